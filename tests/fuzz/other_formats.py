"""The formats that only the runtime reads, or that are no text; see `formats`, where the others are."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from tests.fuzz.formats import Format, _json, _whole_json
from tests.fuzz.mutate import mutate_bytes, mutated_text

from seekforge.common.errors import ConfigError
from seekforge.common.files import sha256_file
from seekforge.exporter.builder.request import read_engine_graph, read_graph
from seekforge.exporter.builder.tensorrt.compiler import Compiled
from seekforge.exporter.builder.tensorrt.resume import Parts
from seekforge.exporter.inspect.draw import draw, groups
from seekforge.exporter.parity import inputs
from seekforge.formats.checkpoint import hub
from seekforge.formats.checkpoint.tokenizer_file import read_tokenizer
from seekforge.formats.dump import Dump
from seekforge.formats.engine import verified
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.parity_steps import make_plan
from seekforge.formats.program import load_program
from seekforge.formats.quality import read_tasks
from seekforge.formats.weight_digests import load_weight_digests
from seekforge.runtime.cli.batch_file import answered, read_requests
from seekforge.runtime.cli.dump import _read as read_plan
from seekforge.runtime.llm import LLM
from seekforge.runtime.sampling.params import SamplingParams

#: Names of the formats.
NAMES = (
    "plan", "weight digests", "verified files", "batch", "batch results", "finished plan", "prompts", "hub index",
    "program graph", "engine graph", "dump tensors", "quality tasks",
)  # fmt: skip
_REQUESTS: Sequence[Mapping[str, Any]] = (
    {"id": "a", "prompt": "the cat", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": ["x"]},
    {"prompt": [5, 6, 7], "logprobs": 2, "logit_bias": {"5": 1.5}, "bad_words": ["mat"], "n": 2, "seed": 1},
    {"id": 3, "prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}, "stop_token_ids": [9]},
    {
        "custom_id": "c",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": "the", "max_tokens": 3, "temperature": 0, "stop": "q", "user": "u"},
    },
    {"id": "d", "messages": [{"role": "user", "content": "hello"}], "chat_template_kwargs": {"thinking": True}},
)
_TASKS: Sequence[Mapping[str, Any]] = (
    {"task": "sums", "prompt": "1 + 1<think>", "answer": "2", "match": "final", "max_tokens": 8},
    {"task": "tales", "text": "Once upon a time"},
    {"task": "sums", "prompt": "2 + 2", "answer": "4", "match": "exact", "max_tokens": 4},
)
_RESULTS: Sequence[Mapping[str, Any]] = (
    {"id": "a", "request": "0" * 32, "completions": [{"text": "x", "token_ids": [1]}], "usage": {"prompt_tokens": 1}},
    {"id": "batch_req_" + "0" * 32, "custom_id": "c", "response": {"status_code": 200, "body": {}}, "error": None},
    {"id": 2, "request": "0" * 32, "error": "no"},
)


class OpenLLM:
    """An engine that requests are checked against, as `run --batch` does before weights are loaded."""

    def __init__(self, engine: Path) -> None:
        self._engine = engine
        self._found: list[LLM] = []

    def __call__(self) -> Any:
        """Return what checks."""
        if not self._found:
            self._found.append(LLM(self._engine, num_blocks=9, self_check=False))
        return self._found[0]


def _lines(values: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def _jsonl(values: Sequence[Mapping[str, Any]]) -> Callable[[random.Random], bytes]:
    texts = [json.dumps(value) for value in values]

    def mutate(rng: random.Random) -> bytes:
        lines = [text.encode() for text in texts]
        at = rng.randrange(len(lines))
        lines[at] = mutated_text(texts[at], rng)
        rng.shuffle(lines)
        whole = b"\n".join(lines) + b"\n" * rng.randrange(2)
        return mutate_bytes(whole, rng) if rng.random() < 0.1 else whole

    return mutate


def _bytes(raw: bytes) -> Callable[[random.Random], bytes]:
    return lambda rng: mutate_bytes(raw, rng)


def _read_verified(folder: Path) -> None:
    before = os.environ.get(verified.VARIABLE, "")
    os.environ[verified.VARIABLE] = str(folder / "verified.json")
    try:
        verified.recall()
    finally:
        os.environ[verified.VARIABLE] = before


def _read_results(folder: Path) -> None:
    asked = [SimpleNamespace(key=key, digest="0" * 32) for key in ("a", "c", 2)]
    answered(folder / "out.jsonl", asked)  # pyright: ignore[reportArgumentType]


def _read_finished(folder: Path) -> None:
    found = Parts(folder).take("k", folder / "taken.plan", folder / "taken.log")
    if found is not None:
        json.dumps(asdict(found))
        assert found.plan_bytes == (folder / "taken.plan").stat().st_size
        sum(found.layers.values()), sum(found.activation_bytes), found.seconds + found.cpu_seconds


class _Hub:
    """A hub that answers with a file that is there already."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def content(self, name: str) -> bytes:
        return self.place.read_bytes()


def _read_hub_index(folder: Path) -> None:
    hub._is_whole(folder)
    hub._declared_bytes(_Hub(folder / hub_index()))  # pyright: ignore[reportArgumentType]


