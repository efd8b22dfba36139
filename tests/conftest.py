"""Fixtures that are made once per run: a checkpoint, its programs and its engines, all of the tiny preset.

What makes them is imported when it is asked for: it brings torch and onnx, which most tests do without.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.support.kept_traces import keep_traces
from tests.support.made_once import made_once

from seekforge.common.cli.console import Stages
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine import verified
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.targets import load_target

#: Of these numerics programs are made once for all tests; bf16 makes the same roundings as exact.
MADE_NUMERICS = ("fp8", "exact")

# Kernels run in Triton's interpreter here; it must be chosen before anything imports triton.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    """Give each worker its share of the cores: engines that take all of them wait for threads of the other workers.

    With two workers on two cores an engine's second thread doubles the processor time of a step, and its wall time.
    """
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: workers])


def pytest_collection() -> None:
    """Search for no garbage while modules are imported and tests collected: there is hardly any."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what is there by now out of the search for garbage: modules and tests, which stay to the end.

    Half a second of each search goes into them, and a trace of a model makes enough objects for several.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _own_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was verified is remembered for this run, and not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(verified.VARIABLE, str(tmp_path_factory.mktemp("verified") / "verified.json"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _kept_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A graph is traced once per run, whoever exports it."""
    with pytest.MonkeyPatch.context() as patch:
        keep_traces(patch, tmp_path_factory)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny` checkpoint folder; do not write into it."""
    return made_once(tmp_path_factory, "checkpoint", lambda root: _write_checkpoint(root / "tiny")) / "tiny"


def _write_checkpoint(folder: Path) -> None:
    from seekforge.exporter.checkpoint.new import new_checkpoint

    new_checkpoint(folder, "tiny")


@pytest.fixture(scope="session")
def tiny_config(tiny_checkpoint: Path) -> ModelConfig:
    """The configuration of `tiny_checkpoint`."""
    return ModelConfig.load(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_source(tiny_checkpoint: Path) -> Iterator[Checkpoint]:
    """The tensors of `tiny_checkpoint`, mapped."""
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        yield checkpoint


def _in_turn(names: Iterable[str]) -> list[str]:
    """Names in an order of this worker's own, so that none waits for what another makes while there is more to make."""
    listed = list(names)
    first = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % len(listed)
    return listed[first:] + listed[:first]


@pytest.fixture(scope="session")
def tiny_programs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Numerics name -> canonical program of `tiny_checkpoint`."""

    def make(name: str, root: Path) -> None:
        from seekforge.exporter.program.export import export

        export(tiny_checkpoint, root / name, numerics=NUMERICS[name])

    made = {
        name: made_once(tmp_path_factory, f"program-{name}", partial(make, name)) / name
        for name in _in_turn(MADE_NUMERICS)
    }
    return {name: made[name] for name in MADE_NUMERICS}


@pytest.fixture(scope="session")
def tiny_layers(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Numerics name -> program of layer 1 of `tiny_checkpoint` alone, its first MoE layer; do not write into it."""

    def make(name: str, root: Path) -> None:
        from seekforge.exporter.program.export import export

        export(tiny_checkpoint, root / name, numerics=NUMERICS[name], layer_range=(1, 2))

    return {name: made_once(tmp_path_factory, f"layer-{name}", partial(make, name)) / name for name in MADE_NUMERICS}


@pytest.fixture(scope="session")
def tiny_engines(
    tiny_checkpoint: Path, tiny_programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Numerics name -> CPU engine of `tiny_checkpoint`; do not write into it."""

    def make(name: str, root: Path) -> None:
        from seekforge.exporter.builder.onnxruntime.build import build

        build(
            tiny_programs[name],
            root / name,
            target=load_target("cpu"),
            checkpoint_folder=tiny_checkpoint,
            force=False,
            progress=Stages(quiet=True),
        )

    made = {
        name: made_once(tmp_path_factory, f"engine-{name}", partial(make, name)) / name
        for name in _in_turn(MADE_NUMERICS)
    }
    return {name: made[name] for name in MADE_NUMERICS}
