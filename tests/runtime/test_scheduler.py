"""Continuous batching on a backend that reads its whole history back through the block tables."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekforge.plugins.errors import RequestError
from seekforge.runtime.backends.null import NullBackend, expected_token
from seekforge.runtime.core import Core
from seekforge.runtime.kv_cache import BlockPool
from seekforge.runtime.sampling import SamplingParams
from seekforge.runtime.scheduler import Iteration, Scheduler
from seekforge.runtime.sequence import Sequence

VOCAB, BLOCK = 97, 4


class Recorder(Scheduler):
    """Keeps every iteration and checks its bounds."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.iterations: list[Iteration] = []

    def schedule(self) -> Iteration:
        plan = super().schedule()
        self.check()
        width = max((row.num_tokens for row in plan.prefill), default=0)
        assert len(plan.prefill) * width + len(plan.decode) <= self.max_num_batched_tokens
        assert 1 <= len(plan.prefill) + len(plan.decode) <= self.max_batch_size
        assert 2 * sum(row.num_tokens for row in plan.prefill) >= len(plan.prefill) * width
        assert all(row.num_tokens == 1 and row.samples for row in plan.decode)
        self.iterations.append(plan)
        return plan


def make(num_blocks: int = 200, batch: int = 4, tokens: int = 32, longest: int = 200) -> tuple[Core, Recorder]:
    backend = NullBackend(VOCAB, 16, BLOCK)
    backend.allocate_caches(num_blocks)
    scheduler = Recorder(
        BlockPool(num_blocks),
        block_size=BLOCK,
        max_batch_size=batch,
        max_num_batched_tokens=tokens,
        max_model_len=longest,
    )
    return Core(backend, scheduler, VOCAB), scheduler


def request(number: int, length: int, count: int, **params) -> Sequence:
    prompt = tuple((number * 13 + i * 7) % VOCAB for i in range(length))
    return Sequence(number, prompt, SamplingParams(temperature=0, max_tokens=count, **params))


def finish(core: Core) -> list[int]:
    """Run to the end; return request ids in the order they ended."""
    order = []
    while core.scheduler.has_work:
        order += [s.request_id for s in core.step() if s.finish_reason is not None]
    return order


def expected(sequence: Sequence) -> list[int]:
    history = list(sequence.prompt_ids)
    for _ in range(sequence.params.max_tokens):
        history.append(expected_token(history, VOCAB))
    return history[len(sequence.prompt_ids) :]


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 12)), min_size=1, max_size=12),
    batch=st.integers(1, 5),
    tokens=st.integers(5, 40),
    num_blocks=st.integers(22, 60),
)
def test_any_mix_gives_what_each_gives_alone(shapes, batch: int, tokens: int, num_blocks: int) -> None:
    core, scheduler = make(num_blocks=num_blocks, batch=batch, tokens=tokens)
    sequences = [request(i, length, count) for i, (length, count) in enumerate(shapes)]
    for sequence in sequences:
        scheduler.add(sequence)
    finish(core)
    for sequence in sequences:
        assert sequence.output_ids == expected(sequence)
        assert sequence.finish_reason == "length" and not sequence.blocks
    scheduler.check()
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    first_runs = [row.sequence.request_id for plan in scheduler.iterations for row in plan.prefill if row.start == 0]
    assert first_runs == sorted(first_runs), "requests must start in the order they came"


def test_a_long_prompt_is_chunked_while_others_decode() -> None:
    core, scheduler = make(tokens=16)
    scheduler.add(request(0, 3, 12))
    core.step()
    scheduler.add(request(1, 50, 2))
    while scheduler.num_waiting or any(row.sequence.request_id == 1 for row in scheduler.iterations[-1].prefill):
        core.step()
        if scheduler.iterations[-1].prefill:
            assert [row.sequence.request_id for row in scheduler.iterations[-1].decode] == [0]
    chunks = [row.num_tokens for plan in scheduler.iterations for row in plan.prefill if row.sequence.request_id == 1]
    assert chunks == [15, 15, 15, 5]


def test_prompts_of_like_length_share_a_rectangle_and_unlike_ones_do_not() -> None:
    core, scheduler = make(tokens=32)
    for number, length in enumerate((10, 8, 2, 3)):
        scheduler.add(request(number, length, 1))
    core.step()
    core.step()
    prefills = [[row.sequence.request_id for row in plan.prefill] for plan in scheduler.iterations]
    assert prefills == [[0, 1, 2], [3]]  # 10 + 8 + 2 of 30 is enough; 4 rows of 10 exceed 32


def test_a_large_request_is_not_starved_by_small_ones_behind_it() -> None:
    core, scheduler = make(num_blocks=11, batch=4, longest=40)
    scheduler.add(request(0, 4, 16))  # 5 blocks of 10
    core.step()
    scheduler.add(request(1, 20, 12))  # 8 blocks: waits for request 0
    for number in range(2, 6):
        scheduler.add(request(number, 2, 2))  # 1 block each would fit at once
    assert finish(core)[0] == 0
    starts = [row.sequence.request_id for plan in scheduler.iterations for row in plan.prefill if row.start == 0]
    assert starts == [0, 1, 2, 3, 4, 5]


def test_abort_frees_blocks_waiting_and_running() -> None:
    core, scheduler = make(batch=1)
    running, waiting = request(0, 9, 5), request(1, 9, 5)
    scheduler.add(running)
    scheduler.add(waiting)
    core.step()
    scheduler.abort(waiting)
    scheduler.abort(running)
    scheduler.abort(running)
    assert (running.finish_reason, waiting.finish_reason) == ("abort", "abort")
    assert not scheduler.has_work and scheduler.pool.num_free == scheduler.pool.num_usable
    scheduler.check()


def test_abort_between_schedule_and_commit_is_skipped() -> None:
    _, scheduler = make()
    sequence = request(0, 5, 3)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    scheduler.abort(sequence)
    scheduler.commit(plan.prefill, {0: 1})
    assert sequence.output_ids == [] and scheduler.pool.num_free == scheduler.pool.num_usable


def test_stop_token_ends_and_min_tokens_bans_it() -> None:
    core, scheduler = make()
    plain = request(0, 5, 8)
    third = expected(plain)[2]
    stopped = Sequence(1, plain.prompt_ids, plain.params, stop_ids=frozenset({third}))
    patient = Sequence(
        2, plain.prompt_ids, SamplingParams(temperature=0, max_tokens=8, min_tokens=8), stop_ids=frozenset({third})
    )
    for sequence in (plain, stopped, patient):
        scheduler.add(sequence)
    finish(core)
    stop_at = plain.output_ids.index(third)
    assert stopped.output_ids == plain.output_ids[: stop_at + 1] and stopped.finish_reason == "stop"
    assert len(patient.output_ids) == 8 and third not in patient.output_ids


@pytest.mark.parametrize(
    ("length", "count", "message"),
    [
        (0, 1, "no tokens"),
        (150, 51, r"prompt 150 \+ max_tokens 51 = 201 tokens, more than max_model_len 200"),
        (100, 61, r"needs 41 cache blocks of 4 tokens, the cache has 40"),
    ],
)
def test_impossible_requests_are_refused_at_once(length: int, count: int, message: str) -> None:
    _, scheduler = make(num_blocks=41)
    with pytest.raises(RequestError, match=message):
        scheduler.add(request(0, length, count))
    assert not scheduler.has_work
