"""The engine in a process of its own: what a stream gives, and what is left when one of the two is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support.rank_engines import rank_engine
from tests.support.ray_served import below
from tests.support.served import alive, engine_of, post, served

from seekforge.common.errors import EngineError, RequestError
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_writer import write_shard
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.engine.scheduler import QueueFullError
from seekforge.runtime.server.channel import Piece
from seekforge.runtime.server.engine_client import EngineDeadError, EngineProcess, Stream
from seekforge.runtime.server.engine_process import CALLS

OPTIONS = {"threads": 1, "num_blocks": 60, "self_check": False}


def run(engine: Path, work: Callable[[EngineProcess], Awaitable[Any]], **options: Any) -> Any:
    """Do `work` with the engine open in a process."""

    async def main() -> Any:
        client = await EngineProcess.open(engine, {**OPTIONS, **options}, lambda said: None)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(main())


async def whole(stream: Stream) -> list[Piece]:
    """Read a stream to its end."""
    pieces: list[Piece] = []
    try:
        while not pieces or pieces[-1].end is None:
            pieces += await stream.read()
    finally:
        stream.close()
    return pieces


def test_streams_give_what_the_engine_gives(toy_engine: Path) -> None:
    params = [SamplingParams(max_tokens=20, seed=i, logprobs=2, ignore_eos=True) for i in range(6)]
    prompts = [[5, 6, 7 + i] for i in range(6)]
    with LLM(toy_engine, **OPTIONS) as llm:
        expected = llm.generate(prompts, params)

    async def work(client: EngineProcess) -> list[list[Piece]]:
        streams = [client.start(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        return await asyncio.gather(*map(whole, streams))

    for pieces, output in zip(run(toy_engine, work), expected, strict=True):
        (completion,) = output.outputs
        assert tuple(token for piece in pieces for token in piece.token_ids) == completion.token_ids
        assert "".join(piece.text for piece in pieces) == completion.text
        rows = [row for piece in pieces for row in piece.logprobs]
        assert rows == [(e.token_id, e.logprob, e.rank, e.top) for e in completion.logprobs or ()]
        end = pieces[-1].end
        assert end is not None and (end.num_prompt_tokens, end.num_completion_tokens) == (3, 20)


def test_text_is_a_prompt_too_and_best_of_gives_the_best(toy_engine: Path) -> None:
    params = SamplingParams(max_tokens=6, seed=3, n=2, best_of=4)
    with LLM(toy_engine, **OPTIONS) as llm:
        (expected,) = llm.generate("the cat", params)

    async def work(client: EngineProcess) -> list[Piece]:
        return await whole(client.start("the cat", params))

    end = run(toy_engine, work)[-1].end
    assert [one.text for one in end.best] == [one.text for one in expected.outputs]


def test_what_cannot_be_served_is_told_before_it_runs(toy_engine: Path) -> None:
    async def work(client: EngineProcess) -> None:
        with pytest.raises(RequestError, match="no tokens"):
            await client.start([], SamplingParams()).accepted()
        with pytest.raises(RequestError, match="max_model_len"):
            await client.start([1], SamplingParams(max_tokens=10**6)).accepted()
        await client.call("pause")
        streams = [client.start([1, 2], SamplingParams(max_tokens=4)) for _ in range(3)]
        refused = [await told(stream) for stream in streams]
        assert [type(error) for error in refused] == [type(None), type(None), QueueFullError]
        await client.call("resume")
        for stream in streams[:2]:
            assert (await whole(stream))[-1].end

    async def told(stream: Stream) -> Exception | None:
        try:
            await stream.accepted()
        except RequestError as error:
            return error
        return None

    run(toy_engine, work, max_waiting=2)


def test_a_stream_that_is_closed_gives_its_blocks_back(toy_engine: Path) -> None:
    async def work(client: EngineProcess) -> None:
        free = (await client.call("metrics"))["num_free_blocks"]
        streams = [client.start([1, 2, i], SamplingParams(max_tokens=200, ignore_eos=True)) for i in range(8)]
        for stream in streams:
            await stream.read()
            stream.close()
        deadline = time.monotonic() + 20
        while (now := await client.call("metrics"))["num_free_blocks"] != free or now["num_running"]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert client.num_streams == 0

    run(toy_engine, work)


def test_weights_are_swapped_from_a_folder(
    tiny_engines: dict[str, Path], tiny_source: Checkpoint, tmp_path: Path
) -> None:
    norm = "model.norm.weight"
    write_shard(tmp_path / "model.safetensors", {norm: -np.asarray(tiny_source.tensor(norm))})
    params = SamplingParams(temperature=0, ignore_eos=True)

    async def work(client: EngineProcess) -> None:
        async def tokens() -> list[int]:
            return [token for piece in await whole(client.start([5, 6, 7], params)) for token in piece.token_ids]

        for path, why in ((tmp_path / "none", "does not exist"), (tmp_path.parent, "holds neither")):
            with pytest.raises(RequestError, match=why):
                await client.call("update_weights", path=str(path))
        before = await tokens()
        assert await client.call("update_weights", path=str(tmp_path)) == 1
        assert await tokens() != before
        (tmp_path / "model.safetensors").unlink()
        write_shard(tmp_path / "model.safetensors", {"no.such.weight": np.zeros(3, np.float32)})
        with pytest.raises(RequestError, match=r"no\.such\.weight"):
            await client.call("update_weights", path=str(tmp_path))

    run(tiny_engines["exact"], work)


@pytest.mark.parametrize("path", ["", "\0", "a\0b", "x" * 5000, "/dev/zero", "/dev/null", "\ud800", "/proc/self/mem"])
def test_weights_of_an_odd_place_are_refused(path: str) -> None:
    with pytest.raises(RequestError) as told:
        CALLS["update_weights"](SimpleNamespace(update_weights=lambda tensors: pytest.fail("swapped")), path=path)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def test_an_engine_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"manifest\.json"):
        run(tmp_path, lambda client: asyncio.sleep(0))


def test_requests_learn_that_the_engine_was_killed(toy_engine: Path) -> None:
    async def work(client: EngineProcess) -> str:
        gone = asyncio.Event()
        client.on_dead = gone.set
        stream = client.start([1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True))
        await stream.read()
        os.kill(client.process_id, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="by signal 9"):
            await whole(stream)
        await gone.wait()
        with pytest.raises(EngineDeadError):
            await client.start([1], SamplingParams()).accepted()
        with pytest.raises(EngineDeadError):
            await client.call("metrics")
        return client.dead

    assert "signal 9" in run(toy_engine, work)


def test_a_server_answers_and_ends_on_sigterm_when_its_requests_have(toy_engine: Path) -> None:
    with served(toy_engine) as (process, url, _):
        engine = engine_of(process)
        with post(
            f"{url}/v1/completions", {"prompt": "a", "max_tokens": 150, "stream": True, "ignore_eos": True}
        ) as answer:
            answer.read(10)
            process.send_signal(signal.SIGTERM)
            text = answer.read().decode()
        assert text.rstrip().endswith("data: [DONE]")
        assert process.wait(30) == 0
        assert not alive(engine)


#: `engine_process` of an engine that loses a rank as soon as the file is there that the environment names.
_LOSING = """
import os, pathlib
from seekforge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from seekforge.runtime.server.engine_process import main
lost = pathlib.Path(os.environ["LOST"])
OnnxRuntimeBackend.fault = property(lambda self: "rank 1 stands still" if lost.exists() else None)
main()
"""


def test_an_engine_that_lost_a_rank_ends_and_says_which(toy_engine: Path, tmp_path: Path) -> None:
    """Also when nothing is asked of it, and though its own process could go on refusing."""

    async def main() -> str:
        client = await EngineProcess.open(
            toy_engine,
            OPTIONS,
            lambda said: None,
            command=(sys.executable, "-c", _LOSING),
            environment={"LOST": str(tmp_path / "lost")},
        )
        try:
            dead = asyncio.Event()
            client.on_dead = dead.set
            assert len(await whole(client.start([5, 6], SamplingParams(max_tokens=2, temperature=0)))) > 0
            (tmp_path / "lost").touch()
            await asyncio.wait_for(dead.wait(), 20)
            with pytest.raises(EngineDeadError, match=r"^rank 1 stands still$"):
                await client.call("metrics")
            return client.dead
        finally:
            await client.close()

    assert asyncio.run(main()) == "rank 1 stands still"


@pytest.mark.slow  # makes an engine of two ranks
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_loses_a_rank_names_it_and_ends(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, number: signal.Signals
) -> None:
    engine = rank_engine(tiny_checkpoint, Parallelism(tp=2), tmp_path_factory)
    with served(engine, "0", "--kv-cache-memory", "4M") as (process, _, lines):
        (rank,) = below(engine_of(process))
        os.kill(rank, number)
        assert process.wait(30) == 2
        deadline = time.monotonic() + 10
        while alive(rank) or not any(line.startswith("error:") for line in lines):
            assert time.monotonic() < deadline, lines
            time.sleep(0.05)
    said = [line for line in lines if line.startswith("error:")]
    assert len(said) == 1 and f"rank 1 (process {rank})" in said[0] and "Traceback" not in "".join(lines)


def test_a_killed_server_leaves_no_engine_and_the_next_one_serves(toy_engine: Path) -> None:
    body = {"prompt": "a", "max_tokens": 8, "seed": 1}
    with served(toy_engine) as (process, url, _):
        port, engine = url.rpartition(":")[2], engine_of(process)
        with post(f"{url}/v1/completions", body) as answer:
            before = json.load(answer)["choices"]
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while alive(engine):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(urllib.error.URLError):
            post(f"{url}/v1/completions", body)
    with served(toy_engine, port) as (process, url, _), post(f"{url}/v1/completions", body) as answer:
        assert json.load(answer)["choices"] == before


def test_a_server_whose_engine_is_killed_says_so_and_ends(toy_engine: Path) -> None:
    with served(toy_engine) as (process, _, lines):
        os.kill(engine_of(process), signal.SIGKILL)
        assert process.wait(30) == 2
    said = [line for line in lines if line.startswith("error:")]
    assert len(said) == 1 and "by signal 9" in said[0] and "Traceback" not in "".join(lines)


def test_the_address_is_json_for_scripts(toy_engine: Path) -> None:
    command = [sys.executable, "-m", "seekforge", "serve", str(toy_engine), "--port", "0", "--json", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        made = json.loads(process.stdout.readline())
        with urllib.request.urlopen(f"{made['url']}/v1/models", timeout=60) as answer:
            assert [one["id"] for one in json.load(answer)["data"]] == made["models"] == ["engine"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_a_port_that_is_taken_is_told_before_the_engine_is_read(toy_engine: Path, tmp_path: Path) -> None:
    with served(toy_engine) as (_, url, _):
        port = url.rpartition(":")[2]
        command = [sys.executable, "-m", "seekforge", "serve", str(tmp_path / "none"), "--port", port]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert re.fullmatch(r"error: serve: .*is taken; choose another --port.*\n|error: .*is taken.*\n", result.stderr)


def test_a_form_begins_behind_the_thought(chat_engine: Path) -> None:
    with LLM(chat_engine, **OPTIONS) as llm:
        form = {"choice": ["yes", "no"]}
        params = SamplingParams(max_tokens=16, seed=1, structured_outputs=form, thinking_token_budget=4)
        request = llm.chat_request([{"role": "user", "content": "x"}], params, chat_template_kwargs={"thinking": True})
        tokenizer = llm.get_tokenizer()
        ids = tokenizer.encode_segments(request.prompt, llm.max_model_len)

    async def work(client: EngineProcess) -> list[Piece]:
        return await whole(client.start(ids, request.params, in_reasoning=True))

    text = "".join(piece.text for piece in run(chat_engine, work))
    _, end, answer = text.partition("</think>")
    assert end and answer.strip().removesuffix("<｜end▁of▁sentence｜>") in ("yes", "no"), text


def test_a_request_is_accepted_when_the_engine_says_so() -> None:
    """Its first piece may come before: a step may be quicker than what tells of it."""

    async def main() -> None:
        stream = Stream(1, None)  # pyright: ignore[reportArgumentType]
        stream.take(Piece(1, 0, "a", (5,)))
        waiting = asyncio.ensure_future(stream.accepted())
        await asyncio.sleep(0)
        stream.num_prompt_tokens = 7
        stream.wake()
        assert await waiting == 7

    asyncio.run(main())
