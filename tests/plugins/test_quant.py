"""Quantization, Hadamard and cache bytes against the known answers (spec §13.1, §13.4, §13.5)."""

import hashlib
import math

import pytest
import torch

from seekforge.plugins.dsa_cache_write.reference import dsa_cache_write
from seekforge.plugins.quant import (
    dequantize_weight,
    fake_quantize,
    hadamard_matrix,
    latent_record_bytes,
    pack_latent,
    quantize,
    ue8m0_scale,
    unpack_index_keys,
    unpack_latent,
)

E4M3 = {
    1.0: 0x38, 1.0625: 0x38, 1.1875: 0x3A, 0.001953125: 0x01, 0.0009765625: 0x00, 0.3: 0x2A, 17.0: 0x58, 19.0: 0x5A,
    100.7: 0x6D, 248.0: 0x78, 440.0: 0x7E, 448.0: 0x7E, -3.3: 0xC5,
}  # fmt: skip
EXPONENTS = {448: 0, 449: 1, 447: 0, 1.75: -8, 1.0: -8, 2.0: -7, 3.5: -7, 7: -6, 100: -2, 0: -22, 1e-5: -22}


def test_e4m3_rounds_to_nearest_even() -> None:
    values = torch.zeros(128)
    values[: len(E4M3)] = torch.tensor(list(E4M3))
    values[-1] = 448.0  # scale 1
    q, scale = quantize(values)
    assert scale.item() == 1.0
    assert q.view(torch.uint8)[: len(E4M3)].tolist() == list(E4M3.values())


@pytest.mark.parametrize(("amax", "exponent"), EXPONENTS.items())
def test_scale_exponents(amax: float, exponent: int) -> None:
    assert ue8m0_scale(torch.tensor(float(amax))).item() == 2.0**exponent


def test_scale_is_the_smallest_power_that_keeps_every_bf16_in_range() -> None:
    bits = torch.arange(0x0001, 0x7F00, dtype=torch.int32)  # every positive bf16 below 1.7e38
    amax = (bits << 16).view(torch.float32)
    scale = ue8m0_scale(amax)
    floored = amax.clamp_min(1e-4).double()
    assert torch.all(floored / scale.double() <= 448)
    assert torch.all(floored / scale.double() > 224)


def test_fake_quantize_keeps_dtype_and_is_idempotent() -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) * 50
    once = fake_quantize(x)
    assert torch.equal(fake_quantize(once), once)
    assert (once - x).abs().max() / x.abs().max() < 2**-4
    assert fake_quantize(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(fake_quantize(torch.zeros(128)), torch.zeros(128))


def test_partial_weight_blocks_use_their_own_scale() -> None:
    weight = torch.ones(192, 256).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    values = dequantize_weight(weight, scale)
    assert torch.equal(values, dequantize_weight(weight.view(torch.int8), scale))
    corners = [(0, 0, 1), (127, 127, 1), (127, 128, 2), (128, 127, 3), (191, 255, 4)]
    assert all(values[row, column] == want for row, column, want in corners)


def test_hadamard_known_answers() -> None:
    assert torch.allclose(torch.tensor([1.0, 2, 3, 4]) @ hadamard_matrix(4), torch.tensor([5.0, -1, -2, 0]))
    out = (torch.arange(128) - 63.5) @ hadamard_matrix()
    want = torch.zeros(128)
    for i, value in enumerate((-5.65685, -11.31371, -22.62742, -45.25483, -90.50967, -181.01934, -362.03867)):
        want[2**i] = value
    assert torch.allclose(out, want, atol=1e-4)
    assert torch.allclose(hadamard_matrix() @ hadamard_matrix(), torch.eye(128), atol=1e-6)


def test_latent_record_bytes() -> None:
    c = (((torch.arange(512) % 128) - 64) / 64).bfloat16().unsqueeze(0)
    k_pe = (torch.arange(64) / 64).bfloat16().unsqueeze(0)
    record = pack_latent(c, k_pe)
    assert record.shape[-1] == latent_record_bytes(512, 64) == 656
    raw = record.numpy().tobytes()
    assert raw[:8].hex() == "f8f8f8f7f7f7f6f6"
    assert raw[512:528].hex() == "0000803b" * 4
    assert raw[528:536].hex() == "0000803c003d403d"
    assert hashlib.sha256(raw).hexdigest() == "8aa11314393cd2988404a41fe3bf8c9e45aae110fbb84a0defd39e452c4437bb"
    back, rotary = unpack_latent(record, 512)
    assert torch.equal(back, fake_quantize(c).float())
    assert torch.equal(rotary, k_pe.float())


def test_latent_tile_scales() -> None:
    c = torch.cat([torch.full((128,), value) for value in (1.0, 3.0, 0.0, 0.00099945)]).bfloat16().unsqueeze(0)
    raw = pack_latent(c, torch.zeros(1, 64))[0, 512:528].contiguous().view(torch.float32)
    assert [math.log2(s) for s in raw.tolist()] == [-8, -7, -22, -18]


def test_index_page_bytes() -> None:
    i, j = torch.arange(64).unsqueeze(1), torch.arange(128)
    keys = ((((7 * i + 3 * j) % 17) - 8) / 4).bfloat16()
    latent, pages = torch.zeros(2, 64, 656, dtype=torch.int8), torch.zeros(2, 64 * 132, dtype=torch.int8)
    slots = torch.arange(64, 128).unsqueeze(0)
    c, k_pe = torch.zeros(1, 64, 512).bfloat16(), torch.zeros(1, 64, 64).bfloat16()
    _, pages = dsa_cache_write(latent, pages, c, k_pe, keys.unsqueeze(0), slots, "fp8_ds", "fp8_ds", True, True)
    raw = pages[1].numpy().tobytes()
    assert raw[:8].hex() == "f8f2e8607076f6f0"
    assert raw[8192:8200].hex() == "0000003c0000003c"
    assert hashlib.sha256(raw).hexdigest() == "0e2b9c6a9083194d54cd45a8708ca86c7423569b70e74d4227b48460a8416016"
    assert torch.equal(unpack_index_keys(pages, slots[0]), fake_quantize(keys).float())
    assert not pages[0].any()
