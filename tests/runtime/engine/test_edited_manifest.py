"""A manifest that was edited and sealed anew loads and works, or is refused in one line: for every value it has."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from seekforge.common.errors import EngineError, SeekforgeError
from seekforge.common.files import write_json
from seekforge.formats.engine.manifest import manifest_digest
from seekforge.runtime import LLM, SamplingParams

PROMPT = [20, 21, 22, 23, 24]
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
WORDS = {
    "dtype": ["f32", "bf16", "i32", "i64", "f64", ""],
    "role": ["token", "bookkeeping", "table", "weight", "cache", "result", "tap", "debug", "intermediate"],
    "kv_format": ["f32", "bf16", "fp8_ds"],
    "backend": ["onnxruntime", "tensorrt", "tensorrt-rtx"],
    "name": ["other", "logits", "latent_cache.0"],
}
#: What the graph cannot know and the runtime reads: any value of these is as good as another, within reason.
FREE = ("limits", "generation", "self_check", "build", "versions", "numerics", "files", "target", "config")

Path_ = tuple[str | int, ...]


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Yield the path of every number, text and flag, of lists the first and last entry."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, (*path, key))
    elif isinstance(value, list) and value:
        for index in sorted({0, len(value) - 1}):
            yield from leaves(value[index], (*path, index))
    else:
        yield path, value


def edits(path: Path_, value: Any) -> list[Any]:
    """Return other values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [-1, value + 1, 2 * value + 64, 2**62]
    if isinstance(value, float):
        return [-1.0, 0.0, 2.5, 1e30]
    if isinstance(value, str):
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        words = WORDS.get(key, ["B", "Q"] if key == "shape" else [])
        return [word for word in words if word != value]
    return [0] if value is None else []


def edited(raw: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    place: Any = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return raw | {"digest": manifest_digest(raw)}


@pytest.fixture(scope="module")
def folder(tiny_engines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    copied = tmp_path_factory.mktemp("edited") / "engine"
    shutil.copytree(tiny_engines["exact"], copied, copy_function=os.link)
    (copied / "manifest.json").unlink()
    return copied


@pytest.fixture(scope="module")
def sealed(tiny_engines: dict[str, Path]) -> dict[str, Any]:
    return json.loads((tiny_engines["exact"] / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def _one_session_per_graph() -> Iterator[None]:
    """Open each graph once: its file stays as it is, and opening it costs most of a load."""
    open_session = onnxruntime.InferenceSession
    sessions: dict[str, onnxruntime.InferenceSession] = {}

    def opened(path: str, options: onnxruntime.SessionOptions, providers: list[str]) -> onnxruntime.InferenceSession:
        if path not in sessions:
            sessions[path] = open_session(path, options, providers=providers)
        return sessions[path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", opened)
        yield


@pytest.fixture(scope="module")
def expected(folder: Path, sealed: dict[str, Any]) -> list[int]:
    """What the engine says as it was built."""
    write_json(folder / "manifest.json", sealed)
    return tokens(folder)


def tokens(folder: Path) -> list[int]:
    with LLM(folder, num_blocks=8, threads=1, num_speculative_tokens=1) as llm:
        return list(llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids)


#: Top-level keys with values to edit; each is a test of its own, so that a failure names it.
KEYS = (
    "format", "target", "versions", "runtime_versions", "numerics", "layer_range", "graphs", "cache", "limits",
    "vocab_size", "num_top_logits", "bos_token_id", "eos_token_id", "generation", "files", "self_check", "config",
    "build", "weights", "audit", "quantization", "min_driver", "capturable",
)  # fmt: skip


def test_every_key_of_a_manifest_is_edited_below(sealed: dict[str, Any]) -> None:
    texts = {"seekforge_version", "program_sha256", "tokenizer", "digest"}
    empty = {key for key, value in sealed.items() if value in ({}, [])}
    assert sealed.keys() - texts - empty <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_an_edited_value_is_refused_or_changes_nothing(
    key: str, folder: Path, sealed: dict[str, Any], expected: list[int]
) -> None:
    tried: dict[tuple[Any, ...], Any] = {}
    for path, value in leaves(sealed.get(key), (key,)):
        if path[:2] == ("config", "quantization_config") or (key == "config" and not isinstance(value, int)):
            continue
        for other in edits(path, value):
            if other != value:
                tried[(*path, repr(other))] = (path, other)
    loaded = 0
    for count, (path, other) in enumerate(tried.values()):
        write_json(folder / "manifest.json", edited(sealed, path, other))
        if key in FREE and (loaded > 5 or count > 24):
            break  # all of one kind
        try:
            found = tokens(folder)
            loaded += 1
        except SeekforgeError as error:
            assert "\n" not in str(error) and len(str(error)) < 4100, (path, other)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
            raise AssertionError(f"{path} = {other!r} ends in {type(error).__name__}: {error}") from error
        else:
            assert found == expected, (path, other)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("cache", "block_size"), 32, "cache.block_size is 32, the graphs are made for 64"),
        (("cache", "kv_format"), "bf16", "cache.kv_format is bf16, 'latent_cache.0' of graph model holds f32"),
        (("cache", "latent_dim"), 200, "'latent_cache.0' of graph model has rows [192], cache says 200"),
        (("cache", "layers"), [0, 1], "cache.layers is [0, 1], graph model has latent_cache of [0, 1, 2, 3]"),
        (("cache", "bytes_per_block"), 1, "cache.bytes_per_block is 1, the caches of the graphs take"),
        (("layer_range",), [0, 3], "cache.layers is [0, 1, 2, 3], layer_range is 0 to 3"),
        (("limits", "max_model_len"), 10**6, "limits.max_model_len is 1000000"),
        (("limits", "max_batch_size"), 0, "limits.max_batch_size is 0, expected 1 to 2147483647"),
        (
            ("limits", "max_num_batched_tokens"),
            1,
            "limits.max_num_batched_tokens is 1, expected at least limits.max_batch_size",
        ),
        (("vocab_size",), 1000, "vocab_size is 1000, config.vocab_size 1024"),
        (("num_top_logits",), 128, "top_logits of graph model has rows [256], expected [128]"),
        (("graphs", "model", "inputs", 0, "role"), "cache", "'input_ids' has the role 'cache', expected 'token'"),
        (("graphs", "model", "inputs", 0, "shape"), ["B", 7], "input input_ids has the shape ['B', 'Q'] in the graph"),
        (("graphs", "model", "aliases", "latent_cache_out.0"), "latent_cache.1", "expected the cache of the same name"),
        (("self_check", "prompt_ids", 0), 5000, "self_check.prompt_ids"),
        (("generation", "top_p"), 7.0, "top_p"),
        (("numerics", "act_quant"), "int4", "numerics"),
    ],
)
def test_the_value_and_what_it_is_held_against_are_named(
    path: Path_, value: Any, words: str, folder: Path, sealed: dict[str, Any]
) -> None:
    write_json(folder / "manifest.json", edited(sealed, path, value))
    with pytest.raises(EngineError) as caught:
        tokens(folder)
    assert words in str(caught.value)
