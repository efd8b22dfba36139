"""The endpoints that generate nothing: models, tokens, health, counters, and what an administrator may change."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from seekforge.common.records import Record
from seekforge.runtime.openai.protocol import BodyError, DetokenizeBody, TokenizeBody, read_body
from seekforge.runtime.server.context import Call, Context
from seekforge.runtime.server.conversation import Conversation
from seekforge.runtime.server.errors import APIError


class UpdateWeightsBody(Record):
    """The body of /update_weights.

    Attributes:
        path: a folder with safetensors files, on the server's machine: the tensors that change, by their names in the
            checkpoint.
    """

    path: str


class EmptyBody(Record):
    """A body that says nothing."""


async def models(call: Call) -> ASGIApp:
    """List the names that the model is served under."""
    return JSONResponse(
        {"object": "list", "data": [_model(call.context, name) for name in call.context.settings.served_model_names]}
    )


async def model(call: Call) -> ASGIApp:
    """Return one of the names that the model is served under."""
    name = call.path.removeprefix("/v1/models/")
    call.context.check_model(name)
    return JSONResponse(_model(call.context, name))


def _model(context: Context, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.started,
        "owned_by": "seekforge",
        "root": context.model_name,
        "max_model_len": context.max_model_len,
    }


async def tokenize(call: Call) -> ASGIApp:
    """Return the tokens of a prompt."""
    body, context = read_body(TokenizeBody, call.body), call.context
    context.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise BodyError("expected one of prompt, which is text, and messages", "prompt")
    if body.messages is None:
        ids = list(await context.encode(body.prompt or "", context.defaults))
    else:
        names = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
        options = {name: value for name in names if (value := getattr(body, name)) is not None}
        ids = list((await Conversation.of(context, body.messages, context.defaults, options)).prompt_ids)
    answer = {"count": len(ids), "max_model_len": context.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [context.tokenizer.token_text(token) for token in ids]
    return JSONResponse(answer)


async def detokenize(call: Call) -> ASGIApp:
    """Return the text of tokens."""
    body, context = read_body(DetokenizeBody, call.body), call.context
    context.check_model(body.model)
    return JSONResponse({"prompt": context.tokenizer.decode(body.tokens, skip_special_tokens=False)})


async def health(call: Call) -> ASGIApp:
    """Say whether the server lives."""
    if call.context.client.dead:
        raise APIError(503, call.context.client.dead, code="engine_dead")
    return PlainTextResponse("")


async def ready(call: Call) -> ASGIApp:
    """Say whether the server takes requests."""
    context = call.context
    why = context.client.dead or context.draining
    if why:
        raise APIError(503, why, code="not_ready")
    return PlainTextResponse("")


async def metrics(call: Call) -> ASGIApp:
    """Return the counters in Prometheus' text form."""
    context = call.context
    text = context.metrics.text(await context.client.call("metrics"))
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def pause(call: Call) -> ASGIApp:
    """Begin no further step; requests wait."""
    await call.context.client.call("pause")
    return JSONResponse({"paused": True})


async def resume(call: Call) -> ASGIApp:
    """Go on after a pause."""
    await call.context.client.call("resume")
    return JSONResponse({"paused": False})


async def reset_prefix_cache(call: Call) -> ASGIApp:
    """Forget what prompts have in common."""
    await call.context.client.call("reset_prefix_cache")
    return JSONResponse({})


async def update_weights(call: Call) -> ASGIApp:
    """Swap weights between two steps."""
    body = read_body(UpdateWeightsBody, call.body)
    count = await call.context.client.call("update_weights", path=body.path)
    return JSONResponse({"num_tensors": count})
