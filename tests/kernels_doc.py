"""Write the tables of docs/kernels.md: what is supported, from the operators' contracts, and what each kernel costs.

seekforge kernels build OUT --json > docs/kernel-resources.json     after a change of a kernel, a tile or the compiler
python tests/kernels_doc.py                                         after that, or after a change of a contract
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from seekforge.exporter.build.kernels_cli import records
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.plugins import aot
from seekforge.plugins.kernel_rules import KNOWN_SPILLS
from seekforge.plugins.kernel_sizes import WITH_KERNELS, operators
from seekforge.plugins.launch import SMS, has_fp8, is_datacentre, op_kernels

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESOURCES = DOCS / "kernel-resources.json"
_BEGIN, _END = "<!-- begin {} -->", "<!-- end {} -->"


def recorded() -> list[dict[str, Any]]:
    """Return the checked-in record of every kernel."""
    return json.loads(RESOURCES.read_text(encoding="utf-8"))["kernels"]


def contracts() -> str:
    """Return the table of what kernels take."""
    rows = ["| operator | kernels take |", "|---|---|"]
    for op in WITH_KERNELS:
        module = op_kernels(op)
        rows.append(f"| `{op}` | {'; '.join([*map(str, module.RULES), *module.NOTES])} |")
    rows += ["", "| SM | FP8 weights | products |", "|---|---|---|"]
    for sm in SMS:
        products = "FP8, f32 promotion per 128" if has_fp8(sm) else "BF16, after widening bytes"
        unit = "wgmma / tcgen05" if is_datacentre(sm) else "mma.sync"
        rows.append(
            f"| {sm} | {'float8 or INT8-typed bytes' if has_fp8(sm) else 'INT8-typed bytes'} | {products} ({unit}) |"
        )
    return "\n".join(rows)


def resources() -> str:
    """Return the table of registers / bytes of stack / KiB of shared memory / occupancy."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for one in recorded():
        text = f"{one['registers']}/{one['spill_bytes']}/{one['shared_bytes'] / 1024:.0f}/{one['occupancy']:.0%}"
        cells.setdefault((one["op"], one["kernel"]), {})[one["sm"]] = text
    rows = ["| operator | kernel | " + " | ".join(f"sm{sm}" for sm in SMS) + " |", "|---|---|" + "---|" * len(SMS)]
    for (op, kernel), by_sm in cells.items():
        rows.append(f"| {op} | {kernel} | " + " | ".join(by_sm.get(sm, "–") for sm in SMS) + " |")
    rows += ["", "Known stacks of kernels with a main loop:", ""]
    for (op, kernel, sm), (size, reason) in KNOWN_SPILLS.items():
        rows.append(f"* {op} {kernel} sm{sm}: {size} bytes; {reason}.")
    return "\n".join(rows)


def updated(text: str) -> str:
    """Return a page with its tables replaced."""
    for name, table in (("contracts", contracts()), ("resources", resources())):
        head, _, rest = text.partition(_BEGIN.format(name))
        _, found, tail = rest.partition(_END.format(name))
        if not found:
            raise SystemExit(f"docs/kernels.md has no {_BEGIN.format(name)} ... {_END.format(name)}")
        text = f"{head}{_BEGIN.format(name)}\n{table}\n{_END.format(name)}{tail}"
    return text


def record() -> None:
    """Compile every kernel of the full model for every SM and write the record: one line per kernel."""
    work = aot.tasks(operators(load_preset("full").config), SMS)
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps(one) for one in records(aot.build(work, Path(folder), cache=aot.default_cache()))]
    text = f'{{"compiler": {json.dumps(aot.compiler())}, "kernels": [\n' + ",\n".join(lines) + "\n]}\n"
    RESOURCES.write_text(text, encoding="utf-8")


def main() -> int:
    if sys.argv[1:] == ["--compile"]:
        record()
    page = DOCS / "kernels.md"
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
