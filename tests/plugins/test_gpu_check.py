"""The GPU harness on a pretended device: its memory is the host's, its launches are the interpreter's.

What a GPU would get goes through here: descriptors, launch plans, packed arguments, addresses, workspace.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_check
import gpu_walk
import pytest
import torch
from gpu_device import Device
from gpu_judge import judge
from gpu_table import Result, Roof, line, markdown, measure_copy, timed, write_report
from gpu_work import Work, attention_work, experts_work, indexer_work, linear_work, route_work, work_of, write_work
from graph_walk import kernel_ops
from graph_walker import HostPlace
from host_device import HostDevice, check_guard, guarded, host_kernels, write_host_kernels

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.plugins import aot
from seekforge.plugins.errors import EnvironmentFault
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.program import load_program
from seekforge.plugins.kernel_sizes import WITH_KERNELS, operators
from seekforge.plugins.launch import check_plan, op_kernels, statics_of, to_json


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
    if op in ("BlockFp8Linear", "DsaAttention", "MoeRoute", "MoeExperts"):
        assert not judge(case, got, bent)[0]


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
        for sm in (80, 90, 120):
            assert op_kernels(one.op).variants(statics, sm)


SMALL = [
    gpu_cases.route(4),
    gpu_cases.write(70),
    gpu_cases.linear(2, 256, 128),
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


def test_digests_tell_the_sets_of_kernels_apart() -> None:
    sets = gpu_check.needed(gpu_cases.tiny_cases(), gpu_cases.real_cases())
    assert len(sets) == len({(op, str(sorted(statics.items()))) for op, statics in sets.values()})
    assert {op for op, _ in sets.values()} == set(WITH_KERNELS)


# --- bytes and FLOPs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "megabytes", "gigaflops"),
    [
        # kernels.md §A: 2·T·N·K and N·K + 2·T·(K + N) with the scales; 2.2 KB a token; 1.1 KB a token
        (linear_work(1, 2112, 7168), 15.16, 0.0303),
        (linear_work(4096, 24576, 1536), 251.7, 309.2),
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
        multiplies = case.op not in ("DsaCacheWrite", "MoeRoute", "DsaIndexer")
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
    result = Result(**timed(plain, Work(3_000_000_000, 10**12, "fp8"), 2e-3, ROOF))
    assert (result.gigabytes_per_s, result.teraflops, result.share, result.bound) == (1500.0, 500.0, 0.5, "memory")
    assert "1000.0" in markdown([result], ROOF, "a GPU") and "50%" in line(result)
    wrong = Result(**timed(Result("x", False, "diff 1", 1), Work(8), 1e-3, ROOF))
    untimed = Result("tiny", True, "same", 1)
    write_report(tmp_path / "report", [result, wrong, untimed], ROOF, "a GPU, sm90")
    text = (tmp_path / "report" / "gpu-report.md").read_text()
    assert "| MoeExperts T=128 | 5 | 2000.0 | 1500 | 500.0 | memory | 1000.0 | 50% | fast | 6360 us DeepGEMM |" in text
    assert "x (WRONG: diff 1)" in text and "| tiny" not in text and "2 of 3 cases agree" in text
    assert "device copy 3000 GB/s, bf16 products 700 TFLOPS, fp8 products 1400 TFLOPS" in text
    raw = json.loads((tmp_path / "report" / "gpu-report.json").read_text())
    assert raw["results"][0]["share"] == 0.5 and raw["roof"]["gigabytes_per_s"] == 3000.0


def test_the_benchmark_runs_on_the_pretended_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [gpu_cases.route(4), gpu_cases.write(70), gpu_cases.linear(2, 256, 128)]
    entries = []
    for real in cases:
        statics = statics_of(real.op, real.statics)
        kernels, cubins = host_kernels(real.op, statics, 90)
        (tmp_path / f"{real.op}.json").write_text(to_json(kernels))
        for name, image in kernels.images.items():
            (tmp_path / image.cubin).write_bytes(cubins[name])
        entries.append({"op": real.op, "sm": 90, "digest": kernels.digest, "file": f"{real.op}.json"})
    (tmp_path / aot.INDEX).write_text(json.dumps({"format": 1, "kernels": entries}))
    monkeypatch.setattr(gpu_check, "real_cases", lambda: cases)
    results = gpu_check.run_all(HostDevice(), tmp_path, ROOF, tiny=False, real=True, repeats=2)
    assert [one.right for one in results] == [True] * 3
    assert [one.launches for one in results] == [1, 1, 2]
    assert all(one.microseconds == 1000.0 and one.share is not None for one in results)
    assert "MoeRoute T=4" in capsys.readouterr().out
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
        for kv_format in gpu_walk.FORMATS:
            for op, bound in operators(config, kv_format=kv_format).items():
                statics_of(op, bound)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_tiny_model_is_walked_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    major, minor = torch.cuda.get_device_capability(0)
    gpu_walk.prepare_model(tmp_path / "tiny", "tiny", [10 * major + minor], jobs=None)
    assert gpu_walk.walk_models(tmp_path, ["tiny"]) == 0
