"""One set of command and option types for every command, so that the same word means and takes the same everywhere.

A command of `Command` shows examples in its help and refuses an option that is given twice, where click keeps the last
and says nothing. Numbers are bounded and finite, numbers of tokens take `64K`, bytes take `2G`, and what may be several
takes commas as well as repetition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

import click
from click.shell_completion import CompletionItem

_SIZES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
#: Most of anything that is counted: operators, graphs and libraries keep sizes in 31 bits.
MOST: Final = (1 << 31) - 1
MOST_SEED: Final = (1 << 64) - 1
#: Formats of the paged caches, by the names that vLLM has for them.
KV_CACHE_DTYPES: Final = ("fp8_ds", "bf16")


class _Once:
    """Refuses an option that is given twice and takes one value."""

    params: list[click.Parameter]

    def check_once(self, parser_order: Sequence[click.Parameter], ctx: click.Context) -> None:
        seen: set[str | None] = set()
        for parameter in parser_order:
            if not isinstance(parameter, click.Option) or parameter.multiple or parameter.count:
                continue
            if parameter.name in seen:
                raise click.UsageError(f"{max(parameter.opts, key=len)} is given twice; it takes one value", ctx)
            seen.add(parameter.name)


class Command(click.Command, _Once):
    """A command with examples.

    Args:
        examples: lines as they are typed, without the prompt; a comment may follow two spaces and `#`.
        function: the function of `seekforge` that the command calls, which checks where it writes; None: there is none.
    """

    def __init__(
        self,
        *args: Any,
        examples: Sequence[str] = (),
        function: Callable[..., object] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.function = function
        #: Called with the context when every argument is read.
        self.checks: tuple[Callable[[click.Context], None], ...] = ()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; each option once."""
        if not ctx.resilient_parsing:  # completion looks at lines that are not finished
            self.check_once(self.make_parser(ctx).parse_args(list(args))[2], ctx)
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            for check in self.checks:
                check(ctx)
        return rest

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the command does, then how it is typed."""
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Group(click.Group, _Once):
    """A group of `Command`s."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; each option once."""
        if not ctx.resilient_parsing and args:
            self.check_once(self.make_parser(ctx).parse_args(list(args))[2], ctx)
        return super().parse_args(ctx, args)


def command(
    name: str, *, examples: Sequence[str], function: Callable[..., object] | None = None
) -> Callable[[Callable[..., Any]], Command]:
    """Return a decorator that makes a function a `Command`. Arguments as of that."""
    return click.command(name, cls=Command, examples=examples, function=function)


class Whole(click.ParamType):
    """A whole number within bounds, in ASCII digits."""

    name = "integer"

    def __init__(self, least: int = 0, most: int = MOST) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number, or fail."""
        if isinstance(value, int):
            return value
        number = self._read(str(value))
        if number is None or not self.least <= number <= self.most:
            self.fail(f"{_brief(value)} is no {self._expected()}", param, ctx)
        return number

    def _read(self, text: str) -> int | None:
        return int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", text) else None

    def _expected(self) -> str:
        end = f"of at least {self.least}" if self.most == MOST else f"from {self.least} to {self.most}"
        return f"whole number {end}"


class Tokens(Whole):
    """A number of tokens: 131072, or 128K, which is the same."""

    name = "tokens"

    def __init__(self) -> None:
        super().__init__(1)

    def _read(self, text: str) -> int | None:
        match = re.fullmatch(r"\s*([0-9]{1,20})\s*([kKmM]?)\s*", text)
        return None if match is None else int(match[1]) * _SIZES[match[2].upper()]

    def _expected(self) -> str:
        return "number of tokens, such as 131072 or 128K"


class ByteSize(Whole):
    """A number of bytes: 1073741824, 512M or 2GiB; the units are powers of 1024."""

    name = "size"

    def __init__(self, least: int = 1) -> None:
        super().__init__(least, (1 << 63) - 1)

    def _read(self, text: str) -> int | None:
        match = re.fullmatch(r"\s*([0-9]{1,20})\s*([KMG]?)(?:I?B)?\s*", text.upper())
        return None if match is None else int(match[1]) * _SIZES[match[2]]

    def _expected(self) -> str:
        return "number of bytes, such as 512M or 2G"


class Number(click.ParamType):
    """A finite number within bounds."""

    name = "number"

    def __init__(self, least: float = -math.inf, most: float = math.inf, *, above: bool = False) -> None:
        self.least, self.most, self.above = least, most, above

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail."""
        if isinstance(value, float | int):
            return float(value)
        text = str(value)
        match = re.fullmatch(r"\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", text, re.ASCII)
        number = math.nan if match is None else float(text)
        inside = (number > self.least if self.above else number >= self.least) and number <= self.most
        if not math.isfinite(number) or not inside:
            bounds = []
            if self.least > -math.inf:
                bounds.append(f"{'above' if self.above else 'of at least'} {self.least:g}")
            if self.most < math.inf:
                bounds.append(f"at most {self.most:g}")
            self.fail(f"{_brief(value)} is no number {' and '.join(bounds)}".rstrip(), param, ctx)
        return number


