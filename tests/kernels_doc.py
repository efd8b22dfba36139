"""Write docs/kernel-resources.json, what kernels cost by their compiled code, and the tables of docs/kernels.md.

python -m tests.kernels_doc --compile         after a change of a kernel, a tile or the compiler: record and page
python -m tests.kernels_doc --compile OP...   the same where only these operators changed
python -m tests.kernels_doc                   after a change of a contract: the page alone

What the cache of compiled kernels has is not compiled again.

Ends with exit code 1 when a kernel spills that should not, or lost its tensor instruction.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from seekforge.exporter.builder.kernel_numbers import Record, faults, records, resources_text
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.formats.targets import NVFP4_SM
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.launch_plan import Variant, op_kernels, statics_of
from seekforge.plugins.kernels.rules import KNOWN_MMA_SYNC, KNOWN_SPILLS, tensor_unit
from seekforge.plugins.kernels.sizes import operators
from seekforge.plugins.kernels.sm_limits import SMS, has_fp8
from seekforge.plugins.registry import WITH_KERNELS

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESOURCES = DOCS / "kernel-resources.json"
_BEGIN, _END = "<!-- begin {} -->", "<!-- end {} -->"


def read_record() -> dict[str, Any]:
    """Return the checked-in file: `compiler` and `kernels`."""
    return json.loads(RESOURCES.read_text(encoding="utf-8"))


def recorded() -> list[Record]:
    """Return the checked-in record of every kernel."""
    return read_record()["kernels"]


def forms() -> list[tuple[dict[str, dict[str, Any]], tuple[int, ...]]]:
    """Return op_type -> sizes of the full model, and the SMs that take them: with FP8 weights, and with NVFP4 ones."""
    config = load_preset("full").config
    sizes, nvfp4 = operators(config), operators(config, nvfp4_experts=True)
    changed = {op: bound for op, bound in nvfp4.items() if bound != sizes[op]}
    return [(sizes, SMS), (changed, tuple(sm for sm in SMS if sm >= NVFP4_SM))]


def variants() -> dict[tuple[str, int, str], Variant]:
    """Return (op, SM, name) -> every kernel that the full model needs, as its sources are now."""
    return {
        (op, sm, variant.name): variant
        for sizes, sms in forms()
        for op, bound in sizes.items()
        for sm in sms
        for variant in op_kernels(op).variants(statics_of(op, bound), sm)
    }


def contracts() -> str:
    """Return the table of what kernels take."""
    rows = ["| operator | kernels take |", "|---|---|"]
    for op in WITH_KERNELS:
        module = op_kernels(op)
        rows.append(f"| `{op}` | {'; '.join([*map(str, module.RULES), *module.NOTES])} |")
    rows += ["", "| SM | FP8 weights | products |", "|---|---|---|"]
    for sm in SMS:
        products = "FP8, f32 promotion per 128" if has_fp8(sm) else "BF16, after widening bytes"
        taken = "float8 or INT8-typed bytes" if has_fp8(sm) else "INT8-typed bytes"
        rows.append(f"| {sm} | {taken} | {products} ({tensor_unit(sm)}) |")
    return "\n".join(rows)


def resources() -> str:
    """Return the table of registers / bytes of stack / KiB of shared memory / occupancy."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for one in recorded():
        cells.setdefault((one["op"], one["kernel"]), {})[one["sm"]] = resources_text(one)
    rows = ["| operator | kernel | " + " | ".join(f"sm{sm}" for sm in SMS) + " |", "|---|---|" + "---|" * len(SMS)]
    for (op, kernel), by_sm in cells.items():
        rows.append(f"| {op} | {kernel} | " + " | ".join(by_sm.get(sm, "–") for sm in SMS) + " |")
    rows += ["", "Known stacks:", ""]
    stores = {(one["op"], one["kernel"], one["sm"]): one for one in recorded()}
    for key, (size, reason) in KNOWN_SPILLS.items():
        one = stores[key]
        loop = one["loop"]["spills"] if one["loop"] else 0
        counts = f"stores {one['spill_stores']}, loads {one['spill_loads']}, {loop} of both in the main loop"
        rows.append(f"* {key[0]} {key[1]} sm{key[2]}: {size} bytes, {counts}; {reason}.")
    return "\n".join(rows)


