"""Whatever bit of an engine flips, the next start says so; and a start after a good one reads nothing."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from seekforge.common.errors import EngineError
from seekforge.formats.engine import digests
from seekforge.formats.engine.manifest import MANIFEST, load_manifest, save_manifest
from seekforge.formats.engine.verify import verify_files
from seekforge.formats.engine.weight_file import WEIGHTS
from seekforge.runtime.engine.engine_folder import Engine


@pytest.fixture
def engine(tiny_engines: dict[str, Path], tmp_path: Path) -> Path:
    """An engine that a test may damage, some time after it was written."""
    folder = tmp_path / "engine"
    shutil.copytree(tiny_engines["exact"], folder)
    time.sleep(0.05)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Bytes of each file that were read for its digests."""
    counted: Counter[str] = Counter()

    class Counting(io.FileIO):
        def readinto(self, buffer) -> int:  # pyright: ignore
            count = super().readinto(buffer)
            counted[Path(str(self.name)).name] += count or 0
            return count or 0

    monkeypatch.setattr(digests, "open_file", Counting)
    yield counted


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_every_flipped_bit_of_every_file_is_noticed(engine: Path) -> None:
    """By the default load, also after a good start that is remembered."""
    chance = random.Random(0)
    Engine.open(engine)
    files = sorted(path for path in engine.rglob("*") if path.is_file())
    listed = {file.path for file in load_manifest(engine).files} | {MANIFEST}
    assert {str(path.relative_to(engine)) for path in files} == listed, "a file that nobody verifies"
    for path in files:
        for _ in range(25):
            bit = chance.randrange(path.stat().st_size * 8)
            flip(path, bit)
            with pytest.raises(EngineError, match=path.name):
                Engine.open(engine)
            flip(path, bit)
    Engine.open(engine)


def test_every_kind_of_flip_in_the_manifest_is_noticed(engine: Path) -> None:
    """Also those after which it says the same: 1e-05 and 1E-05, and digits beyond a number's precision."""
    path = engine / MANIFEST
    manifest = load_manifest(engine)
    check = manifest.self_check
    assert check is not None
    save_manifest(engine, manifest.model_copy(update={"self_check": check.model_copy(update={"tolerance": 1e-05})}))
    raw = path.read_bytes()
    place = raw.index(b"1e-05") + 1
    flip(path, 8 * place + 5)
    assert path.read_bytes()[place : place + 1] == b"E"
    with pytest.raises(EngineError, match="manifest was edited"):
        load_manifest(engine)


def test_the_message_names_the_tensor(engine: Path) -> None:
    """As the graph places it, whose offsets the builder wrote."""
    model = onnx.load(engine / load_manifest(engine).graphs["model"].file, load_external_data=False)
    place = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            about = {entry.key: entry.value for entry in tensor.external_data}
            place[tensor.name] = int(about["offset"]), int(about["length"])
    assert len(place) > 10
    size = (engine / WEIGHTS).stat().st_size
    length = digests.chunk_bytes(size)
    for name, (offset, count) in random.Random(1).sample(sorted(place.items()), 4):
        flip(engine / WEIGHTS, 8 * (offset + count // 2))
        begin = (offset + count // 2) // length * length
        expected = [n for n, (o, c) in place.items() if o < begin + length and begin < o + c]
        assert name in expected
        with pytest.raises(EngineError, match=rf"{WEIGHTS}: bytes {begin:,} to .* are not what was built") as error:
            Engine.open(engine)
        assert sum(one in str(error.value) for one in expected) >= min(len(expected), 3)
        flip(engine / WEIGHTS, 8 * (offset + count // 2))


def test_the_second_start_reads_nothing_and_verify_reads_all(engine: Path, reads: Counter[str]) -> None:
    manifest = load_manifest(engine)
    total = sum(file.bytes for file in manifest.files)
    assert Engine.open(engine).verification.read_bytes == total == reads.total()
    reads.clear()
    again = Engine.open(engine).verification
    assert (again.num_bytes, again.read_bytes, reads.total()) == (total, 0, 0)
    assert Engine.open(engine, verify=True).verification.read_bytes == total == reads.total()


def test_progress_is_told_of_what_is_read_and_of_nothing_else(engine: Path) -> None:
    told: list[tuple[int, int]] = []
    total = Engine.open(engine, progress=lambda done, all_: told.append((done, all_))).verification.read_bytes
    assert told == sorted(told) and told[-1] == (total, total)
    told.clear()
    Engine.open(engine, progress=lambda done, all_: told.append((done, all_)))
    assert told == []


SHOWN = """
import sys
from pathlib import Path
from seekforge.common.cli.console import Stages
from seekforge.runtime.cli.options import open_engine
stages = Stages(quiet=sys.argv[2] == "quiet")
open_engine(Path(sys.argv[1]), stages, verify=True)
stages.stop()
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="the system has no pseudo-terminals")
@pytest.mark.parametrize(
    ("terminal", "how", "shows"), [(True, "loud", True), (True, "quiet", False), (False, "loud", False)]
)
def test_a_bar_is_shown_to_who_looks(engine: Path, terminal: bool, how: str, shows: bool) -> None:
    ours, theirs = os.openpty() if terminal else os.pipe()
    done = subprocess.Popen(
        [sys.executable, "-c", SHOWN, str(engine), how], stderr=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # how Linux ends a pseudo-terminal
        while more := os.read(ours, 1 << 16):
            seen += more
    os.close(ours)
    assert done.wait() == 0
    assert (b"checking files" in seen and b"MB" in seen) if shows else seen == b"", seen


def test_only_what_was_written_to_is_read_again(engine: Path, reads: Counter[str]) -> None:
    Engine.open(engine)
    reads.clear()
    path = engine / "tokenizer.json"
    path.write_bytes(path.read_bytes())
    time.sleep(0.05)
    Engine.open(engine)
    assert dict(reads) == {"tokenizer.json": path.stat().st_size}


def test_a_copy_is_read_even_if_its_times_are_those_of_the_original(
    engine: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    Engine.open(engine)
    reads.clear()
    shutil.copytree(engine, tmp_path / "copy")
    Engine.open(tmp_path / "copy")
    assert reads.total() == sum(file.bytes for file in load_manifest(engine).files)


def test_damage_is_not_remembered_as_good(engine: Path) -> None:
    flip(engine / WEIGHTS, 12345)
    for _ in range(2):
        time.sleep(0.05)
        with pytest.raises(EngineError, match=WEIGHTS):
            Engine.open(engine)


def test_damage_in_two_files_names_both(engine: Path) -> None:
    flip(engine / WEIGHTS, 1)
    flip(engine / "tokenizer.json", 1)
    with pytest.raises(EngineError, match=r"are not what was built.*, nor is ") as error:
        verify_files(engine, load_manifest(engine))
    assert "weights.bin" in str(error.value) and "tokenizer.json" in str(error.value)
