"""What a server counts, in Prometheus' text form, under our names and under vLLM's, which routers read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
_TOKEN_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS: Final = (1, 8, 64, 256, 1024, 4096, 16384, 65536, 131072)
_OURS, _VLLM = b"seekforge:", b"vllm:"


class Metrics:
    """The counters of one server."""

    def __init__(self, model_name: str, facts: Mapping[str, Any]) -> None:
        """Make them.

        Args:
            model_name: the label of all of them.
            facts: the engine's (`engine_process.facts`).
        """
        self._registry = CollectorRegistry()
        self._own_registry = CollectorRegistry()  # without a counterpart at vLLM
        self._model = model_name
        self._gauges = {
            name: self._one(Gauge, name, text)
            for name, text in (
                ("num_requests_running", "Completions that hold cache blocks."),
                ("num_requests_waiting", "Completions that wait."),
                ("kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1."),
            )
        }
        self._totals = {
            name: self._one(Counter, name, text)
            for name, text in (
                ("prompt_tokens", "Prompt tokens, computed or found in the prefix cache."),
                ("generation_tokens", "Tokens generated."),
                ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
                ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
                ("num_preemptions", "Completions that lost their blocks and were computed anew."),
                ("spec_decode_num_draft_tokens", "Tokens drafted."),
                ("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted."),
            )
        }
        self._before = dict.fromkeys(self._totals, 0.0)
        self._first = self._one(Histogram, "time_to_first_token_seconds", "To the first token.", buckets=_LATENCY_S)
        self._between = self._one(Histogram, "inter_token_latency_seconds", "Between tokens.", buckets=_TOKEN_S)
        self._whole = self._one(Histogram, "e2e_request_latency_seconds", "Of whole requests.", buckets=_LATENCY_S)
        self._prompt = self._one(Histogram, "request_prompt_tokens", "Tokens of a prompt.", buckets=_TOKENS)
        self._generated = self._one(Histogram, "request_generation_tokens", "Tokens of an answer.", buckets=_TOKENS)
        self._ended = Counter(
            f"{_OURS.decode()}request_success",
            "Requests that ended.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        Gauge(
            f"{_OURS.decode()}cache_config_info",
            "The cache.",
            ("model_name", "block_size", "num_gpu_blocks"),
            registry=self._registry,
        ).labels(model_name, facts["block_size"], facts["num_blocks"]).set(1)
        self._answers = Counter(
            f"{_OURS.decode()}http_requests", "Answers.", ("path", "status"), registry=self._own_registry
        )
        self._num_usable = max(facts["num_blocks"] - 1, 1)

    def _one(self, kind: Any, name: str, text: str, **more: Any) -> Any:
        made = kind(f"{_OURS.decode()}{name}", text, ("model_name",), registry=self._registry, **more)
        return made.labels(model_name=self._model)

    def answered(self, path: str, status: int) -> None:
        """Count an answer."""
        self._answers.labels(path=path, status=str(status)).inc()

    def timer(self) -> RequestTimer:
        """Return what takes the times of one request."""
        return RequestTimer(self)

    def text(self, engine: Mapping[str, Any]) -> bytes:
        """Return all of it.

        Args:
            engine: the engine's counters now (`LLMMetrics`).
        """
        for name, value in (
            ("num_requests_running", engine["num_running"]),
            ("num_requests_waiting", engine["num_waiting"]),
            ("kv_cache_usage_perc", 1 - engine["num_free_blocks"] / self._num_usable),
        ):
            self._gauges[name].set(value)
        for name, value in (
            ("prompt_tokens", engine["num_queried_tokens"]),
            ("generation_tokens", engine["num_sampled"]),
            ("prefix_cache_queries", engine["num_queried_tokens"]),
            ("prefix_cache_hits", engine["num_hit_tokens"]),
            ("num_preemptions", engine["num_preemptions"]),
            ("spec_decode_num_draft_tokens", sum(engine["drafts_proposed"])),
            ("spec_decode_num_accepted_tokens", sum(engine["drafts_accepted"])),
        ):
            self._totals[name].inc(max(value - self._before[name], 0))
            self._before[name] = value
        ours = generate_latest(self._registry)
        return ours + ours.replace(_OURS, _VLLM) + generate_latest(self._own_registry)


class RequestTimer:
    """The times of one request, from its arrival."""

    __slots__ = ("_began", "_last", "_metrics")

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.perf_counter()
        self._last = 0.0

    def came(self) -> None:
        """Some tokens came."""
        now = time.perf_counter()
        if self._last:
            self._metrics._between.observe(now - self._last)
        else:
            self._metrics._first.observe(now - self._began)
        self._last = now

    def ended(self, reason: str, num_prompt: int, num_generated: int) -> float:
        """It is over; returns the seconds that it took."""
        metrics, seconds = self._metrics, time.perf_counter() - self._began
        metrics._ended.labels(metrics._model, reason).inc()
        metrics._whole.observe(seconds)
        metrics._prompt.observe(num_prompt)
        metrics._generated.observe(num_generated)
        return seconds
