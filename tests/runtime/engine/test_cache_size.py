"""The cache that nobody asked for always fits, and what cannot fit says which option to change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.support.samples import audit_of

from seekforge.common.errors import EngineError, RequestError
from seekforge.exporter.sizing.memory import cache_bytes
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.agreement import cache_block_bytes
from seekforge.formats.engine.manifest import Manifest, Target
from seekforge.formats.engine.ranks import Ranks
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime import LLM, Engine, SamplingParams
from seekforge.runtime.engine import cache_size
from seekforge.runtime.engine.cache_size import cache_budget, decide_num_blocks

MIB = 1 << 20


@pytest.fixture(scope="module")
def manifest(toy_engine: Path) -> Manifest:
    return Engine.open(toy_engine).manifest


def decide(manifest: Manifest, free: int | None, **asked: int | None) -> int:
    options = {"max_batch_size": 8, "max_model_len": 1024, "num_blocks": None, "kv_cache_memory": None, **asked}
    return decide_num_blocks(manifest, free_bytes=free, **options)  # pyright: ignore[reportArgumentType]


def on_gpu(manifest: Manifest, **account: int) -> Manifest:
    audit = audit_of({"weights": 0, "scratch": 0, "activations": 0, "reserve": 0, **account})
    return manifest.model_copy(update={"audit": audit, "target": Target(name="h200", backend="tensorrt", sm=90)})


def test_the_default_holds_all_requests_where_that_fits(manifest: Manifest) -> None:
    assert decide(manifest, 1 << 40) == 8 * 16 + 1
    assert decide(manifest, None) == 8 * 16 + 1
    assert decide(manifest, 1 << 40, max_model_len=65) == 8 * 2 + 1


def test_the_default_takes_half_of_what_the_engine_leaves(manifest: Manifest) -> None:
    files = sum(file.bytes for file in manifest.files)
    size = manifest.cache.bytes_per_block
    assert decide(manifest, files + 20 * size) == 10
    assert cache_budget(manifest, files - 1) == 0
    with pytest.raises(EngineError, match=r"0 bytes are left for caches, expected room for at least 2 .* num_blocks"):
        decide(manifest, files)


def test_a_gpu_s_default_is_what_the_planner_left(manifest: Manifest) -> None:
    size = manifest.cache.bytes_per_block
    gpu = on_gpu(manifest, usable=100 * MIB, weights=60 * MIB, scratch=10 * MIB, activations=5 * MIB, reserve=5 * MIB)
    assert cache_budget(gpu, free_bytes=1) == 20 * MIB  # main memory is no matter there
    assert decide(gpu, 1) == min(20 * MIB // size, 8 * 16 + 1)
    full = on_gpu(manifest, usable=100 * MIB, weights=99 * MIB, scratch=2 * MIB)
    with pytest.raises(EngineError, match="num_blocks"):
        decide(full, 1)


def test_of_several_gpus_the_one_with_room_for_the_fewest_blocks_decides(manifest: Manifest) -> None:
    """Stage 1 has fewer layers and so smaller blocks, but far less room."""
    model = manifest.graphs["model"]
    caches = model.with_role("cache")
    first = dataclasses.replace(model, inputs=caches, outputs=(), aliases={}, file="model.0.plan")
    second = dataclasses.replace(model, inputs=caches[:1], outputs=(), aliases={}, file="model.1.plan")
    size, less = (cache_block_bytes([one], manifest.cache) for one in (first, second))
    assert less < size

    def blocks(*rooms: int) -> int:
        empty = dict.fromkeys(("weights", "scratch", "activations", "reserve"), 0)
        accounts = tuple({**empty, "usable": room} for room in rooms)
        ranks = Ranks(
            parallelism=Parallelism(tp=2, pp=2),
            pipeline_stages=((0, 1), (1, 2)),
            pieces={"model": (("model.0",), ("model.1",))},
            stage_bytes=accounts,
        )
        several = on_gpu(manifest, total=0, usable=max(rooms)).model_copy(
            update={"graphs": {"model": model}, "stages": {"model": (first, second)}, "ranks": ranks}
        )
        return decide(several, None)

    assert blocks(20 * size, 20 * size) == 20
    assert blocks(20 * size, 7 * less + 1) == 7
    with pytest.raises(EngineError, match=f"{less:,} bytes are left for caches, expected room for at least 2 "):
        blocks(20 * size, less)


def test_the_default_stays_inside_the_profiles(manifest: Manifest) -> None:
    """A plan takes caches of the sizes that it was compiled for."""
    name = manifest.graphs["model"].with_role("cache")[0].name
    shapes = ((64, 16), (64, 16), (7 * 64, 16))
    spec = manifest.graphs["model"].named(name)
    graph_io = manifest.graphs["model"].model_copy(
        update={
            "inputs": tuple(
                one.model_copy(update={"shape": ("NS", one.shape[1])}) if one == spec else one
                for one in manifest.graphs["model"].inputs
            )
        }
    )
    bound = manifest.model_copy(
        update={"graphs": {**manifest.graphs, "model": graph_io}, "profiles": {"decode": {"model": {name: shapes}}}}
    )
    assert decide(bound, 1 << 40) == 7


@pytest.mark.parametrize(
    ("asked", "blocks"), [({"num_blocks": 9}, 9), ({"kv_cache_memory": 10 * 73_728 + 5}, 10)], ids=str
)
def test_what_is_asked_for_is_taken_whatever_is_free(manifest: Manifest, asked: dict[str, int], blocks: int) -> None:
    assert manifest.cache.bytes_per_block == 73_728
    assert decide(manifest, 1, **asked) == blocks


def test_a_small_machine_serves_less_and_says_so(toy_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.open(toy_engine)
    files = sum(file.bytes for file in engine.manifest.files)
    size = engine.manifest.cache.bytes_per_block
    monkeypatch.setattr("seekforge.runtime.llm_options.free_memory", lambda: files + 8 * size)
    with LLM(engine, threads=1) as llm:
        assert (llm.num_blocks, llm.max_model_len) == (4, 192)
        with pytest.raises(RequestError, match=r"max_model_len 192; .* raise max_model_len"):
            llm.generate([5] * 190, SamplingParams(max_tokens=16))
        assert len(llm.generate([5] * 170, SamplingParams(max_tokens=16))[0].outputs[0].token_ids) <= 16
    with pytest.raises(EngineError, match=r"max_model_len 256 needs .* \(num_blocks or kv_cache_memory\)"):
        LLM(engine, threads=1, max_model_len=256)


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    assert cache_size._container_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert cache_size._container_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text(f"{8 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * MIB}\n")
    assert cache_size._container_memory(tmp_path) == 5 * MIB


def test_the_planner_and_the_manifest_agree_on_blocks(tiny_engines: dict[str, Path]) -> None:
    """The runtime reads the planner's numbers from the manifest; they must be the planner's."""
    engine = Engine.open(next(iter(tiny_engines.values())))
    manifest = engine.manifest
    config = ModelConfig.parse(manifest.config, "the engine's config")
    layers = [*manifest.cache.layers, *([] if manifest.cache.mtp_layer is None else [manifest.cache.mtp_layer])]
    for context, batch in ((1, 1), (64, 3), (1000, 2)):
        assert engine.cache_bytes(context, batch) == cache_bytes(
            config, manifest.cache.kv_format, context=context, batch=batch, layers=layers
        )


@pytest.mark.parametrize("name", ["num_blocks", "kv_cache_memory"])
def test_a_cache_that_no_memory_holds_is_refused_before_anything_is_made(manifest: Manifest, name: str) -> None:
    """What counts blocks would fill the memory long before the cache itself does."""
    for value in (10**30, 10**13):
        with pytest.raises(EngineError, match=rf"^{name} is .*, expected at most .*; lower {name}$"):
            decide(manifest, 1 << 30, **{name: value})
