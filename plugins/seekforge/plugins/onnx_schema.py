"""ONNX operator schemas with shape inference, made from the specs: the checker and `infer_shapes` know our ops.

A process without these schemas reads a program all the same (the checker does not mind unknown domains);
with them, wrong shapes and attributes are found where they are written.
"""

from __future__ import annotations

from typing import Any, Final

import onnx
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceError

from seekforge.common import dtypes
from seekforge.common.errors import ShapeError
from seekforge.plugins.operator import DOMAIN, DOMAIN_VERSION, TYPE_VARIABLES, Arg, OpSpec
from seekforge.plugins.registry import SPECS

#: Attribute of every node: with it, TensorRT takes a registered plugin and else inlines the function.
PLUGIN_NAMESPACE: Final = "plugin_namespace"

_ATTR_TYPES: Final[dict[str, OpSchema.AttrType]] = {
    "int": OpSchema.AttrType.INT,
    "bool": OpSchema.AttrType.INT,
    "float": OpSchema.AttrType.FLOAT,
    "str": OpSchema.AttrType.STRING,
}
_CONVERT: Final = {"int": int, "bool": bool, "float": float, "str": str}


def make_schema(spec: OpSpec) -> OpSchema:
    """Return the ONNX schema of an operator, with type and shape inference."""

    def formal(arg: Arg) -> OpSchema.FormalParameter:
        option = OpSchema.FormalParameterOption
        presence = option.Optional if arg in spec.optional else option.Single
        type_str = arg.dtype if arg.dtype in TYPE_VARIABLES else dtypes.ONNX_TYPES[arg.dtype]
        shape = ", ".join(str(dim) for dim in arg.shape)
        return OpSchema.FormalParameter(arg.name, type_str, f"[{shape}] {arg.doc}", param_option=presence)

    used = {arg.dtype for arg in spec.all_inputs} & TYPE_VARIABLES.keys()
    schema = OpSchema(
        spec.name,
        DOMAIN,
        DOMAIN_VERSION,
        spec.doc,
        inputs=[formal(arg) for arg in spec.all_inputs],
        outputs=[formal(arg) for arg in spec.outputs],
        type_constraints=[(name, [dtypes.ONNX_TYPES[t] for t in TYPE_VARIABLES[name]], name) for name in sorted(used)],
        attributes=[
            *(OpSchema.Attribute(attr.name, _ATTR_TYPES[attr.kind], attr.doc) for attr in spec.attrs),
            OpSchema.Attribute(
                PLUGIN_NAMESPACE,
                OpSchema.AttrType.STRING,
                "TensorRT: prefer a plugin of this namespace",
                required=False,
            ),
        ],
    )
    schema.set_type_and_shape_inference_function(lambda context: infer(spec, context))
    return schema


def register_schemas() -> None:
    """Register the schemas of all operators; once per process is enough, more often does no harm."""
    for spec in SPECS.values():
        if not onnx.defs.has(spec.name, domain=DOMAIN):
            onnx.defs.register_schema(make_schema(spec))


def infer(spec: OpSpec, context: Any) -> None:
    """Set the output types of a node of `spec`; does nothing while the type or the rank of an input is unknown.

    Args:
        context: `onnx.shape_inference.InferenceContext`.

    Raises:
        InferenceError: a rank, size, dtype or attribute differs from the contract.
    """
    types = [context.get_input_type(i) for i in range(context.get_num_inputs())]
    # None behind operators that ONNX does not know, such as products with codes
    if any(t is None or not t.HasField("tensor_type") or not t.tensor_type.HasField("shape") for t in types):
        return
    attrs = {}
    for attr in spec.attrs:
        value = context.get_attribute(attr.name)
        if value is None:
            raise InferenceError(f"{spec.name}: attribute {attr.name} is missing")
        if value.ref_attr_name:
            return  # inside a function: known only where it is called
        got = onnx.helper.get_attribute_value(value)
        attrs[attr.name] = _CONVERT[attr.kind](got.decode() if isinstance(got, bytes) else got)
    try:
        elements = spec.named([t.tensor_type.elem_type for t in types])
        names = {name: dtypes.FROM_ONNX.get(t, str(t)) for name, t in elements.items()}
        spec.check_attrs(attrs)
        bound = spec.bind([[_read(dim) for dim in t.tensor_type.shape.dim] for t in types], attrs)
        results = zip(spec.output_dtypes(names), spec.output_shapes(bound), strict=True)
    except ShapeError as error:
        raise InferenceError(str(error)) from None
    for i, (dtype, shape) in enumerate(results):
        written = [_write(dim) for dim in shape]
        context.set_output_type(i, onnx.helper.make_tensor_type_proto(dtypes.ONNX[dtype], written))


class _Symbol:
    """A size that is not a number: a named one (`dim_param`) or an unknown one. Arithmetic on it is unknown."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def _unknown(self, *_: object) -> _Symbol:
        return _Symbol()

    __neg__ = __add__ = __radd__ = __mul__ = __rmul__ = __floordiv__ = __rfloordiv__ = _unknown


def _read(dim: onnx.TensorShapeProto.Dimension) -> int | _Symbol:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return _Symbol(dim.dim_param or None)


def _write(dim: int | _Symbol) -> int | str | None:
    return dim.name if isinstance(dim, _Symbol) else dim
