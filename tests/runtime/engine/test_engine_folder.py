"""Engines that must not be run are refused, each with one line that says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from seekforge.common.errors import EngineError, EnvironmentFault
from seekforge.runtime.engine.engine_folder import Engine


def test_opens_and_knows_its_cache(toy_engine: Path) -> None:
    engine = Engine.open(toy_engine, verify=True)
    assert engine.cache_bytes(64) == 2 * engine.manifest.cache.bytes_per_block
    assert engine.cache_bytes(65, num_sequences=2) == 5 * engine.manifest.cache.bytes_per_block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=1), "engine format 1, this seekforge runs format 4"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.pop("vocab_size"), "vocab_size"),
        (lambda m: m["graphs"].pop("model"), "expected 'model'"),
        (lambda m: m["graphs"]["model"]["aliases"].pop("latent_cache_out.0"), "cache latent_cache.0 is not paired"),
        (lambda m: m["graphs"]["model"]["outputs"].pop(4), "without logits"),
        (lambda m: m.update(tokenizer="../secret"), "is '../secret', which lies outside the folder"),
        (
            lambda m: m["files"][0].update(path="../model.onnx"),
            "key 'files.0.path': is '../model.onnx', which lies outside the folder",
        ),
        (
            lambda m: m["runtime_versions"].update(onnxruntime="1.0.0"),
            "runtime_versions.onnxruntime: found 1.",
        ),
    ],
)
def test_an_edited_manifest_is_refused(edit_manifest, change, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Engine.open(edit_manifest(change))


def test_a_missing_library_names_its_command_if_it_is_one_of_ours(
    edit_manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seekforge.runtime.engine.engine_folder.installed_versions", lambda packages: {})
    folder = edit_manifest(lambda m: m["runtime_versions"].update({"onnxruntime": "3.1"}))
    with pytest.raises(EnvironmentFault, match=r"pip install 'onnxruntime==3\.1'"):
        Engine.open(folder)


def test_a_library_that_only_the_engine_knows_is_not_advised(edit_manifest) -> None:
    folder = edit_manifest(lambda m: m["runtime_versions"].update({"no-such-library": "3.1"}))
    with pytest.raises(EnvironmentFault, match=r"needs no-such-library 3\.1, which is not installed") as caught:
        Engine.open(folder)
    assert "pip" not in str(caught.value)


def test_a_face_other_than_the_manifests_is_refused_at_load(edit_manifest) -> None:
    folder = edit_manifest(lambda m: m["graphs"]["model"]["inputs"][0].update(dtype="i32"))
    with pytest.raises(EngineError, match=r"input input_ids is tensor\(int64\) in the graph and tensor\(int32\)"):
        Engine.open(folder).open_backend()


def test_no_engine_folder(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="expected a folder written by 'seekforge build'"):
        Engine.open(tmp_path)


def test_a_missing_file(toy_copy: Path) -> None:
    (toy_copy / "model.onnx.data").unlink()
    with pytest.raises(EngineError, match=r"model\.onnx\.data: missing"):
        Engine.open(toy_copy)


def test_a_truncated_file(toy_copy: Path) -> None:
    path = toy_copy / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineError, match="the manifest says"):
        Engine.open(toy_copy)


@pytest.mark.parametrize("verify", [False, True])
def test_a_flipped_bit_is_found(toy_copy: Path, verify: bool) -> None:
    path = toy_copy / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineError, match="changed or damaged"):
        Engine.open(toy_copy, verify=verify)
