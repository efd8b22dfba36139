"""Sampling from the top K must equal sampling from everything."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from seekforge.common.errors import RequestError
from seekforge.runtime.sampling import sampler
from seekforge.runtime.sampling.bad_words import BadWords, Bans
from seekforge.runtime.sampling.inverse_cdf import SamplingMetadata
from seekforge.runtime.sampling.logits_processors import EditedRows, EditTables
from seekforge.runtime.sampling.params import SamplingParams, StructuredOutputsParams
from seekforge.runtime.sampling.sampler import NO_TOKEN, FullLogits, TopLogits, choose, needs_full_logits
from seekforge.runtime.sequence import Sequence
from seekforge.runtime.text.vocabulary import Vocabulary

VOCAB = 500


#: Texts of tokens of which one sees where each begins: a text-level ban is then one of token sequences.
SPELLED = Vocabulary([b"<%03d" % token for token in range(VOCAB)])


def words_of(words: tuple[tuple[int, ...], ...]) -> list[str]:
    """Return token sequences as texts."""
    return [b"".join(SPELLED.bytes_of[token] for token in word).decode() for word in words]


@dataclass(frozen=True)
class Allowed:
    """A grammar that never changes."""

    mask: np.ndarray = field(compare=False)

    def allowed(self) -> np.ndarray:
        return self.mask

    def advance(self, token: int) -> None:
        assert self.mask[token]


@dataclass(frozen=True)
class Draw:
    """What one row is to choose, after what."""

    params: SamplingParams
    seed: int = 0
    index: int = 0
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_ids: frozenset[int] = frozenset()
    allowed: np.ndarray | None = None

    def sequence(self, number: int) -> Sequence:
        grammar = None if self.allowed is None else Allowed(self.allowed)
        one = Sequence(
            number,
            self.prompt,
            self.params,
            stop_ids=self.stop_ids,
            early_ids=self.stop_ids,
            bad_words=BadWords(Bans(words_of(self.bad_words), SPELLED, frozenset())) if self.bad_words else None,
            grammar=grammar,
        )
        one.output_ids.extend(self.output)
        one.num_tokens += len(self.output)
        one.last_id = self.output[-1] if self.output else one.last_id
        one.state = "running"
        return one

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """What becomes of the logits of the whole vocabulary, token by token and the plain way."""
        params, out = self.params, logits.astype(np.float64)
        for token in {*self.prompt, *self.output, *params.logit_bias}:
            count = self.output.count(token)
            out[token] += params.logit_bias.get(token, 0.0)
            if params.repetition_penalty != 1 and (count or token in self.prompt):
                out[token] *= 1 / params.repetition_penalty if out[token] > 0 else params.repetition_penalty
            out[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        for word in self.bad_words:
            if len(word) == 1 or self.output[1 - len(word) :] == word[:-1]:
                out[word[-1]] = -np.inf
        if len(self.output) < params.min_tokens:
            out[list(self.stop_ids)] = -np.inf
        if self.allowed is not None:
            out[~self.allowed] = -np.inf
        return out


def banning(params: SamplingParams, *tokens: int) -> tuple[SamplingParams, tuple[tuple[int, ...], ...]]:
    """Parameters and bad words that ban these tokens."""
    return replace(params, bad_words=["banned"]), tuple((token,) for token in tokens)


def sample(draws: list[Draw], top: TopLogits, full) -> list[int]:
    """Call `choose` with rows that are written one by one."""
    sequences = [draw.sequence(number) for number, draw in enumerate(draws)]
    edits = None
    if any(draw.params.edits_logits for draw in draws):
        edits, broken = EditedRows(EditTables(len(draws), top.vocab_size), sequences).next(range(len(draws)))
        assert not broken
    rules = SamplingMetadata.of([d.params for d in draws], [d.seed for d in draws])
    rows = FullLogits(full, np.arange(len(draws)))
    return choose(rules, np.array([d.index for d in draws]), edits, top, rows).tolist()


def top_of(logits: np.ndarray, k: int) -> TopLogits:
    """The K largest as an engine gives them: falling, ties by rising id, logsumexp rounded to f32."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)
    exact = logits.astype(np.float64)
    lse = np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1)) + exact.max(1)
    return TopLogits(np.take_along_axis(logits, ids, 1), ids, lse.astype(np.float32), logits.shape[1])


