"""`build` for TensorRT and TensorRT-RTX: specialize, compile kernels and plans, audit, write a manifest.

An engine holds no weights: they are inputs, and `bindings.json` in the engine says how a runtime makes them from the
checkpoint. So the full model builds on a laptop. What cannot work is refused before (`check`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from seekforge.common.cli.console import Stages
from seekforge.common.cores import usable_cores
from seekforge.common.errors import EngineError
from seekforge.common.files import atomic_folder, sha256_file
from seekforge.exporter.builder.engine_writer import write_engine
from seekforge.exporter.builder.options import BuildOptions
from seekforge.exporter.builder.tensorrt import audit
from seekforge.exporter.builder.tensorrt.check import GpuBuild, Inputs
from seekforge.exporter.builder.tensorrt.compiler import Compiled, compile_graph
from seekforge.exporter.builder.tensorrt.dedupe import Form, form_of
from seekforge.exporter.builder.tensorrt.graph import Prepared, debug_specs, prepare
from seekforge.exporter.builder.tensorrt.kernels import compile_kernels, digests_of, kernel_tasks
from seekforge.exporter.builder.tensorrt.manifest import Made, engine_parts, make_audit
from seekforge.exporter.builder.tensorrt.memory import block_bytes
from seekforge.exporter.builder.tensorrt.profiles import axis_bounds, pool_blocks, shapes, spanning
from seekforge.exporter.builder.tensorrt.resume import Parts
from seekforge.exporter.program.graph_io import graph_io, roles_in
from seekforge.exporter.program.stages import INTERMEDIATE, cut, stage_ranges
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import MANIFEST, Manifest
from seekforge.formats.engine.ranks import Ranks
from seekforge.formats.program import GraphIO, TensorSpec
from seekforge.formats.targets import TargetConfig
from seekforge.formats.weight_digests import write_weight_digests
from seekforge.formats.weight_recipes import tensors_of
from seekforge.plugins.kernels.index import NO_KERNELS
from seekforge.plugins.tensorrt.library import installed_version

LOG = "build.log"


def build_gpu(
    inputs: Inputs, checked: GpuBuild, out: Path, *, options: BuildOptions, force: bool, progress: Stages
) -> Manifest:
    """Build the engine folder `out`.

    Raises:
        EngineError: the compiler refused, or made less than was asked for.
        EnvironmentFault: its library is missing or needs a GPU, or the compiler of kernels is missing.
        OutputError: `out` cannot be written.
        ShapeError, TargetError: there are no kernels for the model's sizes, or one does not compile.
    """
    target, program = checked.target, inputs.program
    gpu = options.tensorrt
    tasks = kernel_tasks(program, inputs.config, target, checked.plugins, gpu.providers) if gpu.kernels else []
    digests = dict.fromkeys(checked.plugins, NO_KERNELS) | digests_of(tasks)
    parts = Parts(out.parent / f".{out.name}.parts")
    lost_log = out.parent / f"{out.name}.{LOG}"
    made = Made(profiles={name: {} for name in target.profiles})
    with atomic_folder(out, force=force, marker=MANIFEST) as folder, _log_kept(folder / LOG, lost_log):
        jobs = []
        for name, canonical in program.graphs.items():
            progress(f"{name}: specialize")
            jobs += _jobs(name, canonical, inputs, checked, options, digests)
        _compile(jobs, target, options, folder, parts, made, progress)
        if tasks:  # after the plans: a library or a GPU that is missing is said before minutes of work
            made.kernels = compile_kernels(tasks, folder, progress.steps_bar)
        for name, canonical in program.graphs.items():
            stages = _stages([job for job in jobs if job.graph == name])
            made.graphs[name] = stages[0] if len(stages) == 1 else _joined(canonical, stages)
            if len(stages) > 1:
                made.stages[name] = stages
        made.uses = {job.plan: len(job.stages) for job in jobs}
        made.ranks = _ranks(inputs, checked, options, made)
        if inputs.weights.path is not None:
            with progress.steps_bar("digest weights") as advance:
                _digest_weights(inputs, Path(inputs.weights.path), folder, advance)
        progress("audit, write")
        audited = make_audit(inputs, checked, made)
        audit.require_precision(
            audited.products, f"--precision {target.precision}", target.products, checked.in_16_bits
        )
        engine = engine_parts(inputs, checked, options, folder, made, audited, digests)
        manifest = write_engine(folder, engine, program_folder=inputs.folder, program=program, config=inputs.config)
    parts.drop()
    lost_log.unlink(missing_ok=True)
    return manifest


def _digest_weights(inputs: Inputs, checkpoint: Path, folder: Path, advance: Callable[[float], None]) -> None:
    """Note what the weights are, of all tensors that the engine reads: loads compare them as they stream."""
    recipes = [recipe for of_graph in inputs.bindings.values() for recipe in of_graph.values()]
    names = set().union(*map(tensors_of, recipes))
    with Checkpoint.open(checkpoint) as opened:
        write_weight_digests(folder, opened, names, lambda done, total: advance(done / max(total, 1)))


@contextmanager
def _log_kept(log: Path, elsewhere: Path) -> Iterator[None]:
    """When a build fails its folder goes: what the compiler said is copied out of it, and errors name the copy."""
    try:
        yield
    except BaseException as error:
        if log.is_file() and log.stat().st_size:
            shutil.copyfile(log, elsewhere)
            if isinstance(error, EngineError) and str(log) in str(error):
                raise EngineError(str(error).replace(str(log), str(elsewhere))) from None
        raise


@dataclass(frozen=True)
class Stage:
    """A range of layers that a plan runs: its place in its graph, and how it calls the values of the plan."""

    number: int
    names: dict[str, str]


@dataclass
class Job:
    """One plan to compile.

    Attributes:
        graph: the graph that it belongs to.
        plan: its name, after its first stage.
        ready: what is compiled: the first stage.
        io: inputs and outputs of the plan; its digest is filled in when it is compiled.
        shapes: profile -> input -> smallest, typical and largest shape.
        stages: the stages that it serves, which differ in names alone.
    """

    graph: str
    plan: str
    ready: Prepared
    io: GraphIO
    shapes: dict[str, dict[str, Any]]
    stages: list[Stage]


def _jobs(
    name: str,
    canonical: GraphIO,
    inputs: Inputs,
    checked: GpuBuild,
    options: BuildOptions,
    digests: dict[str, str],
) -> list[Job]:
    """Return what must be compiled for one graph: one plan, or one for every kind of layer range."""
    target, config = checked.target, inputs.config
    budget, per_block = _cache_room(inputs, checked)
    jobs: dict[str, Job] = {}
    forms: dict[str, Form] = {}
    for number, (plan, graph) in enumerate(_ranges(name, inputs, options.layers_per_plan)):
        form = form_of(graph, checked.wide[name])
        if form.digest in jobs:
            names = dict(zip(forms[form.digest].names, form.names, strict=True))
            jobs[form.digest].stages.append(Stage(number, names))
            continue
        ready = prepare(
            graph,
            checked.how,
            config,
            plugins=checked.plugins,
            products=target.products,
            digests=digests,
            taps=options.taps,
            weights=checked.wide[name],
            bf16_linears=checked.bf16_linears.get(name, ()),
            nvfp4_experts=target.nvfp4_experts,
        )
        described = _describe(ready.model, canonical, f"{plan}.plan")
        blocks = pool_blocks(described, checked.limits, budget, per_block)
        bounds = {
            label: shapes(described, axis_bounds(profile, checked.limits, pool_blocks=blocks))
            for label, profile in spanning(target.profiles, checked.limits).items()
        }
        forms[form.digest] = form
        jobs[form.digest] = Job(name, plan, ready, described, bounds, [Stage(number, {})])
    return list(jobs.values())


def _cache_room(inputs: Inputs, checked: GpuBuild) -> tuple[int, int]:
    """Return the bytes that are left for caches, and those of a block, where that makes the fewest blocks: all ranks
    have as many."""
    rooms = []
    for stage, account in enumerate(checked.stage_bytes):
        held = sum(account[key] for key in ("weights", "scratch", "activations", "reserve"))
        per_block = block_bytes(inputs.program, inputs.config, checked.target.kv_format, stage)
        rooms.append((account["usable"] - held, per_block))
    return min(rooms, key=lambda room: room[0] / room[1])


def _layer_ranges(inputs: Inputs, most_layers: int | None) -> list[list[tuple[int, int]]]:
    """Return for each pipeline stage the layers of the plans that it runs."""
    stages = inputs.program.pipeline_stages
    return [stage_ranges(layers, most_layers) if most_layers else [layers] for layers in stages]


def _ranks(inputs: Inputs, checked: GpuBuild, options: BuildOptions, made: Made) -> Ranks | None:
    """Describe which of the engine's plans each rank runs; None: there is one rank."""
    parallelism = inputs.program.parallelism
    if parallelism.num_ranks == 1:
        return None
    pieces: dict[str, tuple[tuple[str, ...], ...]] = {}
    for name, graph in made.graphs.items():
        files = [Path(stage.file).stem for stage in made.stages.get(name, (graph,))]
        counts = [0] * (parallelism.pp - 1) + [len(files)]
        if name == "model":
            counts = [len(ranges) for ranges in _layer_ranges(inputs, options.layers_per_plan)]
        ends = list(itertools.accumulate(counts))
        pieces[name] = tuple(tuple(files[end - count : end]) for end, count in zip(ends, counts, strict=True))
    return Ranks(
        parallelism=parallelism,
        pipeline_stages=inputs.program.pipeline_stages,
        pieces=pieces,
        stage_bytes=checked.stage_bytes,
    )


