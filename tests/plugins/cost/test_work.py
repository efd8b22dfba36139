"""Bytes, FLOPs and programs of each operator's launches, against numbers counted by hand from their shapes."""

from __future__ import annotations

from typing import Any

import pytest
from tests import kernels_doc
from tests.gpu import work as perfect

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.formats.targets import NVFP4_SM
from seekforge.plugins.cost.model import shape_of
from seekforge.plugins.cost.work import Load, Work, experts_hit, op_cost, visible_keys
from seekforge.plugins.kernels import sass
from seekforge.plugins.kernels.launch_plan import op_kernels
from seekforge.plugins.kernels.sizes import operators

SIZES = operators(load_preset("full").config)
CACHES: dict[str, Any] = {"*latent": (4097,), "*index": (4097,), "scale": 1.0}


def works(op: str, sm: int = 90, load: Load | None = None, **sizes: Any) -> dict[str, Work]:
    """Return kernel -> its work, of a call whose launches all have different kernels."""
    bound = SIZES[op] | CACHES | sizes
    load = load or Load(context=32768, num_experts=256)
    launches = op_kernels(op).plan(bound, sm).launches
    assert len({one.variant for one in launches}) == len(launches)
    return {one.variant: op_cost(op).work(one, bound, sm, load) for one in launches}


def test_a_linear_of_few_rows() -> None:
    found = works("BlockFp8Linear", **{"*lead": (4, 8), "N": 2112, "K": 7168})
    assert list(found) == ["quantize", "narrow-32x16"]
    assert found["quantize"] == Work(
        read_bytes=32 * 7168 * 2,
        written_bytes=32 * 7168 + 32 * 56 * 4,
        loaded_bytes=32 * 7168 * 2,
        programs=4 * 56,  # 8 rows and 128 columns each
    )
    product = found["narrow-32x16"]  # 132 times 16 rows of the weight, 4 blocks of 128 in a pass
    assert product.programs == 132 and product.passes == (14,)
    assert product.read_bytes == 32 * 7168 + 32 * 56 * 4 + 2112 * 7168 + 17 * 56 * 4
    assert product.written_bytes == 32 * 2112 * 2
    assert product.flops == 2 * 32 * 2112 * 7168
    assert product.pass_flops == 2 * 32 * 16 * 512 and product.products == "fp8"
    assert product.loaded_bytes == 132 * (32 + 16) * 7168


def test_a_linear_of_two_rows_quantizes_them_itself() -> None:
    found = works("BlockFp8Linear", **{"*lead": (2, 1), "N": 7168, "K": 2048})
    assert list(found) == ["narrow-2x32-quantize"]
    product = found["narrow-2x32-quantize"]
    assert product.programs == 224 and product.passes == (4,)
    assert product.read_bytes == 2 * 2048 * 2 + 7168 * 2048 + 56 * 16 * 4, "rows as BF16"
    assert product.loaded_bytes == 224 * (2 * 2 + 32) * 2048


@pytest.mark.parametrize(("rows", "kernel"), [(2, "narrow-2x32"), (16, "narrow-16x32"), (128, "tile-64x128")])
def test_a_linear_of_quantized_rows_quantizes_nothing(rows: int, kernel: str) -> None:
    found = works("BlockFp8Linear", **{"*lead": (rows,), "N": 7168, "K": 2048, "KB": 16})
    assert "quantize" not in found and {"combine"} >= found.keys() - {kernel, f"{kernel}-split"}
    product = found[kernel] if kernel in found else found[f"{kernel}-split"]
    assert product.read_bytes == rows * (2048 + 16 * 4) + 7168 * 2048 + 56 * 16 * 4, "rows as codes and scales"


def test_a_norm_is_read_once_and_written_thrice() -> None:
    sizes = {"*lead": (4, 8), "H": 7168, "epsilon": 1e-6}
    adds = works("AddRmsNormQuantize", **sizes, R=7168)["norm-64"]
    assert adds.programs == 32 and adds.flops == 0
    assert adds.read_bytes == 32 * 2 * 7168 * 2 + 7168 * 4
    assert adds.loaded_bytes == 32 * (2 * 7168 * 2 + 7168 * 4), "each program reads the weight"
    assert adds.written_bytes == 32 * (2 * 7168 * 2 + 7168 + 56 * 4)
    alone = works("AddRmsNormQuantize", **sizes, R=0)["norm-64"]
    assert adds.read_bytes - alone.read_bytes == 32 * 7168 * 2


