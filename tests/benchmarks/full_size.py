"""Measure what docs/full-size.md states: the full export, and the loader against a plain copy.

    python -m tests.benchmarks.full_size [--folder DIR] [--gigabytes N] [--threads N] [--json]

Needs no weights and no GPU: the export reads a sparse checkpoint of true size; the loader reads layers of true width
(`--gigabytes` of them, made with random valid values under DIR, some space for which is needed twice: on disk and in
memory). The files are read once before timing, so the loader is compared with the copy and not with the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from seekforge.common.dtypes import NUMPY
from seekforge.common.files import atomic_folder
from seekforge.exporter.checkpoint.new import layouts, split_into_shards, write_sidecars
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.checkpoint.schema import ExpectedTensor, expected_tensors
from seekforge.exporter.checkpoint.sparse import new_sparse_checkpoint
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_writer import ShardWriter
from seekforge.formats.loader import Loader, LoadProgress, allocate
from seekforge.formats.weight_recipes import Recipe, concat, stack, take

_REPEATS = 7
_TILE_BYTES = 1 << 24
_COPY_BYTES = 8 << 20


def machine() -> dict[str, Any]:
    """Return the processor's name, cores, load and date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return {
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def measure_export(folder: Path) -> dict[str, Any]:
    """Make the sparse full checkpoint and export it in a process of its own."""
    start = time.perf_counter()
    written = new_sparse_checkpoint(folder / "full", "full")
    sparse_s = time.perf_counter() - start
    command = [
        sys.executable,
        "-m",
        "seekforge.runtime.cli.main",
        "export",
        str(folder / "full"),
        str(folder / "program"),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    files = ("model.onnx", "mtp.onnx", "bindings.json", "program.json")
    return {
        "num_tensors": written.num_tensors,
        "checkpoint_bytes": written.num_bytes,
        "checkpoint_disk_bytes": written.disk_bytes,
        "new_checkpoint_s": round(sparse_s, 2),
        "export_s": round(seconds, 1),
        "export_cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "export_peak_rss_mb": round(after.ru_maxrss * 1024 / 1e6),
        "files": {name: (folder / "program" / name).stat().st_size for name in files},
        "summary": json.loads(done.stdout),
    }


# --- the loader -----------------------------------------------------------------------------------------------


def wide_checkpoint(folder: Path, gigabytes: float) -> dict[str, Recipe]:
    """Write experts of true size, an even number, with random valid values; return recipes that stack them as the
    program does."""
    config = load_preset("full").config
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    num_experts = max(2, int(gigabytes * 1e9 / (3 * hidden * inner)) // 2 * 2)
    prefix = "model.layers.3.mlp.experts"
    tensors: dict[str, ExpectedTensor] = {}
    for name, tensor in expected_tensors(config).items():
        if name.startswith(f"{prefix}.") and int(name.split(".")[5]) < num_experts:
            tensors[name] = tensor
    shards = split_into_shards(tensors, max(1, num_experts // 64))
    random = np.random.default_rng(0)
    tile = random.integers(0, 256, _TILE_BYTES, np.uint8)
    tile[(tile & 0x7F) == 0x7F] = 0
    with atomic_folder(folder, marker="config.json") as out:
        for file, layout in layouts(tensors, shards).items():
            with ShardWriter(out / file, layout) as writer:
                for name, (dtype, shape) in layout.items():
                    count = int(np.prod(shape))
                    if dtype == "f32":
                        writer.write(name, np.exp2(random.integers(-12, -6, shape)).astype(np.float32))
                    else:
                        writer.write(name, np.resize(tile, count).view(NUMPY[dtype]).reshape(shape))
        preset = load_preset("full")
        write_sidecars(out, Preset("wide", len(shards), preset.config_json, config), shards)

    def leaf(expert: int, part: str, suffix: str) -> Recipe:
        name = f"{prefix}.{expert}.{part}_proj.weight{suffix}"
        return take(name, tensors[name].shape, tensors[name].dtype)

    result = {}
    for suffix, end in (("", ""), ("_scale_inv", "_scale")):
        pairs = (concat([leaf(e, "gate", suffix), leaf(e, "up", suffix)]) for e in range(num_experts))
        result[f"w13{end}"] = stack(pairs)
        result[f"w2{end}"] = stack(leaf(e, "down", suffix) for e in range(num_experts))
    return result


def plain_copy(
    checkpoint: Checkpoint, recipes: Mapping[str, Recipe], buffers: Mapping[str, np.ndarray], threads: int
) -> float:
    """Read the same bytes, tensor after tensor, into the same buffers with as many threads; return seconds."""
    pieces: list[tuple[str, int, np.ndarray]] = []
    for name, recipe in recipes.items():
        flat, position = buffers[name].reshape(-1).view(np.uint8), 0
        for tensor in _takes(recipe):
            info = checkpoint.info(tensor)
            pieces.append((info.shard, info.begin, flat[position : position + info.num_bytes]))
            position += info.num_bytes
    pieces.sort(key=lambda piece: piece[:2])
    files = {shard: os.open(checkpoint.folder / shard, os.O_RDONLY) for shard in checkpoint.shards}

    def read(piece: tuple[str, int, np.ndarray]) -> None:
        shard, begin, out = piece
        for start in range(0, out.size, _COPY_BYTES):
            os.preadv(files[shard], [out[start : start + _COPY_BYTES].data], begin + start)

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read, pieces):
            pass
    seconds = time.perf_counter() - start
    for file in files.values():
        os.close(file)
    return seconds


def _takes(recipe: Recipe) -> list[str]:
    if recipe.op == "take":
        assert recipe.tensor is not None
        return [recipe.tensor]
    return [tensor for part in recipe.parts for tensor in _takes(part)]


def measure_loader(folder: Path, gigabytes: float, threads: int, console: Console) -> dict[str, Any]:
    """Time the loader without and with scans, and a plain copy: medians of runs taken in turns.

    Processor time is told as well: on a machine with other work it is the steadier comparison.
    """
    recipes = wide_checkpoint(folder / "wide", gigabytes)
    with Checkpoint.open(folder / "wide") as checkpoint:
        buffers = allocate(recipes)
        memory = folder / "scans.json"
        total = Loader(checkpoint, recipes, buffers).total_bytes
        columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.fields[speed]}"))

        def load(*, scan: bool, remembered: Path | None = None) -> float:
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task("load", total=total, speed="")

                def show(at: LoadProgress) -> None:
                    bar.update(task, completed=at.done_bytes, speed=f"{at.gb_per_s:.2f} GB/s, {at.eta_s:.0f} s left")

                loader = Loader(checkpoint, recipes, buffers, threads=threads, scan=scan, memory=remembered)
                return loader.run(show).seconds

        plain_copy(checkpoint, recipes, buffers, threads)  # fills the page cache and touches the buffers
        ways: dict[str, Callable[[], float]] = {
            "copy": lambda: plain_copy(checkpoint, recipes, buffers, threads),
            "loader": lambda: load(scan=False),
            "loader_with_scan": lambda: load(scan=True),
        }
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(_REPEATS):
            for name, way in ways.items():
                start = time.process_time()
                seconds = way()
                runs[name].append((seconds, time.process_time() - start))
        wall, cpu = (
            {name: statistics.median(pair[which] for pair in pairs) for name, pairs in runs.items()} for which in (0, 1)
        )
        load(scan=True, remembered=memory)
        start = time.perf_counter()
        load(scan=True, remembered=memory)
        again = time.perf_counter() - start
    return {
        "num_bytes": total,
        "threads": threads,
        "gb_per_s": {name: round(total / seconds / 1e9, 2) for name, seconds in wall.items()},
        "gb_per_cpu_s": {name: round(total / seconds / 1e9, 2) for name, seconds in cpu.items()},
        "scan_remembered_gb_per_s": round(total / again / 1e9, 2),
        "loader_of_copy": round(wall["copy"] / wall["loader"], 2),
        "loader_of_copy_by_cpu": round(cpu["copy"] / cpu["loader"], 2),
    }


def main() -> None:
    """Run both and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder if not given")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="how much the loader reads")
    parser.add_argument("--threads", type=int, default=2, help="parallel readers")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    console = Console(stderr=True, quiet=options.json)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="seekforge-benchmark-") as name:
        folder = Path(name)
        result = {"machine": machine()}
        console.print("export of the full model …")
        result["export"] = measure_export(folder)
        console.print("loader …")
        result["loader"] = measure_loader(folder, options.gigabytes, options.threads, console)
    sys.stdout.write(json.dumps(result) + "\n" if options.json else _sentences(result))


def _sentences(result: dict[str, Any]) -> str:
    here, export, loader = result["machine"], result["export"], result["loader"]
    speeds = loader["gb_per_s"]
    files = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in export["files"].items())
    return (
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gb']} GB, load {here['load_average']}, {here['date']}\n"
        f"new-checkpoint --sparse: {export['num_tensors']:,} tensors, {export['checkpoint_bytes']:,} bytes, "
        f"{export['checkpoint_disk_bytes'] / 1e6:.1f} MB on disk, {export['new_checkpoint_s']} s\n"
        f"export: {export['export_s']} s ({export['export_cpu_s']} s of processor time), peak RSS "
        f"{export['export_peak_rss_mb']} MB\n"
        f"files: {files}\n"
        f"loader, {loader['threads']} threads, {loader['num_bytes'] / 1e9:.2f} GB from the page cache: "
        f"{speeds['loader']} GB/s ({loader['loader_of_copy']:.0%} of a plain copy at {speeds['copy']} GB/s, "
        f"{loader['loader_of_copy_by_cpu']:.0%} by processor time), "
        f"{speeds['loader_with_scan']} GB/s with value scans, {loader['scan_remembered_gb_per_s']} GB/s when the scan "
        "is remembered\n"
    )


if __name__ == "__main__":
    main()
