"""manifest.json of an engine folder: what it is, what it needs, and how it proves itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from seekforge.plugins.errors import EngineError
from seekforge.plugins.formats.files import sampled_digest, sha256_file, write_json
from seekforge.plugins.formats.program import GraphIO, Strict

#: Raised when an older runtime would misread an engine.
ENGINE_FORMAT = 1
MANIFEST = "manifest.json"


class Target(Strict):
    """What the engine was built for. `sm` is the CUDA compute capability (90 for H100), None on a CPU."""

    name: str
    backend: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    sm: int | None = None


class Cache(Strict):
    """The paged caches. Each layer in `layers` has `latent_cache.{i}` and `index_cache.{i}`.

    Attributes:
        layers: absolute layer numbers of the main graph's caches.
        mtp_layer: the layer whose caches belong to the MTP graph, or None.
        kv_format: f32, bf16 or fp8_ds (spec §7).
        bytes_per_block: over all layers, MTP included.
    """

    block_size: int
    layers: tuple[int, ...]
    mtp_layer: int | None
    kv_format: Literal["f32", "bf16", "fp8_ds"]
    latent_dim: int
    index_dim: int
    bytes_per_block: int


class Limits(Strict):
    """What one engine accepts. `max_model_len` counts prompt and generated tokens of one sequence."""

    max_model_len: int
    max_batch_size: int
    max_num_batched_tokens: int


class FileDigest(Strict):
    """One file. `sha256` covers it whole, `sampled` its size and 64 blocks (`files.sampled_digest`)."""

    path: str
    bytes: int
    sha256: str
    sampled: str


class SelfCheckRow(Strict):
    """What the engine must give after `position` of the prompt."""

    position: int
    top_ids: tuple[int, ...]
    top_logits: tuple[float, ...]
    logsumexp: float


class SelfCheck(Strict):
    """Stored results that a loaded engine must reproduce before it serves.

    Attributes:
        prompt_ids: the prompt, prefilled whole.
        rows: expected values at some positions.
        tolerance: largest allowed |difference| of a top logit or logsumexp, in logits.
        reason: why this tolerance.
        source: what computed the values.
    """

    prompt_ids: tuple[int, ...]
    rows: tuple[SelfCheckRow, ...]
    tolerance: float
    reason: str
    source: str


class Manifest(Strict):
    """manifest.json.

    Attributes:
        versions: library versions at build; `runtime_versions` of them must match at load.
        runtime_versions: package -> version that the compiled engine needs exactly (a TensorRT plan is
            tied to its version); empty where the format is portable.
        program_sha256: digest of the program.json it was built from.
        graphs: "model" and perhaps "mtp"; `file` is relative to the engine folder.
        vocab_size, num_top_logits, eos_token_id, bos_token_id: what decoding needs of the model.
        generation: defaults of the checkpoint's generation_config.json (temperature, top_p).
        tokenizer: path of tokenizer.json in the engine folder.
        config: the checkpoint's config.json.
        build: Python, platform and options, for people.
    """

    format: int
    seekforge_version: str
    target: Target
    versions: dict[str, str]
    runtime_versions: dict[str, str]
    program_sha256: str
    numerics: dict[str, Any]
    layer_range: tuple[int, int]
    graphs: dict[str, GraphIO]
    cache: Cache
    limits: Limits
    vocab_size: int
    num_top_logits: int
    bos_token_id: int
    eos_token_id: int
    generation: dict[str, float]
    tokenizer: str
    files: tuple[FileDigest, ...]
    self_check: SelfCheck | None
    config: dict[str, Any]
    build: dict[str, Any]


def digest_file(folder: Path, relative: str) -> FileDigest:
    """Describe one file of an engine folder."""
    path = folder / relative
    return FileDigest(path=relative, bytes=path.stat().st_size, sha256=sha256_file(path), sampled=sampled_digest(path))


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def load_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json, not yet the files it names.

    Raises:
        EngineError: not an engine folder, another format version, or malformed.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineError(
            f"{path}: cannot be read ({error.strerror}); expected a folder written by 'seekforge build'"
        ) from None
    except ValueError as error:
        raise EngineError(f"{path}: not valid JSON ({error}); build the engine again") from None
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != ENGINE_FORMAT:
        raise EngineError(
            f"{path}: engine format {found!r}, this seekforge runs format {ENGINE_FORMAT}; "
            "build the engine again with 'seekforge build'"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise EngineError(f"{path}: key {key!r}: {fault['msg']}; build the engine again") from None


def verify_files(folder: Path, manifest: Manifest, *, full: bool) -> None:
    """Compare every file with its digest: whole files when `full`, else size and sampled blocks.

    Raises:
        EngineError: a file is missing, of another size, or its bytes differ.
    """
    for expected in manifest.files:
        path = folder / expected.path
        try:
            size = path.stat().st_size
        except OSError:
            raise EngineError(f"{path}: missing; build the engine again or copy the whole folder") from None
        if size != expected.bytes:
            raise EngineError(f"{path}: {size} bytes, the manifest says {expected.bytes}; copy it again or build again")
        found, wanted = (sha256_file(path), expected.sha256) if full else (sampled_digest(path), expected.sampled)
        if found != wanted:
            raise EngineError(
                f"{path}: digest {found[:12]}, the manifest says {wanted[:12]}; the file was changed or damaged, "
                "copy it again or build again"
            )
