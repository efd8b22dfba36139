"""manifest.json of an engine folder: what it is, what it needs, and how it proves itself."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from seekforge.common.cli.terminal import typed, typed_command
from seekforge.common.errors import EngineError
from seekforge.common.files import json_text, sha256_file, write_json
from seekforge.common.paths import RelativePath
from seekforge.common.reading import LISTING_BYTES, parse_json, read_bytes
from seekforge.common.records import Record, RecordError
from seekforge.formats.end_of_sequence import end_ids
from seekforge.formats.engine.agreement import disagreement
from seekforge.formats.engine.digests import chunk_digests
from seekforge.formats.engine.ranks import Ranks
from seekforge.formats.int_quant import Quantization
from seekforge.formats.program import GraphIO
from seekforge.formats.quality import Quality

#: Raised when an older runtime would misread an engine. 2: files have a digest for each chunk.
ENGINE_FORMAT = 4
MANIFEST = "manifest.json"
#: The effective target, beside the engine.
TARGET = "target.yaml"


class Target(Record):
    """What the engine was built for. `sm` is the CUDA compute capability (90 for H100), None on a CPU.

    `sms`: all of them, where one plan serves several. `provider`: cuda where ONNX Runtime runs it on a GPU.
    """

    name: str
    backend: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    sm: int | None = None
    sms: tuple[int, ...] = ()
    provider: Literal["cuda"] | None = None


class Cache(Record):
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


class Limits(Record):
    """What one engine accepts. `max_model_len` counts prompt and generated tokens of one sequence."""

    max_model_len: int
    max_batch_size: int
    max_num_batched_tokens: int


class FileDigest(Record):
    """One file. `sha256` says which it is, `chunks` (`digests.chunk_digests`) are compared at each start."""

    path: RelativePath
    bytes: int
    sha256: str
    chunks: tuple[str, ...]


class SelfCheckRow(Record):
    """What the engine must give after `position` of the prompt."""

    position: int
    top_ids: tuple[int, ...]
    top_logits: tuple[float, ...]
    logsumexp: float


class SelfCheck(Record):
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


class WeightSource(Record):
    """Where a GPU engine's weights come from: `bindings.json` of the engine says how.

    Attributes:
        path: the checkpoint folder at build, a hint; None when none was given.
        index_digest: `Checkpoint.index_digest()`; weights of another structure are refused.
    """

    path: str | None
    index_digest: str | None


class PluginUse(Record):
    """How an operator runs inside the plan as a plugin.

    Attributes:
        version: the version of the operator's contract.
        products: precision of its matrix products, fp8 or bf16.
        kernel_digest: the digest of the kernels that it was built with; empty: there were none, and it cannot run.
        num_layers: over all graphs.
        kernel_source: what made the kernels, with versions: triton, or nvcc and a library; empty: nobody noted it.
    """

    version: int
    products: str
    kernel_digest: str
    num_layers: int
    kernel_source: str = ""


class Share(Record):
    """Matrix products of one kind.

    Attributes:
        what: operator, or what the weight is.
        form: plugin, inlined or native.
        precision: fp8, bf16 or f32: what is multiplied.
        share: the share of all matrix-product FLOPs of one token.
    """

    what: str
    form: Literal["plugin", "inlined", "native"]
    precision: str
    share: float


class Audit(Record):
    """What a build really made.

    Attributes:
        asked: the precision that was asked for.
        got: the precision in words: fp8, bf16, or that FP8 weights are multiplied in BF16.
        context: keys that a token sees in the shares below.
        products: shares of the matrix-product FLOPs of one decoded token, largest first.
        layers: plan -> kind of TensorRT layer -> count, before fusion. A plan is a graph, or `graph.A-B` after the
            first layers that it runs.
        native_products: plan -> type that is multiplied -> TensorRT's own matrix layers, before fusion.
        plugins: op_type -> plugin layers of a step; a plan that runs many layers counts as often.
        kernels: op_type -> compiled kernels in the engine, over all its SMs.
        workspaces: op_type -> most scratch that a plugin asked TensorRT for, over all plans and profiles.
        inlined: op_type -> nodes of a step whose body was inlined.
        weight_input_bytes: bytes of all weight and table inputs.
        plan_bytes: plan -> size.
        activation_bytes: plan -> profile -> memory that TensorRT says a step of it needs ("Total Activation Memory"):
            what lives between its operators and their scratch. Plans run one after another and share it. A plan whose
            compiler did not say is not listed.
        device_bytes: expected use of one GPU: weights, cache (one sequence of the longest context), scratch,
            activations, reserve, total and what is usable.
        oversize: more is expected than there is; such an engine does not load.
        build_seconds, build_cpu_seconds: plan -> of parsing and compiling.
        build_peak_bytes: plan -> largest resident memory of the compiling process.
    """

    asked: str
    got: str
    context: int
    products: tuple[Share, ...]
    layers: dict[str, dict[str, int]]
    native_products: dict[str, dict[str, int]] = field(default_factory=dict)
    plugins: dict[str, int]
    kernels: dict[str, int] = field(default_factory=dict)
    workspaces: dict[str, int] = field(default_factory=dict)
    inlined: dict[str, int]
    weight_input_bytes: int
    plan_bytes: dict[str, int]
    activation_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    device_bytes: dict[str, int]
    oversize: bool
    build_seconds: dict[str, float]
    build_cpu_seconds: dict[str, float]
    build_peak_bytes: dict[str, int]

    def share(self, precision: str) -> float:
        """Return the share of matrix-product FLOPs in one precision."""
        return sum(one.share for one in self.products if one.precision == precision)


class Manifest(Record):
    """manifest.json.

    Attributes:
        versions: library versions at build; `runtime_versions` of them must match at load.
        runtime_versions: package -> version that the compiled engine needs exactly (a TensorRT plan is
            tied to its version); empty where the format is portable.
        program_sha256: digest of the program.json it was built from.
        graphs: "model" and perhaps "mtp"; `file` is relative to the engine folder.
        stages: graph -> what a step runs one after the other, where it was cut; `file` of the whole graph is then the
            first. `intermediate_out.N` of one is `intermediate.N` of a later one. Layers that differ in names alone
            have one plan: stages of one `file` correspond tensor by tensor, and the plan has the names of the first.
        vocab_size, num_top_logits, bos_token_id: what decoding needs of the model.
        eos_token_id: the end of sequence, or several: each ends a request.
        generation: sampling defaults of the checkpoint's generation_config.json, by the names of `SamplingParams`.
        tokenizer: path of tokenizer.json in the engine folder.
        config: the checkpoint's config.json.
        build: Python, platform and options, for people.
        weights: the checkpoint that the weights come from, when the engine holds none.
        plugins: op_type -> plugin, on a GPU.
        profiles: name -> graph -> input -> smallest, typical and largest shape, in the order of the plan's profiles.
        min_driver: SM of the kernels -> the CUDA version that a driver must have to load them, 13000 for 13.0.
        capturable: plan -> whether TensorRT says that its runs can be captured in a CUDA graph; a plan that is not
            listed can be tried.
        audit: what a GPU build really made.
        quantization: which weights of a CPU engine are int8 or int4; None: all are f32.
        quality: what it was measured to do when it was built; None, and no key of the file: nothing was measured.
        ranks: how ranks share the engine, and `stages` has the pieces of all of them; None, and no key of the file:
            there is one.
        digest: the digest of everything above.
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
    stages: dict[str, tuple[GraphIO, ...]] = field(default_factory=dict)
    cache: Cache
    limits: Limits
    vocab_size: int
    num_top_logits: int
    bos_token_id: int
    eos_token_id: int | tuple[int, ...]
    generation: dict[str, float]
    tokenizer: RelativePath
    files: tuple[FileDigest, ...]
    self_check: SelfCheck | None
    config: dict[str, Any]
    build: dict[str, Any]
    weights: WeightSource | None = None
    plugins: dict[str, PluginUse] = field(default_factory=dict)
    profiles: dict[str, dict[str, dict[str, tuple[tuple[int, ...], ...]]]] = field(default_factory=dict)
    min_driver: dict[str, int] = field(default_factory=dict)
    capturable: dict[str, bool] = field(default_factory=dict)
    audit: Audit | None = None
    quantization: Quantization | None = None
    quality: Quality | None = None
    ranks: Ranks | None = None
    digest: str = ""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ends of sequence, the model's own first."""
        return end_ids(self.eos_token_id)

    def plans(self, graph: str) -> tuple[GraphIO, ...]:
        """Return what a step of `graph` runs, in order."""
        return self.stages.get(graph, (self.graphs[graph],))

    def uses(self) -> dict[str, int]:
        """Return plan file -> how often one step of its graph runs it, in order."""
        return dict(Counter(one.file for graph in self.graphs for one in self.plans(graph)))

    def max_cache_blocks(self) -> int | None:
        """Return the most cache blocks that every profile of every plan takes; None where any number will do."""
        caches = {spec.name: spec.shape for graph_io in self.graphs.values() for spec in graph_io.with_role("cache")}
        blocks = [
            bounds[2][0] // (self.cache.block_size if caches[name][0] == "NS" else 1)
            for plans in self.profiles.values()
            for shapes in plans.values()
            for name, bounds in shapes.items()
            if name in caches
        ]
        return min(blocks, default=None)


