"""program.json and bindings.json: what a canonical program computes, takes and gives."""

from __future__ import annotations

import gc
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from seekforge.common.errors import ProgramError
from seekforge.common.files import write_json
from seekforge.common.paths import RelativePath, inside, same_names
from seekforge.common.reading import LISTING_BYTES, read_json
from seekforge.common.records import Record, RecordError
from seekforge.formats.parallelism import ONE_RANK, Parallelism
from seekforge.formats.weight_recipes import Recipe, read_recipe

#: Raised when a reader of the previous number would misread a program.
PROGRAM_FORMAT = 3

#: Ranks of one replica are fewer; readers look at each.
_MOST_RANKS = 4096

#: What text needs, carried from a checkpoint to a program and an engine.
TEMPLATE_FILE = "chat_template.jinja"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", TEMPLATE_FILE)

#: `intermediate`: what one plan of an engine gives to a later one (see `Manifest.stages`).
Role = Literal["token", "bookkeeping", "table", "weight", "cache", "result", "tap", "debug", "intermediate"]


#: Kind of tensor, its name before the layer -> role, where the name tells it.
_ROLES: dict[str, Role] = {
    "rope_cos": "table",
    "rope_sin": "table",
    "hadamard": "table",
    "expert_map": "table",
    "vocab_start": "table",
    "latent_cache": "cache",
    "index_cache": "cache",
    "latent_cache_out": "cache",
    "index_cache_out": "cache",
    "topk_indices": "tap",
    "expert_ids": "tap",
    "positions": "bookkeeping",
    "slot_mapping": "bookkeeping",
    "block_table": "bookkeeping",
    "logits_index": "bookkeeping",
    "input_ids": "token",
    "hidden_in": "token",
    "hidden_states": "token",
    "residual": "token",
    "topk_indices_in": "token",
}


def role_of(name: str) -> Role | None:
    """Return the role of a tensor by its name, such as `latent_cache.3`; None where the name does not tell."""
    return _ROLES.get(name.partition(".")[0])


#: The layer whose weight, cache or tap an input or output is.
LAYER = re.compile(r"^(?:layers\.(\d+)\.|(?:latent_cache|index_cache|topk_indices|expert_ids)(?:_out)?\.(\d+)$)")


def layer_of(name: str) -> int | None:
    """Return the layer that an input or output belongs to, or None."""
    match = LAYER.match(name)
    return None if match is None else int(match[1] or match[2])


