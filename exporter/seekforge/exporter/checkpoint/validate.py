"""Is this folder the checkpoint that its config describes (headers), and are its values sane (bytes)?

`check_structure` costs nothing and runs before every export and build. `scan_values` reads everything, at the
speed of the disk, and is asked for by name; it is where a bit flip or a bad conversion shows (spec §2.6).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from seekforge.common.dtypes import is_stored_as
from seekforge.common.errors import CheckpointError
from seekforge.exporter.checkpoint.schema import ExpectedTensor, expected_tensors, needless_tensors
from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import EXPERT
from seekforge.exporter.models.shared.parameters import STACKED_EXPERTS
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.quantization_forms import TAKE
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.value_check import (
    SCALE_SUFFIX,
    Family,
    Findings,
    first_fault,
    first_not_positive,
    is_positive,
    not_finite,
    not_positive,
)
from seekforge.formats.weight_recipes.stored import WORDS

#: Told the bytes that are done, and all.
OnBytes = Callable[[int, int], None]

#: Read and scanned, or compared, at once: a core's cache holds it.
_PIECE_BYTES = 1 << 19


@dataclass(frozen=True)
class ScanReport:
    """What `scan_values` saw.

    Attributes:
        num_tensors: tensors read.
        num_bytes: bytes read.
        scale_families: kind of weight, which is its name without numbers -> its scales.
    """

    num_tensors: int
    num_bytes: int
    scale_families: dict[str, Family]

    @property
    def all_powers_of_two(self) -> bool:
        """Whether every scale seen is a power of two (what `scale_fmt: ue8m0` promises)."""
        return not self.other_families

    @property
    def other_families(self) -> tuple[str, ...]:
        """The families with scales that are not powers of two."""
        return tuple(
            name for name, family in self.scale_families.items() if family.num_powers_of_two < family.num_tensors
        )


def check_structure(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Check names, shapes and dtypes against the config. Reads headers only.

    Raises:
        CheckpointError: a tensor is missing, left over, or has another shape or dtype; the message names the
            first and says how many more there are.
    """
    faults = list(_structure_faults(checkpoint, config))
    if faults:
        more = f" (and {len(faults) - 1} more such faults)" if len(faults) > 1 else ""
        raise CheckpointError(f"{checkpoint.folder}: {faults[0]}{more}")