def logits_rows(rows: int, spread: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, VOCAB)) * spread).astype(np.float32)


def exact_probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, then min-p, then top-k, then top-p, written the plain way in f64."""
    scaled = logits.astype(np.float64) / params.temperature
    order = np.argsort(-scaled, kind="stable")
    p = np.exp(scaled[order] - scaled.max())
    p[p < params.min_p * p.max()] = 0
    p[params.top_k or len(p) :] = 0
    p /= p.sum()
    before = np.cumsum(p) - p
    p[before >= params.top_p] = 0
    p /= p.sum()
    out = np.zeros_like(p)
    out[order] = p
    return out


#: Of seeds 0, 7, 2^64 − 1 at tokens 0, 3, 9.
DRAWS = [0.06477138672626537, 0.45472896245420213, 0.29020853094653465]


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
    params, words = banning(SamplingParams(temperature=0), *best[:8].tolist())
    draw, everything = Draw(params, bad_words=words[:3]), Draw(params, bad_words=words)
    assert sample([draw], top_of(logits, 8), Never()) == [best[3]]
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
    banned = [(), (1, 2), (int(logits[2].argmax()),)]
    given = [banning(params, *banned[i % 3]) if i % 3 else (params, ()) for i in range(40)]
    draws = [Draw(one, seed=11, index=i, bad_words=words) for i, (one, words) in enumerate(given)]
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
        given = [banning(params, i) for i in range(60)]
        draws = [Draw(one, seed=3, index=i, bad_words=words) for i, (one, words) in enumerate(given)]
        monkeypatch.setattr(sampler, "_FIRST_SORT", VOCAB)
        whole = sample(draws, top_of(logits, 2), lambda: logits)
        monkeypatch.setattr(sampler, "_FIRST_SORT", first_sort)
        assert sample(draws, top_of(logits, 2), lambda: logits) == whole


def uniforms(seeds: np.ndarray, index: np.ndarray) -> np.ndarray:
    return SamplingMetadata.of([SamplingParams()] * len(seeds), seeds.tolist()).draws(index)


def test_draws_depend_on_seed_and_index_only_and_are_even() -> None:
    seeds, index = np.repeat(np.arange(200), 200), np.tile(np.arange(200), 200)
    draws = uniforms(seeds, index)
    assert (draws == uniforms(seeds, index)).all()
    assert uniforms(seeds[999:1001], index[999:1001]).tolist() == draws[999:1001].tolist()
    assert len(set(draws.tolist())) == 40_000 and draws.min() >= 0 and draws.max() < 1
    for values in (draws, draws[::200], draws[:200]):  # all, over seeds, over the tokens of one seed
        counts = np.bincount((values * 10).astype(int), minlength=10)
        expected = len(values) / 10
        assert ((counts - expected) ** 2 / expected).sum() < 9 + 6 * np.sqrt(18)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02


def test_draws_stay_what_they_were() -> None:
    """Whoever stored a seed gets the same text from the next version."""
    assert uniforms(np.array([0, 7, 2**64 - 1], np.uint64), np.array([0, 3, 9])).tolist() == DRAWS


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
        ("top_k", -2),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("min_tokens", 17),
        ("seed", -2),
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
        ("logprobs", -2),
        ("structured_outputs", "json"),
        ("taps", ["all"]),
    ],
)
def test_bad_parameters_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})


def random_draw(rng: np.random.Generator, params: SamplingParams, index: int) -> Draw:
    """Any mix of changes."""

    def some(high: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, VOCAB, rng.integers(0, high)).tolist())

    output, guided = some(20), rng.random() < 0.3
    params = replace(
        params,
        max_tokens=100,
        repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
        frequency_penalty=float(rng.choice([0.5, -0.5, 0.0])),
        presence_penalty=float(rng.choice([0.7, -0.2, 0.0])),
        logit_bias={t: float(rng.choice([-4.0, 3.0, 8.0, -100.0])) for t in some(6)},
        bad_words=["banned"],
        min_tokens=0 if guided else int(rng.choice([0, 10])),
        structured_outputs=StructuredOutputsParams(regex=".") if guided else None,
    )
    return Draw(
        params,
        5,
        index,
        some(40) or (1,),
        output,
        (*((t,) for t in some(5)), (output[-1] if output else 3, int(rng.integers(VOCAB))), (9, 9, 9)),
        frozenset(some(4)),
        rng.random(VOCAB) < 0.3 if guided else None,
    )


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), *CASES], ids=repr)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_edited_rows_choose_what_the_whole_edited_vocabulary_would(params: SamplingParams, spread: float) -> None:
    rng = np.random.default_rng(7)
    logits = logits_rows(60, spread, seed=3)
    draws = [random_draw(rng, params, i) if i % 4 else Draw(params, 5, i) for i in range(60)]
    edited = np.stack([draw.apply(row) for draw, row in zip(draws, logits, strict=True)])
    plain = [Draw(params, seed=5, index=i) for i in range(60)]
    whole = sample(plain, top_of(edited, VOCAB), Never())
    for k in (16, 64, 200, VOCAB):
        assert sample(draws, top_of(logits, k), lambda: logits) == whole


def test_an_edit_that_only_lowers_needs_no_full_row_where_the_top_decide() -> None:
    logits = logits_rows(50, 6.0, seed=4)
    params, words = banning(SamplingParams(temperature=0.8, top_p=0.9, presence_penalty=1.0), 7)
    draws = [Draw(params, 2, i, output=(3, 99, 412), bad_words=words) for i in range(50)]
    sample(draws, top_of(logits, 256), Never())


def test_a_favored_token_is_looked_up_by_itself() -> None:
    """A bias may make any token the likeliest. Its logit is fetched, and no row is sorted."""
    logits = logits_rows(50, 6.0, seed=4)
    last = np.argsort(logits, axis=1)[:, 0].tolist()
    params = [replace(SamplingParams(temperature=0.8, top_p=0.9), logit_bias={t: 60.0}) for t in last]
    draws = [Draw(p, 2, i) for i, p in enumerate(params)]
    whole = [Draw(replace(p, logit_bias={}), 2, i) for i, p in enumerate(params)]
    edited = np.stack([draw.apply(row) for draw, row in zip(draws, logits, strict=True)])

    class OnlyValues(FullLogits):
        def rows(self, rows: np.ndarray) -> np.ndarray:
            raise AssertionError("a whole row was looked at")

    sequences = [draw.sequence(number) for number, draw in enumerate(draws)]
    edits, _ = EditedRows(EditTables(50, VOCAB), sequences).next(range(50))
    tokens = choose(
        SamplingMetadata.of(params, [2] * 50),
        np.arange(50),
        edits,
        top_of(logits, 256),
        OnlyValues(lambda: logits, np.arange(50)),
    )
    assert tokens.tolist() == sample(whole, top_of(edited, VOCAB), Never())
    assert np.mean(tokens == last) > 0.5


def test_no_token_is_chosen_where_none_may_be() -> None:
    nothing = np.zeros(VOCAB, bool)
    logits = logits_rows(2, 1.0)
    for temperature in (0, 1.0):
        params = SamplingParams(temperature=temperature)
        draws = [
            Draw(replace(params, structured_outputs=StructuredOutputsParams(regex=".")), allowed=nothing),
            Draw(params),
        ]
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
        hf.MinPLogitsWarper(0.02),
        hf.TopKLogitsWarper(60),
        hf.TopPLogitsWarper(0.9),
    ]
    for processor in processors:
        scores = processor(history, scores)
    wanted = torch.softmax(scores.double(), -1)[0].numpy()
    params, words = banning(SamplingParams(temperature=0.7, top_k=60, top_p=0.9, min_p=0.02), 11, 12)
    params = replace(params, repetition_penalty=1.3, logit_bias=bias)
    draw = Draw(params, 1, prompt=tuple(ids[:20].tolist()), output=tuple(ids[20:].tolist()), bad_words=words)
    changed = draw.apply(logits[0]).astype(np.float32)
    np.testing.assert_allclose(exact_probabilities(changed, params), wanted, atol=1e-6)
    count = 4000
    draws = [replace(draw, index=i) for i in range(count)]
    repeated = np.repeat(logits, count, axis=0)
    found = np.bincount(sample(draws, top_of(repeated, 256), lambda: repeated), minlength=VOCAB)
    assert not found[wanted == 0].any()
    often = wanted * count >= 5
    chi = (((found - wanted * count) ** 2)[often] / (wanted * count)[often]).sum()
    assert chi < often.sum() + 6 * np.sqrt(2 * often.sum())


def test_tokens_are_counted_as_they_come_and_leave_nothing_behind() -> None:
    """Places change hands, sequences gain several tokens at once, and come back after others had their place."""
    rng = np.random.default_rng(3)
    tables = EditTables(3, VOCAB)
    given = [random_draw(rng, SamplingParams(), i) for i in range(12)]
    sequences = [draw.sequence(i) for i, draw in enumerate(given)]
    for sequence in sequences:
        sequence.state = "waiting"
    for _ in range(200):
        chosen = rng.choice(12, 3, replace=False)
        for number, sequence in enumerate(sequences):
            sequence.state = "running" if number in chosen else "waiting"
        together = [sequences[i] for i in chosen]
        rows = EditedRows(tables, together)
        for _ in range(rng.integers(1, 3)):
            for sequence in together:
                for token in rng.integers(0, 30, rng.integers(0, 4)).tolist():
                    sequence.output_ids.append(token)
                    sequence.last_id = token
            edits, _ = rows.next(range(3))
            logits = rng.standard_normal((3, VOCAB))
            found = edits.apply(logits, np.tile(np.arange(VOCAB), (3, 1)))
            for row, sequence in enumerate(together):
                draw = Draw(
                    sequence.params,
                    prompt=sequence.prompt_ids,
                    output=tuple(sequence.output_ids),
                    bad_words=given[sequence.request_id].bad_words,
                    stop_ids=sequence.stop_ids,
                    allowed=None if sequence.grammar is None else sequence.grammar.allowed(),
                )
                np.testing.assert_allclose(found[row], draw.apply(logits[row]), rtol=1e-12)


EXTREMES = [5e-324, 1e-308, 9.9e-6, 1e-5, 1e-3, 0.02, 1.0, 50.0, 1e30, 1e308, 1.7976931348623157e308]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spread", [0.0, 1.0, 1e4, 1e37])
@pytest.mark.parametrize("k", [1, 16, VOCAB])
def test_extreme_temperatures_and_penalties_warn_of_nothing(spread: float, k: int) -> None:
    """All in one batch with ordinary rows: what one asks for touches nobody else, and no arithmetic overflows."""
    logits = logits_rows(2 * len(EXTREMES), spread, seed=4)
    plain = [Draw(SamplingParams(temperature=t, top_p=0.9 if i % 2 else 1.0), 3, i) for i, t in enumerate(EXTREMES)]
    changed = [
        Draw(
            SamplingParams(temperature=t, repetition_penalty=r, frequency_penalty=2, logit_bias={3: 100, 4: -100}),
            3,
            i,
            output=(3, 4, 5),
        )
        for i, (t, r) in enumerate(zip(EXTREMES, [1e-320, 1e-300, 1e300, 1.7e308, *[1.1] * 7], strict=True))
    ]
    tokens = sample([*plain, *changed], top_of(logits, k), lambda: logits)
    assert min(tokens) >= 0
    for row, temperature in enumerate(EXTREMES):
        if temperature < 1e-5:
            assert tokens[row] == logits[row].argmax()
        alone = sample([plain[row]], top_of(logits[row : row + 1], k), lambda row=row: logits[row : row + 1])
        assert alone == [tokens[row]]


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-9, 9.99e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = np.zeros((50, VOCAB), np.float32)
    draws = [Draw(SamplingParams(temperature=temperature), seed=2, index=i) for i in range(50)]
    assert set(sample(draws, top_of(logits, 8), Never())) == {0}
    assert not needs_full_logits(SamplingParams(temperature=temperature))


def test_min_p_comes_before_top_p() -> None:
    """Of 0.4, 0.3 and twelve of 0.025, min-p 0.5 leaves two; 0.55 of what they weigh together is the first alone."""
    p = np.array([0.4, 0.3, *[0.025] * 12])
    logits = np.repeat(np.log(p)[None].astype(np.float32), 400, axis=0)
    draws = [Draw(SamplingParams(min_p=0.5, top_p=0.55), 1, i) for i in range(400)]
    assert set(sample(draws, top_of(logits, 8), lambda: logits)) == {0}
    assert set(
        sample([replace(d, params=SamplingParams(top_p=0.55)) for d in draws], top_of(logits, 8), lambda: logits)
    ) == {0, 1}
