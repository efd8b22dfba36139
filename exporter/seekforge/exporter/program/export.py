"""`export`: checkpoint folder in, canonical program folder out. Reads headers only, no weight bytes."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from seekforge.common.errors import ConfigError, ProgramError
from seekforge.common.files import atomic_folder, sha256_file
from seekforge.exporter.checkpoint.check_tokenizer import check_tokenizer
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.checkpoint.quantization_error import quantization_errors
from seekforge.exporter.checkpoint.schema import needless_tensors
from seekforge.exporter.checkpoint.text_files import read_text_file, text_files
from seekforge.exporter.models import family_of
from seekforge.exporter.models.sharding import check_parallelism, whole_vocabulary
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.weights import unused_tensors
from seekforge.exporter.program.graph_io import graph_io
from seekforge.exporter.program.inline import plain
from seekforge.exporter.program.layers import check_range, count_groups, outside, truncate
from seekforge.exporter.program.metadata import annotate
from seekforge.exporter.program.trace import OPSET, Traced, trace
from seekforge.exporter.sizing.stages import pipeline_stages
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.tokenizer_file import without_limits
from seekforge.formats.checkpoint.tools_preamble import preamble_difference
from seekforge.formats.numerics import Numerics
from seekforge.formats.parallelism import ONE_RANK, Parallelism
from seekforge.formats.program import PROGRAM_FORMAT, GraphIO, OpUse, Program, Role, role_of, save_program
from seekforge.formats.support import supported
from seekforge.formats.weight_recipes import Recipe, coverage
from seekforge.formats.weight_recipes.stored import BLOCK_FORMS, WORDS
from seekforge.plugins.functions.attach import attach
from seekforge.plugins.functions.specialization import CANONICAL, CANONICAL_KEPT
from seekforge.plugins.kernels.contracts import export_warnings
from seekforge.plugins.registry import SPECS


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, for the command line.

    `quantization_errors`: kind of weight -> what quantizing it to FP8 blocks changes (`quantization_errors`).
    `warnings`: a sentence for each thing of the checkpoint that was taken for granted or passed over, and for each
    operator whose kernels do not take the model's sizes.
    """

    program: Program
    num_nodes: dict[str, int]
    num_weight_inputs: dict[str, int]
    num_tensors: int
    num_outside: int
    warnings: tuple[str, ...]
    quantization_errors: Mapping[str, float]


