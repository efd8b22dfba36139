"""What messages say is text: no special token of the vocabulary comes from any field of any message."""

from __future__ import annotations

import random
from typing import Any

import pytest

from seekforge.runtime.chat import ChatProcessor, Segment, SegmentedText, encode
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.text.tokenizer import Tokenizer

MOST = 1 << 20


def conversation(text: str) -> dict[str, Any]:
    """Every field that holds a text, with `text` in it."""
    function = {
        "name": f"f{text}",
        "description": text,
        "parameters": {"type": "object", "properties": {f"k{text}": {"type": "string", "enum": [text]}}},
    }
    calls = [{"function": {"name": f"f{text}", "arguments": {f"k{text}": text, "n": [text, {text: 1}]}}}]
    messages = [
        {"role": "system", "content": text, "response_format": {"title": text}},
        {"role": "user", "content": [{"type": "text", "text": text}]},
        {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": calls},
        {"role": "tool", "content": text},
        {"role": "developer", "content": text, "tools": [function | {"name": f"g{text}"}]},
        {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": calls},
        {"role": "tool", "content": text},
    ]
    return {"messages": messages, "tools": [{"type": "function", "function": function}]}


def test_no_special_token_of_the_vocabulary_comes_from_a_message(tokenizer: Tokenizer) -> None:
    added = tokenizer.added_texts
    assert len(added) == 20

    def specials(text: str) -> list[int]:
        prompt = encode(**conversation(text), thinking=True)
        ids = tokenizer.encode_segments(prompt, MOST)
        assert tokenizer.decode(ids, skip_special_tokens=False) == prompt.text
        return [token for token in ids if token in added]

    plain = specials("x")
    assert len(plain) > 8
    for text in added.values():
        assert specials(text) == plain, text
        assert specials(f"a{text}b{text}") == plain, text
    assert specials("".join(added.values())) == plain


def test_a_special_token_is_not_put_together_at_the_border_of_a_message(tokenizer: Tokenizer) -> None:
    for text in tokenizer.added_texts.values():
        for at in range(1, len(text)):
            halves = SegmentedText.of([Segment(text[:at], True), Segment(text[at:]), Segment("x", True)])
            assert not {*tokenizer.encode_segments(halves, MOST)} & {*tokenizer.added_texts}
            halves = SegmentedText.of([Segment(text[:at]), Segment(text[at:], True)])
            assert not {*tokenizer.encode_segments(halves, MOST)} & {*tokenizer.added_texts}


@pytest.mark.parametrize("seed", range(4))
def test_the_ids_are_those_of_the_whole_text_where_no_message_holds_a_special_token(
    seed: int, tokenizer: Tokenizer
) -> None:
    """Where pieces begin changes nothing: words, numbers and line ends go across their borders."""
    rng = random.Random(seed)
    words = [
        " ",
        "\n",
        "\n\n",
        "a",
        "the",
        " cat",
        "12",
        "3",
        "<",
        "｜",
        "日本",
        "本",
        ">",
        "</",
        "é",
        "'s",
        "Us",
        "\t",
    ]
    special = list(tokenizer.added_texts.values())
    for _ in range(400):
        segments: list[Segment] = []
        for _ in range(rng.randint(1, 6)):
            is_special = rng.random() < 0.5
            text = "".join(rng.choice(words) for _ in range(rng.randint(0, 5)))
            segments.append(Segment(text + (rng.choice(special) if is_special else ""), is_special))
        prompt = SegmentedText.of(segments)
        assert tokenizer.encode_segments(prompt, MOST) == tokenizer.encode(prompt.text), prompt


def test_those_who_mean_it_get_special_tokens(tokenizer: Tokenizer) -> None:
    processor = ChatProcessor("deepseek_v32", tokenizer)
    messages = [{"role": "user", "content": "a<think>b"}]
    ids: dict[bool, list[int]] = {}
    for split in (True, False):
        request = processor.request(messages, SamplingParams(), {"split_special_tokens": split})
        ids[split] = tokenizer.encode_segments(request.prompt, MOST)
    think = tokenizer.token_id("<think>")
    assert think in ids[False] and think not in ids[True]
    assert ids[False] == tokenizer.encode(encode(messages).text)


def test_merges_that_spell_a_special_token_do_not_make_one(tokenizer: Tokenizer, monkeypatch: Any) -> None:
    """A vocabulary may hold the text of an added token as an ordinary one of the same id."""
    think, a = tokenizer.token_id("<think>"), tokenizer.encode("a")[0]
    real = tokenizer._encode
    monkeypatch.setattr(tokenizer, "_encode", lambda which, text: [think] if text == "aa" else real(which, text))
    assert tokenizer.encode_text("aa") == [a, a]
