"""Exports are whole or absent, and the full model fits a small machine."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from tests.support.kept_traces import kept

import seekforge.exporter.program.export as export_module
from seekforge.common.errors import CheckpointError, OutputError, SeekforgeError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.checkpoint.sparse import new_sparse_checkpoint
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.program.export import export
from seekforge.exporter.program.trace import Traced
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.shard_index import INDEX_FILE
from seekforge.formats.numerics import EXACT, FP8
from seekforge.formats.program import load_bindings, load_program
from seekforge.formats.weight_recipes import take


@pytest.fixture(scope="module")
def traced(tiny_config: ModelConfig) -> dict[bool, Traced]:
    """The graphs of a one-layer range and of the MTP module, so that a test of the writing need not trace."""
    settings = Settings(tiny_config, EXACT, activations="bf16")
    return {in_model: export_module.trace(settings, (3, 4) if in_model else None, print) for in_model in (True, False)}


@pytest.fixture
def quick(traced: dict[bool, Traced], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`export` of layer 3 and MTP, traced before."""

    def prepared(settings: object, layers: object, progress: object) -> Traced:
        source = traced[layers is not None]
        model = onnx.ModelProto()
        model.CopyFrom(source.model)
        return Traced(model, source.recipes, source.aliases, source.output_names)

    monkeypatch.setattr(export_module, "trace", prepared)

    def run(checkpoint: Path, out: Path, *, force: bool = False, progress: Callable[[str], None] = print) -> None:
        export(checkpoint, out, numerics=EXACT, layer_range=(3, 4), force=force, progress=progress)

    return run


def test_a_trace_that_tests_keep_is_the_traced_graph_and_nobody_elses(tmp_path: Path) -> None:
    """Tests of exports take graphs from files: equal settings, made anew, find them, and others do not."""
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_model(onnx.helper.make_graph([node], "step", [], []))
    original = Traced(graph, {"w": take("w", (2, 3), "bf16")}, {"b": "a"}, ("y",))
    asked: list[object] = []

    def trace(settings: object, layers: object, progress: Callable[[str], None]) -> Traced:
        asked.append((settings, layers))
        progress("convert")
        return original

    def made(name: str, make: Callable[[Path], None]) -> Path:
        if not (tmp_path / name).is_dir():
            (tmp_path / name).mkdir()
            make(tmp_path / name)
        return tmp_path / name

    told: list[str] = []
    from_files = kept(trace, made)
    config = load_preset("tiny").config
    for _ in range(2):
        result = from_files(Settings(copy.deepcopy(config), EXACT, activations="bf16"), (3, 4), told.append)
        assert result == original and result.model is not original.model
        result.model.graph.ClearField("node")
    assert len(asked) == 1 and told == ["convert", "convert"]
    for other in ((EXACT, None), (EXACT, (2, 4)), (FP8, (3, 4))):
        from_files(Settings(config, other[0], activations="bf16"), other[1], told.append)
    assert len(asked) == 4


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_programs_hold_no_weight_and_only_symbolic_axes(tiny_programs: dict[str, Path]) -> None:
    for folder in tiny_programs.values():
        program = load_program(folder)
        bindings = load_bindings(folder)
        for name, graph_io in program.graphs.items():
            model = onnx.load(folder / graph_io.file)
            assert sum(len(t.raw_data) for t in model.graph.initializer) < 4096
            assert {spec.name for spec in graph_io.inputs if spec.role in ("weight", "table")} == set(bindings[name])
            for spec in graph_io.inputs:
                if spec.role not in ("weight", "table"):
                    assert isinstance(spec.shape[0], str), spec
        assert len(program.unused) == 2 and "lm_head.weight" in program.shared


# --- killed at any moment -------------------------------------------------------------------------------------


