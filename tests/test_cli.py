"""The command line as a whole: the way through, and every wrong input it can be given on that way.

A refusal is exit code 2 and exactly one line on stderr, `error: ...`, that says what to do; it leaves nothing
half-written and loses nothing that was there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from seekforge.common.dtypes import NUMPY
from seekforge.common.files import json_text
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_index import INDEX_FILE
from seekforge.formats.checkpoint.shard_writer import write_shard
from seekforge.formats.engine.digests import chunk_bytes
from seekforge.formats.engine.manifest import MANIFEST, manifest_digest
from seekforge.runtime.cli import main as cli

Edit = Callable[[dict[str, np.ndarray]], None]
#: A small tensor of each kind, and the shard position is looked up.
NORM = "model.norm.weight"
FP8 = "model.layers.0.self_attn.q_a_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SCALE = FP8 + "_scale_inv"


def invoke(*args: str | Path) -> Result:
    """Run the command line in this process; an exception that is no exit is a bug and is raised."""
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refuse(*args: str | Path) -> str:
    """Run a command that must be refused; return its one line."""
    result = invoke(*args, "--quiet")
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith("\n")
    return result.stderr


def refuse_export(checkpoint: Path, tmp_path: Path, *args: str | Path) -> str:
    """As `refuse`; OUT must not appear, nor anything beside it."""
    before = sorted(tmp_path.iterdir())
    line = refuse("export", checkpoint, tmp_path / "out", *args)
    assert sorted(tmp_path.iterdir()) == before
    return line


def refuse_build(program: Path, checkpoint: Path, tmp_path: Path, *args: str | Path) -> str:
    """As `refuse_export`."""
    before = sorted(tmp_path.iterdir())
    target = () if "--target" in args else ("--target", "cpu")
    line = refuse("build", program, tmp_path / "out", "--checkpoint", checkpoint, *target, *args)
    assert sorted(tmp_path.iterdir()) == before
    return line


def linked_copy(folder: Path, out: Path) -> Path:
    """Copy a folder by hard links; a file must be unlinked before it is written."""
    shutil.copytree(folder, out, copy_function=os.link)
    return out


def rewrite(path: Path, content: bytes) -> None:
    """Replace one file of a linked copy."""
    path.unlink()
    path.write_bytes(content)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change one JSON file of a linked copy."""
    value = json.loads(path.read_text())
    change(value)
    rewrite(path, json_text(value).encode())


