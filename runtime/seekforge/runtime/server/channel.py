"""What the process that speaks HTTP and the one that runs the engine tell each other: frames over a socket pair.

A frame is its length (4 bytes, big-endian) and a pickled tuple whose first entry says what it is. Both ends are the
same program, one started by the other, and nobody else can reach the socket: that is what makes pickle right here.

To the engine:

- `("open", engine, options)`: load it. `options` are keyword arguments of `LLM`.
- `("add", request_id, prompt, params, priority, timeout_s, in_reasoning)`: start a request.
- `("abort", request_ids)`: end some, as far as they run.
- `("call", call_id, name, arguments)`: do something else (`engine_process.CALLS`).
- `("follow_blocks",)`: say from now on what the prefix cache holds.

From it:

- `("loading", what)`, then `("ready", facts)` or `("failed", message)`.
- `("accepted", request_id, num_prompt_tokens)`, or `("refused", request_id, kind, message)`: it cannot be served;
  kind is the name of the error's class, or nothing where it is a bug of ours.
- `("step", pieces)`: what requests gained, the fields of a `Piece` each; one frame for all of them.
- `("blocks", changes)`: what the prefix cache gained and lost, a `BlockChange` each; only where it is followed.
- `("lost", line)`: a rank of the engine is lost, and this process ends.
- `("result", call_id, value)`, or `("error", call_id, kind, message)`.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

from seekforge.runtime.openai.answers import TokenRow
from seekforge.runtime.sequence import FinishReason

_LENGTH_BYTES = 4


class Piece(NamedTuple):
    """What one completion gained by one step.

    Attributes:
        request_id: whose it is.
        choice: the index of the completion among those of the request.
        text, token_ids: the new text and tokens.
        finish_reason, stop_reason: why the completion ended, in its last piece.
        logprobs: log-probabilities of the new tokens; empty unless asked.
        end: the facts of the whole request, in its last piece.
    """

    request_id: int
    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenRow, ...] = ()
    end: End | None = None


class End(NamedTuple):
    """A finished request.

    Attributes:
        prompt_token_ids: what was computed of the prompt; empty unless it was truncated or log-probabilities of it are
            wanted.
        num_prompt_tokens, num_completion_tokens, num_cached_tokens: sums over all completions.
        prompt_logprobs: a row for each token of the prompt, None for the first; None unless asked.
        best: the completions that `best_of` chose, in their order; empty without it.
        error: what went wrong.
    """

    prompt_token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    prompt_logprobs: tuple[TokenRow | None, ...] | None = None
    best: tuple[Piece, ...] = ()
    error: str | None = None


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Join the pieces of each completion of one request; the one with `end` stays last."""
    of_choice: dict[int, list[Piece]] = {}
    for piece in pieces:
        of_choice.setdefault(piece.choice, []).append(piece)
    return sorted(map(_whole, of_choice.values()), key=lambda piece: piece.end is not None)


def _whole(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    return pieces[-1]._replace(
        text="".join([piece.text for piece in pieces]),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(row for piece in pieces for row in piece.logprobs),
    )


class Channel:
    """The engine's end: frames are read by one thread and sent by any."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._file = end.makefile("rb")
        self._sending = threading.Lock()
        self.broken = False

    def receive(self) -> tuple[Any, ...] | None:
        """Return the next frame; None when the other side is gone."""
        try:
            head = self._file.read(_LENGTH_BYTES)
            body = self._file.read(int.from_bytes(head, "big")) if len(head) == _LENGTH_BYTES else b""
        except OSError:
            return None
        return pickle.loads(body) if body else None

    def send(self, *frame: Any) -> None:
        """Send a frame. Where nobody reads any more, nothing happens: `receive` says so."""
        body = pickle.dumps(frame, pickle.HIGHEST_PROTOCOL)
        with self._sending:
            try:
                self._socket.sendall(len(body).to_bytes(_LENGTH_BYTES, "big") + body)
            except OSError:
                self.broken = True


async def receive(reader: asyncio.StreamReader) -> tuple[Any, ...] | None:
    """Return the next frame; None when the other side is gone."""
    try:
        head = await reader.readexactly(_LENGTH_BYTES)
        return pickle.loads(await reader.readexactly(int.from_bytes(head, "big")))
    except (asyncio.IncompleteReadError, OSError):
        return None


def packed(*frame: Any) -> bytes:
    """Return the bytes of a frame."""
    body = pickle.dumps(frame, pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body
