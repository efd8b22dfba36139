"""Requests from a JSONL file, results to another, as they end; an interrupted run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from seekforge.plugins.errors import OutputError, RequestError
from seekforge.runtime.intake import Prompt
from seekforge.runtime.llm import LLM
from seekforge.runtime.outputs import CompletionOutput
from seekforge.runtime.sampling import SamplingParams

_FIELDS = frozenset(field.name for field in fields(SamplingParams)) - {"taps"}


def run_batch(llm: LLM, requests: Path, results: Path, params: SamplingParams, say: Callable[[str], None]) -> None:
    """Answer every request of a file that has no result yet.

    Args:
        llm: a loaded engine.
        requests: JSONL: "prompt", and perhaps "id" and sampling parameters.
        results: JSONL, made or appended to.
        params: what a request does not say itself.
        say: told the progress, a line at a time.

    Raises:
        RequestError: a line is malformed (all are checked before any is run), or the engine failed on some.
        OutputError: `results` is no file of results.
    """
    done = _ids_done(results)
    pending = [entry for entry in _read(llm, requests, params) if entry[0] not in done]
    say(f"batch    {len(pending)} requests to run, {len(done)} have a result in {results}")
    failed, step = 0, max(len(pending) // 10, 1)
    with results.open("a", encoding="utf-8") as file:
        ended = llm.as_completed((prompt, own) for _, prompt, own in pending)
        for count, (number, output) in enumerate(ended, 1):
            errors = [c.error for c in output.outputs if c.finish_reason == "error"]
            line: dict[str, Any] = {"id": pending[number][0]}
            if errors:
                failed += 1
                line["error"] = errors[0]
            else:
                line["completions"] = [completion_json(completion) for completion in output.outputs]
                line["usage"] = {
                    "prompt_tokens": output.usage.prompt_tokens,
                    "completion_tokens": output.usage.completion_tokens,
                }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            if count % step == 0 or count == len(pending):
                say(f"batch    {count} of {len(pending)} done")
    if failed:
        raise RequestError(f"{failed} of {len(pending)} requests failed; run again to repeat them, see {results}")


def completion_json(completion: CompletionOutput) -> dict[str, Any]:
    """Return one completion as plain JSON values."""
    out: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        out["logprobs"] = [
            {"token_id": entry.token_id, "logprob": entry.logprob, "top": entry.top} for entry in completion.logprobs
        ]
    return out


def _read(llm: LLM, path: Path, params: SamplingParams) -> list[tuple[Any, Prompt, SamplingParams]]:
    """Return (id, prompt, parameters) of every line; all can be served."""
    entries: list[tuple[Any, Prompt, SamplingParams]] = []
    seen: set[Any] = set()
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            raw = json.loads(text)
            if not isinstance(raw, dict) or not isinstance(raw.get("prompt"), (str, list)):
                raise RequestError('expected an object with a "prompt", text or token ids')
            key, prompt = raw.pop("id", number), raw.pop("prompt")
            unknown = sorted(raw.keys() - _FIELDS)
            if unknown:
                raise RequestError(f"unknown key {unknown[0]!r}, expected id, prompt, {', '.join(sorted(_FIELDS))}")
            if not isinstance(key, (str, int)) or key in seen:
                raise RequestError(f"id {key!r} is no text or number, or stands there twice")
            own = replace(params, **raw)
            llm.check(prompt, own)
        except (ValueError, TypeError, RequestError) as error:
            raise RequestError(f"{path}, line {number}: {error}") from None
        seen.add(key)
        entries.append((key, prompt, own))
    return entries


def _ids_done(path: Path) -> set[Any]:
    """Return the ids that have a good result. A last line that was cut off by an interruption is taken away."""
    if not path.exists():
        return set()
    done: set[Any] = set()
    whole = 0
    raw = path.read_bytes()
    for line in raw.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            if "error" not in entry:
                done.add(entry["id"])
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"{path}: holds something else than results; give another --output") from None
        whole += len(line)
    if whole < len(raw):
        with path.open("r+b") as file:
            file.truncate(whole)
    return done
