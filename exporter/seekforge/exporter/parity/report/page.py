"""The report as one HTML page that needs nothing else: charts are inline SVG, numbers stand behind each point.

Made from the JSON report alone, by templates that escape whatever they are given.
Tap or point at a chart and the numbers of the nearest mark appear under it; every line
chart also has its numbers as a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from seekforge.exporter.parity.report.html import page, piece
from seekforge.exporter.parity.report.svg import Point, folded_table, heat_map, line_chart, plain_table
from seekforge.exporter.parity.report.terminal import number

#: Rows of a table at most.
_MOST_ROWS = 1000


@dataclass(frozen=True)
class Section:
    """One headed part of the page; its parts are markup that templates made."""

    title: str
    parts: tuple[Markup, ...]


def render(report: dict[str, Any]) -> str:
    """Return the page of a report made by `report.to_json`."""
    judged, reference = report["judged"], report["reference"]
    sections = [
        make(report) for make in (_layers, _positions, _heat, _overlap, _sensitivity, _cases, _operations, _flips)
    ]
    return page(
        "parity.html",
        title=f"Parity: {judged['name']} against {reference['name']}",
        sides=[_who(judged), _who(reference)],
        model=report["model"],
        passed=report["passed"],
        finding=report["finding"],
        judged_operations=bool(report["operations"]),
        gates=report["gates"],
        notes=report["notes"],
        sections=[section for section in sections if section is not None],
    )


def _who(side: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in side["versions"].items())
    return f"{side['name']}: {side['kind']}, numerics {side['numerics']}, {side['activations']} ({versions})"


def _label(layer: dict[str, Any]) -> str:
    return f"{layer['layer']}{' (MTP)' if layer['graph'] == 'mtp' else ''}"


def _layers(report: dict[str, Any]) -> Section | None:
    layers = report["layers"]
    series: dict[str, list[Point]] = {"residual stream": [], "PyTorch against itself": [], "worst operation": []}
    series["on PyTorch's inputs"] = []
    rows = []
    for i, layer in enumerate(layers):
        name = f"layer {_label(layer)}"
        stream, noise, worst = layer["stream"], layer["noise"], layer["worst_operation"]
        if stream:
            series["residual stream"].append((i, stream["rms_relative"], f"{name}: {number(stream['rms_relative'])}"))
        if noise:
            series["PyTorch against itself"].append(
                (i, noise["rms_relative"], f"{name}, noise: {number(noise['rms_relative'])}")
            )
        fed = layer["on_reference_inputs"]
        if fed is not None:
            series["on PyTorch's inputs"].append((i, fed, f"{name}, the engine's on PyTorch's inputs: {number(fed)}"))
        if worst:
            series["worst operation"].append(
                (i, worst["error"], f"{name}: {worst['module']} {number(worst['error'])} given the same inputs")
            )
        cells = [_label(layer)]
        for value in (stream, noise):
            cells.append(number(value and value["rms_relative"]))
        cells += [number(stream and stream[key]) for key in ("max_abs", "cosine_difference", "calc_diff")]
        cells += [number(layer["caches"].get(kind, {}).get("max_relative")) for kind in ("latent", "index")]
        rows.append([*cells, number(fed), "—" if worst is None else f"{number(worst['error'])} {worst['module']}"])
    names = [
        "layer",
        "stream",
        "noise",
        "max abs",
        "cosine diff",
        "calc_diff",
        "latent cache",
        "index cache",
        "on PyTorch's inputs",
        "worst op",
    ]
    chart = line_chart(series, x_label="layer", y_label="error", log=True, ticks=[_label(layer) for layer in layers])
    points = _points_table(layers)
    return Section("Error over layers", (chart, folded_table(names, rows, "numbers"), *points))


def _points_table(layers: Sequence[dict[str, Any]]) -> list[Markup]:
    rows = [
        [_label(layer), point, *(number(value[key]) for key in ("max_abs", "max_relative", "rms_relative")),
         *(number(value[key]) for key in ("cosine_difference", "calc_diff"))]
        for layer in layers
        for point, value in layer["points"].items()
    ]  # fmt: skip
    names = ["layer", "tensor", "max abs", "max rel", "rms rel", "cosine diff", "calc_diff"]
    return [folded_table(names, rows, "every tensor of every layer")] if rows else []


def _positions(report: dict[str, Any]) -> Section | None:
    series: dict[str, list[Point]] = {}
    rows = []
    for case in report["cases"]:
        points: list[Point] = []
        for i, (where, value, noise) in enumerate(zip(case["positions"], case["error"], case["noise"])):
            if value is None or isinstance(value, str):
                continue
            text = f"{case['name']}, sequence {where['sequence']}, position {where['position']}: {number(value)}"
            points.append((where["position"] if case["mode"] != "ragged" else i, value, text))
            rows.append([case["name"], where["sequence"], where["position"], number(value), number(noise)])
        if points:
            suffix = " (MTP)" if case["graph"] == "mtp" else ""
            series[case["name"] + suffix] = points
    if not series:
        return None
    chart = line_chart(series, x_label="position", y_label="logits error / spread", log=True)
    table = folded_table(["case", "sequence", "position", "error", "noise"], rows[:_MOST_ROWS], "numbers")
    return Section("Error of the logits over positions", (chart, table))


def _heat(report: dict[str, Any]) -> Section | None:
    cases = [case for case in report["cases"] if case["heat"]]
    if not cases:
        return None
    # the longest case first, others folded
    cases.sort(key=lambda case: -len(case["positions"]))
    parts = [heat_map(cases[0])]
    for case in cases[1:4]:
        parts.append(piece("folded", case["name"], heat_map(case)))
    return Section("Where it differs: token × layer", tuple(parts))


def _overlap(report: dict[str, Any]) -> Section | None:
    series: dict[str, list[Point]] = {}
    rows = []
    for layer in report["layers"]:
        points = []
        for point in layer["keys"]["curve"]:
            text = f"layer {_label(layer)}, context {point['context']}: {point['overlap']:.2%} of {point['rows']} rows"
            points.append((point["context"], point["overlap"], text))
            rows.append([_label(layer), point["context"], f"{point['overlap']:.3%}", point["rows"]])
        if points:
            series[f"layer {_label(layer)}"] = points
    if not series:
        topk = report["model"]["index_topk"]
        text = f"No row sees more than index_topk = {topk} keys: all of them are chosen. Use longer --contexts."
        return Section("Overlap of the chosen keys over context", (piece("dim", text),))
    chart = line_chart(series, x_label="context", y_label="overlap", log=False)
    table = folded_table(["layer", "context", "overlap", "rows"], rows, "numbers")
    return Section("Overlap of the chosen keys over context", (chart, table))


def _sensitivity(report: dict[str, Any]) -> Section | None:
    if not report["sensitivity"]:
        return None
    points: list[Point] = [
        (row["layer"], row["kl"], f"layer {row['layer']} alone: KL {number(row['kl'])}")
        for row in report["sensitivity"]
    ]
    rows = [[row["layer"], number(row["kl"])] for row in report["sensitivity"]]
    chart = line_chart({"KL when this layer alone changes": points}, x_label="layer", y_label="KL", log=True)
    return Section("What each layer costs", (chart, folded_table(["layer", "KL"], rows, "numbers")))


def _cases(report: dict[str, Any]) -> Section | None:
    keys = ("error_median", "error_max", "kl_mean", "kl_max")
    rows = [
        [
            case["name"] + (" (MTP)" if case["graph"] == "mtp" else ""),
            case["rows"],
            *(number(case[key]) for key in keys),
            *(number(case["logits"][key]) for key in ("max_abs", "cosine_difference", "calc_diff")),
            f"{case['top1']:.2%}",
            f"{case['top10']:.2%}",
            number(case.get("perplexity")),
            number(case.get("perplexity_difference")),
            case["rows_flipped"],
        ]
        for case in report["cases"]
        if "kl_mean" in case
    ]
    names = ["case", "rows", "error median", "largest", "KL mean", "largest", "max abs", "cosine diff",
             "calc_diff", "top-1", "top-10", "perplexity",
             "difference", "rows that chose otherwise"]  # fmt: skip
    return Section("Cases", (plain_table(names, rows),)) if rows else None


def _operations(report: dict[str, Any]) -> Section | None:
    records = report["operations"]
    if not records:
        return None

    def row(record: dict[str, Any]) -> list[Any]:
        mark = piece("mark", "off", "fail") if record["failed"] else piece("mark", "right", "pass")
        tensors = ", ".join(record["tensors"][:3]) + (" …" if record["num_tensors"] > 3 else "")
        return [
            mark,
            record["layer"],
            record["module"],
            record["does"],
            number(record["error"]),
            number(record["gate"]),
            f"{record['num_bad']} of {record['num_rows']}",
            record["detail"] or tensors,
        ]

    names = ["", "layer", "module", "what", "error", "allowed", "rows", "checkpoint"]
    failed = [record for record in records if record["failed"]]
    shown = failed or sorted(records, key=lambda r: -float(r["error"]))[:10]
    word = "Operations that are off" if failed else "The ten least equal operations"
    every = folded_table(names, [row(r) for r in records], f"all {len(records)} operations")
    return Section(f"{word}, each given the engine's own inputs", (plain_table(names, [row(r) for r in shown]), every))


def _flips(report: dict[str, Any]) -> Section | None:
    parts = [
        (layer, kind, choices["flips"])
        for layer in report["layers"]
        for kind, choices in (("key", layer["keys"]), ("expert", layer["experts"]))
        if choices and choices["flips"]
    ]
    share = max(1, _MOST_ROWS // max(1, len(parts)))  # of every layer, so that none is missing
    rows = [
        [_label(layer), kind, flip["chosen"], flip["sequence"], flip["position"],
         "judged" if flip["by"] == "judged" else "reference", number(flip["gap"]), flip["kind"]]
        for layer, kind, flips in parts
        for flip in flips[:share]
    ]  # fmt: skip
    if not rows:
        return None
    names = ["layer", "what", "which", "sequence", "position", "chosen by", "gap", "class"]
    chosen = [choices for layer in report["layers"] for choices in (layer["keys"], layer["experts"]) if choices]
    total = sum(sum(choices["kinds"].values()) for choices in chosen)
    words = f"all {total}" if len(rows) == total else f"{len(rows)} of {total}, the farthest of each layer,"
    return Section("Choices that differ", (folded_table(names, rows, f"{words} with their gaps"),))
