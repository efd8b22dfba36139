"""The graph walker on a GPU: the tiny model and a truncated one of real width, eager and as a CUDA graph.

Each model is a folder with a checkpoint of random weights, its program, and its kernels. Steps go through
`plugin.enqueue`; every custom node is judged by its own inputs, the results are compared with PyTorch, the captured
step with the eager one byte for byte. The place is a parameter, so that all of it is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tests.support.graph_walk import (
    KvFormat,
    Walk,
    WrongNode,
    kernel_ops,
    same_outputs,
)
from tests.support.graph_walker import CapturedStep, CudaPlace, Place

from seekforge.common.errors import EnvironmentFault
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.program.export import export
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parity_steps import shuffled_tables
from seekforge.formats.program import load_program
from seekforge.formats.step_io import StepInputs, lay_out
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.index import KERNELS
from seekforge.plugins.quant import fake_quantize

CHECKPOINT, PROGRAM = "checkpoint", "program"


@dataclass(frozen=True)
class Model:
    """A model to walk.

    Attributes:
        preset: that it is made from; changes: keys of config.json that differ.
        past: cached tokens of each sequence before a step, more than index_topk in the first.
        steps: new tokens of each sequence, a decode step and others.
        trials: PyTorch runs that measure its noise.
        formats: those of the caches.
    """

    preset: str
    changes: dict[str, Any]
    past: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    trials: int
    formats: tuple[KvFormat, ...] = ("fp8_ds", "bf16")


MODELS: Final[dict[str, Model]] = {
    "tiny": Model("tiny", {"num_nextn_predict_layers": 0}, (150, 9), ((1, 1), (4, 3), (60, 33)), trials=12),
    "tiny-v3": Model(
        "tiny-v3",
        {"num_nextn_predict_layers": 0},
        (150, 9),
        ((1, 1), (4, 3), (60, 33)),
        trials=12,
        formats=("bf16",),  # dense attention reads no other
    ),
    # two layers of real width, one dense and one with 16 of the 256 experts, and a short vocabulary
    "real-width": Model(
        "full",
        {
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
            "n_routed_experts": 16,
            "vocab_size": 4096,
        },
        (4096, 700, 64, 0),
        ((1, 1, 1, 1), (16, 16, 16, 16)),
        trials=2,
    ),
}


def engine_folder(folder: Path, kv_format: KvFormat) -> Path:
    """Return where the kernels of a model and cache format lie."""
    return folder / f"engine-{kv_format}"


def prepare_program(folder: Path, name: str) -> None:
    """Write the checkpoint and the program of a model; what is there is kept."""
    model = MODELS[name]
    if not (folder / CHECKPOINT).is_dir():
        raw = load_preset(model.preset).config_json | model.changes
        folder.mkdir(parents=True, exist_ok=True)
        new_checkpoint(folder / CHECKPOINT, Preset(name, 1, raw, ModelConfig.parse(raw, name)))
    if not (folder / PROGRAM).is_dir():
        export(folder / CHECKPOINT, folder / PROGRAM, numerics=NUMERICS["fp8"])


def prepare_model(folder: Path, name: str, sms: Sequence[int], *, jobs: int | None) -> None:
    """Write checkpoint and program, and compile the kernels of each of its cache formats."""
    prepare_program(folder, name)
    program = load_program(folder / PROGRAM)
    for kv_format in MODELS[name].formats:
        tasks = aot.tasks(kernel_ops(program, kv_format), sms)
        aot.build(tasks, engine_folder(folder, kv_format) / KERNELS, cache=aot.default_cache(), jobs=jobs)


def fill_past(walk: Walk, lengths: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
    """Give both sides the same random caches for the past tokens; PyTorch would take minutes to prefill them."""
    draw = torch.Generator().manual_seed(1)
    config, session = walk.config, walk.session
    session.allocate_caches(walk.num_blocks)
    for layer in session.module().layer_numbers:
        latent, index = session.caches[f"latent_cache.{layer}"], session.caches.get(f"index_cache.{layer}")
        for length, blocks in zip(lengths, tables, strict=True):
            slots = (torch.tensor(blocks).unsqueeze(1) * 64 + torch.arange(64)).view(-1)[:length]
            c = fake_quantize(torch.randn(length, config.kv_lora_rank, generator=draw))
            k_pe = torch.randn(length, config.qk_rope_head_dim, generator=draw)
            latent[slots] = torch.cat([c, k_pe], 1).to(latent.dtype)
            if index is not None:
                keys = fake_quantize(torch.randn(length, config.index_head_dim, generator=draw))
                index[slots] = keys.to(index.dtype)
    walk.take_caches()


def walk_model(folder: Path, name: str, kv_format: KvFormat, place: Place, *, repeats: int = 20) -> tuple[bool, str]:
    """Walk all steps of a model; returns whether all is right, and a line per step.

    Args:
        repeats: of the runs that are timed; 0 times nothing.
    """
    model, lines, right = MODELS[name], [], True
    if not (folder / PROGRAM).is_dir():
        raise EnvironmentFault(f"{folder}: not made; gpu_check.py compile {folder.parent.parent} --sm {place.sm}")
    longest = max(max(new) for new in model.steps)
    tables, num_blocks = shuffled_tables([past + longest for past in model.past], np.random.default_rng(1))
    with Checkpoint.open(folder / CHECKPOINT) as source:
        engine = engine_folder(folder, kv_format)
        walk = Walk(source, folder / PROGRAM, engine, place, kv_format=kv_format, num_blocks=num_blocks)
        for new in model.steps:
            fill_past(walk, model.past, tables)
            draw = np.random.default_rng(0)
            tokens = [draw.integers(16, walk.config.vocab_size * 7 // 8, n).tolist() for n in new]
            step = lay_out(tokens, model.past, tables)
            good, text = _walk_step(walk, step, repeats, model.trials)
            right = right and good
            shape = f"B={len(new)} Q={max(new)}"
            lines.append(f"{'ok   ' if good else 'WRONG'} {name} {kv_format} {shape}: {text}")
            print(lines[-1], flush=True)
    return right, "\n".join(lines)


def _walk_step(walk: Walk, step: StepInputs, repeats: int, trials: int) -> tuple[bool, str]:
    """Compare one step with PyTorch, then replayed with eager, then time both."""
    before = {name: cache.clone() for name, cache in walk.caches.items()}

    def rewind() -> None:
        for name, cache in walk.caches.items():
            cache.copy_(before[name])

    noise = walk.noise(step, trials)
    try:
        found = walk.step(step)
    except WrongNode as error:
        rewind()
        return False, str(error)
    rewind()
    inputs = walk.inputs(step)
    eager = {name: one.clone() for name, one in walk.walker.run(inputs).items()}
    rewind()
    captured = CapturedStep(walk.walker, inputs, list(walk.caches))
    differ = same_outputs(captured.run(inputs), eager, walk.walker.outputs)
    text = str(found)
    if repeats:
        eager_ms = 1e3 * walk.place.seconds(lambda: _ignore(walk.walker.run(inputs)), repeats)
        graph_ms = 1e3 * walk.place.seconds(captured.replay, repeats)
        text += f"; eager {eager_ms:.2f} ms, graph {graph_ms:.2f} ms a step"
    rewind()
    good = found.within(noise, walk.config.num_hidden_layers) and not differ
    return good, text + (f"; graph and eager differ in {', '.join(differ)}" if differ else "")


def _ignore(outputs: object) -> None:
    """Only the time of a step is wanted."""


def walk_models(folder: Path, names: Sequence[str]) -> int:
    """Walk models on the first GPU; returns the exit code."""
    place = CudaPlace()
    right = [
        walk_model(folder / name, name, kv_format, place)[0] for name in names for kv_format in MODELS[name].formats
    ]
    return int(not all(right))
