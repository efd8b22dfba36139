"""`seekforge export`: checkpoint folder -> canonical ONNX program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import Whole, command, json_option, quiet_option
from seekforge.common.cli.terminal import echo, write_json
from seekforge.exporter.checkpoint.source import headers, parse_repo
from seekforge.exporter.checkpoint.text_files import check_files
from seekforge.exporter.program.layers import parse_layers
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.weight_recipes import Ranks

if TYPE_CHECKING:
    from seekforge.exporter.program.export import Exported


@command(
    "export",
    examples=(
        "seekforge export checkpoint program",
        "seekforge export deepseek-ai/DeepSeek-V3.2 program --numerics exact",
        "seekforge export checkpoint stage --layers 0-30",
    ),
)
@click.argument("checkpoint")
@click.option("--revision", default=None, help="Of a hub repository: branch, tag or commit.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--numerics",
    type=click.Choice(sorted(NUMERICS)),
    default="fp8",
    show_default=True,
    help="fp8: the official reference's roundings. exact: no quantisation of activations or caches.",
)
@click.option("--layers", default=None, metavar="A-B", help="A pipeline stage: layers A to B, both included.")
@click.option("--num-layers", type=Whole(1), metavar="N", help="A truncated model: the first N layers, norm and head.")
@click.option("--tp", type=Whole(1), default=1, show_default=True, help="Ranks that share each expert.")
@click.option("--ep", type=Whole(1), default=1, show_default=True, help="Groups of ranks that share out the experts.")
@click.option(
    "--plain-f32",
    is_flag=True,
    help="Write model.f32.onnx besides, in FP32 without custom operators: for ONNX Runtime alone, and for viewers.",
)
@click.option("--force", is_flag=True, help="Replace a program that stands at OUT.")
@quiet_option
@json_option
def export(
    checkpoint: str,
    out: Path,
    *,
    revision: str | None,
    numerics: str,
    layers: str | None,
    num_layers: int | None,
    tp: int,
    ep: int,
    plain_f32: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Trace the model of CHECKPOINT into a canonical ONNX program in the folder OUT.

    CHECKPOINT is a folder, or a Hugging Face repository: deepseek-ai/DeepSeek-V3.2, with @REVISION, or its address.

    Reads config.json and the headers of the shards, no weight: the full model exports on a laptop, from the hub too.

    With --tp and --ep the program is that of each of tp x ep ranks: attention, dense MLPs and shared experts are split
    among all of them, routed experts are dealt out to ep groups and split among the tp ranks of a group.
    """
    stages = Stages(quiet=quiet or as_json)
    repo = parse_repo(checkpoint, revision)
    with headers(checkpoint, revision=revision, say=stages) as folder:
        if folder.is_dir():  # what is odd in it is said before torch is imported, which takes seconds
            ModelConfig.load(folder)
            check_files(folder)
        from seekforge.exporter.program.export import export as write_program

        exported = write_program(
            folder,
            out,
            numerics=NUMERICS[numerics],
            layer_range=None if layers is None else parse_layers(layers),
            num_layers=num_layers,
            ranks=Ranks(tp, ep),
            plain_f32=plain_f32,
            force=force,
            progress=stages,
        )
    stages.done()
    for warning in exported.warnings:
        echo(f"warning: {warning}", err=True)
    if as_json:
        write_json(_summary(exported, out, stages.seconds))
    elif not quiet:
        for line in _sentences(exported, out, checkpoint if repo is None else str(repo)):
            echo(line)


def _summary(exported: Exported, out: Path, seconds: dict[str, float]) -> dict[str, object]:
    return {
        "path": str(out),
        "numerics": exported.program.numerics["name"],
        "num_nodes": exported.num_nodes,
        "num_weight_inputs": exported.num_weight_inputs,
        "tp": exported.program.tp,
        "ep": exported.program.ep,
        "layer_range": exported.program.layer_range,
        "num_tensors": exported.num_tensors,
        "num_outside": exported.num_outside,
        "warnings": exported.warnings,
        "ops": {name: use.num_nodes for name, use in exported.program.ops.items()},
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }


def _sentences(exported: Exported, out: Path, checkpoint: str) -> list[str]:
    nodes = " + ".join(str(count) for count in exported.num_nodes.values())
    inputs = " + ".join(str(count) for count in exported.num_weight_inputs.values())
    ops = sum(use.num_nodes for use in exported.program.ops.values())
    inside = exported.num_tensors - exported.num_outside
    away = f" of this part ({exported.num_outside:,} lie outside)" if exported.num_outside else ""
    count = exported.program.tp * exported.program.ep
    following = f"next: seekforge build {out} ENGINE --target cpu --checkpoint {checkpoint}"
    if count > 1:
        following = f"the program is that of each of {count} ranks; see what each loads: seekforge inspect {out}"
    return [
        f"wrote {out}: {' and '.join(f'{name}.onnx' for name in exported.num_nodes)}, {nodes} nodes ({ops} custom), "
        f"{inputs} weight inputs cover all {inside:,} tensors{away}",
        following,
    ]
