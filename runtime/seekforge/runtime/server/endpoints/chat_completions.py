"""/v1/chat/completions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from seekforge.runtime.chat import MessageDelta
from seekforge.runtime.openai.answers import chat_logprobs, usage
from seekforge.runtime.openai.params import chat_options, chat_params
from seekforge.runtime.openai.protocol import BodyError, ChatCompletionBody, read_body
from seekforge.runtime.server.context import Call
from seekforge.runtime.server.conversation import Choice, Conversation
from seekforge.runtime.server.endpoints.completions import prompt_row
from seekforge.runtime.server.sse import json_text


async def chat_completions(call: Call) -> ASGIApp:
    """Answer a conversation."""
    body, context = read_body(ChatCompletionBody, call.body), call.context
    context.check_model(body.model)
    params = chat_params(body, context.defaults)
    if body.stream and body.prompt_logprobs is not None:
        raise BodyError("prompt_logprobs cannot be streamed; leave stream out", "prompt_logprobs")
    if body.stream and body.return_token_ids:
        raise BodyError("return_token_ids cannot be streamed in a chat; leave stream out", "return_token_ids")
    conversation = await Conversation.of(context, body.messages, params, chat_options(body))
    if body.stream:
        return await call.event_stream(_events(call, body, conversation))
    return await call.unless_gone(_whole(call, body, conversation))


async def _whole(call: Call, body: ChatCompletionBody, conversation: Conversation) -> JSONResponse:
    context = call.context
    end = await conversation.whole(call, body.priority or 0)
    counts = usage(end.num_prompt_tokens, end.num_completion_tokens, end.num_cached_tokens)
    counts["completion_tokens_details"] = {"reasoning_tokens": conversation.num_reasoning_tokens}
    answer: dict[str, Any] = {
        "id": f"chatcmpl-{call.request_id}",
        "object": "chat.completion",
        "created": call.created,
        "model": context.model_name,
        "choices": [_choice(call, body, index, choice) for index, choice in enumerate(conversation.choices)],
        "usage": counts,
    }
    if end.prompt_logprobs is not None:
        token_bytes = context.tokenizer.written_bytes
        answer["prompt_logprobs"] = [
            None if row is None else prompt_row(row, token_bytes) for row in end.prompt_logprobs
        ]
    if body.return_token_ids:
        answer["prompt_token_ids"] = list(end.prompt_token_ids or conversation.prompt_ids)
    return JSONResponse(answer)


def _choice(call: Call, body: ChatCompletionBody, index: int, choice: Choice) -> dict[str, Any]:
    said = choice.parser.message
    message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
    if said.reasoning_content is not None and body.include_reasoning is not False:
        message["reasoning_content"] = said.reasoning_content
    if said.tool_calls:
        message["tool_calls"] = [one.to_dict() for one in said.tool_calls]
        message["content"] = said.content or None
    token_bytes = call.context.tokenizer.written_bytes
    more = {"token_ids": choice.token_ids} if body.return_token_ids else {}
    return more | {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(choice.rows, token_bytes) if body.logprobs else None,
        "finish_reason": choice.reason,
        "stop_reason": choice.stop_reason,
    }


def delta_object(delta: MessageDelta, *, with_reasoning: bool = True) -> dict[str, Any]:
    """Return what a message gained as OpenAI writes it; empty where it gained nothing that is shown."""
    out: dict[str, Any] = {}
    if delta.reasoning_content and with_reasoning:
        out["reasoning_content"] = delta.reasoning_content
    if delta.content:
        out["content"] = delta.content
    if delta.tool_calls:
        out["tool_calls"] = [
            {"index": one.index}
            | ({"id": one.id, "type": "function"} if one.id is not None else {})
            | {"function": ({"name": one.name} if one.name is not None else {}) | {"arguments": one.arguments}}
            for one in delta.tool_calls
        ]
    return out


async def _events(call: Call, body: ChatCompletionBody, conversation: Conversation) -> AsyncGenerator[bytes, None]:
    context = call.context
    token_bytes = context.tokenizer.written_bytes
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    shows_reasoning = body.include_reasoning is not False
    head = json_text(
        {
            "id": f"chatcmpl-{call.request_id}",
            "object": "chat.completion.chunk",
            "created": call.created,
            "model": context.model_name,
        }
    )[:-1]
    tail = ',"usage":null}\n\n' if wants_usage else "}\n\n"
    starts = [f'data: {head},"choices":[{{"index":{index},"delta":' for index in range(len(conversation.choices))]
    end_of_plain = ',"logprobs":null,"finish_reason":null}]' + tail
    began = False
    async with contextlib.aclosing(conversation.deltas(call, body.priority or 0)) as gains:
        async for gained in gains:
            if not began:
                began = True
                opening = '{"role":"assistant","content":""}'
                yield "".join(f"{start}{opening}{end_of_plain}" for start in starts).encode()
                continue
            out: list[str] = []
            for index, piece, deltas in gained:
                start, choice = starts[index], conversation.choices[index]
                chunks = [one for delta in deltas if (one := delta_object(delta, with_reasoning=shows_reasoning))]
                logprobs = None
                if body.logprobs and piece.logprobs:
                    logprobs, choice.rows = chat_logprobs(piece.logprobs, token_bytes), []
                    chunks = chunks or [{}]  # tokens whose text is held back have theirs all the same
                for number, chunk in enumerate(chunks):
                    if logprobs is None or number:
                        out.append(f"{start}{json_text(chunk)}{end_of_plain}")
                    else:
                        out.append(
                            f'{start}{json_text(chunk)},"logprobs":{json_text(logprobs)},"finish_reason":null}}]{tail}'
                        )
                if piece.finish_reason is not None:
                    out.append(
                        f'{start}{{}},"logprobs":null,"finish_reason":"{choice.reason}",'
                        f'"stop_reason":{json_text(choice.stop_reason)}}}]{tail}'
                    )
            if out:
                yield "".join(out).encode()
    if wants_usage:
        end = conversation.end
        assert end is not None
        counts = usage(end.num_prompt_tokens, end.num_completion_tokens, end.num_cached_tokens)
        counts["completion_tokens_details"] = {"reasoning_tokens": conversation.num_reasoning_tokens}
        yield f'data: {head},"choices":[],"usage":{json_text(counts)}}}\n\n'.encode()
    yield b"data: [DONE]\n\n"
