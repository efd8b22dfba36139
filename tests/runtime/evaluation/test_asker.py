"""Questions on the toy engine, whose log-probabilities NumPy computes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support.toy_engine import Toy

from seekforge.common.errors import RequestError
from seekforge.runtime.evaluation.answers import ANSWERS, AnswerStore
from seekforge.runtime.evaluation.asker import Asker, AskOptions, conversation_text
from seekforge.runtime.llm import LLM

TASK = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}


@pytest.fixture(scope="module")
def llm(toy_engine: Path) -> Iterator[LLM]:
    with LLM(toy_engine, max_model_len=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def chat_llm(chat_engine: Path) -> Iterator[LLM]:
    with LLM(chat_engine) as llm:
        yield llm


def logprobs(toy: Toy, ids: list[int], count: int) -> tuple[float, bool]:
    """Return the sum over the last `count` tokens, and whether each is the likeliest."""
    total, greedy = 0.0, True
    for end in range(len(ids) - count, len(ids)):
        logits = toy.logits(ids[:end])
        total += logits[ids[end]] - np.logaddexp.reduce(logits)
        greedy &= int(logits.argmax()) == ids[end]
    return total, greedy


def test_a_continuation_has_the_models_log_probability(llm: LLM, toy: Toy) -> None:
    asker = Asker(llm)
    context = asker.encode("the cat sat")
    likely = toy.greedy(context, 3)
    pairs = [(context, asker.encode(" on the mat")), (context, likely), (context[:1], context[1:])]
    answers = asker.ask("loglikelihood", [asker.scored(*pair) for pair in pairs])
    for (before, after), answer in zip(pairs, answers, strict=True):
        total, greedy = logprobs(toy, [*before, *after], len(after))
        assert answer.logprob == pytest.approx(total, abs=1e-4) and answer.is_greedy == greedy
    assert answers[1].is_greedy and not answers[0].is_greedy


def test_a_context_that_is_too_long_loses_its_beginning(llm: LLM, toy: Toy) -> None:
    asker = Asker(llm)
    ids = [int(one) for one in np.random.default_rng(0).integers(2, 260, 100)]
    (answer,) = asker.ask("loglikelihood", [asker.scored(ids[:-4], ids[-4:])])
    assert asker.max_length == 62 and asker.num_truncated == 1
    assert answer.logprob == pytest.approx(logprobs(toy, ids[-63:], 4)[0], abs=1e-4)
    with pytest.raises(RequestError, match="63 tokens, the engine takes 62"):
        asker.scored(ids[:1], ids[:63])
    with pytest.raises(RequestError, match="no tokens"):
        asker.scored(ids[:1], [])


def test_an_answer_ends_where_the_task_says(llm: LLM, toy: Toy) -> None:
    asker = Asker(llm)
    (answer,) = asker.ask("generate_until", [asker.generated("the cat", TASK)])
    tokenizer = llm.engine.tokenizer
    whole = tokenizer.decode(toy.greedy(tokenizer.encode("the cat"), 6))
    assert answer.text == whole and answer.num_tokens == 6 and answer.finish_reason == "length"
    end = next(character for character in whole[1:] if character not in (whole[0], "\ufffd"))
    (answer,) = asker.ask("generate_until", [asker.generated("the cat", TASK | {"until": [end]})])
    assert answer.text == whole[: whole.index(end)] and answer.finish_reason == "stop"
    with pytest.raises(RequestError, match="up to 64 tokens"):
        asker.generated("the cat", TASK | {"max_gen_toks": 64})


def test_the_begin_of_sequence_is_there_once_where_it_is_asked_for(llm: LLM) -> None:
    plain, begins = Asker(llm), Asker(llm, AskOptions(add_bos_token=True))
    ids = plain.encode("the cat")
    assert begins.encode("the cat") == [plain.prefix_token_id, *ids] == begins.encode("<｜begin▁of▁sentence｜>the cat")
    assert begins.encode("the cat", begins=False) == ids


def test_sampled_answers_differ_and_come_again_with_their_seed(llm: LLM) -> None:
    def texts(seed: int) -> list[str | None]:
        asker = Asker(llm, AskOptions(seed=seed, sampling={"temperature": 1.0}))
        questions = [asker.generated("the cat", TASK) for _ in range(4)]
        return [answer.text for answer in asker.ask("generate_until", questions)]

    assert len(set(texts(0))) > 1
    assert texts(0) == texts(0) != texts(1)


def test_a_question_is_asked_once_and_what_was_answered_not_again(llm: LLM, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    with AnswerStore(tmp_path) as store:
        asker = Asker(llm, store=store, progress=lambda *report: reports.append(report))
        first = [asker.scored([5], [6]), asker.scored([5], [7]), asker.scored([5], [6])]
        answers = asker.ask("loglikelihood", first)
        assert answers[0] == answers[2] and reports[0] == ("loglikelihood", 0, 3) and reports[-1][1:] == (3, 3)
        assert len((tmp_path / ANSWERS).read_text().splitlines()) == 2
    before = llm.metrics().num_steps
    with AnswerStore(tmp_path) as store:
        assert Asker(llm, store=store).ask("loglikelihood", first) == answers
        assert llm.metrics().num_steps == before
        Asker(llm, store=store).ask("loglikelihood", [*first, asker.scored([5], [8])])
    assert len((tmp_path / ANSWERS).read_text().splitlines()) == 3


def test_answers_that_came_before_an_interruption_are_kept(llm: LLM, tmp_path: Path) -> None:
    def interrupt(kind: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with AnswerStore(tmp_path) as store:
        asker = Asker(llm, store=store, progress=interrupt)
        questions = [asker.scored([5, number], [6]) for number in range(10, 40)]
        with pytest.raises(KeyboardInterrupt):
            asker.ask("loglikelihood", questions)
    assert llm.metrics().num_running == llm.metrics().num_waiting == 0
    with AnswerStore(tmp_path) as store:
        assert store.num_read == 3
        assert len(Asker(llm, store=store).ask("loglikelihood", questions)) == 30


def test_another_engine_does_not_get_the_answers_of_this_one(
    llm: LLM, toy_engine: Path, edit_manifest, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    other = edit_manifest(lambda raw: raw["generation"].update(temperature=0.5))
    with AnswerStore(tmp_path / "out") as store, LLM(other, max_model_len=64) as changed:
        question = Asker(llm, store=store).scored([5], [6])
        Asker(llm, store=store).ask("loglikelihood", [question])
        assert store.get(Asker(changed).scored([5], [6]).digest) is None
        assert store.get(question.digest) is not None


def test_a_conversation_is_encoded_as_chat_does_and_its_thought_is_no_answer(chat_llm: LLM) -> None:
    messages = [{"role": "user", "content": "the <｜User｜> cat"}]
    asker = Asker(chat_llm, AskOptions(chat=True, thinking=True, sampling={"thinking_token_budget": 3}))
    question = asker.generated(conversation_text(messages), TASK)
    request = chat_llm.chat_request(messages, chat_template_kwargs={"thinking": True})
    assert question.prompt == request.prompt
    assert question.params.max_tokens == 9 and question.params.stop == ()
    (answer,) = asker.ask("generate_until", [question])
    (output,) = chat_llm.chat(messages, question.params, chat_template_kwargs={"thinking": True})
    message = output.outputs[0].message
    assert message is not None
    assert (answer.text, answer.reasoning) == (message.content, message.reasoning_content) and answer.reasoning


def test_what_an_assistant_says_is_scored_as_text(chat_llm: LLM) -> None:
    asker = Asker(chat_llm, AskOptions(chat=True))
    messages = [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "the"}]
    context, continuation = asker.encode_conversation(conversation_text(messages, begins_answer=False), " mat")
    tokenizer = chat_llm.engine.tokenizer
    text = tokenizer.decode(context, skip_special_tokens=False)
    assert text.endswith("the") and "cat?" in text
    assert continuation == tokenizer.encode_text(" mat")
