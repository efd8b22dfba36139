"""Backends without a model, for tests and for measuring what the runtime itself costs.

`NullBackend`: the next token is a hash of the whole history, read back through the block table from a cache of token
ids. So a wrong slot, table or position gives wrong tokens: schedulers are tested against `expected_token`. Its MTP
graph continues the hash from the hidden state, and checks that every entry of its own cache continues the one before.

`FixedBackend` does nothing at all: what a step takes on it is what the runtime costs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from seekforge.formats.paged_cache import SCRAP_BLOCK
from seekforge.formats.step_io import MODEL, StepInputs
from seekforge.runtime.backends.base import GraphMetrics

_PRIME = 1_000_003
_START = 7
#: Logit of the tokens that are not among the largest.
_TAIL = -16.0


class NullStepOutputs:
    """Results as plain arrays."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self._values = values

    def fetch(self, name: str) -> np.ndarray:
        """Return one output."""
        return self._values[name]


class NullBackend:
    """Deterministic: logits are a ramp over the vocabulary that starts at the hashed token.

    Attributes:
        draft_period: every n-th draft, by its hash, is wrong; 0 makes all right.
        num_runs: graph name -> steps.
    """

    def __init__(self, vocab_size: int, num_top_logits: int, block_size: int, *, draft_period: int = 0) -> None:
        self.vocab_size = vocab_size
        self.num_top_logits = num_top_logits
        self.block_size = block_size
        self.draft_period = draft_period
        self.num_runs = {"model": 0, "mtp": 0}
        self._slots = np.zeros(0, np.int64)
        self._mtp = np.zeros((0, 2), np.int64)
        self._ramp = -0.5 * np.arange(vocab_size, dtype=np.float32)
        self._logsumexp = np.float32(np.log(np.exp(self._ramp.astype(np.float64)).sum()))

    def allocate_caches(self, num_blocks: int) -> None:
        """Make empty caches: one token id per slot, −1 where nothing was written; for MTP also the hash up to it."""
        self._slots = np.full(num_blocks * self.block_size, -1, np.int64)
        self._mtp = np.full((num_blocks * self.block_size, 2), -1, np.int64)

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL) -> NullStepOutputs:
        """Write the tokens, then hash the history of each token."""
        self.num_runs[graph] += 1
        real = inputs.slot_mapping >= 0
        slots = inputs.slot_mapping[real]
        assert (slots // self.block_size != SCRAP_BLOCK).all(), "a real token was sent to the scrap block"
        assert len(np.unique(slots)) == len(slots), "two tokens share a slot"
        hashes = np.zeros(inputs.input_ids.shape, np.int64)
        if graph == MODEL:
            self._slots[slots] = inputs.input_ids[real]
            wanted = np.argwhere(real) if "hidden" in outputs else self._places(inputs)
            for sequence, column in wanted:
                if real[sequence, column]:
                    hashes[sequence, column] = self._hash(inputs, sequence, column)
        else:
            assert inputs.hidden_in is not None
            before = np.rint(inputs.hidden_in[..., 0]).astype(np.int64)
            hashes = (before * 31 + inputs.input_ids + 1) % _PRIME
            self._mtp[slots] = np.stack([inputs.input_ids[real], hashes[real]], axis=1)
            for sequence, column in self._places(inputs):
                if real[sequence, column]:
                    self._check_mtp(inputs, sequence, column)
        rows = hashes.reshape(-1)[inputs.logits_index]
        first = rows % self.vocab_size
        if graph != MODEL and self.draft_period:
            first = np.where(rows % self.draft_period == 0, (first + 1) % self.vocab_size, first)
        ids = (first[:, None] + np.arange(self.vocab_size)) % self.vocab_size
        logits = np.empty(ids.shape, np.float32)
        np.put_along_axis(logits, ids, np.broadcast_to(self._ramp, ids.shape), axis=1)
        top = slice(0, self.num_top_logits)
        results = {
            "hidden": hashes[..., None].astype(np.float32),
            "top_ids": ids[:, top].astype(np.int32),
            "top_logits": np.repeat(self._ramp[None, top], len(first), axis=0),
            "logsumexp": np.full(len(first), self._logsumexp),
            "logits": logits,
        }
        return NullStepOutputs({name: value for name, value in results.items() if name in outputs})

    def graph_metrics(self) -> GraphMetrics:
        """Return zeros: there are no CUDA graphs."""
        return GraphMetrics()

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """There are none."""

    def close(self) -> None:
        """Give back the caches."""
        self._slots = np.zeros(0, np.int64)

    def _places(self, inputs: StepInputs) -> list[tuple[int, int]]:
        width = inputs.input_ids.shape[1]
        return [divmod(int(row), width) for row in inputs.logits_index]

    def _read(self, cache: np.ndarray, inputs: StepInputs, sequence: int, column: int) -> np.ndarray:
        positions = np.arange(inputs.positions[sequence, column] + 1)
        blocks = inputs.block_table[sequence, positions // self.block_size].astype(np.int64)
        history = cache[blocks * self.block_size + positions % self.block_size]
        assert (history >= 0).all(), "a position was read that was never written"
        return history

    def _hash(self, inputs: StepInputs, sequence: int, column: int) -> int:
        return _hash(self._read(self._slots, inputs, sequence, column).tolist())

    def _check_mtp(self, inputs: StepInputs, sequence: int, column: int) -> None:
        history = self._read(self._mtp, inputs, sequence, column)
        tokens, hashes = history[1:, 0], history[:, 1]
        assert (hashes[1:] == (hashes[:-1] * 31 + tokens + 1) % _PRIME).all(), "an MTP entry is of another sequence"


class FixedBackend:
    """Gives the same results at every step, made once per number of rows."""

    def __init__(self, vocab_size: int, num_top_logits: int, hidden_size: int = 64, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.num_top_logits = num_top_logits
        self.hidden_size = hidden_size
        self._rng = np.random.default_rng(seed)
        self._made: dict[int, dict[str, np.ndarray]] = {}

    def allocate_caches(self, num_blocks: int) -> None:
        """Nothing to make."""

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL) -> NullStepOutputs:
        """Look the results up."""
        count = len(inputs.logits_index)
        if count not in self._made:
            self._made[count] = self._make(count)
        values = self._made[count]
        if "logits" in outputs and "logits" not in values:
            values["logits"] = np.full((count, self.vocab_size), _TAIL, np.float32)
            np.put_along_axis(values["logits"], values["top_ids"].astype(np.int64), values["top_logits"], axis=1)
        if "hidden" in outputs:
            values = values | {"hidden": np.zeros((*inputs.input_ids.shape, self.hidden_size), np.float32)}
        return NullStepOutputs(values)

    def graph_metrics(self) -> GraphMetrics:
        """Return zeros: there are no CUDA graphs."""
        return GraphMetrics()

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """There are none."""

    def close(self) -> None:
        """Nothing to give back."""

    def _make(self, count: int) -> dict[str, np.ndarray]:
        logits = np.sort(self._rng.standard_normal((count, self.num_top_logits)).astype(np.float32) * 3)[:, ::-1]
        ids = self._rng.integers(2, self.vocab_size - self.num_top_logits, (count, 1)) + np.arange(self.num_top_logits)
        tail = (self.vocab_size - self.num_top_logits) * np.exp(_TAIL)
        logsumexp = np.log(np.exp(logits.astype(np.float64)).sum(1) + tail).astype(np.float32)
        return {
            "top_logits": np.ascontiguousarray(logits),
            "top_ids": ids.astype(np.int32),
            "logsumexp": logsumexp,
        }


def _hash(history: Iterable[int]) -> int:
    value = _START
    for token in history:
        value = (value * 31 + token + 1) % _PRIME
    return value


def expected_token(history: Iterable[int], vocab_size: int) -> int:
    """Return the token that `NullBackend` likes best after `history`."""
    return _hash(history) % vocab_size
