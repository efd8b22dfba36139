"""Which provider an operator's kernels shall come from: `OP=PROVIDER` texts of a user, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from seekforge.common.errors import OptionError, ShapeError
from seekforge.plugins.kernels.launch_plan import op_kernels
from seekforge.plugins.operator import TRITON
from seekforge.plugins.registry import KERNEL_FORMS, WITH_KERNELS

#: In place of a provider: the one whose launches the cost model finds quickest.
AUTO: Final = "auto"


def providers_of(op: str) -> tuple[str, ...]:
    """Return the providers of an operator's kernels, Triton first."""
    return (TRITON, *KERNEL_FORMS[op].libraries)


def read_choice(texts: Iterable[str]) -> dict[str, str]:
    """Return op_type -> provider or AUTO; operators that are not named take Triton.

    Args:
        texts: `OP=PROVIDER` or `OP=auto`; `auto` alone says it of every operator with more than one provider.

    Raises:
        OptionError: an operator has no kernels, or not from this provider, or is named twice. Says what there is.
    """
    choice: dict[str, str] = {}
    several = [op for op in WITH_KERNELS if len(providers_of(op)) > 1]
    for text in texts:
        op, equals, provider = text.partition("=")
        if text == AUTO:
            choice = dict.fromkeys(several, AUTO) | choice
            continue
        if not equals:
            raise OptionError(f"{text[:60]!r} is no choice of kernels, expected OPERATOR=PROVIDER or {AUTO}")
        if op not in WITH_KERNELS:
            raise OptionError(f"{op[:60]!r} has no kernels; operators are {', '.join(WITH_KERNELS)}")
        if provider not in (*providers_of(op), AUTO):
            raise OptionError(
                f"{op} has no kernels of provider {provider[:60]!r}; it has {', '.join(providers_of(op))}, or {AUTO}"
            )
        if choice.get(op, provider) != provider and choice[op] != AUTO:
            raise OptionError(f"{op} is given the providers {choice[op]} and {provider}; name one")
        choice[op] = provider
    return choice


def provider_fault(op: str, provider: str, bound: Mapping[str, Any]) -> str:
    """Return why a provider has no kernels of an operator for these sizes, or nothing."""
    module = op_kernels(op, provider)
    try:
        module.check({name: bound[name] for name in module.STATICS})
    except ShapeError as error:
        return str(error)
    return ""
