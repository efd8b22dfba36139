"""The scratch that is asked for while an engine is built is what its kernels use, and hardly more."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.launch_plan import most_rows, op_kernels, workspace_bytes
from seekforge.plugins.kernels.sm_limits import SMS
from seekforge.plugins.operator import cdiv
from seekforge.plugins.registry import SPECS, WITH_KERNELS

#: Sizes that only a call fixes, under the symbols of the specs; all else is in the code of the kernels.
Sizes = dict[str, int]
Shapes = list[tuple[int, ...]]
_128 = st.integers(1, 64).map(lambda n: 128 * n)
_FORMATS = st.sampled_from(["bf16", "fp8_ds"])
#: Few rows are where work is split; many are where it is sliced.
_STEPS = st.one_of(st.integers(1, 9), st.integers(10, 300), st.integers(301, 5000))
_BLOCKS = st.one_of(st.integers(1, 64), st.integers(65, 40_000))


def shapes_of(op: str, fixed: dict[str, Any], sizes: Sizes) -> tuple[Shapes, dict[str, Any]]:
    """Input shapes and attributes of a call."""
    f, b, q, mb = fixed, sizes["B"], sizes["Q"], sizes["MB"]
    match op:
        case "BlockFp8Linear":
            n, k = f["N"], f["K"]
            lead = (b, q) if f["axes"] == 2 else (b * q,)
            codes = [(*lead, k // 4), (*lead, k // 128)] if f["act_quant"] == "ue8m0" and f["codes"] else []
            return [(*lead, k), (n, k), (cdiv(n, 128), k // 128), *codes], {"act_quant": f["act_quant"]}
        case "AddRmsNormQuantize":
            return [(b, q, f["H"]), (f["H"],), *([(b, q, f["H"])] if f["adds"] else [])], {"epsilon": 1e-6}
        case "Bf16Linear":
            return [(*((b, q) if f["axes"] == 2 else (b * q,)), f["K"]), (f["N"], f["K"])], {}
        case "DsaIndexer":
            shapes = [(b, q, f["Hi"], 128), (b, q, f["Hi"]), (64, 128), (b, mb), (b, q)]
            return shapes, {name: f[name] for name in ("index_topk", "indexer_fp8", "index_format")}
        case "DsaAttention":
            h, c, r = f["H"], f["C"], f["R"]
            shapes = [(b, q, h, c), (b, q, h, r), (64, c + r), (b, mb), (b, q, f["TOPK"])]
            return shapes, {"scale": 0.1, "kv_format": f["kv_format"]}
        case "MlaAttention":
            h, c, r = f["H"], f["C"], f["R"]
            shapes = [(b, q, h, c), (b, q, h, r), (64, c + r), (b, mb), (b, q)]
            return shapes, {"scale": 0.1, "kv_format": "bf16"}
        case "MoeExperts":
            t, e, h, i, k = b * q, f["E"], f["H"], f["I"], f["K"]
            weights = [(e, 2 * i, h), (e, i // 64, h // 128), (e, h, i), (e, h // 128, i // 128)]
            return [(t, h), (t, k), (t, k), *weights], {"act_quant": f["act_quant"]}
        case "DsaCacheWrite":
            form, quant = f["kv_format"], f["kv_format"] == "fp8_ds"
            attrs = {"kv_format": form, "index_format": form, "kv_fp8": quant, "indexer_fp8": quant}
            return [(64, 576), (64, 128), (b, q, 512), (b, q, 64), (b, q, 128), (b, q)], attrs
        case "MlaCacheWrite":
            attrs = {"kv_format": f["kv_format"], "kv_fp8": f["kv_format"] == "fp8_ds"}
            return [(64, 576), (b, q, 512), (b, q, 64), (b, q)], attrs
        case _:
            return [(b * q, 64), (64,)], {"n_group": 8, "topk_group": 4, "top_k": 8, "norm": True, "scale": 2.5}


FIXED = {
    "AddRmsNormQuantize": st.fixed_dictionaries({"H": _128, "adds": st.booleans()}),
    "BlockFp8Linear": st.fixed_dictionaries(
        {
            "N": st.one_of(st.integers(1, 700), st.integers(700, 40_000)),
            "K": _128,
            "axes": st.sampled_from([1, 2]),
            "act_quant": st.sampled_from(["ue8m0", "none"]),
            "codes": st.booleans(),
        }
    ),
    "Bf16Linear": st.fixed_dictionaries(
        {"N": st.one_of(st.integers(1, 600), st.integers(600, 130_000)), "K": _128, "axes": st.sampled_from([1, 2])}
    ),
    "DsaIndexer": st.fixed_dictionaries(
        {
            "Hi": st.sampled_from([16, 32, 64]),
            "index_topk": st.one_of(st.integers(1, 4096), st.integers(4096, 1_000_000)),
            "indexer_fp8": st.just(True),
            "index_format": _FORMATS,
        }
    ),
    "DsaAttention": st.fixed_dictionaries(
        {
            "H": st.integers(1, 128),
            "C": st.sampled_from([128, 256, 512]),
            "R": st.sampled_from([16, 32, 64]),
            "TOPK": st.one_of(st.integers(1, 300), st.integers(300, 4096)),
            "kv_format": _FORMATS,
        }
    ),
    "MlaAttention": st.fixed_dictionaries(
        {"H": st.integers(1, 128), "C": st.sampled_from([128, 256, 512]), "R": st.sampled_from([16, 32, 64])}
    ),
    "MoeExperts": st.fixed_dictionaries(
        {
            "E": st.integers(1, 1024),
            "K": st.integers(1, 16),
            "H": _128,
            "I": _128,
            "act_quant": st.sampled_from(["ue8m0", "none"]),
        }
    ),
    "DsaCacheWrite": st.fixed_dictionaries({"kv_format": _FORMATS}),
    "MlaCacheWrite": st.fixed_dictionaries({"kv_format": _FORMATS}),
    "MoeRoute": st.just({}),
}


def used(op: str, fixed: dict[str, Any], sizes: Sizes, sm: int) -> int:
    """Scratch that the launches of a call take."""
    shapes, attrs = shapes_of(op, fixed, sizes)
    return op_kernels(op).plan(SPECS[op].bind(shapes, attrs), sm).workspace_bytes


def smaller(largest: Sizes, draw: Any) -> Sizes:
    return {name: draw(st.integers(1, size), label=name) for name, size in largest.items()}


def largest_product(b: int, q: int, most: int) -> tuple[int, int]:
    """At most `b` sequences and `q` queries of each that are most rows, but no more than `most`."""
    return max(((n, min(q, most // n)) for n in range(1, min(b, most) + 1)), key=lambda pair: pair[0] * pair[1])


def candidates(op: str, fixed: dict[str, Any], largest: Sizes) -> list[Sizes]:
    """The sizes among which an operator's plans are greediest, found by trying and not by its own arithmetic."""
    b, q, mb = largest["B"], largest["Q"], largest["MB"]
    most = {64, *(128 // splits for splits in range(1, 9))}  # rows up to which calls are split into so many parts
    if op in ("DsaAttention", "MlaAttention"):  # each number of rows has parts of its own
        most = set(range(1, 129))
    rows = [(x, min(q, n // x)) for x in range(1, min(b, 128) + 1) for n in most if n >= x]
    if op in ("BlockFp8Linear", "Bf16Linear"):  # each number of tiles has splits of its own
        axes = (1, b * q) if fixed["axes"] == 1 else (b, q)
        rows += [largest_product(*axes, n) for n in range(16, 2049, 16)]
    split = ("BlockFp8Linear", "Bf16Linear", "DsaAttention", "MlaAttention")
    steps = {(b, q), (b, min(q, 255)), *rows} if op in split else {(b, q)}
    blocks = {mb}
    if op == "DsaIndexer":  # a slice has whole rows, so a shorter context may fill it better
        blocks |= {max(1, mb * n // 64) for n in range(1, 64)}
        blocks |= {min(mb, max(1, (256 << 20) // (256 * n))) for n in range(1, 300)}
    found = [{"B": x, "Q": y, "MB": z} for x, y in steps for z in blocks]
    if op == "DsaIndexer":  # few rows are shared among programs that count
        for rows in range(1, 129):
            x, y = largest_product(b, q, rows)
            found.append({"B": x, "Q": y, "MB": min(mb, (256 << 20) // (256 * rows))})
    return found


#: Tokens of a step: beyond, a plan is thousands of launches, and hundreds of plans are tried.
_MOST_TOKENS = 1 << 16
#: Operator, and what of it is fixed.
CASES = st.sampled_from(WITH_KERNELS).flatmap(lambda op: st.tuples(st.just(op), FIXED[op]))
V32_NONE = ("MoeExperts", {"E": 256, "K": 8, "H": 7168, "I": 2048, "act_quant": "none"})
FEW_KEYS = {"Hi": 64, "index_topk": 2048, "indexer_fp8": True, "index_format": "fp8_ds"}
ALL_KEYS = {"Hi": 64, "index_topk": 2048, "indexer_fp8": True, "index_format": "bf16"}
TINY = ("MoeExperts", {"E": 8, "K": 2, "H": 256, "I": 128, "act_quant": "ue8m0"})


@given(CASES, st.fixed_dictionaries({"B": _STEPS, "Q": _STEPS, "MB": _BLOCKS}), st.sampled_from(SMS), st.data())
@example(V32_NONE, {"B": 1, "Q": 2048, "MB": 1}, 80, None)
@example(TINY, {"B": 1, "Q": 1, "MB": 1}, 90, None)
@example(("DsaIndexer", FEW_KEYS), {"B": 11, "Q": 12, "MB": 100}, 90, None)
@example(("DsaIndexer", FEW_KEYS), {"B": 300, "Q": 1, "MB": 2048}, 90, None)
@example(("DsaIndexer", FEW_KEYS), {"B": 13, "Q": 13, "MB": 9000}, 90, None)  # slices have 128 rows, no step has
@example(("DsaIndexer", ALL_KEYS), {"B": 4, "Q": 1024, "MB": 32}, 90, None)
@settings(max_examples=120, deadline=None)
def test_no_smaller_step_uses_more_and_none_is_asked_for_in_vain(
    case: tuple[str, dict[str, Any]], largest: Sizes, sm: int, data: Any
) -> None:
    op, fixed = case
    largest = largest | {"Q": min(largest["Q"], max(_MOST_TOKENS // largest["B"], 1))}
    shapes, attrs = shapes_of(op, fixed, largest)
    asked = workspace_bytes(op, shapes, attrs, [sm])
    assert used(op, fixed, largest, sm) <= asked
    for _ in range(0 if data is None else 8):
        assert used(op, fixed, smaller(largest, data.draw), sm) <= asked
    worst = max(used(op, fixed, sizes, sm) for sizes in candidates(op, fixed, largest))
    assert worst <= asked <= max(worst * 1.01, worst + 65536)


@given(
    CASES, st.fixed_dictionaries({"B": _STEPS, "Q": _STEPS, "MB": _BLOCKS}), st.sets(st.sampled_from(SMS), min_size=1)
)
@settings(max_examples=100, deadline=None)
def test_an_engine_for_several_gpus_has_enough_for_each(
    case: tuple[str, dict[str, Any]], largest: Sizes, sms: set[int]
) -> None:
    op, fixed = case
    shapes, attrs = shapes_of(op, fixed, largest)
    each = [workspace_bytes(op, shapes, attrs, [sm]) for sm in sms]
    assert workspace_bytes(op, shapes, attrs, sms) == max(each)
    assert workspace_bytes(op, shapes, attrs) >= max(each), "without a target, whatever the GPU"


def test_the_gpu_that_runs_kernels_of_another_needs_what_those_need() -> None:
    shapes, attrs = shapes_of(*V32_NONE, {"B": 1, "Q": 64, "MB": 1})
    assert workspace_bytes("MoeExperts", shapes, attrs, [86]) == workspace_bytes("MoeExperts", shapes, attrs, [80])


def test_an_operator_without_kernels_has_no_scratch_to_ask_for() -> None:
    with pytest.raises(ShapeError, match="SumRanks: there are no kernels for it"):
        workspace_bytes("SumRanks", [(2, 256)], {"num_ranks": 2})


@given(st.integers(0, 200), st.lists(st.integers(0, 30), max_size=3))
def test_most_rows_is_the_largest_product_within_the_limit(limit: int, axes: list[int]) -> None:
    products = {1}
    for size in axes:
        products = {one * n for one in products for n in range(size + 1) if one * n <= 200}
    assert most_rows(limit, axes) == max(one for one in products | {0} if one <= limit)


def test_sizing_an_engine_needs_neither_torch_nor_triton() -> None:
    """The runtime and the planner start on machines that have none of the heavy packages."""
    code = (
        "import sys\n"
        "from seekforge.plugins.kernels.launch_plan import workspace_bytes\n"
        "import seekforge.exporter.sizing.memory\n"
        "workspace_bytes('BlockFp8Linear', [(2, 256), (128, 256), (1, 2)], {'act_quant': 'ue8m0'})\n"
        "heavy = {'torch', 'triton', 'onnx', 'tensorrt', 'tensorrt_rtx', 'cuda'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
