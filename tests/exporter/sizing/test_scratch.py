"""Scratch memory has one truth: what plugins ask TensorRT for, what a build expects, and what the planner counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support.build_options import gpu_options

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.tensorrt.build import build_gpu
from seekforge.exporter.builder.tensorrt.check import Inputs, check, open_inputs
from seekforge.exporter.builder.tensorrt.memory import expected_bytes
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.planner.answer import memory_of
from seekforge.exporter.planner.cli import plan as plan_command
from seekforge.exporter.planner.question import Question
from seekforge.exporter.sizing.memory import Workload
from seekforge.exporter.sizing.scratch import Kernels, bf16_linear_shapes, linear_shapes, step_scratch_bytes
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import all_targets, load_target

OPTIONS = gpu_options(plugins="all", kernels=False)


@pytest.fixture(scope="module")
def full() -> ModelConfig:
    return ModelConfig.parse(load_preset("full").config_json, "full")


@pytest.fixture(scope="module")
def inputs(tiny_programs: dict[str, Path], tiny_checkpoint: Path) -> Inputs:
    return open_inputs(tiny_programs["fp8"], tiny_checkpoint)


@pytest.mark.parametrize("joins", [True, False])
def test_the_linears_that_are_counted_are_those_of_the_graph(inputs: Inputs, joins: bool) -> None:
    """Joined where they may be, and apart for engines that show what is between them."""
    if not joins:
        inputs = open_inputs(inputs.folder, None, joins=False)
    found = set()
    for graph in inputs.graphs.values():
        shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.graph.input}
        found |= {shapes[node.input[1]] for node in graph.graph.node if node.op_type == "BlockFp8Linear"}
    config = inputs.config
    latent, heads = config.q_lora_rank, config.num_attention_heads * config.qk_head_dim
    indexer = config.index_n_heads * config.index_head_dim
    apart = {(heads, latent), (indexer, latent)}
    assert set(linear_shapes(config)) == found | apart | {(heads + indexer, latent)}
    assert apart.isdisjoint(found) is joins
    narrow = {
        tuple(map(int, inputs.program.graphs[graph].named(name).shape))
        for graph, names in inputs.bf16_linears.items()
        for name in names
    }
    assert narrow == set(bf16_linear_shapes(inputs.config))


@pytest.mark.parametrize("limits", [{}, {"max_batch_size": 3, "max_num_batched_tokens": 40}, {"max_model_len": 128}])
@pytest.mark.parametrize("target", [target.name for target in all_targets() if target.gpu])
def test_the_planner_counts_what_a_build_expects(inputs: Inputs, target: str, limits: dict[str, int]) -> None:
    chosen = load_target(target, [f"limits.{key}={value}" for key, value in limits.items()])
    known = chosen.limits
    work = Workload(known.max_model_len, known.max_batch_size, known.max_num_batched_tokens)
    question = Question("fp8", "fp8_ds", target=chosen)
    memory = memory_of(inputs.config, Parallelism(), work, question)
    assert memory.indexer_scores + memory.scratch == expected_bytes(inputs, chosen, known, 1)["scratch"]


def test_dense_attention_holds_whole_contexts_only_where_it_is_inlined() -> None:
    config, step = load_preset("v3-full").config, {"context": 65536, "kv_format": "bf16"}
    plugin = step_scratch_bytes(config, 16, 1, **step)["MlaAttention"]
    assert plugin == 16 * 8 * 128 * (512 + 1) * 4, "8 parts of each row, values and log-sums"
    inlined = step_scratch_bytes(config, 16, 1, **step, kernels=Kernels(inlined=frozenset({"MlaAttention"})))
    assert inlined["MlaAttention"] == 16 * 65536 * (3 * 576 + 128) * 4


def test_the_command_plan_says_what_a_build_expects(full: ModelConfig) -> None:
    """For one GPU of each kind; that the model does not fit does not matter."""
    target = load_target("h200")
    args = ["full", "--target", "h200", "--num-gpus", "1", "--contexts", str(target.limits.max_model_len)]
    args += ["--batch-size", str(target.limits.max_batch_size), "--precision", "fp8", "--json"]
    said = json.loads(CliRunner().invoke(plan_command, args, catch_exceptions=False).stdout)
    held = said["answers"][0]["bytes_per_gpu"]
    work = Workload(target.limits.max_model_len, target.limits.max_batch_size, target.limits.max_num_batched_tokens)
    memory = memory_of(full, Parallelism(), work, Question("fp8", "fp8_ds", target=target))
    assert held["indexer_scores"] + held["scratch"] == memory.indexer_scores + memory.scratch


def test_the_plugins_of_an_engine_ask_for_what_was_expected(
    tiny_checkpoint: Path, tiny_layers: dict[str, Path], tmp_path: Path
) -> None:
    """Without quantized activations, whose experts keep rows of two bytes; for two SMs, and steps in three profiles."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    inputs = open_inputs(tiny_layers["exact"], tiny_checkpoint)
    target = load_target("rtx4090", ["also=[120]", "precision=bf16", "kv_format=bf16"])
    planned = check(inputs, target, OPTIONS)
    manifest = build_gpu(
        inputs, planned, tmp_path / "engine", options=OPTIONS, force=False, progress=Stages(quiet=True)
    )
    audit = manifest.audit
    assert audit is not None and len(manifest.profiles) == 3
    assert set(audit.workspaces) == set(inputs.ops)
    assert max(audit.workspaces.values()) == audit.device_bytes["scratch"]
