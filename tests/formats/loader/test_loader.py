"""The loader fills buffers with what the recipes say, reads each byte once, and says what is wrong with a shard."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import CheckpointError, ProgramError
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_writer import write_shard
from seekforge.formats.loader import EXTRA_BYTES, Loader, LoadProgress, allocate, jobs, loader, planner, reader
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.quantization.nvfp4 import rows_of_fp8
from seekforge.formats.value_check import first_fault
from seekforge.formats.weight_recipes import (
    Recipe,
    as_bytes,
    cast,
    concat,
    dequantize,
    evaluate,
    expert_map,
    for_rank,
    hadamard_table,
    nvfp4_rows,
    nvfp4_scales,
    reshape,
    retarget,
    rope_table,
    slice_,
    split,
    stack,
    take,
    transpose,
)

F8, BF16, F32 = (NUMPY[name] for name in ("f8e4m3", "bf16", "f32"))


def _fp8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    stored = rng.integers(0, 256, shape, np.uint8)
    stored[(stored & 0x7F) == 0x7F] = 1
    return stored.view(F8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards: matrices with scales, a bf16 table and its copy, norms."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("loader")
    first: dict[str, np.ndarray] = {"odd": rng.normal(size=3).astype(BF16)}
    for i in range(4):
        first[f"e{i}.weight"] = _fp8(rng, 256, 384)
        first[f"e{i}.weight_scale_inv"] = np.exp2(rng.integers(-9, -3, (2, 3))).astype(F32)
    second: dict[str, np.ndarray] = {
        "kv.weight": _fp8(rng, 8 * 128, 128),
        "kv.weight_scale_inv": rng.uniform(0.001, 0.01, (8, 1)).astype(F32),
        "table": rng.normal(size=(300, 200)).astype(BF16),
        "norm": rng.normal(size=129).astype(F32),
    }
    second["copy"] = second["table"].copy()
    shards = {"model-00001-of-000002.safetensors": first, "model-00002-of-000002.safetensors": second}
    weight_map = {}
    for file, tensors in shards.items():
        write_shard(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def checkpoint(folder: Path) -> Any:
    with Checkpoint.open(folder) as opened:
        yield opened


def _expert(i: int) -> Recipe:
    return take(f"e{i}.weight", (256, 384), "f8e4m3")


def _recipes() -> dict[str, Recipe]:
    kv = dequantize(take("kv.weight", (1024, 128), "f8e4m3"), take("kv.weight_scale_inv", (8, 1), "f32"), "bf16")
    heads = reshape(kv, (4, 256, 128))
    table = take("table", (300, 200), "bf16")
    rope = {
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 4096.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "magnitude": 1.0,
    }
    return {
        "whole": table,
        "again": table,
        "as_f32": cast(table, "f32"),
        "rows_f32": slice_(cast(table, "f32"), 0, 17, 203),
        "odd": take("odd", (3,), "bf16"),
        "norm": take("norm", (129,), "f32"),
        "scales": stack(take(f"e{i}.weight_scale_inv", (2, 3), "f32") for i in range(4)),
        "rows": slice_(table, 0, 17, 203),
        "columns": slice_(table, 1, 5, 131),
        "both": slice_(slice_(table, 1, 5, 131), 0, 1, 2),
        "turned": transpose(table, (1, 0)),
        "turned_part": transpose(slice_(table, 1, 7, 9), (1, 0)),
        "stacked": stack(concat([_expert(i), _expert(3 - i)]) for i in range(4)),
        "side_by_side": concat([_expert(0), _expert(1)], axis=1),
        "cut_stack": slice_(stack(_expert(i) for i in range(4)), 0, 1, 3),
        "cut_inside": slice_(stack(_expert(i) for i in range(4)), 2, 128, 256),
        "cut_concat": slice_(concat([_expert(0), _expert(1), _expert(2)]), 0, 200, 600),
        "cut_other": slice_(concat([_expert(0), _expert(1)]), 1, 100, 228),
        "bytes": as_bytes(slice_(_expert(2), 1, 0, 128)),
        "w_uk": slice_(heads, 1, 0, 128),
        "w_uv": slice_(heads, 1, 128, 256),
        "one_head": slice_(slice_(heads, 1, 128, 256), 0, 3, 4),
        "kv_f32": dequantize(*kv.parts, "f32"),
        "rope_cos": rope_table("rope_cos", num_positions=20_000, dim=64, rope=rope),
        "hadamard": hadamard_table(128),
        "nvfp4": nvfp4_rows(stack(concat([_expert(i), _expert(3 - i)]) for i in range(4))),
        "nvfp4_of_a_rank": nvfp4_rows(slice_(stack(_expert(i) for i in range(4)), 1, 128, 256)),
        "nvfp4_columns": nvfp4_rows(slice_(stack(_expert(i) for i in range(4)), 2, 128, 384)),
        "nvfp4_side_by_side": nvfp4_rows(concat([_expert(0), _expert(1)], axis=1)),
        "nvfp4_scales": nvfp4_scales(stack(take(f"e{i}.weight_scale_inv", (2, 3), "f32") for i in range(4))),
        "no_view": reshape(slice_(table, 1, 0, 100), (100, 300)),
    }


def _assert_equal(got: np.ndarray, expected: np.ndarray, name: str) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype, name
    assert got.tobytes() == np.ascontiguousarray(expected).tobytes(), name


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_recipe_gives_what_evaluating_it_gives(checkpoint: Checkpoint, threads: int, scan: bool) -> None:
    recipes = _recipes()
    buffers = allocate(recipes)
    report = Loader(checkpoint, recipes, buffers, threads=threads, scan=scan, copies={"copy": "table"}).run()
    for name, recipe in recipes.items():
        _assert_equal(buffers[name], evaluate(recipe, checkpoint), name)
    assert report.read_bytes == report.num_bytes and report.scanned == scan
    if scan:
        assert report.families["kv"].num_powers_of_two == 0
        assert report.families["e0"].num_powers_of_two == 1


def test_what_only_selects_or_widens_is_never_held_whole(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of 3.7 GB goes to a device in slices of f32; evaluating a slice would make all of it each time."""
    names = ("as_f32", "rows_f32", "rows", "columns", "both", "turned", "stacked", "cut_stack", "cut_concat", "w_uk")
    recipes = {name: recipe for name, recipe in _recipes().items() if name in names}
    expected = {name: evaluate(recipe, checkpoint) for name, recipe in recipes.items()}
    monkeypatch.setattr(reader, "evaluate", lambda *args: pytest.fail("evaluated as a whole"))
    buffers = allocate(recipes)
    Loader(checkpoint, recipes, buffers).run()
    for name, value in expected.items():
        _assert_equal(buffers[name], value, name)


