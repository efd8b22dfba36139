"""Which endpoint a request is for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from starlette.types import ASGIApp

from seekforge.common.records import Record
from seekforge.runtime.server.context import Call
from seekforge.runtime.server.errors import APIError

#: The path of one model.
MODELS: Final = "/v1/models/{model}"
Handler = Callable[[Call], Awaitable[ASGIApp]]


@dataclass(frozen=True)
class Route:
    """One endpoint.

    Attributes:
        method, path: how it is called.
        handler: what answers.
        key: whose key is needed: anybody's (none), a user's, or an administrator's.
        body: the record that its body is; None where it takes none.
        generates: it takes the engine's time, and counts among the requests on their way.
        title: what it does, for the OpenAPI document.
        answers: media type of the answer.
        errors: shape of its errors.
    """

    method: str
    path: str
    handler: Handler
    key: Literal["none", "user", "admin"] = "user"
    body: type[Record] | None = None
    generates: bool = False
    title: str = ""
    answers: str = "application/json"
    errors: Literal["openai", "anthropic"] = "openai"


class Router:
    """Finds routes by method and path."""

    def __init__(self, routes: Sequence[Route]) -> None:
        """Take the endpoints of one server."""
        self._routes = {(route.method, route.path): route for route in routes}
        self._paths = {route.path for route in routes}

    def route(self, method: str, path: str) -> Route | None:
        """Return the route of a request; a path may name a model at its end."""
        verb = "GET" if method == "HEAD" else method
        prefix = MODELS.partition("{")[0]
        return self._routes.get((verb, MODELS if path.startswith(prefix) and path != prefix else path))

    def no_route(self, method: str, path: str) -> APIError:
        """Return what a request without a route is refused with: 405 where its path is known, else 404."""
        if path in self._paths:
            can = ", ".join(sorted(known for known, where in self._routes if where == path))
            return APIError(405, f"{path} is not called with {method[:16]!r}, but with {can}", allow=can)
        return APIError(404, f"there is nothing at {path[:200]!r}; /openapi.json lists what there is", code="not_found")
