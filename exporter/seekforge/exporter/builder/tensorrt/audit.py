"""Which matrix products an engine makes, and in which precision. Pure functions over a specialized graph.

Counted for one decoded token at a stated context: operators as their descriptions say, other products with weights from
the weights' own shapes. The Hadamard rotation, 0.3 % of the rest, is left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import onnx

from seekforge.common.dtypes import FROM_ONNX
from seekforge.common.errors import EngineError
from seekforge.exporter.models.shared.parameters import ATTENTION
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import Share
from seekforge.plugins.functions.attach import operator_of, read_attrs
from seekforge.plugins.registry import FP8_OPS

Form = Literal["plugin", "inlined", "native"]


@dataclass(frozen=True)
class Product:
    """Matrix products of one node, FLOPs per token."""

    what: str
    form: Form
    precision: str
    flops: float

    def times(self, count: int) -> Product:
        """Return the products of `count` such nodes."""
        return replace(self, flops=self.flops * count)


def products(
    operators: onnx.ModelProto,
    config: ModelConfig,
    *,
    weights: Iterable[str],
    plugins: Collection[str],
    precision: str,
    context: int,
) -> list[Product]:
    """Return the matrix products of a specialized graph before inlining.

    Args:
        operators: the graph with its custom nodes.
        config: the model's config.
        weights: names of the inputs that are weights.
        plugins: op_types that run as plugins.
        precision: the precision in which plugins multiply FP8 weights.
        context: keys that a token sees.
    """
    graph = operators.graph
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    source = {name: name for name in weights}
    counted = []
    for node in graph.node:
        operator = operator_of(node)
        if node.op_type in ("Cast", "Transpose") and node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]
            types[node.output[0]] = types[node.input[0]]
            if node.op_type == "Cast":
                types[node.output[0]] = next(a.i for a in node.attribute if a.name == "to")
        elif operator is not None and operator.products is not None:
            inputs = dict(zip((arg.name for arg in operator.spec.all_inputs), node.input))
            known = {name: shapes[value] for name, value in inputs.items() if value in shapes}
            what = node.op_type if operator.in_programs else _kind(inputs["weight"])
            form: Form = "plugin" if node.op_type in plugins else "inlined"
            dtype = operator.products.inlined
            if form == "plugin":
                dtype = operator.products.in_plugin(read_attrs(node), known)
                dtype = precision if dtype == "fp8" else dtype
            counted.append(Product(what, form, dtype, operator.products.flops(known, config, context)))
        elif node.op_type == "MatMul":
            name = next((name for name in node.input if name in source), None)
            if name is not None:
                weight = source[name]
                work = 2.0 * math.prod(shapes[weight])
                counted.append(Product(_kind(weight), "native", FROM_ONNX[types[name]], work))
    return counted


def _kind(weight: str) -> str:
    """Return the name of a weight's module, the same for all layers."""
    parts = weight.removesuffix(".weight").split(".")
    return ".".join(parts[2:] if parts[0] == "layers" else parts).removeprefix(f"{ATTENTION}.")


def shares(counted: Iterable[Product]) -> tuple[Share, ...]:
    """Return the shares by kind, form and precision, largest first."""
    sums: dict[tuple[str, Form, str], float] = defaultdict(float)
    for one in counted:
        sums[one.what, one.form, one.precision] += one.flops
    total = sum(sums.values()) or 1.0
    ordered = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    return tuple(
        Share(what=what, form=form, precision=precision, share=round(flops / total, 6))
        for (what, form, precision), flops in ordered
    )


def require_precision(audited: Iterable[Share], option: str, expected: str, in_16_bits: Collection[str] = ()) -> None:
    """Refuse an engine whose products of FP8 weights are less than was asked for.

    Args:
        audited: the shares of the audit.
        option: the precision, as the user said it.
        expected: what that means on the target: bf16 where it has no FP8 units.
        in_16_bits: operators that multiply in F16 by what was asked.

    Raises:
        EngineError: some run in another precision; the message says which and how much.
    """
    if expected != "fp8":
        return
    less = [one for one in audited if one.what in FP8_OPS and one.what not in in_16_bits and one.precision != "fp8"]
    if less:
        share = sum(one.share for one in less)
        names = " and ".join(dict.fromkeys(f"{one.what} ({one.form})" for one in less))
        raise EngineError(
            f"{option} was asked, but {names} multiply in {less[0].precision}: {share:.0%} of the matrix-product "
            "FLOPs; build with --plugins all, or ask for --precision bf16"
        )
