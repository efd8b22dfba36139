"""What goes wrong, in the shape that clients read: a status, and OpenAI's error object. Never a traceback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seekforge.common.errors import EngineError, EnvironmentFault, RequestError, SeekforgeError
from seekforge.runtime.engine.scheduler import QueueFullError
from seekforge.runtime.openai.protocol import BodyError
from seekforge.runtime.server.engine_client import EngineDeadError

#: Status -> what OpenAI calls such an error.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    421: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "server_error",
    503: "service_unavailable",
}


@dataclass(eq=False)
class APIError(Exception):
    """An answer that is an error.

    Attributes:
        status: the status of HTTP.
        message: one line: what came, what was expected, what to do.
        param: the key that is at fault.
        code: what a program may look at.
        allow: methods of HTTP that the path is called with.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    allow: str = ""

    @property
    def kind(self) -> str:
        """What OpenAI calls such an error."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """Return the error object of Anthropic's shape."""
        kinds = {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
        kind = kinds.get(self.status, "api_error" if self.status >= 500 else self.kind)
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def as_api_error(error: BaseException) -> APIError | None:
    """Return what a client is told of an error; None for a bug of ours."""
    match error:
        case APIError():
            return error
        case BodyError():
            return APIError(400, str(error), error.param or None)
        case QueueFullError():
            return APIError(429, str(error), code="queue_full")
        case RequestError():
            return APIError(400, str(error))
        case EngineDeadError():
            return APIError(503, str(error), code="engine_dead")
        case EnvironmentFault():
            return APIError(400, str(error), code="not_installed")
        case EngineError() | SeekforgeError():
            return APIError(500, str(error), code="engine_error")
        case _:
            return None
