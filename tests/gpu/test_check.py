"""The GPU harness on a pretended device: its memory is the host's, its launches are the interpreter's.

What a GPU would get goes through here: descriptors, launch plans, packed arguments, addresses, workspace.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.gpu import cases as gpu_cases
from tests.gpu import check as gpu_check
from tests.gpu import walk as gpu_walk
from tests.gpu.device import Device, in_turns
from tests.gpu.judge import judge
from tests.gpu.table import Result, Roof, copies_for, line, markdown, measure_copy, settled, timed, write_report
from tests.gpu.work import (
    Work,
    attention_work,
    bf16_linear_work,
    experts_work,
    indexer_work,
    linear_work,
    norm_work,
    route_work,
    work_of,
    write_work,
)
from tests.support.graph_walk import kernel_ops
from tests.support.graph_walker import HostPlace
from tests.support.host_device import HostDevice, check_guard, guarded, host_kernels, write_host_kernels

from seekforge.common.errors import EnvironmentFault
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.program import load_program
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.kernel_set import to_json
from seekforge.plugins.kernels.launch_plan import check_plan, op_kernels, statics_of
from seekforge.plugins.kernels.sizes import operators
from seekforge.plugins.registry import WITH_KERNELS
from seekforge.plugins.testing import Case


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_a_case_of_every_operator_runs_through_the_harness(op: str) -> None:
    case = next(c for c in gpu_cases.tiny_cases() if c.op == op and c.name.startswith(("one-token", "three")))
    statics = statics_of(op, case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs))
    device = HostDevice()
    kernels, cubins = host_kernels(op, statics, device.sm)
    got = gpu_check.run_case(device, kernels, cubins, case)
    right, error = judge(case, got, case.expected())
    assert right, error
    assert device.driver.launches
    bent = tuple(t * 1.01 if t.is_floating_point() else t for t in case.expected())
    if op in ("BlockFp8Linear", "Bf16Linear", "DsaAttention", "MlaAttention", "MoeRoute", "MoeExperts"):
        assert not judge(case, got, bent)[0]


def near_tie(gap: float) -> tuple[Case, list[torch.Tensor]]:
    """A routing case of one token whose fourth and fifth expert differ by `gap`, and the reference's results."""
    logits = torch.linspace(2.0, -2.0, 16).view(1, 16).clone()
    bias = torch.zeros(16)
    scores = torch.sigmoid(logits[0])
    bias[4] = scores[3] - scores[4] - gap
    attrs = {"n_group": 1, "topk_group": 1, "top_k": 4, "norm": True, "scale": 2.5}
    case = Case("MoeRoute", "near-tie", (logits, bias), attrs)
    return case, [t.clone() for t in case.expected()]


@pytest.mark.parametrize(("gap", "right"), [(1e-6, True), (1e-3, False)])
def test_an_expert_that_is_as_near_as_noise_is_right_with_its_own_weight(gap: float, right: bool) -> None:
    case, want = near_tie(gap)
    ids = want[0].clone()
    assert ids.tolist() == [[0, 1, 2, 3]]
    ids[0, 3] = 4
    scores = torch.sigmoid(case.inputs[0][0])[ids[0].long()]
    weights = (scores / scores.sum() * 2.5).view(1, 4)
    same, said = judge(case, (ids, weights), want)
    assert same is right
    assert said.startswith("1 near ties" if right else f"other experts, gap {gap:.1e}")
    assert not judge(case, (ids, weights * 1.01), want)[0], "weights are those of the experts that were chosen"
    assert not judge(case, (ids, want[1] * 1.01), want)[0]


def test_neighbors_within_noise_may_change_places_and_others_may_not() -> None:
    case, want = near_tie(1e-6)
    case.inputs[1][2] = torch.sigmoid(case.inputs[0][0])[1] - torch.sigmoid(case.inputs[0][0])[2] - 1e-6
    want = [t.clone() for t in case.expected()]
    order = torch.tensor([0, 2, 1, 3])
    assert judge(case, (want[0][:, order], want[1][:, order]), want)[0]
    assert not judge(case, (want[0][:, order], want[1]), want)[0], "weights go with their experts"
    order = torch.tensor([1, 0, 2, 3])
    assert not judge(case, (want[0][:, order], want[1][:, order]), want)[0]


