"""The formats that are read from foreign folders: for each a seed, how it is mutated, and every function that reads it.

A case passes if reading ends well or in a `SeekforgeError` of one line and bounded length. Anything else is a finding:
another exception (a panic of a Rust library too), a message of many lines, a value that makes a reader allocate.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tests.fuzz.mutate import mutate_bytes, mutated_copy, mutated_text, places, to_text

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import SeekforgeError
from seekforge.common.files import json_text
from seekforge.exporter.builder.generation import read_generation
from seekforge.exporter.builder.request import check_program
from seekforge.exporter.checkpoint.presets import read_preset
from seekforge.exporter.inspect.describe import bytes_read
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.dump import Dump
from seekforge.formats.engine.manifest import Manifest, load_manifest, manifest_digest, rebuild_command
from seekforge.formats.parallelism import ONE_RANK, Parallelism
from seekforge.formats.program import load_bindings, load_program
from seekforge.formats.targets import load_target
from seekforge.formats.weight_recipes import Recipe, coverage, evaluate, for_rank, retarget
from seekforge.plugins.kernels.arguments import CallArguments
from seekforge.plugins.kernels.index import Descriptors, read_index
from seekforge.plugins.kernels.kernel_set import read_kernels
from seekforge.runtime.compatibility import check_complete
from seekforge.runtime.engine.cache_size import cache_budget
from seekforge.runtime.text.tokenizer import Tokenizer

#: Longest message of any refusal.
MOST_CHARACTERS = 4100


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        file: name of the file in the folder of a case.
        seed: returns the unspoilt file.
        mutate: returns the bytes of a case.
        read: what readers do with the folder.
        beside: other files of the folder, unspoilt.
    """

    file: str
    seed: Callable[[], bytes]
    mutate: Callable[[random.Random], bytes]
    read: Callable[[Path], object]
    beside: Mapping[str, bytes] = field(default_factory=dict)

    def prepare(self, folder: Path) -> None:
        """Write the unspoilt files."""
        for name, raw in {**self.beside, self.file: self.seed()}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw)


def run_case(one: Format, folder: Path, seed: int) -> str | None:
    """Run one case in a folder that was prepared; returns what was found, None: nothing."""
    raw = one.mutate(random.Random(seed))
    spoilt = folder / one.file
    spoilt.unlink(missing_ok=True)  # a file that is cut to nothing and written again is flushed by some file systems
    spoilt.write_bytes(raw)
    return judge(one, folder)


def judge(one: Format, folder: Path) -> str | None:
    """Read a folder; returns what was found, None: nothing."""
    try:
        one.read(folder)
    except SeekforgeError as error:
        text = str(error)
        if len(text) > MOST_CHARACTERS:
            return f"a message of {len(text)} characters"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"a message that cannot be printed: {text[:200]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def _json(value: Any) -> Callable[[random.Random], bytes]:
    text = json.dumps(value)
    return lambda rng: mutated_text(text, rng)


def _sealed(value: dict[str, Any]) -> Callable[[random.Random], bytes]:
    """Mutate a manifest and, mostly, digest it anew: else nothing but its digest would be read."""

    mark = "d" * 64
    text = json.dumps(value | {"digest": mark})

    def mutate(rng: random.Random) -> bytes:
        value = raw = None
        if rng.random() < 0.8:
            value = mutated_copy(text, rng)
        else:
            raw = mutate_bytes(text.encode(), rng)
        if rng.random() < 0.9:
            try:
                value = json.loads(raw) if raw is not None else value
                if isinstance(value, dict) and value.get("digest") == mark:
                    value["digest"] = manifest_digest(value)
                    raw = None
            except (ValueError, TypeError, RecursionError):
                pass  # of what no manifest can hold
        return to_text(value).encode("utf-8", "surrogatepass") if raw is None else raw

    return mutate


