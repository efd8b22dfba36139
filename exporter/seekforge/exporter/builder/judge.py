"""Whether an engine is good enough to be kept: it is measured where it was built, before it gets its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from seekforge.common.errors import EngineError, TargetError
from seekforge.common.temporary import temporary_folder
from seekforge.exporter.builder.options import QualityBounds
from seekforge.exporter.quality import EncodedTasks, encode, misses, run_engine
from seekforge.formats.engine.manifest import Limits, Manifest, save_manifest
from seekforge.formats.program import Program
from seekforge.formats.quality import Quality
from seekforge.formats.quality_run import RunRequest


def check_measurable(program: Program, program_folder: Path, limits: Limits, bounds: QualityBounds) -> EncodedTasks:
    """Refuse what an engine of a program could not be measured on, before it is built.

    Raises:
        TargetError: the program is a part of a model, and gives no text.
        ConfigError: a row does not fit into the engine's limits.
    """
    if program.outside or not program.gives_logits:
        raise TargetError("--quality generates text, and the program is a part of a model; measure the whole model")
    return encode(bounds.tasks, program_folder / "tokenizer.json", longest=limits.max_model_len)


def judge(
    folder: Path, manifest: Manifest, bounds: QualityBounds, *, out: Path, say: Callable[[str], object]
) -> Manifest:
    """Measure a sealed engine, and seal it again with what came of that.

    Args:
        folder: the engine, where it was built.
        manifest: the manifest of that folder.
        bounds: what it is measured on, and what it must reach.
        out: what messages call it: the place that it is for.
        say: told each part of the work.

    Raises:
        EngineError: it misses a bound; all that it misses are named.
    """
    encoded = encode(bounds.tasks, folder / manifest.tokenizer, longest=manifest.limits.max_model_len)
    with temporary_folder("seekforge-quality") as work:
        answer = run_engine(folder, RunRequest(rows=encoded.rows), work, name=str(out), say=say)
    results = encoded.score(answer.completions, answer.nll_sums, manifest.eos_token_ids)
    missed = misses(results, bounds.bounds)
    if missed:
        raise EngineError(
            f"{out}: not written: {'; '.join(missed)} (--min-quality); build with a higher precision, or lower bounds"
        )
    quality = Quality(tasks_sha256=bounds.tasks.sha256, tasks=results, bounds=dict(bounds.bounds))
    return save_manifest(folder, manifest.model_copy(update={"quality": quality}))
