"""The report as one HTML page that needs nothing else: charts are inline SVG, numbers stand behind each point.

Made from the JSON report alone. Tap or point at a chart and the numbers of the nearest mark appear under it; every line
chart also has its numbers as a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from seekforge.exporter.parity.charts import Point, folded_table, heat_map, line_chart, plain_table
from seekforge.exporter.parity.terminal import number

#: Rows of a table at most.
_MOST_ROWS = 1000

_STYLE = """
:root{--ink:#1c2733;--dim:#5c6b7a;--paper:#fff;--card:#f5f7fa;--line:#d7dee6;--ok:#1d8a55;--bad:#c22f2f}
@media(prefers-color-scheme:dark){:root{--ink:#e6ecf2;--dim:#9aa8b6;--paper:#12181f;--card:#1b232d;--line:#323d4a;
--ok:#4fc78a;--bad:#ff7a70}}
*{box-sizing:border-box}body{margin:0 auto;max-width:960px;padding:16px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:break-word}
.verdict,.gates td:nth-child(n+3){overflow-wrap:anywhere}.gates td:first-child{white-space:nowrap}
.gates td:nth-child(3),.gates td:nth-child(4){min-width:6.5em}
h1{font-size:1.4rem;margin:.2em 0}h2{font-size:1.1rem;margin:1.6em 0 .4em}p{margin:.4em 0}
.verdict{border-radius:10px;padding:14px 16px;background:var(--card);border-left:8px solid var(--ok)}
.verdict.bad{border-color:var(--bad)}.verdict b.word{color:var(--ok)}.verdict.bad b.word{color:var(--bad)}
.dim{color:var(--dim)}code{font-size:.92em}
figure{margin:0;background:var(--card);border-radius:10px;padding:10px}
svg{display:block;width:100%;height:auto;color:var(--ink)}svg text{font:13px system-ui,sans-serif;fill:var(--dim)}
svg .grid{stroke:var(--line)}svg .hit{cursor:pointer}
figcaption{min-height:1.5em;font-size:.9rem;color:var(--dim)}figcaption output{color:var(--ink)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.85rem}.legend i{display:inline-block;width:12px;height:12px;
border-radius:3px;margin-right:5px;vertical-align:-1px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:left;padding:5px 8px;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.pass{color:var(--ok)}.fail{color:var(--bad);font-weight:700}
details{margin:.4em 0}summary{cursor:pointer;color:var(--dim)}
@media(max-width:560px){.gates thead{display:none}
.gates tr{display:block;padding:8px 0;border-bottom:1px solid var(--line)}
.gates td{display:block;border:0;padding:1px 0}.gates td:nth-child(4)::before{content:"allowed ";color:var(--dim)}
.gates td:nth-child(3)::before{content:"found ";color:var(--dim)}.gates td:nth-child(-n+2){display:inline;padding:0 8px
0 0}svg text{font-size:19px}}
"""

_SCRIPT = """
for(const kind of ['click','mousemove'])document.addEventListener(kind,e=>{
const svg=e.target.closest&&e.target.closest('figure svg');if(!svg)return;
let best=e.target.dataset.v&&e.target,least=Infinity;
if(!best)for(const mark of svg.querySelectorAll('.hit')){const r=mark.getBoundingClientRect(),
d=Math.hypot(r.x+r.width/2-e.clientX,r.y+r.height/2-e.clientY);if(d<least){least=d;best=mark}}
if(best)svg.closest('figure').querySelector('output').textContent=best.dataset.v});
"""


def render(report: dict[str, Any]) -> str:
    """Return the page of a report made by `report.to_json`."""
    judged, reference = report["judged"], report["reference"]
    title = f"Parity: {judged['name']} against {reference['name']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">{_who(judged)} · {_who(reference)} · {report["model"]["num_hidden_layers"]} layers, '
        f"index_topk {report['model']['index_topk']}</p>",
        _verdict(report),
        "<h2>Gates</h2>",
        _gates(report["gates"]),
        *(f'<p class="dim">Note: {escape(note)}</p>' for note in report["notes"]),
        _layers(report),
        _positions(report),
        _heat(report),
        _overlap(report),
        _sensitivity(report),
        _cases(report),
        _operations(report),
        _flips(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _who(side: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in side["versions"].items())
    return escape(f"{side['name']}: {side['kind']}, numerics {side['numerics']}, {side['activations']} ({versions})")


def _verdict(report: dict[str, Any]) -> str:
    word = "passed" if report["passed"] else "failed"
    finding = report["finding"]
    text = "No operation differs by more than noise." if report["operations"] else "Operations were not judged."
    if finding is not None:
        tensors = ", ".join(f"<code>{escape(name)}</code>" for name in finding["tensors"][:6])
        text = (
            f"First divergence: layer {finding['layer']}, <b>{escape(finding['module'])}</b>. {escape(finding['text'])}"
            + (f"<br>Checkpoint: {tensors}" if tensors else "")
        )
    bad = "" if report["passed"] else " bad"
    return f'<div class="verdict{bad}"><b class="word">{word}</b><p>{text}</p></div>'


def _gates(gates: Sequence[dict[str, Any]]) -> str:
    rows = []
    for gate in gates:
        mark = '<span class="dim">shown</span>'
        if gate["gated"]:
            mark = '<span class="pass">pass</span>' if gate["passed"] else '<span class="fail">FAIL</span>'
        cells = [mark, f"<b>{escape(gate['name'])}</b>", escape(gate["value"]), escape(gate["allowed"])]
        reason = f'<span class="dim">{escape(gate["reason"])}</span>'
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in [*cells, reason]) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("", "gate", "found", "allowed", "reason"))
    return f'<table class="gates"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


# --- sections -----------------------------------------------------------------------------------------------


def _label(layer: dict[str, Any]) -> str:
    return f"{layer['layer']}{' (MTP)' if layer['graph'] == 'mtp' else ''}"


def _layers(report: dict[str, Any]) -> str:
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
    return f"<h2>Error over layers</h2>{chart}{folded_table(names, rows, 'numbers')}{points}"


def _points_table(layers: Sequence[dict[str, Any]]) -> str:
    rows = [
        [_label(layer), point, *(number(value[key]) for key in ("max_abs", "max_relative", "rms_relative")),
         *(number(value[key]) for key in ("cosine_difference", "calc_diff"))]
        for layer in layers
        for point, value in layer["points"].items()
    ]  # fmt: skip
    names = ["layer", "tensor", "max abs", "max rel", "rms rel", "cosine diff", "calc_diff"]
    return folded_table(names, rows, "every tensor of every layer") if rows else ""


def _positions(report: dict[str, Any]) -> str:
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
        return ""
    chart = line_chart(series, x_label="position", y_label="logits error / spread", log=True)
    table = folded_table(["case", "sequence", "position", "error", "noise"], rows[:_MOST_ROWS], "numbers")
    return f"<h2>Error of the logits over positions</h2>{chart}{table}"


def _heat(report: dict[str, Any]) -> str:
    cases = [case for case in report["cases"] if case["heat"]]
    if not cases:
        return ""
    # the longest case first, others folded
    cases.sort(key=lambda case: -len(case["positions"]))
    parts = ["<h2>Where it differs: token × layer</h2>", heat_map(cases[0])]
    for case in cases[1:4]:
        parts.append(f"<details><summary>{escape(case['name'])}</summary>{heat_map(case)}</details>")
    return "".join(parts)


def _overlap(report: dict[str, Any]) -> str:
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
        return (
            '<h2>Overlap of the chosen keys over context</h2><p class="dim">No row sees more than index_topk = '
            f"{topk} keys: all of them are chosen. Use longer --contexts.</p>"
        )
    chart = line_chart(series, x_label="context", y_label="overlap", log=False)
    table = folded_table(["layer", "context", "overlap", "rows"], rows, "numbers")
    return f"<h2>Overlap of the chosen keys over context</h2>{chart}{table}"


def _sensitivity(report: dict[str, Any]) -> str:
    if not report["sensitivity"]:
        return ""
    points: list[Point] = [
        (row["layer"], row["kl"], f"layer {row['layer']} alone: KL {number(row['kl'])}")
        for row in report["sensitivity"]
    ]
    rows = [[row["layer"], number(row["kl"])] for row in report["sensitivity"]]
    chart = line_chart({"KL when this layer alone changes": points}, x_label="layer", y_label="KL", log=True)
    return f"<h2>What each layer costs</h2>{chart}{folded_table(['layer', 'KL'], rows, 'numbers')}"


def _cases(report: dict[str, Any]) -> str:
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
    return f"<h2>Cases</h2>{plain_table(names, rows)}" if rows else ""


def _operations(report: dict[str, Any]) -> str:
    records = report["operations"]
    if not records:
        return ""

    def row(record: dict[str, Any]) -> list[Any]:
        mark = '<span class="fail">off</span>' if record["failed"] else '<span class="pass">right</span>'
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
    return (
        f"<h2>{word}, each given the engine's own inputs</h2>{plain_table(names, [row(r) for r in shown])}"
        f"{folded_table(names, [row(r) for r in records], f'all {len(records)} operations')}"
    )


def _flips(report: dict[str, Any]) -> str:
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
        return ""
    names = ["layer", "what", "which", "sequence", "position", "chosen by", "gap", "class"]
    chosen = [choices for layer in report["layers"] for choices in (layer["keys"], layer["experts"]) if choices]
    total = sum(sum(choices["kinds"].values()) for choices in chosen)
    words = f"all {total}" if len(rows) == total else f"{len(rows)} of {total}, the farthest of each layer,"
    return f"<h2>Choices that differ</h2>{folded_table(names, rows, f'{words} with their gaps')}"
