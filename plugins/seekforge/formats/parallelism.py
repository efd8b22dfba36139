"""How a model is laid out over GPUs: tensor, pipeline, data and expert parallelism, in vLLM's sense.

One value says it everywhere: `plan` proposes it, `export` makes the program of it, `build` and `run` read it there.
Which sizes of a model divide so is decided in one place, by the family's table of parameters
(`exporter.models.sharding`). Light: the runtime starts with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from seekforge.common.errors import ConfigError
from seekforge.common.records import Record, at_least

if TYPE_CHECKING:  # the runtime starts without it
    from seekforge.formats.checkpoint.model_config import ModelConfig


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands: its replica, its pipeline stage, and its place among the tensor-parallel ranks."""

    dp_rank: int
    pp_rank: int
    tp_rank: int


@dataclass(frozen=True)
class RankSizes:
    """Sizes of one rank, under the keys that config.json has for those of the model.

    Attributes:
        num_attention_heads: heads of the attention.
        intermediate_size: width of dense MLPs.
        shared_intermediate_size: width of all shared experts together.
        n_routed_experts: routed experts that the rank holds, whole or a part of each.
        moe_intermediate_size: width of what it holds of each.
        vocab_size: rows of the embedding and of the head.
    """

    num_attention_heads: int
    intermediate_size: int
    shared_intermediate_size: int
    n_routed_experts: int
    moe_intermediate_size: int
    vocab_size: int


class Parallelism(Record):
    """How many ranks share a model, and how. Ranks are numbered as vLLM does: (dp_rank · pp + pp_rank) · tp + tp_rank.

    Attributes:
        tp: vLLM's `tensor_parallel_size`. So many ranks divide the heads of the attention and the columns of dense MLPs
            and experts of every layer, and add up what they make of their parts. They divide the vocabulary of
            embedding and head where it divides into equal parts. Router, indexer, norms and caches are whole on each.
        pp: vLLM's `pipeline_parallel_size`: stages of consecutive layers, of `tp` ranks each.
        dp: vLLM's `data_parallel_size`: replicas, each with its own requests and caches. They are whole models of
            `tp · pp` ranks, which share nothing; so programs and engines are those of one replica, whose `dp` is 1.
        ep: vLLM's `enable_expert_parallel`. Routed experts are dealt out whole among the ranks of a stage, instead of
            being cut into `tp` parts. The group is `tp` ranks; vLLM's is tp · dp, as its replicas share experts.
    """

    tp: Annotated[int, at_least(1)] = 1
    pp: Annotated[int, at_least(1)] = 1
    dp: Annotated[int, at_least(1)] = 1
    ep: bool = False

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica."""
        return self.tp * self.pp

    @property
    def num_gpus(self) -> int:
        """Ranks of all replicas."""
        return self.num_ranks * self.dp

    @property
    def ep_size(self) -> int:
        """Ranks among which the experts of a layer are dealt out; 1 where each rank has a part of every expert."""
        return self.tp if self.ep else 1

    @property
    def options(self) -> str:
        """The options of `seekforge export` that ask for it; empty for one rank."""
        parts = [f"--{name} {size}" for name, size in (("tp", self.tp), ("pp", self.pp)) if size > 1]
        return " ".join([*parts, *(["--ep"] if self.ep else [])])

    def __str__(self) -> str:
        sizes = (("TP", self.tp), ("EP", self.ep_size), ("PP", self.pp), ("DP", self.dp))
        return "·".join(f"{name}{size}" for name, size in sizes if size > 1) or "1 GPU"

    def divides_vocabulary(self, config: ModelConfig) -> bool:
        """Whether each rank of a stage has a part of the vocabulary; else embedding and head are whole on each."""
        return self.tp > 1 and config.vocab_size % self.tp == 0

    def coordinates(self, rank: int) -> Coordinates:
        """Return where a rank stands.

        Raises:
            ConfigError: there is no such rank.
        """
        if not 0 <= rank < self.num_gpus:
            raise ConfigError(f"rank {rank}: expected 0 to {self.num_gpus - 1} of {self}")
        stage, tp_rank = divmod(rank, self.tp)
        dp_rank, pp_rank = divmod(stage, self.pp)
        return Coordinates(dp_rank, pp_rank, tp_rank)

    def rank_sizes(self, config: ModelConfig) -> RankSizes:
        """Return the sizes of one rank of a model that divides so."""
        tp = self.tp
        return RankSizes(
            num_attention_heads=config.num_attention_heads // tp,
            intermediate_size=config.intermediate_size // tp,
            shared_intermediate_size=config.n_shared_experts * config.moe_intermediate_size // tp,
            n_routed_experts=config.n_routed_experts // self.ep_size,
            moe_intermediate_size=config.moe_intermediate_size // (1 if self.ep else tp),
            vocab_size=config.vocab_size // (tp if self.divides_vocabulary(config) else 1),
        )


#: A model on one GPU.
ONE_RANK = Parallelism()
