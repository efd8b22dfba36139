"""A server of Ray Serve LLM without Ray: what it asks the application, and how it says what came."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seekforge.common.errors import EngineError, OptionError
from seekforge.runtime.ray.llm_server import EngineServer, arguments_of


class Given:
    """An instance of one of the classes of Ray's requests and answers, which are pydantic's."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def model_dump_json(self, *, exclude_unset: bool, warnings: bool) -> str:
        assert exclude_unset and not warnings
        return json.dumps(self.fields)

    @classmethod
    def model_validate_json(cls, text: str) -> Given:
        return cls(**json.loads(text))


class Completion(Given):
    pass


class Tokens(Given):
    pass


class Error(Given):
    pass


MODELS = SimpleNamespace(CompletionResponse=Completion, TokenizeResponse=Tokens, ErrorResponse=Error, ErrorInfo=dict)


def config(engine: Path | None, **more: Any) -> Any:
    """Return what is read of an LLMConfig."""
    fields: dict[str, Any] = {
        "model_loading_config": SimpleNamespace(
            model_id="toy/one", model_source=None if engine is None else str(engine)
        ),
        "engine_kwargs": {"kv_cache_memory": 1 << 22},
        "deployment_config": {},
    }
    others = dict.fromkeys(("accelerator_type", "placement_group_config", "lora_config", "runtime_env"))
    return SimpleNamespace(**{**fields, **others, **more})


def served(llm_config: Any, work: Callable[[EngineServer], Awaitable[None]]) -> None:
    """Start a server, do something, end it."""

    async def main() -> None:
        server = EngineServer.__new__(EngineServer)
        await server.__init__(llm_config)  # as Ray does
        try:
            await work(server)
        finally:
            await server.__del__()
        with pytest.raises(EngineError, match="it ends"):
            await server.check_health()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("engine", "odd", "line"),
    [
        ("e", {"lora_config": {}}, "lora_config is for engines of vLLM"),
        ("e", {"placement_group_config": {"strategy": "SPREAD"}}, "placement_group_config"),
        ("e", {"engine_kwargs": {"tensor_parallel_size": 2}}, "engine_kwargs .*tensor_parallel_size"),
        ("e", {"engine_kwargs": {"served_model_name": "x"}}, "served_model_name"),
        ("e", {"engine_kwargs": {"num_replicas": 2}}, "num_replicas, .* deployment_config"),
        (None, {}, "model_source is None"),
    ],
)
def test_what_is_odd_in_a_config_is_named(engine: str | None, odd: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError, match=line):
        arguments_of(config(None if engine is None else Path(engine), **odd))


def test_a_deployment_has_the_wishes_of_its_config_and_the_bundles_of_its_engine(toy_engine: Path) -> None:
    wishes = {"num_replicas": 3, "ray_actor_options": {"num_cpus": 7, "resources": {"here": 1}}}
    llm_config = config(
        toy_engine,
        engine_kwargs={"threads": 2},
        deployment_config=wishes,
        runtime_env={"env_vars": {"SEEKFORGE_API_KEY": "k"}},
    )
    options = EngineServer.get_deployment_options(llm_config)
    assert options["num_replicas"] == 3 and options["placement_group_bundles"] == [{"CPU": 2.0, "GPU": 0.0}]
    assert options["ray_actor_options"] == {
        "num_cpus": 2.0,
        "num_gpus": 0.0,
        "resources": {"here": 1},
        "runtime_env": {"env_vars": {"SEEKFORGE_API_KEY": "k"}},
    }
    assert wishes["ray_actor_options"] == {"num_cpus": 7, "resources": {"here": 1}}, "the config is left as it was"


def test_answers_are_instances_of_rays_classes_or_texts_of_events(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seekforge.runtime.ray.llm_server._models", lambda: MODELS)
    monkeypatch.setenv("SEEKFORGE_API_KEY", "secret")
    info = SimpleNamespace(headers={"Authorization": "Bearer secret", "Content-Length": "1", "X-Request-Id": "one"})
    asked = {"model": "toy/one", "prompt": [5, 6], "max_tokens": 4, "temperature": 0}

    async def answers(method: Any, heads: Any = info, **fields: Any) -> list[Any]:
        return [part async for part in await method(Given(**fields), heads)]

    async def work(server: EngineServer) -> None:
        await server.check_health()
        (whole,) = await answers(server.completions, **asked)
        assert type(whole) is Completion and whole.fields["usage"]["completion_tokens"] == 4
        texts = await answers(server.completions, stream=True, **asked)
        events = [line.removeprefix("data: ") for line in "".join(texts).splitlines() if line]
        assert events[-1] == "[DONE]" and all(isinstance(text, str) for text in texts)
        streamed = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        assert streamed == whole.fields["choices"][0]["text"] != ""
        (tokens,) = await answers(server.tokenize, prompt="a cat")
        assert type(tokens) is Tokens and len(tokens.fields["tokens"]) == tokens.fields["count"] > 0

        for method, fields, heads, code, said in (
            (server.completions, {**asked, "temperature": -1}, info, 400, "temperature"),
            (server.completions, {**asked, "stream": True, "model": "x"}, info, 404, "x"),
            (server.completions, asked, None, 401, "API key"),
            (server.embeddings, {"input": "a"}, info, 404, "/v1/embeddings"),
        ):
            (error,) = await answers(method, heads, **fields)
            assert type(error) is Error and error.fields["error"]["code"] == code
            assert said in error.fields["error"]["message"]

    served(config(toy_engine), work)


def test_a_request_that_nobody_waits_for_any_more_ends(toy_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seekforge.runtime.ray.llm_server._models", lambda: MODELS)

    async def work(server: EngineServer) -> None:
        asked = {"model": "toy/one", "prompt": [5, 6], "max_tokens": 200, "ignore_eos": True, "stream": True}
        parts = await server.completions(Given(**asked))
        assert (await anext(aiter(parts))).startswith("data: ")
        assert server._app is not None
        context = server._app._context
        assert context is not None
        assert context.num_running == 1
        await parts.aclose()  # as Ray does when a client is gone
        assert context.num_running == 0
        async with asyncio.timeout(20):
            while (await context.client.call("metrics"))["num_running"]:
                await asyncio.sleep(0.01)

    served(config(toy_engine), work)


def test_a_server_whose_engine_cannot_be_opened_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        server = EngineServer.__new__(EngineServer)
        with pytest.raises(EngineError, match=r"manifest\.json"):
            await server.__init__(config(tmp_path))
        del server
        gc.collect()

    asyncio.run(main())