def rebuild_command(folder: Path, manifest: Manifest, *, target: str | None = None) -> str:
    """Return the command that builds this engine again. What no engine knows is in capitals: the program's folder, and
    the checkpoint of an engine that holds its weights.

    Args:
        folder: the engine folder.
        manifest: the manifest of that folder.
        target: the target to build for, instead of what the engine was built for.
    """
    options: dict[str, object] = {"--target": target or manifest.target.name}
    if target is None and TARGET in {file.path for file in manifest.files}:
        options["--target"] = folder / TARGET  # with precision, cache format and limits
    else:
        options |= {f"--{name.replace('_', '-')}": value for name, value in manifest.limits.model_dump().items()}
    if manifest.weights is None:  # they are in the engine, and nobody noted where they came from
        options["--checkpoint"] = "CHECKPOINT"
    elif manifest.weights.path is not None:
        options["--checkpoint"] = typed(manifest.weights.path)
    build = manifest.build
    if build.get("plugins", "auto") != "auto":
        options["--plugins"] = build["plugins"]
    if build.get("layers_per_engine", 1) != 1:
        options["--layers-per-engine"] = build["layers_per_engine"]
    kernels = build.get("kernels")
    if isinstance(kernels, list) and kernels and all(isinstance(one, str) for one in kernels):
        options["--kernels"] = typed(",".join(kernels))
    compiler = build.get("compiler")  # of a manifest that was edited it may be anything
    for name, option in _COMPILER_OPTIONS.items():
        if isinstance(compiler, dict) and name in compiler:
            options[option] = compiler[name]
    words = [word for pair in options.items() for word in pair]
    shown = any(spec.role == "debug" for graph_io in manifest.graphs.values() for spec in graph_io.outputs)
    flags = ["--taps"] if shown or build.get("taps") else []
    return typed_command("build", "PROGRAM", folder, *words, *flags, "--force")


