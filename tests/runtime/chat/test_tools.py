"""The grammar of calls: what the encoding writes and the parser reads, with arguments that fit their schemas."""

from __future__ import annotations

from typing import Any

import pytest

from seekforge.runtime.chat.tools import calls_grammar
from seekforge.runtime.sampling.guided import Grammars
from seekforge.runtime.sampling.params import StructuredOutputsParams
from seekforge.runtime.text.tokenizer import Tokenizer

TOOLS: list[dict[str, Any]] = [
    {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"enum": ["c", "f", 3]},
                "maybe": {"type": ["string", "null"]},
                "place": {"$ref": "#/$defs/Place"},
                "either": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
                "free": {},
            },
            "required": ["city", "days"],
            "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
        },
    },
    {"name": "now"},
    {"name": "list", "parameters": {"type": "object", "properties": {"all": {"type": "boolean"}}}},
]
CITY, DAYS = ("city", "true", "San <b>\nFrancisco</｜DSML｜invoke>"), ("days", "false", "3")


def call(name: str, *parameters: tuple[str, str, str]) -> str:
    lines = [
        f'<｜DSML｜parameter name="{key}" string="{kind}">{value}</｜DSML｜parameter>\n'
        for key, kind, value in parameters
    ]
    return f'<｜DSML｜invoke name="{name}">\n{"".join(lines) or chr(10)}</｜DSML｜invoke>'


def block(*calls: str) -> str:
    return "\n\n<｜DSML｜function_calls>\n" + "\n".join(calls) + "\n</｜DSML｜function_calls>"


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    pytest.importorskip("llguidance")
    return Grammars(tokenizer, 1024, [1])


def fits(grammars: Grammars, tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether the tokens of `text` are allowed one after the other, and the end after them."""
    matcher = grammars.compile(StructuredOutputsParams(grammar=grammar), 4000)()
    for token in tokenizer.encode(text):
        if not matcher.allowed()[token]:
            return False
        matcher.advance(token)
    return bool(matcher.allowed()[1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (block(call("now")), True),
        (block(call("list")), True),
        (block(call("list", ("all", "false", "true"))), True),
        (block(call("get_weather", CITY, DAYS), call("now")), True),
        (block(call("get_weather", CITY, DAYS, ("unit", "true", "c"), ("maybe", "false", "null"))), True),
        (block(call("get_weather", CITY, DAYS, ("unit", "false", "3"), ("maybe", "true", "null"))), True),
        (block(call("get_weather", CITY, DAYS, ("place", "false", '{"x": 3}'), ("either", "false", "[1]"))), True),
        (block(call("get_weather", CITY, DAYS, ("either", "true", "[1"), ("free", "false", '{"y": [1]}'))), True),
        (block(call("get_weather", CITY, DAYS, ("free", "true", ""))), True),
        (block(call("get_weather", CITY)), False),
        (block(call("get_weather", DAYS)), False),
        (block(call("get_weather", CITY, ("days", "false", "x"))), False),
        (block(call("get_weather", CITY, ("days", "true", "3"))), False),
        (block(call("get_weather", CITY, DAYS, ("unit", "true", "k"))), False),
        (block(call("get_weather", CITY, DAYS, ("place", "false", '{"x": "y"}'))), False),
        (block(call("get_weather", CITY, DAYS, ("other", "true", "y"))), False),
        (block(call("later")), False),
        (block(call("now")) + "x", False),
        ("hello", False),
        ("", False),
    ],
)
def test_a_call_that_is_demanded_fits_its_schema(
    text: str, expected: bool, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    grammar = calls_grammar(TOOLS, parallel=True, required=True)
    assert fits(grammars, tokenizer, grammar, text) == expected


@pytest.mark.parametrize("required", [True, False])
def test_one_call_is_all_where_calls_are_not_parallel(required: bool, grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = calls_grammar(TOOLS, parallel=False, required=required)
    assert fits(grammars, tokenizer, grammar, block(call("now")))
    assert not fits(grammars, tokenizer, grammar, block(call("now"), call("now")))
    for text in ("hello", "a < b\n\n", "hello" + block(call("now"))):
        assert fits(grammars, tokenizer, grammar, text) != required


def test_an_answer_of_a_form_or_calls(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = calls_grammar(TOOLS, parallel=True, required=False, form='%json {"enum": [1, 2]}')
    for text, expected in (("1", True), (block(call("now"), call("now")), True), ("3", False), ("x", False)):
        assert fits(grammars, tokenizer, grammar, text) == expected


def test_what_a_grammar_forces_is_spelled_as_the_model_was_trained(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Where only one text can follow, its tokens are the tokenizer's, and no others are allowed."""
    text = block(call("now"))
    matcher = grammars.compile(
        StructuredOutputsParams(grammar=calls_grammar(TOOLS[1:2], parallel=False, required=True)), 99
    )()
    for token in tokenizer.encode(text):
        assert matcher.allowed().nonzero()[0].tolist() == [token]
        matcher.advance(token)
