"""`seekforge.parity`: compare an engine with PyTorch, with transformers, with another engine, or two dumps."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from seekforge.common.errors import OptionError, OutputError
from seekforge.common.files import atomic_folder, replace_file
from seekforge.common.temporary import temporary_folder
from seekforge.exporter.calls import (
    AnyPath,
    Bytes,
    Counts,
    Flag,
    Forms,
    Modes,
    Names,
    NotNegative,
    Paths,
    Progress,
    Seed,
    Source,
    Threads,
    many,
    public,
    stages_of,
)
from seekforge.exporter.checkpoint.source import resolve
from seekforge.exporter.checkpoint.text_files import check_weight_files
from seekforge.exporter.parity.refusals import refuse_unused
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.dump import Dump
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.parity_steps import MODES, read_prompts
from seekforge.formats.quality import FormName, read_tasks

if TYPE_CHECKING:
    from seekforge.exporter.parity.gates import Finding, Gate

#: Forms of the PyTorch model that stand beside engines in a table of quality.
FORM_NAMES: Final[tuple[FormName, ...]] = get_args(FormName)


@dataclass(frozen=True)
class ParityResult:
    """The verdict of a check, or where PyTorch's side alone was written to be compared elsewhere.

    Attributes:
        passed: whether every gate holds; None where nothing was compared, or where quality was measured.
        gates: what must hold, with what was measured and why it must.
        finding: the first place where the two sides differ by more than they may.
        notes: what the reader should know, such as what was not looked at.
        report: everything, as JSON values; None where nothing was compared.
        dumps: the folder that dumps were kept in.
        html: the page that was written.
        stored_self_check: whether the results were stored in the engine.
    """

    passed: bool | None
    gates: tuple[Gate, ...] = ()
    finding: Finding | None = None
    notes: tuple[str, ...] = ()
    report: Mapping[str, Any] | None = None
    dumps: Path | None = None
    html: Path | None = None
    stored_self_check: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return what `seekforge parity --json` prints; empty where nothing was compared."""
        return dict(self.report or {})