def _ranges(name: str, inputs: Inputs, most_layers: int | None) -> list[tuple[str, onnx.ModelProto]]:
    """Return (name, canonical graph) of every stage of a graph. The MTP module is one layer, and one stage."""
    whole = inputs.graphs[name]
    ranges = [one for of_stage in _layer_ranges(inputs, most_layers) for one in of_stage] if name == "model" else []
    if len(ranges) < 2:
        return [(name, whole)]
    labels = [f"{name}.{first}" if last == first + 1 else f"{name}.{first}-{last - 1}" for first, last in ranges]
    return list(zip(labels, cut(whole, ranges), strict=True))


def _stages(jobs: list[Job]) -> tuple[GraphIO, ...]:
    """Describe the stages of a graph in order: as their plans are, by the names of the stage."""
    stages: dict[int, GraphIO] = {}
    for job in jobs:
        for stage in job.stages:
            stages[stage.number] = _renamed(job.io, stage.names)
    return tuple(stages[number] for number in sorted(stages))


def _renamed(plan: GraphIO, names: Mapping[str, str]) -> GraphIO:
    def spec(one: TensorSpec) -> TensorSpec:
        return one.model_copy(update={"name": names.get(one.name, one.name)})

    return plan.model_copy(
        update={
            "inputs": tuple(map(spec, plan.inputs)),
            "outputs": tuple(map(spec, plan.outputs)),
            "aliases": {names.get(out, out): names.get(source, source) for out, source in plan.aliases.items()},
        }
    )


