"""Every script of `examples/` runs as its head says, on the tiny engine, and prints what it is there to show."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.served import served
from tests.support.trained_nano import trained_nano

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str, *arguments: str | Path) -> str:
    """Run a script as a user does; return what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def nano_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that can think and call; do not write into it."""
    return trained_nano(tmp_path_factory) / "engine"


def test_every_example_has_a_test_and_says_how_to_run_it() -> None:
    called = {
        node.args[0].value
        for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "example"
        if isinstance(node.args[0], ast.Constant)
    }
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == called
    for name in scripts:
        head = ast.get_docstring(ast.parse((EXAMPLES / name).read_text(encoding="utf-8")))
        assert head and re.search(rf"python examples/{re.escape(name)} (ENGINE|URL)", head), name


def test_generate_answers_texts_and_ids(tiny_engines: dict[str, Path]) -> None:
    printed = example("generate.py", tiny_engines["fp8"])
    answers = re.findall(r"^\((.*)\) -> \((.*)\) \((stop|length)\)$", printed, re.MULTILINE)
    assert len(answers) == 3 and answers[2][0] == "5, 6, 7"
    assert all(1 <= len(tokens.split(",")) <= 16 for _, tokens, _ in answers)


def test_stream_repeats_itself_with_the_same_seed(tiny_engines: dict[str, Path]) -> None:
    first = example("stream.py", tiny_engines["fp8"], "Hello")
    assert re.search(r"\n\d+ tokens, finish: (length|stop)\n$", first)
    assert first == example("stream.py", tiny_engines["fp8"], "Hello")


def test_serving_answers_all_and_forgets_who_gave_up(tiny_engines: dict[str, Path]) -> None:
    printed = example("serve_many.py", tiny_engines["fp8"])
    answered = re.findall(r"^(request \d|urgent): (\d+) tokens", printed, re.MULTILINE)
    assert {name for name, _ in answered} == {*(f"request {number}" for number in range(6)), "urgent"}
    assert re.search(r"^given up: after [4-9] of 200 tokens$", printed, re.MULTILINE)
    assert printed.endswith("running 0, waiting 0\n")


def test_choices_are_of_the_list_and_json_is_of_the_schema(tiny_engines: dict[str, Path]) -> None:
    pytest.importorskip("llguidance", reason="structured outputs need the extra 'guided'")
    printed = example("choose.py", tiny_engines["fp8"])
    assert re.search(r"^choice: (red|green|blue)$", printed, re.MULTILINE)
    (found,) = re.findall(r"^json: (.*)$", printed, re.MULTILINE)
    value = ast.literal_eval(found)
    assert value["color"] in ("red", "green", "blue") and isinstance(value["warm"], bool)
    assert len(re.findall(r"^sample \d: ", printed, re.MULTILINE)) == 3


def test_engine_and_pytorch_agree(tiny_engines: dict[str, Path], tiny_checkpoint: Path) -> None:
    printed = example("compare_with_pytorch.py", tiny_engines["exact"], tiny_checkpoint)
    (found,) = re.findall(r"largest difference of 99 log-probabilities: (.*)$", printed, re.MULTILINE)
    assert 0 < float(found) < 1e-3


def test_a_model_is_taught_what_its_engine_samples(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Random weights are never right: the loop runs, engine and trainer agree, and there is nothing to learn."""
    log, chart = tmp_path / "log.jsonl", tmp_path / "curve.svg"
    sizes = ("--prompts", "2", "--n", "2", "--max-tokens", "4", "--items", "2")
    printed = example(
        "grpo.py", tiny_engines["exact"], tiny_checkpoint, "--steps", "2", *sizes, "--log", log, "--chart", chart
    )
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and printed.endswith("right at the end: 0%\n")
    assert all(0 < row["largest_gap"] < 1e-4 and row["weight_version"] == 0 for row in rows)
    assert "reward, share right" in chart.read_text(encoding="utf-8")


def test_a_batch_file_is_answered_and_not_answered_twice(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    printed = example("batch_file.py", tiny_engines["fp8"], requests, answers)
    found = {json.loads(line)["id"]: json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()}
    assert set(found) == {f"q{number}" for number in range(5)} and len(printed.splitlines()) == 5
    example("batch_file.py", tiny_engines["fp8"], requests, answers)
    assert len(answers.read_text(encoding="utf-8").splitlines()) == 5


def test_a_tool_is_called_through_the_server(nano_engine: Path) -> None:
    with served(nano_engine) as (_, url, _):
        printed = example("tool_call.py", url)
    assert printed == 'call     calculator({"expression": "67 * 89"})\nresult   5963\nanswer   5963\n'


def test_a_question_is_answered_with_and_without_a_thought(nano_engine: Path) -> None:
    printed = example("thinking.py", nano_engine, "What is 467 + 385?")
    without, _, thinking = printed.partition("thinking on: ")
    assert re.match(r"thinking off: \d+ tokens\nanswer: +'\d+'\n", without) and "thought:" not in without
    assert thinking.endswith("thought:  467+385 | 7+5+0=12 | 6+8+1=15 | 4+3+1=08 | =0852\nanswer:   '852'\n")


def test_a_thought_ends_with_its_budget(nano_engine: Path) -> None:
    printed = example("thinking_budget.py", nano_engine, "What is 467 + 385?")
    lines = re.findall(r"^budget (\w+): '(.*)' -> '(\d+)'$", printed, re.MULTILINE)
    assert [budget for budget, _, _ in lines] == ["4", "16", "none"]
    assert [thought for _, thought, _ in lines][:2] == ["467+", "467+385 | 7+5+0=12"]
    assert lines[2][2] == "852"


def test_a_tool_may_be_called_in_a_thought(nano_engine: Path) -> None:
    printed = example("tool_in_a_thought.py", nano_engine)
    assert printed.splitlines() == [
        "thought  I call a tool.",
        'call     calculator({"expression": "67 * 89"})',
        "result   5963",
        "thought  The tool says it.",
        "answer   5963",
    ]
