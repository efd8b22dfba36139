"""`Bf16Linear` in plain torch: both operands to f32, multiply."""

from torch import Tensor


def bf16_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · Wᵀ.

    Args:
        x: [..., K], f32 or bf16. weight: [N, K], dtype of `x`.

    Returns:
        [..., N] f32.

    Source: spec §5.3: the reference reads these weights as f32, which changes no value of theirs.
    """
    return x.float() @ weight.float().T
