"""`seekforge parity` as people call it: verdicts as exit codes, reports, dumps carried elsewhere, refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tests.support.in_process import dump_in_process
from tests.support.made_once import made_once
from tests.support.parity_faults import (
    bent_engine,
    build_engine,
    edited_checkpoint,
    scaled,
    split_products,
)

from seekforge.common.requirements import declared
from seekforge.exporter.parity.sides import engine as engine_side
from seekforge.exporter.parity.sides.engine import EngineSide
from seekforge.exporter.program.export import export
from seekforge.formats.dump import Dump
from seekforge.formats.engine.manifest import WeightSource, load_manifest, save_manifest
from seekforge.formats.numerics import FP8
from seekforge.runtime.cli import main as cli

FEW = ("--contexts", "70", "--modes", "whole,mtp", "--threads", "1")
NORM = "model.layers.2.post_attention_layernorm.weight"


#: Engines run in this process: in one of their own they are run by the check that is `saved`, and by faults.
HERE = pytest.mark.usefixtures("engines_run_here")


@pytest.fixture
def engines_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    dump_in_process(monkeypatch)


def invoke(*args: str | Path) -> Result:
    """Run the command line in this process; an exception that is no exit is a bug and is raised."""
    result = CliRunner().invoke(cli.main, ["parity", *(str(arg) for arg in args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refuse(*args: str | Path) -> str:
    result = invoke(*args, "--quiet")
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


class Page(HTMLParser):
    """Counts elements and notes every address that a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.fetched: list[str] = []
        self.values: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action"):
                self.fetched.append(value or "")
            elif name == "data-v":
                self.values.append(value or "")


