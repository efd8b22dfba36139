"""Memory of compiled plans, as TensorRT-RTX says it: how it grows, where it is written down, and what was expected."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from tests.support.build_options import gpu_options
from tests.support.real_width import real_width

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.tensorrt import build as gpu_engine
from seekforge.exporter.builder.tensorrt.build import build_gpu
from seekforge.exporter.builder.tensorrt.check import check, open_inputs
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.inspect.cli import inspect as inspect_command
from seekforge.exporter.sizing.memory import Workload, logits_bytes
from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import TargetConfig, load_target

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

OPTIONS = gpu_options(plugins="all", allow_oversize=True, kernels=False)
#: By how much the planner may be above what plans say.
FACTOR = 2


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense and an MoE layer of DeepSeek-V3.2, each a program."""
    return {name: real_width(tmp_path_factory, name) / "program" for name in ("dense", "moe")}


def decoding(batch: int, queries: int = 1) -> TargetConfig:
    """A target whose only profile takes `batch` sequences and `queries` tokens of each."""
    target = load_target(
        "rtx5090", [f"limits.max_batch_size={batch}", f"limits.max_num_batched_tokens={max(batch, queries)}"]
    )
    sizes = {"max_batch_size": batch, "max_query_len": queries, "typical_batch_size": min(4, batch)}
    return target.model_copy(update={"profiles": {"decode": target.profiles["decode"].model_copy(update=sizes)}})


def built(program: Path, target: TargetConfig, out: Path) -> tuple[Manifest, int]:
    """Return the manifest of an engine, and the bytes that the planner expected of what its plans share."""
    inputs = open_inputs(program, None)
    planned = check(inputs, target, OPTIONS)
    manifest = build_gpu(inputs, planned, out, options=OPTIONS, force=True, progress=Stages(quiet=True))
    work = Workload(target.limits.max_model_len, target.limits.max_batch_size)
    beside = logits_bytes(inputs.config, Parallelism(), work)
    return manifest, planned.device_bytes["scratch"] + planned.device_bytes["activations"] - beside


def shared(manifest: Manifest) -> int:
    """Return what the plans of an engine share, as TensorRT says it."""
    assert manifest.audit is not None
    return max(size for sizes in manifest.audit.activation_bytes.values() for size in sizes.values())


def test_a_sequence_more_costs_its_activations_and_no_weight(
    layers: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """W_UK of one layer is 16.8 MB: held once per sequence, it would be the slope."""
    monkeypatch.setattr(gpu_engine, "spanning", lambda profiles, limits: profiles)  # one token of each sequence
    config = load_preset("full").config
    small, large = 16, 256
    sizes = {batch: shared(built(layers["moe"], decoding(batch), tmp_path / "engine")[0]) for batch in (small, large)}
    slope = (sizes[large] - sizes[small]) / (large - small)
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    absorbed = 2 * 2 * heads * latent  # queries before and after, bf16
    scores = 4 * load_target("rtx5090").limits.max_model_len + 8192  # of the indexer, with its histogram
    assert absorbed < slope < 2 * (absorbed + scores)
    assert slope < heads * config.qk_nope_head_dim * latent * 2 / 8


@pytest.mark.parametrize(
    ("kind", "batch", "queries"), [("moe", 64, 1), ("moe", 4, 512), ("dense", 1, 2048), ("dense", 1, 1)]
)
def test_the_planner_agrees_with_plans_of_real_width(
    layers: dict[str, Path], kind: str, batch: int, queries: int, tmp_path: Path
) -> None:
    manifest, expected = built(layers[kind], decoding(batch, queries), tmp_path / "engine")
    assert shared(manifest) <= expected <= FACTOR * shared(manifest)


def test_every_plan_says_its_memory_and_the_planner_agrees(tiny_programs: dict[str, Path], tmp_path: Path) -> None:
    """For every profile of a target; `build` and `inspect` print the largest of each."""
    target = load_target("rtx4090")
    manifest, expected = built(tiny_programs["fp8"], target, tmp_path / "engine")
    assert manifest.audit is not None
    said = manifest.audit.activation_bytes
    assert said.keys() == manifest.audit.plan_bytes.keys()
    assert all(list(sizes) == list(target.profiles) for sizes in said.values())
    assert shared(manifest) <= expected <= FACTOR * shared(manifest)
    log = (tmp_path / "engine" / "build.log").read_text(encoding="utf-8")
    assert all(f"{size} bytes" in log for sizes in said.values() for size in sizes.values())
    page = " ".join(CliRunner().invoke(inspect_command, [str(tmp_path / "engine")]).output.split())
    line = page.partition("memory that plans share, by profile: ")[2]
    for profile in target.profiles:
        largest = max(sizes[profile] for sizes in said.values())
        assert f"{profile} {largest / (1 << 30):.2f} GiB" in line


def broadcast_weights(model: onnx.ModelProto, weights: set[str]) -> list[str]:
    """Return the matrix products whose weight lacks an axis that their other operand has, or has it of size 1."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph = inferred.graph
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    shapes |= {one.name: list(one.dims) for one in graph.initializer}
    from_weight = set(weights)
    found = []
    for node in graph.node:
        if node.op_type in ("Cast", "Transpose", "Identity", "Unsqueeze", "Reshape") and node.input[0] in from_weight:
            from_weight.add(node.output[0])
        if node.op_type not in ("MatMul", "Gemm", "Einsum"):
            continue
        own = [name for name in node.input if name in from_weight]
        other = [name for name in node.input if name not in from_weight]
        if own and other and (node.op_type == "Einsum" or shapes[own[0]][:-2] != shapes[other[0]][:-2]):
            found.append(f"{node.name}: {shapes[other[0]]} x {shapes[own[0]]}")
    return found


@pytest.mark.parametrize("numerics", ("exact", "fp8"))
def test_no_product_of_a_program_repeats_a_weight(tiny_programs: dict[str, Path], numerics: str) -> None:
    """TensorRT repeats an operand along every axis that only the other one has."""
    inputs = open_inputs(tiny_programs[numerics], None)
    for name, graph in inputs.graphs.items():
        held = {spec.name for role in ("weight", "table") for spec in inputs.program.graphs[name].with_role(role)}
        assert broadcast_weights(graph, held) == []


def test_a_repeated_weight_is_found() -> None:
    def product(rows: str, weight: str) -> onnx.ModelProto:
        return onnx.parser.parse_model(
            '<ir_version: 11, opset_import: ["" : 23]>'
            f"g (float[{rows}] x, float[{weight}] w) => (float[{rows.rpartition(',')[0]},4] y) "
            "{ t = Identity(w)  y = MatMul(x, t) }"
        )

    assert len(broadcast_weights(product("B,Q,8", "8,4"), {"w"})) == 1
    assert len(broadcast_weights(product("B,2,Q,8", "2,8,4"), {"w"})) == 1
    assert len(broadcast_weights(product("B,2,Q,8", "1,2,8,4"), {"w"})) == 1
    assert broadcast_weights(product("T,8", "8,4"), {"w"}) == []
    assert broadcast_weights(product("2,T,8", "2,8,4"), {"w"}) == []
