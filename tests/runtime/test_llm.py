"""The public interface on a toy engine: batched = one by one = chunked = numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seekforge.common.errors import EngineError, RequestError
from seekforge.runtime import LLM, Engine, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LENGTHS = (1, 5, 63, 64, 65, 130, 200, 3, 17, 90)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(2, 300, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def llm(toy_engine: Path):
    with LLM(toy_engine, threads=1, num_blocks=40) as llm:
        yield llm


def tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_idle(llm: LLM) -> None:
    llm._scheduler.check()
    assert not llm._turns.live and not llm._scheduler.has_work
    assert llm._scheduler.cache.pool.num_free == llm._scheduler.cache.pool.num_usable


def test_batched_is_what_numpy_says(llm: LLM, toy, prompts: list[list[int]]) -> None:
    outputs = llm.generate(prompts, GREEDY)
    assert tokens(outputs) == [toy.greedy(prompt, 12) for prompt in prompts]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == tuple(prompt)
        assert output.outputs[0].finish_reason == "length"
        assert output.metrics.prefill_tokens == len(prompt) and output.metrics.decode_tokens == 11
        assert output.metrics.prefill_s > 0 and output.metrics.decode_s > 0
    check_idle(llm)


def test_batched_is_one_by_one(llm: LLM, prompts: list[list[int]]) -> None:
    batched = llm.generate(prompts, GREEDY)
    assert tokens(batched) == [tokens(llm.generate(prompt, GREEDY))[0] for prompt in prompts]


@pytest.mark.parametrize("chunk", [1, 7, 64, 65])
def test_batched_is_chunked(toy_engine: Path, toy, prompts: list[list[int]], chunk: int) -> None:
    with LLM(toy_engine, threads=1, num_blocks=40, max_num_batched_tokens=chunk, self_check=False) as llm:
        some = prompts[:6]
        assert tokens(llm.generate(some, GREEDY)) == [toy.greedy(prompt, 12) for prompt in some]
        check_idle(llm)


def test_a_seeded_request_does_not_depend_on_its_batch(llm: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=1.5, top_p=0.98, seed=4, max_tokens=12, ignore_eos=True)
    batched = tokens(llm.generate(prompts, params))
    assert batched == [tokens(llm.generate(prompt, params))[0] for prompt in prompts]
    assert batched != tokens(llm.generate(prompts, replace(params, seed=5)))


def test_a_stream_joins_to_the_text(llm: LLM) -> None:
    prompt = "日本語 the cat 🎉"
    (whole,) = llm.generate(prompt, GREEDY)
    deltas = list(llm.stream(prompt, GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert [token for delta in deltas for token in delta.token_ids] == list(whole.outputs[0].token_ids)
    assert [delta.output is not None for delta in deltas] == [False] * 11 + [True]
    assert deltas[-1].output is not None and deltas[-1].output.outputs == whole.outputs
    assert whole.outputs[0].text == llm.engine.tokenizer.decode(whole.outputs[0].token_ids)


def test_streams_by_turns_and_a_batch_between(llm: LLM, toy, prompts: list[list[int]]) -> None:
    first, second = llm.stream(prompts[1], GREEDY), llm.stream(prompts[4], GREEDY)
    collected: tuple[list[int], list[int]] = ([], [])
    for _ in range(6):
        collected[0].extend(next(first).token_ids)
        collected[1].extend(next(second).token_ids)
    assert tokens(llm.generate(prompts[2], GREEDY)) == [toy.greedy(prompts[2], 12)]
    for out, stream in zip(collected, (first, second), strict=True):
        out.extend(token for delta in stream for token in delta.token_ids)
    assert list(collected) == [toy.greedy(prompts[1], 12), toy.greedy(prompts[4], 12)]
    check_idle(llm)


def test_a_closed_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream([5, 6, 7], GREEDY)
    next(stream)
    assert llm._scheduler.num_running == 1
    stream.close()
    check_idle(llm)


def test_eos_stops_unless_ignored(llm: LLM, toy, prompts: list[list[int]]) -> None:
    prompt = prompts[3]
    continuation = toy.greedy(prompt, 12)
    stop = continuation[4]
    (output,) = llm.generate([prompt], replace(GREEDY, stop_token_ids=[stop]))
    assert list(output.outputs[0].token_ids) == continuation[: continuation.index(stop) + 1]
    assert output.outputs[0].finish_reason == "stop"


def test_the_model_s_eos_ends_a_request(edit_manifest, toy, prompts: list[list[int]]) -> None:
    eos = toy.greedy(prompts[2], 3)[2]
    with LLM(edit_manifest(lambda m: m.update(eos_token_id=eos)), threads=1, num_blocks=9) as llm:
        (output,) = llm.generate([prompts[2]], replace(GREEDY, ignore_eos=False))
        assert output.outputs[0].finish_reason == "stop" and output.outputs[0].token_ids[-1] == eos


def test_each_end_of_sequence_ends_a_request(edit_manifest, toy, prompts: list[list[int]]) -> None:
    expected = toy.greedy(prompts[2], 12)
    other = expected[4]
    end = expected.index(other)
    params = replace(GREEDY, ignore_eos=False)
    with LLM(edit_manifest(lambda m: m.update(eos_token_id=[1, other])), threads=1, num_blocks=9) as llm:
        (output,) = llm.generate([prompts[2]], params)
        first = output.outputs[0]
        assert list(first.token_ids) == expected[: end + 1] and first.finish_reason == "stop"
        assert first.stop_reason == other and first.text == llm.get_tokenizer().decode(expected[:end])
        assert tokens(llm.generate([prompts[2]], GREEDY)) == [expected]
        for ignored in (False, True):
            held = replace(params, min_tokens=end + 2, ignore_eos=ignored)
            assert other not in tokens(llm.generate([prompts[2]], held))[0][: end + 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": []}, r"eos_token_id is \(\)"),
        ({"eos_token_id": [1, 320]}, "eos_token_id is 320, expected an id below vocab_size 320"),
        ({"eos_token_id": -1}, "eos_token_id is -1, expected an id below vocab_size 320"),
        ({"generation": {"temperature": -1.0}}, "key 'generation': temperature is -1"),
        ({"generation": {"top_k": 1.5}}, "key 'generation': top_k is 1.5"),
        ({"generation": {"heat": 1.0}}, "key 'generation': SamplingParams has no 'heat'"),
    ],
)
def test_a_manifest_with_impossible_defaults_is_refused(edit_manifest, change: dict, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        LLM(edit_manifest(lambda m: m.update(change)), threads=1, num_blocks=9)


def test_greedy_may_be_the_default(edit_manifest, toy, prompts: list[list[int]]) -> None:
    with LLM(edit_manifest(lambda m: m.update(generation={"temperature": 0.0})), threads=1, num_blocks=9) as llm:
        assert llm.default_sampling_params.greedy
        found = tokens(llm.generate([prompts[1]]))[0]
        assert found == toy.greedy(prompts[1], len(found))


def test_defaults_come_from_the_checkpoint(llm: LLM) -> None:
    assert llm.default_sampling_params == SamplingParams(temperature=1.0, top_p=0.95)
    assert llm.generate([]) == []
    assert len(llm.generate("the cat")[0].outputs[0].token_ids) >= 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 1: the prompt has no tokens"),
        ([], "prompt 1: the prompt has no tokens"),
        ([3, 320], "prompt 1: prompt token 320 is out of range, expected 0 to 319"),
        ([-1], "prompt token -1"),
        ([1.5], "prompt token 1.5 is no token id"),
        ([2] * 1020, r"prompt 1020 \+ max_tokens 12 = 1032 tokens, more than max_model_len 1024"),
    ],
)
def test_one_bad_prompt_stops_all_before_any_work(llm: LLM, prompt, message: str) -> None:
    requests = llm._intake.num_requests
    with pytest.raises(RequestError, match=message):
        llm.generate(["fine", prompt], GREEDY)
    assert llm._intake.num_requests == requests
    with pytest.raises(RequestError, match="stop_token_ids entry 320"):
        llm.stream("fine", replace(GREEDY, stop_token_ids=[320]))
    check_idle(llm)


def test_numpy_ids_are_ids(llm: LLM) -> None:
    assert tokens(llm.generate([np.array([4, 5])], GREEDY)) == tokens(llm.generate([4, 5], GREEDY))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 1025}, "max_model_len is 1025, this engine allows 1 to 1024"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"num_blocks": 1}, "expected room for at least 2 blocks"),
        ({"kv_cache_memory": 1000}, "kv_cache_memory is 1,000 bytes"),
        ({"num_blocks": 4, "kv_cache_memory": 1}, "pass one"),
        ({"max_model_len": 1000, "num_blocks": 5}, "max_model_len 1000 needs"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_impossible_options_are_refused(toy_engine: Path, options: dict, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        LLM(toy_engine, **options)


def test_the_default_length_is_what_the_cache_holds(toy_engine: Path) -> None:
    engine = Engine.open(toy_engine)
    with LLM(engine, kv_cache_memory=engine.manifest.cache.bytes_per_block * 5, self_check=False) as llm:
        assert (llm.num_blocks, llm.max_model_len) == (5, 256)


def test_self_check_reports_how_near_it_came(llm: LLM) -> None:
    assert llm.self_check is not None
    assert llm.self_check.num_values == 4 * 9
    assert llm.self_check.largest_difference < llm.self_check.tolerance == 1e-3


def test_a_failed_self_check_names_row_id_and_values(edit_manifest) -> None:
    def bend(manifest: dict) -> None:
        manifest["self_check"]["rows"][2]["top_logits"][1] += 0.01

    folder = edit_manifest(bend)
    with pytest.raises(EngineError, match=r"self-check failed at position 64: the logit of id \d+ is .*, expected"):
        LLM(folder, num_blocks=9)
    LLM(folder, num_blocks=9, self_check=False).close()


def test_an_engine_without_self_check_loads(edit_manifest) -> None:
    with LLM(edit_manifest(lambda m: m.update(self_check=None)), num_blocks=9) as llm:
        assert llm.self_check is None
