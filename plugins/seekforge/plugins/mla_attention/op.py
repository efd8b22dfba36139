"""`torch.ops.seekforge.mla_attention`."""

from seekforge.plugins.mla_attention.reference import mla_attention as _reference
from seekforge.plugins.mla_attention.spec import SPEC
from seekforge.plugins.torch_ops import register

mla_attention = register(SPEC, _reference)
