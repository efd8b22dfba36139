"""What `nano` learns, as text: sums, recall, tools and tales; drawn from a seed, held out or not by the question.

An example is a list of pieces: text that a conversation gives, and text that the model has to write, which alone is
learned. Prompts are written as the encoding of conversations writes them (`docs/chat.md`); a test holds the two equal.
"""

from __future__ import annotations

import json
import lzma
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.exporter.checkpoint.tokenizer import BOS, EOS
from seekforge.formats.checkpoint.tools_preamble import TOOLS_PREAMBLE

USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"
THINK: Final = "<think>"
ANSWER: Final = "</think>"
DSML: Final = "｜DSML｜"

#: One question of so many is held out: never trained on, and what scores are made of.
_HELD_OUT_SHARE: Final = 12
_KEYS = """
man boy king bird tree door house wood water night day son wife mother father child head hand eye bed fire fox
cat wolf bear horse dog gold sea stone bread garden princess queen prince daughter brother sister old young
little great long way time good dear light word world heart piece place end road side home wind hill well sun
moon star ring crown cup box book bell song rain snow leaf rose nut egg cow hen goose duck fish frog mouse rat
bee ant pig goat sheep lion
"""
_VALUES = """
red blue green white black brown grey pink one two three four five six seven eight nine ten north south east
west up down left right hot cold new big small soft
"""
#: Words of one token each, in the list of a recall and in its answer.
KEYS: Final = tuple(_KEYS.split())
VALUES: Final = tuple(_VALUES.split())
CITIES: Final = {
    "Rome": "Europe/Rome", "Paris": "Europe/Paris", "London": "Europe/London", "Berlin": "Europe/Berlin",
    "Madrid": "Europe/Madrid", "Vienna": "Europe/Vienna", "Oslo": "Europe/Oslo", "Athens": "Europe/Athens",
    "Tokyo": "Asia/Tokyo", "Seoul": "Asia/Seoul", "Delhi": "Asia/Delhi", "Cairo": "Africa/Cairo",
}  # fmt: skip
#: The tools of `seekforge chat --tools`.
TOOLS: Final[tuple[dict[str, Any], ...]] = (
    {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression. Functions: abs, round, min, max, sqrt, exp, log, sin, cos, "
        "tan; constants: pi, e.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "Such as (3 + 4) * 2 ** 5"}},
            "required": ["expression"],
        },
    },
    {
        "name": "clock",
        "description": "Return the date and time.",
        "parameters": {
            "type": "object",
            "properties": {"timezone": {"type": "string", "description": "Such as Europe/Rome; else UTC"}},
        },
    },
)


@dataclass(frozen=True)
class Piece:
    """A part of an example's text, and whether the model learns to write it."""

    text: str
    learned: bool = False


