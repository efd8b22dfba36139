"""`seekforge build`: canonical program -> engine for one target."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from seekforge.exporter.build.targets import TargetConfig, load_target
from seekforge.exporter.checkpoint.source import resolve
from seekforge.exporter.progress import Stages
from seekforge.plugins.errors import TargetError

if TYPE_CHECKING:
    from seekforge.exporter.build.engine import Built
    from seekforge.exporter.build.gpu_checks import Choices, Inputs, Planned
    from seekforge.plugins.formats.manifest import Manifest

_GIB = 1 << 30
#: Options that only a GPU build knows: name -> value when it was not given.
_GPU_OPTIONS = {
    "kv_cache_dtype": None,
    "sms": (),
    "plugins": None,
    "workspace": None,
    "timing_cache": None,
    "builder_optimization_level": None,
    "layers_per_engine": None,
    "kernels": True,
    "allow_oversize": False,
    "dry_run": False,
}
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@click.command("build")
@click.argument("program", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="A name of 'seekforge targets', or the path of a YAML file.")
@click.option("--set", "settings", multiple=True, metavar="A.B=C", help="Change a key of the target.")
@click.option(
    "--checkpoint",
    default=None,
    metavar="FOLDER|REPO",
    help="What the program was exported from. cpu: its weights go into the engine; GPU: remembered, not read.",
)
@click.option("--max-batch-size", type=int, default=None, help="Most sequences of a step.")
@click.option("--max-model-len", type=int, default=None, help="Longest sequence, prompt and answer together.")
@click.option("--max-num-batched-tokens", type=int, default=None, help="Most tokens of a step.")
@click.option(
    "--precision",
    type=click.Choice(["f32", "int8", "int4", "bf16", "fp8"]),
    default=None,
    help="cpu: of the weights, f32, int8 or int4; GPU: of products of FP8 weights, bf16 or fp8.",
)
@click.option(
    "--kv-cache-dtype", type=click.Choice(["fp8_ds", "bf16"]), default=None, help="GPU: format of the caches."
)
@click.option("--sm", "sms", type=int, multiple=True, help="tensorrt-rtx: another SM that the plan shall run on.")
@click.option(
    "--plugins",
    type=click.Choice(["auto", "all", "none"]),
    default=None,
    help="GPU: operators as plugins: all, none (inlined), or auto: all that the model's sizes allow.  [default: auto]",
)
@click.option("--workspace", default=None, metavar="SIZE", help="GPU: most scratch memory of one layer, such as 512M.")
@click.option(
    "--timing-cache", type=click.Path(path_type=Path), default=None, help="tensorrt: file of measured tactics."
)
@click.option("--builder-optimization-level", type=click.IntRange(0, 5), default=None, help="GPU: the library's.")
@click.option(
    "--layers-per-engine",
    type=click.IntRange(min=1),
    default=None,
    help="GPU: most layers of one plan; layers that are alike share one.  [default: 1, with --taps all]",
)
@click.option(
    "--kernels/--no-kernels",
    default=True,
    help="GPU: compile the plugins' kernels; an engine without can be looked at, not run.  [default: kernels]",
)
@click.option("--allow-oversize", is_flag=True, help="GPU: build what does not fit; it is marked and does not load.")
@click.option("--dry-run", is_flag=True, help="GPU: check everything, say what would be built, build nothing.")
@click.option("--taps", is_flag=True, help="Let the engine show the tensors inside each layer, for 'parity'.")
@click.option("--force", is_flag=True, help="Replace an engine that stands at OUT.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def build(
    program: Path,
    out: Path,
    *,
    target: str,
    settings: tuple[str, ...],
    checkpoint: str | None,
    max_batch_size: int | None,
    max_model_len: int | None,
    max_num_batched_tokens: int | None,
    taps: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
    **gpu: Any,
) -> None:
    """Build an engine for one target from the program folder PROGRAM into the folder OUT.

    A CPU engine is compared with the PyTorch model before it is written, and holds its weights. A GPU engine takes
    its weights from the checkpoint when it runs, so a program of any size builds anywhere.
    """
    config = load_target(target, settings)
    folder = None if checkpoint is None else resolve(checkpoint)
    stages = Stages(quiet=quiet or as_json)
    if config.backend == "onnxruntime":
        precision = gpu.pop("precision")
        if precision is not None:
            config = config.changed([f"precision={precision}"])
        for option, value in (
            *gpu.items(),
            ("max_batch_size", max_batch_size),
            ("max_num_batched_tokens", max_num_batched_tokens),
        ):
            if value != _GPU_OPTIONS.get(option):
                name = {"sms": "sm", "kernels": "no-kernels"}.get(option, option.replace("_", "-"))
                raise TargetError(f"--{name} is for GPU targets, target {config.name} does not know it")
        if folder is None:
            raise TargetError(f"target {config.name} keeps the weights in the engine; pass --checkpoint FOLDER")
        _build_cpu(program, out, config, folder, max_model_len, taps, force, quiet, as_json, stages)
        return
    if taps and gpu["layers_per_engine"] is not None:
        raise TargetError("--taps shows the layers of one plan; leave out --layers-per-engine")
    limits = {
        "max_batch_size": max_batch_size,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    _build_gpu(program, out, config, folder, limits, gpu | {"taps": taps}, force, quiet, as_json, stages)


def _build_cpu(
    program: Path,
    out: Path,
    target: TargetConfig,
    checkpoint: Path,
    max_model_len: int | None,
    taps: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
    stages: Stages,
) -> None:
    from seekforge.exporter.build.engine import build as write_engine  # brings torch, which GPU builds do without

    built = write_engine(
        program,
        out,
        target=target,
        checkpoint_folder=checkpoint,
        max_model_len=max_model_len,
        force=force,
        progress=stages,
        taps=taps,
    )
    stages.done()
    if as_json:
        sys.stdout.write(json.dumps(_summary(built, out, stages.seconds)) + "\n")
    elif not quiet:
        sys.stdout.write(_sentence(built, out))


def _build_gpu(
    program: Path,
    out: Path,
    target: TargetConfig,
    checkpoint: Path | None,
    limits: dict[str, int | None],
    gpu: dict[str, Any],
    force: bool,
    quiet: bool,
    as_json: bool,
    stages: Stages,
) -> None:
    from seekforge.exporter.build.audit_page import show_audit
    from seekforge.exporter.build.compiler import Options
    from seekforge.exporter.build.gpu_checks import Choices, check, open_inputs
    from seekforge.exporter.build.gpu_engine import build_gpu

    target = with_options(target, limits, gpu)
    if gpu["timing_cache"] is not None and target.backend == "tensorrt-rtx":
        raise TargetError("--timing-cache is for tensorrt; tensorrt-rtx measures on the GPU that runs the engine")
    choices = Choices(
        plugins=gpu["plugins"] or "auto",
        allow_oversize=gpu["allow_oversize"],
        kernels=gpu["kernels"],
        layers_per_engine=gpu["layers_per_engine"],
        taps=gpu["taps"],
        compiler=Options(
            workspace_bytes=None if gpu["workspace"] is None else parse_size(gpu["workspace"]),
            optimization_level=gpu["builder_optimization_level"],
            timing_cache=gpu["timing_cache"],
        ),
    )
    stages("read program and check")
    inputs = open_inputs(program, checkpoint)
    planned = check(inputs, target, choices)
    if gpu["dry_run"]:
        stages.done()
        sys.stdout.write(_dry_run(inputs, planned, choices, out, as_json))
        return
    manifest = build_gpu(inputs, planned, out, choices=choices, force=force, progress=stages)
    stages.done()
    if as_json:
        sys.stdout.write(json.dumps(_gpu_summary(manifest, out, stages.seconds)) + "\n")
    elif not quiet:
        console = Console(highlight=False, width=None if Console().is_terminal else 110)
        console.print(f"wrote {out}: {manifest.target.name}")
        show_audit(manifest, console)
        console.print("self-check: none yet ('parity' writes it where the GPU is)")


def with_options(target: TargetConfig, limits: dict[str, int | None], gpu: dict[str, Any]) -> TargetConfig:
    """Return the target as the command line changes it, checked again.

    Raises:
        TargetError: the result is no valid target.
    """
    settings = [f"limits.{name}={value}" for name, value in limits.items() if value is not None]
    if gpu["precision"] is not None:
        settings.append(f"precision={gpu['precision']}")
    if gpu["kv_cache_dtype"] is not None:
        settings.append(f"kv_format={gpu['kv_cache_dtype']}")
    if gpu["sms"]:
        settings.append(f"also={[*target.also, *gpu['sms']]}")
    return target.changed(settings)


def parse_size(text: str) -> int:
    """Return bytes from `1073741824`, `512M` or `2GiB`.

    Raises:
        TargetError: not such a size.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]?)(?:I?B)?\s*", text.upper())
    if match is None or int(match[1]) == 0:
        raise TargetError(f"--workspace {text!r}: expected bytes such as 512M or 2G")
    return int(match[1]) * _SIZES[match[2]]