def test_a_linear_of_a_few_hundred_rows_is_split() -> None:
    found = works("BlockFp8Linear", **{"*lead": (1, 128), "N": 7168, "K": 16384})
    product = found["tile-64x128-split"]  # two tiles of rows, 56 of columns, two splits of 128 blocks of K
    assert product.programs == 2 * 56 * 2 and product.passes == (64,)
    assert product.written_bytes == 2 * 128 * 7168 * 4
    assert product.pass_flops == 2 * 64 * 128 * 128
    assert product.loaded_bytes == 2 * 56 * (64 + 128) * 16384
    assert found["combine"].read_bytes == product.written_bytes
    assert found["combine"].written_bytes == 128 * 7168 * 2
    assert found["combine"].programs == 896  # 1,024 values each


def test_a_linear_of_many_rows() -> None:
    found = works("BlockFp8Linear", **{"*lead": (1, 2048), "N": 7168, "K": 2048})
    product = found["tile-128x128"]
    assert product.programs == 16 * 56 and product.passes == (16,)
    assert product.read_bytes == 2048 * 2048 + 2048 * 16 * 4 + 7168 * 2048 + 56 * 16 * 4
    assert product.written_bytes == 2048 * 7168 * 2
    assert product.loaded_bytes == 16 * 56 * 256 * 2048  # each tile reads 128 rows of both factors


def test_products_on_a_gpu_without_fp8_are_bf16() -> None:
    found = works("BlockFp8Linear", sm=80, **{"*lead": (1, 128), "N": 7168, "K": 2048})
    assert found["tile-64x128"].products == "bf16"
    assert found["tile-64x128"].read_bytes == 128 * 2048 + 128 * 16 * 4 + 7168 * 2048 + 56 * 16 * 4, (
        "weights stay bytes"
    )


def test_a_linear_of_bf16() -> None:
    found = works("Bf16Linear", **{"*lead": (32,), "N": 256, "K": 7168})
    product = found["swap-32x128"]  # two tiles, 16 splits of 112 blocks of 64
    assert product.programs == 2 * 16 and product.passes == (7,)
    assert product.read_bytes == 2 * (32 * 7168 + 256 * 7168)
    assert product.written_bytes == 16 * 32 * 256 * 4
    assert product.flops == 2 * 32 * 256 * 7168 and product.products == "bf16"
    assert found["add-splits"].read_bytes == product.written_bytes
    assert found["add-splits"].written_bytes == 32 * 256 * 4 and found["add-splits"].programs == 8


def test_a_linear_of_bf16_of_a_token() -> None:
    found = works("Bf16Linear", **{"*lead": (1, 1), "N": 256, "K": 7168})
    assert list(found) == ["narrow-4x8"]
    product = found["narrow-4x8"]  # 8 blocks of 64 in a pass
    assert product.programs == 32 and product.passes == (14,)
    assert product.written_bytes == 256 * 4 and product.pass_flops == 2 * 4 * 8 * 512
    assert product.loaded_bytes == 2 * 32 * (4 + 8) * 7168


def test_writing_into_caches() -> None:
    found = works("DsaCacheWrite", B=3, Q=3)["write"]
    assert found == Work(
        read_bytes=9 * ((512 + 64 + 128) * 2 + 8), written_bytes=9 * (656 + 132), loaded_bytes=9 * 1416, programs=3
    )
    latent = works("MlaCacheWrite", B=3, Q=3, kv_format="bf16", kv_fp8=False)["write"]
    assert (latent.read_bytes, latent.written_bytes, latent.programs) == (9 * (576 * 2 + 8), 9 * 1152, 3)


