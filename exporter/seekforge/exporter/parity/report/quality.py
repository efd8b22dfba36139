"""The table of `parity --quality` in a terminal and as a page, made from its JSON values.

Likelihoods are shown as perplexities, with the change of the mean log-likelihood to that of the exact PyTorch model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.filesize import decimal

from seekforge.common.cli.console import Column, Console, Table, styled
from seekforge.exporter.parity.report.html import page, piece
from seekforge.exporter.parity.report.svg import plain_table
from seekforge.formats.quality import TaskQuality

_WORDS = ("", "weights", "cache/token")


def columns(report: Mapping[str, Any]) -> list[str]:
    """Return the heads of the table's columns."""
    tasks = [one["task"] if one["score"] is not None else f"{one['task']} ppl" for one in report["entries"][0]["tasks"]]
    return ["", *tasks, "drafts", "tok/step", "drafts, speed", "recall", "weights", "cache/token", "decode tok/s"]


def cells(report: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    """Return one line of the table: an engine, or a form of PyTorch."""
    exact = report["entries"][0]
    drafts, speed, recall = entry["drafts"], entry["speed"], entry["recall"]
    return [
        entry["name"] if entry["kind"] == "engine" else f"PyTorch {entry['name']}",
        *(_task(one, other) for one, other in zip(entry["tasks"], exact["tasks"], strict=True)),
        "—" if drafts is None else _part(drafts["accepted"][0], drafts["proposed"][0]),
        "—" if drafts is None else f"{drafts['tokens_per_step']:.2f}",
        "—" if drafts is None or drafts["speedup"] is None else f"{drafts['speedup']:.2f}x",
        "—" if recall is None else f"{recall['inside']:.1%} of {recall['best']:.1%}",
        decimal(round(entry["weight_bytes"])),
        f"{entry['cache_bytes_per_token']:,.0f} B",
        "—" if speed is None else f"{speed['decode_tok_s']:.0f}",
    ]


def _part(some: int, of: int) -> str:
    return f"{some / of:.1%}" if of else "—"


def _task(one: Mapping[str, Any], exact: Mapping[str, Any]) -> str:
    task = TaskQuality.model_validate(dict(one))
    if task.score is not None:
        return f"{task.score:.1%}"
    assert task.nll is not None
    change = task.nll - exact["nll"]
    return f"{task.perplexity:.4g}" + ("" if one is exact else f" ({change:+.4f})")


def print_quality(out: Console, report: Mapping[str, Any], *, brief: bool = False) -> None:
    """Print the table, and unless `brief` what each line is."""
    heads = columns(report)
    table = Table([Column(name, "words" if name in _WORDS else "number") for name in heads], title=_title(report))
    for entry in report["entries"]:
        table.add(*cells(report, entry))
    out.print(table)
    if not brief:
        for entry in report["entries"]:
            out.print(styled((cells(report, entry)[0], "bold"), f": {entry['does']}"))
        for note in _notes(report):
            out.print(styled(("note", "yellow"), f" {note}"))


def _title(report: Mapping[str, Any]) -> str:
    tasks = report["tasks"]
    return f"quality of {report['checkpoint']} on {tasks['file']} ({tasks['num_rows']} rows)"


def _notes(report: Mapping[str, Any]) -> Sequence[str]:
    explained = [
        "behind a perplexity: change of the mean log-likelihood loss to the exact model, in nats",
        "recall: dense attention's mass inside the keys that indexers chose, of the most that so many keys could hold",
    ]
    return [*explained, *report["notes"]]


def render_quality(report: Mapping[str, Any]) -> str:
    """Return the page of a report: one file that needs nothing else."""
    lines = [cells(report, entry) for entry in report["entries"]]
    recalls = [
        [line[0], *(f"{value:.2%}" for value in entry["recall"]["layers"].values())]
        for line, entry in zip(lines, report["entries"], strict=True)
        if entry["recall"] is not None
    ]
    layers = next((list(e["recall"]["layers"]) for e in report["entries"] if e["recall"] is not None), [])
    sections = [{"title": "Table", "parts": [plain_table(columns(report), lines)]}]
    if recalls:
        heads = ["", *(f"layer {layer}" for layer in layers)]
        sections.append({"title": "Attention inside the chosen keys", "parts": [plain_table(heads, recalls)]})
    what = [[line[0], entry["does"], entry["backend"]] for line, entry in zip(lines, report["entries"], strict=True)]
    sections.append({"title": "What each line is", "parts": [plain_table(["", "what", "runs in"], what)]})
    sections.append({"title": "Notes", "parts": [piece("dim", note) for note in _notes(report)]})
    return page("quality.html", title=_title(report), model=report["model"], sections=sections)
