"""Charts: both formats, the same bytes for the same numbers, and one line when one cannot be drawn."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from seekforge.common.cli.charts import Line, Panel, check_chart, tokens, write_charts, write_figure
from seekforge.common.errors import EnvironmentFault, OutputError

PANEL = Panel("a < b", "tokens", "GiB", (Line("x & y", ((2048.0, 2.0), (1024.0, 1.0))),), (("limit", 3.0),))


def test_an_svg_holds_its_words_and_is_reproducible(tmp_path: Path) -> None:
    write_charts(tmp_path / "a.svg", [PANEL])
    write_charts(tmp_path / "b.svg", [PANEL])
    root = ElementTree.fromstring((tmp_path / "a.svg").read_text(encoding="utf-8"))
    assert {"a < b", "x & y", "limit", "1K", "2K", "GiB", "tokens"} <= {element.text for element in root.iter()}
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_png_grows_with_its_panels(tmp_path: Path) -> None:
    sizes = []
    for count in (1, 2):
        write_charts(tmp_path / "chart.png", [PANEL] * count)
        raw = (tmp_path / "chart.png").read_bytes()
        assert raw[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append((int.from_bytes(raw[16:20]), int.from_bytes(raw[20:24])))
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] == 2 * sizes[0][1]
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]


def test_what_cannot_be_drawn_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"x\.bmp: charts are written as PNG or SVG"):
        check_chart(Path("x.bmp"))
    with pytest.raises(OutputError, match="cannot be written"):
        write_charts(tmp_path / "nowhere" / "x.png", [PANEL])

    def without(name: str, *rest: Any) -> Any:
        if name == "matplotlib":
            raise ModuleNotFoundError(name)
        return importlib.__import__(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(EnvironmentFault, match="pip install 'matplotlib>"):
        check_chart(Path("x.png"))


def test_tokens_are_written_as_people_do() -> None:
    assert [tokens(131072), tokens(100), tokens(1025)] == ["128K", "100", "1025"]


def test_marks_of_logarithmic_axes_are_numbers(tmp_path: Path) -> None:
    """Formulas of matplotlib's are not read, since names may hold dollars: its marks would stand there raw."""

    def draw(figure: Any) -> None:
        near, far = figure.subplots(1, 2)
        near.semilogy([6e-7, 9e-7])
        far.loglog([1, 1000], [1e-7, 1e-2])

    write_figure(tmp_path / "a.svg", (6.0, 3.0), draw, dpi=100)
    words = {element.text for element in ElementTree.fromstring((tmp_path / "a.svg").read_text("utf-8")).iter()}
    assert not any("$" in (word or "") for word in words)
    assert {"9e−07", "1e−05", "100"} <= words