def test_the_indexer_in_decode() -> None:
    found = works("DsaIndexer", B=2, Q=1, MB=512)
    scores = found["scores-1"]
    assert scores.programs == 2 * 128  # 512 pages, 4 each
    assert scores.read_bytes == 2 * (32768 * 132 + 64 * (128 * 2 + 4))
    assert scores.written_bytes == 2 * 32768 * 4 + 2 * 4096 * 4, "and the counts of the first digit, cleared"
    assert scores.flops == 2 * 2 * 32768 * 64 * 128 and scores.products == "fp8"
    assert scores.pass_flops == 2 * 64 * 64 * 128 and scores.passes == (4,)
    read, counts = 2 * (32768 * 4 + 8), 2 * 4096 * 4
    assert found["digit-0"] == Work(
        read_bytes=read, written_bytes=2 * counts, loaded_bytes=2 * 32768 * 4, programs=2 * 16, passes=(1,)
    )
    each = 32 * 257 * 4  # of 16 programs of each row, for the last digit
    assert (found["digit-1"].read_bytes, found["digit-1"].written_bytes) == (read + counts, counts)
    assert (found["digit-2"].read_bytes, found["digit-2"].written_bytes) == (read + counts, each)
    assert found["digit-2"].loaded_bytes == 2 * 32768 * 4 + 32 * 4096 * 4, "every program reads the sums"
    emit = found["emit"]
    assert (emit.read_bytes, emit.written_bytes) == (read + each, 2 * 2048 * 4)
    assert emit.programs == 32 and emit.passes == (1, 1, 0)
    assert emit.loaded_bytes == 2 * 32768 * 4 + 16 * each, "every program reads the counts of its row"


def test_the_selection_of_many_rows() -> None:
    select = works("DsaIndexer", B=200, Q=1, MB=512)["select"]
    assert (select.read_bytes, select.written_bytes) == (200 * (32768 * 4 + 8), 200 * 2048 * 4)
    assert select.loaded_bytes == 4 * 200 * 32768 * 4, "three histograms, and the pass that writes"
    assert select.programs == 200 and select.passes == (16, 16, 16, 16, 0)


def test_the_indexer_scores_nothing_for_rows_that_take_all_they_see() -> None:
    found = works("DsaIndexer", load=Load(context=2050), B=1, Q=4, MB=33)  # the rows see 2047, 2048, 2049 and 2050
    assert found["scores-2"].written_bytes == (2049 + 2050) * 4
    assert found["scores-2"].flops == 2 * (2049 + 2050) * 64 * 128
    assert found["scores-2"].programs == 9, "33 pages, 4 each, of the second pair of rows alone"
    assert found["select"].read_bytes == (2049 + 2050) * 4 + 4 * 8
    assert found["select"].passes == (2, 2, 2, 2, 1)
    short = works("DsaIndexer", load=Load(context=100), B=2, Q=1, MB=33)
    assert short["scores-1"].programs == 0 and short["scores-1"].flops == 0


def test_attention_in_decode() -> None:
    found = works("DsaAttention", B=1, Q=1, MB=512, TOPK=2048)
    part, combine = found["part"], found["combine-32"]
    # 128 heads by 64, columns by 256, 64 steps of 32 keys in 32 splits
    assert part.programs == 2 * 2 * 32 and part.passes == (2,)
    assert part.read_bytes == 2048 * 656 + 128 * 576 * 2 + 2048 * 4
    assert part.written_bytes == 32 * 128 * (512 + 1) * 4
    looked = 4 * 32 * 2048 * 4  # each program looks for the end of its row
    queries = 2 * 32 * 128 * 576 * 2  # of all columns, for the scores of each half
    assert part.loaded_bytes == 4 * 2048 * (656 + 4) + queries + looked, "each key by 4 programs"
    assert part.flops == 2 * 2048 * 128 * (512 + 512 + 64) and part.products == "bf16"
    assert part.pass_flops == 2 * 64 * 32 * (512 + 64 + 256)
    assert (combine.read_bytes, combine.written_bytes) == (part.written_bytes, 128 * 512 * 2)
    assert combine.loaded_bytes == 32 * 128 * (512 + 4) * 4, "four programs of 128 columns, each of which reads sums"
    assert combine.programs == 128 * 4 and combine.passes == ()
    few = works("DsaAttention", B=32, Q=1, MB=512, TOPK=2048)["combine-4"]
    assert few.programs == 32 * 128, "two parts, of all 512 columns in one program"
    assert few.read_bytes == few.loaded_bytes == 32 * 2 * 128 * (512 + 1) * 4