def _describe(model: onnx.ModelProto, canonical: GraphIO, file: str) -> GraphIO:
    """Describe a specialized graph; roles and aliases are those of the canonical one."""
    roles = roles_in(canonical)
    return graph_io(
        model,
        file,
        role_of=lambda name: "intermediate" if name.startswith(INTERMEDIATE) else roles[name],
        aliases=canonical.aliases,
    )


def _joined(canonical: GraphIO, stages: Sequence[GraphIO]) -> GraphIO:
    """Describe the whole graph by its stages, in the order of the canonical one."""
    inputs = {spec.name: spec for stage in stages for spec in stage.inputs}
    outputs = {spec.name: spec for stage in stages for spec in stage.outputs}
    return GraphIO(
        file=stages[0].file,
        sha256=stages[0].sha256,
        inputs=tuple(inputs[spec.name] for spec in canonical.inputs if spec.name in inputs),
        outputs=tuple(outputs[spec.name] for spec in canonical.outputs if spec.name in outputs),
        aliases=dict(pair for stage in stages for pair in stage.aliases.items()),
    )


def _compile(
    jobs: list[Job],
    target: TargetConfig,
    options: BuildOptions,
    folder: Path,
    parts: Parts,
    made: Made,
    progress: Stages,
) -> None:
    """Compile all plans, as many at a time as there are cores, and note what was made.

    TensorRT measures on the GPU while it compiles, so there it is one after the other.
    """
    at_a_time = min(len(jobs), usable_cores()) if target.backend == "tensorrt-rtx" else 1
    stop = threading.Event()
    telling = threading.Lock()
    done = dict.fromkeys((job.plan for job in jobs), 0.0)
    stage = f"{', '.join(done)}: compile for {' and '.join(f'sm{sm}' for sm in target.sms)}"
    with progress.steps_bar(stage) as bar, ThreadPoolExecutor(at_a_time, "compile") as pool:

        def run(job: Job) -> Compiled:
            def tell(fraction: float) -> None:
                if stop.is_set():
                    raise EngineError("stopped, because another plan failed")
                with telling:  # in the order of the sums, which never fall
                    done[job.plan] = max(done[job.plan], fraction)
                    bar(sum(done.values()) / len(done))

            compiled = _compile_one(job, target, options, folder, parts, tell)
            tell(1.0)
            return compiled

        running = {job.plan: pool.submit(run, job) for job in jobs}
        try:
            for future in as_completed(running.values()):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            _join_logs(folder, [job.plan for job in jobs])
    for job in jobs:
        made.compiled[job.plan], made.prepared[job.plan] = running[job.plan].result(), job.ready
        outputs = (*job.io.outputs, *debug_specs(made.compiled[job.plan].taps))
        job.io = job.io.model_copy(update={"sha256": sha256_file(folder / job.io.file), "outputs": outputs})
        for label, bounds in job.shapes.items():
            made.profiles[label][job.plan] = bounds