def test_ids_that_are_none_or_twice_are_wrong() -> None:
    case, want = near_tie(1e-6)
    for bad in (-1, 16, 0):
        ids = want[0].clone()
        ids[0, 3] = bad
        assert not judge(case, (ids, want[1]), want)[0]


def test_a_write_behind_a_buffer_is_noticed() -> None:
    tensor = guarded((5, 3), torch.float32)
    assert tensor.isnan().all() and tensor.data_ptr() % 256 == 0
    tensor.fill_(1.0)
    check_guard(tensor)
    tensor.as_strided((16,), (1,))[15] = 0.0
    with pytest.raises(AssertionError, match="past the end of a buffer of 60 bytes"):
        check_guard(tensor)


def test_every_real_case_has_a_plan_and_kernels() -> None:
    found = gpu_cases.real_cases()
    assert {one.op for one in found} == set(WITH_KERNELS)
    assert len({str(one) for one in found}) == len(found)
    for one in found:
        statics = statics_of(one.op, one.statics)
        for sm in (80, 90, 120)[2 if one.first_sm else 0 :]:
            assert op_kernels(one.op).variants(statics, sm)


SMALL = [
    gpu_cases.route(4),
    gpu_cases.write(70),
    gpu_cases.linear(2, 256, 128),
    gpu_cases.norm(3, 256),
    gpu_cases.bf16_linear(2, 256, 128),
    gpu_cases.attention(1, 1, 16),
    gpu_cases.indexer(1, 128, 70),
]


@pytest.mark.parametrize("real", SMALL, ids=str)
def test_a_small_real_case_is_drawn_as_described(real: gpu_cases.Real) -> None:
    case = real.make()
    bound = case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs)
    assert statics_of(case.op, bound) == real.statics
    check_plan(op_kernels(case.op).plan(bound, 90), op_kernels(case.op).variants(real.statics, 90))
    part, got = gpu_cases.judged_part(case, case.expected())
    for ours, theirs in zip(got, part.expected(), strict=True):
        assert judge(part, (ours,) * len(got), (theirs,) * len(got))[0] if len(got) == 1 else ours.equal(theirs)


def test_each_sm_gets_kernels_of_the_cases_that_it_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(gpu_check, "tiny_cases", list)
    monkeypatch.setattr(gpu_check, "real_cases", lambda: [gpu_cases.experts(1), gpu_cases.experts(1, in_nvfp4=True)])
    monkeypatch.setattr(
        gpu_check.aot,
        "tasks",
        lambda sizes, sms, providers: asked.extend((sms[0], one["W13"]) for one in sizes.values()) or [],
    )
    monkeypatch.setattr(gpu_check.aot, "build", lambda work, out, *, cache, jobs: None)
    monkeypatch.setattr(gpu_check, "prepare_model", lambda folder, name, sms, *, jobs: None)
    gpu_check.compile_all(tmp_path, [90, 120], jobs=1)
    assert asked == [(90, 7168), (120, 7168), (120, 4032)]


def test_digests_tell_the_sets_of_kernels_apart() -> None:
    sets = gpu_check.needed(gpu_cases.tiny_cases(), gpu_cases.real_cases())
    assert len(sets) == len({(op, str(sorted(statics.items())), provider) for op, statics, provider in sets.values()})
    assert {op for op, *_ in sets.values()} == set(WITH_KERNELS)


def test_every_provider_that_can_be_compiled_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.aot, "compiler_of", lambda op, provider: provider)
    gpu_check._providers_here.cache_clear()
    providers = [one[2] for one in gpu_check.needed([], [gpu_cases.route(4), gpu_cases.write(70)]).values()]
    assert sorted(providers) == ["flashinfer", "triton", "triton"]

    def no_library(op: str, provider: str) -> str:
        if provider != "triton":
            raise EnvironmentFault("no library")
        return provider

    monkeypatch.setattr(gpu_check.aot, "compiler_of", no_library)
    gpu_check._providers_here.cache_clear()
    assert [one[2] for one in gpu_check.needed([], [gpu_cases.route(4)]).values()] == ["triton"]
    gpu_check._providers_here.cache_clear()


