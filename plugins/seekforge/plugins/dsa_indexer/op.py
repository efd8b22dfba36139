"""`torch.ops.seekforge.dsa_indexer`."""

from seekforge.plugins.dsa_indexer.reference import dsa_indexer as _reference
from seekforge.plugins.dsa_indexer.spec import SPEC
from seekforge.plugins.torch_ops import register

dsa_indexer = register(SPEC, _reference)
