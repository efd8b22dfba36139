"""`build` for TensorRT and TensorRT-RTX: check first, then specialise, compile each graph, audit, write a manifest.

An engine holds no weights: they are inputs, and `bindings.json` in the engine says how a runtime makes them from the
checkpoint. So the full model builds on a laptop, and everything that cannot work is refused before work begins.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import onnx
import yaml

from seekforge.exporter.build import audit
from seekforge.exporter.build.common import check_program, copy_text_files, generation_defaults
from seekforge.exporter.build.compiler import Compiled, Options, compile_graph
from seekforge.exporter.build.prepare import Prepared, prepare
from seekforge.exporter.build.profiles import axis_bounds, pool_blocks, shapes
from seekforge.exporter.build.targets import TargetConfig
from seekforge.exporter.checkpoint.validate import check_structure
from seekforge.exporter.rewrite.layers import truncate
from seekforge.plugins.contracts import refusals
from seekforge.plugins.errors import ProgramError, TargetError
from seekforge.plugins.formats.bindings import Recipe, retarget
from seekforge.plugins.formats.dtypes import FROM_ONNX, itemsize
from seekforge.plugins.formats.files import atomic_folder, sha256_file
from seekforge.plugins.formats.manifest import (
    ENGINE_FORMAT,
    MANIFEST,
    Audit,
    Cache,
    Limits,
    Manifest,
    PluginUse,
    Target,
    WeightSource,
    digest_file,
    save_manifest,
    sealed,
)
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.program import (
    BLOCK_SIZE,
    PROGRAM_FORMAT,
    GraphIO,
    Program,
    Role,
    TensorSpec,
    load_bindings,
    load_program,
)
from seekforge.plugins.formats.safetensors import Checkpoint
from seekforge.plugins.formats.sizing import (
    GIB,
    Layout,
    Workload,
    activation_bytes,
    cache_bytes_per_token,
    reserve_bytes,
    scratch_bytes,
    usable_bytes,
)
from seekforge.plugins.registry import SPECS
from seekforge.plugins.spec import cdiv
from seekforge.plugins.specialisation import Specialisation
from seekforge.plugins.tensorrt.launch import NO_KERNELS
from seekforge.plugins.tensorrt.library import MODULES

LOG, BINDINGS, CONFIG = "build.log", "bindings.json", "target.yaml"
#: Keys that a token sees in the audit, unless the engine's limit is lower.
_AUDIT_CONTEXT = 8192
#: Operators that know the cache's byte layout, which standard operators cannot read.
_CACHE_OPS = ("DsaCacheWrite", "DsaIndexer", "DsaAttention")


class Progress(Protocol):
    """What a build tells about its work; `exporter.progress.Stages` is one."""

    def __call__(self, stage: str) -> None: ...

    def steps_bar(self, stage: str) -> AbstractContextManager[Callable[[float], None]]: ...


@dataclass(frozen=True)
class Choices:
    """What a user may choose beside the target.

    Attributes:
        plugins: all operators, none (inlined everywhere), or auto: those whose limits the model keeps.
        allow_oversize: build although it will not fit; such an engine is marked and does not load.
        compiler: passed on.
    """

    plugins: Literal["auto", "all", "none"] = "auto"
    allow_oversize: bool = False
    compiler: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Planned:
    """What will be built: the result of all checks, before any work.

    Attributes:
        plugins: op_types that become plugins.
        how: dtypes of the specialisation.
        limits: of the engine.
        device_bytes: expected use of one GPU.
        oversize: more is expected than there is.
        pool_blocks: graph -> most cache blocks.
    """

    target: TargetConfig
    plugins: tuple[str, ...]
    inlined: tuple[str, ...]
    how: Specialisation
    limits: Limits
    device_bytes: dict[str, int]
    oversize: bool


@dataclass(frozen=True)
class Inputs:
    """A program and, if given, its checkpoint; checked."""

    folder: Path
    program: Program
    bindings: dict[str, dict[str, Recipe]]
    config: ModelConfig
    weights: WeightSource


def open_inputs(program_folder: Path, checkpoint_folder: Path | None) -> Inputs:
    """Read and check a program and the headers of its checkpoint; no weight bytes.

    Raises:
        ProgramError, CheckpointError, ConfigError: damaged, or they do not belong together.
    """
    program = load_program(program_folder)
    bindings = load_bindings(program_folder)
    check_program(program, bindings, program_folder)
    config = ModelConfig.parse(program.config, str(program_folder / "program.json"))
    if checkpoint_folder is None:
        return Inputs(program_folder, program, bindings, config, WeightSource(path=None, index_digest=None))
    found = whole = ModelConfig.load(checkpoint_folder)
    if program.truncated_from is not None and whole.num_hidden_layers == program.truncated_from:
        found = truncate(whole, config.num_hidden_layers)
    for key in type(config).model_fields:
        ours, theirs = getattr(config, key), getattr(found, key)
        if ours != theirs:
            raise ProgramError(
                f"{checkpoint_folder}: {key} is {theirs}, the program was exported for {ours}; "
                "pass the checkpoint it was exported from, or export again"
            )
    with Checkpoint.open(checkpoint_folder) as checkpoint:
        check_structure(checkpoint, whole)
        weights = WeightSource(path=str(checkpoint_folder.resolve()), index_digest=checkpoint.index_digest())
    return Inputs(program_folder, program, bindings, config, weights)


# --- checks before work -----------------------------------------------------------------------------------------


def check(inputs: Inputs, target: TargetConfig, choices: Choices) -> Planned:
    """Decide what will be built, or refuse with one sentence that names what would work.

    Raises:
        TargetError: precision, cache format, limits, operators or memory do not go together.
    """
    program, config = inputs.program, inputs.config
    limits = _check_limits(target.limits, config)
    _check_numerics(target, program)
    ops = tuple(op for op in SPECS if op in program.ops)
    plugins = _choose_plugins(target, config, ops, choices)
    inlined = tuple(op for op in ops if op not in plugins)
    broken = refusals(config, plugins=plugins, ops=ops)
    if broken:
        hint = "; --plugins auto inlines what has no plugin" if choices.plugins == "all" else ""
        raise TargetError(f"target {target.name}: {broken[0]}{hint}")
    products = target.products
    if products == "fp8" and any(op in inlined for op in audit.FP8_OPS):
        names = " and ".join(op for op in audit.FP8_OPS if op in inlined)
        raise TargetError(
            f"--precision fp8 needs {names} as plugin on sm{target.sm}, inlined it multiplies in BF16; "
            "pass --plugins all, or --precision bf16"
        )
    if target.kv_format == "fp8_ds" and any(op in inlined for op in _CACHE_OPS):
        names = ", ".join(op for op in _CACHE_OPS if op in inlined)
        raise TargetError(
            f"--kv-cache-dtype fp8_ds is read and written by plugins only, and {names} would be inlined; "
            "pass --plugins all, or --kv-cache-dtype bf16"
        )
    storage = "float8" if target.has_fp8 and "MoeExperts" not in inlined else "int8"
    how = Specialisation("bf16", storage, target.kv_format, "trt")
    device = expected_bytes(inputs, target, limits)
    oversize = device["total"] > device["usable"]
    if oversize and not choices.allow_oversize:
        raise TargetError(_what_would_fit(inputs, target, limits, device))
    return Planned(target, plugins, inlined, how, limits, device, oversize)


def _check_limits(limits: Limits, config: ModelConfig) -> Limits:
    for name, value in limits.model_dump().items():
        if value < 1:
            raise TargetError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if limits.max_model_len > config.max_position_embeddings:
        raise TargetError(
            f"--max-model-len is {limits.max_model_len}, the model ends at {config.max_position_embeddings} "
            "(max_position_embeddings)"
        )
    if limits.max_num_batched_tokens < limits.max_batch_size:
        raise TargetError(
            f"--max-num-batched-tokens is {limits.max_num_batched_tokens}, expected at least --max-batch-size "
            f"{limits.max_batch_size}: a decode step has one token of each sequence"
        )
    return limits


def _check_numerics(target: TargetConfig, program: Program) -> None:
    """The program must carry the roundings that the options ask for."""
    numerics = program.numerics
    if target.precision == "fp8" and numerics["act_quant"] != "ue8m0":
        raise TargetError(
            f"--precision fp8 multiplies quantised activations, and the program has numerics {numerics['name']!r} "
            "without them; export with --numerics fp8, or pass --precision bf16"
        )
    if target.kv_format == "fp8_ds" and not (numerics["kv_fp8"] and numerics["indexer_fp8"]):
        raise TargetError(
            f"--kv-cache-dtype fp8_ds stores FP8, and the program has numerics {numerics['name']!r} without that "
            "rounding; export with --numerics fp8, or pass --kv-cache-dtype bf16"
        )


def _choose_plugins(
    target: TargetConfig, config: ModelConfig, ops: tuple[str, ...], choices: Choices
) -> tuple[str, ...]:
    match choices.plugins:
        case "all":
            return ops
        case "none":
            return ()
        case _:
            return tuple(op for op in ops if not refusals(config, plugins=[op], ops=[op]))


def expected_bytes(inputs: Inputs, target: TargetConfig, limits: Limits) -> dict[str, int]:
    """Return what one GPU is expected to hold, with one sequence of the longest context, and what it has."""
    assert target.gpu is not None
    config = inputs.config
    work = Workload(limits.max_model_len, 1, limits.max_num_batched_tokens)
    found = {
        "weights": weight_input_bytes(inputs.program),
        "cache": (cdiv(limits.max_model_len, BLOCK_SIZE) + 1) * _block_bytes(inputs.program, config, target.kv_format),
        "scratch": scratch_bytes(config, Layout(), work, target.kv_format),
        "activations": activation_bytes(config, Layout(), replace(work, batch=limits.max_batch_size)),
        "reserve": reserve_bytes(Layout()),
    }
    return found | {"total": sum(found.values()), "usable": usable_bytes(target.gpu.memory_gib)}


def weight_input_bytes(program: Program) -> int:
    """Bytes of all weight and table inputs; what two graphs share is held once."""
    sizes: dict[str, int] = {}
    for face in program.graphs.values():
        for spec in face.inputs:
            if spec.role in ("weight", "table"):
                sizes[spec.name] = itemsize(spec.dtype) * math.prod(int(size) for size in spec.shape)
    return sum(sizes.values())


def _block_bytes(program: Program, config: ModelConfig, kv_format: str) -> int:
    """Bytes of one cache block over all layers of all graphs."""
    layers = sum(len(face.with_role("cache")) // 2 for face in program.graphs.values())
    return BLOCK_SIZE * cache_bytes_per_token(config, kv_format, num_layers=layers)  # pyright: ignore[reportArgumentType]


def _what_would_fit(inputs: Inputs, target: TargetConfig, limits: Limits, device: Mapping[str, int]) -> str:
    """Say by how much it does not fit, and the largest number that would."""
    needs = f"needs {device['total'] / GIB:.1f} GiB, {target.name} has {device['usable'] / GIB:.1f} GiB usable"
    low, high = 0, limits.max_model_len // BLOCK_SIZE
    while low < high:
        middle = (low + high + 1) // 2
        tried = limits.model_copy(update={"max_model_len": middle * BLOCK_SIZE})
        sizes = expected_bytes(inputs, target, tried)
        low, high = (middle, high) if sizes["total"] <= sizes["usable"] else (low, middle - 1)
    allow = "or pass --allow-oversize to build what will not load"
    if low:
        return f"the engine {needs}; pass --max-model-len {low * BLOCK_SIZE} at most, {allow}"
    start, stop = inputs.program.layer_range
    other = device["total"] - device["weights"] - device["cache"]
    per_layer = (device["weights"] + device["cache"]) / (stop - start)
    count = int(max(device["usable"] - other, 0) / per_layer)
    remedy = (
        f"about {count} of its {stop - start} layers fit: export stages with --layers"
        if count
        else "not one layer fits"
    )
    return (
        f"the engine {needs}, of it {device['weights'] / GIB:.1f} GiB of weights; {remedy} "
        f"('seekforge plan' says how many GPUs hold it all), {allow}"
    )


# --- the build --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Plans that an interrupted build has finished, by what they were made from."""

    folder: Path

    def take(self, key: str, plan: Path) -> Compiled | None:
        """Put the plan made from `key` at `plan`, if there is one, and return what was known of it."""
        try:
            known = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            if sha256_file(self.folder / f"{key}.plan") != known.pop("sha256"):
                return None
            shutil.copyfile(self.folder / f"{key}.plan", plan)
            return Compiled(**known)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, key: str, plan: Path, compiled: Compiled) -> None:
        """Remember a finished plan; failing to is no error."""
        try:
            self.folder.mkdir(exist_ok=True)
            for name, write in (
                (f"{key}.plan", lambda path: shutil.copyfile(plan, path)),
                (
                    f"{key}.json",
                    lambda path: path.write_text(json.dumps(asdict(compiled) | {"sha256": sha256_file(plan)})),
                ),
            ):
                temporary = self.folder / f"{name}.{os.getpid()}"
                write(temporary)
                temporary.replace(self.folder / name)
        except OSError:
            self.drop()

    def drop(self) -> None:
        """Forget all."""
        shutil.rmtree(self.folder, ignore_errors=True)


