"""Sampling parameters as options of a command: one for every field of `SamplingParams` but those that say why not.

The command line, a line of a batch file and the Python interface take the same parameters under the same names. A test
holds the fields against the two tables below, so that none is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import click

from seekforge.common.cli.options import MOST_SEED, Number, Tokens, Whole, list_option
from seekforge.common.errors import RequestError
from seekforge.common.reading import SETTINGS_BYTES, parse_json, read_text
from seekforge.runtime.sampling.params import StructuredOutputsParams


class _Bias(click.ParamType):
    """A token id and what is added to its logit."""

    name = "id:bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        """Return both, or fail."""
        if isinstance(value, tuple):
            return value
        token, colon, bias = str(value).partition(":")
        if not colon:
            self.fail(f"{value!r} is no token id and bias, such as 271:-5", param, ctx)
        return Whole().convert(token, param, ctx), Number(-100, 100).convert(bias, param, ctx)


def _several(name: str, help: str, *, metavar: str = "TEXT") -> Any:
    return click.option(f"--{name}", name.replace("-", "_"), multiple=True, metavar=metavar, help=help)


#: Field of `SamplingParams` -> its option.
OPTIONS: Final[Mapping[str, Any]] = {
    "n": click.option("--n", type=Whole(1), help="Completions of each prompt.  [default: 1]"),
    "best_of": click.option("--best-of", type=Whole(1), help="Generate so many and keep the best --n."),
    "max_tokens": click.option(
        "--max-tokens", type=Tokens(), default=128, show_default=True, help="Tokens to generate."
    ),
    "min_tokens": click.option("--min-tokens", type=Whole(), help="Do not end before so many tokens."),
    "temperature": click.option("--temperature", type=Number(0), help="Default: the checkpoint's."),
    "top_p": click.option("--top-p", type=Number(0, 1, above=True), help="Default: the checkpoint's."),
    "top_k": click.option("--top-k", type=Whole(-1), help="0 and -1 keep all tokens.  [default: 0]"),
    "min_p": click.option("--min-p", type=Number(0, 1), help="Keep tokens at least so likely as a share of the best."),
    "repetition_penalty": click.option("--repetition-penalty", type=Number(0, above=True), help="Above 1: less."),
    "presence_penalty": click.option("--presence-penalty", type=Number(-2, 2), help="Once for each generated token."),
    "frequency_penalty": click.option("--frequency-penalty", type=Number(-2, 2), help="As often as it was generated."),
    "logit_bias": list_option("--logit-bias", type=_Bias(), help="Added to the logits of tokens, such as 271:-5."),
    "bad_words": _several("bad-words", "Text that must not be generated. May be given several times."),
    "allowed_token_ids": list_option("--allowed-token-ids", type=Whole(), help="No other tokens are chosen."),
    "seed": click.option("--seed", type=Whole(-1, MOST_SEED), help="Same seed, same text."),
    "stop": _several("stop", "End before this text. May be given several times."),
    "include_stop_str_in_output": click.option(
        "--include-stop-str-in-output", is_flag=True, default=None, help="Keep the text that ended it."
    ),
    "stop_token_ids": list_option("--stop-token-ids", type=Whole(), help="End on these tokens too."),
    "ignore_eos": click.option("--ignore-eos", is_flag=True, default=None, help="Go on after the end of sequence."),
    "skip_special_tokens": click.option(
        "--skip-special-tokens/--no-skip-special-tokens",
        default=None,
        help="Leave special tokens out of the text.  [default: skip-special-tokens]",
    ),
    "truncate_prompt_tokens": click.option(
        "--truncate-prompt-tokens", type=Whole(-1), help="Keep so many of the prompt's last tokens; -1: what has room."
    ),
    "logprobs": click.option("--logprobs", type=Whole(-1), help="Of so many likely tokens; with --json or --batch."),
    "prompt_logprobs": click.option(
        "--prompt-logprobs", type=Whole(-1), help="The same of the prompt's tokens; with --json or --batch."
    ),
    "thinking_token_budget": click.option(
        "--thinking-token-budget", type=Whole(-1), help="End a thought after so many tokens."
    ),
    "skip_reading_prefix_cache": click.option(
        "--skip-reading-prefix-cache", is_flag=True, default=None, help="Compute the whole prompt."
    ),
}
#: Field of `StructuredOutputsParams` -> its option.
STRUCTURED: Final[Mapping[str, Any]] = {
    "json": click.option("--json-schema", "json", metavar="JSON|@FILE", help="The text is JSON of this schema."),
    "regex": click.option("--regex", metavar="TEXT|@FILE", help="The text matches this regular expression."),
    "choice": _several("choice", "The text is one of these. May be given several times."),
    "grammar": click.option("--grammar", metavar="TEXT|@FILE", help="The text follows this Lark grammar."),
    "json_object": click.option("--json-object", is_flag=True, default=None, help="The text is a JSON object."),
    "disable_any_whitespace": click.option(
        "--disable-any-whitespace", is_flag=True, default=None, help="JSON without white space."
    ),
    "disable_additional_properties": click.option(
        "--disable-additional-properties",
        is_flag=True,
        default=None,
        help="JSON of what the schema names.",
    ),
    "whitespace_pattern": click.option("--whitespace-pattern", help="A regular expression of white space in JSON."),
}
#: Fields that have no option, and why.
WITHOUT_OPTION: Final[Mapping[str, str]] = {
    "structured_outputs": "its own fields are options",
    "detokenize": "a command that prints text makes text",
    "spaces_between_special_tokens": "without effect on byte-level text",
    "taps": "arrays, which 'seekforge dump' writes",
}


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: every option above; the command hands what it gets to `params_of`."""
    for option in reversed([*OPTIONS.values(), *STRUCTURED.values()]):
        function = option(function)
    return function


def params_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `SamplingParams` that were given.

    Args:
        options: what was given, by field.

    Raises:
        RequestError: a value is out of range, or a file after @ cannot be read.
    """
    said = {name: value for name, value in options.items() if value is not None and value != ()}
    structured = {name: said.pop(name) for name in STRUCTURED if name in said}
    for name in ("json", "regex", "grammar"):
        if name in structured:
            structured[name] = _content(name, structured[name])
    if "json" in structured:
        try:
            structured["json"] = parse_json(structured["json"])
        except ValueError as error:
            raise RequestError(f"--json-schema: {error}") from None
    if structured:
        said["structured_outputs"] = StructuredOutputsParams(**structured)
    if "logit_bias" in said:
        said["logit_bias"] = dict(said["logit_bias"])
    return said


def _content(name: str, text: str) -> str:
    """Return the text of an option, or of the file that it names after @."""
    if not text.startswith("@"):
        return text
    path = Path(text[1:])
    try:
        return read_text(path, most=SETTINGS_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RequestError(f"--{'json-schema' if name == 'json' else name}: {path}: {reason}") from None
