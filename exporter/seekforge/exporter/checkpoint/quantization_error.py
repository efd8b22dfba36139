"""What quantizing BF16 weights to FP8 blocks costs, per kind of weight, on a sample of each."""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from seekforge.common.dtypes import NUMPY
from seekforge.exporter.checkpoint.schema import expected_tensors
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.quantization.block_fp8 import quantize
from seekforge.formats.weight_recipes import dequantize_into

#: Rows of a sample: whole blocks, some MB of the widest matrix.
_ROWS: Final = 256
_NUMBERED: Final = re.compile(r"^model\.layers\.\d+\.|(?<=experts)\.\d+(?=\.)")


def quantization_errors(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, float]:
    """Return kind of weight -> root mean square of what quantizing changes, relative to that of the weights.

    The first 256 rows of the first matrix of each kind are read and quantized as loading does.

    Args:
        checkpoint: an open checkpoint.
        config: its config.

    Returns:
        Empty where the checkpoint's weights are not BF16, or where their values are not there: only headers were
        fetched, or the file is sparse.
    """
    if config.stored_form != "bf16":
        return {}
    first: dict[str, str] = {}
    for name, tensor in expected_tensors(config).items():
        if tensor.form == "bf16":
            first.setdefault(_NUMBERED.sub("", name).removesuffix(".weight"), name)
    errors: dict[str, float] = {}
    for kind, name in first.items():
        if not _has_values(checkpoint, name):
            continue
        info = checkpoint.info(name)
        stored = np.empty((min(_ROWS, info.shape[0]), *info.shape[1:]), NUMPY[info.dtype])
        checkpoint.read_rows(name, 0, stored)
        values = stored.astype(np.float32)
        spread = float(np.sqrt(np.mean(values**2, dtype=np.float64)))
        if not spread:
            continue
        back = np.empty_like(values)
        dequantize_into(*quantize(values), back)
        errors[kind] = float(np.sqrt(np.mean((back - values) ** 2, dtype=np.float64))) / spread
    return errors


def _has_values(checkpoint: Checkpoint, name: str) -> bool:
    if name not in checkpoint:
        return False
    info = checkpoint.info(name)
    return (checkpoint.folder / info.shard).stat().st_size >= info.end
