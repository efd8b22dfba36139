"""The kernel that writes latents alone, under Triton's interpreter: bytes equal to the reference in every format."""

from __future__ import annotations

import pytest
import torch
from tests.support.kernel_cases import ATTRS, gpu_cases

from seekforge.plugins.dsa_cache_write.reference import dsa_cache_write
from seekforge.plugins.kernels.interpreter import interpret
from seekforge.plugins.mla_cache_write.reference import mla_cache_write
from seekforge.plugins.testing import Case, equal_bits

CASES = [
    pytest.param(found, sm, id=f"{case}-{kv_format}-{sm}")
    for case in gpu_cases("MlaCacheWrite")
    for kv_format, sm in (("fp8_ds", 90), ("fp8_ds", 80), ("bf16", 90))
    if (found := ATTRS["MlaCacheWrite"](case, kv_format)) is not None  # fp8_ds is always quantized
]


@pytest.mark.parametrize(("case", "sm"), CASES)
def test_bytes_equal_the_reference(case: Case, sm: int) -> None:
    (got,), (want,) = interpret(case.op, case.inputs, case.attrs, sm=sm), case.expected()
    first = 1 if got.dtype == torch.int8 else 64  # block 0 is scrap
    assert equal_bits(got[first:], want[first:])


@pytest.mark.parametrize("kv_format", ["fp8_ds", "bf16"])
def test_a_record_is_that_of_a_layer_with_an_indexer(kv_format: str) -> None:
    """Attention reads the caches of both kinds of layers in one way."""
    found = next(case for case in gpu_cases("MlaCacheWrite") if case.name == "scattered-fp8")
    case = ATTRS["MlaCacheWrite"](found, kv_format)
    assert case is not None
    cache, c, k_pe, slots = case.inputs
    key = torch.zeros(*c.shape[:2], 128, dtype=c.dtype)
    index = torch.zeros(len(cache) * (64 if kv_format == "fp8_ds" else 1), 128, dtype=torch.bfloat16)
    whole, _ = dsa_cache_write(cache, index, c, k_pe, key, slots, kv_format, "bf16", True, False)
    assert equal_bits(mla_cache_write(*case.inputs, **case.attrs), whole)  # pyright: ignore[reportArgumentType]
    (got,) = interpret(case.op, case.inputs, case.attrs, sm=90)
    assert equal_bits(got[64 if kv_format == "bf16" else 1 :], whole[64 if kv_format == "bf16" else 1 :])


def test_padding_and_slots_outside_the_pool_write_nothing() -> None:
    cache = torch.full((2, 64, 128 + 4 + 128), -1, dtype=torch.int8)
    inputs = [torch.ones(1, 4, 128).bfloat16(), torch.ones(1, 4, 64).bfloat16()]
    slots = torch.tensor([[-1, 128, 2**40, -(2**40)]])
    (got,) = interpret("MlaCacheWrite", [cache, *inputs, slots], {"kv_format": "fp8_ds", "kv_fp8": True}, sm=90)
    assert (got == -1).all()


@pytest.mark.parametrize("index", [1, 2])
def test_a_bent_reference_is_noticed(index: int) -> None:
    """1 % more in one input changes bytes: the inputs are neither so small nor so coarse that it is rounded away."""
    found = next(case for case in gpu_cases("MlaCacheWrite") if case.name == "scattered-fp8")
    case = ATTRS["MlaCacheWrite"](found, "fp8_ds")
    assert case is not None
    (got,) = interpret(case.op, case.inputs, case.attrs, sm=90)
    bent = list(case.inputs)
    bent[index] = (bent[index].float() * 1.01).bfloat16()
    assert not equal_bits(got[1:], mla_cache_write(*bent, **case.attrs)[1:])  # pyright: ignore[reportArgumentType]
