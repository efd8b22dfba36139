"""GPU engines of the tiny model, built by TensorRT-RTX without a GPU, and what is refused before any work."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from tests.support.build_options import gpu_options
from tests.support.made_once import made_once

from seekforge.common.cli.console import Stages
from seekforge.common.errors import EngineError, EnvironmentFault
from seekforge.exporter.builder.options import BuildOptions, CompilerOptions
from seekforge.exporter.builder.tensorrt import build as gpu_engine
from seekforge.exporter.builder.tensorrt import compiler
from seekforge.exporter.builder.tensorrt.build import build_gpu
from seekforge.exporter.builder.tensorrt.check import Inputs, check, open_inputs
from seekforge.exporter.builder.tensorrt.compiler import Phases, compile_graph
from seekforge.exporter.builder.tensorrt.graph import prepare
from seekforge.exporter.builder.tensorrt.resume import Parts
from seekforge.exporter.inspect.cli import inspect as inspect_command
from seekforge.exporter.sizing.memory import selection_bytes
from seekforge.formats.engine.manifest import MANIFEST, Audit, Manifest, load_manifest
from seekforge.formats.engine.verify import verify_files
from seekforge.formats.program import load_bindings
from seekforge.formats.targets import TargetConfig, load_target
from seekforge.plugins.kernels.index import Descriptors
from seekforge.plugins.kernels.kernel_set import Image
from seekforge.plugins.kernels.launch_plan import op_kernels
from seekforge.plugins.kernels.launcher import KernelFolder, OpLauncher
from seekforge.plugins.registry import ADD_RMS_NORM_QUANTIZE, FP8_OPS, SPECS
from seekforge.runtime.compatibility import check_complete, check_loadable
from seekforge.runtime.engine.engine_folder import Engine

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

QUIET = Stages(quiet=True)


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


@pytest.fixture(scope="module", params=["rtx4090", "rtx5090"])
def engine(request: pytest.FixtureRequest, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the whole model without kernels, made once per run; do not write into it."""
    return whole_engine(request.param, inputs, tmp_path_factory)


