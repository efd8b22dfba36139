"""Compiling without a GPU: the smallest operator for three SMs, the cache, and what the gate refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from seekforge.common.errors import ShapeError, TargetError
from seekforge.exporter.builder.kernels_cli import kernels
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.kernel_set import read_cubin, read_kernels
from seekforge.plugins.kernels.rules import unrunnable

pytest.importorskip("triton", reason="triton compiles the kernels; it exists for Linux only")

SIZES = {"C": 128, "R": 64, "D": 128, "kv_format": "fp8_ds", "index_format": "fp8_ds"}
OPS = {"DsaCacheWrite": SIZES | {"kv_fp8": True, "indexer_fp8": True}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("kernels")
    aot.build(aot.tasks(OPS, (80, 90)), root / "out", cache=root / "cache", jobs=1)
    return root / "out", root / "cache"


def test_each_sm_gets_a_descriptor_and_a_cubin(folders: tuple[Path, Path]) -> None:
    out, _ = folders
    index = json.loads((out / "index.json").read_text())
    assert index["format"] == 1
    assert [(entry["op"], entry["sm"]) for entry in index["kernels"]] == [("DsaCacheWrite", 80), ("DsaCacheWrite", 90)]
    assert len({entry["digest"] for entry in index["kernels"]}) == 1, "one engine may serve several SMs"
    for entry in index["kernels"]:
        path = out / entry["file"]
        found = read_kernels(path)
        assert (found.digest, found.sm) == (entry["digest"], entry["sm"])
        image = found.images["write"]
        assert read_cubin(path, image).startswith(b"\x7fELF")
        assert [param.name for param in image.params[-2:]] == ["", ""]
        assert [(p.offset, p.size) for p in image.params[6:8]] == [(48, 4), (56, 8)]
        assert image.resources.registers > 16 and image.resources.stack_bytes == 0 < image.resources.occupancy


def test_code_is_read_once_and_damage_is_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out, _ = folders
    (cubin,) = (out / "sm90").glob("*.cubin")
    code = aot.read_code(cubin, cache=tmp_path / "cache")
    assert code.instructions > 100 and code.spill_stores == 0
    (tmp_path / cubin.name).write_bytes(b"")
    assert aot.read_code(tmp_path / cubin.name, cache=tmp_path / "cache") == code, "known by its name"
    with pytest.raises(TargetError, match="no instruction; nvdisasm ended with"):
        aot.read_code(tmp_path / cubin.name, cache=tmp_path / "other")


def test_a_second_build_compiles_nothing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache = folders
    monkeypatch.setattr(aot, "compile_variant", None)  # whoever called it would fail
    (task,) = aot.tasks(OPS, (90,))
    found = aot._compile_task(task, cache)
    aot.write([found], tmp_path, cache=cache)
    name = f"sm90/dsa_cache_write-{task.digest[:12]}.json"
    assert (tmp_path / name).read_text() == (out / name).read_text()


def test_two_sizes_of_one_operator_are_two_sets(tmp_path: Path) -> None:
    work = aot.tasks({"DsaCacheWrite": OPS["DsaCacheWrite"] | {"R": 16}}, (90,))
    work += aot.tasks({"DsaCacheWrite": OPS["DsaCacheWrite"] | {"R": 32}}, (90,))
    found = aot.build(work, tmp_path / "out", cache=tmp_path / "cache", jobs=1)
    assert sorted(one.statics["R"] for one in found) == [16, 32]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert {entry["digest"] for entry in index["kernels"]} == {task.digest for task in work}


def test_the_digest_covers_sizes_and_sources() -> None:
    assert aot.set_digest("DsaCacheWrite", {"C": 128}) != aot.set_digest("DsaCacheWrite", {"C": 256})


def test_unknown_sms_and_sizes_are_refused() -> None:
    with pytest.raises(TargetError, match="sm 75: kernels are compiled for 80"):
        aot.tasks(OPS, (75,))
    with pytest.raises(ShapeError, match="kv_lora_rank is 96"):
        aot.tasks({"DsaCacheWrite": OPS["DsaCacheWrite"] | {"C": 96}}, (90,))


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"shared_bytes": 2**18}, "shared memory"),
        ({"tensor_columns": 576}, "only traps"),
        ({"ptx": "\ttrap;\n"}, "only traps"),
        ({"scratch": 256}, "global scratch"),
        ({"profile": 1}, "profile scratch"),
    ],
)
def test_kernels_that_could_not_run_are_refused(changed: dict, fault: str) -> None:
    good = {"ptx": "ret;", "sm": 90, "shared_bytes": 1000, "tensor_columns": 0, "scratch": 0, "profile": 0}
    assert unrunnable(**good) == ""
    assert fault in unrunnable(**(good | changed))


def test_the_command_prints_a_record_per_kernel(folders: tuple[Path, Path], tmp_path: Path) -> None:
    args = ["build", str(tmp_path / "out"), "--sm", "90", "--model", "tiny", "--op", "DsaCacheWrite", "--json"]
    result = CliRunner().invoke(kernels, [*args, "--cache", str(folders[1])], catch_exceptions=False)
    (record,) = json.loads(result.stdout)["kernels"]
    assert (record["op"], record["sm"], record["kernel"]) == ("DsaCacheWrite", 90, "write")
    assert {"registers", "spill_bytes", "shared_bytes", "occupancy", "tensor", "loop"} <= set(record)
    assert record["instructions"] > 100 and record["tensor"] == {} and record["loop"] is None
    assert json.loads(result.stdout)["slow"] == []
    quiet = CliRunner().invoke(kernels, [*args[:-1], "--quiet", "--cache", str(folders[1])], catch_exceptions=False)
    assert quiet.output == ""
