"""The PyTorch model on the rows of a quality check: greedy generation and likelihoods, some sequences at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from seekforge.exporter.models.shared.session import TorchSession
from seekforge.formats.paged_cache import blocks_needed
from seekforge.formats.quality_run import RunRow
from seekforge.formats.step_io import lay_out

#: Sequences that generate together, and tokens of their prompts at most.
_AT_ONCE, _TOKENS = 32, 8192


def run_rows(
    session: TorchSession,
    rows: Sequence[RunRow],
    eos_token_ids: Collection[int],
    *,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[list[tuple[int, ...]], list[float | None]]:
    """Run rows as an engine does (`quality_run.RunAnswer`).

    Args:
        session: the model.
        rows: what it is given.
        eos_token_ids: tokens that end a completion; they are a part of it.
        say: told how far it is.

    Returns:
        The completions, and sums of negative log-likelihoods.
    """
    completions: list[tuple[int, ...]] = [()] * len(rows)
    nll_sums: list[float | None] = [None] * len(rows)
    texts = [number for number, row in enumerate(rows) if not row.max_tokens]
    for number in texts:
        nll_sums[number] = _nll(session, rows[number].ids)
    prompts = sorted(set(range(len(rows))) - set(texts), key=lambda number: (len(rows[number].ids), number))
    done = 0
    for batch in _batches(prompts, rows):
        say(f"{done} of {len(prompts)} prompts")
        for number, completion in zip(batch, _generate(session, [rows[n] for n in batch], eos_token_ids), strict=True):
            completions[number] = completion
        done += len(batch)
    return completions, nll_sums


def _nll(session: TorchSession, ids: Sequence[int]) -> float:
    results = session.prefill(ids)
    expected = torch.tensor(ids[1:])
    likelihoods = results["logits"][:-1].gather(1, expected[:, None]).squeeze(1) - results["logsumexp"][:-1]
    return -float(likelihoods.double().sum())


def _batches(numbers: Sequence[int], rows: Sequence[RunRow]) -> list[list[int]]:
    """Return rows of like lengths together."""
    batches: list[list[int]] = []
    for number in numbers:
        tokens = len(rows[number].ids)
        if not batches or len(batches[-1]) == _AT_ONCE or (len(batches[-1]) + 1) * tokens > _TOKENS:
            batches.append([])
        batches[-1].append(number)
    return batches


def _generate(session: TorchSession, rows: Sequence[RunRow], eos_token_ids: Collection[int]) -> list[tuple[int, ...]]:
    """Continue prompts together; those that have ended leave the batch."""
    tables: list[list[int]] = []
    used = 1  # block 0 is scrap
    for row in rows:
        count = blocks_needed(len(row.ids) + row.max_tokens)
        tables.append(list(range(used, used + count)))
        used += count
    session.allocate_caches(used)
    outputs: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    new = [list(row.ids) for row in rows]
    starts = [0] * len(rows)
    while alive:
        width = max(len(new[i]) for i in alive)
        last = [place * width + len(new[i]) - 1 for place, i in enumerate(alive)]
        step = lay_out([new[i] for i in alive], [starts[i] for i in alive], [tables[i] for i in alive], last)
        logits = session.run(step, outputs=("logits",))["logits"].numpy()
        going: list[int] = []
        for i, token in zip(alive, np.argmax(logits, axis=-1).tolist(), strict=True):
            starts[i] += len(new[i])
            new[i] = [token]
            outputs[i].append(token)
            if token not in eos_token_ids and len(outputs[i]) < rows[i].max_tokens:
                going.append(i)
        alive = going
    return [tuple(one) for one in outputs]
