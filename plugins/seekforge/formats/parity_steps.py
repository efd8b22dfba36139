"""What every side of a parity check is told to run: cases cut into steps over paged caches. NumPy only.

`step_runner.run_steps` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from seekforge.common.errors import ConfigError
from seekforge.common.reading import LISTING_BYTES, read_text
from seekforge.common.records import Record, RecordError, at_least
from seekforge.formats.paged_cache import BLOCK_SIZE, blocks_needed
from seekforge.formats.step_io import MODEL, MTP, StepInputs, lay_out

Mode = Literal["whole", "chunked", "decode", "ragged", "mtp"]
MODES: tuple[Mode, ...] = ("whole", "chunked", "decode", "ragged", "mtp")
#: Rows of full logits that one step keeps at most, in bytes: 2,048 rows of 129,280 ids would be a gigabyte.
_LOGIT_BYTES = 64 << 20


class PlanStep(Record):
    """One rectangular step.

    Attributes:
        graph: the graph that runs it. An `mtp` step is fed the `hidden` of the step before it.
        sequences: the sequences of the case that have new tokens.
        tokens: their new tokens.
        starts: the position of the first new token of each.
        logits_index: rows of the flattened [B, Q] whose logits are kept.
    """

    graph: Literal["model", "mtp"]
    sequences: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    logits_index: tuple[int, ...]

    def places(self) -> list[tuple[int, int]]:
        """Return (sequence, position) of each new token: of each row that is not padding."""
        return [
            (sequence, start + i)
            for sequence, start, new in zip(self.sequences, self.starts, self.tokens, strict=True)
            for i in range(len(new))
        ]


class Case(Record):
    """Steps that share caches.

    Attributes:
        name: what reports call it.
        mode: how its sequences are cut.
        context: tokens of its longest sequence.
        tables: the blocks of each sequence, in shuffled order; block 0 is scrap.
        num_blocks: blocks of the caches.
        steps: what is run, in order.
    """

    name: str
    mode: Mode
    context: int
    tables: tuple[tuple[int, ...], ...]
    num_blocks: Annotated[int, at_least(1, 1 << 24)]
    steps: tuple[PlanStep, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= block < self.num_blocks for table in self.tables for block in table):
            raise RecordError(f"has blocks out of range, expected 0 to {self.num_blocks - 1}", ("tables",))
        for number, step in enumerate(self.steps):
            fault = self._fault(step)
            if fault is not None:
                raise RecordError(fault, ("steps", number))

    def _fault(self, step: PlanStep) -> str | None:
        """Return what is wrong with a step of this case."""
        rows = len(step.sequences)
        if not rows or not rows == len(step.tokens) == len(step.starts) or not all(step.tokens):
            return "expected a sequence, its new tokens (at least one) and its start for each row"
        if not all(0 <= one < len(self.tables) for one in step.sequences):
            return f"has a sequence without a table, expected 0 to {len(self.tables) - 1}"
        ends = [start + len(new) for start, new in zip(step.starts, step.tokens, strict=True)]
        if min(step.starts) < 0 or max(ends) > self.context:
            return f"has positions out of range, expected 0 to {self.context - 1}"
        if any(end > len(self.tables[one]) * BLOCK_SIZE for one, end in zip(step.sequences, ends, strict=True)):
            return "has positions beyond the blocks of its sequence"
        if not all(0 <= token < 1 << 31 for new in step.tokens for token in new):
            return "has token ids out of range"
        width = max(len(new) for new in step.tokens)
        if not all(0 <= row < rows * width for row in step.logits_index):
            return f"has rows of logits out of range, expected 0 to {rows * width - 1}"
        return None


class ParitySteps(Record):
    """The cases that every side runs."""

    cases: tuple[Case, ...]

    def steps(self) -> Iterator[tuple[int, Case, PlanStep]]:
        """Yield (number over all cases, case, step) in order."""
        number = 0
        for case in self.cases:
            for step in case.steps:
                yield number, case, step
                number += 1

    def last_steps(self) -> set[int]:
        """Return the number of the last step of each graph in each case: there the caches are looked at."""
        return set({(case.name, step.graph): number for number, case, step in self.steps()}.values())


def step_inputs(case: Case, step: PlanStep) -> StepInputs:
    """Return the arrays of a step; tables reach to the last token."""
    reach = max(blocks_needed(start + len(new)) for start, new in zip(step.starts, step.tokens, strict=True))
    return lay_out(step.tokens, step.starts, [case.tables[one][:reach] for one in step.sequences], step.logits_index)


def make_plan(
    *,
    contexts: Sequence[int],
    vocab_size: int,
    index_topk: int,
    has_mtp: bool,
    modes: Sequence[Mode] = MODES,
    prompts: Sequence[Sequence[int]] = (),
    seed: int = 0,
) -> ParitySteps:
    """Return the cases of every mode and context, on random tokens or on prompts.

    Args:
        contexts: lengths of random token sequences; ignored where `prompts` are given.
        vocab_size: the vocabulary size of the model. Random ids leave out the first 16 and the padded end.
        index_topk: chunks have a border there; 0 for a model that attends to all keys.
        has_mtp: whether the MTP module can be run.
        modes: the ways of cutting a sequence into steps.
        prompts: token ids; each is run in the modes too, `ragged` batches all of them.
        seed: the seed of the random tokens and of the order of blocks.
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
                lengths = ragged_lengths(len(text))
                sequences = [text, text[: lengths[1]], text[-lengths[2] :]]
            sizes = [chunks(mode, len(sequence), index_topk) for sequence in sequences]
            cases.append(make_case(f"{mode} {label}", mode, sequences, sizes, vocab_size, rng))
    if not cases:
        raise ConfigError("the plan is empty: no context or prompt is long enough for the modes asked for")
    return ParitySteps(cases=tuple(cases))


