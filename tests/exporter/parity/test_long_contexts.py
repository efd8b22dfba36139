"""Long contexts of every family: a whole prompt of 16K tokens, and steps at the end of what the model can hold.

Slow: a prompt of 16,384 tokens is minutes of a core, most of them PyTorch's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner

from seekforge.exporter.builder.onnxruntime.session import OrtSession
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.tolerances import GATE
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.numerics import EXACT
from seekforge.formats.paged_cache import BLOCK_SIZE, blocks_needed
from seekforge.formats.step_io import lay_out
from seekforge.runtime import LLM
from seekforge.runtime.cli import main as cli

pytestmark = pytest.mark.slow

PRESETS = ("tiny", "tiny-v3", "glm5-tiny")


def run(*args: str | Path, code: int = 0) -> str:
    """Run a command and return what it printed."""
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.output


def made(checkpoint: Path, *options: str) -> Path:
    """Return an engine of exact numerics of a checkpoint."""
    program, engine = checkpoint.with_name("program"), checkpoint.with_name("engine")
    run("export", checkpoint, program, "--numerics", "exact", "--quiet")
    run("build", program, engine, "--target", "cpu", "--checkpoint", checkpoint, "--quiet", *options)
    return engine


@pytest.mark.timeout(7200)  # eight minutes of a quiet core for `tiny`; the default is for tests of the suite
@pytest.mark.parametrize("preset", PRESETS)
def test_a_prompt_of_16k_tokens_is_what_pytorch_computes(preset: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    new_checkpoint(checkpoint, preset)
    engine = made(checkpoint)
    said = run("parity", engine, "--checkpoint", checkpoint, "--contexts", "16384", "--modes", "chunked", "--brief")
    assert "chunked 16384" in said and said.rstrip().endswith("passed")


def narrow(name: str) -> Preset:
    """Return a preset of few layers and no MTP; one layer shares another's choice where the family has such."""
    whole = load_preset(name)
    raw = dict(whole.config_json) | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    if "indexer_types" in raw:
        raw["indexer_types"] = ["full", "shared"]
    return replace(whole, num_shards=1, config_json=raw, config=ModelConfig.parse(raw, name))


@pytest.mark.parametrize("preset", PRESETS)
def test_steps_at_128k_and_at_the_last_position_of_the_model(preset: str, tmp_path: Path) -> None:
    """Caches are filled with noise, as if so many tokens had been computed: then a few more are, on both sides."""
    checkpoint = tmp_path / "checkpoint"
    new_checkpoint(checkpoint, narrow(preset))
    config = ModelConfig.load(checkpoint)
    most = config.max_position_embeddings
    engine = made(checkpoint, "--max-model-len", str(most))
    assert load_manifest(engine).limits.max_model_len == most
    refused = run(
        *("build", checkpoint.with_name("program"), tmp_path / "longer", "--target", "cpu"),
        *("--checkpoint", checkpoint, "--max-model-len", str(most + 1)),
        code=2,
    )
    assert f"expected 1 to {most}" in refused
    with Checkpoint.open(checkpoint) as source:
        for length in (131_072, most):
            check_end(TorchSession(Settings(config, EXACT), source), engine, length)
    with LLM(engine, max_batch_size=1, num_blocks=blocks_needed(most) + 2) as llm:
        assert llm.max_model_len == most


def check_end(reference: TorchSession, folder: Path, length: int) -> None:
    """Compare steps of the last tokens of a sequence of `length`: several, then one more."""
    engine = OrtSession(folder, {"model": load_manifest(folder).graphs["model"]}, threads=1)
    num_blocks = blocks_needed(length) + 2
    rng = np.random.default_rng(length)
    reference.module()
    for session in (reference, engine):
        session.allocate_caches(num_blocks)
    for name, cache in reference.caches.items():
        noise = rng.standard_normal(tuple(cache.shape), np.float32)
        reference.caches[name] = torch.from_numpy(noise)
        engine.caches[name] = ort.OrtValue.ortvalue_from_numpy(noise.copy())
    table = (rng.permutation(num_blocks - 2) + 1).tolist()
    for start, count in ((length - 4, 3), (length - 1, 1)):
        ids = rng.integers(16, 900, count).tolist()
        inputs = lay_out([ids], [start], [table])
        ours, expected = engine.run(inputs), reference.run(inputs)
        logits = expected.fetch("logits")
        error = np.abs(ours.fetch("logits") - logits).max() / logits.std()
        assert error <= GATE, f"{error:.1e} of the spread at {start} of {length}"
        for name in expected:
            if name.startswith("topk_indices"):
                chosen = expected.fetch(name)
                assert np.array_equal(ours.fetch(name), chosen)
                assert chosen.max() > length * 0.9, "nothing near the end was chosen"
    slots = np.array([table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for position in (length - 1,)])
    for name in reference.caches:
        assert np.allclose(engine.cache(name)[slots], reference.cache(name)[slots], rtol=1e-4, atol=1e-4)


def test_a_rope_table_that_ends_early_is_noticed(tmp_path: Path) -> None:
    """The comparison above sees one position of the tables alone being wrong."""
    checkpoint = tmp_path / "checkpoint"
    new_checkpoint(checkpoint, narrow("tiny"))
    engine = made(checkpoint, "--max-model-len", "131072")
    config = ModelConfig.load(checkpoint)
    with Checkpoint.open(checkpoint) as source:
        reference = TorchSession(Settings(config, EXACT), source)
        module = reference.module()
        tables = {name: value for name, value in module.named_parameters() if name.startswith("rope_")}
        assert tables
        with torch.no_grad():
            for value in tables.values():
                value[131_071] = value[0]
        with pytest.raises(AssertionError, match="of the spread at 131071 of 131072"):
            check_end(reference, engine, 131_072)
