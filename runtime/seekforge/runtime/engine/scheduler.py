"""Who runs next: continuous batching in pure Python, no numpy, no device.

An iteration is at most two rectangles of tokens: a prefill group (prompts, or chunks of them) and a decode group
(one known token of every sequence whose prompt is done, and the drafts to verify after it). At most a quarter of a
rectangle is padding.

Requests are served in the order of `arrival iteration + priority * PRIORITY_STEPS`. A request is therefore overtaken
only by those that arrive within PRIORITY_STEPS iterations per level of priority after it, and never by one that
needs fewer blocks: so none starves. Blocks are taken as tokens come. When they run out, the last in order loses
its blocks, waits again at its place, and is computed anew (mostly from the prefix cache); the first in
order never does, and since every accepted request fits the whole cache, it always ends.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator

from seekforge.common.errors import RequestError
from seekforge.formats.paged_cache import blocks_needed
from seekforge.runtime.engine.iteration import Iteration, Row, verify_width
from seekforge.runtime.engine.kv_cache import KvCache
from seekforge.runtime.sequence import FinishReason, Sequence

#: Iterations of waiting that weigh as much as one level of priority.
PRIORITY_STEPS = 1000
#: How far behind the head of the queue rows are sought that fit the shape of the rectangle.
_LOOK_AHEAD = 32


class QueueFullError(RequestError):
    """As many requests wait as may; try again later."""


class Scheduler:
    """Plans iterations over the requests it was given.

    Call `schedule`, run each group, hand each group back with `commit`; repeat while `has_work`.

    Attributes:
        num_preemptions: how often a sequence lost its blocks.
    """

    def __init__(
        self,
        cache: KvCache,
        *,
        max_batch_size: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_waiting: int | None = None,
        most_model_len: int | None = None,
    ) -> None:
        """Make an idle scheduler.

        Args:
            cache: the cache that blocks come from; nobody else takes from it.
            max_batch_size: most sequences that run at the same time.
            max_num_batched_tokens: most tokens of one iteration, padding included.
            max_model_len: most tokens of one sequence, prompt and generated.
            max_waiting: most sequences that wait; None sets no bound.
            most_model_len: what `max_model_len` could be raised to, as a refusal advises; None: no further.
        """
        if not 1 <= max_batch_size <= max_num_batched_tokens:
            raise ValueError(
                f"max_batch_size is {max_batch_size}, expected 1 to max_num_batched_tokens ({max_num_batched_tokens}): "
                "an iteration must hold one token of every running sequence"
            )
        self.cache = cache
        self.block_size = cache.block_size
        self.max_batch_size = max_batch_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_waiting = max_waiting
        self._most_model_len = most_model_len or max_model_len
        self.num_preemptions = 0
        self._iteration = 0
        self._arrivals = itertools.count()
        self._running: list[Sequence] = []  # in order
        # Heaps; entries of sequences that have moved on are dropped when they come up, or when they are the majority.
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._num_waiting = 0
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._num_timed = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._num_waiting or self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences that hold blocks, in order."""
        return tuple(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks."""
        return self._num_waiting

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def max_num_tokens(self) -> int:
        """Most tokens that a sequence can have, prompt and generated, by the context and the whole cache."""
        return min(self.max_model_len, self.cache.pool.num_usable * self.block_size)

    def check_request(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuse a request that could never be served, before anything is done for any.

        Raises:
            RequestError: the prompt is empty, or prompt and max_tokens exceed `max_model_len` or the whole cache.
        """
        if not num_prompt_tokens:
            raise RequestError("the prompt has no tokens; pass some text or token ids")
        total = num_prompt_tokens + max_tokens
        if total > self.max_model_len:
            grow = f", or raise max_model_len to {total}" if total <= self._most_model_len else ""
            raise RequestError(
                f"prompt {num_prompt_tokens} + max_tokens {max_tokens} = {total} tokens, more than max_model_len "
                f"{self.max_model_len}; shorten the prompt or lower max_tokens{grow}"
            )
        needed = blocks_needed(total, self.block_size)
        if needed > self.cache.pool.num_usable:
            raise RequestError(
                f"prompt {num_prompt_tokens} + max_tokens {max_tokens} needs {needed} cache blocks of "
                f"{self.block_size} tokens, the cache has {self.cache.pool.num_usable}; lower max_tokens or raise "
                "num_blocks"
            )

    def check_queue(self, count: int) -> None:
        """Refuse `count` more sequences if the queue has no room for them.

        Raises:
            QueueFullError: it has not.
        """
        if self.max_waiting is not None and self._num_waiting + count > self.max_waiting:
            raise QueueFullError(
                f"{self._num_waiting} requests wait, of at most {self.max_waiting}, and {count} more came; "
                "try again later or raise max_waiting"
            )

    def add(self, sequence: Sequence) -> None:
        """Put a request into the queue.

        Raises:
            RequestError: as `check_request`. Whether the queue has room is for the caller to ask first.
        """
        self.check_request(len(sequence.prompt_ids), sequence.max_tokens)
        sequence.order = (self._iteration + sequence.priority * PRIORITY_STEPS, next(self._arrivals))
        self._wait(sequence)
        for one in (sequence, *sequence.siblings):
            if one.deadline_s is not None:
                heapq.heappush(self._deadlines, (one.deadline_s, next(self._arrivals), one))
                self._num_timed += 1

    def abort(self, sequence: Sequence, reason: FinishReason = "abort", error: str | None = None) -> None:
        """End a sequence now and free its blocks; one that has ended already is left as it is."""
        if sequence.state == "finished":
            return
        sequence.finish_reason, sequence.error = reason, error
        self._retire(sequence)

    def expire(self, now_s: float) -> list[Sequence]:
        """End the sequences whose deadline has passed, and return them."""
        ended: list[Sequence] = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.state != "finished":
                ended.append(sequence)
                self.abort(sequence, "timeout")
        return ended

    def schedule(self, *, verify: bool = True) -> Iteration:
        """Plan one iteration. With work left, at least one row is in it.

        Args:
            verify: let drafts be verified; else they are left out.
        """
        self._iteration += 1
        decode, area = self._plan_decode(verify)
        only_decode = len(decode) == len(self._running) and not self._num_waiting
        prefill = () if only_decode else self._plan_prefill(self.max_num_batched_tokens - area)
        assert decode or prefill or not self.has_work, "nothing can run: a bug of the scheduler"
        return Iteration(prefill, decode)

    def commit(self, group: Iterable[Row]) -> None:
        """Take the outcome of one group: sampled tokens have been appended to the sequences of its rows.

        Args:
            group: a group of the last `schedule`, after it ran. Sequences aborted meanwhile are skipped.
        """
        block_size = self.block_size
        for row in group:
            sequence = row.sequence
            if sequence.state != "running":
                continue
            # A row that samples is followed by at least one new token; drafts count as far as they came true.
            computed = sequence.num_tokens - 1 if row.samples else row.stop
            sequence.num_computed = computed
            if computed // block_size > sequence.table.num_published:
                self.cache.publish(sequence.table, sequence.tokens, computed)
            if sequence.finish_reason is not None:
                self._retire(sequence)
            elif row.num_drafts:
                self.cache.truncate(sequence.table, sequence.num_tokens)
            if row.samples and sequence.siblings:
                siblings, sequence.siblings = sequence.siblings, ()
                for sibling in siblings:
                    if sibling.state == "new":
                        sibling.order = (sequence.order[0], next(self._arrivals))
                        self._wait(sibling)

    def fail(self, group: Iterable[Row], error: str, reason: FinishReason = "error") -> list[Sequence]:
        """End the sequences of a group whose step raised; what it wrote to the cache is never found again."""
        failed: list[Sequence] = []
        for row in group:
            for sequence in (row.sequence, *row.sequence.siblings):
                if sequence.state != "finished":
                    self.cache.release(sequence.table, forget=True)
                    self.abort(sequence, reason, error)
                    failed.append(sequence)
        return failed

    def restart(self, root_of: Callable[[Sequence], bytes], weight_version: int) -> None:
        """Compute everything anew: the weights have changed. Running sequences keep their tokens and their place.

        Args:
            root_of: gives a sequence the new start of its chain of digests.
            weight_version: the version of the new weights.
        """
        for sequence in list(self._running):
            self._preempt(sequence)
        self.cache.pool.forget_all()
        for _, sequence in self._waiting:
            for one in (sequence, *sequence.siblings):
                one.table.root = root_of(one)
                one.table.digests.clear()
                if not one.output_ids:
                    one.weight_version = weight_version
                elif one.weight_version + len(one.weight_changes) < weight_version:
                    one.weight_changes.append(len(one.output_ids))

    def check(self) -> None:
        """Verify that block tables and pool agree.

        Raises:
            BlockAccountingError: they do not.
        """
        self.cache.pool.check(sequence.table.blocks for sequence in self._running)
        for sequence in self._running:
            assert sequence.num_computed <= len(sequence.table.blocks) * self.block_size
        assert self._num_waiting == sum(self._is_waiting(entry) for entry in self._waiting)

    def _plan_decode(self, verify: bool) -> tuple[tuple[Row, ...], int]:
        """Return the decode group and its area; blocks for its tokens are taken."""
        decoding = [s for s in self._running if s.output_ids and s.num_tokens - s.num_computed == 1]
        if not decoding:
            return (), 0
        drafts = 0
        if verify and any(s.drafts for s in decoding):
            prefilling = len(decoding) < len(self._running) or self._num_waiting > 0
            budget = self.max_num_batched_tokens * (3 if prefilling else 4) // 4
            most = max(budget // len(decoding), 1)
            drafts = verify_width([1 + min(len(s.drafts), self._room(s)) for s in decoding], most) - 1
        rows: list[Row] = []
        block_size, width, preempted = self.block_size, 1, self.num_preemptions
        for sequence in decoding:
            num_tokens = sequence.num_tokens
            extra = min(drafts, len(sequence.drafts), self._room(sequence)) if drafts else 0
            if num_tokens + extra > len(sequence.table.blocks) * block_size:
                if sequence.state != "running":
                    continue
                if extra and not self.cache.grow(sequence.table, num_tokens + extra):
                    extra = 0
                if not self._grow(sequence, num_tokens):
                    continue
            rows.append(Row(sequence, num_tokens - 1, num_tokens + extra, True, extra))
            width = max(width, 1 + extra)
        if drafts:  # where blocks ran out, victims and cut drafts have changed the shape
            rows = [row for row in rows if row.sequence.state == "running"]
            width = verify_width([row.num_tokens for row in rows], width) if rows else 1
            rows = [row if row.num_tokens <= width else row.cut(width) for row in rows]
        elif self.num_preemptions > preempted:
            rows = [row for row in rows if row.sequence.state == "running"]
        return tuple(rows), width * len(rows)

    def _room(self, sequence: Sequence) -> int:
        """Drafts that could be accepted: one token is sampled after them."""
        return sequence.max_tokens - len(sequence.output_ids) - 1

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room in a running sequence's table, at the cost of those behind it; False if it had to yield itself."""
        while not self.cache.grow(sequence.table, num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits at its place and is computed anew."""
        self._running.remove(sequence)
        self.cache.release(sequence.table)
        sequence.num_computed = 0
        sequence.drafts = []
        sequence.taps.clear()
        sequence.prompt_logprobs.clear()
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence)

    def _plan_prefill(self, budget: int) -> tuple[Row, ...]:
        """Return the prefill group: a rectangle of at most `budget` tokens."""
        rows: list[Row] = []
        width = used = 0
        if budget <= 0:
            return ()
        for sequence in self._prefill_candidates():
            count = len(rows) + 1
            most = budget // count
            if width > most:
                break
            if sequence.state == "waiting" and not self._admit(sequence):
                break
            take = min(sequence.num_pending, most)
            # Padding is computed like any token. What does not fit the shape waits and is asked first next time.
            if 4 * (used + take) < 3 * count * max(width, take):
                continue
            start = sequence.num_computed
            rows.append(Row(sequence, start, start + take, start + take == sequence.num_tokens))
            width, used = max(width, take), used + take
        return tuple(rows)

    def _prefill_candidates(self) -> Iterator[Sequence]:
        """Sequences with more than a decode step to compute: the running ones, then the queue while it is admitted."""
        yield from [s for s in self._running if s.num_tokens - s.num_computed > 1 or not s.output_ids][:_LOOK_AHEAD]
        for _ in range(_LOOK_AHEAD):
            head = self._head()
            if head is None:
                return
            yield head
            if head.state == "waiting":
                return

    def _head(self) -> Sequence | None:
        while self._waiting and not self._is_waiting(self._waiting[0]):
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    @staticmethod
    def _is_waiting(entry: tuple[tuple[int, int], Sequence]) -> bool:
        return entry[1].state == "waiting"

    def _admit(self, sequence: Sequence) -> bool:
        """Let the head of the queue run if it gets blocks for all its known tokens."""
        if len(self._running) >= self.max_batch_size:
            return False
        # A few blocks stay free for those that run already: else the next block they need would preempt somebody.
        spare = min(len(self._running), self.cache.pool.num_usable // 16)
        num_cached = self.cache.admit(
            sequence.table, sequence.tokens, sequence.num_tokens, spare=spare, reuse=sequence.reads_cache
        )
        if num_cached is None:
            return False
        heapq.heappop(self._waiting)
        self._num_waiting -= 1
        sequence.num_computed = sequence.num_cached_tokens = num_cached
        sequence.state = "running"
        bisect.insort(self._running, sequence, key=lambda s: s.order)
        return True

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = "waiting"
        self._num_waiting += 1
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def _retire(self, sequence: Sequence) -> None:
        if sequence.state == "running":
            self._running.remove(sequence)
        elif sequence.state == "waiting":
            self._num_waiting -= 1
        sequence.state = "finished"
        sequence.drafts = []
        self.cache.release(sequence.table)
        if sequence.deadline_s is not None:
            self._num_timed -= 1
            if len(self._deadlines) > 2 * self._num_timed + 16:
                self._deadlines = [entry for entry in self._deadlines if entry[2].state != "finished"]
                heapq.heapify(self._deadlines)
        if len(self._waiting) > 2 * self._num_waiting + 16:
            self._waiting = [entry for entry in self._waiting if self._is_waiting(entry)]
            heapq.heapify(self._waiting)
