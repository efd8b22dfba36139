"""The bodies of requests, checked. A field that is null is one that is not there.

What changes nothing about the answer is taken and ignored (`IGNORED`); what would change it and is not done here is
refused by name, since a server that takes a parameter promises what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar

from seekforge.common.errors import RequestError
from seekforge.common.records import Record, RecordError, UnknownKeyError

_Body = TypeVar("_Body", bound=Record)

#: Keys of any body that change nothing about the answer.
IGNORED: Final = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "verbosity",
    )
)
#: Keys that are known and refused -> what to do instead.
REFUSED: Final[Mapping[str, str]] = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "suffix": "put it into the prompt",
    "audio": "this model speaks text",
    "modalities": "this model speaks text",
    "web_search_options": "give the model a tool that searches",
    "prediction": "speculation is an option of the server (--num-speculative-tokens)",
    "guided_json": 'use response_format, or structured_outputs {"json": ...}',
    "guided_regex": 'use structured_outputs {"regex": ...}',
    "guided_choice": 'use structured_outputs {"choice": ...}',
    "guided_grammar": 'use structured_outputs {"grammar": ...}',
    "chat_template": "the server encodes conversations as the model was trained; use /v1/completions for another form",
    "mm_processor_kwargs": "this model reads text",
    "documents": "put them into a message",
}


class BodyError(RequestError):
    """A body cannot be served.

    Attributes:
        param: the key that is at fault, as a path; nothing where it is the body.
    """

    def __init__(self, message: str, param: str = "") -> None:
        super().__init__(message)
        self.param = param


class StreamOptions(Record):
    """How a stream is written.

    Attributes:
        include_usage: a last chunk says how many tokens there were.
        include_obfuscation: taken and ignored: nothing is padded.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(Record):
    """What all bodies that generate have in common; each is documented at `SamplingParams`."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    priority: int | None = None
    return_token_ids: bool | None = None


class CompletionBody(GenerationBody):
    """The body of /v1/completions.

    Attributes:
        prompt: text, texts, token ids, or lists of token ids: one choice (or n) for each.
        echo: the prompt is part of the answer, with its log-probabilities where `logprobs` is there.
        logprobs: log-probabilities of each token and of so many likely ones.
        best_of: generate so many, return the best n.
    """

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


class ChatCompletionBody(GenerationBody):
    """The body of /v1/chat/completions.

    Attributes:
        messages: the conversation.
        tools: functions that the model may call.
        tool_choice: "none", "auto", "required", or {"type": "function", "function": {"name": ...}}.
        parallel_tool_calls: false: one call at most.
        max_completion_tokens: `max_tokens` by its newer name.
        logprobs, top_logprobs: log-probabilities of each token, and of so many likely ones.
        reasoning_effort: "none" answers at once; any other lets the model think first.
        thinking_token_budget: tokens after which a thought is closed.
        chat_template_kwargs: {"thinking": true} lets the model think first.
        add_generation_prompt, continue_final_message: whether an answer is begun, or the last message gone on with.
        include_reasoning: false leaves the reasoning out of the answer.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking_token_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None


class TokenizeBody(Record):
    """The body of /tokenize: a prompt or a conversation.

    Attributes:
        prompt: text.
        messages, tools, chat_template_kwargs, add_generation_prompt, continue_final_message: those of a chat.
        return_token_strs: also what each token looks like.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Record):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[int]


def read_body(kind: type[_Body], raw: Any) -> _Body:
    """Return the body that a decoded JSON value is.

    Raises:
        BodyError: it is none.
    """
    if not isinstance(raw, dict):
        raise BodyError(f"the body is {type(raw).__name__}, expected a JSON object")
    said = {name: value for name, value in raw.items() if value is not None and name not in IGNORED}
    for name in said:
        if name in REFUSED and name not in kind.model_fields:
            raise BodyError(f"{name} is not done here; {REFUSED[name]}", name)
    if "stream_options" in said and "stream_options" in kind.model_fields and not said.get("stream"):
        raise BodyError("stream_options needs stream to be true", "stream_options")
    try:
        return kind.model_validate(said)
    except RecordError as error:
        path = ".".join(map(str, error.path))
        unknown = isinstance(error, UnknownKeyError)
        problem = "is not known here; leave it out" if unknown else error.problem
        raise BodyError(f"{path or 'the body'} {problem}", path) from None
