"""Write a checkpoint of true size and structure whose weights are holes: 690 GB that take a few MB on disk.

Everything that reads headers only (export, planning, structure checks) does with it what it does with the
real download. Values read as zero, scales too, so `scan_values` refuses it and no engine runs on it.
"""

from __future__ import annotations

from pathlib import Path

from seekforge.common.errors import OutputError
from seekforge.common.files import atomic_folder
from seekforge.exporter.checkpoint.new import WrittenCheckpoint, describe, layouts, split_into_shards, write_sidecars
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.checkpoint.schema import expected_tensors
from seekforge.exporter.checkpoint.validate import OnBytes
from seekforge.formats.checkpoint.shard_writer import build_header

_PROBE_BYTES = 1 << 24


def new_sparse_checkpoint(
    out: Path, preset: str | Preset, *, force: bool = False, progress: OnBytes | None = None
) -> WrittenCheckpoint:
    """Write headers and sidecar files of a preset; the data of every shard is a hole.

    Args:
        out: the folder to make.
        preset: a name of `configs/models`, or a preset itself.
        force: replace a checkpoint that stands at `out`.
        progress: told the bytes laid out so far and in all, after each shard.

    Raises:
        ConfigError: the preset is unknown or malformed.
        OutputError: `out` is not empty (without `force`), cannot be written, or its file system stores holes.
    """
    chosen = load_preset(preset) if isinstance(preset, str) else preset
    tensors = expected_tensors(chosen.config)
    shards = split_into_shards(tensors, chosen.num_shards)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    laid_out = 0
    with atomic_folder(out, force=force, marker="config.json") as folder:
        _require_holes(folder, out)
        for file, layout in layouts(tensors, shards).items():
            head, offsets = build_header(layout)
            _write_with_hole(folder / file, head, max(end for _, end in offsets.values()))
            laid_out += sum(tensors[name].num_bytes for name in layout)
            if progress is not None:
                progress(laid_out, total)
        write_sidecars(folder, chosen, shards)
        return describe(folder, out, tensors)


def _require_holes(folder: Path, out: Path) -> None:
    """Find out with a small file whether a hole takes no space here."""
    probe = folder / "probe"
    _write_with_hole(probe, b"", _PROBE_BYTES)
    stored = probe.stat().st_blocks * 512
    probe.unlink()
    if stored > _PROBE_BYTES // 2:
        raise OutputError(
            f"{out}: this file system stores the holes of sparse files, expected one that does not "
            "(ext4, xfs, btrfs, tmpfs); choose a folder on such a disk"
        )


def _write_with_hole(path: Path, head: bytes, num_bytes: int) -> None:
    """Write `head`, and make the file `num_bytes` long with nothing behind it."""
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(num_bytes)