def edit_manifest(engine: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a linked engine and its digest with it, spelt as a build spells them."""

    def reseal(value: dict[str, Any]) -> None:
        change(value)
        value["digest"] = manifest_digest(value)

    edit_json(engine / MANIFEST, reseal)


def edit_tensors(checkpoint: Path, near: str, change: Edit) -> None:
    """Change the tensors of the shard that holds `near`, and the index with them."""
    with Checkpoint.open(checkpoint) as source:
        shard = source.info(near).shard
        tensors = {name: source.tensor(name).copy() for name in source.names if source.info(name).shard == shard}
    before = set(tensors)
    change(tensors)
    (checkpoint / shard).unlink()
    write_shard(checkpoint / shard, tensors)

    def reindex(index: dict[str, Any]) -> None:
        for name in before - set(tensors):
            del index["weight_map"][name]
        index["weight_map"] |= dict.fromkeys(tensors, shard)

    edit_json(checkpoint / INDEX_FILE, reindex)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return linked_copy(tiny_checkpoint, tmp_path_factory.mktemp("damaged") / "ck")


@pytest.fixture
def program(tiny_programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a program of the tiny checkpoint to damage."""
    return linked_copy(tiny_programs["fp8"], tmp_path_factory.mktemp("damaged") / "prog")


@pytest.fixture
def engine(tiny_engines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of an engine of the tiny checkpoint to damage."""
    return linked_copy(tiny_engines["fp8"], tmp_path_factory.mktemp("damaged") / "eng")


# --- the way through ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_nothing_to_text_and_again_with_force(tmp_path: Path) -> None:
    ck, prog, eng = (str(tmp_path / name) for name in ("ck", "prog", "eng"))
    steps = (
        ["new-checkpoint", ck, "--preset", "tiny"],
        ["export", ck, prog],
        ["build", prog, eng, "--target", "cpu", "--checkpoint", ck],
    )
    texts = []
    for force in ([], ["--force"]):
        for step in steps:
            seekforge(*step, *force)
        texts.append(seekforge("run", eng, "--prompt", "Hello", "--max-tokens", "16", "--greedy").stdout)
    assert texts[0] == texts[1] != ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "eng", "prog"]


def seekforge(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the real command."""
    return subprocess.run([sys.executable, "-m", "seekforge", *args], capture_output=True, text=True, check=True)


def test_run_streams_and_reports_speed(tiny_engines: dict[str, Path]) -> None:
    engine = str(tiny_engines["fp8"])
    done = seekforge("run", engine, "--prompt", "Hello", "--max-tokens", "16", "--greedy", "--ignore-eos")
    assert done.stdout.strip()
    assert "self-check passed" in done.stderr and "decode 15 tokens at" in done.stderr
    again = seekforge("run", engine, "--prompt", "Hello", "--max-tokens", "16", "--greedy", "--ignore-eos", "--json")
    result = json.loads(again.stdout)
    assert (result["text"] + "\n", len(result["token_ids"]), again.stderr) == (done.stdout, 16, "")


def test_the_runtime_imports_no_compiler(tiny_engines: dict[str, Path]) -> None:
    script = (
        "import sys\nfrom seekforge.runtime import LLM, SamplingParams\n"
        f"llm = LLM({str(tiny_engines['fp8'])!r}, max_batch_size=2, max_model_len=128)\n"
        "out = llm.generate(['Hello', [5, 6, 7]], SamplingParams(max_tokens=8, temperature=0))\n"
        "assert all(out[i].outputs[0].token_ids for i in (0, 1))\n"
        "heavy = {'torch', 'triton', 'onnx', 'onnxscript', 'transformers', 'seekforge.exporter'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_missing_extra_names_the_command_and_the_remedy(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # an import of it then fails, as where it is not installed
    script = "import sys\nsys.modules['onnxscript'] = None\nfrom seekforge.runtime.cli.main import main\nmain()"
    arguments = ["export", str(tiny_checkpoint), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: export: the module 'onnxscript' is not installed; pip install 'onnxscript>")


# --- checkpoints --------------------------------------------------------------------------------------------


def test_export_of_no_checkpoint(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "none" in refuse_export(tmp_path / "none", tmp_path)
    assert "config.json" in refuse_export(empty, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "a checkpoint folder must hold config.json"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b"\xff\xfe", "not valid JSON"),
        ("config.json", b"[]", "expected an object"),
        ("tokenizer.json", None, "must hold the tokenizer"),
        (INDEX_FILE, b"{}", "no 'weight_map'"),
        ("model-00002-of-000003.safetensors", None, "finish the download"),
        ("model-00002-of-000003.safetensors", b"", "expected a safetensors file"),
        ("model-00002-of-000003.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_files_missing_or_damaged(
    checkpoint: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    (checkpoint / file).unlink()
    if content is not None:
        (checkpoint / file).write_bytes(content)
    line = refuse_export(checkpoint, tmp_path)
    assert message in line and str(checkpoint) in line


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.0001])
def test_a_truncated_shard(checkpoint: Path, tmp_path: Path, kept: float) -> None:
    shard = checkpoint / "model-00001-of-000003.safetensors"
    content = shard.read_bytes()
    rewrite(shard, content[: int(len(content) * kept)])
    assert "truncated" in refuse_export(checkpoint, tmp_path)


def drop(name: str) -> Edit:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, array: np.ndarray) -> Edit:
    return lambda tensors: tensors.__setitem__(name, array)


@pytest.mark.parametrize(
    ("near", "change", "message"),
    [
        (NORM, drop(NORM), f"tensor '{NORM}' is missing, expected [512] bf16"),
        (NORM, put("model.extra.weight", np.zeros(4, np.float32)), "'model.extra.weight' is left over"),
        (NORM, put(NORM, np.ones(511, NUMPY["bf16"])), f"'{NORM}' has shape [511], expected [512]"),
        (NORM, put(NORM, np.ones(512, np.float32)), f"'{NORM}' has dtype f32, expected bf16"),
        (SCALE, drop(SCALE), f"weight '{FP8}' has no '{SCALE}'"),
        (FP8, put(FP8, np.zeros((256, 512), NUMPY["bf16"])), f"'{FP8}' has dtype bf16, expected f8e4m3"),
        (BIAS, put(BIAS, np.ones(16, NUMPY["bf16"])), f"'{BIAS}' has dtype bf16, expected f32"),
    ],
)
def test_tensors_that_do_not_fit_the_config(
    checkpoint: Path, tmp_path: Path, near: str, change: Edit, message: str
) -> None:
    edit_tensors(checkpoint, near, change)
    assert message in refuse_export(checkpoint, tmp_path)


def test_an_index_of_another_download(checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / INDEX_FILE, lambda index: index["weight_map"].pop(NORM))
    assert f"does not list '{NORM}'" in refuse_export(checkpoint, tmp_path)


def test_each_config_key_that_is_missing_is_named(tiny_checkpoint: Path, checkpoint: Path, tmp_path: Path) -> None:
    from seekforge.formats.checkpoint.model_config import ModelConfig

    raw = json.loads((tiny_checkpoint / "config.json").read_text())
    for key in ModelConfig.model_fields:
        rewrite(checkpoint / "config.json", json.dumps({k: v for k, v in raw.items() if k != key}).encode())
        line = refuse_export(checkpoint, tmp_path)
        if key == "quantization_config":  # weights are BF16 then, which these are not
            assert "expected bf16; config.json has no quantization_config" in line
        else:
            assert "config.json: " in line and (f"key '{key}' is missing" in line or key == "model_type"), line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "512"}, "key 'hidden_size' is '512'"),
        ({"hidden_size": 512.0}, "key 'hidden_size' is 512.0"),
        ({"hidden_size": None}, "key 'hidden_size' is None"),
        ({"index_topk": 0}, "key 'index_topk' is 0"),
        ({"rms_norm_eps": "1e-6"}, "key 'rms_norm_eps'"),
        ({"rope_scaling": 3}, "rope_scaling is 3"),
        ({"rope_scaling": {"type": "yarn"}}, "key 'rope_scaling.factor' is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "deepseek_v3"}, "key 'index_n_heads' is 16"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"scoring_func": "softmax"}, "key 'scoring_func'"),
        ({"n_group": 3}, "n_group"),
        ({"num_hidden_layers": 5}, "take the config.json of this checkpoint"),
        ({"num_nextn_predict_layers": 0}, "is left over"),
    ],
)
def test_configs_that_are_wrong(checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.update(change))
    assert message in refuse_export(checkpoint, tmp_path)


