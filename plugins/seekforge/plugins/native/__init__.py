"""Operators of the CPU as a library for ONNX Runtime: one node where the body in standard operators has dozens.

At batch 1 a decode step is bound by reading weights, and every node costs some microseconds beside that: with the
bodies in standard operators, nine of ten nodes of a step reshaped, gathered or compared. The library is optional.
Engines hold the bodies as functions, which ONNX Runtime inlines where no library claims the operator: the same file
runs both ways.

C++ stands in the operator's folder, `plugins/<op>/cpu/`, of those that `plugins.registry` lists as `NATIVE` and
`NATIVE_FORMS`; here is what operators share.
"""

from typing import Final

#: op_type of what an engine for the CPU has in place of several nodes -> `module:function` that makes its body.
FUSED: Final = {
    "AddRmsNorm": "seekforge.plugins.fused.bodies:add_rms_norm",
    "SwiGlu": "seekforge.plugins.fused.bodies:swiglu_form",
    "FakeQuantize": "seekforge.plugins.fused.bodies:fake_quantize_form",
    "MoeRouteAll": "seekforge.plugins.fused.bodies:route_all",
    "QueryRows": "seekforge.plugins.fused.bodies:query_rows",
    "IndexQuery": "seekforge.plugins.fused.bodies:index_query",
    "LatentRows": "seekforge.plugins.fused.bodies:latent_rows",
    "PlainLatentRows": "seekforge.plugins.fused.bodies:plain_latent_rows",
    "HeadAttention": "seekforge.plugins.fused.bodies:head_attention",
    "HeadMlaAttention": "seekforge.plugins.fused.bodies:head_mla_attention",
}
