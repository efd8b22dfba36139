"""The application: plain ASGI, so that any server of that kind can run it."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from seekforge.runtime.openai.protocol import ChatCompletionBody, CompletionBody, DetokenizeBody, TokenizeBody
from seekforge.runtime.server.context import Context
from seekforge.runtime.server.endpoints import anthropic_messages, basics, openapi, page
from seekforge.runtime.server.endpoints.basics import EmptyBody, UpdateWeightsBody
from seekforge.runtime.server.endpoints.chat_completions import chat_completions
from seekforge.runtime.server.endpoints.completions import completions
from seekforge.runtime.server.endpoints.responses import ResponsesBody, responses
from seekforge.runtime.server.middleware import RequestMiddleware
from seekforge.runtime.server.router import MODELS, Route, Router

#: Every endpoint; the OpenAPI document is made from it.
ROUTES: tuple[Route, ...] = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        body=ChatCompletionBody,
        generates=True,
        title="Answer a conversation, as OpenAI's clients ask",
    ),
    Route(
        "POST",
        "/v1/responses",
        responses,
        body=ResponsesBody,
        generates=True,
        title="Answer a conversation, as OpenAI's newer clients ask",
    ),
    Route(
        "POST",
        "/v1/messages",
        anthropic_messages.messages,
        body=anthropic_messages.MessagesBody,
        generates=True,
        title="Answer a conversation, as Anthropic's clients ask",
        errors="anthropic",
    ),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        anthropic_messages.count_tokens,
        body=anthropic_messages.CountTokensBody,
        title="Count the tokens of a conversation",
        errors="anthropic",
    ),
    Route("POST", "/v1/completions", completions, body=CompletionBody, generates=True, title="Continue prompts"),
    Route("GET", "/v1/models", basics.models, title="List the models"),
    Route("GET", MODELS, basics.model, title="One model"),
    Route("POST", "/tokenize", basics.tokenize, body=TokenizeBody, title="Turn text into tokens"),
    Route("POST", "/detokenize", basics.detokenize, body=DetokenizeBody, title="Turn tokens into text"),
    Route("GET", "/engine", page.engine, title="Which engine is served"),
    Route("GET", "/health", basics.health, key="none", title="Is the engine there?", answers="text/plain"),
    Route("GET", "/ready", basics.ready, key="none", title="Are requests taken?", answers="text/plain"),
    Route("GET", "/metrics", basics.metrics, key="none", title="Counters for Prometheus", answers="text/plain"),
    Route("POST", "/pause", basics.pause, key="admin", body=EmptyBody, title="Begin no further step"),
    Route("POST", "/resume", basics.resume, key="admin", body=EmptyBody, title="Go on after a pause"),
    Route(
        "POST", "/reset_prefix_cache", basics.reset_prefix_cache, key="admin", body=EmptyBody, title="Empty the cache"
    ),
    Route("POST", "/update_weights", basics.update_weights, key="admin", body=UpdateWeightsBody, title="Swap weights"),
)


def make_app(context: Context) -> ASGIApp:
    """Return the application of a server whose engine is open."""
    routes = [*ROUTES, *openapi.handlers(ROUTES)]
    if context.settings.enable_page:
        routes.append(Route("GET", "/", page.page, key="none", title="The page", answers="text/html"))
    handlers: ASGIApp = RequestMiddleware(context, Router(routes))
    if context.settings.cors_origins:
        handlers = CORSMiddleware(
            handlers, allow_origins=list(context.settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await handlers(scope, receive, send)
        elif scope["type"] == "lifespan":  # the engine is opened before and closed after
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        else:
            await send({"type": "websocket.close", "code": 1000})

    return app
