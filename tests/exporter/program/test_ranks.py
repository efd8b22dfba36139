"""The graphs of all ranks, merged into one with a Sum at each collective, compute what the whole model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, inliner
from tests.support.ort_session import open_session

from seekforge.common.errors import ProgramError
from seekforge.exporter.builder.onnxruntime.fold import WeightFile, fold_weights, limit_tables
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.models.deepseek_v32.model import StepModel
from seekforge.exporter.models.sharding import check_parallelism
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.weights import recipes
from seekforge.exporter.program.rank_bindings import rank_bindings
from seekforge.exporter.program.ranks import merge
from seekforge.exporter.program.specialize import specialize
from seekforge.exporter.program.stages import cut
from seekforge.exporter.program.trace import OPSET, Traced, trace
from seekforge.exporter.sizing.stages import pipeline_stages
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.loader import Loader, allocate
from seekforge.formats.numerics import EXACT, FP8, Numerics
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.program import PROGRAM_FORMAT, Program
from seekforge.formats.step_io import StepInputs, lay_out
from seekforge.formats.weight_recipes import coverage, retarget
from seekforge.plugins.functions.attach import attach
from seekforge.plugins.functions.specialization import Specialization

HOW = Specialization("f32", "float8", "f32", "ort")
TABLES = ("rope_cos", "rope_sin")
SHARED = ("input_ids", "positions", "slot_mapping", "block_table", "logits_index")
PROMPT = np.random.default_rng(5).integers(16, 900, 71).tolist()


@pytest.fixture(scope="module")
def preset() -> Preset:
    """Two layers, one of each kind, wide enough to be cut in four between FP8 blocks."""
    raw = load_preset("tiny").config_json | {
        "num_hidden_layers": 2,
        "moe_intermediate_size": 512,
        "num_nextn_predict_layers": 0,
    }
    return Preset("wide", 1, raw, ModelConfig.parse(raw, "test"))


@pytest.fixture(scope="module")
def source(preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ranks") / "checkpoint"
    new_checkpoint(folder, preset)
    with Checkpoint.open(folder) as checkpoint:
        yield checkpoint


def _program(config: ModelConfig, ranks: Parallelism) -> Program:
    """Return what program.json says of these two layers."""
    return Program(
        format=PROGRAM_FORMAT,
        seekforge_version="0",
        opset=OPSET,
        layer_range=(0, 2),
        pipeline_stages=pipeline_stages(config, ranks),
        numerics={},
        config=config.model_dump(mode="json"),
        ops={},
        graphs={},
        unused={},
        shared={},
        files=(),
        parallelism=ranks,
    )


def _merged(
    stage: onnx.ModelProto, number: int, traced: Traced, program: Program, source: Checkpoint, folder: Path
) -> onnx.ModelProto:
    """Specialize and fold the graph of a stage for each of its ranks, and join them; weights go to `folder`."""
    weights = WeightFile("weights.bin")
    graphs, tp = [], program.parallelism.tp
    config = ModelConfig.parse(program.config, "test")
    for rank in range(number * tp, (number + 1) * tp):
        model = specialize(stage, HOW, config)
        read = {
            name: retarget(recipe, activations="f32", fp8_dtype="f8e4m3")
            for name, recipe in rank_bindings(program, {"model": traced.recipes}, rank)["model"].items()
        }
        inputs = {value.name for value in model.graph.input}
        assert {name for name, recipe in read.items() if recipe.op != "computed"} <= inputs, "no more than it needs"
        constants = fold_weights(model, limit_tables({n: r for n, r in read.items() if n in inputs}, TABLES, 512))
        weights.attach(model, constants)
        graphs.append(model)
    folder.mkdir()
    weights.write(folder, source, lambda done, total: None)
    handed = [value.name for value in stage.graph.input if value.name.startswith("intermediate.")]
    merged = merge(graphs, [*SHARED, *handed]) if tp > 1 else graphs[0]
    attach(merged, HOW)
    return inliner.inline_local_functions(merged)


def _run(
    model: onnx.ModelProto, folder: Path, step: StepInputs, handed: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    session = open_session(folder / "model.onnx")
    feeds: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        if "_cache" in value.name:
            feeds[value.name] = np.zeros((256, value.shape[1]), np.float32)
        else:
            feeds[value.name] = handed[value.name] if value.name in handed else step.array(value.name)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, feeds)), strict=True))


def _assert_ranks_equal_whole(
    preset: Preset, source: Checkpoint, tmp_path: Path, ranks: Parallelism, *, numerics: Numerics = EXACT
) -> None:
    config = preset.config
    check_parallelism(config, ranks)
    whole = TorchSession(Settings(config, numerics, "f32"), source).prefill(PROMPT)
    step = lay_out([PROMPT], [0], [[1, 2]])
    traced = trace(Settings(config, numerics, "bf16", parallelism=ranks), (0, 2), lambda stage: None)
    sums = [node for node in traced.model.graph.node if node.op_type == "SumRanks"]
    assert len(sums) == (6 if ranks.tp > 1 else 0), "two of a layer, of the embedding and of the logits"
    program = _program(config, ranks)
    parts = cut(traced.model, program.pipeline_stages) if ranks.pp > 1 else [traced.model]
    assert len(parts) == ranks.pp
    handed: dict[str, np.ndarray] = {}
    results: dict[str, np.ndarray] = {}
    for number, part in enumerate(parts):
        folder = tmp_path / str(number)
        outputs = _run(_merged(part, number, traced, program, source, folder), folder, step, handed)
        prefix = "rank0." if ranks.tp > 1 else ""
        for name, value in outputs.items():
            plain = name.partition(".")[2] if prefix else name
            # every rank of a stage ends with the same
            np.testing.assert_array_equal(value, outputs[prefix + plain], err_msg=name)
            results[plain] = value
        handed = {
            name.replace("_out", ""): results.pop(name) for name in [*results] if name.startswith("intermediate_out.")
        }
    for name, expected in whole.items():
        if expected.is_floating_point():
            np.testing.assert_allclose(
                results[name], expected.numpy(), atol=2e-4 * float(expected.std()), rtol=0, err_msg=name
            )
        elif name != "top_ids":
            np.testing.assert_array_equal(results[name], expected.numpy(), err_msg=name)


#: Parts of the names of tensors of which each tensor-parallel rank reads a part.
DIVIDED = ("q_b_proj", "kv_b_proj", "o_proj", "mlp.", "embed_tokens", "lm_head")
TWO, FOUR = Parallelism(tp=2), Parallelism(tp=4)
TWO_EP, FOUR_EP = Parallelism(tp=2, ep=True), Parallelism(tp=4, ep=True)


@pytest.mark.parametrize("ranks", [TWO, TWO_EP], ids=str)
def test_two_ranks_compute_the_whole(preset: Preset, source: Checkpoint, tmp_path: Path, ranks: Parallelism) -> None:
    """With experts cut in two, and with experts dealt out whole."""
    _assert_ranks_equal_whole(preset, source, tmp_path, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [FOUR, FOUR_EP], ids=str)
def test_four_ranks_compute_the_whole(preset: Preset, source: Checkpoint, tmp_path: Path, ranks: Parallelism) -> None:
    _assert_ranks_equal_whole(preset, source, tmp_path, ranks)


def test_two_stages_of_two_ranks_compute_the_whole(preset: Preset, source: Checkpoint, tmp_path: Path) -> None:
    """One program, cut where program.json says; each rank reads what its bindings say, and that is all it needs."""
    _assert_ranks_equal_whole(preset, source, tmp_path, Parallelism(tp=2, pp=2))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [Parallelism(pp=2), Parallelism(tp=2, pp=2, ep=True)], ids=str)
def test_stages_compute_the_whole(preset: Preset, source: Checkpoint, tmp_path: Path, ranks: Parallelism) -> None:
    _assert_ranks_equal_whole(preset, source, tmp_path, ranks)


@pytest.mark.parametrize("ranks", [Parallelism(), TWO, FOUR_EP, Parallelism(tp=2, pp=2)], ids=str)
def test_every_element_is_read_by_exactly_one_rank_or_by_all(
    preset: Preset, source: Checkpoint, ranks: Parallelism
) -> None:
    """Load every rank; together they read what is divided once, and what is whole once each."""
    with torch.device("meta"):
        named = recipes(StepModel(Settings(preset.config, FP8, parallelism=ranks), (0, 2)))
    used = coverage(named).used
    assert used == {name: int(np.prod(source.info(name).shape)) for name in source.names}
    split_bytes = whole_bytes = total = 0
    for name in source.names:
        size = source.info(name).num_bytes
        is_split = any(part in name for part in DIVIDED) and "gate." not in name
        split_bytes, whole_bytes = (split_bytes + size, whole_bytes) if is_split else (split_bytes, whole_bytes + size)
    for rank in range(ranks.num_ranks):
        read = rank_bindings(_program(preset.config, ranks), {"model": named}, rank)["model"]
        loader = Loader(source, read, allocate(read))
        assert sum(loader.shard_bytes.values()) == loader.total_bytes
        total += loader.total_bytes
    assert total == split_bytes + ranks.tp * whole_bytes


def test_sums_of_hidden_states_travel_in_bf16(preset: Preset) -> None:
    """As `plan` counts them: two bytes an element, and four of the logits. A graph in f32 keeps f32."""
    config = preset.config
    model = trace(Settings(config, EXACT, "bf16", parallelism=TWO_EP), (0, 2), lambda stage: None).model
    nodes = [node for node in model.graph.node if node.op_type == "SumRanks"]
    values = {value.name: value.type.tensor_type for value in (*model.graph.value_info, *model.graph.output)}
    sums = [(values[node.output[0]].elem_type, values[node.output[0]].shape.dim[-1].dim_value) for node in nodes]
    hidden, logits = (TensorProto.BFLOAT16, config.hidden_size), (TensorProto.FLOAT, config.vocab_size)
    assert sums == [hidden] * 5 + [logits], "of the embedding, two of a layer, of the logits"


def test_a_vocabulary_that_does_not_divide_is_whole_on_each_rank(preset: Preset) -> None:
    raw = preset.config_json | {"vocab_size": 1027}
    config = ModelConfig.parse(raw, "test")
    check_parallelism(config, TWO)
    model = trace(Settings(config, EXACT, "bf16", parallelism=TWO), (0, 2), lambda stage: None).model
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input}
    assert shapes["embed_tokens.weight"] == shapes["lm_head.weight"] == [1027, config.hidden_size]
    assert "vocab_start" not in shapes
    assert len([node for node in model.graph.node if node.op_type == "SumRanks"]) == 4


def test_graphs_without_a_collective_are_not_merged() -> None:
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [value], [onnx.helper.make_tensor_value_info("y", 1, [1])])
    )
    with pytest.raises(ProgramError, match=r"\[0\] collectives"):
        merge([model, model], ["x"])
