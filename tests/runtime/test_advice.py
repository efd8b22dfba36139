"""What a refusal of `run`, `bench`, `dump` or `LLM` advises is tried: it leads on, never back to where it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.advice import (
    invoke,
    refusal,
    with_option,
    without_option,
)

from seekforge.common.errors import EngineError, RequestError
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.dump import model_size
from seekforge.runtime.engine.engine_folder import Engine

RUN = ["run", "{engine}", "--prompt", "the cat", "--max-tokens", "3", "--no-self-check"]
BATCH = ["run", "{engine}", "--batch", "{batch}", "--output", "{out}", "--no-self-check"]
BENCH = ["bench", "{engine}", "--contexts", "8", "--concurrency", "1", "--max-tokens", "2"]
DUMP = ["dump", "{tiny}", "{out}", "--modes", "whole"]

Follow = Callable[[list[str], str, dict[str, str]], list[str]]


def drop(name: str, *, has_value: bool = True) -> Follow:
    return lambda args, line, places: without_option(args, name, has_value=has_value)


def put(name: str, number: str) -> Follow:
    """Give an option the last number that a pattern finds in the refusal."""
    return lambda args, line, places: with_option(args, name, re.findall(number, line)[-1])


def add(*more: str) -> Follow:
    return lambda args, line, places: [*args, *(part.format(**places) for part in more)]


CASES: dict[str, tuple[list[str], str, Follow]] = {
    "nothing to do": (
        ["run", "{engine}"],
        "give either --prompt or --batch",
        add("--prompt", "a", "--max-tokens", "2"),
    ),
    "greedy, and not": ([*RUN, "--greedy", "--top-k", "3"], "drop one or the other", drop("--top-k")),
    "a batch without results": (BATCH[:4], "belong together", add("--output", "{out}")),
    "a batch as JSON": ([*BATCH, "--json"], "drop --json", drop("--json", has_value=False)),
    "log-probabilities in a stream": ([*RUN, "--logprobs", "2"], "needs --json", add("--json")),
    "completions in a stream": ([*RUN, "--n", "2"], "needs --json", add("--json")),
    "the best in a stream": ([*RUN, "--best-of", "2"], "needs --json", add("--json")),
    "too many tokens": (
        with_option(RUN, "--max-tokens", "100000"),
        "lower max_tokens",
        lambda args, line, places: with_option(args, "--max-tokens", "3"),
    ),
    "no room for the answer": (
        [*RUN, "--max-model-len", "4"],
        "raise max_model_len to",
        put("--max-model-len", r"max_model_len to (\d+)"),
    ),
    "a context beyond the engine": (
        [*RUN, "--max-model-len", "10000000"],
        "allows 1 to",
        put("--max-model-len", r"1 to (\d+)"),
    ),
    "a checkpoint that is not read": ([*RUN, "--checkpoint", "{out}"], "leave it out", drop("--checkpoint")),
    "drafts beyond what there is": (
        [*RUN, "--num-speculative-tokens", "9"],
        "from 0 to 5",
        put("--num-speculative-tokens", r"0 to (\d)"),
    ),
    "more log-probabilities than tokens": (
        [*RUN, "--json", "--logprobs", "100000"],
        "or -1 for all",
        lambda args, line, places: with_option(args, "--logprobs", "-1"),
    ),
    "more completions than there may be": (
        [*RUN, "--json", "--n", "500"],
        "from 1 to",
        put("--n", r"to (\d+)"),
    ),
    "a choice that does not fit": (
        [*RUN, "--choice", "a text that needs more than three tokens"],
        "raise it to",
        put("--max-tokens", r"raise it to (\d+)"),
    ),
    "more tokens at least than at most": (
        [*RUN, "--min-tokens", "9"],
        "at most max_tokens (3)",
        put("--min-tokens", r"max_tokens \((\d)\)"),
    ),
    "a token that is none": (
        [*RUN, "--stop-token-ids", "999999"],
        "expected 0 to",
        put("--stop-token-ids", r"0 to (\d+)"),
    ),
    "an empty prompt": (
        with_option(RUN, "--prompt", ""),
        "pass some text",
        lambda args, line, places: with_option(args, "--prompt", "a"),
    ),
    "results of other requests": (
        [*BATCH, "--seed", "2"],
        "give another --output",
        lambda args, line, places: with_option(args, "--output", places["out2"]),
    ),
    "results that are none": (
        with_option(BATCH, "--output", "{notes}"),
        "give another --output",
        lambda args, line, places: with_option(args, "--output", places["out2"]),
    ),
    "a batch of no request": (
        with_option(BATCH, "--batch", "{empty}"),
        "write one JSON object a line",
        lambda args, line, places: with_option(args, "--batch", places["batch"]),
    ),
    "results over requests": (
        with_option(BATCH, "--output", "{batch}"),
        "write to another place",
        lambda args, line, places: with_option(args, "--output", places["out2"]),
    ),
    "more at once than the engine runs": (
        with_option(BENCH, "--concurrency", "999"),
        "this engine runs",
        put("--concurrency", r"runs (\d+)"),
    ),
    "contexts beyond the engine": (
        with_option(BENCH, "--contexts", "9999999"),
        "allowed",
        lambda args, line, places: with_option(
            args, "--contexts", str(min(int(re.findall(r"of (\d+)", line)[0]) - 2, 9))
        ),
    ),
    "one token has no time between": (
        with_option(BENCH, "--max-tokens", "1"),
        "at least 2",
        put("--max-tokens", r"least (\d)"),
    ),
    "steps beyond the engine": (
        [*DUMP, "--contexts", "999999999"],
        "the engine accepts",
        lambda args, line, places: with_option(
            args, "--contexts", str(min(int(re.findall(r"accepts (\d+)", line)[0]), 9))
        ),
    ),
    "a tap that is none": (
        [*DUMP, "--contexts", "9", "--taps", "nothing"],
        "'seekforge inspect' lists",
        drop("--taps"),
    ),
}


@pytest.fixture
def places(toy_engine: Path, tiny_engines: dict[str, Path], tmp_path: Path) -> dict[str, str]:
    """What the cases call their files."""
    found = {name: str(tmp_path / name) for name in ("batch", "out", "out2", "notes", "empty")}
    for name, line in (("batch", {"id": "a", "prompt": "a", "max_tokens": 2}), ("notes", {"note": 1})):
        (tmp_path / name).write_text(json.dumps(line) + "\n", encoding="utf-8")
    (tmp_path / "empty").touch()
    return found | {"engine": str(toy_engine), "tiny": str(tiny_engines["exact"])}


@pytest.mark.parametrize("case", CASES)
def test_advice_leads_on(case: str, places: dict[str, str]) -> None:
    form, message, follow = CASES[case]
    args = [part.format(**places) for part in form]
    if case == "results of other requests":
        assert invoke(*(part.format(**places) for part in BATCH)).exit_code == 0
    line = refusal(*args)
    assert message in line, line
    result = invoke(*follow(args, line, places))
    assert result.exit_code == 0, (line, result.output)


#: What `LLM` refuses, and what its advice makes of it, given the refusal.
ARGUMENTS: list[tuple[dict[str, Any], str, Callable[[str], dict[str, Any]]]] = [
    ({"max_batch_size": 0}, "allows 1 to", lambda line: {"max_batch_size": int(re.findall(r"1 to (\d+)", line)[0])}),
    ({"threads": 0}, "at least 1", lambda line: {"threads": 1}),
    ({"num_blocks": 9, "kv_cache_memory": 1 << 20}, "pass one", lambda line: {"num_blocks": 9}),
    ({"num_blocks": 1}, "at least 2 blocks", lambda line: {"num_blocks": 2}),
    (
        {"num_blocks": 3, "max_model_len": 1000},
        "lower max_model_len",
        lambda line: {"num_blocks": 3, "max_model_len": 64},
    ),
    (
        {"num_speculative_tokens": 9},
        "0 to",
        lambda line: {"num_speculative_tokens": int(re.findall(r"0 to (\d)", line)[0])},
    ),
]


@pytest.mark.parametrize(
    ("given", "message", "follow"), ARGUMENTS, ids=lambda value: None if callable(value) else str(value)[:40]
)
def test_advice_about_arguments_leads_on(
    toy_engine: Path, given: dict[str, Any], message: str, follow: Callable[[str], dict[str, Any]]
) -> None:
    rest: dict[str, Any] = {"self_check": False} | ({} if "threads" in given else {"threads": 1})
    with pytest.raises(EngineError, match=message) as caught:
        LLM(toy_engine, **rest, **given)
    with LLM(toy_engine, **rest, **follow(str(caught.value))) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=2))[0].finished


def test_no_more_room_is_advised_than_an_engine_can_have(toy_engine: Path, tiny_engines: dict[str, Path]) -> None:
    with LLM(toy_engine, threads=1, self_check=False, num_blocks=60) as llm:
        most = llm.engine.manifest.limits.max_model_len
        with pytest.raises(RequestError) as caught:
            llm.generate("a", SamplingParams(max_tokens=most + 5))
        assert "raise" not in str(caught.value)
    engine = Engine.open(tiny_engines["exact"])
    most, config = engine.manifest.limits.max_model_len, engine.manifest.config
    for could, advised in (
        (most, "choose one of these"),
        (most + 9, f"build it with a higher limit, {most + 9} at most"),
    ):
        config["max_position_embeddings"] = could
        with pytest.raises(EngineError, match=advised):
            LLM(engine, threads=1, max_model_len=most + 5)


@pytest.mark.parametrize("value", [None, "4", 1.5, True])
def test_a_size_that_a_manifest_misses_is_one_line(tiny_engines: dict[str, Path], value: object) -> None:
    manifest = Engine.open(tiny_engines["exact"]).manifest
    manifest.config["index_topk"] = value
    with pytest.raises(EngineError, match="key 'config': index_topk is"):
        model_size(manifest, "index_topk")
