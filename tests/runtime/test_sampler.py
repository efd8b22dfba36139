"""Sampling from the top K must equal sampling from everything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from seekforge.plugins.errors import RequestError
from seekforge.runtime import sampler
from seekforge.runtime.edits import Edit
from seekforge.runtime.sampler import NO_TOKEN, Rules, TopLogits, choose, needs_full_logits, uniforms
from seekforge.runtime.sampling import SamplingParams

VOCAB = 500


@dataclass(frozen=True)
class Draw:
    """What one row is to choose."""

    params: SamplingParams
    seed: int = 0
    index: int = 0
    banned: frozenset[int] = frozenset()
    edit: Edit | None = None


def sample(draws: list[Draw], top: TopLogits, full) -> list[int]:
    """Call `choose` with rows that are written one by one."""
    rules = Rules.of([d.params for d in draws], [d.seed for d in draws])
    edits = {i: d.edit or Edit(banned=d.banned) for i, d in enumerate(draws) if d.edit or d.banned}
    return choose(rules, np.array([d.index for d in draws]), edits, top, lambda rows: full()[rows]).tolist()


def top_of(logits: np.ndarray, k: int) -> TopLogits:
    """The K largest as an engine gives them: falling, ties by rising id, logsumexp rounded to f32."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)
    exact = logits.astype(np.float64)
    lse = np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1)) + exact.max(1)
    return TopLogits(np.take_along_axis(logits, ids, 1), ids, lse.astype(np.float32), logits.shape[1])


def logits_rows(rows: int, spread: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, VOCAB)) * spread).astype(np.float32)


