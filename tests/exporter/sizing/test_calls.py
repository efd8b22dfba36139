"""The calls of a step: which operators, how often, with which sizes."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.sizing.calls import Call, StepShape, step_calls
from seekforge.exporter.sizing.flops import attention_flops, linear_flops
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism
from seekforge.plugins.cost.work import Load, op_cost
from seekforge.plugins.kernels.launch_plan import check_plan, op_kernels, statics_of
from seekforge.plugins.kernels.sm_limits import SMS


@pytest.fixture(scope="module")
def full() -> ModelConfig:
    return load_preset("full").config


def launches(calls: list[Call], sm: int = 90) -> int:
    return sum(call.count * len(op_kernels(call.op).plan(call.bound, sm).launches) for call in calls)


def flops(calls: list[Call], context: int, experts: int) -> float:
    load, total = Load(context=context, num_experts=experts), 0
    for call in calls:
        for launch in op_kernels(call.op).plan(call.bound, 90).launches:
            total += call.count * op_cost(call.op).work(launch, call.bound, 90, load).flops
    return total


def test_every_operator_of_a_step_is_called_once_a_layer(full: ModelConfig) -> None:
    calls = step_calls(full, StepShape(1, 1, 32768), kv_format="fp8_ds")
    counts = Counter[str]()
    for call in calls:
        counts[call.op] += call.count
    assert counts == {
        "AddRmsNormQuantize": 61 * 3,  # before the attention, of its query latent, and before the MLP
        # three of the attention, where both that read the query latent are one; two of a dense MLP
        "BlockFp8Linear": 61 * 3 + 3 * 2,
        "Bf16Linear": 61 + 58 + 1,  # head weights of the indexer, routers, head
        "DsaCacheWrite": 61,
        "DsaIndexer": 61,
        "DsaAttention": 61,
        "MoeRoute": 58,
        "MoeExperts": 58,
    }
    moe = [call for call in calls if call.count in (58, 61)]
    assert launches([Call(one.op, one.what, one.bound, 1) for one in moe]) == 19


def test_experts_in_nvfp4_change_their_call_and_have_no_shared_one_among_them(full: ModelConfig) -> None:
    fp8 = step_calls(full, StepShape(1, 1, 32768), kv_format="fp8_ds")
    nvfp4 = step_calls(full, StepShape(1, 1, 32768), kv_format="fp8_ds", nvfp4_experts=True)
    (before,), changed = [one for one in fp8 if one not in nvfp4], [one for one in nvfp4 if one not in fp8]
    assert [one.what or one.op for one in changed] == [
        "mlp.shared_experts.gate_up_proj", "mlp.shared_experts.down_proj", "MoeExperts",
    ]  # fmt: skip
    assert changed[2].bound == dict(before.bound) | {"W13": 7168 * 9 // 16, "S2": 0} and before.bound["S2"] == 4096


def test_ranks_that_share_experts_have_a_narrower_shared_one_among_them(full: ModelConfig) -> None:
    calls = step_calls(full, StepShape(1, 1, 4096), kv_format="fp8_ds", parallelism=Parallelism(tp=8, ep=True))
    (experts,) = (call for call in calls if call.op == "MoeExperts")
    assert (experts.bound["E"], experts.bound["I2"], experts.bound["S2"]) == (32, 4096, 512)
    assert not any("shared_experts" in call.what for call in calls)


def test_the_products_are_those_of_the_model_but_for_what_tensorrt_runs(full: ModelConfig) -> None:
    context = 32768
    calls = step_calls(full, StepShape(1, 1, context), kv_format="fp8_ds")
    absorbed = 2 * full.num_hidden_layers * full.num_attention_heads * full.kv_lora_rank
    absorbed *= full.qk_nope_head_dim + full.v_head_dim  # W_UK and W_UV
    wanted = linear_flops(full).total - absorbed + attention_flops(full, context).total
    assert flops(calls, context, full.n_routed_experts) == pytest.approx(wanted, rel=1e-6)


def test_ranks_share_the_products(full: ModelConfig) -> None:
    shape, context = StepShape(64, 1, 4096), 4096
    whole = step_calls(full, shape, kv_format="fp8_ds")
    one_of = step_calls(full, shape, kv_format="fp8_ds", parallelism=Parallelism(tp=8, ep=True))
    experts, part = ([call for call in calls if call.op == "MoeExperts"] for calls in (whole, one_of))
    assert flops(experts, context, 256) == pytest.approx(8 * flops(part, context, 256), rel=0.01)
    heads = [call.bound["H"] for call in one_of if call.op == "DsaAttention"]
    assert heads == [16]


def test_the_head_sees_one_row_of_each_sequence(full: ModelConfig) -> None:
    calls = step_calls(full, StepShape(3, 5, 4096), kv_format="fp8_ds")
    rows = {call.what: math.prod(call.bound["*lead"]) for call in calls if "*lead" in call.bound}
    assert rows["lm_head"] == 3 and rows["self_attn.o_proj"] == 15


def test_layers_that_share_an_indexer_call_it_not() -> None:
    config = load_preset("glm5-tiny").config
    calls = step_calls(config, StepShape(1, 1, 64), kv_format="fp8_ds")
    of = {call.op: call.count for call in calls if call.op in ("DsaIndexer", "DsaCacheWrite", "MlaCacheWrite")}
    indexers = sum(config.has_indexer(layer) for layer in range(config.num_hidden_layers))
    assert 0 < indexers < config.num_hidden_layers
    assert of == {
        "DsaIndexer": indexers,
        "DsaCacheWrite": indexers,
        "MlaCacheWrite": config.num_hidden_layers - indexers,
    }


def test_a_model_without_an_indexer_attends_to_all_keys() -> None:
    config = load_preset("v3-full").config
    calls = step_calls(config, StepShape(1, 1, 4096), kv_format="bf16")
    counts = {call.op: call.count for call in calls if call.op.startswith(("Dsa", "Mla"))}
    assert counts == {"MlaCacheWrite": 61, "MlaAttention": 61}
    absorbed = 2 * 61 * config.num_attention_heads * config.kv_lora_rank
    absorbed *= config.qk_nope_head_dim + config.v_head_dim  # W_UK and W_UV
    wanted = linear_flops(config).total - absorbed + attention_flops(config, 4096).total
    assert flops(calls, 4096, config.n_routed_experts) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("preset", ["tiny", "tiny-v3", "glm5-tiny"])
@pytest.mark.parametrize("kv_format", ["fp8_ds", "bf16"])
def test_every_call_has_a_plan_on_every_sm(preset: str, kv_format: str) -> None:
    config = load_preset(preset).config
    if not config.index_topk:
        kv_format = "bf16"
    for shape in (StepShape(1, 1, 1), StepShape(3, 2, 100), StepShape(2, 300, 4096)):
        load = Load(context=shape.context, num_experts=config.n_routed_experts)
        for call in step_calls(config, shape, kv_format=kv_format):
            for sm in SMS:
                plan = op_kernels(call.op).plan(call.bound, sm)
                check_plan(plan, op_kernels(call.op).variants(statics_of(call.op, call.bound), sm))
                for launch in plan.launches:
                    work = op_cost(call.op).work(launch, call.bound, sm, load)
                    assert 0 <= work.programs <= math.prod(launch.grid), (call.op, launch.variant)
                    assert min(work.read_bytes, work.written_bytes, work.loaded_bytes, work.flops) >= 0
