"""Engines of several GPUs: what each rank runs and holds. The compiler is a stand-in; `test_collectives` has it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.support.build_options import gpu_options
from tests.support.made_once import made_once
from tests.support.rank_engines import rank_engine

from seekforge.common.cli.console import Stages
from seekforge.common.dtypes import itemsize
from seekforge.exporter.builder.tensorrt import build as gpu_engine
from seekforge.exporter.builder.tensorrt.check import check, open_inputs
from seekforge.exporter.builder.tensorrt.compiler import Compiled
from seekforge.exporter.builder.tensorrt.kernels import kernel_tasks
from seekforge.exporter.program.rank_bindings import rank_bindings
from seekforge.formats.engine.manifest import Manifest, load_manifest
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.program import TensorSpec, load_bindings
from seekforge.formats.targets import load_target
from seekforge.formats.weight_recipes import for_rank

ALL = Parallelism(tp=2, pp=2, ep=True)
TARGET = ["precision=bf16", "kv_format=bf16"]
OPTIONS = gpu_options(kernels=False)


@pytest.fixture(scope="session")
def program(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_engine(tiny_checkpoint, ALL, tmp_path_factory).parent / "program"


def stand_in_engine(
    program: Path, checkpoint: Path, parallelism: Parallelism, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the engine that is made of a program of several ranks by a compiler which compiles nothing."""

    def compiled(*, plan: Path, plugins: dict[str, int], **_: Any) -> Compiled:
        plan.write_bytes(plan.name.encode())
        return Compiled({}, {}, dict(plugins), plan.stat().st_size, 0.0, 0.0, 0.0, 0, "1.7.1", True)

    def make(root: Path) -> None:
        inputs = open_inputs(program, checkpoint)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_engine, "compile_graph", compiled)
            planned = check(inputs, load_target("rtx4090", TARGET), OPTIONS)
            gpu_engine.build_gpu(
                inputs, planned, root / "engine", options=OPTIONS, force=False, progress=Stages(quiet=True)
            )

    return made_once(tmp_path_factory, f"gpu-rank-engine-{parallelism}", make) / "engine"


@pytest.fixture(scope="session")
def engine(program: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in_engine(program, tiny_checkpoint, ALL, tmp_path_factory)


@pytest.fixture
def manifest(engine: Path) -> Manifest:
    return load_manifest(engine)


def test_one_folder_has_the_plans_of_all_ranks(manifest: Manifest) -> None:
    """Layers 1 and 2 are alike: one plan serves both, whichever stages and GPUs they are on."""
    assert manifest.ranks is not None and manifest.ranks.parallelism == ALL
    plans = ["model.0", "model.1", "model.1", "model.3"]
    stages = tuple(tuple(plans[start:stop]) for start, stop in manifest.ranks.pipeline_stages)
    assert manifest.ranks.pieces == {"model": stages, "mtp": ((), ("mtp",))} and all(stages)
    assert manifest.uses() == {"model.0.plan": 1, "model.1.plan": 2, "model.3.plan": 1, "mtp.plan": 1}


def test_every_rank_reads_what_its_program_does(engine: Path, manifest: Manifest, program: Path) -> None:
    assert manifest.ranks is not None
    bindings, inputs = load_bindings(engine), open_inputs(program, None)
    described = inputs.program
    for rank in range(4):
        place = ALL.coordinates(rank)
        expected = rank_bindings(described, inputs.bindings, rank)
        for graph in manifest.graphs:
            pieces = manifest.ranks.pieces_of(graph, manifest.plans(graph), place.pp_rank)
            names = {spec.name for one in pieces for spec in one.inputs if spec.role in ("weight", "table")}
            tables = {spec.name for spec in described.graphs[graph].with_role("table")}
            assert names <= expected[graph].keys() <= names | tables, "a stage need not read every table"
            for name in names:
                assert for_rank(bindings[graph][name], ALL, place.tp_rank).shape == expected[graph][name].shape


def _num_bytes(specs: Iterable[TensorSpec]) -> int:
    return sum(itemsize(spec.dtype) * math.prod(map(int, spec.shape)) for spec in specs)


def test_accounts_and_kernels_are_those_of_one_rank(manifest: Manifest, program: Path, tiny_checkpoint: Path) -> None:
    assert manifest.ranks is not None and manifest.audit is not None
    accounts = manifest.ranks.stage_bytes
    assert manifest.audit.device_bytes == max(accounts, key=lambda one: one["total"])
    for stage, account in enumerate(accounts):
        plans = {graph: manifest.plans(graph) for graph in manifest.graphs}
        pieces = [piece for graph, ios in plans.items() for piece in manifest.ranks.pieces_of(graph, ios, stage)]
        specs = {spec.name: spec for one in pieces for spec in one.inputs if spec.role in ("weight", "table")}
        held = _num_bytes(specs.values())
        tables = _num_bytes(spec for one in manifest.graphs.values() for spec in one.with_role("table"))
        assert held <= account["weights"] <= held + tables, stage
    inputs = open_inputs(program, tiny_checkpoint)
    tasks = kernel_tasks(inputs.program, inputs.config, load_target("rtx4090", TARGET), ["DsaAttention", "MoeExperts"])
    statics = {task.op: task.statics for task in tasks}
    assert statics["MoeExperts"]["E"] == inputs.config.n_routed_experts // 2
    assert statics["DsaAttention"]["H"] == inputs.config.num_attention_heads // 2


@pytest.mark.parametrize("plugins", ["auto", "all", "none"])
def test_a_sum_over_ranks_is_neither_a_plugin_nor_inlined(program: Path, tiny_checkpoint: Path, plugins: str) -> None:
    inputs = open_inputs(program, tiny_checkpoint)
    planned = check(inputs, load_target("rtx4090", TARGET), gpu_options(plugins=plugins))
    assert "SumRanks" in inputs.program.ops
    assert "SumRanks" not in {*planned.plugins, *planned.inlined} and len({*planned.plugins, *planned.inlined}) > 5
