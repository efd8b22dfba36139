"""Trace a step program under fake tensors and convert it to ONNX with its weights as inputs.

No weight byte is read or allocated: parameters are fake tensors, and none becomes an initializer. Custom
operators come out as single nodes of domain `seekforge`; their bodies are attached later.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer, values
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules import common as rules
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from seekforge.common.dtypes import ONNX
from seekforge.common.errors import ProgramError
from seekforge.exporter.models import family_of
from seekforge.exporter.models.shared.model import MtpModel, StepModel
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.weights import recipes
from seekforge.exporter.program.canonical_names import canonicalise
from seekforge.exporter.program.lower import lower
from seekforge.exporter.program.replicate import groups_to_trace, stamp
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.program import role_of
from seekforge.formats.step_io import INTERMEDIATE_TENSORS, TOPK_INDICES_IN
from seekforge.formats.weight_recipes import Recipe
from seekforge.plugins.onnx_schema import register_schemas
from seekforge.plugins.operator import DOMAIN, DOMAIN_VERSION, OpSpec
from seekforge.plugins.registry import OPERATORS
from seekforge.plugins.torch_ops import DTYPE_NAMES

#: ONNX opset of every program. Converting between opsets would inline our functions, so it is traced at this.
OPSET = 23
_IR_VERSION = 11

#: Symbolic axes: sequences, new tokens each, blocks per sequence, rows with logits, cache slots.
AXES = ("B", "Q", "MB", "N", "NS")
#: Those of the fifty rules which onnxscript's optimizer tries on every node that are about operators of a step, in its
#: order. The others are about convolutions, batch norms, clips, scatters and biases of operators that no step has, and
#: about a pair of slices that halve a tensor, which the optimizer looks for behind every node; steps split.
_RULES = RewriteRuleSet(
    [
        *rules.mul_by_1_rule.commute(),
        *rules.add_0_rule.commute(),
        rules.sub_0_rule,
        rules.div_by_1_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.materialize_reshape_shape_rule,
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.flatten_to_reshape_rule,
        rules.reshape_reshape_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.squeeze_reshape_1d_rule,
    ]
)
# Example sizes for the trace. None may be 0 or 1 (torch specializes those), nor the model's own sizes.
_EXAMPLE = {"B": 2, "Q": 3, "MB": 5, "N": 4, "NS": 7 * BLOCK_SIZE}


@dataclass(frozen=True)
class _Input:
    """A graph input that is not a weight."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Traced:
    """A converted graph.

    Attributes:
        model: ONNX without functions; inputs are tokens, bookkeeping, caches, then weights.
        recipes: weight input -> how it comes from the checkpoint, in input order.
        aliases: cache output -> cache input.
        output_names: all outputs in order.
    """

    model: onnx.ModelProto
    recipes: dict[str, Recipe]
    aliases: dict[str, str]
    output_names: tuple[str, ...]


def step_inputs(model: StepModel | MtpModel) -> list[_Input]:
    """Return the inputs of `model` that are not weights, in graph order.

    `logits_index` is among them even where no logits are given: the tracer names axes by position and is led
    astray by a missing argument. `trace` takes it out of the graph.
    """
    config, dtype = model.settings.config, model.settings.dtype
    known = {
        "input_ids": _Input("input_ids", torch.int64, ("B", "Q")),
        TOPK_INDICES_IN: _Input(TOPK_INDICES_IN, torch.int32, ("B", "Q", config.index_topk)),
    }
    tokens = [known.get(name, _Input(name, dtype, ("B", "Q", config.hidden_size))) for name in model.token_names()]
    bookkeeping = [
        _Input("positions", torch.int64, ("B", "Q")),
        _Input("slot_mapping", torch.int64, ("B", "Q")),
        _Input("block_table", torch.int32, ("B", "MB")),
        _Input("logits_index", torch.int64, ("N",)),
    ]
    caches = [
        _Input(f"{kind}.{layer}", dtype, ("NS", size))
        for kind in model.cache_kinds()
        for layer, size in model.layers_with(kind).items()
    ]
    return [*tokens, *bookkeeping, *caches]


def cache_output(name: str) -> str:
    """Name of the output that a cache input aliases: `latent_cache.3` -> `latent_cache_out.3`."""
    kind, _, layer = name.partition(".")
    return f"{kind}_out.{layer}"


