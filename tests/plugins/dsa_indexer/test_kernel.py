"""The indexer's kernels under Triton's interpreter: scores against the reference, selection exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.kernel_cases import ATTRS, gpu_cases, packed_index
from torch import Tensor

from seekforge.plugins.dsa_indexer import launch
from seekforge.plugins.dsa_indexer.kernel import digit_kernel, emit_kernel, scores_kernel, select_kernel
from seekforge.plugins.dsa_indexer.reference import index_scores
from seekforge.plugins.kernels.interpreter import interpret
from seekforge.plugins.testing import Case, Draw, calc_diff, equal_bits, same_selection

#: Against the reference on the same quantized inputs (spec §11).
TOLERANCE = 5e-6


def typed(case: Case, index_format: str) -> Case | None:
    if index_format == "fp8_ds" and not case.attrs["indexer_fp8"]:
        return None
    return ATTRS["DsaIndexer"](case, index_format)


def reference_scores(case: Case) -> Tensor:
    q, w, cache, table, positions = case.inputs
    attrs = case.attrs
    return index_scores(q, w, cache, table, positions, attrs["indexer_fp8"], attrs["index_format"])


#: SM80 differs in how bytes are read, which four cases show; 48 rows are slow, and one format shows them.
ON_SM80 = ("ragged", "nan-keys", "many-ties-at-rank-k-fp8", "topk-one")
CASES = [
    pytest.param(found, sm, id=f"{case}-{index_format}-{sm}")
    for case in gpu_cases("DsaIndexer")
    for index_format, sm in (("fp8_ds", 90), ("fp8_ds", 80), ("bf16", 90))
    if (sm != 80 or case.name in ON_SM80)
    and (case.name != "many-rows" or index_format != "bf16")
    and (found := typed(case, index_format)) is not None  # fp8_ds is always quantized
]


@pytest.mark.parametrize(("case", "sm"), CASES)
def test_selects_like_the_reference(case: Case, sm: int) -> None:
    (got,) = interpret(case.op, case.inputs, case.attrs, sm=sm)
    (want,) = case.expected()
    if "ties" in case.name or "constant" in case.name or "zero" in case.name:
        assert torch.equal(got, want), "every score is exact there"
    # elsewhere scores differ in the last bits, and only keys that score like the last one may be swapped
    assert same_selection(got, want, reference_scores(case), 1e-6)
    valid = torch.where(got < 0, 2**30, got)
    assert torch.equal(valid, valid.sort(dim=-1).values), "ascending, -1 last"


def scores(case: Case, *, sm: int = 90, rows: int = 1, first: int = 0) -> Tensor:
    """Return what the scores kernel writes, NaN where it writes nothing."""
    q, w, cache, table, positions = case.inputs
    b, n = positions.shape
    statics = {"Hi": q.shape[2], "D": 128, "indexer_fp8": True, "index_format": "fp8_ds"}
    variant = next(v for v in launch.variants(statics, sm) if v.name == f"scores-{rows}")
    out = torch.full((b * n - first, table.shape[1] * 64), torch.nan)
    counts = torch.full((b * n - first, 2048), -9, dtype=torch.int32)
    groups = -(-n // rows)
    code = cache.view(torch.uint8).view(-1)
    scores_kernel[((b - first // n) * groups, -(-table.shape[1] // 4), 1)](
        q,
        w,
        code,
        table,
        positions,
        out,
        counts,
        cache.shape[0] * 64,
        table.shape[1],
        n,
        first,
        b * n,
        4,
        2048,
        0,
        **variant.constants,
    )
    assert (counts == 0).all(), "the selection finds its counts cleared"
    return out


def random_case(b: int, n: int, *, blocks: int = 3, seed: int = 0, heads: int = 16) -> Case:
    draw = Draw(seed)
    table = draw.block_table(b, blocks, b * blocks + 2)
    cache = packed_index(draw.normal((b * blocks + 2) * 64, 128))
    used = torch.zeros(cache.shape[0], dtype=torch.bool)
    used[table.long().flatten()] = True
    cache[~used] = -1
    positions = draw.integers(b, n, low=-1, high=blocks * 64)
    inputs = (draw.normal(b, n, heads, 128).bfloat16(), draw.normal(b, n, heads) * 0.02, cache, table, positions)
    return Case("DsaIndexer", "random", inputs, {"index_topk": 48, "indexer_fp8": True, "index_format": "fp8_ds"})


@pytest.mark.parametrize(("sm", "rows", "first"), [(90, 1, 0), (80, 1, 0), (90, 2, 3), (90, 4, 0), (120, 4, 7)])
def test_scores_within_the_tolerance_and_only_where_visible(sm: int, rows: int, first: int) -> None:
    case = random_case(2, 5, seed=rows)
    got = scores(case, sm=sm, rows=rows, first=first)
    want = reference_scores(case).flatten(0, 1)[first:]
    visible = want.isfinite()
    assert got[~visible].isnan().all(), "nothing is written beyond a row's length"
    assert calc_diff(got[visible], want[visible]) < TOLERANCE
    assert equal_bits(scores(case, sm=sm, rows=rows, first=first), got)
    for index in (0, 1):
        inputs = list(case.inputs)
        inputs[index] = (inputs[index].float() * 1.01).to(inputs[index].dtype)
        bent = reference_scores(Case(case.op, "bent", tuple(inputs), case.attrs)).flatten(0, 1)[first:]
        assert calc_diff(got[visible], bent[visible]) > TOLERANCE
    assert calc_diff(got[visible] * 1.01, want[visible]) > TOLERANCE


def select(rows: Tensor, lengths: list[int], topk: int, *, block: int = 256) -> Tensor:
    out = torch.full((len(lengths), topk), -2, dtype=torch.int32)
    positions = torch.tensor(lengths, dtype=torch.int64) - 1
    select_kernel[(len(lengths), 1, 1)](rows, positions, out, rows.shape[1], 0, topk, BLOCK=block)
    return out


def select_shared(
    rows: Tensor, lengths: list[int], topk: int, *, block: int = 128, steps: int = 2, bent: str = ""
) -> Tensor:
    """Return what programs that share rows select, each with `steps` blocks of a row; one count more where `bent`."""
    count, span = len(lengths), steps * block
    programs = -(-rows.shape[1] // span)
    out = torch.full((count, topk), -2, dtype=torch.int32)
    positions = torch.tensor(lengths, dtype=torch.int64) - 1
    sizes = {"state": 4, "high": 4096, "middle": 4096, "low": programs * 256, "above": programs}
    found = {name: torch.full((count, size), -9, dtype=torch.int32) for name, size in sizes.items()}
    found["high"].zero_()  # as the scores' kernel leaves it
    state, high, middle, low, above = found.values()
    for level in range(3):
        digit_kernel[(count, programs, 1)](
            rows, positions, state, high, middle, low, above, rows.shape[1], 0, span, topk, LEVEL=level, BLOCK=block
        )
    if bent:
        found[bent][:, 0] += 1
    emit_kernel[(count, programs, 1)](
        rows, positions, state, low, above, out, rows.shape[1], 0, span, topk, BLOCK=block, CHUNKS=2
    )
    return out


def oracle(row: Tensor, length: int, topk: int) -> list[int]:
    values = [float(v) for v in row[:length]]
    best = sorted(range(length), key=lambda i: (-values[i], i))[:topk]
    return sorted(best) + [-1] * (topk - len(best))


def corner_rows(length: int) -> dict[str, Tensor]:
    draw = Draw(11)
    normal = draw.normal(length)
    spike = torch.zeros(length)
    spike[-1] = 1.0
    return {
        "constant": torch.full((length,), 0.25),
        "plateau": torch.relu(normal - 1.0),
        "signed-zeros": torch.where(normal > 0, 0.0, -0.0),
        "tied-at-the-border": draw.integers(length, low=0, high=3).float(),
        "denormals": normal * 1e-42,
        "largest-and-smallest": torch.where(normal > 0.5, 3.4e38, -3.4e38),
        "rising": torch.arange(length).float(),
        "falling": -torch.arange(length).float(),
        "last-is-best": spike,
        "one-bin": 1.0 + torch.arange(length).flip(0) * 2.0**-23,
    }


@pytest.mark.parametrize("name", corner_rows(4))
def test_selection_is_exact(name: str) -> None:
    length, topk = 700, 100
    row = corner_rows(length)[name].clone()
    lengths = [0, 1, 99, 100, 101, 255, 256, 257, 700]
    rows = torch.full((len(lengths), length), torch.nan)
    for i, n in enumerate(lengths):
        rows[i, :n] = row[:n]
    assert select(rows, lengths, topk).tolist() == [oracle(row, n, topk) for n in lengths]
    shared = [0, 100, 101, 257, 700]
    got = select_shared(rows[[lengths.index(n) for n in shared]], shared, topk)
    assert got.tolist() == [oracle(row, n, topk) for n in shared]


def test_a_count_that_is_one_off_is_noticed() -> None:
    """What the first program of a row counted above the last digit decides where the second one writes."""
    row = torch.arange(700).float().unsqueeze(0)
    want = [oracle(row[0], 700, 500)]
    assert select_shared(row, [700], 500).tolist() == want
    assert select_shared(row, [700], 500, bent="above").tolist() != want


def test_one_score_by_one_per_cent_decides() -> None:
    """The last key that is taken and the best that is not: 1 % makes them change places."""
    row = torch.linspace(1.0, 1.5, 600)[Draw(13).order(600)]
    worst, best_left = row.sort(descending=True).indices[99:101].tolist()
    bent = row.clone()
    bent[best_left] *= 1.01
    got, other = (set(select_shared(one.unsqueeze(0), [600], 100).flatten().tolist()) for one in (row, bent))
    assert other - got == {best_left} and got - other == {worst}


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_selection_is_exact_for_any_row(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 300))
    topk = data.draw(st.integers(1, 200))
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 3.4028234663852886e38])
    values = data.draw(st.lists(st.one_of(few, st.floats(width=32, allow_nan=False)), min_size=length, max_size=length))
    row = torch.tensor(values, dtype=torch.float32)
    assert select(row.unsqueeze(0), [length], topk, block=128).tolist() == [oracle(row, length, topk)]
    shared = select_shared(row.unsqueeze(0), [length], topk, block=64, steps=data.draw(st.integers(1, 3)))
    assert shared.tolist() == [oracle(row, length, topk)]


def test_v32_selection_reads_2048_of_a_long_row() -> None:
    row = Draw(12).normal(5000)
    lengths = [2047, 2048, 2049, 5000]
    rows = row.expand(4, -1).contiguous()
    assert select(rows, lengths, 2048, block=2048).tolist() == [oracle(row, n, 2048) for n in lengths]
    assert select_shared(rows, lengths, 2048, block=2048, steps=1).tolist() == [oracle(row, n, 2048) for n in lengths]


def test_slices_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(2, 5, seed=3)
    (whole,) = interpret(case.op, case.inputs, case.attrs, sm=90)
    for rows in (1, 3, 7):
        monkeypatch.setattr(launch, "SCORE_BYTES", rows * 4 * 192)
        assert equal_bits(interpret(case.op, case.inputs, case.attrs, sm=90)[0], whole)


def test_programs_that_share_rows_select_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the launch plan: five launches for each slice of four rows, and the bytes of two for all rows."""
    case = random_case(2, 5, seed=3)
    (whole,) = interpret(case.op, case.inputs, case.attrs, sm=90)
    monkeypatch.setattr(launch, "SELECT_BLOCK", 32)
    monkeypatch.setattr(launch, "SCORE_BYTES", 4 * 4 * 192)
    bound = case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs)
    assert [one.variant for one in launch.plan(bound, 90).launches[1:5]] == ["digit-0", "digit-1", "digit-2", "emit"]
    assert len(launch.plan(bound, 90).launches) == 5 * 3
    assert equal_bits(interpret(case.op, case.inputs, case.attrs, sm=90)[0], whole)


def test_rows_do_not_depend_on_the_batch() -> None:
    case = random_case(3, 1, seed=5)
    (got,) = interpret(case.op, case.inputs, case.attrs, sm=90)
    q, w, cache, table, positions = case.inputs
    order = [2, 0, 1]
    again = (q[order], w[order], cache, table[order], positions[order])
    assert equal_bits(interpret(case.op, again, case.attrs, sm=90)[0], got[order])


@settings(max_examples=8, deadline=None)
@given(
    b=st.integers(1, 3),
    n=st.integers(1, 6),
    blocks=st.integers(1, 3),
    heads=st.sampled_from([16, 32]),
    sm=st.sampled_from([80, 90, 120]),
)
def test_any_shape(b: int, n: int, blocks: int, heads: int, sm: int) -> None:
    case = random_case(b, n, blocks=blocks, heads=heads, seed=b * n)
    (got,) = interpret(case.op, case.inputs, case.attrs, sm=sm)
    assert same_selection(got, case.expected()[0], reference_scores(case), 1e-6)
