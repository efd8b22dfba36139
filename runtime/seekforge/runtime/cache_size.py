"""How many blocks the cache has: what was asked for, or what fits beside everything else.

What a block takes, and on a GPU what the weights, scratch memory and activations leave for the cache, the planner
(`plugins.formats.sizing`) worked out at build; both stand in the manifest.
"""

from __future__ import annotations

import os
from pathlib import Path

from seekforge.plugins.errors import EngineError
from seekforge.plugins.formats.manifest import Manifest
from seekforge.runtime.kv_cache import blocks_needed

#: Part of the free memory of a CPU that caches take when no size is asked for: others live there too.
_CPU_SHARE = 0.5


def decide_num_blocks(
    manifest: Manifest,
    *,
    max_batch_size: int,
    max_model_len: int,
    num_blocks: int | None,
    kv_cache_memory: int | None,
    free_bytes: int | None,
) -> int:
    """Return the size of the cache in blocks, the scrap block included.

    Args:
        manifest: of the engine.
        max_batch_size, max_model_len: what the cache holds when no size is asked for, if that fits.
        num_blocks: asked for.
        kv_cache_memory: bytes asked for.
        free_bytes: of main memory, before the engine is loaded; None where nobody knows. For engines of a CPU.

    Raises:
        EngineError: both sizes are given, or there is not room for two blocks; the message says what to pass.
    """
    size = manifest.cache.bytes_per_block
    if num_blocks is not None and kv_cache_memory is not None:
        raise EngineError("num_blocks and kv_cache_memory both give the size of the cache; pass one")
    most = manifest.max_cache_blocks()
    if num_blocks is not None:
        chosen, asked = num_blocks, f"num_blocks is {num_blocks}"
    elif kv_cache_memory is not None:
        chosen, asked = kv_cache_memory // size, f"kv_cache_memory is {kv_cache_memory:,} bytes"
    else:
        wanted = max_batch_size * blocks_needed(max_model_len, manifest.cache.block_size) + 1
        chosen = wanted if most is None else min(wanted, most)
        budget = cache_budget(manifest, free_bytes)
        asked = "no memory is known to be free" if budget is None else f"{max(budget, 0):,} bytes are left for caches"
        if budget is not None:
            chosen = min(chosen, budget // size)
    if chosen < 2:
        raise EngineError(
            f"{asked}, expected room for at least 2 blocks of {size:,} bytes (one is scrap); "
            "free memory, or say how many with num_blocks"
        )
    return chosen


def cache_budget(manifest: Manifest, free_bytes: int | None) -> int | None:
    """Return how many bytes caches may take when nothing is asked for; None where nobody knows.

    On a GPU: what is usable of it, less weights, scratch, activations and reserve, by the planner's account at build.
    On a CPU: half of what is free when the engine's own files are in memory.
    """
    if manifest.target.backend == "onnxruntime":
        if free_bytes is None:
            return None
        return int(max(free_bytes - sum(file.bytes for file in manifest.files), 0) * _CPU_SHARE)
    if manifest.audit is None:
        return None
    account = manifest.audit.device_bytes
    return account["usable"] - sum(account[key] for key in ("weights", "scratch", "activations", "reserve"))


def free_memory() -> int | None:
    """Bytes of main memory that can be used without swapping, a container's limit included; None: nobody tells."""
    found = [value for value in (_system_memory(), _container_memory()) if value is not None]
    return min(found, default=None)


def _system_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _container_memory(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the limit of a control group (version 2) leaves, or None where there is none."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None
