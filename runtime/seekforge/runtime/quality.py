"""The engine's side of a quality check: given tokens, what it generates and how likely it finds them.

Started as a process of its own, `python -m seekforge.runtime.quality ENGINE REQUEST OUT`: REQUEST is a JSON file
(`RunRequest`), OUT a folder for the answer. What is measured goes through `LLM`, as what is served does.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seekforge.common.cli.terminal import echo, one_line, write
from seekforge.common.errors import SeekforgeError
from seekforge.common.files import write_json
from seekforge.common.reading import LISTING_BYTES, read_text
from seekforge.common.system import end_with_parent
from seekforge.formats.paged_cache import blocks_needed
from seekforge.formats.quality_run import ANSWER, DraftsRun, RunAnswer, RunRequest, SpeedRun, selections_file
from seekforge.runtime.engine.outputs import RequestOutput
from seekforge.runtime.llm import LLM
from seekforge.runtime.sampling.params import SamplingParams

_SELECTIONS = "topk_indices"


def measure(
    engine: Path, request: RunRequest, out: Path, say: Callable[[str], object] = lambda line: None
) -> RunAnswer:
    """Run the rows of a request.

    Args:
        engine: its folder.
        request: what to run.
        out: an empty folder: gets a file for each row whose selections are kept.
        say: told each part of the work.

    Raises:
        EngineError, RequestError: the engine cannot be loaded, or cannot run the rows.
    """
    longest = max(len(row.ids) + max(row.max_tokens, 1) for row in request.rows)
    blocks = blocks_needed(longest + request.num_speculative_tokens) + 1
    with LLM(
        engine,
        num_blocks=1 + blocks * min(len(request.rows), _AT_ONCE),
        num_speculative_tokens=request.num_speculative_tokens,
        speculation_off_switch=False,
        prefix_caching=False,
        threads=request.threads,
        checkpoint=request.checkpoint,
    ) as llm:
        llm.drafting = False
        say(f"{len(request.rows)} rows")
        outputs = _run(llm, request, range(len(request.rows)))
        for number in request.selections:
            say(f"what indexers chose in row {number}")
            params = SamplingParams(temperature=0, max_tokens=1, taps=(_SELECTIONS,), detokenize=False)
            taps = llm.generate(list(request.rows[number].ids), params)[0].outputs[0].taps
            arrays: dict[str, Any] = {name: value.astype(np.int32) for name, value in taps.items()}
            np.savez(out / selections_file(number), **arrays)
        drafts = _drafts(llm, request, say) if request.num_speculative_tokens else None
        plain, drafted = _rounds(llm, request, say)
    if drafts is not None and drafted:
        speedup = statistics.median(b.decode_tok_s / a.decode_tok_s for a, b in zip(plain, drafted, strict=True))
        drafts = drafts.model_copy(update={"speedup": speedup})
    speed = None
    if plain:
        prefill, decode = (statistics.median(v) for v in zip(*((p.prefill_tok_s, p.decode_tok_s) for p in plain)))
        speed = SpeedRun(prefill_tok_s=prefill, decode_tok_s=decode)
    return RunAnswer(
        completions=tuple(o.outputs[0].token_ids if r.max_tokens else () for o, r in zip(outputs, request.rows)),
        nll_sums=tuple(None if row.max_tokens else _nll(output) for output, row in zip(outputs, request.rows)),
        drafts=drafts,
        speed=speed,
    )


#: Sequences that the cache has room for at a time.
_AT_ONCE = 64


def _run(llm: LLM, request: RunRequest, numbers: Sequence[int]) -> list[RequestOutput]:
    rows = [request.rows[number] for number in numbers]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=row.max_tokens or 1,
            prompt_logprobs=None if row.max_tokens else 0,
            detokenize=False,
        )
        for row in rows
    ]
    return llm.generate([list(row.ids) for row in rows], params)


def _nll(output: RequestOutput) -> float:
    return -sum(entry.logprob for entry in output.prompt_logprobs or () if entry is not None)


def _drafts(llm: LLM, request: RunRequest, say: Callable[[str], object]) -> DraftsRun | None:
    """Generate with drafts, and count them; None where nothing is generated."""
    numbers = [number for number, row in enumerate(request.rows) if row.max_tokens]
    if not numbers:
        return None
    say("rows with drafts")
    before = llm.metrics()
    llm.drafting = True
    _run(llm, request, numbers)
    llm.drafting = False
    after = llm.metrics()
    proposed = np.subtract(after.drafts_proposed, before.drafts_proposed).tolist()
    accepted = np.subtract(after.drafts_accepted, before.drafts_accepted).tolist()
    return DraftsRun(
        num_speculative_tokens=request.num_speculative_tokens,
        proposed=tuple(proposed),
        accepted=tuple(accepted),
        tokens_per_step=1 + sum(accepted) / max(proposed[0], 1),
        speedup=None,
    )


@dataclass(frozen=True)
class _Round:
    """Tokens per second of the timed rows, one at a time."""

    prefill_tok_s: float
    decode_tok_s: float


def _rounds(llm: LLM, request: RunRequest, say: Callable[[str], object]) -> tuple[list[_Round], list[_Round]]:
    """Time rows without drafts and with them by turns, so that both meet the same machine."""
    sides: tuple[list[_Round], list[_Round]] = ([], [])
    ways = (False, True) if request.num_speculative_tokens else (False,)
    for number in range(request.rounds if request.timed else 0):
        say(f"speed, round {number + 1} of {request.rounds}")
        for drafting in ways if number % 2 == 0 else ways[::-1]:
            llm.drafting = drafting
            metrics = [_run(llm, request, [row])[0].metrics for row in request.timed]
            llm.drafting = False
            prefill = sum(m.prefill_tokens for m in metrics) / max(sum(m.prefill_s for m in metrics), 1e-9)
            decode = sum(m.decode_tokens for m in metrics) / max(sum(m.decode_s for m in metrics), 1e-9)
            sides[drafting].append(_Round(prefill, max(decode, 1e-9)))
    return sides


def main(arguments: Sequence[str]) -> int:
    """Answer a request; 2, and one line on stderr, where it cannot be."""
    engine, request_file, out = map(Path, arguments)
    try:
        request = RunRequest.model_validate_json(read_text(request_file, most=LISTING_BYTES))
        answer = measure(engine, request, out, echo)
    except SeekforgeError as error:
        write(f"error: {one_line(str(error))}\n", err=True)
        return 2
    write_json(out / ANSWER, answer.model_dump(mode="json"))
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(sys.argv[1:]))
