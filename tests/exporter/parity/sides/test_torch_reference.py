"""The layer-by-layer walk is the model: the same bits as `TorchSession`, with one layer in memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seekforge.common.errors import ConfigError
from seekforge.exporter.models.shared.layer_operations import LayerModule
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.parity.compare import following
from seekforge.exporter.parity.compare.dumps import stream_rows
from seekforge.exporter.parity.compare.following import Follower
from seekforge.exporter.parity.sides import torch_reference as walking
from seekforge.exporter.parity.sides.torch_reference import Reference
from seekforge.exporter.parity.sides.torch_streams import Stream
from seekforge.exporter.parity.torch_walks import torch_side, without
from seekforge.exporter.program.taps import SELECTIONS
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.dump import Dump, DumpWriter
from seekforge.formats.numerics import EXACT, FP8, NUMERICS
from seekforge.formats.parity_steps import PlanStep, make_plan
from seekforge.formats.step_io import DUMPED_RESULTS
from seekforge.formats.step_runner import run_steps


def walk(folder: Path, settings: Settings, source: Checkpoint, plan: Any, **stream: Any) -> Dump:
    folder.mkdir()
    writer = DumpWriter(folder, torch_side(settings, "test", (0, settings.config.num_hidden_layers)), plan)
    Reference(settings, source, plan, streams=[Stream(writer, **stream)]).run()
    writer.close()
    return Dump.open(folder)


def plan_of(config: ModelConfig, context: int, *modes: Any) -> Any:
    return make_plan(
        contexts=(context,), vocab_size=config.vocab_size, index_topk=config.index_topk, has_mtp=True, modes=modes
    )


@pytest.mark.parametrize(("numerics", "activations"), [("exact", "f32"), ("fp8", "f32"), ("fp8", "bf16")])
def test_the_walk_gives_the_bits_of_the_whole_model(
    tiny_config: ModelConfig, tiny_source: Checkpoint, tmp_path: Path, numerics: str, activations: Any
) -> None:
    settings = Settings(tiny_config, NUMERICS[numerics], activations)
    plan = plan_of(tiny_config, 70, "ragged", "mtp")
    dump = walk(tmp_path / "walk", settings, tiny_source, plan)
    session = TorchSession(settings, tiny_source)

    def outputs(step: PlanStep) -> list[str]:
        return [name for name in session.output_names(step.graph) if name.startswith((*DUMPED_RESULTS, *SELECTIONS))]

    for ran in run_steps(session, plan, outputs):
        assert {"hidden", "logits"} < ran.tensors.keys()
        for name, value in ran.tensors.items():
            assert np.array_equal(dump.tensor(ran.number, name), value), (ran.case.name, ran.number, name)
    last = max(n for n, (_, step) in enumerate(dump.cases) if step.graph == "model")
    assert np.array_equal(dump.tensor(last, "cache_latent.2"), session.cache("latent_cache.2"))


def test_one_layer_is_in_memory_at_a_time(
    tiny_config: ModelConfig, tiny_source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Counted(LayerModule):
        def __init__(self, *args: Any) -> None:
            nonlocal most
            super().__init__(*args)
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr(walking, "LayerModule", Counted)
    walk(tmp_path / "walk", Settings(tiny_config, EXACT), tiny_source, plan_of(tiny_config, 5, "whole"), points=())
    assert most == 1


def test_a_perturbed_run_differs_a_little_and_repeats(
    tiny_config: ModelConfig, tiny_source: Checkpoint, tmp_path: Path
) -> None:
    settings, plan = Settings(tiny_config, EXACT), plan_of(tiny_config, 12, "whole")
    names = ("plain", "one", "two")
    runs = [
        walk(tmp_path / name, settings, tiny_source, plan, perturbation=0.0 if name == "plain" else 1e-6, points=())
        for name in names
    ]
    logits = [torch.from_numpy(run.tensor(0, "logits").copy()) for run in runs]
    assert torch.equal(logits[1], logits[2])
    moved = float((logits[0] - logits[1]).abs().max() / logits[0].std())
    assert 0 < moved < 1e-4
    assert runs[0].names(0) == ["hidden", "logits"]  # no points asked for


def test_a_run_goes_on_with_choices_of_another_that_tie_and_keeps_its_own(
    tiny_config: ModelConfig, tiny_source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a choice by noise leads to is then no difference: rows that read it through the caches are the same too."""
    settings, plan = Settings(tiny_config, EXACT), plan_of(tiny_config, 70, "whole")
    free = walk(tmp_path / "free", settings, tiny_source, plan)
    layer = next(i for i in range(tiny_config.num_hidden_layers) if tiny_config.is_moe_layer(i))
    name, row = f"expert_ids.{layer}", 40
    other = free.tensor(0, name).copy()
    other[row, -1] = next(e for e in range(tiny_config.n_routed_experts) if e not in other[row])
    (tmp_path / "other").mkdir()
    writer = DumpWriter(tmp_path / "other", free.side, plan)
    writer.write(0, {name: other})
    writer.close()

    def follow(folder: str) -> tuple[Dump, list[set[int]]]:
        followed = walk(tmp_path / folder, settings, tiny_source, plan, follows=Follower(Dump.open(tmp_path / "other")))
        assert np.array_equal(followed.tensor(0, name), free.tensor(0, name)), "its own choice is what is compared"
        return followed, [
            set(np.flatnonzero((stream_rows(followed, 0, i) != stream_rows(free, 0, i)).any(-1)))
            for i in (layer, layer + 1, layer + 2)
        ]

    assert follow("far")[1] == [set(), set(), set()], "another expert that does not tie is no noise"
    monkeypatch.setattr(following, "FLOOR_EXPERTS", 10.0)  # now it does
    followed, moved = follow("tie")
    assert moved[:2] == [set(), {row}]
    assert moved[2] > {row} and min(moved[2]) == row
    assert not np.array_equal(free.tensor(0, "logits"), followed.tensor(0, "logits"))


def test_a_range_needs_what_goes_into_it(tiny_config: ModelConfig, tiny_source: Checkpoint, tmp_path: Path) -> None:
    settings, plan = Settings(tiny_config, EXACT), plan_of(tiny_config, 5, "whole")
    writer = DumpWriter(tmp_path, torch_side(settings, "test", (2, 3)), plan)
    with pytest.raises(ConfigError, match="--layers starts at 2"):
        Reference(settings, tiny_source, plan, streams=[Stream(writer)]).run((2, 3))


def test_roundings_are_switched_off_by_name() -> None:
    assert without(FP8, ()) is FP8
    changed = without(FP8, ("kv_fp8",))
    assert not changed.kv_fp8 and changed.indexer_fp8 and changed.name == "fp8 without kv_fp8"
    with pytest.raises(ConfigError, match="--without kv: expected some of act_quant"):
        without(FP8, ("kv",))
