"""`build --target cpu`: specialise to f32, fold or quantise the weights, inline the bodies, prove the result, write a
manifest."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx
from onnx import inliner

from seekforge.exporter.build.common import (
    check_program,
    check_same_model,
    copy_text_files,
    generation_defaults,
    read_graph,
)
from seekforge.exporter.build.fold import WeightFile, fold_weights, limit_tables
from seekforge.exporter.build.quantise import choose
from seekforge.exporter.build.self_check import make_self_check
from seekforge.exporter.build.targets import TargetConfig
from seekforge.exporter.checkpoint.validate import check_structure, scan_values
from seekforge.exporter.parity.taps import expose, name_taps
from seekforge.exporter.rewrite.specialise import specialise
from seekforge.plugins.errors import TargetError
from seekforge.plugins.formats.bindings import Recipe, retarget, tensors_of
from seekforge.plugins.formats.dtypes import FROM_ONNX, itemsize
from seekforge.plugins.formats.files import atomic_folder, sha256_file
from seekforge.plugins.formats.manifest import (
    ENGINE_FORMAT,
    MANIFEST,
    Cache,
    Limits,
    Manifest,
    Target,
    digest_file,
    save_manifest,
)
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.program import (
    BLOCK_SIZE,
    GraphIO,
    Program,
    Role,
    TensorSpec,
    load_bindings,
    load_program,
    save_bindings,
)
from seekforge.plugins.formats.quantised import Quantisation
from seekforge.plugins.formats.safetensors import Checkpoint
from seekforge.plugins.function import attach
from seekforge.plugins.specialisation import Specialisation

WEIGHTS = "weights.bin"
#: The tensors that scale with the context an engine accepts.
_ROPE_TABLES = ("rope_cos", "rope_sin")


class Progress(Protocol):
    """What `build` tells about its work; `exporter.progress.Stages` is one."""

    def __call__(self, stage: str) -> None: ...

    def bytes_bar(self, stage: str) -> AbstractContextManager[Callable[[int, int], None]]: ...


@dataclass(frozen=True)
class Built:
    """What `build` wrote."""

    manifest: Manifest
    num_nodes: dict[str, int]
    weight_bytes: int


def build(
    program_folder: Path,
    out: Path,
    *,
    target: TargetConfig,
    checkpoint_folder: Path,
    max_model_len: int | None,
    force: bool,
    progress: Progress,
    taps: bool = False,
) -> Built:
    """Build an engine folder.

    Args:
        program_folder: written by `export`.
        out: folder to make.
        target: what to build for.
        checkpoint_folder: the weights; must have the program's config.
        max_model_len: longest sequence that the engine accepts; None takes the target's, capped by the model's.
        force: replace an engine that stands at `out`.
        progress: told each stage.
        taps: the graphs also give the tensors inside each layer, for `parity`.

    Raises:
        ProgramError, CheckpointError: program or weights are damaged or do not belong together.
        TargetError: the target cannot do this, or is not built here.
        EngineError: the built engine does not compute what PyTorch computes.
        OutputError: `out` cannot be written.
    """
    if target.backend != "onnxruntime":
        raise TargetError(f"target {target.name} needs the {target.backend} backend, which this version does not build")
    progress("read program and checkpoint")
    program = load_program(program_folder)
    bindings = load_bindings(program_folder)
    check_program(program, bindings, program_folder)
    config = ModelConfig.parse(program.config, str(program_folder / "program.json"))
    found = ModelConfig.load(checkpoint_folder)
    check_same_model(program, config, found, checkpoint_folder)
    limits = _limits(target, config, max_model_len)
    how = Specialisation(activations="f32", fp8_storage="float8", kv_format="f32", bodies="ort")
    coded = None if target.precision == "f32" else choose(target.precision)
    with Checkpoint.open(checkpoint_folder) as checkpoint:
        check_structure(checkpoint, found)
        with atomic_folder(out, force=force, marker=MANIFEST) as folder:
            with progress.bytes_bar("scan weights (NaN, scales, copies)") as bar:
                scan_values(checkpoint, found, names=_read_tensors(program, bindings), progress=bar)
            progress("specialise and fold")
            weights = WeightFile(WEIGHTS)
            graphs = {
                name: _fold_graph(program_folder, face, bindings[name], config, how, coded, limits, weights, taps)
                for name, face in program.graphs.items()
            }
            with progress.bytes_bar("dequantise weights" if coded is None else f"{target.precision} weights") as bar:
                weights.write(folder, checkpoint, bar)
            progress("inline, check, write")
            faces = {name: _write_graph(model, folder, program.graphs[name]) for name, model in graphs.items()}
            files = [*copy_text_files(program, program_folder, folder), "bindings.json"]
            save_bindings(folder, dict(zip(graphs, weights.attached, strict=True)))
            self_check = None
            if program.gives_logits:
                progress("self-check against PyTorch")
                self_check = make_self_check(
                    folder, faces["model"], config, program.numerics, checkpoint, limits, coded
                )
            manifest = Manifest(
                format=ENGINE_FORMAT,
                seekforge_version=importlib.metadata.version("seekforge"),
                target=Target(name=target.name, backend=target.backend, sm=target.sm),
                versions={name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "torch", "numpy")},
                runtime_versions={},
                program_sha256=sha256_file(program_folder / "program.json"),
                numerics=program.numerics,
                layer_range=program.layer_range,
                graphs=faces,
                cache=_cache(config, faces),
                limits=limits,
                vocab_size=config.vocab_size,
                num_top_logits=config.num_top_logits,
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
                generation=generation_defaults(program_folder),
                tokenizer="tokenizer.json",
                files=tuple(digest_file(folder, name) for name in [*files, *(f.file for f in faces.values()), WEIGHTS]),
                self_check=self_check,
                config=program.config,
                build={
                    "python": platform.python_version(),
                    "platform": platform.platform(),
                    "activations": "f32",
                    "precision": target.precision,
                    "taps": taps,
                },
                quantisation=coded,
            )
            manifest = save_manifest(folder, manifest)
    return Built(manifest, {name: len(model.graph.node) for name, model in graphs.items()}, weights.num_bytes)


def _read_tensors(program: Program, bindings: dict[str, dict[str, Recipe]]) -> list[str] | None:
    """Return the checkpoint tensors of a part of a model, in the order of its inputs; None for a whole model."""
    if not program.outside:
        return None
    names = (
        name for recipes in bindings.values() for recipe in recipes.values() for name in sorted(tensors_of(recipe))
    )
    return list(dict.fromkeys([*names, *program.unused]))


def _limits(target: TargetConfig, config: ModelConfig, max_model_len: int | None) -> Limits:
    """Return the limits of the engine: the asked length, or the target's default capped by the model's."""
    if max_model_len is None:
        length = min(target.limits.max_model_len, config.max_position_embeddings)
    elif 0 < max_model_len <= config.max_position_embeddings:
        length = max_model_len
    else:
        raise TargetError(
            f"--max-model-len is {max_model_len}, expected 1 to {config.max_position_embeddings} "
            "(max_position_embeddings of the model)"
        )
    return target.limits.model_copy(update={"max_model_len": length})


def _fold_graph(
    program_folder: Path,
    face: GraphIO,
    recipes: dict[str, Recipe],
    config: ModelConfig,
    how: Specialisation,
    coded: Quantisation | None,
    limits: Limits,
    weights: WeightFile,
    taps: bool,
) -> onnx.ModelProto:
    """Load, check, specialise and fold one graph; bodies are inlined, so that it holds operators of ONNX and
    ONNX Runtime only."""
    model = specialise(read_graph(program_folder, face), how, config)
    names = name_taps(model)
    if taps:
        expose(model, names)
    retargeted = {
        name: retarget(recipe, activations=how.activations, fp8_dtype=how.fp8_dtype) for name, recipe in recipes.items()
    }
    tables = limit_tables(retargeted, _ROPE_TABLES, limits.max_model_len)
    constants = fold_weights(model, tables, coded, top_k=config.num_experts_per_tok)
    weights.attach(model, constants)
    attach(model, how)
    inlined = inliner.inline_local_functions(model)
    # model-local functions are gone, and with them the domain
    keep = [entry for entry in inlined.opset_import if entry.domain in _domains(inlined.graph)]
    del inlined.opset_import[:]
    inlined.opset_import.extend(keep)
    return inlined


def _domains(graph: onnx.GraphProto) -> set[str]:
    """Domains of all nodes, bodies of Scan and If included, and the standard one."""
    domains = {""}
    for node in graph.node:
        domains.add("" if node.domain == "ai.onnx" else node.domain)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                domains |= _domains(attribute.g)
    return domains


def _write_graph(model: onnx.ModelProto, folder: Path, canonical: GraphIO) -> GraphIO:
    """Write one engine graph beside its weights, check it as a file, and describe its face."""
    path = folder / canonical.file
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))
    roles: dict[str, Role] = {spec.name: spec.role for spec in (*canonical.inputs, *canonical.outputs)}

    def describe(value: onnx.ValueInfoProto) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        return TensorSpec(
            name=value.name, dtype=FROM_ONNX[tensor.elem_type], shape=shape, role=roles.get(value.name, "tap")
        )

    return GraphIO(
        file=canonical.file,
        sha256=sha256_file(path),
        inputs=tuple(describe(value) for value in model.graph.input),
        outputs=tuple(describe(value) for value in model.graph.output),
        aliases=canonical.aliases,
    )


def _cache(config: ModelConfig, faces: dict[str, GraphIO]) -> Cache:
    caches = [spec for face in faces.values() for spec in face.with_role("cache")]
    per_slot = sum(itemsize(spec.dtype) * int(spec.shape[1]) for spec in caches)
    layers = [int(spec.name.partition(".")[2]) for spec in faces["model"].with_role("cache")]
    return Cache(
        block_size=BLOCK_SIZE,
        layers=tuple(dict.fromkeys(layers)),
        mtp_layer=config.mtp_layer if "mtp" in faces else None,
        kv_format="f32",
        latent_dim=config.latent_dim,
        index_dim=config.index_head_dim,
        bytes_per_block=per_slot * BLOCK_SIZE,
    )
