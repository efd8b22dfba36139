"""Continuous batching on a backend that reads its whole history back through the block tables."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekforge.common.errors import RequestError
from seekforge.runtime.backends.null import NullBackend, expected_token
from seekforge.runtime.block_table import BlockTable
from seekforge.runtime.engine.core import Core
from seekforge.runtime.engine.iteration import Iteration, verify_width
from seekforge.runtime.engine.kv_cache import BlockPool, KvCache
from seekforge.runtime.engine.scheduler import PRIORITY_STEPS, QueueFullError, Scheduler
from seekforge.runtime.engine.speculative import SpeculationSwitch, Speculator
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.sequence import Sequence

VOCAB, BLOCK = 97, 4


class Recorder(Scheduler):
    """Keeps every iteration and checks its bounds."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.iterations: list[Iteration] = []

    def schedule(self, *, verify: bool = True) -> Iteration:
        plan = super().schedule(verify=verify)
        self.check()
        areas = [0]
        for group in plan.groups:
            width = max(row.num_tokens for row in group)
            assert 4 * sum(row.num_tokens for row in group) >= 3 * len(group) * width, "more than 25 % padding"
            areas.append(len(group) * width)
        assert sum(areas) <= self.max_num_batched_tokens
        assert 1 <= len(plan.prefill) + len(plan.decode) <= self.max_batch_size
        assert all(row.num_tokens == 1 + row.num_drafts and row.samples for row in plan.decode)
        self.iterations.append(plan)
        return plan

    def commit(self, group) -> None:
        super().commit(group)
        self.check()


def make(
    num_blocks: int = 200,
    batch: int = 4,
    tokens: int = 32,
    longest: int = 200,
    drafts: int = 0,
    draft_period: int = 3,
    switch: SpeculationSwitch | None = None,
    **options,
) -> tuple[Core, Recorder]:
    backend = NullBackend(VOCAB, 16, BLOCK, draft_period=draft_period)
    backend.allocate_caches(num_blocks)
    scheduler = Recorder(
        KvCache(BlockPool(num_blocks), BLOCK, lookahead=int(drafts > 0)),
        max_batch_size=batch,
        max_num_batched_tokens=tokens,
        max_model_len=longest,
        **options,
    )
    speculator = Speculator(backend, drafts, BLOCK, VOCAB) if drafts else None
    return Core(backend, scheduler, VOCAB, speculator=speculator, switch=switch), scheduler


def request(
    number: int, length: int, count: int, *, prompt: tuple[int, ...] = (), drafts: int = 0, **fields
) -> Sequence:
    prompt = prompt or tuple((number * 13 + i * 7) % VOCAB for i in range(length))
    known = {name: fields.pop(name) for name in ("priority", "deadline_s", "siblings", "stop_ids") if name in fields}
    params = SamplingParams(temperature=0, max_tokens=count, **fields)
    return Sequence(number, prompt, params, speculates=drafts > 0, table=BlockTable(b"root"), **known)


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


def check_idle(scheduler: Scheduler) -> None:
    scheduler.check()
    assert not scheduler.has_work
    assert scheduler.cache.pool.num_free == scheduler.cache.pool.num_usable


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 12), st.integers(0, 40)), min_size=1, max_size=12),
    batch=st.integers(1, 5),
    tokens=st.integers(5, 40),
    num_blocks=st.integers(22, 60),
    drafts=st.integers(0, 5),
)
def test_any_mix_gives_what_each_gives_alone(shapes, batch: int, tokens: int, num_blocks: int, drafts: int) -> None:
    """Lengths, shared beginnings, a cache that is too small for all, drafts of which some are wrong."""
    core, scheduler = make(num_blocks=num_blocks, batch=batch, tokens=tokens, drafts=drafts)
    common = [(i * 5) % VOCAB for i in range(40)]
    sequences = []
    for number, (length, count, shared) in enumerate(shapes):
        own = [(number * 13 + i * 7) % VOCAB for i in range(length)]
        prompt = tuple([*common[: min(shared, length)], *own][:length])
        sequences.append(request(number, length, count, prompt=prompt, drafts=drafts))
        scheduler.add(sequences[-1])
    finish(core)
    for sequence in sequences:
        assert sequence.output_ids == expected(sequence)
        assert sequence.finish_reason == "length" and not sequence.table.blocks
    check_idle(scheduler)
    if drafts == 0:
        assert all(row.num_drafts == 0 for plan in scheduler.iterations for row in plan.decode)


