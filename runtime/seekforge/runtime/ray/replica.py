"""One replica: the application of `seekforge serve`, which opens its engine when it starts and closes it at its end.

Nothing here knows Ray: it is an ASGI application, whose `lifespan` is the life of the replica.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from seekforge.common.errors import EngineError, SeekforgeError
from seekforge.runtime.server.app import make_app
from seekforge.runtime.server.context import Context
from seekforge.runtime.server.engine_client import EngineProcess
from seekforge.runtime.server.serve import context_of
from seekforge.runtime.server.settings import ServerSettings

#: Seconds that requests have to be told that their engine is gone, before the replica ends.
_LAST_WORDS_S: Final = 1.0
#: Seconds in which the loss of one process ends others: by then it is known which was the first.
_SETTLING_S: Final = 0.5


class OtherRanks(Protocol):
    """The ranks of the engine that others hold (`ranks.Ranks`)."""

    async def start(self, on_lost: Callable[[str], None]) -> Mapping[str, str]:
        """Start them; return the variables of rank 0.

        Raises:
            EngineError: they cannot be started.
        """
        ...

    async def close(self, patience_s: float = 10.0) -> None:
        """End them; those that do not end by themselves in that time are killed."""
        ...


class ReplicaApp:
    """The application of a replica.

    Args:
        settings: how the server speaks.
        options: keyword arguments of `LLM`.
        end: ends this process; called when the engine's process is gone, or a rank is.
        ranks: the ranks that are not started by the engine's process; None: it starts all.
    """

    def __init__(
        self,
        settings: ServerSettings,
        options: Mapping[str, Any],
        end: Callable[[], None],
        ranks: OtherRanks | None = None,
    ) -> None:
        self._settings, self._options, self._end, self._ranks = settings, options, end, ranks
        self._lost = ""
        self._client: EngineProcess | None = None
        self._context: Context | None = None
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or begin and end."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._app is None:
            raise EngineError("the replica has no engine; it begins or ends")
        else:
            await self._app(scope, receive, send)

    def check(self) -> None:
        """Raise where the replica cannot answer any more.

        Raises:
            EngineError: the engine's process is gone, or a rank.
        """
        if self._lost:
            raise EngineError(self._lost)
        if self._client is not None and self._client.dead:
            raise EngineError(self._client.dead)

    async def open(self) -> None:
        """Open the engine, and start the ranks that others hold.

        Raises:
            SeekforgeError: it cannot be opened, or a rank was lost meanwhile.
        """
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[str] = loop.create_future()

        def lose(line: str) -> None:
            if not lost.done():
                lost.set_result(line)

        environment: Mapping[str, str] = {}
        try:
            if self._ranks is not None:
                environment = await self._ranks.start(lose)
            engine = self._settings.engine
            client = await _unless_lost(
                EngineProcess.open(engine, self._options, lambda said: None, environment=environment), lost
            )
        except BaseException:
            if self._ranks is not None:
                await self._ranks.close(0.0)
            raise
        self._client = client
        client.on_dead = lambda: lose(client.dead)
        lost.add_done_callback(lambda one: loop.call_later(_SETTLING_S, self._die, one.result()))
        self._context = context_of(client, self._settings)
        self._app = make_app(self._context)

    async def close(self) -> None:
        """Take no more requests, and close the engine."""
        if self._context is not None:
            self._context.draining = "the replica ends"
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        if self._ranks is not None:
            await self._ranks.close()

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self.open()
                except SeekforgeError as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    def _die(self, line: str) -> None:
        """Say what was lost, and end this process when requests have been told; unless it ends anyway."""
        if self._client is None:
            return
        dead = self._client.dead  # one is lost because of the other
        self._lost = f"{dead} ({line})" if dead and dead != line else line
        sys.stderr.write(f"error: {self._settings.engine}: {self._lost}; the replica ends\n")
        sys.stderr.flush()
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._end)


async def _unless_lost(opening: Coroutine[Any, Any, EngineProcess], lost: asyncio.Future[str]) -> EngineProcess:
    """Wait until the engine is open.

    Raises:
        EngineError: it cannot be, or a rank was lost meanwhile.
    """
    task = asyncio.create_task(opening)
    await asyncio.wait((task, lost), return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        await asyncio.wait((task,), timeout=_SETTLING_S)  # rank 0 knows better, where it was told
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
        raise EngineError(lost.result())
    return task.result()