def _structure_faults(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[str]:
    expected = expected_tensors(config)
    foreign = _foreign_form(checkpoint, config)
    if foreign is not None:
        yield foreign
        return
    for name, want in expected.items():
        if name not in checkpoint:
            if want.copy_of is not None or not want.is_read:
                continue
            if want.part_of is not None and want.part_of in checkpoint:
                yield (
                    f"weight {want.part_of!r} has no {name!r}, expected its scales {list(want.shape)} {want.dtype}; "
                    f"{TAKE}"
                )
            else:
                yield (
                    f"tensor {name!r} is missing, expected {list(want.shape)} {want.dtype} by config.json; "
                    "finish the download, or take the config.json of this checkpoint"
                )
            continue
        stored = checkpoint.info(name)
        if stored.shape != want.shape and config.weight_form(name) == "bf16" and stored.dtype == "u8":
            yield f"tensor {name!r} has dtype {stored.dtype}, expected {want.dtype}; {_by_config(config)}"
        elif stored.shape != want.shape:
            yield (
                f"tensor {name!r} has shape {list(stored.shape)}, expected {list(want.shape)} by config.json; "
                "config and weights are of different models"
            )
        elif not _is_read(want, stored.dtype, config):
            advice = TAKE if want.form is None else _by_config(config)
            yield f"tensor {name!r} has dtype {stored.dtype}, expected {want.dtype}; {advice}"
    needless = needless_tensors(checkpoint.names)
    for name in checkpoint.names:
        if name not in expected and name not in needless:
            yield (
                f"tensor {name!r} is left over: config.json describes no such tensor (num_hidden_layers "
                f"{config.num_hidden_layers}, num_nextn_predict_layers {config.num_nextn_predict_layers}, "
                f"n_routed_experts {config.n_routed_experts}); config and weights are of different models"
            )


def _by_config(config: ModelConfig) -> str:
    """Say what config.json makes of the weights."""
    said = "has no quantization_config" if config.quantization_config is None else "has a quantization_config"
    return (
        f"config.json {said}, so weights are {WORDS[config.stored_form]}: take the config.json of this checkpoint, or "
        f"{TAKE}"
    )


def _is_read(want: ExpectedTensor, stored: str, config: ModelConfig) -> bool:
    """Whether a tensor of type `stored` will do. Scales are powers of two, as a rule, and lose nothing where they are
    stored in less than F32; any other F32 tensor that is not was rounded by somebody: in a BF16 checkpoint, all norms.
    """
    narrow = want.part_of is not None or (config.stored_form != "fp8_blocks" and want.draw in ("norm", "shift"))
    return stored == want.dtype or (narrow and is_stored_as(stored, want.dtype))


def _foreign_form(checkpoint: Checkpoint, config: ModelConfig) -> str | None:
    """Say of tensors that are named as another program names them which program that is."""
    stacked = re.compile(rf"model\.layers\.\d+\.({'|'.join(map(re.escape, STACKED_EXPERTS))})(_|$)")
    for name in checkpoint.names:
        match = stacked.match(name)
        if match:
            each = STACKED_EXPERTS[match[1]][-1].replace(EXPERT, "0")
            return (
                f"tensor {name!r} holds all experts of a layer, expected one tensor for each, such as '…{each}'; save "
                "it with transformers' save_pretrained(save_original_format=True)"
            )
        if re.match(r"layers\.\d+\.(attn|ffn)\.", name):
            return (
                f"tensor {name!r} is named as the demo's inference/convert.py names it, expected 'model.layers.0.…'; "
                f"pass the checkpoint that was converted, or {TAKE}"
            )
        others = (".weight_scale", ".weight_packed", ".qweight", ".weight_scale_2")
        if config.stored_form in ("fp8_blocks", "bf16") and name.endswith(others):
            return f"tensor {name!r} is of another quantized format, expected '….weight{SCALE_SUFFIX}'; {TAKE}"
    return None


def scan_values(
    checkpoint: Checkpoint,
    config: ModelConfig,
    names: Iterable[str] | None = None,
    progress: OnBytes | None = None,
) -> ScanReport:
    """Read values and check them (spec §2.6). Extra memory: a megabyte, and one tensor of scales.

    Args:
        checkpoint: passed `check_structure`.
        config: its config, which says where the MTP layer is.
        names: tensors to read; when None all that the config describes. The MTP copies are compared if both are
            among them.
        progress: told the bytes read so far and in all.

    Raises:
        CheckpointError: an FP8 weight holds NaN, a scale is not finite and above 0, a BF16 or F32 tensor is not
            finite, or the MTP layer's embedding or head differs from the main one. Names the first such tensor.
    """
    needless = needless_tensors(checkpoint.names)
    chosen = [name for name in (checkpoint.names if names is None else names) if name not in needless]
    total = sum(checkpoint.info(name).num_bytes for name in chosen)
    done = 0
    buffer, scratch = np.empty(_PIECE_BYTES, np.uint8), np.empty(_PIECE_BYTES // 8, np.uint64)
    findings = Findings()
    for name in chosen:
        info = checkpoint.info(name)
        if is_positive(name, info.dtype):
            stored = checkpoint.tensor(name)
            _check_finite(checkpoint, name, 0, stored.reshape(-1), scratch)
            scales = stored.astype(np.float32, copy=False)
            _check_positive(checkpoint, name, scales)
            if name.endswith(SCALE_SUFFIX):
                findings.add(name, scales)
        else:
            for start, piece in checkpoint.pieces(name, buffer):
                _check_finite(checkpoint, name, start, piece, scratch)
        done += info.num_bytes
        if progress is not None:
            progress(done, total)
    _check_copies(checkpoint, config, set(chosen))
    return ScanReport(len(chosen), total, findings.families())


def _check_finite(checkpoint: Checkpoint, name: str, start: int, piece: np.ndarray, scratch: np.ndarray) -> None:
    """Check elements of a tensor, which begin with the one that has the number `start`."""
    first = first_fault(piece.view(np.uint8), checkpoint.info(name).dtype, scratch)
    if first is not None:
        place = _position(checkpoint.info(name).shape, start + first)
        raise not_finite(_place(checkpoint, name), float(piece[first]), place)


def _check_positive(checkpoint: Checkpoint, name: str, scales: np.ndarray) -> None:
    first = first_not_positive(scales)
    if first is not None:
        place = _position(scales.shape, first)
        raise not_positive(_place(checkpoint, name), float(scales.reshape(-1)[first]), place)


def _position(shape: tuple[int, ...], number: int) -> list[int]:
    return [int(i) for i in np.unravel_index(number, shape)]


def _check_copies(checkpoint: Checkpoint, config: ModelConfig, chosen: set[str]) -> None:
    for copy, main in family_of(config).mtp_copies(config).items():
        if not {copy, main} <= chosen:
            continue
        both = (checkpoint.pieces(name, np.empty(_PIECE_BYTES, np.uint8)) for name in (copy, main))
        for (_, first), (_, second) in zip(*both, strict=True):
            if not np.array_equal(first.view(np.uint8), second.view(np.uint8)):
                raise CheckpointError(
                    f"{_place(checkpoint, copy)} differs from {main!r}, expected equal bits (the MTP layer shares "
                    "it); the checkpoint was changed on one side only, download it again"
                )


def _place(checkpoint: Checkpoint, name: str) -> str:
    return f"{checkpoint.folder / checkpoint.info(name).shard}: {name!r}"
