"""Bytes and FLOPs that an operator cannot do without, from its sizes. Pure arithmetic.

Bytes are those of a perfect kernel: each input that is needed is read once, each output written once. Scores of the
indexer are written and read once, since selection is a launch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seekforge.plugins.operator import cdiv
from seekforge.plugins.quant import INDEX_KEY_BYTES, latent_record_bytes
from seekforge.plugins.testing import Case


@dataclass(frozen=True)
class Work:
    """What must be moved and computed. `products`: the precision of the matrix products, None without any."""

    num_bytes: int
    flops: int = 0
    products: str | None = None


def linear_work(rows: int, n: int, k: int) -> Work:
    """x bf16 [rows, k] · weight f8 [n, k] with its scales -> bf16 [rows, n]."""
    scales = 4 * cdiv(n, 128) * cdiv(k, 128)
    return Work(n * k + scales + 2 * rows * (n + k), 2 * rows * n * k, "fp8")


def bf16_linear_work(rows: int, n: int, k: int) -> Work:
    """x bf16 [rows, k] · weight bf16 [n, k] -> f32 [rows, n]."""
    return Work(2 * n * k + rows * (4 * n + 2 * k), 2 * rows * n * k, "bf16")


def norm_work(rows: int, width: int, *, adds: bool) -> Work:
    """x, and what is added, bf16 [rows, width] -> sum and norm in bf16, and the norm as codes and scales."""
    return Work(rows * (2 * width * (2 if adds else 1) + 4 * width + width + 4 * (width // 128)) + 4 * width)


def write_work(tokens: int, *, latent: int, rope: int, index: int, kv_format: str) -> Work:
    """Latent, rotary key and indexer key (`index` 0: none) in bf16, and a slot, into the caches."""
    if kv_format == "fp8_ds":
        written = latent_record_bytes(latent, rope) + (INDEX_KEY_BYTES if index else 0)
    else:
        written = 2 * (latent + rope + index)
    return Work(tokens * (2 * (latent + rope + index) + 8 + written))


def indexer_work(
    visible: Sequence[Sequence[int]], *, heads: int, dim: int, topk: int, key_bytes: int, takes_all: bool
) -> Work:
    """Scores and selection.

    Args:
        visible: per sequence, the visible keys of each of its rows.
        heads, dim: of the indexer's queries.
        topk: positions per row.
        key_bytes: of one cached key with its scale.
        takes_all: no row can see more than topk, so that nothing is scored.
    """
    rows, seen = sum(map(len, visible)), sum(map(sum, visible))
    picked = rows * (4 * topk + 8)
    if takes_all:
        return Work(picked)
    keys = sum(max(each, default=0) for each in visible) * key_bytes
    queries = rows * heads * (2 * dim + 4)
    return Work(keys + queries + 2 * 4 * seen + picked, 2 * seen * heads * dim, "fp8")


def attention_work(rows: int, keys: int, *, heads: int, latent: int, rope: int, key_bytes: int) -> Work:
    """Absorbed attention of `rows` over `keys` chosen keys in all, each read once with its index."""
    queries = rows * heads * 2 * (2 * latent + rope)
    return Work(keys * (key_bytes + 4) + queries, 2 * keys * heads * (2 * latent + rope), "bf16")


def dense_attention_work(visible: list[list[int]], *, heads: int, latent: int, rope: int, key_bytes: int) -> Work:
    """Absorbed attention over all positions that each query of each sequence sees, each read once by a sequence."""
    rows, seen = sum(map(len, visible)), sum(map(sum, visible))
    keys = sum(max(each, default=0) for each in visible) * key_bytes
    queries = rows * (heads * 2 * (2 * latent + rope) + 8)
    return Work(keys + queries, 2 * seen * heads * (2 * latent + rope), "bf16")


def route_work(tokens: int, experts: int, top_k: int) -> Work:
    """f32 logits in, ids and weights out."""
    return Work(tokens * (4 * experts + 8 * top_k) + 4 * experts)


def experts_work(tokens: int, assignments: int, hit: int, *, hidden: int, inner: int, row_bytes: int = 0) -> Work:
    """Both products of the experts that are hit, and rows in and out; `row_bytes` of `hidden` weights, 0: FP8's.

    Others are multiplied as BF16.
    """
    weights = 3 * inner * (row_bytes or hidden) + 4 * 3 * cdiv(inner, 128) * cdiv(hidden, 128)
    rows = tokens * hidden * (2 + 4) + 8 * assignments
    products = "fp8" if row_bytes in (0, hidden) else "bf16"
    return Work(hit * weights + rows, 6 * assignments * inner * hidden, products)


def work_of(case: Case) -> Work:
    """Return the work of one call, from its shapes, and where they decide, from its positions and choices."""
    bound: dict[str, Any] = case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs)
    inputs = case.spec.named(case.inputs)
    packed = "fp8_ds" in case.attrs.values()
    match case.op:
        case "AddRmsNormQuantize":
            return norm_work(inputs["x"].numel() // bound["H"], bound["H"], adds=bound["R"] > 0)
        case "BlockFp8Linear":
            return linear_work(inputs["x"].numel() // bound["K"], bound["N"], bound["K"])
        case "Bf16Linear":
            return bf16_linear_work(inputs["x"].numel() // bound["K"], bound["N"], bound["K"])
        case "DsaCacheWrite":
            sizes = {"latent": bound["C"], "rope": bound["R"], "index": bound["D"]}
            return write_work(int((inputs["slot_mapping"] >= 0).sum()), kv_format=case.attrs["kv_format"], **sizes)
        case "MlaCacheWrite":
            sizes = {"latent": bound["C"], "rope": bound["R"], "index": 0}
            return write_work(int((inputs["slot_mapping"] >= 0).sum()), kv_format=case.attrs["kv_format"], **sizes)
        case "DsaIndexer":
            key_bytes = INDEX_KEY_BYTES if packed else 2 * bound["D"]
            return indexer_work(
                (inputs["positions"] + 1).tolist(),
                heads=bound["Hi"],
                dim=bound["D"],
                topk=bound["index_topk"],
                key_bytes=key_bytes,
                takes_all=bound["MB"] * 64 <= bound["index_topk"],
            )
        case "DsaAttention":
            key_bytes = latent_record_bytes(bound["C"], bound["R"]) if packed else 2 * (bound["C"] + bound["R"])
            return attention_work(
                bound["B"] * bound["Q"],
                int((inputs["topk_indices"] >= 0).sum()),
                heads=bound["H"],
                latent=bound["C"],
                rope=bound["R"],
                key_bytes=key_bytes,
            )
        case "MlaAttention":
            return dense_attention_work(
                (inputs["positions"] + 1).tolist(),
                heads=bound["H"],
                latent=bound["C"],
                rope=bound["R"],
                key_bytes=2 * (bound["C"] + bound["R"]),
            )
        case "MoeRoute":
            return route_work(bound["T"], bound["E"], bound["top_k"])
        case _:
            ids = inputs["expert_ids"]
            chosen = ids[(ids >= 0) & (ids < bound["E"])]
            return experts_work(
                bound["T"],
                chosen.numel(),
                int(chosen.unique().numel()),
                hidden=bound["H"],
                inner=bound["I2"] // 2,
                row_bytes=bound["W13"],
            )
