"""Engines of several ranks compute what the engine of one computes, and end together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support.rank_engines import rank_engine

from seekforge import LLM, SamplingParams
from seekforge.common.errors import EngineError
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.step_io import MODEL, MTP, StepInputs, lay_out
from seekforge.runtime.backends.base import Backend
from seekforge.runtime.backends.ranks import micro_batches
from seekforge.runtime.backends.ranks.same_check import VARIABLE, SameCheck
from seekforge.runtime.engine.engine_folder import Engine
from seekforge.runtime.engine.outputs import GenerationError

TP, TP_EP, PP = Parallelism(tp=2), Parallelism(tp=2, ep=True), Parallelism(pp=2)
TP_PP, ALL = Parallelism(tp=2, pp=2), Parallelism(tp=2, pp=2, ep=True)
#: The one layout of the ordinary tests has everything; the others are slow.
LAYOUTS = [ALL, *(pytest.param(one, marks=pytest.mark.slow) for one in (TP, TP_EP, PP, TP_PP))]
RNG = np.random.default_rng(3)
COMMON = RNG.integers(16, 900, 70).tolist()
PROMPTS = [
    COMMON + RNG.integers(16, 900, count).tolist() for count in (50, 52, 54)
]  # each needs a third block before it ends
GREEDY = SamplingParams(max_tokens=20, temperature=0)


@pytest.fixture(scope="session", params=LAYOUTS, ids=str)
def engine(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_engine(tiny_checkpoint, request.param, tmp_path_factory)


@contextlib.contextmanager
def opened(engine: Path) -> Iterator[Backend]:
    backend = Engine.open(engine).open_backend(threads=1)
    try:
        yield backend
    finally:
        backend.close()


def children() -> set[int]:
    """Return the processes of ranks that this one has."""
    result: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"ranks.worker" in (stat.parent / "cmdline").read_bytes():
                result.add(int(stat.parent.name))
    return result


def results(backend: Backend, names: set[str]) -> list[dict[str, np.ndarray]]:
    """Prefill two prompts in two chunks, then take a step of the MTP module."""
    backend.allocate_caches(8)
    rows = [COMMON[:40], COMMON[5:69]]
    steps: list[dict[str, np.ndarray]] = []
    for start, stop in ((0, 30), (30, 64)):
        step = lay_out([row[start:stop] for row in rows], [start, start], [[1], [2]])
        given = backend.run(step, outputs=names | {"hidden"})
        steps.append({name: np.array(given.fetch(name)) for name in names | {"hidden"}})
    step = StepInputs(**{**vars(step), "hidden_in": steps[-1]["hidden"]})
    given = backend.run(step, outputs={"logits", "hidden"}, graph=MTP)
    return [*steps, {name: np.array(given.fetch(name)) for name in ("logits", "hidden")}]


def test_steps_equal_those_of_one_rank(engine: Path, tiny_engines: dict[str, Path]) -> None:
    manifest = Engine.open(engine).manifest
    taps = {spec.name for spec in manifest.graphs[MODEL].outputs if spec.role == "tap"}
    assert taps, "selections of all stages come to rank 0"
    with opened(engine) as many, opened(tiny_engines["exact"]) as one:
        pairs = zip(results(many, {"logits", *taps}), results(one, {"logits", *taps}), strict=True)
        for several, single in pairs:
            for name, expected in single.items():
                if name in taps:
                    np.testing.assert_array_equal(np.sort(several[name]), np.sort(expected), err_msg=name)
                else:
                    np.testing.assert_allclose(several[name], expected, atol=2e-5 * expected.std(), rtol=0)
        layers = (*manifest.cache.layers, manifest.cache.mtp_layer)
        for name in (f"{kind}.{layer}" for kind in ("latent_cache", "index_cache") for layer in layers):
            expected = one.cache(name)  # pyright: ignore[reportAttributeAccessIssue] - CPU backends show caches
            value = many.cache(name)  # pyright: ignore[reportAttributeAccessIssue]
            np.testing.assert_allclose(value, expected, atol=2e-5 * expected.std(), rtol=0, err_msg=name)
    assert not children()


def test_micro_batches_change_nothing(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts cut by columns, a step of many sequences cut by rows: results, taps and caches of the whole steps."""
    taps = {spec.name for spec in Engine.open(engine).manifest.graphs[MODEL].outputs if spec.role == "tap"}
    names = {"logits", "hidden", *taps}
    prompts = lay_out([COMMON[:50], COMMON[7:40], COMMON[3:33]], [0] * 3, [[1], [2], [3]], [3, 20, 149, 60, 82])
    ahead = (50, 33, 30, 0, 0)
    one_each = lay_out([[5], [6, 7], [8], [9, 10], [11]], ahead, [[1], [2], [3], [4], [5]], [9, 0, 3, 2])
    told: list[list[np.ndarray]] = []
    with opened(engine) as backend:
        for least in (micro_batches.LEAST_TOKENS, 2):
            monkeypatch.setattr(micro_batches, "LEAST_TOKENS", least)
            backend.allocate_caches(7)
            given: list[np.ndarray] = []
            for step in (prompts, one_each):
                fetched = backend.run(step, outputs=names)
                for name in sorted(names):
                    value = np.array(fetched.fetch(name))
                    if name in taps:
                        value = np.sort(value.reshape(len(step.real), -1))[step.real]
                    elif name == "hidden":
                        value = value.reshape(len(step.real), -1)[step.real]
                    given.append(value)
            told.append([*given, backend.cache("latent_cache.3")])  # pyright: ignore[reportAttributeAccessIssue]
    for expected, value in zip(*told, strict=True):
        exact = np.issubdtype(expected.dtype, np.integer)  # choices
        np.testing.assert_allclose(value, expected, atol=0 if exact else 2e-5 * expected.std(), rtol=0)