def test_right_drafts_save_steps_and_are_counted() -> None:
    steps = {}
    for drafts in (0, 3):
        core, scheduler = make(drafts=drafts, draft_period=0)
        scheduler.add(request(0, 9, 41, drafts=drafts))
        finish(core)
        steps[drafts] = len(scheduler.iterations)
        if core.speculator is not None:
            metrics = core.speculator.metrics
            assert metrics.proposed == metrics.accepted and metrics.proposed[0] > 8
    assert steps[0] == 41 and steps[3] <= 16
    core, scheduler = make(drafts=3, draft_period=2)
    scheduler.add(request(0, 9, 41, drafts=3))
    finish(core)
    proposed, accepted = core.speculator.metrics.proposed, core.speculator.metrics.accepted
    assert proposed[0] > accepted[0] > accepted[1] > accepted[2]


@pytest.mark.parametrize("diverge", [7, 8, 9, 11, 12, 13])
def test_two_prompts_that_part_at_a_block_border_share_no_wrong_mtp_entry(diverge: int) -> None:
    """The null backend checks every MTP entry it reads: one more shared block would hold a foreign last entry."""
    core, scheduler = make(drafts=2, draft_period=0)
    first = tuple(range(20))
    second = (*first[:diverge], *(90 - i for i in range(20 - diverge)))
    sequences = [request(0, 0, 9, prompt=first, drafts=2), request(1, 0, 9, prompt=second, drafts=2)]
    for sequence in sequences:
        scheduler.add(sequence)
        finish(core)
        assert sequence.output_ids == expected(sequence)
    assert sequences[1].num_cached_tokens == (diverge - 1) // BLOCK * BLOCK


def test_a_prompt_computed_before_is_not_computed_again() -> None:
    core, scheduler = make(tokens=64)
    first = request(0, 30, 4)
    turn = request(1, 0, 4, prompt=(*first.prompt_ids, *expected(first), 5, 6))
    for sequence, cached in ((first, 0), (request(2, 0, 4, prompt=first.prompt_ids), 28), (turn, 32)):
        scheduler.add(sequence)
        finish(core)
        assert sequence.num_cached_tokens == cached
        assert sequence.output_ids == expected(sequence)
    assert scheduler.cache.num_hit_tokens == 60
    foreign = request(3, 0, 4, prompt=first.prompt_ids)
    foreign.table.root = b"other numerics"
    scheduler.add(foreign)
    finish(core)
    assert foreign.num_cached_tokens == 0


def test_siblings_share_the_prompt() -> None:
    core, scheduler = make(batch=4, tokens=64)
    prompt = tuple(range(22))
    siblings = tuple(request(n, 0, 6, prompt=prompt) for n in (1, 2))
    first = request(0, 0, 6, prompt=prompt, siblings=siblings)
    scheduler.add(first)
    core.step()
    assert scheduler.num_waiting == 2
    core.step()
    tables = [s.table.blocks for s in (first, *siblings)]
    assert tables[0][:5] == tables[1][:5] == tables[2][:5] and len({t[5] for t in tables}) == 3
    finish(core)
    assert [s.num_cached_tokens for s in siblings] == [20, 20]
    assert all(s.output_ids == expected(first) for s in (first, *siblings))
    check_idle(scheduler)


def test_preemption_takes_the_youngest_and_it_resumes_at_its_place() -> None:
    core, scheduler = make(num_blocks=13, batch=4, longest=48, tokens=40)
    sequences = [request(n, 7, 30) for n in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    finish(core)
    assert scheduler.num_preemptions > 0
    assert sequences[0].num_preemptions == 0
    for sequence in sequences:
        assert sequence.output_ids == expected(sequence)
    check_idle(scheduler)


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
    for number, length in enumerate((10, 2, 8, 3)):
        scheduler.add(request(number, length, 1))
    core.step()
    core.step()
    prefills = [[row.sequence.request_id for row in plan.prefill] for plan in scheduler.iterations]
    assert prefills == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("lengths", "most", "width"),
    [([1, 1, 4], 9, 1), ([4, 4, 1], 9, 4), ([4, 4, 4], 2, 2), ([6, 3, 3], 9, 4), ([1], 5, 1)],
)
def test_verify_width_keeps_three_quarters_full(lengths: list[int], most: int, width: int) -> None:
    assert verify_width(lengths, most) == width


def test_a_large_request_is_not_starved_by_small_ones_behind_it() -> None:
    core, scheduler = make(num_blocks=11, batch=4, longest=40)
    scheduler.add(request(0, 16, 4))
    core.step()
    scheduler.add(request(1, 28, 12))  # 7 blocks of 10, 5 are held: waits for request 0
    for number in range(2, 6):
        scheduler.add(request(number, 2, 2))  # 1 block each would fit at once
    assert finish(core)[0] == 0
    starts = [row.sequence.request_id for plan in scheduler.iterations for row in plan.prefill if row.start == 0]
    assert starts == [0, 1, 2, 3, 4, 5]


