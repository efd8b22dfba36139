"""GPU engines of the tiny model, built by TensorRT-RTX without a GPU, and what is refused before any work."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx
import pytest
from click.testing import CliRunner
from tests.support.build_options import gpu_options

from seekforge.common.cli.console import Stages
from seekforge.common.dtypes import itemsize
from seekforge.common.errors import EngineError, EnvironmentFault, ProgramError, SeekforgeError, TargetError
from seekforge.exporter.builder.cli import build as build_command
from seekforge.exporter.builder.options import BuildOptions, CompilerOptions
from seekforge.exporter.builder.tensorrt import audit, compiler
from seekforge.exporter.builder.tensorrt import build as gpu_engine
from seekforge.exporter.builder.tensorrt import manifest as gpu_manifest
from seekforge.exporter.builder.tensorrt.build import build_gpu
from seekforge.exporter.builder.tensorrt.check import GpuBuild, Inputs, check, open_inputs
from seekforge.exporter.builder.tensorrt.compiler import Phases, compile_graph
from seekforge.exporter.builder.tensorrt.diagnostics import explain, place
from seekforge.exporter.builder.tensorrt.graph import prepare, widen_weights
from seekforge.exporter.builder.tensorrt.memory import expected_bytes, layers_that_fit
from seekforge.exporter.builder.tensorrt.profiles import axis_bounds, largest_step, pool_blocks, spanning
from seekforge.exporter.builder.tensorrt.resume import Parts
from seekforge.exporter.inspect.cli import inspect as inspect_command
from seekforge.exporter.sizing.memory import Workload, activation_bytes, scratch_bytes, selection_bytes
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import MANIFEST, Manifest, Share, load_manifest
from seekforge.formats.engine.verify import verify_files
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.program import load_bindings, load_program
from seekforge.formats.targets import TargetConfig, all_targets, load_target
from seekforge.plugins.kernels.index import Descriptors
from seekforge.plugins.kernels.kernel_set import Image
from seekforge.plugins.kernels.launcher import KernelFolder, OpLauncher
from seekforge.plugins.registry import FP8_OPS, SPECS
from seekforge.runtime.compatibility import check_complete, check_loadable
from seekforge.runtime.engine.engine_folder import Engine

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

QUIET = Stages(quiet=True)


@pytest.fixture(scope="module")
def inputs(tiny_programs: dict[str, Path], tiny_checkpoint: Path) -> Inputs:
    return open_inputs(tiny_programs["fp8"], tiny_checkpoint)


@pytest.fixture(scope="module")
def one_layer(tiny_checkpoint: Path, tiny_layers: dict[str, Path]) -> Inputs:
    """The first MoE layer alone."""
    return open_inputs(tiny_layers["fp8"], tiny_checkpoint)


ONE_PLAN = gpu_options(kernels=False, layers_per_engine=4)


def build(inputs: Inputs, target: TargetConfig, out: Path, options: BuildOptions | None = None) -> Manifest:
    """Build for the decode profile alone, widened to the limits: each more costs a third of the time."""
    target = target.model_copy(update={"profiles": {"decode": target.profiles["decode"]}})
    options = options or gpu_options(kernels=False)
    return build_gpu(inputs, check(inputs, target, options), out, options=options, force=False, progress=QUIET)


# --- builds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtx4090", "rtx5090"])
def test_every_operator_becomes_a_plugin(inputs: Inputs, name: str, tmp_path: Path) -> None:
    manifest = build(inputs, load_target(name), tmp_path / "engine")
    uses = inputs.ops
    assert manifest.audit is not None
    assert manifest.audit.plugins == uses
    assert manifest.audit.inlined == {}
    assert max(manifest.audit.workspaces.values()) == manifest.audit.device_bytes["scratch"]
    for graph, layers in manifest.audit.layers.items():
        assert layers["PLUGIN_V3"] > 0, graph
        assert "LOOP_OUTPUT" not in layers and "CONDITION" not in layers, "a body was inlined"
    runs = manifest.uses()
    assert runs == {"model.0.plan": 1, "model.1.plan": 2, "model.3.plan": 1, "mtp.plan": 1}
    assert manifest.capturable == dict.fromkeys(["model.0", "model.1", "model.3", "mtp"], True)
    counted = sum(runs[f"{plan}.plan"] * layers["PLUGIN_V3"] for plan, layers in manifest.audit.layers.items())
    assert counted == sum(uses.values())
    fp8 = [one for one in manifest.audit.products if one.what in FP8_OPS]
    assert {one.precision for one in fp8} == {"fp8"}
    assert sum(one.share for one in manifest.audit.products) == pytest.approx(1.0, abs=1e-4)
    again = load_manifest(tmp_path / "engine")
    assert again == manifest
    verify_files(tmp_path / "engine", again, full=True)
    assert not list(tmp_path.glob(".engine.*")), "nothing is left beside the engine"
    sm = manifest.target.sm
    assert sm is not None
    with pytest.raises(EngineError, match="built with --no-kernels"):
        check_loadable(tmp_path / "engine", again, sm=sm, versions=again.runtime_versions)
    recipes = load_bindings(tmp_path / "engine")
    for graph, graph_io in manifest.graphs.items():
        wanted = {spec.name: spec.dtype for role in ("weight", "table") for spec in graph_io.with_role(role)}
        assert {key: recipe.dtype for key, recipe in recipes[graph].items()} == wanted
    assert manifest.graphs["model"].named("latent_cache.0").dtype == "i8"


class Recorder:
    """A driver that counts."""

    loaded = 0

    def load(self, image: Image, cubin: bytes) -> str:
        self.loaded += 1
        assert hashlib.sha256(cubin).hexdigest() == image.sha256
        return image.entry

    def launch(self, *arguments: object) -> None:
        raise AssertionError("nothing is launched")


def _attrs(inputs: Inputs, op: str) -> dict[str, object]:
    """Attributes of an operator as the engine's nodes have them."""
    found = {attr.name: inputs.program.ops[op].attributes[attr.name] for attr in SPECS[op].attrs}
    return found | {name: "fp8_ds" for name in ("kv_format", "index_format") if name in found}


