"""`seekforge build`: canonical program -> engine for one target."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click
from rich.filesize import decimal

from seekforge.common.cli.console import Stages, console
from seekforge.common.cli.options import (
    ByteSize,
    Listed,
    Tokens,
    Whole,
    command,
    json_option,
    kv_cache_dtype_option,
    list_option,
    quiet_option,
)
from seekforge.common.cli.terminal import echo, typed_command, write_json
from seekforge.exporter.builder import api
from seekforge.exporter.builder.api import BuildResult
from seekforge.exporter.builder.audit_page import quality_words, self_check_words
from seekforge.exporter.builder.options import DEFAULTS, LAYERS_PER_ENGINE, OptimizationLevel, PluginChoice
from seekforge.exporter.option_types import TARGET
from seekforge.formats.targets import Precision, WeightBlockSize

_GIB = 1 << 30
_GPU = DEFAULTS.tensorrt


class _KernelsOption(click.Option):
    """`--kernels` with values, and `--no-kernels` without one: True, False, or the values in their order."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, type=Listed(click.STRING), multiple=True, callback=_kernels, **more)
        self.secondary_opts = ["--no-kernels"]

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser know both."""
        super().add_to_parser(parser, ctx)
        parser.add_option(
            obj=self, opts=self.secondary_opts, dest=self.name, action="append_const", nargs=0, const=_NO_KERNELS
        )

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return both, and the help."""
        record = super().get_help_record(ctx)
        return record and (f"{self.opts[0]} {self.metavar} / {self.secondary_opts[0]}", record[1])


#: What `--no-kernels` gives, which no operator is called.
_NO_KERNELS = "\0"


def _kernels(ctx: click.Context, param: click.Parameter, value: tuple[list[str], ...]) -> bool | tuple[str, ...]:
    texts = tuple(dict.fromkeys(one for part in value for one in part))
    if _NO_KERNELS in texts and len(texts) > 1:
        raise click.BadParameter("--kernels and --no-kernels exclude each other", ctx, param)
    return _NO_KERNELS not in texts and (texts or _GPU.kernels)


@command(
    "build",
    examples=(
        "seekforge build program engine --target cpu --checkpoint checkpoint",
        "seekforge build program engine --target cpu --checkpoint ck --precision int8 --set experts=int4",
        "seekforge build program engine --target h200 --checkpoint checkpoint --max-model-len 64K",
        "seekforge build program engine --target rtx4090 --sm 120 --dry-run",
        "seekforge build program engine --target cpu --checkpoint ck --quality tasks.jsonl --min-quality sums=0.95",
    ),
    function=api.build,
)
@click.argument("program", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", type=TARGET, required=True, help="A name of 'seekforge targets', or the path of a YAML file.")
@click.option(
    "--set",
    multiple=True,
    metavar="A.B=C",
    help="Change a key of the target. cpu: PATTERN=PRECISION is for the weights with such a name or of such a kind.",
)
@click.option(
    "--checkpoint",
    default=None,
    metavar="FOLDER|REPO",
    help="What the program was exported from. cpu: its weights go into the engine; GPU: remembered, not read.",
)
@click.option("--max-batch-size", type=Whole(1), help="Most sequences of a step.")
@click.option("--max-model-len", type=Tokens(), help="Longest sequence, prompt and answer together.")
@click.option("--max-num-batched-tokens", type=Tokens(), help="Most tokens of a step.")
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default=DEFAULTS.precision,
    help="cpu: of the weights, f32, int8 or int4; GPU: of products of FP8 weights, bf16 or fp8; nvfp4: fp8 with "
    "experts in NVFP4, on SMs from 100 on.",
)
@click.option(
    "--weight-block-size",
    type=click.Choice(get_args(WeightBlockSize)),
    help="cpu: values of a row that share a scale, where weights are int8 or int4.  [default: 32]",
)
@kv_cache_dtype_option("GPU: format of the caches.")
@list_option("--sm", type=Whole(1), help="tensorrt-rtx: other SMs that the plan shall run on.")
@click.option(
    "--plugins",
    type=click.Choice(get_args(PluginChoice)),
    default=_GPU.plugins,
    show_default=True,
    help="GPU: operators as plugins: all, none (inlined), or auto: all that the model's sizes allow.",
)
@click.option(
    "--workspace",
    type=ByteSize(),
    help="GPU: most scratch memory of one layer, such as 4G; with less than one needs the build fails.  "
    "[default: the library's]",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    default=_GPU.timing_cache,
    help="tensorrt: file of measured tactics.",
)
@click.option(
    "--builder-optimization-level", type=Whole(0, max(get_args(OptimizationLevel))), help="GPU: the library's."
)
@click.option(
    "--layers-per-engine",
    type=Whole(1),
    help="GPU: most layers of one plan; layers that are alike share one.  "
    f"[default: {LAYERS_PER_ENGINE}, with --taps all]",
)
@click.option(
    "--kernels",
    cls=_KernelsOption,
    metavar="OP=PROVIDER,…",
    help="GPU: kernels of an operator from a library (MoeRoute=flashinfer), or auto: of each the quickest by the model "
    "of 'kernels estimate'. --no-kernels compiles none: such an engine can be looked at, not run.  [default: triton]",
)
@click.option("--allow-oversize", is_flag=True, help="GPU: build what does not fit; it is marked and does not load.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be built, build nothing.")
@click.option("--taps", is_flag=True, help="Let the engine show the tensors inside each layer, for 'parity'.")
@click.option(
    "--quality",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="cpu: measure the engine on these tasks (JSONL); what came of it goes into the manifest.",
)
@list_option(
    "--min-quality",
    type=click.STRING,
    metavar="TASK=BOUND,…",
    help="Refuse an engine with a smaller score than this, or for a task of texts a larger perplexity.",
)
@click.option("--force", is_flag=True, help="Replace an engine that stands at OUT.")
@quiet_option
@json_option
def build(program: Path, out: Path, *, quiet: bool, as_json: bool, **options: Any) -> None:
    """Build an engine for one target from the program folder PROGRAM into the folder OUT.

    A CPU engine is compared with the PyTorch model before it is written, and holds its weights. A GPU engine takes
    its weights from the checkpoint when it runs, so a program of any size builds anywhere.
    """
    result = api.build(program, out, progress=Stages(quiet=quiet or as_json), **options)
    if as_json:
        write_json(result.to_json())
    elif not quiet:
        _show(result)


