"""`seekforge kernels estimate`: what it prints, what it refuses, and that a bent descriptor is noticed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests import kernels_doc

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.plugins.kernels import aot, sass
from seekforge.plugins.kernels.kernel_set import Image, KernelSet, Param, Resources
from seekforge.plugins.kernels.launch_plan import op_kernels, statics_of
from seekforge.plugins.kernels.sizes import operators
from seekforge.plugins.registry import SPECS
from seekforge.runtime.cli.main import main

ATTENTION = ("--op", "DsaAttention", "--shape", "batch=1,context=32K")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["kernels", "estimate", *arguments])


def test_shapes_alone_as_a_table_and_as_json() -> None:
    table = run("--sm", "90", *ATTENTION, "--counts-only")
    assert table.exit_code == 0, table.stderr
    assert "part" in table.stdout and "combine-32" in table.stdout and "122 launches" in table.stdout
    assert "a model, no measurement; code from none" in table.stdout
    said = json.loads(run("--target", "h100", *ATTENTION, "--counts-only", "--json").stdout)
    part, combine = said["launches"]
    assert (part["kernel"], part["count"], part["grid"]) == ("part", 61, [1, 4, 32])
    assert part["flops"] == 2 * 2048 * 128 * 1088 and part["code"] is None and part["waves"] is None
    assert part["memory_bytes"] == 2048 * 656 + 128 * 576 * 2 + 2048 * 4 + 32 * 128 * 513 * 4
    assert said["card"]["name"] == "h100" and said["shape"] == {"batch": 1, "queries": 1, "context": 32768}
    step = said["step"]
    assert step["launches"] == 122 and step["gaps_us"] == pytest.approx(122 * 1.25)
    each = 61 * (part["us"] + combine["us"])
    assert step["kernels_us"] == pytest.approx(each, rel=1e-3)
    assert step["total_us"] == pytest.approx(each + 122 * 1.25, rel=1e-3)


def test_experts_in_nvfp4_read_nine_sixteenths() -> None:
    arguments = ("--target", "b200", "--op", "MoeExperts", "--shape", "batch=9", "--counts-only", "--json")
    fp8, nvfp4 = (json.loads(run(*arguments, "--precision", one).stdout) for one in ("fp8", "nvfp4"))
    assert (fp8["precision"], nvfp4["precision"]) == ("fp8", "nvfp4")
    up = {one["kernel"]: one for said in (fp8, nvfp4) for one in said["launches"]}
    shared = 4096 * 7168 + 32 * 56 * 4  # FP8 experts have the shared one among them
    assert 0.56 < up["up-nvfp4-16"]["read_bytes"] / (up["up-16"]["read_bytes"] - shared) < 0.57
    assert nvfp4["step"]["total_us"] < fp8["step"]["total_us"]


def test_slices_of_a_long_prompt_that_need_no_scores_are_rows_too() -> None:
    said = json.loads(run("--sm", "90", "--op", "DsaIndexer", "--shape", "queries=32K,context=32K", "--counts-only",
                          "--json").stdout)  # fmt: skip
    first = said["launches"][0]
    assert first["kernel"] == "scores-4" and (first["programs"], first["us"]) == (0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --target and --sm"),
        (("--sm", "90", "--target", "h100"), "give one of --target and --sm"),
        (
            ("--sm", "90", "--precision", "nvfp4"),
            "--precision nvfp4 is for SMs from 100 on (Blackwell), and this is for sm 90",
        ),
        (("--sm", "86"), "sm 86: no target has it; targets have 80, 89, 90"),
        (("--target", "cpu"), "target cpu is a CPU"),
        (("--target", "h1000"), "unknown target 'h1000'"),
        (("--sm", "90", "--shape", "batch=0"), "'0' is no number of tokens"),
        (("--sm", "90", "--shape", "size=3"), "'size=3' is no part of a shape; parts are batch, queries, context"),
        (("--sm", "90", "--shape", "batch=1,batch=2"), "'batch=2' is no part of a shape"),
        (("--sm", "90", "--shape", "queries=9,context=8"), "context is 8, expected at least the 9 queries"),
        (("--sm", "90", "--shape", "batch=1M,queries=2,context=4"), "are more than a step has"),
        (("--sm", "90", "--tp", "3"), "--tp 3"),
        (("--sm", "90", "--op", "Softmax"), "calls none of Softmax; operators are AddRmsNormQuantize"),
        (("--sm", "90", "--model", "tiny-v3", "--op", "DsaAttention"), "tiny-v3 calls none of DsaAttention"),
        (("--sm", "90", "--model", "tiny-v3", "--counts-only"), "caches of a deepseek_v3 model are bf16 on GPUs"),
        (("--sm", "90", "--kernels", "/nowhere"), "'/nowhere' does not exist"),
        (("--sm", "90", "--provider", "MoeRoute=cutlass"), "it has triton, flashinfer, or auto"),
        (("--sm", "90", "--provider", "auto", "--counts-only"), "--provider auto compares code"),
        (
            ("--sm", "90", "--op", "DsaAttention", "--provider", "MoeRoute=flashinfer", "--counts-only"),
            "MoeRoute=flashinfer: the step calls no MoeRoute",
        ),
        (("--sm", "90", "--kernels", ".", "--counts-only"), "exclude each other"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and not result.stdout
    last = result.stderr.strip().splitlines()
    assert len(last) == 1 and message in last[0]


def _code(tensor: bool) -> sass.Code:
    """Return made-up code: of a kernel with products, a loop of 100 instructions of which 104 HMMA do one pass."""
    wide = {"HMMA.16816.F32.BF16": 104} if tensor else {}
    kinds = ({"tensor": 104} if tensor else {}) | {"integer": 100}
    body = sass.Body(kinds=kinds, barriers=3, waits=True, copies=False, tensor=wide)
    return sass.Code(500, wide, 0, 0, None, bodies=(body,) if tensor else (), kinds={"integer": 500})


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `kernels build` writes it, of made-up kernels with the record's resources."""
    statics = statics_of("DsaAttention", operators(load_preset("full").config)["DsaAttention"])
    recorded = {one["kernel"]: one for one in kernels_doc.recorded() if (one["op"], one["sm"]) == ("DsaAttention", 90)}
    cache, folder = tmp_path / "cache", tmp_path / "store"
    cache.mkdir()
    images: dict[str, Image] = {}
    for variant in op_kernels("DsaAttention").variants(statics, 90):
        one, cubin = recorded[variant.name], variant.name.encode()
        digest = hashlib.sha256(cubin).hexdigest()
        (cache / f"{digest[:32]}.cubin").write_bytes(cubin)
        used = Resources(
            **{name: one[name] for name in ("registers", "shared_bytes", "occupancy")},
            stack_bytes=one["spill_bytes"],
            tensor_columns=0,
        )
        hidden = tuple(Param("", "*u8", 8 * i, 8) for i in range(2))
        sizes: dict[str, Any] = {"num_warps": one["warps"], "num_ctas": 1, "scratch_bytes": 0, "scratch_align": 1}
        images[variant.name] = Image(
            variant=variant.name, entry="kernel", cubin=f"{digest[:32]}.cubin", sha256=digest, params=hidden,
            main_loop=variant.main_loop, driver=13000, programmatic=True, resources=used, **sizes,
        )  # fmt: skip
    version = SPECS["DsaAttention"].version
    made = KernelSet("DsaAttention", version, 90, "d" * 64, statics, "made up", images)
    aot.write([made], folder, cache=cache)
    products = {images[name].cubin for name in ("attend", "part", "attend-expanded")}
    monkeypatch.setattr(aot, "read_code", lambda cubin, cache: _code(cubin.name in products))
    return folder


