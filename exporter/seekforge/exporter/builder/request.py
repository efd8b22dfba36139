"""What builds for every kind of target check of a program before work, and how its graphs are read."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from seekforge.common.dtypes import is_stored_as
from seekforge.common.errors import EngineError, ProgramError, SeekforgeError, TargetError
from seekforge.common.paths import inside
from seekforge.common.reading import read_bytes
from seekforge.exporter.builder.check_graph import GraphFault, check_graph, check_text
from seekforge.exporter.program.layers import truncate
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.limits import ONE_TOKEN_EACH, range_fault, step_fault
from seekforge.formats.engine.manifest import MANIFEST, Limits
from seekforge.formats.program import GraphIO, Program, TensorSpec
from seekforge.formats.weight_recipes import Recipe

if TYPE_CHECKING:
    import onnx

#: Protobuf's own limit.
_MOST_GRAPH_BYTES = 1 << 31


def check_program(program: Program, bindings: dict[str, dict[str, Recipe]], folder: Path) -> None:
    """Every weight and table of every graph has a recipe, and no other.

    Args:
        program, bindings: the program in `folder`.
        folder: its folder.

    Raises:
        ProgramError: naming the first recipe that is wrong.
    """
    for name, graph in program.graphs.items():
        recipes = bindings.get(name, {})
        wanted = {spec.name for role in ("weight", "table") for spec in graph.with_role(role)}
        wrong = sorted(wanted ^ recipes.keys())
        if wrong:
            fault = "has no recipe" if wrong[0] in wanted else "is no weight of that graph"
            raise ProgramError(
                f"{folder / 'bindings.json'}: {wrong[0]!r} of graph {name!r} {fault} by program.json; "
                "export the program again"
            )
        for spec in graph.inputs:
            recipe = recipes.get(spec.name)
            if spec.role in ("weight", "table") and recipe is not None:
                _check_recipe(spec, recipe, folder)


def _check_recipe(spec: TensorSpec, recipe: Recipe, folder: Path) -> None:
    if (recipe.shape, recipe.dtype) != (spec.shape, spec.dtype):
        raise ProgramError(
            f"{folder / 'bindings.json'}: {spec.name} is {recipe.dtype} {list(recipe.shape)}, program.json says "
            f"{spec.dtype} {list(spec.shape)}; export the program again"
        )


def check_takes(bindings: Mapping[str, Mapping[str, Recipe]], checkpoint: Checkpoint, folder: Path) -> None:
    """Every tensor that the recipes of the program in `folder` read is one of the checkpoint, as they expect it.

    Block scales may be stored in a narrower type, of which every value is one of the wider (`evaluate` widens them).

    Raises:
        ProgramError: naming the first that is not.
    """
    waiting = [recipe for recipes in bindings.values() for recipe in recipes.values()]
    while waiting:
        recipe = waiting.pop()
        waiting.extend(recipe.parts)
        if recipe.op != "take" or recipe.tensor is None:
            continue
        info = checkpoint.info(recipe.tensor) if recipe.tensor in checkpoint else None
        if info is None or info.shape != recipe.shape or not is_stored_as(info.dtype, recipe.dtype):
            has = "does not have it" if info is None else f"has {info.dtype} {list(info.shape)}"
            raise ProgramError(
                f"{folder / 'bindings.json'}: reads {recipe.tensor!r} as {recipe.dtype} {list(recipe.shape)}, the "
                f"checkpoint {checkpoint.folder} {has}; pass the checkpoint it was exported from, or export it again"
            )


def read_graph(folder: Path, graph: GraphIO) -> onnx.ModelProto:
    """Read a graph of the program in `folder`.

    Raises:
        ProgramError: it cannot be read, is not the one that the program describes, or none that `export` writes.
    """
    return _read_onnx(folder, graph, ProgramError, "program.json", "export the program again", checked=True)


def read_engine_graph(folder: Path, graph: GraphIO) -> onnx.ModelProto:
    """Read a graph of the CPU engine in `folder`, without its weights; its digest is checked where engines are opened.

    Raises:
        EngineError: it cannot be read.
    """
    return _read_onnx(folder, graph, EngineError, MANIFEST, "build the engine again", checked=False)


def _read_onnx(
    folder: Path, graph: GraphIO, error: type[SeekforgeError], listing: str, again: str, *, checked: bool
) -> onnx.ModelProto:
    path = inside(folder, graph.file, error=error, where=folder / listing, again=again)
    try:
        raw = read_bytes(path, most=_MOST_GRAPH_BYTES)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}); {again}") from None
    digest = hashlib.sha256(raw).hexdigest() if checked else graph.sha256
    if digest != graph.sha256:
        raise error(f"{path}: digest {digest[:12]}, {listing} says {graph.sha256[:12]}; {again}")
    import onnx  # here, so that what reads no graph needs no onnx

    try:
        model = onnx.load_from_string(raw)
    except Exception as problem:  # protobuf's and ONNX's have no common base
        raise error(f"{path}: is no ONNX file ({type(problem).__name__}); {again}") from None
    try:
        check_graph(model, graph) if checked else check_text(model)
    except GraphFault as fault:
        raise error(f"{path}: {fault}; {again}") from None
    return model


def check_same_model(program: Program, config: ModelConfig, checkpoint: ModelConfig, folder: Path) -> None:
    """The checkpoint is of the model that the program was exported for; a truncated program takes the whole model's.

    Args:
        program: the program.
        config: its config, parsed.
        checkpoint: the config of the checkpoint in `folder`.
        folder: the checkpoint's folder.

    Raises:
        ProgramError: naming the first key that differs.
    """
    compared = checkpoint
    if program.truncated_from is not None and checkpoint.num_hidden_layers == program.truncated_from:
        compared = truncate(checkpoint, config.num_hidden_layers)
    different = config.first_difference(compared)
    if different is not None:
        key, exported, there = different
        raise ProgramError(
            f"{folder}: {key} is {there}, the program was exported for {exported}; "
            "pass the checkpoint it was exported from, or export again"
        )


def fit_limits(limits: Limits, config: ModelConfig, named: Collection[str]) -> Limits:
    """Return the limits of an engine: those that the user named as they are, others cut to what is possible.

    Args:
        limits: the limits of the target, as options changed it.
        config: the program's config.
        named: the limits that the user named; the others are the target's defaults.

    Raises:
        TargetError: what was asked for cannot be.
    """
    longest = config.max_position_embeddings
    if "max_model_len" not in named:
        limits = limits.model_copy(update={"max_model_len": min(limits.max_model_len, longest)})
    fault = range_fault(limits, longest, _option)
    if fault is None and limits.max_batch_size > limits.max_num_batched_tokens:
        batch, tokens = limits.max_batch_size, limits.max_num_batched_tokens
        if "max_num_batched_tokens" not in named:
            raise TargetError(
                f"--max-batch-size is {batch}, and --max-num-batched-tokens is {tokens} where nothing is asked: "
                f"{ONE_TOKEN_EACH}; pass --max-num-batched-tokens {batch} too"
            )
        if "max_batch_size" not in named:
            return limits.model_copy(update={"max_batch_size": tokens})
        fault = step_fault(limits, _option)
    if fault is not None:
        raise TargetError(fault)
    return limits


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
