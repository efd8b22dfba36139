"""Two workers behind NVIDIA Dynamo's own frontend: its router finds prefixes, and one worker is killed under load.

Dynamo is no part of the environment that the other tests have: SEEKFORGE_DYNAMO_PYTHON names an interpreter that has it
beside what an engine needs, unless this one does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.replicas import (
    AnswerError,
    Load,
    asked,
    check_after_kill,
    completion,
    expected_texts,
    free_port,
    process,
    wait_until,
)
from tests.support.served import alive

from seekforge.formats.engine.manifest import load_manifest, save_manifest

PYTHON = os.environ.get("SEEKFORGE_DYNAMO_PYTHON") or (sys.executable if importlib.util.find_spec("dynamo") else "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="ai-dynamo is not installed; SEEKFORGE_DYNAMO_PYTHON names a Python with it"),
]
#: Longer than two blocks, so that the router sees them as work.
PROMPTS = [[5 + (7 * i + j * j) % 250 for j in range(150)] for i in range(8)]
MODEL = "toy"
#: Seconds for which Dynamo's file discovery believes in a worker that was killed, and those that it takes to notice.
_LEASE_S = 15


@dataclass
class Cluster:
    """A frontend and its workers.

    Attributes:
        url: where the frontend is.
        folder: where logs are.
        engine: what each worker has.
    """

    url: str
    folder: Path
    engine: Path
    environment: dict[str, str]
    stack: ExitStack
    workers: list[Worker] = field(default_factory=list)

    def start_worker(self) -> Worker:
        port = free_port()
        command = [PYTHON, "-m", "seekforge.runtime.dynamo", str(self.engine), "--served-model-name", MODEL]
        command += ["--discovery-backend", "file", "--threads", "1", "--kv-cache-memory", "4M"]
        log = self.folder / f"worker{len(self.workers)}.log"
        started = self.stack.enter_context(process(command, self.environment | {"DYN_SYSTEM_PORT": str(port)}, log))
        self.workers.append(Worker(started, f"http://127.0.0.1:{port}", log))
        return self.workers[-1]

    def ready(self, count: int) -> None:
        """Wait until the frontend knows so many workers."""

        def known() -> bool:
            assert all(worker.process.poll() is None for worker in self.workers), self.logs()
            try:
                return completion(self.url, MODEL, PROMPTS[0], 4) != "" and len(self.instances()) == count
            except OSError:
                return False

        wait_until(known, 120, lambda: self.logs())
        assert "Rejected incompatible workers" not in self.logs(), "the frontend takes them for different models"

    def instances(self) -> list[Any]:
        listed = fetched(f"{self.url}/health").get("instances", [])
        return [one for one in listed if one.get("endpoint") == "generate"]

    def logs(self) -> str:
        return "".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))


@dataclass
class Worker:
    process: Any
    url: str
    log: Path

    def counter(self, name: str) -> float:
        """Return what `/metrics` says; 0 of a worker that is not there yet."""
        try:
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return 0.0
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{")), 0.0)

    def engine_process(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])


def fetched(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


@pytest.fixture
def retries() -> str:
    """How often the frontend gives a request to another worker."""
    return "0"


@pytest.fixture
def cluster(toy_copy: Path, tmp_path: Path, retries: str) -> Iterator[Cluster]:
    """A frontend without workers."""
    manifest = load_manifest(toy_copy)
    config = {
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
        "vocab_size": manifest.vocab_size,
    }
    more = {"max_position_embeddings": 1024, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    save_manifest(toy_copy, replace(manifest, config={**config, **more, "bos_token_id": 0}))
    root = Path(__file__).parents[3]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(root / one) for one in ("exporter", "plugins", "runtime")),
        "DYN_FILE_KV": str(tmp_path / "discovery"),
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    port = free_port()
    command = [PYTHON, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    command += ["--discovery-backend", "file", "--router-mode", "kv", "--kv-cache-block-size", "64"]
    command += ["--migration-limit", retries]
    with ExitStack() as stack:
        stack.enter_context(process(command, environment, tmp_path / "frontend.log"))
        yield Cluster(f"http://127.0.0.1:{port}", tmp_path, toy_copy, environment, stack)


@pytest.mark.parametrize("retries", ["0", "3"])
def test_two_workers_share_prefixes_and_one_killed_under_load_loses_what_was_on_it(
    cluster: Cluster, retries: str
) -> None:
    texts = expected_texts(cluster.engine, PROMPTS)
    first, second = cluster.start_worker(), cluster.start_worker()
    cluster.ready(2)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert completion(cluster.url, MODEL, prompt) == text

    (choice,) = asked(cluster.url, MODEL, PROMPTS[0], 4, logprobs=2)["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == 4 and texts[0].startswith(choice["text"].rstrip("\ufffd"))
    with pytest.raises(AnswerError, match=r"400 .*n is 2"):
        asked(cluster.url, MODEL, PROMPTS[0], 4, n=2, temperature=0.5)

    # the same beginning again and again: whoever computed it gets it
    beginning = [10 + i % 200 for i in range(64 * 5)]
    cached = []
    for number in range(8):
        usage = asked(cluster.url, MODEL, [*beginning, 3 + number], 4)["usage"]
        cached.append((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
        time.sleep(0.3)  # events go their own way
    assert cached == [0] + [320] * 7, cached

    with Load(cluster.url, MODEL, PROMPTS) as load:
        wait_until(lambda: all(worker.counter("generation_tokens_total") > 500 for worker in (first, second)))
        engine = first.engine_process()
        killed = time.monotonic()
        os.kill(first.process.pid, signal.SIGKILL)
        load.until(lambda answers: sum(answer.began > killed + _LEASE_S for answer in answers) > 20)
        wait_until(lambda: not alive(engine), 20)
        cluster.workers.remove(first)
        third = cluster.start_worker()
        wait_until(lambda: third.counter("generation_tokens_total") > 500, 120, cluster.logs)
    failed = check_after_kill(load.answers, texts, killed, within_s=_LEASE_S)
    assert all(answer.fault.startswith("5") for answer in failed), "the frontend says so, with a status"
    assert retries == "0" or failed == [], "another worker goes on with it"
    cluster.ready(2)


@pytest.mark.parametrize("retries", ["3"])
def test_a_worker_that_is_told_to_end_answers_what_is_on_its_way(cluster: Cluster, retries: str) -> None:
    texts = expected_texts(cluster.engine, PROMPTS)
    first, _ = cluster.start_worker(), cluster.start_worker()
    cluster.ready(2)
    assert fetched(f"{first.url}/health")["status"] == "ready"
    with Load(cluster.url, MODEL, PROMPTS) as load:
        load.until(lambda answers: len(answers) > 10)
        first.process.terminate()
        assert first.process.wait(60) == 0
        ended = time.monotonic()
        load.until(lambda answers: sum(answer.began > ended for answer in answers) > 10)
    assert check_after_kill(load.answers, texts, ended) == []


def test_a_worker_whose_engine_is_killed_ends_with_one_line(cluster: Cluster) -> None:
    first, _ = cluster.start_worker(), cluster.start_worker()
    cluster.ready(2)
    cluster.workers.remove(first)
    os.kill(first.engine_process(), signal.SIGKILL)
    assert first.process.wait(60) == 2
    said = [line for line in first.log.read_text().splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "by signal 9" in said[0]
    assert completion(cluster.url, MODEL, PROMPTS[0], 4)