def build_gpu(
    inputs: Inputs, planned: Planned, out: Path, *, choices: Choices, force: bool, progress: Progress
) -> Manifest:
    """Build the engine folder `out`.

    Raises:
        EngineError: the compiler refused, or made less than was asked for.
        EnvironmentFault: its library is missing or needs a GPU.
        OutputError: `out` cannot be written.
    """
    target, program, config = planned.target, inputs.program, inputs.config
    assert target.backend != "onnxruntime" and target.gpu is not None
    parts = Parts(out.parent / f".{out.name}.parts")
    lost_log = out.parent / f"{out.name}.{LOG}"
    digests = dict.fromkeys(planned.plugins, NO_KERNELS)
    compiled: dict[str, Compiled] = {}
    prepared: dict[str, Prepared] = {}
    faces: dict[str, GraphIO] = {}
    profiles: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in target.profiles}
    budget = planned.device_bytes["usable"] - sum(
        planned.device_bytes[key] for key in ("weights", "scratch", "activations", "reserve")
    )
    per_block = _block_bytes(program, config, target.kv_format)
    with atomic_folder(out, force=force, marker=MANIFEST) as folder:
        log = folder / LOG
        try:
            for name, canonical in program.graphs.items():
                progress(f"{name}: specialise")
                ready = prepare(
                    _read_graph(inputs.folder, canonical),
                    planned.how,
                    config,
                    plugins=planned.plugins,
                    products=target.products,
                    digests=digests,
                )
                face = describe(ready.model, canonical, f"{name}.plan")
                blocks = pool_blocks(face, planned.limits, budget, per_block)
                for label, profile in target.profiles.items():
                    bounds = axis_bounds(profile, planned.limits, pool_blocks=blocks)
                    profiles[label][name] = shapes(face, bounds)
                compiled[name] = _compile(
                    name, ready, folder / face.file, target, profiles, choices, log, parts, progress
                )
                prepared[name] = ready
                faces[name] = face.model_copy(update={"sha256": sha256_file(folder / face.file)})
        except BaseException:
            if log.is_file() and log.stat().st_size:
                shutil.copyfile(log, lost_log)  # the folder goes, what the compiler said stays
            raise
        progress("audit, write")
        made = _audit(inputs, planned, prepared, compiled)
        audit.require_precision(made.products, f"--precision {target.precision}", target.products)
        manifest = sealed(_manifest(inputs, planned, choices, folder, faces, profiles, compiled, made, digests))
        save_manifest(folder, manifest)
    parts.drop()
    lost_log.unlink(missing_ok=True)
    return manifest


