"""What the script of peers' kernels counts and takes; it compiles nothing here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.benchmarks.peers import KERNEL, Tile, extracted, mean_ratio, points, product_work, row

from seekforge.formats.targets import load_target
from seekforge.plugins.block_fp8_linear import launch
from seekforge.plugins.cost.card import card_of
from seekforge.plugins.cost.model import Kernel
from seekforge.plugins.cost.work import Load, op_cost
from seekforge.plugins.kernels.kernel_set import Resources
from seekforge.plugins.kernels.sass import Body, Code


def test_a_product_of_theirs_is_counted_as_one_of_ours() -> None:
    """The same tile of the same product, whose rows come quantized."""
    bound = {"*lead": (4096,), "N": 2304, "K": 7168, "KB": 56, "act_quant": "ue8m0"}
    (ours,) = launch.plan(bound, 89).launches
    want = op_cost("BlockFp8Linear").work(ours, bound, 89, Load(context=1))
    (point,) = (one for one in points() if (one.m, one.n) == (4096, 2304))
    assert product_work(replace(point, tile=Tile(64, 128, 4, 3))) == want


def test_times_are_those_that_were_published() -> None:
    """Some by hand: 1.298 TFLOPS of one row, and microseconds as they are."""
    by_size = {(one.target, one.m, one.n): one for one in points()}
    assert by_size["h100", 1, 2112].published_us == pytest.approx(23.318, abs=1e-3)
    assert by_size["h100", 8192, 2112].published_us == pytest.approx(610.15, abs=0.01)
    assert by_size["h200", 4096, 24576].published_us == pytest.approx(4067.296, abs=1e-3)
    assert len(by_size) == 21


def test_one_function_is_taken_of_a_source_and_nothing_is_run() -> None:
    source = f"raise ValueError\n\ndef other():\n    pass\n\n@triton.jit\ndef {KERNEL}(a, b):\n    pass\n"
    module = extracted(source, KERNEL)
    assert module.endswith(f"@triton.jit\ndef {KERNEL}(a, b):\n    pass\n") and "ValueError" not in module
    with pytest.raises(SystemExit, match=f"no function {KERNEL} in the source"):
        extracted("x = 1", KERNEL)
    with pytest.raises(SystemExit, match="the source is no Python: "):
        extracted("x = = 1", KERNEL)


def test_programs_in_turn_take_as_long_as_there_are_of_them() -> None:
    (point,) = (one for one in points() if (one.target, one.m) == ("h100", 2048))
    tensor = {"QGMMA.64x64x32.F32.E4M3.E4M3": 8}
    body = Body({"tensor": 8, "integer": 280}, barriers=2, waits=True, copies=True, tensor=tensor)
    code = Code(400, tensor, 0, 0, None, bodies=(body,), kinds={"tensor": 8, "integer": 392})
    used = Resources(registers=234, stack_bytes=0, shared_bytes=98304, tensor_columns=0, occupancy=0.125)
    made = row(point, Kernel(used, 4, 4, code), card_of(load_target("h100")))
    assert made["programs_per_sm"] == 2 and made["us_in_turn"] == pytest.approx(2 * made["us"], rel=0.01)
    assert made["ratio"] == pytest.approx(2 * made["ratio_in_turn"], rel=0.02)
    assert mean_ratio([made, made], "ratio") == pytest.approx(made["ratio"])
