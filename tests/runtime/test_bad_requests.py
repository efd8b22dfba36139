"""A bad request harms only itself: it is refused before it enters, and what fails inside ends it alone."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seekforge.common.errors import EngineError, RequestError
from seekforge.runtime import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from seekforge.runtime.engine.outputs import GenerationError
from seekforge.runtime.sampling.guided import Grammars
from seekforge.runtime.text import matching
from seekforge.runtime.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


class _Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


BAD_PROMPTS = [
    None, 1.5, 7, True, b"bytes", bytearray(b"x"), {5, 6}, object(), _Odd(), {}, {"prompt": 5},
    {"prompt_token_ids": "5"}, {"prompt": "a", "prompt_token_ids": [5]}, {"text": "a"}, {"prompt": None},
    [5, "a"], [5, 1.0], [5, None], [5, True],
    np.array([5.0]), np.array(5), np.zeros((1, 2), int), [-1], [10**30], "", "\ud800", [], [5] * 5000,
]  # fmt: skip
BAD_PARAMS = [{"max_tokens": 3}, "greedy", 0, False, object(), SamplingParams, [GREEDY], _Odd()]
BAD_PRIORITIES = ["high", 1.5, math.nan, b"1", object(), True, 10**30, {1}, _Odd()]
BAD_TIMEOUTS = ["1", math.nan, math.inf, -math.inf, -1, True, object(), np.float64("nan"), [1], 10**400, _Odd()]


@pytest.fixture(scope="module")
def llm(toy_engine: Path):
    with LLM(toy_engine, threads=1, num_blocks=40) as llm:
        yield llm


def bad_calls() -> list[tuple[str, tuple, dict]]:
    calls: list[tuple[str, tuple, dict]] = []
    calls += [
        ("prompt", (prompt, GREEDY), {}) for prompt in BAD_PROMPTS if not (isinstance(prompt, list) and not prompt)
    ]
    calls += [("params", ([5, 6], params), {}) for params in BAD_PARAMS]
    calls += [("priority", ([5, 6], GREEDY), {"priority": value}) for value in BAD_PRIORITIES]
    calls += [("timeout", ([5, 6], GREEDY), {"timeout_s": value}) for value in BAD_TIMEOUTS]
    return calls


@pytest.mark.parametrize("number", range(len(bad_calls())))
def test_whatever_is_wrong_is_one_line_and_neighbors_go_on(llm: LLM, number: int) -> None:
    _, arguments, named = bad_calls()[number]
    expected = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    neighbor = llm.stream([5, 6, 7], GREEDY)
    tokens = list(next(neighbor).token_ids)
    for call in (llm.generate, llm.stream):
        if call == llm.stream or arguments[1:] != ([GREEDY],):  # a list of one is right for `generate`
            with pytest.raises(RequestError) as told:
                call(*arguments, **named)
            assert isinstance(told.value, ValueError) and "\n" not in str(told.value) and len(str(told.value)) < 400
    tokens += [token for delta in neighbor for token in delta.token_ids]
    assert tuple(tokens) == expected
    llm._scheduler.check()
    assert not llm._scheduler.has_work


def test_asyncllm_checks_the_same(toy_engine: Path) -> None:
    async def ask() -> None:
        async with AsyncLLM(toy_engine, threads=1, num_blocks=40) as llm:
            expected = (await llm.generate([5, 6, 7], GREEDY)).outputs[0].token_ids
            neighbor = asyncio.create_task(llm.generate([5, 6, 7], GREEDY))
            for _, arguments, named in bad_calls():
                with pytest.raises(RequestError):
                    await llm.generate(*arguments, **named)
                with pytest.raises(RequestError):
                    async for _delta in llm.stream(*arguments, **named):
                        pass
            assert (await neighbor).outputs[0].token_ids == expected

    asyncio.run(asyncio.wait_for(ask(), 120))


_NO_INTEGERS = ["3", 2.5, math.nan, True, [1], np.float64(3), _Odd()]
_NO_BOOLEANS = ["no", 1, None, _Odd()]
_NO_FUNCTIONS = ["print", 3]
_OPTIONS: dict[str, list] = {
    **dict.fromkeys(
        ("max_model_len", "max_batch_size", "max_num_batched_tokens", "num_blocks", "kv_cache_memory", "threads"),
        _NO_INTEGERS,
    ),
    "num_speculative_tokens": [*_NO_INTEGERS, None],
    "max_waiting": [*_NO_INTEGERS, 0, -1],
    **dict.fromkeys(
        ("deterministic", "prefix_caching", "speculation_off_switch", "self_check"),
        _NO_BOOLEANS,
    ),
    **dict.fromkeys(("on_step", "on_load", "before_load"), _NO_FUNCTIONS),
    "checkpoint": [3, b"x", "", "a\0b", _Odd()],
}


@pytest.mark.parametrize("name", _OPTIONS)
@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_options_of_the_wrong_type_are_refused_before_anything_is_read(kind: type, name: str) -> None:
    for value in _OPTIONS[name]:
        with pytest.raises(RequestError, match=f"^{name} is ") as told:
            kind("/nowhere", **{name: value})
        assert "\n" not in str(told.value) and len(str(told.value)) < 400


@pytest.mark.parametrize("place", [None, 3, b"/tmp", "", "a\0b", [], math.nan, _Odd()])
@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_an_engine_is_a_place(kind: type, place: object) -> None:
    with pytest.raises(RequestError, match=r"^engine is .*expected the path of a folder"):
        kind(place)


def test_numpy_s_integers_are_numbers(toy_engine: Path) -> None:
    one = {"max_model_len": 128, "max_batch_size": 2, "max_num_batched_tokens": 16, "num_blocks": 40, "threads": 1}
    with LLM(toy_engine, self_check=False, **{name: np.int64(value) for name, value in one.items()}) as llm:
        assert llm.generate([5, 6, 7], GREEDY)[0].outputs[0].finish_reason == "length"


def test_requests_that_are_no_pairs(llm: LLM) -> None:
    for request in (3, ("a",), "ab", ("a", GREEDY, 3), None, {"a": GREEDY, "b": GREEDY}):
        with pytest.raises(RequestError, match=r"^request 0 is .*, expected \(prompt, sampling_params\)"):
            list(llm.as_completed([request]))
    for ahead in (0, -1, "x", math.nan, 2.5, True):
        with pytest.raises(RequestError, match=r"^ahead is "):
            list(llm.as_completed([([5], GREEDY)], ahead=ahead))


def test_prompts_come_as_vllm_takes_them(llm: LLM) -> None:
    expected = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    for prompt in (
        (5, 6, 7),
        np.array([5, 6, 7]),
        {"prompt_token_ids": [5, 6, 7]},
        {"prompt_token_ids": np.array([5, 6, 7])},
    ):
        (output,) = llm.generate(prompt, GREEDY)
        assert output.outputs[0].token_ids == expected and output.prompt is None
    outputs = llm.generate(["the cat", {"prompt": "the cat"}, [5, 6, 7]], GREEDY)
    assert outputs[0].outputs == outputs[1].outputs and outputs[1].prompt == "the cat"
    assert outputs[2].outputs[0].token_ids == expected
    assert llm.generate([], GREEDY) == []
    with pytest.raises(RequestError, match=r"^prompt 1: the prompt is 5, expected text, a list of token ids"):
        llm.generate(["the", 5], GREEDY)


def test_no_timeout_keeps_another_from_coming(llm: LLM) -> None:
    for odd in (math.nan, np.float32("nan")):
        with pytest.raises(RequestError, match=r"timeout_s is .*nan.*, expected seconds"):
            llm.generate([5], GREEDY, timeout_s=odd)
    (late,) = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True), timeout_s=0.0)
    assert late.outputs[0].finish_reason == "timeout"


@pytest.mark.parametrize("place", ["add", "abort", "text"])
def test_what_fails_inside_ends_its_own_request_and_wakes_the_others(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Threads share the engine; the request of one prompt breaks the scheduler, or its own text."""
    with LLM(toy_engine, threads=1, num_blocks=40) as llm:
        expected = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
        doomed = (9, 9)
        if place == "text":
            make = llm._intake.make

            def broken(request, *rest):
                live = make(request, *rest)
                if request.prompt_ids == doomed:
                    monkeypatch.setattr(live.texts[0], "take", lambda **_: 1 / 0)
                return live

            monkeypatch.setattr(llm._intake, "make", broken)
        else:
            plain = getattr(llm._scheduler, place)

            def fails(sequence, *rest):
                if sequence.prompt_ids == doomed and sequence.state != "finished":
                    raise ZeroDivisionError("a bug")
                return plain(sequence, *rest)

            monkeypatch.setattr(llm._scheduler, place, fails)
        results: list[object] = []

        def ask(prompt: list[int], timeout_s: float | None = None) -> None:
            try:
                results.append(llm.generate(prompt, GREEDY, timeout_s=timeout_s)[0].outputs[0].token_ids)
            except GenerationError as error:
                results.append(str(error))

        threads = [threading.Thread(target=ask, args=([5, 6, 7],), daemon=True) for _ in range(3)]
        if place == "abort":  # ended from outside, in the middle
            stream = llm.stream(list(doomed), GREEDY)
            next(stream)
            threads.append(threading.Thread(target=stream.close, daemon=True))
        else:
            threads.append(threading.Thread(target=ask, args=(list(doomed),), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
        assert results.count(expected) == 3
        if place != "abort":
            (failed,) = [result for result in results if result != expected]
            assert "ZeroDivisionError" in str(failed)


@pytest.mark.parametrize("cut", [{}, {"truncate_prompt_tokens": 5}, {"truncate_prompt_tokens": -1}], ids=str)
def test_a_hopeless_text_is_not_encoded_whole(llm: LLM, monkeypatch: pytest.MonkeyPatch, cut: dict[str, int]) -> None:
    encoded: list[int] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encoded.append(len(text)) or encode(self, text))
    text = "1234567890" * 160_000
    params = SamplingParams(max_tokens=1, temperature=0, **cut)
    with pytest.raises(RequestError, match=r"1,600,000 characters, of which the first .* tokens are taken here"):
        llm.generate(text, params)
    assert sum(encoded) < len(text) / 10
    with pytest.raises(RequestError, match="max_model_len"):  # a little too long is told by its tokens
        llm.generate("z" * (llm.max_model_len + 10), GREEDY)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "tensors is None, expected a mapping"),
        ([("a", np.zeros(1))], "expected a mapping"),
        ({1: np.zeros(1)}, "expected a mapping of names"),
        ({"model.norm.weight": [1.0]}, "'model.norm.weight' is .*expected a NumPy array"),
    ],
    ids=str,
)
def test_weights_of_odd_types_are_refused_and_nothing_is_changed(llm: LLM, tensors: Any, message: str) -> None:
    before = llm.generate("a", GREEDY)
    with pytest.raises(EngineError, match=message):
        llm.update_weights(tensors)
    assert [one.outputs for one in llm.generate("a", GREEDY)] == [one.outputs for one in before]


