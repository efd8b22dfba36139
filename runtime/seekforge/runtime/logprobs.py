"""Log-probabilities of tokens: logit − logsumexp, of the model alone. Vectorised over rows; numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seekforge.runtime.sampler import FullLogits, TopLogits
from seekforge.runtime.sequence import TokenLogprobs


def token_logprobs(tokens: np.ndarray, counts: Sequence[int], top: TopLogits, full: FullLogits) -> list[TokenLogprobs]:
    """Return the log-probability of one token per row, and of the most likely ones.

    Args:
        tokens: [N].
        counts: how many of the most likely to give, per row.
        top: of those rows.
        full: of those rows; looked at where the top K do not reach.
    """
    found = top.ids == tokens[:, None]
    inside = found.any(1)
    logits = np.take_along_axis(top.logits, found.argmax(1)[:, None], 1)[:, 0].astype(np.float64)
    width = top.ids.shape[1]
    if not inside.all():
        rows = np.flatnonzero(~inside)
        logits[rows] = full.take(rows).values(tokens[rows, None])[:, 0]
    values = logits - top.logsumexp
    out: list[TokenLogprobs] = []
    for row, (token, value, count) in enumerate(zip(tokens.tolist(), values.tolist(), counts, strict=True)):
        if count <= width:
            ids, best = top.ids[row, :count], top.logits[row, :count]
        else:
            whole = full.rows(np.array([row]))[0]
            ids = np.argsort(-whole, kind="stable")[:count]
            best = whole[ids]
        likely = best.astype(np.float64) - float(top.logsumexp[row])
        out.append(TokenLogprobs(token, value, tuple(zip(ids.tolist(), likely.tolist()))))
    return out
