"""DeepSeek-V3 from a checkpoint to text: the second family, through the same commands as the first."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.checkpoint.schema import expected_tensors
from seekforge.exporter.models import family_of
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import load_manifest
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.cli import main as cli


def run(*args: str | Path) -> str:
    """Run a command, which must succeed, and return what it printed."""
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("v3")
    checkpoint, program, engine = (root / name for name in ("checkpoint", "program", "engine"))
    run("new-checkpoint", checkpoint, "--preset", "tiny-v3", "--quiet")
    run("export", checkpoint, program, "--numerics", "exact", "--quiet")
    run("build", program, engine, "--target", "cpu", "--checkpoint", checkpoint, "--quiet")
    return {"checkpoint": checkpoint, "program": program, "engine": engine}


def test_a_checkpoint_has_no_indexer() -> None:
    config = load_preset("tiny-v3").config
    sparse = expected_tensors(load_preset("tiny").config)
    assert expected_tensors(config).items() <= sparse.items()
    assert all(".indexer." in name for name in sparse.keys() - expected_tensors(config).keys())
    assert family_of(config).caches(config, 1) == {"latent_cache": config.latent_dim}


def test_a_config_of_transformers_without_an_indexer_is_read() -> None:
    raw = dict(load_preset("tiny-v3").config_json)
    assert ModelConfig.parse(raw | {"rope_interleave": True}, "test").index_topk == 0
    with pytest.raises(Exception, match="rope_interleave is False"):
        ModelConfig.parse(raw | {"rope_interleave": False}, "test")


@pytest.mark.slow
def test_an_engine_generates_and_has_one_cache_a_layer(folders: dict[str, Path]) -> None:
    manifest = load_manifest(folders["engine"])
    caches = [spec.name for spec in manifest.graphs["model"].with_role("cache")]
    assert caches == [f"latent_cache.{layer}" for layer in range(4)]
    with LLM(folders["engine"]) as llm:
        outputs = llm.generate(["Hello", [5, 6, 7]], SamplingParams(max_tokens=8, temperature=0))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 8]


@pytest.mark.slow
@pytest.mark.parametrize("against", [(), ("--modes", "whole", "--against", "transformers")])
def test_an_engine_is_what_pytorch_and_transformers_compute(folders: dict[str, Path], against: tuple[str, ...]) -> None:
    said = run("parity", folders["engine"], "--checkpoint", folders["checkpoint"], "--contexts", "70", *against)
    assert said.rstrip().endswith("passed")