def test_an_engine_carries_the_kernels_of_its_plugins(one_layer: Inputs, tmp_path: Path) -> None:
    """Built without a GPU for a GPU, the engine folder has all that a plugin asks for on that GPU, and only there."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    engine = tmp_path / "engine"
    manifest = build(one_layer, load_target("rtx4090"), engine, gpu_options())
    check_complete(engine, manifest)
    check_loadable(engine, manifest, sm=89, versions=manifest.runtime_versions)
    verify_files(engine, manifest, full=True)
    assert manifest.audit is not None and manifest.audit.kernels.keys() == manifest.plugins.keys()
    cubins = sorted(path.name for path in engine.rglob("*.cubin"))
    assert len(cubins) == len(set(cubins)) <= sum(manifest.audit.kernels.values())
    assert set(cubins) < {Path(file.path).name for file in manifest.files}, "every cubin has a digest"
    assert manifest.min_driver == {"89": 12000}
    assert manifest.build["kernel_compiler"] == f"triton {triton.__version__}"
    driver = Recorder()
    source = KernelFolder(engine, 89, driver)
    for op, use in manifest.plugins.items():
        launcher = source.launcher(op, attrs=_attrs(one_layer, op), products="fp8", digest=use.kernel_digest)
        assert launcher.kernels.sm == 89
        again = source.launcher(op, attrs=_attrs(one_layer, op), products="fp8", digest=use.kernel_digest)
        assert again is launcher, "the kernels of an operator are loaded once, not once per layer"
    assert driver.loaded == sum(manifest.audit.kernels.values())
    about = json.loads(CliRunner().invoke(inspect_command, [str(engine), "--json"]).output)
    assert about["audit"]["kernels"] == manifest.audit.kernels and about["digest"] == manifest.digest
    page = CliRunner().invoke(inspect_command, [str(engine)], env={"COLUMNS": "200"}).output
    assert "matrix products of one token" in page and "9 BlockFp8Linear" in page and "fp8" in page
    with pytest.raises(EngineError, match="no kernels for sm120"):
        KernelFolder(engine, 120, driver).launcher(
            "MoeRoute", attrs={}, products="", digest=manifest.plugins["MoeRoute"].kernel_digest
        )
    _every_flip_is_noticed(engine, manifest)
    with pytest.raises(EngineError, match=r"\.cubin: (missing|not what was compiled)"):
        (engine / "kernels" / "sm89" / cubins[0]).write_bytes(b"flipped")
        for op, use in manifest.plugins.items():
            OpLauncher.open(Descriptors(engine, 89).find(op, use.kernel_digest), _attrs(one_layer, op), driver)
    with pytest.raises(EngineError, match=rf"{cubins[0]}: 7 bytes, the manifest says"):
        verify_files(engine, manifest, full=False)


def _every_flip_is_noticed(engine: Path, manifest: Manifest) -> None:
    """In every file of the folder but what the compiler said, which nothing reads."""
    files = sorted(path for path in engine.rglob("*") if path.is_file() and path.name != gpu_engine.LOG)
    names = {str(path.relative_to(engine)) for path in files}
    assert names == {file.path for file in manifest.files} | {MANIFEST}, "a file that nobody verifies"
    assert {".plan", ".cubin", ".json", ".yaml"} <= {path.suffix for path in files}
    chance = random.Random(0)
    Engine.open(engine, part=True)
    for path in files:
        good = path.read_bytes()
        for _ in range(4 if good else 0):
            bad, bit = bytearray(good), chance.randrange(8 * len(good))
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            with pytest.raises(EngineError, match=re.escape(path.name)):
                Engine.open(engine, part=True)
        path.write_bytes(good)
    Engine.open(engine, part=True)


def test_without_the_compiler_of_kernels_a_build_says_so_before_it_works(
    one_layer: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(EnvironmentFault, match=r"triton is not installed.*--no-kernels"):
        build(one_layer, load_target("rtx4090"), tmp_path / "engine", gpu_options())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("most", "files"),
    [
        (None, ["model.0.plan", "model.1.plan", "model.1.plan", "model.3.plan"]),
        (3, ["model.0-1.plan", "model.2-3.plan"]),
    ],
    ids=["layers that are alike share one", "as even as can be"],
)
def test_a_model_in_several_plans(inputs: Inputs, tmp_path: Path, most: int | None, files: list[str]) -> None:
    manifest = build(
        inputs, load_target("rtx4090"), tmp_path / "engine", gpu_options(kernels=False, layers_per_engine=most)
    )
    stages = manifest.stages["model"]
    assert [stage.file for stage in stages] == files
    assert manifest.graphs["model"].file == files[0] and "mtp" not in manifest.stages
    whole = inputs.program.graphs["model"]
    assert [spec.name for spec in manifest.graphs["model"].inputs] == [spec.name for spec in whole.inputs]
    assert [spec.name for spec in manifest.graphs["model"].outputs] == [spec.name for spec in whole.outputs]
    assert manifest.graphs["model"].aliases == whole.aliases
    for before, after in itertools.pairwise(stages):
        gives = {spec.name for spec in before.outputs if spec.role == "intermediate"}
        takes = {spec.name for spec in after.inputs if spec.role == "intermediate"}
        assert len(gives) == 1 and {name.replace("_out", "") for name in gives} == takes
        assert takes.isdisjoint(spec.name.replace("_out", "") for spec in after.outputs), "not where it reads"
    for number, stage in enumerate(stages):
        own = [spec for spec in stage.inputs if spec.role in ("weight", "cache")]
        layers = {int(part) for spec in own for part in spec.name.split(".") if part.isdigit()}
        assert layers == ({number} if most is None else {2 * number, 2 * number + 1})
        assert stage.aliases.items() <= whole.aliases.items() and len(stage.aliases) == 2 * len(layers)
    assert manifest.audit is not None
    assert manifest.audit.plugins == inputs.ops
    plans = {Path(file).stem for file in files} | {"mtp"}
    assert manifest.audit.plan_bytes.keys() == plans == manifest.profiles["decode"].keys()
    listed = [file.path for file in manifest.files if file.path.endswith(".plan")]
    assert sorted(listed) == sorted({*files, "mtp.plan"})
    page = CliRunner().invoke(inspect_command, [str(tmp_path / "engine")], env={"COLUMNS": "300"}).output
    said = "model.0.plan, model.1.plan 2 times, model.3.plan" if most is None else ", ".join(files)
    assert f"a step runs {len(files)} stages by {len(set(files))} plans" in page and said in page
    assert (" MB 2 times, model.3 " in page) == (most is None)
    verify_files(tmp_path / "engine", manifest, full=True)


def test_the_audit_is_the_same_however_the_model_is_cut(inputs: Inputs, tmp_path: Path) -> None:
    """But for the memory of what each layer of a plan chooses."""
    found = []
    for most in (1, 4):
        options = gpu_options(kernels=False, layers_per_engine=most)
        audit = build(inputs, load_target("rtx4090"), tmp_path / str(most), options).audit
        assert audit is not None
        found.append(audit)
    cut, whole = found
    assert cut.products == whole.products and cut.plugins == whole.plugins
    assert cut.weight_input_bytes == whole.weight_input_bytes
    limits = load_target("rtx4090").limits  # of the one profile, whose corner is counted
    more = 3 * limits.max_batch_size * limits.max_num_batched_tokens * selection_bytes(inputs.config)
    expected = {key: more if key in ("activations", "total") else 0 for key in cut.device_bytes}
    assert {key: whole.device_bytes[key] - size for key, size in cut.device_bytes.items()} == expected


def test_one_plan_for_ampere_carries_fp8_as_bytes(one_layer: Inputs, tmp_path: Path) -> None:
    target = load_target("rtx4090", ["sm=80", "also=[86, 89]"])
    manifest = build(one_layer, target, tmp_path / "engine")
    assert manifest.target.sms == (80, 86, 89)
    assert manifest.audit is not None
    assert manifest.audit.got == "FP8 weights, BF16 products"
    assert {use.products for use in manifest.plugins.values()} == {"bf16"}
    assert "f8e4m3" not in {spec.dtype for spec in manifest.graphs["model"].inputs}


def test_functions_are_inlined_where_plugins_are_not_wanted(inputs: Inputs, tmp_path: Path) -> None:
    """The whole model: what compiles as one layer need not compile as four."""
    target = load_target("rtx5090", ["precision=bf16", "kv_format=bf16"])
    manifest = build(inputs, target, tmp_path / "engine", gpu_options(plugins="none"))
    assert manifest.audit is not None
    assert not any("PLUGIN_V3" in layers for layers in manifest.audit.layers.values())
    assert manifest.capturable and all(manifest.capturable.values()), "loops over experts are captured too"
    assert manifest.audit.inlined == {op: use.num_nodes for op, use in inputs.program.ops.items()}
    assert manifest.plugins == {}
    inlined = {one.what: one.precision for one in manifest.audit.products if one.form == "inlined"}
    assert inlined == {
        "BlockFp8Linear": "bf16",
        "MoeExperts": "bf16",
        "DsaAttention": "f32",
        "DsaIndexer": "f32",
    }
    assert {kind for plan in manifest.audit.native_products.values() for kind in plan} == {"BF16", "FLOAT"}


def test_finished_plans_of_an_interrupted_build_are_used(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    finished = threading.Event()

    def fake(*, plan: Path, plugins: dict[str, int], log: Path, **rest: object) -> compiler.Compiled:
        calls.append(plan.name)
        log.write_text(f"about {plan.name}\n")
        if plan.name == "mtp.plan" and calls.count(plan.name) == 1:
            finished.wait(30)
            raise EngineError(f"the power went out (log: {log})")
        plan.write_bytes(b"plan of " + plan.name.encode())
        return compiler.Compiled({}, {}, dict(plugins), plan.stat().st_size, 0.0, 0.0, 0.0, 0, "1.7.1", True)

    keep = Parts.keep
    monkeypatch.setattr(Parts, "keep", lambda *arguments: (keep(*arguments), finished.set()))
    monkeypatch.setattr(gpu_engine, "compile_graph", fake)
    with pytest.raises(EngineError, match=r"power went out \(log: .*/engine\.build\.log\)"):
        build(inputs, load_target("rtx4090"), tmp_path / "engine", ONE_PLAN)
    assert not (tmp_path / "engine").exists()
    assert (tmp_path / "engine.build.log").read_text() == "about model.plan\nabout mtp.plan\n", "in order, one file"
    manifest = build(inputs, load_target("rtx4090"), tmp_path / "engine", ONE_PLAN)
    assert sorted(calls) == ["model.plan", "mtp.plan", "mtp.plan"]
    assert (tmp_path / "engine" / "model.plan").read_bytes() == b"plan of model.plan"
    log = (tmp_path / "engine" / "build.log").read_text()
    assert log == "about model.plan\nabout mtp.plan\n", "also of the plan that was finished before"
    verify_files(tmp_path / "engine", manifest, full=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine"], "nothing is left beside the engine"


def test_a_plan_is_compiled_for_all_the_layers_it_serves(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, tuple[object, object]] = {}

    def fake(*, plan: Path, alike: int, target: str, **rest: object) -> compiler.Compiled:
        told[plan.name] = (alike, target)
        raise EngineError("no")

    monkeypatch.setattr(gpu_engine, "compile_graph", fake)
    monkeypatch.setattr(gpu_engine, "usable_cores", lambda: 9)
    with pytest.raises(EngineError, match=r"^no$"):
        build(inputs, load_target("rtx4090"), tmp_path / "engine")
    expected = {"model.0.plan": 0, "model.1.plan": 1, "model.3.plan": 0, "mtp.plan": 0}
    assert told.items() <= {name: (alike, "rtx4090") for name, alike in expected.items()}.items()


def test_when_a_plan_fails_the_others_are_stopped(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, stopped = threading.Event(), []

    def fake(*, plan: Path, progress: Callable[[float], None], **rest: object) -> compiler.Compiled:
        if plan.name == "mtp.plan":
            failed.set()
            raise EngineError("no")
        failed.wait(30)
        try:
            for _ in range(3000):
                progress(0.5)
                time.sleep(0.01)
        except EngineError as error:
            stopped.append(str(error))
            raise
        raise AssertionError("it was not stopped")

    monkeypatch.setattr(gpu_engine, "compile_graph", fake)
    monkeypatch.setattr(gpu_engine, "usable_cores", lambda: 2)
    with pytest.raises(EngineError, match=r"^no$"):
        build(inputs, load_target("rtx4090"), tmp_path / "engine", ONE_PLAN)
    assert stopped == ["stopped, because another plan failed"]


def test_a_failing_node_is_named_by_its_place(one_layer: Inputs, tmp_path: Path) -> None:
    planned = check(one_layer, load_target("rtx4090"), gpu_options())
    canonical = onnx.load(one_layer.folder / "model.onnx")
    for value in canonical.graph.input:
        if value.name == "layers.1.self_attn.o_proj.weight":
            value.type.tensor_type.shape.dim[1].dim_value = 128
    ready = prepare(canonical, planned.how, one_layer.config, plugins=planned.plugins, products="fp8", digests={})
    with pytest.raises(EngineError, match=r"^layer 1, .*BlockFp8Linear.*weight.*log: .*build\.log"):
        compile_graph(
            flavour="tensorrt-rtx",
            model=ready.model.SerializeToString(),
            plan=tmp_path / "x.plan",
            plugins=ready.plugins,
            sms=[89],
            profiles=[],
            options=CompilerOptions(),
            log=tmp_path / "build.log",
        )
    assert (tmp_path / "build.log").stat().st_size > 0


def test_an_operator_that_was_not_taken_as_plugin_is_an_error(one_layer: Inputs, tmp_path: Path) -> None:
    planned = check(one_layer, load_target("rtx4090"), gpu_options())
    ready = prepare(
        onnx.load(one_layer.folder / "model.onnx"),
        planned.how,
        one_layer.config,
        plugins=planned.plugins,
        products="fp8",
        digests={},
    )
    with pytest.raises(EngineError, match=r"expected .*'MoeRoute': 2"):
        compile_graph(
            flavour="tensorrt-rtx",
            model=ready.model.SerializeToString(),
            plan=tmp_path / "x.plan",
            plugins=ready.plugins | {"MoeRoute": 2},
            sms=[89],
            profiles=[],
            options=CompilerOptions(),
            log=tmp_path / "build.log",
        )


def test_a_crash_of_the_compiler_is_an_error_of_ours(tmp_path: Path) -> None:
    import sys

    script = 'import os, sys; print(\'{"event": "stage", "name": "compile"}\', flush=True); os.abort()'
    with pytest.raises(EngineError, match=r"crashed \(signal 6\) in stage 'compile'"):
        compiler._run([sys.executable, "-c", script], tmp_path / "log", lambda fraction: None)


def test_tensorrt_says_where_to_build(one_layer: Inputs, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"tensorrt is not installed.*on the machine with the GPU"):
        build(one_layer, load_target("h200"), tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


# --- refusals before work -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ((), gpu_options(plugins="none"), "--precision fp8 needs BlockFp8Linear and MoeExperts as plugin"),
        (("precision=bf16",), gpu_options(plugins="none"), "fp8_ds is read and written by plugins only"),
        (("limits.max_model_len=1000000",), gpu_options(), "--max-model-len is 1000000, expected 1 to 163840"),
        (("limits.max_model_len=0",), gpu_options(), "--max-model-len is 0, expected 1 to 163840"),
        (("limits.max_batch_size=4096",), gpu_options(), "pass --max-num-batched-tokens 4096 too"),
        (("gpu.memory_gib=2.05",), gpu_options(), r"needs 2\.\d GiB.*pass --max-model-len \d+ at most"),
        (("gpu.memory_gib=1",), gpu_options(), "of it .* of weights; not one layer fits"),
    ],
)
def test_refusals(inputs: Inputs, settings: tuple[str, ...], options: BuildOptions, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        check(inputs, load_target("rtx4090", settings), replace(options, settings=settings))


def test_the_number_that_would_work_works(inputs: Inputs) -> None:
    small = ["gpu.memory_gib=2.05"]
    with pytest.raises(TargetError) as caught:
        check(inputs, load_target("rtx4090", small), gpu_options())
    fits = str(caught.value).partition("--max-model-len ")[2].partition(" ")[0]
    planned = check(inputs, load_target("rtx4090", [*small, f"limits.max_model_len={fits}"]), gpu_options())
    assert not planned.oversize


def test_layers_that_fit_count_what_the_ends_hold_beside_them(inputs: Inputs) -> None:
    """The first stage embeds tokens, the last one has the head and the MTP module: a mean says too much of both."""
    sizes: dict[str, int] = {}
    for graph, graph_io in inputs.program.graphs.items():
        for spec in (*graph_io.with_role("weight"), *graph_io.with_role("table")):
            dtype = "f32" if spec.name in inputs.wide(SPECS)[graph] else spec.dtype
            sizes[spec.name] = itemsize(dtype) * math.prod(map(int, spec.shape))
    tables = tuple(spec.name for spec in inputs.program.graphs["model"].with_role("table"))
    behind = tuple(name for name in sizes if not name.startswith(("layers.0.", "layers.1.", "layers.2.", *tables)))
    cache = 1000  # of one layer

    def held(first: int, stop: int) -> int:
        """Bytes of the stage [first, stop)."""
        names = tuple(f"layers.{layer}." for layer in range(first, stop)) + tables
        names += behind if stop == 4 else ("embed_tokens.",) if first == 0 else ()
        return sum(size for name, size in sizes.items() if name.startswith(names)) + cache * (
            stop - first + (stop == 4)
        )

    stages = {
        (first, stop): held(first, stop) for first in range(4) for stop in range(first + 1, 5) if stop - first < 4
    }
    assert len(set(stages.values())) > 4, "stages differ"
    for budget in (size - fewer for size in stages.values() for fewer in (0, 1)):
        expected = max((stop - first for (first, stop), size in stages.items() if size <= budget), default=0)
        assert layers_that_fit(inputs, budget, 5 * cache) == expected
    small = ["limits.max_model_len=64"]
    device = expected_bytes(inputs, load_target("rtx4090", small), load_target("rtx4090", small).limits, 1)
    there = device["total"] - device["weights"] - device["cache"] + device["cache"] + stages[1, 3]
    with pytest.raises(TargetError, match="; at most 2 of its 4 layers fit: export stages with --layers"):
        check(inputs, load_target("rtx4090", [*small, f"gpu.memory_gib={there / 0.98 / 2**30}"]), gpu_options())


def test_oversize_is_built_only_when_asked(inputs: Inputs) -> None:
    planned = check(inputs, load_target("rtx4090", ["gpu.memory_gib=1"]), gpu_options(allow_oversize=True))
    assert planned.oversize


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "--precision fp8 multiplies quantized activations.*export with --numerics fp8"),
        (("precision=bf16",), "--kv-cache-dtype fp8_ds stores FP8.*export with --numerics fp8"),
    ],
)
def test_the_program_must_carry_what_is_asked(
    tiny_programs: dict[str, Path], settings: tuple[str, ...], message: str
) -> None:
    exact = open_inputs(tiny_programs["exact"], None)
    with pytest.raises(TargetError, match=message):
        check(exact, load_target("rtx4090", settings), gpu_options())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_n_heads": 48}, "DsaIndexer: index_n_heads is 48, kernels take 16, 32 or 64"),
        (
            {"num_experts_per_tok": 22, "n_routed_experts": 64},
            "MoeRoute: num_experts_per_tok is 22, kernels take 1 to 16",
        ),
        ({"n_routed_experts": 2048}, "MoeRoute: n_routed_experts is 2048, kernels take a power of two from 16 to 1024"),
        ({"kv_lora_rank": 384}, "DsaCacheWrite: kv_lora_rank is 384, kernels take 128, 256, 512 or 1024"),
    ],
)
def test_an_operator_refuses_sizes_it_cannot_do(inputs: Inputs, change: dict[str, int], message: str) -> None:
    bent = replace(inputs, config=inputs.config.model_copy(update=change))
    with pytest.raises(TargetError, match=message):
        check(bent, load_target("rtx4090"), gpu_options(plugins="all"))


def test_auto_inlines_what_has_no_plugin(inputs: Inputs) -> None:
    config = inputs.config.model_copy(update={"n_routed_experts": 160, "n_group": 8})
    bent = replace(inputs, config=config)
    planned = check(bent, load_target("rtx4090"), gpu_options())
    assert planned.inlined == ("MoeRoute",)


def test_a_checkpoint_of_another_model_is_refused(inputs: Inputs, tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"index_topk": 8}))
    with pytest.raises(ProgramError, match="index_topk is 8, the program was exported for"):
        open_inputs(inputs.folder, other)


def test_less_than_was_asked_fails() -> None:
    found = [
        Share(what="BlockFp8Linear", form="inlined", precision="bf16", share=0.6),
        Share(what="MoeExperts", form="plugin", precision="fp8", share=0.4),
    ]
    with pytest.raises(EngineError, match=r"BlockFp8Linear \(inlined\) multiply in bf16: 60%"):
        audit.require_precision(found, "--precision fp8", "fp8")
    audit.require_precision(found, "--precision bf16", "bf16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "cpu"], "pass --checkpoint"),
        (["--target", "cpu", "--precision", "fp8"], "precision fp8 is for GPUs; a CPU knows f32, int8, int4"),
        (["--target", "cpu", "--sm", "89"], "--sm is for GPU targets"),
        (["--target", "rtx4090", "--timing-cache", "x"], "--timing-cache is for tensorrt"),
        (["--target", "rtx4090", "--sm", "90"], "sm 90 is not one that tensorrt-rtx compiles for"),
        (["--target", "rtx4090", "--taps", "--layers-per-engine", "2"], "leave out --layers-per-engine"),
    ],
)
def test_options_that_a_target_does_not_know(
    tiny_programs: dict[str, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(build_command, [str(tiny_programs["fp8"]), str(tmp_path / "x"), *arguments])
    assert isinstance(result.exception, SeekforgeError)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_is_a_number_of_bytes(tiny_programs: dict[str, Path], tmp_path: Path) -> None:
    arguments = [str(tiny_programs["fp8"]), str(tmp_path / "x"), "--target", "rtx4090", "--workspace", "big"]
    result = CliRunner().invoke(build_command, arguments)
    assert result.exit_code == 2
    assert "'--workspace': 'big' is no number of bytes, such as 512M or 2G" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_it_would_build_and_builds_nothing(tiny_programs: dict[str, Path], tmp_path: Path) -> None:
    arguments = [str(tiny_programs["fp8"]), str(tmp_path / "x"), "--target", "rtx5090", "--dry-run", "--json"]
    result = CliRunner().invoke(build_command, arguments)
    said = json.loads(result.stdout)
    assert said["plugins"].keys() == {*load_program(tiny_programs["fp8"]).ops, "Bf16Linear"}
    assert said["sms"] == [120]
    assert list(tmp_path.iterdir()) == []


# --- pure parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "layers.3.self_attn.o_proj/BlockFp8Linear",
            "layer 3, the output projection of the attention (operator BlockFp8Linear)",
        ),
        ("layers.12/Mul_4", "layer 12 (operator Mul)"),
        ("lm_head/MatMul", "the head (operator MatMul)"),
        ("(Unnamed Layer* 8) [Constant]", None),
    ],
)
def test_places(name: str, expected: str | None) -> None:
    assert place(name) == expected


def test_the_first_place_and_the_first_message_are_told() -> None:
    said = explain(["Internal  error", "in node layers.7.mlp.gate/MoeRoute_3: bad"])
    assert said == "layer 7, the router (operator MoeRoute): Internal error"
    assert explain(["no place here"]) == "no place here"


@pytest.mark.parametrize(("alike", "expected"), [(1, "layer 7 (and 1 layer like it), the router"), (56, "56 layers")])
def test_of_layers_that_are_alike_all_are_told(alike: int, expected: str) -> None:
    assert expected in explain(["in node layers.7.mlp.gate/MoeRoute: bad"], alike)


def test_progress_never_falls() -> None:
    phases = Phases()
    events = [
        ("phase", "all", 2), ("phase", "part", 4), ("step", "part", 1), ("finish", "part", 0), ("step", "all", 0),
        ("phase", "part", 4), ("step", "part", 3), ("finish", "part", 0), ("step", "all", 1), ("finish", "all", 0),
    ]  # fmt: skip
    seen = [phases.update({"event": e, "name": n, "steps": k, "step": k}) for e, n, k in events]
    assert seen == sorted(seen)
    assert seen[2] == pytest.approx(0.25)
    assert seen[-1] == 1.0


def test_profiles_keep_the_limits(inputs: Inputs) -> None:
    target = load_target("rtx4090", ["limits.max_batch_size=3", "limits.max_model_len=100"])
    graph_io = inputs.program.graphs["model"]
    blocks = pool_blocks(graph_io, target.limits, 10 << 30, 64 * 2560)
    assert blocks == 3 * 2 + 1, "full sequences need no more"
    decode = axis_bounds(target.profiles["decode"], target.limits, pool_blocks=blocks)
    assert decode["B"] == (1, 3, 3)
    assert decode["Q"] == (1, 1, 6)
    assert decode["MB"] == (1, 2, 2)
    assert decode["NS"] == (64, 7 * 64, 7 * 64)
    prefill = axis_bounds(target.profiles["prefill"], target.limits, pool_blocks=blocks)
    assert prefill["Q"][2] == 100
    for bounds in (*decode.values(), *prefill.values()):
        assert list(bounds) == sorted(bounds)


def test_a_pool_is_no_larger_than_a_tensor_can_count(inputs: Inputs) -> None:
    target = load_target("rtx4090", ["limits.max_batch_size=2048", "limits.max_num_batched_tokens=2048"])
    graph_io = inputs.program.graphs["model"]
    blocks = pool_blocks(graph_io, target.limits, 1 << 50, 1)
    widest = max(int(spec.shape[1]) for spec in graph_io.with_role("cache"))
    assert blocks * 64 * widest < 2**31


@pytest.fixture(scope="module")
def planned(inputs: Inputs) -> GpuBuild:
    return check(inputs, load_target("rtx4090"), gpu_options())


def test_the_audit_counts_what_the_sizes_say(inputs: Inputs, planned: GpuBuild) -> None:
    """The FLOPs of the graph's products are those of the formulas, over main model and MTP module."""
    from seekforge.exporter.sizing.flops import attention_flops, linear_flops
    from seekforge.exporter.sizing.matrices import layer_matrices

    config: ModelConfig = inputs.config
    total = 0.0
    for name in inputs.program.graphs:
        ready = prepare(
            onnx.load(inputs.folder / f"{name}.onnx"),
            planned.how,
            config,
            plugins=planned.plugins,
            products="fp8",
            digests={},
            weights=planned.wide[name],
            bf16_linears=planned.bf16_linears[name],
        )
        weights = [spec.name for spec in inputs.program.graphs[name].with_role("weight")]
        found = audit.products(
            ready.operators, config, weights=weights, plugins=planned.plugins, precision="fp8", context=4096
        )
        total += sum(one.flops for one in found)
        head = next(one for one in found if one.what == "lm_head")
        assert (head.form, head.precision) == ("plugin", "bf16")
    expected = linear_flops(config).total + attention_flops(config, 4096).total
    assert config.mtp_layer is not None
    expected += linear_flops(config, layer_matrices(config, config.mtp_layer)).total
    expected += attention_flops(config, 4096, layers=[0]).total + 2.0 * config.vocab_size * config.hidden_size
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("plugins", ["all", "none"])
def test_no_plan_converts_a_weight_in_every_step(inputs: Inputs, plugins: Literal["all", "none"]) -> None:
    """What is only multiplied keeps its two bytes where a plugin multiplies it; all else that is read as f32 is f32,
    and what converts it is the recipe. Memory is counted like that."""
    target = load_target("rtx4090", ["precision=bf16", "kv_format=bf16"])
    planned = check(inputs, target, gpu_options(plugins=plugins))
    for name, graph in inputs.graphs.items():
        wide, linears = planned.wide[name], planned.bf16_linears.get(name, set())
        ready = prepare(
            graph,
            planned.how,
            inputs.config,
            plugins=planned.plugins,
            products="bf16",
            digests={},
            weights=wide,
            bf16_linears=linears,
        )
        types = {value.name: value.type.tensor_type.elem_type for value in ready.model.graph.input}
        converted = {node.input[0] for node in ready.model.graph.node if node.op_type == "Cast"} & types.keys()
        assert not [one for one in converted & inputs.bindings[name].keys() if types[one] == onnx.TensorProto.BFLOAT16]
        assert {one for one in wide if types[one] == onnx.TensorProto.FLOAT} == wide
        multiplied = {"lm_head.weight"} | {
            one for one in types if one.endswith(("mlp.gate.weight", "weights_proj.weight"))
        }
        assert wide & multiplied == (set() if plugins == "all" else multiplied) and "norm.weight" in wide
        assert linears == (multiplied if plugins == "all" else set())
        narrow = {node.input[1]: node.name for node in ready.model.graph.node if node.op_type == "Bf16Linear"}
        assert narrow.keys() == linears and ready.plugins.get("Bf16Linear", 0) == len(linears)
        assert all(types[one] == onnx.TensorProto.BFLOAT16 and place(narrow[one]) for one in linears)
        assert types["embed_tokens.weight"] == onnx.TensorProto.BFLOAT16
    recipes = gpu_manifest.engine_bindings(inputs, planned.how, planned.wide)
    dtype = "bf16" if plugins == "all" else "f32"
    assert {recipes[name]["lm_head.weight"].dtype for name in inputs.graphs} == {dtype}
    whole = check(inputs, target, gpu_options()).device_bytes["weights"]
    more = sum(
        2 * math.prod(map(int, inputs.program.graphs[graph].named(one).shape))
        for graph, names in inputs.bf16_linears.items()
        for one in names - (set() if graph == "model" else {"lm_head.weight"})
    )
    assert planned.device_bytes["weights"] == whole + (0 if plugins == "all" else more)


