"""Which layers a program holds, and that two stages and a truncated model compute what PyTorch computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seekforge.common.cli.console import Stages
from seekforge.common.errors import ConfigError
from seekforge.exporter.builder.onnxruntime.build import build
from seekforge.exporter.builder.onnxruntime.session import OrtSession
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.checkpoint.schema import expected_tensors
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.program.export import export
from seekforge.exporter.program.layers import check_range, count_groups, outside, parse_layers, truncate
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import Manifest, load_manifest
from seekforge.formats.numerics import EXACT
from seekforge.formats.program import load_program
from seekforge.formats.step_io import INTERMEDIATE_TENSORS, MODEL, lay_out
from seekforge.formats.targets import load_target

PROMPT = np.random.default_rng(3).integers(16, 900, 70).tolist()


@pytest.mark.parametrize(("text", "expected"), [("0-30", (0, 31)), ("7", (7, 8)), ("3-3", (3, 4)), (" 0-1 ", (0, 2))])
def test_layers_are_given_with_both_ends(text: str, expected: tuple[int, int]) -> None:
    assert parse_layers(text) == expected


@pytest.mark.parametrize("text", ["", "-3", "3-", "a-b", "1-2-3", "1:2"])
def test_malformed_layers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected A-B"):
        parse_layers(text)


@pytest.mark.parametrize("layer_range", [(2, 2), (3, 2), (0, 5), (4, 5)])
def test_a_range_outside_the_model_is_refused(layer_range: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="within 0-3"):
        check_range(layer_range, load_preset("tiny").config)


@pytest.mark.parametrize("num_layers", [0, -1, 5])
def test_a_model_of_more_layers_than_there_are_is_refused(num_layers: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 4"):
        truncate(load_preset("tiny").config, num_layers)


def test_a_truncated_config_has_no_mtp_and_keeps_its_dense_layers() -> None:
    full = load_preset("full").config
    two, five = truncate(full, 2), truncate(full, 5)
    assert (two.num_hidden_layers, two.first_k_dense_replace, two.mtp_layer) == (2, 2, None)
    assert (five.num_hidden_layers, five.first_k_dense_replace, five.hidden_size) == (5, 3, 7168)
    assert truncate(full, 61) is full


def test_every_tensor_of_the_full_model_is_in_one_of_two_stages() -> None:
    config = load_preset("full").config
    names = list(expected_tensors(config))
    first = outside(names, config, layer_range=(0, 30), has_mtp=False)
    second = outside(names, config, layer_range=(30, 61), has_mtp=True)
    inside = [set(names) - set(first), set(names) - set(second)]
    assert inside[0] | inside[1] == set(names)
    # the MTP module reads the embedding too
    assert inside[0] & inside[1] == {"model.embed_tokens.weight"}
    groups = count_groups(first)
    assert list(groups)[:3] == ["lm_head.weight", "model.norm.weight", "model.layers.30.*"]
    assert groups["model.layers.30.*"] == 1565 and groups["model.layers.61.*"] == 1571


def _engine(program: Path, checkpoint: Path) -> tuple[Path, Manifest]:
    out = program.with_name(program.name + "-engine")
    target = load_target("cpu", ["limits.max_model_len=512"])
    build(
        program,
        out,
        target=target,
        checkpoint_folder=checkpoint,
        force=False,
        progress=Stages(quiet=True),
    )
    return out, load_manifest(out)


def test_two_stages_give_the_logits_of_the_whole_model(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tiny_source: Checkpoint, tmp_path: Path
) -> None:
    whole = TorchSession(Settings(tiny_config, EXACT, "f32"), tiny_source).prefill(PROMPT)
    step = lay_out([PROMPT], [0], [[1, 2]])
    results: dict[str, np.ndarray] = {}
    for layers in ((0, 2), (2, 4)):
        program = tmp_path / f"program{layers[0]}"
        exported = export(tiny_checkpoint, program, numerics=EXACT, layer_range=layers)
        assert exported.program.layer_range == layers and not exported.program.gives_logits
        assert set(exported.program.graphs) == ({"model"} if layers[1] < 4 else {"model", "mtp"})
        assert sum(exported.program.outside.values()) == exported.num_outside
        engine, manifest = _engine(program, tiny_checkpoint)
        assert manifest.self_check is None and manifest.cache.layers == tuple(range(*layers))
        results |= OrtSession(engine, {MODEL: manifest.graphs[MODEL]}, 4).run(step)
        if layers[1] < 4:
            tensors = {name: results.pop(f"{name}_out") for name in INTERMEDIATE_TENSORS}
            step = replace(step, intermediate_tensors=tensors)
    for name, expected in whole.items():
        if expected.is_floating_point():
            spread = float(expected.std())
            np.testing.assert_allclose(results[name], expected.numpy(), atol=1e-3 * spread, rtol=0, err_msg=name)
        elif name != "top_ids":
            np.testing.assert_array_equal(results[name], expected.numpy(), err_msg=name)


def test_a_truncated_model_proves_itself_like_a_whole_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    exported = export(tiny_checkpoint, tmp_path / "program", numerics=EXACT, num_layers=2)
    program = load_program(tmp_path / "program")
    assert program == exported.program
    assert program.truncated_from == 4 and program.gives_logits and set(program.graphs) == {"model"}
    assert program.outside == {"model.layers.2.*": 125, "model.layers.3.*": 125, "model.layers.4.*": 131}
    assert program.unused == {}
    _, manifest = _engine(tmp_path / "program", tiny_checkpoint)
    assert manifest.self_check is not None and manifest.layer_range == (0, 2)
