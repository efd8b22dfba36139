"""Templates of a user's own: in the sandbox, and without a way from a message to a special token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekforge.common.errors import RequestError
from seekforge.runtime.chat import ChatTemplate, Message, SegmentedText
from seekforge.runtime.text.tokenizer import Tokenizer

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>{% endif %}"
)


def render(
    template: str, tokenizer: Tokenizer, *contents: str, tools: Any = (), adds: bool = True, **variables: Any
) -> SegmentedText:
    messages = [Message("user", content) for content in contents]
    return ChatTemplate(template).render(
        messages, tokenizer, tools=tools, add_generation_prompt=adds, variables=variables
    )


def specials(prompt: SegmentedText, tokenizer: Tokenizer) -> list[str]:
    ids = tokenizer.encode_segments(prompt, 1 << 20)
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt.text
    return [tokenizer.added_texts[token] for token in ids if token in tokenizer.added_texts]


def test_a_template_is_rendered_with_the_usual_names(tokenizer: Tokenizer) -> None:
    prompt = render(PLAIN, tokenizer, " hello ", "é < 3")
    assert prompt.text == "<｜begin▁of▁sentence｜><｜User｜>hello<｜User｜>é < 3<｜Assistant｜><think>"
    assert prompt.in_reasoning and tokenizer.encode_segments(prompt, 999) == tokenizer.encode(prompt.text)
    assert not render(PLAIN, tokenizer, "a", adds=False).in_reasoning
    tools = [{"name": "f", "description": "é"}]
    assert render("{{ tools[0].function | tojson }}{{ x }}", tokenizer, "a", tools=tools, x=3).text == (
        '{"name": "f", "description": "é"}3'
    )


def test_no_special_token_comes_from_a_message(tokenizer: Tokenizer) -> None:
    expected = specials(render(PLAIN, tokenizer, "x"), tokenizer)
    for text in tokenizer.added_texts.values():
        for content in (text, f"a{text}b", text + text):
            assert specials(render(PLAIN, tokenizer, content), tokenizer) == expected, content


PIECES = st.lists(
    st.sampled_from(["<", ">", "think", "<think", "think>", "</", "｜", "<｜User", "User｜>", "<th", "ink>", "x", " "]),
    min_size=1,
    max_size=4,
).map("".join)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(PIECES, min_size=1, max_size=4))
def test_messages_side_by_side_put_no_special_token_together(tokenizer: Tokenizer, contents: list[str]) -> None:
    for template in (
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "<{% for m in messages %}{{ m.content }}{% endfor %}>",
    ):
        prompt = render(template, tokenizer, *contents)
        assert prompt.text.strip("<>") == "".join(contents).strip("<>")
        assert specials(prompt, tokenizer) == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "is no Jinja template"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{{ 1 // 0 }}", "fails: ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ x.y.z }}", "undefined"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails: OverflowError"),
        ("{% include '/etc/passwd' %}", "chat_template"),
    ],
)
def test_what_a_template_must_not_do_is_one_line(template: str, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        render(template, tokenizer, "a")
    assert "\n" not in str(caught.value)


def test_a_template_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        ChatTemplate(tmp_path / "none.jinja")
