"""Comparisons of CPU engines with others: who has a turn when, what is computed of it, and what is refused."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, cast

import pytest
from tests.benchmarks import cpu_profile, cpu_vs_llama_cpp, cpu_vs_transformers
from tests.benchmarks.cpu.engine_side import EngineSide
from tests.benchmarks.cpu.report import Comparison, Pair, draw, markdown
from tests.benchmarks.cpu.rounds import Case, Measured, Shared, Side, factor, measure
from tests.benchmarks.cpu_profile import by_operator
from tests.support.toy_engine import write_toy_engine

from seekforge.common.errors import EnvironmentFault

SCRIPTED = "tests.support.scripted_side"
OPTIONS = {"cores": sorted(os.sched_getaffinity(0))[:1], "clock": "wall"}


def test_a_side_answers_from_its_own_process_and_its_faults_are_one_line() -> None:
    with Side("scripted", SCRIPTED, OPTIONS) as side:
        assert side.call("add", a=2, b=3) == 5
        with pytest.raises(EnvironmentFault, match=r"^scripted: RuntimeError: first line$"):
            side.call("fail", words="first line\nsecond line")
        assert side.call("add", a=1, b=1) == 2
        with pytest.raises(EnvironmentFault, match=r"^scripted ended: what a library prints$"):
            side.call("end")
    with pytest.raises(EnvironmentFault, match=r"^scripted: ValueError: no such file$"):
        Side("scripted", SCRIPTED, OPTIONS | {"refuses": "no such file"})


class Recorded:
    """A side in this process: takes as many seconds as it is told to, and notes its calls."""

    def __init__(self, name: str, seconds: float, calls: list[str]) -> None:
        self.name, self.seconds, self.calls = name, seconds, calls

    def call(self, name: str, **keywords: Any) -> float:
        self.calls.append(f"{self.name} {name}")
        self.keywords = keywords
        return self.seconds


def test_every_side_has_a_turn_in_each_round_and_the_first_one_changes() -> None:
    calls: list[str] = []
    sides = [Recorded("a", 0.5, calls), Recorded("b", 2.0, calls)]
    memory = Recorded("memory", 1e9, calls)
    first, second = measure(
        cast("Any", sides), cast("Any", memory), Case("decode", 10, 8), rounds=2, steps=4, vocab_size=50
    )
    warm = ["a hold", "a decode", "b hold", "b decode"]
    assert calls == [*warm, "memory read", "a decode", "b decode", "memory read", "b decode", "a decode"]
    assert (first.speeds, second.speeds) == ([8 * 4 / 0.5] * 2, [8 * 4 / 2.0] * 2)
    assert factor(first, second) == (4, 4, 4) and first.read == [1e9, 1e9]
    measure(cast("Any", sides), cast("Any", memory), Case("prefill", 10), rounds=1, steps=4, vocab_size=50)
    assert len(sides[0].keywords["prompt"]) == 10 and max(sides[0].keywords["prompt"]) < 50


def compared() -> Comparison:
    long, eight, prompt = Case("decode", 2048), Case("decode", 64, 8), Case("prefill", 512)
    read = [10e9, 20e9, 10e9]
    results = (
        Measured(long, "int8", [50.0, 60.0, 70.0], read),
        Measured(long, "llama.cpp Q8_0", [50.0, 40.0, 35.0], read),
        Measured(eight, "int8", [100.0, 110.0, 120.0], read),
        Measured(prompt, "int8", [1000.0, 1100.0, 1200.0], read),
        Measured(prompt, "llama.cpp Q8_0", [500.0, 500.0, 500.0], read),
    )
    pair = Pair("int8", "llama.cpp Q8_0", 100_000_000)
    return Comparison("against llama.cpp", (pair,), results, 3, 16, 2, "wall", 0.25)


def test_the_tables_say_both_speeds_the_factor_its_spread_and_what_is_read() -> None:
    text = markdown(compared())
    assert "| 2,048 | 60.0 / 40.0 = **1.50×** (1.00–2.00), reads 50% |" in text
    assert "| 64, batch 8 | 110 (100–120) |" in text
    assert "| 512 | 1,100 / 500 = **2.20×** (2.00–2.40) |" in text
    assert "others kept 25% of the cores busy" in text and "Memory read 10.0 GB/s" in text
    assert "int8 100." in text
    assert json.loads(json.dumps(compared().to_json()))["results"][0]["tokens_per_s"] == [50, 60, 70]


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    draw(compared(), tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert "decode, batch 8" in text and "seekforge" in text


def test_what_others_do_meanwhile_is_counted() -> None:
    assert os.cpu_count()
    watch = Shared([])
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert 0 <= watch.share() <= 1
    watch.busy -= (os.cpu_count() or 1) * (time.monotonic() - watch.began + 1)  # as if others had had all cores
    assert watch.share() == 1


def test_an_engine_decodes_whole_steps_of_all_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    write_toy_engine(folder)
    options = {"folder": str(folder), "threads": 1, "batch": 2, "tokens": 400}
    side = EngineSide(options, time.perf_counter)
    assert side.prefill(list(range(2, 80))) > 0
    side.hold([list(range(2, 132)), list(range(3, 133))])
    for _ in range(2):
        assert side.decode(5) > 0
        assert [metrics.num_decode_tokens for _, metrics in side.steps[-5:]] == [2] * 5
    side.llm.close()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ((), "no --llama-source: weights become GGUF by llama.cpp's converter"),
        (("--llama-source", "nowhere"), "no convert_hf_to_gguf.py in nowhere"),
        (("--precisions", "int8,fp8"), "--precisions is 'int8,fp8', expected some of f32,int8,int4"),
        (("--cpu-time", "--threads", "2"), "give --threads 1 with it"),
        (("--chart", "a.pdf"), "charts are written as PNG or SVG"),
    ],
)
def test_what_cannot_be_compared_is_one_line_before_any_work(
    words: tuple[str, ...], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cpu_vs_llama_cpp.main([str(tmp_path / "work"), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and fault in said and said.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_a_missing_library_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "F32.gguf").touch()
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError('No module named llama_cpp')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert cpu_vs_llama_cpp.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "No module named llama_cpp; --llama-python names a Python" in said and said.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cpu_vs_transformers.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: transformers is not installed, and there is nothing to compare with\n"


def test_a_profile_counts_the_nodes_of_the_last_steps_and_not_their_containers() -> None:
    def node(name: str, at: int, duration: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_1_kernel_time", "ts": at, "dur": duration, "args": {"op_name": name}}

    def run(at: int, duration: int) -> dict[str, Any]:
        return {"cat": "Session", "name": "model_run", "ts": at, "dur": duration}

    prefill = [run(0, 100), node("MatMul", 10, 80)]
    steps = [run(200, 50), node("If", 201, 40), node("MatMul", 205, 30), run(300, 50), node("MatMul", 310, 40)]
    shares = by_operator([[run(5, 1)], prefill + steps], 2)
    assert [(one.operator, one.nodes, one.microseconds) for one in shares] == [("MatMul", 1, 35), ("session", 0, 15)]
    text = cpu_profile.markdown(shares, 70, 1)
    assert "| MatMul | 1 | 35 | 50% |" in text and "| 1 others | – | 15 | 21% |" in text
    assert "| outside of ONNX Runtime | – | 20 | 29% |" in text and "| **a step** | **1** | **70** | |" in text
