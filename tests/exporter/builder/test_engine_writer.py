"""What every engine carries along of its program, whatever backend made it."""

from __future__ import annotations

from pathlib import Path

import pytest

from seekforge.common.errors import ProgramError
from seekforge.common.files import sha256_file, write_json
from seekforge.exporter.builder.engine_writer import EngineParts, write_engine
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import Limits
from seekforge.formats.engine.verify import verify_files
from seekforge.formats.program import PROGRAM_FORMAT, GraphIO, Program, TensorSpec, load_bindings, save_program
from seekforge.formats.targets import load_target
from seekforge.formats.weight_recipes import Recipe

TAKEN = Recipe("take", (4, 8), "bf16", tensor="model.norm.weight")


def graph(config: ModelConfig, file: str, layers: range) -> GraphIO:
    caches = tuple(
        TensorSpec(name=f"{kind}_cache.{layer}", dtype="bf16", shape=("NS", width), role="cache")
        for layer in layers
        for kind, width in (("latent", config.latent_dim), ("index", config.index_head_dim))
    )
    return GraphIO(file=file, sha256="", inputs=caches, outputs=(), aliases={})


@pytest.fixture
def program(tiny_config: ModelConfig, tmp_path: Path) -> Program:
    """A program with two text files, in `program`."""
    folder = tmp_path / "program"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    write_json(folder / "generation_config.json", {"temperature": 0.25})
    made = Program(
        format=PROGRAM_FORMAT,
        seekforge_version="0",
        opset=23,
        layer_range=(0, 2),
        pipeline_stages=((0, 2),),
        numerics={},
        config=tiny_config.model_dump(mode="json"),
        ops={},
        graphs={"model": graph(tiny_config, "model.onnx", range(2))},
        unused={},
        shared={},
        files=("tokenizer.json", "generation_config.json", "tokenizer_config.json"),
    )
    save_program(folder, made, {})
    return made


@pytest.mark.parametrize("target", ["cpu", "rtx4090"])
def test_an_engine_of_every_backend_has_what_its_program_says(
    tiny_config: ModelConfig, program: Program, tmp_path: Path, target: str
) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "model.bin").write_bytes(b"compiled")
    limits = Limits(max_model_len=128, max_batch_size=2, max_num_batched_tokens=64)
    parts = EngineParts(
        target=load_target(target),
        limits=limits,
        kv_format="bf16",
        graphs=program.graphs,
        bindings={"model": {"norm.weight": TAKEN}},
        files=["model.bin"],
        versions={"compiler": "1"},
        options={"precision": "none"},
    )
    folder = tmp_path / "program"
    manifest = write_engine(engine, parts, program_folder=folder, program=program, config=tiny_config)
    verify_files(engine, manifest, full=True)
    assert [file.path for file in manifest.files] == [*program.files, "bindings.json", "target.yaml", "model.bin"]
    assert (engine / "tokenizer_config.json").read_text() == "{}"
    assert load_bindings(engine) == {"model": {"norm.weight": TAKEN}}
    assert load_target(str(engine / "target.yaml")).limits == manifest.limits == limits
    assert manifest.program_sha256 == sha256_file(folder / "program.json")
    assert manifest.generation["temperature"] == 0.25
    assert list(manifest.build) == ["python", "platform", "precision"]
    slot = 2 * (tiny_config.latent_dim + tiny_config.index_head_dim)
    assert manifest.cache.bytes_per_block == 64 * 2 * slot and manifest.cache.layers == (0, 1)
    assert manifest.cache.mtp_layer is None


def test_a_text_file_that_is_missing_is_named(tiny_config: ModelConfig, program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "program"
    (folder / "tokenizer.json").unlink()
    limits = Limits(max_model_len=128, max_batch_size=2, max_num_batched_tokens=64)
    parts = EngineParts(
        target=load_target("cpu"),
        limits=limits,
        kv_format="f32",
        graphs=program.graphs,
        bindings={},
        files=[],
        versions={},
        options={},
    )
    with pytest.raises(ProgramError, match=r"tokenizer\.json: missing; export the program again"):
        write_engine(tmp_path, parts, program_folder=folder, program=program, config=tiny_config)
