"""Training writes FP8 blocks and BF16, and refuses to round to other forms."""

from __future__ import annotations

import pytest

from seekforge.common.errors import ConfigError
from seekforge.exporter.checkpoint.presets import DTYPES, load_preset, stored_as
from seekforge.exporter.training.weights import check_form


@pytest.mark.parametrize("dtype", ["fp8", *DTYPES])
def test_a_form_that_no_update_is_rounded_to_is_refused(dtype: str) -> None:
    config = stored_as(load_preset("tiny"), dtype).config
    if dtype in ("fp8", "bf16"):
        check_form(config)
        return
    with pytest.raises(ConfigError, match="trained weights are rounded to FP8 blocks or BF16"):
        check_form(config)