def whole_engine(name: str, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = made_once(tmp_path_factory, f"engine-{name}", lambda root: build(inputs, load_target(name), root / "engine"))
    return made / "engine"


@pytest.fixture
def manifest(engine: Path) -> Manifest:
    return load_manifest(engine)


def num_nodes(inputs: Inputs) -> dict[str, int]:
    """Return op_type -> nodes of an engine whose operators are all plugins."""
    return check(inputs, load_target("rtx4090"), gpu_options(kernels=False)).num_nodes


def audit_of(manifest: Manifest) -> Audit:
    assert manifest.audit is not None
    return manifest.audit


def test_every_operator_becomes_a_plugin(inputs: Inputs, manifest: Manifest) -> None:
    audited = audit_of(manifest)
    assert audited.plugins == num_nodes(inputs)
    assert audited.inlined == {}
    for graph, layers in audited.layers.items():
        assert layers["PLUGIN_V3"] > 0, graph
        assert "LOOP_OUTPUT" not in layers and "CONDITION" not in layers, "a body was inlined"


def test_layers_that_are_alike_run_one_plan_several_times(inputs: Inputs, manifest: Manifest) -> None:
    runs = manifest.uses()
    assert runs == {"model.0.plan": 1, "model.1.plan": 2, "model.3.plan": 1, "mtp.plan": 1}
    layers = audit_of(manifest).layers
    plugin_layers = (runs[f"{plan}.plan"] * of_plan["PLUGIN_V3"] for plan, of_plan in layers.items())
    assert sum(plugin_layers) == sum(num_nodes(inputs).values())


def test_plans_of_plugins_are_capturable(manifest: Manifest) -> None:
    assert manifest.capturable == dict.fromkeys(["model.0", "model.1", "model.3", "mtp"], True)


def test_plugins_multiply_in_fp8(manifest: Manifest) -> None:
    products = audit_of(manifest).products
    assert {one.precision for one in products if one.what in FP8_OPS} == {"fp8"}
    assert sum(one.share for one in products) == pytest.approx(1.0, abs=1e-4)


def test_the_scratch_of_an_engine_is_that_of_its_largest_plan(manifest: Manifest) -> None:
    audited = audit_of(manifest)
    assert max(audited.workspaces.values()) == audited.device_bytes["scratch"]


def test_a_build_writes_what_its_manifest_lists_and_nothing_beside_it(engine: Path, manifest: Manifest) -> None:
    verify_files(engine, manifest, full=True)
    assert [path.name for path in engine.parent.iterdir()] == [engine.name]


def test_an_engine_without_kernels_is_not_loaded(engine: Path, manifest: Manifest) -> None:
    sm = manifest.target.sm
    assert sm is not None
    with pytest.raises(EngineError, match="built with --no-kernels"):
        check_loadable(engine, manifest, sm=sm, versions=manifest.runtime_versions)


def test_recipes_give_the_types_that_an_engine_takes(engine: Path, manifest: Manifest) -> None:
    recipes = load_bindings(engine)
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

    def prepare(self, *arguments: object) -> None:
        raise AssertionError("nothing is launched")

    def launch(self, *arguments: object) -> None:
        raise AssertionError("nothing is launched")


def _attrs(inputs: Inputs, op: str) -> dict[str, object]:
    """Attributes of an operator as the engine's nodes have them."""
    if op == ADD_RMS_NORM_QUANTIZE:  # a build puts it in, as precise as the program's norms
        return {"epsilon": float(np.float32(inputs.config.rms_norm_eps))}
    found = {attr.name: inputs.program.ops[op].attributes[attr.name] for attr in SPECS[op].attrs}
    return found | {name: "fp8_ds" for name in ("kv_format", "index_format") if name in found}


@pytest.fixture(scope="module")
def with_kernels(one_layer: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of one layer with its kernels, made once per run; do not write into it."""
    pytest.importorskip("triton", reason="triton is not installed")

    def make(root: Path) -> None:
        manifest = build(one_layer, load_target("rtx4090"), root / "engine", gpu_options())
        assert load_manifest(root / "engine") == manifest, "what is returned is what is written"

    return made_once(tmp_path_factory, "engine-with-kernels", make) / "engine"


def test_an_engine_has_all_that_its_plugins_need_on_its_gpu(with_kernels: Path) -> None:
    """Built without a GPU for a GPU."""
    manifest = load_manifest(with_kernels)
    check_complete(with_kernels, manifest)
    check_loadable(with_kernels, manifest, sm=89, versions=manifest.runtime_versions)
    verify_files(with_kernels, manifest, full=True)
    assert manifest.min_driver == {"89": 12000}
    made_by = {use.kernel_source for use in manifest.plugins.values()}
    assert made_by == {f"triton {importlib.metadata.version('triton')}"}


def test_every_kernel_of_an_engine_has_a_digest(with_kernels: Path) -> None:
    manifest = load_manifest(with_kernels)
    kernels = audit_of(manifest).kernels
    assert kernels.keys() == manifest.plugins.keys()
    cubins = sorted(path.name for path in with_kernels.rglob("*.cubin"))
    assert len(cubins) == len(set(cubins)) <= sum(kernels.values())
    assert set(cubins) < {Path(file.path).name for file in manifest.files}


def test_the_kernels_of_an_operator_are_loaded_once_and_not_once_per_layer(
    with_kernels: Path, one_layer: Inputs
) -> None:
    manifest, driver = load_manifest(with_kernels), Recorder()
    source = KernelFolder(with_kernels, 89, driver)
    for op, use in manifest.plugins.items():
        first, again = (
            source.launcher(op, attrs=_attrs(one_layer, op), products="fp8", digest=use.kernel_digest) for _ in range(2)
        )
        assert first.kernels.sm == 89 and again is first
    assert driver.loaded == sum(audit_of(manifest).kernels.values())


def test_an_engine_has_no_kernels_for_another_gpu(with_kernels: Path) -> None:
    digest = load_manifest(with_kernels).plugins["MoeRoute"].kernel_digest
    with pytest.raises(EngineError, match="no kernels for sm120"):
        KernelFolder(with_kernels, 120, Recorder()).launcher("MoeRoute", attrs={}, products="", digest=digest)


def test_inspect_tells_what_an_engine_multiplies_with(with_kernels: Path) -> None:
    manifest = load_manifest(with_kernels)
    about = json.loads(CliRunner().invoke(inspect_command, [str(with_kernels), "--json"]).output)
    assert about["audit"]["kernels"] == audit_of(manifest).kernels and about["digest"] == manifest.digest
    page = CliRunner().invoke(inspect_command, [str(with_kernels)], env={"COLUMNS": "200"}).output
    variants = op_kernels("BlockFp8Linear").variants({"act_quant": "ue8m0"}, 89)
    assert "matrix products of one token" in page and f"{len(variants)} BlockFp8Linear" in page and "fp8" in page


def test_every_flipped_bit_of_an_engine_is_noticed(with_kernels: Path, tmp_path: Path) -> None:
    """In every file of the folder but what the compiler said, which nothing reads."""
    engine = shutil.copytree(with_kernels, tmp_path / "engine")
    manifest = load_manifest(engine)
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


def test_a_kernel_that_was_replaced_is_noticed(with_kernels: Path, one_layer: Inputs, tmp_path: Path) -> None:
    engine = shutil.copytree(with_kernels, tmp_path / "engine")
    manifest = load_manifest(engine)
    cubin = min(engine.rglob("*.cubin"))
    cubin.write_bytes(b"flipped")
    with pytest.raises(EngineError, match=r"\.cubin: (missing|not what was compiled)"):
        for op, use in manifest.plugins.items():
            OpLauncher.open(Descriptors(engine, 89).find(op, use.kernel_digest), _attrs(one_layer, op), Recorder())
    with pytest.raises(EngineError, match=rf"{cubin.name}: 7 bytes, the manifest says"):
        verify_files(engine, manifest, full=False)


def test_without_the_compiler_of_kernels_a_build_says_so_before_it_works(
    one_layer: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(EnvironmentFault, match=r"triton is not installed.*--no-kernels"):
        build(one_layer, load_target("rtx4090"), tmp_path / "engine", gpu_options())
    assert not list(tmp_path.iterdir())


@pytest.fixture(
    scope="module",
    params=[
        (None, ["model.0.plan", "model.1.plan", "model.1.plan", "model.3.plan"]),
        (3, ["model.0-1.plan", "model.2-3.plan"]),
    ],
    ids=["layers that are alike share one", "as even as can be"],
)
def cut(
    request: pytest.FixtureRequest, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """An engine of the whole model in several plans, and the plan of each stage; do not write into it."""
    most, files = request.param
    if most is None:
        return whole_engine("rtx4090", inputs, tmp_path_factory), files
    options = gpu_options(kernels=False, layers_per_engine=most)
    made = made_once(
        tmp_path_factory,
        "engine-of-halves",
        lambda root: build(inputs, load_target("rtx4090"), root / "engine", options),
    )
    return made / "engine", files


def test_a_model_in_several_plans_has_the_inputs_and_outputs_of_the_whole(
    inputs: Inputs, cut: tuple[Path, list[str]]
) -> None:
    manifest, whole = load_manifest(cut[0]), inputs.program.graphs["model"]
    graph = manifest.graphs["model"]
    assert graph.file == cut[1][0] and "mtp" not in manifest.stages
    assert [spec.name for spec in graph.inputs] == [spec.name for spec in whole.inputs]
    assert [spec.name for spec in graph.outputs] == [spec.name for spec in whole.outputs]
    assert graph.aliases == whole.aliases


def test_stages_hand_on_what_the_next_one_takes(inputs: Inputs, cut: tuple[Path, list[str]]) -> None:
    stages = load_manifest(cut[0]).stages["model"]
    assert [stage.file for stage in stages] == cut[1]
    for before, after in itertools.pairwise(stages):
        gives = {spec.name for spec in before.outputs if spec.role == "intermediate"}
        takes = {spec.name for spec in after.inputs if spec.role == "intermediate"}
        assert len(gives) == 2 and {name.replace("_out", "") for name in gives} == takes
        assert takes.isdisjoint(spec.name.replace("_out", "") for spec in after.outputs), "not where it reads"


def test_a_stage_has_weights_and_caches_of_its_own_layers(inputs: Inputs, cut: tuple[Path, list[str]]) -> None:
    stages, whole = load_manifest(cut[0]).stages["model"], inputs.program.graphs["model"]
    each = 4 // len(stages)
    for number, stage in enumerate(stages):
        held = [spec for spec in stage.inputs if spec.role in ("weight", "cache")]
        layers = {int(part) for spec in held for part in spec.name.split(".") if part.isdigit()}
        assert layers == set(range(each * number, each * (number + 1)))
        assert stage.aliases.items() <= whole.aliases.items() and len(stage.aliases) == 2 * len(layers)


def test_plans_are_counted_and_listed_once(inputs: Inputs, cut: tuple[Path, list[str]]) -> None:
    manifest, files = load_manifest(cut[0]), cut[1]
    audited = audit_of(manifest)
    assert audited.plugins == num_nodes(inputs)
    plans = {Path(file).stem for file in files} | {"mtp"}
    assert audited.plan_bytes.keys() == plans == manifest.profiles["decode"].keys()
    listed = [file.path for file in manifest.files if file.path.endswith(".plan")]
    assert sorted(listed) == sorted({*files, "mtp.plan"})
    verify_files(cut[0], manifest, full=True)


def test_inspect_tells_how_often_a_plan_runs(cut: tuple[Path, list[str]]) -> None:
    engine, files = cut
    shared = len(set(files)) < len(files)
    page = CliRunner().invoke(inspect_command, [str(engine)], env={"COLUMNS": "300"}).output
    said = "model.0.plan, model.1.plan 2 times, model.3.plan" if shared else ", ".join(files)
    assert f"a step runs {len(files)} stages by {len(set(files))} plans" in page and said in page
    assert (" MB 2 times, model.3 " in page) == shared


def test_the_audit_is_the_same_however_the_model_is_cut(
    inputs: Inputs, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """But for the memory of what each layer of a plan chooses."""
    cut = audit_of(load_manifest(whole_engine("rtx4090", inputs, tmp_path_factory)))  # a layer in each plan
    whole = audit_of(build(inputs, load_target("rtx4090"), tmp_path / "engine", ONE_PLAN))
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


def test_memory_of_a_compiler_is_its_own() -> None:
    """Not that of the large process which starts it."""
    held = b"x" * 300_000_000
    code = "from seekforge.common.system import peak_bytes; print(peak_bytes())"
    found = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 0 < found < len(held)
