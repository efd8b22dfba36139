"""Engines that TensorRT-RTX builds without a GPU: a row per program, form and SM. Layers, seconds, memory, plan size.

    python -m tests.benchmarks.builder                               # the table of docs/targets.md: everything, all SMs
    python -m tests.benchmarks.builder --programs layer --forms plugins --sms 89,120 --profiles all --json
    python -m tests.benchmarks.builder --programs full --forms plugins --sms 89 --layers-per-engine 61   # one plan
    python -m tests.benchmarks.builder --programs full,full-tp8-ep,full-tp8-pp2 --forms plugins --sms 89,120   # ranks

Programs are made here, from checkpoints without weights: `tiny` (4 layers and MTP), `layer` (one MoE layer of
DeepSeek-V3.2), `full` (all 61 layers and MTP), and `full` of several ranks: of eight that deal experts out, and of two
stages of eight. Forms: `plugins` (every operator a plugin, fp8_ds caches, FP8 products)
and `inlined` (none: bf16 caches, BF16 products). The full program is inlined only for --programs full --forms inlined.
CPU seconds are those of the compiling process, which other work on the machine does not change; peak memory is that
process's. Layers that are alike have one plan; `runs` is how often a step runs it. The row `build` is the whole of it:
layers of a step, seconds on the wall, CPU seconds of all processes, and the memory of the largest compilers that can
run at once. A build that is refused or fails is a row with the reason.
Kernels are compiled elsewhere and not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tests.support.build_options import gpu_options

from seekforge.common.cli.console import Stages
from seekforge.common.cores import usable_cores
from seekforge.common.errors import SeekforgeError
from seekforge.exporter.builder.tensorrt.build import build_gpu
from seekforge.exporter.builder.tensorrt.check import Inputs, check, open_inputs
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.sparse import new_sparse_checkpoint
from seekforge.exporter.program.export import export
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parallelism import ONE_RANK, Parallelism
from seekforge.formats.targets import RTX_SMS, TargetConfig, load_target

#: name -> preset, layers of the program (None: all of them), and its ranks.
PROGRAMS: Final[dict[str, tuple[str, tuple[int, int] | None, Parallelism]]] = {
    "tiny": ("tiny", None, ONE_RANK),
    "layer": ("full", (3, 4), ONE_RANK),
    "full": ("full", None, ONE_RANK),
    "full-tp8-ep": ("full", None, Parallelism(tp=8, ep=True)),
    "full-tp8-pp2": ("full", None, Parallelism(tp=8, pp=2)),
}
#: name -> settings of the target.
FORMS: Final[dict[str, tuple[str, ...]]] = {"plugins": (), "inlined": ("precision=bf16", "kv_format=bf16")}
PROFILES: Final = ("decode", "all")


@dataclass(frozen=True)
class Row:
    """One plan of one engine, or the whole build.

    Attributes:
        program, form, sm, profiles: what was built.
        graph: model or mtp, with its first layers if cut; build: the whole.
        runs: of the plan in one step. layers, plugin_layers: of TensorRT's network. seconds, cpu_seconds: of the
            compiler. peak_gib: its memory.
        plan_mb: size of the plan. fault: why there is none; the numbers are then 0.
    """

    program: str
    form: str
    sm: int
    profiles: str
    graph: str
    runs: int = 1
    layers: int = 0
    plugin_layers: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_gib: float = 0.0
    plan_mb: float = 0.0
    fault: str = ""


def make_program(name: str, root: Path) -> Inputs:
    """Write a checkpoint (once per preset) and export a program of it."""
    preset, layers, parallelism = PROGRAMS[name]
    checkpoint = root / f"{preset}-checkpoint"
    if not checkpoint.is_dir():
        (new_checkpoint if preset == "tiny" else new_sparse_checkpoint)(checkpoint, preset)
    folder = root / f"{name}-program"
    if not folder.is_dir():
        export(checkpoint, folder, numerics=NUMERICS["fp8"], layer_range=layers, parallelism=parallelism)
    return open_inputs(folder, checkpoint)


def target_of(form: str, sm: int, profiles: str) -> TargetConfig:
    """Return the target of a build: rtx4090 with another SM."""
    target = load_target("rtx4090", [f"sm={sm}", *FORMS[form]])
    if profiles == "decode":
        return target.model_copy(update={"profiles": {"decode": target.profiles["decode"]}})
    return target


def measure(
    inputs: Inputs, program: str, form: str, sm: int, profiles: str, layers_per_engine: int | None = None
) -> list[Row]:
    """Build one engine; returns a row per plan and one for all, or one with the reason why there is none."""
    target = target_of(form, sm, profiles)
    options = gpu_options(
        plugins="all" if form == "plugins" else "none",
        allow_oversize=True,
        kernels=False,
        layers_per_engine=layers_per_engine,
    )
    began, own_cpu = time.perf_counter(), time.process_time()
    try:
        planned = check(inputs, target, options)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "engine")
            manifest = build_gpu(inputs, planned, out, options=options, force=False, progress=Stages(quiet=True))
    except SeekforgeError as error:
        return [Row(program, form, sm, profiles, "model", fault=str(error))]
    seconds, own_cpu = time.perf_counter() - began, time.process_time() - own_cpu
    audit = manifest.audit
    assert audit is not None
    uses = manifest.uses()
    at_once = sorted(audit.build_peak_bytes.values(), reverse=True)[: usable_cores()]
    rows = [
        Row(
            program,
            form,
            sm,
            profiles,
            graph,
            runs=uses[f"{graph}.plan"],
            layers=sum(audit.layers[graph].values()),
            plugin_layers=audit.layers[graph].get("PLUGIN_V3", 0),
            seconds=round(audit.build_seconds[graph], 1),
            cpu_seconds=round(audit.build_cpu_seconds[graph], 1),
            peak_gib=round(audit.build_peak_bytes[graph] / (1 << 30), 2),
            plan_mb=round(audit.plan_bytes[graph] / 1e6, 1),
        )
        for graph in audit.plan_bytes
    ]
    whole = Row(
        program,
        form,
        sm,
        profiles,
        "build",
        runs=sum(row.runs for row in rows),
        layers=sum(row.runs * row.layers for row in rows),
        plugin_layers=sum(row.runs * row.plugin_layers for row in rows),
        seconds=round(seconds, 1),
        cpu_seconds=round(own_cpu + sum(audit.build_cpu_seconds.values()), 1),
        peak_gib=round(sum(at_once) / (1 << 30), 2),
        plan_mb=round(sum(audit.plan_bytes.values()) / 1e6, 1),
    )
    return [*rows, whole]


def wanted(programs: Sequence[str], forms: Sequence[str], sms: Sequence[int]) -> list[tuple[str, str, int]]:
    """Return (program, form, SM) in order; the full program is inlined only where nothing else is asked for."""
    alone = list(forms) == ["inlined"] and list(programs) == ["full"]
    return [
        (program, form, sm)
        for program in programs
        for form in forms
        for sm in sms
        if alone or form != "inlined" or not program.startswith("full")
    ]


def markdown(rows: Iterable[Row]) -> str:
    """Return the table."""
    header = ["program", "form", "SM", "profiles", "runs", "TensorRT layers", "plugin layers", "seconds", "CPU seconds"]
    lines = [[*header, "peak GiB", "plan MB"], ["---"] * (len(header) + 2)]
    for row in rows:
        name = row.program if row.graph == "model" else f"{row.program}, {row.graph}"
        head = [name, row.form, str(row.sm), row.profiles]
        if row.fault:
            lines.append([*head, f"not built: {row.fault}", *["–"] * 6])
            continue
        numbers = [
            str(row.runs),
            f"{row.layers:,}",
            f"{row.plugin_layers:,}",
            f"{row.seconds:.1f}",
            f"{row.cpu_seconds:.1f}",
        ]
        lines.append([*head, *numbers, f"{row.peak_gib:.2f}", f"{row.plan_mb:.1f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> int:
    """Parse arguments, export, measure, print each row as it comes, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default="tiny,layer,full", help=f"of {', '.join(PROGRAMS)}")
    parser.add_argument("--forms", default=",".join(FORMS), help="of plugins, inlined")
    parser.add_argument("--sms", default=",".join(map(str, RTX_SMS)))
    parser.add_argument("--profiles", choices=PROFILES, default="decode", help="decode alone, or all of the target")
    parser.add_argument("--layers-per-engine", type=int, help="most layers of one plan; 61: one plan for all")
    parser.add_argument("--folder", type=Path, help="keep checkpoints and programs here, and use those that are there")
    parser.add_argument("--json", action="store_true")
    found = parser.parse_args()
    programs, forms = found.programs.split(","), found.forms.split(",")
    unknown = [name for name in (*programs, *forms) if name not in PROGRAMS and name not in FORMS]
    if unknown:
        parser.error(f"{unknown[0]!r} is neither a program ({', '.join(PROGRAMS)}) nor a form ({', '.join(FORMS)})")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = found.folder or Path(temporary)
        for program, form, sm in wanted(programs, forms, [int(sm) for sm in found.sms.split(",")]):
            new = measure(make_program(program, root), program, form, sm, found.profiles, found.layers_per_engine)
            sys.stderr.write("".join(f"{row}\n" for row in new))
            rows += new
    sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) + "\n" if found.json else markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
