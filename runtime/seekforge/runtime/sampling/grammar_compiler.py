"""Compiling grammars within bounds of time and memory, which llguidance itself has not.

A short form may take it hours (`{"multipleOf": 999983}`, `(x|y|){30000}`), all memory, or end the process. So a form is
compiled on trial first, for a vocabulary of bytes, in a process that is ended when it has used up its processor time;
what passes is compiled here. That process starts with the first form, serves all engines, and ends when it is idle or
when this process does.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from seekforge.common.errors import RequestError
from seekforge.common.paths import real_path

#: Most processor time of the trial, in seconds, and most address space of its process.
TRIAL_SECONDS: Final = 1.0
_TRIAL_BYTES: Final = 4 << 30
#: After so many seconds without a form the trial's process ends.
_IDLE_SECONDS: Final = 60
_SERVE: Final = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from seekforge.runtime.sampling.grammar_compiler import serve_trials; serve_trials()"
)
#: Most symbols and entries of a row that the library may make of a grammar.
_LIMITS: Final = {"max_grammar_size": 20_000, "max_items_in_row": 20_000, "verbose_errors": False}
#: Stack of the thread that compiles: the library goes down once per rule, and a stack that ends ends the process.
_STACK_BYTES: Final = 64 << 20
_STACK_LOCK = threading.Lock()
#: How many texts are begun to see whether a grammar can be used, their tokens, and the seconds that this may take.
_NUM_WALKS, _WALK_TOKENS, _WALK_SECONDS = 2, 64, 0.3
#: A grammar that took at most so many seconds to compile is compiled again by the thread that steps.
_QUICK_SECONDS: Final = 0.1


class CompiledGrammar:
    """A grammar of which texts can be begun at once.

    What the library works out about a grammar while it is used is shared by all texts of it, and has a bound. Past that
    bound each of them fails, whichever one has used it up; so the grammar is then compiled again.
    """

    def __init__(self, library: Any, tokenizer: Any, grammar: str) -> None:
        """Compile one.

        Args:
            library: the module llguidance.
            tokenizer: the vocabulary, as its `LLTokenizer`.
            grammar: the grammar in its own language.

        Raises:
            RequestError: it is wrong, or too complex.
        """
        self._make: Callable[[], Any] = lambda: compile_grammar(library, tokenizer, grammar)[0]
        self._lock = threading.Lock()
        self._root: Any
        self._root, seconds = compile_grammar(library, tokenizer, grammar)
        self._is_quick = seconds <= _QUICK_SECONDS
        fault = fault_of(self._root)
        if fault is not None:
            raise RequestError(fault)

    def root(self) -> Any:
        """Return the library's matcher at the beginning of the text, which is copied for each one."""
        with self._lock:
            if self._root is None:
                self._root = self._make()
            return self._root

    def renewed(self, worn: Any) -> Any | None:
        """Return another `root` than one that fails; None where compiling takes too long for those that wait."""
        if not self._is_quick:
            if self._root is worn:
                self._root = None
            return None
        with self._lock:
            if self._root is worn:
                self._root = self._make()
            return self._root


def compile_grammar(library: Any, tokenizer: Any, grammar: str) -> tuple[Any, float]:
    """Return the library's matcher of a grammar, at the beginning of the text, and the seconds of a processor it took.

    Raises:
        RequestError: the grammar is wrong or too large, or there is no memory for the work.
    """
    limits, made = library.LLParserLimits(**_LIMITS), list[tuple[Any, float]]()

    def make() -> None:
        matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        made.append((matcher, time.thread_time()))

    work = threading.Thread(target=make, name="seekforge-grammar")
    with _STACK_LOCK:
        before = threading.stack_size(_STACK_BYTES)
        try:
            work.start()
        except RuntimeError:
            raise RequestError("there is no memory to compile it; try later") from None
        finally:
            threading.stack_size(before)
    work.join()
    if not made:
        raise RequestError("llguidance failed")
    matcher, seconds = made[0]
    if matcher.is_error():
        raise RequestError(matcher.get_error())
    return matcher, seconds


