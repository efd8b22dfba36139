"""The rollout side of reinforcement learning: groups of completions with all that a trainer needs of them.

A trainer computes log-probabilities of the sampled tokens itself, and they are those of the engine only where both
choose the same experts and the same keys. So a rollout has, beside its tokens, what router and indexer chose at every
position, to be replayed (docs/rl.md), and the version of the weights that chose it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from seekforge.common.errors import RequestError
from seekforge.runtime.arguments import Prompt, split_prompts
from seekforge.runtime.engine.outputs import CompletionOutput, RequestOutput
from seekforge.runtime.llm import LLM
from seekforge.runtime.sampling.params import TAPS, SamplingParams, completion_seed
from seekforge.runtime.sequence import FinishReason
from seekforge.runtime.values import integer, shown


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled completion.

    Attributes:
        prompt_token_ids: P tokens.
        token_ids: the T sampled ones, the one that ended the completion included.
        logprobs: [T] f32, of each sampled token by the model alone: what it is sampled with at temperature 1 without
            top-k, top-p and min-p.
        text: the text of the sampled tokens.
        finish_reason: "stop" or "length"; "abort" of one that was ended for its staleness.
        group: which of the prompts it continues.
        seed: a request for this prompt alone with this seed samples the same tokens from the same weights.
        weight_version, weight_changes: the weights that chose its tokens, as `CompletionOutput` has them.
        expert_ids: [MoE layers, P + T − 1, num_experts_per_tok] int32, the chosen experts of each position that was
            computed; None: not recorded.
        topk_indices: [layers, P + T − 1, index_topk] int32, the chosen keys, filled up with −1; None: not recorded.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: np.ndarray
    text: str
    finish_reason: FinishReason
    group: int
    seed: int
    weight_version: int
    weight_changes: tuple[int, ...]
    expert_ids: np.ndarray | None
    topk_indices: np.ndarray | None


class RolloutEngine:
    """Samples groups from an engine whose weights a trainer updates.

    Attributes:
        llm: the engine.
        max_staleness: updates of the weights after which a rollout is too old to learn from; None: never.
        num_sampled, num_stale: rollouts that were sampled, and those of them that were too old.
    """

    def __init__(self, llm: LLM, *, max_staleness: int | None = None, record: Sequence[str] = TAPS) -> None:
        """Make one.

        Args:
            llm: an open engine.
            max_staleness: see the class.
            record: which choices rollouts bear: "expert_ids", "topk_indices", both or none.

        Raises:
            RequestError: an argument is something else.
        """
        if not isinstance(llm, LLM):
            raise RequestError(f"llm is {shown(llm)}, expected an open LLM")
        self.llm, self.record = llm, SamplingParams(taps=record).taps
        self.max_staleness = None if max_staleness is None else integer("max_staleness", max_staleness, 0)
        self.num_sampled = self.num_stale = 0

    @property
    def weight_version(self) -> int:
        """How often the weights were updated."""
        return self.llm.weight_version

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams, *, seed: int | None = None
    ) -> list[list[Rollout]]:
        """Sample `params.n` completions of each prompt, all of them together.

        Args:
            prompts: as `LLM.generate` takes them.
            params: how; `logprobs`, `taps` and `seed` are set here.
            seed: the seed of all draws: the same seed and weights give the same rollouts, whatever else runs.
                None draws one.

        Returns:
            One group per prompt, in their order.

        Raises:
            RequestError: a prompt cannot be served, or `params` ask for completions that were not sampled alike.
        """
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params is {shown(params)}, expected SamplingParams")
        if params.best_of is not None:
            raise RequestError("best_of returns the best completions, which no trainer may learn from; use n")
        batch, _ = split_prompts(prompts)
        first = secrets.randbits(63) if seed is None else integer("seed", seed, 0)
        seeds = np.random.SeedSequence(first).generate_state(len(batch), np.uint64) >> np.uint64(1)
        recording = replace(params, logprobs=0, taps=self.record)
        outputs = self.llm.generate(batch, [replace(recording, seed=int(one)) for one in seeds])
        groups = [
            [_rollout(output, one, group, int(seeds[group])) for one in output.outputs]
            for group, output in enumerate(outputs)
        ]
        self.num_sampled += sum(map(len, groups))
        return groups

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> int:
        """Swap weights, see `LLM.update_weights`: what is on its way and would be too old ends; returns the version."""
        return self.llm.update_weights(tensors, max_staleness=self.max_staleness)

    def staleness(self, rollout: Rollout) -> int:
        """Return how many updates ago the first token of a rollout was chosen."""
        return self.weight_version - rollout.weight_version

    def fresh(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        """Return those that are not too old, and count the others."""
        every = list(rollouts)
        if self.max_staleness is None:
            return every
        kept = [one for one in every if self.staleness(one) <= self.max_staleness]
        self.num_stale += len(every) - len(kept)
        return kept


def _rollout(output: RequestOutput, one: CompletionOutput, group: int, seed: int) -> Rollout:
    assert one.logprobs is not None
    return Rollout(
        output.prompt_token_ids,
        one.token_ids,
        np.array([entry.logprob for entry in one.logprobs], np.float32),
        one.text,
        one.finish_reason,
        group,
        completion_seed(seed, one.index),
        one.weight_version,
        one.weight_changes,
        _stacked(one.taps, "expert_ids"),
        _stacked(one.taps, "topk_indices"),
    )


def _stacked(taps: Mapping[str, np.ndarray], kind: str) -> np.ndarray | None:
    """Return the choices of all layers, in their order."""
    layers = sorted(int(name.partition(".")[2]) for name in taps if name.partition(".")[0] == kind)
    return np.stack([taps[f"{kind}.{layer}"] for layer in layers]) if layers else None
