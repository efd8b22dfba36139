"""The scratch that an engine asks for when it is built without kernels is enough for the kernels that it gets."""

from __future__ import annotations

import pytest

from seekforge.plugins.launch import SMS, op_kernels
from seekforge.plugins.registry import SPECS
from seekforge.plugins.workspace import workspace_bytes

FP8 = {"act_quant": "ue8m0"}
INDEXER = {"index_topk": 2048, "indexer_fp8": True, "index_format": "fp8_ds"}
ATTENTION = {"scale": 0.1, "kv_format": "fp8_ds"}


def shapes(op: str, b: int, q: int, blocks: int) -> list[tuple[list[tuple[int, ...]], dict]]:
    """Input shapes of DeepSeek-V3.2."""
    t = b * q
    match op:
        case "BlockFp8Linear":
            sizes = ((2112, 7168), (7168, 16384), (576, 7168), (36864, 7168))
            return [([(b, q, k), (n, k), (-(-n // 128), k // 128)], FP8) for n, k in sizes]
        case "DsaIndexer":
            return [([(b, q, 64, 128), (b, q, 64), (9000, 8448), (b, blocks), (b, q)], INDEXER)]
        case "DsaAttention":
            queries = [(b, q, 128, 512), (b, q, 128, 64)]
            return [([*queries, (9000, 64, 656), (b, blocks), (b, q, 2048)], ATTENTION)]
        case _:
            weights = [(256, 4096, 7168), (256, 32, 56), (256, 7168, 2048), (256, 56, 16)]
            return [([(t, 7168), (t, 8), (t, 8), *weights], FP8)]


@pytest.mark.parametrize("op", ["BlockFp8Linear", "DsaIndexer", "DsaAttention", "MoeExperts"])
@pytest.mark.parametrize(("b", "q", "blocks"), [(1, 1, 2048), (8, 1, 64), (64, 1, 2048), (256, 2, 64), (1, 2048, 512)])
def test_kernels_need_no_more_than_was_asked_for(op: str, b: int, q: int, blocks: int) -> None:
    for inputs, attrs in shapes(op, b, q, blocks):
        bound = SPECS[op].bind(inputs, attrs)
        asked = workspace_bytes(op, inputs, attrs)
        assert all(op_kernels(op).workspace_bytes(bound, sm) <= asked for sm in SMS)
