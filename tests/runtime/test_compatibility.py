"""A GPU engine that does not belong here is refused with the field, what was found, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.samples import audit_of

from seekforge.common.errors import CheckpointError, EngineError
from seekforge.formats.engine.manifest import (
    ENGINE_FORMAT,
    Cache,
    Limits,
    Manifest,
    PluginUse,
    Target,
    WeightSource,
    digest_file,
    load_manifest,
    rebuild_command,
    save_manifest,
)
from seekforge.formats.engine.verify import verify_files
from seekforge.runtime.compatibility import check_complete, check_loadable, check_weights

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
        format=ENGINE_FORMAT,
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
        vocab_size=2,
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
        audit=audit_of(
            dict.fromkeys(("weights", "scratch", "activations", "reserve"), 0) | {"total": 2 << 30, "usable": 1 << 30}
        ),
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


@pytest.mark.parametrize("build", [{"compiler": None}, {"compiler": 3}, {"layers_per_engine": {}}])
def test_an_edited_manifest_that_says_nonsense(engine: Manifest, tmp_path: Path, build: dict[str, object]) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"build": build}))
    with pytest.raises(EngineError, match=r"the manifest was edited.*seekforge build PROGRAM"):
        load_manifest(tmp_path)


def test_a_flipped_byte(engine: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(EngineError, match=r"model\.plan: bytes 0 to 3,999 are not what was built"):
        verify_files(tmp_path, engine, full=False)


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
    with pytest.raises(EngineError, match="built with --no-kernels"):
        check_loadable(tmp_path, changed(engine, plugins=plugins), sm=89, versions=HERE)


def test_an_engine_without_kernels_is_refused_where_no_gpu_is(engine: Manifest, tmp_path: Path) -> None:
    check_complete(tmp_path, engine)
    bare = {op: use.model_copy(update={"kernel_digest": ""}) for op, use in engine.plugins.items()}
    with pytest.raises(EngineError, match=r"kernel_digest: empty, it was built with --no-kernels.*seekforge build"):
        check_complete(tmp_path, changed(engine, plugins=bare))


def test_an_oversize_engine(engine: Manifest, tmp_path: Path) -> None:
    assert engine.audit is not None
    audit = engine.audit.model_copy(update={"oversize": True})
    with pytest.raises(EngineError, match=r"needs 2\.0 GiB and rtx4090 has 1\.0 GiB"):
        check_loadable(tmp_path, changed(engine, audit=audit), sm=89, versions=HERE)
    with pytest.raises(EngineError, match=r"audit\.oversize is true"):
        check_complete(tmp_path, changed(engine, audit=audit))


def test_the_command_that_builds_it_again_has_its_options(engine: Manifest, tmp_path: Path) -> None:
    assert rebuild_command(tmp_path, engine) == (
        f"seekforge build PROGRAM {tmp_path} --target rtx4090 --max-model-len 1 --max-batch-size 1 "
        "--max-num-batched-tokens 1 --checkpoint /weights --force"
    )
    (tmp_path / "target.yaml").write_text("name: mine\n")
    build = {
        "plugins": "all",
        "layers_per_engine": 2,
        "compiler": {"workspace_bytes": "1000", "optimization_level": "3"},
        "taps": True,
    }
    files = (*engine.files, digest_file(tmp_path, "target.yaml"))
    mine = changed(engine, build=build, files=files)
    assert rebuild_command(tmp_path, mine) == (
        f"seekforge build PROGRAM {tmp_path} --target {tmp_path}/target.yaml --checkpoint /weights --plugins all "
        "--layers-per-engine 2 --workspace 1000 --builder-optimization-level 3 --taps --force"
    )
    assert "--checkpoint CHECKPOINT --plugins" in rebuild_command(tmp_path, changed(mine, weights=None))
    assert "--target TARGET --max-model-len 1" in rebuild_command(tmp_path, mine, target="TARGET")


@pytest.mark.parametrize("damage", ["edited", "flipped", "truncated", "missing", "gpu", "library"])
def test_every_refusal_names_the_command(engine: Manifest, tmp_path: Path, damage: str) -> None:
    plan, cubin, path = (tmp_path / name for name in ("model.plan", "kernels/route.json", "manifest.json"))
    match damage:
        case "edited":
            path.write_text(path.read_text().replace('"bos_token_id": 0', '"bos_token_id": 7'))
        case "flipped":
            plan.write_bytes(plan.read_bytes()[:-1] + b"?")
        case "truncated":
            plan.write_bytes(plan.read_bytes()[:-1])
        case "missing":
            cubin.unlink()
    with pytest.raises(EngineError, match=rf"seekforge build PROGRAM {tmp_path} --target (rtx4090|TARGET) .*--force$"):
        manifest = load_manifest(tmp_path)
        verify_files(tmp_path, manifest, full=False)
        versions = {"tensorrt-rtx": "1.0"} if damage == "library" else HERE
        check_loadable(tmp_path, manifest, sm=120 if damage == "gpu" else 89, versions=versions)


def test_weights_for_an_engine_that_was_built_without(engine: Manifest, tmp_path: Path) -> None:
    """No digest is known then: the configurations decide, but for how many layers there are."""
    config = {"hidden_size": 8, "num_hidden_layers": 2}
    unbound = changed(engine, weights=WeightSource(path=None, index_digest=None), config=config)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 61}))
    check_weights(tmp_path, unbound, "beef", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 9}))
    with pytest.raises(CheckpointError, match=r"config\.json: hidden_size is 9, the engine .* was built for 8"):
        check_weights(tmp_path, unbound, "beef", tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: is no JSON object"):
        check_weights(tmp_path, unbound, "beef", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        check_weights(tmp_path, unbound, "beef", tmp_path)


def test_weights_of_another_structure(engine: Manifest, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"digest beef, the engine .* was built for feed \(at /weights\)"):
        check_weights(tmp_path, engine, "beef", tmp_path)
