"""`SumRanks` as the rest of the tree knows it: TensorRT's own collective runs it, so there are no kernels."""

from seekforge.plugins.operator import NO_TAPS, Operator
from seekforge.plugins.sum_ranks.spec import SPEC

OPERATOR = Operator(
    spec=SPEC,
    in_programs=True,
    body="seekforge.plugins.sum_ranks.function:body",
    inlined_limits=(),
    inlined_weights=None,
    inlined_scratch=None,
    folded=None,
    native=False,
    products=None,
    taps=NO_TAPS,
    kernels=None,
)
