"""The table of families, checkpoints and targets: complete, the same in the docs, and true of the config reader."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from seekforge.formats.checkpoint.model_config import MODEL_TYPES
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.support import TABLE, markdown, sentence, supported
from seekforge.formats.weight_recipes.stored import BLOCK_FORMS, WeightForm

DOCS = Path(__file__).parents[2] / "docs"


def test_every_family_form_and_target_has_one_row() -> None:
    rows = [(row.family, row.form, row.backend) for row in TABLE]
    assert len(rows) == len(set(rows)) == len(MODEL_TYPES) * len(typing.get_args(WeightForm)) * 2
    for family in MODEL_TYPES:
        for form in typing.get_args(WeightForm):
            assert supported(family, form).keys() == {"cpu", "gpu"}


def test_numerics_are_those_that_a_form_has() -> None:
    for row in TABLE:
        assert set(row.numerics) <= NUMERICS.keys()
        assert ("fp8" in row.numerics) == (row.form in BLOCK_FORMS), row
        keeps = row.form != "fp8_blocks"  # what keeps its values has no kernels
        assert row.backend == "cpu" or not keeps or not set(row.numerics) - {"fp8"}, row
        assert ("refused" in row.shown_by) == (not row.works) == ("refused" in sentence(row))


def test_the_docs_have_this_table() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    assert markdown() in text, "paste the output of seekforge.formats.support.markdown() into docs/index.md"


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_sentence_has_no_markup(family: str) -> None:
    assert all("`" not in sentence(row) for row in supported(family, "bf16").values())
