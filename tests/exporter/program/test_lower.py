"""A lowered graph becomes the program that the libraries' own passes, which take twice as long, would make of it."""

from __future__ import annotations

import importlib

import pytest
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from seekforge.common.errors import ProgramError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.program.lower import lower
from seekforge.exporter.program.trace import trace
from seekforge.formats.numerics import NUMERICS

trace_module = importlib.import_module("seekforge.exporter.program.trace")  # its package has a function of this name


class Composites(nn.Module):
    """One of each operator that is lowered, and views of what is not contiguous."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.flatten(0, 1)
        left, right = rows.double().chunk(2, dim=-1)
        parts = right.unflatten(-1, (2, -1))[..., :1].reshape(rows.shape[0], -1)
        return left.T, parts, rows.float().view_as(x), x.reshape(-1, 8)


def exported(module: nn.Module) -> torch.export.ExportedProgram:
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return torch.export.export(module, (torch.zeros(2, 3, 8),), dynamic_shapes=(axes,))


def test_composite_operators_are_replaced_and_the_results_are_the_same() -> None:
    lowered = lower(exported(Composites()))
    names = {str(node.target) for node in lowered.graph.nodes if str(node.target).startswith("aten.")}
    assert names - {"aten.slice.Tensor", "aten.sym_size.int"} == {
        f"aten.{name}"
        for name in ("_to_copy.default", "clone.default", "permute.default", "split.Tensor", "view.default")
    }
    x = torch.randn(4, 5, 8)
    for one, other in zip(lowered.module()(x), Composites()(x), strict=True):
        assert torch.equal(one, other)


def test_a_size_that_is_no_product_of_axes_is_refused() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x]).flatten(0, 1)

    with pytest.raises(ProgramError, match=r"has the size 2\*s\d+\*s\d+, expected an axis or a product of two"):
        lower(exported(Doubled()))


def test_operands_of_several_types_are_refused() -> None:
    """A cast that nobody wrote would be missing in the program."""

    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.double()

    message = "aten.mul.Tensor has torch.float32 and torch.float64, expected one type"
    with pytest.raises(ProgramError, match=message):
        lower(exported(Mixed()))


@pytest.mark.parametrize("factor", [2, 0.5])
def test_a_number_takes_the_type_of_the_tensor_beside_it(factor: float) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * factor

    x = torch.randn(4, 5, 8)
    assert torch.equal(lower(exported(Scaled())).module()(x), x * factor)


@pytest.mark.parametrize(
    ("preset", "numerics", "layer_range"),
    [
        ("tiny", "fp8", (3, 4)),
        pytest.param("tiny", "exact", (0, 4), marks=pytest.mark.slow),
        pytest.param("tiny", "fp8", None, marks=pytest.mark.slow),
        pytest.param("tiny-v3", "fp8", (0, 2), marks=pytest.mark.slow),
    ],
)
def test_programs_are_those_of_all_passes(
    preset: str, numerics: str, layer_range: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(load_preset(preset).config, NUMERICS[numerics], activations="bf16")
    lowered = trace(settings, layer_range, lambda stage: None)
    monkeypatch.setattr(trace_module, "lower", lambda program: program)
    monkeypatch.setattr(trace_module, "_optimize", optimizer.optimize)
    decomposed = trace(settings, layer_range, lambda stage: None)
    for one, other in zip(lowered.model.graph.node, decomposed.model.graph.node, strict=True):
        assert one == other
    assert lowered.model.SerializeToString(deterministic=True) == decomposed.model.SerializeToString(deterministic=True)
