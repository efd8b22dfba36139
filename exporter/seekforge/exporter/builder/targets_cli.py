"""`seekforge targets`: what can be built for, and how each operator runs there."""

from __future__ import annotations

from dataclasses import fields

import click

from seekforge.common.cli.console import Column, Table, console
from seekforge.common.cli.options import command, json_option, list_option
from seekforge.common.cli.terminal import shown, write, write_json
from seekforge.exporter.option_types import TARGET
from seekforge.formats.targets import Gpu, TargetConfig, all_targets, load_target
from seekforge.plugins.kernels.contracts import limits, support
from seekforge.plugins.registry import WITH_KERNELS


@command("targets", examples=("seekforge targets", "seekforge targets --target h200,b200 --json"))
@list_option("--target", "names", type=TARGET, help="Only these: names, or YAML files.")
@click.option("--markdown", is_flag=True, help="Print the tables of docs/targets.md.")
@json_option
def targets(names: tuple[str, ...], *, markdown: bool, as_json: bool) -> None:
    """List targets with their hardware and defaults, and what each operator supports there."""
    configs = [load_target(name) for name in names] or all_targets()
    if as_json:
        listed = [
            target.model_dump(mode="json") | {"products": target.products, "ops": _ops(target)} for target in configs
        ]
        write_json(listed, indent=1)
    elif markdown:
        write(markdown_tables(configs))
    else:
        out = console()
        for title, header, rows in _tables(configs):
            numbers = {"SM", "GiB", "GB/s", "BF16", "FP8", "FP4", "SMs", "MHz", "link"}
            columns = [Column(name, "number" if name in numbers else "words") for name in header]
            table = Table(columns, title=title, lines=True)
            for row in rows:
                table.add(*row)
            out.print(table)


def _ops(target: TargetConfig) -> dict[str, str]:
    return {op: support(op, target.sm) for op in WITH_KERNELS}


def _tables(configs: list[TargetConfig]) -> list[tuple[str, list[str], list[list[str]]]]:
    hardware = [
        [
            target.name,
            target.title,
            "-" if target.sm is None else str(target.sm),
            target.backend,
            *_numbers(target),
            _precision(target),
            target.kv_format,
            f"{target.limits.max_batch_size} × {target.limits.max_model_len}, {target.limits.max_num_batched_tokens}",
        ]
        for target in configs
    ]
    header = ["name", "hardware", "SM", "backend", "GiB", "GB/s", "BF16", "FP8", "FP4", "SMs", "MHz", "link"]
    header += ["products", "cache"]
    ops = [[op, *(support(op, sm) for sm in _classes(configs).values())] for op in WITH_KERNELS]
    listed = [[limit.op, " and ".join(limit.forms), limit.key, limit.expected] for limit in limits()]
    return [
        (
            "Targets (rates: dense TFLOPS; link: GB/s from a GPU to the others of its server)",
            [*header, "batch × context, tokens per step"],
            hardware,
        ),
        ("Operators", ["operator", *_classes(configs)], ops),
        ("Limits", ["operator", "form", "key of config.json", "expected"], listed),
    ]


def _numbers(target: TargetConfig) -> list[str]:
    if target.gpu is None:
        return ["-"] * len(fields(Gpu))
    values = target.gpu.model_dump().values()
    return ["-" if value is None else f"{value:g}" for value in values]


def _precision(target: TargetConfig) -> str:
    weights_only = target.precision == "fp8" and target.products == "bf16"
    return "BF16 (FP8 weights)" if weights_only else target.products.upper()


def _classes(configs: list[TargetConfig]) -> dict[str, int | None]:
    """One column per kind of hardware: CPU, GPUs without and with FP8 units."""
    names = {"CPU": [t for t in configs if t.sm is None]}
    names["without FP8 (SM80)"] = [t for t in configs if t.sm is not None and not t.has_fp8]
    names["with FP8 (SM89 and later)"] = [t for t in configs if t.has_fp8]
    return {name: members[0].sm for name, members in names.items() if members}


def markdown_tables(configs: list[TargetConfig]) -> str:
    """Return the tables as Markdown; docs/targets.md holds them, and a test compares."""
    parts = []
    for title, header, rows in _tables(configs):
        parts += [f"### {title}", ""]
        parts += [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
        parts += [f"| {' | '.join(shown(cell).replace('|', '&#124;') for cell in row)} |" for row in rows] + [""]
    return "\n".join(parts)
