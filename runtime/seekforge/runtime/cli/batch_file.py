"""Requests from a JSONL file, results to another, as they end; an interrupted run goes on where it was.

A line ends at a newline and nowhere else. Every line is checked before any is run, without the engine's weights. An
answer carries the digest of its request and engine: an answer to something else is never taken for one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, TextIO, Unpack

from seekforge.common.cli.terminal import json_text
from seekforge.common.errors import EngineError, OutputError, RequestError
from seekforge.common.reading import lines_of, parse_json
from seekforge.runtime.arguments import Prompt
from seekforge.runtime.chat.request import ChatOptions, ChatRequest
from seekforge.runtime.cli import openai_batch
from seekforge.runtime.engine.chat_output import with_messages
from seekforge.runtime.engine.outputs import CompletionOutput, RequestOutput
from seekforge.runtime.llm import LLM
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.text.segments import SegmentedText

#: Longest line: a prompt of a million tokens, or an answer with the log-probabilities of as many, has less.
MOST_LINE_BYTES: Final = 256 << 20
#: stdin, or stdout.
DASH: Final = "-"
#: Parameters whose results JSON has no room for, and what has.
NOT_IN_BATCH: Final[Mapping[str, str]] = {"taps": "arrays, which 'seekforge dump' writes"}
_FIELDS: Final = frozenset(field.name for field in fields(SamplingParams)) - NOT_IN_BATCH.keys()
#: Options of a conversation that a line may give; a template is a file of whoever runs the batch, not of a line.
_CHAT: Final = tuple(name for name in ChatOptions.__annotations__ if name != "chat_template")
_KEYS: Final = ("id", "prompt", "messages", *_CHAT)


class Checks(Protocol):
    """What checks a request: an `LLM`, before it is loaded too."""

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Refuse a request that cannot be served."""

    def chat_request(
        self, messages: Any, sampling_params: SamplingParams | None = None, **options: Unpack[ChatOptions]
    ) -> ChatRequest:
        """Return the prompt of a conversation, and its parameters."""
        ...


@dataclass(frozen=True)
class Request:
    """One line, checked.

    Attributes:
        key: the id of the request, its custom_id, or the number of its line.
        prompt: what is continued.
        params: all of them.
        digest: the digest of the request and the engine.
        batch_line: the line, where it is in OpenAI's form and is answered in that form.
        chat: the conversation, where the answer is a message.
    """

    key: str | int
    prompt: Prompt
    params: SamplingParams
    digest: str
    batch_line: openai_batch.BatchLine | None = None
    chat: ChatRequest | None = None


