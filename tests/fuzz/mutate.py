"""Mutations of JSON and of bytes: what people, disks and attackers do to files. Deterministic for a seed."""

from __future__ import annotations

import copy
import functools
import json
import marshal
import random
from typing import Any

#: Values that have ended readers before: other types, edges of integers and floats, names that lead elsewhere, text
#: that cannot be printed, nests.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 64, 65, 127, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, -(2**63),
    2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, -2.5, 1e-320, 1e300, 1e308, float("nan"), float("inf"), -float("inf"),
    "", "a", "0", "1", "-1", "NaN", "null", "true", "..", "../x", "/etc/passwd", "/dev/zero", "a/../../b", "C:\\x",
    "a\\b", "a\0b", "\ud800", "\udfff", "\x1b[31m", "[/]", "<script>", "é" * 300, "x" * 100_000, "2001-99-01",
    "0x10", "1e999",
    [], {}, [0], [[]], [None], {"": 0}, {"a": None}, [1, 2, 3, 4, 5, 6, 7, 8], ["B"], [0] * 9, [2**40] * 3, [[1]] * 3,
)  # fmt: skip
WORDS = (
    "f32", "bf16", "f8e4m3", "i8", "u8", "i32", "i64", "bool", "F32", "BF16", "F8_E4M3", "U8", "take", "slice",
    "reshape", "transpose", "concat", "stack", "dequantize", "cast", "bytes", "split", "computed", "codes",
    "code_scales", "packed", "rope_cos", "hadamard", "expert_map", "cache", "weight", "table", "token", "result", "tap",
    "debug", "onnxruntime", "tensorrt", "tensorrt-rtx", "fp8_ds", "all", "tp", "ep", "model", "mtp", "whole", "decode",
)  # fmt: skip


class Nest:
    """A value nested so deep that no Python value of it is made: written as text."""

    def __init__(self, depth: int) -> None:
        self.depth = depth


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value inside `value`, iteratively."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        keys = one.keys() if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            waiting.append(one[key])
    return found


def _somewhere(value: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """Return (container, key) of a value inside `value`, at any depth; None: there is none."""
    found = None
    while isinstance(value, (dict, list)) and value:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        found = (value, key)
        value = value[key]
        if rng.random() < 0.2:
            break
    return found


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Change a JSON value in one to three places; returns it, or another in its place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spot, other = _somewhere(value, rng), _somewhere(value, rng)
        if spot is None or other is None:
            return copy.deepcopy(rng.choice(ODD))
        _change(*spot, other[0][other[1]], rng)
    return value


def _change(container: Any, key: Any, other: Any, rng: random.Random) -> None:
    kind, old = rng.randrange(10), container[key]
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = copy.deepcopy(other)
    elif kind == 2 and isinstance(container, dict):
        container[rng.choice(("new", "", "format", "\ud800", "x" * 5000))] = copy.deepcopy(old)
    elif kind == 3 and isinstance(container, list):
        container.insert(key, copy.deepcopy(other))
    elif kind == 4 and isinstance(old, str):
        container[key] = _bend_text(old, rng)
    elif kind in (5, 6) and isinstance(old, (int, float)) and not isinstance(old, bool):
        container[key] = rng.choice(
            (old + 1, old - 1, -old, old * 2, old * 2**40, 0, old / 3 if abs(old) < 2**64 else 1)
        )
    elif kind == 7:
        container[key] = rng.choice(WORDS)
    elif kind == 8 and rng.random() < 0.1:
        container[key] = Nest(rng.choice((50, 200, 1200, 20_000)))
    else:
        container[key] = copy.deepcopy(rng.choice(ODD))  # a change may go on inside it


def _bend_text(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return rng.choice((text[:at], text[at:], text + text, text.upper(), f"{text[:at]}.{text[at:]}", f"../{text}"))


def to_text(value: Any) -> str:
    """Return JSON of a mutated value, with NaN and half surrogates as Python writes them."""
    marks: list[Nest] = []

    def mark(one: Any) -> Any:
        marks.append(one)
        return f"@nest{len(marks) - 1}@"

    try:
        text = json.dumps(value, default=mark)
    except RecursionError:
        return "[" * 5000
    for number, nest in enumerate(marks):
        text = text.replace(f'"@nest{number}@"', "[" * nest.depth + "]" * nest.depth)
    return text


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Return bytes with a few flipped, cut, doubled or replaced."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not data:
            break
        at = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            piece = data[at : at + rng.randrange(1, 40)]
            data[at:at] = piece * rng.choice((1, 1, 50))
        elif kind == 4:
            data[at] = rng.choice(b'{}[]",:\\0019eE-.\n\x00\xff\xed')
        else:
            data[at:at] = rng.choice(
                (b"[" * 3000, b'{"a":' * 500, b"9" * 400, b"\\ud800", b"NaN", b"\xff\xfe", b"1e999")
            )
    return bytes(data)


def mutated_text(seed: str, rng: random.Random) -> bytes:
    """Return a file made from the JSON text `seed`: changed as a value four times in five, else as bytes."""
    if rng.random() < 0.8:
        return to_text(mutated_copy(seed, rng)).encode("utf-8", "surrogatepass")
    return mutate_bytes(seed.encode(), rng)


def mutated_copy(seed: str, rng: random.Random) -> Any:
    """Return the value of the JSON text `seed`, changed."""
    return mutate_value(marshal.loads(_packed(seed)), rng)


@functools.cache
def _packed(seed: str) -> bytes:
    """Return the value of a JSON text in the form that is copied fastest."""
    return marshal.dumps(json.loads(seed))
