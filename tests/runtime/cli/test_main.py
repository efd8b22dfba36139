"""The command line: what it prints, where, and how it ends."""

from __future__ import annotations

import importlib
import json
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import seekforge
from seekforge.common.errors import OutputError
from seekforge.common.requirements import parse
from seekforge.runtime.cli import doctor as doctor_module
from seekforge.runtime.cli import main as cli
from seekforge.runtime.cli.doctor import capability, driver_fault, target_capabilities
from seekforge.runtime.engine.engine_folder import Engine


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.main, list(args))


def one_line(result: Result) -> str:
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_help_lists_every_command_and_imports_none() -> None:
    script = (
        "import sys\nfrom seekforge.runtime.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'onnx', 'onnxruntime', 'tokenizers', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for name in cli.COMMANDS:
        assert f"  {name} " in done.stdout


def test_version() -> None:
    assert invoke("--version").stdout == f"seekforge {seekforge.__version__}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--stop", ""), "stop is"), (("--regex", "@nowhere"), "nowhere"), (("--json-schema", "{"), "--json-schema")],
)
def test_values_that_no_engine_takes_are_refused_before_one_is_read(options: tuple[str, ...], message: str) -> None:
    """An engine takes long to read; this one is not even there."""
    assert message in one_line(invoke("run", "no-engine", "--prompt", "x", *options))


@pytest.mark.parametrize("option", ["--plan", "--inputs"])
def test_what_is_dumped_is_read_before_the_engine(option: str, tmp_path: Path) -> None:
    given = tmp_path / "given"
    assert f"{given}" in one_line(invoke("dump", "no-engine", str(tmp_path / "out"), option, str(given)))


def test_tasks_are_loaded_before_the_files_of_an_engine_are_compared(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(Engine, "open", lambda *_, **__: pytest.fail("was opened"))
    args = ("eval", str(toy_engine), "--tasks", "sums", "--quiet")
    assert "is not installed, which evaluation needs" in one_line(invoke(*args))
    assert "cannot be read" in one_line(invoke("eval", "no-engine", *args[2:]))


@pytest.mark.parametrize("damage", [lambda raw: raw[:100], lambda raw: raw[:16] + b"\xff" * 40], ids=["cut", "other"])
def test_a_module_that_was_cut_on_a_full_disk_is_named(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "cut_module.py"
    source.write_text("\n".join(f"a{i} = {i} * 'text'" for i in range(100)))
    compiled = Path(py_compile.compile(str(source), doraise=True) or "")
    compiled.write_bytes(damage(compiled.read_bytes()))

    @click.command()
    def command() -> None:
        importlib.import_module("cut_module")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)
    assert f"{compiled}: this module as Python compiled it is damaged" in one_line(invoke("run"))


def test_an_unknown_command_suggests_near_ones() -> None:
    assert "no command 'exprot'; did you mean export?" in one_line(invoke("exprot"))
    assert "commands are new-checkpoint, train, export" in one_line(invoke("xyz"))


def test_usage_errors_are_one_line() -> None:
    assert "seekforge run --help" in one_line(invoke("run"))
    assert "--tempreture" in one_line(invoke("run", "x", "--prompt", "a", "--tempreture", "1"))


def fake(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command()
    def command() -> None:
        raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OutputError("out: two\nlines"), "error: out: two lines"),
        (ModuleNotFoundError("no", name="onnx.helper"), "pip install 'onnx>"),
        (ModuleNotFoundError("no", name="onnxruntime"), "pip install 'onnxruntime"),
        (OSError(28, "No space left on device", "/out/x"), "error: /out/x: the disk is full"),
        (PermissionError(13, "Permission denied", "/out/x"), "error: /out/x: Permission denied"),
    ],
)
def test_faults_of_the_environment_are_one_line(monkeypatch, error: Exception, message: str) -> None:
    fake(monkeypatch, error)
    assert message in one_line(invoke("export"))


def test_interrupt_ends_quietly_with_130(monkeypatch) -> None:
    fake(monkeypatch, KeyboardInterrupt())
    result = invoke("export")
    assert (result.exit_code, result.output) == (130, "")


def test_our_own_bugs_keep_their_traceback(monkeypatch) -> None:
    fake(monkeypatch, ModuleNotFoundError("no", name="seekforge.runtime.nothing"))
    assert isinstance(invoke("export").exception, ModuleNotFoundError)


RUN = ("--prompt", "the cat", "--max-tokens", "8", "--greedy", "--ignore-eos")


