"""What every kind of engine carries along from its program."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import onnx

from seekforge.exporter.rewrite.layers import truncate
from seekforge.plugins.errors import ProgramError
from seekforge.plugins.formats.bindings import Recipe
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.program import GraphIO, Program


def check_program(program: Program, bindings: dict[str, dict[str, Recipe]], folder: Path) -> None:
    """The program is for one rank, and every weight and table of every graph has a recipe, and no other.

    Raises:
        ProgramError: it is shared among ranks, or naming the first recipe that is wrong.
    """
    if program.tp * program.ep > 1:
        raise ProgramError(
            f"{folder}: is shared among {program.tp * program.ep} ranks (--tp {program.tp} --ep {program.ep}), and "
            "engines of several ranks are not built yet; export it without --tp and --ep"
        )
    for graph, face in program.graphs.items():
        wanted = {spec.name for role in ("weight", "table") for spec in face.with_role(role)}
        wrong = sorted(wanted ^ bindings.get(graph, {}).keys())
        if wrong:
            fault = "has no recipe" if wrong[0] in wanted else "is no weight of that graph"
            raise ProgramError(
                f"{folder / 'bindings.json'}: {wrong[0]!r} of graph {graph!r} {fault} by program.json; "
                "export the program again"
            )


def read_graph(folder: Path, face: GraphIO) -> onnx.ModelProto:
    """Read a graph of the program in `folder`.

    Raises:
        ProgramError: it cannot be read, or is not the one that the program describes.
    """
    path = folder / face.file
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ProgramError(f"{path}: cannot be read ({error.strerror}); export the program again") from None
    found = hashlib.sha256(raw).hexdigest()
    if found != face.sha256:
        raise ProgramError(f"{path}: digest {found[:12]}, program.json says {face.sha256[:12]}; export again")
    return onnx.load_from_string(raw)


def check_same_model(program: Program, config: ModelConfig, checkpoint: ModelConfig, folder: Path) -> None:
    """The checkpoint is of the model that the program was exported for; a truncated program takes the whole model's.

    Args:
        program: with `config`, parsed.
        checkpoint: config of the checkpoint in `folder`.

    Raises:
        ProgramError: naming the first key that differs.
    """
    found = checkpoint
    if program.truncated_from is not None and checkpoint.num_hidden_layers == program.truncated_from:
        found = truncate(checkpoint, config.num_hidden_layers)
    different = config.first_difference(found)
    if different is not None:
        key, ours, theirs = different
        raise ProgramError(
            f"{folder}: {key} is {theirs}, the program was exported for {ours}; "
            "pass the checkpoint it was exported from, or export again"
        )


def copy_text_files(program: Program, program_folder: Path, folder: Path) -> list[str]:
    """Copy tokenizer and chat files into an engine folder and return their names.

    Raises:
        ProgramError: one is missing.
    """
    for name in program.files:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(program_folder / name, place)
        except FileNotFoundError:
            raise ProgramError(f"{program_folder / name}: missing; export the program again") from None
    return list(program.files)


def generation_defaults(program_folder: Path) -> dict[str, float]:
    """Sampling defaults of generation_config.json; the model card's where the file is missing."""
    path = program_folder / "generation_config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"temperature": float(raw.get("temperature", 1.0)), "top_p": float(raw.get("top_p", 0.95))}
