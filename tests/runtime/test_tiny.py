"""The runtime on the tiny model: whatever is batched, shared, drafted or interrupted, tokens are those of one by one.

Exact numerics: those of fp8 round activations, which may flip with the order of a sum.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from seekforge.common.errors import EngineError, RequestError
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import digest_file, save_manifest
from seekforge.formats.numerics import NUMERICS
from seekforge.runtime import LLM, Engine, SamplingParams, StructuredOutputsParams

TOPK = 64  # index_topk of the tiny model
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="session")
def engine(tiny_engines: dict[str, Path]) -> Engine:
    return Engine.open(tiny_engines["exact"])


@pytest.fixture(scope="module")
def plain(engine: Engine) -> Iterator[LLM]:
    """One request at a time, nothing shared, nothing drafted."""
    with LLM(engine, num_blocks=30, max_batch_size=1, prefix_caching=False, self_check=False) as llm:
        yield llm


def ids_of(outputs) -> list[list[int]]:
    return [list(c.token_ids) for output in outputs for c in output.outputs]


def check_idle(llm: LLM) -> None:
    llm._scheduler.check()
    assert not llm._turns.live and not llm._scheduler.has_work
    assert llm._scheduler.cache.pool.num_free == llm._scheduler.cache.pool.num_usable


def prompts_around(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 1000, length).tolist() for length in lengths]


@pytest.mark.parametrize(("chunk", "drafts"), [(2048, 0), (TOPK, 0), (TOPK, 3)])
def test_a_context_that_crosses_index_topk(engine: Engine, plain: LLM, drafts: int, chunk: int) -> None:
    """Below, at and above it; mid-decode, at a chunk border, under speculation."""
    prompts = prompts_around([TOPK - 6, TOPK - 1, TOPK, TOPK + 1, 2 * TOPK])
    expected = [ids_of(plain.generate(prompt, GREEDY))[0] for prompt in prompts]
    options = {"num_speculative_tokens": drafts, "max_num_batched_tokens": chunk, "speculation_off_switch": False}
    with LLM(engine, num_blocks=40, self_check=False, **options) as llm:
        assert ids_of(llm.generate(prompts, GREEDY)) == expected
        assert ids_of(llm.generate(prompts, GREEDY)) == expected  # from the prefix cache
        assert llm.metrics().num_hit_tokens > 0
        check_idle(llm)


@pytest.mark.parametrize("drafts", [1, pytest.param(3, marks=pytest.mark.slow), 5])
def test_drafts_change_no_token(engine: Engine, plain: LLM, drafts: int) -> None:
    prompts = prompts_around([5, 63, 64, 90])
    for params in (replace(GREEDY, max_tokens=20), SamplingParams(seed=3, max_tokens=20, ignore_eos=True)):
        expected = [ids_of(plain.generate(prompt, params))[0] for prompt in prompts]
        options = {"num_speculative_tokens": drafts, "speculation_off_switch": False}
        with LLM(engine, num_blocks=40, self_check=False, **options) as llm:
            assert ids_of(llm.generate(prompts, params)) == expected
            metrics = llm.metrics()
            assert len(metrics.drafts_proposed) == drafts and metrics.drafts_proposed[0] > 40
            check_idle(llm)


def mixed_requests(count: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Random lengths; a third shares one of a few beginnings."""
    rng = random.Random(seed)
    shared = prompts_around([64, 128, 100], seed=7)
    requests = []
    for number in range(count):
        own = prompts_around([rng.choice([1, 3, 17, 60, 64, 65, 100, 150])], seed=number)[0]
        prompt = (rng.choice(shared) + own)[:240] if rng.random() < 0.33 else own
        requests.append((prompt, replace(GREEDY, max_tokens=rng.choice([1, 2, 5, 12, 24]))))
    return requests


