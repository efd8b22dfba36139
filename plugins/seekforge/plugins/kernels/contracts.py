"""What each operator can do on which hardware: refused with a sentence before any work, and listed for the docs.

The plugin's limits are those of its kernels, read from the `launch` modules; the inlined form's are TensorRT's and
stand in its description. Only plain values are compared, so export, build and documentation read one table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from seekforge.common.errors import ShapeError
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import ONE_RANK, Parallelism
from seekforge.plugins.kernels.launch_plan import op_kernels
from seekforge.plugins.kernels.sizes import DEFAULT_FORMAT, operators
from seekforge.plugins.kernels.sm_limits import has_fp8
from seekforge.plugins.registry import CACHE_OPS, FP8_OPS, OPERATORS, WITH_KERNELS

#: How an operator runs: as a plugin, or as standard operators in its place.
Form = Literal["plugin", "inlined"]


@dataclass(frozen=True)
class Limit:
    """One line of the table of limits.

    Attributes:
        op: ONNX op_type.
        forms: where it holds.
        key: a key of config.json, or a size in words.
        expected: what it must be, in words.
    """

    op: str
    forms: tuple[Form, ...]
    key: str
    expected: str


def limits() -> list[Limit]:
    """Return all limits, the operators in the order of a layer."""
    result = []
    for op in WITH_KERNELS:
        result += [Limit(op, ("plugin",), rule.key, rule.expected) for rule in op_kernels(op).RULES]
        result += [Limit(op, ("inlined",), one.key, f"at most {one.most}") for one in OPERATORS[op].inlined_limits]
    return result


def plugin_fault(op: str, sizes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return why an operator has no kernels for these sizes (`sizes.operators`), or nothing."""
    if op not in sizes:
        return f"{op}: there are no kernels for it"
    module = op_kernels(op)
    try:
        module.check({name: sizes[op][name] for name in module.STATICS})
    except ShapeError as error:
        return str(error)
    return ""


def inlined_fault(op: str, config: ModelConfig) -> str:
    """Return why TensorRT cannot build an operator's inlined form, or nothing."""
    for limit in OPERATORS[op].inlined_limits:
        value = getattr(config, limit.key)
        if value > limit.most:
            return f"{op}: {limit.key} is {value}, {limit.reason} at most {limit.most} where it is inlined"
    return ""


def refusals(
    config: ModelConfig,
    *,
    plugins: Collection[str],
    ops: Collection[str],
    parallelism: Parallelism = ONE_RANK,
    kv_format: str = DEFAULT_FORMAT,
) -> list[str]:
    """Return one sentence for every operator that a model asks too much of; none: it can be built.

    Args:
        config: the model.
        plugins: op_types that run as plugins; the other `ops` are inlined.
        ops: op_types of the program.
        parallelism: how ranks share the model; what counts is the sizes of one of them.
        kv_format: layout and dtype of both caches.
    """
    sizes = operators(config, kv_format=kv_format, parallelism=parallelism)
    faults = [plugin_fault(op, sizes) if op in plugins else inlined_fault(op, config) for op in ops]
    return [fault for fault in faults if fault]


def export_warnings(
    config: ModelConfig, *, ops: Collection[str], parallelism: Parallelism, kv_format: str = DEFAULT_FORMAT
) -> list[str]:
    """Return one sentence for every operator of a program that has no kernels for the model.

    An export does not know its target. What no target computes is refused with the config; what is said here is what
    GPU targets will refuse or do without plugins, so that nobody learns of it only when an engine is built. `kv_format`
    is the first of those that its caches can have on a GPU.
    """
    sizes = operators(config, kv_format=kv_format, parallelism=parallelism)
    lines = []
    for op in ops:
        fault = plugin_fault(op, sizes) if op in sizes else ""
        if not fault:
            continue
        if inlined_fault(op, config):
            lines.append(
                f"{fault}, and it cannot be inlined either ({inlined_fault(op, config)}): no GPU target builds it"
            )
            continue
        needs = "--precision bf16" if op in FP8_OPS else "--kv-cache-dtype bf16" if op in CACHE_OPS else ""
        lines.append(f"{fault}: GPU targets inline it" + (f", which needs {needs}" if needs else ""))
    return lines


def support(op: str, sm: int | None) -> str:
    """Say in a few words how an operator runs on an SM; None is a CPU."""
    if sm is None:
        return "f32, inlined"
    products = OPERATORS[op].products
    if products is None:
        return "plugin or inlined"
    if op not in FP8_OPS:
        return f"plugin or inlined ({products.inlined})"
    in_plugin = "FP8 products" if has_fp8(sm) else "FP8 weights, BF16 products"
    return f"plugin: {in_plugin}; inlined: {products.inlined.upper()} products"
