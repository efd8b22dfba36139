"""`seekforge parity`: compare an engine with PyTorch, with transformers, with another engine, or two dumps."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import torch
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
from seekforge.common.files import atomic_folder
from seekforge.common.temporary import temporary_folder
from seekforge.exporter.checkpoint.source import resolve
from seekforge.exporter.parity.inputs import Asked
from seekforge.exporter.parity.report.page import render
from seekforge.exporter.parity.report.terminal import print_terminal
from seekforge.exporter.parity.report.to_json import to_json
from seekforge.exporter.parity.sources import from_dumps, from_engine, reference_only
from seekforge.exporter.parity.write_self_check import write_self_check as store_self_check
from seekforge.formats.dump import Dump
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parity_steps import MODES

#: Options that a way of comparing has no use for, by name of their parameter. A flag that is taken is a promise.
_ENGINE_ALONE = ("against", "layers", "sensitivity", "max_dump_size", "write_self_check")
_TORCH_ALONE = ("layers", "sensitivity", "numerics", "without", "max_dump_size")
_STEPS = ("prompts", "contexts", "modes", "seed")


@command(
    "parity",
    examples=(
        "seekforge parity engine --checkpoint checkpoint",
        "seekforge parity engine --checkpoint checkpoint --contexts 16,2K --html report.html",
        "seekforge parity --from-dump here --from-dump there",
    ),
)
@click.argument("engine", type=click.Path(path_type=Path), required=False)
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
@click.option("--from-dump", "dumps", type=click.Path(path_type=Path), multiple=True, help="Compare dumps; twice.")
@click.option("--save", type=click.Path(path_type=Path), help="Keep the dumps of both sides in this folder.")
@click.option("--force", is_flag=True, help="Replace what an earlier check wrote at --save.")
@click.option(
    "--write-self-check", is_flag=True, help="If it passes, store results in ENGINE to compare at each start."
)
@click.option("--html", type=click.Path(path_type=Path), help="Write the report as one HTML page.")
@click.option("--brief", is_flag=True, help="Print the cases and the verdict alone.")
@json_option
@threads_option
@seed_option("Of random prompts.", default=0)
@click.option("--quiet", is_flag=True, help="Print nothing: the exit code is the verdict.")
@click.pass_context
def parity(
    ctx: click.Context,
    engine: Path | None,
    dumps: tuple[Path, ...],
    save: Path | None,
    force: bool,
    write_self_check: bool,
    html: Path | None,
    as_json: bool,
    brief: bool,
    quiet: bool,
    threads: int | None,
    **options: object,
) -> None:
    """Prove that ENGINE computes what PyTorch computes, or find the first place where it does not.

    Exit code 0: passed, 1: a gate failed, 2: bad input. Every gate says why it is what it is.
    """
    _refuse_unused(ctx)
    if options["checkpoint"] is not None:
        options["checkpoint"] = resolve(str(options["checkpoint"]), quiet=quiet or as_json)
    asked = Asked(engine=engine, threads=threads, write_self_check=write_self_check, **options)  # pyright: ignore
    stages = Stages(quiet=quiet or as_json)
    if threads:
        torch.set_num_threads(threads)
    stored = False
    with _workspace(save, force) as work:
        if dumps:
            result = from_dumps(dumps, asked, work, stages)
        elif engine is None:
            reference_only(asked, save, work, stages)
            stages.done()
            if not quiet:
                echo(f"wrote {save}: reference, noise and plan.json of the PyTorch side")
            return
        else:
            result = from_engine(engine, asked, work, stages)
            stored = write_self_check and result.passed
            if stored:
                stages("write self-check")
                sides = Dump.open(work / "judged"), Dump.open(work / "reference")
                store_self_check(engine, *sides, f"{asked.against}, by parity")
    stages.done()
    report = to_json(result)
    done = {"dumps": save, "report": html, "self-check, compared at each start": engine if stored else None}
    if html is not None:
        html.write_text(render(report), encoding="utf-8")
    if as_json:
        write_json(report)
    elif not quiet:
        print_terminal(console(), report, brief=brief)
        for what, where in done.items():
            if where is not None:
                echo(f"{what}: {where}")
    if not result.passed:
        sys.exit(1)


@contextlib.contextmanager
def _workspace(save: Path | None, force: bool) -> Iterator[Path]:
    """The folder that dumps go to: kept at `save`, else temporary."""
    if save is not None:
        with atomic_folder(save, force=force, marker="plan.json") as folder:
            yield folder
        return
    with temporary_folder("seekforge-parity") as folder:
        yield folder


def _refuse_unused(ctx: click.Context) -> None:
    """Refuse options that would be taken and then do nothing.

    Raises:
        UsageError: names the first.
    """
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    options = ctx.params

    def refuse(names: Iterable[str], why: str) -> None:
        for name in names:
            if name in given:
                option = next(parameter.opts[0] for parameter in ctx.command.params if parameter.name == name)
                raise click.UsageError(f"{option} {why}")

    if options["dumps"]:
        if options["engine"] is not None:
            raise click.UsageError("--from-dump takes one or two dumps and no ENGINE")
        refuse(_ENGINE_ALONE, "needs an ENGINE to run; dumps show what they show")
        refuse(_STEPS, "says what to run; a dump has run its own steps")
        if options["checkpoint"] is None:
            refuse(("numerics", "without"), "says how PyTorch computes, which needs --checkpoint")
    elif options["engine"] is None:
        refuse(_ENGINE_ALONE, "needs an ENGINE")
        refuse(("html", "as_json", "brief", "max_kl"), "is about a comparison; without ENGINE there is none")
    elif options["against"] != "torch":
        refuse(_TORCH_ALONE, "needs --against torch")
        if options["against"] != "transformers":
            refuse(("write_self_check",), "needs --against torch or transformers")
    if options["save"] is None:
        refuse(("force",), "replaces what stands at --save; give that too")
    if options["as_json"]:
        refuse(("brief",), "shortens the tables; --json prints everything")