Example = list[Piece]


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out set."""
    return zlib.crc32(question.encode()) % _HELD_OUT_SHARE == 0


def tales() -> list[str]:
    """Return the paragraphs of the tales, in their order."""
    packed = Path(__file__).with_name("tales.txt.xz").read_bytes()
    return lzma.decompress(packed).decode().strip().split("\n\n")


#: The tale that no training sees is the last one.
_HELD_OUT_TALE: Final = "SNOW-WHITE AND ROSE-RED"


def split_tales() -> tuple[list[str], list[str]]:
    """Return the paragraphs that are trained on, and those of the held-out tale."""
    paragraphs = tales()
    cut = paragraphs.index(_HELD_OUT_TALE)
    return paragraphs[:cut], paragraphs[cut:]


# --- arithmetic -----------------------------------------------------------------------------------------------


def sum_thought(a: int, b: int) -> str:
    """Return the thought that adds two numbers: digit by digit from the right, the carry written out."""
    width = max(3, len(str(max(a, b))))
    first, second = str(a).zfill(width), str(b).zfill(width)
    lines, carry, digits = [f"{first}+{second}"], 0, ""
    for x, y in zip(reversed(first), reversed(second)):
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}+{carry}={total:02d}")
        carry, digits = total // 10, str(total % 10) + digits
    lines.append(f"={carry}{digits}")
    return "\n".join(lines)


def difference_thought(a: int, b: int) -> str:
    """Return the thought that subtracts b <= a from a in the same way, the borrow written out."""
    width = max(3, len(str(a)))
    first, second = str(a).zfill(width), str(b).zfill(width)
    lines, borrow, digits = [f"{first}-{second}"], 0, ""
    for x, y in zip(reversed(first), reversed(second)):
        total = int(x) - int(y) - borrow
        digit, next_borrow = total % 10, int(total < 0)
        lines.append(f"{x}-{y}-{borrow}={next_borrow}{digit}")
        borrow, digits = next_borrow, str(digit) + digits
    lines.append(f"={digits}")
    return "\n".join(lines)


def draw_number(rng: random.Random, most_digits: int = 3) -> int:
    """Return a number of one to `most_digits` digits; long ones are more frequent, as there are more of them."""
    digits = rng.choices(range(1, most_digits + 1), [1, 2, 4, 4][:most_digits])[0]
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def draw_sum(rng: random.Random, *, held_out: bool, digits: int = 3) -> tuple[int, int]:
    """Return two numbers whose sum is in the wanted set."""
    while True:
        a, b = draw_number(rng, digits), draw_number(rng, digits)
        if digits > 3 and max(a, b) < 1000:
            continue
        if is_held_out(f"{a} + {b}") == held_out:
            return a, b


def arithmetic(rng: random.Random) -> Example:
    """One question about a sum, mostly thought out."""
    kind = rng.random()
    if kind < 0.01:
        a, b = draw_sum(rng, held_out=False, digits=4)
    elif kind < 0.04:
        return differences(rng)
    else:
        a, b = draw_sum(rng, held_out=False)
    question = f"What is {a} + {b}?"
    if kind > 0.98:  # without a thought
        return [Piece(f"{BOS}{USER}{question}{ASSISTANT}{ANSWER}"), Piece(f"{a + b}{EOS}", True)]
    thought = sum_thought(a, b)
    if kind > 0.95:  # a thought that a budget ends: what is known is answered
        cut = rng.randrange(len(thought))
        return [
            Piece(f"{BOS}{USER}{question}{ASSISTANT}{THINK}{thought[:cut]}{ANSWER}"),
            Piece(f"{a + b}{EOS}", True),
        ]
    return _thinking(question, thought, str(a + b))


def differences(rng: random.Random) -> Example:
    """One question about a difference that is not negative, thought out."""
    while True:
        b, a = sorted((draw_number(rng), draw_number(rng)))
        if not is_held_out(f"{a} - {b}"):
            return _thinking(f"What is {a} - {b}?", difference_thought(a, b), str(a - b))


def digit_sums(rng: random.Random, num_lines: int = 24) -> Example:
    """Lines of the thought that adds two numbers, of which the results alone are learned."""
    pieces = [Piece(BOS)]
    for _ in range(num_lines):
        x, y, carry = rng.randrange(10), rng.randrange(10), rng.randrange(2)
        pieces += [Piece(f"{x}+{y}+{carry}="), Piece(f"{x + y + carry:02d}", True), Piece("\n")]
    return pieces


def _thinking(question: str, thought: str, answer: str) -> Example:
    return [
        Piece(f"{BOS}{USER}{question}{ASSISTANT}{THINK}"),
        Piece(f"{thought}{ANSWER}{answer}{EOS}", True),
    ]


# --- recall ---------------------------------------------------------------------------------------------------


def draw_list(rng: random.Random, num_pairs: int) -> tuple[str, dict[str, str]]:
    """Return a list of `num_pairs` pairs as text, and its pairs."""
    pairs = {key: rng.choice(VALUES) for key in rng.sample(KEYS, num_pairs)}
    return "\n".join(f"{key} {value}" for key, value in pairs.items()), pairs


def recall(rng: random.Random, num_pairs: int, num_questions: int) -> Example:
    """A list, and questions about it in the same conversation."""
    while True:
        text, pairs = draw_list(rng, num_pairs)
        if not is_held_out(text):
            break
    keys = rng.sample(sorted(pairs), min(num_questions, num_pairs))
    answers = [f"{key} {pairs[key]}" for key in keys]
    first = f"{BOS}{USER}{recall_question(text, keys[0])}{ASSISTANT}"
    if rng.random() < 0.1:
        return [Piece(f"{first}{THINK}"), Piece(f"{answers[0]}{ANSWER}{answers[0]}{EOS}", True)]
    pieces = [Piece(f"{first}{ANSWER}"), Piece(f"{answers[0]}{EOS}", True)]
    for key, answer in zip(keys[1:], answers[1:]):
        pieces += [Piece(f"{USER}{key}?{ASSISTANT}{ANSWER}"), Piece(f"{answer}{EOS}", True)]
    return pieces


def recall_question(text: str, key: str) -> str:
    """Return what a user asks about a list."""
    return f"Remember:\n{text}\n{key}?"


# --- tools ----------------------------------------------------------------------------------------------------


def tools_system() -> str:
    """Return the text in front of a conversation that has the tools."""
    preamble = TOOLS_PREAMBLE.format(
        dsml_token=DSML,
        thinking_start_token=THINK,
        thinking_end_token=ANSWER,
        tool_schemas="\n".join(json.dumps(tool, ensure_ascii=False) for tool in TOOLS),
    )
    return f"{BOS}\n\n{preamble}"


def tool_call(name: str, parameter: str, value: str) -> str:
    """Return a call of a tool with one text."""
    return (
        f'\n\n<{DSML}function_calls>\n<{DSML}invoke name="{name}">\n<{DSML}parameter name="{parameter}" string="true">'
        f"{value}</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}function_calls>"
    )


def tool_result(value: str) -> str:
    """Return what a tool said, as the model is shown it."""
    return f"\n\n<function_results>\n<result>{value}</result>\n</function_results>\n\n"


@dataclass(frozen=True)
class ToolUse:
    """A question, the call that it needs, what the tool says and the answer."""

    question: str
    call: str
    result: str
    answer: str


def draw_tool_use(rng: random.Random, *, held_out: bool) -> ToolUse:
    """Return a use of one of the tools that is in the wanted set."""
    while True:
        if rng.random() < 0.7:
            a, b, sign = draw_number(rng), draw_number(rng), rng.choice("+-*")
            expression = f"{a} {sign} {b}"
            value = str({"+": a + b, "-": a - b, "*": a * b}[sign])
            use = ToolUse(f"What is {expression}?", tool_call("calculator", "expression", expression), value, value)
            key = expression
        else:
            city = rng.choice(sorted(CITIES))
            time = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
            date = f"2026-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"
            zone = f"+{rng.randrange(0, 10):02d}:00"
            value = f"{date}T{time}:{rng.randrange(60):02d}{zone}"
            use = ToolUse(f"What time is it in {city}?", tool_call("clock", "timezone", CITIES[city]), value, time)
            key = f"{city} {value}"
        if is_held_out(key) == held_out:
            return use


#: Characters of the end of the text about tools that are left of it in a short conversation.
_SHORT_SYSTEM: Final = (40, 300)


def tools(rng: random.Random, num_questions: int, *, short: bool = False) -> Example:
    """A conversation that has the tools and uses them; if short, with only the end of the text about them in front."""
    system = tools_system()
    pieces = [Piece(f"{BOS}{system[-rng.randint(*_SHORT_SYSTEM) :]}" if short else system)]
    thinks = rng.random() < 0.4
    for number in range(num_questions):
        use = draw_tool_use(rng, held_out=False)
        last = number == num_questions - 1
        thinking = thinks and last  # thoughts of earlier turns are left out of a prompt
        opening, lead = (THINK, f"I call a tool.{ANSWER}") if thinking else (ANSWER, "")
        pieces += [
            Piece(f"{USER}{use.question}{ASSISTANT}{opening}"),
            Piece(f"{lead}{use.call}{EOS}", True),
            Piece(f"{tool_result(use.result)}{opening}"),
            Piece(f"{f'The tool says it.{ANSWER}' if thinking else ''}{use.answer}{EOS}", True),
        ]
    return pieces


# --- tales ----------------------------------------------------------------------------------------------------


def tale(rng: random.Random, paragraphs: list[str], num_characters: int) -> Example:
    """A part of the tales, now and then as what somebody asked to be told."""
    start = rng.randrange(len(paragraphs))
    text = ""
    while len(text) < num_characters:
        text += paragraphs[start % len(paragraphs)] + "\n\n"
        start += 1
    if rng.random() < 0.15:
        return [Piece(f"{BOS}{USER}Tell me a story.{ASSISTANT}{ANSWER}"), Piece(text, True)]
    return [Piece(BOS), Piece(text, True)]


# --- held-out items -------------------------------------------------------------------------------------------


def quality_rows(seed: int = 0, num_items: int = 200) -> Iterator[dict[str, Any]]:
    """Yield held-out items: task, prompt, exact answer and how it is compared; tales as texts."""
    rng = random.Random(f"quality {seed}")
    for _ in range(num_items):
        a, b = draw_sum(rng, held_out=True)
        prompt = f"{BOS}{USER}What is {a} + {b}?{ASSISTANT}{THINK}"
        yield {"task": "arithmetic", "prompt": prompt, "answer": str(a + b), "match": "final", "max_tokens": 80}
    for _ in range(num_items):
        yield _recall_row(rng)
    for _ in range(num_items // 2):
        yield from _tool_rows(draw_tool_use(rng, held_out=True))
    paragraphs = split_tales()[1]
    for start in range(0, len(paragraphs) - 3, 4):
        yield {"task": "english", "text": BOS + "\n\n".join(paragraphs[start : start + 4])}


#: More than four times `index_topk` of 32 tokens: a pair is three.
HELD_OUT_PAIRS: Final = 48


def _recall_row(rng: random.Random) -> dict[str, Any]:
    while True:
        text, pairs = draw_list(rng, HELD_OUT_PAIRS)
        if is_held_out(text):
            break
    key = rng.choice(sorted(pairs))
    prompt = f"{BOS}{USER}{recall_question(text, key)}{ASSISTANT}{ANSWER}"
    return {"task": "recall", "prompt": prompt, "answer": f"{key} {pairs[key]}", "match": "exact", "max_tokens": 8}


def _tool_rows(use: ToolUse) -> Iterator[dict[str, Any]]:
    question = f"{tools_system()}{USER}{use.question}{ASSISTANT}{ANSWER}"
    yield {"task": "tools", "prompt": question, "answer": use.call, "match": "exact", "max_tokens": 96}
    told = f"{question}{use.call}{EOS}{tool_result(use.result)}{ANSWER}"
    yield {"task": "tools", "prompt": told, "answer": use.answer, "match": "exact", "max_tokens": 24}


Draw = Callable[[random.Random], Example]
