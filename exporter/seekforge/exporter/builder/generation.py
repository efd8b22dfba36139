"""What generation_config.json says of sampling, checked: defaults named as in `SamplingParams`, ends of sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seekforge.common.errors import ProgramError
from seekforge.common.reading import is_there, read_json
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.end_of_sequence import end_ids

FILE = "generation_config.json"
#: The model card's values, for what the file does not say.
_TEMPERATURE, _TOP_P = 1.0, 0.95


@dataclass(frozen=True)
class _Rule:
    expected: str
    fits: Callable[[float], bool]
    whole: bool = False


_RULES = {
    "temperature": _Rule("a number of at least 0", lambda v: v >= 0),
    "top_p": _Rule("a number above 0 and at most 1", lambda v: 0 < v <= 1),
    "top_k": _Rule("a whole number of at least -1", lambda v: v >= -1, whole=True),
    "min_p": _Rule("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "repetition_penalty": _Rule("a number above 0", lambda v: v > 0),
}


@dataclass(frozen=True)
class Generation:
    """What an engine keeps of it.

    Attributes:
        defaults: sampling parameters that the checkpoint recommends.
        eos_token_ids: what ends a request: config.json's, and what this file has beside them.
    """

    defaults: dict[str, float]
    eos_token_ids: tuple[int, ...]


def read_generation(folder: Path, config: ModelConfig) -> Generation:
    """Read generation_config.json of a program folder; the model card's values where it is missing.

    `do_sample: false` makes greedy the default, whatever else the file says of sampling.

    Raises:
        ProgramError: it cannot be read, or a value is of the wrong type or out of range.
    """
    path = folder / FILE
    try:
        raw = read_json(path) if is_there(path) else {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ProgramError(f"{path}: cannot be read ({reason}); take the checkpoint's file") from None
    if not isinstance(raw, dict):
        raise ProgramError(f"{path}: holds a {type(raw).__name__}, expected an object such as {{'temperature': 1.0}}")
    defaults = {name: _number(path, name, raw[name], rule) for name, rule in _RULES.items() if name in raw}
    sampled = raw.get("do_sample", True)
    if not isinstance(sampled, bool):
        raise _refusal(path, "do_sample", sampled, "true or false")
    if sampled:
        defaults = {"temperature": _TEMPERATURE, "top_p": _TOP_P} | defaults
    else:
        kept = defaults.get("repetition_penalty")
        defaults = {"temperature": 0.0} | ({} if kept is None else {"repetition_penalty": kept})
    ends = (*end_ids(config.eos_token_id), *_ends(path, raw, config.vocab_size))
    return Generation(defaults, tuple(dict.fromkeys(ends)))


def _ends(path: Path, raw: dict[str, Any], vocab_size: int) -> list[int]:
    if "eos_token_id" not in raw:
        return []
    value = raw["eos_token_id"]
    tokens = value if isinstance(value, list) else [value]
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise _refusal(path, "eos_token_id", value, f"a token id from 0 to {vocab_size - 1}, or a list of them")
    return tokens


def _number(path: Path, name: str, value: Any, rule: _Rule) -> float:
    plain = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and not rule.whole)
    if isinstance(value, bool) or not plain or not rule.fits(value):
        raise _refusal(path, name, value, rule.expected)
    return float(value)


def _refusal(path: Path, name: str, value: Any, expected: str) -> ProgramError:
    return ProgramError(
        f"{path}: {name} is {value!r:.60}, expected {expected}; correct it, or leave it out for the default"
    )
