"""/v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from seekforge.runtime.openai.answers import completion_logprobs, finish_reason, usage, written_logprob
from seekforge.runtime.openai.params import completion_params
from seekforge.runtime.openai.protocol import BodyError, CompletionBody, read_body
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.server.channel import End, Piece, joined
from seekforge.runtime.server.context import MAX_PROMPTS, Call, Context, merged
from seekforge.runtime.server.sse import json_text
from seekforge.runtime.values import is_integer


async def completions(call: Call) -> ASGIApp:
    """Continue each prompt."""
    body, context = read_body(CompletionBody, call.body), call.context
    context.check_model(body.model)
    params = completion_params(body, context.defaults)
    if body.stream and params.best_of not in (None, params.n):
        raise BodyError("best_of cannot be streamed, since the best are known at the end only", "best_of")
    if body.stream and body.echo and (body.logprobs is not None or body.prompt_logprobs is not None):
        raise BodyError("echo with logprobs cannot be streamed; leave stream out", "echo")
    if body.stream and body.echo and body.truncate_prompt_tokens is not None:
        raise BodyError("echo of a truncated prompt cannot be streamed; leave stream out", "echo")
    prompts = await _prompts(body.prompt, context, params)
    if body.stream:
        return await call.event_stream(_events(call, body, prompts, params))
    return await call.unless_gone(_whole(call, body, prompts, params))


async def _prompts(prompt: Any, context: Context, params: SamplingParams) -> list[Sequence[int]]:
    """Return the tokens of each prompt."""
    if isinstance(prompt, str):
        return [await context.encode(prompt, params)]
    if not prompt:
        raise BodyError("prompt is an empty list, expected text, texts, token ids, or lists of token ids", "prompt")
    if all(is_integer(one) for one in prompt):
        return [tuple(prompt)]
    if len(prompt) > MAX_PROMPTS:
        raise BodyError(f"prompt has {len(prompt)} entries, expected at most {MAX_PROMPTS}", "prompt")
    prompts: list[Sequence[int]] = []
    for number, one in enumerate(prompt):
        if isinstance(one, str):
            prompts.append(await context.encode(one, params))
        elif isinstance(one, list) and all(is_integer(token) for token in one):
            prompts.append(tuple(one))
        else:
            raise BodyError(f"prompt.{number} is neither text nor a list of token ids", f"prompt.{number}")
    return prompts


async def _whole(
    call: Call, body: CompletionBody, prompts: list[Sequence[int]], params: SamplingParams
) -> JSONResponse:
    context, timer = call.context, call.context.metrics.timer()
    token_bytes = context.tokenizer.written_bytes
    choices: list[dict[str, Any]] = []
    totals = [0, 0, 0]
    async with call.streams(prompts, params, body.priority or 0) as streams:
        collected: list[list[Piece]] = [[] for _ in streams]
        async for number, pieces in merged(streams):
            timer.came()
            collected[number] += pieces
    for number, pieces in enumerate(collected):
        end = pieces[-1].end
        assert end is not None
        for one in end.best or sorted(joined(pieces), key=lambda piece: piece.choice):
            choices.append(
                _choice(number * params.n + one.choice, one, end, body, prompts[number], context, token_bytes)
            )
        generated = 0 if body.max_tokens == 0 else end.num_completion_tokens
        totals = [a + b for a, b in zip(totals, (end.num_prompt_tokens, generated, end.num_cached_tokens))]
    call.log["completion_tokens"] = totals[1]
    timer.ended(choices[0]["finish_reason"], totals[0], totals[1])
    return JSONResponse(
        {
            "id": f"cmpl-{call.request_id}",
            "object": "text_completion",
            "created": call.created,
            "model": context.model_name,
            "choices": choices,
            "usage": usage(*totals),
        }
    )


def _choice(
    index: int, one: Piece, end: End, body: CompletionBody, prompt: Sequence[int], context: Context, token_bytes: Any
) -> dict[str, Any]:
    only_prompt = body.max_tokens == 0
    text, ids, rows = ("", (), ()) if only_prompt else (one.text, one.token_ids, one.logprobs)
    before = ""
    if body.echo:
        ids_before = end.prompt_token_ids or tuple(prompt)
        before = context.tokenizer.decode(ids_before, skip_special_tokens=False)
        if end.prompt_logprobs is not None:
            ids, rows = (*ids_before, *ids), (*end.prompt_logprobs, *rows)
    choice: dict[str, Any] = {
        "index": index,
        "text": before + text,
        "logprobs": None if body.logprobs is None else completion_logprobs(rows, ids, token_bytes),
        "finish_reason": "length" if only_prompt else finish_reason(one.finish_reason),
        "stop_reason": None if only_prompt else one.stop_reason,
    }
    if body.prompt_logprobs is not None and end.prompt_logprobs is not None:
        choice["prompt_logprobs"] = [
            None if row is None else prompt_row(row, token_bytes) for row in end.prompt_logprobs
        ]
    if body.return_token_ids:
        choice |= {"prompt_token_ids": list(end.prompt_token_ids or prompt), "token_ids": list(one.token_ids)}
    return choice


def prompt_row(row: Any, token_bytes: Any) -> dict[str, Any]:
    """Return the log-probabilities at one position of a prompt, as vLLM writes them."""
    number, logprob, rank, likely = row

    def entry(token: int, value: float, place: int) -> dict[str, Any]:
        return {
            "logprob": written_logprob(value),
            "rank": place,
            "decoded_token": token_bytes(token).decode("utf-8", "replace"),
        }

    out = {str(number): entry(number, logprob, rank)}
    for place, (token, value) in enumerate(likely, 1):
        out.setdefault(str(token), entry(token, value, place))
    return out


async def _events(
    call: Call, body: CompletionBody, prompts: list[Sequence[int]], params: SamplingParams
) -> AsyncGenerator[bytes, None]:
    context, timer = call.context, call.context.metrics.timer()
    token_bytes = context.tokenizer.written_bytes
    options = body.stream_options
    wants_usage = options is not None and bool(options.include_usage)
    head = json_text(
        {
            "id": f"cmpl-{call.request_id}",
            "object": "text_completion",
            "created": call.created,
            "model": context.model_name,
        }
    )[:-1]
    nothing_more = ',"usage":null}\n\n' if wants_usage else "}\n\n"
    plain = body.logprobs is None and not body.return_token_ids
    # what most chunks are, but for their text
    starts = [f'data: {head},"choices":[{{"index":{index},"text":' for index in range(len(prompts) * params.n)]
    end_of_plain = ',"logprobs":null,"finish_reason":null}]' + nothing_more
    offsets: dict[int, int] = {}
    reason = "stop"
    totals = [0, 0, 0]
    async with call.streams(prompts, params, body.priority or 0) as streams:
        if body.echo:
            yield "".join(
                f"{starts[number * params.n + index]}{json_text(text)}{end_of_plain}"
                for number, ids in enumerate(prompts)
                for text in (context.tokenizer.decode(ids, skip_special_tokens=False),)
                for index in range(params.n)
            ).encode()
        else:
            yield b""  # the request is accepted: the answer begins
        async for number, pieces in merged(streams):
            timer.came()
            out: list[str] = []
            for piece in pieces:
                index = number * params.n + piece.choice
                if piece.end is not None:
                    end = piece.end
                    counts = (end.num_prompt_tokens, end.num_completion_tokens, end.num_cached_tokens)
                    totals = [a + b for a, b in zip(totals, counts)]
                    call.log["completion_tokens"] = totals[1]
                reason = finish_reason(piece.finish_reason) or reason
                if body.max_tokens == 0:
                    piece = piece._replace(text="", token_ids=(), logprobs=(), finish_reason="length")
                if plain and piece.finish_reason is None:
                    if piece.text:
                        out.append(f"{starts[index]}{json_text(piece.text)}{end_of_plain}")
                    continue
                logprobs = None
                if body.logprobs is not None:
                    at = offsets.get(index, 0)
                    logprobs = completion_logprobs(piece.logprobs, piece.token_ids, token_bytes, at)
                    offsets[index] = at + sum(map(len, logprobs["tokens"]))
                more = f',"token_ids":{list(piece.token_ids)}' if body.return_token_ids else ""
                out.append(
                    f"{starts[index]}{json_text(piece.text)},"
                    f'"logprobs":{json_text(logprobs)},"finish_reason":{json_text(finish_reason(piece.finish_reason))},'
                    f'"stop_reason":{json_text(piece.stop_reason)}{more}}}]{nothing_more}'
                )
            if out:
                yield "".join(out).encode()
    timer.ended(reason, totals[0], totals[1])
    if body.max_tokens == 0:
        totals[1] = 0
    if wants_usage:
        yield f'data: {head},"choices":[],"usage":{json_text(usage(*totals))}}}\n\n'.encode()
    yield b"data: [DONE]\n\n"
