"""From a task's generation settings to sampling parameters. No lm_eval here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from seekforge.common.errors import RequestError
from seekforge.runtime.sampling.params import SamplingParams

#: A task's setting -> the field of `SamplingParams` that is the same.
_SAME: Final = {
    name: name
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    )
}
#: Settings that change nothing here: transformers' own switches.
_WITHOUT_EFFECT: Final = frozenset({"do_sample", "num_beams", "use_cache"})


def generation_params(
    settings: Mapping[str, Any], sampling: Mapping[str, Any], *, thinking: bool = False
) -> tuple[SamplingParams, tuple[str, ...]]:
    """Return how an answer is generated, and the texts that it is cut at afterwards.

    A thought may hold any text, so with `thinking` the texts that end an answer are looked for in the answer alone, and
    the tokens of the thought come on top of the task's: as many as `thinking_token_budget` allows, or the rest of the
    context.

    Args:
        settings: a task's `generation_kwargs` in lm_eval's normal form: `until`, `max_gen_toks`, and sampling.
        sampling: fields of `SamplingParams` that go before them.
        thinking: whether the model reasons first.

    Raises:
        RequestError: a setting that is not known here, or of a value that it does not take.
    """
    known = {"until", "max_gen_toks", *_SAME, *_WITHOUT_EFFECT}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise RequestError(
            f"a task's generation_kwargs have {unknown[0]!r}, which seekforge does not know; known: "
            f"{', '.join(sorted(known))}"
        )
    if settings.get("num_beams", 1) != 1:
        raise RequestError(
            f"a task's generation_kwargs have num_beams {settings['num_beams']!r}; there is no beam search"
        )
    fields = {_SAME[name]: value for name, value in settings.items() if name in _SAME}
    if not settings.get("do_sample"):
        fields["temperature"] = 0.0  # greedy, unless the task says otherwise
    fields["max_tokens"] = settings["max_gen_toks"]
    fields |= sampling
    if thinking and "max_tokens" not in sampling:
        budget = fields.get("thinking_token_budget")
        fields["max_tokens"] = None if budget is None or budget < 0 else fields["max_tokens"] + budget
    until = tuple(text for text in settings.get("until") or () if text)
    if not thinking:
        fields["stop"] = until
    return SamplingParams(**fields), until


def cut(text: str, until: tuple[str, ...]) -> str:
    """Return what stands before the first of the texts that end it."""
    return text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))]
