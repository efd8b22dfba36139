"""The arguments of `LLM`: types are checked before anything is read, ranges against the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Concatenate, ParamSpec, TypeVar

from seekforge.common.errors import EngineError, RequestError
from seekforge.formats.engine.manifest import Manifest
from seekforge.runtime.engine.cache_size import decide_num_blocks, free_gpu_memory, free_memory
from seekforge.runtime.engine.engine_folder import Engine
from seekforge.runtime.engine.speculative import MAX_DRAFTS
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.values import boolean, integer, is_integer, shown

_Self = TypeVar("_Self")
_Arguments = ParamSpec("_Arguments")

_INTEGERS = (
    "max_model_len",
    "max_batch_size",
    "max_num_batched_tokens",
    "num_blocks",
    "kv_cache_memory",
    "num_speculative_tokens",
    "threads",
)
_BOOLEANS = ("speculation_off_switch", "prefix_caching", "deterministic", "self_check")
_CALLED = ("on_step", "on_load", "before_load")
#: Options that None does not leave open.
_NEVER_NONE = ("num_speculative_tokens", *_BOOLEANS)


def options_checked(
    plain: Callable[Concatenate[_Self, _Arguments], None],
) -> Callable[Concatenate[_Self, _Arguments], None]:
    """Let a constructor refuse options of the wrong type, as a `RequestError`, before it does anything."""

    @functools.wraps(plain)
    def checked(self: _Self, /, *places: _Arguments.args, **options: _Arguments.kwargs) -> None:
        for name, value in options.items():
            _check(name, value)
        plain(self, *places, **options)

    return checked


def check_place(name: str, value: object) -> None:
    """Refuse what names no folder.

    Raises:
        RequestError: it is no path, an empty one, or one that no file system has.
    """
    text = value.__fspath__() if isinstance(value, PathLike) else value
    if not isinstance(text, str) or not text or "\0" in text:
        raise RequestError(f"{name} is {shown(value)}, expected the path of a folder")


@dataclass(frozen=True)
class LLMSizes:
    """How much a loaded engine takes at a time.

    Attributes:
        max_model_len: most tokens of one request, prompt and generated.
        max_batch_size: most completions that run at the same time.
        max_num_batched_tokens: tokens of one step.
        num_blocks: cache blocks, the scrap block included.
    """

    max_model_len: int
    max_batch_size: int
    max_num_batched_tokens: int
    num_blocks: int


def decide_sizes(
    engine: Engine,
    *,
    max_model_len: int | None,
    max_batch_size: int | None,
    max_num_batched_tokens: int | None,
    num_blocks: int | None,
    kv_cache_memory: int | None,
) -> LLMSizes:
    """Return the sizes that are asked for, within the engine's limits and the memory that is free.

    Args:
        engine: opened.
        max_model_len, max_batch_size, max_num_batched_tokens, num_blocks, kv_cache_memory: the arguments of `LLM`.

    Raises:
        EngineError: the engine's limits or the cache do not allow them.
    """
    manifest = engine.manifest
    limits, cache = manifest.limits, manifest.cache
    batch = _limit("max_batch_size", max_batch_size, limits.max_batch_size)
    tokens = _limit("max_num_batched_tokens", max_num_batched_tokens, limits.max_num_batched_tokens)
    batch = min(batch, tokens)
    most = manifest.config.get("max_position_embeddings")
    longest = _limit("max_model_len", max_model_len, limits.max_model_len, most if is_integer(most) else None)
    blocks = decide_num_blocks(
        manifest,
        max_batch_size=batch,
        max_model_len=longest,
        num_blocks=num_blocks,
        kv_cache_memory=kv_cache_memory,
        free_bytes=free_memory() if manifest.target.provider is None else free_gpu_memory(),
    )
    holds = (blocks - 1) * cache.block_size
    if max_model_len is not None and holds < max_model_len:
        raise EngineError(
            f"max_model_len {max_model_len} needs {engine.cache_bytes(max_model_len):,} bytes of cache, the cache has "
            f"{blocks * cache.bytes_per_block:,}; lower max_model_len or give more memory (num_blocks or "
            "kv_cache_memory)"
        )
    return LLMSizes(min(longest, holds), batch, tokens, blocks)


def recommended_params(manifest: Manifest) -> SamplingParams:
    """Return what the checkpoint recommends; the ends of sequence are looked at as well.

    Raises:
        EngineError: the manifest holds values that cannot be.
    """
    for token in manifest.eos_token_ids or (-1,):
        if not 0 <= token < manifest.vocab_size:
            raise EngineError(
                f"manifest.json, key 'eos_token_id': {shown(manifest.eos_token_id)}, expected a token id from 0 to "
                f"{manifest.vocab_size - 1}, or some; build the engine again"
            )
    recommended: dict[str, Any] = {**manifest.generation}
    if float(recommended.get("top_k", 0)).is_integer():
        recommended["top_k"] = int(recommended.get("top_k", 0))
    try:
        return SamplingParams(**recommended)
    except RequestError as error:
        raise EngineError(f"manifest.json, key 'generation': {error}; build the engine again") from None


def checked_drafts(manifest: Manifest, requested: int) -> int:
    """Return how many tokens to draft per step.

    Raises:
        EngineError: more than can be, or some of an engine without an MTP graph.
    """
    if not 0 <= requested <= MAX_DRAFTS:
        raise EngineError(f"num_speculative_tokens is {requested}, expected 0 to {MAX_DRAFTS}")
    if requested and "mtp" not in manifest.graphs:
        raise EngineError(
            "num_speculative_tokens needs an engine with an MTP graph, this one has none; "
            "export a checkpoint that has the MTP layer, or leave it at 0"
        )
    return requested


def _limit(name: str, requested: int | None, engine_limit: int, most: int | None = None) -> int:
    """Return what is asked for, else the engine's limit; `most` is what an engine could be built with."""
    if requested is None:
        return engine_limit
    if not 1 <= requested <= engine_limit:
        could = requested > engine_limit and (most is None or most > engine_limit)
        higher = "" if most is None else f", {most} at most"
        raise EngineError(
            f"{name} is {requested}, this engine allows 1 to {engine_limit}"
            + (f"; build it with a higher limit{higher}" if could else "; choose one of these")
        )
    return requested


def _check(name: str, value: Any) -> None:
    if value is None and name not in _NEVER_NONE:
        return
    if name in _INTEGERS:
        if not is_integer(value):
            raise RequestError(f"{name} is {shown(value)}, expected a whole number")
    elif name == "max_waiting":
        integer(name, value, 1)
    elif name in _BOOLEANS:
        boolean(name, value)
    elif name in _CALLED:
        if not callable(value):
            raise RequestError(f"{name} is {shown(value)}, expected a function, or None")
    elif name == "checkpoint":
        check_place(name, value)
