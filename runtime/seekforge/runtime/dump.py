"""Run a plan of a parity check on an engine and write down what it computes. No torch, no onnx.

This is the engine's side of `seekforge parity`, in the runtime's own process and through the backend that serves:
what is compared is what users get. Each step is written before the next one runs.

A part of a model (a stage, or an engine that a check has cut between layers) computes nothing of what goes into it:
that comes from another side's dump.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib import metadata
from pathlib import Path

import numpy as np

from seekforge.common.errors import EngineError, RequestError
from seekforge.common.requirements import onnxruntime_package
from seekforge.formats.dump import CHECKPOINT, NVFP4_EXPERTS, Dump, DumpWriter, Side
from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.parity_steps import ParitySteps, PlanStep
from seekforge.formats.step_io import DUMPED_RESULTS, INTERMEDIATE_TENSORS, MTP, TOPK_INDICES, TOPK_INDICES_IN
from seekforge.formats.step_runner import CacheReader, run_steps
from seekforge.runtime.values import is_integer, shown


def engine_side(manifest: Manifest, name: str) -> Side:
    """Describe an engine as the maker of a dump."""
    packages = {"onnxruntime": (onnxruntime_package(),), "tensorrt-rtx": ("tensorrt-rtx",), "tensorrt": ("tensorrt",)}
    versions = {package: metadata.version(package) for package in packages[manifest.target.backend]}
    return Side(
        kind="engine",
        name=name,
        numerics=manifest.numerics,
        activations=manifest.build.get("activations", "bf16"),
        layers=manifest.layer_range,
        config=manifest.config,
        versions=versions,
        weights=_weights(manifest),
        quantization=manifest.quantization,
    )


def _weights(manifest: Manifest) -> str:
    """Return how an engine has its weights, as `Side.weights` says it."""
    if manifest.quantization is not None:
        return manifest.quantization.smallest
    return NVFP4_EXPERTS if manifest.build.get("precision") == NVFP4_EXPERTS else CHECKPOINT


def model_size(manifest: Manifest, key: str) -> int:
    """Return a size of the model from the checkpoint's config.json, which the manifest holds.

    Raises:
        EngineError: it is not there, or no whole number.
    """
    value = manifest.config.get(key)
    if not isinstance(value, int) or not is_integer(value):
        raise EngineError(f"manifest.json, key 'config': {key} is {shown(value)}, expected a whole number; build again")
    return int(value)


def write_dump(
    backend: CacheReader,
    manifest: Manifest,
    plan: ParitySteps,
    out: Path,
    *,
    name: str,
    taps: Collection[str] | None = None,
    inputs: Dump | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> None:
    """Run every step of `plan` and store results, taps and, after the last step of a graph in a case, its caches.

    Args:
        backend: the opened engine.
        manifest: the manifest of the engine.
        plan: what to run.
        out: an empty folder.
        name: what the report calls this side.
        taps: names of tap outputs to keep; None keeps all that the engine gives.
        inputs: another side's dump of the same plan: what goes into a part of a model, and into MTP steps.
        progress: called with the name of each case.

    Raises:
        RequestError: a case is longer than the engine accepts.
        ConfigError: `inputs` does not have what goes into this part.
        EngineError: the plan needs a graph that the engine does not have, or the engine is a part of a model and
            there is no dump of what goes into it.
    """
    _check_runs(manifest, plan)
    kept = {graph: _kept_outputs(manifest, graph, taps) for graph in manifest.graphs}
    taken = {graph: _taken_inputs(manifest, graph, inputs) for graph in manifest.graphs}
    last = plan.last_steps()
    writer = DumpWriter(out, engine_side(manifest, name), plan)

    def inputs_of(number: int, step: PlanStep) -> dict[str, np.ndarray]:
        if inputs is None:
            return {}
        tensors = {of_graph: inputs.tensor(number, of_dump) for of_graph, of_dump in taken[step.graph].items()}
        return tensors | ({"hidden_in": inputs.tensor(number - 1, "hidden")} if step.graph == MTP else {})

    for ran in run_steps(
        backend,
        plan,
        lambda step: list(kept[step.graph]),
        graphs=manifest.graphs,
        inputs=inputs_of,
        on_case=lambda case: progress(case.name),
    ):
        graph = ran.step.graph
        # of a stage, what went in is part of what it shows
        tensors = {
            taken[graph][of_graph]: value
            for of_graph, value in ran.inputs.intermediate_tensors.items()
            if of_graph in INTERMEDIATE_TENSORS or of_graph == TOPK_INDICES_IN
        }
        tensors |= {kept[graph][of_graph]: value for of_graph, value in ran.tensors.items()}
        if ran.number in last:
            tensors |= {f"cache_{kind}": value for kind, value in _caches(backend, manifest, graph).items()}
        writer.write(ran.number, tensors)
    writer.close()


def _check_runs(manifest: Manifest, plan: ParitySteps) -> None:
    """Refuse steps that the engine cannot run, before any is run."""
    limit = manifest.limits.max_model_len
    longest = max(case.context for case in plan.cases)
    if longest > limit:
        raise RequestError(f"a case has {longest} tokens, the engine accepts {limit}; ask for shorter --contexts")
    is_part = manifest.layer_range[1] < model_size(manifest, "num_hidden_layers")  # has no MTP module
    for _, case, step in plan.steps():
        if step.graph not in manifest.graphs and not (is_part and step.graph == MTP):
            raise EngineError(f"case {case.name!r} runs the graph {step.graph!r}, which the engine does not have")


def _kept_outputs(manifest: Manifest, graph: str, taps: Collection[str] | None) -> dict[str, str]:
    """Return the outputs of a graph that are stored -> their names in a dump."""
    outputs = manifest.graphs[graph].outputs
    names = {name: name for name in DUMPED_RESULTS}
    handed = (*INTERMEDIATE_TENSORS, TOPK_INDICES)
    names |= {f"{name}_out": f"{name}.{manifest.layer_range[1]}" for name in handed}
    names |= {spec.name: spec.name for spec in outputs if spec.role in ("tap", "debug")}
    is_tap = {spec.name: spec.role in ("tap", "debug") for spec in outputs}
    return {
        name: of_dump
        for name, of_dump in names.items()
        if name in is_tap and (not is_tap[name] or taps is None or name in taps)
    }


def _taken_inputs(manifest: Manifest, graph: str, inputs: Dump | None) -> dict[str, str]:
    """Return the inputs of a graph that another side's dump holds -> their names there.

    Raises:
        EngineError: there are such inputs, and no dump.
    """
    names: dict[str, str] = {}
    for spec in manifest.graphs[graph].inputs:
        kind, _, layer = spec.name.partition(".")
        point = kind.removesuffix("_in")
        if spec.name in INTERMEDIATE_TENSORS or spec.name == TOPK_INDICES_IN:
            names[spec.name] = f"{point}.{manifest.layer_range[0]}"
        elif point in INTERMEDIATE_TENSORS or (point == TOPK_INDICES and kind != point):
            names[spec.name] = f"{point}.{layer}"
    if names and inputs is None:
        raise EngineError(
            f"the engine holds layers {manifest.layer_range[0]} to {manifest.layer_range[1] - 1} only: pass --inputs, "
            "a dump that shows what goes into them"
        )
    return names


def _caches(backend: CacheReader, manifest: Manifest, graph: str) -> dict[str, np.ndarray]:
    """Return `latent.3` and `index.3` of every layer of a graph, whole: [NB·64, width]; not those that are bytes."""
    names = [spec.name for spec in manifest.graphs[graph].with_role("cache") if spec.dtype in ("f32", "bf16")]
    return {name.replace("_cache", ""): np.array(backend.cache(name)) for name in names}
