"""The reader sees what was written, and says in one line what is wrong with anything else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekforge.common.errors import CheckpointError
from seekforge.formats.checkpoint import safetensors
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_header import parse_header
from seekforge.formats.checkpoint.shard_index import INDEX_FILE, SINGLE_FILE
from seekforge.formats.checkpoint.shard_writer import ShardWriter, write_shard

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
FIRST, SECOND = "model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"


def tensors() -> dict[str, np.ndarray]:
    """Three of each dtype; the one-byte tensor of three elements puts the rest at odd offsets."""
    return {
        "odd": np.arange(3, dtype=np.float32).astype(FP8),
        "f32": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
        "bf16": np.linspace(-2, 2, 10, dtype=np.float32).astype(BF16).reshape(2, 5),
        "scalar": np.array(7, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with an index."""
    everything = tensors()
    first = {name: everything[name] for name in ("odd", "f32")}
    second = {name: array for name, array in everything.items() if name not in first}
    write_shard(tmp_path / FIRST, first)
    write_shard(tmp_path / SECOND, second)
    write_index(tmp_path, dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND))
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX_FILE).read_text())["weight_map"]


def raw_shard(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- what is right ------------------------------------------------------------------------------------------


def test_reads_back_every_dtype_and_shape(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.names) == set(tensors())
        for name, array in tensors().items():
            assert same(checkpoint.tensor(name), array), name


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    write_shard(tmp_path / SINGLE_FILE, tensors())
    with Checkpoint.open(tmp_path) as checkpoint:
        assert same(checkpoint.tensor("bf16"), tensors()["bf16"])
        assert checkpoint.info("bf16").shard == SINGLE_FILE


def test_a_tensor_is_read_at_any_offset_and_outlives_the_checkpoint(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.info("f32").begin % 4 != 0
    array = checkpoint.tensor("f32")
    checkpoint.close()
    assert same(array, tensors()["f32"])
    assert same(checkpoint.tensor("f32"), array)  # opened again
    checkpoint.close()


@pytest.mark.parametrize("name", tensors())
@pytest.mark.parametrize("buffer_bytes", [4, 7, 1 << 10])
def test_pieces_and_rows_are_those_of_the_tensor(folder: Path, name: str, buffer_bytes: int) -> None:
    whole = tensors()[name]
    with Checkpoint.open(folder) as checkpoint:
        pieces = [(start, piece.copy()) for start, piece in checkpoint.pieces(name, np.empty(buffer_bytes, np.uint8))]
        assert all(start == sum(piece.size for _, piece in pieces[:i]) for i, (start, _) in enumerate(pieces))
        assert b"".join(piece.tobytes() for _, piece in pieces) == whole.tobytes()
        for start in range(len(whole) if whole.ndim else 1):
            rows = np.empty(whole[start:].shape if whole.ndim else (), whole.dtype)
            checkpoint.read_rows(name, start, rows)
            assert same(rows, np.asarray(whole[start:] if whole.ndim else whole))


@pytest.mark.parametrize(
    ("start", "out"),
    [
        (0, np.empty((4, 4), np.float32)),
        (2, np.empty((2, 4), np.float32)),
        (0, np.empty((2, 5), np.float32)),
        (0, np.empty((3, 4), np.float16)),
        (0, np.empty(12, np.float32)),
        (0, np.empty((), np.float32)),
    ],
)
def test_rows_that_a_tensor_does_not_have_are_refused(folder: Path, start: int, out: np.ndarray) -> None:
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match=r"'f32' is f32 .* expected"):
        checkpoint.read_rows("f32", start, out)


def test_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    numpy_io = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_shard(tmp_path / "ours.safetensors", {"a": array})
    assert same(numpy_io.load_file(tmp_path / "ours.safetensors")["a"], array)
    numpy_io.save_file({"b": array, "c": array[:1]}, tmp_path / SINGLE_FILE)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert same(checkpoint.tensor("b"), array) and same(checkpoint.tensor("c"), array[:1])


def test_digest_is_stable_and_sees_a_changed_header(folder: Path) -> None:
    digest = Checkpoint.open(folder).index_digest()
    assert digest == Checkpoint.open(folder).index_digest() and len(digest) == 64
    reshaped = {"odd": tensors()["odd"], "f32": tensors()["f32"].reshape(4, 3)}
    write_shard(folder / FIRST, reshaped)
    assert Checkpoint.open(folder).index_digest() != digest


def test_tensors_may_be_written_in_any_order(tmp_path: Path) -> None:
    everything = tensors()
    layout = {"odd": ("f8e4m3", (3,)), "f32": ("f32", (3, 4))}
    with ShardWriter(tmp_path / SINGLE_FILE, layout) as writer:
        writer.write("f32", everything["f32"])
        writer.write("odd", everything["odd"])
    with Checkpoint.open(tmp_path) as checkpoint:
        assert same(checkpoint.tensor("odd"), everything["odd"])
        assert same(checkpoint.tensor("f32"), everything["f32"])


def test_a_writer_that_forgets_a_tensor_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not written"), ShardWriter(tmp_path / "x", {"a": ("f32", (1,))}):
        pass


# --- what is wrong with the folder and the index ------------------------------------------------------------


def set_index(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX_FILE).write_text(text) and None


def remap(name: str, shard: Any) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, weight_map(folder) | {name: shard})


