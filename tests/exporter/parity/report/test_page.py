"""The HTML page: right for odd reports, and what a browser shows of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib import image as image
from tests.support.parity_faults import build_engine, edited_checkpoint, scaled

from seekforge.exporter.parity.report.page import render
from seekforge.exporter.parity.report.svg import _COLORS, _color, line_chart
from seekforge.exporter.parity.report.terminal import number
from seekforge.exporter.parity.report.to_json import _finite
from seekforge.runtime.cli import main as cli

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def report() -> dict[str, Any]:
    side = {"name": "<b>x</b>", "kind": "engine", "numerics": "fp8", "activations": "f32", "layers": [0, 1]}
    side["versions"] = {"onnxruntime": "1"}
    return {
        "format": 1,
        "passed": False,
        "judged": side,
        "reference": side | {"name": "y"},
        "model": {"num_hidden_layers": 1, "index_topk": 64},
        "num_engine_runs": 1,
        "notes": ["a & b"],
        "gates": [],
        "finding": None,
        "cases": [],
        "layers": [],
        "operations": [],
        "sensitivity": [],
    }


def test_names_are_escaped_and_a_bare_report_renders(report: dict[str, Any]) -> None:
    page = render(report)
    assert "<b>x</b>" not in page and "&lt;b&gt;x" in page and "a &amp; b" in page
    assert "nothing to show" in page and "Operations were not judged" in page


HOSTILE = "<span><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}\x1b\u202e"


def poisoned(value: Any) -> Any:
    """Every text and every key that names something, hostile."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [poisoned(one) for one in value]
    if isinstance(value, dict):
        return {key: one if key in ("graph", "mode", "by") else poisoned(one) for key, one in value.items()}
    return value


def test_hostile_text_in_any_place_of_a_report_stays_text(report: dict[str, Any]) -> None:
    error = {"max_abs": 0.1, "cosine_difference": 0.1, "calc_diff": 0.1, "max_relative": 0.1, "rms_relative": 0.1}
    keys = {"curve": [{"context": 8, "overlap": 0.5, "rows": 2}], "kinds": {"near": 1}, "rows_other": 1}
    keys["flips"] = [{"chosen": 1, "sequence": 0, "position": 1, "by": "judged", "gap": 0.1, "kind": "near"}]  # type: ignore
    layer = {"layer": 0, "graph": "model", "stream": error, "noise": error, "on_reference_inputs": 0.1, "caches": {}}
    layer |= {"points": {HOSTILE: error}, "keys": keys, "experts": None}
    layer["worst_operation"] = {"module": "m", "error": 0.1}
    case = {"name": "c", "graph": "model", "mode": "whole", "positions": [{"sequence": 0, "position": 0}], "rows": 1}
    case |= {"error": [0.1], "noise": [0.1], "heat_layers": [0], "heat": [[0.1]], "logits": error, "kl_mean": 0.1}
    case |= {"error_median": 0.1, "error_max": 0.1, "kl_max": 0.1, "top1": 1.0, "top10": 1.0, "rows_flipped": 0}
    operation = {"failed": True, "tensors": ["t"] * 4, "num_tensors": 4, "layer": 0, "module": "m", "does": "d"}
    operation |= {"error": 0.1, "gate": 0.1, "num_bad": 1, "num_rows": 1, "detail": "x"}
    gate = {"name": "g", "gated": True, "passed": False, "value": "v", "allowed": "a", "reason": "r"}
    report |= {"cases": [case, case], "layers": [layer], "operations": [operation], "gates": [gate]}
    report |= {"finding": {"layer": 0, "module": "m", "text": "t", "tensors": ["t"], "others": 0}}
    report["sensitivity"] = [{"layer": 0, "kl": 0.1}]
    page = render(poisoned(report))
    clean = render(report)
    assert "49" not in page.replace("{{ 7*7 }}", "") or "49" in clean
    assert page.count("&lt;script&gt;alert(1)") > 20
    assert "\x1b" not in page and "\u202e" not in page

    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.counts: Counter[str] = Counter()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.counts[tag] += 1
            assert not any(name.startswith("on") for name, _ in attrs), attrs

    seen = []
    for text in (page, clean):
        tags = Tags()
        tags.feed(text)
        seen.append(tags.counts)
    assert seen[0] == seen[1] and seen[0]["script"] == 1


def test_what_is_not_finite_becomes_words_and_no_point() -> None:
    value = _finite({"a": [float("nan"), np.float32(1.5), -np.inf], 3: (np.int64(2),)})
    assert json.loads(json.dumps(value)) == {"a": ["NaN", 1.5, "-inf"], "3": [2]}
    chart = line_chart({"s": [(0, "NaN", "bad"), (1, 2.0, "good")]}, x_label="x", y_label="y", log=True)  # pyright: ignore
    assert "good" in chart and "bad" not in chart


