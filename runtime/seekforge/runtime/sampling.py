"""What a request asks for: checked once, here, and then trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from seekforge.plugins.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    Attributes:
        temperature: 0 is greedy: the largest logit, of equal ones the lowest id.
        top_p: keep the fewest most likely tokens whose probability reaches this; 1 keeps all.
        top_k: keep the k most likely tokens; 0 keeps all. Applied before `top_p`.
        seed: the same seed gives the same tokens; None draws one.
        max_tokens: most tokens to generate.
        min_tokens: the request does not end on a stop token before this many tokens: until then stop tokens
            cannot be chosen.
        stop_token_ids: end the request, besides the model's end of sequence.
        ignore_eos: the end of sequence is a token like any other.

    Raises:
        RequestError: a value is of the wrong type or out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, "a number of at least 0", lambda v: v >= 0)
        _number("top_p", self.top_p, "a number above 0 and at most 1", lambda v: 0 < v <= 1)
        _integer("top_k", self.top_k, 0)
        _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, expected at most max_tokens ({self.max_tokens})")
        if self.seed is not None:
            _integer("seed", self.seed, 0)
            if self.seed >= 1 << 64:
                raise RequestError(f"seed is {self.seed}, expected less than 2^64")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}, expected true or false")
        if isinstance(self.stop_token_ids, (str, bytes)) or not isinstance(self.stop_token_ids, Sequence):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r}, expected a list of token ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        """Whether the largest logit wins."""
        return self.temperature == 0


def _number(name: str, value: object, expected: str, valid: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not valid(value):
        raise RequestError(f"{name} is {value!r}, expected {expected}")


def _integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"{name} is {value!r}, expected a whole number of at least {least}")
