"""`torch.ops.seekforge.dsa_cache_write`."""

from seekforge.plugins.dsa_cache_write.reference import dsa_cache_write as _reference
from seekforge.plugins.dsa_cache_write.spec import SPEC
from seekforge.plugins.torch_ops import register

dsa_cache_write = register(SPEC, _reference)
