"""Replicas of one engine behind somebody else's OpenAI frontend: load on them, and what became of each request."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seekforge.runtime import LLM, SamplingParams

#: Tokens of each answer under load: long enough to be killed in.
ANSWER = 120


class AnswerError(OSError):
    """A status that says no, with its message."""


@dataclass
class Answer:
    """What became of a request.

    Attributes:
        prompt: which of the prompts it had.
        began, ended: when, in seconds.
        text: what came; None where it failed.
        fault: how it failed: a status with a message, or a connection that ended.
    """

    prompt: int
    began: float
    ended: float = 0.0
    text: str | None = None
    fault: str = ""


@dataclass
class Load:
    """Clients that ask again and again until they are stopped; use it as a context.

    Attributes:
        answers: what became of each request that ended.
    """

    url: str
    model: str
    prompts: Sequence[Sequence[int]]
    num_clients: int = 6
    answers: list[Answer] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(self.num_clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a request never ended"

    def until(self, holds: Callable[[list[Answer]], bool], seconds: float = 120.0) -> None:
        """Wait until something holds of the answers so far."""
        wait_until(lambda: holds(list(self.answers)), seconds, lambda: f"{self.answers[-3:]}")

    def _ask(self, client: int) -> None:
        number = client
        while not self._stop.is_set():
            answer = Answer(number % len(self.prompts), time.monotonic())
            try:
                answer.text = completion(self.url, self.model, self.prompts[answer.prompt])
            except AnswerError as error:
                answer.fault = str(error)
            except OSError as error:
                answer.fault = repr(error)
            answer.ended = time.monotonic()
            self.answers.append(answer)
            number += self.num_clients


def completion(url: str, model: str, prompt: Sequence[int], max_tokens: int = ANSWER, **more: Any) -> str:
    """Return the text of a greedy answer."""
    return asked(url, model, prompt, max_tokens, **more)["choices"][0]["text"]


def asked(url: str, model: str, prompt: Sequence[int], max_tokens: int = ANSWER, **more: Any) -> dict[str, Any]:
    """Return a greedy answer as the interface gives it."""
    body = {"model": model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, **more}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise AnswerError(f"{error.code} {error.read()[:300].decode(errors='replace')}") from None


def expected_texts(engine: Path, prompts: Sequence[Sequence[int]], max_tokens: int = ANSWER) -> list[str]:
    """Return what the engine answers alone."""
    with LLM(engine, num_blocks=60, threads=1, self_check=False) as llm:
        outputs = llm.generate(
            [list(prompt) for prompt in prompts], SamplingParams(max_tokens=max_tokens, temperature=0)
        )
        return [output.outputs[0].text for output in outputs]


def check_after_kill(
    answers: Sequence[Answer], texts: Sequence[str], killed: float, within_s: float = 5.0
) -> list[Answer]:
    """Hold every answer to what it should be; return those that failed: each was sent to a replica that was killed.

    Args:
        answers: what became of all requests.
        texts: what each prompt is answered with.
        killed: when the replica was killed.
        within_s: seconds after which everybody knows that it is gone.
    """
    failed = [answer for answer in answers if answer.text is None]
    for answer in answers:
        if answer.text is not None:
            assert answer.text == texts[answer.prompt], answer
    for answer in failed:
        assert answer.began < killed + within_s and answer.ended > killed, f"failed for no reason: {answer}"
        assert answer.fault.strip(), "an error that says nothing"
    return failed


def wait_until(
    holds: Callable[[], bool], seconds: float = 120.0, tell: Callable[[], str] = lambda: "it did not happen"
) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, tell()
        time.sleep(0.05)


def free_port() -> int:
    """Return a port that nobody listens on; Dynamo takes none above 32767."""
    while True:
        with socket.socket() as one, contextlib.suppress(OSError):
            port = random.randrange(10_000, 32_000)
            one.bind(("127.0.0.1", port))
            return port


@contextmanager
def process(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command, whose lines go to a file, until the block ends."""
    with log.open("ab") as file:
        started = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.terminate()
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