def test_a_weight_that_something_else_reads_too_keeps_its_type() -> None:
    graph = onnx.parser.parse_model(
        """<ir_version: 11, opset_import: ["" : 23]>
        g (bfloat16[2] x, bfloat16[2] a, bfloat16[2] b, bfloat16[2] c)
            => (float[2] y, bfloat16[2] z, float[2] u, float[2] v) {
          af = Cast<to = 1>(a)
          bf = Cast<to = 1>(b)
          y = Mul(af, bf)
          z = Add(x, b)
          u = Cast<to = 1>(x)
          v = Cast<to = 1>(c)
        }"""
    )
    graph.graph.node[0].name, graph.graph.node[2].name = "layers.3.mlp.gate/Cast", "layers.3/Mul"
    assert widen_weights(graph, ["a", "b", "c"]) == {"a"}
    assert [node.op_type for node in graph.graph.node] == ["Cast", "Mul", "Add", "Cast", "Cast"]
    product = graph.graph.node[1]
    assert (list(product.input), product.name) == (["a", "bf"], "layers.3.mlp.gate/Mul"), "messages still find it"
    onnx.checker.check_model(graph, full_check=True)


def test_expected_weights_are_those_of_the_planner(inputs: Inputs, planned: GpuBuild) -> None:
    from seekforge.exporter.sizing.matrices import weight_bytes

    tables = {
        spec.name: itemsize(spec.dtype) * math.prod(map(int, spec.shape))
        for graph_io in inputs.program.graphs.values()
        for spec in graph_io.with_role("table")
    }
    expected = weight_bytes(inputs.config, mtp=True) + sum(tables.values())
    assert planned.device_bytes["weights"] == expected


