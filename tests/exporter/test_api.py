"""`seekforge.export`, `build`, `plan` and `parity`: the commands as functions, for other programs."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

import seekforge
from seekforge import ExportResult, OptionError, SeekforgeError, build, export, parity, plan
from seekforge.exporter.builder.cli import build as build_command
from seekforge.exporter.parity.cli import parity as parity_command
from seekforge.exporter.planner.cli import plan as plan_command
from seekforge.exporter.program.cli import export as export_command
from seekforge.formats.engine.manifest import load_manifest
from seekforge.runtime.cli import main as cli

#: Function -> the command that calls it, and arguments that the command needs.
PAIRS: dict[str, tuple[Callable[..., Any], click.Command, list[str]]] = {
    "export": (export, export_command, ["checkpoint", "out"]),
    "build": (build, build_command, ["program", "out", "--target", "cpu"]),
    "plan": (plan, plan_command, ["model"]),
    "parity": (parity, parity_command, ["engine"]),
}
#: Options that say what a command prints; a function prints nothing.
PRINTING = {"json", "quiet", "brief", "all"}
#: Arguments that a function has and a command has not.
PYTHON_ALONE = {"progress"}


def command_line(*args: object) -> Any:
    """Run a command and return the JSON that it prints."""
    result = CliRunner().invoke(cli.main, [*map(str, args), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def as_json(value: object) -> Any:
    return json.loads(json.dumps(value))


def without_times(value: dict[str, Any]) -> dict[str, Any]:
    return {key: one for key, one in value.items() if key not in ("seconds", "path")}


@pytest.mark.parametrize("name", PAIRS)
def test_keywords_are_the_options_of_the_command_with_their_defaults(name: str) -> None:
    function, command, args = PAIRS[name]
    signature = inspect.signature(function)
    given = command.make_context(name, list(args), resilient_parsing=False).params
    options: dict[str, Any] = {}
    for parameter in command.params:
        assert parameter.name is not None
        if isinstance(parameter, click.Argument):
            assert signature.parameters[parameter.name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
            continue
        word = max(parameter.opts, key=len).removeprefix("--").replace("-", "_")
        if word not in PRINTING:
            options[word] = parameter
            assert parameter.name == word, f"{word} arrives as {parameter.name}"
    keywords = {one.name: one for one in signature.parameters.values() if one.kind == inspect.Parameter.KEYWORD_ONLY}
    assert keywords.keys() - PYTHON_ALONE == options.keys()
    for word, option in options.items():
        if not option.required:
            assert keywords[word].default == given[word], word
    assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values())


@pytest.mark.parametrize("name", PAIRS)
def test_every_argument_is_documented_and_every_choice_is_that_of_the_command(name: str) -> None:
    function, command, _ = PAIRS[name]
    parameters = inspect.signature(function).parameters.values()
    needed = {one.name: "x" for one in parameters if one.default is inspect.Parameter.empty}
    assert function.__doc__ is not None
    for word in inspect.signature(function).parameters:
        assert f"{word}:" in function.__doc__ or f"{word}," in function.__doc__, word
    for parameter in command.params:
        inner = getattr(parameter.type, "inner", parameter.type)
        if isinstance(inner, click.Choice):
            with pytest.raises(OptionError, match=rf"{name}: {parameter.name}") as caught:
                function(**needed | {parameter.name: "no such"})
            assert all(repr(one) in str(caught.value) for one in inner.choices), caught.value


def test_the_public_names_are_there_and_bring_nothing_heavy() -> None:
    code = (
        "import sys, seekforge\n"
        "for name in seekforge.__all__: getattr(seekforge, name)\n"
        "from seekforge import AsyncLLM, LLM, SamplingParams, build, export, parity, plan\n"
        "assert all(map(callable, (build, export, parity, plan))), 'a subpackage hides a function'\n"
        "import seekforge.exporter.builder, seekforge.exporter.planner\n"
        "assert callable(seekforge.build) and callable(seekforge.plan)\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'triton', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.strip() == "[]"


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_base_install_is_told_what_to_install(tiny_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx'): sys.modules[name] = None\n"
        "import seekforge\n"
        "try: seekforge.export(sys.argv[1], sys.argv[2])\n"
        "except seekforge.EnvironmentFault as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tiny_checkpoint), str(tmp_path / "program")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.count("\n") == 1 and "pip install '" in done.stdout and "export: the module" in done.stdout
    assert done.stderr == "" and list(tmp_path.iterdir()) == []


def test_a_checkpoint_becomes_an_engine_and_is_proved_in_python(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A truncated model, so that it takes seconds; what the functions return is what the commands print."""
    stages: list[str] = []
    options: dict[str, Any] = {"numerics": "exact", "num_layers": 2}
    program = export(str(tiny_checkpoint), tmp_path / "program", **options, progress=stages.append)
    assert isinstance(program, ExportResult) and program.path == tmp_path / "program" and program.numerics == "exact"
    assert stages and set(program.seconds) >= {"read config and headers"}
    limits: dict[str, Any] = {"max_model_len": np.int64(128), "max_num_batched_tokens": 64}
    place = (program.path, tmp_path / "engine")
    planned = build(*place, target="cpu", checkpoint=tiny_checkpoint, dry_run=True, **limits)
    assert planned.dry_run and planned.manifest is None and not (tmp_path / "engine").exists()
    engine = build(
        *place, target="cpu", checkpoint=tiny_checkpoint, taps=True, set={"limits.max_batch_size": 2}, **limits
    )  # fmt: skip
    assert engine.limits.max_batch_size == 2 and engine.limits.max_model_len == 128
    assert engine.manifest == load_manifest(engine.path) and engine.weight_bytes == planned.weight_bytes
    verdict = parity(engine.path, checkpoint=tiny_checkpoint, contexts=20, modes="whole", threads=1)
    assert verdict.passed is True and verdict.finding is None and {gate.name for gate in verdict.gates} >= {"logits"}
    with seekforge.LLM(engine.path, threads=1) as llm:
        (output,) = llm.generate([[5, 6, 7]], seekforge.SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 3
    assert capfd.readouterr() == ("", "")

    said = command_line("export", tiny_checkpoint, tmp_path / "p2", "--numerics", "exact", "--num-layers", 2)
    assert without_times(said) == without_times(as_json(program.to_json())) and said["seconds"].keys() == set(
        program.seconds
    )
    args = (program.path, tmp_path / "engine2", "--target", "cpu", "--checkpoint", tiny_checkpoint, "--dry-run")
    args = (*args, "--max-model-len", 128, "--max-num-batched-tokens", 64)
    dry = without_times(command_line("build", *args))
    free = dry.pop("disk_free_bytes")
    expected = without_times(as_json(planned.to_json()))
    assert expected.pop("disk_free_bytes") > 0 < free and dry == expected
    args = ("--checkpoint", tiny_checkpoint, "--contexts", 20, "--modes", "whole", "--threads", 1)
    assert command_line("parity", engine.path, *args) == as_json(verdict.to_json())


def test_a_gpu_build_is_planned_as_the_command_does(
    tiny_programs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = build(
        tiny_programs["fp8"], tmp_path / "x", target="rtx4090", sm=[120], kernels=False, plugins="all", dry_run=True
    )
    assert result.sms == (89, 120) and result.plugins is not None and "DsaAttention" in result.plugins
    assert capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []
    args = ("--target", "rtx4090", "--sm", "120", "--no-kernels", "--plugins", "all", "--dry-run")
    said = command_line("build", tiny_programs["fp8"], tmp_path / "x", *args)
    assert without_times(said) == without_times(as_json(result.to_json()))


def test_a_plan_is_what_the_command_prints(capfd: pytest.CaptureFixture[str]) -> None:
    result = plan("full", target=["h200", "b200"], contexts=[65536], batch_size=4, precision="fp8")
    assert [row.target.name for row in result.answers] == ["h200", "b200"]
    assert all(row.found is not None and row.fits for row in result.answers)
    assert capfd.readouterr() == ("", "")
    args = ("--target", "h200,b200", "--contexts", "64K", "--batch-size", 4, "--precision", "fp8")
    assert command_line("plan", "full", *args) == as_json(result.to_json())


def test_results_do_not_change() -> None:
    result = plan("tiny", target="h200", contexts=64)
    with pytest.raises(AttributeError):
        result.mtp = True  # pyright: ignore[reportAttributeAccessIssue]


#: Calls that are refused: function, its arguments, and words of the message. {new} is where nothing stands.
REFUSED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str]] = {
    "no checkpoint": ("export", ("/nowhere", "{new}"), {}, "/nowhere"),
    "a layer too many": ("export", ("{checkpoint}", "{new}"), {"num_layers": 99}, "expected 1 to 4"),
    "no layer": ("export", ("{checkpoint}", "{new}"), {"num_layers": 0}, "num_layers is 0, expected at least 1"),
    "a bool for a number": ("export", ("{checkpoint}", "{new}"), {"tp": True}, "tp is True, expected a whole number"),
    "a text for a number": ("export", ("{checkpoint}", "{new}"), {"tp": "2"}, "tp is '2', expected a whole number"),
    "a number of ranks for a flag": ("export", ("{checkpoint}", "{new}"), {"ep": 2}, "ep is 2, expected"),
    "a part in stages": ("export", ("{checkpoint}", "{new}"), {"layers": "0-1", "pp": 2}, "leave out one of them"),
    "a stage too many": ("export", ("{checkpoint}", "{new}"), {"pp": 5}, "num_hidden_layers is 4"),
    "a number for a flag": ("export", ("{checkpoint}", "{new}"), {"force": 1}, "force is 1, expected"),
    "no layers": ("export", ("{checkpoint}", "{new}"), {"layers": "a-b"}, "expected A-B"),
    "a place that is read": ("export", ("{checkpoint}", "{checkpoint}"), {"force": True}, "is read by the same"),
    "a place that is taken": ("export", ("{checkpoint}", "{taken}"), {}, "exists and is not empty"),
    "a place below a file": ("export", ("{checkpoint}", "{file}/x"), {}, "is a file"),
    "no path": ("export", (b"x", "{new}"), {}, "checkpoint is b'x', expected a path"),
    "an empty path": ("export", ("{checkpoint}", ""), {}, "out is '', expected a path"),
    "no program": ("build", ("/nowhere", "{new}"), {"target": "cpu", "checkpoint": "{checkpoint}"}, "/nowhere"),
    "no target": ("build", ("{program}", "{new}"), {"target": "cpuu"}, "did you mean cpu?"),
    "no weights": ("build", ("{program}", "{new}"), {"target": "cpu"}, "pass --checkpoint"),
    "a GPU's option": ("build", ("{program}", "{new}"), {"target": "cpu", "kernels": False}, "--no-kernels is for GPU"),
    "no key": ("build", ("{program}", "{new}"), {"target": "h200", "set": {"limits.x": 1}}, "unknown key 'limits.x'"),
    "no value": ("build", ("{program}", "{new}"), {"target": "h200", "set": {"limits": {1, 2}}}, "values that JSON"),
    "a level too high": (
        "build", ("{program}", "{new}"), {"target": "h200", "builder_optimization_level": 6}, "level is 6, expected",
    ),
    "no model": ("plan", ("no-such-model",), {}, "neither a folder"),
    "a context too long": ("plan", ("tiny",), {"contexts": 1 << 30}, "the model ends at"),
    "no context": ("plan", ("tiny",), {"contexts": [64, 0]}, "contexts[1] is 0, expected at least 1"),
    "no picture": ("plan", ("tiny",), {"chart": "{new}.txt"}, "ends in .png or .svg"),
    "no engine": ("parity", ("/nowhere",), {"checkpoint": "{checkpoint}"}, "/nowhere"),
    "nothing": ("parity", (), {}, "there is nothing to compare"),
    "two ways": ("parity", ("{engine}",), {"from_dump": "{engine}"}, "no ENGINE"),
    "three dumps": ("parity", (), {"from_dump": ["/a", "/b", "/c"]}, "one or two dumps"),
    "an idle option": ("parity", ("{engine}",), {"force": True}, "give that too"),
    "no checkpoint for PyTorch": ("parity", ("{engine}",), {"contexts": 8}, "needs --checkpoint"),
    "prompts and contexts": (
        "parity", ("{engine}",), {"checkpoint": "{checkpoint}", "contexts": 8, "prompts": "{file}"}, "drop --contexts",
    ),
    "no number": ("parity", ("{engine}",), {"max_kl": float("nan")}, "max_kl is nan, expected"),
    "a page below nothing": ("parity", ("{engine}",), {"html": "{new}/x.html"}, "make that folder first"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_one_error_of_ours_and_nothing_is_left(
    case: str,
    tiny_checkpoint: Path,
    tiny_programs: dict[str, Path],
    tiny_engines: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name, args, options, words = REFUSED[case]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    places = {
        "new": tmp_path / "new", "taken": tmp_path / "taken", "file": tmp_path / "taken" / "file",
        "checkpoint": tiny_checkpoint, "program": tiny_programs["fp8"], "engine": tiny_engines["fp8"],
    }  # fmt: skip

    def filled(value: Any) -> Any:
        return value.format(**places) if isinstance(value, str) else value

    with pytest.raises(SeekforgeError) as caught:
        getattr(seekforge, name)(*map(filled, args), **{key: filled(value) for key, value in options.items()})
    assert words in str(caught.value), caught.value
    assert not isinstance(caught.value, click.ClickException) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]
    assert capfd.readouterr() == ("", "")


def test_an_unknown_keyword_is_a_type_error_as_everywhere() -> None:
    with pytest.raises(TypeError, match="num_gpu"):
        plan("tiny", num_gpu=2)  # pyright: ignore[reportCallIssue]