def run_mixed(engine: Engine, plain: LLM, count: int, **options) -> None:
    requests = mixed_requests(count, seed=5)
    expected = [ids_of(plain.generate(prompt, params))[0] for prompt, params in requests]
    rng = random.Random(1)
    with LLM(engine, self_check=False, num_speculative_tokens=2, speculation_off_switch=False, **options) as llm:
        streams = [llm.stream(prompt, params) for prompt, params in requests]
        found: list[list[int]] = [[] for _ in requests]
        doomed = {i: rng.randrange(4) for i in rng.sample(range(count), count // 8)}
        open_streams = list(range(count))
        while open_streams:  # a few are read by turns at a time, so that they come and go
            for i in open_streams[:12]:
                delta = next(streams[i], None)
                if delta is not None:
                    found[i] += delta.token_ids
                if delta is None or (i in doomed and len(found[i]) > doomed[i]):
                    streams[i].close()
                    open_streams.remove(i)
        for i, tokens in enumerate(found):
            assert tokens == expected[i][: len(tokens)]
            assert i in doomed or tokens == expected[i]
        check_idle(llm)
        assert llm.metrics().num_hit_tokens > 0


def test_a_mix_in_a_small_cache_gives_what_each_gives_alone(engine: Engine, plain: LLM) -> None:
    run_mixed(engine, plain, 16, num_blocks=12, max_batch_size=8, max_num_batched_tokens=96)


@pytest.mark.slow
def test_two_hundred_mixed_requests(engine: Engine, plain: LLM) -> None:
    run_mixed(engine, plain, 200, num_blocks=12, max_batch_size=8, max_num_batched_tokens=128)


def test_preemption_happens_and_changes_nothing(engine: Engine, plain: LLM) -> None:
    prompts = prompts_around([120, 121, 122])
    params = replace(GREEDY, max_tokens=16)
    expected = [ids_of(plain.generate(prompt, params))[0] for prompt in prompts]
    with LLM(engine, num_blocks=8, max_batch_size=4, self_check=False) as llm:
        outputs = llm.generate(prompts, params)
        assert ids_of(outputs) == expected
        assert llm.metrics().num_preemptions > 0 and sum(o.metrics.preemptions for o in outputs) > 0


def bits(output) -> tuple:
    completion = output.outputs[0]
    assert completion.logprobs is not None
    values = [(t.token_id, t.logprob, t.top) for t in completion.logprobs]
    return completion.token_ids, tuple(values)


@pytest.mark.parametrize("numerics", ["exact", pytest.param("fp8", marks=pytest.mark.slow)])
def test_deterministic_mode_gives_the_same_bits_in_any_company(tiny_engines: dict[str, Path], numerics: str) -> None:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=8, ignore_eos=True, logprobs=3)
    prompts = prompts_around([70, 1, 33, 150, 64], seed=3)
    engine = Engine.open(tiny_engines[numerics])
    common = {"num_blocks": 40, "self_check": False, "deterministic": True}
    seen: list[list[tuple]] = []
    with LLM(engine, **common) as llm:
        seen.append([bits(llm.generate(prompt, params)[0]) for prompt in prompts])  # alone
        seen.append([bits(llm.generate(prompt, params)[0]) for prompt in prompts])  # from the cache
        seen.append([bits(output) for output in llm.generate(prompts, params)])
    with LLM(engine, max_num_batched_tokens=48, **common) as llm:
        seen.append([bits(output) for output in llm.generate(prompts, params)])  # in chunks
    with LLM(engine, num_speculative_tokens=3, speculation_off_switch=False, **common) as llm:
        seen.append([bits(output) for output in llm.generate(prompts[::-1], params)][::-1])
    for other in seen[1:]:
        assert other == seen[0]


def test_logprobs_are_those_of_pytorch(engine: Engine, tiny_checkpoint: Path) -> None:
    config = ModelConfig.load(tiny_checkpoint)
    (prompt,) = prompts_around([90], seed=4)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=5, prompt_logprobs=300)
    with LLM(engine, num_blocks=20, max_num_batched_tokens=40, self_check=False) as llm:
        (output,) = llm.generate(prompt, params)
        assert llm.generate(prompt, params)[0].metrics.cached_tokens == 0  # prompt logprobs need every position
    completion = output.outputs[0]
    whole = [*prompt, *completion.token_ids]
    with Checkpoint.open(tiny_checkpoint) as source:
        session = TorchSession(Settings(config, NUMERICS["exact"]), source)
        logits = session.prefill(whole)["logits"].double()
    wanted = (logits - logits.logsumexp(-1, keepdim=True)).numpy()
    assert output.prompt_logprobs is not None and completion.logprobs is not None
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    for position, entry in enumerate([*output.prompt_logprobs[1:], *completion.logprobs]):
        assert entry is not None and entry.token_id == whole[position + 1]
        assert entry.logprob == pytest.approx(wanted[position, entry.token_id], abs=2e-4)
        best = np.sort(wanted[position])[::-1]
        assert len(entry.top) == (300 if position < len(prompt) - 1 else 5)
        np.testing.assert_allclose([value for _, value in entry.top], best[: len(entry.top)], atol=2e-4)
    assert completion.cumulative_logprob == pytest.approx(sum(t.logprob for t in completion.logprobs))


