"""One job at a time: bytes are read, checked on the way, and put where they belong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from seekforge.common.dtypes import NUMPY, itemsize, widen
from seekforge.common.errors import CheckpointError
from seekforge.common.system import read_all_at
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.loader.jobs import READ_BYTES, Copy, Dequantize, Job, Quantize
from seekforge.formats.loader.views import View
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.quantization.block_fp8 import block_scales, encode_into
from seekforge.formats.value_check import (
    SCALE_SUFFIX,
    Findings,
    first_fault,
    first_not_positive,
    is_positive,
    not_finite,
    not_positive,
)
from seekforge.formats.weight_digests import WeightDigests
from seekforge.formats.weight_recipes import FP8_VALUES, evaluate

#: Scanned at once: small enough to be scanned from the cache.
_SCAN_BYTES: Final = 1 << 19
#: Shorter runs than this are read together with what lies between them, then picked out.
_MIN_RUN_BYTES: Final = 16 << 10


class Reader:
    """Does jobs, one at a time, with one scratch."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        file: Callable[[str], int],
        findings: Findings | None,
        scratch_bytes: int,
        digests: WeightDigests | None = None,
    ) -> None:
        self._checkpoint, self._file, self._findings, self._digests = checkpoint, file, findings, digests
        self._scratch = np.empty(scratch_bytes, np.uint8)
        self._words = np.empty(_SCAN_BYTES // 8, np.uint64)

    def do(self, job: Job) -> None:
        """Read what `job` needs and put it where it belongs."""
        if isinstance(job, Copy):
            self._copy(job)
        elif isinstance(job, Dequantize):
            self._dequantize(job)
        elif isinstance(job, Quantize):
            self._quantize(job)
        else:
            job.target[...] = evaluate(job.recipe, self)

    def tensor(self, name: str) -> np.ndarray:
        """Return a whole tensor in memory of its own."""
        info = self._checkpoint.info(name)
        array = np.empty(info.shape, NUMPY[info.dtype])
        self._read(name, info.dtype, 0, _bytes_of(array))
        return array

    def _copy(self, job: Copy) -> None:
        first = job.targets[0]
        direct = job.view.is_dense and first.flags.c_contiguous and first.dtype == NUMPY[job.dtype] and not job.check
        if direct and job.view.size:
            self._read(job.tensor, job.dtype, job.view.offset, _bytes_of(first))
            for other in job.targets[1:]:
                other[...] = first
        elif job.view.size:
            self._through_scratch(job.tensor, job.dtype, job.view, job.targets, check=job.check)

    def _through_scratch(
        self, tensor: str, dtype: str, view: View, targets: tuple[np.ndarray, ...], *, check: bool
    ) -> None:
        """Read pieces of `view` that fit the scratch, gaps included, and assign or compare what was asked for."""
        size = itemsize(dtype)
        rows = 1
        if view.shape:
            inner = view.slice(0, 0, 1)
            apart = inner.is_dense and inner.size * size >= _MIN_RUN_BYTES and inner.size != view.strides[0]
            if inner.span * size > self._scratch.size or (apart and view.shape[0] > 1):
                for i in range(view.shape[0]):
                    part = View(view.offset + i * view.strides[0], view.shape[1:], view.strides[1:])
                    self._copy(Copy(tensor, dtype, part, tuple(target[i] for target in targets), check))
                return
            spare = self._scratch.size // size - inner.span
            rows = 1 + (spare // view.strides[0] if view.strides[0] else view.shape[0])
        for start in range(0, view.shape[0] if view.shape else 1, rows):
            part = view.slice(0, start, min(start + rows, view.shape[0])) if view.shape else view
            raw = self._scratch[: part.span * size]
            self._read(tensor, dtype, part.offset, raw, scan=part.is_dense)
            strides = tuple(stride * size for stride in part.strides)
            values = np.lib.stride_tricks.as_strided(raw.view(NUMPY[dtype]), part.shape, strides)
            if not part.is_dense and self._findings is not None:
                self._scan(tensor, dtype, _bytes_of(np.ascontiguousarray(values)), part)
            for target in targets:
                place = target[start : start + rows] if view.shape else target
                if not check:
                    place[...] = values
                elif not np.array_equal(place, values.astype(place.dtype)):
                    raise CheckpointError(
                        f"{self._where(tensor)} differs from the tensor that the main model has in its place, expected "
                        "equal bits (the MTP layer shares it); the checkpoint was changed on one side only, download "
                        "it again"
                    )

    def _dequantize(self, job: Dequantize) -> None:
        (first, last), k = job.rows, job.shape[1]
        columns = -(-k // FP8_BLOCK)
        low, high = first // FP8_BLOCK, (last - 1) // FP8_BLOCK + 1
        held = np.empty((high - low, columns), NUMPY[job.scale_dtype])
        self._read(job.scale, job.scale_dtype, low * columns, _bytes_of(held))
        scales = widen(held, "f32")
        stored = np.empty((last - first, k), np.uint8)
        self._read(job.weight, "f8e4m3", first * k, stored.reshape(-1))
        product = FP8_VALUES[stored]
        along_k = np.repeat(scales, FP8_BLOCK, axis=1)[:, :k]
        for row in range(low, high):
            part = slice(max(row * FP8_BLOCK, first) - first, min((row + 1) * FP8_BLOCK, last) - first)
            product[part] *= along_k[row - low]
        flat = product.reshape(-1)
        for view, target in zip(job.views, job.targets, strict=True):
            strides = tuple(4 * stride for stride in view.strides)
            target[...] = np.lib.stride_tricks.as_strided(flat[view.offset - first * k :], view.shape, strides)

    def _quantize(self, job: Quantize) -> None:
        (first, last), k = job.rows, job.shape[1]
        values = np.empty((last - first, k), NUMPY[job.dtype])
        self._read(job.tensor, job.dtype, first * k, _bytes_of(values))
        scales = block_scales(values)
        for target in job.codes:
            encode_into(values, scales, target)
        for target in job.scales:
            target[...] = scales

    def _read(self, tensor: str, dtype: str, offset: int, out: np.ndarray, *, scan: bool = True) -> None:
        """Fill `out` (bytes) from element `offset` of a tensor on, checking values on the way."""
        info = self._checkpoint.info(tensor)
        file = self._file(info.shard)
        position = info.begin + offset * itemsize(dtype)
        scan = scan and self._findings is not None
        # what is scanned is read in small pieces, which are then still in the cache
        step = _SCAN_BYTES if scan else READ_BYTES
        for start in range(0, out.size, step):
            piece = out[start : start + step]
            self._fill(tensor, file, position + start, piece)
            if scan:
                first = offset + start // itemsize(dtype)
                self._scan(tensor, dtype, piece, View(first, (piece.size // itemsize(dtype),), (1,)))
        if self._digests is not None:
            damage = self._digests.compare(
                tensor,
                info.num_bytes,
                position - info.begin,
                out,
                lambda begin, rest: self._fill(tensor, file, info.begin + begin, rest),
            )
            if damage is not None:
                raise CheckpointError(
                    f"{self._where(tensor)}: its bytes {damage[0]:,} to {damage[1] - 1:,} (from byte {info.begin:,} of "
                    "the file on) are not those that the engine was built with: the file is damaged, download it "
                    "again; or these are other weights, build the engine with them"
                )

    def _fill(self, tensor: str, file: int, position: int, out: np.ndarray) -> None:
        """Fill `out` from a byte of a file on."""
        try:
            filled = read_all_at(file, out.data, position)
        except OSError as error:
            raise CheckpointError(
                f"{self._where(tensor)} cannot be read ({error.strerror}); check the disk, then go on"
            ) from None
        if filled < out.size:
            raise CheckpointError(
                f"{self._where(tensor)} ends {out.size - filled} bytes early: the file shrank while it was read; put "
                "the whole file back, then go on"
            )

    def _scan(self, tensor: str, dtype: str, values: np.ndarray, view: View) -> None:
        """Check values, the bytes of what `view` sees of a tensor, one after the other."""
        assert self._findings is not None
        fault = first_fault(values, dtype, self._words)
        if fault is not None:
            value = float(values.view(NUMPY[dtype])[fault])
            raise not_finite(self._where(tensor), value, f"element {_element(view, fault)}")
        if is_positive(tensor, dtype):
            scales = values.view(NUMPY[dtype]).astype(np.float32, copy=False)
            fault = first_not_positive(scales)
            if fault is not None:
                raise not_positive(self._where(tensor), float(scales[fault]), f"element {_element(view, fault)}")
            if tensor.endswith(SCALE_SUFFIX):
                self._findings.add(tensor, scales)

    def _where(self, tensor: str) -> str:
        return f"{self._checkpoint.folder / self._checkpoint.info(tensor).shard}: {tensor!r}"


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """Return the bytes of a contiguous array, as a view."""
    return array.reshape(-1).view(np.uint8)


def _element(view: View, number: int) -> int:
    """Return which element of its tensor a view has in the place `number`, counted along the view."""
    place = np.unravel_index(number, view.shape)
    return view.offset + sum(int(i) * stride for i, stride in zip(place, view.strides, strict=True))