def exact_probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, then top-k, then top-p, written the plain way in f64."""
    scaled = logits.astype(np.float64) / params.temperature
    order = np.argsort(-scaled, kind="stable")
    p = np.exp(scaled[order] - scaled.max())
    p[params.top_k or len(p) :] = 0
    p /= p.sum()
    before = np.cumsum(p) - p
    p[before >= params.top_p] = 0
    p[p < params.min_p * p.max()] = 0
    p /= p.sum()
    out = np.zeros_like(p)
    out[order] = p
    return out


class Never:
    def __call__(self) -> np.ndarray:
        raise AssertionError("the full logits were fetched although the top K decide")


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [7, 3, 400]] = 5
    assert sample([Draw(SamplingParams(temperature=0))], top_of(logits, 8), Never()) == [3]


def test_greedy_without_banned_tokens() -> None:
    logits = logits_rows(1, 2.0)
    best = np.argsort(-logits[0], kind="stable")
    draw = Draw(SamplingParams(temperature=0), banned=frozenset(best[:3].tolist()))
    assert sample([draw], top_of(logits, 8), Never()) == [best[3]]
    everything = Draw(SamplingParams(temperature=0), banned=frozenset(best[:8].tolist()))
    assert sample([everything], top_of(logits, 8), lambda: logits) == [best[8]]


CASES = [
    SamplingParams(temperature=1.0, top_p=0.95),
    SamplingParams(temperature=1.0, top_p=0.5),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_p=0.95),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1.7, top_p=0.9),
    SamplingParams(temperature=3.0),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.3, top_k=5, top_p=0.7),
    SamplingParams(temperature=1.3, top_k=200, top_p=0.7),
    SamplingParams(temperature=0.02, top_p=0.9),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.5, min_p=0.02, top_p=0.9, top_k=50),
]


@pytest.mark.parametrize("params", CASES, ids=repr)
@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 6.0])
def test_the_top_k_choose_what_the_whole_vocabulary_would(params: SamplingParams, spread: float) -> None:
    logits = logits_rows(40, spread, seed=3)
    banned = [frozenset[int](), frozenset({1, 2}), frozenset({int(logits[2].argmax())})]
    draws = [Draw(params, seed=11, index=i, banned=banned[i % 3]) for i in range(40)]
    whole = sample(draws, top_of(logits, VOCAB), Never())
    for k in (16, 64):
        assert sample(draws, top_of(logits, k), lambda: logits) == whole


def test_a_nucleus_inside_the_top_k_never_fetches_everything() -> None:
    logits = logits_rows(200, 6.0, seed=4)
    draws = [Draw(SamplingParams(temperature=0.8, top_p=0.9), seed=2, index=i) for i in range(200)]
    sample(draws, top_of(logits, 256), Never())


def test_a_flat_row_fetches_everything_once() -> None:
    logits = logits_rows(20, 0.01, seed=5)
    calls = []

    def fetch() -> np.ndarray:
        calls.append(1)
        return logits

    draws = [Draw(SamplingParams(temperature=1.0, top_p=0.95), seed=2, index=i) for i in range(20)]
    tokens = sample(draws, top_of(logits, 16), fetch)
    assert len(calls) == 1 and len(set(tokens)) > 10


@pytest.mark.parametrize("params", [CASES[0], CASES[2], CASES[5], CASES[8], CASES[11]], ids=repr)
def test_distribution(params: SamplingParams) -> None:
    """Chi-square against the exact probabilities; the bound is about 6 standard deviations."""
    count = 8000
    logits = logits_rows(1, 1.5, seed=8)[:, :40]
    wanted = exact_probabilities(logits[0], params)
    repeated = np.repeat(logits, count, axis=0)
    draws = [Draw(params, seed=9, index=i) for i in range(count)]
    found = np.bincount(sample(draws, top_of(repeated, 10), lambda: repeated), minlength=40)
    assert not found[wanted == 0].any()
    often = wanted * count >= 5
    chi = (((found - wanted * count) ** 2)[often] / (wanted * count)[often]).sum()
    freedom = often.sum() - 1
    assert chi < freedom + 6 * np.sqrt(2 * freedom) + 6


@pytest.mark.parametrize("first_sort", [1, 3, 30])
def test_a_partly_sorted_row_gives_what_a_sorted_one_does(monkeypatch, first_sort: int) -> None:
    logits = np.round(logits_rows(60, 1.0, seed=6) * 4) / 4  # many ties, also where the sorted part ends
    for params in CASES:
        draws = [Draw(params, seed=3, index=i, banned=frozenset({i})) for i in range(60)]
        monkeypatch.setattr(sampler, "_FIRST_SORT", VOCAB)
        whole = sample(draws, top_of(logits, 2), lambda: logits)
        monkeypatch.setattr(sampler, "_FIRST_SORT", first_sort)
        assert sample(draws, top_of(logits, 2), lambda: logits) == whole


def test_draws_depend_on_seed_and_index_only_and_are_even() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    draws = uniforms(seeds, np.tile(np.arange(200), 200))
    assert (draws == uniforms(seeds, np.tile(np.arange(200), 200))).all()
    assert len(set(draws.tolist())) == 40_000 and draws.min() >= 0 and draws.max() < 1
    for values in (draws, draws[::200], draws[:200]):  # all, over seeds, over the tokens of one seed
        counts = np.bincount((values * 10).astype(int), minlength=10)
        expected = len(values) / 10
        assert ((counts - expected) ** 2 / expected).sum() < 9 + 6 * np.sqrt(18)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02


def test_rows_do_not_depend_on_their_batch() -> None:
    logits = logits_rows(6, 2.0, seed=1)
    draws = [Draw(SamplingParams(), seed=i, index=3) for i in range(6)]
    together = sample(draws, top_of(logits, 32), lambda: logits)
    alone = [sample([d], top_of(logits[i : i + 1], 32), lambda i=i: logits[i : i + 1])[0] for i, d in enumerate(draws)]
    assert together == alone


def test_greedy_keeps_no_full_logits() -> None:
    assert not needs_full_logits(SamplingParams(temperature=0))
    assert needs_full_logits(SamplingParams())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("min_tokens", 17),
        ("seed", -1),
        ("seed", 2**64),
        ("stop_token_ids", "abc"),
        ("stop_token_ids", [-1]),
        ("ignore_eos", 1),
        ("n", 0),
        ("best_of", 0),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", float("inf")),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {1: 200}),
        ("stop", [""]),
        ("bad_words", "word"),
        ("logprobs", -1),
        ("guided", "json"),
        ("taps", ["all"]),
    ],
)
def test_bad_parameters_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})


def random_edit(rng: np.random.Generator) -> Edit:
    """Any mix of changes."""
    seen = np.unique(rng.integers(0, VOCAB, rng.integers(1, 40)))
    generated = np.unique(rng.integers(0, VOCAB, rng.integers(1, 20)))
    return Edit(
        repetition=float(rng.choice([1.0, 1.3, 0.8])),
        seen=seen if rng.random() < 0.6 else None,
        generated=generated,
        penalty=rng.integers(1, 4, len(generated)) * rng.choice([0.5, -0.5, 0.0]) + rng.choice([0.7, 0.0]),
        bias={int(t): float(v) for t, v in zip(rng.integers(0, VOCAB, 5), rng.choice([-4.0, 3.0, -100.0], 5))},
        banned=frozenset(rng.integers(0, VOCAB, 8).tolist()),
        allowed=rng.random(VOCAB) < 0.3 if rng.random() < 0.4 else None,
    )


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), *CASES], ids=repr)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_edited_rows_choose_what_the_whole_edited_vocabulary_would(params: SamplingParams, spread: float) -> None:
    rng = np.random.default_rng(7)
    logits = logits_rows(60, spread, seed=3)
    draws = [Draw(params, seed=5, index=i, edit=random_edit(rng) if i % 4 else None) for i in range(60)]
    edited = logits.astype(np.float64)
    for i, draw in enumerate(draws):
        if draw.edit is not None:
            edited[i] = draw.edit.apply(edited[i], np.arange(VOCAB))
    plain = [Draw(params, seed=5, index=i) for i in range(60)]
    whole = sample(plain, top_of(edited, VOCAB), Never())
    for k in (16, 64, VOCAB):
        assert sample(draws, top_of(logits, k), lambda: logits) == whole


def test_an_edit_that_only_lowers_needs_no_full_row_where_the_top_decide() -> None:
    logits = logits_rows(50, 6.0, seed=4)
    lower = Edit(penalty=np.full(3, 1.0), generated=np.array([3, 99, 412]), banned=frozenset({7}))
    draws = [Draw(SamplingParams(temperature=0.8, top_p=0.9), seed=2, index=i, edit=lower) for i in range(50)]
    sample(draws, top_of(logits, 256), Never())


def test_no_token_is_chosen_where_none_may_be() -> None:
    nothing = Edit(allowed=np.zeros(VOCAB, bool))
    logits = logits_rows(2, 1.0)
    for temperature in (0, 1.0):
        params = SamplingParams(temperature=temperature)
        draws = [Draw(params, edit=nothing), Draw(params)]
        found = sample(draws, top_of(logits, 16), lambda: logits)
        assert found[0] == NO_TOKEN != found[1]


def test_numbers_are_those_of_transformers() -> None:
    """Penalties, bans and filters against an independent implementation."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(2)
    logits = logits_rows(1, 3.0, seed=9)
    ids = rng.integers(0, VOCAB, 30)
    bias = {3: 2.0, 77: -1.5}
    scores = torch.from_numpy(logits.copy())
    history = torch.from_numpy(ids)[None]
    processors = [
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
        hf.NoBadWordsLogitsProcessor([[11], [12]], eos_token_id=[1]),
        hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(60),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.02),
    ]
    for processor in processors:
        scores = processor(history, scores)
    wanted = torch.softmax(scores.double(), -1)[0].numpy()
    params = SamplingParams(temperature=0.7, top_k=60, top_p=0.9, min_p=0.02)
    edit = Edit(repetition=1.3, seen=np.unique(ids), bias=bias, banned=frozenset({11, 12}))
    changed = edit.apply(logits[0].astype(np.float64), np.arange(VOCAB)).astype(np.float32)
    np.testing.assert_allclose(exact_probabilities(changed, params), wanted, atol=1e-6)
    count = 4000
    draws = [Draw(params, seed=1, index=i, edit=edit) for i in range(count)]
    repeated = np.repeat(logits, count, axis=0)
    found = np.bincount(sample(draws, top_of(repeated, 256), lambda: repeated), minlength=VOCAB)
    assert not found[wanted == 0].any()
    often = wanted * count >= 5
    chi = (((found - wanted * count) ** 2)[often] / (wanted * count)[often]).sum()
    assert chi < often.sum() + 6 * np.sqrt(2 * often.sum())