@pytest.mark.parametrize("requests", [None, 3, 1.5])
def test_what_holds_no_requests_is_refused(llm: LLM, requests: Any) -> None:
    with pytest.raises(RequestError, match="expected pairs of a prompt and SamplingParams"):
        list(llm.as_completed(requests))


def test_a_text_of_few_long_tokens_is_served(llm: LLM) -> None:
    """Far more characters than the context has tokens, and yet it fits."""
    tokenizer = llm.get_tokenizer()
    longest = max(range(tokenizer.vocab_size), key=lambda token: len(tokenizer.decode([token])))
    text = tokenizer.decode([longest], skip_special_tokens=False) * 100
    assert tokenizer.encode_at_most(text, 64) == tokenizer.encode(text)


def test_long_texts_let_other_threads_run(tiny_checkpoint: Path) -> None:
    """What is held while a text is encoded is held for seconds: another thread must get on meanwhile."""
    tokenizer = Tokenizer(tiny_checkpoint / "tokenizer.json")
    ticks, stop = [0], threading.Event()

    def count() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    tokenizer.encode("1234567890" * 30_000)
    stop.set()
    thread.join()
    assert ticks[0] > 5


def test_compiling_a_grammar_holds_up_nobody(toy_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()
    plain = Grammars._compile

    def slow(self: Grammars, grammar: str):
        began.set()
        assert go_on.wait(60)
        return plain(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", slow)
    guided = SamplingParams(max_tokens=20, structured_outputs=StructuredOutputsParams(regex="(ab)+"))
    with LLM(toy_engine, threads=1, num_blocks=40) as llm:
        texts: list[str] = []
        thread = threading.Thread(
            target=lambda: texts.append(llm.generate([5], guided)[0].outputs[0].text), daemon=True
        )
        thread.start()
        assert began.wait(60)
        assert llm.generate([5, 6, 7], GREEDY)[0].outputs[0].finish_reason == "length"
        go_on.set()
        thread.join(60)
        assert set(texts[0]) == {"a", "b"}


def test_a_grammar_is_compiled_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    plain = Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda self, grammar: compiled.append(grammar) or plain(self, grammar))
    with LLM(llm.engine, threads=1, num_blocks=40) as other:
        form = StructuredOutputsParams(regex="[xy]{3}z")
        other.generate([[5], [6]], SamplingParams(n=3, max_tokens=20, structured_outputs=form))
        other.generate([7], SamplingParams(max_tokens=20, structured_outputs=form))
    assert len(compiled) == 1


def rules(count: int) -> str:
    return "start: r0\n" + "\n".join(f'r{i}: "x" r{i + 1}' for i in range(count)) + f'\nr{count}: "y"'


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def many_properties(count: int) -> dict:
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(count)}}