@public
def parity(
    engine: Paths | None = None,
    *,
    checkpoint: Source | None = None,
    prompts: AnyPath | None = None,
    contexts: Counts = (),
    modes: Modes = MODES,
    against: Source = "torch",
    layers: str | None = None,
    numerics: Literal["bf16", "exact", "fp8"] | None = None,
    without: Names = (),
    sensitivity: Flag = False,
    max_kl: NotNegative | None = None,
    max_dump_size: Bytes = 8 << 30,
    from_dump: Paths = (),
    save: AnyPath | None = None,
    force: Flag = False,
    write_self_check: Flag = False,
    quality: AnyPath | None = None,
    forms: Forms = (),
    html: AnyPath | None = None,
    threads: Threads | None = None,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> ParityResult:
    """Prove that an engine computes what PyTorch computes, or find the first place where it does not.

    That it does not is no error: `passed` of the result is then False.

    Args:
        engine: its folder; with `quality` also several. Without it two dumps are compared, or PyTorch's side is
            written to `save`.
        checkpoint: the weights for the PyTorch side; a Hugging Face repository is downloaded.
        prompts: text file, one prompt a line; None: random ids.
        contexts: lengths of random prompts; none: 16, and around index_topk.
        modes: how prompts are cut into steps.
        against: the other side: "torch", "transformers", or the folder of another engine.
        layers: look at layers "A-B" only, from what the engine had at A.
        numerics: how the PyTorch side computes; None: as the engine.
        without: roundings that are switched off on the PyTorch side, such as "kv_fp8".
        sensitivity: also tell what each layer's roundings cost alone.
        max_kl: fail above this mean KL, also where numerics differ.
        max_dump_size: bytes; all layers are tapped only if that takes no more, else the first bad one is searched.
        from_dump: one or two dumps to compare instead of an engine.
        save: keep the dumps of both sides in this folder.
        force: replace what an earlier check wrote there.
        write_self_check: if it passes, store results in the engine, which are compared at each start.
        quality: file of tasks: measure engines on it, beside the exact PyTorch model, instead of comparing steps.
        forms: with `quality`, PyTorch in these forms too, such as "fp8" or "nvfp4".
        html: write the report as one HTML page.
        threads: CPU threads; None: the cores this process may use.
        seed: the seed of random prompts.
        progress: told each stage.

    Raises:
        OptionError: an argument is none that it takes, or does not go with another.
        ConfigError, CheckpointError, EngineError: what is compared is damaged, or does not belong together.
        OutputError: `save` or `html` cannot be written.
        EnvironmentFault: a library is not installed.
    """
    arguments = dict(locals())
    parameters = inspect.signature(parity).parameters
    refuse_unused({name for name, one in parameters.items() if arguments[name] != one.default}, arguments)
    folders = () if engine is None else tuple(map(Path, many(engine)))
    folder = folders[0] if folders else None
    if quality is not None:
        assert checkpoint is not None  # looked at above
        return _quality(folders, str(checkpoint), Path(quality), many(forms), html=html, threads=threads, say=progress)
    if len(folders) > 1:
        raise OptionError(f"{len(folders)} engines stand there; parity compares one, and --quality shows several")
    dumps = tuple(map(Path, many(from_dump)))
    saved, page = (None if one is None else Path(one) for one in (save, html))
    if len(dumps) > 2:
        raise OptionError(f"--from-dump was given {len(dumps)} times; it takes one or two dumps")
    stages = stages_of(progress)
    source = None if checkpoint is None else resolve(checkpoint, quiet=stages.quiet)
    _look_at(folder, source, dumps)
    if prompts is not None:
        read_prompts(Path(prompts))
    # these bring torch
    from seekforge.exporter.parity.inputs import ParityOptions
    from seekforge.exporter.parity.report.page import render
    from seekforge.exporter.parity.report.to_json import to_json
    from seekforge.exporter.parity.sources import from_dumps, from_engine, reference_only
    from seekforge.exporter.parity.write_self_check import write_self_check as store_self_check

    options = ParityOptions(
        engine=folder,
        checkpoint=source,
        prompts=None if prompts is None else Path(prompts),
        contexts=many(contexts),
        modes=many(modes),
        against=str(against),
        layers=layers,
        numerics=numerics,
        without=many(without),
        sensitivity=sensitivity,
        write_self_check=write_self_check,
        max_kl=max_kl,
        max_dump_size=max_dump_size,
        threads=threads,
        seed=seed,
    )
    stored = False
    with _threads(threads), _workspace(saved, force) as work:
        if dumps:
            result = from_dumps(dumps, options, work, stages)
        elif folder is None:
            reference_only(options, saved, work, stages)
            stages.done()
            return ParityResult(None, dumps=saved)
        else:
            result = from_engine(folder, options, work, stages)
            stored = write_self_check and result.passed
            if stored:
                stages("write self-check")
                sides = Dump.open(work / "judged"), Dump.open(work / "reference")
                store_self_check(folder, *sides, f"{options.against}, by parity")
    stages.done()
    report = to_json(result)
    if page is not None:
        _write_page(page, render(report), saved)
    return ParityResult(
        passed=result.passed,
        gates=tuple(result.gates),
        finding=result.finding,
        notes=tuple(result.notes),
        report=report,
        dumps=saved,
        html=page,
        stored_self_check=stored,
    )


def _quality(
    engines: tuple[Path, ...],
    checkpoint: str,
    tasks_file: Path,
    forms: tuple[FormName, ...],
    *,
    html: AnyPath | None,
    threads: int | None,
    say: Progress | None,
) -> ParityResult:
    """Measure engines and forms of PyTorch on tasks."""
    tasks = read_tasks(tasks_file)
    for one in engines:
        load_manifest(one)
    stages = stages_of(say)
    source = resolve(checkpoint, quiet=stages.quiet)
    _look_at(None, source, ())
    # these bring torch
    from seekforge.exporter.parity.quality.check import check_quality
    from seekforge.exporter.parity.report.quality import render_quality

    with _threads(threads), temporary_folder("seekforge-quality") as work:
        made = check_quality(engines, source, tasks, forms, threads=threads, work=work, stages=stages)
    stages.done()
    report = made.model_dump(mode="json")
    page = None if html is None else Path(html)
    if page is not None:
        _write_page(page, render_quality(report))
    return ParityResult(None, report=report, html=page)


def _write_page(page: Path, text: str, saved: Path | None = None) -> None:
    """Write a report; what it is of was kept in `saved` before, and stays."""
    try:
        replace_file(page, text.encode())
    except OSError as error:
        kept = "" if saved is None else f" (the dumps are whole, in {saved}: --from-dump compares them again)"
        raise OutputError(f"{page}: cannot be written ({error.strerror}); choose another place{kept}") from None


def _look_at(engine: Path | None, checkpoint: Path | None, dumps: Iterable[Path]) -> None:
    """Say what is odd in the folders that are going to be read."""
    if checkpoint is not None:
        ModelConfig.load(checkpoint)
        check_weight_files(checkpoint)
    if engine is not None:
        load_manifest(engine)
    for dump in dumps:
        Dump.open(dump)


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Let PyTorch use so many threads; afterwards it uses as many as before."""
    import torch

    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _workspace(save: Path | None, force: bool) -> Iterator[Path]:
    """Make the folder that dumps go to: kept at `save`, else temporary."""
    if save is not None:
        with atomic_folder(save, force=force, marker="plan.json") as folder:
            yield folder
        return
    with temporary_folder("seekforge-parity") as folder:
        yield folder