def unlist(folder: Path) -> None:
    write_index(folder, {name: file for name, file in weight_map(folder).items() if name != "f32"})


def duplicate(folder: Path) -> None:
    write_shard(folder / SECOND, tensors())


def cut(name: str, size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size])

    return damage


def lfs_pointer(folder: Path) -> None:
    (folder / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_index("{"), "not valid JSON"),
        (set_index('{"weight_map": ["a"]}'), "has no 'weight_map'"),
        (set_index('{"weight_map": {}}'), "has no 'weight_map'"),
        (set_index("[1]"), "has no 'weight_map'"),
        (set_index("[" * 100_000), "not valid JSON"),
        (set_index('{"weight_map": {"a": "b", "a": "c"}}'), "names 'a' twice"),
        (remap("f32", "../x.safetensors"), "expected the plain name of a file in the same folder"),
        (remap("f32", "/etc/passwd"), "expected the plain name"),
        (remap("f32", ".."), "expected the plain name"),
        (remap("f32", "a\\b"), "expected the plain name"),
        (remap("f32", "a\0b"), "expected the plain name"),
        (remap("f32", 3), "expected the plain name"),
        (remap("f32", "gone.safetensors"), "gone.safetensors: is missing, but"),
        (remap("f32", SECOND), f"puts 'f32' in {SECOND}, but {FIRST} holds it"),
        (remap("ghost", FIRST), "puts 'ghost' in .* but no shard holds it"),
        (unlist, f"does not list 'f32', which {FIRST} holds"),
        (duplicate, "holds 'odd', which .*00001.* holds too"),
        (cut(FIRST, 0), "is 0 bytes, expected a safetensors file"),
        (cut(FIRST, 7), "is 7 bytes, expected a safetensors file"),
        (cut(FIRST, 60), "says its header is .* truncated"),
        (cut(FIRST, -1), "is truncated: .* finish the download"),
        (lfs_pointer, "is a Git LFS pointer.*git lfs pull"),
    ],
)
def test_a_damaged_folder_is_explained_in_one_line(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_missing_shards_are_counted(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / SECOND).unlink()
    with pytest.raises(CheckpointError, match=r"00001.*is missing .and 1 more of 2 shards"):
        Checkpoint.open(folder)


def test_a_missing_folder_and_a_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint.open(tmp_path / "file")


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match="has no tensor 'x' among its 5"):
        checkpoint.tensor("x")


