"""`seekforge kernels estimate`: what the launches of a step cost, from their compiled code and a model of the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from seekforge.common.cli.console import console
from seekforge.common.cli.options import (
    Command,
    Named,
    Tokens,
    Whole,
    json_option,
    kv_cache_dtype_option,
    list_option,
    quiet_option,
)
from seekforge.common.cli.terminal import shown, write_json
from seekforge.common.errors import OptionError, TargetError
from seekforge.common.temporary import temporary_folder
from seekforge.exporter.builder import estimate as estimates
from seekforge.exporter.builder.kernel_choice import settle
from seekforge.exporter.checkpoint.presets import known_presets, load_preset
from seekforge.exporter.checkpoint.source import headers
from seekforge.exporter.models import family_of
from seekforge.exporter.models.sharding import check_parallelism
from seekforge.exporter.option_types import MODEL, TARGET, kernel_precision_option
from seekforge.exporter.sizing.calls import Call, StepShape, step_calls
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import NVFP4_SM, all_targets, load_target
from seekforge.plugins.cost.card import Card, card_of
from seekforge.plugins.cost.model import Kernel
from seekforge.plugins.cost.work import Load
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.index import kernel_sm
from seekforge.plugins.kernels.providers.choice import AUTO, read_choice
from seekforge.plugins.kernels.sizes import DEFAULT_FORMAT
from seekforge.plugins.registry import WITH_KERNELS

#: Keys of `--shape`, and what they are where it does not say.
_SHAPE = {"batch": 1, "queries": 1, "context": 32768}


class Shape(click.ParamType):
    """A step: `batch=32,queries=1,context=32K`, each part once, in any order."""

    name = "batch=N,queries=N,context=N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> StepShape:
        """Return the step, or fail."""
        if isinstance(value, StepShape):
            return value
        sizes: dict[str, int] = {}
        for part in str(value).split(","):
            key, equals, number = part.strip().partition("=")
            if not equals or key not in _SHAPE or key in sizes:
                self.fail(f"{part[:60]!r} is no part of a shape; parts are {', '.join(_SHAPE)}, each once, as KEY=N")
            sizes[key] = Tokens().convert(number, param, ctx)
        return StepShape(**(_SHAPE | sizes))


def check_nvfp4(sms: Sequence[int]) -> None:
    """Refuse SMs whose kernels take no experts in NVFP4."""
    if min(sms) < NVFP4_SM:
        raise TargetError(
            f"--precision nvfp4 is for SMs from {NVFP4_SM} on (Blackwell), and this is for sm {min(sms)}; take fp8"
        )


def config_of(model: str) -> ModelConfig:
    """Return the config of a preset, or of what has a config.json."""
    if model in known_presets():
        return load_preset(model).config
    with headers(model, config_only=True) as folder:
        return ModelConfig.load(folder)


@click.command(
    "estimate",
    cls=Command,
    examples=(
        "seekforge kernels estimate --sm 90 --shape batch=32,context=32K",
        "seekforge kernels estimate --target b200 --tp 8 --ep --shape batch=128,context=128K --json",
        "seekforge kernels estimate --sm 90 --shape queries=2048 --op DsaAttention --counts-only",
    ),
)
@click.option("--target", type=TARGET, help="The GPU: a name of 'seekforge targets', or a YAML file.")
@click.option("--sm", type=Whole(1), help="Instead: the first of these targets with the compute capability.")
@click.option(
    "--shape",
    type=Shape(),
    default="batch=1,queries=1,context=32K",
    show_default=True,
    help="The step: sequences, new tokens of each, keys that the last one sees.",
)
@click.option(
    "--model", type=MODEL, default="full", show_default=True, help="A name of configs/models, or a config.json."
)
@kv_cache_dtype_option("Format of the caches.", default=DEFAULT_FORMAT)
@kernel_precision_option
@click.option(
    "--tp", type=Whole(1), default=1, show_default=True, help="Tensor-parallel ranks; sizes are those of one."
)
@click.option("--ep", is_flag=True, help="Expert parallelism: experts dealt out whole among these ranks.")
@list_option("--op", "only", type=Named("operator", lambda: WITH_KERNELS), help="Only these operators.")
@list_option(
    "--provider",
    "providers",
    type=click.STRING,
    metavar="OP=NAME,…",
    help="Kernels of a library (flashinfer); auto: the quickest by this model.",
)
@click.option(
    "--kernels",
    "store",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder that 'kernels build' wrote. Default: kernels are compiled, or taken from the cache.",
)
@click.option("--counts-only", is_flag=True, help="Compile nothing: bytes, FLOPs, programs and their roofs.")
@click.option("--jobs", type=Whole(1, 4096), help="Processes that compile. Default: one per core.")
@click.option("--cache", type=click.Path(path_type=Path), default=None, help="Folder of compiled images.")
@quiet_option
@json_option
def estimate(
    target: str | None,
    sm: int | None,
    shape: StepShape,
    *,
    model: str,
    kv_cache_dtype: str,
    precision: str,
    tp: int,
    ep: bool,
    only: tuple[str, ...],
    providers: tuple[str, ...],
    store: Path | None,
    counts_only: bool,
    jobs: int | None,
    cache: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Estimate the launches of one step: bytes, FLOPs, programs, instructions, occupancy, and a time.

    Times come from counts and a simple model of the GPU, not from a run: docs/kernels.md says what it assumes and how
    far it is from what others measured. Operators that TensorRT runs itself are not counted. Needs no GPU.
    """
    if store is not None and counts_only:
        raise OptionError("--kernels and --counts-only exclude each other: one reads code, the other none")
    choice = read_choice(providers)
    if counts_only and AUTO in choice.values():
        raise OptionError(f"--provider {AUTO} compares code, --counts-only has none; name a provider")
    card = _card(target, sm)
    nvfp4 = precision == "nvfp4"
    if nvfp4:
        check_nvfp4((card.sm,))
    config, parallelism = config_of(model), Parallelism(tp=tp, ep=ep)
    check_parallelism(config, parallelism)
    _check(shape)
    calls = [
        call
        for call in step_calls(config, shape, kv_format=kv_cache_dtype, parallelism=parallelism, nvfp4_experts=nvfp4)
        if not only or call.op in only
    ]
    if not calls:
        raise TargetError(
            f"{model} calls none of {', '.join(map(shown, only))}; operators are {', '.join(WITH_KERNELS)}"
        )
    formats = family_of(config).kv_formats
    if kv_cache_dtype not in formats:
        raise TargetError(
            f"the caches of a {config.model_type} model are {' or '.join(formats)} on GPUs, --kv-cache-dtype is "
            f"{kv_cache_dtype}; pass --kv-cache-dtype {formats[0]}"
        )
    load = Load(context=shape.context, num_experts=config.n_routed_experts)
    with aot.cache_folder(cache) as kept:
        settled = settle(choice, calls, card, load, cache=kept, jobs=jobs)
        kernels = {} if counts_only else _kernels(calls, card, store, settled, jobs=jobs, cache=kept)
    listed = estimates.rows(calls, kernels, card, load, kernel_sm(card.sm), settled)
    source = "none: shapes alone" if counts_only else "nvdisasm"
    if as_json:
        head = {"model": model, "kv_cache_dtype": kv_cache_dtype, "precision": precision, "tp": tp, "ep": ep}
        head |= {"code_from": source}
        write_json(head | estimates.as_json(listed, card, shape))
    elif not quiet:
        out = console()
        out.print(estimates.table(listed))
        out.print(estimates.summary(listed))
        out.print(
            f"{card.name}, sm {card.sm}: a model, no measurement; code from {source}; "
            "operators of TensorRT are not counted"
        )


