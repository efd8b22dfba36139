"""`seekforge parity`: compare an engine with PyTorch, with transformers, with another engine, or two dumps."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from tokenizers import Tokenizer

from seekforge.exporter.checkpoint.validate import check_structure
from seekforge.exporter.model.step import Settings
from seekforge.exporter.parity.engine_side import EngineSide
from seekforge.exporter.parity.local import OpRecord
from seekforge.exporter.parity.page import render
from seekforge.exporter.parity.report import to_json
from seekforge.exporter.parity.run import Noise, Result, check_engine, conclude
from seekforge.exporter.parity.terminal import print_terminal
from seekforge.exporter.parity.walks import Walker, sensitivity, without
from seekforge.exporter.parity.write_self_check import write_self_check as store_self_check
from seekforge.exporter.progress import Stages
from seekforge.exporter.rewrite.layers import check_range, parse_layers, truncate
from seekforge.plugins.errors import ConfigError
from seekforge.plugins.formats.dump import Dump
from seekforge.plugins.formats.files import atomic_folder
from seekforge.plugins.formats.manifest import MANIFEST
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.numerics import EXACT, NUMERICS, Numerics, numerics_from_dict
from seekforge.plugins.formats.plan import MODES, Plan, make_plan, parse_contexts, parse_modes
from seekforge.plugins.formats.safetensors import Checkpoint


@dataclass(frozen=True)
class _Options:
    engine: Path | None
    checkpoint: Path | None
    prompts: Path | None
    contexts: str | None
    modes: str
    against: str
    layers: str | None
    numerics: str | None
    without: tuple[str, ...]
    sensitivity: bool
    max_kl: float | None
    max_dump_gb: float
    threads: int | None
    seed: int


@click.command("parity")
@click.argument("engine", type=click.Path(path_type=Path), required=False)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The weights for the PyTorch side.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Text file, one prompt a line. Default: random ids.")
@click.option("--contexts", help="Lengths of random prompts. Default: 16, and around index_topk.")
@click.option("--modes", default=",".join(MODES), show_default=True, help="How prompts are cut into steps.")
@click.option(
    "--against", default="torch", show_default=True, metavar="torch|transformers|ENGINE2", help="The other side."
)
@click.option("--layers", help="Look at layers A-B only, from what the engine had at A.")
@click.option("--numerics", type=click.Choice(sorted(NUMERICS)), help="Of the PyTorch side. Default: the engine's.")
@click.option("--without", multiple=True, help="Switch one rounding off on the PyTorch side, such as kv_fp8.")
@click.option("--sensitivity", is_flag=True, help="Also tell what each layer's roundings cost alone.")
@click.option("--max-kl", type=click.FloatRange(min=0), help="Fail above this mean KL, also where numerics differ.")
@click.option(
    "--max-dump-gb",
    type=click.FloatRange(min=0),
    default=8.0,
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
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: the cores this process may use.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random prompts.")
@click.option("--quiet", is_flag=True, help="Print nothing: the exit code is the verdict.")
def parity(
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
    asked = _Options(engine=engine, threads=threads, **options)  # pyright: ignore[reportArgumentType]
    if write_self_check and (engine is None or asked.against not in ("torch", "transformers")):
        raise click.UsageError("--write-self-check needs an ENGINE and --against torch or transformers")
    stages = Stages(quiet=quiet or as_json)
    if threads:
        torch.set_num_threads(threads)
    with _workspace(save, force) as work:
        if dumps:
            result = _from_dumps(dumps, asked, work, stages)
        elif engine is None:
            _reference_only(asked, save, work, stages)
            stages.done()
            if not quiet:
                click.echo(f"wrote {save}: reference, noise and plan.json of the PyTorch side")
            return
        else:
            result = _from_engine(engine, asked, work, stages)
            if write_self_check and result.passed:
                stages("write self-check")
                sides = Dump.open(work / "judged"), Dump.open(work / "reference")
                store_self_check(engine, *sides, f"{asked.against}, by parity")
    stages.done()
    report = to_json(result)
    if html is not None:
        html.write_text(render(report), encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
    elif not quiet:
        width = None if sys.stdout.isatty() else 140
        print_terminal(Console(highlight=False, width=width), report, brief=brief)
        if html is not None:
            click.echo(f"report: {html}")
    if not result.passed:
        sys.exit(1)


@contextlib.contextmanager
def _workspace(save: Path | None, force: bool) -> Iterator[Path]:
    """The folder that dumps go to: kept at `save`, else temporary."""
    if save is not None:
        with atomic_folder(save, force=force, marker="plan.json") as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="seekforge-parity-") as folder:
        yield Path(folder)


# --- where things come from ---------------------------------------------------------------------------------


def _plan(asked: _Options, config: ModelConfig, tokenizer: Path, *, has_mtp: bool, longest: int) -> Plan:
    modes = parse_modes(asked.modes)
    if asked.prompts is not None:
        if asked.contexts is not None:
            raise click.UsageError("--prompts has its own lengths; drop --contexts")
        prompts = _read_prompts(asked.prompts, tokenizer)
        return make_plan(
            contexts=(), vocab_size=config.vocab_size, index_topk=config.index_topk, has_mtp=has_mtp, modes=modes,
            prompts=prompts, seed=asked.seed,
        )  # fmt: skip
    if asked.contexts is not None:
        contexts = parse_contexts(asked.contexts)
    else:
        contexts = tuple(sorted({min(n, longest) for n in (16, config.index_topk + 8, 2 * config.index_topk)}))
    if max(contexts) > longest:
        raise ConfigError(f"--contexts has {max(contexts)}, the engine accepts {longest} tokens")
    return make_plan(
        contexts=contexts, vocab_size=config.vocab_size, index_topk=config.index_topk, has_mtp=has_mtp, modes=modes,
        seed=asked.seed,
    )  # fmt: skip


def _read_prompts(path: Path, tokenizer: Path) -> list[list[int]]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; expected one prompt a line") from None
    if not lines:
        raise ConfigError(f"{path}: holds no prompt; expected one a line")
    if not tokenizer.is_file():
        raise ConfigError(f"{tokenizer}: missing; --prompts needs the tokenizer")
    encoder = Tokenizer.from_file(str(tokenizer))
    prompts = [encoder.encode(line, add_special_tokens=False).ids for line in lines]
    empty = next((line for line, ids in zip(lines, prompts) if not ids), None)
    if empty is not None:
        raise ConfigError(f"{path}: the prompt {empty!r} encodes to no token")
    return prompts


def _numerics(asked: _Options, side: dict[str, object]) -> Numerics:
    chosen = NUMERICS[asked.numerics] if asked.numerics else numerics_from_dict(side)
    return without(chosen, asked.without)


@contextlib.contextmanager
def _source(folder: Path, config: ModelConfig) -> Iterator[Checkpoint]:
    """Open a checkpoint that belongs to a model of this config (the whole of it, or its first layers)."""
    found = ModelConfig.load(folder)
    ours = config
    if found.num_hidden_layers > config.num_hidden_layers and config.mtp_layer is None:
        found = truncate(found, config.num_hidden_layers)
    for key in type(config).model_fields:
        if getattr(ours, key) != getattr(found, key):
            raise ConfigError(
                f"{folder}: {key} is {getattr(found, key)}, the engine's model has {getattr(ours, key)}; "
                "pass the checkpoint of that model"
            )
    with Checkpoint.open(folder) as checkpoint:
        check_structure(checkpoint, ModelConfig.load(folder))
        yield checkpoint


def _need_checkpoint(asked: _Options, what: str) -> Path:
    if asked.checkpoint is None:
        raise click.UsageError(f"{what} needs --checkpoint, the folder with the weights")
    return asked.checkpoint


def _range(asked: _Options, config: ModelConfig) -> tuple[int, int] | None:
    if asked.layers is None:
        return None
    layers = parse_layers(asked.layers)
    check_range(layers, config)
    return layers


# --- the ways to compare ------------------------------------------------------------------------------------


def _from_engine(engine: Path, asked: _Options, work: Path, stages: Callable[[str], None]) -> Result:
    side = EngineSide(engine, work, asked.threads)
    manifest = side.manifest
    config = ModelConfig.parse(manifest.config, str(engine / MANIFEST))
    modes_need_mtp = "mtp" in manifest.graphs
    plan = _plan(
        asked, config, engine / manifest.tokenizer, has_mtp=modes_need_mtp, longest=manifest.limits.max_model_len
    )
    (work / "plan.json").write_text(plan.model_dump_json(), encoding="utf-8")
    activations = manifest.build.get("activations", "bf16")
    settings = Settings(config, _numerics(asked, manifest.numerics), activations)
    if asked.against == "torch":
        folder = _need_checkpoint(asked, "--against torch")
        with _source(folder, config) as source:
            walker = Walker(settings, source, folder.resolve().name, stages)
            result = check_engine(
                side,
                walker,
                plan,
                work=work,
                layers=_range(asked, config),
                max_dump_bytes=int(asked.max_dump_gb * 1e9),
                max_kl=asked.max_kl,
                costs=asked.sensitivity,
            )
            if asked.sensitivity and not result.sensitivity:
                result.sensitivity = _sensitivity(walker, plan, manifest.numerics, work, asked)
        return result
    if asked.layers is not None or asked.sensitivity or asked.numerics or asked.without:
        raise click.UsageError("--layers, --sensitivity, --numerics and --without need --against torch")
    if asked.against == "transformers":
        from seekforge.exporter.parity.oracle import write_oracle_dump

        folder = _need_checkpoint(asked, "--against transformers")
        stages("transformers")
        (work / "reference").mkdir()
        with tempfile.TemporaryDirectory(prefix="seekforge-oracle-") as copy:
            reference = write_oracle_dump(folder, plan, work / "reference", Path(copy))
        stages(f"engine {engine.name}")
        judged = side.dump(plan, work / "judged", [tap for tap in side.taps if tap.startswith(("hidden", "resid"))])
        same = numerics_from_dict(manifest.numerics) == EXACT
        return conclude(judged, reference, None, [], same=same, max_kl=asked.max_kl, num_runs=1)
    return _two_engines(side, Path(asked.against), plan, settings, asked, work, stages)


def _two_engines(
    first: EngineSide,
    other: Path,
    plan: Plan,
    settings: Settings,
    asked: _Options,
    work: Path,
    stages: Callable[[str], None],
) -> Result:
    """Both engines run; with a checkpoint, PyTorch judges the operations of both and measures the noise."""
    second = EngineSide(other, work, asked.threads)
    dumps: list[Dump] = []
    for side, name in ((first, "judged"), (second, "reference")):
        stages(f"engine {side.folder.name}")
        dumps.append(side.dump(plan, work / name, side.taps))
    records: list[OpRecord] = []
    noise: Noise | None = None
    notes: list[str] = []
    numerics = [numerics_from_dict(dump.side.numerics) for dump in dumps]
    if asked.checkpoint is None:
        notes.append("without --checkpoint operations were not judged, and noise was not measured")
    else:
        with _source(asked.checkpoint, settings.config) as source:
            walk = work / "walk"
            walk.mkdir()
            name = asked.checkpoint.resolve().name
            records = Walker(settings, source, name, stages).judge_dump(dumps[0], walk)
            theirs = Settings(settings.config, numerics[1], dumps[1].side.activations)  # pyright: ignore
            records += Walker(theirs, source, name, stages).judge_only(dumps[1])
            noise = (Dump.open(walk / "noise"), Dump.open(walk / "reference"))
    stages("compare")
    same = numerics[0] == numerics[1]
    return conclude(dumps[0], dumps[1], noise, records, same=same, max_kl=asked.max_kl, notes=notes, num_runs=2)


def _from_dumps(folders: Sequence[Path], asked: _Options, work: Path, stages: Callable[[str], None]) -> Result:
    if asked.engine is not None or len(folders) > 2:
        raise click.UsageError("--from-dump takes one or two dumps and no ENGINE")
    judged = Dump.open(folders[0])
    (work / "plan.json").write_text(judged.plan.model_dump_json(), encoding="utf-8")
    config = ModelConfig.parse(judged.side.config, str(folders[0]))
    numerics = _numerics(asked, judged.side.numerics)
    settings = Settings(config, numerics, judged.side.activations)  # pyright: ignore[reportArgumentType]
    records: list[OpRecord] = []
    noise: Noise | None = None
    notes: list[str] = []
    if asked.checkpoint is not None:
        with _source(asked.checkpoint, config) as source:
            name = asked.checkpoint.resolve().name
            records = Walker(settings, source, name, stages).judge_dump(judged, work)
        noise = Dump.open(work / "noise")
    if len(folders) == 2:
        reference = Dump.open(folders[1])
        beside = folders[1].resolve().parent / "noise"
        if noise is None and (beside / "dump.json").is_file():
            noise = Dump.open(beside)  # written with the reference by --save
        elif noise is not None:
            noise = (noise, Dump.open(work / "reference"))
        else:
            notes.append("no noise was measured: there is none beside the second dump, and no --checkpoint")
    elif asked.checkpoint is not None:
        reference = Dump.open(work / "reference")
    else:
        raise click.UsageError("one --from-dump needs --checkpoint, or a second --from-dump to compare with")
    stages("compare")
    theirs = numerics_from_dict(reference.side.numerics)
    same = numerics_from_dict(judged.side.numerics) == theirs
    return conclude(judged, reference, noise, records, same=same, max_kl=asked.max_kl, notes=notes)


def _reference_only(asked: _Options, save: Path | None, work: Path, stages: Callable[[str], None]) -> None:
    """No engine: write the PyTorch side, to be compared with an engine's dump made elsewhere."""
    if save is None:
        raise click.UsageError(
            "without ENGINE and --from-dump there is nothing to compare; --save writes PyTorch's side"
        )
    folder = _need_checkpoint(asked, "--save without ENGINE")
    config = ModelConfig.load(folder)
    plan = _plan(
        asked,
        config,
        folder / "tokenizer.json",
        has_mtp=config.mtp_layer is not None,
        longest=config.max_position_embeddings,
    )
    (work / "plan.json").write_text(plan.model_dump_json(), encoding="utf-8")
    numerics = without(NUMERICS[asked.numerics or "fp8"], asked.without)
    settings = Settings(config, numerics, "f32")
    with _source(folder, config) as source:
        Walker(settings, source, folder.resolve().name, stages).run(plan, work)


def _sensitivity(
    walker: Walker, plan: Plan, engine_numerics: dict[str, object], work: Path, asked: _Options
) -> dict[int, float]:
    """Each layer alone in the engine's numerics, the others as in the reference (exact, where both are the same)."""
    settings, other = walker.settings, numerics_from_dict(engine_numerics)
    base = settings.numerics if settings.numerics != other else EXACT
    if base == other:
        raise ConfigError("--sensitivity: the engine computes exactly, no layer costs anything")
    start, stop = _range(asked, settings.config) or (0, settings.config.num_hidden_layers)
    exact = Walker(Settings(settings.config, base, settings.activations), walker.source, walker.name, walker.progress)
    return sensitivity(exact, plan, other=other, work=work, layers=range(start, stop))
