"""How what one side of a parity check computed is written down.

A dump is a folder: `dump.json` (who ran what, and where each tensor is) and safetensors files of one step and one layer
each, so that a side can write layer by layer or step by step and a reader holds one tensor at a time. NumPy only: an
engine's dump is made without torch, on another machine if need be.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from seekforge.common.dtypes import NUMPY, SAFETENSORS
from seekforge.common.errors import ConfigError
from seekforge.common.files import write_json
from seekforge.common.paths import RelativePath, inside
from seekforge.common.reading import LISTING_BYTES, SETTINGS_BYTES, check_regular, parse_json, read_json
from seekforge.common.records import Record, RecordError, Size
from seekforge.common.system import read_all_at
from seekforge.formats.int_quant import Quantization
from seekforge.formats.parity_steps import ParitySteps, step_inputs
from seekforge.formats.step_io import StepInputs

DUMP_FORMAT = 1
INDEX = "dump.json"
#: Headers, and layouts of steps, that a reader remembers: a walk through a layer reads a few hundred again and again.
_REMEMBERED = 512
#: Weights of a side that has them as they are in the checkpoint.
CHECKPOINT = "checkpoint"
#: Weights of a side that has routed experts in NVFP4, as engines of precision nvfp4.
NVFP4_EXPERTS = "nvfp4"

_Word = Literal["F32", "I32", "I64"]
_TYPES: dict[_Word, np.dtype] = {
    word: NUMPY[name] for word in get_args(_Word) for name, other in SAFETENSORS.items() if other == word
}
_WORDS: dict[np.dtype, _Word] = {dtype: word for word, dtype in _TYPES.items()}


class Side(Record):
    """Who made a dump.

    Attributes:
        kind: engine, torch or transformers.
        name: the engine's or checkpoint's folder name, for people.
        numerics: fields of `formats.numerics.Numerics`.
        activations: dtype that it computed in.
        weights: int8 or int4 where an engine rounded its weights to codes, the smaller of both; nvfp4 where routed
            experts are; else as the checkpoint has them.
        quantization: which of them are such codes; None: none.
        layers: [a, b) of the main model that it ran.
        config: the model's config.json.
        versions: the versions of what ran it.
    """

    kind: Literal["engine", "torch", "transformers"]
    name: str
    numerics: dict[str, Any]
    activations: str
    layers: tuple[int, int]
    config: dict[str, Any]
    versions: dict[str, str]
    weights: str = CHECKPOINT
    quantization: Quantization | None = None


class _Tensor(Record):
    file: RelativePath
    dtype: _Word
    shape: tuple[Size, ...]


class _Index(Record):
    format: int
    side: Side
    plan: ParitySteps
    tensors: tuple[dict[str, _Tensor], ...]


def layer_of(name: str) -> int | None:
    """Return the layer in a tensor name such as `attn_out.3`, or None for one of a whole step."""
    number = name.rpartition(".")[2]
    return int(number) if number.isascii() and number.isdigit() and len(number) < 10 else None


class DumpWriter:
    """Writes a dump into a folder that exists and is empty; `close` makes it readable."""

    def __init__(self, folder: Path, side: Side, plan: ParitySteps) -> None:
        self.folder, self.side, self.plan = folder, side, plan
        self._tensors: list[dict[str, _Tensor]] = [{} for _ in plan.steps()]
        self._files = 0
        self.num_bytes = 0

    def write(self, step: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Store tensors of one step, those of each layer in a file of their own."""
        groups: dict[int | None, dict[str, np.ndarray]] = {}
        for name, array in tensors.items():
            groups.setdefault(layer_of(name), {})[name] = array
        for layer, group in groups.items():
            file = f"{step:05d}-{'step' if layer is None else layer}-{self._files}.safetensors"
            self._files += 1
            _write_safetensors(self.folder / file, group)
            for name, array in group.items():
                self._tensors[step][name] = _Tensor(file=file, dtype=_WORDS[array.dtype], shape=array.shape)
                self.num_bytes += array.nbytes

    def close(self) -> None:
        """Write the index."""
        index = _Index(format=DUMP_FORMAT, side=self.side, plan=self.plan, tensors=tuple(self._tensors))
        write_json(self.folder / INDEX, index.model_dump(mode="json"))