# --- bytes and FLOPs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "megabytes", "gigaflops"),
    [
        # 2·T·N·K and N·K + 2·T·(K + N) with the scales; 2.2 KB a token; 1.1 KB a token
        (linear_work(1, 2112, 7168), 15.16, 0.0303),
        (linear_work(4096, 24576, 1536), 251.7, 309.2),
        # two streams in, two values and a byte out, a scale for 128 of them, and the weight
        (norm_work(2048, 7168, adds=True), 132.6, 0),
        # 2·N·K of the weight, 2·T·K in, 4·T·N out: the head of one token, the router of a prompt
        (bf16_linear_work(1, 129280, 7168), 1853.9, 1.853),
        (bf16_linear_work(2048, 256, 7168), 35.13, 7.516),
        (write_work(8192, latent=512, rope=64, index=128, kv_format="fp8_ds"), 18.06, 0),
        (write_work(1, latent=512, rope=64, index=128, kv_format="bf16"), 0.002824, 0),
        # one sequence of 128K: 17.3 MB of keys, 2.1 GFLOP, and a MB of scores written and read
        (indexer_work([[131072]], heads=64, dim=128, topk=2048, key_bytes=132, takes_all=False), 18.37, 2.147),
        (indexer_work([[64]], heads=64, dim=128, topk=2048, key_bytes=132, takes_all=True), 0.0082, 0),
        # two rows of one sequence read its keys once
        (indexer_work([[99, 100]], heads=64, dim=128, topk=64, key_bytes=132, takes_all=False), 0.04859, 0.00326),
        (attention_work(1, 2048, heads=128, latent=512, rope=64, key_bytes=656), 1.630, 0.570),
        (attention_work(32, 32 * 2048, heads=128, latent=512, rope=64, key_bytes=656), 52.17, 18.25),
        (route_work(1, 256, 8), 0.002112, 0),
        (experts_work(1, 8, 8, hidden=7168, inner=2048), 352.4, 0.705),
        (experts_work(2048, 8 * 2048, 256, hidden=7168, inner=2048), 11365, 1443),
    ],
)
def test_work_is_what_the_notes_say(work: Work, megabytes: float, gigaflops: float) -> None:
    assert work.num_bytes / 1e6 == pytest.approx(megabytes, rel=2e-3)
    assert work.flops / 1e9 == pytest.approx(gigaflops, rel=2e-3)


def test_work_of_a_case_counts_what_is_there() -> None:
    by_name = {str(case): case for case in gpu_cases.tiny_cases()}
    for case in by_name.values():
        found = work_of(case)
        multiplies = case.op not in ("AddRmsNormQuantize", "DsaCacheWrite", "MlaCacheWrite", "MoeRoute", "DsaIndexer")
        assert found.num_bytes >= 0 and (not multiplies or found.products is not None)
    case = gpu_cases.attention(1, 1, 16).make()
    whole = work_of(case)
    case.inputs[4][..., 1024:] = -1
    half = work_of(case)
    assert half.flops * 2 == whole.flops and half.num_bytes < whole.num_bytes
    assert work_of(gpu_cases.linear(2, 256, 128).make()) == linear_work(2, 256, 128)


# --- table ------------------------------------------------------------------------------------------------------

ROOF = Roof(3000.0, {"bf16": 700.0, "fp8": 1400.0})


def test_the_roof_is_the_slower_of_memory_and_math() -> None:
    assert ROOF.microseconds(Work(3_000_000)) == (1.0, "memory")
    assert ROOF.microseconds(Work(3_000_000, 2_800_000_000, "fp8")) == (2.0, "math")
    assert ROOF.microseconds(Work(3_000_000, 2_800_000_000, "bf16")) == (4.0, "math")
    assert Roof(3000.0, {}).microseconds(Work(3_000_000, 10**12, "fp8")) == (1.0, "memory"), "no product was measured"


