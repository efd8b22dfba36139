"""`torch.ops.seekforge.dsa_attention`."""

from seekforge.plugins.dsa_attention.reference import dsa_attention as _reference
from seekforge.plugins.dsa_attention.spec import SPEC
from seekforge.plugins.torch_ops import register

dsa_attention = register(SPEC, _reference)
