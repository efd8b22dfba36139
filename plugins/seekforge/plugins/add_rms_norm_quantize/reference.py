"""`AddRmsNormQuantize` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seekforge.plugins.quant import quantize


def add_rms_norm_quantize(
    x: Tensor, weight: Tensor, epsilon: float, *, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (total, y, codes, scale).

    Args:
        x: [..., H], f32 or bf16. weight: [H] f32. epsilon: added to the mean of squares.
        residual: [..., H], dtype of `x`; None: nothing is added.

    Returns:
        total and y [..., H], dtype of `x`; codes [..., H / 4] int32, four bytes of e4m3 each; scale [..., H / 128] f32.

    Source: spec §3.1 (the norm sees the unrounded sum) and spec §5.1.
    """
    wide = x.float() if residual is None else x.float() + residual.float()
    y = F.rms_norm(wide, (x.shape[-1],), weight, epsilon).to(x.dtype)
    codes, scale = quantize(y)
    return wide.to(x.dtype), y, codes.view(torch.int32), scale
