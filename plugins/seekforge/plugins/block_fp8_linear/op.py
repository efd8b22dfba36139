"""`torch.ops.seekforge.block_fp8_linear`."""

from seekforge.plugins.block_fp8_linear.reference import block_fp8_linear as _reference
from seekforge.plugins.block_fp8_linear.spec import SPEC
from seekforge.plugins.torch_ops import register

block_fp8_linear = register(SPEC, _reference)