def tensor() -> str:
    """Return the table of tensor instructions: one row for all SMs that have the same."""
    rows = ["| operator | kernel | SM | tensor instructions | in the main loop | share |", "|---|---|---|---|---|---|"]
    cells: dict[tuple[str, str, str], list[str]] = {}
    for one in recorded():
        if one["tensor"]:
            cells.setdefault((one["op"], one["kernel"], _tensor_cells(one)), []).append(str(one["sm"]))
    for (op, kernel, text), sms in cells.items():
        rows.append(f"| {op} | {kernel} | {', '.join(sms)} | {text} |")
    rows += ["", "Kernels that use mma.sync where there is wgmma or tcgen05:", ""]
    known: dict[tuple[str, str], dict[str, list[int]]] = {}
    for (op, kernel, sm), reason in KNOWN_MMA_SYNC.items():
        known.setdefault((op, reason), {}).setdefault(kernel, []).append(sm)
    for (op, reason), kernels in known.items():
        alike: dict[str, list[str]] = {}
        for kernel, sms in kernels.items():
            alike.setdefault(", ".join(f"sm{sm}" for sm in sms), []).append(kernel)
        places = "; ".join(f"{', '.join(names)} on {sms}" for sms, names in alike.items())
        rows.append(f"* {op} {places}: {reason}.")
    return "\n".join(rows)


def _tensor_cells(one: Record) -> str:
    names = ", ".join(f"{count} {name}" for name, count in one["tensor"].items())
    if one["loop"] is None:
        count = sum(one["tensor"].values())
        return (
            f"{names} | no loop left: {count} of the kernel's {one['instructions']} | {count / one['instructions']:.1%}"
        )
    count, of = one["loop"]["tensor"], one["loop"]["instructions"]
    return f"{names} | {count} of {of} | {count / of:.1%}"


def updated(text: str) -> str:
    """Return a page with its tables replaced."""
    for name, table in (("contracts", contracts()), ("resources", resources()), ("tensor", tensor())):
        head, _, rest = text.partition(_BEGIN.format(name))
        _, found, tail = rest.partition(_END.format(name))
        if not found:
            raise SystemExit(f"docs/kernels.md has no {_BEGIN.format(name)} ... {_END.format(name)}")
        text = f"{head}{_BEGIN.format(name)}\n{table}\n{_END.format(name)}{tail}"
    return text


def compiled(ops: Collection[str] = ()) -> list[Record]:
    """Compile kernels of the full model for every SM, or take them from the cache, and return what the code says.

    Args:
        ops: the operators; none: all.
    """
    cache = aot.default_cache()
    listed: dict[tuple[str, int, str], Record] = {}
    for sizes, sms in forms():
        tasks = aot.tasks({op: bound for op, bound in sizes.items() if not ops or op in ops}, sms)
        with tempfile.TemporaryDirectory() as folder:
            sets = aot.build(tasks, Path(folder), cache=cache)
            made = records(sets, Path(folder), cache=cache)
        listed |= {(one["op"], one["sm"], one["kernel"]): one for one in made}
    return list(listed.values())


def renewed(ops: Collection[str]) -> list[Record]:
    """Return the record with these operators' kernels compiled now, and the others' as it has them."""
    if not ops:
        return compiled()
    known = read_record()
    if unknown := set(ops) - {one["op"] for one in known["kernels"]}:
        raise SystemExit(f"no kernels of {', '.join(sorted(unknown))} are recorded")
    if known["compiler"] != aot.compiler():
        raise SystemExit(f"the record is of {known['compiler']}, here is {aot.compiler()}; compile all")
    found = compiled(ops)
    by_op = {one["op"]: [new for new in found if new["op"] == one["op"]] for one in found}
    kept: dict[str, list[Record]] = {}
    for one in known["kernels"]:
        kept.setdefault(one["op"], []).append(one)
    return [one for op, listed in kept.items() for one in by_op.get(op, listed)]


def main() -> int:
    if sys.argv[1:2] == ["--compile"]:
        lines = [json.dumps(one) for one in renewed(sys.argv[2:])]
        text = f'{{"compiler": {json.dumps(aot.compiler())}, "kernels": [\n' + ",\n".join(lines) + "\n]}\n"
        RESOURCES.write_text(text, encoding="utf-8")
    page = DOCS / "kernels.md"
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
    found = faults(recorded(), variants())
    for line in found:
        print(f"slow: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
