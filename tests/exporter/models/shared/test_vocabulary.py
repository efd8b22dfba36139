"""Ranks that divide the vocabulary: together they have the embedding and the logits, to the bit."""

from __future__ import annotations

import pytest
import torch

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.models.sharding import whole_vocabulary
from seekforge.exporter.models.shared.layers import Embedding, all_logits
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.weight_recipes import evaluate, for_rank, vocab_start
from seekforge.runtime.backends.weights import GivenTensors

TINY = load_preset("tiny")


@pytest.mark.parametrize("numerics", ["exact", "bf16"])
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_add_up_to_the_whole(tp: int, numerics: str) -> None:
    """The first and the last token of every rank are among those that are looked up."""
    ranks, config = Parallelism(tp=tp), TINY.config
    settings = Settings(config, NUMERICS[numerics], parallelism=ranks)
    size, whole = config.vocab_size // tp, torch.randn(config.vocab_size, config.hidden_size).to(settings.dtype)
    ids = torch.arange(config.vocab_size)[[0, *(edge for r in range(1, tp) for edge in (r * size - 1, r * size)), -1]]
    ids, hidden = ids.reshape(2, -1), torch.randn(5, config.hidden_size)
    embedded = torch.zeros(*ids.shape, config.hidden_size, dtype=settings.dtype)
    logits = torch.zeros(5, config.vocab_size)
    for rank in range(tp):
        start = evaluate(for_rank(vocab_start(config.vocab_size, ranks), ranks, rank), GivenTensors({}))
        embedding = Embedding(settings)
        embedding.weight.copy_(whole[rank * size : (rank + 1) * size])
        embedded += embedding(ids, torch.from_numpy(start))
        logits += all_logits(hidden @ embedding.weight.float().T, torch.from_numpy(start), settings)
    assert torch.equal(embedded, whole[ids])
    expected = torch.cat([hidden @ part.float().T for part in whole.split(size)], dim=-1)
    assert torch.equal(logits, expected)


def test_a_vocabulary_that_does_not_divide_is_said() -> None:
    odd = ModelConfig.parse(TINY.config_json | {"vocab_size": 1027}, "odd")
    for ranks in (Parallelism(), Parallelism(pp=2)):
        assert whole_vocabulary(odd, ranks) is None
    assert whole_vocabulary(TINY.config, Parallelism(tp=2)) is None
    assert whole_vocabulary(odd, Parallelism(tp=2, pp=2)) == (
        "vocab_size is 1027, which 2 ranks do not divide into equal parts: each has embedding and head whole"
    )
    sizes = [Parallelism(tp=2).rank_sizes(config).vocab_size for config in (odd, TINY.config)]
    assert sizes == [1027, TINY.config.vocab_size // 2]
