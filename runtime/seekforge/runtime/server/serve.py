"""From settings to a server that runs: the engine's process, the application, signals and the end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import json
import logging
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn

from seekforge.common.errors import EngineError, OptionError
from seekforge.formats.engine.manifest import load_manifest
from seekforge.runtime.chat import ChatProcessor
from seekforge.runtime.chat.template import checkpoint_template
from seekforge.runtime.server.app import make_app
from seekforge.runtime.server.context import Context
from seekforge.runtime.server.engine_client import EngineProcess
from seekforge.runtime.server.metrics import Metrics
from seekforge.runtime.server.settings import ServerSettings
from seekforge.runtime.text.tokenizer import Tokenizer

#: Connections that the system keeps until they are accepted.
_BACKLOG = 2048


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address, before anything is loaded.

    Raises:
        OptionError: somebody else holds it, or it is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        held = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OptionError(
            f"--host {host!r}: {error.strerror or error}; expected a name or address of this machine"
        ) from None
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind(address)
    except OSError as error:
        held.close()
        what = (
            "is taken; choose another --port"
            if error.errno == errno.EADDRINUSE
            else f"cannot be used ({error.strerror})"
        )
        raise OptionError(f"{host}:{port} {what}") from None
    return held


class _JsonLines(logging.Formatter):
    """A line of JSON for each record; what the server's own lines say is in the object itself."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = record.getMessage()
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
        }
        try:
            said = json.loads(text) if text.startswith("{") else {"message": text}
        except ValueError:
            said = {"message": text}
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | said, ensure_ascii=False)


def log_to_stderr(level: int) -> None:
    """Let the server's logger, and from warnings on uvicorn's, write lines of JSON to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name, least in (("seekforge", level), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False


def context_of(client: EngineProcess, settings: ServerSettings) -> Context:
    """Return the parts of a server whose engine is open."""
    manifest = load_manifest(settings.engine)
    tokenizer = Tokenizer(settings.engine / manifest.tokenizer)
    return Context(
        client,
        settings,
        tokenizer,
        ChatProcessor(manifest.config.get("model_type"), tokenizer, checkpoint_template(settings.engine)),
        Metrics(settings.served_model_names[0], client.facts),
    )


class _Server(uvicorn.Server):
    """Uvicorn's server, which tells the application that the end has begun."""

    def __init__(self, config: uvicorn.Config, context: Context, told: Callable[[], None]) -> None:
        super().__init__(config)
        self._context, self._told = context, told

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Take no more requests; a second signal ends those on their way."""
        if self._context.draining:
            self.force_exit = True
        self._context.draining = "the server ends"
        super().handle_exit(sig, frame)
        # a signal that ended us is not raised again: ending on it is what was asked
        self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept, and say so."""
        await super().startup(sockets)
        self._told()


async def serve(
    settings: ServerSettings,
    options: Mapping[str, Any],
    held: socket.socket,
    *,
    on_loading: Callable[[str], None],
    on_ready: Callable[[Mapping[str, Any]], None],
    command: tuple[str, ...] | None = None,
) -> None:
    """Serve until a signal ends it.

    Args:
        settings: how the server speaks.
        options: keyword arguments of `LLM`.
        held: a bound socket.
        on_loading: called with what is done.
        on_ready: called with the engine's facts when requests are taken.
        command: what runs the engine in place of `engine_process`; for benchmarks.

    Raises:
        EngineError: the engine cannot be loaded, or ended by itself.
    """
    more: dict[str, Any] = {} if command is None else {"command": command}
    client = await EngineProcess.open(settings.engine, options, on_loading, **more)
    try:
        context = context_of(client, settings)
        config = uvicorn.Config(
            make_app(context),
            http="httptools" if importlib.util.find_spec("httptools") else "h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=max(int(settings.drain_s), 1),
        )
        server = _Server(config, context, lambda: on_ready(client.facts))

        def dead() -> None:
            server.should_exit = True

        client.on_dead = dead
        with contextlib.suppress(asyncio.CancelledError):
            await server.serve([held])
        if client.dead:
            raise EngineError(f"{client.dead}; the requests on their way were lost, start the server again")
    finally:
        await client.close()


def run(settings: ServerSettings, options: Mapping[str, Any], held: socket.socket, **more: Any) -> None:
    """Serve until a signal ends it; arguments and errors as `serve`."""
    if importlib.util.find_spec("uvloop"):
        import uvloop

        uvloop.run(serve(settings, options, held, **more))
    else:
        asyncio.run(serve(settings, options, held, **more))
