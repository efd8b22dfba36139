"""`torch.ops.seekforge.moe_experts`."""

from seekforge.plugins.moe_experts.reference import moe_experts as _reference
from seekforge.plugins.moe_experts.spec import SPEC
from seekforge.plugins.torch_ops import register

moe_experts = register(SPEC, _reference)
