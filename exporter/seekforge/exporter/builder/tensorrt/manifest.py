"""What a GPU build says of the engine that it made: its audit and its manifest."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

from seekforge.common.errors import EngineError
from seekforge.common.files import sha256_file
from seekforge.exporter.builder.generation import read_generation
from seekforge.exporter.builder.request import copy_text_files, write_target
from seekforge.exporter.builder.tensorrt import audit
from seekforge.exporter.builder.tensorrt.check import Choices, Inputs, Planned, block_bytes
from seekforge.exporter.builder.tensorrt.compiler import Compiled
from seekforge.exporter.builder.tensorrt.graph import Prepared
from seekforge.exporter.builder.tensorrt.kernels import count_images, kernel_files, min_drivers
from seekforge.formats import weight_digests
from seekforge.formats.engine.manifest import (
    ENGINE_FORMAT,
    Audit,
    Cache,
    Manifest,
    PluginUse,
    Target,
    digest_file,
)
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.program import PROGRAM_FORMAT, GraphIO
from seekforge.formats.weight_recipes import Recipe, cast, retarget
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.kernels.launch_plan import KernelSet
from seekforge.plugins.registry import SPECS
from seekforge.plugins.tensorrt.library import MODULES

BINDINGS = "bindings.json"
#: Keys that a token sees in the audit, unless the engine's limit is lower.
_AUDIT_CONTEXT = 8192


@dataclass
class Made:
    """What a build has made so far.

    Attributes:
        kernels: compiled for the plugins.
        prepared, compiled: plan -> graph and result; a plan is a graph, or `graph.A-B` after its first layers.
        faces: graph -> face of the whole graph.
        stages: graph -> faces of what a step runs, where that is several.
        uses: plan -> how many of the stages it runs.
        profiles: profile -> plan -> input -> smallest, typical and largest shape.
    """

    kernels: list[KernelSet] = field(default_factory=list)
    prepared: dict[str, Prepared] = field(default_factory=dict)
    compiled: dict[str, Compiled] = field(default_factory=dict)
    faces: dict[str, GraphIO] = field(default_factory=dict)
    stages: dict[str, tuple[GraphIO, ...]] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    profiles: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


def make_audit(inputs: Inputs, planned: Planned, made: Made) -> Audit:
    """Return what the compiled plans really are."""
    target = planned.target
    context = min(_AUDIT_CONTEXT, planned.limits.max_model_len)
    weights = {spec.name for face in inputs.program.graphs.values() for spec in face.with_role("weight")}
    compiled = made.compiled
    found = [
        product.times(made.uses[plan])
        for plan, graph in made.prepared.items()
        for product in audit.products(
            graph.operators,
            inputs.config,
            weights=weights,
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
        plugins=_in_all({name: one.plugins for name, one in compiled.items()}, made.uses),
        kernels=count_images(made.kernels),
        workspaces=_most_workspaces(compiled.values(), planned),
        inlined=_in_all({name: one.inlined for name, one in made.prepared.items()}, made.uses),
        weight_input_bytes=planned.device_bytes["weights"],
        plan_bytes={name: one.plan_bytes for name, one in compiled.items()},
        activation_bytes={
            name: dict(zip(made.profiles, one.activation_bytes, strict=True))
            for name, one in compiled.items()
            if one.activation_bytes
        },
        device_bytes=planned.device_bytes,
        oversize=planned.oversize,
        build_seconds={name: round(one.seconds, 3) for name, one in compiled.items()},
        build_cpu_seconds={name: round(one.cpu_seconds, 3) for name, one in compiled.items()},
        build_peak_bytes={name: one.peak_bytes for name, one in compiled.items()},
    )


def _most_workspaces(compiled: Iterable[Compiled], planned: Planned) -> dict[str, int]:
    """Return op_type -> most scratch that a plugin asked for.

    Raises:
        EngineError: one asked for more than was expected before; a bug, and the cache would be given memory twice.
    """
    most: dict[str, int] = {}
    for plan in compiled:
        for op, size in plan.workspaces.items():
            most[op] = max(size, most.get(op, 0))
    expected = planned.device_bytes["scratch"]
    for op, size in most.items():
        if size > expected:
            raise EngineError(
                f"{op} asked for {size} bytes of scratch, expected at most {expected}; this is a bug in seekforge"
            )
    return dict(sorted(most.items()))


def _in_all(counts: Mapping[str, Mapping[str, int]], uses: Mapping[str, int]) -> dict[str, int]:
    """Add up counts per plan, each as often as its plan is used."""
    found: Counter[str] = Counter()
    for plan, of_plan in counts.items():
        found.update({op: count * uses[plan] for op, count in of_plan.items()})
    return dict(found)


def make_manifest(
    inputs: Inputs,
    planned: Planned,
    choices: Choices,
    folder: Path,
    made: Made,
    found: Audit,
    digests: Mapping[str, str],
) -> Manifest:
    """Write the files beside the plans into `folder` and return the manifest that lists all.

    Args:
        inputs, planned, choices: what was asked.
        folder: of the engine, with plans and kernels.
        made: what was compiled.
        found: its audit.
        digests: op_type -> digest of the kernels.
    """
    target, program, config, faces = planned.target, inputs.program, inputs.config, made.faces
    assert target.backend != "onnxruntime"
    _, distribution, _ = MODULES[target.backend]
    version = next(iter(made.compiled.values())).version
    files = copy_text_files(program, inputs.folder, folder)
    (folder / BINDINGS).write_text(_bindings_text(inputs, planned.how, planned.wide), encoding="utf-8")
    plans = dict.fromkeys(stage.file for name, face in faces.items() for stage in made.stages.get(name, (face,)))
    files += [BINDINGS, write_target(folder, target, planned.limits), *plans, *kernel_files(folder, made.kernels)]
    if (folder / weight_digests.FILE).exists():
        files.append(weight_digests.FILE)
    generation = read_generation(inputs.folder, config)
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
        stages=made.stages,
        cache=Cache(
            block_size=BLOCK_SIZE,
            layers=tuple(dict.fromkeys(cache_layers)),
            mtp_layer=config.mtp_layer if "mtp" in faces else None,
            kv_format=target.kv_format,
            latent_dim=config.latent_dim,
            index_dim=config.index_head_dim,
            bytes_per_block=block_bytes(program, config, target.kv_format),
        ),
        limits=planned.limits,
        vocab_size=config.vocab_size,
        num_top_logits=config.num_top_logits,
        bos_token_id=config.bos_token_id,
        eos_token_id=generation.eos_token_id,
        generation=generation.defaults,
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
            **({} if not made.kernels else {"kernel_compiler": made.kernels[0].compiler}),
            **({} if choices.most_layers is None else {"layers_per_engine": choices.most_layers}),
            "compiler": {key: str(v) for key, v in asdict(choices.compiler).items() if v is not None},
        },
        weights=inputs.weights,
        plugins={
            op: PluginUse(
                version=SPECS[op].version,
                products=target.products,
                kernel_digest=digests[op],
                num_layers=found.plugins.get(op, 0),
            )
            for op in planned.plugins
        },
        profiles=made.profiles,
        min_driver=min_drivers(made.kernels),
        capturable={name: one.capturable for name, one in made.compiled.items() if one.capturable is not None},
        audit=found,
    )


def _bindings_text(inputs: Inputs, how: Specialization, wide: Mapping[str, set[str]]) -> str:
    """bindings.json of the engine: the program's recipes in the dtypes of the engine."""

    def recipe(canonical: Recipe, *, wide: bool) -> Recipe:
        mine = retarget(canonical, activations=how.activations, fp8_dtype=how.fp8_dtype)
        return cast(mine, "f32") if wide else mine

    graphs = {
        graph: {name: recipe(one, wide=name in wide[graph]).to_dict() for name, one in recipes.items()}
        for graph, recipes in inputs.bindings.items()
    }
    return json.dumps({"format": PROGRAM_FORMAT, "graphs": graphs}, ensure_ascii=False, separators=(",", ":")) + "\n"