#: Options of the compiler in `Manifest.build` -> as they are typed.
_COMPILER_OPTIONS = {
    "workspace_bytes": "--workspace",
    "optimization_level": "--builder-optimization-level",
    "timing_cache": "--timing-cache",
}


def manifest_digest(raw: dict[str, Any]) -> str:
    """Return the SHA-256, in hex, over a decoded manifest without its own digest."""
    kept = {key: value for key, value in raw.items() if key != "digest"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest_file(folder: Path, relative: str) -> FileDigest:
    """Describe one file of an engine folder."""
    path = folder / relative
    return FileDigest(path=relative, bytes=path.stat().st_size, sha256=sha256_file(path), chunks=chunk_digests(path))


def save_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json into `folder` with its digest, so that an edit of any field is found at load; return it."""
    raw = json.loads(json.dumps(manifest.model_dump(mode="json")))
    for name in ("quality", "ranks"):
        if raw[name] is None:
            del raw[name]
    raw["digest"] = manifest_digest(raw)
    write_json(folder / MANIFEST, raw)
    return manifest.model_copy(update={"digest": raw["digest"]})


def load_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json, not yet the files it names.

    Raises:
        EngineError: not an engine folder, another format version, or malformed.
    """
    path = folder / MANIFEST
    try:
        text = read_bytes(path, most=LISTING_BYTES)
        raw = parse_json(text)
    except OSError as error:
        raise EngineError(
            f"{path}: cannot be read ({error.strerror}); expected a folder written by 'seekforge build'"
        ) from None
    except ValueError as error:
        raise EngineError(f"{path}: not valid JSON ({error}); build the engine again") from None
    number = raw.get("format") if isinstance(raw, dict) else None
    if number != ENGINE_FORMAT:
        raise EngineError(
            f"{path}: engine format {number!r}, this seekforge runs format {ENGINE_FORMAT}; "
            "build the engine again with 'seekforge build'"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except RecordError as error:
        raise EngineError(f"{path}: {error}; build the engine again") from None
    digest = manifest_digest(raw)
    again = f"copy it again or build it again: {rebuild_command(folder, manifest)}"
    if digest != manifest.digest:
        raise EngineError(
            f"{path}: digest: found {digest[:12]}, expected {manifest.digest[:12] or 'one'}: the manifest was edited; "
            f"{again}"
        )
    if text != json_text(raw).encode():  # 1E-05 is 1e-05 as a value
        raise EngineError(f"{path}: is not spelt as it was written: the manifest was edited; {again}")
    fault = disagreement(manifest)
    if fault is not None:
        raise EngineError(f"{path}: {fault}; the manifest was edited, copy it again or build the engine again")
    return manifest