class TensorSpec(Record):
    """One input or output of a graph. A string in `shape` is a symbolic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: Role


class GraphIO(Record):
    """What one ONNX graph takes and gives.

    Attributes:
        file: file name beside the JSON.
        sha256: digest of that file.
        inputs, outputs: descriptions in graph order.
        aliases: output name -> input name of each cache that is updated in place.
    """

    file: RelativePath
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: dict[str, str]

    def named(self, name: str) -> TensorSpec:
        """Return the input or output called `name`."""
        return next(spec for spec in (*self.inputs, *self.outputs) if spec.name == name)

    def with_role(self, role: Role) -> list[TensorSpec]:
        """Return the inputs of one role, in graph order."""
        return [spec for spec in self.inputs if spec.role == role]


class OpUse(Record):
    """How the program uses one operator: all its nodes share version and attributes."""

    version: int
    attributes: dict[str, float | int | str]
    num_nodes: int


class Program(Record):
    """program.json.

    Attributes:
        layer_range: [a, b): layers of the main model in `model.onnx`.
        numerics: fields of `formats.numerics.Numerics`.
        config: the checkpoint's config.json; of a truncated model, as it is for the first layers alone.
        truncated_from: `num_hidden_layers` of the checkpoint, when the program is its first layers as a whole model.
        ops: op name -> use, over all graphs.
        graphs: "model", and "mtp" when the model has an MTP layer and the range ends at the last layer.
        unused: checkpoint tensors that no input reads, with the reason.
        outside: what other ranges read: `model.layers.7.*` or a tensor's name -> how many tensors.
        parallelism: how many ranks share the model, and how. Tensor-parallel ranks run these graphs; of `model.onnx`
            each of them runs the layers of its pipeline stage, and those of the last stage run `mtp.onnx`.
        pipeline_stages: [a, b) of each stage; together the layers of `layer_range`.
        shared: checkpoint tensors that several inputs read, with those inputs ("graph:input").
        files: tokenizer files carried along, relative to the program folder.
    """

    format: int
    seekforge_version: str
    opset: int
    layer_range: tuple[int, int]
    pipeline_stages: tuple[tuple[int, int], ...]
    numerics: dict[str, Any]
    config: dict[str, Any]
    ops: dict[str, OpUse]
    graphs: dict[str, GraphIO]
    unused: dict[str, str]
    shared: dict[str, list[str]]
    files: tuple[RelativePath, ...]
    truncated_from: int | None = None
    outside: dict[str, int] = field(default_factory=dict)
    parallelism: Parallelism = ONE_RANK

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parallelism.dp != 1:
            problem = f"is {self.parallelism.dp}, expected 1: a program is that of one replica"
            raise RecordError(problem, ("parallelism", "dp"))
        if self.parallelism.num_ranks > _MOST_RANKS:
            problem = f"is of {self.parallelism.num_ranks:,} ranks, expected at most {_MOST_RANKS:,}"
            raise RecordError(problem, ("parallelism",))
        borders = [self.layer_range[0], *(stop for _, stop in self.pipeline_stages)]
        ranges = tuple(itertools.pairwise(borders))
        if (
            len(ranges) != self.parallelism.pp
            or ranges != self.pipeline_stages
            or borders[-1] != self.layer_range[1]
            or any(start >= stop for start, stop in ranges)
        ):
            expected = f"{self.parallelism.pp} adjacent ranges of the layers {list(self.layer_range)}"
            raise RecordError(
                f"is {list(map(list, self.pipeline_stages))!r:.200}, expected {expected}", ("pipeline_stages",)
            )
        for index, name in enumerate(self.files):
            if name not in TEXT_FILES:
                expected = f"{', '.join(TEXT_FILES[:-1])} or {TEXT_FILES[-1]}"
                raise RecordError(f"is {name!r}, expected {expected}; export again", ("files", index))
        twice = same_names(self.files)
        if twice is not None:
            raise RecordError(f"has {twice[0]!r} and {twice[1]!r}, expected each file once", ("files",))

    @property
    def gives_logits(self) -> bool:
        """Whether `model.onnx` takes token ids and gives logits: a whole (or truncated) model, not a stage of one."""
        return self.layer_range == (0, self.config["num_hidden_layers"])


def save_program(folder: Path, program: Program, bindings: dict[str, dict[str, Recipe]]) -> None:
    """Write program.json and bindings.json (graph name -> input name -> recipe) into `folder`."""
    save_bindings(folder, bindings)
    write_json(folder / "program.json", program.model_dump(mode="json"))


def save_bindings(folder: Path, bindings: Mapping[str, Mapping[str, Recipe]]) -> None:
    """Write bindings.json: graph name -> input name -> recipe. In a CPU engine: of the constants of each graph."""
    raw = {graph: {name: recipe.to_dict() for name, recipe in recipes.items()} for graph, recipes in bindings.items()}
    text = json.dumps({"format": PROGRAM_FORMAT, "graphs": raw}, ensure_ascii=False, separators=(",", ":"))
    (folder / "bindings.json").write_text(text + "\n", encoding="utf-8")


def load_program(folder: Path) -> Program:
    """Read and check program.json.

    Raises:
        ProgramError: not a program folder, another format version, or malformed.
    """
    raw = _read(folder, "program.json")
    try:
        return Program.model_validate(raw)
    except RecordError as error:
        raise ProgramError(f"{folder / 'program.json'}: {error}; export the program again") from None


def listed_files(folder: Path, program: Program) -> list[Path]:
    """Return the paths of the files that are carried along with a program; none of them is read.

    Args:
        folder: the program folder.
        program: program.json of that folder.

    Raises:
        ProgramError: one is missing, leads out of the folder, is no regular file, or is larger than any.
    """
    paths: list[Path] = []
    for name in program.files:
        path = inside(folder, name, error=ProgramError, where=folder / "program.json", again="export the program again")
        try:
            size = path.stat().st_size
        except OSError as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise ProgramError(f"{path}: {reason}; export the program again") from None
        if size > LISTING_BYTES:
            raise ProgramError(f"{path}: has {size:,} bytes, expected at most {LISTING_BYTES:,}")
        paths.append(path)
    return paths


def load_bindings(folder: Path) -> dict[str, dict[str, Recipe]]:
    """Read bindings.json: graph name -> input name -> recipe.

    Raises:
        ProgramError: as `load_program`.
    """
    collects = gc.isenabled()
    gc.disable()  # it would look at every new value again and again: a third of the time that 671B takes
    try:
        return _read_bindings(folder)
    finally:
        if collects:
            gc.enable()


def _read_bindings(folder: Path) -> dict[str, dict[str, Recipe]]:
    graphs = _read(folder, "bindings.json").get("graphs")
    if not isinstance(graphs, dict) or not all(isinstance(recipes, dict) for recipes in graphs.values()):
        raise ProgramError(
            f"{folder / 'bindings.json'}: 'graphs' is malformed, expected graph -> input -> recipe; "
            "export the program again"
        )
    return {graph: {name: read_recipe(recipe) for name, recipe in recipes.items()} for graph, recipes in graphs.items()}


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        raw = read_json(path, most=LISTING_BYTES)
    except OSError as error:
        raise ProgramError(
            f"{path}: cannot be read ({error.strerror}); expected a folder written by 'seekforge export'"
        ) from None
    except ValueError as error:
        raise ProgramError(f"{path}: not valid JSON ({error}); export the program again") from None
    if not isinstance(raw, dict) or raw.get("format") != PROGRAM_FORMAT:
        number = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ProgramError(
            f"{path}: format {number!r}, this seekforge reads format {PROGRAM_FORMAT}; export the program again"
        )
    return raw