def _dry_run(inputs: Inputs, planned: Planned, choices: Choices, out: Path, as_json: bool) -> str:
    ops = {op: use.num_nodes for op, use in inputs.program.ops.items()}
    target = planned.target
    facts = {
        "path": str(out),
        "target": target.name,
        "sms": target.sms,
        "backend": target.backend,
        "products": target.products,
        "kv_cache_dtype": target.kv_format,
        "fp8_storage": planned.how.fp8_storage,
        "plugins": {op: ops[op] for op in planned.plugins},
        "inlined": {op: ops[op] for op in planned.inlined},
        "limits": planned.limits.model_dump(),
        "device_bytes": planned.device_bytes,
        "oversize": planned.oversize,
        "profiles": list(target.profiles),
    }
    if as_json:
        return json.dumps(facts) + "\n"
    total, usable = (planned.device_bytes[key] / _GIB for key in ("total", "usable"))
    plugins = ", ".join(f"{ops[op]} {op}" for op in planned.plugins) or "none"
    inlined = ", ".join(f"{ops[op]} {op}" for op in planned.inlined) or "none"
    return (
        f"would build {out} for {target.name} ({', '.join(f'sm{sm}' for sm in target.sms)}, {target.backend})\n"
        f"products {target.products}, caches {target.kv_format}, FP8 weights as {planned.how.fp8_storage}\n"
        f"plugins: {plugins}\ninlined: {inlined}\n"
        f"expected memory {total:.1f} GiB of {usable:.1f} GiB{' (oversize)' if planned.oversize else ''}\n"
    )