@pytest.mark.parametrize(
    "form",
    [
        {"grammar": rules(4000)},  # this one ended the process: the stack of the library's recursion
        {"grammar": rules(20_000)},
        {"grammar": 'start: "a"{100000}'},
        {"grammar": "start: " + "(" * 3000 + '"x"' + ")" * 3000},
        {"regex": "(" * 3000 + "x" + ")" * 3000},
        {"regex": "(([a-z]{1,1000}){1,1000}){1,1000}"},
        {"regex": "|".join(f"label {i}" for i in range(30_000))},
        {"json": nested(3000)},
        {"json": nested(100)},
        {"json": many_properties(10_000)},
        {"json": many_properties(600)},
        {"json": {"type": "string", "maxLength": 100_000}},
        {"json": {"type": "string", "minLength": 100_000}},
        {"json": {"type": "array", "minItems": 100_000, "items": {"type": "string", "maxLength": 100_000}}},
        {"json": {"enum": [f"label {i}" for i in range(5000)]}},
        {"json": True},
        {"json": "true"},
        {"json": False},
        {"json": "false"},
        {"json": {"$ref": "#"}},
    ],
    ids=range(20),
)
def test_a_heavy_form_is_refused_at_once_or_works(llm: LLM, form: dict) -> None:
    """Never in the middle of a text."""
    try:
        params = SamplingParams(temperature=0, max_tokens=12, structured_outputs=StructuredOutputsParams(**form))
        llm.check([5, 6], params)
    except RequestError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert llm.generate([5, 6], params)[0].outputs[0].finish_reason in ("stop", "length")


