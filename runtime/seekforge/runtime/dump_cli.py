"""`seekforge dump`: run the steps of a parity check on an engine and write what it computes, for another machine."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from seekforge.plugins.errors import ConfigError
from seekforge.plugins.formats.dump import Dump
from seekforge.plugins.formats.files import atomic_folder
from seekforge.plugins.formats.manifest import Manifest
from seekforge.plugins.formats.plan import MODES, Plan, make_plan, parse_contexts, parse_modes
from seekforge.plugins.formats.reading import LISTING_BYTES, read_text
from seekforge.runtime.dump import write_dump
from seekforge.runtime.engine import Engine
from seekforge.runtime.options import check_checkpoint, checkpoint_option


@click.command("dump")
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="The steps to run, as 'parity' writes them.")
@click.option("--contexts", default="16,200", show_default=True, help="Lengths of random prompts, without --plan.")
@click.option("--modes", default=",".join(MODES), show_default=True, help="How prompts are cut into steps.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random prompts.")
@click.option("--taps", help="Tap outputs to keep, separated by commas. Default: all that the engine gives.")
@click.option("--given", type=click.Path(path_type=Path), help="Dump with what goes into ENGINE, a part of a model.")
@checkpoint_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: the cores this process may use.")
@click.option("--name", help="What reports call this side. Default: the folder's name.")
@click.option("--force", is_flag=True, help="Replace a dump that stands at OUT.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
def dump(
    engine: Path,
    out: Path,
    *,
    plan_file: Path | None,
    contexts: str,
    modes: str,
    seed: int,
    taps: str | None,
    given: Path | None,
    checkpoint: Path | None,
    threads: int | None,
    name: str | None,
    force: bool,
    quiet: bool,
) -> None:
    """Run ENGINE and write logits, caches and taps into the folder OUT.

    OUT is compared with another side by 'seekforge parity --from-dump OUT --from-dump OTHER'. An engine built with
    --taps gives the inside of every layer too.
    """
    opened = Engine.open(engine, part=True)
    check_checkpoint(opened, checkpoint)
    kept = None if taps is None else _known_taps(taps, opened)
    inputs = None if given is None else Dump.open(given)
    if plan_file is not None:
        plan = _read(plan_file)
    else:
        plan = inputs.plan if inputs is not None else _random_plan(opened.manifest, contexts, modes, seed)
    if inputs is not None and inputs.plan != plan:
        raise ConfigError(f"{given}: ran other steps than the plan has; leave out --plan to run the steps of --given")

    def say(case: str) -> None:
        if not quiet:
            click.echo(f"  running {case}", err=True)

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
            name=name or engine.resolve().name,
            taps=kept,
            given=inputs,
            progress=say,
        )
    if not quiet:
        click.echo(f"wrote {out}: {sum(1 for _ in plan.steps())} steps of {len(plan.cases)} cases")


def _read(path: Path) -> Plan:
    try:
        return Plan.model_validate_json(read_text(path, most=LISTING_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a RecordError is one
        raise ConfigError(f"{path}: {error}; let 'seekforge parity' write the plan") from None


def _known_taps(text: str, engine: Engine) -> set[str]:
    """Return the names in `text`, all of which the engine gives."""
    names = {part.strip() for part in text.split(",")} - {""}
    given = {spec.name for face in engine.manifest.graphs.values() for spec in face.outputs}
    unknown = sorted(names - given)
    if unknown:
        raise ConfigError(
            f"--taps has {unknown[0]!r}, which {engine.folder} does not give; 'seekforge inspect' lists what it gives, "
            "and 'seekforge build --taps' makes an engine that gives more"
        )
    return names


def _random_plan(manifest: Manifest, contexts: str, modes: str, seed: int) -> Plan:
    return make_plan(
        contexts=parse_contexts(contexts),
        vocab_size=manifest.vocab_size,
        index_topk=int(manifest.config["index_topk"]),
        has_mtp="mtp" in manifest.graphs,
        modes=parse_modes(modes),
        seed=seed,
    )


if __name__ == "__main__":
    from seekforge.runtime.cli import main

    main(["dump", *sys.argv[1:]])
