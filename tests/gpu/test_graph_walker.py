"""The graph walker on a pretended GPU: whole steps of the tiny model through plugins, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tests.support import stand_in_trt
from tests.support.graph_walk import (
    KL,
    LAYER_DIFF,
    KvFormat,
    Walk,
    WrongNode,
    judge_node,
    kernel_ops,
    same_outputs,
)
from tests.support.graph_walker import CapturedStep, HostPlace, plugin_module
from tests.support.host_device import write_host_kernels
from tests.support.made_once import made_once
from tests.support.standard_ops import OPERATORS, run_standard

from seekforge.common.errors import EngineError, ProgramError
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.program.export import export
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parity_steps import shuffled_tables
from seekforge.formats.program import load_program
from seekforge.formats.quantization import nvfp4
from seekforge.formats.step_io import StepInputs, lay_out
from seekforge.formats.weight_recipes import TensorSource
from seekforge.plugins.kernels.launcher import OpLauncher
from seekforge.plugins.testing import calc_diff, run_model

#: One dense layer and one with experts.
NUM_LAYERS = 2
#: Smaller than the tiny preset in what costs the interpreter most: the products.
SMALL = {"hidden_size": 256, "intermediate_size": 256, "q_lora_rank": 128, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 4, "num_hidden_layers": NUM_LAYERS, "num_nextn_predict_layers": 0}
#: Tokens of the two sequences before the walk begins: one sees more keys than `index_topk` takes, one fewer.
PAST = (70, 5)


#: Takes the name of a folder and what fills it; returns the folder, made once.
Once = Callable[[str, Callable[[Path], None]], Path]


class Rig:
    """Opens walks over programs of a small checkpoint, which are exported once for all workers."""

    def __init__(self, checkpoint: Path, once: Once, stack: ExitStack) -> None:
        self.checkpoint, self.once = checkpoint, once
        self.source = stack.enter_context(Checkpoint.open(checkpoint))
        self.tables, self.num_blocks = shuffled_tables([past + 12 for past in PAST], np.random.default_rng(1))

    def program(self, numerics: str, num_layers: int) -> Path:
        def make(root: Path) -> None:
            export(self.checkpoint, root / "program", numerics=NUMERICS[numerics], num_layers=num_layers)

        return self.once(f"{numerics}-{num_layers}", make) / "program"

    def walk(
        self,
        numerics: str,
        kv_format: KvFormat,
        sm: int,
        *,
        trt: Any = None,
        num_layers: int = NUM_LAYERS,
        nvfp4_from: TensorSource | None = None,
    ) -> Walk:
        """Open a walk; with experts in NVFP4 that are made of the weights of `nvfp4_from`, which PyTorch reads too."""
        program, nvfp4 = self.program(numerics, num_layers), nvfp4_from is not None

        def make(root: Path) -> None:
            write_host_kernels(root, kernel_ops(load_program(program), kv_format, nvfp4_experts=nvfp4), sm)

        engine = self.once(f"kernels-{numerics}-{num_layers}-{kv_format}-{sm}{'-nvfp4' if nvfp4 else ''}", make)
        return Walk(
            self.source if nvfp4_from is None else nvfp4_from,
            program,
            engine,
            HostPlace(sm),
            kv_format=kv_format,
            num_blocks=self.num_blocks,
            nvfp4_experts=nvfp4,
            trt=trt,
        )

    def with_past(self, walk: Walk) -> Walk:
        """Let PyTorch prefill both sequences, and give the walker its caches."""
        walk.session.run(self.step(PAST, (0, 0), seed=9))
        walk.take_caches()
        return walk

    def step(self, new: Sequence[int], starts: Sequence[int], *, seed: int = 0) -> StepInputs:
        draw = np.random.default_rng(seed)
        return lay_out([draw.integers(16, 900, n).tolist() for n in new], starts, self.tables)


@contextmanager
def small_rig(preset: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    raw = load_preset(preset).config_json | SMALL

    def once(name: str, make: Callable[[Path], None]) -> Path:
        return made_once(tmp_path_factory, f"walks-{preset}-{name}", make)

    def make_checkpoint(root: Path) -> None:
        new_checkpoint(root / "small", Preset("small", 1, raw, ModelConfig.parse(raw, "small")))

    with ExitStack() as stack:
        yield Rig(once("checkpoint", make_checkpoint) / "small", once, stack)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory):
    with small_rig("tiny", tmp_path_factory) as found:
        yield found


def test_prefill_then_decode_without_fp8_rounding_meets_the_gates_of_two_runs(rig: Rig) -> None:
    walk = rig.walk("exact", "bf16", 90)
    for step in (rig.step((3, 2), (0, 0)), rig.step((1, 1), (3, 2), seed=1)):
        noise = walk.noise(step, 3)
        found = walk.step(step)
        assert found.hidden <= LAYER_DIFF * NUM_LAYERS and found.kl <= KL
        assert found.keys == found.experts == 0
        assert found.within(noise, NUM_LAYERS), (found, noise)


def test_dense_attention_prefills_and_decodes_through_its_plugin(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Over 70 and 5 cached tokens: parts of the longer row, and a combination of them."""
    with small_rig("tiny-v3", tmp_path_factory) as rig:
        walk = rig.with_past(rig.walk("exact", "bf16", 90, num_layers=1))
        step = rig.step((2, 1), PAST)
        noise = walk.noise(step, 3)
        found = walk.step(step)
        assert found.hidden <= LAYER_DIFF and found.kl <= KL
        assert found.within(noise, 1), (found, noise)
        entries = {entry for entry, _ in walk.place.driver.launches}
    assert {"attend_kernel", "combine_kernel", "latent_write_kernel"} <= entries


