"""Two tools to try tool calls with: a calculator and a clock. Nothing is executed but arithmetic."""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

#: Largest exponent and most digits: what is within takes no time.
_MOST_EXPONENT: Final = 1000
_MOST_BITS: Final = 10_000
_MOST_CHARACTERS: Final = 1000

_BINARY: Final[Mapping[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: Final[Mapping[type[ast.unaryop], Callable[[Any], Any]]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "abs": abs, "round": round, "min": min, "max": max, "sqrt": math.sqrt, "exp": math.exp, "log": math.log,
    "sin": math.sin, "cos": math.cos, "tan": math.tan,
}  # fmt: skip
_CONSTANTS: Final = {"pi": math.pi, "e": math.e}

#: What the model is told.
TOOLS: Final[tuple[Mapping[str, Any], ...]] = (
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": f"Evaluate an arithmetic expression. Functions: {', '.join(_FUNCTIONS)}; constants: pi, e.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string", "description": "Such as (3 + 4) * 2 ** 5"}},
                "required": ["expression"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "Return the date and time.",
            "parameters": {
                "type": "object",
                "properties": {"timezone": {"type": "string", "description": "Such as Europe/Rome; else UTC"}},
            },
        },
    },
)


def call_tool(name: str, arguments: str) -> str:
    """Return what a tool says, for the model; what goes wrong is said too."""
    try:
        values = json.loads(arguments)
        if name == "calculator":
            return str(calculate(values["expression"]))
        if name == "clock":
            zone = values.get("timezone")
            return datetime.now(ZoneInfo(zone) if zone else UTC).isoformat(timespec="seconds")
    except KeyError as error:
        return f"error: {error} is missing or unknown"
    except Exception as error:  # whatever the model asks for, the chat goes on
        return f"error: {' '.join(str(error).split())}"
    return f"error: there is no tool {name!r}"


def calculate(expression: str) -> int | float:
    """Return the value of an arithmetic expression.

    Raises:
        ValueError: it holds something else, or numbers that are too large.
    """
    if not isinstance(expression, str) or len(expression) > _MOST_CHARACTERS:
        raise ValueError(f"the expression is no text of at most {_MOST_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("this is no arithmetic expression") from None
    return _value(tree.body)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            first, second = _value(left), _value(right)
            if isinstance(op, ast.Pow) and abs(second) > _MOST_EXPONENT:
                raise ValueError(f"the exponent {second} is too large")
            return _bounded(_BINARY[type(op)](first, second))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            function: Callable[..., Any] = _FUNCTIONS[name]
            return _bounded(function(*map(_value, args)))
    raise ValueError("only numbers, + - * / // % ** and the functions named are known")


def _bounded(value: Any) -> int | float:
    if isinstance(value, complex) or (isinstance(value, int) and value.bit_length() > _MOST_BITS):
        raise ValueError("the value is no number that can be written here")
    return value
