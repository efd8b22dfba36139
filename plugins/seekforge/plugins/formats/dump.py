"""What two sides of a parity check are told to run, and how what they computed is written down.

A plan lists cases (whole prefill, chunked, decode, ragged batch, MTP) as steps over paged caches; every side runs the
same plan. A dump is a folder: `dump.json` (who ran what, and where each tensor is) and safetensors files of one step
and one layer each, so that a side can write layer by layer or step by step and a reader holds one tensor at a time.
NumPy only: an engine's dump is made without torch, on another machine if need be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seekforge.plugins.errors import ConfigError
from seekforge.plugins.formats.files import write_json
from seekforge.plugins.formats.program import BLOCK_SIZE
from seekforge.plugins.formats.records import Record, RecordError

DUMP_FORMAT = 1
INDEX = "dump.json"
#: Weights of a side that has them as they are in the checkpoint.
CHECKPOINT = "checkpoint"

Mode = Literal["whole", "chunked", "decode", "ragged", "mtp"]
MODES: tuple[Mode, ...] = ("whole", "chunked", "decode", "ragged", "mtp")
#: Rows of full logits that one step keeps at most, in bytes: 2,048 rows of 129,280 ids would be a gigabyte.
_LOGIT_BYTES = 64 << 20

_TYPES = {"F32": np.dtype(np.float32), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
_WORDS = {dtype: word for word, dtype in _TYPES.items()}


# --- the plan -----------------------------------------------------------------------------------------------


class PlanStep(Record):
    """One rectangular step.

    Attributes:
        graph: which program runs it. An `mtp` step is fed the `hidden` of the step before it.
        sequences: which sequences of the case have new tokens.
        tokens: their new tokens; starts: the position of the first of each.
        logits_index: rows of the flattened [B, Q] whose logits are kept.
    """

    graph: Literal["model", "mtp"]
    sequences: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    logits_index: tuple[int, ...]


class Case(Record):
    """Steps that share caches. `tables`: the blocks of each sequence, in shuffled order; block 0 is scrap."""

    name: str
    mode: Mode
    context: int
    tables: tuple[tuple[int, ...], ...]
    num_blocks: int
    steps: tuple[PlanStep, ...]


class Plan(Record):
    """What every side runs."""

    cases: tuple[Case, ...]

    def steps(self) -> Iterator[tuple[int, Case, PlanStep]]:
        """Yield (number over all cases, case, step) in order."""
        number = 0
        for case in self.cases:
            for step in case.steps:
                yield number, case, step
                number += 1


@dataclass(frozen=True)
class StepArrays:
    """The arrays of one step: input_ids, positions, slot_mapping [B, Q] int64, in padded places 0, −1, −1;
    block_table [B, MB] int32; logits_index [N] int64."""

    input_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    block_table: np.ndarray
    logits_index: np.ndarray

    @property
    def real(self) -> np.ndarray:
        """[B·Q] bool: rows that are not padding."""
        return self.positions.reshape(-1) >= 0


def lay_out(case: Case, step: PlanStep) -> StepArrays:
    """Return the arrays of a step; short rows are padded on the right, tables reach to the last token."""
    rows, width = len(step.tokens), max(len(row) for row in step.tokens)
    ids = np.zeros((rows, width), np.int64)
    positions = np.full((rows, width), -1, np.int64)
    slots = np.full((rows, width), -1, np.int64)
    reach = max(-(-(start + len(new)) // BLOCK_SIZE) for start, new in zip(step.starts, step.tokens, strict=True))
    table = np.zeros((rows, reach), np.int32)
    for row, (sequence, new, start) in enumerate(zip(step.sequences, step.tokens, step.starts, strict=True)):
        n = len(new)
        blocks = case.tables[sequence][:reach]
        table[row, : len(blocks)] = blocks
        ids[row, :n] = new
        where = np.arange(start, start + n)
        positions[row, :n] = where
        slots[row, :n] = table[row, where // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + where % BLOCK_SIZE
    return StepArrays(ids, positions, slots, table, np.array(step.logits_index, np.int64))


def make_plan(
    *,
    contexts: Sequence[int],
    vocab_size: int,
    index_topk: int,
    has_mtp: bool,
    modes: Sequence[Mode] = MODES,
    prompts: Sequence[Sequence[int]] = (),
    seed: int = 0,
) -> Plan:
    """Plan the cases of every mode and context, on random tokens or on prompts.

    Args:
        contexts: lengths of random token sequences; ignored where `prompts` are given.
        vocab_size: of the model. Random ids leave out the first 16 and the padded end.
        index_topk: chunks have a border there.
        has_mtp: whether the MTP module can be run.
        modes: which ways of cutting a sequence into steps.
        prompts: token ids; each is run in the modes too, `ragged` batches all of them.
        seed: of the random tokens and of the order of blocks.
    """
    rng = np.random.default_rng(seed)

    def random_ids(length: int) -> list[int]:
        return rng.integers(min(16, vocab_size // 2), vocab_size * 7 // 8, length).tolist()

    cases: list[Case] = []
    texts = [list(prompt) for prompt in prompts] or [random_ids(context) for context in contexts]
    for number, text in enumerate(texts):
        label = f"prompt {number}" if prompts else f"{len(text)}"
        for mode in modes:
            if mode == "mtp" and (not has_mtp or len(text) < 2):
                continue
            sequences = [text]
            if mode == "ragged":
                if len(text) < 3:
                    continue
                sequences = [text, text[: len(text) // 3 + 1], text[-min(5, len(text)) :]]
            cases.append(_case(f"{mode} {label}", mode, sequences, vocab_size, index_topk, rng))
    if not cases:
        raise ConfigError("the plan is empty: no context or prompt is long enough for the modes asked for")
    return Plan(cases=tuple(cases))


def parse_contexts(text: str) -> tuple[int, ...]:
    """Read `16,2048`.

    Raises:
        ConfigError: a part is no number of at least 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) >= 1 for part in parts):
        raise ConfigError(f"--contexts is {text!r}, expected numbers of tokens separated by commas, such as 16,2048")
    return tuple(int(part) for part in parts)


