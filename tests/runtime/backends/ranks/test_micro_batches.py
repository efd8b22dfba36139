"""A step in parts of columns is the step: every token, slot and row of logits is in one part, in order."""

from __future__ import annotations

import numpy as np
import pytest

from seekforge.formats.step_io import lay_out
from seekforge.runtime.backends.ranks.micro_batches import join_columns, num_parts, split_columns


@pytest.mark.parametrize(
    ("columns", "stages", "parts"), [(1, 4, 1), (255, 4, 1), (256, 4, 2), (4096, 4, 4), (900, 1, 1)]
)
def test_short_steps_stay_whole(columns: int, stages: int, parts: int) -> None:
    assert num_parts(lay_out([list(range(columns))], [0], [list(range(1, 66))]), stages) == parts


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_joined_are_the_step(count: int) -> None:
    """Results that tell which token they are of come back where they belong, whatever their shape."""
    step = lay_out([list(range(100, 107)), list(range(200, 204))], [5, 0], [[1], [2]], [0, 6, 9, 4, 10])
    parts = split_columns(step, count)

    def results(inputs) -> dict[str, np.ndarray]:
        ids = inputs.input_ids
        return {
            "logits": ids.reshape(-1)[inputs.logits_index][:, None],
            "hidden": np.stack([ids, inputs.positions], axis=-1),
            "o_latent.3": np.stack([ids, inputs.positions], axis=-1)[..., None, :],
            "expert_ids.3": np.stack([ids.reshape(-1), inputs.slot_mapping.reshape(-1)], axis=-1),
        }

    joined = join_columns([results(part) for part, _ in parts], parts)
    for name, expected in results(step).items():
        np.testing.assert_array_equal(joined[name], expected, err_msg=name)
    assert all(len(part.logits_index) for part, _ in parts)
