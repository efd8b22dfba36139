"""Structured outputs over the whole vocabulary: added tokens, thousands of choices, and choices within max_tokens."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekforge.common.errors import RequestError
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime import StructuredOutputsParams as Form
from seekforge.runtime.sampling.guided import Grammars
from seekforge.runtime.text.tokenizer import Tokenizer

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer(tiny_checkpoint / "tokenizer.json")


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, tiny_config) -> Grammars:
    return Grammars(tokenizer, tiny_config.vocab_size, (EOS,))


def walk(grammars: Grammars, form: Form, *, prefer, seed: int = 0, most: int = 100) -> list[int]:
    """Take allowed tokens, those of `prefer` first, to the end of the text; nothing that is allowed is refused."""
    matcher, draw, out = grammars.compile(form, most)(), random.Random(seed), []
    for _ in range(most):
        allowed = np.flatnonzero(matcher.allowed()).tolist()
        token = max(allowed, key=lambda one: (one in prefer, draw.random()))
        matcher.advance(token)
        if token == EOS:
            return out
        out.append(token)
    raise AssertionError("no end")


def escaped(text: str) -> str:
    return re.sub(r"([|.*+?()\[\]{}\\])", r"\\\1", text)


FORMS = {
    "regex": lambda text: Form(regex=f"a{escaped(text)}b"),
    "choice": lambda text: Form(choice=[f"a{text}b"]),
    "json": lambda text: Form(json={"enum": [f"a{text}b"]}),
    "grammar": lambda text: Form(grammar="start: " + json.dumps(f"a{text}b")),
}


@pytest.mark.parametrize("kind", FORMS)
def test_the_text_of_every_added_token_can_be_generated(kind: str, tokenizer: Tokenizer, grammars: Grammars) -> None:
    pytest.importorskip("llguidance")
    for token, text in tokenizer.added_texts.items():
        for prefer in ({token}, set()):
            ids = walk(grammars, FORMS[kind](text), prefer=prefer, seed=token)
            found = tokenizer.decode(ids)
            assert (json.loads(found) if kind == "json" else found) == f"a{text}b"
            if prefer and token not in tokenizer.special_ids:
                assert token in ids  # the model may say it as it learned it
            assert not tokenizer.special_ids & {*ids}


def test_a_grammar_may_name_any_added_token(tokenizer: Tokenizer, grammars: Grammars) -> None:
    pytest.importorskip("llguidance")
    for token, text in tokenizer.added_texts.items():
        if token != EOS:
            grammar = f'start: "a" {text} /[b-c]/ x // {text}\nx: "{text}"'
            ids = walk(grammars, Form(grammar=grammar), prefer={token})
            assert ids[1] == token and tokenizer.decode(ids[2:])[1:] == text


@pytest.mark.parametrize("form", [Form(regex=r"[^x]{40}"), Form(json={"type": "string", "maxLength": 40})], ids=repr)
def test_free_text_takes_any_token_that_is_allowed(form: Form, tokenizer: Tokenizer, grammars: Grammars) -> None:
    pytest.importorskip("llguidance")
    for seed in range(5):
        walk(grammars, form, prefer={*tokenizer.added_texts}, seed=seed)
        walk(grammars, form, prefer=set(), seed=seed, most=300)


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text("ab<>think/é🎉 ", min_size=1, max_size=30), min_size=1, max_size=6),
    most=st.integers(1, 34),
    seed=st.integers(0, 99),
)
def test_a_choice_is_completed_within_max_tokens_or_refused(tokenizer, grammars, texts, most, seed) -> None:
    form = Form(choice=texts)
    try:
        grammars.compile(form, most)
    except RequestError as error:
        assert "raise it to" in str(error)
        assert most < 1 + min(len(tokenizer.encode(text)) for text in texts)
        return
    assert tokenizer.decode(walk(grammars, form, prefer=set(), seed=seed, most=most)) in texts


def test_thousands_of_choices(grammars: Grammars, tokenizer: Tokenizer) -> None:
    labels = [f"label {number}" for number in range(20_000)]
    found = {tokenizer.decode(walk(grammars, Form(choice=labels), prefer=set(), seed=seed)) for seed in range(20)}
    assert found <= {*labels} and len(found) > 5


def test_choices_that_no_completion_can_hold_are_not_counted(grammars: Grammars, tokenizer: Tokenizer) -> None:
    long = "xy" * 100_000
    matcher = grammars.compile(Form(choice=[long, "z"]), 100)
    choices = grammars._choices((long, "z"))
    assert np.flatnonzero(matcher().allowed()).tolist() == tokenizer.encode("z")
    assert choices._needed.cache_info().currsize == 1
    with pytest.raises(RequestError, match="max_tokens is 100; raise it to"):
        grammars.compile(Form(choice=[long]), 100)
    with pytest.raises(RequestError, match="expected at most"):
        grammars.compile(Form(choice=["x" * (1 << 20), "y"]), 100)


def test_what_is_kept_of_choices_is_bounded(
    monkeypatch: pytest.MonkeyPatch, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    monkeypatch.setattr("seekforge.runtime.sampling.choices._MAX_MASK_BYTES", 3 * grammars._vocab_size)
    form = Form(choice=[f"choice {number}" for number in range(300)])
    assert {tokenizer.decode(walk(grammars, form, prefer=set(), seed=seed)) for seed in range(9)} <= {*form.choice}
    assert len(grammars._choices(tuple(form.choice))._masks) == 3


def test_the_model_s_other_ends_are_ends_of_a_form(tokenizer: Tokenizer, tiny_config) -> None:
    pytest.importorskip("llguidance")
    grammars = Grammars(tokenizer, tiny_config.vocab_size, (EOS, 1004))
    for form in (Form(regex="a"), Form(choice=["a"])):
        matcher = grammars.compile(form, 9)()
        matcher.advance(*tokenizer.encode("a"))
        assert np.flatnonzero(matcher.allowed()).tolist() == [EOS, 1004]
        matcher.advance(1004)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Form(regex="("), "the grammar cannot be used"),
        (Form(grammar="begin: 'a'"), "the grammar cannot be used"),
        (Form(json={"type": "nothing"}), "the grammar cannot be used"),
        (Form(json=False), "the JSON schema cannot be used"),
        (Form(choice=["a" * 900]), "max_tokens is 16; raise it to"),
    ],
    ids=repr,
)
def test_forms_that_cannot_be_are_refused_at_once(toy_engine: Path, form: Form, message: str) -> None:
    pytest.importorskip("llguidance")
    with LLM(toy_engine, threads=1, num_blocks=9, self_check=False) as llm:
        with pytest.raises(RequestError, match=message) as caught:
            llm.generate("x", SamplingParams(structured_outputs=form))
        assert "\n" not in str(caught.value)
        assert llm.generate("x", SamplingParams(max_tokens=2))[0].finished


def test_json_options(grammars: Grammars, tokenizer: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["a"]}
    closed = Form(json=schema, disable_additional_properties=True, disable_any_whitespace=True)
    for seed in range(5):
        text = tokenizer.decode(walk(grammars, closed, prefer=set(), seed=seed))
        assert {*json.loads(text)} == {"a"} and " " not in text
    ends = tokenizer.encode("}") + tokenizer.encode('"')
    assert isinstance(json.loads(tokenizer.decode(walk(grammars, Form(json_object=True), prefer={*ends}))), dict)


def test_closing_objects_touches_schemas_and_nothing_else(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """A property may be called like a keyword, and what `enum` holds is a value."""
    pytest.importorskip("llguidance")
    inner = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]}
    value = {"type": "object", "properties": {"x": 1}}
    schema = {
        "type": "object",
        "properties": {"properties": inner, "items": {"enum": [value]}, "l": {"type": "array", "items": inner}},
        "required": ["properties", "items", "l"],
    }
    closed = Form(json=schema, disable_additional_properties=True, disable_any_whitespace=True)
    for seed in range(3):
        found = json.loads(tokenizer.decode(walk(grammars, closed, prefer={*tokenizer.encode("]")}, seed=seed)))
        assert {*found} == {"properties", "items", "l"} and found["properties"] == {"x": 1} and found["items"] == value
        assert all(one == {"x": 1} for one in found["l"])
