"""CPU engines with int8 and int4 weights: the graph, what the manifest says, and that the gate is tight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from tests.support.made_once import made_once
from tests.support.ort_session import open_session

from seekforge.common.cli.console import Stages
from seekforge.common.errors import EngineError, TargetError
from seekforge.exporter.builder.onnxruntime.build import build
from seekforge.exporter.builder.onnxruntime.quantize import MS_DOMAIN, choose, quantize_experts
from seekforge.exporter.inspect.cli import inspect
from seekforge.exporter.models.shared.sparse.parameters import CODES
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.int_quant import Quantization, kind_of
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.program import load_bindings
from seekforge.formats.quantization.int_codes import quantize_rows
from seekforge.formats.targets import load_target
from seekforge.formats.weight_recipes import (
    Recipe,
    evaluate,
    evaluation,
    expert_map,
    for_rank,
    ones_table,
    split,
    stack,
    take,
)
from seekforge.plugins.moe_experts.spec import SPEC as MOE_EXPERTS
from seekforge.plugins.operator import DOMAIN
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.backends.weights import GivenTensors

#: What another form of weights is asked for by.
MIXED = (
    "precision=int4",
    "weight_block_size=128",
    "model.layers.0.*=int8",
    "lm_head=f32",
    "experts=int8",
    "o_proj=f32",
)


def build_cpu(program: Path, out: Path, checkpoint: Path, *settings: str) -> Path:
    build(
        program,
        out,
        target=load_target("cpu", [*settings, "limits.max_model_len=1024"]),
        checkpoint_folder=checkpoint,
        force=False,
        progress=Stages(quiet=True),
    )
    return out


@pytest.fixture(scope="module")
def engines(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    kinds = {
        "int8": ("exact", ("precision=int8",)),
        "int4": ("exact", ("precision=int4",)),
        "fp8": ("fp8", ("precision=int8",)),
        "mixed": ("exact", MIXED),
    }

    def make(root: Path) -> None:
        for name, (numerics, settings) in kinds.items():
            build_cpu(tiny_programs[numerics], root / name, tiny_checkpoint, *settings)

    root = made_once(tmp_path_factory, "coded", make)
    return {name: root / name for name in kinds}


@pytest.mark.parametrize("precision", ("int8", "int4"))
def test_products_have_codes_and_the_manifest_lists_all_kinds(engines: dict[str, Path], precision: str) -> None:
    manifest = load_manifest(engines[precision])
    how = manifest.quantization
    assert how is not None and how.precision == precision and how.block_size == 32
    assert set(CODES.values()) == {"int4", "int8", "f32"}
    assert how.kinds == {kind: precision if codes == "int4" else codes for kind, codes in CODES.items()}
    model = onnx.load(engines[precision] / "model.onnx", load_external_data=False)
    codes = {t.name for t in model.graph.initializer if t.name.endswith(".codes")}
    assert {kind_of(name.removesuffix(".codes")) for name in codes} == {
        kind for kind, stored in CODES.items() if stored != "f32"
    }
    kinds = [node.op_type for node in model.graph.node if node.domain == "com.microsoft"]
    layers = manifest.layer_range[1]
    assert kinds.count("QMoE") == layers - 1
    # qkv_a, q_b, wq_b, o of every layer; gate_up and down of the dense MLP and of shared experts; the head
    assert kinds.count("MatMulNBits") == 6 * layers + 1
    # whatever is still multiplied as f32 is of a kind that is listed so
    constants = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            assert kind_of(node.input[1].removesuffix(".transposed")) in {
                kind for kind, stored in CODES.items() if stored == "f32"
            }


def test_weights_that_are_named_are_stored_as_asked_in_blocks_as_asked(engines: dict[str, Path]) -> None:
    how = load_manifest(engines["mixed"]).quantization
    assert how is not None and how.precision == "int4" and how.block_size == 128
    expected = {"f32": None, "int8": 8, "int4": 4}
    # the last pattern that names a weight decides
    assert how.stored_in(0, "o_proj") == "f32" and how.stored_in(0, "q_b_proj") == "int8"
    assert how.stored_in(1, "experts") == "int8" and how.stored_in(1, "q_b_proj") == "int4"
    model = onnx.load(engines["mixed"] / "model.onnx", load_external_data=False)
    products = {
        node.input[1].removesuffix(".codes"): {a.name: a.i for a in node.attribute}
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }
    assert products["layers.0.self_attn.q_b_proj.weight"]["bits"] == 8
    assert products["layers.1.self_attn.q_b_proj.weight"]["bits"] == expected[how.stored_in(1, "q_b_proj")]
    assert {attributes["block_size"] for attributes in products.values()} == {128}
    assert not any("o_proj" in name or "lm_head" in name for name in products)
    moe = [{a.name: a.i for a in node.attribute} for node in model.graph.node if node.op_type == "QMoE"]
    assert moe and all(one["expert_weight_bits"] == 8 and one["block_size"] == 128 for one in moe)
    shown = CliRunner().invoke(inspect, [str(engines["mixed"])], env={"COLUMNS": "400"}).output
    assert "blocks of 128" in shown and "but f32 lm_head.weight" in shown


@pytest.mark.parametrize("tp", (2, 4))
def test_experts_of_all_ranks_add_up_to_what_one_rank_computes(tp: int) -> None:
    """With four ranks each has fewer experts than a token chooses, and some tokens choose none of a rank's."""
    num_experts, hidden, inner, top_k, tokens = 8, 64, 32, 3, 16
    rng = np.random.default_rng(5)
    tensors: dict[str, np.ndarray] = {}
    recipes: dict[str, Recipe] = {}
    for name, shape in (("w13", (2 * inner, hidden)), ("w2", (hidden, inner))):
        tensors |= {f"{name}.{e}": rng.standard_normal(shape).astype(np.float32) for e in range(num_experts)}
        recipes[name] = stack(take(f"{name}.{e}", shape, "f32") for e in range(num_experts))
        recipes[f"{name}_scale"] = stack(ones_table(1, 1) for _ in range(num_experts))
    how = Quantization(precision="int8", block_size=32, kinds={"experts": "int8"})
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    ids = np.array([rng.permutation(num_experts)[:top_k] for _ in range(tokens)], np.int32)
    weights = rng.random((tokens, top_k), np.float32)

    def routed(parallelism: Parallelism, rank: int, ids: np.ndarray) -> np.ndarray:
        kinds = {"x": TensorProto.FLOAT, "ids": TensorProto.INT32, "weights": TensorProto.FLOAT}
        names = [*kinds, *(f"experts.{name}" for name in recipes)]
        node = helper.make_node(MOE_EXPERTS.name, names, ["y"], domain=DOMAIN, act_quant="none")
        constants = {f"experts.{name}": split(one, 0, parallelism.ep_size) for name, one in recipes.items()}
        nodes = quantize_experts(node, top_k, how, constants)
        read = {name for node in nodes for name in node.input}
        source = GivenTensors(tensors)
        made = {
            name: np.ascontiguousarray(evaluate(for_rank(recipe, parallelism, rank), source))
            for name, recipe in constants.items()
            if name in read
        }
        graph = helper.make_graph(
            nodes,
            "experts",
            [helper.make_tensor_value_info(name, kind, ["T", None]) for name, kind in kinds.items()],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", hidden])],
            [numpy_helper.from_array(value, name) for name, value in made.items()],
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MS_DOMAIN, 1)]
        session = open_session(helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())
        return np.asarray(session.run(None, {"x": x, "ids": ids, "weights": weights})[0])

    whole = routed(Parallelism(), 0, ids)
    layout, parts = Parallelism(tp=tp, ep=True), []
    for rank in range(tp):
        here = evaluate(for_rank(expert_map(num_experts, layout), layout, rank), GivenTensors({}))[ids]
        parts.append(routed(layout, rank, here))
        assert not parts[-1][(here < 0).all(1)].any()
    np.testing.assert_allclose(sum(parts), whole, atol=1e-5 * whole.std(), rtol=0)
    assert tp < 4 or any((ids // 2 != rank).all(1).any() for rank in range(tp))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("o_prj=int8", "--set o_prj: is no key of the target and names no weight, .*did you mean o_proj"),
        ("precison=int8", "--set precison: is no key of the target and names no weight"),
        ("gate=int8", "--set gate: gate stays f32"),
        ("*.q_a_proj.weight=int8", r"names model\.layers\.0\.self_attn\.q_a_proj\.weight and not .*one matrix"),
        ("*.experts.0.*=int4", "one matrix of an engine; name all of it, such as experts"),
        ("*.experts.*.down_proj.weight=int4", "experts of a layer have one precision"),
    ],
)
def test_a_pattern_that_names_no_weight_is_refused(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(TargetError, match=message):
        build_cpu(tiny_programs["exact"], tmp_path / "engine", tiny_checkpoint, setting)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_no_whole_blocks_are_refused_before_work(tiny_config: ModelConfig) -> None:
    bindings = {"model": {"layers.0.self_attn.o_proj.weight": take("w", (128, 96), "f8e4m3")}}
    with pytest.raises(
        TargetError, match="rows of 96 values, which are no whole blocks of 64; pass --weight-block-size 32"
    ):
        choose(load_target("cpu", ["precision=int8", "weight_block_size=64"]), tiny_config, bindings)
    assert (
        choose(load_target("cpu", ["precision=int8", "o_proj=f32", "weight_block_size=64"]), tiny_config, bindings)
        is None
    )


def test_weights_shrink_to_what_codes_and_scales_take(engines: dict[str, Path], tiny_engines: dict[str, Path]) -> None:
    size = {name: (folder / "weights.bin").stat().st_size for name, folder in engines.items() if name != "mixed"}
    assert size["int4"] < size["int8"] < 0.4 * (tiny_engines["exact"] / "weights.bin").stat().st_size


@pytest.mark.parametrize("name", ("int8", "int4", "fp8", "mixed"))
def test_the_self_check_is_tight_and_passes_at_load(engines: dict[str, Path], name: str) -> None:
    check = load_manifest(engines[name]).self_check
    assert check is not None and len(check.prompt_ids) == 1
    # rounding of inputs included: without it PyTorch would differ by 1e-2 of the spread and more
    assert check.tolerance < 0.1 and "weights" in check.source
    with LLM(engines[name], num_blocks=8) as llm:  # compares, or refuses to start
        (output,) = llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 4


def test_a_scale_that_is_one_percent_off_is_noticed(
    bent_engine: None, tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="differs from PyTorch"):
        build_cpu(tiny_programs["exact"], tmp_path / "engine", tiny_checkpoint, "precision=int4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ("int8", "mixed"))
def test_updated_weights_are_quantized_again(engines: dict[str, Path], tiny_source: Checkpoint, engine: str) -> None:
    name = "model.layers.0.self_attn.q_b_proj.weight_scale_inv"
    names = [name.removesuffix("_scale_inv"), name]
    tensors = {key: np.asarray(tiny_source.tensor(key)).copy() for key in names}
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, logprobs=1)
    with LLM(engines[engine], num_blocks=8) as llm:
        before = llm.generate([[5, 6, 7]], params)[0].outputs[0].logprobs
        llm.update_weights(tensors)
        assert llm.generate([[5, 6, 7]], params)[0].outputs[0].logprobs == before
        llm.update_weights({**tensors, name: tensors[name] * np.float32(4)})
        assert llm.generate([[5, 6, 7]], params)[0].outputs[0].logprobs != before


def test_file_and_self_check_have_each_weight_quantized_once(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(weight: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        calls.append(weight.shape)
        return quantize_rows(weight, bits, block_size)

    monkeypatch.setattr(evaluation, "quantize_rows", counted)
    folder = build_cpu(tiny_programs["exact"], tmp_path / "engine", tiny_checkpoint, "precision=int4")

    def operands(recipe: Recipe) -> Iterator[str]:
        if recipe.op == "codes":
            yield json.dumps(recipe.parts[0].to_dict())
        for part in recipe.parts:
            yield from operands(part)

    bindings = load_bindings(folder)
    quantized = {one for recipes in bindings.values() for recipe in recipes.values() for one in operands(recipe)}
    assert len(calls) == len(quantized) > 20


def test_inspect_lists_what_is_stored_how(engines: dict[str, Path]) -> None:
    shown = CliRunner().invoke(inspect, [str(engines["int4"])], env={"COLUMNS": "400"}).output
    assert (
        "weights: int8 qkv_a_proj, lm_head, wq_b; int4 q_b_proj, o_proj, gate_up_proj, down_proj, experts; f32 gate"
        in shown
    )
    told = json.loads(CliRunner().invoke(inspect, [str(engines["int4"]), "--json"]).output)
    assert told["quantization"]["kinds"]["experts"] == "int4"


def test_only_a_cpu_has_such_weights_and_it_has_no_fp8() -> None:
    with pytest.raises(TargetError, match="precision fp8 is for GPUs; a CPU knows f32, int8, int4"):
        load_target("cpu", ["precision=fp8"])
    with pytest.raises(TargetError, match="precision bf16, fp8 or nvfp4"):
        load_target("h100", ["precision=int4"])


def test_a_manifest_that_names_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="int3"):
        Quantization.model_validate({"precision": "int4", "block_size": 32, "kinds": {"o_proj": "int3"}})