@pytest.mark.parametrize("scratch", [600, 5000])
def test_a_small_scratch_only_makes_more_pieces(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, scratch: int
) -> None:
    for module in (loader, planner, reader):
        monkeypatch.setattr(module, "READ_BYTES", scratch)
    monkeypatch.setattr(jobs, "JOB_BYTES", 10_000)
    monkeypatch.setattr(reader, "_SCAN_BYTES", 512)
    recipes = _recipes()
    buffers = allocate(recipes)
    Loader(checkpoint, recipes, buffers, scan=True).run()
    for name, recipe in recipes.items():
        _assert_equal(buffers[name], evaluate(recipe, checkpoint), name)


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """Count reads of each (inode, byte)."""
    seen: Counter[tuple[int, int]] = Counter()
    real = os.preadv

    def preadv(file: int, buffers: Any, offset: int) -> int:
        count = real(file, buffers, offset)
        inode = os.fstat(file).st_ino
        seen.update((inode, i) for i in range(offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


def test_each_byte_is_read_once_though_inputs_share_it(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = {name: _recipes()[name] for name in ("whole", "again", "w_uk", "w_uv", "stacked")}
    recipes["w_uk_again"] = recipes["w_uk"]
    # the stack takes each expert twice: a recipe of ours never does, so only the first half counts
    recipes["stacked"] = stack(_expert(i) for i in range(4))
    seen = _count_reads(monkeypatch)
    load = Loader(checkpoint, recipes, allocate(recipes))
    load.run()
    assert set(seen.values()) == {1}
    assert len(seen) == load.total_bytes == 4 * 256 * 384 + 300 * 200 * 2 + 1024 * 128 + 8 * 4
    assert sum(load.shard_bytes.values()) == load.total_bytes


@pytest.mark.parametrize(("activations", "fp8"), [("f32", "f8e4m3"), ("bf16", "i8"), ("f32", "i8")])
def test_specialized_dtypes_are_made_on_the_way(checkpoint: Checkpoint, activations: str, fp8: str) -> None:
    recipes = {
        name: retarget(recipe, activations=activations, fp8_dtype=fp8)
        for name, recipe in _recipes().items()
        if name not in ("bytes", "as_f32", "kv_f32")
    }
    buffers = allocate(recipes)
    Loader(checkpoint, recipes, buffers).run()
    for name, recipe in recipes.items():
        _assert_equal(buffers[name], evaluate(recipe, checkpoint), name)


@pytest.mark.parametrize("ranks", [Parallelism(tp=2), Parallelism(tp=2, ep=True), Parallelism(tp=4, ep=True)], ids=str)
def test_ranks_together_have_the_whole_once(checkpoint: Checkpoint, ranks: Parallelism) -> None:
    tp = ranks.tp
    table = take("table", (300, 200), "bf16")
    columns = 1 if ranks.ep else tp
    whole = {
        "rows": split(table, 0, tp),
        "columns": split(table, 1, tp),
        "experts": split(stack(split(_expert(i), 0, columns) for i in range(4)), 0, ranks.ep_size),
    }
    whole["nvfp4"] = nvfp4_rows(whole["experts"])
    parts: dict[str, list[np.ndarray]] = {name: [] for name in whole}
    for rank in range(tp):
        recipes = {name: for_rank(recipe, ranks, rank) for name, recipe in whole.items()}
        recipes["map"] = for_rank(expert_map(4, ranks), ranks, rank)
        buffers = allocate(recipes)
        Loader(checkpoint, recipes, buffers).run()
        for name in whole:
            _assert_equal(buffers[name], evaluate(recipes[name], checkpoint), name)
            parts[name].append(buffers[name])
        here = np.flatnonzero(buffers["map"] >= 0)
        held = 4 // ranks.ep_size
        assert here.tolist() == [(rank if ranks.ep else 0) * held + i for i in range(held)]
        assert buffers["map"][here].tolist() == list(range(held))
    bits = checkpoint.tensor("table").view(np.uint16)
    np.testing.assert_array_equal(np.concatenate([p.view(np.uint16) for p in parts["rows"]]), bits)
    np.testing.assert_array_equal(np.concatenate([p.view(np.uint16) for p in parts["columns"]], 1), bits)
    experts = np.stack([checkpoint.tensor(f"e{i}.weight").view(np.uint8) for i in range(4)])
    together = np.concatenate([part.view(np.uint8) for part in parts["experts"]], 0 if ranks.ep else 1)
    np.testing.assert_array_equal(together, experts)
    rows = np.concatenate(parts["nvfp4"], 0 if ranks.ep else 1)
    np.testing.assert_array_equal(rows, rows_of_fp8(experts.view(F8)))


def test_a_shared_recipe_needs_a_rank(checkpoint: Checkpoint) -> None:
    recipe = split(take("table", (300, 200), "bf16"), 0, 2)
    with pytest.raises(ProgramError, match="for_rank"):
        evaluate(recipe, checkpoint)
    with pytest.raises(ProgramError, match="rank 2: expected 0 to 1"):
        for_rank(recipe, Parallelism(tp=2), 2)
    with pytest.raises(ProgramError, match="is not one among 4 ranks"):
        for_rank(recipe, Parallelism(tp=4), 2)
    with pytest.raises(ProgramError, match="does not divide"):
        split(take("odd", (3,), "bf16"), 0, 2)


def test_a_buffer_that_does_not_fit_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ProgramError, match=r"buffer of x is \[2\] float32, expected \[3\] bf16"):
        Loader(checkpoint, {"x": take("odd", (3,), "bf16")}, {"x": np.empty(2, np.float32)})


def test_bindings_of_another_checkpoint_are_refused(checkpoint: Checkpoint) -> None:
    recipe = {"x": take("odd", (4,), "bf16")}
    with pytest.raises(ProgramError, match=r"expect odd as \[4\] bf16, the checkpoint has \[3\] bf16"):
        Loader(checkpoint, recipe, allocate(recipe))


def test_extra_memory_is_bounded(tmp_path: Path) -> None:
    """100 MB in forms that need the scratch: none of them makes the loader hold more than it may."""
    rng = np.random.default_rng(0)
    rows = 1 << 15
    write_shard(
        tmp_path / "model.safetensors",
        {
            "a": _fp8(rng, rows, 1024),
            "b": np.zeros((rows, 1024), BF16),
            "a_scale": np.ones((rows // 128, 8), F32),
        },
    )
    with Checkpoint.open(tmp_path) as checkpoint:
        a = take("a", (rows, 1024), "f8e4m3")
        product = reshape(dequantize(a, take("a_scale", (rows // 128, 8), "f32"), "bf16"), (rows // 256, 256, 1024))
        b = take("b", (rows, 1024), "bf16")
        recipes = {
            "u": slice_(product, 1, 0, 128),
            "c": slice_(b, 1, 0, 512),
            "t": slice_(transpose(b, (1, 0)), 0, 512, 1024),
        }
        buffers = allocate(recipes)
        load = Loader(checkpoint, recipes, buffers, threads=4, scan=True)
        tracemalloc.start()
        load.run()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < EXTRA_BYTES


def test_progress_ends_at_the_total_and_knows_speed_and_time_left(checkpoint: Checkpoint) -> None:
    recipes = _recipes()
    told: list[LoadProgress] = []
    load = Loader(checkpoint, recipes, allocate(recipes))
    load.run(told.append)
    assert told[-1].done_bytes == told[-1].total_bytes == load.total_bytes
    half = LoadProgress(2_000_000_000, 6_000_000_000, 4.0)
    assert (half.gb_per_s, half.eta_s) == (0.5, 8.0)


# --- what can go wrong ----------------------------------------------------------------------------------------


def _damaged(folder: Path, tmp_path: Path, change: Callable[[Checkpoint, Path], None]) -> Checkpoint:
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder, copy)
    opened = Checkpoint.open(copy)
    change(opened, copy)
    return opened


def _poke(tensor: str, at: int, value: bytes) -> Callable[[Checkpoint, Path], None]:
    def change(checkpoint: Checkpoint, folder: Path) -> None:
        info = checkpoint.info(tensor)
        with (folder / info.shard).open("r+b") as file:
            file.seek(info.begin + at)
            file.write(value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_poke("e1.weight", 1000, b"\x7f"), r"'e1.weight' holds nan at element 1000"),
        (_poke("e1.weight", 256 * 384 - 1, b"\xff"), r"'e1.weight' holds nan at element 98303"),
        (_poke("table", 401 * 2, b"\x80\x7f"), r"'table' holds inf at element 401"),
        (_poke("norm", 128 * 4, b"\x00\x00\x80\xff"), r"'norm' holds -inf at element 128"),
        (
            _poke("e0.weight_scale_inv", 4, b"\x00\x00\x00\x00"),
            r"'e0.weight_scale_inv' holds 0.0 at element 1, expected every",
        ),
        (
            _poke("e0.weight_scale_inv", 4, b"\x00\x00\x80\xbf"),
            r"'e0.weight_scale_inv' holds -1.0 at element 1, expected every",
        ),
        (_poke("copy", 402, b"\x00\x00"), r"'copy' differs from the tensor"),
    ],
)
def test_bad_values_are_found_by_a_scan_only(
    folder: Path, tmp_path: Path, change: Callable[[Checkpoint, Path], None], message: str
) -> None:
    recipes = _recipes()
    with _damaged(folder, tmp_path, change) as checkpoint:
        Loader(checkpoint, recipes, allocate(recipes), copies={"copy": "table"}).run()
        with pytest.raises(CheckpointError, match=message):
            Loader(checkpoint, recipes, allocate(recipes), scan=True, copies={"copy": "table"}).run()


def test_a_bad_value_in_columns_is_placed_in_the_whole_tensor(folder: Path, tmp_path: Path) -> None:
    """Only some columns are read, and packed: the place in the message is still that in the tensor."""
    columns = {"columns": slice_(_recipes()["rows"].parts[0], 1, 5, 131)}
    width = columns["columns"].parts[0].shape[1]
    at = 3 * width + 7
    with _damaged(folder, tmp_path, _poke("table", 2 * at, b"\x80\x7f")) as checkpoint:
        loader = Loader(checkpoint, columns, allocate(columns), scan=True)
        with pytest.raises(CheckpointError, match=rf"'table' holds inf at element {at}, "):
            loader.run()


def test_a_shard_that_shrank_before_the_load_is_named(folder: Path, tmp_path: Path) -> None:
    def shrink(checkpoint: Checkpoint, copy: Path) -> None:
        os.truncate(copy / "model-00002-of-000002.safetensors", 5000)

    recipes = _recipes()
    with (
        _damaged(folder, tmp_path, shrink) as checkpoint,
        pytest.raises(CheckpointError, match=r"00002-of-000002.safetensors: is now 5000 bytes, was"),
    ):
        Loader(checkpoint, recipes, allocate(recipes)).run()


def test_a_shard_that_shrinks_while_it_is_read_gives_one_line_and_the_load_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = {"a": _expert(0), "b": take("table", (300, 200), "bf16"), "c": take("norm", (129,), "f32")}
    buffers = allocate(recipes)
    with _damaged(folder, tmp_path, lambda checkpoint, copy: None) as checkpoint:
        shard = checkpoint.folder / checkpoint.info("table").shard
        whole = shard.read_bytes()
        real = os.preadv

        def preadv(file: int, buffers: Any, offset: int) -> int:
            if os.fstat(file).st_ino == shard.stat().st_ino:
                os.truncate(shard, checkpoint.info("table").begin + 100)
            return real(file, buffers, offset)

        load = Loader(checkpoint, recipes, buffers, threads=1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", preadv)
            with pytest.raises(CheckpointError, match=r"'table' ends 119900 bytes early: the file shrank"):
                load.run()
        shard.write_bytes(whole)
        report = load.run()
        assert 0 < report.read_bytes < report.num_bytes == load.total_bytes
    with Checkpoint.open(tmp_path / "checkpoint") as mended:
        for name, recipe in recipes.items():
            _assert_equal(buffers[name], evaluate(recipe, mended), name)


def test_an_interrupt_ends_the_other_threads_too(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the thread that waits for them: Ctrl-C was heard when the last of 690 GB had been loaded."""
    table = take("table", (300, 200), "bf16")
    recipes = {str(row): slice_(table, 0, row, row + 1) for row in range(200)}
    buffers = allocate(recipes)
    load = Loader(checkpoint, recipes, buffers, threads=2)
    real, began = reader.Reader.do, []

    def slow(self: reader.Reader, job: Any) -> None:
        began.append(job)
        if len(began) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        real(self, job)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(reader.Reader, "do", slow)
            load.run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert 3 <= len(began) < 30
    load.run()  # goes on
    for name, recipe in recipes.items():
        _assert_equal(buffers[name], evaluate(recipe, checkpoint), name)


def test_a_read_error_names_the_tensor(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    recipe = {"x": _expert(3)}
    with pytest.raises(CheckpointError, match=r"'e3.weight' cannot be read \(Input/output error\)"):
        Loader(checkpoint, recipe, allocate(recipe)).run()


def test_a_scan_is_done_once_per_checkpoint_and_set_of_inputs(
    folder: Path, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    memory = tmp_path / "cache" / "scans.json"
    recipes = _recipes()
    time.sleep(0.05)  # what was written just now is not remembered

    def families(opened: Checkpoint, chosen: dict[str, Recipe]) -> int:
        report = Loader(opened, chosen, allocate(chosen), scan=True, memory=memory).run()
        assert report.scanned
        return len(report.families)

    assert families(checkpoint, recipes) > 0
    assert families(checkpoint, recipes) == 0
    assert families(checkpoint, {"w_uk": recipes["w_uk"]}) > 0
    with _damaged(folder, tmp_path, _poke("norm", 0, b"\x00\x00\x80\x3f")) as other:
        assert families(other, recipes) > 0
    memory.write_text("not JSON")
    assert families(checkpoint, recipes) > 0


def test_a_failed_scan_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    memory = tmp_path / "scans.json"
    recipe = {"x": _expert(1)}
    with _damaged(folder, tmp_path, _poke("e1.weight", 7, b"\x7f")) as checkpoint:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="holds nan"):
                Loader(checkpoint, recipe, allocate(recipe), scan=True, memory=memory).run()


@pytest.mark.parametrize("dtype", ["f8e4m3", "bf16", "f32"])
def test_every_bit_pattern_is_judged_as_numpy_does(dtype: str) -> None:
    bits = {"f8e4m3": np.uint8, "bf16": np.uint16, "f32": np.uint32}[dtype]
    patterns = np.arange(1 << min(16, 8 * np.dtype(bits).itemsize), dtype=np.uint32)
    patterns = (patterns << 16 if dtype == "f32" else patterns).astype(bits)
    scratch = np.empty(4, np.uint64)
    with np.errstate(invalid="ignore"):
        bad = ~np.isfinite(patterns.view(NUMPY[dtype]).astype(np.float32))
    for pattern, is_bad in zip(patterns[:: 1 if dtype == "f8e4m3" else 17], bad[:: 1 if dtype == "f8e4m3" else 17]):
        for place in (0, 5, 12):
            values = np.ones(13, bits)
            values[place] = pattern
            found = first_fault(values.view(np.uint8), dtype, scratch)
            assert found == (place if is_bad else None), hex(int(pattern))
