"""Plugin engines at the widths of DeepSeek-V3.2, without a GPU: a layer for every SM of TensorRT-RTX, and the whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tests.support.build_options import gpu_options

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.tensorrt.build import build_gpu
from seekforge.exporter.builder.tensorrt.check import check, open_inputs
from seekforge.exporter.checkpoint.sparse import new_sparse_checkpoint
from seekforge.exporter.program.export import export
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import RTX_SMS, load_target

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytestmark = pytest.mark.slow

OPTIONS = gpu_options(plugins="all", allow_oversize=True, kernels=False)


#: Nodes that are plugins: of three dense layers, of 58 with experts, of the head, and of the MTP module.
PLUGIN_LAYERS = 3 * 12 + 58 * 13 + 1 + 14


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "checkpoint"
    new_sparse_checkpoint(folder, "full")
    return folder


@pytest.fixture(scope="module")
def moe_layer(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "layer"
    export(checkpoint, folder, numerics=NUMERICS["fp8"], layer_range=(3, 4))
    return folder


@pytest.mark.parametrize("sm", RTX_SMS)
def test_one_layer_at_real_width(checkpoint: Path, moe_layer: Path, sm: int, tmp_path: Path) -> None:
    inputs = open_inputs(moe_layer, checkpoint)
    planned = check(inputs, load_target("rtx4090", [f"sm={sm}"]), OPTIONS)
    manifest = build_gpu(
        inputs, planned, tmp_path / "engine", options=OPTIONS, force=False, progress=Stages(quiet=True)
    )
    assert manifest.audit is not None
    assert manifest.audit.layers["model"]["PLUGIN_V3"] == sum(planned.num_nodes.values())
    assert manifest.audit.got == ("fp8" if sm >= 89 else "FP8 weights, BF16 products")
    assert manifest.audit.plan_bytes["model"] < 64 << 20, "a plan holds no weights"
    assert max(manifest.audit.workspaces.values()) == manifest.audit.device_bytes["scratch"]
    assert any(math.prod(map(int, spec.shape)) > 2**31 for spec in manifest.graphs["model"].with_role("weight"))


@pytest.mark.parametrize("name", ["rtx4090", "rtx5090"])
def test_the_whole_program(checkpoint: Path, name: str, tmp_path: Path) -> None:
    program = checkpoint.parent / "program"
    if not program.exists():
        export(checkpoint, program, numerics=NUMERICS["fp8"])
    inputs = open_inputs(program, checkpoint)
    planned = check(inputs, load_target(name), OPTIONS)
    manifest = build_gpu(
        inputs, planned, tmp_path / "engine", options=OPTIONS, force=False, progress=Stages(quiet=True)
    )
    audit = manifest.audit
    assert audit is not None and audit.oversize and audit.inlined == {}
    # per layer 3 norms, 3 linears of the attention, head weights, a cache write, an indexer, an attention; 2 linears of
    # a dense MLP; per MoE layer the router's product, a choice and experts, the shared one among them; then the head
    runs = manifest.uses()
    assert runs == {"model.0.plan": 1, "model.1.plan": 2, "model.3.plan": 57, "model.60.plan": 1, "mtp.plan": 1}
    plugins = {plan: layers["PLUGIN_V3"] for plan, layers in audit.layers.items()}
    assert plugins == {"model.0": 12, "model.1": 12, "model.3": 13, "model.60": 14, "mtp": 14}
    assert sum(audit.plugins.values()) == PLUGIN_LAYERS
    assert audit.share("fp8") > 0.6
    assert manifest.capturable == dict.fromkeys(plugins, True)
    assert max(audit.build_peak_bytes.values()) < 1 << 29


@pytest.fixture(scope="module", params=[Parallelism(tp=8, ep=True), Parallelism(tp=8, pp=2)], ids=str)
def of_ranks(request: pytest.FixtureRequest, checkpoint: Path) -> tuple[Parallelism, Path]:
    """A layout of the whole model on eight GPUs, or on two machines of eight, and its program."""
    program = checkpoint.parent / f"program-{request.param_index}"
    export(checkpoint, program, numerics=NUMERICS["fp8"], parallelism=request.param)
    return request.param, program


@pytest.mark.parametrize("name", ["rtx4090", "rtx5090"])
def test_the_whole_program_of_several_ranks(
    of_ranks: tuple[Parallelism, Path], checkpoint: Path, name: str, tmp_path: Path
) -> None:
    """What TensorRT will build for data-center GPUs, dry: plans that stages share, with their sums over ranks."""
    layout, program = of_ranks
    inputs = open_inputs(program, checkpoint)
    planned = check(inputs, load_target(name), OPTIONS)
    manifest = build_gpu(
        inputs, planned, tmp_path / "engine", options=OPTIONS, force=False, progress=Stages(quiet=True)
    )
    audit, ranks, runs = manifest.audit, manifest.ranks, manifest.uses()
    assert audit is not None and audit.inlined == {} and ranks is not None and ranks.parallelism == layout
    assert sum(count for plan, count in runs.items() if plan.startswith("model")) == 61
    assert sum(audit.plugins.values()) == PLUGIN_LAYERS, "as many as of one rank"
    assert len(ranks.stage_bytes) == layout.pp and len(runs) <= 8 and all(manifest.capturable.values())
    whole = sum(one["weights"] for one in ranks.stage_bytes) * layout.tp
    assert 640e9 < whole < 800e9, "what tensor-parallel ranks do not divide is on each of them"
    assert max(audit.build_peak_bytes.values()) < 1.5 * (1 << 29)


@pytest.fixture(scope="module", params=["glm5-full", "v3-full"])
def another(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another family, of headers alone, and the program beside it."""
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    new_sparse_checkpoint(folder, request.param)
    export(folder, folder.with_name("program"), numerics=NUMERICS["fp8"])
    return folder


@pytest.mark.parametrize("name", ["rtx4090", "rtx5090"])
def test_the_whole_program_of_another_family(another: Path, name: str, tmp_path: Path) -> None:
    """Every operator of every layer becomes a plugin, and alike layers share a plan."""
    inputs = open_inputs(another.with_name("program"), another)
    config = ModelConfig.load(another)
    settings = [] if config.index_topk else ["kv_format=bf16"]  # dense attention reads no FP8 caches
    planned = check(inputs, load_target(name, settings), OPTIONS)
    manifest = build_gpu(
        inputs, planned, tmp_path / "engine", options=OPTIONS, force=False, progress=Stages(quiet=True)
    )
    audit, runs = manifest.audit, manifest.uses()
    assert audit is not None and audit.oversize and audit.inlined == {}
    assert audit.plugins == planned.num_nodes
    assert sum(count for plan, count in runs.items() if plan.startswith("model")) == config.num_hidden_layers
    assert len(runs) <= 8 and all(manifest.capturable.values()), manifest.capturable
    assert max(audit.build_peak_bytes.values()) < 1 << 29
