"""What is taught: texts as conversations are encoded, held-out questions apart, thoughts that are right."""

import random

import pytest

from seekforge.exporter.training import tasks
from seekforge.exporter.training.batches import encode
from seekforge.exporter.training.vocabulary import task_tokenizer
from seekforge.runtime.chat import encode as encode_chat
from seekforge.runtime.cli.chat_tools import TOOLS


@pytest.fixture(scope="module")
def tokenizer():
    return task_tokenizer(1280)


def text_of(example: tasks.Example) -> str:
    return "".join(piece.text for piece in example)


@pytest.mark.parametrize("thinking", [False, True])
def test_a_question_is_written_as_a_conversation_is_encoded(thinking: bool) -> None:
    opening = tasks.THINK if thinking else tasks.ANSWER
    prompt = encode_chat([{"role": "user", "content": "What is 3 + 4?"}], thinking=thinking)
    assert str(prompt) == f"{tasks.BOS}{tasks.USER}What is 3 + 4?{tasks.ASSISTANT}{opening}"


@pytest.mark.parametrize("thinking", [False, True])
def test_a_tool_is_used_as_a_conversation_is_encoded(thinking: bool) -> None:
    rng = random.Random(3)
    while True:
        example = tasks.tools(rng, 1)
        if (tasks.ANSWER in example[2].text) == thinking:
            break
    use = next(iter(_uses(example)))
    call = {"type": "function", "function": {"name": use["name"], "arguments": use["arguments"]}}
    messages = [
        {"role": "user", "content": use["question"]},
        {"role": "assistant", "content": "", "reasoning_content": "I call a tool.", "tool_calls": [call]},
        {"role": "tool", "content": use["result"]},
    ]
    told = encode_chat(messages, thinking=thinking, tools=TOOLS)
    assert text_of(example[:-1]) == str(told)


def _uses(example: tasks.Example):
    import json
    import re

    text = text_of(example[1:])
    name = re.search(r'invoke name="(\w+)"', text)
    parameter = re.search(r'parameter name="(\w+)" string="true">([^<]*)<', text)
    result = re.search(r"<result>(.*?)</result>", text)
    question = re.search(rf"{re.escape(tasks.USER)}(.*?){re.escape(tasks.ASSISTANT)}", text)
    assert name and parameter and result and question
    yield {
        "name": name[1],
        "arguments": json.dumps({parameter[1]: parameter[2]}),
        "result": result[1],
        "question": question[1],
    }


@pytest.mark.parametrize(
    ("a", "b", "thought"),
    [
        (345, 78, "345+078\n5+8+0=13\n4+7+1=12\n3+0+1=04\n=0423"),
        (0, 9, "000+009\n0+9+0=09\n0+0+0=00\n0+0+0=00\n=0009"),
        (999, 1, "999+001\n9+1+0=10\n9+0+1=10\n9+0+1=10\n=1000"),
        (4095, 17, "4095+0017\n5+7+0=12\n9+1+1=11\n0+0+1=01\n4+0+0=04\n=04112"),
    ],
)
def test_a_sum_is_thought_out_digit_by_digit(a: int, b: int, thought: str) -> None:
    assert tasks.sum_thought(a, b) == thought


def test_a_difference_is_thought_out_digit_by_digit() -> None:
    assert tasks.difference_thought(305, 78) == "305-078\n5-8-0=17\n0-7-1=12\n3-0-1=02\n=227"


def test_held_out_questions_are_never_trained_on() -> None:
    rng = random.Random(0)
    trained = {text_of(tasks.arithmetic(rng)).split("What is ")[1].split("?")[0] for _ in range(3000)}
    rows = list(tasks.quality_rows(0, 200))
    held_out = {row["prompt"].split("What is ")[1].split("?")[0] for row in rows if row["task"] == "arithmetic"}
    assert len(held_out) > 150 and not trained & held_out
    assert all(tasks.is_held_out(question) for question in held_out)


def test_a_recall_needs_more_tokens_than_four_times_index_topk(tokenizer) -> None:
    row = next(row for row in tasks.quality_rows(0, 3) if row["task"] == "recall")
    assert len(tokenizer.encode(row["prompt"]).ids) > 4 * 32


def test_the_items_are_the_same_for_the_same_seed() -> None:
    assert list(tasks.quality_rows(1, 4)) == list(tasks.quality_rows(1, 4)) != list(tasks.quality_rows(2, 4))


@pytest.mark.parametrize(
    "draw", [tasks.arithmetic, lambda rng: tasks.recall(rng, 9, 3), lambda rng: tasks.tools(rng, 2)]
)
def test_pieces_are_tokens_of_the_whole_text(draw, tokenizer) -> None:
    for seed in range(20):
        example = draw(random.Random(seed))
        assert encode(tokenizer, example)[0] == tokenizer.encode(text_of(example)).ids


def test_digits_and_the_words_of_lists_are_single_tokens(tokenizer) -> None:
    assert len(tokenizer.encode("98765").ids) == 5
    assert [key for key in tasks.KEYS if len(tokenizer.encode(key).ids) != 1] == []
    assert [value for value in tasks.VALUES if len(tokenizer.encode(f" {value}").ids) != 1] == []
