"""What kernels cost: the record is of the sources as they are, nothing spills or lost its tensor instruction unsaid.

The record is made by `python -m tests.kernels_doc --compile`. Each of its lines has the digest of all that the kernel
was made from, so a change without a new record fails where no compiler is, and its numbers are judged anywhere.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tests import kernels_doc

from seekforge.exporter.builder.kernel_numbers import Record, code_of, faults, records
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.plugins.kernels import aot, sass
from seekforge.plugins.kernels.kernel_set import KernelSet
from seekforge.plugins.kernels.launch_plan import Variant, op_kernels, statics_of
from seekforge.plugins.kernels.rules import KNOWN_MMA_SYNC, KNOWN_SPILLS, tensor_instruction
from seekforge.plugins.kernels.sizes import operators
from seekforge.plugins.kernels.sm_limits import SHARED_LIMIT, is_datacenter
from seekforge.plugins.registry import SPECS, WITH_KERNELS

COMPILER = kernels_doc.read_record()["compiler"]
RECORD = {(one["op"], one["sm"], one["kernel"]): one for one in kernels_doc.recorded()}
VARIANTS = kernels_doc.variants()
RENEW = "run: python -m tests.kernels_doc --compile"


def test_every_operator_has_kernels_but_those_that_tensorrt_runs_itself() -> None:
    assert set(SPECS) - set(WITH_KERNELS) <= {"SumRanks"}, "a collective is TensorRT's own layer"


def test_the_record_is_of_every_kernel_of_the_full_model_for_every_sm_as_its_sources_are() -> None:
    wanted = {key: aot.image_key(key[0], one, key[1], compiler=COMPILER)[:16] for key, one in VARIANTS.items()}
    stale = sorted(key for key in wanted.keys() | RECORD.keys() if RECORD.get(key, {}).get("key") != wanted.get(key))
    assert not stale, f"{len(stale)} kernels changed, such as {stale[0]}; {RENEW}"


def test_nothing_spills_and_no_tensor_instruction_is_lost_unsaid() -> None:
    assert faults(list(RECORD.values()), VARIANTS) == []


def test_what_is_known_to_be_slow_still_is_and_has_a_reason() -> None:
    spilled = {(op, name, sm): one["spill_bytes"] for (op, sm, name), one in RECORD.items() if one["spill_bytes"]}
    assert spilled == {key: size for key, (size, _) in KNOWN_SPILLS.items()}
    datacenter = {key: one for key, one in RECORD.items() if is_datacenter(key[1])}
    narrow = {(op, name, sm) for (op, sm, name), one in datacenter.items() if _kinds(one) == {sass.MMA_SYNC}}
    assert narrow == set(KNOWN_MMA_SYNC)
    assert all(len(reason) > 20 for reason in [*KNOWN_MMA_SYNC.values(), *(why for _, why in KNOWN_SPILLS.values())])


def _kinds(one: Record) -> set[str]:
    return {sass.tensor_kind(name) for name in one["tensor"]}


@pytest.mark.parametrize(
    ("heads", "sm", "instruction"), [(16, 90, "HMMA"), (17, 90, "HGMMA"), (17, 100, "UTCHMMA"), (17, 120, "HMMA")]
)
def test_few_heads_need_no_wide_products(heads: int, sm: int, instruction: str) -> None:
    statics = {"H": heads, "C": 512, "R": 64, "kv_format": "fp8_ds"}
    part = next(one for one in op_kernels("DsaAttention").variants(statics, sm) if one.name == "part")
    assert tensor_instruction("DsaAttention", part, sm) == instruction


def test_every_kernel_with_products_has_tensor_instructions_in_a_main_loop_that_may_be_unrolled() -> None:
    for key, one in RECORD.items():
        assert bool(one["tensor"]) == one["main_loop"], key
        if one["loop"] is None:
            continue
        assert 0 < one["loop"]["tensor"] <= sum(one["tensor"].values()), key
        assert one["loop"]["tensor"] < one["loop"]["instructions"] < one["instructions"], key


@pytest.mark.parametrize(
    ("key", "instruction"),
    [
        (("BlockFp8Linear", 80, "tile-64x128"), "HMMA"),
        (("BlockFp8Linear", 89, "tile-64x128"), "QMMA"),
        (("BlockFp8Linear", 90, "tile-128x128"), "QGMMA"),
        (("MoeExperts", 100, "up-128"), "UTCQMMA"),
        (("MoeExperts", 100, "up-nvfp4-64"), "UTCHMMA"),
        (("MoeExperts", 120, "down-nvfp4-32"), "HMMA"),
        (("DsaIndexer", 121, "scores-4"), "QMMA"),
        (("DsaAttention", 89, "attend"), "HMMA"),
        (("DsaAttention", 90, "part"), "HGMMA"),
        (("DsaAttention", 100, "part"), "UTCHMMA"),
        (("DsaAttention", 90, "attend-expanded"), "HGMMA"),
        (("DsaAttention", 103, "attend-expanded"), "UTCHMMA"),
        (("MlaAttention", 120, "attend"), "HMMA"),
        (("MlaAttention", 90, "part"), "HGMMA"),
        (("MlaAttention", 100, "part"), "UTCHMMA"),
        (("Bf16Linear", 90, "add-splits"), ""),
    ],
)
def test_the_instruction_that_a_kernel_must_have_follows_from_its_operands_and_sm(
    key: tuple[str, int, str], instruction: str
) -> None:
    assert tensor_instruction(key[0], VARIANTS[key], key[1]) == instruction


def test_without_quantized_rows_products_are_bf16() -> None:
    (variant,) = (
        one
        for one in kernels_doc.op_kernels("BlockFp8Linear").variants({"act_quant": "none"}, 90)
        if one.name == "tile-64x128"
    )
    assert tensor_instruction("BlockFp8Linear", variant, 90) == "HGMMA"


TILE = ("BlockFp8Linear", 90, "tile-64x128")


@pytest.mark.parametrize(
    ("key", "changed", "said"),
    [
        (TILE, {"tensor": {}}, "compiled to no tensor instruction, expected QGMMA"),
        (TILE, {"tensor": {"HMMA.16816.F32.BF16": 32}}, "compiled to HMMA, expected QGMMA"),
        (TILE, {"tensor": {"HGMMA.64x128x16.F32.BF16": 4, "QGMMA.64x128x32": 4}}, "compiled to HGMMA and QGMMA"),
        (("Bf16Linear", 90, "add-splits"), {"tensor": {"HMMA.1688.F32": 1}}, "compiled to HMMA, expected none"),
        (TILE, {"spill_bytes": 8}, "8 bytes of stack, 0 known"),
        (TILE, {"spill_stores": 1, "spill_loads": 2}, "spills, 1 stores and 2 loads"),
        (("Bf16Linear", 90, "add-splits"), {"spill_bytes": 16}, "16 bytes of stack, 0 known"),
        (("MoeExperts", 90, "up-128"), {"spill_bytes": 24}, "24 bytes of stack, 16 known"),
    ],
)
def test_each_new_fault_is_named(key: tuple[str, int, str], changed: dict, said: str) -> None:
    (found,) = faults([RECORD[key] | changed], VARIANTS)
    assert f"{key[0]} {key[2]} sm{key[1]}: " in found and said in found


def test_every_kernel_fits_its_sm() -> None:
    for one in RECORD.values():
        assert one["shared_bytes"] <= SHARED_LIMIT[one["sm"]]
        assert one["occupancy"] > 0, f"{one['op']} {one['kernel']} sm{one['sm']} cannot be resident"


def test_the_tables_of_the_docs_are_up_to_date() -> None:
    page = (kernels_doc.DOCS / "kernels.md").read_text(encoding="utf-8")
    assert kernels_doc.updated(page) == page, "run: python -m tests.kernels_doc"


def _need_the_compiler() -> None:
    """Skip without a compiler, or where torch brings one of its own choice; fail if the record is of another."""
    pytest.importorskip("triton", reason="triton compiles the kernels; it exists for Linux only")
    found = f"triton {importlib.metadata.version('triton')}"
    if found != COMPILER and any(one.startswith("triton") for one in importlib.metadata.requires("torch") or []):
        pytest.skip(f"the record is of {COMPILER}; this torch pins {found}")
    assert found == COMPILER, RENEW


def _compile(key: tuple[str, int, str], folder: Path) -> KernelSet:
    """Compile one variant; in a process of its own, as a build does."""
    op, sm, _ = key
    statics = statics_of(op, operators(load_preset("full").config)[op])
    image, cubin = aot.compile_variant(op, VARIANTS[key], sm)
    (folder / f"sm{sm}").mkdir(exist_ok=True)
    (folder / f"sm{sm}" / image.cubin).write_bytes(cubin)
    return KernelSet(op, 1, sm, "", statics, aot.compiler(), {image.variant: image})


@pytest.fixture(scope="module")
def compiling() -> Iterator[ProcessPoolExecutor]:
    """A process that compiles: one for all tests, since it imports torch and triton."""
    _need_the_compiler()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # the process inherits it when it starts
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(int).result()
    with pool:
        yield pool


@pytest.mark.parametrize(("sm", "kernel"), [(89, "narrow-16x32"), (90, "tile-128x128"), (100, "tile-128x128")])
def test_compiled_again_a_kernel_of_each_tensor_unit_is_as_recorded(
    sm: int, kernel: str, tmp_path: Path, compiling: ProcessPoolExecutor
) -> None:
    key = ("BlockFp8Linear", sm, kernel)
    made = compiling.submit(_compile, key, tmp_path).result()
    assert made.images[kernel].programmatic == (sm >= 90)
    assert records([made], tmp_path, cache=tmp_path) == [RECORD[key]]


@pytest.mark.slow
def test_compiled_again_every_kernel_is_as_recorded() -> None:
    _need_the_compiler()
    assert {(one["op"], one["sm"], one["kernel"]): one for one in kernels_doc.compiled()} == RECORD


def test_the_code_of_a_record_is_what_was_read() -> None:
    one = RECORD[TILE]
    assert code_of(one).tensor == one["tensor"]
    assert replace(code_of(one), loop=None).instructions == one["instructions"]


def test_a_changed_variant_needs_a_new_record() -> None:
    one: Variant = VARIANTS[TILE]
    keys = {
        aot.image_key("BlockFp8Linear", changed, 90, compiler=COMPILER)
        for changed in (one, replace(one, num_stages=one.num_stages + 1), replace(one, num_warps=16))
    }
    keys |= {aot.image_key("BlockFp8Linear", one, 89, compiler=COMPILER)}
    keys |= {aot.image_key("BlockFp8Linear", one, 90, compiler="triton 0")}
    assert len(keys) == 5
