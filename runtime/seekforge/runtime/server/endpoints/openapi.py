"""The OpenAPI document, made from the routes and the records of their bodies."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from starlette.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp

from seekforge.common.records import Record
from seekforge.common.requirements import own_version
from seekforge.runtime.server.context import Call
from seekforge.runtime.server.router import Route

_VERSION: Final = "3.1.0"
#: One attribute of a docstring, or several: names, and a text that may go on in lines further in.
_ATTRIBUTE: Final = re.compile(r"^    (\w+(?:, \w+)*): (.+(?:\n {6,}.+)*)", re.MULTILINE)
_SIMPLE: Final = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
}
_ERRORS: Final = {
    400: "The request cannot be served.",
    401: "No valid key came.",
    404: "There is no such model.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    429: "Too many requests are on their way.",
    500: "The engine failed.",
    503: "The engine is gone, or the server ends.",
}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the document of these routes."""
    schemas: dict[str, Any] = {"Error": _error_schema()}
    paths: dict[str, Any] = {}
    for route in routes:
        operation: dict[str, Any] = {
            "operationId": route.handler.__name__,
            "summary": route.title,
            "responses": {
                "200": {"description": "The answer.", "content": {route.answers: {"schema": {}}}},
                **{
                    str(status): {
                        "description": text,
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                    }
                    for status, text in _ERRORS.items()
                    if route.body is not None or status in (401, 500, 503)
                },
            },
        }
        if route.generates:
            operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        if route.key != "none":
            operation["security"] = [{"key": []}]
        if "{" in route.path:
            operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        if route.body is not None:
            name = _define(route.body, schemas)
            operation["requestBody"] = {
                "required": bool(schemas[name].get("required")),
                "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}},
            }
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": _VERSION,
        "info": {"title": "seekforge", "version": own_version(), "description": "An engine over HTTP."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _error_schema() -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    inner = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": ["message", "type"], "properties": inner}},
    }


def _define(record: type[Record], schemas: dict[str, Any]) -> str:
    """Put the schema of a record among the others; return its name."""
    name = record.__name__
    if name in schemas:
        return name
    schema = schemas[name] = {"type": "object", "properties": {}, "additionalProperties": False}
    described = {
        attribute: " ".join(text.split())
        for base in reversed(record.__mro__)
        for names, text in _ATTRIBUTE.findall(inspect.cleandoc(base.__doc__ or ""))
        for attribute in names.split(", ")
    }
    required = []
    hints = typing.get_type_hints(record, include_extras=True)
    for field, facts in record.model_fields.items():
        schema["properties"][field] = _schema(hints[field], schemas)
        if field in described:
            schema["properties"][field]["description"] = described[field]
        if facts.default is facts.default_factory:  # neither
            required.append(field)
    if required:
        schema["required"] = required
    return name


def _schema(hint: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _schema(arguments[0], schemas)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(one, schemas) for one in arguments]}
    if origin in (list, tuple):
        return {"type": "array", "items": _schema(arguments[0], schemas)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], schemas)}
    if isinstance(hint, type) and issubclass(hint, Record):
        return {"$ref": f"#/components/schemas/{_define(hint, schemas)}"}
    return dict(_SIMPLE[hint])


def handlers(routes: Sequence[Route]) -> tuple[Route, ...]:
    """Return the routes that show the document of these."""

    async def openapi(call: Call) -> ASGIApp:
        """Return the document."""
        return JSONResponse(document(routes))

    async def docs(call: Call) -> ASGIApp:
        """Return a page that lists the endpoints; no foreign host is asked."""
        return HTMLResponse(_page(document(routes)))

    return (
        Route("GET", "/openapi.json", openapi, key="none", title="This document"),
        Route("GET", "/docs", docs, key="none", title="The endpoints as a page", answers="text/html"),
    )


def _page(made: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{method.upper()}</code><td><code>{path}</code><td>{operation['summary']}"
        for path, methods in made["paths"].items()
        for method, operation in methods.items()
    )
    return (
        "<!doctype html><meta charset=utf-8><title>seekforge</title>"
        "<style>body{font:16px system-ui;margin:3rem auto;max-width:48rem}td{padding:.2rem 1rem .2rem 0}</style>"
        f"<h1>Endpoints</h1><table>{rows}</table><p>Bodies and answers: <a href=openapi.json>openapi.json</a>"
    )