def fault_of(root: Any) -> str | None:
    """Return what goes wrong in the texts of a grammar: much that is too complex is noticed only there."""
    until = time.thread_time() + _WALK_SECONDS
    for seed in range(_NUM_WALKS):
        matcher, draw = root.deep_copy(), random.Random(seed)
        for _ in range(_WALK_TOKENS):
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            if matcher.is_error() or not len(allowed):
                return matcher.get_error() or "no token may begin its text"
            if not matcher.consume_token(int(draw.choice(allowed))):
                return matcher.get_error()
            if matcher.is_stopped():
                break
            if time.thread_time() > until:
                return None
    return None


class Trial:
    """Compiles grammars in a process that may be ended. Threads take turns."""

    def __init__(self) -> None:
        """Make one; its process starts with the first grammar."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def fault(self, grammar: str, vocab_size: int) -> str | None:
        """Return why a grammar over so many tokens cannot be compiled within the bounds, or None."""
        if self._owner != os.getpid():  # this process was forked: the other one's is not ours
            self._lock, self._process, self._owner = threading.Lock(), None, os.getpid()
        line = json.dumps([grammar, vocab_size]).encode() + b"\n"
        status = 0
        with self._lock:
            for _ in range(2):  # it may have ended for want of work at this very moment
                answer, status = self._ask(line)
                if answer:
                    return json.loads(answer)
                if status:
                    break
        if status == -signal.SIGPROF:
            return f"compiling it takes more than {TRIAL_SECONDS:g} s of a processor; make it simpler"
        if status < 0:
            return f"compiling it takes more than {_TRIAL_BYTES >> 30} GiB of memory, or all stack; make it simpler"
        return f"the process that compiles it ended with status {status}; see whether `import llguidance` works"

    def _ask(self, line: bytes) -> tuple[bytes, int]:
        """Return the answer of the process; or nothing, and its exit status."""
        process = self._process
        if process is None:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _SERVE, *(str(real_path(Path(path))) for path in sys.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            except OSError as error:
                raise RequestError(f"no process can be started to compile it: {error.strerror}; try later") from None
            self._process = process
        assert process.stdin is not None and process.stdout is not None
        answer = b""
        with contextlib.suppress(OSError):
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        if answer.endswith(b"\n"):
            return answer, 0
        self._process = None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        return b"", process.wait()


#: All engines of this process share it.
trial: Final = Trial()


class _Bytes:
    """A vocabulary of the 256 bytes and tokens without text, as llguidance wants it described."""

    is_tokenizer_wrapper = True
    special_token_ids: Final = [256]
    eos_token_id, bos_token_id = 256, None

    def __init__(self, vocab_size: int) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)] + [b""] * (vocab_size - 256)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def serve_trials() -> None:
    """Answer grammars from standard input, one with its number of tokens a line of JSON, with its fault or null."""
    import resource  # not on every system

    import llguidance  # an optional dependency, which the process that asks has

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with contextlib.suppress(OSError, ValueError):  # macOS has no such bound
        limits = resource.getrlimit(resource.RLIMIT_AS)
        bound = min([_TRIAL_BYTES, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_AS, (bound, limits[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    @functools.lru_cache(4)
    def tokenizer(vocab_size: int) -> Any:
        return llguidance.LLTokenizer(_Bytes(vocab_size), n_vocab=vocab_size, eos_token=256)  # pyright: ignore[reportArgumentType]

    source, answers = sys.stdin.buffer, sys.stdout.buffer
    while select.select([source], [], [], _IDLE_SECONDS)[0]:
        line = source.readline()
        if not line:
            return
        signal.setitimer(signal.ITIMER_PROF, TRIAL_SECONDS)  # its signal ends the process
        fault = None
        grammar, vocab_size = json.loads(line)
        try:
            compile_grammar(llguidance, tokenizer(max(vocab_size, 257)), grammar)
        except RequestError as error:
            fault = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(fault).encode() + b"\n")
        answers.flush()
