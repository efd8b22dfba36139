"""Requests are spans where somebody traces."""

from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.runtime.server.test_middleware import ASK, CHAT, call, until
from tests.support.scripted_engine import live_server

from seekforge.runtime.server import tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_request_is_a_span_below_that_of_its_caller(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    with live_server(tiny_checkpoint, lambda prompt: "It rains.") as server:
        call(server, "POST", CHAT, ASK, {"traceparent": PARENT})
        call(server, "POST", CHAT, ASK | {"temperature": "a secret"})
        until(lambda: len(spans.get_finished_spans()) == 2)
    good, bad = spans.get_finished_spans()
    assert good.name == f"POST {CHAT}" and f"{good.parent.span_id:x}" == PARENT.split("-")[2]
    assert good.attributes["gen_ai.usage.input_tokens"] > 0 and good.attributes["gen_ai.usage.output_tokens"] > 0
    assert bad.attributes["http.response.status_code"] == 400
    assert "secret" not in str([span.to_json() for span in spans.get_finished_spans()])


def test_without_its_packages_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_packages", lambda: None)
    assert tracing.begin("GET", "/", {}, "model") is None
    tracing.end(None, {})
