"""`seekforge export`: checkpoint folder -> canonical ONNX program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import Whole, command, json_option, quiet_option
from seekforge.common.cli.terminal import echo, typed, typed_command, write_json
from seekforge.exporter.checkpoint.source import parse_repo
from seekforge.exporter.program import api
from seekforge.exporter.program.api import ExportResult
from seekforge.formats.numerics import NUMERICS


@command(
    "export",
    examples=(
        "seekforge export checkpoint program",
        "seekforge export deepseek-ai/DeepSeek-V3.2 program --numerics exact",
        "seekforge export checkpoint program --tp 8 --pp 2 --ep",
    ),
    function=api.export,
)
@click.argument("checkpoint")
@click.option("--revision", default=None, help="Of a hub repository: branch, tag or commit.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--numerics",
    type=click.Choice(sorted(NUMERICS)),
    default="fp8",
    show_default=True,
    help="fp8: the official reference's roundings. exact: no quantization of activations or caches. bf16: the same "
    "with BF16 activations where the target has them. BF16 weights become FP8 with fp8, and are kept with the others.",
)
@click.option("--layers", default=None, metavar="A-B", help="Layers A to B alone, both included.")
@click.option("--num-layers", type=Whole(1), metavar="N", help="A truncated model: the first N layers, norm and head.")
@click.option("--tp", type=Whole(1), default=1, show_default=True, help="Tensor-parallel ranks.")
@click.option("--pp", type=Whole(1), default=1, show_default=True, help="Pipeline stages of so many ranks each.")
@click.option("--ep", is_flag=True, help="Expert parallelism: experts dealt out whole among the tensor-parallel ranks.")
@click.option(
    "--plain-f32",
    is_flag=True,
    help="Write model.f32.onnx besides, in FP32 without custom operators: for ONNX Runtime alone, and for viewers.",
)
@click.option("--force", is_flag=True, help="Replace a program that stands at OUT.")
@quiet_option
@json_option
def export(checkpoint: str, out: Path, *, quiet: bool, as_json: bool, **options: Any) -> None:
    """Trace the model of CHECKPOINT into a canonical ONNX program in the folder OUT.

    CHECKPOINT is a folder, or a Hugging Face repository: deepseek-ai/DeepSeek-V3.2, with @REVISION, or its address.

    Reads config.json and the headers of the shards, no weight: the full model exports on a laptop, from the hub too.

    With --tp the program is that of each of so many ranks, which divide heads, dense MLPs and experts; with --ep each
    routed expert is whole on one of them. With --pp the layers are divided among stages of such ranks. The words are
    vLLM's; 'seekforge plan' proposes layouts.
    """
    result = api.export(checkpoint, out, progress=Stages(quiet=quiet or as_json), **options)
    for warning in result.warnings:
        echo(f"warning: {warning}", err=True)
    if as_json:
        write_json(result.to_json())
    elif not quiet:
        repo = parse_repo(checkpoint, options["revision"])
        for line in _sentences(result, checkpoint if repo is None else str(repo)):
            echo(line)


def error_sentences(errors: Mapping[str, float]) -> list[str]:
    """Say what quantizing changes, by kind of weight; nothing where nothing is quantized."""
    if not errors:
        return []
    kinds = ", ".join(f"{kind} {error:.2%}" for kind, error in errors.items())
    return [f"BF16 weights become FP8 blocks as they are read; relative error, on a sample of each kind: {kinds}"]


def _sentences(result: ExportResult, checkpoint: str) -> list[str]:
    graphs = " and ".join(f"{name}.onnx" for name in result.num_nodes)
    nodes = " + ".join(str(count) for count in result.num_nodes.values())
    inputs = " + ".join(str(count) for count in result.num_weight_inputs.values())
    inside = result.num_tensors - result.num_outside
    away = f" of this part ({result.num_outside:,} lie outside)" if result.num_outside else ""
    count, out = result.parallelism.num_ranks, result.path
    building = typed_command("build", out, "ENGINE", "--target", "cpu", "--checkpoint", typed(checkpoint))
    following = f"next: {building}"
    if count > 1:
        looking = typed_command("inspect", out)
        following = f"the program is that of each of {count} ranks; see what each loads: {looking}"
    return [
        f"wrote {out}: {graphs}, {nodes} nodes ({sum(result.ops.values())} custom), "
        f"{inputs} weight inputs cover all {inside:,} tensors{away}",
        *error_sentences(result.quantization_errors),
        following,
    ]
