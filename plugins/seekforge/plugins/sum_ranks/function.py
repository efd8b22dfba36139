"""`SumRanks` in standard ONNX operators: the identity."""

import onnx

from seekforge.plugins.functions.builder import Attrs, Text
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.sum_ranks.spec import SPEC


def body(attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return y = x: a graph of one rank computes that rank's part."""
    text = Text()
    text.add("y = Identity(x)")
    return text.body_of(SPEC)
