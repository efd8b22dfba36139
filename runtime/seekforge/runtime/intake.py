"""From a prompt and its parameters to a request on its way, or a refusal before any work is done."""

from __future__ import annotations

import operator
import secrets
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import SupportsIndex

from seekforge.plugins.errors import RequestError
from seekforge.runtime.core import Core
from seekforge.runtime.engine import Engine
from seekforge.runtime.guided import Grammars
from seekforge.runtime.kv_cache import Table, root_digest
from seekforge.runtime.live import Live
from seekforge.runtime.outputs import Delta
from seekforge.runtime.sampling import SamplingParams
from seekforge.runtime.sequence import Sequence as _Sequence
from seekforge.runtime.text import TextStream

#: Distance between the seeds of the completions of one request.
_SEED_STEP = 0x9E3779B97F4A7C15

Prompt = str | Sequence[int]


class Intake:
    """Checks and makes requests for one engine.

    Attributes:
        num_requests: completions that were made so far; they are numbered so.
        weights_version: counts the weights that were swapped in: blocks of other weights are other blocks.
    """

    def __init__(self, engine: Engine, core: Core, *, prefix_caching: bool) -> None:
        self.num_requests = 0
        self.weights_version = 0
        self._engine, self._core = engine, core
        self._tokenizer = engine.tokenizer
        self._prefix_caching = prefix_caching

    def check(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        """Encode one prompt and refuse it if it cannot be served.

        Raises:
            RequestError: it cannot.
        """
        vocab_size = self._engine.manifest.vocab_size
        ids = tuple(self._tokenizer.encode(prompt) if isinstance(prompt, str) else map(_token_id, prompt))
        named = (
            ("prompt token", ids),
            ("stop_token_ids entry", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        )
        for name, tokens in named:
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise RequestError(f"{name} {token} is out of range, expected 0 to {vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocab_size:
                raise RequestError(f"{name} is {getattr(params, name)}, expected at most {vocab_size}")
        for kind in params.taps:
            if not self._core.tap_names.get(kind):
                raise RequestError(f"taps asks for {kind}, which this engine does not give; build it with taps")
        if params.guided is not None:
            self._grammars.matcher(params.guided)
        self._core.scheduler.check_request(len(ids), params.max_tokens)
        return ids

    def make(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        priority: int,
        timeout_s: float | None,
        on_delta: Callable[[Delta], None] | None,
    ) -> Live:
        """Return a request that was checked."""
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= {self._engine.manifest.eos_token_id}
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        now = time.monotonic()
        bad_words = tuple(ids for word in params.bad_words for ids in self._spellings(word))
        sequences: list[_Sequence] = []
        texts: list[TextStream] = []
        owner = self.num_requests + 1
        for index in range(params.num_sequences):
            self.num_requests += 1
            text = TextStream(
                self._tokenizer, params.stop, include_stop=params.include_stop, min_tokens=params.min_tokens
            )
            sequence = _Sequence(
                self.num_requests,
                prompt_ids,
                params,
                seed=(seed + index * _SEED_STEP) % 2**64,
                stop_ids=stop_ids,
                priority=priority,
                deadline_s=None if timeout_s is None else now + timeout_s,
                on_token=text.push,
                grammar=self._grammars.matcher(params.guided) if params.guided is not None else None,
                bad_words=bad_words,
                speculates=self._core.drafting,
                table=Table(b"", owner=owner),
                arrived_s=now,
            )
            sequence.table.root = self.root(sequence)
            sequences.append(sequence)
            texts.append(text)
        sequences[0].siblings = tuple(sequences[1:])
        return Live(params, tuple(sequences), tuple(texts), on_delta)

    def root(self, sequence: _Sequence) -> bytes:
        """Return the start of its blocks' digests: what their contents depend on besides tokens."""
        manifest = self._engine.manifest
        facts = (manifest.program_sha256, manifest.numerics, manifest.cache.kv_format, self.weights_version)
        alone = None if self._prefix_caching else sequence.table.owner
        return root_digest(*facts, sequence.speculates, alone)

    @cached_property
    def _grammars(self) -> Grammars:
        manifest = self._engine.manifest
        return Grammars(self._engine.folder / manifest.tokenizer, manifest.vocab_size, manifest.eos_token_id)

    def _spellings(self, word: str) -> list[tuple[int, ...]]:
        """Return the token sequences of a word: at the start of a text, and after a space."""
        found = [tuple(self._tokenizer.encode(prefix + word.lstrip())) for prefix in ("", " ")]
        return list(dict.fromkeys(ids for ids in found if ids))


def is_integer(value: object) -> bool:
    """Whether `value` is a Python or NumPy integer; a boolean or 1.0 is none."""
    return not isinstance(value, bool) and isinstance(value, SupportsIndex) and getattr(value, "ndim", 0) == 0


def _token_id(value: object) -> int:
    if not is_integer(value):
        raise RequestError(f"prompt token {value!r} is no token id; pass text, or a list of whole numbers")
    return operator.index(value)  # pyright: ignore[reportArgumentType]