class Named(click.ParamType):
    """A text that is one of known names, or may be something else; the shell completes the names.

    Args:
        name: what it is, in capital letters in the help.
        known: returns the names.
    """

    def __init__(self, name: str, known: Callable[[], Sequence[str]]) -> None:
        self.name = name
        self._known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text: whoever uses the name says whether it is one."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the names; and files, where what was typed begins as a path does."""
        if incomplete.startswith((".", "/", "~")):
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(name) for name in self._known() if name.startswith(incomplete)]


class Listed(click.ParamType):
    """Several values, separated by commas."""

    separator: ClassVar[str] = ","

    def __init__(self, inner: click.ParamType) -> None:
        self.inner = inner
        self.name = f"{inner.name},…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """Return the values; there is at least one."""
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in str(value).split(self.separator)]
        if not all(parts):
            self.fail(f"{_brief(value)} has an empty part; separate values by single commas", param, ctx)
        return [self.inner.convert(part, param, ctx) for part in parts]

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete the last part."""
        before, comma, last = incomplete.rpartition(self.separator)
        offered = self.inner.shell_complete(ctx, param, last)
        return [CompletionItem(f"{before}{comma}{item.value}", type=item.type) for item in offered]


def list_option(*names: str, type: click.ParamType, help: str, default: str | None = None, **more: Any) -> Any:
    """Return an option that takes several values: with commas, given several times, or both.

    The command gets a tuple, each value once, in the order of the command line; empty where nothing was given and there
    is no default.
    """

    def flatten(ctx: click.Context, param: click.Parameter, value: tuple[list[Any], ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(one for part in value for one in part))

    if default is not None:
        more["default"] = (default,)
        help += f"  [default: {default}]"
    return click.option(*names, type=Listed(type), multiple=True, callback=flatten, help=help, **more)


def kv_cache_dtype_option(help: str, default: str | None = None) -> Any:
    """Return `--kv-cache-dtype`."""
    shown = default is not None
    return click.option(
        "--kv-cache-dtype", type=click.Choice(KV_CACHE_DTYPES), default=default, show_default=shown, help=help
    )


def contexts_option(help: str, default: str | None = None) -> Any:
    """Return `--contexts`."""
    return list_option("--contexts", type=Tokens(), help=help, default=default)


quiet_option = click.option("--quiet", is_flag=True, help="Print nothing but errors.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
threads_option = click.option(
    "--threads", type=Whole(1, 4096), help="CPU threads. Default: the cores this process may use."
)


def seed_option(help: str, default: int | None = None) -> Any:
    """Return `--seed`."""
    return click.option(
        "--seed", type=Whole(0, MOST_SEED), default=default, show_default=default is not None, help=help
    )


def _brief(value: object) -> str:
    text = str(value)
    return repr(text if len(text) <= 60 else f"{text[:57]}…")