def test_attention_works_on_the_keys_that_a_row_has() -> None:
    found = works("DsaAttention", load=Load(context=300), B=1, Q=1, MB=5, TOPK=2048)
    part, combine = found["part"], found["combine-32"]
    assert part.flops == 2 * 300 * 128 * 1088 and part.read_bytes == 300 * 656 + 128 * 576 * 2 + 2048 * 4
    assert part.programs == 4 * 32 and part.passes == (1,), "10 steps are the share of 10 splits"
    assert part.written_bytes == combine.read_bytes == 128 * (10 * 512 + 32) * 4
    assert part.loaded_bytes == 4 * 300 * 660 + 2 * 10 * 128 * 576 * 2 + 4 * 32 * 2048 * 4
    many = works("DsaAttention", load=Load(context=300), B=128, Q=1, MB=5, TOPK=2048)
    assert many["attend"].passes == (10,)


def test_attention_of_a_long_prompt() -> None:
    found = works("DsaAttention", load=Load(context=4096), B=1, Q=512, MB=64, TOPK=2048)
    expand, attend = found["expand"], found["attend-expanded"]
    assert (expand.read_bytes, expand.written_bytes) == (4096 * 656 + 64 * 4, 4096 * 576 * 2)
    assert expand.programs == 1024
    assert attend.programs == 512 * 4 and attend.passes == (64,)
    assert attend.read_bytes == 4096 * 1152 + 512 * (128 * 576 * 2 + 2048 * 4), "rows share what they choose"
    assert attend.flops == 2 * 512 * 2048 * 128 * 1088
    assert attend.loaded_bytes == 4 * 512 * 2048 * (1152 + 4) + 512 * (2 * 128 * 576 * 2 + 4 * 2048 * 4)


def test_dense_attention_in_decode() -> None:
    found = works("MlaAttention", B=1, Q=1, MB=512)
    part, combine = found["part"], found["combine"]
    # 128 heads by 64, columns by 256, 1,024 steps of 32 keys in 128 parts
    assert part.programs == 2 * 2 * 128 and part.passes == (8,)
    assert part.read_bytes == 32768 * 1152 + 128 * 576 * 2 + 8 + 512 * 4
    assert part.written_bytes == 128 * 128 * (512 + 1) * 4
    queries = 2 * 128 * 128 * 576 * 2  # of all columns, for the scores of each half
    assert part.loaded_bytes == 4 * (32768 * 1152 + 1024 * 4 + 128 * 8) + queries
    assert part.flops == 2 * 32768 * 128 * (512 + 512 + 64) and part.products == "bf16"
    assert part.pass_flops == 2 * 64 * 32 * (512 + 64 + 256)
    assert (combine.read_bytes, combine.written_bytes) == (part.written_bytes, 128 * 512 * 2)
    assert combine.programs == 128 and combine.passes == (8, 8), "16 parts at a time"


def test_dense_attention_of_a_prompt_reads_the_keys_of_a_sequence_once() -> None:
    found = works("MlaAttention", load=Load(context=4096), B=2, Q=512, MB=64)["attend"]
    seen = sum(range(3585, 4097))
    assert found.read_bytes == 2 * 4096 * 1152 + 1024 * (128 * 576 * 2 + 8) + 2 * 64 * 4
    assert found.written_bytes == 1024 * 128 * 512 * 2
    assert found.flops == 2 * 2 * seen * 128 * 1088 and found.passes == (128,)
    assert found.programs == 1024 * 2 * 2 and found.loaded_bytes > 4 * 2 * seen * 1152, "two of heads, two of columns"


def test_routing() -> None:
    found = works("MoeRoute", T=10)["route"]
    assert found == Work(
        read_bytes=10 * 256 * 4 + 256 * 4, written_bytes=10 * 8 * 8, loaded_bytes=(10 + 3) * 256 * 4, programs=3
    )