def test_run_streams_text_to_stdout_and_the_rest_to_stderr(toy_engine: Path) -> None:
    result = invoke("run", str(toy_engine), *RUN)
    assert result.exit_code == 0, result.output
    assert "self-check passed: 36 values" in result.stderr
    assert "decode 7 tokens at" in result.stderr and "finish: length" in result.stderr
    quiet = invoke("run", str(toy_engine), *RUN, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


def test_run_json(toy_engine: Path) -> None:
    result = invoke("run", str(toy_engine), *RUN, "--json", "--verify")
    data = json.loads(result.stdout)
    assert result.stderr == "" and len(data["token_ids"]) == 8 and data["finish_reason"] == "length"
    assert data["timings"]["decode_tokens"] == 7 and data["self_check"]["tolerance"] == 1e-3
    plain = invoke("run", str(toy_engine), *RUN, "--quiet").stdout
    assert plain == data["text"] + "\n"


def test_run_gives_several_completions_logprobs_and_drafts(toy_engine: Path) -> None:
    args = ("--prompt", "the cat", "--max-tokens", "6", "--ignore-eos", "--seed", "1", "--n", "2", "--logprobs", "3")
    data = json.loads(invoke("run", str(toy_engine), *args, "--json", "--num-speculative-tokens", "2").stdout)
    assert len(data["completions"]) == 2 and data["completions"][0]["text"] == data["text"]
    assert [len(entry["top"]) for entry in data["completions"][1]["logprobs"]] == [3] * 6
    line = invoke("run", str(toy_engine), *RUN, "--num-speculative-tokens", "1").stderr
    assert "drafts   accepted by position: " in line


def test_run_batch_resumes(toy_engine: Path, tmp_path: Path) -> None:
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"prompt": "the cat", "id": "a"},
        {"prompt": [5, 6], "max_tokens": 3, "n": 2},
        {"prompt": "x", "stop": ["e"]},
    ]
    requests.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    command = ("run", str(toy_engine), "--batch", str(requests), "--output", str(results), *RUN[2:])
    first = invoke(*command)
    assert first.exit_code == 0 and first.stdout == "" and "3 of 3 done" in first.stderr
    whole = {line["id"]: line for line in map(json.loads, results.read_text().splitlines())}
    assert set(whole) == {"a", 2, 3} and [len(c["token_ids"]) for c in whole[2]["completions"]] == [3, 3]
    assert whole["a"]["completions"][0]["text"] + "\n" == invoke("run", str(toy_engine), *RUN, "--quiet").stdout
    kept = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(kept[0] + kept[1][:10])  # as an interruption leaves it
    again = invoke(*command)
    assert "2 requests to run, 1 have a result" in again.stderr
    assert {line["id"]: line for line in map(json.loads, results.read_text().splitlines())} == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: Expecting"),
        ('{"prompt": 3}', "prompt is int, expected text or a list of token ids"),
        ('{"prompt": "a", "temprature": 1}', "unknown key 'temprature'"),
        ('{"prompt": "a", "top_p": 2}', "top_p is 2"),
        ('{"prompt": "a", "max_tokens": 5000}', "more than max_model_len"),
    ],
)
def test_run_batch_refuses_a_bad_line_before_any_is_run(toy_engine: Path, tmp_path: Path, line: str, message) -> None:
    (tmp_path / "in").write_text(line + "\n")
    out = tmp_path / "out"
    result = invoke("run", str(toy_engine), "--quiet", "--batch", str(tmp_path / "in"), "--output", str(out))
    assert message in one_line(result) and not out.exists()


def test_run_repeats_with_a_seed(toy_engine: Path) -> None:
    sampled = ("--prompt", "the cat", "--max-tokens", "20", "--ignore-eos", "--temperature", "1.5", "--json")
    texts = [json.loads(invoke("run", str(toy_engine), *sampled, "--seed", s).stdout)["token_ids"] for s in "112"]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prompt", ""), "the prompt has no tokens"),
        (("--prompt", "a", "--greedy", "--top-p", "0.5"), "--greedy leaves nothing to"),
        ((), "either --prompt or --batch"),
        (("--prompt", "a", "--n", "2"), "--n above 1 needs --json or --batch"),
        (("--prompt", "a", "--logprobs", "2"), "--logprobs needs --json or --batch"),
        (("--prompt", "a", "--max-tokens", "5000"), "= 5001 tokens, more than max_model_len 1024"),
        (("--prompt", "a", "--max-model-len", "2000"), "max_model_len is 2000, this engine allows 1 to 1024"),
        (("--prompt", "a", "--max-model-len", "10", "--max-tokens", "10"), "more than max_model_len 10"),
    ],
)
def test_run_refuses_in_one_line(toy_engine: Path, args: tuple[str, ...], message: str) -> None:
    assert message in one_line(invoke("run", str(toy_engine), "--quiet", *args))


