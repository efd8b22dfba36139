"""`seekforge build`: canonical program -> engine for one target."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from seekforge.exporter.build.engine import Built
from seekforge.exporter.build.engine import build as write_engine
from seekforge.exporter.build.targets import load_target
from seekforge.exporter.progress import Stages


@click.command("build")
@click.argument("program", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="A name of configs/targets, such as cpu.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="The checkpoint that the program was exported from: its weights go into the engine.",
)
@click.option("--max-model-len", type=int, default=None, help="Longest sequence, prompt and answer together.")
@click.option("--taps", is_flag=True, help="Let the engine show the tensors inside each layer, for 'parity'.")
@click.option("--force", is_flag=True, help="Replace an engine that stands at OUT.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def build(
    program: Path,
    out: Path,
    *,
    target: str,
    checkpoint: Path,
    max_model_len: int | None,
    taps: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build an engine for one target from the program folder PROGRAM into the folder OUT.

    The engine is compared with the PyTorch model before it is written; the results are stored in it, and a
    runtime repeats the comparison when it loads.
    """
    stages = Stages(quiet=quiet or as_json)
    built = write_engine(
        program,
        out,
        target=load_target(target),
        checkpoint_folder=checkpoint,
        max_model_len=max_model_len,
        force=force,
        progress=stages,
        taps=taps,
    )
    stages.done()
    if as_json:
        sys.stdout.write(json.dumps(_summary(built, out, stages.seconds)) + "\n")
    elif not quiet:
        sys.stdout.write(_sentence(built, out))


def _summary(built: Built, out: Path, seconds: dict[str, float]) -> dict[str, object]:
    check = built.manifest.self_check
    return {
        "path": str(out),
        "target": built.manifest.target.name,
        "numerics": built.manifest.numerics["name"],
        "num_nodes": built.num_nodes,
        "weight_bytes": built.weight_bytes,
        "max_model_len": built.manifest.limits.max_model_len,
        "self_check": None if check is None else {"tolerance": check.tolerance, "reason": check.reason},
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }


def _sentence(built: Built, out: Path) -> str:
    check = built.manifest.self_check
    nodes = " + ".join(str(count) for count in built.num_nodes.values())
    proof = "a part of a model: no self-check, and 'seekforge run' needs a whole one\n"
    if check is not None:
        proof = (
            f"self-check: {len(check.prompt_ids)} tokens, {len(check.rows)} rows equal to PyTorch within "
            f"{check.tolerance:.2g} logits\n"
            f'next: seekforge run {out} --prompt "Hello" --max-tokens 64 --greedy\n'
        )
    return (
        f"wrote {out}: target {built.manifest.target.name}, {nodes} nodes, "
        f"{built.weight_bytes / 1e6:.1f} MB of f32 weights\n{proof}"
    )
