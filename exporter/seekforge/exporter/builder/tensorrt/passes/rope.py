"""RoPE in plain operators, for graphs whose operators are inlined.

TensorRT-RTX 1.7.1 compiles such a graph as one piece, and fails in it over `RotaryEmbedding` with dynamic axes
("producer is not shape_call", the tiny model); between plugins the operator is fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

#: To the end of an axis.
_END = np.iinfo(np.int64).max


def write_out_rope(model: onnx.ModelProto) -> None:
    """Replace each `RotaryEmbedding` of [B, Q, num_heads · D], with cos and sin [B, Q, R / 2], in place."""
    kept: list[onnx.NodeProto] = []
    constants: dict[str, onnx.TensorProto] = {}
    for node in model.graph.node:
        kept += _Written(node, constants).nodes if node.op_type == "RotaryEmbedding" else [node]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(constants.values())


class _Written:
    """The nodes that take the place of one.

    Attributes:
        nodes: the nodes in order; the last gives the result of the one.
    """

    def __init__(self, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._node, self._constants = node, constants
        attrs = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        heads, width = attrs["num_heads"], attrs["rotary_embedding_dim"]
        x, *tables = node.input
        cos, sin = (self._add("Unsqueeze", [table, self._ints(2)]) for table in tables)
        x = self._add("Reshape", [x, self._ints(0, 0, heads, -1)])
        turning, still = self._part(x, 0, width), self._part(x, width, _END)
        if attrs.get("interleaved", 0):
            pairs = self._add("Reshape", [turning, self._ints(0, 0, heads, width // 2, 2)])
            u, v = (self._add("Gather", [pairs, self._scalar(i)], axis=4) for i in (0, 1))
            turned = [self._add("Unsqueeze", [one, self._ints(4)]) for one in self._turn(u, v, cos, sin)]
            turning = self._add("Reshape", [self._add("Concat", turned, axis=4), self._ints(0, 0, heads, width)])
        else:
            u, v = self._part(turning, 0, width // 2), self._part(turning, width // 2, _END)
            turning = self._add("Concat", self._turn(u, v, cos, sin), axis=3)
        whole = self._add("Concat", [turning, still], axis=3)
        self._add("Reshape", [whole, self._ints(0, 0, -1)])
        self.nodes[-1].output[0] = node.output[0]

    def _turn(self, u: str, v: str, cos: str, sin: str) -> list[str]:
        mul = [self._add("Mul", pair) for pair in ((u, cos), (v, sin), (u, sin), (v, cos))]
        return [self._add("Sub", mul[:2]), self._add("Add", mul[2:])]

    def _part(self, x: str, start: int, stop: int) -> str:
        return self._add("Slice", [x, self._ints(start), self._ints(stop), self._ints(3)])

    def _add(self, op: str, inputs: Sequence[str], **attrs: Any) -> str:
        output = f"{self._node.output[0]}.{len(self.nodes)}"
        name = f"{self._node.name}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attrs))
        return output

    def _ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _scalar(self, value: int) -> str:
        return self._constant(np.array(value, np.int64))

    def _constant(self, values: np.ndarray) -> str:
        name = f"rope.{values.ndim}.{'.'.join(map(str, values.reshape(-1)))}"
        self._constants.setdefault(name, numpy_helper.from_array(values, name))
        return name