def test_the_debug_mode_finds_nothing_in_a_sound_engine(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And compares something: every sum, and the keys and experts that each layer chooses."""
    counted: list[str] = []
    require = SameCheck.require

    def noted(self: SameCheck, what: str, value: np.ndarray) -> None:
        counted.append(what)
        require(self, what, value)

    monkeypatch.setattr(SameCheck, "require", noted)
    monkeypatch.setenv(VARIABLE, "1")
    with opened(engine) as many:
        results(many, {"logits"})
    kinds = {what.partition(".")[0] for what in counted}
    tp = Engine.open(engine).manifest.ranks.parallelism.tp  # pyright: ignore[reportOptionalMemberAccess]
    assert kinds == {"sum", "topk_indices", "expert_ids"} if tp > 1 else "sum" not in kinds


@pytest.mark.slow  # engines of two layouts are built, and run twice
@pytest.mark.parametrize(("layout", "precision"), [(ALL, "int4"), (TP, "int8")], ids=str)
def test_weights_in_codes_are_those_of_one_rank(
    layout: Parallelism,
    precision: str,
    tiny_checkpoint: Path,
    tiny_source: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Before and after a weight is another one. Inputs of products are rounded to int8, where another order of a sum
    flips some: most rows move by 0.03 of the spread (measured), those before the first flip by nothing. A weight that
    changes moves them by 0.15 and more."""
    name = "model.layers.3.self_attn.o_proj.weight_scale_inv"
    changed = {one: tiny_source.tensor(one) for one in (name, name.removesuffix("_scale_inv"))}
    changed[name] = changed[name] * np.float32(1.5)
    told: list[list[dict[str, np.ndarray]]] = []
    for parallelism in (layout, Parallelism()):
        folder = rank_engine(tiny_checkpoint, parallelism, tmp_path_factory, precision=precision)
        with opened(folder) as backend:
            before = results(backend, {"logits"})
            backend.update_weights(changed)
            told.append([*before, *results(backend, {"logits"})])
    assert Engine.open(folder).manifest.quantization is not None
    for several, single in zip(*told, strict=True):
        errors = np.abs(several["logits"] - single["logits"]).max(-1) / single["logits"].std()
        assert np.median(errors) < 0.05, errors
    assert np.abs(told[0][0]["logits"] - told[1][0]["logits"]).max(-1).min() < 1e-4
    for one in told:
        moved = [np.abs(before["logits"] - after["logits"]).max(-1) for before, after in zip(one, one[3:])]
        assert min(map(np.median, moved)) > 0.1 * one[0]["logits"].std()


def test_text_with_drafts_prefixes_preemption_and_new_weights_is_that_of_one_rank(
    engine: Path, tiny_engines: dict[str, Path], tiny_source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new weight is one that ranks divide, in a layer of the last stage. Stages take all steps in micro-batches."""
    monkeypatch.setattr(micro_batches, "LEAST_TOKENS", 1)
    name = "model.layers.3.self_attn.o_proj.weight_scale_inv"
    changed = {name: tiny_source.tensor(name) * np.float32(1.5)}
    changed[name.removesuffix("_scale_inv")] = tiny_source.tensor(name.removesuffix("_scale_inv"))
    told: list[list[tuple[int, ...]]] = []
    for folder in (tiny_engines["exact"], engine):
        with LLM(
            folder,
            num_blocks=6,
            max_num_batched_tokens=64,
            num_speculative_tokens=2,
            speculation_off_switch=False,
            threads=1,
        ) as llm:
            before = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
            metrics = llm.metrics()
            assert metrics.num_hit_tokens and metrics.num_preemptions and sum(metrics.drafts_proposed)
            with pytest.raises(EngineError, match="reads no tensor 'x'"):
                llm.update_weights({"x": changed[name]})
            llm.update_weights(changed)
            after = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
            assert before != after
            told += [before + after]
    assert told[0] == told[1]


def test_a_rank_that_is_killed_is_named_and_leaves_nothing(engine: Path) -> None:
    with LLM(engine, num_blocks=9, self_check=False, threads=1) as llm:
        processes = children()
        assert len(processes) == Engine.open(engine).manifest.ranks.parallelism.num_ranks - 1  # pyright: ignore
        os.kill(max(processes), signal.SIGKILL)
        with pytest.raises(GenerationError, match=r"rank \d \(process \d+\) was ended by signal 9"):
            llm.generate(PROMPTS, GREEDY)
        assert not children(), "the other ranks ended too"
        with pytest.raises(EngineError, match=r"rank \d"):
            llm.update_weights({})


_SCRIPT = """
import sys
from seekforge import LLM, SamplingParams
with LLM(sys.argv[1], num_blocks=5, num_speculative_tokens=1, self_check=False, threads=1) as llm:
    print(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0))[0].outputs[0].token_ids, flush=True)
    if len(sys.argv) > 2:
        sys.stdin.read()
"""


def test_ranks_that_a_launcher_started_meet(engine: Path) -> None:
    """As torchrun starts them: the same program for every rank, and variables that say which it is."""
    count = Engine.open(engine).manifest.ranks.parallelism.num_ranks  # pyright: ignore[reportOptionalMemberAccess]
    shared = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(20_000 + os.getpid()),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(engine)],
            env=shared | {"RANK": str(rank), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, ended
    assert ended[0][0].startswith("(") and not any(out for out, _ in ended[1:])


def test_the_ranks_of_a_process_that_is_killed_end(engine: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(engine), "wait"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline()
    ranks = [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if int(stat.read_text().rpartition(")")[2].split()[1]) == process.pid
    ]
    assert ranks
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