def shuffled_tables(lengths: Sequence[int], rng: np.random.Generator) -> tuple[list[tuple[int, ...]], int]:
    """Give each sequence blocks for `lengths` tokens in random order; returns (tables, number of blocks).

    Block 0 is scrap and never handed out; one spare block at the end belongs to nobody.
    """
    needed = [blocks_needed(length) for length in lengths]
    order = (rng.permutation(sum(needed)) + 1).tolist()
    return [tuple(order[sum(needed[:i]) : sum(needed[: i + 1])]) for i in range(len(needed))], sum(needed) + 2


def make_case(
    name: str,
    mode: Mode,
    sequences: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[int]],
    vocab_size: int,
    rng: np.random.Generator,
) -> Case:
    """Cut sequences that share caches into steps.

    Args:
        name: what reports call the case.
        mode: `mtp` runs the MTP module behind every step of the model; the others differ by `sizes` alone.
        sequences: the tokens of each.
        sizes: how many new tokens each step of a sequence has, as `chunks` returns them.
        vocab_size: bounds the rows of logits that a step keeps.
        rng: draws the order of the blocks.
    """
    tables, num_blocks = shuffled_tables([len(sequence) for sequence in sequences], rng)
    done = [0] * len(sequences)
    steps: list[PlanStep] = []
    for turn in range(max(len(one) for one in sizes)):
        active = [i for i, one in enumerate(sizes) if turn < len(one)]
        new = [tuple(sequences[i][done[i] : done[i] + sizes[i][turn]]) for i in active]
        starts = tuple(done[i] for i in active)
        steps.append(_step(MODEL, active, new, starts, vocab_size))
        if mode == "mtp":  # t_{i+1} beside h_i: one token more than the model was fed is known
            ahead = [tuple(sequences[i][s + 1 : s + 1 + len(row)]) for i, s, row in zip(active, starts, new)]
            steps.append(_step(MTP, active, ahead, starts, vocab_size))
        for i, row in zip(active, new, strict=True):
            done[i] += len(row)
    context = max(len(sequence) for sequence in sequences)
    return Case(name=name, mode=mode, context=context, tables=tuple(tables), num_blocks=num_blocks, steps=tuple(steps))


def ragged_lengths(length: int) -> tuple[int, int, int]:
    """Return the lengths of the very different sequences that one ragged case runs together."""
    return length, length // 3 + 1, min(5, length)


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
    # a border at index_topk where there is one in reach, and others that are no multiple of a block
    first = [min(index_topk, max(1, length // 2))] if index_topk else []
    for size in [*first, 37, *[max(131, length // 4)] * length]:
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


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file: a line each, empty ones passed over.

    Raises:
        ConfigError: it cannot be read, is no text, or holds none.
    """
    expected = "expected one prompt a line"
    try:
        lines = read_text(path, most=LISTING_BYTES).split("\n")  # at nothing else: prompts may hold U+2028
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {expected}") from None
    except ValueError:
        raise ConfigError(f"{path}: not UTF-8 text; {expected}") from None
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt; {expected}")
    return prompts
