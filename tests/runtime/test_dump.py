"""The engine's side of a parity check: which steps are run, what is kept, and that no torch is needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from seekforge.common.errors import EngineError, RequestError
from seekforge.formats.dump import CHECKPOINT, NVFP4_EXPERTS, Dump
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.parity_steps import make_plan
from seekforge.formats.step_io import StepInputs
from seekforge.runtime.cli import main as cli
from seekforge.runtime.dump import engine_side, write_dump


class Results:
    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self.values = values

    def fetch(self, name: str) -> np.ndarray:
        return self.values[name]


class FakeBackend:
    """Gives the number of the run in every output, and notes what it was asked for."""

    def __init__(self, width: int) -> None:
        self.width, self.log, self.allocated = width, [], []

    def allocate_caches(self, num_blocks: int) -> None:
        self.allocated.append(num_blocks)

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = "model") -> Results:
        rows = (*inputs.input_ids.shape, self.width)
        self.log.append((graph, inputs, sorted(outputs)))
        return Results({name: np.full(rows, len(self.log), np.float32) for name in outputs})

    def cache(self, name: str) -> np.ndarray:
        return np.full((64, 4), len(self.log), np.float32)


def make(tmp_path: Path, engine: Path, *, modes: str = "whole,mtp", context: int = 6, taps=None):
    manifest = load_manifest(engine)
    plan = make_plan(
        contexts=(context,), vocab_size=1024, index_topk=64, has_mtp=True, modes=tuple(modes.split(","))  # pyright: ignore
    )  # fmt: skip
    backend = FakeBackend(manifest.config["hidden_size"])
    write_dump(backend, manifest, plan, tmp_path, name="engine", taps=taps)
    return backend, Dump.open(tmp_path)


def test_each_case_has_caches_of_its_own_and_shows_them_last(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    backend, dump = make(tmp_path, tiny_engines["exact"], modes="decode,ragged")
    assert len(backend.allocated) == 2
    for number, (case, step) in enumerate(dump.cases):
        assert dump.has(number, "cache_latent.3") == (step is case.steps[-1])
    last = len(dump.cases[0][0].steps) - 1
    assert dump.tensor(last, "cache_index.0")[0, 0] == last + 1


def test_an_mtp_step_is_fed_the_hidden_state_before_it(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    backend, dump = make(tmp_path, tiny_engines["exact"])
    graphs = [graph for graph, _, _ in backend.log]
    assert graphs == [step.graph for _, step in dump.cases] and "mtp" in graphs
    for number, (graph, inputs, _) in enumerate(backend.log):
        assert (inputs.hidden_in is not None) == (graph == "mtp")
        if graph == "mtp":
            assert (inputs.hidden_in == number).all()  # what run `number` gave, counted from 1


def test_both_graphs_show_their_caches_after_their_last_step(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    _, dump = make(tmp_path, tiny_engines["exact"], modes="mtp")
    last = {step.graph: number for number, (_, step) in enumerate(dump.cases)}
    shown = {(n, name) for n in range(len(dump.cases)) for name in dump.names(n) if name.startswith("cache_latent")}
    assert shown == {*((last["model"], f"cache_latent.{layer}") for layer in range(4)), (last["mtp"], "cache_latent.4")}


def test_taps_are_kept_as_asked(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    backend, _ = make(tmp_path, tiny_engines["exact"], modes="whole", taps={"expert_ids.1"})
    assert backend.log[0][2] == ["expert_ids.1", "hidden", "logits"]


def test_a_case_longer_than_the_engine_is_refused(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    limit = load_manifest(tiny_engines["exact"]).limits.max_model_len
    with pytest.raises(RequestError, match=f"accepts {limit}"):
        make(tmp_path, tiny_engines["exact"], modes="whole", context=limit + 1)


def test_an_engine_without_mtp_refuses_mtp_steps(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    manifest = load_manifest(tiny_engines["exact"])
    manifest = manifest.model_copy(update={"graphs": {"model": manifest.graphs["model"]}})
    plan = make_plan(contexts=(6,), vocab_size=1024, index_topk=64, has_mtp=True, modes=("mtp",))
    with pytest.raises(EngineError, match="graph 'mtp', which the engine does not have"):
        write_dump(FakeBackend(512), manifest, plan, tmp_path, name="engine")


def test_the_command_writes_what_the_engine_computes(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "dump"
    args = ["dump", str(tiny_engines["exact"]), str(out), "--contexts", "5", "--modes", "whole", "--quiet"]
    result = CliRunner().invoke(cli.main, args)
    assert result.exit_code == 0 and result.output == "", result.output
    dump = Dump.open(out)
    assert dump.side.kind == "engine" and dump.tensor(0, "logits").shape == (5, 1024)
    assert np.isfinite(dump.tensor(0, "logits")).all() and dump.tensor(0, "topk_indices.0").dtype == np.int32
    again = CliRunner().invoke(cli.main, args)
    assert again.exit_code == 2 and "pass --force" in again.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--contexts", "x"], "'x' is no number of tokens"),
        (["--modes", "x"], "'x' is not one of 'whole'"),
        (["--plan", "/nowhere"], "/nowhere: cannot be read"),
        (["--taps", "expert_ids.1,attn_out.1"], "--taps has 'attn_out.1', which"),
    ],
)
def test_bad_input_is_one_line(tiny_engines: dict[str, Path], tmp_path: Path, args: list[str], words: str) -> None:
    result = CliRunner().invoke(cli.main, ["dump", str(tiny_engines["exact"]), str(tmp_path / "out"), *args])
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_engine_side_imports_no_torch() -> None:
    code = "import sys, seekforge.runtime.cli.dump; print([m for m in ('torch', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_dump_of_an_engine_with_experts_in_nvfp4_says_so(tiny_engines: dict[str, Path]) -> None:
    manifest = load_manifest(tiny_engines["exact"])
    assert engine_side(manifest, "engine").weights == CHECKPOINT
    nvfp4 = manifest.model_copy(update={"build": manifest.build | {"precision": "nvfp4"}})
    assert engine_side(nvfp4, "engine").weights == NVFP4_EXPERTS