def test_run_on_a_damaged_engine(toy_copy: Path) -> None:
    (toy_copy / "model.onnx").unlink()
    assert "model.onnx: missing" in one_line(invoke("run", str(toy_copy), "--quiet", *RUN))


def test_a_reader_that_leaves_is_no_error(toy_engine: Path) -> None:
    arguments = f"run {toy_engine} --prompt a --quiet --max-tokens 500 --ignore-eos"
    command = (
        f"{sys.executable} -m seekforge.runtime.cli.main {arguments} | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_bench_measures_and_draws(toy_engine: Path, tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    args = (
        "--concurrency",
        "1,3",
        "--contexts",
        "8,130",
        "--max-tokens",
        "5",
        "--host-batch-size",
        "1,4",
        "--threads",
        "1",
    )
    result = invoke("bench", str(toy_engine), *args, "--json", "--chart", str(chart), "--num-speculative-tokens", "2")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [(p["context"], p["concurrency"]) for p in data["points"]] == [(8, 1), (8, 3), (130, 1), (130, 3)]
    for point in data["points"]:
        assert point["prefill_tok_s"] > 0 and point["decode_tok_s"] > 0 and len(point["acceptance"]) == 2
        assert point["first_token_ms"]["p50"] <= point["first_token_ms"]["p99"]
        assert (point["hit_rate"] > 0.9) == (point["context"] == 130)
    assert set(data["host_step_ms"]) == {"greedy", "sampled"}
    raw = chart.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(raw[20:24]) > int.from_bytes(raw[16:20]), "two charts"
    table = invoke("bench", str(toy_engine), *args)
    assert [line.split()[:2] for line in table.stdout.splitlines() if line.lstrip()[:1].isdigit()] == [
        [context, requests] for context in ("8", "130") for requests in ("1", "3")
    ]
    assert "greedy" in table.stdout and "sampled" in table.stdout
    assert "--concurrency goes to 9" in one_line(invoke("bench", str(toy_engine), "--concurrency", "9"))
    assert "no number of tokens" in one_line(invoke("bench", str(toy_engine), "--contexts", "a"))


def test_doctor() -> None:
    report = json.loads(invoke("doctor", "--json").stdout)
    assert report["versions"]["onnxruntime"] and "triton" in report["versions"]
    assert {"name": "run on cpu", "ready": True, "missing": "", "remedy": ""} in report["capabilities"]
    text = invoke("doctor")
    assert text.exit_code == 0 and "run on cpu" in text.stdout


def test_doctor_says_each_cause_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    causes = [line for line in invoke("doctor").stdout.splitlines() if line.startswith("not possible, since")]
    assert len([line for line in causes if "run" not in line and "it needs a driver" in line]) == 1
    assert len(set(causes)) == len(causes) and not any("pip install 'tensorrt>" in line for line in causes)


def test_doctor_names_the_command_for_what_is_missing() -> None:
    wanted = parse(
        ["click<9", "torch<3,>=2.13; extra == 'export'", "onnx-ir>=1; extra == 'export'", "a; extra == 'cpu'"]
    )
    installed = {"torch": "2.13.0+cpu", "a": "1.0"}
    found = capability("export", ("export", "cpu"), wanted, installed.get)
    assert (found.ready, found.missing) == (False, "onnx-ir is not installed")
    assert found.remedy == "pip install 'onnx-ir>=1'"
    assert capability("run", ("cpu",), wanted, installed.get).ready
    other = capability("export", ("export",), wanted, {"torch": "2.12.0", "onnx-ir": "1.1.0"}.get)
    assert other.missing == "torch is 2.12.0, needs >=2.13,<3" and other.remedy == "pip install 'torch>=2.13,<3'"


def test_doctor_knows_the_two_packages_of_onnxruntime() -> None:
    lines = [
        "a>=1; extra == 'export'",
        "onnxruntime>=1.32; extra == 'cpu'",
        "onnxruntime-gpu>=1.31; extra == 'ort-cuda'",
    ]
    wanted = parse(lines)
    cpu, cuda = {"a": "1", "onnxruntime": "1.32.0"}, {"a": "1", "onnxruntime-gpu": "1.31.1"}

    def judged(installed: dict[str, str], provider: str | None = None, *, has_gpu: bool = True):
        return target_capabilities("x", "onnxruntime", wanted, installed.get, has_gpu=has_gpu, provider=provider)

    assert all(
        one.ready for one in (*judged(cpu), *judged(cuda), *judged(cuda, "cuda"))
    )  # either builds and runs on CPUs
    build, run = judged(cpu, "cuda")
    assert build.ready and not run.ready and "beside which it must not lie" in run.missing
    assert run.remedy == "pip uninstall --yes onnxruntime && pip install 'onnxruntime-gpu>=1.31'"
    assert judged(cuda, "cuda", has_gpu=False)[1].missing == "no NVIDIA GPU here"
    for provider in (None, "cuda"):
        for one in judged(cpu | cuda, provider):
            assert not one.ready and "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed" in one.missing
    assert judged({"a": "1"})[0].remedy == "pip install 'onnxruntime>=1.32'"


