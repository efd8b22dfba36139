"""`seekforge parity`: compare an engine with PyTorch, with transformers, with another engine, or two dumps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from seekforge.common.cli.console import Stages, console
from seekforge.common.cli.options import (
    ByteSize,
    Number,
    command,
    contexts_option,
    json_option,
    list_option,
    seed_option,
    threads_option,
)
from seekforge.common.cli.terminal import echo, write_json
from seekforge.common.errors import OptionError
from seekforge.exporter.parity import api
from seekforge.exporter.parity.refusals import refuse_unused
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parity_steps import MODES


@command(
    "parity",
    examples=(
        "seekforge parity engine --checkpoint checkpoint",
        "seekforge parity engine --checkpoint checkpoint --contexts 16,2K --html report.html",
        "seekforge parity --from-dump here --from-dump there",
        "seekforge parity engine engine-int4 --checkpoint checkpoint --quality tasks.jsonl",
    ),
    function=api.parity,
)
@click.argument("engine", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FOLDER|REPO",
    help="The weights for the PyTorch side; a Hugging Face repository is downloaded.",
)
@click.option("--prompts", type=click.Path(path_type=Path), help="Text file, one prompt a line. Default: random ids.")
@contexts_option("Lengths of random prompts. Default: 16, and around index_topk.")
@list_option(
    "--modes",
    type=click.Choice(MODES),
    default=",".join(MODES),
    metavar="MODE,…",
    help="How prompts are cut into steps.",
)
@click.option(
    "--against", default="torch", show_default=True, metavar="torch|transformers|ENGINE2", help="The other side."
)
@click.option("--layers", help="Look at layers A-B only, from what the engine had at A.")
@click.option("--numerics", type=click.Choice(sorted(NUMERICS)), help="Of the PyTorch side. Default: the engine's.")
@click.option("--without", multiple=True, help="Switch a rounding off on the PyTorch side, such as kv_fp8.")
@click.option("--sensitivity", is_flag=True, help="Also tell what each layer's roundings cost alone.")
@click.option("--max-kl", type=Number(0), help="Fail above this mean KL, also where numerics differ.")
@click.option(
    "--max-dump-size",
    type=ByteSize(0),
    default="8G",
    show_default=True,
    help="Tap all layers only if that takes no more; else bisect.",
)
@click.option("--from-dump", type=click.Path(path_type=Path), multiple=True, help="Compare dumps; twice.")
@click.option("--save", type=click.Path(path_type=Path), help="Keep the dumps of both sides in this folder.")
@click.option("--force", is_flag=True, help="Replace what an earlier check wrote at --save.")
@click.option(
    "--write-self-check", is_flag=True, help="If it passes, store results in ENGINE to compare at each start."
)
@click.option(
    "--quality",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measure ENGINE, or several, on tasks (JSONL) beside the exact PyTorch model.",
)
@list_option(
    "--forms",
    type=click.Choice(api.FORM_NAMES),
    metavar="FORM,…",
    help=f"With --quality: PyTorch in these forms too: {', '.join(api.FORM_NAMES)}.",
)
@click.option("--html", type=click.Path(path_type=Path), help="Write the report as one HTML page.")
@click.option("--brief", is_flag=True, help="Print the cases and the verdict alone.")
@json_option
@threads_option
@seed_option("Of random prompts.", default=0)
@click.option("--quiet", is_flag=True, help="Print nothing: the exit code is the verdict.")
@click.pass_context
def parity(
    ctx: click.Context, engine: tuple[Path, ...], *, as_json: bool, brief: bool, quiet: bool, **options: Any
) -> None:
    """Prove that ENGINE computes what PyTorch computes, or find the first place where it does not.

    Exit code 0: passed, 1: a gate failed, 2: bad input. Every gate says why it is what it is.

    With --quality, show instead what engines and forms of PyTorch make of tasks, beside their bytes and speed.
    """
    _refuse_unused(ctx)
    result = api.parity(engine or None, progress=Stages(quiet=quiet or as_json), **options)
    if result.report is None:
        if not quiet:
            echo(f"wrote {result.dumps}: reference, noise and plan.json of the PyTorch side")
        return
    if as_json:
        write_json(result.to_json())
    elif quiet:
        pass
    elif options["quality"] is not None:
        from seekforge.exporter.parity.report.quality import print_quality

        print_quality(console(), result.report, brief=brief)
        if result.html is not None:
            echo(f"report: {result.html}")
    else:
        from seekforge.exporter.parity.report.terminal import print_terminal

        print_terminal(console(), result.report, brief=brief)
        stored = engine[0] if result.stored_self_check else None
        done = {"dumps": result.dumps, "report": result.html, "self-check, compared at each start": stored}
        for what, where in done.items():
            if where is not None:
                echo(f"{what}: {where}")
    if result.passed is False:
        sys.exit(1)


def _refuse_unused(ctx: click.Context) -> None:
    """Refuse options that would be taken and then do nothing, also such as have the value of their default.

    Raises:
        OptionError: names the first.
    """
    options = ctx.params
    passed = {name for name in options if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    refuse_unused(passed, options | {"engine": options["engine"] or None})
    if not options["engine"] and not options["from_dump"] and options["quality"] is None:
        for name, option in (("as_json", "--json"), ("brief", "--brief")):
            if name in passed:
                raise OptionError(f"{option} is about a comparison; without ENGINE there is none")
    if options["as_json"] and options["brief"]:
        raise OptionError("--brief shortens the tables; --json prints everything")
