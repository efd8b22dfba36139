"""The report as tables in a terminal, made from its JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seekforge.common.cli.console import Column, Console, Table, styled


def number(value: Any) -> str:
    """Show a number shortly."""
    if value is None:
        return "—"
    if isinstance(value, str):
        return value
    return "0" if value == 0 else f"{value:.1e}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.3g}"


def print_terminal(out: Console, report: Mapping[str, Any], *, brief: bool = False) -> None:
    """Print the report as tables: verdict last, so that it is what one sees. `brief`: cases and verdict alone."""
    judged, reference = (report[side] for side in ("judged", "reference"))
    facts = [f" ({side['kind']}, {side['numerics']}, {side['activations']})" for side in (judged, reference)]
    out.print(
        styled((judged["name"], "bold"), f"{facts[0]} against ", (reference["name"], "bold"), facts[1]),
    )
    if not brief:
        out.print(_layers_table(report))
    if any("kl_mean" in case for case in report["cases"]):
        out.print(_cases_table(report))
    if report["sensitivity"]:
        out.print(_sensitivity_table(report))
    if not brief:
        out.print(_gates_table(report))
    for note in report["notes"]:
        out.print(styled(("note", "yellow"), f" {note}"))
    finding = report["finding"]
    if finding is not None:
        out.print(styled(("first divergence", "bold red"), f" layer {finding['layer']}: ", (finding["module"], "bold")))
        out.print(f"  {finding['text']}")
        if finding["tensors"]:
            out.print(f"  checkpoint: {', '.join(finding['tensors'][:6])}")
        if finding["others"]:
            out.print(
                styled((f"  {finding['others']} more operations are off by themselves; --json lists them", "dim"))
            )
    if brief:
        for word, mark in ((True, "passed gates"), (False, ("failed gates", "red"))):
            names = [gate["name"] for gate in report["gates"] if gate["gated"] and gate["passed"] is word]
            if names:
                out.print(styled(mark, f": {', '.join(names)}"))
    out.print(styled(("passed", "bold green") if report["passed"] else ("failed", "bold red")))


def _table(title: str, columns: Sequence[str], *, words: Sequence[str] = ()) -> Table:
    return Table([Column(name, "words" if name in words else "number") for name in columns], title=title)


def _layers_table(report: Mapping[str, Any]) -> Table:
    columns = ("layer", "stream error", "of PyTorch itself", "on its inputs", "worst operation", "keys", "experts")
    table = _table("layers", columns, words=("worst operation", "keys", "experts"))
    for layer in report["layers"]:
        worst = layer["worst_operation"]
        table.add(
            f"{layer['layer']}{' (MTP)' if layer['graph'] == 'mtp' else ''}",
            number(layer["stream"] and layer["stream"]["rms_relative"]),
            number(layer["noise"] and layer["noise"]["rms_relative"]),
            number(layer["on_reference_inputs"]),
            "—" if worst is None else f"{number(worst['error'])} {worst['module']}",
            _choice_text(layer["keys"]),
            _choice_text(layer["experts"]),
        )
    return table


def _cases_table(report: Mapping[str, Any]) -> Table:
    columns = ("case", "rows", "logits, median", "largest", "KL", "top-1", "top-10", "chose otherwise", "perplexity")
    table = _table("cases: difference of logits in parts of their spread", columns, words=("case", "perplexity"))
    for case in report["cases"]:
        if "kl_mean" not in case:
            continue
        change = case.get("perplexity_difference")
        table.add(
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


def _sensitivity_table(report: Mapping[str, Any]) -> Table:
    table = _table("what each layer costs alone", ("layer", "KL"))
    for row in sorted(report["sensitivity"], key=lambda row: -float(row["kl"])):
        table.add(str(row["layer"]), number(row["kl"]))
    return table


def _gates_table(report: Mapping[str, Any]) -> Table:
    names = ("", "gate", "found", "allowed", "reason")
    table = _table("gates", names, words=names)
    for gate in report["gates"]:
        mark = ("·", "dim") if not gate["gated"] else ("pass", "green") if gate["passed"] else ("FAIL", "red")
        table.add(mark, gate["name"], gate["value"], gate["allowed"], (gate["reason"], "dim"))
    return table


def _choice_text(choices: dict[str, Any] | None) -> str:
    if choices is None:
        return "—"
    if not choices["rows_other"]:
        return "same"
    kinds = ", ".join(f"{count} {kind}" for kind, count in choices["kinds"].items() if count)
    rows = choices["rows_other"]
    return f"{rows} {'row' if rows == 1 else 'rows'}: {kinds}"
