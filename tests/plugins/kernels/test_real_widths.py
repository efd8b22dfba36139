"""Every operator's kernels at the static sizes of DeepSeek-V3.2, under Triton's interpreter, with few tokens.

What is compiled for the full model is what runs here: 128 heads, latents of 512 + 64, 64 index heads, 2048 keys per
row, 256 experts in 8 groups, widths of 7168. Only the experts' inner width is cut in the ordinary run (2048 takes a
minute, and is marked slow).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.gpu.judge import judge
from tests.support.kernel_cases import packed_index, packed_latents
from torch import Tensor

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.formats.quantization.nvfp4 import row_bytes, rows_of_fp8
from seekforge.plugins.kernels.interpreter import interpret
from seekforge.plugins.kernels.launch_plan import op_kernels, statics_of
from seekforge.plugins.kernels.sizes import operators
from seekforge.plugins.quant import fake_quantize, quantize
from seekforge.plugins.testing import Case, Draw

SIZES = operators(load_preset("full").config)
NVFP4_SIZES = operators(load_preset("full").config, nvfp4_experts=True)


def check(case: Case, *, changed: tuple[str, ...] = (), sizes: Mapping[str, Any] = SIZES, sm: int = 90) -> None:
    """Run a case that has the model's statics (all but `changed`), and compare; then a result that is 1 % off."""
    statics = statics_of(case.op, case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs))
    wanted = statics_of(case.op, sizes[case.op])
    assert {name: v for name, v in statics.items() if name not in changed} == {
        name: v for name, v in wanted.items() if name not in changed
    }
    got, want = interpret(case.op, case.inputs, case.attrs, sm=sm), case.expected()
    right, error = judge(case, got, want)
    assert right, error
    if case.op not in ("DsaCacheWrite", "DsaIndexer"):
        assert not judge(case, tuple(one * 1.01 if one.is_floating_point() else one for one in got), want)[0]


def test_linear() -> None:
    """The last 64 rows of q_a + kv_a are half a block; K is split."""
    draw = Draw(0)
    inputs = (draw.normal(2, 7168).bfloat16(), draw.fp8(192, 7168), draw.weight_scale(2, 56))
    check(Case("BlockFp8Linear", "real", inputs, {"act_quant": "ue8m0"}))


def test_linear_of_quantized_rows() -> None:
    draw = Draw(1)
    codes, scale = quantize(draw.normal(2, 7168))
    weight = draw.fp8(192, 7168), draw.weight_scale(2, 56)
    x = torch.full((2, 7168), torch.nan).bfloat16()
    check(Case("BlockFp8Linear", "codes", (x, *weight, codes.view(torch.int32), scale), {"act_quant": "ue8m0"}))


@pytest.mark.parametrize(("width", "adds"), [(7168, True), (1536, False)])
def test_norm(width: int, adds: bool) -> None:
    draw = Draw(2)
    x, residual = (draw.normal(3, width).bfloat16() for _ in range(2))
    inputs = (x, draw.normal(width), *((residual,) if adds else ()))
    check(Case("AddRmsNormQuantize", "real", inputs, {"epsilon": 1e-6}))


def test_router() -> None:
    """The whole router of DeepSeek-V3.2; its K is split."""
    draw = Draw(10)
    check(Case("Bf16Linear", "real", (draw.normal(3, 7168).bfloat16(), draw.normal(256, 7168).bfloat16()), {}))


def test_cache_write() -> None:
    draw = Draw(1)
    caches = torch.zeros(3, 64, 656, dtype=torch.int8), torch.zeros(3, 8448, dtype=torch.int8)
    rows = [draw.normal(1, 5, width).bfloat16() for width in (512, 64, 128)]
    slots = torch.tensor([[64, 191, -1, 127, 128]])
    attrs = {name: SIZES["DsaCacheWrite"][name] for name in ("kv_format", "index_format", "kv_fp8", "indexer_fp8")}
    check(Case("DsaCacheWrite", "real", (*caches, *rows, slots), attrs))


def test_indexer() -> None:
    """2048 of 2112 keys."""
    draw, blocks = Draw(2), 33
    table = draw.block_table(1, blocks, blocks + 2)
    cache = packed_index(draw.normal((blocks + 2) * 64, 128))
    inputs = (
        draw.normal(1, 1, 64, 128).bfloat16(),
        draw.normal(1, 1, 64) * 0.01,
        cache,
        table,
        torch.tensor([[2105]]),
    )
    attrs = {name: SIZES["DsaIndexer"][name] for name in ("index_topk", "indexer_fp8", "index_format")}
    check(Case("DsaIndexer", "real", inputs, attrs))


