"""Contract of `SumRanks`: y = Σ x over the tensor-parallel ranks.

Not called AllReduce: parsers look at the op_type alone, and ONNX Runtime has an operator of that name.
"""

from seekforge.plugins.operator import Arg, Attr, OpSpec

SPEC = OpSpec(
    name="SumRanks",
    version=1,
    doc="Sum over all ranks; every rank gets the sum. The body is the identity: what one rank gives to the sum.",
    inputs=(Arg("x", "act", ("*lead", "H"), "this rank's part of the sum"),),
    outputs=(Arg("y", "act", ("*lead", "H"), "Σ x over ranks, in the dtype of x"),),
    attrs=(Attr("num_ranks", "int", "tensor-parallel ranks, 2 or more"),),
)
