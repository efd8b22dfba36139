"""One replica: the application of `seekforge serve`, which opens its engine when it starts and closes it at its end.

Nothing here knows Ray: it is an ASGI application, whose `lifespan` is the life of the replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from starlette.types import ASGIApp, Receive, Scope, Send

from seekforge.common.errors import EngineError, SeekforgeError
from seekforge.runtime.server.app import make_app
from seekforge.runtime.server.context import Context
from seekforge.runtime.server.engine_client import EngineProcess
from seekforge.runtime.server.serve import context_of
from seekforge.runtime.server.settings import ServerSettings

#: Seconds that requests have to be told that their engine is gone, before the replica ends.
_LAST_WORDS_S: Final = 1.0


class ReplicaApp:
    """The application of a replica.

    Args:
        settings: how the server speaks.
        options: keyword arguments of `LLM`.
        end: ends this process; called when the engine's process is gone.
    """

    def __init__(self, settings: ServerSettings, options: Mapping[str, Any], end: Callable[[], None]) -> None:
        self._settings, self._options, self._end = settings, options, end
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
            EngineError: the engine's process is gone.
        """
        if self._client is not None and self._client.dead:
            raise EngineError(self._client.dead)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self._open()
                except SeekforgeError as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _open(self) -> None:
        client = await EngineProcess.open(self._settings.engine, self._options, lambda said: None)
        self._client = client

        def dead() -> None:
            asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._end)

        client.on_dead = dead
        self._context = context_of(client, self._settings)
        self._app = make_app(self._context)

    async def _close(self) -> None:
        if self._context is not None:
            self._context.draining = "the replica ends"
        client, self._client = self._client, None
        if client is not None:
            await client.close()
