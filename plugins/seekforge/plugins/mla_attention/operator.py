"""`MlaAttention` as the rest of the tree knows it."""

from __future__ import annotations

from seekforge.plugins.dsa_attention.operator import flops_per_key
from seekforge.plugins.mla_attention.spec import SPEC
from seekforge.plugins.operator import Operator, Products, Taps

OPERATOR = Operator(
    spec=SPEC,
    in_programs=True,
    body="seekforge.plugins.mla_attention.function:body",
    inlined_limits=(),
    inlined_weights=None,
    folded=None,
    products=Products(
        flops=lambda shapes, config, keys: flops_per_key(config) * keys,
        in_plugin=lambda attrs: "bf16",
        inlined="f32",  # the body computes in f32, as the reference does
    ),
    taps=Taps(inputs={"q_latent": "q_latent", "q_pe": "q_pe"}, outputs={"o_latent": "o_latent"}),
    kernels=None,
)
