"""llama.cpp through the low-level functions of llama-cpp-python, as a side of a comparison.

Needs no package but that one and NumPy. Everything is llama.cpp's default but the number of threads and the size of the
context: weights mapped, caches in F16, micro-batches of 512 tokens.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from tests.benchmarks.cpu.protocol import Clock, serve


class LlamaCppSide:
    """Caches of held prompts stay; what a turn added to them is removed after it."""

    def __init__(self, options: dict[str, Any], clock: Clock) -> None:
        self.clock, self.threads = clock, options["threads"]
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            options["file"].encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {options['file']}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.size = (0, 0)
        self.prompts: list[list[int]] = []
        self.first: list[int] = []

    def open(self, sequences: int, tokens: int) -> None:
        """Make an empty context of so many sequences of at most `tokens` tokens; one of another size is freed."""
        if self.size == (sequences, tokens):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
            return
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        self.size = (sequences, tokens)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * -(-tokens // 256) * 256
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {params.n_ctx} tokens")
        self.batch = llama_cpp.llama_batch_init(llama_cpp.llama_n_batch(self.context), 0, 1)

    def step(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run one batch of (token, position, sequence, whether its logits are wanted); return likeliest tokens."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = wanted
        status = llama_cpp.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return [self.likeliest(i) for i, row in enumerate(rows) if row[3]]

    def likeliest(self, row: int) -> int:
        """Return the token of the largest logit of a row of the last batch."""
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(pointer, (self.vocab_size,)).argmax())

    def run(self, prompt: list[int], sequence: int) -> int:
        """Run a prompt in batches of llama.cpp's size; return the first token."""
        size = llama_cpp.llama_n_batch(self.context)
        chosen: list[int] = []
        for start in range(0, len(prompt), size):
            part = prompt[start : start + size]
            last = start + len(part) == len(prompt)
            chosen = self.step(
                [(token, start + i, sequence, last and i == len(part) - 1) for i, token in enumerate(part)]
            )
        return chosen[0]

    def prefill(self, prompt: list[int]) -> float:
        """Return the seconds to the first token of a prompt."""
        self.open(1, len(prompt) + 1)
        began = self.clock()
        self.run(prompt, 0)
        return self.clock() - began

    def hold(self, prompts: list[list[int]]) -> None:
        """Run prompts, which `decode` goes on with."""
        self.open(len(prompts), max(map(len, prompts)) + 256)
        self.prompts = prompts
        self.first = [self.run(prompt, sequence) for sequence, prompt in enumerate(prompts)]

    def decode(self, steps: int) -> float:
        """Return the seconds of `steps` steps, each of one token of every prompt."""
        tokens, began = self.first, self.clock()
        for step in range(steps):
            tokens = self.step(
                [(token, len(self.prompts[i]) + step, i, True) for i, token in enumerate(tokens)],
            )
        seconds = self.clock() - began
        memory = llama_cpp.llama_get_memory(self.context)
        for i, prompt in enumerate(self.prompts):
            if not llama_cpp.llama_memory_seq_rm(memory, i, len(prompt), -1):
                raise RuntimeError("llama.cpp does not forget the tokens of a turn")
        return seconds


def quantize(source: str, out: str, kind: str) -> None:
    """Write a GGUF of F32 weights anew in one of llama.cpp's own formats, such as Q8_0."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp does not quantize {source} to {kind}")


def make(options: dict[str, Any], clock: Clock) -> dict[str, Any]:
    if "file" not in options:
        return {"quantize": quantize}
    side = LlamaCppSide(options, clock)
    return {"prefill": side.prefill, "hold": side.hold, "decode": side.decode}


if __name__ == "__main__":
    serve(make)
