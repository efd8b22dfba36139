"""An engine that was built without a self-check gets one from a parity check that it passes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from seekforge.common.errors import EngineError
from seekforge.formats.engine.manifest import SelfCheck, load_manifest, save_manifest
from seekforge.runtime import LLM
from seekforge.runtime.cli.main import main

FEW = ("--contexts", "70", "--threads", "1", "--quiet")


@pytest.fixture
def bare(tiny_engines: dict[str, Path], tmp_path: Path) -> Path:
    """The exact tiny engine as a GPU's build leaves it: without a self-check."""
    folder = tmp_path / "engine"
    shutil.copytree(tiny_engines["exact"], folder, copy_function=_link)
    save_manifest(folder, load_manifest(folder).model_copy(update={"self_check": None}))
    return folder


def _link(source: str, target: str) -> None:
    if source.endswith("manifest.json"):
        shutil.copyfile(source, target)
    else:
        os.link(source, target)


def test_a_passed_check_is_stored_and_compared_at_every_start(bare: Path, tiny_checkpoint: Path) -> None:
    args = ["parity", str(bare), "--checkpoint", str(tiny_checkpoint), *FEW, "--modes", "whole", "--write-self-check"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    check = load_manifest(bare).self_check
    assert isinstance(check, SelfCheck)
    assert len(check.prompt_ids) == 70 and len(check.rows) > 0 and check.source == "torch, by parity"
    with LLM(bare, max_model_len=128) as llm:
        assert llm.self_check is not None and llm.self_check.num_values == 21 * len(check.rows)
    row = check.rows[0].model_copy(update={"logsumexp": check.rows[0].logsumexp + 3 * check.tolerance})
    bent = check.model_copy(update={"rows": (row, *check.rows[1:])})
    save_manifest(bare, load_manifest(bare).model_copy(update={"self_check": bent}))
    with pytest.raises(EngineError, match="self-check failed at position"):
        LLM(bare, max_model_len=128)


def test_what_cannot_be_stored_is_refused_and_nothing_changes(bare: Path, tiny_checkpoint: Path) -> None:
    before = (bare / "manifest.json").read_bytes()
    args = ["parity", str(bare), "--checkpoint", str(tiny_checkpoint), *FEW, "--write-self-check"]
    ragged = CliRunner().invoke(main, [*args, "--modes", "ragged"])
    assert ragged.exit_code == 2 and "no prompt was run whole and alone" in ragged.stderr
    other = CliRunner().invoke(main, [*args, "--against", str(bare)])
    assert other.exit_code == 2 and "--write-self-check needs" in other.stderr
    assert (bare / "manifest.json").read_bytes() == before