def _read_graph(folder: Path, face: GraphIO) -> onnx.ModelProto:
    path = folder / face.file
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ProgramError(f"{path}: cannot be read ({error.strerror}); export the program again") from None
    found = hashlib.sha256(raw).hexdigest()
    if found != face.sha256:
        raise ProgramError(f"{path}: digest {found[:12]}, program.json says {face.sha256[:12]}; export again")
    return onnx.load_from_string(raw)


def describe(model: onnx.ModelProto, canonical: GraphIO, file: str) -> GraphIO:
    """Return the face of a specialised graph; roles and aliases are those of the canonical one."""
    roles: dict[str, Role] = {spec.name: spec.role for spec in (*canonical.inputs, *canonical.outputs)}

    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        return TensorSpec(name=value.name, dtype=FROM_ONNX[tensor.elem_type], shape=shape, role=roles[value.name])

    return GraphIO(
        file=file,
        sha256="",
        inputs=tuple(spec(value) for value in model.graph.input),
        outputs=tuple(spec(value) for value in model.graph.output),
        aliases=canonical.aliases,
    )


def _compile(
    name: str,
    ready: Prepared,
    plan: Path,
    target: TargetConfig,
    profiles: Mapping[str, Mapping[str, Any]],
    choices: Choices,
    log: Path,
    parts: Parts,
    progress: Progress,
) -> Compiled:
    assert target.backend != "onnxruntime"
    model = ready.model.SerializeToString(deterministic=True)
    shapes_of = [dict(graphs[name]) for graphs in profiles.values()]
    key = _key(model, target, shapes_of, choices)
    known = parts.take(key, plan)
    if known is not None:
        progress(f"{name}: plan of the interrupted build")
        return known
    with progress.steps_bar(f"{name}: compile for {' and '.join(f'sm{sm}' for sm in target.sms)}") as bar:
        compiled = compile_graph(
            flavour=target.backend,
            model=model,
            plan=plan,
            plugins=ready.plugins,
            sms=target.sms,
            profiles=shapes_of,
            options=choices.compiler,
            log=log,
            progress=bar,
        )
    parts.keep(key, plan, compiled)
    return compiled


