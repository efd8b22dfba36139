"""Which provider's kernels an engine gets where the user leaves it to the cost model (`auto`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from seekforge.common.errors import EnvironmentFault, TargetError
from seekforge.common.temporary import temporary_folder
from seekforge.exporter.builder import estimate
from seekforge.exporter.sizing.calls import Call
from seekforge.plugins.cost.card import Card
from seekforge.plugins.cost.work import Load
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.index import kernel_sm
from seekforge.plugins.kernels.providers.choice import AUTO, provider_fault, providers_of
from seekforge.plugins.operator import TRITON


def settle(
    choice: Mapping[str, str], calls: Sequence[Call], card: Card, load: Load, *, cache: Path, jobs: int | None = None
) -> dict[str, str]:
    """Return op_type -> provider for the operators of a choice that are called.

    Of those left to the cost model, the provider whose launches of all calls take the shortest time with gaps; Triton
    where another is no quicker. A provider that is not installed, or has no kernels for the sizes, is none of the
    candidates. Candidates are compiled, or taken from the cache.

    Args:
        choice: op_type -> provider or `auto`, as `read_choice` gives it.
        calls: a step.
        card: the GPU.
        load: what decides the work beside the shapes.
        cache: folder of compiled images.
        jobs: processes that compile.

    Raises:
        EnvironmentFault: the compiler of a named provider, or its library, is missing.
        TargetError: a named provider has no kernels for the sizes, or its operator is not called, or one does not
            compile.
    """
    settled = {}
    for op, wanted in choice.items():
        of_op = [call for call in calls if call.op == op]
        if wanted != AUTO:
            if not of_op:
                raise TargetError(f"{op}={wanted}: the step calls no {op}; leave it out")
            if fault := provider_fault(op, wanted, of_op[0].bound):
                raise TargetError(f"{op}={wanted}: {fault}")
            settled[op] = wanted
            continue
        if not of_op:
            continue
        seconds = {
            provider: _seconds(of_op, provider, card, load, cache=cache, jobs=jobs)
            for provider in providers_of(op)
            if _is_candidate(op, provider, of_op[0])
        }
        settled[op] = min(seconds, key=lambda provider: (seconds[provider], provider != TRITON))
    return settled


def _is_candidate(op: str, provider: str, call: Call) -> bool:
    if provider == TRITON:
        return True
    if provider_fault(op, provider, call.bound):
        return False
    try:
        aot.compiler_of(op, provider)
    except EnvironmentFault:
        return False
    return True


def _seconds(calls: Sequence[Call], provider: str, card: Card, load: Load, *, cache: Path, jobs: int | None) -> float:
    """Return the time of an operator's calls by the cost model."""
    op, sm = calls[0].op, kernel_sm(card.sm)
    with temporary_folder("seekforge-kernels") as folder:
        sets = aot.build(aot.tasks({op: calls[0].bound}, [sm], {op: provider}), folder, cache=cache, jobs=jobs)
        kernels = estimate.read_kernel_sets(sets, folder, cache=cache)
    return estimate.step_json(estimate.rows(calls, kernels, card, load, sm, {op: provider}))["total_us"] / 1e6
