"""An engine that is replaced while it is in use: who holds the old one keeps it, who opens the folder has the new."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.onnxruntime.build import build
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.formats.targets import load_target
from seekforge.runtime import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(100, 180)), [900]]


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    return [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.slow
def test_a_build_over_a_live_engine_changes_nothing_for_who_holds_it(
    tiny_engines: dict[str, Path], tiny_programs: dict[str, Path], tmp_path: Path
) -> None:
    with LLM(tiny_engines["exact"], threads=1, num_blocks=40) as llm:
        expected = tokens(llm)
    engine, other = tmp_path / "engine", tmp_path / "other"
    shutil.copytree(tiny_engines["exact"], engine)
    new_checkpoint(other, "tiny", seed=1)
    # the old weights are mapped, and pages of them that no step has touched yet are read after the build
    with LLM(engine, threads=1, num_blocks=40, self_check=False) as llm:
        build(
            tiny_programs["exact"],
            engine,
            target=load_target("cpu"),
            checkpoint_folder=other,
            force=True,
            progress=Stages(quiet=True),
        )
        assert tokens(llm) == expected
        with LLM(engine, threads=1, num_blocks=40) as new:
            assert tokens(new) != expected
        assert tokens(llm) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "other"]