def _key(model: bytes, target: TargetConfig, profiles: list[dict[str, Any]], choices: Choices) -> str:
    """Digest of all that a plan depends on."""
    assert target.backend != "onnxruntime"
    _, distribution, _ = MODULES[target.backend]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "missing"
    rest = json.dumps([target.backend, version, target.sms, profiles, asdict(choices.compiler)], default=str)
    return hashlib.sha256(hashlib.sha256(model).digest() + rest.encode()).hexdigest()[:32]


def _audit(
    inputs: Inputs, planned: Planned, prepared: Mapping[str, Prepared], compiled: Mapping[str, Compiled]
) -> Audit:
    target = planned.target
    context = min(_AUDIT_CONTEXT, planned.limits.max_model_len)
    found = [
        product
        for name, graph in prepared.items()
        for product in audit.products(
            graph.operators,
            inputs.config,
            weights=[spec.name for spec in inputs.program.graphs[name].with_role("weight")],
            plugins=planned.plugins,
            precision=target.products,
            context=context,
        )
    ]
    got = "FP8 weights, BF16 products" if target.precision == "fp8" and target.products == "bf16" else target.products
    return Audit(
        asked=target.precision,
        got=got,
        context=context,
        products=audit.shares(found),
        layers={name: one.layers for name, one in compiled.items()},
        native_products={name: one.products for name, one in compiled.items()},
        plugins=dict(sum((Counter(one.plugins) for one in compiled.values()), Counter())),
        inlined=dict(sum((Counter(one.inlined) for one in prepared.values()), Counter())),
        weight_input_bytes=planned.device_bytes["weights"],
        plan_bytes={name: one.plan_bytes for name, one in compiled.items()},
        device_bytes=planned.device_bytes,
        oversize=planned.oversize,
        build_seconds={name: round(one.seconds, 3) for name, one in compiled.items()},
        build_cpu_seconds={name: round(one.cpu_seconds, 3) for name, one in compiled.items()},
        build_peak_bytes={name: one.peak_bytes for name, one in compiled.items()},
    )


