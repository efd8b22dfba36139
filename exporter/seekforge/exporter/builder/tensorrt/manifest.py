"""What a GPU build says of the engine that it made: its audit, and its parts of the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

from seekforge.common.errors import EngineError
from seekforge.exporter.builder.engine_writer import EngineParts
from seekforge.exporter.builder.options import BuildOptions
from seekforge.exporter.builder.tensorrt import audit
from seekforge.exporter.builder.tensorrt.check import GpuBuild, Inputs
from seekforge.exporter.builder.tensorrt.compiler import Compiled
from seekforge.exporter.builder.tensorrt.graph import Prepared
from seekforge.exporter.builder.tensorrt.kernels import count_images, kernel_files, min_drivers, sources_of
from seekforge.exporter.builder.tensorrt.passes.nvfp4_experts import nvfp4_recipes
from seekforge.formats import weight_digests
from seekforge.formats.engine.manifest import Audit, PluginUse
from seekforge.formats.engine.ranks import Ranks
from seekforge.formats.program import GraphIO
from seekforge.formats.weight_recipes import Recipe, cast, retarget
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.kernels.kernel_set import KernelSet
from seekforge.plugins.registry import SPECS
from seekforge.plugins.tensorrt.library import MODULES

#: Keys that a token sees in the audit, unless the engine's limit is lower.
_AUDIT_CONTEXT = 8192


@dataclass
class Made:
    """What a build has made so far.

    Attributes:
        kernels: the kernels of the plugins, compiled.
        prepared, compiled: plan -> graph and result; a plan is a graph, or `graph.A-B` after its first layers.
        graphs: graph -> its inputs and outputs as a whole.
        stages: graph -> inputs and outputs of each plan that a step runs, where they are several.
        uses: plan -> how many of the stages it runs.
        profiles: profile -> plan -> input -> smallest, typical and largest shape.
        ranks: how ranks share what was made; None: there is one.
    """

    kernels: list[KernelSet] = field(default_factory=list)
    prepared: dict[str, Prepared] = field(default_factory=dict)
    compiled: dict[str, Compiled] = field(default_factory=dict)
    graphs: dict[str, GraphIO] = field(default_factory=dict)
    stages: dict[str, tuple[GraphIO, ...]] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    profiles: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    ranks: Ranks | None = None


def make_audit(inputs: Inputs, checked: GpuBuild, made: Made) -> Audit:
    """Return what the compiled plans really are. Shares of products are those of all pipeline stages together, with the
    heads and experts of one rank."""
    target = checked.target
    heads = inputs.program.parallelism.rank_sizes(inputs.config).num_attention_heads
    config = inputs.config.model_copy(update={"num_attention_heads": heads})
    context = min(_AUDIT_CONTEXT, checked.limits.max_model_len)
    weights = {spec.name for graph in inputs.program.graphs.values() for spec in graph.with_role("weight")}
    compiled = made.compiled
    products = [
        product.times(made.uses[plan])
        for plan, graph in made.prepared.items()
        for product in audit.products(
            graph.operators,
            config,
            weights=weights,
            plugins=checked.plugins,
            precision=target.products,
            context=context,
        )
    ]
    got = "FP8 weights, BF16 products" if target.precision == "fp8" and target.products == "bf16" else target.products
    return Audit(
        asked=target.precision,
        got=got,
        context=context,
        products=audit.shares(products),
        layers={name: one.layers for name, one in compiled.items()},
        native_products={name: one.products for name, one in compiled.items()},
        plugins=_in_all({name: one.plugins for name, one in compiled.items()}, made.uses),
        kernels=count_images(made.kernels),
        workspaces=_most_workspaces(compiled.values(), checked),
        inlined=_in_all({name: one.inlined for name, one in made.prepared.items()}, made.uses),
        weight_input_bytes=checked.device_bytes["weights"],
        plan_bytes={name: one.plan_bytes for name, one in compiled.items()},
        activation_bytes={
            name: dict(zip(made.profiles, one.activation_bytes, strict=True))
            for name, one in compiled.items()
            if one.activation_bytes
        },
        device_bytes=checked.device_bytes,
        oversize=checked.oversize,
        build_seconds={name: round(one.seconds, 3) for name, one in compiled.items()},
        build_cpu_seconds={name: round(one.cpu_seconds, 3) for name, one in compiled.items()},
        build_peak_bytes={name: one.peak_bytes for name, one in compiled.items()},
    )


def _most_workspaces(compiled: Iterable[Compiled], checked: GpuBuild) -> dict[str, int]:
    """Return op_type -> most scratch that a plugin asked for.

    Raises:
        EngineError: one asked for more than was expected before; a bug, and the cache would be given memory twice.
    """
    most: dict[str, int] = {}
    for plan in compiled:
        for op, size in plan.workspaces.items():
            most[op] = max(size, most.get(op, 0))
    expected = checked.device_bytes["scratch"]
    for op, size in most.items():
        if size > expected:
            raise EngineError(
                f"{op} asked for {size} bytes of scratch, expected at most {expected}; this is a bug in seekforge"
            )
    return dict(sorted(most.items()))


def _in_all(counts: Mapping[str, Mapping[str, int]], uses: Mapping[str, int]) -> dict[str, int]:
    """Add up counts per plan, each as often as its plan is used."""
    sums: Counter[str] = Counter()
    for plan, of_plan in counts.items():
        sums.update({op: count * uses[plan] for op, count in of_plan.items()})
    return dict(sums)


def engine_parts(
    inputs: Inputs,
    checked: GpuBuild,
    options: BuildOptions,
    folder: Path,
    made: Made,
    audited: Audit,
    digests: Mapping[str, str],
) -> EngineParts:
    """Return what the engine writer needs to know of an engine for a GPU.

    Args:
        inputs: the program.
        checked: what the checks decided.
        options: the options of the build.
        folder: the engine's folder, with plans, kernels and perhaps digests of weights.
        made: what was compiled.
        audited: what the compiled plans really are.
        digests: op_type -> digest of its kernels.
    """
    target, graphs = checked.target, made.graphs
    assert target.backend != "onnxruntime"
    _, distribution, _ = MODULES[target.backend]
    version = next(iter(made.compiled.values())).version
    plans = dict.fromkeys(stage.file for name, graph in graphs.items() for stage in made.stages.get(name, (graph,)))
    files, sources = [*plans, *kernel_files(folder, made.kernels)], sources_of(made.kernels)
    if (folder / weight_digests.FILE).exists():
        files.append(weight_digests.FILE)
    return EngineParts(
        target=target,
        limits=checked.limits,
        kv_format=target.kv_format,
        graphs=graphs,
        stages=made.stages,
        bindings=engine_bindings(inputs, checked.how, checked.wide, nvfp4_experts=target.nvfp4_experts),
        files=files,
        versions={"onnx": onnx.__version__, distribution: version},
        runtime_versions={distribution: version},
        options={
            "activations": "bf16",
            "fp8_storage": checked.how.fp8_storage,
            "plugins": options.tensorrt.plugins,
            **({"precision": target.precision} if target.nvfp4_experts else {}),
            **({} if not options.tensorrt.providers else {"kernels": list(options.tensorrt.providers)}),
            **({} if options.layers_per_plan is None else {"layers_per_engine": options.layers_per_plan}),
            "compiler": {key: str(v) for key, v in asdict(options.tensorrt.compiler).items() if v is not None},
        },
        weights=inputs.weights,
        plugins={
            op: PluginUse(
                version=SPECS[op].version,
                products=target.products,
                kernel_digest=digests[op],
                kernel_source=sources.get(op, ""),
                num_layers=audited.plugins.get(op, 0),
            )
            for op in checked.plugins
        },
        profiles=made.profiles,
        min_driver=min_drivers(made.kernels),
        capturable={name: one.capturable for name, one in made.compiled.items() if one.capturable is not None},
        audit=audited,
        ranks=made.ranks,
    )


def engine_bindings(
    inputs: Inputs, how: Specialization, wide: Mapping[str, set[str]], *, nvfp4_experts: bool = False
) -> dict[str, dict[str, Recipe]]:
    """Return the program's recipes in the dtypes of the engine: graph -> weight input -> recipe.

    Args:
        inputs: the program.
        how: the dtypes of the specialization.
        wide: graph -> weight inputs that the engine holds in f32.
        nvfp4_experts: whether it has experts in NVFP4.
    """

    def retyped(recipe: Recipe, *, wide: bool) -> Recipe:
        stored = retarget(recipe, activations=how.activations, fp8_dtype=how.fp8_dtype)
        return cast(stored, "f32") if wide else stored

    bindings = {
        graph: {name: retyped(recipe, wide=name in wide[graph]) for name, recipe in recipes.items()}
        for graph, recipes in inputs.bindings.items()
    }
    if nvfp4_experts:
        for graph, recipes in inputs.bindings.items():
            bindings[graph] |= nvfp4_recipes(inputs.graphs[graph], recipes)
    return bindings
