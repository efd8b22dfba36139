"""The report as tables in a terminal, made from its JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def number(value: Any) -> str:
    """Show a number shortly."""
    if value is None:
        return "—"
    if isinstance(value, str):
        return value
    return "0" if value == 0 else f"{value:.1e}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.3g}"


def print_terminal(console: Console, report: dict[str, Any], *, brief: bool = False) -> None:
    """Print the report as tables: verdict last, so that it is what one sees. `brief`: cases and verdict alone."""
    judged, reference = report["judged"], report["reference"]
    console.print(
        f"[bold]{escape(judged['name'])}[/] ({judged['kind']}, {judged['numerics']}, {judged['activations']}) against "
        f"[bold]{escape(reference['name'])}[/] ({reference['kind']}, {reference['numerics']}, "
        f"{reference['activations']})"
    )
    if not brief:
        console.print(_layers_table(report))
    if any("kl_mean" in case for case in report["cases"]):
        console.print(_cases_table(report))
    if report["sensitivity"]:
        console.print(_sensitivity_table(report))
    if not brief:
        console.print(_gates_table(report))
    for note in report["notes"]:
        console.print(f"[yellow]note[/] {escape(note)}")
    finding = report["finding"]
    if finding is not None:
        console.print(f"[bold red]first divergence[/] layer {finding['layer']}: [bold]{escape(finding['module'])}[/]")
        console.print(f"  {escape(finding['text'])}")
        if finding["tensors"]:
            console.print(f"  checkpoint: {escape(', '.join(finding['tensors'][:6]))}")
        if finding["others"]:
            console.print(f"  [dim]{finding['others']} more operations are off by themselves; --json lists them[/]")
    if brief:
        for word, mark in ((True, "passed gates"), (False, "[red]failed gates[/]")):
            names = [gate["name"] for gate in report["gates"] if gate["gated"] and gate["passed"] is word]
            if names:
                console.print(f"{mark}: {', '.join(names)}")
    console.print("[bold green]passed[/]" if report["passed"] else "[bold red]failed[/]")


def _table(title: str, columns: Sequence[str], *, left: Sequence[str] = (), always_left: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title=title)
    for name in columns:
        table.add_column(name, justify="left" if always_left or name in left else "right")
    return table


def _layers_table(report: dict[str, Any]) -> Table:
    columns = ("layer", "stream error", "of PyTorch itself", "on its inputs", "worst operation", "keys", "experts")
    table = _table("layers", columns, left=("worst operation",))
    for layer in report["layers"]:
        worst = layer["worst_operation"]
        table.add_row(
            f"{layer['layer']}{' (MTP)' if layer['graph'] == 'mtp' else ''}",
            number(layer["stream"] and layer["stream"]["rms_relative"]),
            number(layer["noise"] and layer["noise"]["rms_relative"]),
            number(layer["on_reference_inputs"]),
            "—" if worst is None else f"{number(worst['error'])} {worst['module']}",
            _choice_text(layer["keys"]),
            _choice_text(layer["experts"]),
        )
    return table


def _cases_table(report: dict[str, Any]) -> Table:
    columns = ("case", "rows", "logits, median", "largest", "KL", "top-1", "top-10", "chose otherwise", "perplexity")
    table = _table("cases: difference of logits in parts of their spread", columns, left=("case",))
    for case in report["cases"]:
        if "kl_mean" not in case:
            continue
        change = case.get("perplexity_difference")
        table.add_row(
            f"{case['name']}{' (MTP)' if case['graph'] == 'mtp' else ''}",
            str(case["rows"]),
            number(case["error_median"]),
            number(case["error_max"]),
            number(case["kl_mean"]),
            f"{case['top1']:.1%}",
            f"{case['top10']:.1%}",
            str(case["rows_flipped"]),
            "—" if change is None else f"{case['perplexity']:.1f} ({change:+.2g})",
        )
    return table


def _sensitivity_table(report: dict[str, Any]) -> Table:
    table = _table("what each layer costs alone", ("layer", "KL"))
    for row in sorted(report["sensitivity"], key=lambda row: -float(row["kl"])):
        table.add_row(str(row["layer"]), number(row["kl"]))
    return table


def _gates_table(report: dict[str, Any]) -> Table:
    table = _table("gates", ("", "gate", "found", "allowed", "reason"), always_left=True)
    for gate in report["gates"]:
        mark = "[dim]·[/]" if not gate["gated"] else "[green]pass[/]" if gate["passed"] else "[red]FAIL[/]"
        table.add_row(mark, gate["name"], gate["value"], gate["allowed"], f"[dim]{escape(gate['reason'])}[/]")
    return table


def _choice_text(choices: dict[str, Any] | None) -> str:
    if choices is None:
        return "—"
    if not choices["rows_other"]:
        return "same"
    kinds = ", ".join(f"{count} {kind}" for kind, count in choices["kinds"].items() if count)
    rows = choices["rows_other"]
    return f"{rows} {'row' if rows == 1 else 'rows'}: {kinds}"
