"""`SumRanks` in plain torch: in one process there is one rank's part, and no sum to be had of it."""

from torch import Tensor


def sum_ranks(x: Tensor, num_ranks: int) -> Tensor:
    """Return what this rank gives to the sum.

    Args:
        x: [..., H], f32 or bf16.
        num_ranks: tensor-parallel ranks.

    Returns:
        A copy of `x`; `program.ranks.merge` joins the graphs of all ranks to have the sum.
    """
    return x.clone()