def _yaml(value: Any) -> Callable[[random.Random], bytes]:
    text, plain = yaml.safe_dump(value, sort_keys=False).encode(), json.dumps(value)
    odd = (
        b"&a [*a]",
        b"2001-99-01",
        b"!!binary a",
        b"? [1]",
        b"<<: {a: 1}",
        b".inf",
        b"1:30",
        b"---\n",
        b"%YAML 9",
        b"=",
    )

    def mutate(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutated_text(plain, rng)  # JSON is YAML
        lines = mutate_bytes(text, rng).split(b"\n")
        if rng.random() < 0.5:
            at = rng.randrange(len(lines))
            lines[at] = lines[at].partition(b":")[0] + b": " + rng.choice(odd)
        return b"\n".join(lines)

    return mutate


def _whole_json(value: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(value).encode()


def _whole_sealed(value: dict[str, Any]) -> Callable[[], bytes]:
    return lambda: json_text(value | {"digest": manifest_digest(value)}).encode()


def _whole_yaml(value: Any) -> Callable[[], bytes]:
    return lambda: yaml.safe_dump(value, sort_keys=False).encode()


def _plain_shard(header: dict[str, Any], size: int) -> Callable[[], bytes]:
    text = json.dumps(header).encode()
    return lambda: struct.pack("<Q", len(text)) + text + bytes(size)


def _read_manifest(folder: Path) -> None:
    manifest: Manifest = load_manifest(folder)
    rebuild_command(folder, manifest)
    manifest.uses()
    manifest.max_cache_blocks()
    cache_budget(manifest, 1 << 30)
    check_complete(folder, manifest)


def _program_reader() -> Callable[[Path], None]:
    bindings = functools.cache(load_bindings)  # they are not what is spoilt

    def read(folder: Path) -> None:
        program = load_program(folder)
        program.__class__.model_validate(program.model_dump(mode="json"))
        ModelConfig.parse(program.config, "program.json")
        check_program(program, bindings(folder), folder)

    return read


class _Zeros:
    """The tensors that the unspoilt bindings read, all zero; of others there are none, as in a checkpoint."""

    def __init__(self, bindings: dict[str, Any]) -> None:
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}
        for container, key in places(bindings):
            if key == "tensor" and container["op"] == "take":
                self._known[container["tensor"]] = tuple(container["shape"]), container["dtype"]

    def has(self, recipe: Recipe) -> bool:
        if recipe.op == "take":
            return self._known.get(recipe.tensor or "") == (recipe.shape, recipe.dtype)
        return all(map(self.has, recipe.parts)) and math.prod(recipe.shape) <= 1 << 17

    def tensor(self, name: str) -> np.ndarray:
        shape, dtype = self._known[name]
        return np.zeros(shape, NUMPY[dtype])


def _read_bindings(folder: Path, zeros: _Zeros) -> None:
    for recipes in load_bindings(folder).values():
        coverage(recipes)
        for recipe in recipes.values():
            retarget(recipe, activations="f32", fp8_dtype="f8e4m3")
            bytes_read(for_rank(recipe, ONE_RANK, 0))
            for_rank(recipe, Parallelism(tp=2), 1)
            mine = for_rank(recipe, ONE_RANK, 0)
            if zeros.has(mine) and mine.op != "split" and not math.prod(mine.shape) > 1 << 17:
                evaluate(mine, zeros)


def _read_dump(folder: Path) -> None:
    dump = Dump.open(folder)
    for step in range(len(dump.cases)):
        dump.arrays(step)
        for name in dump.names(step):
            dump.tensor(step, name)


def _read_kernels(folder: Path) -> None:
    kernels = read_kernels(folder / "op.json")
    for image in kernels.images.values():
        CallArguments([(image, {param.name: 0 for param in image.params if param.name})], [])


def _read_kernel_index(folder: Path) -> None:
    read_index(folder / "kernels")
    Descriptors(folder, 89).find("DsaIndexer", "0" * 64)


def _read_checkpoint(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        for name in checkpoint.names:
            checkpoint.tensor(name)
        checkpoint.index_digest()


def _read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.json")
    tokenizer.decode(tokenizer.encode("the cat sat on 12,345 mats 🎉 <think>\n"))


def _safetensors(header: dict[str, Any], size: int) -> Callable[[random.Random], bytes]:
    seed = json.dumps(header)

    def mutate(rng: random.Random) -> bytes:
        text = mutated_text(seed, rng)
        length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(text) + 1))
        return struct.pack("<Q", length) + text + bytes(size)

    return mutate


def formats(
    *, manifest: dict[str, Any], gpu_manifest: dict[str, Any], program: dict[str, Any], bindings: dict[str, Any],
    program_bindings: dict[str, Any], dump: dict[str, Any], dump_files: dict[str, bytes], config: dict[str, Any],
    generation: dict[str, Any], tokenizer: dict[str, Any], target: dict[str, Any], preset: dict[str, Any],
    index: dict[str, Any], kernels: dict[str, Any], kernel_index: dict[str, Any],
) -> dict[str, Format]:  # fmt: skip
    """Return every format by name, made of files as the commands write them."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F8_E4M3", "shape": [8, 1], "data_offsets": [32, 40]},
    }
    small = copy.deepcopy(bindings)
    for graph, recipes in small["graphs"].items():
        kept = {}
        for name, recipe in recipes.items():  # one of each form
            kept.setdefault((recipe["op"], recipe["dtype"]), (name, recipe))
        small["graphs"][graph] = dict(kept.values())
    small["graphs"].pop("mtp", None)
    for container, key in places(small):
        if key == "parts" and container["op"] == "stack":
            container["parts"] = container["parts"][:2]
            container["shape"][0] = 2
    zeros = _Zeros(small)
    own_config = ModelConfig.parse(config, "config.json")
    made = {
        "manifest": Format("manifest.json", _whole_sealed(manifest), _sealed(manifest), _read_manifest),
        "gpu manifest": Format("manifest.json", _whole_sealed(gpu_manifest), _sealed(gpu_manifest), _read_manifest),
        "shard": Format("model.safetensors", _plain_shard(header, 40), _safetensors(header, 40), _read_checkpoint),
    }
    of_json: dict[str, tuple[str, Any, Callable[[Path], object]]] = {
        "program": ("program.json", program, _program_reader()),
        "bindings": ("bindings.json", small, lambda folder: _read_bindings(folder, zeros)),
        "dump": ("dump.json", dump, _read_dump),
        "config": ("config.json", config, ModelConfig.load),
        "generation config": ("generation_config.json", generation, lambda folder: read_generation(folder, own_config)),
        "tokenizer": ("tokenizer.json", tokenizer, _read_tokenizer),
        "index": ("model.safetensors.index.json", index, _read_checkpoint),
        "kernel descriptor": ("op.json", kernels, _read_kernels),
        "kernel index": ("kernels/index.json", kernel_index, _read_kernel_index),
    }
    of_yaml: dict[str, tuple[Any, Callable[[Path], object]]] = {
        "target": (target, lambda folder: load_target(str(folder / "own.yaml"))),
        "preset": (preset, lambda folder: read_preset(folder / "own.yaml")),
    }
    beside = {
        "program": {"bindings.json": json.dumps(program_bindings).encode()},
        "dump": dump_files,
        "index": {"model.safetensors": made["shard"].seed()},
        "kernel index": {"kernels/sm89/a.json": b"{}"},
    }
    for name, (file, value, read) in of_json.items():
        made[name] = Format(file, _whole_json(value), _json(value), read, beside.get(name, {}))
    for name, (value, read) in of_yaml.items():
        made[name] = Format("own.yaml", _whole_yaml(value), _yaml(value), read)
    return made
