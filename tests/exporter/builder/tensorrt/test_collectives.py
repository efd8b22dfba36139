"""One of several ranks: TensorRT-RTX builds its sums over ranks as collectives, for every SM and without a GPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from seekforge.exporter.builder.options import CompilerOptions
from seekforge.exporter.builder.tensorrt.compiler import compile_graph
from seekforge.exporter.builder.tensorrt.graph import prepare
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.program.trace import trace
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import FP8
from seekforge.formats.parallelism import Parallelism
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.registry import SPECS
from seekforge.plugins.sum_ranks.collective import to_collectives
from seekforge.plugins.testing import one_node_model

RTX_SMS = (80, 86, 89, 120, 121)


def test_a_sum_over_ranks_becomes_the_collective_that_the_parser_knows() -> None:
    how = Specialization("bf16", "float8", "bf16", "trt")
    model = one_node_model("SumRanks", {"num_ranks": 4}, how, [("bf16", [2, 256])], [("bf16", [2, 256])])
    assert to_collectives(model) == 1
    (node,) = model.graph.node
    attrs = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    assert (node.op_type, list(node.input), list(node.output)) == ("DistCollective", ["x"], ["y"])
    assert attrs == {
        "collective_operation": b"all_reduce",
        "reduce_op": b"sum",
        "root": -1,
        "nb_rank": 4,
        "group_size": 0,
    }
    assert to_collectives(model) == 0


@pytest.mark.parametrize(("layers", "collectives"), [((1, 2), 3), pytest.param((0, 2), 6, marks=pytest.mark.slow)])
def test_layers_of_a_rank_build_with_plugins_and_collectives(
    layers: tuple[int, int], collectives: int, tmp_path: Path
) -> None:
    """Two sums of a layer, one of the logits; and one of the embedding, where the model begins."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    raw = load_preset("tiny").config_json | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    config = ModelConfig.parse(raw | {"moe_intermediate_size": 512}, "wide")
    settings = Settings(config, FP8, "bf16", parallelism=Parallelism(tp=2, ep=True))
    traced = trace(settings, layers, lambda stage: None)
    how = Specialization("bf16", "int8", "fp8_ds", "trt")
    ready = prepare(traced.model, how, config, plugins=list(SPECS), products="bf16", digests={})
    assert ready.collectives == collectives
    assert "SumRanks" not in ready.plugins and not ready.inlined
    bounds = {"B": (1, 2, 4), "Q": (1, 1, 8), "MB": (1, 2, 4), "N": (1, 2, 4), "NB": (2, 4, 8)}
    shapes = {}
    for value in ready.model.graph.input:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if any(isinstance(dim, str) for dim in dims):
            shapes[value.name] = tuple(
                tuple(bounds[dim][i] if isinstance(dim, str) else dim for dim in dims) for i in range(3)
            )
    made = compile_graph(
        flavour="tensorrt-rtx",
        model=ready.model.SerializeToString(),
        plan=tmp_path / "rank.plan",
        plugins=ready.plugins,
        sms=RTX_SMS,
        profiles=[shapes],
        options=CompilerOptions(),
        log=tmp_path / "log",
    )
    assert made.layers["DIST_COLLECTIVE"] == ready.collectives
    assert made.capturable is True
    assert made.layers["PLUGIN_V3"] == sum(ready.plugins.values())
    assert made.plan_bytes == (tmp_path / "rank.plan").stat().st_size
