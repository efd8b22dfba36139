"""`parity` of engines of several ranks: operations are judged as of one rank, and the rank that is wrong is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.in_process import dump_in_process
from tests.support.rank_engines import rank_engine

from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.parity.check import Result, check_engine
from seekforge.exporter.parity.sides.engine import EngineSide
from seekforge.exporter.parity.torch_walks import Walker
from seekforge.exporter.program.taps import layer_points
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import digest_file, load_manifest, save_manifest
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.parity_steps import make_plan
from seekforge.formats.program import load_bindings

ALL, TP = Parallelism(tp=2, pp=2, ep=True), Parallelism(tp=2)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small tensors: more threads only disturb others. Ranks are processes; the first is this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    dump_in_process(monkeypatch)
    yield
    torch.set_num_threads(before)


def check(engine: Path, checkpoint: Path, work: Path, *, has_mtp: bool = False, **options: Any) -> Result:
    work.mkdir(parents=True, exist_ok=True)
    side = EngineSide(engine, work, threads=1)
    config = ModelConfig.load(checkpoint)
    settings = Settings(config, NUMERICS[side.manifest.numerics["name"]], "f32")
    plan = make_plan(
        contexts=(40,),
        vocab_size=config.vocab_size,
        index_topk=config.index_topk,
        has_mtp=has_mtp,
        modes=("whole", "mtp") if has_mtp else ("whole",),
    )
    with Checkpoint.open(checkpoint) as source:
        return check_engine(side, Walker(settings, source, "checkpoint"), plan, work=work, **options)


def bent(engine: Path, out: Path, rank: int, weight: str) -> Path:
    """Copy an engine, sealed anew, in which a rank has another value of a weight: 1 % larger."""
    shutil.copytree(engine, out, copy_function=os.link)
    manifest, bindings = load_manifest(engine), load_bindings(engine)
    assert manifest.ranks is not None
    file = manifest.ranks.weight_file(rank)
    pieces = manifest.ranks.own_constants(engine, bindings, rank)
    values = [value for constants in pieces.values() for name, value in constants.items() if name.startswith(weight)]
    assert len({value.ctypes.data for value in values}) == 1, "graphs share it"
    start = values[0].ctypes.data - _start_of(pieces)
    (out / file).unlink()
    shutil.copyfile(engine / file, out / file)
    mapped = np.memmap(out / file, np.uint8, mode="r+")
    mapped[start : start + values[0].nbytes].view(values[0].dtype)[:] *= values[0].dtype.type(1.01)
    mapped.flush()
    files = tuple(digest_file(out, one.path) if one.path == file else one for one in manifest.files)
    (out / "manifest.json").unlink()
    save_manifest(out, manifest.model_copy(update={"files": files, "digest": "", "self_check": None}))
    return out


def _start_of(pieces: dict[str, dict[str, np.ndarray]]) -> int:
    """Return where the file is mapped."""
    value = next(iter(next(iter(pieces.values())).values()))
    while value.base is not None and isinstance(value.base, np.ndarray):
        value = value.base
    return value.ctypes.data


@pytest.mark.slow  # four processes run both graphs; the test below looks at an engine with one fault
def test_a_sound_engine_passes_and_all_its_operations_are_judged(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What ranks divide is put together to what one rank has: every point of every layer, between stages too."""
    engine = rank_engine(tiny_checkpoint, ALL, tmp_path_factory)
    result = check(engine, tiny_checkpoint, tmp_path / "w", has_mtp=True)
    assert result.passed, [gate for gate in result.gates if not gate.passed]
    assert [note.partition(":")[0] for note in result.notes] == ["ranks share the engine"]
    assert not any(record.ranks for record in result.records)
    judged = {layer: {r.module for r in result.records if r.layer == layer} for layer in range(6)}
    assert {"embed_tokens", "mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj"} <= judged[0]
    for layer in range(1, tiny_config.num_hidden_layers):
        assert {"input_layernorm", "mlp.experts", "mlp (sum)", "self_attn.indexer (selection)"} <= judged[layer], layer
    assert {"norm", "lm_head"} <= judged[tiny_config.num_hidden_layers]
    border = load_manifest(engine).ranks.pipeline_stages[1][0]  # pyright: ignore[reportOptionalMemberAccess]
    for number in (border - 1, border):
        shown = {point for layer in result.comparison.layers if layer.layer == number for point in layer.points}
        assert shown == set(layer_points(tiny_config, number)), number


#: Rank, weight, and what parity names: layer and module.
FAULTS = [
    (1, "layers.1.self_attn.o_proj.weight", 1, "self_attn.o_proj"),
    *(
        pytest.param(*fault, marks=pytest.mark.slow)
        for fault in (
            (1, "embed_tokens.weight", 0, "embed_tokens"),
            (1, "layers.0.mlp.gate_up_proj.weight", 0, "mlp.gate_proj"),
            (0, "layers.0.mlp.down_proj.weight", 0, "mlp.down_proj"),
            (1, "layers.1.mlp.experts.w2", 1, "mlp.experts"),
            (0, "layers.2.self_attn.q_b_proj.weight", 2, "self_attn.q_b_proj"),
            (3, "layers.3.mlp.shared_experts.down_proj.weight", 3, "mlp.shared_experts.down_proj"),
            (2, "lm_head.weight", 4, "lm_head"),
        )
    ),
]


@pytest.mark.parametrize(("rank", "weight", "layer", "module"), FAULTS)
def test_the_first_operation_and_the_rank_that_is_wrong_are_named(
    rank: int,
    weight: str,
    layer: int,
    module: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    engine = bent(rank_engine(tiny_checkpoint, ALL, tmp_path_factory), tmp_path / "engine", rank, weight)
    result = check(engine, tiny_checkpoint, tmp_path / "w")
    assert not result.passed and result.finding is not None
    assert (result.finding.layer, result.finding.module) == (layer, module)
    assert result.finding.ranks == (rank,) and result.finding.text.startswith(f"rank {rank}: ")
    assert result.finding.others == (module == "mlp.gate_proj"), "the same constant has up_proj; all else is right"


@pytest.mark.slow
def test_experts_that_are_cut_in_parts_name_their_rank(
    tiny_checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = rank_engine(tiny_checkpoint, TP, tmp_path_factory)
    result = check(bent(engine, tmp_path / "engine", 1, "layers.1.mlp.experts.w2"), tiny_checkpoint, tmp_path / "w")
    assert result.finding is not None and result.finding.module == "mlp.experts" and result.finding.ranks == (1,)


@pytest.mark.slow
def test_a_rank_is_named_when_taps_do_not_fit(
    tiny_checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = rank_engine(tiny_checkpoint, ALL, tmp_path_factory)
    engine = bent(engine, tmp_path / "engine", 3, "layers.3.self_attn.o_proj.weight")
    result = check(engine, tiny_checkpoint, tmp_path / "w", max_dump_bytes=0)
    assert result.finding is not None and (result.finding.layer, result.finding.ranks) == (3, (3,))
