"""Every way in which a checkpoint may differ from its config or be damaged is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from seekforge.common.errors import CheckpointError
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.checkpoint.validate import check_structure, scan_values
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_index import INDEX_FILE
from seekforge.formats.checkpoint.shard_writer import write_shard

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
SCALE = O_PROJ + "_scale_inv"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
HEAD = "model.layers.4.shared_head.head.weight"
NORM = "model.norm.weight"

Tensors = dict[str, np.ndarray]


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of our own to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def open_with_config(folder: Path) -> tuple[Checkpoint, ModelConfig]:
    return Checkpoint.open(folder), ModelConfig.load(folder)


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Apply `change` to the tensors and write them as one file."""
    with Checkpoint.open(folder) as checkpoint:
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    change(tensors)
    (folder / INDEX_FILE).unlink()
    write_shard(folder / "model.safetensors", tensors)


def poke(folder: Path, name: str, byte: int, data: bytes) -> None:
    """Overwrite `data` at byte `byte` of a tensor in its shard."""
    info = Checkpoint.open(folder).info(name)
    with (folder / info.shard).open("r+b") as file:
        file.seek(info.begin + byte)
        file.write(data)


def test_a_written_checkpoint_passes(tiny_checkpoint: Path) -> None:
    checkpoint, config = open_with_config(tiny_checkpoint)
    check_structure(checkpoint, config)
    seen: list[tuple[int, int]] = []
    report = scan_values(checkpoint, config, progress=lambda done, total: seen.append((done, total)))
    assert report.num_tensors == len(checkpoint.names) == len(seen)
    assert seen[-1] == (report.num_bytes, report.num_bytes)
    assert report.all_powers_of_two
    assert report.scale_families["self_attn.o_proj"].num_tensors == 5
    assert report.scale_families["mlp.experts.up_proj"].num_tensors == 4 * 16
    family = report.scale_families["self_attn.q_b_proj"]
    assert 0 < family.smallest < family.largest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"tensor '{NORM}' is missing, expected \\[512\\] bf16"),
        (lambda t: t.pop(SCALE), f"weight '{O_PROJ}' has no '{SCALE}'"),
        (lambda t: t.update(x=np.zeros(1, np.float32)), "tensor 'x' is left over"),
        (lambda t: t.update({NORM: t[NORM][:-1]}), r"has shape \[511\], expected \[512\]"),
        (lambda t: t.update({NORM: t[NORM].astype(np.float32)}), "has dtype f32, expected bf16"),
        (lambda t: t.update({SCALE: t[SCALE].T[:, :3]}), "expected \\[4, 4\\]"),
        (lambda t: [t.pop(NORM), t.pop(BIAS)], r"and 1 more such faults"),
    ],
)
def test_structure_faults_are_named(copy: Path, change: Callable[[Tensors], object], message: str) -> None:
    rewrite(copy, change)
    checkpoint, config = open_with_config(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_structure(checkpoint, config)
    assert "\n" not in str(caught.value)


def test_a_config_without_mtp_leaves_its_layer_over(copy: Path) -> None:
    raw = json.loads((copy / "config.json").read_text())
    config = ModelConfig.parse(raw | {"num_nextn_predict_layers": 0}, "test")
    with pytest.raises(CheckpointError, match=r"'model\.layers\.4\..*left over.*num_nextn_predict_layers 0"):
        check_structure(Checkpoint.open(copy), config)


F32_NAN, F32_INF = np.float32(np.nan).tobytes(), np.float32(np.inf).tobytes()


@pytest.mark.parametrize(
    ("name", "byte", "data", "message"),
    [
        (O_PROJ, 512 + 3, b"\x7f", r"holds nan at \[1, 3\], expected finite"),
        (O_PROJ, 512 * 512 - 1, b"\xff", r"holds nan at \[511, 511\]"),
        (SCALE, 4, F32_NAN, r"holds nan at \[0, 1\]"),
        (SCALE, 4, F32_INF, r"holds inf at \[0, 1\]"),
        (SCALE, 4, bytes(4), r"holds 0.0 at \[0, 1\], expected every scale above 0"),
        (SCALE, 4, np.float32(-1).tobytes(), r"holds -1.0 at \[0, 1\]"),
        (BIAS, 8, F32_NAN, r"e_score_correction_bias' holds nan at \[2\]"),
        (NORM, 2, np.array(-np.inf, ml_dtypes.bfloat16).tobytes(), r"holds -inf at \[1\]"),
        (HEAD, 0, b"\x01", "differs from 'lm_head.weight', expected equal bits"),
        (HEAD, 1024 * 512 * 2 - 2, b"\x01", "differs from 'lm_head.weight'"),
    ],
)
def test_damaged_values_are_named(copy: Path, name: str, byte: int, data: bytes, message: str) -> None:
    poke(copy, name, byte, data)
    checkpoint, config = open_with_config(copy)
    check_structure(checkpoint, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        scan_values(checkpoint, config)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_largest_fp8_values_are_not_nan(copy: Path) -> None:
    poke(copy, O_PROJ, 0, b"\x7e\xfe\x80")
    scan_values(*open_with_config(copy), names=[O_PROJ])


def test_scales_that_are_no_powers_of_two_are_reported_not_refused(copy: Path) -> None:
    poke(copy, SCALE, 0, np.float32(0.003).tobytes())
    report = scan_values(*open_with_config(copy))
    assert not report.all_powers_of_two
    assert report.other_families == ("self_attn.o_proj",)
    assert report.scale_families["self_attn.o_proj"].num_powers_of_two == 4


def test_a_scan_of_some_names_reads_no_other(copy: Path) -> None:
    poke(copy, BIAS, 0, F32_NAN)
    report = scan_values(*open_with_config(copy), names=[NORM, SCALE])
    assert report.num_tensors == 2


def test_a_model_without_mtp_passes(tmp_path: Path) -> None:
    tiny = load_preset("tiny")
    raw = tiny.config_json | {"num_nextn_predict_layers": 0}
    new_checkpoint(tmp_path / "out", replace(tiny, config_json=raw, config=ModelConfig.parse(raw, "test")))
    checkpoint, config = open_with_config(tmp_path / "out")
    check_structure(checkpoint, config)
    scan_values(checkpoint, config)
