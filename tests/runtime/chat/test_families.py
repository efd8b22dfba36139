"""Conversations of GLM-5, DeepSeek-V3 and Kimi-K2: the sandboxed template of a checkpoint, answers by their tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.chat_families import ASK, GLM, KIMI, TOOLS, V3, add_tokens

from seekforge.common.errors import EngineError, RequestError
from seekforge.runtime.chat import ChatProcessor, ChatRequest, ChatTemplate, Message
from seekforge.runtime.chat.template import checkpoint_template
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.text.tokenizer import Tokenizer


def request(model_type: str, template: str | None, tokenizer: Tokenizer, **options: Any) -> ChatRequest:
    messages = options.pop("messages", ASK)
    return ChatProcessor(model_type, tokenizer, template).request(messages, SamplingParams(), options)


def answer(request: ChatRequest, text: str) -> Message:
    parser = request.parser()
    for _ in (*parser.push(text), *parser.finish()):
        pass
    return parser.message


def test_a_turn_of_glm_with_a_call_and_its_result(tokenizer: Tokenizer) -> None:
    first = request("glm_moe_dsa", GLM, tokenizer, tools=TOOLS)
    assert first.prompt.text.endswith("<|user|>q<|assistant|><think>") and first.prompt.in_reasoning
    message = answer(first, 'why</think><tool_call>f<arg_key>a</arg_key><arg_value>{"b": 1}</arg_value></tool_call>')
    (call,) = message.tool_calls
    assert message.reasoning_content == "why" and json.loads(call.arguments) == {"a": {"b": 1}}
    result = {"role": "tool", "content": "r"}
    again = request("glm_moe_dsa", GLM, tokenizer, tools=TOOLS, messages=[*ASK, message, result])
    assert '<tool_call>f<arg_key>a</arg_key><arg_value>{"b": 1}</arg_value></tool_call>' in again.prompt.text
    assert "<tool_response>r</tool_response>" in again.prompt.text


def test_a_turn_of_deepseek_v3_with_a_call_and_its_result(tokenizer: Tokenizer) -> None:
    first = request("deepseek_v3", V3, tokenizer, tools=TOOLS, chat_template_kwargs={"thinking": True})
    assert first.prompt.text.endswith("<｜User｜>q<｜Assistant｜><think>") and first.prompt.in_reasoning
    called = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
    message = answer(first, f"why</think>x<｜tool▁calls▁begin｜>{called}<｜tool▁calls▁end｜>")
    assert (message.reasoning_content, message.content) == ("why", "x")
    messages = [*ASK, message, {"role": "tool", "content": "r"}]
    assert called in request("deepseek_v3", V3, tokenizer, tools=TOOLS, messages=messages).prompt.text


def test_a_turn_of_kimi_gives_the_result_to_the_call_of_its_id(tokenizer_file: Path, tmp_path: Path) -> None:
    add_tokens(tokenizer_file, ("<|tool_call_begin|>",), tmp_path / "tokenizer.json")
    with_kimi = Tokenizer(tmp_path / "tokenizer.json")
    first = request("deepseek_v3", KIMI, with_kimi, tools=TOOLS)
    assert first.syntax == "kimi" and not first.params.skip_special_tokens
    called = '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>'
    message = answer(first, f"x<|tool_calls_section_begin|>{called}<|tool_calls_section_end|>")
    (call,) = message.tool_calls
    assert (call.id, call.name, message.content) == ("functions.f:0", "f", "x")
    result = {"role": "tool", "tool_call_id": call.id, "content": "r"}
    again = request("deepseek_v3", KIMI, with_kimi, tools=TOOLS, messages=[*ASK, message, result])
    assert called in again.prompt.text and "## Return of functions.f:0\nr" in again.prompt.text


@pytest.mark.parametrize(("model_type", "template"), [("glm_moe_dsa", GLM), ("deepseek_v3", V3)])
def test_thinking_is_one_option_for_all(model_type: str, template: str, tokenizer: Tokenizer) -> None:
    for thinking in (True, False):
        made = request(model_type, template, tokenizer, chat_template_kwargs={"thinking": thinking})
        assert made.prompt.in_reasoning == thinking


@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": "required"},
        {"parallel_tool_calls": False},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_what_only_a_grammar_of_calls_holds_is_refused(options: dict[str, Any], tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="is enforced for calls of deepseek_v32 alone, this model is glm_moe_dsa"):
        request("glm_moe_dsa", GLM, tokenizer, tools=TOOLS, **options)


def test_a_family_without_an_encoding_and_a_template_says_so(tokenizer: Tokenizer) -> None:
    with pytest.raises(EngineError, match="carries no template of its checkpoint"):
        request("glm_moe_dsa", None, tokenizer)


def test_the_template_of_an_engine_is_found(tmp_path: Path) -> None:
    assert checkpoint_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": [{"name": "other", "template": "x"}]}))
    assert checkpoint_template(tmp_path) is None
    config.write_text(json.dumps({"chat_template": V3}))
    assert checkpoint_template(tmp_path) == V3
    (tmp_path / "chat_template.jinja").write_text(GLM)
    assert checkpoint_template(tmp_path) == GLM


def doubled(step: str) -> str:
    """A template that takes a step forty times."""
    return "{% set n = namespace(s='x\"xxxxxx', i=9, l=[]) %}{% for i in range(40) %}" + step + "{% endfor %}"


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "more than 1,000,000 steps"),
        ("{{ 'x' * 99999999 }}", "repeats a text"),
        ("{{ 9 ** 999999999 }}", "uses '\\*\\*'"),
        ("{{ '%999999999d' % 1 }}", "uses '%'"),
        ("{{ '%999999999d' | format(1) }}", "No filter named 'format'"),
        (
            "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "text of more than 64,000,000",
        ),
        (doubled("{% set n.s = n.s ~ n.s %}"), "text of more than 64,000,000"),
        (doubled("{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}"), "text of more than 64,000,000"),
        ("{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + doubled("{% set n.s = m(n.s) %}"), "text of more than 64"),
        (doubled("{% set n.s = n.s.replace('x', n.s) %}"), "text of more than 64,000,000"),
        (doubled("{% set n.s = n.s | replace('x', n.s) %}"), "text of more than 64,000,000"),
        (doubled("{% set n.s = n.s.join(n.s) %}"), "text of more than 64,000,000"),
        (doubled("{% set n.s = n.s | join(n.s) %}"), "text of more than 64,000,000"),
        (doubled("{% set n.s = n.s | tojson | tojson %}"), "text of more than 64,000,000"),
        ("{{ 'x' | indent(99999999, first=true) }}", "text of more than 64,000,000"),
        ("{{ 'x'.ljust(99999999999) }}", "uses ljust"),
        ("{{ ('x' | attr('zfill'))(99999999999) }}", "uses zfill"),
        ("{{ '{:>99999999999}'.format(1) }}", "uses format"),
        ("{{ 'x'.format_map({}) }}", "uses format_map"),
        ("{{ 1 | round(999999999, 'floor') }}", "No filter named 'round'"),
        ("{{ [1] | batch(99999999999, 0) | list }}", "No filter named 'batch'"),
        ("{{ lipsum(n=99999999) }}", "'lipsum' is undefined"),
        (doubled("{% set n.l = [n.l, n.l] %}") + "{{ n.l }}", "text of more than 64,000,000"),
        (doubled("{% set n.l = [n.l, n.l] %}") + "{{ n.l | tojson }}", "text of more than 64,000,000"),
        (doubled("{% set n.l = {'a': n.l, 'b': n.l} %}") + "{{ n.l ~ '' }}", "text of more than 64,000,000"),
        (doubled("{% set n.i = n.i * n.i %}"), "number of more than 1,024 bits"),
    ],
)
def test_a_template_of_a_stranger_is_bounded(template: str, fault: str, tokenizer: Tokenizer) -> None:
    conversation = [Message("user", "q")]
    with pytest.raises(RequestError, match=fault):
        ChatTemplate(template).render(conversation, tokenizer, tools=(), add_generation_prompt=True, variables={})


def test_what_templates_do_with_texts_is_computed_as_ever(tokenizer: Tokenizer) -> None:
    template = (
        "{% set t = ['b', 'a'] %}{% set s %}{{ t[1] }}-{% endset %}{{ s ~ 1 ~ none ~ t[0] }} {{ t | join(', ') }} "
        "{{ [{'n': {'k': 1}}, {'n': {'k': 2}}] | join('+', attribute='n.k') }} {{ '/'.join(t) }} "
        "{{ 'aaa'.replace('a', 'b', 1) }} {{ 'aaa' | replace('a', 'b', 2) }} {{ 'x\ny\n\nz' | indent(2) }} "
        "{% for x in t %}{{ x.replace('a', 'c') }}{% endfor %} "
        "{{ t | map('upper') | list }} {{ 'a b'.split(' ')[-1] }} {{ (7 * 6) % 5 }}"
    )
    prompt = ChatTemplate(template).render(
        [Message("user", "q")], tokenizer, tools=(), add_generation_prompt=True, variables={}
    )
    assert prompt.text == "a-1Noneb b, a 1+2 b/a baa bba x\n  y\n\n  z bc ['B', 'A'] b 2"
