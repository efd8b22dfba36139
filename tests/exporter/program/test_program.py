"""What the canonical program promises: no weight in it, symbolic axes, functions, a complete account."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from seekforge.common.files import sha256_file
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.program import load_bindings, load_program
from seekforge.formats.weight_recipes import tensors_of
from seekforge.plugins.registry import ADD_RMS_NORM_QUANTIZE, BF16_LINEAR, SPECS

GRAPHS = ("model", "mtp")
AXES = {
    "input_ids": ["B", "Q"],
    "hidden_in": ["B", "Q", None],
    "positions": ["B", "Q"],
    "slot_mapping": ["B", "Q"],
    "block_table": ["B", "MB"],
    "logits_index": ["N"],
    "latent_cache": ["NS", None],
    "index_cache": ["NS", None],
}


@pytest.fixture(scope="module", params=("fp8", "exact"))
def program(request: pytest.FixtureRequest, tiny_programs: dict[str, Path]) -> Path:
    return tiny_programs[request.param]


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_declared_axis_is_symbolic(program: Path, graph: str) -> None:
    model = onnx.load(program / f"{graph}.onnx")
    for value in model.graph.input:
        expected = AXES.get(value.name.partition(".")[0])
        if expected is None:
            continue
        dims = value.type.tensor_type.shape.dim
        assert [dim.dim_param or None for dim in dims] == expected, value.name


@pytest.mark.parametrize("graph", GRAPHS)
def test_weights_are_inputs_and_constants_are_tiny(program: Path, graph: str) -> None:
    model = onnx.load(program / f"{graph}.onnx")
    bindings = load_bindings(program)[graph]
    inputs = {value.name: value for value in model.graph.input}
    for name, recipe in bindings.items():
        dims = inputs[name].type.tensor_type.shape.dim
        assert tuple(dim.dim_value for dim in dims) == recipe.shape, name
    assert all(math.prod(tensor.dims) <= 64 for tensor in model.graph.initializer)
    assert (program / f"{graph}.onnx").stat().st_size < 200_000


def test_every_element_of_the_checkpoint_is_used_or_declared(program: Path, tiny_source: Checkpoint) -> None:
    document = load_program(program)
    read = {
        name for named in load_bindings(program).values() for recipe in named.values() for name in tensors_of(recipe)
    }
    assert read | set(document.unused) == set(tiny_source.names)
    assert not read & set(document.unused)
    assert sorted(document.unused) == ["model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"]
    assert document.shared["lm_head.weight"] == ["model:lm_head.weight", "mtp:lm_head.weight"]
    assert "model.layers.0.self_attn.kv_b_proj.weight_scale_inv" in document.shared


@pytest.mark.parametrize("graph", GRAPHS)
def test_nodes_carry_their_namespace_and_share_one_function(
    program: Path, graph: str, tiny_config: ModelConfig
) -> None:
    model = onnx.load(program / f"{graph}.onnx")
    custom = [node for node in model.graph.node if node.domain == "seekforge"]
    # a program of one rank has no collective, sparse attention no dense one, and only GPU builds put two of them in
    assert (
        {node.op_type for node in custom}
        == set(SPECS) - {"SumRanks", ADD_RMS_NORM_QUANTIZE, BF16_LINEAR, "MlaCacheWrite", "MlaAttention"}
        == {function.name for function in model.functions}
    )
    for node in custom:
        assert any(a.name == "plugin_namespace" and a.s == b"seekforge" for a in node.attribute), node.name
    layers = tiny_config.num_hidden_layers if graph == "model" else 1
    assert sum(node.op_type == "DsaAttention" for node in custom) == layers
    others = {node.domain for node in model.graph.node} - {"seekforge"}
    assert others == {""}


@pytest.mark.parametrize("graph", GRAPHS)
def test_caches_are_aliased_to_their_outputs(program: Path, graph: str) -> None:
    graph_io = load_program(program).graphs[graph]
    assert graph_io.sha256 == sha256_file(program / graph_io.file)
    caches = [spec.name for spec in graph_io.inputs if spec.role == "cache"]
    assert sorted(graph_io.aliases.values()) == sorted(caches)
    for output, source in graph_io.aliases.items():
        assert graph_io.named(output).shape == graph_io.named(source).shape
        assert output.replace("_out.", ".") == source


def test_a_process_without_our_schemas_accepts_the_program(program: Path) -> None:
    code = (
        "import onnx, sys\n"
        "for name in ('model', 'mtp'):\n"
        "    model = onnx.load(f'{sys.argv[1]}/{name}.onnx')\n"
        "    onnx.checker.check_model(model, full_check=True)\n"
        "    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)\n"
        "assert not any(m.startswith('seekforge') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(program)], check=True)


def test_program_json_records_what_was_asked(program: Path, tiny_config: ModelConfig) -> None:
    document = load_program(program)
    assert document.layer_range == (0, tiny_config.num_hidden_layers)
    assert document.numerics["name"] == program.name
    assert ModelConfig.parse(document.config, "program.json") == tiny_config
    assert document.ops["DsaIndexer"].attributes["indexer_fp8"] == (program.name == "fp8")
    assert {"tokenizer.json", "generation_config.json"} <= set(document.files)
