"""How many blocks the cache has: what was asked for, or what fits beside everything else.

What a block takes, and on a GPU what the weights, scratch memory and activations leave for the cache, the planner
(`plugins.formats.sizing`) worked out at build; both stand in the manifest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from seekforge.common.errors import EngineError
from seekforge.formats.engine.agreement import cache_block_bytes
from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.paged_cache import blocks_needed

#: Part of the free memory of a CPU that caches take when no size is asked for: others live there too.
_CPU_SHARE = 0.5
#: Most blocks, some hundred million tokens: what counts them takes main memory too, whatever a block takes.
_MOST_BLOCKS = 1 << 22


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
        manifest: the manifest of the engine.
        max_batch_size, max_model_len: what the cache holds when no size is asked for, if that fits.
        num_blocks: asked for.
        kv_cache_memory: bytes asked for; of several GPUs on each of them.
        free_bytes: free memory before the engine is loaded, of what it will run on; None where nobody knows. For
            engines of ONNX Runtime.

    Raises:
        EngineError: both sizes are given, or there is not room for two blocks; the message says what to pass.
    """
    size = max(of_stage for of_stage, _ in _places(manifest, free_bytes))
    if num_blocks is not None and kv_cache_memory is not None:
        raise EngineError("num_blocks and kv_cache_memory both give the size of the cache; pass one")
    most = manifest.max_cache_blocks()
    if num_blocks is not None:
        chosen, cause = num_blocks, f"num_blocks is {num_blocks}"
    elif kv_cache_memory is not None:
        chosen, cause = kv_cache_memory // size, f"kv_cache_memory is {kv_cache_memory:,} bytes"
    else:
        wanted = max_batch_size * blocks_needed(max_model_len, manifest.cache.block_size) + 1
        chosen = wanted if most is None else min(wanted, most)
        cause = "no memory is known to be free"
        for per_block, budget in _places(manifest, free_bytes):  # all ranks have as many blocks: the least of them
            if budget is not None and budget // per_block <= chosen:
                chosen, size = budget // per_block, per_block
                cause = f"{max(budget, 0):,} bytes are left for caches"
    if chosen > _MOST_BLOCKS:
        raise EngineError(
            f"{cause}, {chosen:,} blocks, expected at most {_MOST_BLOCKS:,}; "
            f"lower {'kv_cache_memory' if num_blocks is None else 'num_blocks'}"
        )
    if chosen < 2:
        raise EngineError(
            f"{cause}, expected room for at least 2 blocks of {size:,} bytes (one is scrap); "
            "free memory, or say how many with num_blocks"
        )
    return chosen


def _places(manifest: Manifest, free_bytes: int | None) -> list[tuple[int, int | None]]:
    """Return what a block takes, and the bytes that caches may take, of each memory that has caches: of several GPUs
    one of each pipeline stage."""
    if manifest.ranks is None or not manifest.ranks.stage_bytes:
        return [(manifest.cache.bytes_per_block * copies(manifest), cache_budget(manifest, free_bytes))]
    places: list[tuple[int, int | None]] = []
    for stage, account in enumerate(manifest.ranks.stage_bytes):
        pieces = [
            piece
            for graph in manifest.graphs
            for piece in manifest.ranks.pieces_of(graph, manifest.plans(graph), stage)
        ]
        places.append((cache_block_bytes(pieces, manifest.cache), _left(account)))
    return places


def copies(manifest: Manifest) -> int:
    """Return how often a block lies in the memory that caches are counted in: tensor-parallel ranks of a CPU engine
    share a machine, and each has the caches of its stage whole."""
    ranks = manifest.ranks
    return 1 if ranks is None or manifest.target.backend != "onnxruntime" else ranks.parallelism.tp


def cache_budget(manifest: Manifest, free_bytes: int | None) -> int | None:
    """Return how many bytes caches may take when nothing is asked for; None where nobody knows.

    On a GPU: what is usable of it, less weights, scratch, activations and reserve, by the planner's account at build.
    Of engines of ONNX Runtime: half of what is free when the engine's own files are in memory.
    """
    if manifest.target.backend == "onnxruntime":
        if free_bytes is None:
            return None
        return int(max(free_bytes - sum(file.bytes for file in manifest.files), 0) * _CPU_SHARE)
    if manifest.audit is None:
        return None
    return _left(manifest.audit.device_bytes)


def _left(account: Mapping[str, int]) -> int:
    """Return what an account of one GPU leaves for caches."""
    return account["usable"] - sum(account[key] for key in ("weights", "scratch", "activations", "reserve"))


def free_memory() -> int | None:
    """Bytes of main memory that this process can have without swapping; None: nobody tells.

    The least of what the system has, and of what the limits of control groups and of the process (`ulimit -v`) leave.
    """
    limits = (_system_memory(), _container_memory(), _process_memory())
    return min((max(value, 0) for value in limits if value is not None), default=None)


def free_gpu_memory() -> int | None:
    """Bytes that are free on the first GPU that this process may use, by nvidia-smi; None: it does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    question = [tool, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    if visible:
        question += ["--id", visible]
    try:
        answer = subprocess.run(
            question, capture_output=True, text=True, errors="replace", timeout=30, check=True
        ).stdout
        return int(answer.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


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


def _container_memory(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the limits of this process's control group and those above it leave, or None where there are none.

    Args:
        root: the folder where control groups are mounted; of version 1 the controller `memory` is a folder below.
        groups: lines "number:controllers:path"; inside a container the path may lie outside of what is mounted.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        lines = []
    left: list[int] = []
    for folder, limit, current, chosen in (
        (root, "memory.max", "memory.current", lambda controllers: not controllers),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", lambda c: "memory" in c.split(",")),
    ):
        paths = [line[2].strip("/") for line in lines if len(line) == 3 and chosen(line[1])]
        places = {folder, *(place for path in paths for place in (folder / path, *(folder / path).parents))}
        for place in places:
            if place == folder or folder in place.parents:
                with contextlib.suppress(OSError, ValueError):  # no such limit here, or "max"
                    left.append(int((place / limit).read_text()) - int((place / current).read_text()))
    return min(left, default=None)


def _process_memory() -> int | None:
    """What the limit of this process's address space leaves, or None where there is none."""
    try:
        import resource  # not everywhere
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        used = 0
    return limit - used