def _gpu_summary(manifest: Manifest, out: Path, seconds: dict[str, float]) -> dict[str, object]:
    assert manifest.audit is not None
    return {
        "path": str(out),
        "target": manifest.target.name,
        "sms": manifest.target.sms,
        "numerics": manifest.numerics["name"],
        "limits": manifest.limits.model_dump(),
        "self_check": None,
        "audit": manifest.audit.model_dump(mode="json"),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }


def _summary(built: Built, out: Path, seconds: dict[str, float]) -> dict[str, object]:
    check = built.manifest.self_check
    return {
        "path": str(out),
        "target": built.manifest.target.name,
        "numerics": built.manifest.numerics["name"],
        "num_nodes": built.num_nodes,
        "precision": built.manifest.build["precision"],
        "weight_bytes": built.weight_bytes,
        "max_model_len": built.manifest.limits.max_model_len,
        "self_check": None if check is None else {"tolerance": check.tolerance, "reason": check.reason},
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }


def _sentence(built: Built, out: Path) -> str:
    check = built.manifest.self_check
    nodes = " + ".join(str(count) for count in built.num_nodes.values())
    proof = "a part of a model: no self-check, and 'seekforge run' needs a whole one\n"
    if check is not None:
        proof = (
            f"self-check: {len(check.prompt_ids)} tokens, {len(check.rows)} rows equal to PyTorch within "
            f"{check.tolerance:.2g} logits\n"
            f'next: seekforge run {out} --prompt "Hello" --max-tokens 64 --greedy\n'
        )
    return (
        f"wrote {out}: target {built.manifest.target.name}, {nodes} nodes, "
        f"{built.weight_bytes / 1e6:.1f} MB of {built.manifest.build['precision']} weights\n{proof}"
    )
