"""What a request asks for: checked once, here, and then trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seekforge.plugins.errors import RequestError

#: Most completions of one request.
MAX_N = 128
#: Optional outputs per token: what the indexer and the router chose.
TAPS = ("topk_indices", "expert_ids")


@dataclass(frozen=True)
class Guided:
    """A form that the completion must have; exactly one field is set. Needs the extra `guided`.

    Attributes:
        json_schema: a JSON schema, as an object or as text.
        regex: a regular expression that the whole text matches.
        grammar: a Lark grammar of llguidance, with the rule `start`.
        choice: the text is one of these.
        whitespace: with `json_schema`, whether white space between tokens is free; else there is none.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    whitespace: bool = True

    def __post_init__(self) -> None:
        given = [name for name in ("json_schema", "regex", "grammar", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"guided sets {', '.join(given) or 'nothing'}, "
                "expected exactly one of json_schema, regex, grammar, choice"
            )
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise RequestError(f"guided.{name} is {value!r}, expected text")
        if self.choice is not None:
            _strings("guided.choice", self.choice)
            if not self.choice:
                raise RequestError("guided.choice is empty, expected at least one text")
        if self.json_schema is not None:
            try:
                text = self.json_schema if isinstance(self.json_schema, str) else json.dumps(self.json_schema)
                if not isinstance(json.loads(text), (dict, bool)):
                    raise ValueError("it is no object")
            except (ValueError, TypeError) as error:
                raise RequestError(f"guided.json_schema is no JSON schema: {error}") from None


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    Logits are changed in this order: repetition, frequency and presence penalty, bias, bans (bad words, stop tokens
    before min_tokens, grammar), temperature, top-k, top-p, min-p.

    Attributes:
        n: completions to return.
        best_of: completions to generate, of which the `n` with the highest log-probability per token are returned.
        temperature: 0 is greedy: the largest logit, of equal ones the lowest id.
        top_p: keep the fewest most likely tokens whose probability reaches this; 1 keeps all.
        top_k: keep the k most likely tokens; 0 keeps all. Applied before `top_p`.
        min_p: keep tokens at least this likely, relative to the most likely one; 0 keeps all.
        repetition_penalty: above 1, tokens of prompt and output become less likely: positive logits are divided by it,
            negative ones multiplied.
        presence_penalty: subtracted from the logit of each token that was generated before.
        frequency_penalty: subtracted as often as it was generated.
        logit_bias: token id -> what is added to its logit.
        bad_words: texts that must not be generated.
        seed: the same seed gives the same tokens; None draws one.
        max_tokens: most tokens to generate.
        min_tokens: the request does not end on a stop token or stop string before this many tokens: until then stop
            tokens cannot be chosen.
        stop: texts that end the request; they do not appear in its text.
        include_stop: they do.
        stop_token_ids: end the request, besides the model's end of sequence.
        ignore_eos: the end of sequence is a token like any other.
        logprobs: log-probabilities of each generated token and this many most likely ones; None gives none.
        prompt_logprobs: the same for the prompt's tokens.
        guided: a form that the text must have.
        taps: optional outputs to return per token: "topk_indices", "expert_ids".

    Raises:
        RequestError: a value is of the wrong type or out of range.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    include_stop: bool = False
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guided: Guided | None = None
    taps: Sequence[str] = ()

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        if self.best_of is not None:
            _integer("best_of", self.best_of, self.n, MAX_N)
        _number("temperature", self.temperature, "a number of at least 0", lambda v: v >= 0)
        _number("top_p", self.top_p, "a number above 0 and at most 1", lambda v: 0 < v <= 1)
        _integer("top_k", self.top_k, 0)
        _number("min_p", self.min_p, "a number from 0 to 1", lambda v: 0 <= v <= 1)
        _number("repetition_penalty", self.repetition_penalty, "a number above 0", lambda v: v > 0)
        _number("presence_penalty", self.presence_penalty, "a number from -2 to 2", lambda v: -2 <= v <= 2)
        _number("frequency_penalty", self.frequency_penalty, "a number from -2 to 2", lambda v: -2 <= v <= 2)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {self.logit_bias!r}, expected a mapping from token id to a number")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0)
            _number("logit_bias", bias, "numbers from -100 to 100", lambda v: -100 <= v <= 100)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        _strings("bad_words", self.bad_words)
        object.__setattr__(self, "bad_words", tuple(self.bad_words))
        if self.seed is not None:
            _integer("seed", self.seed, 0, (1 << 64) - 1)
        _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, expected at most max_tokens ({self.max_tokens})")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _strings("stop", self.stop)
        object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("ignore_eos", "include_stop"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}, expected true or false")
        if isinstance(self.stop_token_ids, (str, bytes)) or not isinstance(self.stop_token_ids, Sequence):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r}, expected a list of token ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0)
        if self.guided is not None and not isinstance(self.guided, Guided):
            raise RequestError(f"guided is {self.guided!r}, expected a Guided")
        if self.guided is not None and (self.ignore_eos or self.min_tokens):
            raise RequestError("guided text ends when its form is complete; leave ignore_eos and min_tokens out")
        if isinstance(self.taps, str) or not set(self.taps) <= set(TAPS):
            raise RequestError(f"taps is {self.taps!r}, expected a list of {', '.join(TAPS)}")
        object.__setattr__(self, "taps", tuple(self.taps))

    @property
    def greedy(self) -> bool:
        """Whether the largest logit wins."""
        return self.temperature == 0

    @property
    def num_sequences(self) -> int:
        """Completions to generate."""
        return self.best_of or self.n

    @property
    def has_penalties(self) -> bool:
        """Whether what was generated before changes the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def edits_logits(self) -> bool:
        """Whether a row of this request may differ from what the model gave, before temperature."""
        return bool(self.has_penalties or self.logit_bias or self.bad_words or self.min_tokens or self.guided)


def _number(name: str, value: object, expected: str, valid: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not valid(value):
        raise RequestError(f"{name} is {value!r}, expected {expected}")


def _integer(name: str, value: object, least: int, most: int | None = None) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not good or (most is not None and value > most):  # pyright: ignore[reportOperatorIssue]
        expected = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
        raise RequestError(f"{name} is {value!r}, expected {expected}")


def _strings(name: str, value: Any) -> None:
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not is_list or not all(isinstance(text, str) and text for text in value):
        raise RequestError(f"{name} is {value!r}, expected a list of texts, none empty")
