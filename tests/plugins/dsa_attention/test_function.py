"""Bodies of `DsaAttention` in ONNX Runtime against the reference."""

import pytest
import torch

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.testing import Case, Draw, cases, max_error, run_function

#: f32 softmax and sums in another order; a scale bent by 1 % moves the result by 1e-3 and more.
TOLERANCE = 3e-6

ORT = Specialization("f32", "float8", "f32", "ort")
HOWS = [Specialization("f32", "float8", kv, bodies) for kv in ("f32", "bf16") for bodies in ("ort", "trt")]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.bodies}-{how.kv_format}")
@pytest.mark.parametrize("case", cases("DsaAttention"), ids=str)
def test_body_computes_the_reference(case: Case, how: Specialization) -> None:
    typed = case.typed(how)
    (out,), (expected,) = run_function(case.op, typed.inputs, typed.attrs, how), typed.expected()
    assert expected.isfinite().all()
    assert max_error(out, expected) < TOLERANCE


def long_prompt(num_rows: int, topk: int, blocks: int = 4) -> Case:
    """A prompt of one sequence whose rows choose at random among what they see; other slots hold NaN."""
    draw = Draw(num_rows)
    choose = torch.Generator().manual_seed(num_rows)
    table = draw.block_table(1, blocks, blocks + 2)
    cache = torch.full(((blocks + 2) * 64, 128 + 64), torch.nan)
    indices = torch.full((1, num_rows, topk), -1, dtype=torch.int32)
    start = blocks * 64 - num_rows
    for row in range(num_rows):
        seen = start + row + 1
        chosen = torch.randperm(seen, generator=choose)[:topk].sort().values
        indices[0, row, : len(chosen)] = chosen.int()
        slots = table[0].long()[chosen // 64] * 64 + chosen % 64
        cache[slots] = draw.normal(len(chosen), 128 + 64)
    q_latent, q_pe = draw.normal(1, num_rows, 4, 128), draw.normal(1, num_rows, 4, 64)
    attrs = {"scale": 0.1352337788608801, "kv_format": "f32"}
    return Case("DsaAttention", "long-prompt", (q_latent, q_pe, cache, table, indices), attrs)


@pytest.mark.parametrize(("num_rows", "topk"), [(256, 64), (100, 64), (77, 16), (8, 64), (7, 64)])
def test_prompts_in_blocks_compute_the_reference(num_rows: int, topk: int) -> None:
    """With 64 of 256 keys a block takes all of them together, with 16 each row takes its own."""
    case = long_prompt(num_rows, topk).typed(ORT)
    (out,), (expected,) = run_function(case.op, case.inputs, case.attrs, ORT), case.expected()
    assert expected.isfinite().all()
    assert max_error(out, expected) < TOLERANCE


def test_rows_that_come_twice_have_the_same_bits_in_any_company() -> None:
    case = long_prompt(96, 64)
    q_latent, q_pe, cache, table, indices = case.inputs

    def run(rows: slice) -> torch.Tensor:
        twice = [torch.cat([value[:, rows], value[:, rows]], dim=1) for value in (q_latent, q_pe, indices)]
        (out,) = run_function(case.op, (*twice[:2], cache, table, twice[2]), case.attrs, ORT)
        half = out.shape[1] // 2
        assert torch.equal(out[:, :half], out[:, half:])
        return out[:, :half]

    whole = run(slice(0, 96))
    for rows in (slice(0, 1), slice(40, 45), slice(17, 96)):
        assert torch.equal(run(rows), whole[:, rows])
