"""Grammars are compiled within bounds, and texts of one grammar do not use up what others need."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from seekforge.common.errors import RequestError
from seekforge.runtime import StructuredOutputsParams as Form
from seekforge.runtime.sampling import guided
from seekforge.runtime.sampling.grammar_compiler import TRIAL_SECONDS, Trial
from seekforge.runtime.sampling.guided import Grammars
from seekforge.runtime.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

INTEGER = {"type": "integer"}


@pytest.fixture(scope="module")
def grammars(tiny_checkpoint: Path, tiny_config) -> Grammars:
    return Grammars(Tokenizer(tiny_checkpoint / "tokenizer.json"), tiny_config.vocab_size, (1,))


@pytest.mark.parametrize(
    "form",
    [
        {"json": {"type": "integer", "multipleOf": 999_983}},
        {"json": {"type": "object", "patternProperties": {f"^p{i}$": INTEGER for i in range(1000)}}},
        {"json": {"type": "object", "properties": {f"p{i}": INTEGER for i in range(8000)}}},
        {"regex": "(x|y|)" * 30_000},
        {"grammar": 'start: %json {"type": "integer", "multipleOf": 999983}'},
    ],
    ids=["multipleOf", "patternProperties", "properties", "regex", "grammar"],
)
def test_what_compiles_for_ever_is_refused_for_little(grammars: Grammars, form: dict) -> None:
    before, children = time.process_time(), os.times()
    with pytest.raises(RequestError, match=r"cannot be used: (compiling it takes|grammar size)") as caught:
        grammars.compile(Form(**form), 100)
    after = os.times()
    assert "\n" not in str(caught.value)
    assert time.process_time() - before < TRIAL_SECONDS  # nothing of it was done in this process
    assert after.children_user - children.children_user < TRIAL_SECONDS + 2
    assert grammars.compile(Form(regex="a|b"), 100)


@pytest.mark.parametrize("regex", ["(a|a)*b{100000}", "(.{0,1000}){0,1000}x"])
def test_what_fails_some_tokens_later_is_refused_at_once(grammars: Grammars, regex: str) -> None:
    with pytest.raises(RequestError, match="too many expressions"):
        grammars.compile(Form(regex=regex), 100)


def test_a_text_that_uses_up_its_grammar_harms_no_other_one(grammars: Grammars) -> None:
    """The library keeps one automaton for all texts of a grammar, and it may be full."""
    start = grammars.compile(Form(regex="(?:.*a.{200}){3}"), 1000)
    letters = [token for byte in b"ab" for token in grammars._tokenizer.encode(chr(byte))]
    other, draw = start(), random.Random(2)
    assert other.allowed()[letters].all()
    other.advance(letters[1])
    with pytest.raises(RequestError, match="too many expressions"):
        for _ in range(20):  # each text has states of its own
            text = start()
            for _ in range(290):
                allowed = text.allowed()
                text.advance(draw.choice([token for token in letters if allowed[token]]))
    for matcher in (other, start()):
        for token in letters:
            assert matcher.allowed()[token]
            matcher.advance(token)


def test_a_text_whose_masks_take_too_long_ends(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = grammars.compile(Form(regex="[ab]*"), 100)()
    monkeypatch.setattr(guided, "_MASK_SECONDS", 0.0)
    monkeypatch.setattr(guided, "_MASK_SECONDS_PER_TOKEN", 1e-9)
    with pytest.raises(RequestError, match=r"took .* s for \d+ tokens, expected at most .* s; make the form simpler"):
        for _ in range(10_000):
            matcher.advance(int(np.flatnonzero(matcher.allowed())[0]))


def test_a_trial_goes_on_after_its_process_has_ended() -> None:
    trial = Trial()
    grammar = '{"grammars": [{"lark_grammar": "start: /ab/"}]}'
    assert trial.fault(grammar, 300) is None
    assert trial._process is not None
    first = trial._process.pid
    assert "EOF" in (trial.fault("{", 300) or "")
    assert trial._process.pid == first
    trial._process.send_signal(signal.SIGABRT)  # as where the library has no memory left
    trial._process.wait()
    assert "memory" in (trial.fault(grammar, 300) or "")
    assert trial.fault(grammar, 300) is None


def test_a_fork_has_a_process_of_its_own() -> None:
    trial = Trial()
    grammar = '{"grammars": [{"lark_grammar": "start: /ab/"}]}'
    assert trial.fault(grammar, 300) is None
    child = os.fork()
    if child == 0:
        os._exit(0 if trial.fault(grammar, 300) is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert trial.fault(grammar, 300) is None