def test_kernels_of_a_folder_are_read(store: Path) -> None:
    said = json.loads(run("--sm", "90", *ATTENTION, "--kernels", str(store), "--json").stdout)
    part = said["launches"][0]
    assert said["code_from"] == "nvdisasm"
    assert (part["blocks_per_sm"], part["waves"]) == (2, 1) and part["code"]["registers"] == 255
    (loop,) = part["code"]["loops"]
    assert loop == {"passes": 2, "instructions": 204, "kinds": {"tensor": 104, "integer": 100}, "barriers": 3}
    assert part["tensor_flops_ratio"] == pytest.approx(4 * 104 * 4096 / (2 * 64 * 32 * (512 + 64 + 256)))
    assert part["roofs_us"]["issue"] == pytest.approx((500 - 204 + 2 * 204) / 1830, abs=0.001)
    table = run("--sm", "90", *ATTENTION, "--kernels", str(store)).stdout
    assert "2 × 204: 104 tensor, 100 integer" in table and "255/72/100" in table


def _descriptor(store: Path) -> Path:
    (path,) = (store / "sm90").glob("*.json")
    return path


def test_a_bent_descriptor_is_noticed(store: Path) -> None:
    path = _descriptor(store)
    raw = json.loads(path.read_text())
    raw["images"]["part"]["resources"] |= {"registers": 40, "shared_bytes": 1024}
    path.write_text(json.dumps(raw))
    result = run("--sm", "90", *ATTENTION, "--kernels", str(store))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "part has 40 registers" in result.stderr and "do not give an occupancy of 0.125" in result.stderr


@pytest.mark.parametrize(("key", "value"), [("registers", 0), ("registers", 70000), ("occupancy", 7.0)])
def test_numbers_that_no_kernel_has_are_refused(store: Path, key: str, value: float) -> None:
    path = _descriptor(store)
    raw = json.loads(path.read_text())
    raw["images"]["part"]["resources"][key] = value
    path.write_text(json.dumps(raw))
    result = run("--sm", "90", *ATTENTION, "--kernels", str(store))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "part" in result.stderr


def test_a_bent_cubin_and_another_sm_are_noticed(store: Path) -> None:
    other = run("--sm", "100", *ATTENTION, "--kernels", str(store))
    assert other.exit_code == 2 and "no kernels of DsaAttention for sm 100 with these sizes" in other.stderr
    heads = run("--sm", "90", "--tp", "8", *ATTENTION, "--kernels", str(store))
    assert heads.exit_code == 2 and "no kernels of DsaAttention for sm 90 with these sizes" in heads.stderr
    next(iter((store / "sm90").glob("*.cubin"))).write_bytes(b"bent")
    result = run("--sm", "90", *ATTENTION, "--kernels", str(store))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "sha256 differs" in result.stderr


def test_a_kernel_with_other_code_has_another_estimate(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(run("--sm", "90", *ATTENTION, "--kernels", str(store), "--json").stdout)
    slow = _code(tensor=True)
    longer = replace(slow, bodies=(replace(slow.bodies[0], kinds={"tensor": 104, "integer": 20000}),))
    read = aot.read_code
    monkeypatch.setattr(
        aot, "read_code", lambda cubin, cache: longer if read(cubin, cache=cache).tensor else read(cubin, cache=cache)
    )
    after = json.loads(run("--sm", "90", *ATTENTION, "--kernels", str(store), "--json").stdout)
    assert after["launches"][0]["us"] > 1.5 * before["launches"][0]["us"]
