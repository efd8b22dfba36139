"""Test vectors of `MoeExperts`."""

from __future__ import annotations

import torch
from torch import Tensor

from seekforge.plugins.quant import quantize
from seekforge.plugins.testing import Case, Draw

_H, _I, _E = 256, 128, 6


def cases() -> list[Case]:
    """Return the vectors."""
    draw = Draw(6)
    result: list[Case] = []

    def add(name: str, ids: Tensor, *, x: Tensor | None = None, nan_expert: int | None = None, inner: int = _I) -> None:
        tokens, top_k = ids.shape
        w13, w2 = draw.fp8(_E, 2 * inner, _H), draw.fp8(_E, _H, inner)
        if nan_expert is not None:
            w13[nan_expert], w2[nan_expert] = torch.nan, torch.nan
        inputs = (
            draw.normal(tokens, _H) if x is None else x,
            ids.to(torch.int32),
            draw.uniform(tokens, top_k, low=0.05, high=1.0),
            w13,
            draw.weight_scale(_E, 2 * inner // 128, _H // 128),
            w2,
            draw.weight_scale(_E, _H // 128, inner // 128),
        )
        for act_quant in ("ue8m0", "none"):
            result.append(Case("MoeExperts", f"{name}-{act_quant}", inputs, {"act_quant": act_quant}))

    def random_ids(tokens: int, top_k: int) -> Tensor:
        return torch.stack([draw.order(_E)[:top_k] for _ in range(tokens)])

    add("one-token", random_ids(1, 2))
    add("random", random_ids(9, 3))
    add("two-inner-blocks", random_ids(5, 2), inner=256)
    add("every-expert-for-every-token", random_ids(4, _E))
    add("all-tokens-on-one-expert", torch.full((7, 1), 4))
    # experts 2 and 5 see no token; what they hold must not matter
    idle = torch.tensor([[0, 1], [3, 4], [4, 0], [1, 3]])
    add("idle-experts-hold-nan", idle, nan_expert=2)
    add("first-and-last-expert", torch.tensor([[0, _E - 1], [_E - 1, 0]]))
    x = draw.normal(3, _H)
    x[1], x[2] = 0.0, x[2] * 1e3
    add("zero-and-large-tokens", random_ids(3, 2), x=x)
    # expert parallelism: −1 marks an expert of another rank, and the last token has none here
    add("experts-of-other-ranks", torch.tensor([[-1, 0], [3, -1], [2, 5], [-1, -1]]))
    return result


def optional_cases() -> list[Case]:
    """Return vectors whose rows are quantized already, and with a shared expert; what `x` holds besides does not count.

    The shared expert is as wide as the others, or narrower; one of a rank that has no other work.
    """
    draw = Draw(7)
    result: list[Case] = []
    for name, tokens, inner, shared in (
        ("codes", 3, 128, 0),
        ("codes-of-many", 21, 128, 0),
        ("shared-of-one-token", 1, 128, 128),
        ("shared-of-many", 21, 128, 128),
        ("narrower-shared", 5, 384, 128),
        ("shared-alone", 2, 256, 256),
    ):
        ids = torch.stack([draw.order(_E)[:2] for _ in range(tokens)]).to(torch.int32)
        codes, x_scale = quantize(draw.normal(tokens, _H))
        inputs = [
            torch.full((tokens, _H), torch.nan),
            torch.full_like(ids, -1) if name == "shared-alone" else ids,
            draw.uniform(tokens, 2, low=0.05, high=1.0),
            draw.fp8(_E, 2 * inner, _H),
            draw.weight_scale(_E, 2 * inner // 128, _H // 128),
            draw.fp8(_E, _H, inner),
            draw.weight_scale(_E, _H // 128, inner // 128),
            codes.view(torch.int32),
            x_scale,
        ]
        if shared:
            inputs += [
                draw.fp8(2 * shared, _H),
                draw.weight_scale(2 * shared // 128, _H // 128),
                draw.fp8(_H, shared),
                draw.weight_scale(_H // 128, shared // 128),
            ]
        result.append(Case("MoeExperts", name, tuple(inputs), {"act_quant": "ue8m0"}))
    return result
