"""What `gpu_check` runs: the operators' vectors in a GPU's types, and DeepSeek-V3.2's shapes with published figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from tests.support.kernel_cases import (
    ATTRS,
    gpu_cases,
    packed_index,
    packed_latents,
)
from torch import Tensor

from seekforge.common.errors import SeekforgeError
from seekforge.formats.quantization import nvfp4
from seekforge.formats.targets import NVFP4_SM
from seekforge.plugins.kernels.launch_plan import statics_of
from seekforge.plugins.quant import fake_quantize
from seekforge.plugins.registry import WITH_KERNELS
from seekforge.plugins.testing import Case, Draw

#: Rows of a real case that are compared with the reference, which runs on a CPU; the rest is timed only.
JUDGED_ROWS: Final = 64


def tiny_cases() -> list[Case]:
    """Return the vectors of every operator with kernels, in the types of a GPU target."""
    found = []
    for op in WITH_KERNELS:
        for case in gpu_cases(op):
            change = ATTRS.get(op, lambda one, kv_format: one)
            formats = ("fp8_ds", "bf16") if op in ATTRS else ("",)
            found += [one for kv_format in formats if (one := change(case, kv_format)) is not None]
    return [case for case in found if _has_kernels(case)]


def _has_kernels(case: Case) -> bool:
    try:
        statics_of(case.op, case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs))
    except SeekforgeError:
        return False
    return True


@dataclass(frozen=True)
class Real:
    """A case at real size. `make` draws it when its turn comes.

    Attributes:
        statics: what its kernels are compiled for.
        target: what a kernel should reach here, a judgement that no GPU has confirmed yet, or nothing.
        anchor: a published figure for this shape or the nearest one, with the GPU and the source, or nothing.
        first_sm: the first SM that has kernels of it.
    """

    op: str
    name: str
    statics: dict[str, Any]
    make: Callable[[], Case]
    target: str = ""
    anchor: str = ""
    first_sm: int = 0

    def __str__(self) -> str:
        return f"{self.op} {self.name}"


#: op -> inputs that have the rows, and the axis of the rows in them and in the output.
_ROWS: Final[dict[str, tuple[tuple[int, ...], int]]] = {
    "AddRmsNormQuantize": ((0, 2), 0),
    "BlockFp8Linear": ((0,), 0),
    "Bf16Linear": ((0,), 0),
    "DsaIndexer": ((0, 1, 4), 1),
    "DsaAttention": ((0, 1, 4), 1),
    "MlaAttention": ((0, 1, 4), 1),
    "MoeExperts": ((0, 1, 2), 0),
}


def judged_part(case: Case, got: Sequence[Tensor]) -> tuple[Case, tuple[Tensor, ...]]:
    """Return the first rows of a case and of its results; rows do not depend on each other."""
    if case.op not in _ROWS:
        return case, tuple(got)
    which, axis = _ROWS[case.op]
    first = slice(0, JUDGED_ROWS)
    index = (slice(None),) * axis + (first,)
    inputs = tuple(one[index] if i in which else one for i, one in enumerate(case.inputs))
    return dataclasses.replace(case, inputs=inputs), tuple(one[index] for one in got)


# --- DeepSeek-V3.2 ----------------------------------------------------------------------------------------------

#: out x in features -> TFLOPS of DeepGEMM at 4096 rows.
_LINEAR_ANCHORS: Final = {(24576, 1536): 1166, (7168, 16384): 1470, (7168, 2048): 1204}


def linear(rows: int, n: int, k: int) -> Real:
    """A projection: out x in features."""

    def make() -> Case:
        draw = Draw(rows)
        x, scale = draw.normal(rows, k).bfloat16(), draw.weight_scale(-(-n // 128), k // 128)
        return Case("BlockFp8Linear", "real", (x, draw.fp8(n, k), scale), {"act_quant": "ue8m0"})

    anchor, target = "", ""
    if rows <= 64 and n * k > 30e6:
        target = ">= 75 % of copy bandwidth"
    if rows >= 2048:
        target = ">= 60 % of the anchor"
        if (n, k) in _LINEAR_ANCHORS:
            anchor = f"{_LINEAR_ANCHORS[n, k]} TFLOPS at 4096 rows, H800, DeepGEMM PR 74"
    return Real("BlockFp8Linear", f"T={rows} {n}x{k}", {"act_quant": "ue8m0"}, make, target, anchor)


def norm(rows: int, width: int) -> Real:
    """A sum of two streams, normed and quantized."""

    def make() -> Case:
        draw = Draw(rows)
        x, residual = (draw.normal(rows, width).bfloat16() for _ in range(2))
        return Case("AddRmsNormQuantize", "real", (x, draw.normal(width), residual), {"epsilon": 1e-6})

    target = "<= 3 us" if rows <= 64 else ">= 60 % of copy bandwidth"
    return Real("AddRmsNormQuantize", f"T={rows} {width}", {}, make, target)


def bf16_linear(rows: int, n: int, k: int) -> Real:
    """A product with f32 results: the head, the router."""

    def make() -> Case:
        draw = Draw(rows)
        return Case("Bf16Linear", "real", (draw.normal(rows, k).bfloat16(), draw.normal(n, k).bfloat16()), {})

    target = ">= 80 % of copy bandwidth" if rows <= 64 and n * k > 30e6 else ""
    return Real("Bf16Linear", f"T={rows} {n}x{k}", {}, make, target)


def attention(b: int, q: int, heads: int = 128) -> Real:
    """Sparse attention over 2048 of 4096 cached keys."""
    statics = {"H": heads, "C": 512, "R": 64, "kv_format": "fp8_ds"}

    def make() -> Case:
        draw, blocks = Draw(b), 64
        table = draw.block_table(b, blocks, b * blocks + 1)
        rows = (b * blocks + 1) * 64
        latents = torch.cat([fake_quantize(draw.normal(rows, 512)), draw.normal(rows, 64)], 1)
        picked = torch.stack([draw.order(blocks * 64)[:2048].sort().values for _ in range(b * q)]).int()
        inputs = (
            draw.normal(b, q, heads, 512).bfloat16(),
            draw.normal(b, q, heads, 64).bfloat16(),
            packed_latents(latents, 512),
            table,
            picked.view(b, q, 2048),
        )
        return Case("DsaAttention", "real", inputs, {"scale": 0.1352337788608801, "kv_format": "fp8_ds"})

    target, anchor = "", ""
    if q >= 256:
        target, anchor = ">= 300 TFLOPS", "640 TFLOPS (bf16 prefill), H800, FlashMLA 9241ae3"
    elif b * q >= 64:
        target = ">= 200 TFLOPS"
        anchor = "250 TFLOPS, 410 with keys shared by two blocks, H800, FlashMLA 9241ae3 (b = 128, s_q = 2)"
    elif b * q == 1:
        target = "<= 15 us"
    return Real("DsaAttention", f"B={b} Q={q}", statics, make, target, anchor)


def dense_attention(b: int, q: int, length: int) -> Real:
    """DeepSeek-V3's attention: the last q rows of sequences of `length` keys."""
    statics = {"H": 128, "C": 512, "R": 64, "kv_format": "bf16"}

    def make() -> Case:
        draw, blocks = Draw(b), length // 64
        table = draw.block_table(b, blocks, b * blocks + 1)
        positions = torch.arange(length - q, length).expand(b, q).contiguous()
        queries = draw.normal(b, q, 128, 512).bfloat16(), draw.normal(b, q, 128, 64).bfloat16()
        inputs = (*queries, draw.normal((b * blocks + 1) * 64, 576).bfloat16(), table, positions)
        return Case("MlaAttention", "real", inputs, {"scale": 0.1352337788608801, "kv_format": "bf16"})

    target = ">= 65 % of copy bandwidth" if b * q == 1 else ""
    return Real("MlaAttention", f"B={b} Q={q} L={length}", statics, make, target)