def read_requests(path: Path, params: SamplingParams, checks: Checks, engine_digest: str) -> list[Request]:
    """Return every request of a file; all can be served.

    Args:
        path: JSONL: "prompt" or "messages", and perhaps "id" and sampling parameters; or OpenAI's batch lines. `-` is
            stdin.
        params: what a request does not say itself.
        checks: refuses what cannot be served.
        engine_digest: the digest of the engine that answers.

    Raises:
        RequestError: naming the first line that is wrong.
    """
    requests: list[Request] = []
    seen: set[str] = set()  # 1 and "1" are one: answers are told apart by what is written
    for number, raw in enumerate(_lines(path), 1):
        if not raw.strip():
            continue
        try:
            request = _read_line(raw, number, params, checks, engine_digest)
            if str(request.key) in seen:
                raise RequestError(f"id {request.key!r} stands there twice")
        except EngineError as error:  # of the chat encoding, which the whole file lacks
            raise EngineError(f"{path}, line {number}: {error}") from None
        except (ValueError, TypeError, RequestError) as error:
            raise RequestError(f"{path}, line {number}: {error}") from None
        seen.add(str(request.key))
        requests.append(request)
    if not requests:
        raise RequestError(f"{path}: holds no request; write one JSON object a line")
    return requests


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file or pipe; a byte order mark and carriage returns at ends are no part of them."""
    if str(path) == DASH:
        file: Any = contextlib.nullcontext(sys.stdin.buffer)
    else:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISFIFO(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "a device"
            raise RequestError(f"{path}: is {what}, expected a file of requests; - is stdin")
        file = path.open("rb")
    with file as source:
        try:
            for number, line in enumerate(lines_of(source, most=MOST_LINE_BYTES)):
                yield (line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line).rstrip(b"\r\n")
        except ValueError as error:
            raise RequestError(f"{path}: {error}; write one JSON object a line") from None


def _read_line(raw: bytes, number: int, params: SamplingParams, checks: Checks, engine_digest: str) -> Request:
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise RequestError('expected an object with a "prompt" or "messages"')
    batch_line = None
    if openai_batch.is_batch_line(value):
        batch_line = openai_batch.read_line(value)
        key, fields, options = batch_line.custom_id, dict(batch_line.params), batch_line.options
        prompt, messages = batch_line.prompt, batch_line.messages
    else:
        fields = dict(value)
        key, prompt = fields.pop("id", number), fields.pop("prompt", None)
        messages, options = fields.pop("messages", None), {name: fields.pop(name) for name in _CHAT if name in fields}
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise RequestError(f"id is {key!r}, expected text or a whole number")
        for name, why in NOT_IN_BATCH.items():
            if name in fields:
                raise RequestError(f"{name} cannot be asked for in a batch: {why}")
        unknown = sorted(fields.keys() - _FIELDS)
        if unknown:
            raise RequestError(f"unknown key {unknown[0]!r}, expected {', '.join((*_KEYS, *sorted(_FIELDS)))}")
    if (prompt is None) == (messages is None):
        raise RequestError('expected either "prompt" or "messages"')
    if messages is None and options:
        raise RequestError(f"{next(iter(options))} belongs to messages, and the line has a prompt")
    line_params, chat = replace(params, **fields), None
    if messages is not None:
        chat = checks.chat_request(messages, line_params, **options)
        prompt, line_params = chat.prompt, chat.params
    elif not isinstance(prompt, str | list):
        raise RequestError(f"prompt is {type(prompt).__name__}, expected text or a list of token ids")
    checks.check(prompt, line_params)
    return Request(key, prompt, line_params, _digest(prompt, line_params, engine_digest), batch_line, chat)


def _digest(prompt: Prompt, params: SamplingParams, engine_digest: str) -> str:
    plain = asdict(prompt) if isinstance(prompt, SegmentedText) else prompt
    facts = {"engine": engine_digest, "prompt": plain, "params": asdict(params)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def answered(results: Path, requests: list[Request]) -> set[str | int]:
    """Return the ids of requests that have a good result. A last line that an interruption cut off is taken away.

    Raises:
        OutputError: `results` holds something else than results, or the answer to another request of that id.
    """
    if str(results) == DASH or not results.exists() or not results.is_file():
        return set()
    wanted = {str(request.key): request for request in requests}
    done: set[str | int] = set()
    whole, size = 0, results.stat().st_size
    with results.open("rb") as file:
        for line in _whole_lines(file, results):
            if not line.endswith(b"\n"):
                break
            key, digest, good = _answer(line, results)
            request = wanted.get(str(key))
            if request is not None and good:
                if digest != request.digest:
                    raise OutputError(
                        f"{results}: the answer to {request.key!r} there is to another request: the request, the "
                        "options or the engine changed since; give another --output"
                    )
                done.add(request.key)
            whole += len(line)
    if whole < size:
        with results.open("r+b") as file:
            file.truncate(whole)
    return done


def _whole_lines(file: BinaryIO, results: Path) -> Iterator[bytes]:
    try:
        yield from lines_of(file, most=MOST_LINE_BYTES)
    except ValueError as error:
        raise OutputError(
            f"{results}: {error}, so it holds something else than results; give another --output"
        ) from None


def _answer(line: bytes, results: Path) -> tuple[str | int, str, bool]:
    """Return whose an answer is, to which request, and whether it is one."""
    try:
        entry = parse_json(line)
        if "custom_id" in entry:
            return entry["custom_id"], entry["id"].removeprefix(openai_batch.request_id("")), entry["error"] is None
        return entry["id"], entry["request"], "error" not in entry
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OutputError(f"{results}: holds something else than results; give another --output") from None


def run_batch(llm: LLM, requests: list[Request], results: Path, say: Callable[[str], None]) -> None:
    """Answer every request that has no result yet.

    Args:
        llm: a loaded engine.
        requests: what `read_requests` returns.
        results: JSONL, made or appended to; `-` is stdout.
        say: called with each line of progress.

    Raises:
        RequestError: the engine failed on some.
        OutputError: as `answered`.
    """
    done = answered(results, requests)
    pending = [request for request in requests if request.key not in done]
    say(f"batch    {len(pending)} requests to run, {len(done)} have a result in {results}")
    failed, step = 0, max(len(pending) // 10, 1)
    with _opened(results) as file:
        ended = llm.as_completed((request.prompt, request.params) for request in pending)
        for count, (number, output) in enumerate(ended, 1):
            chat = pending[number].chat
            answer = output if chat is None else with_messages(output, chat)
            line, good = _result(pending[number], answer, llm.engine.tokenizer.token_bytes)
            failed += not good
            file.write(json_text(line) + "\n")
            file.flush()
            if count % step == 0 or count == len(pending):
                say(f"batch    {count} of {len(pending)} done")
    if failed:
        raise RequestError(f"{failed} of {len(pending)} requests failed; run again to repeat them, see {results}")


def _opened(results: Path) -> Any:
    """Open what results go to; a pipe or device is written and never read."""
    if str(results) == DASH or (results.exists() and _is_stdout(results)):
        return contextlib.nullcontext[TextIO](sys.stdout)
    return results.open("a" if not results.exists() or results.is_file() else "w", encoding="utf-8")


def _is_stdout(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return not path.is_file() and os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    return False


def _result(
    request: Request, output: RequestOutput, token_bytes: Callable[[int], bytes]
) -> tuple[dict[str, Any], bool]:
    errors = [one.error for one in output.outputs if one.finish_reason == "error"]
    if request.batch_line is not None:
        return openai_batch.answer_line(request.batch_line, request.digest, output, token_bytes), not errors
    line: dict[str, Any] = {"id": request.key, "request": request.digest}
    if errors:
        return line | {"error": errors[0]}, False
    line["completions"] = [completion_json(completion) for completion in output.outputs]
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = prompt_logprobs_json(output)
    line["usage"] = {
        "prompt_tokens": output.usage.prompt_tokens,
        "completion_tokens": output.usage.completion_tokens,
    }
    return line, True


def completion_json(completion: CompletionOutput) -> dict[str, Any]:
    """Return one completion as plain JSON values."""
    out: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.message is not None:
        out["message"] = completion.message.to_dict()
    if completion.cumulative_logprob is not None:
        out["cumulative_logprob"] = completion.cumulative_logprob
    if completion.logprobs is not None:
        out["logprobs"] = [_entry(entry) for entry in completion.logprobs]
    return out


def prompt_logprobs_json(output: RequestOutput) -> list[dict[str, Any] | None]:
    """Return the log-probabilities of a prompt's tokens as plain JSON values; null for the first."""
    return [None if entry is None else _entry(entry) for entry in output.prompt_logprobs or ()]


def _entry(entry: Any) -> dict[str, Any]:
    return {"token_id": entry.token_id, "logprob": entry.logprob, "rank": entry.rank, "top": entry.top}
