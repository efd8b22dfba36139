"""From a conversation and its options to a prompt, sampling parameters, and what reads the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypedDict

from seekforge.common.errors import EngineError, RequestError
from seekforge.runtime.chat import markup
from seekforge.runtime.chat.encoding import encode_read, with_instructions
from seekforge.runtime.chat.messages import Message, dumped, read_messages, read_tools
from seekforge.runtime.chat.parser import ChatParser, Syntax
from seekforge.runtime.chat.tag_scanner import KIMI_TOKEN, TAGS
from seekforge.runtime.chat.template import template_reader
from seekforge.runtime.chat.tools import ToolChoice, calls_grammar, read_tool_choice
from seekforge.runtime.sampling.params import SamplingParams, StructuredOutputsParams
from seekforge.runtime.text.segments import Segment, SegmentedText
from seekforge.runtime.text.tokenizer import Tokenizer
from seekforge.runtime.values import boolean, shown

#: `model_type` -> whose tags its calls are written with.
SYNTAX: Final[dict[str, Syntax]] = {
    "deepseek_v32": "deepseek_v32",
    "deepseek_v3": "deepseek_v3",
    "glm_moe_dsa": "glm",
}
#: `model_type`s whose conversations are encoded here; others by the template of their checkpoint.
FAMILIES: Final = ("deepseek_v32",)
#: Tags that text must show where they are special tokens.
_TAGS: Final[dict[Syntax, tuple[str, ...]]] = {"deepseek_v32": (markup.THINK_START, markup.THINK_END), **TAGS}


class ChatOptions(TypedDict, total=False):
    """What a conversation may come with. Names and meanings are those of vLLM's `LLM.chat` and the OpenAI interface.

    Attributes:
        tools: functions that the model may call.
        tool_choice: "none", "auto", "required", or `{"type": "function", "function": {"name": ...}}`. The last two are
            enforced by a grammar, which needs the extra `guided`. None is "auto".
        parallel_tool_calls: False allows one call at most, by a grammar too.
        response_format: `{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {"schema": ...}}`: the
            answer has this form, behind the thought if there is one. A schema is told to the model as well.
        add_generation_prompt: False leaves out what begins the answer.
        continue_final_message: go on with the last message, the assistant's, which stays open.
        chat_template: a Jinja template (text, or the `Path` of a file) in place of the encoding of the model's family;
            it runs in Jinja's sandbox and needs the extra `templates`.
        chat_template_kwargs: `{"thinking": True}` lets the model reason before it answers. A template of one's own
            takes any names.
        split_special_tokens: True: special tokens written in messages are plain text. False makes them what they name:
            for those who trust every word of the conversation.
    """

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool
    response_format: Mapping[str, Any] | None
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template: str | Path | None
    chat_template_kwargs: Mapping[str, Any] | None
    split_special_tokens: bool


@dataclass(frozen=True)
class ChatRequest:
    """A conversation that can be answered.

    Attributes:
        prompt: what is continued.
        params: sampling parameters, with the form that the answer must have.
        tools: functions that may be called.
        reads_calls: whether calls are looked for in the answer.
        syntax: whose tags they are written with.
    """

    prompt: SegmentedText
    params: SamplingParams
    tools: tuple[Mapping[str, Any], ...]
    reads_calls: bool
    syntax: Syntax = "deepseek_v32"

    def parser(self) -> ChatParser:
        """Return what reads one answer."""
        return ChatParser(
            in_reasoning=self.prompt.in_reasoning,
            tools=self.tools or None,
            tool_calls=self.reads_calls,
            syntax=self.syntax,
        )


class ChatProcessor:
    """Makes requests of conversations, for one engine."""

    def __init__(self, model_type: object, tokenizer: Tokenizer, chat_template: str | None = None) -> None:
        """Keep what it needs.

        Args:
            model_type: the family of the model, as config.json names it.
            tokenizer: the tokenizer of the model.
            chat_template: the template of the checkpoint, for a family that has no encoding here.
        """
        self._model_type, self._tokenizer = model_type, tokenizer
        self._syntax: Syntax = SYNTAX.get(str(model_type), "deepseek_v32")
        if self._syntax == "deepseek_v3" and tokenizer.token_id(KIMI_TOKEN) is not None:
            self._syntax = "kimi"
        self._chat_template = chat_template
        self._template = template_reader()

    def request(self, messages: object, params: SamplingParams, options: Mapping[str, Any]) -> ChatRequest:
        """Return the request of one conversation.

        Args:
            messages: a list of `Message`, or of mappings with the keys of the OpenAI interface.
            params: the sampling parameters.
            options: those of `ChatOptions`.

        Raises:
            RequestError: messages that cannot stand like this, or an option that is none.
            EngineError: the model's family has no encoding here, or its vocabulary lacks a token of it.
        """
        unknown = sorted(options.keys() - ChatOptions.__annotations__.keys())
        if unknown:
            raise RequestError(f"chat has no {unknown[0]!r}; expected some of {', '.join(ChatOptions.__annotations__)}")
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params is {shown(params)}, expected SamplingParams")
        if not params.detokenize:
            raise RequestError("chat reads the text of the answer; leave detokenize true")
        conversation = read_messages(messages)
        tools = read_tools(options.get("tools"))
        known = (*tools, *(tool for message in conversation for tool in message.tools))
        choice = read_tool_choice(options.get("tool_choice"), known)
        schema, form = _read_format(options.get("response_format"), params)
        if choice.mode == "none":
            tools = ()
        prompt = self._prompt(conversation, tools, schema, options)
        parallel = _flag(options, "parallel_tool_calls", True)
        if self._syntax != "deepseek_v32":
            _check_unforced(choice, tools, parallel, form, str(self._model_type))
        structured = _structured(known, choice, parallel, form, params)
        if structured is not None:
            params = replace(params, structured_outputs=structured)
        special = self._tokenizer.special_ids
        if any(self._tokenizer.token_id(text) in special for text in _TAGS[self._syntax]):
            params = replace(params, skip_special_tokens=False)  # what ends the thought has to be read
        if params.structured_outputs is not None and not prompt.in_reasoning:
            params = replace(params, thinking_token_budget=None)  # the form begins at once: there is no thought to end
        return ChatRequest(prompt, params, known, choice.mode != "none", self._syntax)

    def _prompt(
        self,
        conversation: tuple[Message, ...],
        tools: tuple[Mapping[str, Any], ...],
        schema: Any,
        options: Mapping[str, Any],
    ) -> SegmentedText:
        adds = _flag(options, "add_generation_prompt", True)
        continues = _flag(options, "continue_final_message", False)
        kwargs = options.get("chat_template_kwargs") or {}
        if not isinstance(kwargs, Mapping):
            raise RequestError(f"chat_template_kwargs is {shown(kwargs)}, expected a mapping")
        source = options.get("chat_template")
        parses = self._syntax == "glm"
        if source is None and self._model_type not in FAMILIES:
            source, kwargs = self._chat_template, _both_names(kwargs)
        if source is not None:
            if not isinstance(source, (str, Path)):
                raise RequestError(f"chat_template is {shown(source)}, expected a Jinja template or the Path of one")
            if continues:
                raise RequestError("continue_final_message and chat_template do not go together; leave one out")
            prompt = self._template(source).render(
                conversation,
                self._tokenizer,
                tools=tools,
                add_generation_prompt=adds,
                variables=kwargs,
                parses_arguments=parses,
            )
        else:
            self._check_family()
            _check_end(conversation, continues=continues, adds=adds)
            prompt = encode_read(
                with_instructions(conversation, tools, schema),
                thinking=_thinking(kwargs),
                add_generation_prompt=adds,
                continue_final_message=continues,
            )
        if _flag(options, "split_special_tokens", True):
            return prompt
        return replace(prompt, segments=(Segment(prompt.text, True),))

    def _check_family(self) -> None:
        if self._model_type not in FAMILIES:
            raise EngineError(
                f"models of type {shown(self._model_type)} have no chat encoding here, those of "
                f"{', '.join(FAMILIES)} have, and this engine carries no template of its checkpoint; pass a "
                "chat_template, or a plain prompt to generate"
            )
        missing = [text for text in markup.CONTROL_TOKENS if self._tokenizer.token_id(text) is None]
        if missing:
            raise EngineError(
                f"tokenizer.json lacks the token {missing[0]}, which conversations need; take the tokenizer.json of "
                "the checkpoint, or pass a plain prompt to generate"
            )


def _flag(options: Mapping[str, Any], name: str, default: bool) -> bool:
    value = options.get(name)
    return default if value is None else boolean(name, value)


def _both_names(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the variables of a template with `thinking` as DeepSeek's know it, and `enable_thinking` as GLM's do."""
    said = kwargs.get("thinking", kwargs.get("enable_thinking"))
    if said is None:
        return kwargs
    return {"thinking": said, "enable_thinking": said} | dict(kwargs)


