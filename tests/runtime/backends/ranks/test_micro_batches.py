"""A step in parts of rows or columns is the step: every token, slot and row of logits is in one part, in order."""

from __future__ import annotations

import numpy as np
import pytest

from seekforge.formats.step_io import StepInputs, lay_out
from seekforge.runtime.backends.ranks.micro_batches import join_parts, num_parts, split_step


@pytest.mark.parametrize(
    ("columns", "stages", "parts"), [(1, 4, 1), (1023, 4, 1), (1024, 4, 2), (4096, 4, 4), (4096, 1, 1)]
)
def test_short_steps_stay_whole(columns: int, stages: int, parts: int) -> None:
    assert num_parts(lay_out([list(range(columns))], [0], [list(range(1, 66))]), stages) == parts


@pytest.mark.parametrize(
    ("rows", "drafts", "parts"), [(1, 0, 1), (1023, 0, 1), (1024, 0, 2), (512, 1, 2), (4000, 0, 4)]
)
def test_decode_steps_of_many_sequences_are_cut_by_sequence(rows: int, drafts: int, parts: int) -> None:
    step = lay_out([list(range(1 + drafts))] * rows, [70] * rows, [[1, 2]] * rows)
    assert num_parts(step, 4) == parts
    assert [part.axis for part in split_step(step, parts)] == [0 if rows > 1 else 1] * parts


WIDE = lay_out([list(range(100, 107)), list(range(200, 204))], [5, 0], [[1], [2]], [0, 6, 9, 4, 10])
MANY = lay_out(
    [[100 + row, 200 + row][: 1 + row % 2] for row in range(7)], range(7), [[1 + r] for r in range(7)], [0, 13, 2, 7]
)


@pytest.mark.parametrize("step", [WIDE, MANY], ids=["columns", "rows"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_joined_are_the_step(step: StepInputs, count: int) -> None:
    """Results that tell which token they are of come back where they belong, whatever their shape."""
    parts = split_step(step, count)

    def results(inputs) -> dict[str, np.ndarray]:
        ids = inputs.input_ids
        return {
            "logits": ids.reshape(-1)[inputs.logits_index][:, None],
            "hidden": np.stack([ids, inputs.positions], axis=-1),
            "o_latent.3": np.stack([ids, inputs.positions], axis=-1)[..., None, :],
            "blocks": np.repeat(inputs.block_table[:, None, :1], ids.shape[1], axis=1),
            "expert_ids.3": np.stack([ids.reshape(-1), inputs.slot_mapping.reshape(-1)], axis=-1),
        }

    joined = join_parts([results(part.inputs) for part in parts], parts)
    for name, expected in results(step).items():
        np.testing.assert_array_equal(joined[name], expected, err_msg=name)
    assert all(len(part.inputs.logits_index) for part in parts)
