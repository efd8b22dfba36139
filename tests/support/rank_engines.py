"""Engines of several ranks, of the `tiny` checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.made_once import made_once

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.onnxruntime.build import build
from seekforge.exporter.program.export import export
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import load_target


def rank_engine(
    checkpoint: Path,
    parallelism: Parallelism,
    tmp_path_factory: pytest.TempPathFactory,
    numerics: str = "exact",
    precision: str = "f32",
) -> Path:
    """Return the engine of a layout, made once per run; do not write into it."""

    def make(root: Path) -> None:
        export(checkpoint, root / "program", numerics=NUMERICS[numerics], parallelism=parallelism)
        build(
            root / "program",
            root / "engine",
            target=load_target("cpu", ["limits.max_model_len=4096", f"precision={precision}"]),
            checkpoint_folder=checkpoint,
            force=False,
            progress=Stages(quiet=True),
        )

    return made_once(tmp_path_factory, f"ranks-{numerics}-{precision}-{parallelism}", make) / "engine"
