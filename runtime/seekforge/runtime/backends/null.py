"""A backend without a model, for tests and for measuring what the runtime itself costs.

The next token is a hash of the whole history, read back through the block table from a cache of token ids. So a
wrong slot, table or position gives wrong tokens: schedulers are tested against `expected_token`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from seekforge.runtime.backends.base import MODEL, StepInputs
from seekforge.runtime.kv_cache import SCRAP_BLOCK

_PRIME = 1_000_003


class NullStepOutputs:
    """Results as plain arrays."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self._values = values

    def fetch(self, name: str) -> np.ndarray:
        """Return one output."""
        return self._values[name]


class NullBackend:
    """Deterministic: logits are a ramp over the vocabulary that starts at the hashed token."""

    def __init__(self, vocab_size: int, num_top_logits: int, block_size: int) -> None:
        self.vocab_size = vocab_size
        self.num_top_logits = num_top_logits
        self.block_size = block_size
        self._slots = np.zeros(0, np.int64)
        self._ramp = -0.5 * np.arange(vocab_size, dtype=np.float32)
        self._logsumexp = np.float32(np.log(np.exp(self._ramp.astype(np.float64)).sum()))

    def allocate_caches(self, num_blocks: int) -> None:
        """Make an empty cache: one token id per slot, −1 where nothing was written."""
        self._slots = np.full(num_blocks * self.block_size, -1, np.int64)

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL) -> NullStepOutputs:
        """Write the tokens, then hash the history of each wanted row."""
        real = inputs.slot_mapping >= 0
        slots = inputs.slot_mapping[real]
        assert (slots // self.block_size != SCRAP_BLOCK).all(), "a real token was sent to the scrap block"
        assert len(np.unique(slots)) == len(slots), "two tokens share a slot"
        self._slots[slots] = inputs.input_ids[real]
        width = inputs.input_ids.shape[1]
        first = np.array([self._next(inputs, *divmod(int(row), width)) for row in inputs.logits_index])
        ids = (first[:, None] + np.arange(self.vocab_size)) % self.vocab_size
        logits = np.empty(ids.shape, np.float32)
        np.put_along_axis(logits, ids, np.broadcast_to(self._ramp, ids.shape), axis=1)
        top = slice(0, self.num_top_logits)
        results = {
            "top_ids": ids[:, top].astype(np.int32),
            "top_logits": np.repeat(self._ramp[None, top], len(first), axis=0),
            "logsumexp": np.full(len(first), self._logsumexp),
            "logits": logits,
        }
        return NullStepOutputs({name: value for name, value in results.items() if name in outputs})

    def close(self) -> None:
        """Give back the cache."""
        self._slots = np.zeros(0, np.int64)

    def _next(self, inputs: StepInputs, sequence: int, column: int) -> int:
        if inputs.slot_mapping[sequence, column] < 0:
            return 0
        positions = np.arange(inputs.positions[sequence, column] + 1)
        blocks = inputs.block_table[sequence, positions // self.block_size].astype(np.int64)
        history = self._slots[blocks * self.block_size + positions % self.block_size]
        assert (history >= 0).all(), "a position was read that was never written"
        return expected_token(history.tolist(), self.vocab_size)


def expected_token(history: Iterable[int], vocab_size: int) -> int:
    """Return the token that `NullBackend` likes best after `history`."""
    value = 7
    for token in history:
        value = (value * 31 + token + 1) % _PRIME
    return value % vocab_size