def _show(result: BuildResult) -> None:
    if result.dry_run:
        lines = _planned(result)
    elif result.backend == "onnxruntime":
        lines = _written(result)
    else:
        _show_gpu(result)
        return
    for line in lines:
        echo(line)


def _show_gpu(result: BuildResult) -> None:
    from seekforge.exporter.builder.audit_page import show_audit

    assert result.manifest is not None
    shown = console()
    shown.print(f"wrote {result.path}: {result.target}")
    show_audit(result.manifest, shown)
    shown.print(f"self-check: {self_check_words(result.manifest)}")


def _steps(result: BuildResult) -> str:
    limits = result.limits
    return (
        f"sequences of up to {limits.max_model_len:,} tokens, steps of up to {limits.max_batch_size:,} sequences and "
        f"{limits.max_num_batched_tokens:,} tokens"
    )


def _planned(result: BuildResult) -> list[str]:
    """Say what a dry run found."""
    if result.backend == "onnxruntime":
        assert result.weight_bytes is not None and result.disk_free_bytes is not None
        return [
            f"would build {result.path} for {result.target} ({result.backend})",
            f"{result.formats}; {_steps(result)}",
            f"expected {decimal(result.weight_bytes)} of weights, {decimal(result.disk_free_bytes)} free on the disk",
            *([result.warning] if result.warning else []),
        ]
    assert result.device_bytes is not None
    total, usable = (result.device_bytes[key] / _GIB for key in ("total", "usable"))
    ops = [", ".join(f"{count} {op}" for op, count in (of or {}).items()) for of in (result.plugins, result.inlined)]
    sms = ", ".join(f"sm{sm}" for sm in result.sms)
    return [
        f"would build {result.path} for {result.target} ({sms}, {result.backend})",
        f"{result.formats}, caches {result.kv_cache_dtype}; {_steps(result)}",
        f"plugins: {ops[0] or 'none'}",
        f"inlined: {ops[1] or 'none'}",
        f"expected memory {total:.1f} GiB of {usable:.1f} GiB{' (oversize)' if result.oversize else ''}",
        *(f"not on this machine: {one}" for one in result.missing or ()),
    ]


def _left_to_the_cpu(result: BuildResult) -> list[str]:
    """Say which operators a GPU's provider has no kernel for."""
    assert result.manifest is not None
    left: dict[str, int] = {}
    for of_graph in result.manifest.build.get("on_the_cpu", {}).values():
        for name, count in of_graph.items():
            left[name] = left.get(name, 0) + count
    return (
        [f"on the CPU, without a CUDA kernel: {', '.join(f'{n} {name}' for name, n in left.items())}"] if left else []
    )


def _written(result: BuildResult) -> list[str]:
    """Say what a CPU engine has."""
    assert result.manifest is not None and result.num_nodes is not None and result.weight_bytes is not None
    check = result.self_check
    nodes = " + ".join(str(count) for count in result.num_nodes.values())
    proof = [f"self-check: {self_check_words(result.manifest)}"]
    if check is not None:
        proof = [
            f"self-check: {len(check.prompt_ids)} tokens, {len(check.rows)} rows equal to PyTorch within "
            f"{check.tolerance:.2g} logits",
            f"next: {typed_command('run', result.path, '--prompt', 'Hello', '--max-tokens', 64, '--greedy')}",
        ]
    return [
        f"wrote {result.path}: target {result.target}, {nodes} nodes, "
        f"{decimal(result.weight_bytes)} of {result.precision} weights",
        *_left_to_the_cpu(result),
        *([] if result.quality is None else [f"quality: {quality_words(result.quality)}"]),
        *proof,
    ]
