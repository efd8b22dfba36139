"""The trained nano checkpoint and an engine of it, made once per run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.made_once import made_once
from tests.support.parity_faults import build_engine

from seekforge.exporter.checkpoint.trained import copy_trained_checkpoint
from seekforge.exporter.program.export import export
from seekforge.formats.numerics import FP8


def trained_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `checkpoint`, `program` and `engine` (the defaults of export and build); only to be read."""

    def make(root: Path) -> None:
        copy_trained_checkpoint(root / "checkpoint", "nano")
        export(root / "checkpoint", root / "program", numerics=FP8)
        build_engine(root / "program", root / "checkpoint", root / "engine")

    return made_once(tmp_path_factory, "trained-nano", make)
