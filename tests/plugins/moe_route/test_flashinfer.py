"""The router with FlashInfer's top-k: what it computes, lanes on a CPU in turns, and what nvcc makes of it.

Nothing of it was run on a GPU. Both need the headers of flashinfer-python; nothing of the package is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tests.support import cuda_on_cpu
from torch import Tensor

from seekforge.common.errors import EnvironmentFault
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.launch_plan import op_kernels
from seekforge.plugins.kernels.providers import library, nvcc
from seekforge.plugins.moe_route.reference import moe_route
from seekforge.plugins.testing import Case, cases
from seekforge.runtime.cli.main import main

TOLERANCE = 1e-6  # as of Triton's kernel
ATTRS = {"n_group": 4, "topk_group": 2, "top_k": 4, "norm": True, "scale": 2.5}
V32 = {"n_group": 8, "topk_group": 4, "top_k": 8, "norm": True, "scale": 2.5}
STATICS = {"E": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "norm": True}


def _missing(*, compiles: bool) -> str:
    try:
        library.find("flashinfer")
        if compiles:
            nvcc.find("flashinfer")
            aot.compiler()
    except EnvironmentFault as error:
        return str(error)
    return "" if cuda_on_cpu.compiler() else "no C++ compiler is installed"


computed = pytest.mark.skipif(bool(_missing(compiles=False)), reason=_missing(compiles=False))
compiled = pytest.mark.skipif(bool(_missing(compiles=True)), reason=_missing(compiles=True))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> cuda_on_cpu.CpuKernels:
    return cuda_on_cpu.CpuKernels("MoeRoute", "flashinfer", tmp_path_factory.mktemp("route"))


def matches(got: list[Tensor], want: tuple[Tensor, ...]) -> bool:
    return torch.equal(got[0], want[0]) and bool(((got[1] - want[1]).abs() <= TOLERANCE * want[1].abs()).all())


@computed
@pytest.mark.parametrize("case", cases("MoeRoute"), ids=str)
def test_routes_like_the_reference(case: Case, kernels: cuda_on_cpu.CpuKernels) -> None:
    got, want = kernels.run(case.inputs, case.attrs), case.expected()
    if case.name == "saturated":  # as of Triton's kernel: a quotient of denormals is less exact
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=2e-6, atol=1e-30)
        return
    assert matches(got, want)
    assert not matches([got[0], got[1] * 1.01], want)


@computed
def test_bent_inputs_are_noticed(kernels: cuda_on_cpu.CpuKernels) -> None:
    case = next(c for c in cases("MoeRoute") if c.name == "as-large-as-v3.2")
    got, (logits, bias) = kernels.run(case.inputs, case.attrs), case.inputs
    assert not matches(got, moe_route(logits * 1.01, bias, **case.attrs))
    assert not matches(got, moe_route(logits, bias * 1.5, **case.attrs))


@computed
@pytest.mark.parametrize("value", [88.0, -88.0, torch.inf, -torch.inf, torch.nan])
def test_extreme_rows_give_different_valid_experts(value: float, kernels: cuda_on_cpu.CpuKernels) -> None:
    logits = torch.full((3, 16), value)
    logits[1, ::2] = 0.0
    logits[2, 5:] = torch.nan
    ids, _ = kernels.run((logits, torch.zeros(16)), ATTRS)
    for row in ids.tolist():
        assert len(set(row)) == 4 and all(0 <= expert < 16 for expert in row)


@computed
def test_nan_loses_and_stays_visible(kernels: cuda_on_cpu.CpuKernels) -> None:
    logits = torch.full((1, 16), torch.nan)
    logits[0, [3, 9]] = torch.tensor([-80.0, 2.0])
    ids, weights = kernels.run((logits, torch.zeros(16)), ATTRS | {"n_group": 1, "topk_group": 1})
    assert ids[0, :2].tolist() == [9, 3] and weights[0].isnan().any()


#: experts, groups, kept groups, top k: small groups, groups of several experts a lane, the most of each.
SHAPES = [(16, 8, 3, 6), (64, 1, 1, 16), (128, 2, 1, 8), (256, 1, 1, 8), (256, 32, 16, 16), (512, 4, 2, 16)]


@computed
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_sizes_that_it_takes(shape: tuple[int, int, int, int], tokens: int, kernels: cuda_on_cpu.CpuKernels) -> None:
    experts, groups, kept, top_k = shape
    generator = torch.Generator().manual_seed(tokens)
    logits, bias = torch.randn(tokens, experts, generator=generator), torch.rand(experts, generator=generator) * 0.1
    attrs = ATTRS | {"n_group": groups, "topk_group": kept, "top_k": top_k}
    want = moe_route(logits, bias, **attrs)  # pyright: ignore[reportArgumentType]
    assert matches(kernels.run((logits, bias), attrs), want)


@compiled
@pytest.mark.parametrize("sm", [80, 90, 120])
def test_nvcc_makes_a_kernel_without_stack(sm: int) -> None:
    (variant,) = op_kernels("MoeRoute", "flashinfer").variants(STATICS, sm)
    image, cubin = aot.compile_variant("MoeRoute", variant, sm, "flashinfer")
    used = image.resources
    assert image.entry == "route_by_flashinfer" and cubin.startswith(b"\x7fELF")
    assert [(one.name, one.size) for one in image.params] == [
        ("logits_ptr", 8), ("bias_ptr", 8), ("ids_ptr", 8), ("weights_ptr", 8), ("num_tokens", 4), ("scale", 4)
    ]  # fmt: skip
    assert used.stack_bytes == 0 == used.shared_bytes and used.registers <= 48
    assert image.driver >= 12000


@compiled
def test_the_cost_model_reads_it_as_any_kernel(tmp_path: Path) -> None:
    """One store with both providers' kernels would be two files; each is estimated from its own."""

    def ran(*arguments: object) -> Any:
        result = CliRunner().invoke(main, ["kernels", *map(str, arguments), "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    shape = ("--op", "MoeRoute", "--cache", tmp_path / "cache", "--jobs", 1)
    made = ran("build", tmp_path / "store", "--sm", 90, *shape, "--provider", "MoeRoute=flashinfer")
    assert made["made_by"]["MoeRoute"]["provider"] == "flashinfer" and made["slow"] == []
    assert made["made_by"]["MoeRoute"]["compiler"].startswith("nvcc ")
    (record,) = made["kernels"]
    assert record["spill_bytes"] == record["spill_stores"] == record["spill_loads"] == 0 and record["tensor"] == {}
    estimate = ("estimate", "--sm", 90, *shape, "--shape", "batch=256")
    ours = ran(*estimate)["launches"][0]
    theirs = ran(*estimate, "--provider", "MoeRoute=flashinfer", "--kernels", tmp_path / "store")["launches"][0]
    assert (ours["provider"], theirs["provider"], theirs["kernel"]) == ("triton", "flashinfer", "flashinfer")
    assert theirs["code"]["kinds"]["exchange"] > 100 and theirs["code"]["spill_bytes"] == 0
    quickest = ran(*estimate, "--provider", "auto")["launches"][0]
    assert quickest == min((ours, theirs), key=lambda one: one["us"])