def _killed_in_child(run: Callable[[], None]) -> None:
    """Run in a forked child that is expected to kill itself with SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_points() -> Iterator[tuple[str, Callable[[pytest.MonkeyPatch], None]]]:
    """What is replaced by SIGKILL, in the order in which an export comes to it."""
    for name in ("coverage", "attach", "sha256_file", "save_program"):
        yield name, lambda patch, name=name: patch.setattr(export_module, name, _kill)
    # everything is written but the last rename
    yield "rename", lambda patch: patch.setattr("seekforge.common.files._replace_folder", _kill)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize(("point", "arm"), list(_kill_points()), ids=[name for name, _ in _kill_points()])
def test_kill_leaves_no_half_written_program(
    tiny_checkpoint: Path,
    tmp_path: Path,
    quick: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    arm: Callable[[pytest.MonkeyPatch], None],
    replaces: bool,
) -> None:
    out = tmp_path / "program"
    before: dict[str, bytes] = {}
    if replaces:
        quick(tiny_checkpoint, out)
        before = _files(out)
    with monkeypatch.context() as patch:
        arm(patch)
        _killed_in_child(lambda: quick(tiny_checkpoint, out, force=True))
    assert out.exists() == replaces
    if replaces:
        assert _files(out) == before
    # what is left behind is hidden and does not stop the next export
    quick(tiny_checkpoint, out, force=True)
    assert load_program(out).layer_range == (3, 4)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["program"]


def test_an_occupied_folder_is_not_replaced_without_force(
    tiny_checkpoint: Path, tmp_path: Path, quick: Callable[..., None]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        quick(tiny_checkpoint, tmp_path)
    with pytest.raises(OutputError, match=r"no program\.json"):
        quick(tiny_checkpoint, tmp_path, force=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


# --- damaged checkpoints --------------------------------------------------------------------------------------


def _drop_shard(folder: Path) -> None:
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()


def _empty_shard(folder: Path) -> None:
    next(iter(sorted(folder.glob("*.safetensors")))).write_bytes(b"")


def _cut_shard(folder: Path) -> None:
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    os.truncate(shard, shard.stat().st_size - 1)


def _long_header(folder: Path) -> None:
    with next(iter(sorted(folder.glob("*.safetensors")))).open("r+b") as file:
        file.write((4 << 30).to_bytes(8, "little"))


def _change_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / INDEX_FILE
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_shard, "is missing"),
        (_empty_shard, "is 0 bytes"),
        (_cut_shard, "is truncated"),
        (_long_header, "says its header is 4294967296 bytes"),
        (
            _change_index(lambda m: m.update({"lm_head.weight": "../../etc/passwd"})),
            "expected the plain name of a file",
        ),
        (_change_index(lambda m: m.update({"lm_head.weight": "absent.safetensors"})), "absent.safetensors: is missing"),
        (_change_index(lambda m: m.pop("lm_head.weight")), "does not list 'lm_head.weight'"),
        (lambda folder: (folder / INDEX_FILE).write_text("{"), "not valid JSON"),
        (
            lambda folder: shutil.copyfile(next(folder.glob("*1-of*")), next(folder.glob("*2-of*"))),
            "holds too|no shard",
        ),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    damage(folder)
    with pytest.raises(SeekforgeError, match=message) as caught:
        export(folder, tmp_path / "out", numerics=EXACT)
    assert isinstance(caught.value, CheckpointError) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


# --- full size ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_full_model_exports_within_its_limits(tmp_path: Path) -> None:
    """61 layers, 92,425 tensors: at most 90 s, 1.5 GB resident and 1.5 GB of address space."""
    new_sparse_checkpoint(tmp_path / "full", "full")
    code = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000,) * 2)\n"
        "sys.argv[0] = 'seekforge'\n"
        "runpy.run_module('seekforge.runtime.cli.main', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, "export", str(tmp_path / "full"), str(tmp_path / "program"), "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-2000:]
    # processor time: other work on the machine does not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 90
    assert after.ru_maxrss * 1024 < 1.5e9
    summary = json.loads(done.stdout)
    assert summary["num_tensors"] == 92_425 and summary["num_outside"] == 0
    program = load_program(tmp_path / "program")
    assert (tmp_path / "program" / "model.onnx").stat().st_size < 100e6
    assert set(program.graphs) == {"model", "mtp"} and program.ops["MoeExperts"].num_nodes == 59
    onnx.checker.check_model(onnx.load(tmp_path / "program" / "model.onnx"))