def test_n_completions_share_the_prompt_and_best_of_keeps_the_best(engine: Engine) -> None:
    (prompt,) = prompts_around([150], seed=6)
    params = SamplingParams(n=4, seed=9, max_tokens=10, ignore_eos=True, logprobs=0)
    with LLM(engine, num_blocks=40, self_check=False, prefix_caching=False) as llm:
        (output,) = llm.generate(prompt, params)
        tokens = ids_of([output])
        assert len({tuple(t) for t in tokens}) == 4
        assert llm.metrics().num_hit_tokens == 3 * 128  # prefix caching is off, siblings share all the same
        (best,) = llm.generate(prompt, replace(params, n=2, best_of=4))
        order = sorted(range(4), key=lambda i: -(output.outputs[i].cumulative_logprob or 0.0))
        assert ids_of([best]) == [tokens[i] for i in order[:2]]
        assert output.usage.completion_tokens == best.usage.completion_tokens == 40
        assert llm.metrics().num_hit_tokens == 6 * 128
        deltas = list(llm.stream(prompt, params))
        for index in range(4):
            assert [t for d in deltas if d.index == index for t in d.token_ids] == tokens[index]
        check_idle(llm)


@pytest.mark.parametrize("drafts", [0, 2])
def test_guided_text_has_its_form(engine: Engine, drafts: int) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    forms = [
        StructuredOutputsParams(json=schema, disable_any_whitespace=True),
        StructuredOutputsParams(regex="[a-c]{3,5}-[0-9]+x"),
        StructuredOutputsParams(choice=["yes", "no", 'per"haps']),
        StructuredOutputsParams(grammar='start: "<" ("a" | "b")+ ">"'),
    ]
    with LLM(engine, num_blocks=40, self_check=False, num_speculative_tokens=drafts) as llm:
        params = [SamplingParams(seed=i, max_tokens=120, structured_outputs=form) for i, form in enumerate(forms)]
        outputs = llm.generate([[5, 6, 7]] * len(forms), params)
        texts = [output.outputs[0].text for output in outputs]
        assert [output.outputs[0].finish_reason for output in outputs] == ["stop"] * 4
        data = json.loads(texts[0])
        assert set(data) == {"name", "age"} and 0 <= data["age"] <= 99
        import re

        assert re.fullmatch("[a-c]{3,5}-[0-9]+x", texts[1])
        assert texts[2] in {"yes", "no", 'per"haps'}
        assert re.fullmatch("<[ab]+>", texts[3])
        with pytest.raises(RequestError, match="the grammar cannot be used"):
            llm.generate("x", SamplingParams(structured_outputs=StructuredOutputsParams(regex="(")))
        check_idle(llm)


def test_taps_name_what_was_chosen_at_every_position(engine: Engine) -> None:
    (prompt,) = prompts_around([100], seed=8)
    params = replace(GREEDY, max_tokens=12, taps=["topk_indices", "expert_ids"])
    seen = []
    for options in ({}, {"max_num_batched_tokens": 33}, {"num_speculative_tokens": 3, "speculation_off_switch": False}):
        with LLM(engine, num_blocks=20, self_check=False, **options) as llm:
            seen.append(llm.generate([prompt, prompt[:30]], params)[0].outputs[0])
    for completion in seen:
        assert set(completion.taps) == {f"topk_indices.{i}" for i in range(4)} | {f"expert_ids.{i}" for i in (1, 2, 3)}
        for name, values in completion.taps.items():
            assert len(values) == 100 + 11
            assert (np.sort(values[:, :4]) >= 0).all() or name.startswith("topk")
        topk = completion.taps["topk_indices.2"]
        for position in (0, 10, 63, 64, 110):
            chosen = topk[position][topk[position] >= 0]
            assert len(chosen) == min(position + 1, TOPK) and chosen.max() <= position
        same = [(completion.taps[name] == seen[0].taps[name]).mean() for name in completion.taps]
        assert min(same) > 0.99