def test_the_copy_counts_both_ways() -> None:
    device: Device = HostDevice()
    assert measure_copy(device, num_bytes=1 << 20, repeats=2) == pytest.approx(2 * (1 << 20) / 1e-3 / 1e9)
    assert not device._buffers, "given back"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_table_has_rates_shares_and_anchors(tmp_path: Path) -> None:
    plain = Result("MoeExperts T=128", True, "diff 1e-7", 5, target="fast", anchor="6360 us DeepGEMM")
    result = timed(plain, Work(3_000_000_000, 10**12, "fp8"), 2e-3, ROOF)
    assert (result.gigabytes_per_s, result.teraflops, result.share, result.bound) == (1500.0, 500.0, 0.5, "memory")
    assert "1000.0" in markdown([result], ROOF, "a GPU") and "50%" in line(result)
    wrong = timed(Result("x", False, "diff 1", 1), Work(8), 1e-3, ROOF)
    untimed = Result("tiny", True, "same", 1)
    write_report(tmp_path / "report", [result, wrong, untimed], ROOF, "a GPU, sm90")
    text = (tmp_path / "report" / "gpu-report.md").read_text()
    assert "| MoeExperts T=128 | 5 | 2000.0 | 1500 | 500.0 | memory | 1000.0 | 50% | fast | 6360 us DeepGEMM |" in text
    assert "x (WRONG: diff 1)" in text and "| tiny" not in text and "2 of 3 cases agree" in text
    assert "device copy 3000 GB/s, bf16 products 700 TFLOPS, fp8 products 1400 TFLOPS" in text
    raw = json.loads((tmp_path / "report" / "gpu-report.json").read_text())
    assert raw["results"][0]["share"] == 0.5 and raw["roof"]["gigabytes_per_s"] == 3000.0


@pytest.mark.parametrize(
    ("touched", "held", "l2", "free", "expected"),
    [
        (100, 100, 0, 0, (1, True)),  # no L2
        (400, 400, 100, 0, (1, True)),  # one call evicts itself
        (399, 399, 100, 1000, (2, True)),
        (15_000_000, 15_500_000, 50_000_000, 10**11, (14, True)),  # a weight of 15 MB on an H200
        (10, 1000, 100, 10_000, (10, False)),  # 40 are wanted, 9 more fit nine tenths of what is free
        (10, 10, 100_000, 10**9, (1024, False)),
        (0, 8, 100, 10**9, (400, True)),
    ],
)
def test_copies_are_enough_that_nothing_stays_in_l2(
    touched: int, held: int, l2: int, free: int, expected: tuple[int, bool]
) -> None:
    copies, cold = copies_for(touched, held, l2_bytes=l2, free_bytes=free)
    assert (copies, cold) == expected
    assert copies == 1 or copies * held <= free + held
    if cold and touched:
        assert copies * touched > 2 * l2, "another's bytes, more than twice the cache, come between two uses"


def test_a_call_takes_turns_with_copies_of_its_buffers() -> None:
    real = gpu_cases.linear(2, 256, 128)
    case, statics = real.make(), statics_of(real.op, real.statics)
    touched = work_of(case).num_bytes
    device = HostDevice(l2_bytes=touched)
    kernels, cubins = host_kernels(real.op, statics, 90)
    call = gpu_check._Call(device, kernels, cubins, case)
    held = dict(device._buffers)
    others: list[set[int]] = []
    launcher = call.launcher

    class Noting:
        def enqueue(self, shapes: Any, inputs: Any, outputs: Any, workspace: int, stream: int) -> None:
            others.append({*inputs, *outputs, workspace})
            launcher.enqueue(shapes, inputs, outputs, workspace, stream)

    call.launcher = Noting()  # pyright: ignore[reportAttributeAccessIssue]
    assert gpu_check.seconds_cold(call, touched, repeats=2) == (1e-3, True)
    assert device.timed == [4] and len(others) == 4
    for i, one in enumerate(others):
        assert all(not one & other for other in others[:i]), "weights, activations and scratch are all their own"
    assert device._buffers.keys() == held.keys(), "copies are given back"
    small = HostDevice(l2_bytes=1 << 40, memory_bytes=sum(b.nbytes for b in held.values()) * 3)
    call = gpu_check._Call(small, kernels, cubins, case)
    seconds, cold = gpu_check.seconds_cold(call, touched, repeats=2)
    assert seconds and not cold and small.timed == [2], "one copy fits what is free"


