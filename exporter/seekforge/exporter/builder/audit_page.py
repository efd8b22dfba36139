"""The audit of a GPU engine as a terminal page: what `build` prints when it is done, and `inspect` at any time."""

from __future__ import annotations

from seekforge.common.cli.console import Column, Console, Table
from seekforge.common.cli.terminal import shown
from seekforge.formats.engine.manifest import Audit, Manifest
from seekforge.formats.quality import Quality, TaskQuality
from seekforge.plugins.kernels.cuda_driver import needs

_GIB = 1 << 30


def show_audit(manifest: Manifest, console: Console) -> None:
    """Print the shares of the matrix products and what the engine is made of; nothing for an engine without audit."""
    audit = manifest.audit
    if audit is None:
        return
    console.print(_shares(audit))
    console.print(f"{_sums(audit)} of the FLOPs")
    sms = ", ".join(f"sm{sm}" for sm in manifest.target.sms)
    uses = manifest.uses()
    plans = ", ".join(
        f"{name} {size / 1e6:.1f} MB{_times(uses.get(f'{name}.plan', 0))}" for name, size in audit.plan_bytes.items()
    )
    library = ", ".join(f"{name} {version}" for name, version in manifest.runtime_versions.items())
    console.print(f"plans for {sms}: {plans}")
    console.print(f"they run with {library} and no other version")
    plain = [name for name, able in manifest.capturable.items() if not able]
    if plain:
        console.print(f"{', '.join(plain)} cannot be captured in a CUDA graph: every decode step is enqueued anew")
    console.print(f"plugins: {_counts(audit.plugins)}")
    console.print(f"inlined: {_counts(audit.inlined)}")
    if manifest.plugins:
        without = "none (--no-kernels), this engine does not load"
        console.print(f"kernels: {_counts(audit.kernels) if audit.kernels else without}")
        sources: dict[str, list[str]] = {}
        for op, use in manifest.plugins.items():
            if use.kernel_source:
                sources.setdefault(use.kernel_source, []).append(op)
        for source, ops in sorted(sources.items(), key=lambda one: -len(one[1])):
            console.print(f"kernels by {shown(source)}: {', '.join(ops)}")
    for sm, version in manifest.min_driver.items():
        console.print(f"kernels of sm{sm} need {needs(version)}")
    if audit.activation_bytes:
        console.print(f"memory that plans share, by profile: {_activations(audit)}")
    size = audit.device_bytes
    total, usable, scratch = (size[key] / _GIB for key in ("total", "usable", "scratch"))
    console.print(
        f"weight inputs {audit.weight_input_bytes / _GIB:.2f} GiB, scratch {scratch:.2f} GiB, expected memory "
        f"{total:.1f} of {usable:.1f} GiB{': OVERSIZE, this engine does not load' if audit.oversize else ''}"
    )
    source = manifest.weights
    if source is not None:
        where = "no checkpoint was named at build; pass --checkpoint to run" if source.path is None else source.path
        console.print(f"weights: {where}")


def self_check_words(manifest: Manifest) -> str:
    """Say what proves an engine."""
    check = manifest.self_check
    if check is not None:
        return f"{len(check.prompt_ids)} tokens within {check.tolerance:.2g} logits"
    if manifest.target.backend == "onnxruntime":
        return "none, this is a part of a model ('seekforge run' needs a whole one)"
    return "none yet ('parity' writes it where the GPU is)"


def _sums(audit: Audit) -> str:
    """Return the share of each precision, the largest first."""
    shares = {precision: audit.share(precision) for precision in dict.fromkeys(one.precision for one in audit.products)}
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in sorted(shares.items(), key=lambda item: -item[1]))


def _activations(audit: Audit) -> str:
    """Return each profile's largest memory over all plans, and the plan that needs it."""
    largest: dict[str, tuple[int, str]] = {}
    for plan, sizes in audit.activation_bytes.items():
        for profile, size in sizes.items():
            largest[profile] = max(largest.get(profile, (0, plan)), (size, plan), key=lambda one: one[0])
    return ", ".join(f"{profile} {size / _GIB:.2f} GiB ({plan})" for profile, (size, plan) in largest.items())


def _shares(audit: Audit) -> Table:
    other = "" if audit.got == audit.asked else f" (asked: {audit.asked})"
    title = f"matrix products of one token at {audit.context} keys: {audit.got}{other}"
    columns = [Column("what"), Column("as"), Column("precision"), Column("share", "number")]
    table = Table(columns, title=title, lines=True)
    for one in audit.products:
        table.add(one.what, one.form, one.precision, f"{one.share:.2%}")
    return table


def _times(count: int) -> str:
    return "" if count == 1 else f" {count} times"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {op}" for op, count in counts.items()) or "none"


def quality_words(quality: Quality) -> str:
    """Say what an engine was measured to do, and what it had to."""
    return ", ".join(_task_words(one, quality.bounds.get(one.task)) for one in quality.tasks)


def _task_words(one: TaskQuality, bound: float | None) -> str:
    if one.score is not None:
        return f"{one.task} {one.score:.1%}{'' if bound is None else f' (at least {bound:.1%})'}"
    return f"{one.task} perplexity {one.perplexity:.4g}{'' if bound is None else f' (at most {bound:.4g})'}"