class Dump:
    """A dump folder; tensors are read when asked for."""

    def __init__(self, folder: Path, index: _Index) -> None:
        self.folder, self.side, self.plan = folder, index.side, index.plan
        self._tensors = index.tensors
        self.cases = [(case, step) for _, case, step in self.plan.steps()]
        self._header = functools.lru_cache(_REMEMBERED)(self._read_header)
        self._layout = functools.lru_cache(_REMEMBERED)(lambda step: step_inputs(*self.cases[step]))

    @staticmethod
    def open(folder: Path) -> Dump:
        """Read the index.

        Raises:
            ConfigError: not a dump folder, of another version, or malformed.
        """
        path = folder / INDEX
        try:
            raw = read_json(path, most=LISTING_BYTES)
            if not isinstance(raw, dict) or raw.get("format") != DUMP_FORMAT:
                number = raw.get("format") if isinstance(raw, dict) else None
                raise ConfigError(f"{path}: dump format {number!r}, this seekforge reads {DUMP_FORMAT}; make it again")
            index = _Index.model_validate(raw)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); expected a folder written by 'seekforge parity --save' "
                "or 'seekforge dump'"
            ) from None
        except RecordError as error:
            raise ConfigError(f"{path}: {error}; make the dump again") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not valid JSON ({error}); make the dump again") from None
        if len(index.tensors) != sum(1 for _ in index.plan.steps()):
            raise ConfigError(f"{path}: {len(index.tensors)} steps listed, the plan has another number; make it again")
        return Dump(folder, index)

    def names(self, step: int) -> list[str]:
        """Return the tensors of a step."""
        return list(self._tensors[step])

    def has(self, step: int, *names: str) -> bool:
        """Return whether a step has all of these tensors."""
        return all(name in self._tensors[step] for name in names)

    def arrays(self, step: int) -> StepInputs:
        """Return the inputs of a step."""
        return self._layout(step)

    def tensor(self, step: int, name: str) -> np.ndarray:
        """Read one tensor.

        Raises:
            ConfigError: the dump does not have it, or its file is damaged.
        """
        entry = self._tensors[step].get(name)
        if entry is None:
            raise ConfigError(f"{self.folder}: step {step} has no tensor {name!r}; make the dump again with taps")
        try:
            path, header = self._header(entry.file)
        except (OSError, ValueError) as error:
            raise _unreadable(self.folder / entry.file, name, error) from None
        array = _read_tensor(path, header, name)
        if array.shape != entry.shape or array.dtype != _TYPES[entry.dtype]:
            raise ConfigError(
                f"{path}: {name} is {array.dtype} {array.shape}, {INDEX} says {_TYPES[entry.dtype]} {entry.shape}"
            )
        return array

    def _read_header(self, file: str) -> tuple[Path, _Header]:
        path = inside(self.folder, file, error=ConfigError, where=self.folder / INDEX, again="make the dump again")
        return path, _read_header(path)

    def rows(self, step: int, name: str) -> np.ndarray:
        """Return a tensor over tokens, [B·Q, width] or [B, Q, ...], as [real tokens, ...] without padding."""
        array = self.tensor(step, name)
        real = self.arrays(step).real
        flat = array if array.ndim == 2 else array.reshape(len(real), *array.shape[2:])
        return np.asarray(flat[real])


def _write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": _WORDS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).data)


class _Header(NamedTuple):
    """What the start of a safetensors file says: its entries, where their bytes begin, and where the file ends."""

    entries: dict[str, Any]
    begin: int
    end: int


def _read_header(path: Path) -> _Header:
    num_bytes = check_regular(path).st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(num_bytes, SETTINGS_BYTES):
            raise ValueError(f"its header of {size} bytes is larger than expected")
        return _Header(parse_json(file.read(size)), 8 + size, num_bytes)


def _read_tensor(path: Path, header: _Header, name: str) -> np.ndarray:
    try:
        entry = header.entries[name]
        start, stop = entry["data_offsets"]
        dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
        if not all(type(value) is int and value >= 0 for value in (start, stop, *shape)):
            raise ValueError("sizes are no whole numbers")
        if stop - start != dtype.itemsize * math.prod(shape) or header.begin + stop > header.end:
            raise ValueError("sizes do not fit")
        array = np.empty(shape, dtype)
        with path.open("rb", buffering=0) as file:
            out = array.reshape(-1).view(np.uint8)
            if read_all_at(file.fileno(), out.data, header.begin + start) < out.size:
                raise ValueError("it ends early")
        return array
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, name, error) from None


def _unreadable(path: Path, name: str, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: {name} cannot be read ({error}); copy the dump again")
