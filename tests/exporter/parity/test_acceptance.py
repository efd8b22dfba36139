"""Faults that users meet, each planted in an engine, and what the check says about it.

And what must not be called a fault: two correct engines that sum in another order.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.support.in_process import dump_in_process
from tests.support.kept_traces import trace_anew
from tests.support.made_once import made_once
from tests.support.parity_faults import (
    bent_engine,
    build_engine,
    edited_checkpoint,
    scaled,
    small_model,
    split_products,
)

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.onnxruntime.build import build
from seekforge.exporter.models.deepseek_v32.attention import Attention
from seekforge.exporter.models.shared.layers import rope_interleaved
from seekforge.exporter.models.shared.model import StepModel
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.parity.check import Result, check_engine
from seekforge.exporter.parity.compare.operations import LocalJudge
from seekforge.exporter.parity.engine_copy import available_taps, tapped_copy
from seekforge.exporter.parity.gates import first_divergence
from seekforge.exporter.parity.sides.engine import EngineSide
from seekforge.exporter.parity.sides.torch_reference import Reference
from seekforge.exporter.parity.torch_walks import Walker
from seekforge.exporter.program import trace as tracing
from seekforge.exporter.program.export import export
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.dump import Dump
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.numerics import EXACT, FP8, NUMERICS
from seekforge.formats.parity_steps import make_plan
from seekforge.formats.targets import load_target
from seekforge.runtime.dump import write_dump
from seekforge.runtime.engine.engine_folder import Engine

MAX_THREADS = 1


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Small tensors: more threads only disturb others."""
    before = torch.get_num_threads()
    torch.set_num_threads(MAX_THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _engines_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """That engines run in processes of their own is for `test_cli.py`, and the fixture `shown`."""
    dump_in_process(monkeypatch)


def plan_of(config: ModelConfig, contexts: tuple[int, ...], *modes: Any) -> Any:
    return make_plan(
        contexts=contexts, vocab_size=config.vocab_size, index_topk=config.index_topk, has_mtp=False, modes=modes
    )


def check(engine: Path, checkpoint: Path, work: Path, plan: Any, **options: Any) -> Result:
    """Compare an engine with PyTorch on the weights of `checkpoint`."""
    work.mkdir(parents=True, exist_ok=True)
    side = EngineSide(engine, work, threads=MAX_THREADS)
    config = ModelConfig.load(checkpoint)
    settings = Settings(config, NUMERICS[side.manifest.numerics["name"]], "f32")
    with Checkpoint.open(checkpoint) as source:
        return check_engine(side, Walker(settings, source, "checkpoint"), plan, work=work, **options)


def gate(result: Result, name: str) -> bool:
    return next(gate.passed for gate in result.gates if gate.name == name)


# --- one weight of layer 5 of 8 is off by 1 % ------------------------------------------------------------------

O_PROJ = "model.layers.5.self_attn.o_proj.weight_scale_inv"


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An 8-layer model: its checkpoint, and an engine of a copy in which o_proj of layer 5 is 1 % too large."""

    def make(root: Path) -> None:
        checkpoint = small_model(root / "checkpoint", num_hidden_layers=8, num_nextn_predict_layers=0)
        export(checkpoint, root / "program", numerics=EXACT)
        broken = edited_checkpoint(checkpoint, root / "broken", {O_PROJ: scaled(1.01)})
        build_engine(root / "program", broken, root / "engine")

    root = made_once(tmp_path_factory, "eight", make)
    return {name: root / name for name in ("checkpoint", "broken", "engine", "program")}


def test_a_weight_off_by_one_percent_is_traced_to_its_layer_and_module(eight: dict[str, Path], tmp_path: Path) -> None:
    config = ModelConfig.load(eight["checkpoint"])
    result = check(eight["engine"], eight["checkpoint"], tmp_path / "w", plan_of(config, (40,), "whole"))
    assert not result.passed and not gate(result, "operations")
    finding = result.finding
    assert finding is not None and finding.layer == 5 and finding.module == "self_attn.o_proj"
    assert O_PROJ in finding.tensors and finding.others == 0  # what follows from it is not blamed
    error = next(r.error for r in result.records if r.failed)
    assert 0.005 < error < 0.1  # 1 % of the largest values
    # the engine's layers on PyTorch's inputs say the same: layer 5 alone, from o_proj's output on
    assert not gate(result, "the engine's layers")
    assert [(one.layer, one.point) for one in result.fed if one.bad] == [(5, "attn_out")]
    assert len(result.fed) == 9 and result.num_engine_runs == 3
    # yet the next token hardly changes: nobody would have seen it in the text
    assert gate(result, "top-1")


def test_it_is_found_in_log_layers_runs_when_taps_do_not_fit(eight: dict[str, Path], tmp_path: Path) -> None:
    config = ModelConfig.load(eight["checkpoint"])
    result = check(
        eight["engine"], eight["checkpoint"], tmp_path / "w", plan_of(config, (24,), "whole"), max_dump_bytes=0
    )
    finding = result.finding
    assert finding is not None and (finding.layer, finding.module) == (5, "self_attn.o_proj")
    # one whole run, the probes, the inside of layer 5 on its own inputs, and on PyTorch's
    assert result.num_engine_runs <= 1 + (1 + math.log2(8)) + 1 + 1
    assert any("bisection" in note for note in result.notes)
    layers = {record.layer for record in result.records}
    assert layers == {5}, "the inside of one layer only was looked at"
    assert [(one.layer, one.bad, one.point) for one in result.fed] == [(5, True, "attn_out")]
    held = sorted(path.name for path in (tmp_path / "w").iterdir() if not path.name.startswith("noise."))
    assert held == ["judged", "noise", "plan.json", "reference"]
    reference = Dump.open(tmp_path / "w" / "reference")
    assert reference.names(0) == ["hidden_states.0", "hidden_states.8", "residual.8", "hidden", "logits"], (
        "nothing of inner layers is kept"
    )


@pytest.fixture(scope="module")
def shown(eight: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Dump:
    """What the engine of the broken copy computes; compared with that copy it is right."""
    root = tmp_path_factory.mktemp("shown")
    engine = EngineSide(eight["engine"], root, threads=MAX_THREADS)
    config = ModelConfig.load(eight["checkpoint"])
    taps = [tap for tap in engine.taps if tap.endswith((".5", ".6"))]
    return engine.dump(plan_of(config, (80,), "whole"), root / "dump", taps)


@pytest.mark.parametrize(
    ("tensor", "index", "module"),
    [
        ("input_layernorm.weight", (7,), "input_layernorm"),
        ("self_attn.q_a_proj.weight_scale_inv", (0, 1), "self_attn.q_a_proj"),
        ("self_attn.indexer.wk.weight_scale_inv", (0, 3), "self_attn.indexer.wk"),
        ("self_attn.kv_a_proj_with_mqa.weight_scale_inv", (1, 0), "self_attn.kv_a_proj_with_mqa"),
        ("self_attn.q_a_layernorm.weight", (9,), "self_attn.q_a_layernorm"),
        ("self_attn.q_b_proj.weight_scale_inv", (3, 1), "self_attn.q_b_proj"),
        ("self_attn.kv_b_proj.weight_scale_inv", (0, 0), "self_attn.kv_b_proj (keys)"),
        ("self_attn.kv_a_layernorm.weight", (100,), "self_attn.kv_a_layernorm"),
        ("self_attn.indexer.k_norm.bias", (5,), "self_attn.indexer.k_norm"),
        ("self_attn.indexer.wq_b.weight_scale_inv", (15, 0), "self_attn.indexer.wq_b"),
        ("self_attn.indexer.weights_proj.weight", (3, 17), "self_attn.indexer.weights_proj"),
        ("post_attention_layernorm.weight", (500,), "post_attention_layernorm"),
        ("mlp.gate.weight", (11, 200), "mlp.gate"),
        ("mlp.experts.3.down_proj.weight_scale_inv", (2, 0), "mlp.experts"),
        ("mlp.shared_experts.up_proj.weight_scale_inv", (0, 2), "mlp.shared_experts.up_proj"),
        ("mlp.shared_experts.down_proj.weight_scale_inv", (3, 0), "mlp.shared_experts.down_proj"),
    ],
)
def test_one_value_of_any_tensor_is_traced_to_its_module(
    eight: dict[str, Path], shown: Dump, tmp_path: Path, tensor: str, index: tuple[int, ...], module: str
) -> None:
    """One element of a bf16 or f32 tensor, one scale of an FP8 block: 1 % on PyTorch's side, the engine is right."""
    name = f"model.layers.5.{tensor}"
    checkpoint = edited_checkpoint(eight["broken"], tmp_path / "edited", {name: scaled(1.01, *index)})
    judge = LocalJudge(shown, EXACT, "f32")
    with Checkpoint.open(checkpoint) as source:
        settings = Settings(ModelConfig.load(checkpoint), EXACT, "f32")
        Reference(settings, source, shown.plan, subject=shown, judge=judge).run((5, 6))
    finding = first_divergence(judge.finish())
    assert finding is not None and (finding.layer, finding.module) == (5, module), finding
    assert name in finding.tensors
    # kv_b_proj holds keys and values in one block of scales at these sizes: both of its halves are off
    assert finding.others == (1 if "kv_b_proj" in tensor else 0), finding


def test_the_right_checkpoint_has_no_finding(eight: dict[str, Path], shown: Dump) -> None:
    judge = LocalJudge(shown, EXACT, "f32")
    with Checkpoint.open(eight["broken"]) as source:
        settings = Settings(ModelConfig.load(eight["broken"]), EXACT, "f32")
        Reference(settings, source, shown.plan, subject=shown, judge=judge).run((5, 6))
    records = judge.finish()
    assert first_divergence(records) is None and len(records) > 25


@pytest.mark.slow
def test_fp8_engines_are_traced_as_strictly(eight: dict[str, Path], tmp_path: Path) -> None:
    """With e4m3 roundings whole runs drift apart by themselves; operations given the same inputs do not."""
    block = {O_PROJ: scaled(1.01, 2, 3)}
    broken = edited_checkpoint(eight["checkpoint"], tmp_path / "broken", block)
    export(eight["checkpoint"], tmp_path / "program", numerics=FP8)
    engine = build_engine(tmp_path / "program", broken, tmp_path / "engine")
    config = ModelConfig.load(eight["checkpoint"])
    result = check(engine, eight["checkpoint"], tmp_path / "w", plan_of(config, (100,), "whole", "decode"))
    finding = result.finding
    assert finding is not None and (finding.layer, finding.module, finding.others) == (5, "self_attn.o_proj", 0)
    assert gate(result, "logits"), "the whole model alone would not have shown it"


# --- the engine's layers on PyTorch's inputs -------------------------------------------------------------------


def test_layers_behind_one_that_gives_nan_are_judged_all_the_same(eight: dict[str, Path], tmp_path: Path) -> None:
    """Nothing behind NaN can be judged on the engine's own values; on PyTorch's, a second fault is found."""
    damage = {"mlp_norm.2": np.ones(512, np.float32), "mlp_norm.6": np.ones(512, np.float32)}
    damage["mlp_norm.2"][3], damage["mlp_norm.6"][7] = np.nan, 1.05
    engine = bent_engine(eight["engine"], tmp_path / "engine", damage)
    config = ModelConfig.load(eight["checkpoint"])
    result = check(engine, eight["broken"], tmp_path / "w", plan_of(config, (24,), "whole"))
    finding = result.finding
    assert finding is not None and (finding.layer, finding.module) == (2, "post_attention_layernorm")
    assert not gate(result, "finite")
    assert {one.layer for one in result.fed if one.bad} == {2, 6}
    failed = {record.layer for record in result.records if record.failed}
    assert failed >= {2, 3, 4, 5, 6, 7}, "on the engine's own values everything behind it is off"


def test_a_cut_engine_gives_the_bits_of_the_whole_one(
    tiny_engines: dict[str, Path], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """Fed with what the engine itself had, every layer gives what it gave, whichever layers are cut out."""
    engine = EngineSide(tiny_engines["fp8"], tmp_path, threads=MAX_THREADS)
    plan = make_plan(
        contexts=(80,), vocab_size=tiny_config.vocab_size, index_topk=tiny_config.index_topk, has_mtp=True,
        modes=("chunked", "mtp"),
    )  # fmt: skip
    whole = engine.dump(plan, tmp_path / "whole", engine.taps)
    for layers, num_mtp in (((0, 4), 4), ((1, 3), 0), ((3, 4), 4)):
        taps = [f"o_latent.{layer}" for layer in range(*layers)]
        fed = engine.dump_fed(whole, tmp_path / "fed", layers, taps)
        assert fed.side.layers == layers
        names = [(step, name) for step in range(len(fed.cases)) for name in fed.names(step)]
        # caches are shown at a case's last step, and layers before the last run no MTP steps
        shared = [one for one in names if whole.has(*one)]
        assert len(shared) >= len(names) - 4 and all(np.array_equal(fed.tensor(*o), whole.tensor(*o)) for o in shared)
        assert {name for _, name in names} >= {*taps, f"residual.{layers[1]}", f"cache_latent.{layers[0]}"}
        mtp = [n for n, (_, step) in enumerate(fed.cases) if step.graph == "mtp" and fed.has(n, "logits")]
        assert len(mtp) == num_mtp


# --- the indexer's RoPE layout swapped in one layer ------------------------------------------------------------


def test_a_swapped_rope_layout_is_named_as_the_indexer_of_its_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = small_model(tmp_path / "checkpoint", num_hidden_layers=3, num_nextn_predict_layers=0)
    bent_layer, plain_init = 1, StepModel.__init__

    def bent_rotate(self: Any, x: torch.Tensor, step: Any, num_heads: int | None = None) -> torch.Tensor:
        x = rope_interleaved(x, step.cos, step.sin, num_heads or 1)
        return x if num_heads is None else x.unflatten(-1, (num_heads, -1))

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        if str(bent_layer) in self.layers:
            indexer = self.layers[str(bent_layer)].self_attn.indexer
            indexer.rotate = bent_rotate.__get__(indexer)

    with monkeypatch.context() as patch:
        trace_anew(patch)
        patch.setattr(StepModel, "__init__", init)
        patch.setattr(tracing, "groups_to_trace", lambda config, layer_range: tuple((i,) for i in range(*layer_range)))
        # the engine is right by its own model: the self-check at build compares it with the bent one
        export(checkpoint, tmp_path / "program", numerics=EXACT)
        engine = build_engine(tmp_path / "program", checkpoint, tmp_path / "engine")
    assert Attention.index_rope is not rope_interleaved
    config = ModelConfig.load(checkpoint)

    def first(result: Result) -> tuple[int, str]:
        assert result.finding is not None and not result.passed
        return result.finding.layer, result.finding.module

    # up to index_topk every key is chosen: no logit tells, and yet the indexer is named
    short = check(engine, checkpoint, tmp_path / "short", plan_of(config, (config.index_topk,), "whole"))
    assert gate(short, "logits") and gate(short, "KL") and not gate(short, "operations")
    assert first(short) == (bent_layer, "self_attn.indexer (rotation of keys)")
    long = check(engine, checkpoint, tmp_path / "long", plan_of(config, (140,), "whole"))
    assert not gate(long, "rows that chose otherwise")
    error, topk = long.comparison.cases[0].error, config.index_topk
    assert error[:topk].max() < 1e-4 and np.median(error[topk:]) > 1e-3
    assert first(long) == (bent_layer, "self_attn.indexer (rotation of keys)")
    failed = {(record.layer, record.module) for record in long.records if record.failed}
    assert failed == {
        (bent_layer, "self_attn.indexer (rotation of keys)"),
        (bent_layer, "self_attn.indexer (rotation of queries)"),
    }
    # the layers before choose the same keys, this one other ones, with gaps far beyond noise
    keys = {layer.layer: layer.keys for layer in long.comparison.layers}
    assert keys[0].other == 0 and keys[bent_layer].other > 0.8 * (140 - config.index_topk)
    assert keys[bent_layer].kinds["wrong"] > 100 and keys[bent_layer].overlap < 0.9 * keys[bent_layer].rows


# --- a router bias in BF16 ------------------------------------------------------------------------------------


def test_a_router_bias_in_bf16_shows_as_expert_flips_with_their_gaps(
    tiny_checkpoint: Path, tiny_programs: dict[str, Path], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    layer = 2
    name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
    rounded = edited_checkpoint(
        tiny_checkpoint, tmp_path / "rounded", {name: lambda bias: bias.astype(ml_dtypes.bfloat16).astype(np.float32)}
    )
    engine = build_engine(tiny_programs["exact"], rounded, tmp_path / "engine")
    result = check(engine, tiny_checkpoint, tmp_path / "w", plan_of(tiny_config, (1200,), "whole"))
    assert not result.passed and not gate(result, "choices") and gate(result, "operations")
    finding = result.finding
    assert finding is not None and (finding.layer, finding.module) == (layer, "mlp.gate (selection)")
    assert finding.tensors == (name,) and "gap" in finding.text
    record = next(r for r in result.records if r.failed)
    with Checkpoint.open(tiny_checkpoint) as source, Checkpoint.open(rounded) as other:
        moved = float(np.abs(source.tensor(name) - other.tensor(name)).max())
    assert record.num_flips["wrong"] >= 2 and record.num_flips["tie"] == 0
    # a flip needs a gap no wider than what the rounding moved: of two experts, or of two groups of two each
    assert all(0 < flip.gap <= 4 * moved for flip in record.flips)
    experts = result.comparison.layers[layer].experts
    assert experts is not None and experts.other >= 1 and experts.kinds["wrong"] >= 2


# --- a damaged cache block ------------------------------------------------------------------------------------


class DamagingBackend:
    """Overwrites one block of one cache before a given run, as a stray write would."""

    def __init__(self, backend: Any, cache: str, block: int, before_run: int) -> None:
        self._backend, self._cache, self._block, self._left = backend, cache, block, before_run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self._left == 0:
            value = self._backend._graphs["model"].caches[self._cache]
            changed = value.numpy().copy()
            changed[self._block * 64 : (self._block + 1) * 64] += 0.5
            value.update_inplace(changed)
        self._left -= 1
        return self._backend.run(*args, **kwargs)


@pytest.mark.parametrize(("numerics", "kind"), [("exact", "latent"), ("fp8", "latent"), ("exact", "index")])
def test_a_damaged_cache_block_shows_at_its_position(
    tiny_checkpoint: Path,
    tiny_engines: dict[str, Path],
    tiny_config: ModelConfig,
    tmp_path: Path,
    numerics: str,
    kind: str,
) -> None:
    layer = 1
    engine = Engine.open(tapped_copy(tiny_engines[numerics], tmp_path / "e", available_taps(tiny_engines[numerics])))
    plan = plan_of(tiny_config, (170,), "decode")
    case = plan.cases[0]
    block = case.tables[0][1]  # holds positions 64-127
    backend = engine.open_backend(threads=MAX_THREADS)
    (tmp_path / "dump").mkdir()
    damaging = DamagingBackend(backend, f"{kind}_cache.{layer}", block, before_run=4)
    write_dump(damaging, engine.manifest, plan, tmp_path / "dump", name="engine")  # pyright: ignore
    dump = Dump.open(tmp_path / "dump")
    judge = LocalJudge(dump, NUMERICS[numerics], "f32")
    with Checkpoint.open(tiny_checkpoint) as source:
        settings = Settings(tiny_config, NUMERICS[numerics], "f32")
        Reference(settings, source, plan, subject=dump, judge=judge).run()
    records = judge.finish()
    finding = first_divergence(records)
    assert finding is not None and (finding.layer, finding.module) == (layer, f"self_attn ({kind} cache)"), finding
    assert f"block {block}: positions 64-127 of sequence 0 (64 tokens)" in finding.text
    failed = {(record.layer, record.module) for record in records if record.failed}
    reader = "self_attn (sparse attention)" if kind == "latent" else "self_attn.indexer (selection)"
    assert failed <= {(layer, f"self_attn ({kind} cache)"), (layer, reader)}


# --- two correct engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", ("exact", "fp8"))
def test_a_correct_engine_that_sums_in_another_order_passes(
    tiny_checkpoint: Path, tiny_engines: dict[str, Path], tiny_config: ModelConfig, tmp_path: Path, numerics: str
) -> None:
    other = split_products(tiny_engines[numerics], tmp_path / "other")
    plan = plan_of(tiny_config, (20, 90), "whole", "chunked")
    result = check(other, tiny_checkpoint, tmp_path / "w", plan)
    assert result.passed, [gate for gate in result.gates if not gate.passed]
    assert result.finding is None and load_manifest(other).numerics["name"] == numerics
    # and it does sum in another order than the first
    work = tmp_path / "first"
    work.mkdir()
    first = EngineSide(tiny_engines[numerics], work, threads=MAX_THREADS).dump(plan, work / "dump", [])
    same = Dump.open(tmp_path / "w" / "judged")
    assert not np.array_equal(first.tensor(0, "logits"), same.tensor(0, "logits"))


# --- what codes in place of weights cost -----------------------------------------------------------------------


def test_int8_codes_are_a_price_and_a_broken_operation_beside_them_is_a_fault(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    target = load_target("cpu", ["precision=int8"])
    build(
        tiny_programs["exact"], tmp_path / "int8", target=target, checkpoint_folder=tiny_checkpoint,
        force=False, progress=Stages(quiet=True),
    )  # fmt: skip
    plan = plan_of(tiny_config, (70,), "whole")
    result = check(tmp_path / "int8", tiny_checkpoint, tmp_path / "w", plan, costs=True)
    assert result.passed and result.finding is None, [gate for gate in result.gates if not gate.passed]
    assert result.judged.weights == "int8"
    coded = [record.error for record in result.records if "int8 codes" in record.reason]
    others = [r for r in result.records if "int8 codes" not in r.reason and not r.num_choices]
    assert len(coded) > 30 and 0.01 < max(coded) < 0.15
    assert len(others) > 50 and max(record.error for record in others) < 2e-5, "the rest is as exact as ever"
    gated = {gate.name for gate in result.gates if gate.gated}
    assert gated == {"finite", "operations", "choices", "caches"}, "what becomes of the whole is the price"
    assert set(result.sensitivity) == {0, 1, 2, 3} and min(result.sensitivity.values()) > 1e-6
    bent = bent_engine(tmp_path / "int8", tmp_path / "bent", {"attn_norm.2": np.full(512, 1.01, np.float32)})
    finding = check(bent, tiny_checkpoint, tmp_path / "b", plan).finding
    assert finding is not None and (finding.layer, finding.module) == (2, "input_layernorm")
