"""No file that is read from a foreign folder ends a reader in anything but one line.

Each format is mutated some hundred times, and with `-m slow` a hundred thousand times (`SEEKFORGE_FUZZ_CASES` says
another number).
"""

from __future__ import annotations

import gc
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.fuzz import other_formats
from tests.fuzz.formats import Format, judge, run_case
from tests.fuzz.mutate import mutated_text
from tests.fuzz.seeds import tiny_formats

from seekforge.runtime.cli.main import main

NAMES = (
    "manifest", "gpu manifest", "program", "bindings", "dump", "config", "generation config", "tokenizer",
    "target", "preset", "index", "shard", "kernel descriptor", "kernel index", *other_formats.NAMES,
)  # fmt: skip
_MANY = int(os.environ.get("SEEKFORGE_FUZZ_CASES", "100000"))
#: Address space of a run: a reader that makes room for what a file claims ends in a MemoryError, not in swap.
_ROOM_BYTES = 24 << 30


@pytest.fixture(scope="module")
def all_formats(
    tiny_checkpoint: Path,
    tiny_programs: dict[str, Path],
    tiny_engines: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Format]:
    scratch = tmp_path_factory.mktemp("seeds")
    program, engine = tiny_programs["exact"], tiny_engines["exact"]
    made = tiny_formats(tiny_checkpoint, program, engine, scratch)
    return made | other_formats.other_formats(program, engine, tiny_checkpoint / "tokenizer.json", scratch)


def fuzz(one: Format, folder: Path, seeds: range) -> None:
    found = {}
    one.prepare(folder)
    gc.collect()
    gc.freeze()  # what is there by now is never searched again
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_ROOM_BYTES, before[1]))
    try:
        for seed in seeds:
            fault = run_case(one, folder, seed)
            if fault is not None:
                found.setdefault(fault[:60], (seed, fault))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not found, "\n".join(f"seed {seed}: {fault}" for seed, fault in list(found.values())[:20])


def test_every_format_is_fuzzed(all_formats: dict[str, Format]) -> None:
    assert set(all_formats) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_unspoilt_file_is_read(name: str, all_formats: dict[str, Format], tmp_path: Path) -> None:
    """Else all cases would be refused for one reason and nothing be tried."""
    all_formats[name].prepare(tmp_path)
    all_formats[name].read(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_some_hundred_cases_find_nothing(name: str, all_formats: dict[str, Format], tmp_path: Path) -> None:
    fuzz(all_formats[name], tmp_path, range(300))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_thousand_cases_find_nothing(name: str, all_formats: dict[str, Format], tmp_path: Path) -> None:
    fuzz(all_formats[name], tmp_path, range(1000, 1000 + _MANY))


#: What once was found: text of a file, by format.
REGRESSIONS: dict[str, list[bytes]] = {
    "manifest": [
        b"[" * 100_000,
        b'{"format": 1e400}',
        b'{"format": 1, "\\ud800": 1}',
        b'{"format": ' + b"9" * 5000 + b"}",
    ],
    "program": [b'{"format": 2, "graphs": ' + b'{"a":' * 2000, b'{"format": NaN}', b"\xff\xfe{}"],
    "bindings": [
        b'{"format": 2, "graphs": {"model": {"x": {"op": "take", "shape": [4611686018427387904, 4], "dtype": "f32"}}}}',
        b'{"format": 2, "graphs": {"model": {"x": {"op": "slice", "shape": [1], "dtype": "f32", "axis": 7}}}}',
        b'{"format": 2, "graphs": {"model": {"x": {"op": "computed", "shape": [2, 2], "dtype": "f32", '
        b'"tensor": "hadamard", "params": {"size": 1048576}}}}}',
    ],
    "target": [b"limits: 2001-99-01", b"name: &a [*a]", b"name: !!python/name:os.system"],
    "tokenizer": [b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}'],
    "kernel descriptor": [b'{"format": 1, "images": {"a": {"params": [], "resources": {}}}}'],
    "dump": [b'{"format": 1, "tensors": [{"a": {"file": "../x", "dtype": "F32", "shape": [1]}}]}'],
}


@pytest.mark.parametrize(("name", "raw"), [(name, raw) for name, texts in REGRESSIONS.items() for raw in texts])
def test_what_once_was_found_is_one_line(name: str, raw: bytes, all_formats: dict[str, Format], tmp_path: Path) -> None:
    (tmp_path / all_formats[name].file).write_bytes(raw)
    assert judge(all_formats[name], tmp_path) is None


@pytest.mark.parametrize("seed", range(12))
def test_a_command_ends_in_one_line_and_code_2(
    seed: int,
    all_formats: dict[str, Format],
    tiny_checkpoint: Path,
    tiny_programs: dict[str, Path],
    tiny_engines: dict[str, Path],
    tmp_path: Path,
) -> None:
    """The whole command line, on a folder with one spoilt file: what is refused is one line, nothing is a traceback."""
    rng = random.Random(seed)
    name, source, command = rng.choice(
        [
            ("manifest", tiny_engines["exact"], ["inspect", "{}"]),
            ("manifest", tiny_engines["exact"], ["run", "{}", "--prompt", "hi", "--max-tokens", "2", "--quiet"]),
            ("program", tiny_programs["exact"], ["inspect", "{}"]),
            ("config", tiny_checkpoint, ["inspect", "{}"]),
            ("index", tiny_checkpoint, ["inspect", "{}"]),
        ]
    )
    folder = Path(shutil.copytree(source, tmp_path / "folder", copy_function=os.link))
    spoilt = folder / all_formats[name].file
    raw = mutated_text(spoilt.read_text(encoding="utf-8"), rng)
    spoilt.unlink()
    spoilt.write_bytes(raw)
    done = CliRunner().invoke(main, [word.format(folder) for word in command])
    assert done.exit_code in (0, 2), done.exception
    if done.exit_code == 2:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and len(done.stderr) < 4200
