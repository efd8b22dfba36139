"""A worker as Dynamo drives it, without Dynamo: a stand-in has its names."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support import stand_in_dynamo as dynamo
from tests.support.stand_in_dynamo import answered, until

from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.dynamo.worker import EngineWorker, Replica, worker_class
from seekforge.runtime.text.tokenizer import Tokenizer

OPTIONS = {"threads": 1, "num_blocks": 40, "self_check": False}
GREEDY = {"sampling_options": {"temperature": 0.0}}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamo.install(monkeypatch)


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy answers in less than the time between two looks at its counters."""
    monkeypatch.setattr("seekforge.runtime.dynamo.worker._COUNTERS_S", 0.002)


def driven(engine: Path, work: Callable[[Any, Any], Awaitable[Any]], **options: Any) -> Any:
    """Do `work` with a started worker and what it registered as."""

    async def main() -> Any:
        replica = Replica(
            engine=engine,
            tokenizer=Tokenizer(engine / "tokenizer.json"),
            options={**OPTIONS, **options},
            card=Path("/card"),
            name="toy",
        )
        worker: EngineWorker = worker_class()(replica)
        try:
            return await work(worker, await worker.start(1))
        finally:
            await worker.cleanup()
            await worker.cleanup()  # Dynamo may ask twice

    return asyncio.run(main())


def request(prompt: list[int], most: int, **parts: Any) -> dict[str, Any]:
    return {"token_ids": prompt, "stop_conditions": {"max_tokens": most, "ignore_eos": True}, **GREEDY, **parts}