@dataclass(frozen=True)
class Saved:
    """One check of the right fp8 engine, with everything kept; do not write into its folder."""

    root: Path

    @property
    def exit_code(self) -> int:
        return int((self.root / "exit_code").read_text())

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.root / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def saved(tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The check, made once for all tests."""

    def make(root: Path) -> None:
        args = (tiny_engines["fp8"], "--checkpoint", tiny_checkpoint, *FEW, "--save", root / "dumps")
        result = invoke(*args, "--html", root / "report.html", "--json")
        (root / "exit_code").write_text(str(result.exit_code))
        (root / "report.json").write_text(result.stdout, encoding="utf-8")

    return Saved(made_once(tmp_path_factory, "saved-parity", make))


def test_a_right_engine_passes_and_says_why(saved: Saved) -> None:
    report = saved.report
    assert saved.exit_code == 0 and report["passed"] and report["finding"] is None, report["gates"]
    assert {gate["name"] for gate in report["gates"]} >= {"operations", "choices", "caches", "logits", "KL", "top-1"}
    assert all(gate["reason"] for gate in report["gates"])
    assert len(report["operations"]) > 100 and report["num_engine_runs"] == 2  # as it is, and fed by PyTorch
    points = report["layers"][1]["points"]
    assert set(points["attn_out"]) == {"max_abs", "max_relative", "rms_relative", "cosine_difference", "calc_diff"}
    case = report["cases"][0]
    assert set(case["logits"]) == set(points["attn_out"]) and 0 < case["logits"]["calc_diff"] < 0.1
    assert case["perplexity_reference"] > 1 and len(case["heat"]) == 4 and len(case["heat"][0]) == 70


def test_the_page_stands_alone_and_has_numbers_behind_every_point(saved: Saved) -> None:
    text = (saved.root / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == [] and "http" not in text and "@import" not in text
    assert page.tags["svg"] >= 3 and page.tags["table"] >= 4 and page.tags["meta"] >= 2
    assert 'name="viewport"' in text and len(text) < 3_000_000
    assert page.tags["circle"] <= len(page.values) and all(page.values)
    assert any(value.startswith("layer 3, sequence 0, position") for value in page.values)


def test_dumps_are_compared_elsewhere(saved: Saved, tiny_checkpoint: Path, tmp_path: Path) -> None:
    dumps = saved.root / "dumps"
    moved = shutil.copytree(dumps, tmp_path / "other machine")
    both = invoke("--from-dump", moved / "judged", "--from-dump", moved / "reference", "--json")
    report = json.loads(both.stdout)
    assert both.exit_code == 0 and report["operations"] == []  # there are no weights here
    assert report["cases"][0]["kl_mean"] == saved.report["cases"][0]["kl_mean"]
    assert report["layers"][0]["noise"] is not None  # noise lies beside the reference
    judged = invoke("--from-dump", moved / "judged", "--checkpoint", tiny_checkpoint, "--json")
    assert judged.exit_code == 0 and len(json.loads(judged.stdout)["operations"]) > 100


def test_a_fault_fails_with_1_and_is_named_in_the_terminal(saved: Saved, tiny_checkpoint: Path, tmp_path: Path) -> None:
    wrong = edited_checkpoint(tiny_checkpoint, tmp_path / "wrong", {NORM: scaled(1.05, 3)})
    judged = saved.root / "dumps" / "judged"
    page = tmp_path / "report.html"
    result = invoke("--from-dump", judged, "--checkpoint", wrong, "--html", page)
    assert result.exit_code == 1
    assert "first divergence layer 2: post_attention_layernorm" in result.stdout and NORM in result.stdout
    assert result.stdout.rstrip().splitlines()[-2:] == ["failed", f"report: {page}"]
    assert NORM in page.read_text(encoding="utf-8")
    brief = invoke("--from-dump", judged, "--checkpoint", wrong, "--brief").stdout
    assert brief.rstrip().splitlines()[-2].startswith("failed gates: operations")
    quiet = invoke("--from-dump", judged, "--checkpoint", wrong, "--quiet")
    assert quiet.exit_code == 1 and quiet.output == ""


@pytest.mark.parametrize("name", [NORM, "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_a_damaged_checkpoint_is_no_fault_of_the_engine(
    saved: Saved, tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    damaged = edited_checkpoint(tiny_checkpoint, tmp_path / "damaged", {name: scaled(float("nan"), 3)})
    line = refuse("--from-dump", saved.root / "dumps" / "judged", "--checkpoint", damaged)
    assert name in line and "holds nan at [3]" in line and "download it again" in line


def test_the_brief_report_is_the_cases_and_the_verdict(saved: Saved) -> None:
    dumps = saved.root / "dumps"
    result = invoke("--from-dump", dumps / "judged", "--from-dump", dumps / "reference", "--brief")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[-1].strip() == "passed" and len(lines) < 16, result.stdout
    assert "perplexity" in result.stdout and "whole 70" in result.stdout and "worst operation" not in result.stdout
    assert lines[-2].startswith("passed gates: finite, logits, KL, top-1")


def test_the_torch_side_alone_is_written_for_later(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "torch"
    args = (
        "--checkpoint",
        tiny_checkpoint,
        "--save",
        out,
        "--numerics",
        "exact",
        "--contexts",
        "5",
        "--modes",
        "whole",
    )
    assert invoke(*args, "--quiet").exit_code == 0
    dump = Dump.open(out / "reference")
    assert dump.side.kind == "torch" and dump.side.numerics["name"] == "exact" and dump.has(0, "attn_out.3", "logits")
    assert (out / "plan.json").is_file() and Dump.open(out / "noise").has(0, "logits")
    assert "pass --force" in refuse(*args)


@HERE
def test_one_range_of_layers_from_what_the_engine_had(tiny_engines: dict[str, Path], tiny_checkpoint: Path) -> None:
    args = (tiny_engines["exact"], "--checkpoint", tiny_checkpoint, "--contexts", "20", "--modes", "whole")
    result = invoke(*args, "--layers", "1-2", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and [layer["layer"] for layer in report["layers"]] == [1, 2]
    assert {record["layer"] for record in report["operations"]} == {1, 2}
    assert report["layers"][1]["stream"]["max_relative"] < 1e-4


@HERE
def test_two_engines_and_the_weights_that_judge_both(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Correct engines in FP8 differ for good once a rounding flips; both are right, operation by operation."""
    other = split_products(tiny_engines["fp8"], tmp_path / "other")
    args = (tiny_engines["fp8"], "--against", other, "--contexts", "60", "--modes", "whole", "--threads", "1")
    result = invoke(*args, "--checkpoint", tiny_checkpoint, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["passed"], report["gates"]
    assert report["reference"]["name"] == "other" and report["num_engine_runs"] == 2
    assert report["layers"][3]["stream"]["max_abs"] > 0


@HERE
def test_numerics_that_differ_are_shown_as_a_cost(tiny_engines: dict[str, Path], tiny_checkpoint: Path) -> None:
    args = (tiny_engines["fp8"], "--checkpoint", tiny_checkpoint, "--contexts", "30", "--modes", "whole")
    result = invoke(*args, "--numerics", "exact", "--sensitivity", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["finding"] is None
    gated = {gate["name"] for gate in report["gates"] if gate["gated"]}
    assert gated == {"finite"}
    costs = [row["kl"] for row in report["sensitivity"]]
    assert [row["layer"] for row in report["sensitivity"]] == [0, 1, 2, 3] and all(cost > 0 for cost in costs)
    whole = report["cases"][0]["kl_mean"]
    assert max(costs) < 4 * whole  # one layer costs no more than all, but for luck
    strict = invoke(*args, "--numerics", "exact", "--max-kl", "1e-9", "--quiet")
    assert strict.exit_code == 1
    # the cache's rounding alone; on a model of random weights luck makes it no smaller than all of FP8 together
    cache = json.loads(invoke(*args, "--without", "kv_fp8", "--json").stdout)
    assert cache["reference"]["numerics"] == "fp8 without kv_fp8"
    assert 0 < cache["cases"][0]["kl_mean"] < 4 * whole and cache["passed"]


@pytest.mark.slow
def test_without_transformers_nothing_runs_and_the_line_says_what_to_install(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    monkeypatch.setattr(EngineSide, "dump", lambda *args, **kwargs: pytest.fail("the engine ran"))
    line = refuse(tiny_engines["exact"], "--checkpoint", tiny_checkpoint, "--against", "transformers", *FEW[:2])
    (wanted,) = [one for one in declared()["dev"] if one.name == "transformers"]
    ranges = ",".join(sorted(map(str, wanted.specifier), reverse=True))
    assert f"transformers, which is not installed; pip install 'transformers{ranges}'" in line


@HERE
def test_transformers_is_a_side(tiny_engines: dict[str, Path], tiny_checkpoint: Path) -> None:
    pytest.importorskip("transformers")
    args = (tiny_engines["exact"], "--checkpoint", tiny_checkpoint, "--against", "transformers")
    result = invoke(*args, "--contexts", "16,90", "--modes", "whole", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0, report["gates"]
    assert report["reference"]["kind"] == "transformers"
    assert report["layers"][3]["stream"]["max_relative"] < 1e-4
    assert report["layers"][3]["keys"]["rows"] == 26 and report["layers"][3]["keys"]["rows_other"] == 0
    assert "whole prompts only" in refuse(*args)


@HERE
def test_prompts_are_encoded_with_the_engines_tokenizer(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text("Hello there\n\nA second prompt.\n", encoding="utf-8")
    args = (tiny_engines["exact"], "--checkpoint", tiny_checkpoint, "--prompts", tmp_path / "prompts")
    report = json.loads(invoke(*args, "--modes", "whole", "--json").stdout)
    assert [case["name"] for case in report["cases"]] == ["whole prompt 0", "whole prompt 1"]
    (tmp_path / "prompts").write_text("\n", encoding="utf-8")
    assert "holds no prompt" in refuse(*args)
    assert "drop --contexts" in refuse(*args, "--contexts", "5")


@HERE
def test_a_stage_is_checked_from_what_pytorch_has_before_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Layers 1 and 2 of 4 as an engine of their own: what goes into layer 1 is PyTorch's."""
    export(tiny_checkpoint, tmp_path / "program", numerics=FP8, layer_range=(1, 3))
    stage = build_engine(tmp_path / "program", tiny_checkpoint, tmp_path / "stage")
    args = ("--checkpoint", tiny_checkpoint, "--contexts", "70", "--modes", "chunked", "--threads", "1")
    result = invoke(stage, *args, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["judged"]["layers"] == [1, 3], report["gates"]
    assert {operation["layer"] for operation in report["operations"]} == {1, 2}
    assert [layer["layer"] for layer in report["layers"]] == [1, 2] and report["layers"][1]["stream"] is not None
    bent = bent_engine(stage, tmp_path / "bent", {"attn_out.2": np.full(512, 1.02, np.float32)})
    fault = invoke(bent, *args, "--json")
    finding = json.loads(fault.stdout)["finding"]
    assert fault.exit_code == 1 and (finding["layer"], finding["module"]) == (2, "self_attn.o_proj")
    assert "is a stage of layers 1-2" in refuse(stage, *args, "--layers", "0-1")
    dump = CliRunner().invoke(cli.main, ["dump", str(stage), str(tmp_path / "dump"), "--quiet", "--modes", "whole"])
    assert dump.exit_code == 2 and "holds layers 1 to 2 only: pass --inputs" in dump.stderr


@HERE
def test_the_first_layer_alone_is_checked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What comes out of a stage has names of its own, and nothing goes into this one."""
    export(tiny_checkpoint, tmp_path / "program", numerics=FP8, layer_range=(0, 1))
    stage = build_engine(tmp_path / "program", tiny_checkpoint, tmp_path / "stage")
    result = invoke(stage, "--checkpoint", tiny_checkpoint, "--contexts", "24", "--modes", "whole", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["judged"]["layers"] == [0, 1], report["gates"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("{engine}",), "needs --checkpoint"),
        (("/nowhere", "--checkpoint", "{checkpoint}"), "cannot be read"),
        (("{engine}", "--checkpoint", "/nowhere"), "cannot be read"),
        (("{engine}", "--checkpoint", "{checkpoint}", "--contexts", "a"), "'--contexts': 'a' is no number"),
        (("{engine}", "--checkpoint", "{checkpoint}", "--contexts", "999999"), "the engine accepts"),
        (("{engine}", "--checkpoint", "{checkpoint}", "--modes", "all"), "'--modes': 'all' is not one of"),
        (("{engine}", "--checkpoint", "{checkpoint}", "--layers", "2-9"), "within 0-3"),
        (("{engine}", "--checkpoint", "{checkpoint}", "--without", "x"), "--without x: expected some of"),
        (("{engine}", "--checkpoint", "{checkpoint}", "--sensitivity", "--contexts", "4", "--modes", "whole"),
         "computes exactly"),
        (("{engine}", "--against", "/nowhere"), "--against is '/nowhere', expected torch, transformers, or an engine"),
        ((), "nothing to compare"),
        (("--from-dump", "/nowhere"), "expected a folder written by"),
        (("--from-dump", "{dump}"), "needs --checkpoint, or a second"),
        (("{engine}", "--from-dump", "{dump}"), "takes one or two dumps and no ENGINE"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    saved: Saved, tiny_engines: dict[str, Path], tiny_checkpoint: Path, args: tuple[str, ...], words: str
) -> None:
    places = {
        "engine": tiny_engines["exact"],
        "checkpoint": tiny_checkpoint,
        "dump": saved.root / "dumps" / "judged",
    }
    assert words in refuse(*(arg.format(**places) for arg in args))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("{engine}", "--against", "{engine}", "--sensitivity"), "--sensitivity needs --against torch"),
        (("{engine}", "--against", "transformers", "--max-dump-size", "1G"), "--max-dump-size needs --against torch"),
        (("{engine}", "--against", "{engine}", "--without", "kv_fp8"), "--without needs --against torch"),
        (("{engine}", "--force"), "--force replaces what stands at --save"),
        (("{engine}", "--json", "--brief"), "--brief shortens the tables"),
        (("--from-dump", "{dump}", "--contexts", "5"), "--contexts says what to run"),
        (("--from-dump", "{dump}", "--modes", "whole"), "--modes says what to run"),
        (("--from-dump", "{dump}", "--layers", "0-1"), "--layers needs an ENGINE"),
        (("--from-dump", "{dump}", "--sensitivity"), "--sensitivity needs an ENGINE"),
        (("--from-dump", "{dump}", "--write-self-check"), "--write-self-check needs an ENGINE"),
        (("--from-dump", "{dump}", "--from-dump", "{dump}", "--numerics", "exact"), "which needs --checkpoint"),
        (("--checkpoint", "{checkpoint}", "--layers", "0-1"), "--layers needs an ENGINE"),
        (("--checkpoint", "{checkpoint}", "--html", "{dump}.html"), "--html is about a comparison"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    saved: Saved, tiny_engines: dict[str, Path], tiny_checkpoint: Path, args: tuple[str, ...], words: str
) -> None:
    dump = saved.root / "dumps" / "judged"
    places = {"engine": tiny_engines["exact"], "checkpoint": tiny_checkpoint, "dump": dump}
    assert words in refuse(*(arg.format(**places) for arg in args))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--sensitivity",), "computes exactly"),
        (("--write-self-check", "--modes", "ragged"), "no prompt was run whole and alone"),
        (("--write-self-check", "--layers", "0-1"), "stores logits of a whole model"),
        (("--prompts", "{long}"), "prompt 1 has"),
        (("--against", "{short}", "--contexts", "70"), "--contexts has 70, the engine accepts 64"),
        (("--against", "{other}"), "has index_topk 64, "),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_engine_runs(
    tiny_engines: dict[str, Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    words: str,
) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the engine was run")

    monkeypatch.setattr(EngineSide, "_run", run)
    manifest = load_manifest(tiny_engines["exact"])
    limits = manifest.limits.model_copy(update={"max_model_len": 64})
    (tmp_path / "long").write_text("Hello\n" + "word " * manifest.limits.max_model_len, encoding="utf-8")
    changes = {
        "short": {"limits": limits, "self_check": None},
        "other": {"config": manifest.config | {"index_topk": 32}},
    }
    for name, change in changes.items():
        shutil.copytree(tiny_engines["exact"], tmp_path / name, copy_function=os.link)
        (tmp_path / name / "manifest.json").unlink()
        save_manifest(tmp_path / name, manifest.model_copy(update=change))
    places = {name: tmp_path / name for name in ("long", "short", "other")}
    line = refuse(tiny_engines["exact"], "--checkpoint", tiny_checkpoint, *(arg.format(**places) for arg in args))
    assert words in line


def test_an_engine_without_weights_gets_them_from_the_checkpoint_that_judges_it(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a GPU's engine, which reads them where it runs; not of one that has its own."""
    commands: list[list[str]] = []

    def note(command: list[str], **kwargs: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 2, "", "error: no GPU\n")

    monkeypatch.setattr(engine_side.subprocess, "run", note)
    manifest = load_manifest(tiny_engines["exact"])
    bare = tmp_path / "bare"
    shutil.copytree(tiny_engines["exact"], bare, copy_function=os.link)
    (bare / "manifest.json").unlink()
    weights = WeightSource(path="/gone", index_digest="0" * 64)
    save_manifest(bare, manifest.model_copy(update={"weights": weights}))
    for engine in (bare, tiny_engines["exact"]):
        line = refuse(engine, "--checkpoint", tiny_checkpoint, "--contexts", "5", "--modes", "whole")
        assert "the runtime could not run it: no GPU" in line
    assert commands[0][commands[0].index("--checkpoint") + 1] == str(tiny_checkpoint)
    assert "--checkpoint" not in commands[1]


def test_a_damaged_engine_is_named_and_not_a_copy_of_it(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The runtime is given a copy with more outputs, whose name means nothing to anyone."""
    engine = tmp_path / "damaged"
    shutil.copytree(tiny_engines["exact"], engine)
    with (engine / "weights.bin").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    line = refuse(engine, "--checkpoint", tiny_checkpoint, "--contexts", "5", "--modes", "whole")
    assert f"{engine / 'weights.bin'}: bytes 0 to " in line and f"seekforge build PROGRAM {engine} " in line
    assert "parity" not in line
    with (engine / "weights.bin").open("r+b") as file:
        file.truncate(7)
    line = refuse(engine, "--checkpoint", tiny_checkpoint, "--contexts", "5", "--modes", "whole")
    assert f"{engine / 'weights.bin'}: 7 bytes, the manifest says" in line


def test_dumps_of_other_steps_are_refused(saved: Saved, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "torch"
    invoke("--checkpoint", tiny_checkpoint, "--save", out, "--contexts", "5", "--modes", "whole", "--quiet")
    judged = saved.root / "dumps" / "judged"
    assert "ran different steps" in refuse("--from-dump", judged, "--from-dump", out / "reference")


def test_damaged_results_do_not_pass(saved: Saved, tmp_path: Path) -> None:
    copy = shutil.copytree(saved.root / "dumps", tmp_path / "copy")
    dump = Dump.open(copy / "judged")
    file = copy / "judged" / dump._tensors[0]["logits"].file
    value = np.array(dump.tensor(0, "logits"))
    value[3] = np.nan
    whole = bytearray(file.read_bytes())
    raw = np.array(dump.tensor(0, "logits")).tobytes()
    at = whole.find(raw)
    whole[at : at + len(raw)] = value.tobytes()
    file.unlink()
    file.write_bytes(whole)
    result = invoke("--from-dump", copy / "judged", "--from-dump", copy / "reference", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not next(g["passed"] for g in report["gates"] if g["name"] == "finite")