def test_a_copy_of_a_call_gives_the_same_results_and_keeps_aliases() -> None:
    real = gpu_cases.write(70)
    case, device = real.make(), HostDevice()
    kernels, cubins = host_kernels(real.op, statics_of(real.op, real.statics), 90)
    call = gpu_check._Call(device, kernels, cubins, case)
    other = call.copied()
    assert other.outputs == other.inputs[:2] and not {*other.sizes} & {*call.sizes}
    first = [t.clone() for t in call.results()]
    assert all(torch.equal(a, b) for a, b in zip(first, other.results(), strict=True))


def test_every_copy_is_timed_as_often_as_every_other() -> None:
    def one() -> None: ...
    def two() -> None: ...
    def three() -> None: ...

    assert in_turns([one], 3) == [one] * 3
    assert in_turns([one, two, three], 4) == [one, two, three] * 2, "in turns, and at least as many as asked for"


FAST = Work(3_000_000_000)  # a millisecond at the roof


def test_a_case_that_is_better_than_the_probes_raises_the_roof_for_all() -> None:
    rows = [
        timed(Result("copy-like", True, "", 1), FAST, 1e-3, ROOF),
        timed(Result("reads", True, "", 1), FAST, 0.95e-3, ROOF),
        timed(Result("product", True, "", 1), Work(8, 1_500_000_000_000, "fp8"), 1e-3, ROOF),
    ]
    assert "better than the memory probe" in line(rows[1])
    done, roof = settled(rows, ROOF)
    assert roof.gigabytes_per_s == pytest.approx(3000 / 0.95) and roof.teraflops == {"bf16": 700.0, "fp8": 1500.0}
    assert [one.share for one in done] == [pytest.approx(0.95), 1.0, 1.0]
    assert not any(one.fault for one in done)


def test_what_is_faster_than_the_gpu_is_a_fault_and_raises_nothing() -> None:
    fault = timed(Result("in L2", True, "", 1), FAST, 0.5e-3, ROOF)
    assert fault.share is None and fault.fault.startswith("2.00 of the memory roof")
    wrong = timed(Result("did nothing", False, "diff 1", 1), FAST, 0.95e-3, ROOF)
    slow = timed(Result("slow", True, "", 1), FAST, 2e-3, ROOF)
    done, roof = settled([fault, wrong, slow], ROOF)
    assert roof == ROOF
    assert [one.share for one in done] == [None, None, 0.5]
    assert done[1].fault.startswith("1.05 of the memory roof")
    text = markdown(done, roof, "a GPU")
    assert "| in L2 (FAULT: 2.00 of the memory roof" in text and "| FAULT |" in text
    assert "FAULT" in line(fault)


def test_a_call_that_cannot_be_cold_has_no_share() -> None:
    warm = timed(Result("tiny", True, "", 1), FAST, 0.5e-3, ROOF, cold=False)
    assert warm.share is None and not warm.fault and "in L2" in line(warm)
    done, roof = settled([warm], ROOF)
    assert roof == ROOF and "| in L2 |" in markdown(done, roof, "a GPU")