def test_a_shard_that_shrinks_after_open_is_refused(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    cut(FIRST, -4)(folder)
    with pytest.raises(CheckpointError, match="when opened"):
        checkpoint.tensor("f32")


def test_a_shard_that_shrinks_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mapped would end the process with SIGBUS."""
    look = safetensors.read_all_at

    def shrink_and_read(file: int, out: memoryview, offset: int) -> int:
        os.truncate(folder / FIRST, offset + len(out) - 1)
        return look(file, out, offset)

    with Checkpoint.open(folder) as checkpoint:
        monkeypatch.setattr(safetensors, "read_all_at", shrink_and_read)
        with pytest.raises(CheckpointError, match=rf"{FIRST}: shrank, it ends before 'f32' does; do not write"):
            checkpoint.tensor("f32")


def test_a_shard_that_is_written_to_is_refused(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.tensor("bf16")
        with (folder / SECOND).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\1")
        os.utime(folder / SECOND, ns=(0, 1))  # clocks of files tick slowly
        with pytest.raises(CheckpointError, match=f"{SECOND}: was written to since it was opened; do not write"):
            checkpoint.tensor("bf16")


def test_a_shard_that_is_replaced_is_read_as_it_was(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        before = checkpoint.tensor("f32")
        (folder / "new").write_bytes(bytes((folder / FIRST).stat().st_size))
        (folder / "new").replace(folder / FIRST)
        assert same(checkpoint.tensor("f32"), before)


def test_a_shard_that_is_gone_is_one_line(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        (folder / FIRST).unlink()
        with pytest.raises(CheckpointError, match=r"cannot be read \(No such file"):
            checkpoint.tensor("f32")


# --- what is wrong with a header ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "num_bytes", "message"),
    [
        (b"not json", 0, "header: not valid JSON"),
        (b"\xff\xfe", 0, "header: not valid JSON"),
        ([], 0, "header is a JSON list, expected an object"),
        ({"a": 3}, 0, "entry of 'a' is malformed"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "entry of 'a' is malformed"),
        ({"a": entry(shape="x")}, 4, "entry of 'a' is malformed"),
        ({"a": entry(shape=[True])}, 4, "entry of 'a' is malformed"),
        ({"a": entry(shape=[-1], offsets=[0, 4])}, 4, "entry of 'a' is malformed"),
        ({"a": entry(offsets=[0, 4, 8])}, 4, "entry of 'a' is malformed"),
        ({"a": entry(offsets=[0.0, 4])}, 4, "entry of 'a' is malformed"),
        ({"a": entry(dtype="I4")}, 4, "'a' has dtype 'I4', expected one of F32, BF16, F8_E4M3"),
        ({"a": entry(dtype=["F32"])}, 4, "'a' has dtype"),
        ({"a": entry(shape=[2])}, 4, "byte range 0 to 4, expected 8 bytes"),
        ({"a": entry(offsets=[4, 0])}, 4, "byte range 4 to 0, expected 4 bytes"),
        ({"a": entry(shape=[0, 2**62], offsets=[0, 0])}, 0, "byte range 0 to 0"),
        ({"a": entry(shape=[0, 2**70], offsets=[0, 0])}, 0, "more than 64 bits"),
        ({"a": entry(), "b": entry()}, 4, "'b' begins at byte 0 of the data and overlaps"),
        ({"a": entry(), "b": entry(offsets=[8, 12])}, 12, "'b' begins at byte 8 of the data and leaves a hole"),
        ({"a": entry(offsets=[4, 8])}, 8, "leaves a hole"),
        ({"a": entry()}, 3, "is truncated"),
        ({"a": entry()}, 5, "its header describes only"),
        (b'{"a": {}, "a": {}}', 0, "names 'a' twice"),
    ],
)
def test_a_damaged_header_is_explained(tmp_path: Path, header: Any, num_bytes: int, message: str) -> None:
    raw_shard(tmp_path / SINGLE_FILE, header, bytes(num_bytes))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 200_000_000, 11])
def test_a_lying_header_length_reads_nothing(tmp_path: Path, length: int) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(length.to_bytes(8, "little") + b"{}        ")
    with pytest.raises(CheckpointError, match=f"says its header is {length} bytes"):
        Checkpoint.open(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=3)


@settings(max_examples=300, deadline=None)
@given(headers.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40), st.integers(0, 200))
def test_any_header_is_either_consistent_or_a_checkpoint_error(header: bytes, file_bytes: int) -> None:
    try:
        found = parse_header(header, file_bytes=file_bytes, path=Path("x.safetensors"))
    except CheckpointError as error:
        assert "\n" not in str(error).removeprefix("x.safetensors")
        return
    position = 8 + len(header)
    for info in found.values():
        assert info.begin == position and info.end >= info.begin
        assert info.num_bytes == math.prod(info.shape) * {"f32": 4, "bf16": 2, "f8e4m3": 1}[info.dtype]
        position = info.end
    assert position == file_bytes


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path = folder / SINGLE_FILE
    write_shard(path, tensors())
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder)
