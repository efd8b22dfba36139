"""Jobs: a run of checkpoint bytes, and the places that its values go to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from seekforge.common.dtypes import itemsize
from seekforge.formats.loader.views import View
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.weight_recipes.recipe import Recipe

#: A job is at most about this long: what a thread takes at once, and what is read again after a failure.
JOB_BYTES: Final = 32 << 20
#: Read at once.
READ_BYTES: Final = 8 << 20


@dataclass(frozen=True)
class Copy:
    """Elements of one tensor and the places they go to; `check` compares with the first place instead."""

    tensor: str
    dtype: str
    view: View
    targets: tuple[np.ndarray, ...]
    check: bool = False

    @property
    def num_bytes(self) -> int:
        return self.view.size * itemsize(self.dtype)


@dataclass(frozen=True)
class Dequantize:
    """Rows of one FP8 matrix times its block scales, and the parts of the product that go to places.

    Every view has the same first axis with the same stride.
    """

    weight: str
    scale: str
    scale_dtype: str
    shape: tuple[int, int]
    views: tuple[View, ...]
    targets: tuple[np.ndarray, ...]

    @property
    def rows(self) -> tuple[int, int]:
        """The rows that are needed."""
        first = min(view.offset for view in self.views) // self.shape[1]
        last = max(view.offset + view.span - 1 for view in self.views) // self.shape[1]
        return first, last + 1

    @property
    def weight_bytes(self) -> int:
        first, last = self.rows
        return (last - first) * self.shape[1]

    @property
    def num_bytes(self) -> int:
        first, last = self.rows
        blocks = (last - 1) // FP8_BLOCK + 1 - first // FP8_BLOCK
        return self.weight_bytes + itemsize(self.scale_dtype) * blocks * -(-self.shape[1] // FP8_BLOCK)


@dataclass(frozen=True)
class Quantize:
    """Rows of one wide matrix, quantized to FP8 blocks as they are read.

    Attributes:
        tensor: its name. dtype: element type in the checkpoint. shape: [N, K].
        rows: [first, end), whole blocks but for the last one of the matrix.
        codes: places for the e4m3 values of these rows. scales: places for their block scales.
    """

    tensor: str
    dtype: str
    shape: tuple[int, int]
    rows: tuple[int, int]
    codes: tuple[np.ndarray, ...]
    scales: tuple[np.ndarray, ...]

    @property
    def num_bytes(self) -> int:
        return (self.rows[1] - self.rows[0]) * self.shape[1] * itemsize(self.dtype)


@dataclass(frozen=True)
class Whole:
    """A recipe of a form that has no faster way: evaluated from whole tensors (its operands are held meanwhile)."""

    recipe: Recipe
    target: np.ndarray
    num_bytes: int


Job = Copy | Dequantize | Quantize | Whole


def pieces(job: Copy) -> Iterator[Copy]:
    """Cut a job along its first axis into pieces of about `JOB_BYTES`."""
    if not job.view.shape or job.num_bytes <= JOB_BYTES:
        yield job
        return
    length = job.view.shape[0]
    step = max(1, JOB_BYTES // (job.num_bytes // length))
    for start in range(0, length, step):
        stop = min(start + step, length)
        targets = tuple(target[start:stop] for target in job.targets)
        yield Copy(job.tensor, job.dtype, job.view.slice(0, start, stop), targets, job.check)
