"""The table of docs/sampling.md, row by row: what vLLM's parameters do here. Each row is run on the toy engine.

`python tests/runtime/sampling/test_vllm_parameters.py` writes the table into the document anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seekforge.common.errors import RequestError
from seekforge.runtime import LLM, SamplingParams, StructuredOutputsParams
from seekforge.runtime.values import OTHER_NAMES

DOCUMENT = Path(__file__).parents[3] / "docs" / "sampling.md"
BEGIN, END = "<!-- table: tests/runtime/sampling/test_vllm_parameters.py -->\n", "<!-- end of table -->\n"
EOS = "<｜end▁of▁sentence｜>"
HOT: dict[str, Any] = {"temperature": 2.0, "max_tokens": 12, "ignore_eos": True}
ONE_WAY: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"const": 1}},
    "required": ["a"],
    "additionalProperties": False,
}


def one(llm: LLM, prompt: Any = "the cat", **params: Any) -> Any:
    """Return the first completion of a seeded request."""
    return llm.generate(prompt, SamplingParams(**{"seed": 7} | params))[0].outputs[0]


def same(llm: LLM, given: dict[str, Any], other: dict[str, Any]) -> None:
    """Both ask for the same."""
    assert one(llm, **HOT | given).token_ids == one(llm, **HOT | other).token_ids


def refused(**params: Any) -> str:
    """Return the refusal of parameters."""
    with pytest.raises(RequestError) as caught:
        SamplingParams(**params)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def text_after(llm: LLM, count: int, **params: Any) -> str:
    return one(llm, **HOT | {"max_tokens": count} | params).text


def check_n(llm: LLM) -> None:
    (output,) = llm.generate("the cat", SamplingParams(n=3, seed=1, **HOT))
    assert [c.index for c in output.outputs] == [0, 1, 2] and len({c.token_ids for c in output.outputs}) == 3
    assert len(llm.generate("the cat", SamplingParams(n=2, temperature=0))[0].outputs) == 2
    refused(n=0), refused(n=129)


def check_best_of(llm: LLM) -> None:
    (output,) = llm.generate("the cat", SamplingParams(n=2, best_of=5, seed=1, **HOT))
    assert [c.index for c in output.outputs] == [0, 1]
    first, second = (c.cumulative_logprob / len(c.token_ids) for c in output.outputs)
    assert first >= second
    with pytest.raises(RequestError, match="best_of cannot be streamed"):
        llm.stream("the cat", SamplingParams(n=1, best_of=2))


def check_temperature(llm: LLM) -> None:
    same(llm, {"temperature": 0}, {"temperature": 5e-324})
    same(llm, {"temperature": None}, {"temperature": 1.0})
    same(llm, {"temperature": np.float32(2.0)}, {"temperature": 2})
    one(llm, temperature=1e6)
    refused(temperature=-1), refused(temperature=float("nan")), refused(temperature="1")


def check_top_k(llm: LLM) -> None:
    same(llm, {"top_k": -1}, {"top_k": 0})
    same(llm, {"top_k": np.int64(3)}, {"top_k": 3})
    same(llm, {"top_k": 1}, {"temperature": 0})
    refused(top_k=-2), refused(top_k=1.5)


def check_min_p(llm: LLM) -> None:
    same(llm, {"min_p": 1.0}, {"temperature": 0})
    same(llm, {"min_p": None}, {"min_p": 0})
    refused(min_p=1.5)


def check_top_p(llm: LLM) -> None:
    same(llm, {"top_p": 1e-9}, {"temperature": 0})
    same(llm, {"top_p": None}, {"top_p": 1})
    refused(top_p=0)


def check_penalty(name: str, low: Any) -> Callable[[LLM], None]:
    def check(llm: LLM) -> None:
        neutral = getattr(SamplingParams(), name)
        same(llm, {name: None}, {name: neutral})
        changed = one(llm, **HOT | {name: 1.9, "max_tokens": 60, "temperature": 0}).token_ids
        assert len({*changed}) >= len({*one(llm, **HOT | {"max_tokens": 60, "temperature": 0}).token_ids})
        refused(**{name: low})

    return check


def check_seed(llm: LLM) -> None:
    for unset in (-1, None):
        assert SamplingParams(seed=unset).seed is None
        assert len({one(llm, **HOT, seed=unset).token_ids for _ in range(3)}) > 1
    same(llm, {"seed": np.int32(5)}, {"seed": 5})
    refused(seed=-2)


def check_stop(llm: LLM) -> None:
    whole = one(llm, **HOT)
    middle = whole.text[4:6]
    for stop in (middle, [middle], (middle,)):
        found = one(llm, **HOT, stop=stop)
        assert (found.text, found.finish_reason, found.stop_reason) == (
            whole.text[: whole.text.index(middle)],
            "stop",
            middle,
        )
    same(llm, {"stop": None}, {"stop": []})
    (eos,) = llm.get_tokenizer().encode(EOS)
    ended = one(llm, **HOT, stop=EOS, logit_bias={eos: 100})
    assert (ended.text, ended.finish_reason, ended.stop_reason) == ("", "stop", EOS)
    for stop in (["aa", "aaa"], ["aaa", "aa"]):
        ended = one(llm, **HOT, **only_a(llm), stop=stop, min_tokens=3)
        assert (ended.text, ended.stop_reason) == ("a", "aaa")
    refused(stop=[""])


def only_a(llm: LLM) -> dict[str, Any]:
    """Parameters with which nothing but the letter is generated."""
    return {"allowed_token_ids": llm.get_tokenizer().encode("a")}


def check_include_stop(llm: LLM) -> None:
    whole = one(llm, **HOT)
    middle = whole.text[4:6]
    found = one(llm, **HOT, stop=middle, include_stop_str_in_output=True)
    assert found.text == whole.text[: whole.text.index(middle) + len(middle)]
    ids = llm.get_tokenizer().encode("a")
    assert one(llm, **HOT, **only_a(llm), stop_token_ids=ids, include_stop_str_in_output=True).text == "a"
    (eos,) = llm.get_tokenizer().encode(EOS)
    for skip, text in ((True, ""), (False, EOS)):
        params: dict[str, Any] = {"skip_special_tokens": skip, "include_stop_str_in_output": True}
        assert one(llm, logit_bias={eos: 100}, **params).text == text


def check_stop_token_ids(llm: LLM) -> None:
    ids = one(llm, **HOT).token_ids
    for given in ([ids[4]], np.array([ids[4]]), {ids[4]}):
        found = one(llm, **HOT, stop_token_ids=given)
        end = ids.index(ids[4])
        assert (found.token_ids, found.stop_reason) == (ids[: end + 1], ids[4])
        assert found.text == llm.get_tokenizer().decode(ids[:end])
    same(llm, {"stop_token_ids": None}, {"stop_token_ids": []})


def check_ignore_eos(llm: LLM) -> None:
    (eos,) = llm.get_tokenizer().encode(EOS)
    found = one(llm, logit_bias={eos: 100}, ignore_eos=True, max_tokens=3)
    assert (found.token_ids, found.finish_reason) == ((eos,) * 3, "length")
    found = one(llm, logit_bias={eos: 100}, max_tokens=3)
    assert (found.token_ids, found.finish_reason, found.stop_reason) == ((eos,), "stop", None)


def check_max_tokens(llm: LLM) -> None:
    (output,) = llm.generate([[5] * 1000], SamplingParams(max_tokens=None, ignore_eos=True, seed=1))
    assert len(output.outputs[0].token_ids) == llm.max_model_len - 1000
    assert SamplingParams().max_tokens == 16
    refused(max_tokens=0)


def check_min_tokens(llm: LLM) -> None:
    (eos,) = llm.get_tokenizer().encode(EOS)
    for ignored in (False, True):
        ids = one(llm, logit_bias={eos: 100}, min_tokens=4, max_tokens=6, ignore_eos=ignored).token_ids
        assert eos not in ids[:4] and ids[4] == eos
    whole = one(llm, **HOT)
    early = whole.text[:1]
    held = one(llm, **HOT, stop=[early], min_tokens=5)
    assert len(held.token_ids) > 5
    for least, count in ((0, 3), (2, 3), (3, 4), (4, 5)):
        assert len(one(llm, **HOT, **only_a(llm), stop=["aaa"], min_tokens=least).token_ids) == count
    (a,) = llm.get_tokenizer().encode("a")
    assert len(one(llm, **HOT, logit_bias={a: 100}, stop_token_ids=[a], min_tokens=3).token_ids) == 4
    refused(min_tokens=17)


def check_logprobs(llm: LLM) -> None:
    found = one(llm, **HOT, logprobs=3)
    for token, entry in zip(found.token_ids, found.logprobs, strict=True):
        assert next(iter(entry)) == token and len(entry) in (3, 4)
        assert entry[token].decoded_token == llm.get_tokenizer().token_text(token)
        assert [value.rank for other, value in entry.items() if other != token] == [
            rank for rank in range(1, 4) if rank != entry[token].rank
        ]
    whole = one(llm, **HOT, logprobs=-1).logprobs[0]
    assert len(whole) == llm.engine.manifest.vocab_size
    order = sorted(whole.items(), key=lambda pair: pair[1].rank)
    assert [value.rank for _, value in order] == [*range(1, len(whole) + 1)]
    assert all(a.logprob >= b.logprob for (_, a), (_, b) in itertools.pairwise(order))
    assert one(llm, **HOT).logprobs is None
    assert [[*entry] for entry in one(llm, **HOT, logprobs=0).logprobs] == [[t] for t in one(llm, **HOT).token_ids]
    shifted = one(llm, **HOT, logprobs=0, presence_penalty=2, repetition_penalty=2, logit_bias={5: 100}).logprobs[0]
    assert shifted[5].logprob == pytest.approx(whole[5].logprob)
    refused(logprobs=-2), refused(logprobs=True)


def check_prompt_logprobs(llm: LLM) -> None:
    (output,) = llm.generate("the cat", SamplingParams(prompt_logprobs=-1, max_tokens=1))
    first, *rest = output.prompt_logprobs
    assert first is None and [next(iter(entry)) for entry in rest] == list(output.prompt_token_ids[1:])
    assert {len(entry) for entry in rest} == {llm.engine.manifest.vocab_size}
    again = llm.generate("the cat", SamplingParams(prompt_logprobs=0, max_tokens=1))[0]
    assert again.num_cached_tokens == 0 and [len(entry) for entry in again.prompt_logprobs[1:]] == [1] * len(rest)


def check_detokenize(llm: LLM) -> None:
    found = one(llm, **HOT, detokenize=False, logprobs=1)
    assert found.text == "" and found.token_ids == one(llm, **HOT).token_ids
    assert found.logprobs[0].decoded_token is None
    refused(detokenize=False, stop="x")


def check_skip_special(llm: LLM) -> None:
    (eos,) = llm.get_tokenizer().encode(EOS)
    biased = {"logit_bias": {eos: 100}, "ignore_eos": True, "max_tokens": 2}
    assert one(llm, **biased).text == ""
    assert one(llm, **biased, skip_special_tokens=False).text == 2 * EOS


def check_spaces(llm: LLM) -> None:
    (eos,) = llm.get_tokenizer().encode(EOS)
    for spaces in (True, False):
        params = {"skip_special_tokens": False, "spaces_between_special_tokens": spaces, "ignore_eos": True}
        assert one(llm, logit_bias={eos: 100}, max_tokens=2, **params).text == 2 * EOS


def check_truncate(llm: LLM) -> None:
    (output,) = llm.generate([[*range(2, 40)]], SamplingParams(truncate_prompt_tokens=5, max_tokens=1))
    assert output.prompt_token_ids == (35, 36, 37, 38, 39)
    (output,) = llm.generate([[5] * 5000], SamplingParams(truncate_prompt_tokens=-1, max_tokens=24, ignore_eos=True))
    assert len(output.prompt_token_ids) == llm.max_model_len - 24
    refused(truncate_prompt_tokens=0)


def check_logit_bias(llm: LLM) -> None:
    same(llm, {"logit_bias": {"40": 5, 41: -3}}, {"logit_bias": {40: 5.0, np.int64(41): np.float32(-3)}})
    same(llm, {"logit_bias": None}, {"logit_bias": {}})
    assert set(one(llm, **HOT, logit_bias={"40": 100}).token_ids) == {40}
    # the penalty takes half of 40's bias, so 50 is first, and then 50's; penalties first would leave 40 its hundred
    both: dict[str, Any] = {"logit_bias": {40: 100, 50: 75}, "repetition_penalty": 2, "temperature": 0}
    assert one(llm, [40, 41], **both, max_tokens=2).token_ids == (50, 40)
    refused(logit_bias={1: 101}), refused(logit_bias={"one": 1}), refused(logit_bias={"1": 1, 1: 2})


def check_allowed(llm: LLM) -> None:
    assert set(one(llm, **HOT, allowed_token_ids=[40, 50]).token_ids) <= {40, 50}
    same(llm, {"allowed_token_ids": None}, {"allowed_token_ids": range(320)})
    refused(allowed_token_ids=[])
    with pytest.raises(RequestError, match="allowed_token_ids entry 320"):
        one(llm, allowed_token_ids=[320])


def check_bad_words(llm: LLM) -> None:
    letter = max("aeost ", key=text_after(llm, 300).count)
    assert letter in text_after(llm, 300) and letter not in text_after(llm, 300, bad_words=[letter])
    same(llm, {"bad_words": None}, {"bad_words": []})
    refused(bad_words=[""]), refused(bad_words="word")


def check_structured(llm: LLM) -> None:
    params = {"temperature": 2.0, "max_tokens": 60}
    assert one(llm, **params, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])).text in ("yes", "no")
    assert one(llm, **params, structured_outputs={"choice": ["yes"]}).text == "yes"
    assert "structured_outputs=" in refused(guided_decoding={}) and "structured_outputs=" in refused(guided={})
    refused(structured_outputs={"choice": ["a"], "regex": "b"}), refused(structured_outputs={})
    for name in ("min_tokens", "ignore_eos"):
        refused(structured_outputs={"choice": ["a"]}, **{name: 1 if name == "min_tokens" else True})


def check_form(**form: Any) -> Callable[[LLM], None]:
    def check(llm: LLM) -> None:
        pytest.importorskip("llguidance")
        llm.check("x", SamplingParams(structured_outputs=StructuredOutputsParams(**form)))

    return check


def check_json_form(expected: str, **form: Any) -> Callable[[LLM], None]:
    """JSON that the form leaves only one way to write."""

    def check(llm: LLM) -> None:
        pytest.importorskip("llguidance")
        params = StructuredOutputsParams(**form)
        assert one(llm, temperature=2.0, max_tokens=60, structured_outputs=params).text == expected

    return check


def check_whitespace(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    form = StructuredOutputsParams(json=ONE_WAY, whitespace_pattern="~")
    params = [SamplingParams(temperature=2.0, max_tokens=60, structured_outputs=form, seed=seed) for seed in range(8)]
    texts = [output.outputs[0].text for output in llm.generate(["x"] * 8, params)]
    assert {text.replace("~", "") for text in texts} == {'{"a":1}'} and any("~" in text for text in texts)


def check_stop_reason(llm: LLM) -> None:
    check_stop(llm), check_stop_token_ids(llm), check_ignore_eos(llm)


def check_reading(llm: LLM) -> None:
    prompt = [[*range(2, 200)]]
    for skip, least, most in ((None, 0, 999), (False, 128, 192), (True, 0, 0)):
        (output,) = llm.generate(prompt, SamplingParams(max_tokens=1, skip_reading_prefix_cache=skip))
        assert least <= output.num_cached_tokens <= most


def check_budget(llm: LLM) -> None:
    """How thoughts end has tests of its own, with a vocabulary that has thoughts."""
    assert SamplingParams(thinking_token_budget=-1) == SamplingParams()
    refused(thinking_token_budget=-2), refused(thinking_token_budget=True)
    with pytest.raises(RequestError, match="which this vocabulary lacks"):
        one(llm, thinking_token_budget=0)


def check_refused(owner: str, name: str) -> Callable[[LLM], None]:
    def check(llm: LLM) -> None:
        kind = {"SamplingParams": SamplingParams, "StructuredOutputsParams": StructuredOutputsParams}[owner]
        with pytest.raises(RequestError) as caught:
            kind(**{name: None})
        assert str(caught.value) == f"{owner} has no {name!r}; use {OTHER_NAMES[owner][name]}"

    return check


def check_output(llm: LLM) -> None:
    first, second = llm.generate(["the cat", [5, 6]], SamplingParams(max_tokens=2))
    assert (first.prompt, second.prompt, second.prompt_token_ids) == ("the cat", None, (5, 6))
    assert isinstance(first.request_id, str) and first.request_id != second.request_id
    assert first.finished is second.finished is True


def check_priority(llm: LLM) -> None:
    assert len(llm.generate(["a", "b"], SamplingParams(max_tokens=1), priority=[1, np.int64(0)])) == 2
    for wrong in ([1], [1, 2, 3], ["high", 1], "high"):
        with pytest.raises(RequestError, match="priorit"):
            llm.generate(["a", "b"], SamplingParams(max_tokens=1), priority=wrong)


def check_tokenizer(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode(ids) == "the cat" and tokenizer.vocab_size > max(ids)
    assert llm.generate("the cat", SamplingParams(max_tokens=1))[0].prompt_token_ids == tuple(ids)


@dataclass(frozen=True)
class Row:
    """One parameter: how it compares, in words, and what holds that."""

    name: str
    verdict: str
    how: str
    check: Callable[[LLM], None]


ROWS = [
    Row("n", "differs", "at most 128, not 16,384; with greedy choice too, which vLLM refuses", check_n),
    Row("best_of", "ours", "vLLM has none; the best have `index` 0 to n − 1; `generate` only", check_best_of),
    Row(
        "temperature",
        "differs",
        "below 1e-5 is greedy, else taken as given: vLLM raises to 0.01 and refuses above 2",
        check_temperature,
    ),
    Row("top_p", "same", "after `top_k`", check_top_p),
    Row("top_k", "same", "0 and −1 keep all", check_top_k),
    Row("min_p", "same", "before `top_k` and `top_p`", check_min_p),
    Row("repetition_penalty", "same", "after `logit_bias`, before the others", check_penalty("repetition_penalty", 0)),
    Row("presence_penalty", "same", "", check_penalty("presence_penalty", 2.1)),
    Row("frequency_penalty", "same", "", check_penalty("frequency_penalty", -2.1)),
    Row("seed", "differs", "−1 is None; other negative numbers are refused; the same tokens in any batch", check_seed),
    Row(
        "stop",
        "differs",
        "special tokens are found too; of those that end together the longest, not the first",
        check_stop,
    ),
    Row("include_stop_str_in_output", "same", "", check_include_stop),
    Row("stop_token_ids", "same", "the text ends before the token", check_stop_token_ids),
    Row("ignore_eos", "same", "", check_ignore_eos),
    Row("max_tokens", "same", "None is the rest of the context", check_max_tokens),
    Row(
        "min_tokens",
        "same",
        "holds back the end of sequence with `ignore_eos` too; a stop string ends with a later token",
        check_min_tokens,
    ),
    Row(
        "logprobs",
        "differs",
        "any number, not 20 at most; equal ones rank by id; true is refused; of the model alone, as there",
        check_logprobs,
    ),
    Row("prompt_logprobs", "differs", "as `logprobs`", check_prompt_logprobs),
    Row("detokenize", "same", "", check_detokenize),
    Row("skip_special_tokens", "same", "", check_skip_special),
    Row("spaces_between_special_tokens", "same", "byte-level text has no such spaces, so without effect", check_spaces),
    Row(
        "truncate_prompt_tokens",
        "differs",
        "−1 leaves room for `max_tokens`; vLLM has it outside of these parameters now",
        check_truncate,
    ),
    Row(
        "logit_bias",
        "differs",
        "ids as text too; beyond ±100 is refused; vLLM's server cuts it, its class does not",
        check_logit_bias,
    ),
    Row("allowed_token_ids", "same", "", check_allowed),
    Row("bad_words", "differs", "no spelling of the text is generated; vLLM bans two spellings", check_bad_words),
    Row(
        "structured_outputs",
        "differs",
        "also as a mapping; refused with `min_tokens` or `ignore_eos`",
        check_structured,
    ),
    Row("structured_outputs.json", "same", "", check_form(json={"type": "integer"})),
    Row("structured_outputs.regex", "same", "", check_form(regex="[ab]+")),
    Row(
        "structured_outputs.choice",
        "differs",
        "never cut off: `max_tokens` too small for all is refused",
        check_form(choice=["a", "b"]),
    ),
    Row(
        "structured_outputs.grammar",
        "differs",
        "Lark, as llguidance reads it; no EBNF",
        check_form(grammar='start: "a"'),
    ),
    Row("structured_outputs.json_object", "same", "", check_form(json_object=True)),
    Row(
        "structured_outputs.disable_any_whitespace",
        "differs",
        "counts for its request; vLLM takes it from the engine's settings",
        check_json_form('{"a":1}', json=ONE_WAY, disable_any_whitespace=True),
    ),
    Row(
        "structured_outputs.disable_additional_properties",
        "differs",
        "counts for its request; vLLM takes it from the engine's settings",
        check_json_form(
            '{"a":1}',
            json={key: value for key, value in ONE_WAY.items() if key != "additionalProperties"},
            disable_additional_properties=True,
            disable_any_whitespace=True,
        ),
    ),
    Row(
        "structured_outputs.whitespace_pattern",
        "differs",
        "is obeyed; vLLM's backends xgrammar and guidance do not read it",
        check_whitespace,
    ),
    Row(
        "thinking_token_budget",
        "differs",
        "needs no configuration; the thought ends with `</think>` alone; −1 sets no bound",
        check_budget,
    ),
    Row("skip_reading_prefix_cache", "same", "", check_reading),
    Row(
        "taps",
        "ours",
        "what router and indexer chose; vLLM returns `routed_experts`",
        lambda llm: refused(taps=["all"]) and None,
    ),
    *(
        Row(
            name if owner == "SamplingParams" else f"structured_outputs.{name}",
            "refused",
            f"use {use}",
            check_refused(owner, name),
        )
        for owner, names in OTHER_NAMES.items()
        for name, use in names.items()
    ),
    Row(
        "`RequestOutput.prompt`, `request_id`, `finished`",
        "same",
        "`prompt` is None where ids were given",
        check_output,
    ),
    Row(
        "`CompletionOutput.stop_reason`",
        "same",
        "the string or token; None for the model's first end of sequence, a further one is named",
        check_stop_reason,
    ),
    Row(
        "`LLM.generate(priority=)`",
        "differs",
        "also one number for all; a level weighs 1,000 steps of waiting",
        check_priority,
    ),
    Row(
        "`LLM.get_tokenizer()`",
        "differs",
        "`encode`, `decode`, `vocab_size`; nothing is added to a text",
        check_tokenizer,
    ),
]


def table() -> str:
    """Return the table as it stands in the document."""
    lines = ["| parameter | against vLLM | |", "|---|---|---|"]
    for row in ROWS:
        name = row.name if row.name.startswith("`") else f"`{row.name}`"
        lines.append(f"| {name} | {row.verdict} | {row.how} |")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def llm(toy_engine: Path):
    with LLM(toy_engine, threads=1, num_blocks=60, self_check=False) as llm:
        yield llm


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.strip("`"))
def test_row(llm: LLM, row: Row) -> None:
    row.check(llm)
    llm._scheduler.check()


def test_every_parameter_has_its_row() -> None:
    names = [row.name for row in ROWS]
    assert len({*names}) == len(names)
    assert {one.name for one in fields(SamplingParams)} <= {*names}
    assert {f"structured_outputs.{one.name}" for one in fields(StructuredOutputsParams)} <= {*names}


@pytest.mark.parametrize("name", [one.name for one in fields(SamplingParams)])
def test_none_is_not_set(name: str) -> None:
    unset: dict[str, Any] = {name: None}
    given = SamplingParams(**unset)
    wanted = SamplingParams()
    assert given == (replace(wanted, max_tokens=None) if name == "max_tokens" else wanted)


def test_the_document_holds_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), f"run python {Path(__file__).name} to write it anew"


if __name__ == "__main__":
    whole = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = whole.partition(BEGIN)
    DOCUMENT.write_text(head + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
