"""`MlaCacheWrite` as the rest of the tree knows it."""

from __future__ import annotations

from seekforge.plugins.mla_cache_write.spec import SPEC
from seekforge.plugins.operator import Operator, Taps

OPERATOR = Operator(
    spec=SPEC,
    in_programs=True,
    body="seekforge.plugins.mla_cache_write.function:body",
    inlined_limits=(),
    inlined_weights=None,
    inlined_scratch=None,
    folded=None,
    products=None,
    taps=Taps(inputs={"c": "kv_latent", "k_pe": "k_pe"}, outputs={}),
    kernels=None,
)