def _manifest(
    inputs: Inputs,
    planned: Planned,
    choices: Choices,
    folder: Path,
    faces: dict[str, GraphIO],
    profiles: dict[str, dict[str, dict[str, Any]]],
    compiled: Mapping[str, Compiled],
    made: Audit,
    digests: Mapping[str, str],
) -> Manifest:
    target, program, config = planned.target, inputs.program, inputs.config
    assert target.backend != "onnxruntime"
    _, distribution, _ = MODULES[target.backend]
    version = next(iter(compiled.values())).version
    files = copy_text_files(program, inputs.folder, folder)
    (folder / BINDINGS).write_text(_bindings_text(inputs.bindings, planned.how), encoding="utf-8")
    effective = target.model_dump(mode="json") | {"limits": planned.limits.model_dump()}
    (folder / CONFIG).write_text(yaml.safe_dump(effective, sort_keys=False, allow_unicode=True), encoding="utf-8")
    files += [BINDINGS, CONFIG, *(face.file for face in faces.values())]
    generation = generation_defaults(inputs.folder)
    cache_layers = [int(s.name.partition(".")[2]) for s in faces["model"].with_role("cache")]
    return Manifest(
        format=ENGINE_FORMAT,
        seekforge_version=importlib.metadata.version("seekforge"),
        target=Target(name=target.name, backend=target.backend, sm=target.sm, sms=target.sms),
        versions={"onnx": onnx.__version__, distribution: version},
        runtime_versions={distribution: version},
        program_sha256=sha256_file(inputs.folder / "program.json"),
        numerics=program.numerics,
        layer_range=program.layer_range,
        graphs=faces,
        cache=Cache(
            block_size=BLOCK_SIZE,
            layers=tuple(dict.fromkeys(cache_layers)),
            mtp_layer=config.mtp_layer if "mtp" in faces else None,
            kv_format=target.kv_format,
            latent_dim=config.latent_dim,
            index_dim=config.index_head_dim,
            bytes_per_block=_block_bytes(program, config, target.kv_format),
        ),
        limits=planned.limits,
        vocab_size=config.vocab_size,
        num_top_logits=config.num_top_logits,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        generation=generation,
        tokenizer="tokenizer.json",
        files=tuple(digest_file(folder, name) for name in files),
        self_check=None,
        config=program.config,
        build={
            "python": platform.python_version(),
            "platform": platform.platform(),
            "activations": "bf16",
            "fp8_storage": planned.how.fp8_storage,
            "plugins": choices.plugins,
            "compiler": {key: str(v) for key, v in asdict(choices.compiler).items() if v is not None},
        },
        weights=inputs.weights,
        plugins={
            op: PluginUse(
                version=SPECS[op].version,
                products=target.products,
                kernel_digest=digests[op],
                num_layers=made.plugins.get(op, 0),
            )
            for op in planned.plugins
        },
        profiles=profiles,
        audit=made,
    )


def _bindings_text(bindings: dict[str, dict[str, Recipe]], how: Specialisation) -> str:
    """bindings.json of the engine: the program's recipes in the dtypes of the engine."""
    graphs = {
        graph: {
            name: retarget(recipe, activations=how.activations, fp8_dtype=how.fp8_dtype).to_dict()
            for name, recipe in recipes.items()
        }
        for graph, recipes in bindings.items()
    }
    return json.dumps({"format": PROGRAM_FORMAT, "graphs": graphs}, ensure_ascii=False, separators=(",", ":")) + "\n"
