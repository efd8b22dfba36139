"""`seekforge build`: canonical program -> engine for one target."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seekforge.common.cli.console import Stages, console
from seekforge.common.cli.options import (
    ByteSize,
    Tokens,
    Whole,
    command,
    json_option,
    kv_cache_dtype_option,
    list_option,
    quiet_option,
)
from seekforge.common.cli.terminal import echo, write_json
from seekforge.common.errors import EnvironmentFault, TargetError
from seekforge.common.files import check_vacant
from seekforge.exporter.builder.request import fit_limits, read_graph, size_words
from seekforge.exporter.builder.tensorrt.audit_page import self_check_words
from seekforge.exporter.checkpoint.source import headers, parse_repo, resolve
from seekforge.exporter.option_types import TARGET
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import MANIFEST
from seekforge.formats.program import load_program
from seekforge.formats.targets import (
    CPU_PRECISIONS,
    GPU_PRECISIONS,
    RTX_SMS,
    TargetConfig,
    asked_limits,
    load_target,
)

if TYPE_CHECKING:
    from seekforge.exporter.builder.onnxruntime.build import Built
    from seekforge.exporter.builder.onnxruntime.build import Planned as CpuPlanned
    from seekforge.exporter.builder.tensorrt.check import Choices, Inputs, Planned
    from seekforge.formats.engine.manifest import Limits, Manifest

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
}


@command(
    "build",
    examples=(
        "seekforge build program engine --target cpu --checkpoint checkpoint",
        "seekforge build program engine --target h200 --checkpoint checkpoint --max-model-len 64K",
        "seekforge build program engine --target rtx4090 --sm 120 --dry-run",
    ),
)
@click.argument("program", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", type=TARGET, required=True, help="A name of 'seekforge targets', or the path of a YAML file.")
@click.option("--set", "settings", multiple=True, metavar="A.B=C", help="Change a key of the target.")
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
    type=click.Choice(["f32", "int8", "int4", "bf16", "fp8"]),
    default=None,
    help="cpu: of the weights, f32, int8 or int4; GPU: of products of FP8 weights, bf16 or fp8.",
)
@kv_cache_dtype_option("GPU: format of the caches.")
@list_option("--sm", "sms", type=Whole(1), help="tensorrt-rtx: other SMs that the plan shall run on.")
@click.option(
    "--plugins",
    type=click.Choice(["auto", "all", "none"]),
    default=None,
    help="GPU: operators as plugins: all, none (inlined), or auto: all that the model's sizes allow.  [default: auto]",
)
@click.option(
    "--workspace",
    type=ByteSize(),
    help="GPU: most scratch memory of one layer, such as 4G; with less than one needs the build fails.  "
    "[default: the library's]",
)
@click.option(
    "--timing-cache", type=click.Path(path_type=Path), default=None, help="tensorrt: file of measured tactics."
)
@click.option("--builder-optimization-level", type=Whole(0, 5), help="GPU: the library's.")
@click.option(
    "--layers-per-engine",
    type=Whole(1),
    help="GPU: most layers of one plan; layers that are alike share one.  [default: 1, with --taps all]",
)
@click.option(
    "--kernels/--no-kernels",
    default=True,
    help="GPU: compile the plugins' kernels; an engine without can be looked at, not run.  [default: kernels]",
)
@click.option("--allow-oversize", is_flag=True, help="GPU: build what does not fit; it is marked and does not load.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be built, build nothing.")
@click.option("--taps", is_flag=True, help="Let the engine show the tensors inside each layer, for 'parity'.")
@click.option("--force", is_flag=True, help="Replace an engine that stands at OUT.")
@quiet_option
@json_option
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
    precision: str | None,
    dry_run: bool,
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
    stages = Stages(quiet=quiet or as_json)
    limits = {
        "max_batch_size": max_batch_size,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    config = with_options(config, limits, precision)
    asked = asked_limits(settings) | {name for name, value in limits.items() if value is not None}
    if config.backend == "onnxruntime":
        for option, value in gpu.items():
            if value != _GPU_OPTIONS[option]:
                name = {"sms": "sm", "kernels": "no-kernels"}.get(option, option.replace("_", "-"))
                raise TargetError(f"--{name} is for GPU targets, target {config.name} does not know it")
        if checkpoint is None:
            raise TargetError(f"target {config.name} keeps the weights in the engine; pass --checkpoint FOLDER")
        _look_at(program)
        if dry_run:
            _check_cpu(program, out, config, checkpoint, asked, force, quiet, as_json, stages)
        else:
            folder = _with_weights(program, out, config, checkpoint, asked, force, quiet or as_json, stages)
            _build_cpu(program, out, config, folder, asked, taps, force, quiet, as_json, stages)
        return
    if taps and gpu["layers_per_engine"] is not None:
        raise TargetError("--taps shows the layers of one plan; leave out --layers-per-engine")
    gpu |= {"taps": taps, "dry_run": dry_run}
    _build_gpu(program, out, config, checkpoint, asked, gpu, force, quiet, as_json, stages)


def _look_at(program: Path) -> None:
    """Say what is odd in a program before torch is imported, which takes seconds."""
    for face in load_program(program).graphs.values():
        read_graph(program, face)


def _with_weights(
    program: Path,
    out: Path,
    target: TargetConfig,
    checkpoint: str,
    asked: Collection[str],
    force: bool,
    quiet: bool,
    stages: Stages,
) -> Path:
    """Return the folder with the weights; a repository is downloaded once its headers say that it can be built."""
    if parse_repo(checkpoint) is not None:
        from seekforge.exporter.builder.onnxruntime.build import check  # brings torch, which GPU builds do without

        with headers(checkpoint, say=stages) as folder:
            check(program, out, target=target, checkpoint_folder=folder, asked=asked)
        check_vacant(out, force=force, marker=MANIFEST)
        stages(f"download {checkpoint}")
    return resolve(checkpoint, quiet=quiet)


def _check_cpu(
    program: Path,
    out: Path,
    target: TargetConfig,
    checkpoint: str,
    asked: Collection[str],
    force: bool,
    quiet: bool,
    as_json: bool,
    stages: Stages,
) -> None:
    from seekforge.exporter.builder.onnxruntime.build import check  # brings torch, which GPU builds do without

    stages("read program and checkpoint")
    with headers(checkpoint, say=stages) as folder:
        planned = check(program, out, target=target, checkpoint_folder=folder, asked=asked)
    check_vacant(out, force=force, marker=MANIFEST)
    stages.done()
    _cpu_dry_run(planned, target, out, as_json, quiet)


def _build_cpu(
    program: Path,
    out: Path,
    target: TargetConfig,
    checkpoint: Path,
    asked: Collection[str],
    taps: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
    stages: Stages,
) -> None:
    ModelConfig.load(checkpoint)
    from seekforge.exporter.builder.onnxruntime.build import (
        build as write_engine,  # brings torch, which GPU builds do without
    )

    built = write_engine(
        program,
        out,
        target=target,
        checkpoint_folder=checkpoint,
        max_model_len=None,
        force=force,
        progress=stages,
        taps=taps,
        asked=asked,
    )
    stages.done()
    if as_json:
        write_json(_summary(built, out, stages.seconds))
    elif not quiet:
        _say(_sentences(built, out))


def _build_gpu(
    program: Path,
    out: Path,
    target: TargetConfig,
    checkpoint: str | None,
    asked: Collection[str],
    gpu: dict[str, Any],
    force: bool,
    quiet: bool,
    as_json: bool,
    stages: Stages,
) -> None:
    from seekforge.exporter.builder.tensorrt.audit_page import show_audit
    from seekforge.exporter.builder.tensorrt.build import build_gpu
    from seekforge.exporter.builder.tensorrt.check import Choices, check
    from seekforge.exporter.builder.tensorrt.compiler import Options

    target = _with_gpu_options(target, gpu)
    if gpu["timing_cache"] is not None and target.backend == "tensorrt-rtx":
        raise TargetError("--timing-cache is for tensorrt; tensorrt-rtx measures on the GPU that runs the engine")
    choices = Choices(
        plugins=gpu["plugins"] or "auto",
        allow_oversize=gpu["allow_oversize"],
        kernels=gpu["kernels"],
        layers_per_engine=gpu["layers_per_engine"],
        taps=gpu["taps"],
        compiler=Options(
            workspace_bytes=gpu["workspace"],
            optimization_level=gpu["builder_optimization_level"],
            timing_cache=gpu["timing_cache"],
        ),
    )
    stages("read program and check")
    inputs = _open_inputs(program, checkpoint, stages)
    target = target.model_copy(update={"limits": fit_limits(target.limits, inputs.config, asked)})
    planned = check(inputs, target, choices)
    if gpu["dry_run"]:
        check_vacant(out, force=force, marker=MANIFEST)
        missing = _missing_here(inputs, planned, choices)
        stages.done()
        _dry_run(inputs, planned, missing, out, as_json, quiet)
        return
    manifest = build_gpu(inputs, planned, out, choices=choices, force=force, progress=stages)
    stages.done()
    if as_json:
        write_json(_gpu_summary(manifest, out, stages.seconds))
    elif not quiet:
        shown = console()
        shown.print(f"wrote {out}: {manifest.target.name}")
        show_audit(manifest, shown)
        shown.print(f"self-check: {self_check_words(manifest)}")


def _open_inputs(program: Path, checkpoint: str | None, stages: Stages) -> Inputs:
    """Open a program and the headers of its checkpoint; where a repository is kept is not remembered."""
    from seekforge.exporter.builder.tensorrt.check import open_inputs

    if checkpoint is None:
        return open_inputs(program, None)
    with headers(checkpoint, say=stages) as folder:
        inputs = open_inputs(program, folder)
    if parse_repo(checkpoint) is None:
        return inputs
    return replace(inputs, weights=inputs.weights.model_copy(update={"path": None}))


def with_options(target: TargetConfig, limits: Mapping[str, int | None], precision: str | None) -> TargetConfig:
    """Return the target as the options change it that all targets know, checked again.

    Raises:
        TargetError: the target does not take one.
    """
    settings = [f"limits.{name}={value}" for name, value in limits.items() if value is not None]
    if precision is not None:
        on_cpu = target.backend == "onnxruntime"
        if on_cpu and precision not in CPU_PRECISIONS:
            raise TargetError(f"--precision {precision} is for GPUs; a CPU knows {', '.join(CPU_PRECISIONS)}")
        if not on_cpu and precision not in GPU_PRECISIONS:
            known = " or ".join(GPU_PRECISIONS)
            raise TargetError(f"--precision {precision} is for CPUs; target {target.name} takes {known}")
        settings.append(f"precision={precision}")
    return target.changed(settings)


def _with_gpu_options(target: TargetConfig, gpu: Mapping[str, Any]) -> TargetConfig:
    settings = []
    if gpu["kv_cache_dtype"] is not None:
        settings.append(f"kv_format={gpu['kv_cache_dtype']}")
    if gpu["sms"]:
        if target.backend == "tensorrt":
            raise TargetError(
                f"--sm {gpu['sms'][0]} is for tensorrt-rtx; target {target.name} is built by TensorRT, whose "
                f"plans run on one SM, here sm{target.sm}: pass the target of the other GPU "
                "('seekforge targets' lists them)"
            )
        wrong = next((sm for sm in gpu["sms"] if sm not in RTX_SMS), None)
        if wrong is not None:
            known = ", ".join(map(str, RTX_SMS))
            raise TargetError(f"--sm {wrong} is not one that tensorrt-rtx compiles for ({known})")
        settings.append(f"also={[*target.also, *gpu['sms']]}")
    return target.changed(settings)


def _missing_here(inputs: Inputs, planned: Planned, choices: Choices) -> list[str]:
    """Return what this machine lacks for a build, one sentence each. A plan may be made where the build is not.

    Raises:
        ShapeError: there are no kernels for the model's sizes, on no machine.
    """
    from seekforge.exporter.builder.tensorrt.kernels import kernel_tasks
    from seekforge.plugins.tensorrt.library import load

    target = planned.target
    assert target.backend != "onnxruntime" and target.sm is not None
    missing = []
    try:
        load(target.backend)
    except EnvironmentFault as error:
        missing.append(str(error))
    if target.backend == "tensorrt" and target.sm not in _sms_here():
        missing.append(f"no GPU of sm{target.sm} here; TensorRT measures on the GPU that it builds for")
    if choices.kernels:
        try:
            kernel_tasks(inputs.program, inputs.config, target, planned.plugins)
        except EnvironmentFault as error:
            missing.append(str(error))
    return missing


def _sms_here() -> list[int]:
    """Ask nvidia-smi for the SMs of the GPUs here; none where there is no answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    question = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line.replace(".", "")) for line in answer.split() if line.replace(".", "").isdigit()]


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        echo(line)