def indexer(b: int, length: int, q: int = 1) -> Real:
    """The last q rows of sequences of `length` keys."""
    statics = {"Hi": 64, "D": 128, "indexer_fp8": True, "index_format": "fp8_ds"}

    def make() -> Case:
        draw, blocks = Draw(b), length // 64
        table = draw.block_table(b, blocks, b * blocks + 1)
        cache = packed_index(draw.normal((b * blocks + 1) * 64, 128))
        positions = torch.arange(length - q, length).expand(b, q).contiguous()
        inputs = (draw.normal(b, q, 64, 128).bfloat16(), draw.normal(b, q, 64) * 0.01, cache, table, positions)
        attrs = {"index_topk": 2048, "indexer_fp8": True, "index_format": "fp8_ds"}
        return Case("DsaIndexer", "real", inputs, attrs)

    target = "scores >= 40 % of FP8 peak" if q > 8 else "scores >= 65 % of copy bandwidth"
    anchor = ""
    if q == 1 and length == 131072:
        target += "; selection <= 25 us a row"
        anchor = "selection of one 68K row: 43.7 us radix, 22.7 us with a hint, B200, TensorRT-LLM blog 21"
    if q == 1 and b == 64:
        anchor = "selection of [64, 9295]: 14.3 us, B200, TensorRT-LLM blog 15"
    return Real("DsaIndexer", f"B={b} Q={q} L={length}", statics, make, target, anchor)


