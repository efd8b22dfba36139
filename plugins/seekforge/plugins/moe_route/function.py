"""`MoeRoute` in standard ONNX operators; the same body for every target.

The sigmoid is written out: ONNX Runtime's own has a relative error of 2e-3 at −10 and clamps below −18, where the
quotient of two weights needs its digits.
"""

import numpy as np
import onnx

from seekforge.plugins.functions.builder import Attrs, Text, onnx_type
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.moe_route.spec import SPEC


def body(attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return group-limited selection by biased scores, and weights from the unbiased ones."""
    text = Text()
    n_group = int(attrs["n_group"])
    text.add(f"""
  negated = Neg(logits)
  e = Exp(negated)
  denominator = Add(e, {text.f32(1)})
  scores = Reciprocal(denominator)
  biased = Add(scores, bias)
  groups = Reshape(biased, {text.ints(0, n_group, -1)})
  best, best_at = TopK<axis = -1, largest = 1, sorted = 1>(groups, {text.ints(2)})
  group_score = ReduceSum<keepdims = 0>(best, {text.ints(-1)})
  group_best, kept = TopK<axis = -1, largest = 1, sorted = 1>(group_score, {text.ints(int(attrs["topk_group"]))})
  kept3 = Unsqueeze(kept, {text.ints(2)})
  is_kept = Equal(kept3, {text.table(np.arange(n_group, dtype=np.int64))})
  counted = Cast<to = {onnx_type("i32")}>(is_kept)
  any_kept = ReduceMax<keepdims = 0>(counted, {text.ints(1)})
  mask = Cast<to = {onnx_type("bool")}>(any_kept)
  mask3 = Unsqueeze(mask, {text.ints(2)})
  limited = Where(mask3, groups, {text.f32(-np.inf)})
  flat = Reshape(limited, {text.ints(0, -1)})
  picked_score, picked = TopK<axis = -1, largest = 1, sorted = 1>(flat, {text.ints(int(attrs["top_k"]))})
  weights = GatherElements<axis = 1>(scores, picked)
""")
    if attrs["norm"]:
        text.add(f"""
  total = ReduceSum<keepdims = 1>(weights, {text.ints(-1)})
  divisor = Add(total, {text.f32(1e-20)})
  shares = Div(weights, divisor)
""")
    else:
        text.add("shares = Identity(weights)")
    text.add(f"expert_weights = Mul(shares, {text.f32(float(attrs['scale']))})")
    text.add(f"expert_ids = Cast<to = {onnx_type('i32')}>(picked)")
    return text.body_of(SPEC)
