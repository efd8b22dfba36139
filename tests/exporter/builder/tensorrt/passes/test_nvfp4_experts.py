"""Engines for Blackwell with experts in NVFP4: what is built, what they load, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from tests.support.build_options import gpu_options

from seekforge.common.cli.console import Stages
from seekforge.common.errors import TargetError
from seekforge.exporter.builder.options import BuildOptions
from seekforge.exporter.builder.tensorrt.build import build_gpu
from seekforge.exporter.builder.tensorrt.check import GpuBuild, Inputs, check, open_inputs
from seekforge.exporter.builder.tensorrt.kernels import kernel_tasks
from seekforge.exporter.builder.tensorrt.passes.nvfp4_experts import expert_weights
from seekforge.exporter.program.export import export
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.loader.loader import Loader
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.program import load_bindings
from seekforge.formats.quantization import nvfp4
from seekforge.formats.weight_recipes import evaluate, nvfp4_rows, read_recipe, slice_, stack


@pytest.fixture(scope="module")
def one_layer(tiny_checkpoint: Path, tiny_layers: dict[str, Path]) -> Inputs:
    """The first MoE layer alone."""
    return open_inputs(tiny_layers["fp8"], tiny_checkpoint)


def checked(inputs: Inputs, name: str, precision: str) -> GpuBuild:
    options = dataclasses.replace(gpu_options(kernels=False), precision=precision)
    return check(inputs, options.target(name), options)


def test_expected_weights_shrink_by_seven_sixteenths_of_the_experts(one_layer: Inputs) -> None:
    graph = one_layer.graphs["model"]
    experts = {weight for weight, _ in expert_weights(graph)}
    assert len(experts) == 2
    sizes = {spec.name: spec.shape for spec in one_layer.program.graphs["model"].inputs}
    saved = sum(math.prod(map(int, sizes[name])) for name in experts) * 7 // 16
    of = {one: checked(one_layer, "b200", one).device_bytes for one in ("fp8", "nvfp4")}
    assert of["fp8"]["weights"] - of["nvfp4"]["weights"] == saved > 0
    assert {key for key in of["fp8"] if of["fp8"][key] != of["nvfp4"][key]} == {"weights", "total"}


@pytest.mark.parametrize("name", ["b200", "b300", "rtx5090"])
def test_kernels_of_blackwell_take_the_rows(one_layer: Inputs, name: str) -> None:
    found = checked(one_layer, name, "nvfp4")
    tasks = kernel_tasks(one_layer.program, one_layer.config, found.target, found.plugins)
    width = {task.statics["W13"] for task in tasks if task.op == "MoeExperts"}
    assert width == {nvfp4.row_bytes(one_layer.config.hidden_size)}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("h200", "precision nvfp4 is for SMs from 100 on .Blackwell., and this is for sm 90; take precision fp8"),
        ("rtx4090", "this is for sm 89; take precision fp8"),
        ("cpu", "--precision nvfp4 is for GPUs; a CPU knows f32, int8, int4"),
    ],
)
def test_other_targets_are_refused_in_one_line(name: str, fault: str) -> None:
    with pytest.raises(TargetError, match=fault):
        BuildOptions(precision="nvfp4").target(name)


def test_a_plan_for_an_older_sm_too_is_refused() -> None:
    options = dataclasses.replace(gpu_options(kernels=False, sm=(89,)), precision="nvfp4")
    with pytest.raises(TargetError, match="this is for sm 89"):
        options.target("rtx5090")


def test_a_program_without_experts_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export(tiny_checkpoint, tmp_path / "dense", numerics=NUMERICS["fp8"], num_layers=1)
    fault = (
        "--precision nvfp4 is for experts, and the program's layers have none; pass --precision fp8 or --precision bf16"
    )
    with pytest.raises(TargetError, match=fault):
        checked(open_inputs(tmp_path / "dense", tiny_checkpoint), "b200", "nvfp4")


def test_experts_that_would_be_inlined_are_refused(one_layer: Inputs) -> None:
    options = dataclasses.replace(gpu_options(kernels=False, plugins="none"), precision="nvfp4")
    with pytest.raises(TargetError, match="--precision nvfp4 needs BlockFp8Linear and MoeExperts as plugin on sm100"):
        check(one_layer, options.target("b200"), options)


@pytest.fixture(scope="module")
def engine(one_layer: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layer for an RTX 5090, for decode alone, without kernels."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    out = tmp_path_factory.mktemp("nvfp4") / "engine"
    options = dataclasses.replace(gpu_options(kernels=False), precision="nvfp4")
    target = options.target("rtx5090")
    target = target.model_copy(update={"profiles": {"decode": target.profiles["decode"]}})
    build_gpu(
        one_layer, check(one_layer, target, options), out, options=options, force=False, progress=Stages(quiet=True)
    )
    return out


def test_an_engine_reads_rows_and_says_so(engine: Path, one_layer: Inputs) -> None:
    manifest = load_manifest(engine)
    assert manifest.build["precision"] == "nvfp4"
    assert manifest.plugins["MoeExperts"].num_layers == 1
    assert manifest.audit is not None and (manifest.audit.asked, manifest.audit.got) == ("nvfp4", "fp8")
    products = {one.what: (one.form, one.precision) for one in manifest.audit.products}
    assert products["MoeExperts"] == ("plugin", "f16") and products["BlockFp8Linear"] == ("plugin", "fp8")
    experts = {weight for weight, _ in expert_weights(one_layer.graphs["model"])}
    before = {spec.name: spec for spec in one_layer.program.graphs["model"].inputs}
    after = {spec.name: spec for spec in manifest.graphs["model"].inputs}
    assert experts <= after.keys()
    for name, spec in after.items():
        if name in experts:
            *lead, k = before[name].shape
            assert (spec.dtype, spec.shape) == ("i8", (*lead, nvfp4.row_bytes(int(k))))
        elif spec.role == "weight":
            assert spec.shape == before[name].shape


def test_what_is_loaded_is_the_experts_within_four_bits(engine: Path, one_layer: Inputs, tiny_checkpoint: Path) -> None:
    bindings = load_bindings(engine)["model"]
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        for weight, scale in expert_weights(one_layer.graphs["model"]):
            wanted = bindings[weight], bindings[scale]
            assert wanted == tuple(read_recipe(one.to_dict()) for one in wanted)
            rows, scales = (np.zeros(one.shape, np.int8 if at == 0 else np.float32) for at, one in enumerate(wanted))
            Loader(checkpoint, {"rows": wanted[0], "scales": wanted[1]}, {"rows": rows, "scales": scales}).run()
            assert (rows == evaluate(wanted[0], checkpoint)).all() and (scales == evaluate(wanted[1], checkpoint)).all()
            exact = evaluate(one_layer.bindings["model"][weight], checkpoint).astype(np.float32)
            factors = evaluate(one_layer.bindings["model"][scale], checkpoint)
            exact *= factors.repeat(128, 1).repeat(128, 2)
            got = nvfp4.from_rows(rows) * scales.repeat(128, 1).repeat(128, 2)
            error = np.sqrt(np.mean(np.square(got - exact)) / np.mean(np.square(exact)))
            assert 0.05 < error < 0.11, error


def test_rows_of_a_rank_are_those_of_its_part(one_layer: Inputs, tiny_checkpoint: Path) -> None:
    """A slice of experts or of rows of the FP8 values gives the slice of the rows."""
    weight, _ = next(expert_weights(one_layer.graphs["model"]))
    recipe = one_layer.bindings["model"][weight]
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        whole = evaluate(nvfp4_rows(recipe), checkpoint)
        assert whole.shape[0] >= 4
        for part, want in (
            (stack(recipe.parts[1:2]), whole[1:2]),
            (slice_(recipe, 0, 1, 3), whole[1:3]),
            (slice_(recipe, 1, 128, 256), whole[:, 128:256]),
        ):
            got = np.zeros(want.shape, np.int8)
            Loader(checkpoint, {"rows": nvfp4_rows(part)}, {"rows": got}).run()
            assert (got == want).all()
