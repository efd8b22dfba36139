"""`seekforge dump`: run the steps of a parity check on an engine and write what it computes, for another machine."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import (
    command,
    contexts_option,
    json_option,
    list_option,
    quiet_option,
    seed_option,
    threads_option,
)
from seekforge.common.cli.terminal import echo, write_json
from seekforge.common.errors import ConfigError
from seekforge.common.files import atomic_folder
from seekforge.common.paths import real_path
from seekforge.common.reading import LISTING_BYTES, read_text
from seekforge.common.system import end_with_parent
from seekforge.formats.dump import Dump
from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.parity_steps import MODES, Mode, ParitySteps, make_plan
from seekforge.runtime.cli.options import check_checkpoint, checkpoint_option, open_engine
from seekforge.runtime.dump import model_size, write_dump

if TYPE_CHECKING:
    from seekforge.runtime.engine.engine_folder import Engine


@command(
    "dump",
    examples=(
        "seekforge dump engine dumped",
        "seekforge dump engine dumped --contexts 16,2K --modes whole,decode",
        "seekforge dump engine dumped --plan plan.json --checkpoint checkpoint",
    ),
)
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="The steps to run, as 'parity' writes them.")
@contexts_option("Lengths of random prompts, without --plan.", default="16,200")
@list_option(
    "--modes",
    type=click.Choice(MODES),
    default=",".join(MODES),
    metavar="MODE,…",
    help="How prompts are cut into steps.",
)
@seed_option("Of the random prompts.", default=0)
@list_option("--taps", type=click.STRING, help="Tap outputs to keep. Default: all that the engine gives.")
@click.option("--inputs", type=click.Path(path_type=Path), help="Dump with what goes into ENGINE, a part of a model.")
@checkpoint_option
@threads_option
@click.option("--name", help="What reports call this side. Default: the folder's name.")
@click.option("--force", is_flag=True, help="Replace a dump that stands at OUT.")
@quiet_option
@json_option
def dump(
    engine: Path,
    out: Path,
    *,
    plan_file: Path | None,
    contexts: tuple[int, ...],
    modes: tuple[Mode, ...],
    seed: int,
    taps: tuple[str, ...],
    inputs: Path | None,
    checkpoint: Path | None,
    threads: int | None,
    name: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run ENGINE and write logits, caches and taps into the folder OUT.

    OUT is compared with another side by 'seekforge parity --from-dump OUT --from-dump OTHER'. An engine built with
    --taps gives the inside of every layer too.
    """
    stages = Stages(quiet=quiet or as_json)
    # before the files of a large engine are compared
    planned = None if plan_file is None else _read(plan_file)
    taken = None if inputs is None else Dump.open(inputs)
    if planned is not None and taken is not None and taken.plan != planned:
        raise ConfigError(f"{inputs}: ran other steps than the plan has; leave out --plan to run the steps of --inputs")
    opened = open_engine(engine, stages, part=True)
    stages.stop()
    check_checkpoint(opened, checkpoint)
    kept = None if not taps else _known_taps(taps, opened)
    plan = planned if taken is None else taken.plan
    if plan is None:
        plan = _random_plan(opened.manifest, contexts, modes, seed)

    def say(case: str) -> None:
        if not quiet and not as_json:
            echo(f"  running {case}", err=True)

    # OUT is refused before the weights of a large engine are loaded
    with (
        atomic_folder(out, force=force, marker="dump.json") as folder,
        contextlib.closing(opened.open_backend(threads=threads, checkpoint=checkpoint)) as backend,
    ):
        if not hasattr(backend, "cache"):
            raise ConfigError(f"{engine}: backend {opened.manifest.target.backend} does not show its caches")
        write_dump(
            backend,  # pyright: ignore[reportArgumentType]  (checked above)
            opened.manifest,
            plan,
            folder,
            name=name or real_path(engine).name,
            taps=kept,
            inputs=taken,
            progress=say,
        )
    num_steps = sum(1 for _ in plan.steps())
    if as_json:
        write_json({"path": str(out), "num_steps": num_steps, "cases": [case.name for case in plan.cases]})
    elif not quiet:
        echo(f"wrote {out}: {num_steps} steps of {len(plan.cases)} cases")


def _read(path: Path) -> ParitySteps:
    try:
        return ParitySteps.model_validate_json(read_text(path, most=LISTING_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a RecordError is one
        raise ConfigError(f"{path}: {error}; let 'seekforge parity' write the plan") from None


def _known_taps(taps: tuple[str, ...], engine: Engine) -> set[str]:
    """Return the names, all of which the engine gives."""
    names = set(taps)
    output_names = {spec.name for graph_io in engine.manifest.graphs.values() for spec in graph_io.outputs}
    unknown = sorted(names - output_names)
    if unknown:
        raise ConfigError(
            f"--taps has {unknown[0]!r}, which {engine.folder} does not give; 'seekforge inspect' lists what it gives, "
            "and 'seekforge build --taps' makes an engine that gives more"
        )
    return names


def _random_plan(manifest: Manifest, contexts: tuple[int, ...], modes: tuple[Mode, ...], seed: int) -> ParitySteps:
    limit = manifest.limits.max_model_len
    if max(contexts) > limit:  # before so many steps are planned
        raise ConfigError(f"--contexts has {max(contexts)}, the engine accepts {limit} tokens")
    return make_plan(
        contexts=contexts,
        vocab_size=manifest.vocab_size,
        index_topk=model_size(manifest, "index_topk"),
        has_mtp="mtp" in manifest.graphs,
        modes=tuple(mode for mode in MODES if mode in modes),
        seed=seed,
    )


if __name__ == "__main__":
    end_with_parent()
    from seekforge.runtime.cli.main import main

    main(["dump", *sys.argv[1:]])