def test_fp8_caches_and_products_are_as_near_as_pytorch_is_to_itself(rig: Rig) -> None:
    walk = rig.with_past(rig.walk("fp8", "fp8_ds", 90))
    step = rig.step((2, 2), PAST)
    noise = walk.noise(step)
    found = walk.step(step)
    assert found.within(noise, NUM_LAYERS), (found, noise)
    entries = {entry for entry, _ in walk.place.driver.launches}
    assert {"norm_kernel", "cache_write_kernel", "scores_kernel", "attend_kernel", "route_kernel"} <= entries
    assert "narrow_up_kernel" in entries and "place_kernel" not in entries


def test_sm80_reads_int8_bytes_through_the_stand_in_module(rig: Rig) -> None:
    walk = rig.with_past(rig.walk("fp8", "fp8_ds", 80, trt=stand_in_trt))
    assert walk.walker.module == "tests.support.stand_in_trt"
    assert walk.walker.weights["layers.0.self_attn.o_proj.weight"].dtype == torch.int8
    step = rig.step((1, 1), PAST)
    noise = walk.noise(step)
    found = walk.step(step)
    assert found.within(noise, NUM_LAYERS), (found, noise)


class ExpertsThatNvfp4Holds:
    """A checkpoint whose experts are e2m1 values times one scale for each 16 along K, all of them e4m3 values too."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source

    def tensor(self, name: str) -> np.ndarray:
        stored = self.source.tensor(name)
        if ".experts." not in name or not name.endswith(".weight"):
            return stored
        blocks = stored.astype(np.float32).reshape(-1, nvfp4.BLOCK)
        scales = np.exp2(np.clip(np.ceil(np.log2(np.abs(blocks).max(-1, keepdims=True) / 6)), -6, 6))
        values = nvfp4.e2m1(blocks / scales).view(ml_dtypes.float4_e2m1fn).astype(np.float32) * scales
        return values.reshape(stored.shape).astype(stored.dtype)


@pytest.mark.parametrize("sm", [100, 120])
def test_experts_in_nvfp4_are_as_near_as_pytorch_is_to_itself(rig: Rig, sm: int) -> None:
    """What NVFP4 holds it holds exactly, so PyTorch with the same values says what the whole step must give."""
    walk = rig.with_past(rig.walk("fp8", "fp8_ds", sm, nvfp4_from=ExpertsThatNvfp4Holds(rig.source)))
    weights = walk.walker.weights
    assert weights["layers.1.mlp.experts.w13"].shape[-1] == nvfp4.row_bytes(SMALL["hidden_size"])
    step = rig.step((2, 2), PAST)
    noise = walk.noise(step)
    found = walk.step(step)
    assert found.within(noise, NUM_LAYERS), (found, noise)


def test_what_nvfp4_takes_off_experts_is_noticed_and_each_node_is_right_by_its_own_inputs(rig: Rig) -> None:
    """Without FP8 rounding, whose flips are larger than that in so small a model."""
    walk = rig.walk("exact", "bf16", 100, nvfp4_from=rig.source)
    step = rig.step((3, 2), (0, 0))
    noise = walk.noise(step, 3)
    found = walk.step(step)
    assert not found.within(noise, NUM_LAYERS), (found, noise)


def test_a_captured_step_gives_the_bytes_of_an_eager_one_and_a_bent_weight_is_noticed(rig: Rig) -> None:
    walk = rig.with_past(rig.walk("exact", "bf16", 90, num_layers=1))
    first, second = rig.step((1, 1), PAST), rig.step((1, 1), PAST, seed=5)
    before = {name: cache.clone() for name, cache in walk.caches.items()}
    inputs = walk.inputs(first)
    captured = CapturedStep(walk.walker, inputs, list(walk.caches))
    eager = walk.walker.run(walk.inputs(second))
    results = {name: one.clone() for name, one in eager.items()}
    for name, cache in walk.caches.items():
        cache.copy_(before[name])
    replayed = captured.run(walk.inputs(second))
    assert replayed["latent_cache_out.0"] is walk.caches["latent_cache.0"], "updated in place"
    assert same_outputs(replayed, results, walk.walker.outputs) == []
    assert same_outputs(before, walk.caches, list(before)) == list(before), "the step wrote both caches"

    noise = walk.noise(second, 3)
    expected = walk.session.run(second)
    assert walk.compare(second, replayed, expected).within(noise, 1)
    walk.walker.weights["layers.0.self_attn.w_uv"] = walk.walker.weights["layers.0.self_attn.w_uv"].flip(0)
    bent = walk.compare(second, walk.walker.run(walk.inputs(second)), expected)
    assert not bent.within(noise, 1), (bent, noise)


def test_a_node_that_is_wrong_by_its_own_inputs_is_named(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = rig.walk("exact", "bf16", 90, num_layers=1)
    enqueue = OpLauncher.enqueue

    def skips_the_sum(self: OpLauncher, *args: Any) -> None:
        enqueue(self, *args)
        if self.kernels.op == "BlockFp8Linear":
            self._calls = {key: type(one)(one.launches[:-1], one.arguments) for key, one in self._calls.items()}

    monkeypatch.setattr(OpLauncher, "enqueue", skips_the_sum)
    step = rig.step((1, 1), (0, 0))
    with pytest.raises(WrongNode, match=r"layers\.0\S*proj\S*: diff"):
        for _ in range(2):
            walk.walker.run(walk.inputs(step), judge_node)


def test_kernels_of_another_digest_are_refused(rig: Rig, tmp_path: Path) -> None:
    engine = tmp_path / "empty"
    (engine / "kernels").mkdir(parents=True)
    with pytest.raises(EngineError, match="built without compiled kernels"):
        Walk(rig.source, rig.program("exact", 1), engine, HostPlace(), kv_format="bf16", num_blocks=rig.num_blocks)


def test_inputs_that_are_missing_are_named(rig: Rig) -> None:
    walk = rig.walk("exact", "bf16", 90, num_layers=1)
    with pytest.raises(ProgramError, match="the first is input_ids"):
        walk.walker.run(walk.caches)


def test_tensorrt_rtx_gives_the_plugin_classes_where_it_is_installed() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert plugin_module().__name__ == "tensorrt_rtx"


@pytest.mark.slow
@pytest.mark.parametrize(("sm", "kv_format"), [(80, "fp8_ds"), (90, "fp8_ds"), (90, "bf16"), (120, "fp8_ds")])
def test_the_whole_tiny_model_prefills_and_decodes(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, sm: int, kv_format: KvFormat
) -> None:
    """All four layers, and a prompt that is longer than `index_topk`."""

    def once(name: str, make: Callable[[Path], None]) -> Path:
        return made_once(tmp_path_factory, f"whole-walks-{name}", make)

    stack = ExitStack()
    rig = Rig(tiny_checkpoint, once, stack)
    walk = rig.walk("fp8", kv_format, sm, num_layers=4)
    for step in (rig.step((70, 9), (0, 0)), rig.step((1, 1), (70, 9), seed=1), rig.step((3, 2), (71, 10), seed=2)):
        noise = walk.noise(step)
        found = walk.step(step)
        assert found.within(noise, 4), (found, noise)
    stack.close()


# --- standard operators -----------------------------------------------------------------------------------------


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
#: op_type, inputs, attributes: every operator that the walker knows, in the forms that programs use.
STANDARD: list[tuple[str, list[torch.Tensor], dict[str, Any]]] = [
    ("Add", [X, X[:, :1]], {}),
    ("Cast", [X], {"to": TensorProto.INT64}),
    ("Clip", [X, torch.tensor(-0.5), torch.tensor(0.5)], {}),
    ("Clip", [ints(-3, 4), torch.tensor(0)], {}),
    ("Concat", [X, X + 1], {"axis": 1}),
    ("Exp", [X], {}),
    ("Gather", [X, torch.tensor([[2, 0], [1, 1]])], {"axis": 0}),
    ("Gather", [X, torch.tensor([3, 0])], {"axis": 1}),
    ("LayerNormalization", [X, X[0, 0], X[0, 1]], {"axis": -1, "epsilon": 1e-6, "stash_type": 1}),
    ("Log", [X.abs() + 1], {}),
    ("MatMul", [X, X[0].T.contiguous()], {}),
    ("Mul", [X, X[:, :1]], {}),
    ("RMSNormalization", [X, X[0, 0]], {"axis": -1, "epsilon": 1e-6, "stash_type": 1}),
    ("RotaryEmbedding", [X, X[..., :1], X[..., 1:2]], {"num_heads": 2, "rotary_embedding_dim": 2}),
    ("RotaryEmbedding", [X, X[..., :3], X[..., 3:]], {"num_heads": 1, "rotary_embedding_dim": 6, "interleaved": 1}),
    ("ReduceSum", [X, ints(-1)], {"keepdims": 1, "noop_with_empty_axes": 0}),
    ("ReduceSum", [X, ints(0, 2)], {"keepdims": 0}),
    ("Reshape", [X, ints(4, -1, 2)], {"allowzero": 1}),
    ("Reshape", [X, ints(0, 24)], {"allowzero": 0}),
    ("Shape", [X], {"start": 1, "end": 2}),
    ("Shape", [X], {}),
    ("Sigmoid", [X], {}),
    ("Slice", [X, ints(1), ints(2**62), ints(2)], {}),
    ("Slice", [X, ints(0, -2), ints(2, 100), ints(-1, 0), ints(2, 1)], {}),
    ("Split", [X, ints(1, 2, 3)], {"axis": 2}),
    ("Split", [X], {"axis": 2, "num_outputs": 2}),
    ("Squeeze", [X[:, :1], ints(1)], {}),
    ("Sub", [X, X[:, :1]], {}),
    ("TopK", [X, ints(3)], {"axis": -1, "largest": 1, "sorted": 1}),
    ("Transpose", [X], {"perm": [2, 0, 1]}),
    ("Unsqueeze", [X, ints(0, -1)], {}),
]


def test_every_standard_operator_is_tried() -> None:
    assert {op for op, _, _ in STANDARD} == set(OPERATORS)


@pytest.mark.parametrize(("op", "inputs", "attrs"), STANDARD, ids=[f"{i}-{one[0]}" for i, one in enumerate(STANDARD)])
def test_standard_operators_do_what_onnx_runtime_does(
    op: str, inputs: list[torch.Tensor], attrs: dict[str, Any]
) -> None:
    found = run_standard(op, inputs, attrs)
    types = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}
    inputs = [one.contiguous() for one in inputs]
    given = {f"x{i}": one for i, one in enumerate(inputs)}
    results = {f"y{i}": torch.empty(one.shape, dtype=one.dtype) for i, one in enumerate(found)}
    graph = helper.make_graph(
        [helper.make_node(op, list(given), list(results), **attrs)],
        "one",
        [helper.make_tensor_value_info(name, types[one.dtype], list(one.shape)) for name, one in given.items()],
        [helper.make_tensor_value_info(name, types[one.dtype], list(one.shape)) for name, one in results.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model)
    run_model(model, given, results)
    for ours, theirs in zip(found, results.values(), strict=True):
        assert ours.shape == theirs.shape and calc_diff(ours, theirs) < 1e-10


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(ProgramError, match="no standard operator NonZero"):
        run_standard("NonZero", [X], {})
