"""The parts of answers that several interfaces share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

#: A token with its log-probability and rank, and the likeliest ones with theirs.
TokenRow = tuple[int, float, int, tuple[tuple[int, float], ...]]
#: Returns the bytes of a token.
TokenBytes = Callable[[int], bytes]

#: Why a completion ended -> what OpenAI calls it.
_REASONS = {"timeout": "length", "abort": "length"}

#: What a log-probability of minus infinity, which JSON cannot write, is given as; so does vLLM.
_LEAST_LOGPROB: Final = -9999.0


def written_logprob(value: float) -> float:
    """Return a log-probability that JSON can write."""
    return max(value, _LEAST_LOGPROB)


def finish_reason(reason: str | None) -> str | None:
    """Return a finish reason in OpenAI's words."""
    return None if reason is None else _REASONS.get(reason, reason)


def usage(num_prompt: int, num_completion: int, num_cached: int) -> dict[str, Any]:
    """Return the `usage` of an answer."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def chat_logprobs(rows: Iterable[TokenRow], token_bytes: TokenBytes) -> dict[str, Any]:
    """Return the `logprobs` of a choice of a chat."""

    def token(number: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(number)
        return {"token": raw.decode("utf-8", "replace"), "logprob": written_logprob(logprob), "bytes": list(raw)}

    return {
        "content": [
            token(number, logprob) | {"top_logprobs": [token(*top) for top in likely]}
            for number, logprob, _, likely in rows
        ],
        "refusal": None,
    }


def completion_logprobs(rows: Sequence[TokenRow | None], ids: Sequence[int], token_bytes: TokenBytes, offset: int = 0):
    """Return the `logprobs` of a choice of a completion.

    Args:
        rows: what each token comes with; None where the model gave none, as for the first of a prompt.
        ids: the tokens.
        token_bytes: what a token is.
        offset: characters before the first of them.
    """
    texts, offsets = [], []
    for number in ids:
        text = token_bytes(number).decode("utf-8", "replace")
        texts.append(text)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if row is None else written_logprob(row[1]) for row in rows],
        "top_logprobs": [
            None
            if row is None
            else {
                token_bytes(number).decode("utf-8", "replace"): written_logprob(logprob)
                for number, logprob in (*reversed(row[3]), (row[0], row[1]))  # of equal texts the likeliest
            }
            for row in rows
        ],
        "text_offset": offsets,
    }
