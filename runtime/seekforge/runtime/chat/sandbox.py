"""Jinja's sandbox for templates that are files from elsewhere: no step makes a text, list or number beyond a bound.

Jinja keeps a template from the machine, and not from its memory: a text can be doubled forty times, or padded to a
width of gigabytes. Here what joins texts is measured before it does, what takes a width or a number of places is not
there, and what filters and methods return is measured behind them.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn

from seekforge.common.errors import RequestError

#: Longest text or list that a product makes.
_MOST_REPEATED: Final = 1_000_000
_MOST_POWER: Final = 16
#: Bits of both factors of a product.
_MOST_BITS: Final = 1024
#: Longest text or list that anything else makes: more than any context has.
_MOST_JOINED: Final = 64_000_000
#: Filters that take a width, a number of places, or a text that is put in many times.
_NO_FILTERS: Final = ("batch", "center", "format", "pprint", "round", "slice", "urlize", "wordwrap")
#: Methods that do.
_NO_METHODS: Final = frozenset(
    ("center", "encode", "expandtabs", "format", "format_map", "ljust", "maketrans", "rjust", "to_bytes", "translate",
     "zfill")
)  # fmt: skip


def bounded_environment() -> Any:
    """Return an environment to compile templates in; jinja2 is installed."""
    jinja: Any = importlib.import_module("jinja2")  # an optional dependency
    environment = _environment_class()(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=_printable
    )
    for name in _NO_FILTERS:
        environment.filters.pop(name, None)
    environment.globals.pop("lipsum", None)
    filters = environment.filters
    filters |= {name: _measured(function) for name, function in filters.items()}
    filters |= {
        "tojson": _measured(_tojson),
        "replace": lambda text, old, new, count=None: _replaced(str(text), str(old), str(new), count),
        "string": lambda value: str(_printable(value)),
        "join": jinja.pass_environment(_join),
        "indent": _indenting(filters["indent"]),
    }
    environment.globals["raise_exception"] = _refuse
    return environment


def _environment_class() -> Any:
    compiler: Any = importlib.import_module("jinja2.compiler")
    sandbox: Any = importlib.import_module("jinja2.sandbox")

    class Generator(compiler.CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:
            """Write a sum of texts (`~`) as a call of what bounds it."""
            self.write("environment.concat((")
            for part in node.nodes:
                self.write("str(environment.finalize(")
                self.visit(part, frame)
                self.write(")), ")
            self.write("))")

    class Bounded(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "%", "+"))
        code_generator_class = Generator
        concat = staticmethod(_joined)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+":
                _check(sum(len(one) for one in (left, right) if hasattr(one, "__len__")))
                return super().call_binop(context, operator, left, right)
            sizes = [len(one) if hasattr(one, "__len__") else abs(one) for one in (left, right)]
            is_small = sizes[0] <= _MOST_REPEATED and sizes[1] <= _MOST_POWER
            if (operator == "**" and not is_small) or (operator == "%" and isinstance(left, str)):
                raise RequestError(f"chat_template uses {operator!r}, which is not computed here")
            repeats = operator == "*" and any(hasattr(one, "__len__") for one in (left, right))
            if repeats and sizes[0] * sizes[1] > _MOST_REPEATED:
                raise RequestError(f"chat_template repeats a text to more than {_MOST_REPEATED:,} characters")
            if operator == "*" and sum(one.bit_length() for one in (left, right) if isinstance(one, int)) > _MOST_BITS:
                raise RequestError(f"chat_template makes a number of more than {_MOST_BITS:,} bits")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            name, owner = getattr(function, "__name__", None), getattr(function, "__self__", None)
            if name in _NO_METHODS:
                raise RequestError(f"chat_template uses {name}, which is not computed here")
            if isinstance(owner, str) and name == "replace":
                return _replaced(owner, *args, *(kwargs[key] for key in ("count",) if key in kwargs))  # Jinja adds more
            if isinstance(owner, str) and name == "join":
                return _joined(*args, separator=owner)
            return _bounded(super().call(context, function, *args, **kwargs))

    return Bounded


def _check(size: int) -> None:
    if size > _MOST_JOINED:
        raise RequestError(f"chat_template makes a text of more than {_MOST_JOINED:,} characters")


def _bounded(value: Any) -> Any:
    """Return a value that is no text or list beyond the bound."""
    if isinstance(value, (str, bytes, list, tuple)):
        _check(len(value))
    return value


def _printable(value: Any) -> Any:
    """Return a value whose text is not beyond the bound: a list that holds another twice writes it twice."""
    _check(_written_size(value, {}))
    return value


def _written_size(value: Any, sizes: dict[int, int]) -> int:
    """Return about how many characters a value is written with; what is there several times is looked at once."""
    if not isinstance(value, (list, tuple, dict)):
        return len(value) if isinstance(value, str) else 1
    if id(value) not in sizes:
        parts = itertools.chain(value, value.values()) if isinstance(value, dict) else value
        sizes[id(value)] = sum(1 + _written_size(part, sizes) for part in parts)
    return sizes[id(value)]


def _measured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose results are measured; what Jinja reads of its attributes stays."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _bounded(function(*args, **kwargs))

    return call


def _joined(parts: Iterable[str], separator: str = "") -> str:
    texts: list[str] = []
    size = 0
    for part in parts:
        size += len(part) + len(separator)
        _check(size - len(separator))
        texts.append(part)
    return separator.join(texts)


def _join(environment: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """The filter `join`; its parameters are called as Jinja's are."""
    if attribute is not None:
        filters: Any = importlib.import_module("jinja2.filters")
        value = map(filters.make_attrgetter(environment, attribute), value)
    return _joined((str(_printable(one)) for one in value), str(d))


def _replaced(text: str, old: str, new: str, count: int | None = None) -> str:
    times = text.count(old) if count is None or count < 0 else min(text.count(old), count)
    _check(len(text) + times * (len(new) - len(old)))
    return text.replace(old, new, -1 if count is None else count)


def _indenting(indent: Callable[..., str]) -> Callable[..., str]:
    """Return the filter `indent`, measured before it is computed."""

    def call(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        before = len(width) if isinstance(width, str) else width
        _check(len(text) + before * (len(text) + 1))  # of so many lines at most
        return indent(text, width, first, blank)

    return call


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(_printable(value), ensure_ascii=False, indent=None if indent is None else min(indent, 16))


def _refuse(message: str) -> NoReturn:
    raise RequestError(message)
