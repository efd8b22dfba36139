"""What compiled kernels cost, read from their code: a record per kernel, its faults, and a table.

Nothing here is estimated or written by hand: registers, stack and shared memory come from the cubin, instructions and
loops from its disassembly (`kernels/sass.py`), occupancy from the three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from seekforge.common.cli.console import Column, Table
from seekforge.common.cores import usable_cores
from seekforge.plugins.kernels import aot, rules
from seekforge.plugins.kernels.kernel_set import Image, KernelSet
from seekforge.plugins.kernels.launch_plan import Variant, op_kernels
from seekforge.plugins.kernels.sass import Code, Loop

#: One kernel for one SM, as JSON has it.
Record = dict[str, Any]


def records(sets: Sequence[KernelSet], store: Path, *, cache: Path, jobs: int | None = None) -> list[Record]:
    """Return one flat record per kernel.

    Args:
        sets: what `aot.build` returned.
        store: the folder that it wrote.
        cache: folder of what was read before.
        jobs: disassemblers at a time; None for one per core.

    Raises:
        TargetError: a cubin cannot be disassembled.
    """
    images = list(_images(sets))
    paths = {store / f"sm{kernels.sm}" / image.cubin for kernels, _, image in images}
    with ThreadPoolExecutor(jobs or usable_cores()) as pool:
        codes = dict(zip(paths, pool.map(lambda path: aot.read_code(path, cache=cache), paths), strict=True))
    return [
        _record(kernels, variant, image, codes[store / f"sm{kernels.sm}" / image.cubin])
        for kernels, variant, image in images
    ]


def _images(sets: Sequence[KernelSet]) -> Iterator[tuple[KernelSet, Variant, Image]]:
    for kernels in sets:
        variants = {
            one.name: one for one in op_kernels(kernels.op, kernels.provider).variants(kernels.statics, kernels.sm)
        }
        for image in kernels.images.values():
            yield kernels, variants[image.variant], image


def _record(kernels: KernelSet, variant: Variant, image: Image, code: Code) -> Record:
    used, loop = image.resources, code.loop
    return {
        "op": kernels.op,
        "sm": kernels.sm,
        "kernel": image.variant,
        "key": aot.image_key(kernels.op, variant, kernels.sm, compiler=kernels.compiler, provider=kernels.provider)[
            :16
        ],
        "warps": image.num_warps,
        "registers": used.registers,
        "spill_bytes": used.stack_bytes,
        "spill_stores": code.spill_stores,
        "spill_loads": code.spill_loads,
        "shared_bytes": used.shared_bytes,
        "occupancy": used.occupancy,
        "main_loop": image.main_loop,
        "instructions": code.instructions,
        "tensor": dict(code.tensor),
        "loop": loop and {"instructions": loop.instructions, "tensor": loop.tensor, "spills": loop.spills},
    }


def code_of(record: Mapping[str, Any]) -> Code:
    """Return the part of a record that was read from instructions."""
    loop = record["loop"] and Loop(**record["loop"])
    return Code(record["instructions"], record["tensor"], record["spill_stores"], record["spill_loads"], loop)


def faults(listed: Sequence[Mapping[str, Any]], variants: Mapping[tuple[str, int, str], Variant]) -> list[str]:
    """Return a line for each unknown spill and each lost tensor instruction among records.

    Args:
        listed: records of kernels.
        variants: (op, SM, name) -> what was compiled.
    """
    lines = []
    for one in listed:
        variant = variants[one["op"], one["sm"], one["kernel"]]
        stack = one["spill_bytes"]
        lines += rules.faults(one["op"], variant, one["sm"], stack_bytes=stack, code=code_of(one))
    return lines


def variants_of(sets: Sequence[KernelSet]) -> dict[tuple[str, int, str], Variant]:
    """Return (op, SM, name) -> what was compiled."""
    return {(kernels.op, kernels.sm, variant.name): variant for kernels, variant, _ in _images(sets)}


def resources_text(one: Mapping[str, Any]) -> str:
    """Return registers/stack bytes/KiB of shared memory/occupancy."""
    return f"{one['registers']}/{one['spill_bytes']}/{one['shared_bytes'] / 1024:.0f}/{one['occupancy']:.0%}"


def tensor_text(one: Mapping[str, Any]) -> str:
    """Return which tensor instruction, how many of how many in the main loop, and their share; nothing without any."""
    if not one["tensor"]:
        return ""
    names = " + ".join(".".join(name.split(".")[:2]) for name in one["tensor"])
    if one["loop"] is None:
        count = sum(one["tensor"].values())
        return f"{names} {count}/{one['instructions']} unrolled ({count / one['instructions']:.1%})"
    tensor, instructions = one["loop"]["tensor"], one["loop"]["instructions"]
    spills = f", {one['loop']['spills']} spills" if one["loop"]["spills"] else ""
    return f"{names} {tensor}/{instructions} ({tensor / instructions:.1%}{spills})"


def table(listed: Sequence[Mapping[str, Any]]) -> Table:
    """Return one row per kernel and SM: resources, tensor instructions of the main loop."""
    numbers = ("SM", "registers", "spills", "shared KiB", "occupancy")
    columns = [Column("operator"), Column("kernel"), *(Column(name, "number") for name in numbers)]
    result = Table([*columns, Column("tensor instructions of the main loop")], lines=True)
    for one in listed:
        result.add(
            one["op"],
            one["kernel"],
            str(one["sm"]),
            str(one["registers"]),
            f"{one['spill_bytes']} B" if one["spill_bytes"] else "",
            f"{one['shared_bytes'] / 1024:.0f}",
            f"{one['occupancy']:.0%}",
            tensor_text(one),
        )
    return result
