"""Layers of DeepSeek-V3.2 at their real width, without values: programs of a model of few layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from tests.support.made_once import made_once

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.checkpoint.sparse import new_sparse_checkpoint
from seekforge.exporter.program.export import export
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import NUMERICS

#: Program -> layers of the model, the first of which is dense, and those of them that it has (None: all, and MTP).
PROGRAMS: Final[dict[str, tuple[int, tuple[int, int] | None]]] = {
    "model": (2, None),
    "dense": (3, (0, 1)),
    "moe": (3, (1, 2)),
}


def real_width(tmp_path_factory: pytest.TempPathFactory, program: str) -> Path:
    """Return a folder with `checkpoint` and `program`, one of PROGRAMS, made once per run; only to be read."""
    num_layers, layers = PROGRAMS[program]

    def make_checkpoint(root: Path) -> None:
        full = load_preset("full")
        raw = full.config_json | {"num_hidden_layers": num_layers, "first_k_dense_replace": 1}
        config = ModelConfig.parse(raw, "test")
        preset = replace(full, name="few layers", num_shards=num_layers, config_json=raw, config=config)
        new_sparse_checkpoint(root / "checkpoint", preset)

    def make(root: Path) -> None:
        checkpoint = made_once(tmp_path_factory, f"real-width-{num_layers}", make_checkpoint) / "checkpoint"
        export(checkpoint, root / "program", numerics=NUMERICS["fp8"], layer_range=layers)
        (root / "checkpoint").symlink_to(checkpoint)

    return made_once(tmp_path_factory, f"real-width-{program}", make)
