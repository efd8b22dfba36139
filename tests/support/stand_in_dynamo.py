"""Stands for the parts of NVIDIA Dynamo that a worker imports: names and signatures, and who calls what when."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest


@dataclass
class LlmRegistration:
    context_length: int | None = None
    kv_cache_block_size: int | None = None
    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


@dataclass
class EngineConfig:
    model: str
    served_model_name: str | None = None
    llm: LlmRegistration | None = None


@dataclass
class ComponentSnapshot:
    kv_used_blocks: int
    kv_total_blocks: int
    gpu_cache_usage: float
    dp_rank: int
    kv_cache_hit_rate: float | None = None


@dataclass(frozen=True)
class PushSource:
    on_ready: Any
    dp_rank: int = 0


class LLMEngine:
    """The class that workers derive from."""

    async def generate(self, request: Any, context: Any) -> Any: ...


class DynamoError(Exception):
    """The base of what a worker raises."""


ERRORS = {
    name: type(name, (DynamoError,), {}) for name in ("InvalidArgument", "EngineShutdown", "Unknown", "CannotConnect")
}


@dataclass
class Context:
    """One request, as the frontend sent it."""

    name: str = "request"

    def id(self) -> str:
        return self.name


@dataclass
class KvEvents:
    """Takes what a worker tells its router."""

    stored: list[dict[str, Any]] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)

    def publish_stored(
        self, token_ids: list[int], num_block_tokens: list[int], block_hashes: list[int], parent_hash: int | None = None
    ) -> None:
        assert len(token_ids) == sum(num_block_tokens) and len(num_block_tokens) == len(block_hashes)
        self.stored.append({"tokens": token_ids, "block": block_hashes[0], "parent": parent_hash})

    def publish_removed(self, block_hashes: list[int]) -> None:
        self.removed += block_hashes


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `dynamo` be this."""
    contents: Mapping[str, Mapping[str, Any]] = {
        "dynamo": {},
        "dynamo.common": {},
        "dynamo.common.backend": {
            "LLMEngine": LLMEngine,
            "EngineConfig": EngineConfig,
            "LlmRegistration": LlmRegistration,
        },
        "dynamo.common.backend.publisher": {"PushSource": PushSource, "ComponentSnapshot": ComponentSnapshot},
        "dynamo.common.backend.health_check": {"build_health_check_payload": lambda token: {"token_ids": [token]}},
        "dynamo.llm": {},
        "dynamo.llm.exceptions": ERRORS,
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


async def answered(worker: Any, request: Mapping[str, Any], name: str = "request") -> list[dict[str, Any]]:
    """Return the chunks of an answer."""
    return [chunk async for chunk in worker.generate(request, Context(name))]


async def until(holds: Any, seconds: float = 20.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)