def _steps(limits: Limits) -> str:
    return (
        f"sequences of up to {limits.max_model_len:,} tokens, steps of up to {limits.max_batch_size:,} sequences and "
        f"{limits.max_num_batched_tokens:,} tokens"
    )


def _cpu_dry_run(planned: CpuPlanned, target: TargetConfig, out: Path, as_json: bool, quiet: bool) -> None:
    facts = {
        "path": str(out),
        "target": target.name,
        "backend": target.backend,
        "precision": target.precision,
        "layers": planned.program.layer_range,
        "limits": planned.limits.model_dump(),
        "weight_bytes": planned.weight_bytes,
        "disk_free_bytes": planned.free_bytes,
        "warning": planned.warning or None,
    }
    if as_json:
        write_json(facts)
    elif not quiet:
        _say(
            [
                f"would build {out} for {target.name} ({target.backend})",
                f"{target.formats}; {_steps(planned.limits)}",
                f"expected {size_words(planned.weight_bytes)} of weights, "
                f"{size_words(planned.free_bytes)} free on the disk",
                *([planned.warning] if planned.warning else []),
            ]
        )


def _dry_run(inputs: Inputs, planned: Planned, missing: list[str], out: Path, as_json: bool, quiet: bool) -> None:
    ops = inputs.ops
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
        "missing": missing,
    }
    if as_json:
        write_json(facts)
    if as_json or quiet:
        return
    total, usable = (planned.device_bytes[key] / _GIB for key in ("total", "usable"))
    plugins = ", ".join(f"{ops[op]} {op}" for op in planned.plugins) or "none"
    inlined = ", ".join(f"{ops[op]} {op}" for op in planned.inlined) or "none"
    _say(
        [
            f"would build {out} for {target.name} ({', '.join(f'sm{sm}' for sm in target.sms)}, {target.backend})",
            f"{target.formats}, caches {target.kv_format}; {_steps(planned.limits)}",
            f"plugins: {plugins}",
            f"inlined: {inlined}",
            f"expected memory {total:.1f} GiB of {usable:.1f} GiB{' (oversize)' if planned.oversize else ''}",
            *(f"not on this machine: {one}" for one in missing),
        ]
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


def _sentences(built: Built, out: Path) -> list[str]:
    check = built.manifest.self_check
    nodes = " + ".join(str(count) for count in built.num_nodes.values())
    proof = [f"self-check: {self_check_words(built.manifest)}"]
    if check is not None:
        proof = [
            f"self-check: {len(check.prompt_ids)} tokens, {len(check.rows)} rows equal to PyTorch within "
            f"{check.tolerance:.2g} logits",
            f'next: seekforge run {out} --prompt "Hello" --max-tokens 64 --greedy',
        ]
    return [
        f"wrote {out}: target {built.manifest.target.name}, {nodes} nodes, "
        f"{built.weight_bytes / 1e6:.1f} MB of {built.manifest.build['precision']} weights",
        *proof,
    ]
