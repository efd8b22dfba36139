"""The process that runs the engine for a server: `python -m seekforge.runtime.server.engine_process FD`.

Its main thread reads what the server wants, another runs the steps, and what all requests gain by a step is sent as one
frame. A request with text or a form to compile is prepared by a thread of a small pool, so that it holds up no other.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from seekforge.common.errors import CheckpointError, EngineError, RequestError, SeekforgeError
from seekforge.common.system import end_with_parent
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.runtime.backends.base import OfProcesses, fault_of
from seekforge.runtime.engine.block_changes import BlockChanges
from seekforge.runtime.engine.outputs import CompletionOutput, Delta, RequestOutput
from seekforge.runtime.engine.request import RequestState
from seekforge.runtime.llm import LLM
from seekforge.runtime.openai.answers import TokenRow
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.sequence import TokenLogprobs
from seekforge.runtime.server.channel import Channel, End, Piece
from seekforge.runtime.values import shown

#: Threads that prepare requests: encode text, compile grammars.
_PREPARERS = 2
#: Seconds between two lines about the loading.
_LOADING_S = 0.5
#: Seconds between two looks at the ranks.
_LOOK_S = 0.2


class EngineHost:
    """An open engine at the other end of a channel."""

    def __init__(self, llm: LLM, channel: Channel) -> None:
        self._llm, self._channel = llm, channel
        self._live: dict[int, RequestState | None] = {}  # None: being prepared
        self._changing = threading.Lock()  # guards it
        self._pieces: list[tuple[Any, ...]] = []  # fields of `Piece`: plain tuples are pickled in a tenth of the time
        self._closing = False
        self._blocks: BlockChanges | None = None
        self._preparers = ThreadPoolExecutor(_PREPARERS, "seekforge-prepare")
        llm._turns.after_deltas = self._send_pieces

    def serve(self) -> None:
        """Do what the server wants until it is gone."""
        steps = threading.Thread(
            target=self._llm._turns.serve, args=(lambda: self._channel.broken,), name="seekforge-steps", daemon=True
        )
        steps.start()
        if isinstance(self._llm._core.backend, OfProcesses):
            threading.Thread(target=self._watch, name="seekforge-watch", daemon=True).start()
        while (frame := self._channel.receive()) is not None:
            kind, *rest = frame
            if kind == "add":
                self._add(*rest)
            elif kind == "abort":
                self._abort(*rest)
            elif kind == "follow_blocks":
                self._blocks = self._llm.follow_blocks()
            elif kind == "call":
                self._preparers.submit(self._call, *rest)
        self._closing = True
        self._preparers.shutdown(wait=False, cancel_futures=True)
        self._llm.close()

    def _watch(self) -> None:
        """End this process when a rank of the engine is lost: every request would fail from then on."""
        while (fault := fault_of(self._llm._core.backend)) is None:
            time.sleep(_LOOK_S)
            if self._closing:
                return
        if not self._closing:
            self._channel.send("lost", fault)
            os._exit(2)

    def _add(self, request_id: int, prompt: Any, params: SamplingParams, *rest: Any) -> None:
        with self._changing:
            self._live[request_id] = None
        if isinstance(prompt, str) or params.structured_outputs is not None:
            self._preparers.submit(self._start, request_id, prompt, params, *rest)
        else:
            self._start(request_id, prompt, params, *rest)

    def _start(
        self,
        request_id: int,
        prompt: Any,
        params: SamplingParams,
        priority: int,
        timeout_s: float | None,
        in_reasoning: bool,
    ) -> None:
        try:
            accepted, order, timeout = self._llm.accept(
                prompt, params, priority=priority, timeout_s=timeout_s, in_reasoning=in_reasoning
            )
            with self._changing:
                if request_id not in self._live:  # aborted meanwhile
                    return
                arrived = functools.partial(self._arrived, request_id, accepted.params)
                (self._live[request_id],) = self._llm._start([accepted], [order], timeout, arrived)
        except Exception as error:  # a bug of ours, too, ends this request and no other
            with self._changing:
                self._live.pop(request_id, None)
            self._channel.send("refused", request_id, *_told(error))
        else:
            self._channel.send("accepted", request_id, len(accepted.prompt_ids))

    def _abort(self, request_ids: tuple[int, ...]) -> None:
        for request_id in request_ids:
            with self._changing:
                live = self._live.pop(request_id, None)
            if live is not None:
                self._llm._turns.drop([live])

    def _arrived(self, request_id: int, params: SamplingParams, delta: Delta) -> None:
        """Keep what one completion gained; called with the turn held."""
        output = delta.output
        self._pieces.append(
            (
                request_id,
                delta.index,
                delta.text,
                delta.token_ids,
                delta.finish_reason,
                delta.stop_reason,
                tuple(map(_row, delta.logprobs)) if delta.logprobs else (),
                None if output is None else _end(request_id, output, params),
            )
        )

    def _send_pieces(self) -> None:
        """Send what has come together; called with the turn held."""
        if self._blocks is not None and (changes := self._blocks.take()):
            self._channel.send("blocks", changes)
        if not self._pieces:
            return
        pieces, self._pieces = self._pieces, []
        self._channel.send("step", pieces)
        ended = [request_id for request_id, *_, end in pieces if end is not None]
        if ended and not self._closing:
            self._preparers.submit(self._forget, ended)

    def _forget(self, request_ids: list[int]) -> None:
        """Drop requests that have ended; not by the thread that holds the turn."""
        with self._changing:
            lives = [live for one in request_ids if (live := self._live.pop(one, None)) is not None]
        self._llm._turns.drop(lives)

    def _call(self, call_id: int, name: str, arguments: Mapping[str, Any]) -> None:
        try:
            self._channel.send("result", call_id, CALLS[name](self._llm, **arguments))
        except Exception as error:
            self._channel.send("error", call_id, *_told(error))


def _told(error: Exception) -> tuple[str, str]:
    """Return the class of an error that a caller can mend, else nothing, and its message."""
    if isinstance(error, SeekforgeError):
        return type(error).__name__, str(error)
    return "", f"{type(error).__name__}: {error}"


def _row(entry: TokenLogprobs) -> TokenRow:
    return entry.token_id, entry.logprob, entry.rank, entry.top


def _end(request_id: int, output: RequestOutput, params: SamplingParams) -> End:
    prompt = None
    if output.prompt_logprobs is not None:
        prompt = tuple(None if entry is None else _row(entry) for entry in output.prompt_logprobs)
    return End(
        output.prompt_token_ids if prompt is not None or params.truncate_prompt_tokens is not None else (),
        output.usage.prompt_tokens,
        output.usage.completion_tokens,
        output.num_cached_tokens,
        prompt,
        tuple(_whole(request_id, one) for one in output.outputs) if params.best_of is not None else (),
        next((one.error for one in output.outputs if one.finish_reason == "error"), None),
    )


def _whole(request_id: int, one: CompletionOutput) -> Piece:
    rows = tuple(map(_row, one.logprobs)) if one.logprobs is not None else ()
    return Piece(request_id, one.index, one.text, one.token_ids, one.finish_reason, one.stop_reason, rows)


def _metrics(llm: LLM) -> dict[str, Any]:
    return dataclasses.asdict(llm.metrics()) | {"paused": llm.paused}


def _update_weights(llm: LLM, path: str) -> int:
    """Swap in the tensors of a folder of safetensors; returns their number."""
    try:
        with Checkpoint.open(Path(path)) as checkpoint:
            tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
            llm.update_weights(tensors)
    except (CheckpointError, EngineError) as error:  # of the folder, or of tensors that this engine does not read
        raise RequestError(str(error)) from None
    except OSError as error:  # such as of a name that no file can have
        raise RequestError(f"{shown(path)}: cannot be read ({error.strerror}); pass the path of a folder") from None
    return len(tensors)


#: What the server may call, beside requests; called with the engine and keyword arguments.
CALLS: dict[str, Callable[..., Any]] = {
    "metrics": _metrics,
    "pause": lambda llm: llm.pause(),
    "resume": lambda llm: llm.resume(),
    "reset_prefix_cache": lambda llm: llm.reset_prefix_cache(),
    "update_weights": _update_weights,
}


def facts(llm: LLM) -> dict[str, Any]:
    """Return what the server wants to know of an open engine."""
    manifest, check = llm.engine.manifest, llm.self_check
    return {
        "target": manifest.target.name,
        "digest": manifest.digest,
        "max_model_len": llm.max_model_len,
        "max_batch_size": llm.max_batch_size,
        "num_blocks": llm.num_blocks,
        "block_size": manifest.cache.block_size,
        "vocab_size": manifest.vocab_size,
        "default_sampling_params": llm.default_sampling_params,
        "self_check": None if check is None else (check.largest_difference, check.tolerance),
        "num_speculative_tokens": llm.num_speculative_tokens,
    }


def open_engine(channel: Channel, engine: Path, options: Mapping[str, Any]) -> LLM | None:
    """Load the engine and say so; None where it cannot be loaded, which is said too."""
    spoken = 0.0

    def on_load(load: Any) -> None:
        nonlocal spoken
        if time.monotonic() - spoken > _LOADING_S:
            spoken = time.monotonic()
            channel.send("loading", f"weights  {load.done_bytes / 1e9:.1f} of {load.total_bytes / 1e9:.1f} GB")

    try:
        llm = LLM(engine, on_load=on_load, **options)
    except (SeekforgeError, MemoryError, OSError) as error:
        channel.send("failed", str(error) or type(error).__name__)
        return None
    channel.send("ready", facts(llm))
    return llm


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # of a whole process group: the server ends this one
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    frame = channel.receive()
    if frame is None:
        return
    kind, engine, options = frame
    if kind != "open":
        raise EngineError(f"the server sent {kind!r}, expected 'open'")
    llm = open_engine(channel, engine, options)
    if llm is not None:
        EngineHost(llm, channel).serve()


if __name__ == "__main__":
    main()
