"""The model of a launch: what each roof is, and that a change of the code changes the estimate that it should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from seekforge.common.errors import TargetError
from seekforge.formats.targets import all_targets, load_target
from seekforge.plugins.cost import model
from seekforge.plugins.cost.card import Card, card_of
from seekforge.plugins.cost.model import Kernel, estimate, shape_of
from seekforge.plugins.cost.work import Work
from seekforge.plugins.kernels.kernel_set import Resources
from seekforge.plugins.kernels.sass import Body, Code

#: 100 SMs at 1 GHz, 1 TB/s, 4,096 BF16 FLOPs per clock and SM.
CARD = Card("test", 90, 100, 1e9, 1e12, 4096.0, True)
WORK = Work(
    read_bytes=9_000_000,
    written_bytes=0,
    loaded_bytes=9_000_000,
    programs=100,
    flops=1,
    pass_flops=2 * 128 * 128 * 128,
    products="fp8",
    passes=(10,),
)
#: One pass of a [128, 128] tile by two warpgroups: 4 instructions of each, beside 60 others.
TILE = {"QGMMA.64x128x32.F32.E4M3.E4M3": 4}
BODY = Body(
    kinds={"tensor": 4, "integer": 50, "global": 6, "sync": 4}, barriers=2, waits=False, copies=True, tensor=TILE
)
CODE = Code(100, TILE, 0, 0, None, bodies=(BODY,), kinds={"tensor": 4, "integer": 96})
KERNEL = Kernel(
    Resources(registers=128, stack_bytes=0, shared_bytes=100_000, tensor_columns=0, occupancy=0.25), 8, 3, CODE
)


def test_each_roof_by_hand() -> None:
    found = estimate(WORK, KERNEL, CARD)
    assert found.blocks_per_sm == 2 and found.waves == 1
    assert found.roofs.memory == pytest.approx(9e6 / (1e12 * 0.9))
    assert found.roofs.l2 == pytest.approx(9e6 / (100 * 64 * 1e9))
    # 4 instructions of each of 2 warpgroups, 64 clocks each at 8,192 FLOPs per clock, at 0.8 of the rate
    tensor = 10 * 4 * 2 * (2 * 64 * 128 * 32 / 8192) / 0.8
    assert found.roofs.tensor == pytest.approx(tensor * 1e-9)
    instructions = 36 + 10 * 64
    assert found.instructions == instructions
    assert found.roofs.issue == pytest.approx(instructions * 8 / 4 * 1e-9)
    # a pass is busy for 128 + 640 clocks, longer than a load takes; two barriers are waited for besides
    assert found.roofs.path == pytest.approx((600 + instructions * 2 + tensor + 10 * 2 * 30) * 1e-9)
    assert (found.bound, found.seconds) == ("memory", found.roofs.memory)
    assert found.tensor_flops_ratio == 1.0


@pytest.mark.parametrize(("columns", "resident"), [(0, 2), (256, 2), (257, 1), (512, 1)])
def test_programs_share_tensor_memory(columns: int, resident: int) -> None:
    kernel = replace(KERNEL, resources=replace(KERNEL.resources, tensor_columns=columns))
    assert estimate(WORK, kernel, CARD).blocks_per_sm == resident


def test_a_pipeline_that_is_too_short_waits_for_memory() -> None:
    short = replace(KERNEL, code=replace(CODE, bodies=(replace(BODY, tensor={}, kinds={"integer": 10, "global": 4}),)))
    work = replace(WORK, flops=0, pass_flops=0, products=None)
    deep = estimate(work, replace(short, num_stages=5), CARD).roofs.path
    two = estimate(work, replace(short, num_stages=3), CARD).roofs.path
    waits = replace(short, code=replace(CODE, bodies=(replace(short.code.bodies[0], waits=True, copies=False),)))  # pyright: ignore[reportOptionalMemberAccess]
    alone = estimate(work, waits, CARD).roofs.path
    assert two - deep == pytest.approx(10 * (600 / 2 - 600 / 4) * 1e-9)
    assert alone - two == pytest.approx(10 * (600 - (600 / 2 - 28)) * 1e-9), "28 clocks are busy"


def test_loads_beside_a_pipeline_are_waited_for() -> None:
    """However long a pass is busy: 128 + 640 clocks here, and 600 clocks more for scales."""
    waits = replace(KERNEL, code=replace(CODE, bodies=(replace(BODY, waits=True),)))
    more = estimate(WORK, waits, CARD).roofs.path - estimate(WORK, KERNEL, CARD).roofs.path
    assert more == pytest.approx(10 * 600 * 1e-9)


@pytest.mark.parametrize(("tensor", "waits"), [(TILE, 0.0), ({}, 600 - 128)])
def test_loads_for_a_later_pass_are_waited_for_behind_this_one(tensor: dict[str, int], waits: float) -> None:
    """128 clocks of instructions hide as much, and 640 of tensor instructions besides the rest."""
    body = replace(BODY, tensor=tensor, copies=False)
    plain = replace(KERNEL, code=replace(CODE, bodies=(body,)))
    ahead = replace(KERNEL, code=replace(CODE, bodies=(replace(body, ahead=True),)))
    work = WORK if tensor else replace(WORK, flops=0, pass_flops=0, products=None)
    more = estimate(work, ahead, CARD).roofs.path - estimate(work, plain, CARD).roofs.path
    assert more == pytest.approx(10 * waits * 1e-9, abs=1e-15)


@pytest.mark.parametrize(("programs", "each"), [(100, 1), (200, 2), (500, 5)])
def test_in_turn_programs_of_an_sm_do_not_overlap(programs: int, each: int) -> None:
    one = estimate(replace(WORK, read_bytes=0, loaded_bytes=0), KERNEL, CARD)
    found = estimate(replace(WORK, read_bytes=0, loaded_bytes=0, programs=programs), KERNEL, CARD)
    assert found.seconds_in_turn == pytest.approx(each * one.roofs.path)
    assert found.roofs.path == pytest.approx(-(-each // 2) * one.roofs.path), "two at a time"
    plain = estimate(replace(WORK, read_bytes=0, loaded_bytes=0, programs=programs, flops=0), KERNEL, CARD)
    assert plain.seconds_in_turn == plain.seconds, "only of those that multiply"


@pytest.mark.parametrize(
    ("bent", "roof"),
    [
        (replace(KERNEL, code=replace(CODE, bodies=(replace(BODY, kinds={**BODY.kinds, "integer": 500}),))), "issue"),
        (replace(KERNEL, code=replace(CODE, bodies=(replace(BODY, barriers=20),))), "path"),
        (replace(KERNEL, code=replace(CODE, bodies=(replace(BODY, tensor={next(iter(TILE)): 8}),))), "tensor"),
        (replace(KERNEL, num_warps=16), "issue"),
    ],
)
def test_slower_code_is_slower(bent: Kernel, roof: str) -> None:
    before, after = estimate(WORK, KERNEL, CARD), estimate(WORK, bent, CARD)
    assert getattr(after.roofs, roof) > getattr(before.roofs, roof)
    assert after.roofs.memory == before.roofs.memory


def test_fewer_blocks_on_an_sm_make_more_waves() -> None:
    many = replace(WORK, programs=1000)
    one = replace(KERNEL, resources=replace(KERNEL.resources, registers=255))
    assert estimate(many, KERNEL, CARD).waves == 5 and estimate(many, one, CARD).waves == 10
    assert estimate(many, one, CARD).roofs.path > estimate(many, KERNEL, CARD).roofs.path
    assert estimate(many, one, CARD).roofs.issue == estimate(many, KERNEL, CARD).roofs.issue


def test_a_product_that_is_done_twice_is_said() -> None:
    twice = replace(KERNEL, code=replace(CODE, bodies=(replace(BODY, tensor={next(iter(TILE)): 8}),)))
    assert estimate(WORK, twice, CARD).tensor_flops_ratio == 2.0
    hidden = replace(KERNEL, code=replace(CODE, bodies=(replace(BODY, tensor={"UTCQMMA": 4}),)))
    assert estimate(WORK, hidden, CARD).tensor_flops_ratio is None
    assert estimate(WORK, hidden, CARD).roofs.tensor == pytest.approx(10 * WORK.pass_flops / 8192 / 0.8 * 1e-9)


def test_what_is_unrolled_counts_once() -> None:
    flat = replace(KERNEL, code=replace(CODE, bodies=(), tensor={next(iter(TILE)): 40}, instructions=700))
    found = estimate(WORK, flat, CARD)
    assert found.instructions == 700 and found.tensor_flops_ratio == 1.0
    assert found.roofs.tensor == pytest.approx(estimate(WORK, KERNEL, CARD).roofs.tensor)


def test_loops_without_products_are_run_as_often_as_the_plan_says_or_once() -> None:
    plain = replace(BODY, tensor={}, kinds={"integer": 20}, barriers=0, copies=False)
    work = replace(WORK, flops=0, pass_flops=0, passes=(3, 5))
    two = replace(KERNEL, code=replace(CODE, bodies=(plain, replace(plain, kinds={"integer": 30})), tensor={}))
    assert estimate(work, two, CARD).instructions == 50 + 3 * 20 + 5 * 30
    one = replace(KERNEL, code=replace(CODE, bodies=(plain,), tensor={}))
    cut = estimate(work, one, CARD)
    assert cut.instructions == 100, "of a loop that the compiler cut no one knows the passes"
    assert cut.roofs.path == pytest.approx((600 + 100 * 2 + 8 / 4 * 600) * 1e-9), "its loads are four at a time"


def test_without_code_shapes_alone_count() -> None:
    found = estimate(WORK, replace(KERNEL, code=None), CARD)
    assert found.instructions == 0 and found.tensor_flops_ratio is None
    assert found.roofs.issue == 0 and found.roofs.memory == estimate(WORK, KERNEL, CARD).roofs.memory


def test_a_launch_without_work_takes_no_time() -> None:
    """The indexer has such launches: rows that take all keys that they see need no scores."""
    idle = replace(WORK, read_bytes=0, loaded_bytes=0, programs=0, flops=0)
    for kernel in (KERNEL, replace(KERNEL, code=None)):
        found = estimate(idle, kernel, CARD)
        assert (found.seconds, found.waves) == (0.0, 0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("HMMA.16816.F32.BF16", ((16, 8, 16), "H")),
        ("QMMA.16832.F32.E4M3.E4M3", ((16, 8, 32), "Q")),
        ("HGMMA.64x256x16.F32.BF16", ((64, 256, 16), "H")),
        ("QGMMA.64x16x32.F32.E4M3.E4M3", ((64, 16, 32), "Q")),
        ("UTCQMMA", (None, "")),
        ("HMMA.12345", (None, "H")),
    ],
)
def test_shapes_of_tensor_instructions(name: str, shape: object) -> None:
    assert shape_of(name) == shape


def test_a_narrow_instruction_of_a_warpgroup_is_bound_by_shared_memory() -> None:
    body = replace(BODY, tensor={"HGMMA.64x16x16.F32.BF16": 10})
    found = estimate(replace(WORK, products="bf16"), replace(KERNEL, code=replace(CODE, bodies=(body,))), CARD)
    clocks = (64 + 16) * 16 * 2 / 128  # both factors at 128 bytes a clock; the products alone would take 8
    assert clocks == 20 and found.roofs.tensor == pytest.approx(10 * 10 * 2 * clocks / 0.8 * 1e-9)


def test_old_tensor_instructions_do_not_reach_the_rate_of_new_ones() -> None:
    body = replace(BODY, tensor={"HMMA.16816.F32.BF16": 10})
    kernel = replace(KERNEL, code=replace(CODE, bodies=(body,)))
    work = replace(WORK, products="bf16")
    on_90 = estimate(work, kernel, CARD).roofs.tensor
    on_89 = estimate(work, kernel, replace(CARD, sm=89)).roofs.tensor
    assert on_90 == pytest.approx(on_89 / model.MMA_SYNC_SHARE[90])


def test_every_gpu_has_a_card_whose_rate_per_clock_is_that_of_its_generation() -> None:
    for target in all_targets():
        if target.gpu is None:
            with pytest.raises(TargetError, match="is a CPU"):
                card_of(target)
            continue
        rate = card_of(target).bf16_flops_per_clock
        nearest = min((512, 1024, 2048, 4096, 8192), key=lambda known: abs(known - rate))
        assert rate == pytest.approx(nearest, rel=0.01), f"{target.name}: SMs, clock and rate do not go together"


def test_a_card_is_what_its_target_says() -> None:
    card = card_of(load_target("h100"))
    assert (card.num_sms, card.clock_hz, card.bytes_per_s) == (132, 1.83e9, 3.35e12)
    assert card.flops_per_clock("fp8") == 2 * card.flops_per_clock("bf16")
    assert card_of(load_target("a100-80g")).flops_per_clock("fp8") == pytest.approx(2048, rel=0.01), "it has no FP8"