@pytest.mark.parametrize("values", ([0.0], [0.0, 0.0], [1e-12, 1e3], [1.0]))
@pytest.mark.parametrize("log", (True, False))
def test_charts_keep_all_points_inside(values: list[float], log: bool) -> None:
    chart = line_chart(
        {"s": [(i, value, str(value)) for i, value in enumerate(values)]}, x_label="x", y_label="y", log=log
    )
    assert chart.count("<circle") == len(values) and "nan" not in chart
    for part in chart.split('cy="')[1:]:
        assert 0 <= float(part.partition('"')[0]) <= 300


def test_colors_go_from_noise_to_error() -> None:
    assert _color(0) == _color(1e-9) == "#18305c" and _color(1.0) == _color(50.0) == "#cd302a"
    assert len({_color(10.0**e) for e in range(-8, 1)}) == 9 and _color("inf") == "#000"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "—"), (0, "0"), (0.5, "0.5"), (1e-7, "1.0e-07"), (123456.0, "1.2e+05"), ("inf", "inf")]
)
def test_numbers_are_short(value: Any, text: str) -> None:
    assert number(value) == text


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(390, 3000), (1000, 2600)], ids=("phone", "desktop"))
def test_a_browser_shows_it_without_a_sideways_scroll(
    tiny_checkpoint: Path, tiny_programs: dict[str, Path], tmp_path: Path, width: int, height: int
) -> None:
    """A screenshot of a report with a fault in it: charts have their colors, nothing is wider than the screen, and a
    finger beside a point of 2 pixels finds it. docs/parity-report.png is such a screenshot."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")
    page = faulty_report(tiny_checkpoint, tiny_programs["exact"], tmp_path)
    # a phone is narrower than a window may be: the page is shown in a frame of that width, which says how wide it is
    probe = page.read_text(encoding="utf-8").replace(
        "</body>",
        "<script>const mark=document.querySelector('svg .hit'),place=mark.getBoundingClientRect();"
        "mark.parentNode.dispatchEvent(new MouseEvent('click',"
        "{bubbles:true,clientX:place.right+9,clientY:place.bottom+9}));"
        "parent.postMessage([document.documentElement.scrollWidth,document.querySelectorAll('svg').length,"
        "mark.dataset.v===document.querySelector('output').textContent],'*')</script></body>",
    )
    (tmp_path / "probe.html").write_text(probe, encoding="utf-8")
    frame = f'<iframe src="probe.html" style="border:0;width:{width}px;height:{height}px"></iframe>'
    listener = "<script>onmessage=e=>{document.title='measured '+e.data.join(' ')}</script>"
    (tmp_path / "frame.html").write_text(f'<!doctype html><body style="margin:0">{listener}{frame}', encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'user'}"]
    flags += ["--allow-file-access-from-files", "--virtual-time-budget=4000"]
    address = (tmp_path / "frame.html").as_uri()
    done = subprocess.run([browser, *flags, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    assert "<title>measured " in done.stdout, done.stderr[-2000:]
    measured = done.stdout.partition("<title>measured ")[2].partition("<")[0].split()
    assert int(measured[0]) <= width and int(measured[1]) >= 4 and measured[2] == "true"
    shot = tmp_path / "shot.png"
    subprocess.run(
        [browser, *flags, f"--screenshot={shot}", f"--window-size={max(width, 500)},{height}", address],
        capture_output=True,
        check=True,
        timeout=120,
    )
    pixels = (image.imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (height, max(width, 500))
    for color in ("#c22f2f", *_COLORS[:4], _color(1e-6)):  # the verdict, lines, cells of layers before the fault
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        near = (np.abs(pixels - wanted).max(-1) <= 8).sum()
        assert near > 20, f"{color}: {near} pixels"


def faulty_report(checkpoint: Path, program: Path, folder: Path) -> Path:
    """The report of an engine in which one scale of layer 2 is 1 % too large."""
    name = "model.layers.2.mlp.shared_experts.down_proj.weight_scale_inv"
    broken = edited_checkpoint(checkpoint, folder / "broken", {name: scaled(1.01, 1, 0)})
    engine = build_engine(program, broken, folder / "tiny-engine")
    page = folder / "report.html"
    args = ["parity", engine, "--checkpoint", checkpoint, "--contexts", "150", "--modes", "whole,chunked"]
    result = CliRunner().invoke(cli.main, [str(arg) for arg in [*args, "--html", page, "--quiet"]])
    assert result.exit_code == 1 and name in page.read_text(encoding="utf-8")
    return page
