"""Small values of large records, for tests that look at one field of them."""

from __future__ import annotations

from seekforge.formats.engine.manifest import Audit


def audit_of(device_bytes: dict[str, int]) -> Audit:
    """Return the audit of an empty GPU engine that is expected to use so much memory."""
    return Audit(
        asked="fp8",
        got="fp8",
        context=1,
        products=(),
        layers={},
        plugins={},
        inlined={},
        weight_input_bytes=0,
        plan_bytes={},
        device_bytes=device_bytes,
        oversize=False,
        build_seconds={},
        build_cpu_seconds={},
        build_peak_bytes={},
    )
