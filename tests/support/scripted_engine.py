"""An engine that says what a test wants, and a live server over it: HTTP is real, the model is not."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from seekforge.common.errors import RequestError
from seekforge.runtime.chat import ChatProcessor
from seekforge.runtime.engine.scheduler import QueueFullError
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.server.app import make_app
from seekforge.runtime.server.channel import End, Piece
from seekforge.runtime.server.context import Context
from seekforge.runtime.server.engine_client import EngineDeadError, Stream
from seekforge.runtime.server.metrics import Metrics
from seekforge.runtime.server.settings import ServerSettings
from seekforge.runtime.text.tokenizer import Detokenizer, Tokenizer

#: From the text of a prompt to the text of the answer.
Script = Callable[[str], str]
VOCAB_SIZE = 1024


class ScriptedEngine:
    """Answers with the tokens of what `script` returns, one at a time.

    Attributes:
        prompts: the texts that it was asked to continue.
        params: what they were asked with.
        in_reasoning: whether they were said to end inside a thought.
        calls: what was called beside.
        aborted: requests that were ended by the server.
        running: requests that are on their way.
        hold: while it is set no token comes.
    """

    def __init__(self, tokenizer: Tokenizer, script: Script, *, max_model_len: int = 4096) -> None:
        self.facts: dict[str, Any] = {
            "target": "scripted",
            "digest": "0" * 64,
            "max_model_len": max_model_len,
            "max_batch_size": 64,
            "num_blocks": 129,
            "block_size": 64,
            "vocab_size": VOCAB_SIZE,
            "default_sampling_params": SamplingParams(temperature=1.0, top_p=0.95),
            "self_check": None,
            "num_speculative_tokens": 0,
        }
        self.dead = ""
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.in_reasoning: list[bool] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.aborted: list[int] = []
        self.running: dict[int, Stream] = {}
        self.hold = False
        self.refusal: RequestError | None = None
        self._tokenizer, self.script = tokenizer, script
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        in_reasoning: bool = False,
    ) -> Stream:
        stream = Stream(next(self._numbers), self)
        if self.dead:
            stream.fail(EngineDeadError(self.dead))
            return stream
        assert not isinstance(prompt, str)
        if self.refusal is not None:
            stream.fail(self.refusal)
            return stream
        most = self.facts["max_model_len"]
        if not prompt:
            stream.fail(RequestError("the prompt has no tokens; pass some text or token ids"))
            return stream
        if len(prompt) + (params.max_tokens or 1) > most:
            stream.fail(RequestError(f"prompt {len(prompt)} + max_tokens {params.max_tokens}, more than {most}"))
            return stream
        text = self._tokenizer.decode(prompt, skip_special_tokens=False)
        self.prompts.append(text)
        self.params.append(params)
        self.in_reasoning.append(in_reasoning)
        self.running[stream.request_id] = stream
        task = asyncio.get_running_loop().create_task(self._answer(stream, prompt, params, self.script(text)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def forget(self, stream: Stream) -> None:
        if self.running.pop(stream.request_id, None) is not None and not stream.ended:
            self.aborted.append(stream.request_id)

    async def call(self, name: str, **arguments: Any) -> Any:
        if self.dead:
            raise EngineDeadError(self.dead)
        self.calls.append((name, arguments))
        if name != "metrics":
            return 3
        return {
            "num_running": len(self.running),
            "num_waiting": 0,
            "num_free_blocks": 128 - len(self.running),
            "num_queried_tokens": 10,
            "num_hit_tokens": 4,
            "num_sampled": 7,
            "num_preemptions": 0,
            "drafts_proposed": (2, 1),
            "drafts_accepted": (1, 0),
            "paused": False,
        }

    async def _answer(self, stream: Stream, prompt: Sequence[int], params: SamplingParams, text: str) -> None:
        stream.num_prompt_tokens = len(prompt)
        stream.wake()
        ids = self._tokenizer.encode(text)
        most = params.max_tokens if params.max_tokens is not None else len(ids)
        cut = len(ids) > most
        ids = ids[:most]
        count = params.num_sequences
        readers = [Detokenizer(self._tokenizer, skip_special_tokens=False) for _ in range(count)]
        for place, token in enumerate(ids):
            while self.hold:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            last = place == len(ids) - 1
            for index in range(count):
                ends = last and index == count - 1
                words = readers[index].push(token) + (readers[index].finish() if last else "")
                rows = ((token, -0.5, 1, ((token, -0.5), (token + 1, -1.5))),) if params.logprobs is not None else ()
                prompt_rows = None
                if params.prompt_logprobs is not None:
                    prompt_rows = (None, *((one, -2.0, 3, ()) for one in prompt[1:]))
                end = End(tuple(prompt) if prompt_rows else (), len(prompt), len(ids) * count, 0, prompt_rows)
                reason = None if not last else "length" if cut else "stop"
                stream.take(Piece(stream.request_id, index, words, (token,), reason, None, rows, end if ends else None))


class LiveServer:
    """A server over a scripted engine, in a thread of its own.

    Attributes:
        engine: what answers.
        context: the server's parts.
        url: where it is.
    """

    def __init__(self, engine: ScriptedEngine, context: Context, port: int) -> None:
        self.engine, self.context = engine, context
        self.url = f"http://127.0.0.1:{port}"


@contextmanager
def live_server(
    checkpoint: Path,
    script: Script,
    *,
    model_type: str = "deepseek_v32",
    template: str | None = None,
    **settings: Any,
) -> Iterator[LiveServer]:
    """Serve `script` with the tokenizer of a checkpoint, of this family and with this chat template of the checkpoint.

    Arguments of `ServerSettings` may be given.
    """
    tokenizer = Tokenizer(checkpoint / "tokenizer.json")
    engine = ScriptedEngine(tokenizer, script)
    context = Context(
        engine,
        ServerSettings(**{"engine": checkpoint, "served_model_names": ("scripted",), **settings}),
        tokenizer,
        ChatProcessor(model_type, tokenizer, template),
        Metrics("scripted", engine.facts),
    )
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(context), log_config=None, access_log=False, lifespan="on"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([held])), daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield LiveServer(engine, context, held.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        held.close()


def full_queue() -> RequestError:
    """The refusal of a full queue."""
    return QueueFullError("64 requests wait, of at most 64, and 1 more came; try again later or raise max_waiting")