def test_doctor_promises_no_gpu_run_that_would_be_refused() -> None:
    lines = ["a>=1; extra == 'export'", "b>=1; extra == 'rtx'", "c>=1; extra == 'trt'", "k>=1; extra == 'kernels'"]
    wanted = parse([*lines, "seekforge[gpu]; extra == 'rtx'", "d>=1; extra == 'gpu'"])
    installed = {"a": "1", "b": "1", "c": "1", "d": "1", "k": "1"}.get
    build, run = target_capabilities("rtx4090", "tensorrt-rtx", wanted, installed, has_gpu=False)
    assert build.ready and not run.ready and run.missing == "no NVIDIA GPU here"
    assert target_capabilities("rtx4090", "tensorrt-rtx", wanted, installed, has_gpu=True)[1].ready
    build, run = target_capabilities("rtx4090", "tensorrt-rtx", wanted, {"a": "1", "b": "1"}.get, has_gpu=True)
    assert build.remedy == "pip install 'd>=1' 'k>=1'" and run.remedy == "pip install 'd>=1'"
    build, _ = target_capabilities("h100", "tensorrt", wanted, installed, has_gpu=False)
    assert not build.ready and "no NVIDIA GPU here" in build.missing
    bare, _ = target_capabilities("h100", "tensorrt", wanted, {"a": "1"}.get, has_gpu=False)
    assert bare == build, "installing TensorRT where no GPU is would lead nowhere"
    assert target_capabilities("h100", "tensorrt", wanted, installed, has_gpu=True)[0].ready
    assert not any(c.ready for c in target_capabilities("x", "unheard-of", wanted, installed, has_gpu=True))


def test_doctor_tells_a_driver_that_is_too_old_for_the_kernels_or_the_bindings() -> None:
    installed = {"cuda-bindings": "12.9.2"}.get
    assert driver_fault(90, "580.65.06", installed) is None and driver_fault(89, "525.60", installed) is None
    assert driver_fault(90, "570.86.15", installed) == (
        "the NVIDIA driver 570.86.15 is too old: kernels of sm90 need a driver of CUDA 13.0 or later (r580); "
        "install a newer driver"
    )
    newer = driver_fault(89, "570.86.15", {"cuda-bindings": "13.5.0"}.get)
    assert newer is not None and "cuda-bindings 13.5.0 need a driver of CUDA 13.0 or later (r580)" in newer
    assert driver_fault(90, "unknown", installed) is None, "nothing is said of what is not known"
    wanted = parse(["c>=1; extra == 'trt'"])
    found = {"c": "1", "cuda-bindings": "12.9.2"}.get
    common = {"has_gpu": True, "sm": 90}
    _, run = target_capabilities("h100", "tensorrt", wanted, found, driver="570.86.15", **common)
    assert not run.ready and "kernels of sm90 need" in run.missing
    _, run = target_capabilities("h100", "tensorrt", wanted, found, driver="580.65.06", **common)
    assert run.ready
    _, run = target_capabilities("h100", "tensorrt", wanted, found, has_gpu=False, sm=90)
    assert run.missing == "no NVIDIA GPU here; it needs a driver of CUDA 13.0 or later (r580)"


def test_doctor_tells_a_broken_driver_from_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setattr(doctor_module.shutil, "which", lambda name: str(tool))

    def gpus(script: str) -> tuple[tuple[str, ...], str]:
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        return doctor_module._gpus()

    assert gpus("echo 'NVIDIA H100, 580.65.06, 9.0'") == (("NVIDIA H100, 580.65.06, 9.0",), "no NVIDIA GPU here")
    assert gpus("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18") == (
        (),
        "nvidia-smi fails (Failed to initialize NVML: Driver/library version mismatch)",
    )
    assert gpus("exit 9")[1] == "nvidia-smi fails (exit code 9)"
    monkeypatch.setattr(doctor_module.shutil, "which", lambda name: None)
    assert doctor_module._gpus() == ((), "no NVIDIA GPU here")