def _check_unforced(
    choice: ToolChoice,
    tools: tuple[Mapping[str, Any], ...],
    parallel: bool,
    form: StructuredOutputsParams | None,
    model_type: str,
) -> None:
    """Refuse what only a grammar of calls could hold, in a family whose calls have none here."""
    option = "tool_choice" if choice.mode == "required" else "" if parallel else "parallel_tool_calls"
    option = "response_format beside tools" if not option and form is not None and choice.mode != "none" else option
    if option and tools:
        raise RequestError(f"{option} is enforced for calls of {', '.join(FAMILIES)} alone, this model is {model_type}")


def _thinking(kwargs: Mapping[str, Any]) -> bool:
    unknown = sorted(map(str, kwargs.keys() - {"thinking"}))
    if unknown:
        raise RequestError(f"chat_template_kwargs has {unknown[0]!r}, expected 'thinking', which is true or false")
    return _flag(kwargs, "thinking", False)


def _check_end(conversation: tuple[Message, ...], *, continues: bool, adds: bool) -> None:
    """Refuse a conversation in which it is not the assistant's turn."""
    if continues or not adds:
        return
    last = conversation[-1]
    if last.role in ("assistant", "system"):
        way = ", or pass continue_final_message=True" if last.role == "assistant" else ""
        raise RequestError(f"the last message is of {last.role}; end with one of user, developer or tool{way}")
    if last.role == "tool":
        results = next((i for i, message in enumerate(reversed(conversation)) if message.role != "tool"), None)
        calls = 0 if results is None else len(conversation[-1 - results].tool_calls)
        if results is not None and results < calls:
            raise RequestError(f"the last {calls} tool calls have {results} results; give one for each, in their order")


