"""What a request asks for: checked once, here, and then trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from json import dumps, loads
from typing import Any

from seekforge.common.errors import RequestError
from seekforge.runtime.values import (
    boolean,
    integer,
    names_checked,
    none_is_unset,
    number,
    shown,
    strings,
    text,
    token_ids,
)

#: Most completions of one request.
MAX_N = 128
#: Distance between the seeds of the completions of one request.
_SEED_STEP = 0x9E3779B97F4A7C15
#: Most characters of all stop strings together, and of all bad words: what looks for them is made before a step.
MAX_TEXT = 16_384
#: More than any vocabulary has.
_ALL = 1 << 31
#: Optional outputs per token: what the indexer and the router chose.
TAPS = ("topk_indices", "expert_ids")


def completion_seed(seed: int, index: int) -> int:
    """Return the seed of completion `index` of a request: a request for it alone has the same draws with this seed."""
    return (seed + index * _SEED_STEP) % 2**64


#: Below this a temperature is greedy: what it would add to the largest logit is lost in rounding. vLLM's _SAMPLING_EPS.
GREEDY_BELOW = 1e-5


@names_checked
@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """A form that the completion must have; exactly one of the first five is set. None is "not set" everywhere.

    All but `choice` need the extra `guided`.

    Attributes:
        json: a JSON schema, as an object or as text.
        regex: a regular expression that the whole text matches.
        choice: the text is one of these. One that `max_tokens` has no room for is not begun.
        grammar: a Lark grammar of llguidance, with the rule `start`.
        json_object: any JSON object.
        disable_any_whitespace: with JSON, no white space between tokens; else it is free.
        disable_additional_properties: with `json`, objects have no properties but those that the schema names;
            one of which it names none stays open.
        whitespace_pattern: with JSON, a regular expression of the white space between tokens.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        none_is_unset(self)
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, boolean(f"structured_outputs.{name}", getattr(self, name)))
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        forms = ("json", "regex", "choice", "grammar", "json_object")
        chosen = [name for name in forms if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise RequestError(
                f"structured_outputs sets {', '.join(chosen) or 'nothing'}, expected exactly one of {', '.join(forms)}"
            )
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None:
                text(f"structured_outputs.{name}", value)
        if self.choice is not None:
            object.__setattr__(self, "choice", strings("structured_outputs.choice", self.choice))
            if not self.choice:
                raise RequestError("structured_outputs.choice is empty, expected at least one text")
        if self.json is not None:
            try:
                schema = self.json if isinstance(self.json, str) else dumps(self.json)
                if not isinstance(loads(schema), (dict, bool)):
                    raise ValueError("it is no object")
            except (ValueError, TypeError, RecursionError) as error:
                raise RequestError(f"structured_outputs.json is no JSON schema: {error}") from None


@names_checked
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a request ends. Names and meanings are vLLM's (docs/sampling.md compares them).

    None is "not set" for every parameter: it gives the default, but `max_tokens=None` is the rest of the context.
    Numbers may be NumPy's.

    Logits are changed in vLLM's order: bias; repetition, frequency and presence penalty; temperature; min-p, top-k,
    top-p. Bans (bad words, stop tokens before min_tokens, allowed tokens, structured outputs) hold whatever the rest.

    Attributes:
        n: completions to return.
        best_of: completions to generate, of which the `n` with the highest log-probability per token are returned.
        temperature: 0, and all below 1e-5, is greedy: the largest logit, of equal ones the lowest id.
        top_p: keep the fewest most likely tokens whose probability reaches this; 1 keeps all.
        top_k: keep the k most likely tokens; 0 and -1 keep all. Applied before `top_p`.
        min_p: keep tokens at least this likely, relative to the most likely one; 0 keeps all.
        repetition_penalty: above 1, tokens of prompt and output become less likely: positive logits are divided by it,
            negative ones multiplied.
        presence_penalty: subtracted from the logit of each token that was generated before.
        frequency_penalty: subtracted as often as it was generated.
        logit_bias: token id -> what is added to its logit. An id may be written as text, as JSON must.
        bad_words: texts that the generated text does not contain, however they are spelled in tokens. The text of a
            special token bans that token.
        allowed_token_ids: no other token is chosen; the end of sequence too only if it is named.
        seed: the same seed gives the same tokens; -1 and None draw one.
        max_tokens: most tokens to generate; None: as many as the context has room for.
        min_tokens: how many first tokens do not end the request: stop tokens and the end of sequence cannot be
            chosen, and a stop string that is complete with one of them does not count.
        stop: texts that end the request; they do not appear in its text. Special tokens are found by their text.
        include_stop_str_in_output: what ended the request, stop string or token, does appear.
        stop_token_ids: end the request, besides the model's ends of sequence.
        ignore_eos: the end of sequence is a token like any other.
        detokenize: False makes no text; `stop` cannot be used then.
        skip_special_tokens: special tokens do not appear in the text.
        spaces_between_special_tokens: without effect: byte-level text puts no spaces between tokens.
        truncate_prompt_tokens: keep only so many of the prompt's last tokens; -1: as many as leave room for
            `max_tokens`.
        logprobs: log-probabilities of each generated token and this many most likely ones; -1 gives all, None none.
        prompt_logprobs: the same for the prompt's tokens.
        structured_outputs: a form that the text must have.
        thinking_token_budget: most tokens of a thought; then `</think>` is generated, whatever the rest would choose.
            A thought that the prompt leaves open counts from its beginning. -1 and None set no bound.
        skip_reading_prefix_cache: compute the whole prompt, whatever of it is in the cache.
        taps: optional outputs to return per token: "topk_indices", "expert_ids".

    Raises:
        RequestError: an unknown name, or a value of the wrong type or out of range.
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
    allowed_token_ids: Sequence[int] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: int | None = None
    skip_reading_prefix_cache: bool = False
    taps: Sequence[str] = ()

    def __post_init__(self) -> None:
        rest_of_context = self.max_tokens is None
        none_is_unset(self)
        self._set("n", integer("n", self.n, 1, MAX_N))
        if self.best_of is not None:
            self._set("best_of", integer("best_of", self.best_of, self.n, MAX_N))
        self._number("temperature", "a number of at least 0", lambda v: v >= 0)
        self._number("top_p", "a number above 0 and at most 1", lambda v: 0 < v <= 1)
        self._set("top_k", min(max(integer("top_k", self.top_k, -1), 0), _ALL))
        self._number("min_p", "a number from 0 to 1", lambda v: 0 <= v <= 1)
        self._number("repetition_penalty", "a number above 0", lambda v: v > 0)
        self._number("presence_penalty", "a number from -2 to 2", lambda v: -2 <= v <= 2)
        self._number("frequency_penalty", "a number from -2 to 2", lambda v: -2 <= v <= 2)
        self._set("logit_bias", _biases(self.logit_bias))
        self._set("bad_words", strings("bad_words", self.bad_words, MAX_TEXT))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty, expected at least one token id; None allows all")
        if self.seed is not None:
            seed = integer("seed", self.seed, -1, (1 << 64) - 1)
            self._set("seed", None if seed == -1 else seed)
        self._set("max_tokens", None if rest_of_context else integer("max_tokens", self.max_tokens, 1))
        self._set("min_tokens", integer("min_tokens", self.min_tokens, 0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, expected at most max_tokens ({self.max_tokens})")
        self._set("stop", strings("stop", (self.stop,) if isinstance(self.stop, str) else self.stop, MAX_TEXT))
        for name in _BOOLEANS:
            self._set(name, boolean(name, getattr(self, name)))
        self._set("stop_token_ids", token_ids("stop_token_ids", self.stop_token_ids))
        if self.stop and not self.detokenize:
            raise RequestError("stop needs the text; leave detokenize true, or use stop_token_ids")
        if self.truncate_prompt_tokens is not None:
            count = integer("truncate_prompt_tokens", self.truncate_prompt_tokens, -1)
            if not count:
                raise RequestError("truncate_prompt_tokens is 0, expected at least 1, or -1 for what there is room for")
            self._set("truncate_prompt_tokens", count)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._set(name, integer(name, getattr(self, name), -1))
        if self.thinking_token_budget is not None:
            budget = integer("thinking_token_budget", self.thinking_token_budget, -1)
            self._set("thinking_token_budget", None if budget == -1 else budget)
        self._set("structured_outputs", _structured(self.structured_outputs))
        if self.structured_outputs is not None and (self.ignore_eos or self.min_tokens):
            raise RequestError("structured text ends when its form is complete; leave ignore_eos and min_tokens out")
        if isinstance(self.taps, str) or not isinstance(self.taps, Sequence) or not all(t in TAPS for t in self.taps):
            raise RequestError(f"taps is {shown(self.taps)}, expected a list of {', '.join(TAPS)}")
        self._set("taps", tuple(self.taps))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _number(self, name: str, expected: str, valid: Callable[[float], bool]) -> None:
        self._set(name, number(name, getattr(self, name), expected, valid))

    @property
    def greedy(self) -> bool:
        """Whether the largest logit wins."""
        return self.temperature < GREEDY_BELOW

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
        return bool(
            self.has_penalties
            or self.logit_bias
            or self.bad_words
            or self.min_tokens
            or self.structured_outputs
            or self.allowed_token_ids
        )


#: Parameters that are true or false.
_BOOLEANS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "skip_reading_prefix_cache",
)


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias is {shown(value)}, expected a mapping from token id to a number")
    out: dict[int, float] = {}
    for key, bias in value.items():
        written = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 20
        token = integer("logit_bias", int(key) if written else key, 0)
        if token in out:
            raise RequestError(f"logit_bias names token {token} twice")
        out[token] = number("logit_bias", bias, "numbers from -100 to 100", lambda v: -100 <= v <= 100)
    return out


def _structured(value: Any) -> StructuredOutputsParams | None:
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return StructuredOutputsParams(**value)
    if value is not None and not isinstance(value, StructuredOutputsParams):
        raise RequestError(f"structured_outputs is {shown(value)}, expected a StructuredOutputsParams")
    return value
