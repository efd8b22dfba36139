"""`torch.ops.seekforge.bf16_linear`, for tests alone: the model writes the product out."""

from seekforge.plugins.bf16_linear.reference import bf16_linear as _reference
from seekforge.plugins.bf16_linear.spec import SPEC
from seekforge.plugins.torch_ops import register

bf16_linear = register(SPEC, _reference)