def hub_index() -> str:
    """Return the name of an index of shards."""
    return "model.safetensors.index.json"


def _graph_reader(program: Path, engine: Path) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    graph_io = load_program(program).graphs["mtp"]
    own = load_manifest(engine).graphs["mtp"]
    weights = {spec.name for spec in graph_io.inputs if spec.role in ("weight", "table")}

    def of_program(folder: Path) -> None:
        """Read it as its maker could have made it: its digest is right."""
        digest = sha256_file(folder / "model.onnx")
        model = read_graph(folder, graph_io.model_copy(update={"file": "model.onnx", "sha256": digest}))
        found = groups(model, weights)
        draw(found, "dot"), draw(found, "mermaid")

    def of_engine(folder: Path) -> None:
        read_engine_graph(folder, own.model_copy(update={"file": "model.onnx"}))

    return of_program, of_engine


def other_formats(program: Path, engine: Path, tokenizer: Path, dump: Path) -> dict[str, Format]:
    """Return every format of this file by name.

    Args:
        program, engine: folders of the tiny model.
        tokenizer: a file that prompts are encoded with.
        dump: folder of a dump with steps of `hidden` and `expert_ids.0`.
    """
    checks = OpenLLM(engine)
    plan = make_plan(contexts=(5,), vocab_size=1024, index_topk=64, has_mtp=True, modes=("decode", "ragged"))
    digests = {"format": 1, "tensors": {"a": "0" * 16 + " " + "1" * 16, "b": "2" * 16}}
    memory = {"format": 1, "files": {"host:1:2:3:4:5": "0" * 32, "host:1:3:3:4:5": "1" * 32}}
    index = {"metadata": {"total_size": 40}, "weight_map": dict.fromkeys("abc", "model.safetensors")}
    compiled = Compiled(
        {"CONV": 3}, {"fp8": 2}, {"A": 1}, 7, 0.1, 2.5, 2.0, 1 << 20, "1.7", True, {"t": "f32"}, {}, [8]
    )
    finished = json.loads(json.dumps(asdict(compiled))) | {"sha256": hashlib.sha256(b"compile").hexdigest()}
    of_program, of_engine = _graph_reader(program, engine)
    graph = {
        "program": (program / load_program(program).graphs["mtp"].file).read_bytes(),
        "engine": (engine / load_manifest(engine).graphs["mtp"].file).read_bytes(),
    }
    tensors = {path.name: path.read_bytes() for path in dump.glob("*.safetensors")} | {
        "dump.json": (dump / "dump.json").read_bytes()
    }
    first = sorted(name for name in tensors if name.endswith(".safetensors"))[0]

    opened: dict[Path, Dump] = {}

    def read_dump(folder: Path) -> None:
        if folder not in opened:  # its index is not what is spoilt
            opened[folder] = Dump.open(folder)
        found = opened[folder]
        found._header.cache_clear()  # of the case before
        for name in found.names(0):
            np.asarray(found.tensor(0, name)).sum()

    def batch(folder: Path) -> None:
        read_requests(folder / "in.jsonl", SamplingParams(), checks(), "0" * 32)

    encoder = read_tokenizer(tokenizer, error=ConfigError, again="")

    def prompts(folder: Path) -> None:
        with mock.patch.object(inputs, "read_tokenizer", lambda *_, **__: encoder):
            inputs._encoded_prompts(folder / "prompts.txt", tokenizer, 1000)

    text = b"the cat sat on the mat\n\nna\xc3\xafve caf\xc3\xa9 \xf0\x9f\x8e\x89\n"
    json_formats: dict[str, tuple[str, Any, Callable[[Path], object], dict[str, bytes]]] = {
        "plan": ("plan.json", plan.model_dump(mode="json"), lambda folder: read_plan(folder / "plan.json"), {}),
        "weight digests": ("weight_digests.json", digests, load_weight_digests, {}),
        "verified files": ("verified.json", memory, _read_verified, {}),
        "finished plan": ("k.json", finished, _read_finished, {"k.plan": b"compile", "k.log": b""}),
        "hub index": (hub_index(), index, _read_hub_index, {"config.json": b""}),
    }
    made = {
        name: Format(file, _whole_json(value), _json(value), read, beside)
        for name, (file, value, read, beside) in json_formats.items()
    }
    return made | {
        "batch": Format("in.jsonl", lambda: _lines(_REQUESTS), _jsonl(_REQUESTS), batch),
        "batch results": Format("out.jsonl", lambda: _lines(_RESULTS), _jsonl(_RESULTS), _read_results),
        "quality tasks": Format(
            "tasks.jsonl",
            lambda: _lines(_TASKS),
            _jsonl(_TASKS),
            lambda folder: read_tasks(folder / "tasks.jsonl"),
        ),
        "prompts": Format("prompts.txt", lambda: text, _bytes(text), prompts),
        "program graph": Format("model.onnx", lambda: graph["program"], _bytes(graph["program"]), of_program),
        "engine graph": Format("model.onnx", lambda: graph["engine"], _bytes(graph["engine"]), of_engine),
        "dump tensors": Format(first, lambda: tensors[first], _bytes(tensors[first]), read_dump, tensors),
    }
