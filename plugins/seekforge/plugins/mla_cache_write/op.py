"""`torch.ops.seekforge.mla_cache_write`."""

from seekforge.plugins.mla_cache_write.reference import mla_cache_write as _reference
from seekforge.plugins.mla_cache_write.spec import SPEC
from seekforge.plugins.torch_ops import register

mla_cache_write = register(SPEC, _reference)
