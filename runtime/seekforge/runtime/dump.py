"""Run a plan of a parity check on an engine and write down what it computes. No torch, no onnx.

This is the engine's side of `seekforge parity`, in the runtime's own process and through the backend that serves:
what is compared is what users get. Each step is written before the next one runs.

A part of a model (a stage, or an engine that a check has cut between layers) computes nothing of what goes into it:
that comes from another side's dump.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np

from seekforge.common.errors import EngineError, RequestError
from seekforge.formats.dump import CHECKPOINT, Dump, DumpWriter, Side
from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.parity_steps import Case, ParitySteps, PlanStep, step_inputs
from seekforge.formats.step_io import DUMPED_RESULTS, INTERMEDIATE_TENSORS, StepInputs
from seekforge.runtime.backends.base import StepOutputs
from seekforge.runtime.values import is_integer, shown


class CacheBackend(Protocol):
    """The part of a backend that a dump needs: `Backend`, and a look at the caches."""

    def allocate_caches(self, num_blocks: int) -> None: ...

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = "model") -> StepOutputs: ...

    def cache(self, name: str) -> np.ndarray: ...


def engine_side(manifest: Manifest, name: str) -> Side:
    """Describe an engine as the maker of a dump."""
    packages = {"onnxruntime": ("onnxruntime",), "tensorrt-rtx": ("tensorrt-rtx",), "tensorrt": ("tensorrt",)}
    versions = {package: metadata.version(package) for package in packages[manifest.target.backend]}
    return Side(
        kind="engine",
        name=name,
        numerics=manifest.numerics,
        activations=manifest.build.get("activations", "bf16"),
        layers=manifest.layer_range,
        config=manifest.config,
        versions=versions,
        weights=precision if (precision := manifest.build.get("precision")) in ("int8", "int4") else CHECKPOINT,
    )


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
    backend: CacheBackend,
    manifest: Manifest,
    plan: ParitySteps,
    out: Path,
    *,
    name: str,
    taps: Collection[str] | None = None,
    given: Dump | None = None,
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
        given: another side's dump of the same plan: what goes into a part of a model, and into MTP steps.
        progress: called with the name of each case.

    Raises:
        RequestError: a case is longer than the engine accepts.
        ConfigError: `given` does not have what goes into this part.
        EngineError: the plan needs a graph that the engine does not have, or the engine is a part of a model and
            nothing is given.
    """
    limit = manifest.limits.max_model_len
    longest = max(case.context for case in plan.cases)
    if longest > limit:
        raise RequestError(f"a case has {longest} tokens, the engine accepts {limit}; ask for shorter --contexts")
    writer = DumpWriter(out, engine_side(manifest, name), plan)
    part = manifest.layer_range[1] < model_size(manifest, "num_hidden_layers")  # has no MTP module
    current: Case | None = None
    last: dict[str, PlanStep] = {}  # graph -> its last step in this case
    hidden = np.zeros(0)
    for number, case, step in plan.steps():
        if case is not current:
            progress(case.name)
            backend.allocate_caches(case.num_blocks)
            current, last = case, {step.graph: step for step in case.steps}
        if step.graph not in manifest.graphs:
            if part and step.graph == "mtp":
                continue
            raise EngineError(f"case {case.name!r} runs the graph {step.graph!r}, which the engine does not have")
        if given is not None and step.graph == "mtp":
            hidden = given.tensor(number - 1, "hidden")
        results = _run(backend, manifest, case, step, hidden, taps, _inputs_of(manifest, step.graph, given, number))
        if step.graph == "model" and "hidden" in results:
            hidden = results["hidden"]
        if step is last[step.graph]:
            results |= {f"cache_{kind}": value for kind, value in _caches(backend, manifest, step.graph).items()}
        writer.write(number, results)
    writer.close()


def _inputs_of(manifest: Manifest, graph: str, given: Dump | None, number: int) -> dict[str, tuple[str, np.ndarray]]:
    """Return what a step takes of another side: input -> (name in dumps, value)."""
    names: dict[str, str] = {}
    for spec in manifest.graphs[graph].inputs:
        kind, _, layer = spec.name.partition(".")
        if spec.name in INTERMEDIATE_TENSORS:
            names[spec.name] = f"{spec.name}.{manifest.layer_range[0]}"
        elif kind.removesuffix("_in") in INTERMEDIATE_TENSORS:
            names[spec.name] = f"{kind.removesuffix('_in')}.{layer}"
    if names and given is None:
        raise EngineError(
            f"the engine holds layers {manifest.layer_range[0]} to {manifest.layer_range[1] - 1} only: pass --given, a "
            "dump that shows what goes into them"
        )
    assert given is not None or not names
    return {name: (kept, given.tensor(number, kept)) for name, kept in names.items()}  # pyright: ignore


def _run(
    backend: CacheBackend,
    manifest: Manifest,
    case: Case,
    step: PlanStep,
    hidden: np.ndarray,
    taps: Collection[str] | None,
    given: dict[str, tuple[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    face = manifest.graphs[step.graph]
    names = {spec.name: spec.name for spec in face.outputs if spec.name in DUMPED_RESULTS}  # output -> name in the dump
    names |= {f"{name}_out": f"{name}.{manifest.layer_range[1]}" for name in INTERMEDIATE_TENSORS}
    names = {name: kept for name, kept in names.items() if any(spec.name == name for spec in face.outputs)}
    names |= {
        spec.name: spec.name
        for spec in face.outputs
        if spec.role in ("tap", "debug") and (taps is None or spec.name in taps)
    }
    inputs = replace(
        step_inputs(case, step),
        hidden_in=hidden if step.graph == "mtp" else None,
        given={name: value for name, (_, value) in given.items()},
    )
    outputs = backend.run(inputs, outputs=list(names), graph=step.graph)
    tensors = {kept: np.array(outputs.fetch(name)) for name, kept in names.items()}
    # of a stage, what went in is part of what it shows
    return {kept: value for name, (kept, value) in given.items() if name in INTERMEDIATE_TENSORS} | tensors


def _caches(backend: CacheBackend, manifest: Manifest, graph: str) -> dict[str, np.ndarray]:
    """Return `latent.3` and `index.3` of every layer of a graph, whole: [NB·64, width]; not those that are bytes."""
    names = [spec.name for spec in manifest.graphs[graph].with_role("cache") if spec.dtype in ("f32", "bf16")]
    return {name.replace("_cache", ""): np.array(backend.cache(name)) for name in names}