def test_a_worker_registers_what_the_router_has_to_know_and_gives_the_engines_tokens(toy_engine: Path) -> None:
    prompts = [[5, 6, 7 + i] for i in range(4)]
    with LLM(toy_engine, **OPTIONS) as llm:
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        block_size, longest = llm.engine.manifest.cache.block_size, llm.max_model_len

    async def work(worker: Any, config: Any) -> None:
        assert (config.model, config.served_model_name) == ("/card", "toy")
        assert (config.llm.kv_cache_block_size, config.llm.total_kv_blocks) == (block_size, 39)
        assert config.llm.context_length == longest
        answers = await asyncio.gather(*(answered(worker, request(p, 12), str(i)) for i, p in enumerate(prompts)))
        for chunks, tokens in zip(answers, expected, strict=True):
            assert tuple(token for chunk in chunks for token in chunk["token_ids"]) == tokens
            assert [chunk.get("finish_reason") for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
            assert chunks[-1]["completion_usage"]["total_tokens"] == 15
        probe = await worker.health_check_payload()
        assert (await answered(worker, {**request([1], 1), **probe}))[-1]["finish_reason"] == "length"

    driven(toy_engine, work)


def test_the_router_learns_of_prefixes_and_of_their_end(toy_engine: Path) -> None:
    async def work(worker: Any, config: Any) -> None:
        (source,) = await worker.kv_event_sources()
        events = dynamo.KvEvents()
        source.on_ready(events)
        size = config.llm.kv_cache_block_size
        prompt = list(range(1, 2 * size + 2))
        await answered(worker, request(prompt, 1))
        await until(lambda: len(events.stored) == 2)
        first, second = events.stored
        assert first["tokens"] + second["tokens"] == prompt[: 2 * size]
        assert first["parent"] is None and second["parent"] == first["block"]
        again = await answered(worker, request(prompt, 1))
        assert again[-1]["completion_usage"]["prompt_tokens_details"]["cached_tokens"] == 2 * size
        await worker._client.call("reset_prefix_cache")
        await until(lambda: sorted(events.removed) == sorted(one["block"] for one in events.stored))

    driven(toy_engine, work)


def test_a_worker_that_follows_nothing_has_no_source(toy_engine: Path) -> None:
    replica = Replica(
        engine=toy_engine,
        tokenizer=Tokenizer(toy_engine / "tokenizer.json"),
        options=OPTIONS,
        card=Path("/card"),
        name="toy",
        follows_blocks=False,
    )
    assert asyncio.run(worker_class()(replica).kv_event_sources()) == []


def test_counters_have_the_names_that_pickers_read(toy_engine: Path) -> None:
    class Registered:
        text: Any = None

        def register_prometheus_expfmt_callback(self, callback: Any) -> None:
            self.text = callback

    class Snapshots:
        last: Any = None

        def publish(self, rank: int, snapshot: Any) -> None:
            self.last = snapshot

    async def work(worker: Any, config: Any) -> None:
        metrics, snapshots = Registered(), Snapshots()
        await worker.register_prometheus(metrics)
        worker.attach_snapshot_publisher(snapshots)
        assert worker.component_metrics_dp_ranks() == [0]
        await answered(worker, request([1, 2, 3], 5))
        await until(lambda: 'vllm:generation_tokens_total{model_name="toy"} 5.0' in metrics.text())
        for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
            assert f'vllm:{name}{{model_name="toy"}} 0.0' in metrics.text()
        assert 'vllm:request_success_total{finished_reason="length",model_name="toy"} 1.0' in metrics.text()
        await until(lambda: snapshots.last is not None and snapshots.last.kv_cache_hit_rate == 0.0)
        assert (snapshots.last.kv_used_blocks, snapshots.last.kv_total_blocks) == (0, 39)

    driven(toy_engine, work)


def test_what_cannot_be_served_is_the_callers_fault_and_a_full_queue_is_not(toy_engine: Path) -> None:
    async def work(worker: Any, config: Any) -> None:
        for wrong in (request([], 1), request([1], 10**6), request([1], 1, sampling_options={"temperature": -1})):
            with pytest.raises(dynamo.ERRORS["InvalidArgument"]):
                await answered(worker, wrong)
        await worker._client.call("pause")
        waiting = asyncio.create_task(answered(worker, request([1, 2], 2), "waits"))
        await until(lambda: worker._counters["num_waiting"] == 1)
        with pytest.raises(dynamo.ERRORS["CannotConnect"], match="wait"):
            await answered(worker, request([1, 2], 2), "refused")
        await worker._client.call("resume")
        assert (await waiting)[-1]["finish_reason"] == "length"

    driven(toy_engine, work, max_waiting=1)


def test_a_client_that_goes_away_gives_its_blocks_back(toy_engine: Path, looks_often: None) -> None:
    async def work(worker: Any, config: Any) -> None:
        running = asyncio.create_task(answered(worker, request([1, 2], 1000), "gone"))
        await until(lambda: worker._counters["num_running"] == 1)
        await worker.abort(dynamo.Context("gone"))
        assert (await running)[-1]["finish_reason"] == "cancelled"
        await until(lambda: worker._counters["num_running"] == 0)
        await worker.abort(dynamo.Context("gone"))  # it is over

    driven(toy_engine, work)


def test_a_killed_engine_fails_what_was_in_flight_and_ends_the_worker(
    toy_engine: Path, looks_often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    real = os.kill
    monkeypatch.setattr(
        "seekforge.runtime.dynamo.worker.os.kill",
        lambda pid, number: ended.append(number) if pid == os.getpid() else real(pid, number),
    )

    async def work(worker: Any, config: Any) -> None:
        running = asyncio.create_task(answered(worker, request([1, 2], 1000)))
        await until(lambda: worker._counters["num_running"] == 1)
        os.kill(worker._client.process_id, signal.SIGKILL)
        with pytest.raises(dynamo.ERRORS["EngineShutdown"], match="ended by signal 9"):
            await running
        with pytest.raises(dynamo.ERRORS["EngineShutdown"]):
            await answered(worker, request([1], 1))
        await until(lambda: ended == [signal.SIGTERM])
        assert "signal 9" in worker.lost

    driven(toy_engine, work)