def test_the_default_cache_fits_a_bounded_address_space(toy_engine: Path) -> None:
    """As under `ulimit -v`: the engine's limits ask for far more than the process may have."""
    script = f"""
import resource
from seekforge.runtime import LLM, SamplingParams
import seekforge.runtime.llm, onnxruntime
import dataclasses
from seekforge.runtime import Engine
engine = Engine.open({str(toy_engine)!r})
limits = dataclasses.replace(engine.manifest.limits, max_batch_size=4000)
object.__setattr__(engine.manifest, "limits", limits)
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
limit = used + (400 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with LLM(engine, threads=1) as llm:
    assert llm.num_blocks * engine.manifest.cache.bytes_per_block < 220 << 20, llm.num_blocks
    print(llm.generate([5, 6], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].finish_reason)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "length\n", done.stderr


def test_a_number_beyond_every_vocabulary_keeps_all_tokens(llm: LLM) -> None:
    asked = {"seed": 3, "max_tokens": 6, "ignore_eos": True}
    of_all = llm.generate([5, 6], SamplingParams(**asked))[0].outputs[0].token_ids
    for count in (2**62, 10**30):
        assert llm.generate([5, 6], SamplingParams(top_k=count, **asked))[0].outputs[0].token_ids == of_all


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop": ["x" * 20_000]}, "stop has 20,000 characters in all, expected at most 16,384"),
        ({"stop": [f"{number:05}" for number in range(4000)]}, "stop has 20,000 characters"),
        ({"bad_words": [f"{number:05}" for number in range(4000)]}, "bad_words has 20,000 characters"),
        ({"structured_outputs": {"regex": "a\ud800"}}, "regex holds .* not valid Unicode"),
        ({"structured_outputs": {"grammar": 'start: "\ud800"'}}, "grammar holds .* not valid Unicode"),
        ({"structured_outputs": {"json_object": True, "whitespace_pattern": "\udfff"}}, "holds .* not valid Unicode"),
    ],
)
def test_texts_that_are_none_or_cost_too_much_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**params)


def test_tokens_of_which_none_may_come_first_are_refused_at_once(llm: LLM) -> None:
    for params in ({"stop_token_ids": [7], "allowed_token_ids": [7]}, {"allowed_token_ids": [1]}):
        with pytest.raises(RequestError, match="allowed_token_ids has only tokens that end the request"):
            llm.generate([5, 6], SamplingParams(min_tokens=2, **params))
    assert llm.generate([5, 6], SamplingParams(min_tokens=2, allowed_token_ids=[1, 7]))


def test_completions_share_what_looks_for_stop_strings(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    plain = matching.Automaton.__init__
    monkeypatch.setattr(matching.Automaton, "__init__", lambda self, words: made.append(words) or plain(self, words))
    llm.generate([5, 6], SamplingParams(n=8, stop=["never in it"], max_tokens=2))
    assert made == [("never in it",)]