def test_nobody_starves_under_constant_load_of_a_higher_priority() -> None:
    """The bound: a request waits for those that came before it, or within PRIORITY_STEPS per level after it."""
    core, scheduler = make(batch=2)
    scheduler._iteration = 10
    low = request(0, 4, 2, priority=1)
    scheduler.add(low)
    number = 0
    while low.finish_reason is None:
        while scheduler.num_waiting < 3:
            number += 1
            scheduler.add(request(number, 4, 2))
        core.step()
        assert len(scheduler.iterations) <= PRIORITY_STEPS + 12
    assert len(scheduler.iterations) >= PRIORITY_STEPS
    urgent = request(10**6, 4, 1, priority=-1)
    scheduler.add(urgent)
    for _ in range(4):
        core.step()
    assert urgent.finish_reason == "length"


def test_the_queue_is_bounded() -> None:
    _, scheduler = make(max_waiting=2)
    scheduler.add(request(0, 4, 2))
    with pytest.raises(QueueFullError, match="1 requests wait, of at most 2, and 2 more came"):
        scheduler.check_queue(2)
    scheduler.check_queue(1)


def test_deadlines_end_requests_waiting_and_running() -> None:
    core, scheduler = make(batch=1)
    now = time.monotonic()
    running, waiting, patient = (
        request(0, 4, 90, deadline_s=now + 0.2),
        request(1, 4, 5, deadline_s=now),
        request(2, 4, 3),
    )
    for sequence in (running, waiting, patient):
        scheduler.add(sequence)
    assert [s.request_id for s in core.step()] == [1, 0]
    assert waiting.finish_reason == "timeout"
    time.sleep(0.21)
    finish(core)
    assert running.finish_reason == "timeout" and running.output_ids == expected(running)[: len(running.output_ids)]
    assert patient.output_ids == expected(patient)
    check_idle(scheduler)


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
    check_idle(scheduler)


def test_abort_between_schedule_and_commit_is_skipped() -> None:
    _, scheduler = make()
    sequence = request(0, 5, 3)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    scheduler.abort(sequence)
    scheduler.commit(plan.prefill)
    assert sequence.output_ids == []
    check_idle(scheduler)


def test_cancelled_requests_leave_no_trace_in_the_queue() -> None:
    _, scheduler = make()
    for number in range(500):
        sequence = request(number, 5, 3, deadline_s=time.monotonic() + 1000)
        scheduler.add(sequence)
        scheduler.abort(sequence)
    assert len(scheduler._waiting) + len(scheduler._deadlines) < 50


def test_stop_token_ends_and_min_tokens_bans_it() -> None:
    core, scheduler = make()
    plain = request(0, 5, 8)
    third = expected(plain)[2]
    stopped = request(1, 0, 8, prompt=plain.prompt_ids, stop_ids=frozenset({third}))
    patient = request(2, 0, 8, prompt=plain.prompt_ids, stop_ids=frozenset({third}), min_tokens=8)
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
        scheduler.add(request(0, length, count) if length else Sequence(0, (), SamplingParams(max_tokens=count)))
    assert not scheduler.has_work


def test_drafting_that_does_not_pay_is_switched_off_and_tried_again() -> None:
    switch = SpeculationSwitch(probe_every=4, rest=20)
    for _ in range(6):
        assert not switch.record(1, model_s=1.0, draft_s=0.5, num_tokens=1, verified=True)
    assert not switch.record(1, model_s=0.9, draft_s=0.5, num_tokens=1, verified=False)
    assert switch.record(1, model_s=1.0, draft_s=0.5, num_tokens=1, verified=True) and not switch.on
    for _ in range(20):
        switch.record(1, model_s=1.0, draft_s=0.0, num_tokens=1, verified=False)
    assert switch.on
    good = SpeculationSwitch(probe_every=4)
    for step in range(100):
        assert not good.record(
            1, model_s=1.0, draft_s=0.5, num_tokens=1 if step % 4 == 3 else 2, verified=step % 4 != 3
        )


def test_after_the_switch_tokens_are_the_same_and_nothing_half_computed_is_shared() -> None:
    switch = SpeculationSwitch(probe_every=2, rest=10, margin=0.0)
    core, scheduler = make(drafts=2, switch=switch, tokens=64)
    first = request(0, 9, 40, drafts=2)
    scheduler.add(first)
    finish(core)
    assert not first.speculates and first.output_ids == expected(first)
    again = request(1, 0, 9, prompt=(*first.prompt_ids, *first.output_ids), drafts=2)
    scheduler.add(again)
    finish(core)
    assert again.output_ids == expected(again) and again.num_cached_tokens < 40