#: tokens -> ms of DeepGEMM and of tuned Triton.
_EXPERT_ANCHORS: Final = {128: (6.36, 12.5), 2048: (9.5, 19.8)}
_EXPERT_TARGETS: Final = {256: "<= 5500 us", 2048: "<= 9000 us"}


def experts(tokens: int, *, in_nvfp4: bool = False) -> Real:
    """All 256 experts on one GPU, in FP8 or NVFP4."""
    statics = {"E": 256, "TOPK": 8, "H": 7168, "I2": 4096, "W13": 7168, "act_quant": "ue8m0"}
    if in_nvfp4:
        statics["W13"] = nvfp4.row_bytes(7168)

    def make() -> Case:
        draw = Draw(tokens)
        ids = torch.stack([draw.order(256)[:8] for _ in range(tokens)]).int()
        w13, w2 = draw.fp8(4096, 7168), draw.fp8(7168, 2048)
        scales = draw.weight_scale(256, 32, 56), draw.weight_scale(256, 56, 16)  # experts differ by their scales
        if in_nvfp4:
            w13, w2 = (torch.from_numpy(nvfp4.rows_of_fp8(one.view(torch.uint8).numpy())) for one in (w13, w2))
        w13, w2 = w13.repeat(256, 1, 1), w2.repeat(256, 1, 1)
        inputs = (draw.normal(tokens, 7168).bfloat16(), ids, draw.uniform(tokens, 8), w13, scales[0], w2, scales[1])
        return Case("MoeExperts", "real", inputs, {"act_quant": "ue8m0"})

    if in_nvfp4:
        return Real("MoeExperts", f"T={tokens} NVFP4", statics, make, first_sm=NVFP4_SM)
    target = _EXPERT_TARGETS.get(tokens, ">= 70 % of copy bandwidth" if tokens <= 32 else "")
    anchor = ""
    if tokens in _EXPERT_ANCHORS:
        ours, triton = _EXPERT_ANCHORS[tokens]
        anchor = f"{ours * 1e3:.0f} us DeepGEMM, {triton * 1e3:.0f} us tuned Triton, H100, vllm PR 13932"
    return Real("MoeExperts", f"T={tokens}", statics, make, target, anchor)