def with_value(name: str, value: float, position: int = 7) -> Edit:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[position] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (FP8, np.nan, f"'{FP8}' holds nan at [0, 7]"),
        (NORM, np.nan, f"'{NORM}' holds nan at [7]"),
        (BIAS, np.inf, f"'{BIAS}' holds inf at [7]"),
        (BIAS, np.nan, f"'{BIAS}' holds nan at [7]"),
        (SCALE, 0.0, f"'{SCALE}' holds 0.0 at"),
        (SCALE, np.inf, f"'{SCALE}' holds inf at"),
        ("model.layers.4.embed_tokens.weight", 3.0, "differs from 'model.embed_tokens.weight'"),
    ],
)
def test_values_that_no_model_has_are_found_before_a_build(
    tiny_programs: dict[str, Path], checkpoint: Path, tmp_path: Path, name: str, value: float, message: str
) -> None:
    edit_tensors(checkpoint, name, with_value(name, value))
    assert message in refuse_build(tiny_programs["fp8"], checkpoint, tmp_path)


# --- programs and targets -----------------------------------------------------------------------------------


def test_an_unknown_target_lists_the_known_ones(tiny_programs, tiny_checkpoint: Path, tmp_path: Path) -> None:
    line = refuse_build(tiny_programs["fp8"], tiny_checkpoint, tmp_path, "--target", "gpu9000")
    assert "unknown target 'gpu9000', expected one of: " in line and "cpu" in line.partition("one of:")[2]


def test_an_unknown_preset_lists_the_known_ones(tmp_path: Path) -> None:
    line = refuse("new-checkpoint", tmp_path / "out", "--preset", "tinny")
    assert "tinny" in line and "tiny" in line and "small" in line
    assert not list(tmp_path.iterdir())


def test_build_without_a_checkpoint_folder(tiny_programs, tmp_path: Path) -> None:
    assert "none" in refuse_build(tiny_programs["fp8"], tmp_path / "none", tmp_path)
    assert "--checkpoint" in refuse("build", tiny_programs["fp8"], tmp_path / "out", "--target", "cpu")


def test_a_checkpoint_of_another_config(tiny_programs, checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.update(routed_scaling_factor=1.0))
    line = refuse_build(tiny_programs["fp8"], checkpoint, tmp_path)
    assert "routed_scaling_factor is 1.0, the program was exported for 2.5" in line