def output_names(model: StepModel | MtpModel) -> list[str]:
    """Return the names of all graph outputs, in order; what is handed over must not be called like what came in."""
    results = [f"{name}_out" if name in INTERMEDIATE_TENSORS else name for name in model.result_names()]
    return [*results, *map(cache_output, model.cache_names()), *model.tap_names()]


def trace(
    settings: Settings,
    layer_range: tuple[int, int] | None,
    progress: Callable[[str], None],
    *,
    every_layer: bool = False,
) -> Traced:
    """Trace and convert one program.

    Args:
        settings: what to build; the canonical program uses bf16 activations.
        layer_range: layers of the main model, or None for the MTP module.
        progress: told each stage as it starts.
        every_layer: trace all layers instead of a few of each kind: the same graph, slowly.

    Raises:
        ProgramError: the result misses a promise (an axis became static, a foreign operator is left).
    """
    progress("trace")
    # tables are parameters too, so no real constant is made inside the mode
    with FakeTensorMode(shape_env=ShapeEnv()):
        made = family_of(settings.config).module("model")
        whole: StepModel | MtpModel = (
            made.StepModel(settings, layer_range) if layer_range else made.MtpModel(settings)
        ).eval()
        layers = tuple(whole.layer_numbers)
        groups = ((layer,) for layer in layers)
        if layer_range and not every_layer:
            groups = groups_to_trace(settings.config, layer_range)
        groups = tuple(groups)
        some = tuple(itertools.chain.from_iterable(groups))
        part = whole
        if layer_range and some != layers:
            part = made.StepModel(settings, layer_range, layers=some).eval()
        exported = _export(part, step_inputs(part))
    progress("convert")
    register_schemas()
    converted = _convert(lower(exported), step_inputs(part), output_names(part))
    if "logits" not in whole.result_names():
        _drop_input(converted, "logits_index")
    _weights_to_inputs(converted, [name for name, _ in part.named_parameters()])
    progress("optimize")
    _optimize(converted)
    proto = _finish(converted)
    progress("stamp and name")
    named, outputs = recipes(whole), output_names(whole)
    if some != layers:
        inputs = _input_infos(whole, named)
        proto = stamp(proto, groups, layers, inputs=inputs, outputs=outputs)
    canonicalise(proto, named)
    _check_promises(proto, step_inputs(whole))
    return Traced(proto, named, {cache_output(name): name for name in whole.cache_names()}, tuple(outputs))


def _input_infos(model: StepModel | MtpModel, named: Mapping[str, Recipe]) -> list[onnx.ValueInfoProto]:
    """Return the graph inputs of `model`, weights included, in order."""
    others = [
        (spec.name, DTYPE_NAMES[spec.dtype], spec.shape)
        for spec in step_inputs(model)
        if spec.name != "logits_index" or "logits" in model.result_names()
    ]
    weights = [(name, recipe.dtype, recipe.shape) for name, recipe in named.items()]
    return [onnx.helper.make_tensor_value_info(name, ONNX[dtype], shape) for name, dtype, shape in [*others, *weights]]


def _arguments(inputs: list[_Input], make: Callable[[_Input], Any], num_tokens: int) -> tuple[Any, ...]:
    """Arrange one value per input as `forward` takes them."""
    values = {spec.name: make(spec) for spec in inputs}
    names = list(values)
    tokens = tuple(values[name] for name in names[:num_tokens])
    caches: dict[str, list[Any]] = {}
    for name in names:
        if role_of(name) == "cache":
            caches.setdefault(name.partition(".")[0], []).append(values[name])
    return (
        tokens,
        values["positions"],
        values["slot_mapping"],
        values["block_table"],
        values["logits_index"],
        list(caches.values()),
    )


def _export(model: StepModel | MtpModel, inputs: list[_Input]) -> torch.export.ExportedProgram:
    dims = {axis: torch.export.Dim(axis) for axis in AXES}

    def example(spec: _Input) -> Tensor:
        return torch.zeros([_EXAMPLE.get(dim, dim) for dim in spec.shape], dtype=spec.dtype)  # pyright: ignore

    def dynamic(spec: _Input) -> dict[int, Any]:
        return {i: dims[dim] for i, dim in enumerate(spec.shape) if isinstance(dim, str)}

    num_tokens = len(model.token_names())
    return torch.export.export(
        model,
        _arguments(inputs, example, num_tokens),
        dynamic_shapes=_arguments(inputs, dynamic, num_tokens),
        strict=False,
    )


