"""What surrounds the handler of every HTTP request: its id, key, body within bounds, and one line in the log.

Plain ASGI: whatever raises below ends as an error object with a status.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seekforge.common.reading import parse_json
from seekforge.runtime.server import tracing
from seekforge.runtime.server.context import Call, Context
from seekforge.runtime.server.errors import APIError, as_api_error
from seekforge.runtime.server.router import Route, Router
from seekforge.runtime.server.sse import ClientGoneError

log = logging.getLogger("seekforge.server")

#: Ids that a caller may give a request; anything else is replaced.
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: Status of an answer that nobody waits for any more, as nginx counts it.
_CLIENT_GONE: Final = 499


class RequestMiddleware:
    """An ASGI application around the handlers of a router."""

    def __init__(self, context: Context, router: Router) -> None:
        """Serve the endpoints of `router`, with the settings of `context`."""
        self._context = context
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began = time.perf_counter()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        wish = headers.get("x-request-id", "")
        request_id = wish if _ID.fullmatch(wish) else secrets.token_hex(12)
        method, path = scope["method"], scope["path"]
        route = self._router.route(method, path)
        call = Call(self._context, request_id, path, None, receive, "openai" if route is None else route.errors)
        status = 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name.lower() for name, _ in message["headers"]}
                if b"x-request-id" not in names:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        counted = False
        span = tracing.begin(method, "" if route is None else route.path, headers, self._context.model_name)
        try:
            self._check_host(headers)
            if route is None:
                raise self._router.no_route(method, path)
            self._check_key(route, headers)
            if route.body is not None:
                call.body = await self._body_in_time(headers, receive)
            if route.generates:
                self._enter()
                counted = True
            answer = await route.handler(call)
            await answer(scope, receive, note)
        except ClientGoneError:
            status = _CLIENT_GONE
        except Exception as error:
            told = as_api_error(error)
            if told is None:
                log.exception("request %s", request_id)
                told = APIError(500, f"an internal error; the log has it under {request_id}")
            call.log |= {"error": told.code or told.kind}  # no message: it may hold a prompt
            head = (told.param or "").partition(".")[0]
            if route is not None and route.body is not None and head in route.body.model_fields:
                call.log["param"] = head  # a name of ours; any other was made up by the caller
            if not status:
                with contextlib.suppress(OSError):
                    await _error_response(told, route)(scope, receive, note)
            status = status if status == told.status else told.status
        finally:
            self._context.num_running -= counted
            seconds = time.perf_counter() - began
            self._context.metrics.answered("other" if route is None else route.path, status)
            line = {"request_id": request_id, "method": method, "path": path[:200], "status": status} | call.log
            tracing.end(span, line)
            level = logging.DEBUG if route is not None and route.key == "none" else logging.INFO
            log.log(level, "%s", json.dumps(line | {"seconds": round(seconds, 4)}))

    def _check_host(self, headers: Mapping[str, str]) -> None:
        """Refuse a request that was sent to another name: a page of that name may have led it to this machine.

        Raises:
            APIError: 421.
        """
        allowed = self._context.settings.allowed_hosts
        if allowed is None:
            return
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if name.lower() not in allowed:
            raise APIError(421, "the request was sent to a name that is none of this server's; --host gives it others")

    def _check_key(self, route: Route, headers: Mapping[str, str]) -> None:
        """Refuse a caller without the key that the route needs.

        Raises:
            APIError: 401; or 404 for an administrator's route of a server that has none.
        """
        settings = self._context.settings
        keys = {"none": (), "user": (*settings.api_keys,), "admin": (*settings.admin_keys,)}[route.key]
        if route.key == "admin" and not keys:
            raise APIError(404, f"{route.path} needs a server that was started with --admin-key", code="not_found")
        if route.key == "user" and keys:
            keys = (*keys, *settings.admin_keys)
        if not keys:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        shown = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        matches = [hmac.compare_digest(shown.encode(), key.encode()) for key in keys]  # all, whichever is right
        if not any(matches):
            raise APIError(
                401,
                "no valid API key came; send it as 'Authorization: Bearer KEY' (or x-api-key)",
                code="invalid_api_key",
            )

    async def _body_in_time(self, headers: Mapping[str, str], receive: Receive) -> Any:
        """Return the decoded body; errors as `_body`, and 408 for one that does not come."""
        seconds = self._context.settings.read_timeout_s
        try:
            async with asyncio.timeout(seconds):
                return await self._body(headers, receive)
        except TimeoutError:
            raise APIError(408, f"the body was not there after {seconds:g} seconds; send it again") from None

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> Any:
        """Return the decoded body.

        Raises:
            APIError: it is too large, no JSON, or of another type.
        """
        most = self._context.settings.max_body_bytes
        too_large = APIError(413, f"the body is larger than {most:,} bytes; the server's --max-body-size says so")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise too_large
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        wrong_type = APIError(415, f"the body's content-type is {kind[:80]!r}, expected 'application/json'")
        is_json = kind == "application/json" or kind.endswith("+json")
        if kind and not is_json:
            raise wrong_type
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            if not message.get("more_body"):
                break
        if size and not is_json:  # a page of another origin may send a body without a type, unasked
            raise wrong_type
        try:
            return parse_json(b"".join(parts)) if size else {}
        except ValueError as error:
            raise APIError(400, f"the body is not valid JSON ({error})") from None

    def _enter(self) -> None:
        """Count a request that takes the engine's time.

        Raises:
            APIError: 503 while draining, 429 with too many on their way.
        """
        context = self._context
        if context.draining:
            raise APIError(503, f"{context.draining}; try another replica", code="draining")
        if context.num_running >= context.settings.max_requests:
            raise APIError(
                429,
                f"{context.num_running} requests are on their way, which is the most; try again later",
                code="queue_full",
            )
        context.num_running += 1


def _error_response(error: APIError, route: Route | None) -> ASGIApp:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    if error.allow:
        headers["allow"] = error.allow
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if route is not None and route.errors == "anthropic":
        return JSONResponse(error.anthropic_body(), error.status, headers)
    return JSONResponse(error.body(), error.status, headers)
