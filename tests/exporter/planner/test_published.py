"""The page's forecasts beside published figures are today's."""

from __future__ import annotations

import pytest
from tests import forecasts_doc


def test_the_page_has_what_is_forecast() -> None:
    """To a twentieth: kernels change in small steps, and none of them says anything of a published figure."""
    for on_page, now in zip(
        forecasts_doc.written(forecasts_doc.PAGE.read_text("utf-8")), forecasts_doc.table(), strict=True
    ):
        assert on_page[:3] == now[:3]
        assert float(on_page[3]) == pytest.approx(float(now[3]), rel=0.05), "run: python -m tests.forecasts_doc"
        assert float(on_page[4]) == pytest.approx(float(on_page[2]) / float(on_page[3]), abs=0.06)


def test_a_page_keeps_what_stands_around_the_table() -> None:
    page = "before\n<!-- begin forecasts -->\n| old |\n<!-- end forecasts -->\nafter\n"
    made = forecasts_doc.updated(page)
    assert made.startswith("before\n<!-- begin") and made.endswith("<!-- end forecasts -->\nafter\n")
    assert forecasts_doc.written(made) == forecasts_doc.table() and "old" not in made
