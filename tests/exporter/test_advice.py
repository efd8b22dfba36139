"""What a refusal advises is tried: it leads on, never back to where it came from.

Each case provokes a refusal on the command line, changes the command as the line on stderr says, and runs that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tests.support.advice import (
    OPTION,
    invoke,
    refusal,
    with_option,
    without_option,
)
from tests.support.build_options import gpu_options

from seekforge.common.errors import ConfigError, TargetError
from seekforge.exporter.builder.tensorrt.check import Inputs, check, open_inputs
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.models.sharding import check_parallelism
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import load_target


def as_advised(args: list[str], line: str) -> list[str]:
    """Return the command with the options that stand behind `pass`, up to an alternative."""
    advice = line.rpartition("pass ")[2].partition(" or ")[0]
    options = OPTION.findall(advice)
    assert options, line
    for name, value in options:
        flag = name in ("--sparse", "--force", "--allow-oversize")
        args = with_option(args, name, None if flag else value)
    return args


def model(folder: Path, **changes: Any) -> Path:
    """Write a checkpoint of the tiny preset with other sizes."""
    raw = load_preset("tiny").config_json | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0} | changes
    new_checkpoint(folder, Preset("changed", 1, raw, ModelConfig.parse(raw, "test")))
    return folder


@pytest.fixture
def places(tiny_checkpoint: Path, tiny_programs: dict[str, Path], tmp_path: Path) -> dict[str, str]:
    """What the cases call their files."""
    return {
        "checkpoint": str(tiny_checkpoint), "program": str(tiny_programs["fp8"]), "exact": str(tiny_programs["exact"]),
        "out": str(tmp_path / "out"), "out2": str(tmp_path / "out2"),
    }  # fmt: skip


Follow = Callable[[list[str], str, dict[str, str]], list[str]]
advised: Follow = lambda args, line, places: as_advised(args, line)  # noqa: E731

CPU = ["build", "{program}", "{out}", "--target", "cpu", "--checkpoint", "{checkpoint}", "--dry-run"]
GPU = ["build", "{program}", "{out}", "--target", "rtx5090", "--no-kernels", "--dry-run"]
EXACT = ["build", "{exact}", "{out}", "--target", "rtx5090", "--no-kernels", "--dry-run"]

CASES: dict[str, tuple[list[str], str, Follow]] = {
    "too many ranks": (
        ["export", "{checkpoint}", "{out}", "--num-layers", "1", "--tp", "3"],
        "pass --tp 2",
        advised,
    ),
    "a batch beyond a step": ([*CPU, "--max-batch-size", "100000"], "pass --max-num-batched-tokens", advised),
    "a context beyond the model": (
        [*CPU, "--max-model-len", "1000000"],
        "expected 1 to ",
        lambda args, line, places: with_option(args, "--max-model-len", re.findall(r"1 to (\d+)", line)[0]),
    ),
    "no weights": (
        ["build", "{program}", "{out}", "--target", "cpu", "--dry-run"],
        "pass --checkpoint FOLDER",
        lambda args, line, places: [*args, "--checkpoint", places["checkpoint"]],
    ),
    "a model that is too large to draw": (["new-checkpoint", "{out}", "--preset", "full"], "pass --sparse", advised),
    "a place that is taken": (["new-checkpoint", "{checkpoint2}", "--preset", "tiny"], "pass --force", advised),
    "inlined, and an FP8 cache": ([*GPU, "--plugins", "none"], "pass --", advised),
    "exact numerics, and an FP8 cache": (EXACT, "export with --numerics fp8, or pass --", advised),
    "taps of one plan": (
        [*GPU, "--taps", "--layers-per-engine", "2"],
        "leave out --layers-per-engine",
        lambda args, line, places: without_option(args, "--layers-per-engine"),
    ),
    "a GPU's option": (
        [*CPU, "--plugins", "all"],
        "--plugins is for GPU targets",
        lambda args, line, places: without_option(args, "--plugins"),
    ),
    "more layers than there are": (
        ["export", "{checkpoint}", "{out}", "--num-layers", "9"],
        "expected 1 to 4",
        lambda args, line, places: with_option(args, "--num-layers", "4"),
    ),
    "layers past the end": (
        ["export", "{checkpoint}", "{out}", "--layers", "2-9"],
        "within 0-3",
        lambda args, line, places: with_option(args, "--layers", "2-3"),
    ),
    "a graph of a checkpoint": (
        ["inspect", "{checkpoint}", "--graph", "dot"],
        "pass a folder that 'export' wrote",
        lambda args, line, places: ["inspect", places["program"], "--graph", "dot"],
    ),
    "an engine that does not fit": (
        [*GPU, "--set", "gpu.memory_gib=2"],
        "pass --max-model-len",
        lambda args, line, places: with_option(args, "--max-model-len", re.findall(r"-len (\d+)", line)[0]),
    ),
    "an engine that shall not fit": (
        [*GPU, "--set", "gpu.memory_gib=1"],
        "pass --allow-oversize",
        lambda args, line, places: [*args, "--allow-oversize"],
    ),
    "a context that a plan cannot hold": (
        ["plan", "tiny", "--target", "h200", "--contexts", "100M"],
        "the model ends at ",
        lambda args, line, places: with_option(args, "--contexts", re.findall(r"\((\d+K)", line)[0]),
    ),
    "drafts of a model that has none": (
        ["plan", "{no_mtp}", "--target", "h200", "--contexts", "1K", "--mtp"],
        "leave --mtp out",
        lambda args, line, places: without_option(args, "--mtp", has_value=False),
    ),
    "two numbers of GPUs": (
        ["plan", "full", "--target", "h200", "--contexts", "1K", "--tp", "8", "--num-gpus", "16"],
        "leave one of them out",
        lambda args, line, places: without_option(args, "--num-gpus"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_advice_leads_on(case: str, places: dict[str, str], tmp_path: Path) -> None:
    form, message, follow = CASES[case]
    if "{checkpoint2}" in form:
        assert invoke("new-checkpoint", tmp_path / "taken", "--preset", "tiny", "--quiet").exit_code == 0
        places["checkpoint2"] = str(tmp_path / "taken")
    if "{no_mtp}" in form:
        places["no_mtp"] = str(model(tmp_path / "no_mtp"))
    args = [part.format(**places) for part in form]
    line = refusal(*args)
    assert message in line, line
    result = invoke(*follow(args, line, places))
    assert result.exit_code == 0, (line, result.output)


# --- sizes of models ----------------------------------------------------------------------------------------------


def test_a_checkpoint_that_can_be_written_can_be_exported_and_built(tmp_path: Path) -> None:
    """300 rows of q_b_proj and kv_b_proj: nothing is cut on one rank, so nothing has to divide."""
    folder = model(tmp_path / "odd", num_attention_heads=4, num_key_value_heads=4, qk_nope_head_dim=11, v_head_dim=64)
    assert invoke("export", folder, tmp_path / "program", "--quiet").exit_code == 0
    args = ("--target", "cpu", "--checkpoint", folder, "--max-model-len", "256", "--quiet")
    result = invoke("build", tmp_path / "program", tmp_path / "engine", *args)
    assert result.exit_code == 0, result.output
    line = refusal("export", folder, tmp_path / "more", "--tp", "2")
    assert line.endswith("on one rank of a stage only: leave out --tp")


def test_heads_without_kernels_are_inlined_as_advised(tmp_path: Path) -> None:
    folder = model(tmp_path / "heads", index_n_heads=24)
    assert invoke("export", folder, tmp_path / "program", "--quiet").exit_code == 0
    for wanted in ([], ["--plugins", "all"]):
        args = ["build", str(tmp_path / "program"), str(tmp_path / "out"), "--target", "rtx5090", "--no-kernels"]
        args += ["--dry-run", *wanted]
        line = refusal(*args)
        assert "pass --" in line and "pass --plugins all" not in line
        result = invoke(*as_advised(args, line))
        assert result.exit_code == 0, (line, result.output)


def test_what_no_gpu_takes_is_not_advised_in_circles(tiny_inputs: Inputs) -> None:
    inputs = dataclasses.replace(tiny_inputs, config=_changed(tiny_inputs.config, index_n_heads=24, index_topk=8192))
    for plugins in ("auto", "all", "none"):
        with pytest.raises(TargetError, match="no options build this model for a GPU"):
            check(inputs, load_target("rtx5090"), gpu_options(plugins=plugins))


def test_every_layout_is_answered_with_one_that_works(tiny_config: ModelConfig) -> None:
    """A refusal is followed, first alternative or last, until nothing is refused."""
    full = load_preset("full").config
    seen = 0
    sizes = product((tiny_config, full), (1, 2, 3, 5, 8, 48, 1000), (1, 2, 62), (False, True), (0, -1))
    for config, tp, pp, ep, which in sizes:
        layout = Parallelism(tp=tp, pp=pp, ep=ep)
        for _ in range(3):
            try:
                check_parallelism(config, layout)
                break
            except ConfigError as error:
                seen += 1
                advice = str(error).rpartition("; ")[2].split(" or ")[which]
                if "leave out --tp" in advice:
                    changes: dict[str, Any] = {"tp": 1, "ep": False}
                else:
                    changes = {name.removeprefix("--"): int(size) for name, size in OPTION.findall(advice)}
                layout = layout.model_copy(update=changes)
        else:
            pytest.fail(f"{layout} is refused by what was advised before")
    assert seen > 20


@pytest.fixture(scope="module")
def tiny_inputs(tiny_programs: dict[str, Path]) -> Inputs:
    return open_inputs(tiny_programs["fp8"], None)


def _changed(config: ModelConfig, **values: Any) -> ModelConfig:
    return config.model_copy(update=values)


def _refused() -> Iterator[tuple[str, str, str, str, int, int]]:
    targets = ("a100-80g", "h200", "rtx5090")
    yield from product(targets, ("auto", "all", "none"), ("fp8", "bf16"), ("fp8_ds", "bf16"), (16, 24), (64, 5000))


def test_every_combination_of_options_is_answered_with_one_that_works(tiny_inputs: Inputs) -> None:
    seen = 0
    for name, plugins, precision, kv_format, heads, topk in _refused():
        config = _changed(tiny_inputs.config, index_n_heads=heads, index_topk=topk)
        inputs = dataclasses.replace(tiny_inputs, config=config)
        target = load_target(name).changed([f"precision={precision}", f"kv_format={kv_format}"])
        try:
            check(inputs, target, gpu_options(plugins=plugins))  # pyright: ignore[reportArgumentType]
        except TargetError as error:
            seen += 1
            if heads == 24 and topk == 5000:
                assert "no options build this model" in str(error)
                continue
            for advice in str(error).rpartition("pass ")[2].split(" or "):
                options = dict(OPTION.findall(advice))
                keys = {"--precision": "precision", "--kv-cache-dtype": "kv_format"}
                better = target.changed(
                    [f"{key}={options[option]}" for option, key in keys.items() if option in options]
                )
                check(inputs, better, gpu_options(plugins=options.get("--plugins", plugins)))  # pyright: ignore
    assert seen > 20


def test_as_many_layers_as_are_said_to_fit_do(tiny_inputs: Inputs, tiny_checkpoint: Path, tmp_path: Path) -> None:
    one_block = load_target("rtx5090").changed(
        ["limits.max_model_len=64", "limits.max_batch_size=1", "limits.max_num_batched_tokens=64"]
    )
    needed = check(tiny_inputs, one_block, gpu_options()).device_bytes["total"] / 2**20
    for mib in range(int(needed) + 200, 0, -2):
        target = one_block.changed([f"gpu.memory_gib={mib / 1024}"])
        try:
            check(tiny_inputs, target, gpu_options())
        except TargetError as error:
            match = re.search(r"at most (\d) of its 4 layers fit: export stages with --layers", str(error))
            assert match is not None, error
            if (count := int(match[1])) < 3:
                break
    result = invoke("export", tiny_checkpoint, tmp_path / "stage", "--layers", f"0-{count - 1}", "--quiet")
    assert result.exit_code == 0, result.output
    check(open_inputs(tmp_path / "stage", None), target, gpu_options())
