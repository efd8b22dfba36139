"""`torch.ops.seekforge.moe_route`."""

from seekforge.plugins.moe_route.reference import moe_route as _reference
from seekforge.plugins.moe_route.spec import SPEC
from seekforge.plugins.torch_ops import register

moe_route = register(SPEC, _reference)
