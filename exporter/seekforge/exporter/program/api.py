"""`seekforge.export`: checkpoint -> canonical ONNX program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from seekforge.exporter.calls import AnyPath, Count, Flag, Progress, Source, public, stages_of
from seekforge.exporter.checkpoint.source import headers
from seekforge.exporter.checkpoint.text_files import check_files
from seekforge.exporter.program.layers import parse_layers
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parallelism import Parallelism


@dataclass(frozen=True)
class ExportResult:
    """A program that was written.

    Attributes:
        path: its folder.
        numerics: "fp8", "bf16" or "exact".
        num_nodes, num_weight_inputs: how many each graph has, "model" and perhaps "mtp".
        parallelism: how ranks share the model.
        layer_range: [first, end) of the layers that it has.
        pipeline_stages: the same of each stage.
        num_tensors: how many the checkpoint has. num_outside: how many of them belong to other layers.
        warnings: a sentence for each thing of the checkpoint that was taken for granted or passed over.
        ops: nodes of each custom operator.
        seconds: how long each stage of the work took.
        quantization_errors: kind of weight -> relative root mean square of what changes as BF16 weights become FP8
            blocks, on a sample; empty where nothing is quantized or no value is there.
    """

    path: Path
    numerics: str
    num_nodes: Mapping[str, int]
    num_weight_inputs: Mapping[str, int]
    parallelism: Parallelism
    layer_range: tuple[int, int]
    pipeline_stages: tuple[tuple[int, int], ...]
    num_tensors: int
    num_outside: int
    warnings: tuple[str, ...]
    ops: Mapping[str, int]
    seconds: Mapping[str, float]
    quantization_errors: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what `seekforge export --json` prints."""
        return asdict(self) | {"path": str(self.path)}


@public
def export(
    checkpoint: Source,
    out: AnyPath,
    *,
    revision: str | None = None,
    numerics: Literal["bf16", "exact", "fp8"] = "fp8",
    layers: str | None = None,
    num_layers: Count | None = None,
    tp: Count = 1,
    pp: Count = 1,
    ep: Flag = False,
    plain_f32: Flag = False,
    force: Flag = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Trace the model of a checkpoint into a canonical ONNX program.

    Reads config.json and the headers of the shards, no weight.

    Args:
        checkpoint: a folder, or a Hugging Face repository: `owner/name`, with `@revision`, or its address.
        out: the folder to make.
        revision: branch, tag or commit of a repository.
        numerics: fp8: the official reference's roundings. exact: no quantization of activations or caches. bf16:
            the same with BF16 activations where the target has them. BF16 weights become FP8 with fp8, and are kept
            with the others.
        layers: some layers, as a program of their own: "0-30", both included.
        num_layers: a truncated model: the first `num_layers` layers, norm and head.
        tp: tensor-parallel ranks.
        pp: pipeline stages, which one program has together.
        ep: expert parallelism: experts dealt out whole among those ranks.
        plain_f32: write model.f32.onnx besides, in FP32 without custom operators.
        force: replace a program that stands at `out`.
        progress: told each stage.

    Raises:
        OptionError: an argument is none that it takes.
        ConfigError, CheckpointError: the checkpoint is not what a model of its type needs.
        ProgramError: the traced graph misses a promise.
        OutputError: `out` cannot be written.
        EnvironmentFault: a library is not installed.
    """
    folder_out, stages = Path(out), stages_of(progress)
    with headers(checkpoint, revision=revision, say=stages) as folder:
        ModelConfig.load(folder)  # what is odd in it is said before torch is imported, which takes seconds
        check_files(folder)
        from seekforge.exporter.program.export import export as write_program

        exported = write_program(
            folder,
            folder_out,
            numerics=NUMERICS[numerics],
            layer_range=None if layers is None else parse_layers(layers),
            num_layers=num_layers,
            parallelism=Parallelism(tp=tp, pp=pp, ep=ep),
            plain_f32=plain_f32,
            force=force,
            progress=stages,
        )
    stages.done()
    program = exported.program
    return ExportResult(
        path=folder_out,
        numerics=str(program.numerics["name"]),
        num_nodes=exported.num_nodes,
        num_weight_inputs=exported.num_weight_inputs,
        parallelism=program.parallelism,
        layer_range=program.layer_range,
        pipeline_stages=program.pipeline_stages,
        num_tensors=exported.num_tensors,
        num_outside=exported.num_outside,
        warnings=exported.warnings,
        ops={name: use.num_nodes for name, use in program.ops.items()},
        quantization_errors=exported.quantization_errors,
        seconds={stage: round(value, 3) for stage, value in stages.seconds.items()},
    )
