"""Parts of answers that every client has to be able to read."""

from __future__ import annotations

import json

from seekforge.runtime.openai.answers import chat_logprobs, completion_logprobs


def test_logprobs_of_tokens_that_cannot_come_are_numbers() -> None:
    """JSON has no infinity."""

    def token_bytes(token: int) -> bytes:
        return str(token).encode()

    row = (5, float("-inf"), 3, ((6, float("-inf")),))
    made = [chat_logprobs([row], token_bytes), completion_logprobs([row], [5], token_bytes)]
    assert "-9999.0" in json.dumps(made, allow_nan=False)
