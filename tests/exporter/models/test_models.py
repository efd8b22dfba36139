"""Families are found by `model_type`, and what their tables say of weights hangs together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from seekforge.common.errors import ConfigError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.models import FAMILIES, family_of, load_family
from seekforge.exporter.models.parameters import in_order
from seekforge.plugins.registry import OPERATORS


def test_an_unknown_model_type_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=f"model_type is 'llama', expected one of .*{sorted(FAMILIES)[0]}"):
        load_family("llama")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_bears_the_name_that_it_is_found_by(model_type: str) -> None:
    assert load_family(model_type).model_type == model_type


@pytest.mark.parametrize(
    ("model_type", "op"),
    [("deepseek_v32", "DsaAttention"), ("deepseek_v3", "MlaAttention"), ("glm_moe_dsa", "DsaAttention")],
)
def test_caches_have_the_formats_that_the_attention_takes(model_type: str, op: str) -> None:
    taken = next(attr.values for attr in OPERATORS[op].spec.attrs if attr.name == "kv_format")
    assert taken is not None
    assert set(load_family(model_type).kv_formats) == set(taken) - {"f32"}  # which engines for CPUs have


def test_copies_of_the_mtp_layer_repeat_tensors_of_the_same_shape() -> None:
    config = load_preset("tiny").config
    family = family_of(config)
    first, last = family.end_tensors(config)
    main = {tensor.name: tensor.shape for tensor in (*first, *last)}
    copies = {
        tensor.name: tensor
        for tensor in family.layer_tensors(config, config.num_hidden_layers)
        if tensor.copy_of is not None
    }
    assert sorted(copies) == ["embed_tokens.weight", "shared_head.head.weight"]
    assert all(main[tensor.copy_of or ""] == tensor.shape for tensor in copies.values())
    named = family.mtp_copies(config)
    assert named["model.layers.4.embed_tokens.weight"] == "model.embed_tokens.weight"
    assert len(named) == 2


def test_a_model_without_an_mtp_layer_has_no_copies() -> None:
    config = load_preset("tiny").config.model_copy(update={"num_nextn_predict_layers": 0})
    assert family_of(config).mtp_copies(config) == {}


def test_the_matrices_of_one_expert_stand_together_in_a_checkpoint() -> None:
    config = load_preset("tiny").config
    names = [name for name, _ in in_order(family_of(config).layer_tensors(config, 1), "")]
    start = names.index("mlp.experts.1.gate_proj.weight")
    assert names[start : start + 4] == [
        "mlp.experts.1.gate_proj.weight",
        "mlp.experts.1.up_proj.weight",
        "mlp.experts.1.down_proj.weight",
        "mlp.experts.2.gate_proj.weight",
    ]


@pytest.mark.parametrize(
    ("preset", "layer"), [("tiny", 0), ("tiny", 1), ("tiny-v3", 1), ("glm5-tiny", 1), ("glm5-tiny", 2)]
)
def test_parameters_are_made_of_tensors_that_the_checkpoint_has(preset: str, layer: int) -> None:
    config = load_preset(preset).config
    family = family_of(config)
    tensors = family.layer_tensors(config, layer)
    rows = family.layer_parameters(config.layer_kind(layer))
    used = {name.removesuffix(".weight") for row in rows for name in row.tensors}
    assert used == {tensor.module for tensor in tensors}


def test_a_trace_of_one_family_knows_the_operators_of_all() -> None:
    """A process that has imported no other family's modules names their operators all the same."""
    code = (
        "from seekforge.exporter.program.trace import register_schemas, translation_table\n"
        "register_schemas(); print(len(translation_table()))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) == sum(operator.in_programs for operator in OPERATORS.values())
