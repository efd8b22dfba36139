"""`seekforge kernels`: compile the operators' kernels, and show what they cost."""

from __future__ import annotations

import re
import time
from pathlib import Path

import click
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from seekforge.common.cli.console import bar, console
from seekforge.common.cli.options import (
    Group,
    Named,
    Whole,
    json_option,
    kv_cache_dtype_option,
    list_option,
    quiet_option,
)
from seekforge.common.cli.terminal import shown, write_json
from seekforge.common.errors import OptionError, OutputError, TargetError
from seekforge.exporter.builder import kernel_numbers
from seekforge.exporter.builder.estimate_cli import check_nvfp4, config_of, estimate
from seekforge.exporter.option_types import MODEL, kernel_precision_option
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.index import INDEX
from seekforge.plugins.kernels.kernel_set import KernelSet
from seekforge.plugins.kernels.providers.choice import AUTO, read_choice
from seekforge.plugins.kernels.sizes import DEFAULT_FORMAT, operators
from seekforge.plugins.kernels.sm_limits import SMS
from seekforge.plugins.registry import WITH_KERNELS


@click.group("kernels", cls=Group)
def kernels() -> None:
    """Compile the operators' GPU kernels ahead of time, and estimate what their launches cost."""


kernels.add_command(estimate)


@kernels.command(
    "build",
    examples=(
        "seekforge kernels build store",
        "seekforge kernels build store --sm 80,90 --op DsaAttention --jobs 4",
    ),
)
@click.argument("store", metavar="OUT", type=click.Path(path_type=Path))
@list_option("--sm", "sms", type=Whole(1), default=",".join(map(str, SMS)), help="Compute capabilities.")
@click.option(
    "--model", type=MODEL, default="full", show_default=True, help="A name of configs/models, or a config.json."
)
@kv_cache_dtype_option("Format of the caches.", default=DEFAULT_FORMAT)
@kernel_precision_option
@list_option("--op", "only", type=Named("operator", lambda: WITH_KERNELS), help="Only these operators.")
@list_option(
    "--provider", "providers", type=click.STRING, metavar="OP=NAME,…", help="Kernels of a library (flashinfer)."
)
@click.option("--jobs", type=Whole(1, 4096), help="Processes. Default: one per core.")
@click.option("--cache", type=click.Path(path_type=Path), default=None, help="Folder of compiled images.")
@quiet_option
@json_option
def build(
    store: Path,
    *,
    sms: tuple[int, ...],
    model: str,
    kv_cache_dtype: str,
    precision: str,
    only: tuple[str, ...],
    providers: tuple[str, ...],
    jobs: int | None,
    cache: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile every kernel that the model needs into the folder OUT, and print what their code costs. Needs no GPU."""
    _check_store(store)
    config = config_of(model)
    if precision == "nvfp4":
        check_nvfp4(sms)
    ops = operators(config, kv_format=kv_cache_dtype, nvfp4_experts=precision == "nvfp4")
    unknown = set(only) - set(ops)
    if unknown:
        raise TargetError(f"no kernels of {', '.join(sorted(unknown))}; operators are {', '.join(ops)}")
    choice = _named(providers)
    idle = [op for op in choice if op not in ops or (only and op not in only)]
    if idle:
        raise TargetError(f"{idle[0]}={choice[idle[0]]}: no kernels of {idle[0]} are compiled here; leave it out")
    work = aot.tasks({op: bound for op, bound in ops.items() if not only or op in only}, sorted(sms), choice)
    start = time.perf_counter()
    quietly = console(err=True, quiet=quiet or as_json)
    with bar(quietly, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        row = progress.add_task("compile", total=len(work))

        def advance(task: aot.Task, done: KernelSet | None) -> None:
            if done is not None:
                progress.update(row, advance=1, description=shown(f"compiled {task.op} sm{task.sm}"))

        with aot.cache_folder(cache) as kept:
            sets = aot.build(work, store, cache=kept, jobs=jobs, progress=advance)
            progress.update(row, description="reading their code")
            records = kernel_numbers.records(sets, store, cache=kept, jobs=jobs) if as_json or not quiet else []
    slow = kernel_numbers.faults(records, kernel_numbers.variants_of(sets))
    seconds = time.perf_counter() - start
    if as_json:
        made_by = {one.op: {"provider": one.provider, "compiler": one.compiler} for one in sets}
        write_json(
            {"path": str(store), "seconds": round(seconds, 3), "kernels": records, "slow": slow, "made_by": made_by}
        )
    elif not quiet:
        out = console()
        out.print(kernel_numbers.table(records))
        count = len(records)
        out.print(f"wrote {store}: {count} kernels for {len({one.sm for one in sets})} SMs in {seconds:.0f} s")
        for line in slow:
            out.print(f"slow: {line}")


def _named(texts: tuple[str, ...]) -> dict[str, str]:
    """Return op_type -> provider; a store has no shape by which the cost model could choose."""
    choice = read_choice(texts)
    left = [op for op, provider in choice.items() if provider == AUTO]
    if left:
        raise OptionError(f"--provider {AUTO} chooses for a step; name the provider of {', '.join(left)}")
    return choice


def _check_store(store: Path) -> None:
    """Refuse a folder that holds what no store of kernels does; one that was begun and not ended is gone on with."""
    names = [path.name for path in store.iterdir()] if store.is_dir() else []
    foreign = sorted(name for name in names if name != INDEX and not re.fullmatch(r"sm\d+|\..+\.partial", name))
    if foreign:
        raise OutputError(
            f"{store}: holds {shown(foreign[0])}, which is no part of a store of kernels; choose a new folder"
        )
