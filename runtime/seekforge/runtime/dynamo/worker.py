"""What Dynamo drives: an engine in a process of its own, whose requests, prefixes, counters and end it is told.

Dynamo's `Worker` calls `start`, then `generate` for each request, and `cleanup` when it was told to end; in between it
keeps the worker registered, drains it, and answers for its health. Dynamo itself is imported where it is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.common.errors import RequestError, SeekforgeError
from seekforge.runtime.dynamo.wire import chunk_of, params_of
from seekforge.runtime.engine.block_changes import BlockChange
from seekforge.runtime.engine.scheduler import QueueFullError
from seekforge.runtime.server.engine_client import EngineDeadError, EngineProcess, Stream
from seekforge.runtime.server.metrics import Metrics
from seekforge.runtime.text.tokenizer import Tokenizer

log = logging.getLogger("seekforge.dynamo")

#: Seconds between two looks at the engine's counters; `/metrics` is as old as that.
_COUNTERS_S: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class Replica:
    """Which engine a worker has, and what it is called.

    Attributes:
        engine: the engine's folder.
        tokenizer: the tokenizer of the engine.
        options: keyword arguments of `LLM`.
        card: the folder that the frontend reads the tokenizer of (`model_card`).
        name: what requests call the model.
        follows_blocks: tell the router which prefixes are in the cache.
        on_loading: called with what is done while the engine is loaded.
        on_ready: called with the engine's facts when it is.
    """

    engine: Path
    tokenizer: Tokenizer
    options: Mapping[str, Any]
    card: Path
    name: str
    follows_blocks: bool = True
    on_loading: Callable[[str], None] = lambda said: None
    on_ready: Callable[[Mapping[str, Any]], None] = lambda facts: None


class EngineWorker:
    """The engine of a worker, by the names of `dynamo.common.backend.LLMEngine` (see `worker_class`).

    Attributes:
        lost: why the engine is gone; nothing while it is there.
    """

    def __init__(self, replica: Replica) -> None:
        self.lost = ""
        self._replica = replica
        self._client: EngineProcess | None = None
        self._metrics: Metrics | None = None
        self._counters: Mapping[str, Any] = {}
        self._looking: asyncio.Task[None] | None = None
        self._streams: dict[str, Stream] = {}
        self._snapshots: Any = None

    async def start(self, worker_id: int) -> Any:
        """Load the engine; returns Dynamo's `EngineConfig`.

        Raises:
            EngineError: it cannot be loaded.
        """
        from dynamo.common.backend import EngineConfig, LlmRegistration

        replica = self._replica
        client = await EngineProcess.open(replica.engine, replica.options, replica.on_loading)
        self._client, facts = client, client.facts
        client.on_dead = self._on_dead
        self._metrics = Metrics(replica.name, facts)
        self._counters = await client.call("metrics")
        self._looking = asyncio.create_task(self._look())
        replica.on_ready(facts)
        return EngineConfig(
            model=str(replica.card),
            served_model_name=replica.name,
            llm=LlmRegistration(
                context_length=facts["max_model_len"],
                kv_cache_block_size=facts["block_size"],
                total_kv_blocks=facts["num_blocks"] - 1,  # block 0 is scrap
                max_num_seqs=facts["max_batch_size"],
            ),
        )

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Answer one request in chunks (`wire.chunk_of`); the last has its counts.

        Raises:
            dynamo.llm.exceptions.DynamoException: it cannot be served, or the engine failed.
        """
        assert self._client is not None and self._metrics is not None
        timer, num_tokens, stream = self._metrics.timer(), 0, None
        try:
            params = params_of(request, self._client.facts["default_sampling_params"])
            stream = self._client.start(tuple(request["token_ids"]), params)
            self._streams[context.id()] = stream
            await stream.accepted()
            ended = False
            while not ended:
                for piece in await stream.read():
                    ended = piece.end is not None
                    num_tokens += len(piece.token_ids)
                    if piece.token_ids:
                        timer.came()
                    if ended:
                        timer.ended(piece.finish_reason or "stop", stream.num_prompt_tokens, num_tokens)
                    yield chunk_of(piece, self._replica.tokenizer.token_text)
        except _AbortedError:
            yield {"token_ids": [], "index": 0, "finish_reason": "cancelled"}
        except SeekforgeError as error:
            raise _as_dynamo_error(error) from None
        finally:
            self._streams.pop(context.id(), None)
            if stream is not None:
                stream.close()

    async def abort(self, context: Any) -> None:
        """End a request whose client went away."""
        stream = self._streams.get(context.id())
        if stream is not None:
            stream.close()
            stream.fail(_AbortedError("the client went away"))

    async def cleanup(self) -> None:
        """Give back everything; may be called again, and before `start` has ended."""
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
            self._looking = None
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def kv_event_sources(self) -> list[Any]:
        """Return what tells the router of prefixes."""
        if not self._replica.follows_blocks:
            return []
        from dynamo.common.backend.publisher import PushSource

        return [PushSource(on_ready=self._follow_blocks)]

    async def health_check_payload(self) -> dict[str, Any]:
        """Return the request by which Dynamo looks whether an idle worker still answers."""
        from dynamo.common.backend.health_check import build_health_check_payload

        return build_health_check_payload(0)

    async def register_prometheus(self, metrics: Any) -> None:
        """Put the counters of the server, by its names and by vLLM's, on the worker's `/metrics`."""
        metrics.register_prometheus_expfmt_callback(self.metrics_text)

    def metrics_text(self) -> str:
        """Return the counters in Prometheus' text form."""
        assert self._metrics is not None
        return self._metrics.text(self._counters).decode()

    def component_metrics_dp_ranks(self) -> list[int]:
        """Return the data-parallel ranks of a worker: one, as more are more workers."""
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        """Take what tells the router how full the cache is."""
        self._snapshots = publisher

    def _follow_blocks(self, publisher: Any) -> None:
        """Tell the router of prefixes from now on."""
        assert self._client is not None

        def publish(changes: Sequence[BlockChange]) -> None:
            for change in changes:
                if change.token_ids is None:
                    publisher.publish_removed(block_hashes=[change.block])
                else:
                    publisher.publish_stored(
                        token_ids=list(change.token_ids),
                        num_block_tokens=[len(change.token_ids)],
                        block_hashes=[change.block],
                        parent_hash=change.parent,
                    )

        self._client.follow_blocks(publish)

    async def _look(self) -> None:
        """Look at the engine's counters again and again."""
        while self._client is not None and not self._client.dead:
            try:
                self._counters = await self._client.call("metrics")
            except EngineDeadError:
                return
            self._publish_snapshot()
            await asyncio.sleep(_COUNTERS_S)

    def _publish_snapshot(self) -> None:
        if self._snapshots is None or self._client is None:
            return
        from dynamo.common.backend.publisher import ComponentSnapshot

        counters, total = self._counters, self._client.facts["num_blocks"] - 1
        used, queried = total - counters["num_free_blocks"], counters["num_queried_tokens"]
        self._snapshots.publish(
            0,
            ComponentSnapshot(
                kv_used_blocks=used,
                kv_total_blocks=total,
                gpu_cache_usage=used / total,
                kv_cache_hit_rate=counters["num_hit_tokens"] / queried if queried else None,
                dp_rank=0,
            ),
        )

    def _on_dead(self) -> None:
        """End the worker as a signal does: it leaves the list that the frontend chooses from."""
        assert self._client is not None
        self.lost = self._client.dead
        log.error("%s; this worker ends, start it again", self.lost)
        os.kill(os.getpid(), signal.SIGTERM)


class _AbortedError(SeekforgeError):
    """Nobody waits for the request any more."""


def worker_class() -> type:
    """Return `EngineWorker` as a class of Dynamo's.

    Raises:
        ModuleNotFoundError: Dynamo is not installed.
    """
    from dynamo.common.backend import LLMEngine

    # options are read by our command line, which makes the worker: nobody asks for `from_args`
    return type("SeekforgeWorker", (EngineWorker, LLMEngine), {"from_args": None})


def _as_dynamo_error(error: SeekforgeError) -> Exception:
    """Return an error by which the frontend knows whose fault it is, and whether another worker may do better."""
    from dynamo.llm import exceptions

    if isinstance(error, EngineDeadError):
        return exceptions.EngineShutdown(str(error))
    if isinstance(error, QueueFullError):
        return exceptions.CannotConnect(str(error))
    if isinstance(error, RequestError):
        return exceptions.InvalidArgument(str(error))
    return exceptions.Unknown(str(error))