@pytest.mark.parametrize("length", ["163841", "1M"])
def test_a_context_that_the_model_does_not_have(tiny_programs, tiny_checkpoint, tmp_path: Path, length: str) -> None:
    line = refuse_build(tiny_programs["fp8"], tiny_checkpoint, tmp_path, "--max-model-len", length)
    assert "expected 1 to 163840" in line


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("program.json", None, "written by 'seekforge export'"),
        ("program.json", b"{", "not valid JSON"),
        ("program.json", b'{"format": 0}', "this seekforge reads format"),
        ("program.json", b'{"format": 2}', "export the program again"),
        ("bindings.json", None, "written by 'seekforge export'"),
        ("bindings.json", b'{"format": 2, "graphs": {}}', "export the program again"),
        ("bindings.json", b'{"format": 2, "graphs": {"model": {"x": {}}, "mtp": {}}}', "export the program again"),
        ("bindings.json", b'{"format": 2, "graphs": []}', "export the program again"),
        ("model.onnx", None, "export the program again"),
        ("model.onnx", b"not onnx", "export the program again"),
        ("tokenizer.json", None, "export the program again"),
    ],
)
def test_a_damaged_program(
    program: Path, tiny_checkpoint: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    (program / file).unlink()
    if content is not None:
        (program / file).write_bytes(content)
    line = refuse_build(program, tiny_checkpoint, tmp_path)
    assert message in line and file in line


def test_folders_in_the_wrong_order(tiny_programs, tiny_checkpoint: Path, tiny_engines, tmp_path: Path) -> None:
    program, engine = tiny_programs["fp8"], tiny_engines["fp8"]
    assert "'seekforge export'" in refuse_build(tiny_checkpoint, tiny_checkpoint, tmp_path)
    assert "config.json" in refuse_build(program, engine, tmp_path)
    assert "config.json" in refuse_export(program, tmp_path)
    assert "'seekforge build'" in refuse("run", program, "--prompt", "a")


# --- output folders -----------------------------------------------------------------------------------------


def occupied(out: Path) -> dict[str, bytes]:
    """Fill `out` with something that must survive."""
    (out / "sub").mkdir(parents=True)
    (out / "precious.txt").write_text("mine")
    (out / "sub" / "more").write_text("mine too")
    return content_of(out)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("command", ["new-checkpoint", "export", "build"])
def test_an_output_folder_that_is_not_empty(tiny_programs, tiny_checkpoint: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    before = occupied(out)
    arguments: dict[str, tuple[str | Path, ...]] = {
        "new-checkpoint": (out,),
        "export": (tiny_checkpoint, out),
        "build": (tiny_programs["fp8"], out, "--target", "cpu", "--checkpoint", tiny_checkpoint),
    }
    assert "not empty; choose a new folder, or pass --force" in refuse(command, *arguments[command])
    # a slip of the pen with --force must not delete a folder that seekforge did not write
    assert "--force will not replace it" in refuse(command, *arguments[command], "--force")
    assert content_of(out) == before and list(tmp_path.iterdir()) == [out]


def test_force_replaces_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("new-checkpoint", out, "--quiet").exit_code == 0
    first = content_of(out)
    (out / "stale").write_text("x")
    assert invoke("new-checkpoint", out, "--quiet", "--force", "--seed", "1").exit_code == 0
    second = content_of(out)
    assert set(second) == set(first) and second != first
    assert list(tmp_path.iterdir()) == [out]


def test_force_keeps_the_old_engine_when_the_build_fails(
    engine: Path, tiny_programs: dict[str, Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content_of(engine)
    monkeypatch.setattr("os.posix_fallocate", no_space)
    arguments = (tiny_programs["fp8"], engine, "--target", "cpu", "--checkpoint", tiny_checkpoint, "--force")
    assert "the disk is full" in refuse("build", *arguments)
    assert content_of(engine) == before and list(engine.parent.iterdir()) == [engine]


def test_an_output_that_is_a_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refuse("export", tiny_checkpoint, tmp_path / "out", "--force")
    assert "out" in refuse("new-checkpoint", tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text() == "mine"


# --- disk full ----------------------------------------------------------------------------------------------


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip("a small file system cannot be mounted here (needs Linux and root)")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_new_checkpoint_on_a_full_disk(small_disk: Path) -> None:
    assert "the disk is full; free space" in refuse("new-checkpoint", small_disk / "out")
    assert not list(small_disk.iterdir())


def test_build_on_a_full_disk(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refuse_build(tiny_programs["fp8"], tiny_checkpoint, small_disk)
    assert "the engine takes 183.1 MB at f32" in said and "has 1.0 MB free" in said
    # somebody else fills it while the engine is written
    room = shutil.disk_usage(small_disk)._replace(free=1 << 40)
    monkeypatch.setattr("seekforge.exporter.builder.onnxruntime.build.shutil.disk_usage", lambda place: room)
    assert "the disk is full; free space" in refuse_build(tiny_programs["fp8"], tiny_checkpoint, small_disk)


@pytest.mark.slow
def test_export_on_a_full_disk(tiny_checkpoint: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(900_000))
    assert "the disk is full; free space" in refuse_export(tiny_checkpoint, small_disk)


@pytest.mark.parametrize(
    ("command", "fails"),
    [
        ("new-checkpoint", "seekforge.exporter.checkpoint.new.write_sidecars"),
        ("export", "seekforge.exporter.program.export.trace"),
        ("build", "os.posix_fallocate"),
    ],
)
def test_writing_without_space(
    tiny_programs: dict[str, Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    fails: str,
) -> None:
    monkeypatch.setattr(fails, no_space)
    out = tmp_path / "out"
    arguments: dict[str, tuple[str | Path, ...]] = {
        "new-checkpoint": (out,),
        "export": (tiny_checkpoint, out),
        "build": (tiny_programs["fp8"], out, "--target", "cpu", "--checkpoint", tiny_checkpoint),
    }
    assert f"{out}: the disk is full" in refuse(command, *arguments[command])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_work_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    at_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(number)

    monkeypatch.setattr("seekforge.exporter.program.export.trace", interrupt)
    try:
        result = invoke("export", tiny_checkpoint, tmp_path / "out", "--quiet")
    finally:
        signal.signal(signal.SIGINT, at_interrupt)
    assert (result.exit_code, result.output) == (code, "")
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(tmp_path.iterdir())


# --- engines and requests -----------------------------------------------------------------------------------


def test_run_of_no_engine(tmp_path: Path) -> None:
    assert "written by 'seekforge build'" in refuse("run", tmp_path / "none", "--prompt", "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 0}, "engine format 0, this seekforge runs format"),
        ({"format": 999}, "engine format 999, this seekforge runs format"),
        ({"unknown_key": 1}, "key 'unknown_key'"),
        ({"vocab_size": "many"}, "key 'vocab_size'"),
        ({"runtime_versions": {"onnxruntime": "0.1"}}, "runtime_versions.onnxruntime: found "),
        (
            {"runtime_versions": {"no-such-package": "1.0"}},
            "no-such-package 1.0, which is not installed; install it",
        ),
    ],
)
def test_engines_of_another_version(engine: Path, change: dict[str, Any], message: str) -> None:
    edit_manifest(engine, lambda manifest: manifest.update(change))
    assert message in refuse("run", engine, "--prompt", "a")


@pytest.mark.parametrize("file", ["model.onnx", "weights.bin", "tokenizer.json"])
def test_damaged_engine_files(engine: Path, file: str) -> None:
    content = (engine / file).read_bytes()
    rewrite(engine / file, content[:-1])
    assert f"{file}: {len(content) - 1} bytes" in refuse("run", engine, "--prompt", "a")
    # one flipped byte may miss the sampled blocks; --verify reads all
    place = len(content) // 3
    rewrite(engine / file, content[:place] + b"\x55\xaa" + content[place + 2 :])
    line = refuse("run", engine, "--prompt", "a", "--verify")
    found = re.search(rf"/{re.escape(file)}: bytes ([0-9,]+) to ([0-9,]+) are not what was built", line)
    assert found, line
    first, last = (int(number.replace(",", "")) for number in found.groups())
    assert first <= place < place + 1 <= last < len(content) and last - first < chunk_bytes(len(content))
    (engine / file).unlink()
    assert f"{file}: missing" in refuse("run", engine, "--prompt", "a")


def test_an_engine_that_computes_something_else(engine: Path) -> None:
    def shift(manifest: dict[str, Any]) -> None:
        row = manifest["self_check"]["rows"][0]
        row["top_logits"][0] += 10 * manifest["self_check"]["tolerance"]

    edit_manifest(engine, shift)
    assert "self-check" in refuse("run", engine, "--prompt", "a")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prompt", ""), "the prompt has no tokens"),
        (("--prompt", "Hello", "--max-tokens", "131072"), "more than max_model_len 131072"),
        (("--prompt", "Hello", "--max-tokens", "64", "--max-model-len", "32"), "more than max_model_len 32"),
        (("--prompt", "Hello", "--max-model-len", "131073"), "this engine allows 1 to 131072"),
        (("--prompt", "Hello", "--max-tokens", "0"), "--max-tokens"),
        (("--prompt", "Hello", "--temperature", "-1"), "--temperature"),
        ((), "--prompt"),
    ],
)
def test_requests_that_cannot_be_served(tiny_engines: dict[str, Path], args: tuple[str, ...], message: str) -> None:
    assert message in refuse("run", tiny_engines["fp8"], *args)
