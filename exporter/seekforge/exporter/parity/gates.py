"""Pass or fail, each gate with its reason; and the first divergence in the order of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from seekforge.exporter.parity.compare.dumps import Comparison
from seekforge.exporter.parity.compare.operations import OpRecord
from seekforge.exporter.parity.locate.bisect import SEGMENT_FACTOR, SEGMENT_FLOOR
from seekforge.exporter.parity.locate.layers import FedLayer
from seekforge.exporter.tolerances import GATE, PERTURBATION

#: The engine must lie within this many times PyTorch's distance from itself.
NOISE_FACTOR = 1.5
QUANTILES = (0.5, 0.9, 0.99)
_NEXT_QUANTILES = (0.9, 0.99, 1.0)
#: Where no row lies beyond a quantile it is the largest of few, and one flip on a short context moves a row far: so
#: many times as much is allowed.
_FEW = 2.0
#: Two counts of correct runs lie apart by fewer than this many standard deviations.
_DEVIATIONS = 3.0
#: Next-token agreement and divergence of two correct runs (spec §11).
TOP1, KL = 0.99, 1e-3
#: Rows that may choose otherwise where no noise was measured (spec §11.2).
FLIPPED = 0.01
#: Gates of what becomes of the whole model, where e4m3 roundings flip by luck.
WHOLE_RUN = frozenset(("logits", "KL", "top-1", "rows that chose otherwise"))


@dataclass(frozen=True)
class Gate:
    """One condition.

    Attributes:
        name: what it is about.
        passed: whether it holds.
        value: what was measured, in words.
        allowed: what may be, in words.
        reason: why that is what may be.
        gated: False for a number that is shown and not judged.
    """

    name: str
    passed: bool
    value: str
    allowed: str
    reason: str
    gated: bool = True


@dataclass(frozen=True)
class Finding:
    """The first divergence.

    Attributes:
        layer: the absolute number of the layer.
        module: the checkpoint's module, or the whole layer where only that could be named.
        text: what is wrong, in words.
        tensors: the checkpoint tensors that the module reads.
        others: how many more operations are off by themselves.
        ranks: ranks on which the operation is off; empty of an engine of one rank.
    """

    layer: int
    module: str
    text: str
    tensors: tuple[str, ...]
    others: int
    ranks: tuple[int, ...] = ()


def judge(
    comparison: Comparison,
    records: Sequence[OpRecord],
    fed: Sequence[FedLayer] = (),
    *,
    same_numerics: bool,
    exact: bool,
    same_weights: bool = True,
    followed: bool = False,
    max_kl: float | None = None,
) -> list[Gate]:
    """Judge two sides.

    Args:
        comparison: how far the two dumps are apart.
        records: operations judged by their own inputs; empty where no side shows them.
        fed: layers of the engine on PyTorch's inputs; empty where it cannot be cut.
        same_numerics: both sides make the same roundings. If not, numbers are shown and only what `max_kl` bounds or
            is plainly broken is gated: the difference is what the other numerics cost.
        same_weights: no side rounded its weights to codes. If one did, operations are still judged, those without
            weights as strictly as ever, and what becomes of the whole model is the price: shown, not gated.
        exact: the numerics have no quantization: then every row must agree.
        followed: the reference went on with the keys and experts of the judged side where they tie but for noise, so no
            row is moved by such a choice.
        max_kl: the largest mean KL that is accepted, when somebody decides about numerics.
    """
    finite = Gate(
        "finite", comparison.not_finite == 0, f"{comparison.not_finite} values", "0", "no NaN or inf on one side only"
    )
    gates = [finite]
    caches = [record for record in records if record.module.endswith("cache)")]
    choices = [record for record in records if record.num_choices]
    numbers = [record for record in records if record not in caches and record not in choices]
    if numbers:
        gates.append(_operations("operations", numbers, same_numerics))
    if choices:
        gates.append(_operations("choices", choices, same_numerics))
    if caches:
        gates.append(_operations("caches", caches, same_numerics))
    if fed:
        gates.append(_fed(fed, gated=same_weights))
    if any(len(case.error) for case in comparison.cases):
        same = same_numerics and same_weights
        gates += _logits(comparison, same_numerics=same, exact=exact, followed=followed, max_kl=max_kl)
    if any(layer.keys.rows or layer.experts for layer in comparison.layers):
        gates.append(_flipped(comparison, same_numerics and same_weights))
    return gates


def _operations(name: str, records: Sequence[OpRecord], gated: bool) -> Gate:
    failed = [record for record in records if record.failed]
    worst = max(records, key=lambda record: record.error / (record.gate or 1.0))
    value = f"{len(failed)} of {len(records)} off" if failed else f"{len(records)} right, worst {worst.error:.1e}"
    return Gate(name, not failed or not gated, value, "0 off", worst.reason, gated)


def _fed(fed: Sequence[FedLayer], *, gated: bool) -> Gate:
    failed = [one for one in fed if one.bad]
    worst = max(fed, key=lambda one: one.error / one.allowed)
    value = f"{len(failed)} of {len(fed)} off" if failed else f"{len(fed)} right"
    reason = (
        f"each given PyTorch's inputs; most rows within {SEGMENT_FACTOR:g} x what PyTorch's layer makes of inputs that "
        f"changed by rounding noise ({PERTURBATION:g} in f32), and {SEGMENT_FLOOR:g}"
    )
    if not gated:
        value, reason = f"{len(fed)} layers", "each given PyTorch's inputs: what its codes in place of weights cost"
    allowed = f"{worst.allowed:.1e}" if gated else "—"
    return Gate(
        "the engine's layers", not (failed and gated), f"{value}, worst {worst.error:.1e}", allowed, reason, gated
    )


def _all(comparison: Comparison, get: Callable) -> np.ndarray:
    return np.concatenate([get(case) for case in comparison.cases])


def _logits(
    comparison: Comparison, *, same_numerics: bool, exact: bool, followed: bool, max_kl: float | None
) -> list[Gate]:
    error, kl = _all(comparison, lambda c: c.error), _all(comparison, lambda c: c.kl)
    top1 = _all(comparison, lambda c: c.top1)
    noise, noise_kl = _all(comparison, lambda c: c.drawn_error), _all(comparison, lambda c: c.drawn_kl)
    noise_top1 = _all(comparison, lambda c: c.drawn_top1)
    quantiles = np.quantile(error, QUANTILES)
    text = " / ".join(f"{value:.1e}" for value in quantiles)
    names = "/".join(f"{q:.0%}" for q in QUANTILES)
    gates = []
    if not same_numerics:
        gates.append(
            Gate("logits", True, text, "—", f"quantiles {names}: what it costs to compute otherwise", gated=False)
        )
    elif exact:
        flipped = _all(comparison, lambda c: c.flipped[c.logit_rows]) & (not followed)
        out = (error > GATE) & ~flipped
        # a row may also move because one before it chose otherwise
        allowed = 0 if not flipped.any() else int(np.ceil(FLIPPED * len(error)))
        which = "rows, PyTorch following choices that tie" if followed else "rows that chose alike"
        reason = f"{which}, beyond {GATE:g} of the logits' spread: FP32 sums in another order give 4e-6"
        gates.append(
            Gate("logits", int(out.sum()) <= allowed, f"{out.sum()} of {len(out)} rows", f"{allowed} rows", reason)
        )
    elif len(noise):
        few = np.array([len(error) * (1 - q) < 1 for q in QUANTILES])
        bound = NOISE_FACTOR * np.where(few, _FEW, 1.0) * np.quantile(noise, _NEXT_QUANTILES) + GATE
        reason = (
            f"quantiles {names} of the error in parts of the spread; allowed: {NOISE_FACTOR:g} x the next quantile "
            f"({'/'.join(f'{q:.0%}' for q in _NEXT_QUANTILES)}) of PyTorch against itself with embeddings changed by "
            "rounding noise (1e-6 in f32), since an e4m3 rounding that flips moves a row for good, and on few texts "
            "luck decides how early; twice as much where no row lies beyond the quantile"
        )
        allowed_text = " / ".join(f"{value:.1e}" for value in bound)
        gates.append(Gate("logits", bool((quantiles <= bound).all()), text, allowed_text, reason))
    mean_kl, agree = float(kl.mean()), float(top1.mean())
    kl_bound, top1_bound = KL, TOP1
    reason = "mean KL of the next token (spec §11)"
    top1_reason = "same most likely token (spec §11)"
    if len(noise) and not exact:
        kl_bound = max(KL, NOISE_FACTOR * float(noise_kl.mean()) + 1e-6)
        noisy = float(noise_top1.mean())
        top1_bound = min(TOP1, noisy - 0.01 - _luck(1 - agree, 1 - noisy, len(top1)))
        reason += f", or {NOISE_FACTOR:g} x PyTorch against itself ({noise_kl.mean():.1e})"
        top1_reason += (
            f", or 1 % below PyTorch against itself ({noisy:.1%}), and {_DEVIATIONS:g} standard deviations of two "
            f"counts in {len(top1)} rows"
        )
    gated = same_numerics or max_kl is not None
    if max_kl is not None:
        kl_bound, reason = max_kl, "mean KL of the next token, as asked for with --max-kl"
    gates.append(
        Gate("KL", not gated or mean_kl <= kl_bound, f"{mean_kl:.1e}", f"{kl_bound:.1e}" if gated else "—",
             reason, gated)
    )  # fmt: skip
    passed = not same_numerics or agree >= top1_bound
    allowed_text = f"{top1_bound:.1%}" if same_numerics else "—"
    gates.append(Gate("top-1", passed, f"{agree:.2%}", allowed_text, top1_reason, same_numerics))
    return gates


def _luck(one: float, other: float, rows: int) -> float:
    """Return how far the shares of rare events in two runs may lie apart by luck."""
    return _DEVIATIONS * float(np.sqrt((one + other) / max(1, rows)))


def _flipped(comparison: Comparison, same_numerics: bool) -> Gate:
    total = sum(len(case.flipped) for case in comparison.cases)
    flipped = sum(int(case.flipped.sum()) for case in comparison.cases)
    noise = sum(
        layer.keys.noise_rows + (layer.experts.noise_rows if layer.experts else 0) for layer in comparison.layers
    )
    share, moved = flipped / max(1, total), noise / max(1, total)
    allowed = max(FLIPPED, NOISE_FACTOR * moved) + _luck(share, moved, total)
    reason = (
        f"rows in which any layer chose other keys or experts; PyTorch against itself: {noise} choices of layers; and "
        f"{_DEVIATIONS:g} standard deviations of two counts"
    )
    return Gate(
        "rows that chose otherwise",
        share <= allowed or not same_numerics,
        f"{flipped} of {total}",
        f"{allowed:.1%}" if same_numerics else "—",
        reason,
        same_numerics,
    )


def first_divergence(records: Sequence[OpRecord], fed: Sequence[FedLayer] = ()) -> Finding | None:
    """Name the first operation at fault. Each was judged by its own inputs, so nothing upstream is blamed on it.

    A damaged cache block shows in what reads it; then the cache is named. Where every operation is right on the
    engine's inputs, a layer of the engine that is wrong on PyTorch's is named.
    """
    failed = [record for record in records if record.failed]
    other = {(one.graph, one.layer): one for one in fed}
    if not failed:
        bad = next((one for one in fed if one.bad), None)
        if bad is None:
            return None
        return Finding(bad.layer, bad.point or "the whole layer", _fed_text(bad), (), 0)
    first = failed[0]
    for record in failed:
        reads = "(selection)" in first.module or "attention)" in first.module
        if record.module.endswith("cache)") and record.layer == first.layer and reads:
            first = record
            break
    where = ""
    if first.where:
        where = "; case {case}, step {step}, sequence {sequence}, position {position}".format(**first.where)
    if first.num_choices:
        flips = sorted((flip for flip in first.flips if flip.kind == "wrong"), key=lambda flip: -flip.gap)
        shown = ", ".join(f"{f.chosen} (gap {f.gap:.1e})" for f in flips[:3])
        text = (
            f"{first.does}: {first.num_flips['wrong']} choices are wrong by more than noise ({first.reason}), "
            f"the farthest {shown}{where}"
        )
    elif first.module.endswith("cache)"):
        text = f"holds other values than were written there: {first.detail}{where}"
    else:
        text = (
            f"{first.does}: given the same inputs it differs by {first.error:.2e} of its root mean square, allowed "
            f"{first.gate:.0e}; {first.num_bad} of {first.num_rows} rows{where}"
        )
        if first.detail:
            text += f"; {first.detail}"
    if (first.graph, first.layer) in other:
        text += f". {_fed_text(other[first.graph, first.layer])}"
    ranks = tuple(sorted(first.ranks))
    if ranks:
        text = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}"
    return Finding(first.layer, first.module, text, first.tensors, len(failed) - 1, ranks)


def _fed_text(one: FedLayer) -> str:
    """Say what a layer of the engine does with PyTorch's inputs."""
    text = f"On PyTorch's inputs the engine's layer differs by {one.error:.1e} in most rows, allowed {one.allowed:.1e}"
    return f"{text}; {one.detail}" if one.detail else text