@pytest.mark.parametrize(
    ("l2", "seconds", "code", "said"),
    [
        (0, 1e-3, 0, "1 of 1 right"),
        (0, 1e-12, 1, "1 were measured wrongly: BlockFp8Linear"),
        (1 << 60, 1e-12, 0, "| in L2 |"),
    ],
)
def test_a_run_fails_when_a_time_cannot_be_right(
    l2: int,
    seconds: float,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = [gpu_cases.linear(2, 256, 128)]
    write_kernels(tmp_path / gpu_check.OPERATORS, cases)
    monkeypatch.setattr(gpu_check, "real_cases", lambda: cases)
    device = HostDevice(l2_bytes=l2, memory_bytes=1 << 20, seconds=seconds)
    monkeypatch.setattr(gpu_check, "CudaDevice", lambda: device)
    monkeypatch.setattr(gpu_check, "measure_copy", lambda device: 3000.0)
    monkeypatch.setattr(gpu_check, "measure_products", lambda sm: {"bf16": 700.0, "fp8": 1400.0})
    asked = SimpleNamespace(folder=tmp_path, only="real", repeats=2, report=tmp_path / "report")
    assert gpu_check._run(asked) == code  # pyright: ignore[reportArgumentType]
    assert said in capsys.readouterr().out
    raw = json.loads((tmp_path / "report" / "gpu-report.json").read_text())
    assert all(one["share"] is None or one["share"] <= 1 for one in raw["results"])


def write_kernels(folder: Path, cases: list[gpu_cases.Real]) -> None:
    """Kernels for the pretended device, as `compile` would leave them."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for real in cases:
        statics = statics_of(real.op, real.statics)
        kernels, cubins = host_kernels(real.op, statics, 90)
        (folder / f"{real.op}.json").write_text(to_json(kernels))
        for name, image in kernels.images.items():
            (folder / image.cubin).write_bytes(cubins[name])
        entries.append({"op": real.op, "sm": 90, "digest": kernels.digest, "file": f"{real.op}.json"})
    (folder / aot.INDEX).write_text(json.dumps({"format": 1, "kernels": entries}))


def test_the_benchmark_runs_on_the_pretended_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [gpu_cases.route(4), gpu_cases.write(70), gpu_cases.linear(5, 256, 128)]
    write_kernels(tmp_path, cases)
    monkeypatch.setattr(gpu_check, "real_cases", lambda: [*cases, gpu_cases.experts(1, in_nvfp4=True)])
    results = gpu_check.run_all(HostDevice(), tmp_path, ROOF, tiny=False, real=True, repeats=2)
    assert [one.right for one in results] == [True] * 3
    assert [one.launches for one in results] == [1, 1, 2]
    assert all(one.microseconds == 1000.0 and one.share is not None for one in results)
    said = capsys.readouterr().out
    assert "MoeRoute T=4" in said and "not checked: MoeExperts T=1 NVFP4 is for SMs from 100 on" in said
    with pytest.raises(EnvironmentFault, match="no kernels for sm89"):
        gpu_check.load(tmp_path, 89)
    with pytest.raises(EnvironmentFault, match=r"index\.json: missing"):
        gpu_check.load(tmp_path / "none", 89)


# --- walk -------------------------------------------------------------------------------------------------------


def small_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_walk.Model:
    changes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "q_lora_rank": 128}
    changes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1, "first_k_dense_replace": 1}
    model = gpu_walk.Model("tiny", changes | {"num_nextn_predict_layers": 0}, (70,), ((1,),), trials=12)
    monkeypatch.setitem(gpu_walk.MODELS, "small", model)
    gpu_walk.prepare_program(folder, "small")
    write_host_kernels(
        gpu_walk.engine_folder(folder, "fp8_ds"), kernel_ops(load_program(folder / gpu_walk.PROGRAM), "fp8_ds"), 90
    )
    return model


def test_a_model_is_walked_eager_and_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model(tmp_path / "small", monkeypatch)
    right, text = gpu_walk.walk_model(tmp_path / "small", "small", "fp8_ds", HostPlace(), repeats=0)
    assert right, text
    assert text.startswith("ok    small fp8_ds B=1 Q=1: hidden")
    assert 0 <= HostPlace().seconds(lambda: None, 3) < 1


def test_what_was_not_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"not made; gpu_check\.py compile"):
        gpu_walk.walk_model(tmp_path, "tiny", "bf16", HostPlace())
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentFault, match="sees no GPU"):
            gpu_walk.walk_models(tmp_path, ["tiny"])


def test_models_to_walk_have_kernels() -> None:
    for model in gpu_walk.MODELS.values():
        assert len(model.past) == len(model.steps[0])
        config = ModelConfig.parse(load_preset(model.preset).config_json | model.changes, model.preset)
        assert model.past[0] > config.index_topk
        for kv_format in model.formats:
            for op, bound in operators(config, kv_format=kv_format).items():
                if config.index_topk or not op.startswith("Dsa"):  # what a model without an indexer calls
                    statics_of(op, bound)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_tiny_model_is_walked_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    major, minor = torch.cuda.get_device_capability(0)
    gpu_walk.prepare_model(tmp_path / "tiny", "tiny", [10 * major + minor], jobs=None)
    assert gpu_walk.walk_models(tmp_path, ["tiny"]) == 0
