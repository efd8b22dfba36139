"""How far a load is, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field

from seekforge.formats.value_check import Family


@dataclass(frozen=True)
class LoadProgress:
    """How far a load is."""

    done_bytes: int
    total_bytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """Mean speed so far, in 10^9 bytes of checkpoint per second."""
        return self.done_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    @property
    def eta_s(self) -> float:
        """Seconds left at the mean speed."""
        left = self.total_bytes - self.done_bytes
        return left / self.done_bytes * self.seconds if self.done_bytes else float("inf")


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        num_bytes: checkpoint bytes that were needed; `read_bytes` of them in this run, the rest in one that failed.
        seconds: the time of this run.
        scanned: values were checked: now, or in an earlier load of the same files.
        families: kind of weight -> its scales, as far as they were read (spec §2.6); empty without a scan.
    """

    num_bytes: int
    read_bytes: int
    seconds: float
    scanned: bool
    families: dict[str, Family] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes of checkpoint per second."""
        return self.read_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0