def export(
    checkpoint_folder: Path,
    out: Path,
    *,
    numerics: Numerics,
    layer_range: tuple[int, int] | None = None,
    num_layers: int | None = None,
    parallelism: Parallelism = ONE_RANK,
    plain_f32: bool = False,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Exported:
    """Trace the model of a checkpoint and write its canonical program.

    Args:
        checkpoint_folder: a DeepSeek-V3.2 checkpoint; only config.json and shard headers are read.
        out: folder to make: model.onnx, mtp.onnx, program.json, bindings.json, tokenizer files.
        numerics: which roundings the program makes.
        layer_range: [a, b), layers of the main model; None takes all. The MTP module goes with the last one. A part of
            the layers is a stage by itself, whose `parallelism` has no others.
        num_layers: export the model's first `num_layers` layers as a whole model, without MTP; None: all.
        parallelism: how ranks share the model; the program is that of each of them.
        plain_f32: write `model.f32.onnx` (and of MTP) besides, which ONNX Runtime opens without seekforge. No engine
            is built from it.
        force: replace a program that stands at `out`.
        progress: told each stage.

    Raises:
        ConfigError, CheckpointError: the checkpoint is not what a model of its type needs.
        ProgramError: the traced graph misses a promise.
        OutputError: `out` cannot be written.
    """
    progress("read config and headers")
    with open_checkpoint(checkpoint_folder) as opened:
        whole, checkpoint, notes = opened.config, opened.checkpoint, opened.notes
        needless = needless_tensors(checkpoint.names)
        sizes = {name: math.prod(checkpoint.info(name).shape) for name in checkpoint.names if name not in needless}
        quantizes = whole.stored_form == "bf16" and numerics.quantizes_activations
        errors = quantization_errors(checkpoint, whole) if quantizes else {}
    config = whole if num_layers is None else truncate(whole, num_layers)
    if layer_range is not None and parallelism.pp > 1:
        raise ConfigError("--layers is one stage and --pp cuts the whole model into several; leave out one of them")
    layer_range = layer_range or (0, config.num_hidden_layers)
    check_range(layer_range, config)
    check_parallelism(config, parallelism)
    check_numerics(config, numerics)
    cut = pipeline_stages(config, parallelism) if parallelism.pp > 1 else (layer_range,)
    files = text_files(checkpoint_folder)
    notes = (*notes, *check_tokenizer(checkpoint_folder, config))
    more = (preamble_difference(checkpoint_folder), whole_vocabulary(config, parallelism))
    notes = (*notes, *(note for note in more if note is not None))
    settings = Settings(config, numerics, activations=CANONICAL.activations, parallelism=parallelism)
    canonical = CANONICAL_KEPT if settings.keeps_weights else CANONICAL
    graphs: dict[str, tuple[int, int] | None] = {"model": layer_range}
    if config.mtp_layer is not None and layer_range[1] == config.num_hidden_layers:
        graphs["mtp"] = None
    with atomic_folder(out, force=force, marker="program.json") as folder:
        traced = {
            name: trace(settings, layers, lambda stage, name=name: progress(f"{name}: {stage}"))
            for name, layers in graphs.items()
        }
        bindings = {name: graph.recipes for name, graph in traced.items()}
        progress("account for every checkpoint element")
        away = outside(sizes, config, layer_range=layer_range, has_mtp="mtp" in graphs)
        unused = unused_tensors(config) if "mtp" in graphs else {}
        unused = {name: reason for name, reason in unused.items() if name in sizes}
        shared = _account(bindings, sizes, unused, away)
        progress("attach function bodies, check, write")
        written, ops = {}, {}
        for name, graph in traced.items():
            attach(graph.model, canonical)
            annotate(
                graph.model,
                name,
                version=importlib.metadata.version("seekforge"),
                config=config,
                numerics=numerics.name,
                layer_range=layer_range,
                parallelism=parallelism,
            )
            written[name] = _write_graph(graph, folder, f"{name}.onnx")
            _count_ops(graph.model, ops)
            if plain_f32:
                _write_plain(graph.model, settings, folder / f"{name}.f32.onnx")
        for name in files:
            raw = read_text_file(checkpoint_folder, name)
            (folder / name).write_bytes(without_limits(raw) if name == "tokenizer.json" else raw)
        program = Program(
            format=PROGRAM_FORMAT,
            seekforge_version=importlib.metadata.version("seekforge"),
            opset=OPSET,
            layer_range=layer_range,
            pipeline_stages=cut,
            numerics=numerics.model_dump(),
            config=config.model_dump(mode="json"),
            truncated_from=None if config is whole else whole.num_hidden_layers,
            ops=ops,
            graphs=written,
            unused=unused | needless,
            outside=count_groups(away),
            parallelism=parallelism,
            shared=shared,
            files=tuple(files),
        )
        save_program(folder, program, bindings)
    return Exported(
        program=program,
        num_nodes={name: len(graph.model.graph.node) for name, graph in traced.items()},
        num_weight_inputs={name: len(graph.recipes) for name, graph in traced.items()},
        num_tensors=len(sizes),
        num_outside=len(away),
        quantization_errors=errors,
        warnings=(
            *notes,
            *export_warnings(
                config,
                ops=[op for op in SPECS if op in ops],
                parallelism=parallelism,
                kv_format=family_of(config).kv_formats[0],
            ),
        ),
    )


def check_numerics(config: ModelConfig, numerics: Numerics) -> None:
    """Refuse numerics that need FP8 blocks where the checkpoint holds values that are none.

    Raises:
        ConfigError: naming the numerics that go with the checkpoint.
    """
    if numerics.quantizes_activations and config.stored_form not in BLOCK_FORMS:
        kept = " or ".join(supported(config.model_type, config.stored_form)["cpu"].numerics)
        raise ConfigError(
            f"--numerics {numerics.name} multiplies FP8 blocks, and this checkpoint's weights are "
            f"{WORDS[config.stored_form]}, which would be rounded once more; pass --numerics {kept}"
        )


def _account(
    bindings: dict[str, dict[str, Recipe]], sizes: dict[str, int], unused: Container[str], away: Container[str]
) -> dict[str, list[str]]:
    """Check that every checkpoint element is read, deliberately unused, or outside; return what is shared.

    Raises:
        ProgramError: elements are left over, or an input reads a tensor that is not there.
    """
    read = coverage({f"{graph}:{name}": recipe for graph, named in bindings.items() for name, recipe in named.items()})
    unknown = sorted(set(read.used) - set(sizes))
    if unknown:
        raise ProgramError(f"bindings read {unknown[0]}, which the checkpoint does not have")
    for name, size in sizes.items():
        used = read.used.get(name, 0)
        if name in unused or name in away:
            if used:
                reason = "is declared unused" if name in unused else "is outside the layer range"
                raise ProgramError(f"bindings read {name}, which {reason}")
        elif used != size:
            raise ProgramError(f"bindings read {used} of {size} elements of {name}; every element must be used")
    return read.shared


def _write_plain(model: onnx.ModelProto, settings: Settings, path: Path) -> None:
    form = plain(model, settings.config, keeps_weights=settings.keeps_weights)
    onnx.checker.check_model(form, full_check=True)
    path.write_bytes(form.SerializeToString(deterministic=True))


def _write_graph(graph: Traced, folder: Path, file: str) -> GraphIO:
    model = graph.model
    onnx.checker.check_model(model, full_check=True)
    path = folder / file
    path.write_bytes(model.SerializeToString(deterministic=True))
    inputs = {value.name for value in model.graph.input}

    def role(name: str) -> Role:
        otherwise = "weight" if name in graph.recipes else "token" if name in inputs else "result"
        return role_of(name) or otherwise

    return graph_io(model, file, role_of=role, aliases=graph.aliases, sha256=sha256_file(path))


def _count_ops(model: onnx.ModelProto, ops: dict[str, OpUse]) -> None:
    """Add the custom nodes of `model` to `ops`."""
    for node in model.graph.node:
        spec = SPECS.get(node.op_type)
        if spec is None:
            continue
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name != "plugin_namespace"}
        values = {key: value.decode() if isinstance(value, bytes) else value for key, value in values.items()}
        before = ops.get(spec.name)
        if before is not None and before.attributes != values:
            raise ProgramError(f"{spec.name}: nodes differ in attributes {before.attributes} and {values}")
        count = 1 if before is None else before.num_nodes + 1
        ops[spec.name] = OpUse(version=spec.version, attributes=values, num_nodes=count)
