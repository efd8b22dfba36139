"""A flipped bit of a checkpoint is noticed while its weights are loaded, and nothing is read twice for that."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seekforge.common.errors import CheckpointError, EngineError
from seekforge.formats import weight_digests
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_writer import write_shard
from seekforge.formats.loader import Loader, allocate
from seekforge.formats.weight_digests import WeightDigests, load_weight_digests, write_weight_digests
from seekforge.formats.weight_recipes import Recipe, slice_, transpose

SHAPES = {"a": (300, 64), "b": (128, 200), "c": (7,)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, and small chunks so that its tensors have several."""
    monkeypatch.setattr(weight_digests, "CHUNK_BYTES", 4096)
    rng = np.random.default_rng(0)
    write_shard(
        tmp_path / "model.safetensors",
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()},
    )
    return tmp_path


@pytest.fixture
def digests(folder: Path) -> WeightDigests:
    told: list[tuple[int, int]] = []
    with Checkpoint.open(folder) as checkpoint:
        write_weight_digests(folder, checkpoint, SHAPES, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    return load_weight_digests(folder)


def _take(name: str) -> Recipe:
    return Recipe("take", SHAPES[name], "f32", tensor=name)


def _load(folder: Path, digests: WeightDigests, recipes: dict[str, Recipe]) -> None:
    with Checkpoint.open(folder) as checkpoint:
        Loader(checkpoint, recipes, allocate(recipes), digests=digests).run()


def _recipes() -> dict[str, Recipe]:
    return {
        "whole": _take("a"),
        "transposed": transpose(_take("b"), (1, 0)),
        "part": slice_(_take("a"), 0, 3, 290),
        "small": _take("c"),
    }


def test_every_flipped_bit_of_every_tensor_is_noticed_and_its_place_named(folder: Path, digests: WeightDigests) -> None:
    path = folder / "model.safetensors"
    with Checkpoint.open(folder) as checkpoint:
        infos = {name: checkpoint.info(name) for name in SHAPES}
    _load(folder, digests, _recipes())
    chance = random.Random(0)
    good = path.read_bytes()
    for name, info in infos.items():
        for _ in range(15):
            bad, at = bytearray(good), chance.randrange(info.num_bytes)
            bad[info.begin + at] ^= 1 << chance.randrange(8)
            path.write_bytes(bad)
            low = at // 4096 * 4096
            with pytest.raises(CheckpointError, match=rf"'{name}': its bytes {low:,} to .* are not those"):
                _load(folder, load_weight_digests(folder), _recipes())
    path.write_bytes(good)
    _load(folder, load_weight_digests(folder), _recipes())


def test_what_is_read_whole_is_read_once(folder: Path, digests: WeightDigests, monkeypatch: pytest.MonkeyPatch) -> None:
    count, real = 0, os.preadv

    def preadv(file: int, buffers: Any, offset: int) -> int:
        nonlocal count
        found = real(file, buffers, offset)
        count += found
        return found

    monkeypatch.setattr(os, "preadv", preadv)
    _load(folder, digests, {name: _take(name) for name in SHAPES})
    assert count == sum(4 * int(np.prod(shape)) for shape in SHAPES.values())


def test_a_damaged_part_is_noticed_again_until_it_is_mended(folder: Path, digests: WeightDigests) -> None:
    path, recipe = folder / "model.safetensors", {"part": slice_(_take("a"), 0, 3, 5)}
    good = path.read_bytes()
    with Checkpoint.open(folder) as checkpoint:
        place = checkpoint.info("a").begin + 4 * 64 * 4
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="'a': its bytes 0 to 4,095"):
            _load(folder, digests, recipe)
    path.write_bytes(good)
    _load(folder, digests, recipe)


def test_holes_have_the_digests_of_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for number, hole in enumerate((False, True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "model.safetensors"
        write_shard(path, {"a": np.zeros((3 << 20,), np.float32)})
        with Checkpoint.open(folder) as checkpoint:
            if hole:
                os.truncate(path, checkpoint.info("a").begin)
                os.truncate(path, checkpoint.info("a").end)
            write_weight_digests(folder, checkpoint, ["a"], lambda done, total: None)
        found.append((folder / weight_digests.FILE).read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "tensors": {}}', '{"format": 1, "tensors": {"a": 1}}'])
def test_a_damaged_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / weight_digests.FILE).write_text(text)
    with pytest.raises(EngineError, match="build the engine again"):
        load_weight_digests(tmp_path)
