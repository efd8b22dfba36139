"""OpenTelemetry: a span for each request where its packages are there and configured, and nothing where they are not.

Names of attributes are those of OpenTelemetry's semantic conventions for HTTP and for generative models. No text of a
prompt or an answer is among them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final

#: Key of a line in the log -> attribute of its span.
_ATTRIBUTES: Final = {
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "error": "error.type",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "request_id": "seekforge.request_id",
}
_SERVER_ERROR: Final = 500


@functools.cache
def _packages() -> tuple[Any, Any] | None:
    try:
        from opentelemetry import propagate, trace  # whoever traces has them; seekforge does not bring them
    except ModuleNotFoundError:
        return None
    return propagate, trace


def begin(method: str, route: str, headers: Mapping[str, str], model: str) -> Any:
    """Return the span of a request, a child of the one that its headers name; None where nobody traces."""
    packages = _packages()
    if packages is None:
        return None
    propagate, trace = packages
    return trace.get_tracer("seekforge").start_span(
        f"{method} {route}",
        context=propagate.extract(headers),
        kind=trace.SpanKind.SERVER,
        attributes={"http.route": route, "gen_ai.request.model": model, "gen_ai.provider.name": "seekforge"},
    )


def end(span: Any, line: Mapping[str, Any]) -> None:
    """End a span with what the log says of the request."""
    if span is None:
        return
    packages = _packages()
    assert packages is not None
    for key, attribute in _ATTRIBUTES.items():
        if line.get(key) is not None:
            span.set_attribute(attribute, line[key])
    if line["status"] >= _SERVER_ERROR:
        span.set_status(packages[1].StatusCode.ERROR)
    span.end()
