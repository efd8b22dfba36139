"""A GPU engine that does not belong here is refused with the field, what was found, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from samples import audit_of

from seekforge.plugins.errors import CheckpointError, EngineError
from seekforge.plugins.formats.loading import check_kernels, check_loadable, check_weights
from seekforge.plugins.formats.manifest import (
    Cache,
    Limits,
    Manifest,
    PluginUse,
    Target,
    WeightSource,
    digest_file,
    load_manifest,
    save_manifest,
    verify_files,
)

HERE = {"tensorrt-rtx": "1.7.1.116"}


@pytest.fixture
def engine(tmp_path: Path) -> Manifest:
    """A complete engine folder with one plugin whose kernels are there for sm89."""
    (tmp_path / "model.plan").write_bytes(b"plan" * 1000)
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    entry = {"op": "MoeRoute", "sm": 89, "digest": "abc123", "file": "route.json"}
    (kernels / "index.json").write_text(json.dumps({"format": 1, "kernels": [entry]}))
    (kernels / "route.json").write_text("{}")
    files = ("model.plan", "kernels/index.json", "kernels/route.json")
    manifest = Manifest(
        format=1,
        seekforge_version="0",
        target=Target(name="rtx4090", backend="tensorrt-rtx", sm=89, sms=(89,)),
        versions=HERE,
        runtime_versions=HERE,
        program_sha256="",
        numerics={},
        layer_range=(0, 1),
        graphs={},
        cache=Cache(
            block_size=64,
            layers=(0,),
            mtp_layer=None,
            kv_format="fp8_ds",
            latent_dim=1,
            index_dim=1,
            bytes_per_block=1,
        ),
        limits=Limits(max_model_len=1, max_batch_size=1, max_num_batched_tokens=1),
        vocab_size=1,
        num_top_logits=1,
        bos_token_id=0,
        eos_token_id=1,
        generation={},
        tokenizer="tokenizer.json",
        files=tuple(digest_file(tmp_path, name) for name in files),
        self_check=None,
        config={},
        build={},
        weights=WeightSource(path="/weights", index_digest="feed"),
        plugins={"MoeRoute": PluginUse(version=1, products="fp8", kernel_digest="abc123", num_layers=1)},
        audit=audit_of({"total": 2 << 30, "usable": 1 << 30}),
    )
    return save_manifest(tmp_path, manifest)


def changed(manifest: Manifest, **fields: object) -> Manifest:
    return manifest.model_copy(update=fields)


def test_a_whole_engine_loads(engine: Manifest, tmp_path: Path) -> None:
    assert load_manifest(tmp_path) == engine
    verify_files(tmp_path, engine, full=True)
    check_loadable(tmp_path, engine, sm=89, versions=HERE)
    check_weights(tmp_path, engine, "feed", tmp_path)


def test_an_edited_manifest(engine: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"max_batch_size": 1', '"max_batch_size": 2'))
    with pytest.raises(EngineError, match="the manifest was edited"):
        load_manifest(tmp_path)


def test_a_flipped_byte(engine: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(EngineError, match=r"model\.plan: digest"):
        verify_files(tmp_path, engine, full=True)


def test_a_truncated_plan(engine: Manifest, tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"plan" * 999)
    with pytest.raises(EngineError, match=r"model\.plan: 3996 bytes, the manifest says 4000"):
        verify_files(tmp_path, engine, full=False)


def test_another_gpu(engine: Manifest, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"target\.sm: this GPU is sm120, the engine is for sm89 \(rtx4090\)"):
        check_loadable(tmp_path, engine, sm=120, versions=HERE)


def test_another_library(engine: Manifest, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"found 1\.8\.0, expected 1\.7\.1\.116.*seekforge build PROGRAM"):
        check_loadable(tmp_path, engine, sm=89, versions={"tensorrt-rtx": "1.8.0"})


def test_another_operator_version(engine: Manifest, tmp_path: Path) -> None:
    plugins = {"MoeRoute": engine.plugins["MoeRoute"].model_copy(update={"version": 7})}
    with pytest.raises(EngineError, match=r"plugins\.MoeRoute\.version: this seekforge has 1, the engine 7"):
        check_loadable(tmp_path, changed(engine, plugins=plugins), sm=89, versions=HERE)


def test_another_kernel(engine: Manifest, tmp_path: Path) -> None:
    plugins = {"MoeRoute": engine.plugins["MoeRoute"].model_copy(update={"kernel_digest": "other"})}
    with pytest.raises(EngineError, match=r"kernel_digest.*digest other.*found sm89 abc123.*--checkpoint /weights"):
        check_loadable(tmp_path, changed(engine, plugins=plugins), sm=89, versions=HERE)


def test_a_missing_kernel(engine: Manifest, tmp_path: Path) -> None:
    (tmp_path / "kernels" / "route.json").unlink()
    with pytest.raises(EngineError, match=r"route\.json: missing"):
        check_loadable(tmp_path, engine, sm=89, versions=HERE)


def test_an_engine_without_kernels(engine: Manifest, tmp_path: Path) -> None:
    plugins = {"MoeRoute": engine.plugins["MoeRoute"].model_copy(update={"kernel_digest": ""})}
    with pytest.raises(EngineError, match="built without compiled kernels"):
        check_loadable(tmp_path, changed(engine, plugins=plugins), sm=89, versions=HERE)


def test_an_engine_without_kernels_is_refused_where_no_gpu_is(engine: Manifest, tmp_path: Path) -> None:
    check_kernels(tmp_path, engine)
    bare = {op: use.model_copy(update={"kernel_digest": ""}) for op, use in engine.plugins.items()}
    with pytest.raises(EngineError, match=r"kernel_digest: empty, it was built with --no-kernels.*seekforge build"):
        check_kernels(tmp_path, changed(engine, plugins=bare))


def test_an_oversize_engine(engine: Manifest, tmp_path: Path) -> None:
    assert engine.audit is not None
    audit = engine.audit.model_copy(update={"oversize": True})
    with pytest.raises(EngineError, match=r"needs 2\.0 GiB and rtx4090 has 1\.0 GiB"):
        check_loadable(tmp_path, changed(engine, audit=audit), sm=89, versions=HERE)


def test_weights_of_another_structure(engine: Manifest, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"digest beef, the engine .* was built for feed \(at /weights\)"):
        check_weights(tmp_path, engine, "beef", tmp_path)
