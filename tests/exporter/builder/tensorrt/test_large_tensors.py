"""TensorRT versions that count a tensor's elements in 31 bits are refused where a model has more, before any work."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest
from tests.support.build_options import gpu_options

from seekforge.common.errors import TargetError
from seekforge.exporter.builder.tensorrt.check import Inputs, check
from seekforge.formats.targets import load_target
from seekforge.plugins.tensorrt.library import large_tensor_fault

W13 = "layers.1.mlp.experts.w13"
OPTIONS = gpu_options(allow_oversize=True, kernels=False)


def with_shape(inputs: Inputs, name: str, shape: tuple[int | str, ...]) -> Inputs:
    """The same program with another size of one tensor."""
    graph_io = inputs.program.graphs["model"]
    changed = {
        side: tuple(s.model_copy(update={"shape": shape}) if s.name == name else s for s in getattr(graph_io, side))
        for side in ("inputs", "outputs")
    }
    assert changed != {"inputs": graph_io.inputs, "outputs": graph_io.outputs}
    graphs = inputs.program.graphs | {"model": graph_io.model_copy(update=changed)}
    return dataclasses.replace(inputs, program=inputs.program.model_copy(update={"graphs": graphs}))


def pretend(monkeypatch: pytest.MonkeyPatch, distribution: str, version: str | None) -> None:
    real = importlib.metadata.version

    def installed(name: str) -> str:
        if name != distribution:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)


@pytest.mark.parametrize("version", ["10.15.1.29", "10.16.0"])
def test_an_old_tensorrt_is_refused_with_tensor_count_and_remedy(
    inputs: Inputs, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "tensorrt", version)
    large = with_shape(inputs, W13, (256, 4096, 7168))
    with pytest.raises(TargetError) as raised:
        check(large, load_target("h100"), OPTIONS)
    said = str(raised.value)
    assert said == (
        f"target h100: {W13} [256, 4096, 7168] has 7516192768 elements, tensorrt {version} takes at most 2147483647 "
        "in a tensor; pip install 'tensorrt>=11.0,<12.0'"
    )


@pytest.mark.parametrize("version", ["11.0.0", "11.4.0.106", None])
def test_a_new_tensorrt_takes_it_and_of_none_nothing_is_known(
    inputs: Inputs, version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "tensorrt", version)
    assert check(with_shape(inputs, W13, (256, 4096, 7168)), load_target("h100"), OPTIONS).plugins


def test_small_models_build_with_the_oldest_version(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "tensorrt", "10.15.1.29")
    assert check(inputs, load_target("h100"), OPTIONS).plugins


def test_tensorrt_rtx_takes_it(inputs: Inputs) -> None:
    assert check(with_shape(inputs, W13, (256, 4096, 7168)), load_target("rtx5090"), OPTIONS).plugins


def test_results_that_grow_with_the_limits_are_counted_at_their_largest(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of every row of a step may be asked for."""
    pretend(monkeypatch, "tensorrt", "10.15.1.29")
    wide = with_shape(inputs, "logits", ("N", 1_000_000))
    assert check(wide, load_target("h100", ["limits.max_num_batched_tokens=2147"]), OPTIONS).plugins
    with pytest.raises(TargetError, match=r"logits \[2148, 1000000\] has 2148000000 elements"):
        check(wide, load_target("h100", ["limits.max_num_batched_tokens=2148"]), OPTIONS)


@pytest.mark.parametrize(("shape", "refused"), [((2**31 - 1,), False), ((2**31,), True), ((2**16, 2**15), True)])
def test_the_limit_is_that_of_31_bits(shape: tuple[int, ...], refused: bool) -> None:
    assert bool(large_tensor_fault("tensorrt", "10.15.1", "x", shape)) is refused
    assert not large_tensor_fault("tensorrt", "unknown", "x", shape)
