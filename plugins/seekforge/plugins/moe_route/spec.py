"""Contract of `MoeRoute`: noaux_tc routing (spec §4)."""

from seekforge.plugins.operator import Arg, Attr, OpSpec

SPEC = OpSpec(
    name="MoeRoute",
    version=1,
    doc="Pick top_k experts by sigmoid(logits) + bias inside the topk_group best groups; weights from sigmoid alone.",
    inputs=(
        Arg("logits", "f32", ("T", "E"), "router logits"),
        Arg("bias", "f32", ("E",), "of each expert; selects only"),
    ),
    outputs=(
        Arg("expert_ids", "i32", ("T", "top_k"), "by falling biased score; ties to the lowest expert"),
        Arg("expert_weights", "f32", ("T", "top_k"), "scale · s / Σ s over the picked (norm), else scale · s"),
    ),
    attrs=(
        Attr("n_group", "int", "groups of experts"),
        Attr("topk_group", "int", "groups kept, by the sum of their two best biased scores"),
        Attr("top_k", "int", "experts per token"),
        Attr("norm", "bool", "divide the weights by their sum"),
        Attr("scale", "float", "routed_scaling_factor"),
    ),
)