def test_profiles_span_whatever_limits_are_asked() -> None:
    """A larger limit than a target's profiles would be a step that no profile takes."""
    target = load_target("rtx4090")
    asked = target.limits.model_copy(update={"max_batch_size": 48, "max_num_batched_tokens": 8192})
    found = spanning(target.profiles, asked)
    assert (found["decode"].max_batch_size, found["decode"].max_query_len) == (48, 6)
    assert (found["prefill"].max_batch_size, found["prefill"].max_query_len) == (1, 8192)
    assert axis_bounds(found["decode"], asked, pool_blocks=99)["B"][2] == 48
    assert axis_bounds(found["prefill"], asked, pool_blocks=99)["Q"][2] == 8192
    assert spanning(target.profiles, target.limits) == target.profiles
    short = asked.model_copy(update={"max_model_len": 512})
    assert axis_bounds(spanning(target.profiles, short)["prefill"], short, pool_blocks=99)["Q"][2] == 512


@pytest.mark.parametrize(
    ("limits", "prefill", "short_prefill"),
    [
        ({}, (4, 2048), (4, 512)),
        ({"max_num_batched_tokens": 512}, (4, 512), (4, 128)),
        ({"max_num_batched_tokens": 8192}, (4, 8192), (4, 512)),
        ({"max_model_len": 100}, (4, 100), (4, 100)),
        ({"max_batch_size": 2, "max_num_batched_tokens": 3}, (2, 3), (2, 1)),
    ],
)
def test_no_prefill_profile_is_larger_than_a_step(
    limits: dict[str, int], prefill: tuple[int, int], short_prefill: tuple[int, int]
) -> None:
    """A plan reserves memory for the corner of each profile, so of a profile that a user wrote too wide is cut."""
    target = load_target("rtx4090", ["profiles.prefill.max_batch_size=4"])
    asked = target.limits.model_copy(update=limits)
    found = spanning(target.profiles, asked)
    most = asked.max_num_batched_tokens
    fewer = (max(1, min(prefill[0], most // prefill[1])), prefill[1])
    assert largest_step(found["prefill"], asked) == fewer
    assert largest_step(found["short_prefill"], asked) == short_prefill
    assert largest_step(found["decode"], asked)[0] == asked.max_batch_size, "steps are padded to it"
    for name in ("prefill", "short_prefill"):
        assert math.prod(largest_step(found[name], asked)) <= most


@pytest.mark.parametrize(
    "limits", [{}, {"max_batch_size": 2048, "max_num_batched_tokens": 2048}, {"max_model_len": 128}]
)
@pytest.mark.parametrize("name", [target.name for target in all_targets() if target.gpu])
def test_expected_memory_covers_the_largest_step_of_each_profile(
    inputs: Inputs, name: str, limits: dict[str, int]
) -> None:
    target = load_target(name, [f"limits.{key}={value}" for key, value in limits.items()])
    found = expected_bytes(inputs, target, target.limits, 1)
    bounds = [
        axis_bounds(one, target.limits, pool_blocks=99) for one in spanning(target.profiles, target.limits).values()
    ]
    corners = [(one["B"][2], one["Q"][2]) for one in bounds]
    if not limits:
        assert max(b * q for b, q in corners) == target.limits.max_num_batched_tokens, "and no more than a step has"
    for batch, queries in corners:
        one = Workload(target.limits.max_model_len, batch, 1, queries - 1)
        assert found["scratch"] >= scratch_bytes(inputs.config, Parallelism(), one, target.kv_format)
        logits = batch * (queries - 1) * inputs.config.vocab_size * 4 * 2  # a step that samples needs one row of each
        assert found["activations"] >= activation_bytes(inputs.config, Parallelism(), one) - logits


@pytest.mark.parametrize("name", [target.name for target in all_targets() if target.gpu])
def test_a_target_takes_short_prompts_together_and_the_longest_alone(name: str) -> None:
    target = load_target(name)
    assert spanning(target.profiles, target.limits) == target.profiles, "nothing is cut"
    corners = {key: largest_step(profile, target.limits) for key, profile in target.profiles.items()}
    assert corners["prefill"] == (1, target.limits.max_num_batched_tokens)
    assert corners["short_prefill"] == (4, target.limits.max_num_batched_tokens // 4)


def test_memory_of_a_compiler_is_its_own() -> None:
    """Not that of the large process which starts it."""
    held = b"x" * 300_000_000
    code = "from seekforge.common.system import peak_bytes; print(peak_bytes())"
    found = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 0 < found < len(held)