def test_experts_of_a_few_tokens_are_not_grouped() -> None:
    up, down = works("MoeExperts", T=2).values()
    hit = round(experts_hit(256, 8, 2))
    assert up.programs == 16 * 128 and up.passes == (14,), "16 gate and 16 up rows of each assignment; 4 blocks a pass"
    assert up.read_bytes == hit * (4096 * 7168 + 32 * 56 * 4) + 2 * 7168 * 2, "rows in BF16, quantized in place"
    assert up.loaded_bytes == 16 * 128 * (2 * 16 + 2) * 7168 and up.written_bytes == 16 * 2048 * 2
    assert up.flops == 2 * 16 * 4096 * 7168 and up.pass_flops == 2 * 2 * 16 * 512
    assert down.programs == 2 * 448 and down.passes == (8 * 4,), "all eight experts of a token, one after another"
    assert down.read_bytes == hit * (7168 * 2048 + 16 * 56 * 4) + 16 * 2048 * 2 + 8 * 16
    assert down.written_bytes == 2 * 7168 * 4 and down.flops == up.flops // 2


@pytest.mark.parametrize(("tokens", "up", "down"), [(2, "narrow-up", "narrow-down"), (300, "up-64", "down-64")])
def test_a_shared_expert_is_work_of_every_token(tokens: int, up: str, down: str) -> None:
    """As wide as the others, and an eighth of it as of a rank that shares it."""
    alone = works("MoeExperts", T=tokens, HB=56)
    for width in (2048, 256):
        both = works("MoeExperts", T=tokens, HB=56, S2=2 * width)
        assert both[up].flops - alone[up].flops == 2 * tokens * 2 * width * 7168
        assert both[down].flops - alone[down].flops == 2 * tokens * width * 7168
        # its weights, and of `down` its rows too
        assert both[up].read_bytes - alone[up].read_bytes == 2 * width * 7168 + 2 * width // 128 * 56 * 4
        h = tokens * 2 * width if tokens < 9 else tokens * (width + width // 128 * 4)
        assert both[down].read_bytes - alone[down].read_bytes == width * 7168 + width // 128 * 56 * 4 + h
        more = tokens * width // 16 if tokens < 9 else -(-tokens // 64) * width // 128
        assert both[up].programs - alone[up].programs == more


def test_quantized_rows_of_experts_are_read_as_they_are() -> None:
    up = works("MoeExperts", T=2, HB=56)["narrow-up"]
    hit = round(experts_hit(256, 8, 2))
    assert up.read_bytes == hit * (4096 * 7168 + 32 * 56 * 4) + 2 * (7168 + 56 * 4)
    assert "quantize" not in works("MoeExperts", T=300, HB=56)


def test_experts_of_one_token_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_kernels("MoeExperts"), "few_tokens", lambda sm: 0)
    found = works("MoeExperts", T=1)
    place, up, down, combine = (found[name] for name in ("place", "up-16", "down-16", "combine"))
    assert place.programs == 1 and place.passes == (0, 1, 1), "no counts of others; a tile of each; one tile too many"
    assert place.read_bytes == 8 * 4 and place.written_bytes == 2 * 8 * 4 + 8 * 12 + 4
    assert up.programs == 8 * 16 and up.passes == (56,)
    assert up.read_bytes == 8 * (4096 * 7168 + 32 * 56 * 4) + 7168 + 56 * 4
    assert up.written_bytes == 8 * (2048 + 16 * 4)
    assert up.flops == 2 * 8 * 4096 * 7168 and up.pass_flops == 2 * 2 * 16 * 128 * 128
    assert down.programs == 8 * 56 and down.passes == (16,)
    assert down.read_bytes == 8 * (7168 * 2048 + 56 * 16 * 4) + 8 * (2048 + 16 * 4)
    assert down.written_bytes == 8 * 7168 * 2 and down.flops == 2 * 8 * 7168 * 2048
    assert (combine.read_bytes, combine.written_bytes) == (8 * 7168 * 2 + 8 * 8, 7168 * 4)


