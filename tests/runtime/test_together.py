"""Options that meet: whatever a request asks of its tokens, drafts, company and a small cache change nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seekforge.runtime import LLM, Engine, SamplingParams, StructuredOutputsParams
from seekforge.runtime.engine.kv_cache import root_digest

DOCS = Path(__file__).parents[2] / "docs" / "runtime.md"

#: Every way to change logits, alone and mixed.
KINDS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.4),
    SamplingParams(temperature=0.8, presence_penalty=1.0, frequency_penalty=0.4),
    SamplingParams(presence_penalty=-1.0, top_p=0.9),
    SamplingParams(temperature=0, logit_bias={7: 4.0, 40: -100.0, 300: 2.5}),
    SamplingParams(bad_words=["the", "cat sat"], top_k=20),
    SamplingParams(min_tokens=6, stop_token_ids=list(range(2, 60)), repetition_penalty=0.9, min_p=0.01),
    SamplingParams(frequency_penalty=0.7, logit_bias={9: 3.0}, logprobs=2),
]


def requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = np.random.default_rng(4)
    prompts = [rng.integers(2, 300, rng.integers(1, 140)).tolist() for _ in range(count)]
    kinds = [KINDS[i % len(KINDS)] for i in range(count)]
    params = [
        replace(kind, seed=i, max_tokens=14, ignore_eos=not kind.min_tokens or kind.ignore_eos)
        for i, kind in enumerate(kinds)
    ]
    return prompts, params


def answers(outputs) -> list[tuple]:
    return [(c.token_ids, c.finish_reason, c.text) for output in outputs for c in output.outputs]


@pytest.fixture(scope="module")
def alone(toy_engine: Path) -> list[tuple]:
    """Each request by itself, nothing shared, nothing drafted."""
    prompts, params = requests(36)
    with LLM(toy_engine, threads=1, num_blocks=9, max_batch_size=1, prefix_caching=False) as llm:
        return [answers(llm.generate(p, one))[0] for p, one in zip(prompts, params, strict=True)]


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("num_blocks", [40, 7])
def test_every_option_gives_the_same_in_any_company(
    toy_engine: Path, alone: list[tuple], drafts: int, num_blocks: int
) -> None:
    prompts, params = requests(36)
    options = {"num_speculative_tokens": drafts, "speculation_off_switch": False, "max_num_batched_tokens": 96}
    with LLM(toy_engine, threads=1, num_blocks=num_blocks, **options) as llm:
        assert answers(llm.generate(prompts, params)) == alone
        assert (llm.metrics().num_preemptions > 0) == (num_blocks == 7)
        assert bool(llm.metrics().drafts_accepted and sum(llm.metrics().drafts_accepted)) == bool(drafts)
        assert llm._scheduler.cache.pool.num_free == llm._scheduler.cache.pool.num_usable


@pytest.mark.parametrize("drafts", [0, 2])
def test_n_and_best_of_take_penalties_of_their_own(toy_engine: Path, drafts: int) -> None:
    """Completions share their prompt, not their counts."""
    params = SamplingParams(n=3, seed=5, max_tokens=12, ignore_eos=True, frequency_penalty=1.5, repetition_penalty=1.2)
    step = 0x9E3779B97F4A7C15
    with LLM(toy_engine, threads=1, num_blocks=40) as llm:
        expected = [
            answers(llm.generate([5, 6, 7] * 30, replace(params, n=1, seed=(5 + i * step) % 2**64)))[0]
            for i in range(3)
        ]
    with LLM(toy_engine, threads=1, num_blocks=40, num_speculative_tokens=drafts, speculation_off_switch=False) as llm:
        assert answers(llm.generate([5, 6, 7] * 30, params)) == expected
        (best,) = llm.generate([5, 6, 7] * 30, replace(params, n=1, best_of=3))
        assert answers([best])[0] in expected
        assert best.outputs[0].cumulative_logprob is not None


@pytest.mark.parametrize("drafts", [0, 3])
def test_guided_text_with_penalties_keeps_its_form(toy_engine: Path, drafts: int) -> None:
    pytest.importorskip("llguidance")
    forms = [
        StructuredOutputsParams(regex="[a-d]{4,9}!"),
        StructuredOutputsParams(choice=["yes", "no"]),
        StructuredOutputsParams(regex="(ab|cd){2,6}x"),
    ]
    params = [
        SamplingParams(
            seed=i,
            max_tokens=40,
            structured_outputs=form,
            presence_penalty=1.0,
            frequency_penalty=0.5,
            repetition_penalty=1.3,
            logit_bias={70: 2.0},
        )
        for i, form in enumerate(forms)
    ]
    options = {"num_speculative_tokens": drafts, "speculation_off_switch": False}
    with LLM(toy_engine, threads=1, num_blocks=40, **options) as llm:
        texts = [output.outputs[0].text for output in llm.generate([[9, 8]] * 3, params)]
        single = [llm.generate([9, 8], one)[0].outputs[0].text for one in params]
    with LLM(toy_engine, threads=1, num_blocks=40) as llm:
        assert texts == single == [output.outputs[0].text for output in llm.generate([[9, 8]] * 3, params)]
    assert re.fullmatch("[a-d]{4,9}!", texts[0]) and texts[1] in ("yes", "no")
    assert re.fullmatch("(ab|cd){2,6}x", texts[2])


def test_blocks_of_other_numerics_or_another_cache_are_other_blocks(toy_engine: Path) -> None:
    """A prefix is found only where it was computed the same way."""
    engine = Engine.open(toy_engine)
    manifest = engine.manifest
    others = [
        manifest,
        manifest.model_copy(update={"numerics": {"kv_fp8": True}}),
        manifest.model_copy(update={"cache": manifest.cache.model_copy(update={"kv_format": "bf16"})}),
        manifest.model_copy(update={"program_sha256": "other"}),
    ]
    roots: set[bytes] = set()
    with LLM(engine, threads=1, num_blocks=9) as llm:
        live = llm._intake.make(llm._intake.check((5, 6), SamplingParams()), 0, None, None)
        for other in others:
            object.__setattr__(llm.engine, "manifest", other)
            roots.add(llm._intake.root(live.sequences[0]))
        object.__setattr__(llm.engine, "manifest", manifest)
        llm._intake.weight_version += 1
        roots.add(llm._intake.root(live.sequences[0]))
        live.sequences[0].speculates = True
        roots.add(llm._intake.root(live.sequences[0]))
    assert len(roots) == 6 and root_digest("a") != root_digest("b")


def test_the_example_of_the_documentation_runs(chat_engine: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("llguidance")
    (example,) = re.findall(r"```python\n(from seekforge.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "engine").symlink_to(chat_engine)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, str(DOCS), "exec"), names)
    assert names["color"][0].outputs[0].text in ("red", "blue")  # pyright: ignore[reportIndexIssue]
    assert names["answer"][0].outputs[0].message is not None  # pyright: ignore[reportIndexIssue]
    assert "length" in capsys.readouterr().out
