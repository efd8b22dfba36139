"""Replicas behind the OpenAI ingress of a real Ray Serve LLM, one of which is killed under load.

SEEKFORGE_RAY_LLM_PYTHON names an interpreter that has Ray, and vLLM or SGLang for Ray's classes of requests.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from tests.support.rank_engines import rank_engine
from tests.support.ray_served import RANK, Served, check_a_killed_replica, running
from tests.support.replicas import completion, expected_texts, free_port, wait_until

from seekforge.formats.parallelism import Parallelism

PYTHON = os.environ.get("SEEKFORGE_RAY_LLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="SEEKFORGE_RAY_LLM_PYTHON names no Python with ray, and vLLM or SGLang beside it"
    ),
]
PROMPTS = [[5 + i, 9, 20 + 3 * i, 7] for i in range(8)]
MODEL = "deepseek-v3.2"
#: Serves what a Serve config says, on cores that need not be there.
_SERVE = """
import importlib, json, os, signal, sys
told = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # vLLM speaks on stdout
import ray, yaml
from ray import serve
(application,) = yaml.safe_load(open(sys.argv[1]))["applications"]
ray.init("local", num_cpus=8, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
module, _, name = application["import_path"].partition(":")
app = getattr(importlib.import_module(module), name)(application["args"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
try:
    serve.run(app, name=application["name"], route_prefix=application["route_prefix"])
    print(json.dumps({"url": f"http://127.0.0.1:{sys.argv[2]}"}), file=told, flush=True)
    signal.pause()
finally:
    serve.shutdown()
    ray.shutdown()
"""


def shown_config(engine: Path, num_replicas: int = 2) -> dict[str, Any]:
    """Return the Serve config that docs/deploy.md shows, of another engine."""
    page = (Path(__file__).parents[3] / "docs/deploy.md").read_text(encoding="utf-8")
    shown = page.partition("### Ray Serve LLM")[2].partition("```yaml\n")[2].partition("```")[0]
    config = yaml.safe_load(shown)
    (llm_config,) = config["applications"][0]["args"]["llm_configs"]
    assert llm_config["model_loading_config"]["model_id"] == MODEL
    llm_config["model_loading_config"]["model_source"] = str(engine)
    llm_config["engine_kwargs"] |= {"max_model_len": 256, "kv_cache_memory": 1 << 22}
    llm_config["deployment_config"]["num_replicas"] = num_replicas
    return config


@contextmanager
def serving(config: dict[str, Any], tmp_path: Path) -> Iterator[Served]:
    """Serve what a Serve config says."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with running([PYTHON, "-c", _SERVE, str(path), str(free_port())], tmp_path) as served:
        yield served


def test_replicas_answer_openais_client_and_one_that_is_killed_loses_what_was_on_it(
    chat_engine: Path, tmp_path: Path
) -> None:
    texts = expected_texts(chat_engine, PROMPTS)
    with serving(shown_config(chat_engine), tmp_path) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == [MODEL]
        for prompt, text in zip(PROMPTS, texts, strict=True):
            assert completion(served.url, MODEL, prompt) == text

        pieces = client.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=120, temperature=0, stream=True)
        streamed = [choice.text for piece in pieces for choice in piece.choices]
        assert "".join(streamed) == texts[0] and len(streamed) > 1
        chat: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "temperature": 0}
        chat["messages"] = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
        whole = client.chat.completions.create(**chat)
        assert whole.usage is not None and whole.usage.completion_tokens == 20
        deltas = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
        parts = list(deltas)
        said = "".join(choice.delta.content or "" for part in parts for choice in part.choices)
        assert said == whole.choices[0].message.content
        usage = parts[-1].usage
        assert usage is not None and usage.completion_tokens == 20 and usage.prompt_tokens == whole.usage.prompt_tokens
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model=MODEL, prompt=PROMPTS[0], temperature=-1)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="another", prompt=PROMPTS[0])
        with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
            client.embeddings.create(model=MODEL, input="a")

        check_a_killed_replica(served, MODEL, PROMPTS, texts)


def test_a_rank_of_a_replica_is_on_its_bundle_and_one_that_is_lost_ends_the_replica(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    engine = rank_engine(tiny_checkpoint, Parallelism(tp=2), tmp_path_factory)
    prompts, max_tokens = PROMPTS[:2], 8
    texts = expected_texts(engine, prompts, max_tokens)
    with serving(shown_config(engine, num_replicas=1), tmp_path) as served:

        def answers() -> list[str]:
            try:
                return [completion(served.url, MODEL, prompt, max_tokens) for prompt in prompts]
            except OSError:  # until Ray has noticed, or while the next replica loads
                return []

        assert answers() == texts
        (first,) = served.replicas()
        (rank,) = served.processes(RANK)
        os.kill(rank, signal.SIGKILL)
        wait_until(lambda: first not in served.replicas(), 60)
        wait_until(lambda: answers() == texts, 120)
        assert len(served.replicas()) == len(served.processes(RANK)) == 1
