"""What a comparison runs, made once in a work folder: checkpoint, engines, and the same weights as GGUF files."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.cpu.rounds import ROOT, Side
from tests.support.oracle import write_dequantized

from seekforge import build, export
from seekforge.common.dtypes import itemsize
from seekforge.common.errors import EnvironmentFault, OptionError
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.program import load_bindings
from seekforge.formats.targets import CPU_PRECISIONS

#: Precision of an engine -> the format of GGUF files that holds about as much.
GGUF_OF: Final = {"f32": "F32", "int8": "Q8_0", "int4": "Q4_0"}


def read_precisions(text: str) -> list[str]:
    """Return the precisions of an option such as f32,int8.

    Raises:
        OptionError: one is none.
    """
    precisions = [name for name in text.split(",") if name]
    unknown = [name for name in precisions if name not in CPU_PRECISIONS]
    if unknown or not precisions:
        raise OptionError(f"--precisions is {text!r}, expected some of {','.join(CPU_PRECISIONS)}")
    return precisions


def make_checkpoint(work: Path, preset: str) -> Path:
    """Return the checkpoint of a work folder: a random one of the preset where there is none."""
    folder = work / "checkpoint"
    if not folder.is_dir():
        new_checkpoint(folder, preset)
    return folder


def make_engines(work: Path, preset: str, precisions: Sequence[str]) -> dict[str, Path]:
    """Make checkpoint, program and engines that are not there yet; return precision -> engine.

    Numerics are `exact`, since nobody else rounds activations to FP8.
    """
    checkpoint, program = make_checkpoint(work, preset), work / "program"
    engines = {precision: work / f"engine-{precision}" for precision in precisions}
    for precision, engine in engines.items():
        if engine.is_dir():
            continue
        if not program.is_dir():
            export(checkpoint, program, numerics="exact")
        build(program, engine, target="cpu", checkpoint=checkpoint, precision=precision)
    return engines


def dequantized(work: Path) -> Path:
    """Return the FP32 copy of the checkpoint that transformers and llama.cpp's converter load; made once."""
    folder, part = work / "f32", work / "f32.part"
    if not folder.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        write_dequantized(work / "checkpoint", part)
        for file in (work / "checkpoint").glob("tokenizer*.json"):
            shutil.copy(file, part)
        part.rename(folder)
    return folder


def check_converter(work: Path, kinds: Sequence[str], source: Path | None) -> None:
    """Refuse GGUF files that cannot be made: there is neither one of F32 nor a converter.

    Raises:
        EnvironmentFault: so it is.
    """
    if (work / "F32.gguf").is_file() or all((work / f"{kind}.gguf").is_file() for kind in kinds):
        return
    if source is None or not (source / "convert_hf_to_gguf.py").is_file():
        place = "no --llama-source" if source is None else f"no convert_hf_to_gguf.py in {source}"
        raise EnvironmentFault(
            f"{place}: weights become GGUF by llama.cpp's converter; name the folder of its source "
            "(the source package of llama-cpp-python has it as vendor/llama.cpp)"
        )


def write_ggufs(
    work: Path, kinds: Sequence[str], source: Path | None, options: dict[str, Any], python: str
) -> dict[str, Path]:
    """Make the GGUF files that are not there yet, F32 by llama.cpp's converter and others from it; return kind -> file.

    Args:
        work: the work folder, with its checkpoint.
        kinds: F32, or formats that llama.cpp quantizes to.
        source: the folder of llama.cpp's source, which has the converter; see `check_converter`.
        options: options of a side.
        python: the interpreter that has llama-cpp-python.

    Raises:
        EnvironmentFault: the converter or llama.cpp fails.
    """
    files = {kind: work / f"{kind}.gguf" for kind in kinds}
    plain = work / "F32.gguf"
    if not plain.is_file() and not all(file.is_file() for file in files.values()):
        part = plain.with_suffix(".part")
        command = [sys.executable, "-m", "tests.benchmarks.cpu.convert", str(source), dequantized(work), part]
        done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not part.is_file():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise EnvironmentFault(f"llama.cpp's converter failed: {last}")
        part.rename(plain)
    missing = [(kind, file) for kind, file in files.items() if not file.is_file()]
    if missing:
        with Side("llama.cpp", "tests.benchmarks.cpu.llama_cpp_side", options, python=python) as side:
            for kind, file in missing:
                part = file.with_suffix(".part")
                side.call("quantize", source=str(plain), out=str(part), kind=kind)
                part.rename(file)
    return files


def step_bytes(folder: Path) -> int:
    """Return the bytes of weights that one decode step needs: all but tables, embedding and experts not chosen."""
    config = load_manifest(folder).config
    share = config["num_experts_per_tok"] / config["n_routed_experts"]
    total = 0.0
    for name, recipe in load_bindings(folder)["model"].items():
        if name.startswith(("rope_", "embed_tokens")):
            continue
        size = math.prod(recipe.shape) * itemsize(recipe.dtype)
        total += size * (share if ".mlp.experts." in name else 1)
    return round(total)
