"""What goes wrong stays with its request: nothing hangs, no block leaks, the cache never serves what is in doubt."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seekforge.common.errors import EngineError
from seekforge.runtime import LLM, AsyncLLM, Engine, GenerationError, QueueFullError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class Faulty:
    """A backend that does something at its n-th step, and otherwise what the real one does."""

    def __init__(self, backend, at: int, fault: Callable[[dict], None]) -> None:
        self.backend, self.at, self.fault, self.count = backend, at, fault, 0

    def __getattr__(self, name: str):
        return getattr(self.backend, name)

    def run(self, inputs, *, outputs, graph="model"):
        self.count += 1
        results = self.backend.run(inputs, outputs=outputs, graph=graph)
        if self.count != self.at:
            return results
        values = {name: results.fetch(name).copy() for name in outputs}
        self.fault(values)
        return type("Results", (), {"fetch": lambda self, name: values[name]})()


@pytest.fixture
def llm(toy_engine: Path):
    with LLM(toy_engine, threads=1, num_blocks=40) as llm:
        yield llm
        assert not llm._turns.live and llm._scheduler.cache.pool.num_free == llm._scheduler.cache.pool.num_usable
        llm._scheduler.check()


def break_at(llm: LLM, at: int, fault: Callable[[dict], None]) -> Faulty:
    llm._core.backend = Faulty(llm._core.backend, at, fault)
    return llm._core.backend


def throw(error: BaseException) -> Callable[[dict], None]:
    def fault(values: dict) -> None:
        raise error

    return fault


@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), MemoryError(), OSError(2, "no such file")])
@pytest.mark.parametrize("at", [1, 3])
def test_a_step_that_raises_fails_its_requests_and_no_others(llm: LLM, toy, error: Exception, at: int) -> None:
    prompt = list(range(20, 150))
    break_at(llm, at, throw(error))
    with pytest.raises(GenerationError, match=f"1 of 1 requests failed; prompt 0: {type(error).__name__}") as caught:
        llm.generate(prompt, GREEDY)
    assert caught.value.outputs[0].outputs[0].finish_reason == "error"
    assert llm._scheduler.cache.pool.num_published == 0
    assert list(llm.generate(prompt, GREEDY)[0].outputs[0].token_ids) == toy.greedy(prompt, 8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_their_request_only(llm: LLM, toy, value: float) -> None:
    prompts = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]

    def poison(values: dict) -> None:
        values["logsumexp"][1] = value

    break_at(llm, 3, poison)
    with pytest.raises(GenerationError, match=r"1 of 3 .*prompt 1: the logits of request 2 at position 4") as caught:
        llm.generate(prompts, GREEDY)
    outputs = [output.outputs[0] for output in caught.value.outputs]
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert list(outputs[0].token_ids) == toy.greedy(prompts[0], 8)
    assert list(outputs[1].token_ids) == toy.greedy(prompts[1], 2)


def test_an_interrupt_ends_what_ran_and_leaves_the_engine_usable(llm: LLM, toy) -> None:
    break_at(llm, 2, throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7], [8, 9]], GREEDY)
    assert list(llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids) == toy.greedy([5, 6, 7], 8)


def test_a_stream_raises_in_place_of_its_last_delta(llm: LLM) -> None:
    break_at(llm, 3, throw(RuntimeError("gone")))
    stream = llm.stream([5, 6, 7], GREEDY)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(GenerationError, match="RuntimeError: gone"):
        next(stream)


def test_a_listener_that_raises_fails_its_request(llm: LLM) -> None:
    stream = llm.stream([5, 6, 7], GREEDY)
    next(stream)
    live = next(iter(llm._turns.live.values()))

    def broken(token: int) -> bool:
        raise ValueError("listener")

    live.sequences[0].on_token = broken
    with pytest.raises(GenerationError, match="ValueError: listener"):
        list(stream)


def test_an_engine_whose_files_vanish(toy_copy: Path) -> None:
    engine = Engine.open(toy_copy)
    with LLM(engine, threads=1, num_blocks=9) as llm:
        shutil.rmtree(toy_copy)
        assert len(llm.generate([5, 6], GREEDY)[0].outputs[0].token_ids) == 8  # loaded already
    with pytest.raises(EngineError):
        LLM(engine, threads=1, num_blocks=9)


def test_siblings_end_with_the_first_when_its_prompt_fails(llm: LLM) -> None:
    break_at(llm, 1, throw(RuntimeError("gone")))
    with pytest.raises(GenerationError) as caught:
        llm.generate([5, 6, 7], replace(GREEDY, n=3))
    assert [c.finish_reason for c in caught.value.outputs[0].outputs] == ["error"] * 3


def test_timeouts_end_with_what_there_is(llm: LLM) -> None:
    (output,) = llm.generate([5, 6, 7], replace(GREEDY, max_tokens=1000), timeout_s=0.05)
    assert output.outputs[0].finish_reason == "timeout"
    (late,) = llm.generate([5, 6, 7], GREEDY, timeout_s=0.0)
    assert late.outputs[0].finish_reason == "timeout" and late.outputs[0].token_ids == ()


def test_many_threads_share_the_steps(llm: LLM, toy) -> None:
    results: dict[int, list[int]] = {}

    def work(number: int) -> None:
        prompt = [number + 3, 5, 7]
        if number % 2:
            results[number] = list(llm.generate(prompt, GREEDY)[0].outputs[0].token_ids)
        else:
            results[number] = [t for delta in llm.stream(prompt, GREEDY) for t in delta.token_ids]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {n: toy.greedy([n + 3, 5, 7], 8) for n in range(12)}
    assert llm.metrics().num_sampled == 12 * 8


def test_async_requests_share_the_steps_and_cancelling_frees_them(toy_engine: Path, toy) -> None:
    async def main() -> None:
        async with AsyncLLM(toy_engine, threads=1, num_blocks=40, max_waiting=6) as llm:
            outputs = await asyncio.gather(*(llm.generate([n + 3, 5], GREEDY) for n in range(6)))
            assert [list(o.outputs[0].token_ids) for o in outputs] == [toy.greedy([n + 3, 5], 8) for n in range(6)]
            long = asyncio.create_task(llm.generate([5, 6], replace(GREEDY, max_tokens=900)))
            await asyncio.sleep(0.05)
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long
            with pytest.raises(QueueFullError):
                await llm.generate([5, 6], replace(GREEDY, n=7))
            texts = [delta.text async for delta in llm.stream("the cat", GREEDY)]
            assert "".join(texts) == llm.llm.generate("the cat", GREEDY)[0].outputs[0].text
            llm.llm._core.backend = Faulty(llm.llm._core.backend, 1, throw(RuntimeError("gone")))
            with pytest.raises(GenerationError, match="gone"):
                await llm.generate([5, 6], GREEDY)
            pool = llm.llm._scheduler.cache.pool
            assert pool.num_free == pool.num_usable

    asyncio.run(asyncio.wait_for(main(), 60))


def test_closing_ends_what_is_on_its_way(toy_engine: Path) -> None:
    async def main() -> None:
        llm = AsyncLLM(toy_engine, threads=1, num_blocks=40)
        running = asyncio.create_task(llm.generate([5, 6], replace(GREEDY, max_tokens=1000)))
        await asyncio.sleep(0.05)
        await llm.close()
        assert (await running).outputs[0].finish_reason == "abort"
        with pytest.raises(EngineError, match="closed"):
            await llm.generate([5, 6], GREEDY)

    asyncio.run(asyncio.wait_for(main(), 60))
