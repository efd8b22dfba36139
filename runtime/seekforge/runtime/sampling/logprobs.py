"""Log-probabilities of tokens: logit − logsumexp, of the model alone. Vectorized over rows; numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from seekforge.runtime.sampling.sampler import FullLogits, TopLogits
from seekforge.runtime.sequence import TokenLogprobs


def token_logprobs(
    tokens: np.ndarray,
    counts: Sequence[int],
    top: TopLogits,
    full: FullLogits,
    token_text: Sequence[Callable[[int], str] | None],
) -> list[TokenLogprobs]:
    """Return the log-probability of one token per row, and of the most likely ones.

    Args:
        tokens: [N].
        counts: how many of the most likely to give, per row; −1: all.
        top: the top K logits of those rows.
        full: all logits of those rows; looked at where the top K do not reach.
        token_text: what decodes a token, per row.
    """
    is_token = top.ids == tokens[:, None]
    inside, column = is_token.any(1), is_token.argmax(1)
    logits = np.take_along_axis(top.logits, column[:, None], 1)[:, 0].astype(np.float64)
    ranks = column + 1
    width = top.ids.shape[1]
    if not inside.all():
        rows = np.flatnonzero(~inside)
        for row in rows.tolist():
            whole, token = full.rows(np.array([row]))[0], int(tokens[row])
            logits[row] = whole[token]
            larger, equal = np.count_nonzero(whole > whole[token]), np.count_nonzero(whole[:token] == whole[token])
            ranks[row] = 1 + larger + equal
    values = logits - top.logsumexp
    out: list[TokenLogprobs] = []
    rows_of_values = zip(tokens.tolist(), values.tolist(), ranks.tolist(), counts, token_text, strict=True)
    for row, (token, value, rank, count, text) in enumerate(rows_of_values):
        count = top.vocab_size if count < 0 else count
        if count <= width:
            ids, best = top.ids[row, :count], top.logits[row, :count]
        else:
            whole = full.rows(np.array([row]))[0]
            ids = np.argsort(-whole, kind="stable")[:count]
            best = whole[ids]
        likely = best.astype(np.float64) - float(top.logsumexp[row])
        out.append(TokenLogprobs(token, value, rank, tuple(zip(ids.tolist(), likely.tolist())), text))
    return out
