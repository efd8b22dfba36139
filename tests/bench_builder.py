"""How long builds take and how much memory: a table of one row per program, target and set of profiles.

    python tests/bench_builder.py CHECKPOINT [--num-layers N | --layers A-B] [--targets rtx4090,sm120] [--json]

A target may be an SM of TensorRT-RTX (sm80, sm86, sm89, sm120, sm121): then it is rtx4090 with that SM.

CHECKPOINT may be sparse ('seekforge new-checkpoint --preset full --sparse'): only its headers are read. Each build runs
with every operator as a plugin, with the target's profiles and with decode shapes alone. CPU seconds are those of the
compiling process, which other work on the machine does not change; peak memory is that process's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from seekforge.exporter.build.gpu_checks import Choices, check, open_inputs
from seekforge.exporter.build.gpu_engine import build_gpu
from seekforge.exporter.build.targets import load_target
from seekforge.exporter.progress import Stages
from seekforge.exporter.rewrite.export import export
from seekforge.exporter.rewrite.layers import parse_layers
from seekforge.plugins.formats.numerics import NUMERICS


def measure(checkpoint: Path, program: Path, targets: list[str], *, decode_only: bool) -> list[dict[str, object]]:
    """Build `program` for each target; returns one row per build and graph."""
    inputs = open_inputs(program, checkpoint)
    rows = []
    for name in targets:
        whole = load_target("rtx4090", [f"sm={name[2:]}"]) if name.startswith("sm") else load_target(name)
        alone = whole.model_copy(update={"profiles": {"decode": whole.profiles["decode"]}})
        variants = {"decode": alone} if decode_only else {"decode and prefill": whole, "decode": alone}
        for label, target in variants.items():
            choices = Choices(plugins="all", allow_oversize=True)
            planned = replace(check(inputs, whole, choices), target=target)
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "engine")
                manifest = build_gpu(inputs, planned, out, choices=choices, force=False, progress=Stages(quiet=True))
            audit = manifest.audit
            assert audit is not None
            for graph in audit.plan_bytes:
                rows.append(
                    {
                        "target": name,
                        "profiles": label,
                        "graph": graph,
                        "layers": sum(audit.layers[graph].values()),
                        "plugin layers": audit.layers[graph]["PLUGIN_V3"],
                        "seconds": round(audit.build_seconds[graph], 1),
                        "CPU seconds": round(audit.build_cpu_seconds[graph], 1),
                        "peak GiB": round(audit.build_peak_bytes[graph] / (1 << 30), 2),
                        "plan MB": round(audit.plan_bytes[graph] / 1e6, 1),
                    }
                )
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), file=sys.stderr)
    return rows


def main() -> int:
    """Parse arguments, export once, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--program", type=Path, help="an exported program of it; else it is exported")
    parser.add_argument("--num-layers", type=int, default=None, help="of a truncated model")
    parser.add_argument("--layers", default=None, help="a stage, as in 'seekforge export'")
    parser.add_argument("--decode-only", action="store_true", help="leave out the builds with both profiles")
    parser.add_argument("--targets", default="rtx4090,rtx5090")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = arguments.program or Path(folder, "program")
        if arguments.program is None:
            export(
                arguments.checkpoint,
                program,
                numerics=NUMERICS["fp8"],
                num_layers=arguments.num_layers,
                layer_range=None if arguments.layers is None else parse_layers(arguments.layers),
            )
        targets = arguments.targets.split(",")
        rows = measure(arguments.checkpoint, program, targets, decode_only=arguments.decode_only)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(map(str, row.values())) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
