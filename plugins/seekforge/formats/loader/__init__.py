"""Fill weight inputs from a checkpoint: any set of them, each byte read once, straight into the caller's buffers.

Recipes become jobs: a run of checkpoint bytes and the places it goes to. Jobs are sorted by file and offset and
dealt to reader threads. What lies in one piece on both sides is read into the buffer itself; the rest goes through a
small scratch per thread, so the extra memory is bounded whatever the model.

Shards are read by calls and not through a mapping: the pages of a mapping count as our memory, and a shard that
shrinks while it is read would end the process with SIGBUS, where a call says that bytes are missing.
"""

from seekforge.formats.loader.loader import EXTRA_BYTES, Loader, allocate
from seekforge.formats.loader.progress import LoadProgress, LoadReport

__all__ = ["EXTRA_BYTES", "LoadProgress", "LoadReport", "Loader", "allocate"]