def _read_format(value: Any, params: SamplingParams) -> tuple[Any, StructuredOutputsParams | None]:
    """Return the schema that is told to the model, and the form that the answer must have."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if value is None or kind == "text":
        return None, None
    if params.structured_outputs is not None:
        raise RequestError("response_format and structured_outputs are both there; leave one of them out")
    if kind == "json_object":
        return None, StructuredOutputsParams(json_object=True)
    inner = value.get("json_schema") if kind == "json_schema" else None
    if not isinstance(inner, Mapping) or inner.get("schema") is None:
        raise RequestError(
            f"response_format is {shown(value)}, expected type text, json_object, or json_schema with a schema"
        )
    dumped(inner["schema"], "response_format")
    return inner["schema"], StructuredOutputsParams(json=inner["schema"])


def _structured(
    tools: tuple[Mapping[str, Any], ...],
    choice: ToolChoice,
    parallel: bool,
    form: StructuredOutputsParams | None,
    params: SamplingParams,
) -> StructuredOutputsParams | None:
    """Return the form of the answer; None where it is that of `params`."""
    required = choice.mode == "required"
    if required and (form is not None or params.structured_outputs is not None):
        raise RequestError("tool_choice demands a call, which leaves no room for another form; leave one of them out")
    if choice.name is not None:
        tools = tuple(tool for tool in tools if tool["name"] == choice.name)
    if required:
        return StructuredOutputsParams(grammar=calls_grammar(tools, parallel=parallel, required=True))
    if choice.mode == "none" or params.structured_outputs is not None or (parallel and form is None):
        return form
    schema = None if form is None else form.json if form.json is not None else {"type": "object"}
    rule = None if schema is None else f"%json {schema if isinstance(schema, str) else json.dumps(schema)}"
    return StructuredOutputsParams(grammar=calls_grammar(tools, parallel=parallel, required=False, form=rule))
