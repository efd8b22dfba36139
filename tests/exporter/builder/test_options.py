"""Options of `build`: what is asked for and what is a default, dry runs, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from rich.console import Console
from rich.filesize import decimal

import seekforge.exporter.builder.onnxruntime.build as engine
from seekforge.common.errors import EnvironmentFault, OutputError, SeekforgeError, TargetError
from seekforge.common.files import check_vacant, write_json
from seekforge.exporter.builder import machine
from seekforge.exporter.builder.audit_page import show_audit
from seekforge.exporter.builder.cli import build
from seekforge.exporter.builder.request import fit_limits
from seekforge.exporter.inspect.cli import inspect
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import MANIFEST, Limits, load_manifest
from seekforge.formats.engine.verify import verify_files
from seekforge.formats.targets import load_target
from seekforge.runtime.cli.main import main

DEFAULTS = Limits(max_model_len=131072, max_batch_size=64, max_num_batched_tokens=2048)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build, [str(argument) for argument in arguments], catch_exceptions=False)


def refusal(*arguments: object) -> str:
    with pytest.raises(SeekforgeError) as caught:
        run(*arguments)
    return str(caught.value)


def dry(*arguments: object) -> dict[str, Any]:
    return json.loads(run(*arguments, "--dry-run", "--json").stdout)


# --- limits: asked for, or a default --------------------------------------------------------------------------


def test_defaults_are_cut_to_the_model(tiny_config: ModelConfig) -> None:
    short = tiny_config.model_copy(update={"max_position_embeddings": 4096})
    assert fit_limits(DEFAULTS, short, ()).max_model_len == 4096
    assert fit_limits(DEFAULTS, tiny_config, ()) == DEFAULTS
    tokens = DEFAULTS.model_copy(update={"max_num_batched_tokens": 32})
    assert fit_limits(tokens, tiny_config, {"max_num_batched_tokens"}).max_batch_size == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 0}, "--max-model-len is 0, expected 1 to 163840"),
        ({"max_model_len": 163841}, "--max-model-len is 163841, expected 1 to 163840"),
        ({"max_batch_size": 0}, "--max-batch-size is 0, expected 1 to 2147483647"),
        ({"max_num_batched_tokens": -1}, "--max-num-batched-tokens is -1, expected 1 to 2147483647"),
        ({"max_num_batched_tokens": 10**400}, "expected 1 to 2147483647"),
        ({"max_batch_size": 4096}, "pass --max-num-batched-tokens 4096 too"),
        (
            {"max_batch_size": 9, "max_num_batched_tokens": 8},
            "--max-num-batched-tokens is 8, expected at least --max-batch-size 9",
        ),
    ],
)
def test_what_was_asked_for_is_refused(tiny_config: ModelConfig, changes: dict[str, int], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        fit_limits(DEFAULTS.model_copy(update=changes), tiny_config, changes)


@pytest.mark.parametrize("target", ["cpu", "rtx4090"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "limits.max_batch_size=0"], "--max-batch-size is 0, expected 1 to 2147483647"),
        (["--set", "limits.max_model_len=999999"], "--max-model-len is 999999, expected 1 to 163840"),
        (["--max-model-len", "999999"], "--max-model-len is 999999, expected 1 to 163840"),
        (["--max-num-batched-tokens", "3", "--max-batch-size", "4"], "expected at least --max-batch-size 4"),
    ],
)
def test_limits_are_refused_alike_on_all_targets(
    tiny_programs: dict[str, Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(engine, "scan_values", lambda *args, **kwargs: pytest.fail("the weights were scanned"))
    given = [tiny_programs["fp8"], tmp_path / "x", "--target", target, "--checkpoint", tiny_checkpoint]
    assert message in refusal(*given, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_default_beyond_the_model_is_cut_on_a_gpu(tiny_programs: dict[str, Path], tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copytree(tiny_programs["fp8"], program)
    raw = json.loads((program / "program.json").read_text())
    raw["config"]["max_position_embeddings"] = 4096
    write_json(program / "program.json", raw)
    given = [program, tmp_path / "x", "--target", "rtx4090"]
    found = dry(*given)["limits"]
    assert found == {"max_model_len": 4096, "max_batch_size": 16, "max_num_batched_tokens": 2048}
    assert "--max-model-len is 65536, expected 1 to 4096" in refusal(*given, "--set", "limits.max_model_len=65536")


# --- options that a target does not take ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("h200", ["--precision", "int8"], "--precision int8 is for CPUs; target h200 takes bf16, fp8 or nvfp4"),
        ("cpu", ["--precision", "bf16"], "--precision bf16 is for GPUs; a CPU knows f32, int8, int4"),
        ("h200", ["--sm", "89"], "--sm 89 is for tensorrt-rtx; target h200 is built by TensorRT"),
        ("rtx4090", ["--sm", "90"], "--sm 90 is not one that tensorrt-rtx compiles for (80, 86, 89, 120, 121)"),
        ("cpu", ["--sm", "89"], "--sm is for GPU targets"),
    ],
)
def test_the_option_that_was_typed_is_named(
    tiny_programs: dict[str, Path], tmp_path: Path, target: str, arguments: list[str], message: str
) -> None:
    assert message in refusal(tiny_programs["fp8"], tmp_path / "x", "--target", target, *arguments)


# --- dry runs -------------------------------------------------------------------------------------------------


def test_a_dry_run_for_a_cpu_says_what_would_be_built(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "some" / "where"
    given = [tiny_programs["fp8"], out, "--target", "cpu", "--checkpoint", tiny_checkpoint, "--precision", "int4"]
    limits = ["--max-batch-size", "3", "--max-num-batched-tokens", "100", "--max-model-len", "1000"]
    said = dry(*given, *limits)
    assert said["limits"] == {"max_model_len": 1000, "max_batch_size": 3, "max_num_batched_tokens": 100}
    assert said["precision"] == "int4" and said["path"] == str(out)
    page = run(*given, *limits, "--dry-run").stdout
    assert (
        f"would build {out} for cpu" in page and "int4 weights in blocks of 32; sequences of up to 1,000 tokens" in page
    )
    assert (
        "steps of up to 3 sequences and 100 tokens" in page
        and f"expected {decimal(said['weight_bytes'])} of weights" in page
    )
    assert list(tmp_path.iterdir()) == []


def test_limits_that_are_given_as_options_are_those_of_a_cpu_engine(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "make_self_check", lambda *args: None)
    out = tmp_path / "engine"
    given = [tiny_programs["exact"], out, "--target", "cpu", "--checkpoint", tiny_checkpoint, "--json"]
    run(*given, "--max-batch-size", 3, "--max-num-batched-tokens", 100, "--max-model-len", 1000)
    expected = Limits(max_model_len=1000, max_batch_size=3, max_num_batched_tokens=100)
    assert load_manifest(out).limits == load_target(str(out / "target.yaml")).limits == expected


@pytest.mark.parametrize("target", ["cpu", "rtx4090"])
def test_a_dry_run_refuses_a_folder_that_is_taken(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, target: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    given = [tiny_programs["fp8"], tmp_path, "--target", target, "--checkpoint", tiny_checkpoint, "--dry-run"]
    assert "exists and is not empty" in refusal(*given)
    assert "will not replace it" in refusal(*given, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_looking_at_a_folder_leaves_nothing(tmp_path: Path) -> None:
    check_vacant(tmp_path / "a" / "b" / "c", force=False, marker=MANIFEST)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "manifest.json").write_text("{}")
    check_vacant(tmp_path, force=True, marker=MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    with pytest.raises(OutputError, match="is a file"):
        check_vacant(tmp_path / "manifest.json", force=False, marker=MANIFEST)


def test_a_dry_run_says_what_is_missing_here(
    tiny_programs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_library(flavour: str) -> None:
        raise EnvironmentFault(f"{flavour} is not installed")

    def no_compiler(*args: object) -> None:
        raise EnvironmentFault("triton is not installed")

    monkeypatch.setattr("seekforge.plugins.tensorrt.library.load", no_library)
    monkeypatch.setattr("seekforge.plugins.kernels.aot.compiler", no_compiler)
    monkeypatch.setattr(machine, "sms_here", lambda: [90])
    given = [tiny_programs["fp8"], tmp_path / "x", "--target"]
    library, gpu, compiler = dry(*given, "a100-80g")["missing"]
    assert library == "tensorrt is not installed" and compiler.startswith("triton is not installed")
    assert gpu == "no GPU of sm80 here; TensorRT measures on the GPU that it builds for"
    assert dry(*given, "h200", "--no-kernels")["missing"] == ["tensorrt is not installed"]
    assert dry(*given, "rtx4090", "--no-kernels")["missing"] == ["tensorrt-rtx is not installed"]
    page = run(*given, "a100-80g", "--dry-run").stdout
    assert "FP8 weights, BF16 products, caches fp8_ds" in page and "int8" not in page
    assert page.count("not on this machine: ") == 3


@pytest.mark.parametrize(
    ("answer", "sms"), [("9.0\n9.0\n", [90, 90]), ("12.0", [120]), ("No devices were found", [])], ids=str
)
def test_the_gpus_here_are_those_that_nvidia_smi_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, sms: list[int]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '%s' '{answer}'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(machine.shutil, "which", lambda name: str(tool))
    assert machine.sms_here() == sms
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.sms_here() == []
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.sms_here() == []


# --- what an engine says of itself ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_engine(tiny_layers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MoE layer for an RTX 4090, without kernels, by the command."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    folder = tmp_path_factory.mktemp("gpu")
    out = folder / "engine"
    page = run(tiny_layers["fp8"], out, "--target", "rtx4090", "--no-kernels", "--max-batch-size", 2).stdout
    (folder / "page").write_text(page)
    return out


def test_the_effective_target_lies_beside_a_gpu_engine(gpu_engine: Path) -> None:
    manifest = load_manifest(gpu_engine)
    assert "target.yaml" in {file.path for file in manifest.files}
    verify_files(gpu_engine, manifest, full=True)
    raw = yaml.safe_load((gpu_engine / "target.yaml").read_text())
    assert raw["limits"] == manifest.limits.model_dump()
    assert load_target(str(gpu_engine / "target.yaml")) == load_target("rtx4090", ["limits.max_batch_size=2"])


def test_build_and_inspect_show_the_same_page(gpu_engine: Path) -> None:
    manifest = load_manifest(gpu_engine)
    assert manifest.audit is not None
    page = CliRunner().invoke(inspect, [str(gpu_engine)], env={"COLUMNS": "200"}).output
    built = (gpu_engine.parent / "page").read_text()
    version = manifest.runtime_versions["tensorrt-rtx"]
    assert {one.precision for one in manifest.audit.products} == {"fp8", "bf16"}
    sums = {name: 100 * manifest.audit.share(name) for name in ("fp8", "bf16")}
    for said in (
        "self-check: none yet ('parity' writes it where the GPU is)",
        f"they run with tensorrt-rtx {version} and no other version",
        f"fp8 {sums['fp8']:.1f} %",
        f"bf16 {sums['bf16']:.1f} %",
    ):
        assert said in page and said in built


def test_the_sums_of_the_audit_fall(gpu_engine: Path) -> None:
    manifest = load_manifest(gpu_engine)
    assert manifest.audit is not None
    shares = [
        one.model_copy(update={"share": share, "precision": name, "what": name + str(share)})
        for one in manifest.audit.products[:1]
        for name, share in (("f32", 0.033), ("bf16", 0.308), ("fp8", 0.6), ("fp8", 0.059))
    ]
    bent = manifest.model_copy(update={"audit": manifest.audit.model_copy(update={"products": tuple(shares)})})
    console = Console(record=True, width=200, quiet=False)
    with console.capture() as capture:
        show_audit(bent, console)
    assert "fp8 65.9 %, bf16 30.8 %, f32 3.3 % of the FLOPs" in capture.get()


def test_a_part_of_a_model_for_a_cpu_says_why_nothing_proves_it(
    tiny_checkpoint: Path, tiny_layers: dict[str, Path], tmp_path: Path
) -> None:
    given = [tiny_layers["exact"], tmp_path / "engine", "--target", "cpu", "--checkpoint", tiny_checkpoint]
    said = "self-check: none, this is a part of a model ('seekforge run' needs a whole one)"
    assert said in run(*given).stdout
    assert said in CliRunner().invoke(inspect, [str(tmp_path / "engine")], env={"COLUMNS": "200"}).output


NAMES = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "weights.bin",
    "manifest.json",
    "model.onnx",
    "encoding/../../x",
    "",
    "C:x",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_program_whose_files_lead_elsewhere_is_refused(
    name: str, tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """`files` of program.json names what is copied into an engine, `file` of a graph what is compiled."""
    program = Path(shutil.copytree(tiny_programs["exact"], tmp_path / "program"))
    whole = json.loads((program / "program.json").read_text())
    (tmp_path / "x").write_text("outside")
    for key, edited in {
        "files": whole | {"files": [*whole["files"], name]},
        "graphs.model.file": whole | {"graphs": whole["graphs"] | {"model": whole["graphs"]["model"] | {"file": name}}},
    }.items():
        (program / "program.json").write_text(json.dumps(edited))
        if key != "files" and name in ("weights.bin", "manifest.json", "model.onnx"):
            continue
        arguments = ["build", str(program), str(tmp_path / "out"), "--target", "cpu", "--checkpoint"]
        done = CliRunner().invoke(main, [*arguments, str(tiny_checkpoint)])
        assert done.exit_code == 2 and f"key '{key}" in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists() and (tmp_path / "x").read_text() == "outside"


def test_a_link_in_a_program_that_leads_outside_is_refused(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    program = Path(shutil.copytree(tiny_programs["exact"], tmp_path / "program"))
    for name in ("tokenizer_config.json", "model.onnx"):
        shutil.move(program / name, tmp_path / name)
        (program / name).symlink_to(tmp_path / name)
        arguments = ["build", str(program), str(tmp_path / "out"), "--target", "cpu", "--checkpoint"]
        done = CliRunner().invoke(main, [*arguments, str(tiny_checkpoint)])
        assert done.exit_code == 2 and f"{name}: is a link that leads outside" in done.stderr
        assert not (tmp_path / "out").exists()