def translation_table() -> dict[Any, Any]:
    """Return torch operator -> function that emits our ONNX node, for the operators that programs have."""
    opset = values.Opset(DOMAIN, DOMAIN_VERSION)

    def translate(spec: OpSpec) -> Callable[..., Any]:
        emit = getattr(opset, spec.name)
        count = len(spec.inputs)

        def node(*args: Any) -> Any:
            attrs = {attr.name: value for attr, value in zip(spec.attrs, args[count:], strict=True)}
            attrs = {name: int(value) if isinstance(value, bool) else value for name, value in attrs.items()}
            return emit(*args[:count], **attrs, _outputs=len(spec.outputs))

        return node

    namespace, table = getattr(torch.ops, DOMAIN), {}
    for spec in (operator.spec for operator in OPERATORS.values() if operator.in_programs):
        importlib.import_module(f"seekforge.plugins.{spec.torch_name}.op")  # a model imports its own operators alone
        table[getattr(namespace, spec.torch_name).default] = translate(spec)
    return table


def _convert(exported: torch.export.ExportedProgram, inputs: list[_Input], outputs: list[str]) -> ir.Model:
    axes = [{i: dim for i, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in inputs]
    by_name = dict(zip((spec.name for spec in inputs), axes, strict=True))
    num_tokens = next(i for i, spec in enumerate(inputs) if spec.name == "positions")
    dynamic = _arguments(inputs, lambda spec: by_name[spec.name], num_tokens)
    with _quiet():
        program = torch.onnx.export(
            exported,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            custom_translation_table=translation_table(),
            dynamic_shapes=dynamic,
            input_names=[spec.name for spec in inputs],
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    return program.model


def _optimize(model: ir.Model) -> None:
    """Do what `onnxscript.optimizer.optimize` does, in its order, with `_RULES`."""
    passes.InlinePass()(model)
    for _ in range(2):
        changed = optimizer.fold_constants(model, onnx_shape_inference=True).modified
        changed = _RULES.apply_to_model(model) > 0 or changed
        for kind in (passes.RemoveUnusedNodesPass, passes.RemoveUnusedFunctionsPass, passes.RemoveUnusedOpsetsPass):
            changed = kind()(model).modified or changed
        if not changed:
            break
    for finish in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        finish(model)


def _drop_input(model: ir.Model, name: str) -> None:
    """Remove an input that nothing reads."""
    value = next(value for value in model.graph.inputs if value.name == name)
    assert not value.uses(), name
    model.graph.inputs.remove(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter's prints and its warnings about names of axes, which are as intended."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _weights_to_inputs(model: ir.Model, names: list[str]) -> None:
    """Turn the initializer of every parameter into a graph input, in parameter order."""
    graph = model.graph
    missing = [name for name in names if name not in graph.initializers]
    if missing:
        raise ProgramError(f"trace lost the weight {missing[0]!r} ({len(missing)} in all): it is not used")
    for name in names:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    for name, value in graph.initializers.items():
        constant = value.const_value
        if isinstance(getattr(constant, "raw", None), torch._subclasses.FakeTensor):
            raise ProgramError(f"trace made the constant {name!r} inside the fake mode: it has no value")


def _finish(model: ir.Model) -> onnx.ModelProto:
    """Drop everything that names this machine or the tracer, so that two exports give the same bytes."""
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version = "seekforge", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "step"
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in itertools.chain(model.graph.inputs, model.graph.outputs, model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    model.functions.clear()
    return ir.to_proto(model)


def _check_promises(model: onnx.ModelProto, inputs: list[_Input]) -> None:
    """Every declared dynamic axis must still be symbolic, under its own name, and every operator be known."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    for spec in inputs:
        if spec.name not in shapes:
            continue
        for axis, dim in enumerate(spec.shape):
            got = shapes[spec.name][axis]
            if isinstance(dim, str) and got.dim_param != dim:
                raise ProgramError(f"trace fixed axis {dim} of {spec.name} to {got.dim_value}; it must stay symbolic")
    known = {"", DOMAIN}
    for node in model.graph.node:
        if node.domain not in known or node.op_type.startswith("Sequence"):
            raise ProgramError(f"trace left the operator {node.domain}::{node.op_type}, which no engine reads")