def _card(target: str | None, sm: int | None) -> Card:
    if (target is None) == (sm is None):
        raise OptionError("give one of --target and --sm, such as --sm 90")
    if target is not None:
        return card_of(load_target(target))
    known = [one for one in all_targets() if one.gpu is not None]
    for one in known:
        if one.sm == sm:
            return card_of(one)
    sms = sorted({one.sm for one in known if one.sm is not None})
    raise TargetError(f"sm {sm}: no target has it; targets have {', '.join(map(str, sms))}")


def _check(shape: StepShape) -> None:
    if shape.context < shape.queries:
        raise OptionError(
            f"context is {shape.context}, expected at least the {shape.queries} queries, which it includes"
        )
    if shape.batch * shape.queries > estimates.MOST_TOKENS or shape.context > estimates.MOST_CONTEXT:
        raise OptionError(
            f"{shape.batch} × {shape.queries} tokens over {shape.context} keys are more than a step has: at most "
            f"{estimates.MOST_TOKENS:,} tokens and {estimates.MOST_CONTEXT:,} keys"
        )


def _kernels(
    calls: Sequence[Call],
    card: Card,
    store: Path | None,
    providers: Mapping[str, str],
    *,
    jobs: int | None,
    cache: Path,
) -> dict[tuple[str, str], Kernel]:
    """Return the compiled kernels of some calls: of a folder, or compiled now where the cache lacks them."""
    sm = kernel_sm(card.sm)
    if store is not None:
        return estimates.read_kernel_sets(estimates.stored_sets(store, calls, sm, providers), store, cache=cache)
    with temporary_folder("seekforge-kernels") as folder:
        work = aot.tasks({call.op: call.bound for call in calls}, [sm], providers)
        return estimates.read_kernel_sets(aot.build(work, folder, cache=cache, jobs=jobs), folder, cache=cache)