def test_experts_of_many_tokens_and_of_ranks() -> None:
    found = works("MoeExperts", T=2048)
    assert found["up-128"].programs == 256 * 16, "64 rows each: one tile of 128"
    count, place = found["count"], found["place"]  # 16,384 assignments by 64 programs; 384 tiles, of which 256 are used
    assert count == Work(read_bytes=16384 * 4, written_bytes=64 * 256 * 4, loaded_bytes=16384 * 4, programs=64)
    assert place.programs == 64 and place.passes == (2, 1, 1), "counts of 32 programs at a time"
    assert place.read_bytes == 16384 * 4 + 64 * 256 * 4
    assert place.written_bytes == 2 * 16384 * 4 + 256 * 12 + 128 * 4
    assert place.loaded_bytes == 2 * 16384 * 4 + 64 * (64 * 256 * 4)
    shared = works("MoeExperts", T=2048, E=32)  # of 256
    assert shared["up-128"].programs == 32 * 16 and shared["up-128"].flops == 2 * 2048 * 4096 * 7168
    whole = works("MoeExperts", load=Load(context=1, num_experts=32), T=2048, E=32)
    assert whole["up-128"].flops == 8 * shared["up-128"].flops


def test_experts_in_nvfp4_read_nine_sixteenths_and_multiply_in_f16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_kernels("MoeExperts"), "few_tokens", lambda sm: 0)
    found = works("MoeExperts", sm=100, T=1, W13=4032)
    up, down, fp8 = found["up-nvfp4-16"], found["down-nvfp4-16"], works("MoeExperts", sm=100, T=1)
    assert up.programs == 8 * 16 and up.passes == (56,) and up.products == down.products == "f16"
    assert up.read_bytes == 8 * (4096 * 7168 * 9 // 16 + 32 * 56 * 4) + 7168 + 56 * 4
    assert up.loaded_bytes == up.programs * (16 * 7168 + 256 * 4032)
    assert down.read_bytes == 8 * (7168 * 2048 * 9 // 16 + 56 * 16 * 4) + 8 * (2048 + 16 * 4)
    for name, one in (("up-16", up), ("down-16", down)):
        assert (one.flops, one.written_bytes) == (fp8[name].flops, fp8[name].written_bytes)


def test_a_few_tokens_of_experts_in_nvfp4_are_not_grouped_either() -> None:
    few, fp8 = works("MoeExperts", sm=100, T=2, HB=56, W13=4032), works("MoeExperts", sm=100, T=2, HB=56)
    hit = round(experts_hit(256, 8, 2))
    for name, values in (("up", 4096 * 7168), ("down", 2048 * 7168)):
        one, other = few[f"narrow-{name}-nvfp4"], fp8[f"narrow-{name}"]
        assert other.read_bytes - one.read_bytes == hit * values * 7 // 16
        assert other.loaded_bytes - one.loaded_bytes == 16 * values * 7 // 16
        assert (one.programs, one.flops, one.passes) == (other.programs, other.flops, other.passes)
        assert (one.products, other.products) == ("f16", "fp8")


@pytest.mark.parametrize(("sm", "w13"), [(90, 7168), (100, 4032)])
def test_slices_of_experts_are_told_apart(sm: int, w13: int) -> None:
    bound = SIZES["MoeExperts"] | {"T": 2048 + 100, "W13": w13}
    load = Load(context=1, num_experts=256)
    launches = op_kernels("MoeExperts").plan(bound, sm).launches
    ups = [op_cost("MoeExperts").work(one, bound, sm, load) for one in launches if one.variant.startswith("up")]
    assert [one.flops for one in ups] == [2 * 8 * tokens * 4096 * 7168 for tokens in (2048, 100)]


def test_experts_that_are_hit() -> None:
    assert experts_hit(256, 8, 1) == pytest.approx(8)
    assert visible_keys(Load(context=10), 3) == [8, 9, 10]
    assert visible_keys(Load(context=1), 1) == [1]


@pytest.mark.parametrize(
    ("op", "sizes", "least"),
    [
        ("BlockFp8Linear", {"*lead": (1, 4096), "N": 7168, "K": 16384}, perfect.linear_work(4096, 7168, 16384)),
        ("Bf16Linear", {"*lead": (4096,), "N": 256, "K": 7168}, perfect.bf16_linear_work(4096, 256, 7168)),
        ("MoeRoute", {"T": 64}, perfect.route_work(64, 256, 8)),
        (
            "DsaAttention",
            {"B": 128, "Q": 1, "MB": 512, "TOPK": 2048},
            perfect.attention_work(128, 128 * 2048, heads=128, latent=512, rope=64, key_bytes=656),
        ),
        (
            "MlaAttention",
            {"B": 128, "Q": 1, "MB": 512},
            perfect.dense_attention_work([[32768]] * 128, heads=128, latent=512, rope=64, key_bytes=1152),
        ),
        (
            "DsaIndexer",
            {"B": 2, "Q": 1, "MB": 512},
            perfect.indexer_work([[32768]] * 2, heads=64, dim=128, topk=2048, key_bytes=132, takes_all=False),
        ),
        ("MoeExperts", {"T": 2048}, perfect.experts_work(2048, 16384, 256, hidden=7168, inner=2048)),
    ],
)
def test_launches_do_the_work_of_a_perfect_kernel_and_never_less(
    op: str, sizes: dict[str, Any], least: perfect.Work
) -> None:
    found = works(op, **sizes).values()
    assert sum(one.flops for one in found) == least.flops
    assert sum(one.memory_bytes for one in found) >= least.num_bytes
    assert all(one.loaded_bytes >= one.read_bytes * 0.99 for one in found if one.passes or not one.flops)


def _tiles() -> dict[tuple[str, int, str], float]:
    """Return (op, SM, kernel) -> FLOPs of a pass, from plans of many sizes."""
    shapes: dict[str, list[dict[str, Any]]] = {
        "BlockFp8Linear": [{"*lead": (rows,), "N": n, "K": 7168} for rows in (16, 32, 64, 4096) for n in (2112, 65536)],
        "Bf16Linear": [{"*lead": (rows,), "N": 256, "K": 7168} for rows in (16, 32, 64, 4096)],
        "DsaIndexer": [{"B": 1, "Q": q, "MB": 512} for q in (1, 2, 64)],
        "DsaAttention": [{"B": b, "Q": q, "MB": 512, "TOPK": 2048} for b, q in ((1, 1), (128, 1), (1, 512))],
        "MlaAttention": [{"B": b, "Q": 1, "MB": 512} for b in (1, 128)],
        "MoeExperts": [{"T": tokens} for tokens in (9, 512, 2048)],
    }
    nvfp4 = [sizes | {"W13": 4032} for sizes in shapes["MoeExperts"]]
    return {
        (op, sm, name): work.pass_flops
        for op, listed in [*shapes.items(), ("MoeExperts", nvfp4)]
        for sizes in listed
        for sm in kernels_doc.SMS
        if "W13" not in sizes or sm >= NVFP4_SM
        for name, work in works(op, sm=sm, **sizes).items()
        if work.flops
    }


def test_main_loops_multiply_whole_tiles_and_no_product_thrice() -> None:
    """What a plan counts is what the compiler made: a tile that is counted wrongly has another number of FLOPs."""
    tiles, ratios = _tiles(), {}
    for one in kernels_doc.recorded():
        key = one["op"], one["sm"], one["kernel"]
        if one["loop"] is None or key not in tiles:
            continue
        shapes = {name: shape_of(name)[0] for name in one["tensor"]}
        if None in shapes.values() or len(shapes) > 1:
            continue  # tcgen05 does not say; of several the record does not say which are in the loop
        ((name, shape),) = shapes.items()
        assert shape is not None
        m, n, k = shape
        groups = one["warps"] / (4 if sass.tensor_kind(name) == sass.WGMMA else 1)
        ratios[key] = one["loop"]["tensor"] * 2 * m * n * k * groups / tiles[key]
    assert len(ratios) > 60
    assert all(1 <= ratio < 2 for ratio in ratios.values()), ratios
    twice = {(op, kernel) for (op, _, kernel), ratio in ratios.items() if ratio > 1.001}
    sparse = {("DsaAttention", "attend"), ("DsaAttention", "part"), ("DsaAttention", "attend-expanded")}
    assert twice == sparse | {("MlaAttention", "attend"), ("MlaAttention", "part")}
    assert ratios["DsaAttention", 89, "part"] == pytest.approx(104 / 68), "scores are computed twice"
