"""Who runs next: continuous batching in pure Python, no numpy, no device.

An iteration is at most two rectangles of tokens: a prefill group (several prompts, or chunks of them) and a
decode group (one new token for every sequence whose prompt is done). Requests are served first come, first
served: nobody overtakes a request that waits for blocks, so none starves.

A request starts when blocks for its prompt *and* its max_tokens are free, and keeps them to its end. So a
running request never lacks a block and nothing is ever preempted; the price is that a request which stops
early held more than it used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from seekforge.plugins.errors import RequestError
from seekforge.runtime.kv_cache import BlockPool, blocks_needed
from seekforge.runtime.sequence import Sequence


@dataclass(frozen=True)
class Row:
    """The tokens [start, stop) of one sequence, run in one step.

    Attributes:
        samples: the row ends at the last known token, so its logits choose the next one.
    """

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        return self.stop == self.sequence.num_tokens

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Iteration:
    """What to run now; either group may be empty. Each group is one call of the model."""

    prefill: tuple[Row, ...]
    decode: tuple[Row, ...]

    @property
    def groups(self) -> Iterator[tuple[Row, ...]]:
        """The groups that are not empty."""
        return (group for group in (self.prefill, self.decode) if group)


class Scheduler:
    """Plans iterations over the requests it was given.

    Call `schedule`, run each group, hand each group back with `commit`; repeat while `has_work`.
    """

    def __init__(
        self, pool: BlockPool, *, block_size: int, max_batch_size: int, max_num_batched_tokens: int, max_model_len: int
    ) -> None:
        """Make an idle scheduler.

        Args:
            pool: where blocks come from; nobody else takes from it.
            block_size: slots in a block.
            max_batch_size: most sequences that run at the same time.
            max_num_batched_tokens: most tokens of one iteration, padding of the prefill rectangle included.
            max_model_len: most tokens of one sequence, prompt and generated.
        """
        if not 1 <= max_batch_size <= max_num_batched_tokens:
            raise ValueError(
                f"max_batch_size is {max_batch_size}, expected 1 to max_num_batched_tokens ({max_num_batched_tokens}): "
                "an iteration must hold one token of every running sequence"
            )
        self.pool = pool
        self.block_size = block_size
        self.max_batch_size = max_batch_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    def check_request(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuse a request that could never be served, before anything is done for any.

        Raises:
            RequestError: the prompt is empty, or prompt and max_tokens exceed `max_model_len` or the whole cache.
        """
        if not num_prompt_tokens:
            raise RequestError("the prompt has no tokens; pass some text or token ids")
        total = num_prompt_tokens + max_tokens
        if total > self.max_model_len:
            raise RequestError(
                f"prompt {num_prompt_tokens} + max_tokens {max_tokens} = {total} tokens, more than max_model_len "
                f"{self.max_model_len}; shorten the prompt, lower max_tokens, or raise max_model_len if the engine can"
            )
        needed = blocks_needed(total, self.block_size)
        if needed > self.pool.num_usable:
            raise RequestError(
                f"prompt {num_prompt_tokens} + max_tokens {max_tokens} needs {needed} cache blocks of "
                f"{self.block_size} tokens, the cache has {self.pool.num_usable}; lower max_tokens or raise num_blocks"
            )

    def add(self, sequence: Sequence) -> None:
        """Put a request at the end of the queue.

        Raises:
            RequestError: as `check_request`.
        """
        self.check_request(len(sequence.prompt_ids), sequence.params.max_tokens)
        self._waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a request now and free its blocks; one that has ended already is left as it is."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = "abort"
        if sequence in self._running:
            self._retire(sequence)
        else:
            self._waiting.remove(sequence)

    def schedule(self) -> Iteration:
        """Plan one iteration. With work left, at least one row is in it."""
        decode = [s for s in self._running if s.num_pending == 1 and s.output_ids]
        budget = self.max_num_batched_tokens - len(decode)
        prefill: list[Row] = []
        width = used = 0
        for sequence in self._prefill_candidates():
            rows = len(prefill) + 1
            take = min(sequence.num_pending, budget // rows)
            area = rows * max(width, take)
            # Padding is computed like any token: a row joins only if the rectangle stays at least half full.
            # What does not fit waits and leads the next rectangle; nothing younger goes before it.
            if not take or area > budget or (prefill and 2 * (used + take) < area):
                break
            if not sequence.blocks and not self._admit(sequence):
                break
            start = sequence.num_computed
            prefill.append(Row(sequence, start, start + take))
            width, used = max(width, take), used + take
        return Iteration(tuple(prefill), tuple(Row(s, s.num_computed, s.num_tokens) for s in decode))

    def commit(self, group: tuple[Row, ...], sampled: dict[int, int]) -> None:
        """Take the outcome of one group.

        Args:
            group: a group of the last `schedule`, after it ran. Requests aborted meanwhile are skipped.
            sampled: request id -> token, for the rows with `samples`.
        """
        for row in group:
            sequence = row.sequence
            if sequence.finish_reason is not None:
                continue
            samples = row.samples
            sequence.num_computed = row.stop
            if samples:
                sequence.append(sampled[sequence.request_id])
                if sequence.finish_reason is not None:
                    self._retire(sequence)

    def check(self) -> None:
        """Verify that block tables and pool agree.

        Raises:
            BlockAccountingError: they do not.
        """
        self.pool.check(sequence.blocks for sequence in self._running)

    def _prefill_candidates(self) -> Iterator[Sequence]:
        """Sequences whose prompt is not done, oldest first: running ones are older than waiting ones."""
        yield from [s for s in self._running if not s.output_ids]
        yield from list(self._waiting)

    def _admit(self, sequence: Sequence) -> bool:
        """Move the head of the queue to the running ones if it gets its blocks."""
        needed = blocks_needed(sequence.max_num_tokens, self.block_size)
        if len(self._running) >= self.max_batch_size or needed > self.pool.num_free:
            return False
        head = self._waiting.popleft()
        assert head is sequence
        sequence.blocks = self.pool.allocate(needed)
        self._running.append(sequence)
        return True

    def _retire(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.pool.free(sequence.blocks)
        sequence.blocks = []
