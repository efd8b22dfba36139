"""`torch.ops.seekforge.sum_ranks`."""

from seekforge.plugins.sum_ranks.reference import sum_ranks as _reference
from seekforge.plugins.sum_ranks.spec import SPEC
from seekforge.plugins.torch_ops import register

sum_ranks = register(SPEC, _reference)