@pytest.mark.parametrize(("topk", "visible"), [(2500, 2560), (4100, 4096)])
def test_an_indexer_that_picks_more_than_deepseek_does(topk: int, visible: int) -> None:
    """Kernels take any index_topk: more than one step of the selection, and more than there are keys."""
    draw, blocks = Draw(topk), visible // 64
    cache = packed_index(draw.normal((blocks + 1) * 64, 128))
    inputs = (
        draw.normal(1, 1, 16, 128).bfloat16(),
        draw.normal(1, 1, 16) * 0.01,
        cache,
        draw.block_table(1, blocks, blocks + 1),
        torch.tensor([[visible - 2]]),
    )
    attrs = {"index_topk": topk, "indexer_fp8": True, "index_format": "fp8_ds"}
    case = Case("DsaIndexer", "wide", inputs, attrs)
    right, error = judge(case, interpret(case.op, case.inputs, case.attrs, sm=90), case.expected())
    assert right, error


def test_attention() -> None:
    """128 heads; 100 of 192 keys, then −1."""
    draw, blocks = Draw(3), 3
    latents = torch.cat([fake_quantize(draw.normal((blocks + 1) * 64, 512)), draw.normal((blocks + 1) * 64, 64)], 1)
    picked = torch.full((1, 1, 128), -1, dtype=torch.int32)
    picked[0, 0, :100] = draw.order(blocks * 64)[:100].sort().values.int()
    inputs = (
        draw.normal(1, 1, 128, 512).bfloat16(),
        draw.normal(1, 1, 128, 64).bfloat16(),
        packed_latents(latents, 512),
        draw.block_table(1, blocks, blocks + 1),
        picked,
    )
    check(Case("DsaAttention", "real", inputs, {"scale": 0.1352337788608801, "kv_format": "fp8_ds"}))


def test_dense_attention() -> None:
    """128 heads; 133 of 192 positions, in parts, one of which has a single position; NaN behind them."""
    draw, blocks = Draw(5), 3
    table = draw.block_table(1, blocks, blocks + 1)
    cache = torch.full(((blocks + 1) * 64, 576), torch.nan)
    seen = torch.arange(133)
    cache[table[0].long()[seen // 64] * 64 + seen % 64] = draw.normal(133, 576)
    queries = draw.normal(1, 1, 128, 512).bfloat16(), draw.normal(1, 1, 128, 64).bfloat16()
    inputs = (*queries, cache.bfloat16(), table, torch.tensor([[132]]))
    check(Case("MlaAttention", "real", inputs, {"scale": 0.1352337788608801, "kv_format": "bf16"}))


def test_route() -> None:
    draw = Draw(4)
    attrs = {name: SIZES["MoeRoute"][name] for name in ("n_group", "topk_group", "top_k", "norm")} | {"scale": 2.5}
    check(Case("MoeRoute", "real", (draw.normal(5, 256), draw.normal(256) * 0.05), attrs))


def experts_case(inner: int, chosen: tuple[int, ...]) -> Case:
    """One token and 256 experts, of which only the chosen ones have memory; the others are of other ranks."""
    draw, hidden = Draw(inner), 7168
    ids = torch.full((1, 8), -1, dtype=torch.int32)
    ids[0, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)

    def weights(n: int, k: int) -> Tensor:
        # untouched pages of calloc cost nothing
        all_of_them = torch.from_numpy(np.zeros((256, n, k), np.uint8)).view(torch.float8_e4m3fn)
        for expert in chosen:
            all_of_them[expert] = draw.fp8(n, k)
        return all_of_them

    inputs = (
        draw.normal(1, hidden).bfloat16(),
        ids,
        draw.uniform(1, 8, low=0.1),
        weights(2 * inner, hidden),
        draw.weight_scale(256, 2 * inner // 128, 56),
        weights(hidden, inner),
        draw.weight_scale(256, 56, inner // 128),
    )
    return Case("MoeExperts", f"inner-{inner}", inputs, {"act_quant": "ue8m0"})


@pytest.mark.parametrize("most_few", [8, 0], ids=["few", "grouped"])
def test_experts_but_for_their_inner_width(most_few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_kernels("MoeExperts"), "few_tokens", lambda sm: most_few)
    check(experts_case(128, (255, 3)), changed=("I2",))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of a gate far below 0
def test_experts_in_nvfp4_but_for_their_inner_width() -> None:
    chosen = (255, 3)
    case = experts_case(128, chosen)
    inputs = list(case.inputs)
    for index in (3, 5):
        rows = torch.zeros(*inputs[index].shape[:2], row_bytes(inputs[index].shape[2]), dtype=torch.int8)
        for expert in chosen:
            values = inputs[index][expert].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
            rows[expert] = torch.from_numpy(rows_of_fp8(values))
        inputs[index] = rows
    check(Case("MoeExperts", "nvfp4", tuple(inputs), case.attrs), changed=("I2",), sizes=NVFP4_SIZES, sm=100)


@pytest.mark.slow
@pytest.mark.parametrize("most_few", [8, 0], ids=["few", "grouped"])
def test_experts(most_few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_kernels("MoeExperts"), "few_tokens", lambda sm: most_few)
    check(experts_case(2048, (131,)))