@pytest.fixture
def read_tensors(tiny_checkpoint: Path) -> Callable[[Callable[[str], bool]], dict[str, np.ndarray]]:
    def read(wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
        index = json.loads((tiny_checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
        with Checkpoint.open(tiny_checkpoint) as source:
            return {name: source.tensor(name).copy() for name in index if wanted(name)}

    return read


def test_update_weights_swaps_them_between_steps(engine: Engine, read_tensors) -> None:
    prompts = prompts_around([70, 20], seed=2)
    tensors = read_tensors(lambda name: name in ("model.norm.weight", "model.layers.1.post_attention_layernorm.weight"))
    rng = np.random.default_rng(0)
    changed = {name: rng.uniform(0.2, 2.0, v.shape).astype(ml_dtypes.bfloat16) for name, v in tensors.items()}
    experts = read_tensors(lambda name: name.startswith("model.layers.2.mlp.experts."))
    with LLM(engine, num_blocks=40, self_check=False, num_speculative_tokens=1) as llm:
        before = ids_of(llm.generate(prompts, GREEDY))
        llm.update_weights(changed)
        after = ids_of(llm.generate(prompts, GREEDY))
        assert after != before and llm.metrics().num_hit_tokens == 0
        llm.update_weights(tensors)
        assert ids_of(llm.generate(prompts, GREEDY)) == before
        stream = llm.stream(prompts[0], replace(GREEDY, max_tokens=6))
        first = [token for _ in range(2) for token in next(stream).token_ids]
        llm.update_weights(experts)  # the same values, every expert: nothing changes, in the middle of a request
        assert first + [token for delta in stream for token in delta.token_ids] == before[0][:6]
        refused = {
            "reads no tensor 'model.norm.wait'; did you mean model.norm.weight": {
                "model.norm.wait": tensors["model.norm.weight"]
            },
            r"expected bfloat16 \(512,\)": {"model.norm.weight": np.zeros(512, np.float32)},
            "not finite": {"model.norm.weight": np.full(512, np.nan, ml_dtypes.bfloat16)},
            "also reads": dict(list(experts.items())[:1]),
        }
        for message, wrong in refused.items():
            with pytest.raises(EngineError, match=message):
                llm.update_weights(wrong)
        assert ids_of(llm.generate(prompts, GREEDY)) == before
        check_idle(llm)


def test_a_conversation_is_answered_by_an_engine_of_a_checkpoint(engine: Engine) -> None:
    with LLM(engine, num_blocks=20, self_check=False) as llm:
        messages = [{"role": "user", "content": "Hello"}]
        (output,) = llm.chat(messages, replace(GREEDY, max_tokens=3), chat_template_kwargs={"thinking": True})
        assert output.prompt == "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜><think>"
        assert len(output.outputs[0].token_ids) == 3 and output.outputs[0].message is not None
        with pytest.raises(RequestError, match="role is 'robot'"):
            llm.chat([{"role": "robot", "content": "Hello"}])


def test_no_code_of_an_engine_is_executed(engine: Engine, tmp_path: Path) -> None:
    """An older engine carries a Python file, which would leave a mark if it were executed."""
    folder = Path(shutil.copytree(engine.folder, tmp_path / "engine", copy_function=os.link))
    path, mark = folder / "encoding" / "encoding_dsv32.py", tmp_path / "mark"
    path.parent.mkdir()
    path.write_text(f"open({str(mark)!r}, 'w').close()\n")
    files = (*engine.manifest.files, digest_file(folder, "encoding/encoding_dsv32.py"))
    (folder / "manifest.json").unlink()
    save_manifest(folder, engine.manifest.model_copy(update={"files": files}))
    with LLM(folder, num_blocks=20, self_check=False) as llm:
        llm.generate("Hello", GREEDY)
        llm.chat([{"role": "user", "content": "Hello"}], GREEDY)
    assert not mark.exists()
