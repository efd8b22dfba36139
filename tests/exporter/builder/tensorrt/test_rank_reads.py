"""Ranks of a GPU engine read their own part of the checkpoint: bytes are counted, tensor by tensor."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from tests.exporter.builder.tensorrt.test_rank_engine import ALL, stand_in_engine
from tests.support.fake_gpu import FakeDevice
from tests.support.made_once import made_once
from tests.support.rank_engines import rank_engine

from seekforge.exporter.program.export import export
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.loader import reader
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.program import load_bindings
from seekforge.runtime.backends.ranks.shared_memory import Memory, SharedMemory
from seekforge.runtime.backends.ranks.stage_links import StageLinks
from seekforge.runtime.backends.tensorrt.device_weights import DeviceWeights
from seekforge.runtime.backends.tensorrt.part import rank_part

#: The one layout of the ordinary tests has everything; the others are slow.
LAYOUTS = [
    ALL,
    *(
        pytest.param(one, marks=pytest.mark.slow)
        for one in (Parallelism(tp=2), Parallelism(tp=2, ep=True), Parallelism(pp=2), Parallelism(tp=2, pp=2))
    ),
]

_LAYER, _EXPERT = re.compile(r"\.layers\.(\d+)\."), re.compile(r"\.experts\.(\d+)\.")
#: What ranks of a stage have rows of.
_BY_ROWS = re.compile(r"(embed_tokens|lm_head|\.(q_b|kv_b|gate|up)_proj)\.weight")


def program_of(layout: Parallelism, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if layout == ALL:  # which other tests have
        return rank_engine(checkpoint, layout, tmp_path_factory).parent / "program"
    return (
        made_once(
            tmp_path_factory,
            f"ranks-program-{layout}",
            lambda root: export(checkpoint, root / "program", numerics=NUMERICS["exact"], parallelism=layout) and None,
        )
        / "program"
    )


def bytes_read(folder: Path, source: Checkpoint, number: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return how many bytes of each tensor a rank reads while its weights are loaded."""
    manifest = load_manifest(folder)
    assert manifest.ranks is not None
    memory = Memory(manifest.ranks.parallelism)
    links = StageLinks(manifest, number, SharedMemory(memory, number, lambda: None))
    part = rank_part(manifest, load_bindings(folder), number, links)
    memory.close()
    starts = sorted((source.info(name).shard, source.info(name).begin, name) for name in source.names)
    read: Counter[str] = Counter()
    fill = reader.read_all_at

    def counted(file: int, out: memoryview, offset: int) -> int:
        shard = Path(f"/proc/self/fd/{file}").readlink().name
        name = max(one for one in starts if one[:2] <= (shard, offset))[2]
        assert offset + len(out) <= source.info(name).end, "a read stays in its tensor"
        read[name] += len(out)
        return fill(file, out, offset)

    with monkeypatch.context() as patched:
        patched.setattr(reader, "read_all_at", counted)
        weights = DeviceWeights(folder, part.bindings, FakeDevice(), lambda: source)  # pyright: ignore[reportArgumentType]
        for graph, recipes in part.bindings.items():
            weights.load(graph, recipes)
    return read


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_rank_reads_its_part_alone(
    layout: Parallelism,
    tiny_checkpoint: Path,
    tiny_source: Checkpoint,
    tiny_config: ModelConfig,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stages, heads, experts and vocabulary of others stay unread. Of matrices that are cut by columns a rank reads
    what lies between its own as well, where they are as narrow as here: a page of the file holds both."""
    program = program_of(layout, tiny_checkpoint, tmp_path_factory)
    folder = stand_in_engine(program, tiny_checkpoint, layout, tmp_path_factory)
    ranks = load_manifest(folder).ranks
    assert ranks is not None
    sizes = {name: tiny_source.info(name).num_bytes for name in tiny_source.names}
    total: Counter[str] = Counter()
    for number in range(layout.num_ranks):
        place = layout.coordinates(number)
        read = bytes_read(folder, tiny_source, number, monkeypatch)
        total.update(read)
        first, last = ranks.pipeline_stages[place.pp_rank]
        for name, count in read.items():
            layer, expert = _LAYER.search(name), _EXPERT.search(name)
            assert layer is None or first <= int(layer[1]) < last or place.pp_rank == layout.pp - 1, name
            if expert is not None and layout.ep:
                assert int(expert[1]) // (tiny_config.n_routed_experts // layout.tp) == place.tp_rank, name
                assert count == sizes[name], name
            elif _BY_ROWS.search(name):
                assert count * layout.tp == sizes[name], (number, name)
            else:
                assert 0 < count <= sizes[name], (number, name)
    experts = {name for name in sizes if _EXPERT.search(name)}
    assert experts <= total.keys(), "what one rank leaves out another reads"
    if layout.ep:
        assert all(total[name] == sizes[name] for name in experts), "and none twice"
