"""A stamped graph is byte for byte the graph that a trace of all layers gives."""

from __future__ import annotations

import itertools

import onnx
import pytest

from seekforge.common.errors import ProgramError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.program.canonical_names import AFTER, BEFORE, canonicalise, renumber, segments
from seekforge.exporter.program.replicate import groups_to_trace, stamp
from seekforge.exporter.program.trace import Traced, trace
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import EXACT, FP8
from seekforge.formats.program import layer_of


def _config(num_layers: int, num_dense: int, **changed: object) -> ModelConfig:
    raw = load_preset("tiny").config_json
    return ModelConfig.parse(
        raw | {"num_hidden_layers": num_layers, "first_k_dense_replace": num_dense} | changed, "test"
    )


def _trace(config: ModelConfig, layer_range: tuple[int, int], *, exact: bool, every_layer: bool) -> Traced:
    settings = Settings(config, EXACT if exact else FP8, activations="bf16")
    return trace(settings, layer_range, lambda stage: None, every_layer=every_layer)


def _assert_same(config: ModelConfig, layer_range: tuple[int, int], *, exact: bool = False) -> None:
    stamped = _trace(config, layer_range, exact=exact, every_layer=False)
    traced = _trace(config, layer_range, exact=exact, every_layer=True)
    # first what differs, in words; then all of it
    for ours, theirs in zip(stamped.model.graph.node, traced.model.graph.node, strict=True):
        assert ours == theirs
    assert stamped.model.SerializeToString(deterministic=True) == traced.model.SerializeToString(deterministic=True)
    assert stamped.recipes == traced.recipes and stamped.output_names == traced.output_names


def layers_to_trace(config: ModelConfig, layer_range: tuple[int, int]) -> tuple[int, ...]:
    """Return the traced layers of all groups."""
    return tuple(itertools.chain.from_iterable(groups_to_trace(config, layer_range)))


