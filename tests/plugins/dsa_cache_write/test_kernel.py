"""The cache-write kernel under Triton's interpreter: bytes equal to the reference in every format."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.kernel_cases import ATTRS, gpu_cases
from torch import Tensor

from seekforge.plugins.dsa_cache_write.launch import plan, variants
from seekforge.plugins.dsa_cache_write.reference import dsa_cache_write
from seekforge.plugins.kernels.interpreter import interpret
from seekforge.plugins.testing import Case, equal_bits


def same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Compare all but block 0, which is scrap."""
    first = 1 if actual[0].dtype == torch.int8 else 64
    return all(equal_bits(a[first:], e[first:]) for a, e in zip(actual, expected, strict=True))


CASES = [
    pytest.param(found, sm, id=f"{case}-{kv_format}-{sm}")
    for case in gpu_cases("DsaCacheWrite")
    for kv_format, sm in (("fp8_ds", 90), ("fp8_ds", 80), ("bf16", 90))
    if (found := ATTRS["DsaCacheWrite"](case, kv_format)) is not None  # fp8_ds is always quantized
]


@pytest.mark.parametrize(("case", "sm"), CASES)
def test_bytes_equal_the_reference(case: Case, sm: int) -> None:
    assert same(interpret(case.op, case.inputs, case.attrs, sm=sm), case.expected())


def write(c: Tensor, k_pe: Tensor, key: Tensor, slots: Tensor, *, blocks: int, sm: int = 90) -> tuple[Tensor, Tensor]:
    width = c.shape[-1] + c.shape[-1] // 128 * 4 + 2 * k_pe.shape[-1]
    latent = torch.full((blocks, 64, width), -1, dtype=torch.int8)
    index = torch.full((blocks, 64 * 132), -1, dtype=torch.int8)
    attrs = {"kv_format": "fp8_ds", "index_format": "fp8_ds", "kv_fp8": True, "indexer_fp8": True}
    inputs = [t.bfloat16().unsqueeze(0) for t in (c, k_pe, key)]
    latent, index = interpret("DsaCacheWrite", [latent, index, *inputs, slots.unsqueeze(0)], attrs, sm=sm)
    return latent, index


@pytest.mark.parametrize("sm", [80, 90])
def test_records_have_the_known_digests(sm: int) -> None:
    j, i = torch.arange(512), torch.arange(64)
    c = ((j % 128 - 64) / 64).expand(64, 512)
    k_pe = (torch.arange(64) / 64).expand(64, 64)
    key = ((7 * i[:, None] + 3 * torch.arange(128)) % 17 - 8) / 4
    latent, index = write(c, k_pe, key, 64 + i, blocks=3, sm=sm)
    record = latent[1, 5].numpy().tobytes()
    assert hashlib.sha256(record).hexdigest() == "8aa11314393cd2988404a41fe3bf8c9e45aae110fbb84a0defd39e452c4437bb"
    page = index[1].numpy().tobytes()
    assert hashlib.sha256(page).hexdigest() == "0e2b9c6a9083194d54cd45a8708ca86c7423569b70e74d4227b48460a8416016"
    assert (latent[2] == -1).all() and (index[2] == -1).all()


@pytest.mark.parametrize("sm", [80, 90])
def test_scales_and_visible_nan(sm: int) -> None:
    c = torch.zeros(2, 512)
    c[0, [3, 130, 390]] = torch.tensor([1.0, 3.0, 0.00099945])
    c[1, 7] = torch.nan
    latent, _ = write(c, torch.zeros(2, 64), torch.zeros(2, 128), torch.tensor([127, 64]), blocks=2, sm=sm)
    scales = latent[1, 63, 512:528].contiguous().view(torch.float32)
    assert scales.log2().tolist() == [-8, -7, -22, -18]
    assert int(latent[1, 0, 7]) & 0x7F == 0x7F
    assert (latent[1, 0, :7] == 0).all()


def test_padding_and_slots_outside_the_pool_write_nothing() -> None:
    slots = torch.tensor([-1, 128, 2**40, -(2**40)])
    latent, index = write(torch.ones(4, 128), torch.ones(4, 64), torch.ones(4, 128), slots, blocks=2)
    assert (latent == -1).all() and (index == -1).all()


@pytest.mark.parametrize("index", [2, 3, 4])
def test_a_bent_reference_is_noticed(index: int) -> None:
    """1 % more in one input changes bytes: the inputs are neither so small nor so coarse that it is rounded away."""
    case = next(c for c in gpu_cases("DsaCacheWrite") if c.name == "scattered-fp8")
    case = ATTRS["DsaCacheWrite"](case, "fp8_ds")
    assert case is not None
    got = interpret(case.op, case.inputs, case.attrs, sm=90)
    bent = list(case.inputs)
    bent[index] = (bent[index].float() * 1.01).bfloat16()
    assert not same(got, dsa_cache_write(*bent, **case.attrs))  # pyright: ignore[reportArgumentType]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_slots_in_any_order(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(2, 4))
    tokens = data.draw(st.integers(1, 9))
    pool = st.integers(64, blocks * 64 - 1)
    slots = torch.tensor(data.draw(st.lists(pool, min_size=tokens, max_size=tokens, unique=True)))
    slots[torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))] = -1
    c = torch.randn(tokens, data.draw(st.sampled_from([128, 256])), generator=torch.Generator().manual_seed(tokens))
    k_pe, key = c[:, :64] * 2, c[:, :128] * 30
    got = write(c, k_pe, key, slots, blocks=blocks)
    start = [torch.full_like(t, -1) for t in got]
    inputs = [t.bfloat16().unsqueeze(0) for t in (c, k_pe, key)]
    want = dsa_cache_write(*start, *inputs, slots.unsqueeze(0), "fp8_ds", "fp8_ds", True, True)
    assert same(got, want)


def test_every_e4m3_value_and_tie_survives() -> None:
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    rows = torch.full((4, 128), 448.0)
    rows[0, :127], rows[1, :127], rows[2, :126], rows[3, :126] = grid, -grid, middle, -middle
    slots = torch.arange(64, 68)
    for sm in (80, 90):
        got = write(rows, torch.zeros(4, 64), rows, slots, blocks=2, sm=sm)[0]
        bytes_ = got[1, :4, :128].contiguous().view(torch.float8_e4m3fn).float()
        assert torch.equal(bytes_, rows.to(torch.float8_e4m3fn).float())


def test_offsets_are_64_bit() -> None:
    """Slot arithmetic of the kernel, as it is compiled: i64 from the slot on (a pool beyond 2 GiB has such offsets)."""
    statics = {"C": 512, "R": 64, "D": 128, "kv_format": "fp8_ds", "index_format": "fp8_ds"}
    statics |= {"kv_fp8": True, "indexer_fp8": True}
    (variant,) = variants(statics, 90)
    assert variant.types["slot_ptr"] == "*i64" and variant.types["num_slots"] == "i64"
    launch = plan(statics | {"B": 1, "Q": 4, "*latent": (2**26, 64, 656)}, 90).launches[0]
    assert launch.arguments["num_slots"] == 2**32


def test_same_bytes_twice() -> None:
    case = ATTRS["DsaCacheWrite"](gpu_cases("DsaCacheWrite")[1], "fp8_ds")
    assert case is not None
    first, second = (interpret(case.op, case.inputs, case.attrs, sm=90) for _ in range(2))
    assert all(itertools.starmap(equal_bits, zip(first, second, strict=True)))
