"""What the model of a launch takes a GPU to be, from the figures of a target (`configs/targets`) and of its SM."""

from __future__ import annotations

from dataclasses import dataclass

from seekforge.common.errors import TargetError
from seekforge.formats.targets import TargetConfig


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        name: its target.
        sm: compute capability.
        num_sms: how many SMs it has.
        clock_hz: the clock at which its dense rates are quoted.
        bytes_per_s: bandwidth of its memory.
        bf16_flops_per_clock: dense BF16 rate of one SM, 2 per multiply and add; FP8 has twice as much.
        has_fp8: whether it multiplies FP8.
    """

    name: str
    sm: int
    num_sms: int
    clock_hz: float
    bytes_per_s: float
    bf16_flops_per_clock: float
    has_fp8: bool

    def flops_per_clock(self, products: str) -> float:
        """Return the dense rate of one SM for factors of `products`: fp8, or bf16 and f16, whose rates are the same."""
        return self.bf16_flops_per_clock * (2 if products == "fp8" and self.has_fp8 else 1)


def card_of(target: TargetConfig) -> Card:
    """Return the GPU of a target.

    Raises:
        TargetError: the target is a CPU.
    """
    if target.gpu is None or target.sm is None:
        raise TargetError(f"target {target.name} is a CPU, kernels are for GPUs; choose a target with an SM")
    gpu, clock = target.gpu, target.gpu.clock_mhz * 1e6
    return Card(
        name=target.name,
        sm=target.sm,
        num_sms=gpu.num_sms,
        clock_hz=clock,
        bytes_per_s=gpu.bandwidth_gb_s * 1e9,
        bf16_flops_per_clock=gpu.bf16_tflops * 1e12 / (gpu.num_sms * clock),
        has_fp8=gpu.fp8_tflops is not None,
    )
