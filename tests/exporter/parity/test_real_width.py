"""Layers of DeepSeek-V3.2's width on a small machine: each a stage of its own, the weights of one layer in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.formats.checkpoint.model_config import ModelConfig

pytestmark = pytest.mark.slow

#: 7168 wide, 128 heads, q_lora 1536, kv_lora 512, 64 index heads, dense 18432 and experts of 2048 as in the full model;
#: 8 of its 256 experts, 2 of its 61 layers and a small vocabulary.
CHANGES = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 8192,
}
#: 0.6 GB of FP8 weights of a layer are 2.5 GB in the engine's f32, and PyTorch holds about as much.
MAX_PEAK_BYTES = 6 << 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = load_preset("full").config_json | CHANGES
    preset = Preset("real width", 2, raw, ModelConfig.parse(raw, "test"))
    return new_checkpoint(tmp_path_factory.mktemp("real") / "checkpoint", preset).path


def run(*args: str | Path) -> tuple[str, int]:
    """Run a command; return what it printed and the largest memory of it or of a process that it started, in bytes."""
    command = [sys.executable, "-m", "seekforge", *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, printed
    return printed, used.ru_maxrss * 1024


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_a_layer_of_real_width_is_checked_in_bounded_memory(checkpoint: Path, tmp_path: Path, layer: int) -> None:
    layers = ("--layers", f"{layer}-{layer}")
    run("export", checkpoint, tmp_path / "program", *layers, "--quiet")
    run("build", tmp_path / "program", tmp_path / "engine", "--target", "cpu", "--checkpoint", checkpoint, "--quiet")
    args = ("--contexts", "24", "--modes", "whole", "--json")
    printed, peak = run("parity", tmp_path / "engine", "--checkpoint", checkpoint, *args)
    report = json.loads(printed)
    assert report["passed"] and report["judged"]["layers"] == [layer, layer + 1]
    operations = {operation["module"]: operation["error"] for operation in report["operations"]}
    assert len(operations) > 20 and operations["self_attn (sparse attention)"] < 1e-4
    assert peak < MAX_PEAK_BYTES, f"{peak / 1e9:.1f} GB"
