"""The exported program, as ONNX Runtime runs it, against the PyTorch model it was traced from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.made_once import made_once
from tests.support.parity import (
    CONTEXTS,
    GATE,
    MAX_FLIPPED,
    MODES,
    assert_same,
    drive,
    lengths_of,
    moved_rows,
    relative_error,
    tokens,
)

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.onnxruntime.build import build
from seekforge.exporter.builder.onnxruntime.session import OrtSession
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.program.export import export
from seekforge.exporter.program.taps import SELECTIONS
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.numerics import EXACT, FP8
from seekforge.formats.parity_steps import make_plan
from seekforge.formats.step_io import DUMPED_RESULTS, INTERMEDIATE_TENSORS, MTP, lay_out
from seekforge.formats.step_runner import run_steps
from seekforge.formats.targets import load_target
from seekforge.runtime.backends.onnxruntime import OnnxRuntimeBackend

BLOCK = 64


def open_engine(folder: Path, num_blocks: int | None = None, graph: str = "model") -> OrtSession:
    return OrtSession(folder, {graph: load_manifest(folder).graphs[graph]}, num_blocks, threads=1)


@pytest.fixture(scope="module")
def opened(tiny_engines: dict[str, Path]) -> dict[str, OrtSession]:
    """The engines, open; who takes steps by himself makes caches first."""
    return {name: open_engine(folder) for name, folder in tiny_engines.items()}


@pytest.fixture(scope="module")
def exact(tiny_config: ModelConfig, tiny_source: Checkpoint) -> TorchSession:
    """The PyTorch model; a run of steps begins with empty caches."""
    return TorchSession(Settings(tiny_config, EXACT), tiny_source)


@pytest.fixture(scope="module")
def rounding(tiny_config: ModelConfig, tiny_source: Checkpoint) -> TorchSession:
    """The same with the roundings of FP8."""
    return TorchSession(Settings(tiny_config, FP8, "f32"), tiny_source)


def caches_of(session: TorchSession) -> dict[str, np.ndarray]:
    """Cache name -> values, without the scrap block."""
    return {name: session.cache(name)[BLOCK:] for name in session.caches}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_exact_engine_equals_pytorch(
    exact: TorchSession, opened: dict[str, OrtSession], context: int, mode: str
) -> None:
    sequences = [tokens(n, seed=n) for n in lengths_of(mode, context)]
    engine = opened["exact"]
    pairs = list(zip(drive(engine, sequences, mode), drive(exact, sequences, mode), strict=True))
    for from_engine, from_torch in pairs:
        assert_same(from_engine, from_torch, f"{mode} at {context}")
    moved = sum(moved_rows(from_engine, from_torch).sum() for from_engine, from_torch in pairs)
    for name, expected in caches_of(exact).items():
        cache = engine.cache(name)[BLOCK:]
        wrong = ~np.isclose(cache, expected, rtol=1e-4, atol=1e-4).all(-1)
        # every byte that nobody owns is untouched, and rows differ only where a layer before chose differently
        assert not cache[(expected == 0).all(-1)].any(), name
        assert wrong.sum() <= 0.01 * len(wrong) + moved, f"{name}: {wrong.sum()} slots differ"


@pytest.mark.parametrize("context", CONTEXTS)
def test_results_of_a_step_are_consistent(opened: dict[str, OrtSession], context: int) -> None:
    ids = tokens(context)
    blocks = list(range(1, 2 + context // BLOCK))
    engine = opened["exact"]
    engine.allocate_caches(len(blocks) + 1)
    got = engine.run(lay_out([ids], [0], [blocks]))
    logits = got["logits"]
    order = np.argsort(-logits, axis=-1, kind="stable")[:, : got["top_ids"].shape[1]]
    assert np.array_equal(got["top_ids"], order)
    assert np.array_equal(got["top_logits"], np.take_along_axis(logits, order, -1))
    peak = logits.max(-1, keepdims=True).astype(np.float64)
    exact = (peak + np.log(np.exp(logits - peak).sum(-1, keepdims=True)))[:, 0]
    assert np.allclose(got["logsumexp"], exact, rtol=0, atol=1e-5)


def test_a_padded_row_changes_no_byte_outside_the_scrap_block(opened: dict[str, OrtSession]) -> None:
    for engine in opened.values():
        engine.allocate_caches(6)
        for name in engine.caches:
            engine.caches[name].update_inplace(np.full_like(engine.cache(name), 7.5))
        # the second sequence is two tokens long, the rectangle nine wide
        engine.run(lay_out([tokens(9), tokens(2)], [0, 0], [[2], [4]]))
        for name in engine.caches:
            after = engine.cache(name)
            touched = np.flatnonzero((after[BLOCK:] != 7.5).any(-1)) + BLOCK
            assert touched.tolist() == [*range(2 * BLOCK, 2 * BLOCK + 9), 4 * BLOCK, 4 * BLOCK + 1], name


def test_rubbish_in_unused_slots_does_not_leak(opened: dict[str, OrtSession]) -> None:
    engine, step = opened["exact"], lay_out([tokens(100)], [0], [[3, 1]])
    engine.allocate_caches(5)
    clean = engine.run(step)["logits"].copy()
    for name in engine.caches:
        engine.caches[name].update_inplace(np.full_like(engine.cache(name), np.nan))
    assert np.array_equal(engine.run(step)["logits"], clean)


@pytest.mark.parametrize("context", (10, 65, 200))
def test_mtp_engine_equals_pytorch(
    tiny_config: ModelConfig, tiny_source: Checkpoint, tiny_engines: dict[str, Path], context: int
) -> None:
    hidden = np.random.default_rng(0).standard_normal((1, context, tiny_config.hidden_size), np.float32)
    step = replace(lay_out([tokens(context)], [0], [range(1, 2 + context // BLOCK)]), hidden_in=hidden)
    expected = TorchSession(Settings(tiny_config, EXACT), tiny_source, 6).run(step, graph=MTP)
    results = open_engine(tiny_engines["exact"], 6, MTP).run(step, graph=MTP)
    assert relative_error(results["logits"], expected.fetch("logits")).max() <= GATE
    assert np.abs(results["hidden"] - expected.fetch("hidden")).max() <= 1e-4
    layer = tiny_config.mtp_layer
    assert np.array_equal(results[f"topk_indices.{layer}"], expected.fetch(f"topk_indices.{layer}"))


def test_one_loop_drives_pytorch_the_graphs_and_the_backend_that_serves(
    tiny_config: ModelConfig, tiny_source: Checkpoint, tiny_engines: dict[str, Path]
) -> None:
    plan = make_plan(contexts=(20,), vocab_size=1024, index_topk=64, has_mtp=True, modes=("ragged", "mtp"))
    engine, manifest = tiny_engines["exact"], load_manifest(tiny_engines["exact"])
    with contextlib.closing(OnnxRuntimeBackend(engine, manifest, threads=1)) as backend:
        runners = (
            TorchSession(Settings(tiny_config, EXACT), tiny_source),
            OrtSession(engine, manifest.graphs),
            backend,
        )
        runs = [list(run_steps(runner, plan, lambda step: DUMPED_RESULTS)) for runner in runners]
        assert [ran.step.graph for ran in runs[0]].count(MTP) > 1
        for expected, *others in zip(*runs, strict=True):
            for ran in others:
                assert ran.number == expected.number
                assert relative_error(ran.tensors["logits"], expected.tensors["logits"]).max() <= GATE
                assert np.allclose(ran.tensors["hidden"], expected.tensors["hidden"], rtol=0, atol=1e-4)
        for name in runners[1].caches:
            np.testing.assert_array_equal(backend.cache(name), runners[1].cache(name), err_msg=name)


# --- numerics fp8: rounding to e4m3 is discrete too ---------------------------------------------------------


@contextlib.contextmanager
def _perturbed(session: TorchSession, seed: int) -> Iterator[TorchSession]:
    """Change the embeddings of a model by parts in a million."""
    generator = torch.Generator().manual_seed(seed)

    def perturb(module: torch.nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded * (1 + 1e-6 * torch.randn(embedded.shape, generator=generator))

    hook = session.module().token_embedding().register_forward_hook(perturb)
    try:
        yield session
    finally:
        hook.remove()


@pytest.mark.parametrize(("context", "mode"), [(10, "whole"), (10, "decode"), (64, "whole"), (200, "ragged")])
def test_fp8_engine_differs_from_pytorch_no_more_than_pytorch_from_itself(
    rounding: TorchSession, opened: dict[str, OrtSession], context: int, mode: str
) -> None:
    """A sum in another order can flip one e4m3 rounding, and the rows that attend to it then differ for good.

    So whole-model FP8 logits are judged by quantiles: the engine against PyTorch must lie within 1.5 times
    PyTorch against itself with embeddings changed by 1e-6 (ten times the noise of a sum in another order). The
    strict comparison is layer by layer, below.
    """
    sequences = [tokens(n, seed=n) for n in lengths_of(mode, context)]
    reference = drive(rounding, sequences, mode)
    engine = drive(opened["fp8"], sequences, mode)
    quantiles = (0.5, 0.9, 1.0)

    def error(runs: list[Any]) -> np.ndarray:
        rows = [relative_error(a.logits, b.logits) for a, b in zip(runs, reference, strict=True)]
        return np.quantile(np.concatenate(rows), quantiles)

    noise = []
    for seed in range(8):
        with _perturbed(rounding, seed) as session:
            noise.append(error(drive(session, sequences, mode)))
    bound = 1.5 * np.max(noise, axis=0) + GATE
    of_engine = error(engine)
    assert (of_engine <= bound).all(), f"quantiles {quantiles}: {of_engine}, allowed {bound}"


@pytest.fixture(scope="module")
def layer_engines(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """FP8 engines of single layers: the dense one and a MoE one in the middle."""

    def make(root: Path) -> None:
        for layer in (0, 2):
            export(tiny_checkpoint, root / f"p{layer}", numerics=FP8, layer_range=(layer, layer + 1))
            build(
                root / f"p{layer}",
                root / f"e{layer}",
                target=load_target("cpu"),
                checkpoint_folder=tiny_checkpoint,
                force=False,
                progress=Stages(quiet=True),
            )

    root = made_once(tmp_path_factory, "layer-engines", make)
    return {layer: root / f"e{layer}" for layer in (0, 2)}


@pytest.mark.parametrize("layer", (0, 2))
def test_fp8_layers_equal_pytorch_but_for_single_roundings(
    tiny_config: ModelConfig, tiny_source: Checkpoint, layer_engines: dict[int, Path], layer: int
) -> None:
    """One layer fed the same input on both sides: what is left is that layer's own arithmetic.

    An e4m3 rounding flips where the two sums straddle a tie: about one element in 10^5. A flip moves its own row
    by about 1e-2 of the spread, and rows that attend to it by far less.
    """
    ids, blocks = tokens(300), [3, 1, 5, 2, 4]
    step = lay_out([ids], [0], [blocks])
    settings = Settings(tiny_config, FP8, "f32")
    if layer:
        before = TorchSession(settings, tiny_source, 7, layer_range=(0, layer)).run(step)
        step = replace(step, intermediate_tensors={name: before.fetch(name) for name in INTERMEDIATE_TENSORS})
    reference = TorchSession(settings, tiny_source, 7, layer_range=(layer, layer + 1))
    expected = reference.run(step)
    engine = open_engine(layer_engines[layer], 7)
    results = engine.run(step)
    for name in INTERMEDIATE_TENSORS:
        error = relative_error(results[f"{name}_out"][0], expected.fetch(name)[0])
        assert (error <= 1e-5).mean() >= 0.9, f"{name}: {(error > 1e-5).sum()} rows moved"
        assert error.max() <= 0.3, f"{name}: a row moved by {error.max():.2e} of the spread"
    for name in [name for name in results if name.startswith(SELECTIONS)]:
        assert (results[name] != expected.fetch(name)).any(-1).mean() <= MAX_FLIPPED, name
    for name, value in caches_of(reference).items():
        same = np.isclose(engine.cache(name)[BLOCK:], value, rtol=1e-5, atol=1e-5)
        assert same.mean() >= 1 - 1e-4, f"{name}: {(~same).sum()} of {same.size} cached values differ"