def parse_modes(text: str) -> tuple[Mode, ...]:
    """Read `whole,decode`.

    Raises:
        ConfigError: a part is no mode.
    """
    parts = [part.strip() for part in text.split(",")]
    unknown = [part for part in parts if part not in MODES]
    if unknown:
        raise ConfigError(f"--modes has {unknown[0]!r}, expected some of {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in parts)


def _case(
    name: str, mode: Mode, sequences: list[list[int]], vocab_size: int, index_topk: int, rng: np.random.Generator
) -> Case:
    needed = [-(-len(sequence) // BLOCK_SIZE) for sequence in sequences]
    order = (rng.permutation(sum(needed)) + 1).tolist()
    tables = [tuple(order[sum(needed[:i]) : sum(needed[: i + 1])]) for i in range(len(needed))]
    plans = [chunks(mode, len(sequence), index_topk) for sequence in sequences]
    done = [0] * len(sequences)
    steps: list[PlanStep] = []
    for turn in range(max(len(plan) for plan in plans)):
        active = [i for i, plan in enumerate(plans) if turn < len(plan)]
        new = [tuple(sequences[i][done[i] : done[i] + plans[i][turn]]) for i in active]
        starts = tuple(done[i] for i in active)
        steps.append(_step("model", active, new, starts, vocab_size))
        if mode == "mtp":  # t_{i+1} beside h_i: one token more than the model was fed is known
            ahead = [tuple(sequences[i][s + 1 : s + 1 + len(row)]) for i, s, row in zip(active, starts, new)]
            steps.append(_step("mtp", active, ahead, starts, vocab_size))
        for i, row in zip(active, new, strict=True):
            done[i] += len(row)
    context = max(len(sequence) for sequence in sequences)
    return Case(
        name=name,
        mode=mode,
        context=context,
        tables=tuple(tables),
        num_blocks=sum(needed) + 2,
        steps=tuple(steps),
    )


def chunks(mode: Mode, length: int, index_topk: int) -> list[int]:
    """Return how many new tokens each step of one sequence has."""
    if mode == "mtp":
        length -= 1
    if mode == "whole":
        return [length]
    if mode == "decode":
        prefill = max(0, length - 8)
        return ([prefill] if prefill else []) + [1] * (length - prefill)
    if mode in ("mtp", "ragged"):
        last = min(3, length - 1)
        return [length - last] + [1] * last
    sizes, done = [], 0
    # a border at index_topk where that is in reach, and others that are no multiple of a block
    for size in [min(index_topk, max(1, length // 2)), 37, *[max(131, length // 4)] * length]:
        if done == length:
            break
        sizes.append(min(size, length - done))
        done += sizes[-1]
    return sizes


def _step(
    graph: Literal["model", "mtp"],
    sequences: Sequence[int],
    tokens: Sequence[tuple[int, ...]],
    starts: Sequence[int],
    vocab_size: int,
) -> PlanStep:
    width = max(len(row) for row in tokens)
    rows = np.array([i * width + j for i, row in enumerate(tokens) for j in range(len(row))])
    keep = max(1, _LOGIT_BYTES // (4 * vocab_size))
    if len(rows) > keep:
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, keep).round().astype(int))]
    return PlanStep(
        graph=graph,
        sequences=tuple(sequences),
        tokens=tuple(tokens),
        starts=tuple(starts),
        logits_index=tuple(rows.tolist()),
    )


# --- the dump -----------------------------------------------------------------------------------------------


class Side(Record):
    """Who made a dump.

    Attributes:
        kind: engine, torch or transformers.
        name: the engine's or checkpoint's folder name, for people.
        numerics: fields of `formats.numerics.Numerics`.
        activations: dtype that it computed in.
        weights: int8 or int4 where an engine rounded its weights to codes; else as the checkpoint has them.
        layers: [a, b) of the main model that it ran.
        config: the model's config.json.
        versions: of what ran it.
    """

    kind: Literal["engine", "torch", "transformers"]
    name: str
    numerics: dict[str, Any]
    activations: str
    layers: tuple[int, int]
    config: dict[str, Any]
    versions: dict[str, str]
    weights: str = CHECKPOINT


class _Tensor(Record):
    file: str
    dtype: str
    shape: tuple[int, ...]


class _Index(Record):
    format: int
    side: Side
    plan: Plan
    tensors: tuple[dict[str, _Tensor], ...]


def layer_of(name: str) -> int | None:
    """Return the layer in a tensor name such as `attn_out.3`, or None for one of a whole step."""
    number = name.rpartition(".")[2]
    return int(number) if number.isdigit() else None


class DumpWriter:
    """Writes a dump into a folder that exists and is empty; `close` makes it readable."""

    def __init__(self, folder: Path, side: Side, plan: Plan) -> None:
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
    """A dump folder; tensors are mapped when asked for."""

    def __init__(self, folder: Path, index: _Index) -> None:
        self.folder, self.side, self.plan = folder, index.side, index.plan
        self._tensors = index.tensors
        self.cases = [(case, step) for _, case, step in self.plan.steps()]

    @staticmethod
    def open(folder: Path) -> Dump:
        """Read the index.

        Raises:
            ConfigError: not a dump folder, of another version, or malformed.
        """
        path = folder / INDEX
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw, dict) or raw.get("format") != DUMP_FORMAT:
                found = raw.get("format") if isinstance(raw, dict) else None
                raise ConfigError(f"{path}: dump format {found!r}, this seekforge reads {DUMP_FORMAT}; make it again")
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

    def arrays(self, step: int) -> StepArrays:
        """Return the inputs of a step."""
        return lay_out(*self.cases[step])

    def tensor(self, step: int, name: str) -> np.ndarray:
        """Map one tensor.

        Raises:
            ConfigError: the dump does not have it, or its file is damaged.
        """
        entry = self._tensors[step].get(name)
        if entry is None:
            raise ConfigError(f"{self.folder}: step {step} has no tensor {name!r}; make the dump again with taps")
        found = _read_safetensors(self.folder / entry.file, name)
        if found.shape != entry.shape:
            raise ConfigError(f"{self.folder / entry.file}: {name} is {found.shape}, {INDEX} says {entry.shape}")
        return found

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


def _read_safetensors(path: Path, name: str) -> np.ndarray:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(size))[name]
        start, stop = entry["data_offsets"]
        dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
        if stop - start != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise ValueError("sizes do not fit")
        if start == stop:
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, mode="r", offset=8 + size + start, shape=shape)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: {name} cannot be read ({error}); copy the dump again") from None