def _join_logs(folder: Path, plans: list[str]) -> None:
    """Put what the compiler said of each plan into one file, in the order of the plans."""
    with (folder / LOG).open("ab") as whole:
        for plan in plans:
            part = folder / f"{plan}.{LOG}"
            if part.is_file():
                whole.write(part.read_bytes())
                part.unlink()


def _compile_one(
    job: Job, target: TargetConfig, options: BuildOptions, folder: Path, parts: Parts, tell: Callable[[float], None]
) -> Compiled:
    assert target.backend != "onnxruntime"
    model = job.ready.model.SerializeToString(deterministic=True)
    shapes_of = list(job.shapes.values())
    key = _key(model, target, shapes_of, options)
    plan, log = folder / job.io.file, folder / f"{job.plan}.{LOG}"
    known = parts.take(key, plan, log)
    if known is not None:
        return known
    try:
        compiled = compile_graph(
            flavour=target.backend,
            model=model,
            plan=plan,
            plugins=job.ready.plugins,
            taps=job.ready.taps,
            sms=target.sms,
            profiles=shapes_of,
            options=options.tensorrt.compiler,
            log=log,
            progress=tell,
            target=target.name,
            alike=len(job.stages) - 1,
        )
    except EngineError as error:
        raise EngineError(str(error).replace(str(log), str(folder / LOG))) from None
    parts.keep(key, plan, compiled, log)
    return compiled


def _key(model: bytes, target: TargetConfig, profiles: list[dict[str, Any]], options: BuildOptions) -> str:
    """Digest of all that a plan depends on."""
    assert target.backend != "onnxruntime"
    version = installed_version(target.backend) or "missing"
    rest = json.dumps([target.backend, version, target.sms, profiles, asdict(options.tensorrt.compiler)], default=str)
    return hashlib.sha256(hashlib.sha256(model).digest() + rest.encode()).hexdigest()[:32]
