"""`torch.ops.seekforge.add_rms_norm_quantize`, for tests alone: the model writes the norm out."""

from seekforge.plugins.add_rms_norm_quantize.reference import add_rms_norm_quantize as _reference
from seekforge.plugins.add_rms_norm_quantize.spec import SPEC
from seekforge.plugins.torch_ops import register

add_rms_norm_quantize = register(SPEC, _reference)