def route(tokens: int) -> Real:
    """Routing among 256 experts in 8 groups."""
    statics: dict[str, Any] = {"E": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "norm": True}
    attrs = {name: statics[name] for name in ("n_group", "topk_group", "top_k", "norm")} | {"scale": 2.5}

    def make() -> Case:
        draw = Draw(tokens)
        return Case("MoeRoute", "real", (draw.normal(tokens, 256), draw.normal(256) * 0.05), attrs)

    return Real("MoeRoute", f"T={tokens}", statics, make, "<= 4 us" if tokens <= 256 else "")


def write(tokens: int) -> Real:
    """New tokens into shuffled slots."""
    statics: dict[str, Any] = {"C": 512, "R": 64, "D": 128, "kv_format": "fp8_ds", "index_format": "fp8_ds"}
    statics |= {"kv_fp8": True, "indexer_fp8": True}
    attrs = {name: statics[name] for name in ("kv_format", "index_format", "kv_fp8", "indexer_fp8")}

    def make() -> Case:
        draw, blocks = Draw(tokens), tokens // 64 + 2
        caches = torch.zeros(blocks, 64, 656, dtype=torch.int8), torch.zeros(blocks, 8448, dtype=torch.int8)
        rows = [draw.normal(1, tokens, width).bfloat16() for width in (512, 64, 128)]
        slots = draw.order((blocks - 1) * 64)[:tokens].view(1, tokens) + 64
        return Case("DsaCacheWrite", "real", (*caches, *rows, slots), attrs)

    target = "<= 3 us" if tokens <= 256 else ">= 50 % of copy bandwidth"
    return Real("DsaCacheWrite", f"T={tokens}", statics, make, target)


def latent_write(tokens: int) -> Real:
    """New tokens of a layer without an indexer into shuffled slots."""
    statics: dict[str, Any] = {"C": 512, "R": 64, "kv_format": "fp8_ds", "kv_fp8": True}
    attrs = {name: statics[name] for name in ("kv_format", "kv_fp8")}

    def make() -> Case:
        draw, blocks = Draw(tokens), tokens // 64 + 2
        cache = torch.zeros(blocks, 64, 656, dtype=torch.int8)
        rows = [draw.normal(1, tokens, width).bfloat16() for width in (512, 64)]
        slots = draw.order((blocks - 1) * 64)[:tokens].view(1, tokens) + 64
        return Case("MlaCacheWrite", "real", (cache, *rows, slots), attrs)

    return Real("MlaCacheWrite", f"T={tokens}", statics, make, "<= 3 us" if tokens <= 256 else "")


def real_cases() -> list[Real]:
    """Return the shapes of DeepSeek-V3.2 that have a published anchor, a target or a clear floor."""
    found = [linear(t, n, k) for n, k in ((2112, 7168), (24576, 1536), (7168, 16384)) for t in (1, 32, 4096)]
    found += [linear(4096, 7168, 2048)] + [norm(t, 7168) for t in (1, 32, 2048)] + [norm(1, 1536)]
    found += [bf16_linear(t, 129280, 7168) for t in (1, 32)] + [bf16_linear(t, 256, 7168) for t in (1, 32, 2048)]
    found += [write(t) for t in (1, 256, 8192)] + [route(t) for t in (1, 256, 8192)]
    found += [latent_write(t) for t in (1, 256, 8192)]
    found += [indexer(1, 32768), indexer(32, 32768), indexer(1, 131072), indexer(64, 9344), indexer(1, 32768, 512)]
    found += [attention(1, 1), attention(64, 1), attention(128, 2), attention(1, 512)]
    found += [dense_attention(1, 1, 32768), dense_attention(64, 1, 4096), dense_attention(1, 512, 4096)]
    found += [experts(t) for t in (1, 32, 128, 256, 2048)] + [experts(t, in_nvfp4=True) for t in (1, 32, 2048)]
    return found
