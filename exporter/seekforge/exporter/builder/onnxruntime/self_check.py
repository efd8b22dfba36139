"""What an engine must reproduce before it serves: results of the PyTorch model on one prompt, and a tolerance.

Selection of keys and experts, and FP8 rounding, are discrete: another order of summation can flip one, and the
logits then move by far more than f32 noise. So the tolerance is measured, not guessed: each candidate prompt is
also run with its embeddings changed by parts in a million, and a prompt whose results hold still is preferred.

In deep FP8 models the engine may flip a rounding that these trials did not. So there, prompts that hold still are
compared one after the other, and the first on which the engine agrees is stored: a correct engine agrees on some of
the short ones, an engine with a fault on none. Without FP8 rounding the first such prompt decides.

Products with int8 and int4 weights round their inputs in so many places that hardly any prompt holds still. There one
of a few long prompts must agree within the tolerance measured on it, since two trials may miss a flip that the engine
takes on one prompt, but not on each; and of many single tokens, of which a correct engine gives most to the last
digits, one must agree tightly: the stillest that does is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seekforge.common.errors import EngineError
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.tolerances import GATE, PERTURBATION
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import Limits, SelfCheck, SelfCheckRow
from seekforge.formats.engine.self_check import self_check_values
from seekforge.formats.int_quant import Quantization
from seekforge.formats.numerics import numerics_from_dict
from seekforge.formats.paged_cache import blocks_needed
from seekforge.formats.step_io import lay_out
from seekforge.formats.step_runner import StepRunner
from seekforge.formats.weight_recipes import TensorSource

#: Stored logits per row.
_TOP = 20
_TRIALS = 3  # the first is unperturbed
#: A prompt whose logits move less than this, in parts of their spread, is taken at once.
_STILL = 1e-3
#: The tolerance: this many times the measured change, and at least this part of the spread.
_FACTOR, _FLOOR = 8.0, GATE
#: With int8 and int4 weights, long prompts (of this many lengths) and single tokens (so many times so many) that are
#: tried at most.
_LONG_PROMPTS, _TOKENS = 4, (4, 16)
#: Longest prompt, unless `index_topk` asks for less. Longer would cross it in larger models, at a price.
_LONGEST = 136


def make_self_check(
    session: StepRunner,
    config: ModelConfig,
    numerics: dict[str, Any],
    source: TensorSource,
    limits: Limits,
    quantization: Quantization | None = None,
) -> SelfCheck:
    """Run the PyTorch model and the new engine on one prompt, compare them, and return what to store.

    Args:
        session: runs the new engine.
        config: the model's configuration.
        numerics: the roundings of the program.
        source: the checkpoint.
        limits: what the engine accepts at most.
        quantization: which of its weights are codes. PyTorch then computes with the same codes and rounds the same
            inputs to int8, so that the tolerance is about the engine, not about what quantization costs.

    Raises:
        EngineError: the engine's results differ by more than the tolerance.
    """
    settings = Settings(config, numerics_from_dict(numerics), "f32", quantization=quantization)
    longest = min((config.index_topk or _LONGEST) + 8, _LONGEST, limits.max_model_len)
    reference = TorchSession(settings, source)  # its weights are made once, for all prompts
    if quantization is not None:
        return _coded_check(reference, session, longest)
    tried: list[_Candidate] = []
    for length, count in ((longest, 1), (16, 6), (6, 12)):
        if length > longest:
            continue
        candidates = _candidates(reference, length, count)
        for candidate in filter(lambda candidate: candidate.holds_still, candidates):
            fault = _difference(candidate.check, session)
            if fault is None:
                return candidate.check
            if settings.numerics.act_quant == "none":
                raise EngineError(fault)  # nothing is rounded to FP8: no other prompt can excuse this one
        tried += candidates
    # none holds still, or the engine disagrees on all that do: the stillest decides
    best = min(tried, key=lambda candidate: candidate.change).check
    fault = _difference(best, session)
    if fault is not None:
        raise EngineError(fault)
    return best


def _coded_check(reference: TorchSession, session: StepRunner, longest: int) -> SelfCheck:
    """Prove an engine with int8 or int4 weights; see the head of this file."""
    faults: list[str] = []
    for length in range(longest, max(longest - _LONG_PROMPTS, 0), -1):
        (candidate,) = _candidates(reference, length, 1)
        fault = _difference(candidate.check, session)
        if fault is None:
            return _tight_check(reference, session)
        faults.append(fault)
    raise EngineError(faults[0])


def _tight_check(reference: TorchSession, session: StepRunner) -> SelfCheck:
    """Return the stillest single token of some on which the engine agrees to the last digits."""
    fault = None
    times, count = _TOKENS
    for draw in range(times):
        for candidate in _candidates(reference, 1, count, draw):
            tight = candidate.check.model_copy(update={"tolerance": _FLOOR * candidate.spread})
            fault = _difference(tight, session)
            if fault is None:
                return candidate.check
    raise EngineError(fault or "no token was tried; please report this")


@dataclass(frozen=True)
class _Candidate:
    """A prompt that may be stored.

    Attributes:
        check: what would be stored of it.
        change: how far its logits move when embeddings are perturbed.
        spread: the standard deviation of its logits.
    """

    check: SelfCheck
    change: float
    spread: float

    @property
    def holds_still(self) -> bool:
        return self.change <= _STILL * self.spread


def _candidates(session: TorchSession, length: int, count: int, draw: int = 0) -> list[_Candidate]:
    """Try random prompts of one length in one batch; return them, the one that moves least first."""
    settings, config = session.settings, session.settings.config
    rng = np.random.default_rng((length, draw))
    # no special token: ids below 16 and the padded end of the vocabulary are left out
    prompts = rng.integers(min(16, config.vocab_size // 2), config.vocab_size * 7 // 8, (count, length))
    rows = [prompt.tolist() for prompt in prompts for _ in range(_TRIALS)]
    blocks = blocks_needed(length)
    tables = [range(1 + i * blocks, 1 + (i + 1) * blocks) for i in range(len(rows))]
    session.allocate_caches(1 + len(rows) * blocks)
    noise = torch.randn(len(rows), length, config.hidden_size, generator=torch.Generator().manual_seed(0))
    noise[::_TRIALS] = 0

    def perturb(module: torch.nn.Module, args: Any, embedded: Tensor) -> Tensor:
        return embedded * (1 + PERTURBATION * noise)

    hook = session.module().token_embedding().register_forward_hook(perturb)
    positions = sorted({0, length // 2, length - 1})
    starts = np.arange(len(rows))[:, None] * length
    step = lay_out(rows, [0] * len(rows), tables, (starts + positions).reshape(-1).tolist())
    results = session.run(step, outputs=("logits", "logsumexp"))
    hook.remove()
    logits = results["logits"].unflatten(0, (count, _TRIALS, len(positions)))
    total = results["logsumexp"].unflatten(0, (count, _TRIALS, len(positions)))
    top = torch.topk(logits[:, 0], min(_TOP, config.vocab_size), dim=-1)
    same = torch.gather(logits, -1, top.indices.unsqueeze(1).expand(-1, _TRIALS, -1, -1))
    moved = torch.maximum(
        (same - same[:, :1]).abs().flatten(1).amax(1), (total - total[:, :1]).abs().flatten(1).amax(1)
    )
    result = []
    for chosen in moved.argsort().tolist():
        change, spread = float(moved[chosen]), float(logits[:, 0].std())
        check = SelfCheck(
            prompt_ids=tuple(rows[chosen * _TRIALS]),
            rows=tuple(
                SelfCheckRow(
                    position=position,
                    top_ids=tuple(top.indices[chosen, i].tolist()),
                    top_logits=tuple(top.values[chosen, i].tolist()),
                    logsumexp=float(total[chosen, 0, i]),
                )
                for i, position in enumerate(positions)
            ),
            tolerance=max(_FACTOR * change, _FLOOR * spread),
            reason=(
                f"{_FACTOR:g} x the change ({change:.2e}) of these values when embeddings are changed by "
                f"{PERTURBATION:g}, at least {_FLOOR:g} of the logits' spread ({spread:.2f})"
            ),
            source=f"PyTorch {torch.__version__}, numerics {settings.numerics.name}, f32 activations"
            + (f", the engine's {settings.quantization.smallest} weights" if settings.quantization else ""),
        )
        result.append(_Candidate(check, change, spread))
    return result


def _difference(check: SelfCheck, session: StepRunner) -> str | None:
    """Prefill the stored prompt on the engine; say what differs by more than the tolerance, if anything."""
    for one in self_check_values(session, check):
        if not one.agrees(check.tolerance):
            return (
                f"the built engine differs from PyTorch by {one.difference:.3g} logits at position {one.position} of "
                f"the self-check prompt, in {one.what}, allowed {check.tolerance:.3g}; nothing was written, please "
                "report this"
            )
    return None
