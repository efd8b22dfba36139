"""A server of Ray Serve LLM: `server_cls` of an LLMConfig, whose replicas answer what Ray's OpenAI ingress is asked.

Requests and answers are instances of Ray's classes, which are vLLM's or SGLang's: one of the two has to be installed,
and none of it runs. Each request goes to the application of `seekforge serve`, in this process.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Final

from starlette.types import ASGIApp, Message, Scope

from seekforge.common.errors import EngineError, OptionError
from seekforge.common.records import RecordError
from seekforge.runtime.ray.application import ApplicationArguments, deployment_options, make_replica_app
from seekforge.runtime.ray.replica import ReplicaApp

#: Parts of an LLMConfig that are for an engine of vLLM.
_NOT_READ: Final = ("accelerator_type", "placement_group_config", "lora_config")
#: Headers of the body that the ingress has read.
_OF_THE_BODY: Final = ("content-length", "content-type", "content-encoding", "transfer-encoding")


def arguments_of(llm_config: Any) -> ApplicationArguments:
    """Return what an LLMConfig says of an engine.

    Args:
        llm_config: `model_source` of its `model_loading_config` is the engine's folder, `model_id` what requests call
            it, and its `engine_kwargs` are the other arguments of an application.

    Raises:
        OptionError: something is wrong with them, or is set that is for other engines.
    """
    for name in _NOT_READ:
        if getattr(llm_config, name) is not None:
            raise OptionError(
                f"LLMConfig: {name} is for engines of vLLM; leave it out (an engine's ranks have a bundle each)"
            )
    model = llm_config.model_loading_config
    if not isinstance(model.model_source, str):
        raise OptionError(
            f"LLMConfig: model_source is {model.model_source!r}, expected the folder of an engine that every node has"
        )
    named = {"engine": model.model_source, "served_model_name": model.model_id}
    if twice := sorted({*named, "num_replicas"} & set(llm_config.engine_kwargs)):
        raise OptionError(
            f"LLMConfig: engine_kwargs has {', '.join(twice)}, which are said by model_loading_config and "
            "deployment_config; leave them out"
        )
    try:
        return ApplicationArguments.model_validate({**named, **llm_config.engine_kwargs})
    except RecordError as error:
        raise OptionError(f"engine_kwargs of the LLMConfig: {error}") from None


class EngineServer:
    """One replica.

    Args:
        llm_config: the LLMConfig; see `arguments_of`.
    """

    async def __init__(self, llm_config: Any) -> None:  # pyright: ignore[reportGeneralTypeIssues]  # Ray awaits it
        arguments = arguments_of(llm_config)
        num_ranks = len(deployment_options(arguments)["placement_group_bundles"])
        app = make_replica_app(arguments, num_ranks)
        await app.open()
        self._app: ReplicaApp | None = app

    def __del__(self) -> Any:
        """Ray calls it when no request is on its way, and awaits what it returns: the engine closes."""
        app, self._app = getattr(self, "_app", None), None
        return None if app is None else app.close()

    @classmethod
    def get_deployment_options(cls, llm_config: Any) -> dict[str, Any]:
        """Return the options of the deployment: those of `deployment_config`, with a bundle for each rank."""
        options = deployment_options(arguments_of(llm_config))
        wishes = dict(llm_config.deployment_config)
        actor = {**wishes.pop("ray_actor_options", {}), **options["ray_actor_options"]}
        if llm_config.runtime_env:
            actor["runtime_env"] = {**actor.get("runtime_env", {}), **llm_config.runtime_env}
        return {**options, **wishes, "ray_actor_options": actor}

    async def check_health(self) -> None:
        """Raise where the engine is gone; Ray then starts another replica.

        Raises:
            EngineError: the engine's process is gone, or a rank.
        """
        self._opened().check()

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Answer a conversation: with one ChatCompletionResponse, with texts of events, or with an ErrorResponse."""
        return self._answers("/v1/chat/completions", request, raw_request_info, "ChatCompletionResponse")

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Continue prompts: with one CompletionResponse, with texts of events, or with an ErrorResponse."""
        return self._answers("/v1/completions", request, raw_request_info, "CompletionResponse")

    async def tokenize(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Turn text into tokens: one TokenizeResponse or ErrorResponse."""
        return self._answers("/tokenize", request, raw_request_info, "TokenizeResponse")

    async def detokenize(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Turn tokens into text: one DetokenizeResponse or ErrorResponse."""
        return self._answers("/detokenize", request, raw_request_info, "DetokenizeResponse")

    async def embeddings(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Say that there are none, with an ErrorResponse."""
        return self._answers("/v1/embeddings", request, raw_request_info, "EmbeddingResponse")

    async def score(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Say that there are none, with an ErrorResponse."""
        return self._answers("/v1/score", request, raw_request_info, "ScoreResponse")

    async def _answers(self, path: str, request: Any, raw_request_info: Any, kind: str) -> AsyncGenerator[Any, None]:
        """Yield what the application answers, as an instance of the class of that name, or as texts of events."""
        models = _models()
        # what was not sent has the defaults of seekforge, not of vLLM
        body = request.model_dump_json(exclude_unset=True, warnings=False).encode()
        headers = {} if raw_request_info is None else raw_request_info.headers
        answer = _Answer(self._opened(), path, headers, body)
        try:
            status, media_type = await answer.begin()
            if media_type == "text/event-stream":
                async for text in answer.texts():
                    yield text
                return
            whole = "".join([text async for text in answer.texts()])
            if status < 400:
                yield getattr(models, kind).model_validate_json(whole)
            else:
                error = json.loads(whole)["error"]
                named = {name: error[name] for name in ("message", "type", "param")}
                yield models.ErrorResponse(error=models.ErrorInfo(**named, code=status))
        finally:
            await answer.end()

    def _opened(self) -> ReplicaApp:
        if self._app is None:
            raise EngineError("the replica has no engine; it ends")
        return self._app


def _models() -> Any:
    """Return Ray's module of requests and answers."""
    from ray.llm._internal.serve.core.configs import openai_api_models

    return openai_api_models


class _Answer:
    """What an ASGI application answers to one request with a body.

    Args:
        app: the application.
        path: which endpoint.
        headers: those of the request.
        body: JSON.
    """

    def __init__(self, app: ASGIApp, path: str, headers: Mapping[str, str], body: bytes) -> None:
        kept = {name.lower(): value for name, value in headers.items() if name.lower() not in _OF_THE_BODY}
        kept |= {"content-type": "application/json", "content-length": str(len(body))}
        scope: Scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept.items()],
        }
        self._said: asyncio.Queue[Message | None] = asyncio.Queue()
        self._body: bytes | None = body
        self._gone = asyncio.Event()
        self._task = asyncio.create_task(self._run(app, scope))

    async def begin(self) -> tuple[int, str]:
        """Wait for the answer to begin; return its status and media type."""
        start = await self._said.get()
        if start is None:
            await self._task  # which raises
            raise AssertionError("the application answered nothing")
        headers = dict(start["headers"])
        return start["status"], headers.get(b"content-type", b"").decode().partition(";")[0]

    async def texts(self) -> AsyncIterator[str]:
        """Yield the answer's body: what has come since the last time, at once."""
        ended = False
        while not ended:
            messages = [await self._said.get()]
            while not self._said.empty():
                messages.append(self._said.get_nowait())
            ended = messages[-1] is None
            if text := b"".join(message.get("body", b"") for message in messages if message is not None).decode():
                yield text
        await self._task

    async def end(self) -> None:
        """Tell the application that nobody waits any more, unless it has ended, and wait for it."""
        self._gone.set()
        await asyncio.wait((self._task,))

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        async def receive() -> Message:
            body, self._body = self._body, None
            if body is not None:
                return {"type": "http.request", "body": body, "more_body": False}
            await self._gone.wait()
            return {"type": "http.disconnect"}

        try:
            await app(scope, receive, self._said.put)
        finally:
            self._said.put_nowait(None)
