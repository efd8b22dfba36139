"""Bad words never stand in the text, whatever tokens spell it; and nothing else is banned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.sampling.bad_words import BadWords, Bans
from seekforge.runtime.text.matching import ROOT, Automaton
from seekforge.runtime.text.vocabulary import Vocabulary

WORDS = st.lists(st.text("ab\n é🎉", min_size=1, max_size=4), min_size=1, max_size=4)


@given(words=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=5), text=st.text("abc", max_size=20))
def test_an_automaton_knows_what_ends_and_what_begins(words: list[str], text: str) -> None:
    automaton, node = Automaton(words), ROOT
    for end in range(1, len(text) + 1):
        node = automaton.step(node, text[end - 1])
        ending = [word for word in words if text[:end].endswith(word)]
        found = automaton.found[node]
        assert (words[found] if found >= 0 else "") == max(ending, key=len, default="")
        begun = [n for word in words for n in range(1, len(word)) if text[:end].endswith(word[:n])]
        assert automaton.begun[node] == max(begun, default=0)


@given(
    tokens=st.lists(st.binary(max_size=3), min_size=1, max_size=40),
    prefix=st.binary(min_size=1, max_size=3),
    text=st.text("ab\x01é", min_size=1, max_size=2),
)
def test_a_vocabulary_finds_what_begins_with_and_what_contains(tokens: list[bytes], prefix: bytes, text: str) -> None:
    vocabulary = Vocabulary(tokens)
    assert sorted(vocabulary.starting(prefix)) == [i for i, one in enumerate(tokens) if one.startswith(prefix)]
    assert vocabulary.containing(text.encode()).tolist() == [i for i, one in enumerate(tokens) if text.encode() in one]


@settings(deadline=None)
@given(
    tokens=st.lists(st.text("ab\n é🎉", min_size=1, max_size=3).map(str.encode), min_size=1, max_size=30),
    pieces=st.lists(st.sampled_from([bytes([b]) for b in "é🎉".encode()]), max_size=4),
    words=WORDS,
    hidden=st.sets(st.integers(0, 3), max_size=2),
    draws=st.lists(st.integers(0, 10**6), max_size=25),
)
def test_exactly_the_tokens_that_complete_a_word_are_banned(tokens, pieces, words, hidden, draws) -> None:
    """Any vocabulary, half characters and tokens without text included; written as a plain search of the text."""
    vocabulary = [*tokens, *pieces]
    bans = Bans(words, Vocabulary(vocabulary), frozenset(hidden))
    state, output = BadWords(bans), []

    def texts(ids: list[int]) -> tuple[bytes, bytes]:
        known = [i for i in ids if i < len(vocabulary)]
        return b"".join(vocabulary[i] for i in known if i not in hidden), b"".join(vocabulary[i] for i in known)

    hidden_texts = [vocabulary[i] for i in hidden if i < len(vocabulary)]
    named = [w for w in words if any(text in w.encode() for text in hidden_texts)]
    for draw in draws:
        banned = {*bans.always.tolist(), *state.banned_now(output).tolist()}
        for token in range(len(vocabulary)):
            shown, written = texts([*output, token])
            bad = any(w.encode() in shown for w in words) or any(w.encode() in written for w in named)
            assert bad == (token in banned), (output, token)
        left = [token for token in range(len(vocabulary)) if token not in banned]
        if not left:
            return
        output.append(left[draw % len(left)])


@pytest.fixture(scope="module")
def llm(toy_engine: Path):
    with LLM(toy_engine, threads=1, num_blocks=40, self_check=False) as llm:
        yield llm


@pytest.mark.parametrize(
    "words",
    [["\n"], [" "], ["the"], [" the"], ["a", "e", "i"], ["é"], ["日"], ["\t", "\n"], ["cat sat"], ["🎉"], ["<think>"]],
    ids=repr,
)
def test_no_text_holds_a_bad_word(llm: LLM, words: list[str]) -> None:
    """Among hot draws, with penalties that drive the model through its vocabulary, and among neighbors."""
    options = {"temperature": 8.0, "max_tokens": 200, "ignore_eos": True, "n": 6, "seed": 3}
    free, banned = llm.generate(
        ["the cat", "the cat"], [SamplingParams(**options), SamplingParams(**options, bad_words=words)]
    )
    texts = [one.text for one in banned.outputs]
    assert not any(word in text for text in texts for word in words)
    assert all(one.finish_reason == "length" for one in banned.outputs)
    if words not in (["cat sat"], [" the"], ["日"], ["🎉"]):  # rarer than this draws
        assert any(word in one.text for one in free.outputs for word in words)


@pytest.mark.parametrize("skip", [True, False])
def test_the_text_of_a_special_token_bans_the_token(llm: LLM, skip: bool) -> None:
    tokenizer = llm.get_tokenizer()
    (eos,) = tokenizer.encode("<｜end▁of▁sentence｜>")
    params = SamplingParams(
        bad_words=["<｜end▁of▁sentence｜>", "the"],
        logit_bias={eos: 100},
        max_tokens=8,
        seed=1,
        skip_special_tokens=skip,
    )
    assert eos not in llm.generate("the cat", params)[0].outputs[0].token_ids
    # a letter of its name bans no token that has no text
    params = SamplingParams(bad_words=["e"], logit_bias={eos: 100}, max_tokens=8, seed=1)
    assert llm.generate("the cat", params)[0].outputs[0].token_ids == (eos,)


def test_bans_leave_the_choice_exact(llm: LLM) -> None:
    """A ban far down the vocabulary changes no draw that it does not touch."""
    tokenizer = llm.get_tokenizer()
    params = SamplingParams(max_tokens=60, seed=5, ignore_eos=True)
    plain = llm.generate("the cat", params)[0].outputs[0]
    words = [chr(code) for code in range(0x3400, 0x3440)]
    same = llm.generate("the cat", replace(params, bad_words=words))[0].outputs[0]
    spelled = {token for word in words for token in tokenizer.encode(word)}
    if not spelled & set(plain.token_ids):
        assert same.token_ids == plain.token_ids