def test_a_stamped_model_is_the_traced_one() -> None:
    config = _config(5, 1)
    assert layers_to_trace(config, (0, 5)) == (0, 1, 2, 4)
    _assert_same(config, (0, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_layers", "num_dense", "layer_range", "traced", "exact"),
    [
        (8, 4, (0, 8), (0, 1, 2, 4, 5, 7), False),  # both kinds stamped
        (8, 4, (0, 8), (0, 1, 2, 4, 5, 7), True),
        (8, 1, (0, 6), (0, 1, 2, 5), False),  # hands over
        (9, 1, (3, 9), (3, 4, 5, 8), False),  # takes over
        (9, 1, (2, 8), (2, 3, 4, 7), True),  # both
        (6, 6, (0, 6), (0, 1, 2, 5), False),  # dense only
    ],
)
def test_any_range_and_kind_is_stamped_as_traced(
    num_layers: int, num_dense: int, layer_range: tuple[int, int], traced: tuple[int, ...], exact: bool
) -> None:
    config = _config(num_layers, num_dense)
    assert layers_to_trace(config, layer_range) == traced
    _assert_same(config, layer_range, exact=exact)


def _sharing(types: str) -> ModelConfig:
    raw = load_preset("glm5-tiny").config_json
    words = ["full" if one == "F" else "shared" for one in types]
    return ModelConfig.parse(raw | {"num_hidden_layers": len(types), "indexer_types": words}, "test")


def test_layers_that_alternate_are_stamped_in_groups() -> None:
    config = _sharing("FFSSFSSFSSFSS")
    assert groups_to_trace(config, (0, 13)) == ((0,), (1, 2, 3), (4, 5, 6), (10, 11, 12))
    assert groups_to_trace(load_preset("glm5-full").config, (0, 78)) == (
        (0,), (1,), (2,), (3, 4, 5, 6), (7, 8, 9, 10), (75,), (76,), (77,),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("types", "layer_range"),
    [
        ("FFSSFSSFSSFSS", (0, 13)),  # groups to the end
        ("FFSSFSSFSSFS", (0, 12)),  # a part of a group behind them
        ("FFSSFSSFSSFSS", (2, 12)),  # begins with a layer that shares, and ends before one
    ],
)
def test_groups_are_stamped_as_traced(types: str, layer_range: tuple[int, int]) -> None:
    config = _sharing(types)
    assert len(layers_to_trace(config, layer_range)) < layer_range[1] - layer_range[0]
    _assert_same(config, layer_range)


def test_the_full_model_needs_six_traced_layers() -> None:
    assert layers_to_trace(load_preset("full").config, (0, 61)) == (0, 1, 2, 3, 4, 60)
    assert layers_to_trace(load_preset("full").config, (31, 61)) == (31, 32, 33, 60)


@pytest.mark.parametrize(
    ("name", "layer", "moved"),
    [
        ("layers.3.self_attn.w_uk", 3, "layers.12.self_attn.w_uk"),
        ("layers.3.mlp.experts.w13", 3, "layers.12.mlp.experts.w13"),
        ("latent_cache.3", 3, "latent_cache.12"),
        ("index_cache_out.60", 60, "index_cache_out.12"),
        ("expert_ids.7", 7, "expert_ids.12"),
        ("norm.weight", None, "norm.weight"),
        ("latent_cache.3.x", None, "latent_cache.3.x"),
        ("rope_cos", None, "rope_cos"),
    ],
)
def test_names_tell_their_layer(name: str, layer: int | None, moved: str) -> None:
    assert layer_of(name) == layer
    assert renumber(name, 12) == moved


# --- graphs by hand -------------------------------------------------------------------------------------------


def _value(name: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", 4])


def _chain(num_layers: int, last_op: str = "Mul") -> onnx.ModelProto:
    """x -> per layer: Add(x, layers.i.w), <op>(_, shared) -> norm.weight at the end; shared is computed once."""
    nodes = [onnx.helper.make_node("Relu", ["t"], ["shared"], name="n")]
    x = "x"
    for i in range(num_layers):
        op = last_op if i == num_layers - 2 else "Mul"
        nodes.append(onnx.helper.make_node("Add", [x, f"layers.{i}.w"], [f"a{i}"], name=f"a{i}"))
        nodes.append(onnx.helper.make_node(op, [f"a{i}", "shared"], [f"b{i}"], name=f"b{i}"))
        x = f"b{i}"
    nodes.append(onnx.helper.make_node("Mul", [x, "norm.weight"], ["hidden"], name="h"))
    inputs = [_value(name) for name in ("x", "t", *(f"layers.{i}.w" for i in range(num_layers)), "norm.weight")]
    graph = onnx.helper.make_graph(nodes, "step", inputs, [_value("hidden")])
    return onnx.helper.make_model(graph)


def test_nodes_belong_to_the_last_layer_they_depend_on() -> None:
    assert segments(_chain(2).graph) == [BEFORE, 0, 0, 1, 1, AFTER]


@pytest.mark.parametrize("num_layers", [5, 6, 20])
def test_a_chain_is_stamped_to_any_length(num_layers: int) -> None:
    whole = _chain(num_layers)
    part = _renumber_last(_chain(4), 3, num_layers - 1)
    traced = ((0,), (1,), (2,), (num_layers - 1,))
    result = stamp(part, traced, range(num_layers), inputs=whole.graph.input, outputs=["hidden"])
    weights = [f"layers.{i}.w" for i in range(num_layers)]
    canonicalise(result, weights)
    canonicalise(whole, weights)
    assert result.SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)
    assert whole.graph.node[3].name == "layers.1/Add" and whole.graph.node[-1].name == "head/Mul"


def _renumber_last(model: onnx.ModelProto, last: int, number: int) -> onnx.ModelProto:
    for node in model.graph.node:
        node.input[:] = [renumber(name, number) if layer_of(name) == last else name for name in node.input]
    for value in model.graph.input:
        value.name = renumber(value.name, number) if layer_of(value.name) == last else value.name
    return model


def test_unequal_neighbors_are_not_stamped() -> None:
    part = _renumber_last(_chain(4, last_op="Sub"), 3, 5)
    with pytest.raises(ProgramError, match="layers 1 and 2 differ in 'b1' and 'b2'"):
        stamp(part, ((0,), (1,), (2,), (5,)), range(6), inputs=part.graph.input, outputs=["hidden"])


def test_an_output_that_no_layer_gives_is_an_error() -> None:
    part = _renumber_last(_chain(4), 3, 5)
    with pytest.raises(ProgramError, match=r"topk_indices\.3"):
        stamp(part, ((0,), (1,), (2,), (5,)), range(6), inputs=part.graph.input, outputs=["hidden", "topk_indices.3"])
