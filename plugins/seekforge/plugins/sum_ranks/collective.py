"""`SumRanks` for TensorRT: the parser's node `DistCollective`, an all-reduce over every rank through NCCL.

Its body, the identity, would be wrong there: one rank's part would pass for the sum. Attributes are those that the
parser of TensorRT 11 and TensorRT-RTX 1.7 reads; an engine then needs a communicator (`context.set_communicator`).
"""

from __future__ import annotations

from typing import Final

import onnx
from onnx import helper

from seekforge.plugins.operator import DOMAIN
from seekforge.plugins.sum_ranks.spec import SPEC

#: op_type that the parser knows. It looks at no domain; this one says whose it is.
OP_TYPE, COLLECTIVE_DOMAIN = "DistCollective", "trt"
#: No root for a sum that all ranks get, no groups: all of them take part.
_NO_ROOT: Final = -1


def to_collectives(model: onnx.ModelProto) -> int:
    """Replace every `SumRanks` of a graph, in place; returns how many there were."""
    nodes = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type == SPEC.name]
    for node in nodes:
        (num_ranks,) = (one.i for one in node.attribute if one.name == "num_ranks")
        new = helper.make_node(
            OP_TYPE,
            list(node.input),
            list(node.output),
            name=node.name,
            domain=COLLECTIVE_DOMAIN,
            collective_operation="all_reduce",
            reduce_op="sum",
            root=_NO_ROOT,
            nb_rank=num_ranks,
            group_size=0,
        )
        node.CopyFrom(new)
    if nodes:
        model.opset_import.append(helper.make_opsetid(COLLECTIVE_DOMAIN, 1))
    return len(nodes)
