"""What JSON says of an ONNX graph: its inputs and outputs, each with its type, its shape and its role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from seekforge.common.dtypes import FROM_ONNX
from seekforge.formats.program import GraphIO, Role, TensorSpec

if TYPE_CHECKING:
    import onnx


def graph_io(
    model: onnx.ModelProto, file: str, *, role_of: Callable[[str], Role], aliases: Mapping[str, str], sha256: str = ""
) -> GraphIO:
    """Describe the inputs and outputs of a graph.

    Args:
        model: the graph, without functions or with them.
        file: the name of the file that holds it, or the plan that is made of it, beside the JSON.
        role_of: returns the role of an input or output by its name.
        aliases: output -> input of each cache that is updated in place. Outputs that this graph does not give are left
            out.
        sha256: the digest of the file; empty until there is one.
    """
    outputs = tuple(tensor_spec(value, role_of(value.name)) for value in model.graph.output)
    names = {spec.name for spec in outputs}
    return GraphIO(
        file=file,
        sha256=sha256,
        inputs=tuple(tensor_spec(value, role_of(value.name)) for value in model.graph.input),
        outputs=outputs,
        aliases={output: source for output, source in aliases.items() if output in names},
    )


def tensor_spec(value: onnx.ValueInfoProto, role: Role) -> TensorSpec:
    """Describe one input or output of a graph."""
    return TensorSpec(
        name=value.name, dtype=FROM_ONNX[value.type.tensor_type.elem_type], shape=shape_of(value), role=role
    )


def shape_of(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """Return the shape of an input or output; a text is the name of a symbolic axis."""
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_param if dim.HasField("dim_param") else dim.dim_value for dim in dims)


def roles_in(described: GraphIO) -> dict[str, Role]:
    """Return the role of each input and output of a graph that is described already."""
    return {spec.name: spec.role for spec in (*described.inputs, *described.outputs)}
