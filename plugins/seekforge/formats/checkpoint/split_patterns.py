"""Regular expressions of a tokenizer.json: refused where a short text would keep a matcher busy.

The library's matcher (Oniguruma) tries every way in which an expression may fit. It gives up one match after ten
million steps, but begins again at each character; so an expression that repeats what repeats takes minutes of a text of
a page, and whoever can send a prompt can send that text. Those of released tokenizers repeat single characters, at most
twice in a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

#: Parts of a tokenizer.json that may hold expressions.
_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
#: Most characters of an expression, and unbounded repetitions in one of its alternatives.
_MOST, _MOST_REPEATS = 4096, 2
#: A repetition of at most so many times is none without bound.
_FEW: Final = 16
_ESCAPE: Final = re.compile(r"\\(?:[pPx]\{[^}]*\}|.)", re.DOTALL)
_GROUP: Final = re.compile(r"\((?:\?(?:<?[=!]|<\w+>|>|[a-z-]*:|[a-z-]+(?=\))))?")
_REPEAT: Final = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")


def expressions(content: Any) -> Iterator[str]:
    """Yield the regular expressions of a parsed tokenizer.json."""
    waiting = [content.get(part) for part in _PARTS] if isinstance(content, dict) else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("Regex"), str):
                yield value["Regex"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def slow_fault(expression: str) -> str | None:
    """Return why an expression may take a matcher long, None: it does not."""
    if len(expression) > _MOST:
        return f"has {len(expression):,} characters, expected at most {_MOST:,}"
    # of each open group: whether it holds a repetition or a choice; unbounded repetitions in the alternative that is
    # read, and in the one that had most
    groups: list[list[int]] = [[0, 0, 0]]
    at = 0
    while at < len(expression):
        character = expression[at]
        inner = 0
        if character == "\\":
            if expression[at + 1 : at + 2] in set("123456789kg"):
                return "refers to another part of itself"
            match = _ESCAPE.match(expression, at)
            at = match.end() if match else len(expression)
        elif character == "[":
            at = _class_end(expression, at)
        elif character == "(":
            match = _GROUP.match(expression, at)
            assert match is not None
            if match[0] == "(" and expression[at + 1 : at + 2] == "?":
                return "has a group of an unknown kind"
            groups.append([0, 0, 0])
            at = match.end()
            continue
        elif character == ")":
            if len(groups) == 1:
                return "closes a group that is not open"
            inner, last, most = groups.pop()
            groups[-1][0] |= inner
            groups[-1][1] += max(last, most)
            at += 1
        elif character == "|":
            groups[-1] = [1, 0, max(groups[-1][1:])]
            at += 1
            continue
        else:
            at += 1
        fault, at = _repetition(expression, at, inner, groups[-1])
        if fault is not None:
            return fault
    return None


def _repetition(expression: str, at: int, inner: int, group: list[int]) -> tuple[str | None, int]:
    """Take what repeats the part that ends at `at`; return a fault, and where it ends."""
    match = _REPEAT.match(expression, at)
    if match is None or match[0] == "{}" or match[0] == "{,}":
        return None, at
    at = match.end()
    counted = match[0][0] == "{"
    most = int(match[3] or match[1] or 0) if len(match[0]) < 12 else _FEW + 1
    if match[0] in "*+" or (counted and ((match[2] and not match[3]) or most > _FEW)):
        if inner:
            return "repeats what repeats or has alternatives", at
        group[1] += 1
        if group[1] > _MOST_REPEATS:
            return f"has more than {_MOST_REPEATS} unbounded repetitions in a row", at
    group[0] = 1
    if expression[at : at + 1] == "?" or (not counted and expression[at : at + 1] == "+"):
        at += 1  # lazy, possessive
    return ("repeats what repeats or has alternatives", at) if _REPEAT.match(expression, at) else (None, at)


def _class_end(expression: str, at: int) -> int:
    """Return where the character class that begins at `at` ends; classes may hold classes."""
    depth = 0
    while at < len(expression):
        if expression[at] == "\\":
            at += 1
        elif expression[at] == "[":
            depth += 1
            at += expression.startswith("^", at + 1)
            at += expression.startswith("]", at + 1)
        elif expression[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return at
