"""Whether plans can be captured in a CUDA graph: TensorRT-RTX judges that while it builds, and needs no GPU for it."""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.build_options import gpu_options
from tests.support.real_width import real_width

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.tensorrt import worker
from seekforge.exporter.builder.tensorrt.build import build_gpu
from seekforge.exporter.builder.tensorrt.check import check, open_inputs
from seekforge.formats.targets import load_target

#: What TensorRT-RTX 1.7.1 says of a network that cannot have the flag.
REFUSALS = (
    "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (BuilderFlag::kREQUIRE_USER_ALLOCATION is not "
    "compatible with networks that contain data-dependent dynamic shapes or other features that prevent capture.)",
    "Assertion !(mConfig.requireUserAllocation && !isStreamCapturable) failed. ",
)


def test_every_kind_of_layer_is_capturable_at_real_width(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One dense layer, one MoE layer and the MTP module of DeepSeek-V3.2, with all that a step needs around them."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    made = real_width(tmp_path_factory, "model")
    inputs = open_inputs(made / "program", made / "checkpoint")
    options = gpu_options(plugins="all", allow_oversize=True, kernels=False)
    target = load_target("rtx5090")
    target = target.model_copy(update={"profiles": {"decode": target.profiles["decode"]}})
    manifest = build_gpu(
        inputs,
        check(inputs, target, options),
        tmp_path / "engine",
        options=options,
        force=False,
        progress=Stages(quiet=True),
    )
    assert manifest.capturable == {"model.0": True, "model.1": True, "mtp": True}
    assert manifest.audit is not None and {"MoeExperts", "BlockFp8Linear"} <= manifest.audit.plugins.keys()


class Flag(enum.Enum):
    """The flags of a stand-in."""

    REQUIRE_USER_ALLOCATION = enum.auto()


class Builder:
    """Gives a plan, unless a flag is set that it has something to say against."""

    def __init__(self, logger: Any, refusal: str | None) -> None:
        self.logger, self.refusal = logger, refusal
        self.flags: set[Flag] = set()
        self.asked: list[set[Flag]] = []

    def set_flag(self, flag: Flag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Flag) -> None:
        self.flags.remove(flag)

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        assert config is self
        self.asked.append(set(self.flags))
        if self.refusal and (self.flags or self.refusal not in REFUSALS):
            self.logger.errors.append(self.refusal)
            self.logger.activation_bytes.append(1)
            return None
        self.logger.activation_bytes.append(2)
        return b"plan"


def run(refusal: str | None, trt: Any) -> tuple[Any, Any, Builder]:
    """Build with a stand-in; returns what `_build` does and the builder."""
    builder = Builder(SimpleNamespace(errors=["from before"], activation_bytes=[]), refusal)
    plan, capturable = worker._build(trt, builder, "network", builder, builder.logger)
    return plan, capturable, builder


def test_a_network_that_cannot_be_captured_is_built_without_the_promise() -> None:
    trt = SimpleNamespace(BuilderFlag=Flag)
    for refusal in REFUSALS:
        plan, capturable, builder = run(refusal, trt)
        assert plan == b"plan" and capturable is False
        assert builder.asked == [{Flag.REQUIRE_USER_ALLOCATION}, set()]
        assert builder.logger.errors == ["from before"], "it is no fault of this build"
        assert builder.logger.activation_bytes == [2], "memory of the plan that was not built"
    assert run(None, trt)[:2] == (b"plan", True)


def test_another_fault_is_told_and_not_tried_again() -> None:
    plan, _, builder = run("layers.3/Mul: no implementation", SimpleNamespace(BuilderFlag=Flag))
    assert plan is None and len(builder.asked) == 1
    assert builder.logger.errors == ["from before", "layers.3/Mul: no implementation"]


def test_of_a_library_without_the_flag_nothing_is_known() -> None:
    assert run(None, SimpleNamespace(BuilderFlag=enum.Enum("BuilderFlag", ["DEBUG"])))[:2] == (b"plan", None)


def test_the_flag_and_its_refusal_are_those_of_the_library() -> None:
    """The words are looked up in the library, so that a new version with other words is noticed."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    libs = pytest.importorskip("tensorrt_rtx_libs", reason="its libraries are elsewhere")
    assert trt.BuilderFlag.REQUIRE_USER_ALLOCATION in trt.BuilderFlag.__members__.values()
    (library,) = Path(libs.__path__[0]).glob("libtensorrt_rtx.so.1*")
    text = library.read_bytes()
    assert b"kREQUIRE_USER_ALLOCATION is not compatible with networks" in text
    assert b"!(mConfig.requireUserAllocation && !isStreamCapturable)" in text
