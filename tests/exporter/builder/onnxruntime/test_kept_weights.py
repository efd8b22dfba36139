"""Engines whose weights are the checkpoint's own, BF16 and NVFP4: as `transformers` computes, and updated in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tests.support.weight_forms import two_layers

from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.cli import main as cli

pytestmark = pytest.mark.slow  # an export is 15 seconds of a core

NAME = "model.layers.1.self_attn.o_proj.weight"


def run(*args: str | Path, code: int = 0) -> str:
    """Run a command and return what it printed."""
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(("preset", "dtype", "numerics"), [("glm5-tiny", "bf16", "bf16"), ("tiny", "nvfp4", "exact")])
def test_an_engine_is_what_transformers_computes(preset: str, dtype: str, numerics: str, tmp_path: Path) -> None:
    checkpoint, program, engine = (tmp_path / name for name in ("checkpoint", "program", "engine"))
    new_checkpoint(checkpoint, two_layers(preset, dtype))
    run("export", checkpoint, program, "--numerics", numerics, "--quiet")
    run("build", program, engine, "--target", "cpu", "--checkpoint", checkpoint, "--quiet")
    options = ("--contexts", "10,65,90", "--modes", "whole", "--against", "transformers", "--brief")
    assert run("parity", engine, "--checkpoint", checkpoint, *options).rstrip().endswith("passed")
    said = run("build", program, tmp_path / "gpu", "--target", "rtx4090", "--checkpoint", checkpoint, code=2)
    assert "engines for GPUs multiply FP8 blocks, and this program keeps its weights as" in said
    assert ("export with --numerics fp8" in said) == (dtype == "bf16")
    _check_update(checkpoint, engine)


def _check_update(checkpoint: Path, engine: Path) -> None:
    """The attention of both is BF16: another value changes the answer, and the old one brings it back."""
    with Checkpoint.open(checkpoint) as source:
        before = np.array(source.tensor(NAME))
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=1)
    with LLM(engine) as llm:

        def logprobs() -> list[float]:
            (output,) = llm.generate([[5, 6, 7, 8]], params)
            return [next(iter(one.values())).logprob for one in output.outputs[0].logprobs or ()]

        first = logprobs()
        llm.update_weights({NAME: (before.astype(np.float32) * -3).astype(before.dtype)})
        assert logprobs() != first
        llm.update_weights({NAME: before})
        assert logprobs() == first
