"""What a plan is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from seekforge.exporter.sizing.matrices import Precision
from seekforge.exporter.sizing.memory import KvFormat
from seekforge.formats.targets import TargetConfig


@dataclass(frozen=True)
class Question:
    """What is asked of a plan, beside the workload.

    Attributes:
        precision, kv_format: formats of weights and caches.
        mtp: whether the MTP module is there.
        ep: whether layouts are with expert parallelism.
        target: whose engine it shall be: scratch is then that of its profiles and kernels. None: any GPU, and one
            prefill and one decode step of the workload.
    """

    precision: Precision
    kv_format: KvFormat
    mtp: bool = False
    ep: bool = False
    target: TargetConfig | None = None
