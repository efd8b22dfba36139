"""Describe a folder as plain JSON values: what it is, how large, of what parts.

Reads headers, and of BF16 weights a sample.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seekforge.common.dtypes import itemsize
from seekforge.common.errors import ProgramError
from seekforge.common.reading import is_there
from seekforge.exporter.builder.request import read_engine_graph, read_graph
from seekforge.exporter.checkpoint.opened import as_stored
from seekforge.exporter.checkpoint.quantization_error import quantization_errors
from seekforge.exporter.checkpoint.schema import expected_tensors
from seekforge.exporter.checkpoint.text_files import present_text_files
from seekforge.exporter.program.rank_bindings import rank_bindings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import MANIFEST, Manifest, load_manifest
from seekforge.formats.engine.verify import listed_files as files_of_engine
from seekforge.formats.program import GraphIO, Program, load_bindings, load_program
from seekforge.formats.program import listed_files as files_of_program
from seekforge.formats.support import sentence, supported
from seekforge.formats.value_check import SCALE_SUFFIX
from seekforge.formats.weight_recipes import Recipe
from seekforge.formats.weight_recipes.stored import WORDS

if TYPE_CHECKING:
    import onnx

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_ReadGraph = Callable[[Path, GraphIO], "onnx.ModelProto"]
_EXPERT = re.compile(r"(?<=experts)\.\d+(?=\.)")


def kind_of(path: Path) -> str:
    """Return `engine`, `program` or `checkpoint`.

    Raises:
        ProgramError: the folder is none of them.
    """
    for name, kind in ((MANIFEST, "engine"), ("program.json", "program"), ("config.json", "checkpoint")):
        if is_there(path / name):
            return kind
    if not path.is_dir():
        what = "is a file" if path.exists() else "is not there"
        raise ProgramError(f"{path}: {what}, expected the folder of a checkpoint, a program or an engine")
    raise ProgramError(
        f"{path}: is no checkpoint (config.json), program (program.json) or engine ({MANIFEST}); "
        "pass a folder that one of the commands wrote, or a downloaded model"
    )


def describe(path: Path) -> dict[str, Any]:
    """Return what `seekforge inspect` shows.

    Raises:
        SeekforgeError: the folder is none that we know, or damaged.
    """
    kind = kind_of(path)
    about = {"checkpoint": _checkpoint, "program": _program, "engine": _engine}[kind](path)
    return {"kind": kind, "path": str(path), **about}


def parameters(config: ModelConfig) -> dict[str, int]:
    """Count parameters as spec §9.1 does.

    Returns:
        stored (with the MTP copies of embedding and head), main, active (per token of the main model, embedding and
        head included), active_without_embedding, and mtp (its own, copies not counted).
    """
    sizes = {name: tensor.num_parameters for name, tensor in expected_tensors(config).items()}
    mtp_prefix = f"model.layers.{config.num_hidden_layers}."
    mtp = sum(size for name, size in sizes.items() if name.startswith(mtp_prefix))
    main = sum(sizes.values()) - mtp
    table = config.vocab_size * config.hidden_size
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    num_moe = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    idle = num_moe * (config.n_routed_experts - config.num_experts_per_tok) * expert
    return {
        "stored": main + mtp,
        "main": main,
        "active": main - idle,
        "active_without_embedding": main - idle - table,
        "mtp": mtp - 2 * table if mtp else 0,
    }


def _model(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_dense_layers": config.first_k_dense_replace,
        "has_mtp": config.mtp_layer is not None,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "n_routed_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "index_topk": config.index_topk,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    config, notes = ModelConfig.read(path)
    present_text_files(path)
    families: dict[str, int] = defaultdict(int)
    layers: dict[str, int] = defaultdict(int)
    dtypes: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "elements": 0, "bytes": 0})
    with Checkpoint.open(path) as checkpoint:
        config, more = as_stored(checkpoint, config)
        for name in checkpoint.names:
            info = checkpoint.info(name)
            layer = _LAYER.match(name)
            families[family_of(name)] += info.num_bytes
            layers[layer[1] if layer else family_of(name)] += info.num_bytes
            entry = dtypes[info.dtype]
            entry["tensors"] += 1
            entry["elements"] += math.prod(info.shape)
            entry["bytes"] += info.num_bytes
        about = {
            "num_tensors": len(checkpoint.names),
            "num_bytes": sum(families.values()),
            "num_shards": len(checkpoint.shards),
            "digest": checkpoint.index_digest(),
            "weights": WORDS[config.stored_form],
            "engines": [sentence(row) for row in supported(config.model_type, config.stored_form).values()],
            "quantization_errors": quantization_errors(checkpoint, config),
        }
    return {
        "model": _model(config),
        "parameters": parameters(config),
        "notes": [*notes, *more],
        **about,
        "dtypes": dict(dtypes),
        "bytes_by_family": dict(sorted(families.items(), key=lambda item: -item[1])),
        "bytes_by_layer": dict(layers),
    }


def family_of(name: str) -> str:
    """Return a tensor's kind, the same for all layers and experts: its name without numbers, and of its weight."""
    short = _EXPERT.sub("", _LAYER.sub("", name))
    return short.removesuffix(SCALE_SUFFIX).removesuffix(".weight").removeprefix("model.")


def _program(path: Path) -> dict[str, Any]:
    program = load_program(path)
    files_of_program(path, program)
    bindings = load_bindings(path)
    config = ModelConfig.parse(program.config, str(path / "program.json"))
    return {
        "model": _model(config),
        "parameters": parameters(config),
        "seekforge_version": program.seekforge_version,
        "opset": program.opset,
        "numerics": program.numerics["name"],
        "layers": list(program.layer_range),
        "ranks": _ranks(program, bindings),
        "ops": {name: use.model_dump(mode="json") for name, use in program.ops.items()},
        "graphs": {
            name: _graph(path, graph, bindings.get(name, {}), read_graph) for name, graph in program.graphs.items()
        },
        "unused": program.unused,
        "num_shared": len(program.shared),
        "outside": program.outside,
        "digest": {name: graph.sha256 for name, graph in program.graphs.items()},
    }


def _ranks(program: Program, bindings: dict[str, dict[str, Recipe]]) -> dict[str, Any]:
    """Return how ranks share the program and the checkpoint bytes that each reads; computed tables count nothing."""
    parallelism = program.parallelism
    reads = []
    for rank in range(parallelism.num_ranks):
        named = rank_bindings(program, bindings, rank)
        listed = [recipe for recipes in named.values() for recipe in recipes.values()]
        # embedding and head are inputs of both graphs, read once
        whole = {recipe.tensor: recipe for recipe in listed if recipe.op == "take"}
        recipes = [*whole.values(), *(recipe for recipe in listed if recipe.op != "take")]
        reads.append(sum(map(bytes_read, recipes)))
    return {
        "parallelism": parallelism.model_dump(mode="json"),
        "pipeline_stages": [list(layers) for layers in program.pipeline_stages],
        "bytes_read": reads,
    }


def bytes_read(recipe: Recipe) -> int:
    """Return the bytes of the checkpoint that a recipe of one rank selects (both operands of a dequantized one)."""
    if recipe.op == "slice":
        whole = recipe.parts[0]
        return bytes_read(whole) * math.prod(recipe.shape) // math.prod(whole.shape)
    if recipe.op == "take":
        return math.prod(recipe.shape) * itemsize(recipe.dtype)
    return sum(map(bytes_read, recipe.parts))


def _graph(path: Path, graph: GraphIO, bindings: dict[str, Recipe], read: _ReadGraph) -> dict[str, Any]:
    weights = [spec for spec in graph.inputs if spec.role in ("weight", "table")]
    by_dtype: dict[str, int] = defaultdict(int)
    for spec in weights:
        by_dtype[spec.dtype] += itemsize(spec.dtype) * math.prod(int(dim) for dim in spec.shape)
    return {
        "file": graph.file,
        "file_bytes": (path / graph.file).stat().st_size if (path / graph.file).is_file() else None,
        "op_counts": _op_counts(path, graph, read),
        "num_weight_inputs": len(weights),
        "weight_bytes": sum(by_dtype.values()),
        "weight_bytes_by_dtype": dict(by_dtype),
        "binding_ops": dict(Counter(op for recipe in bindings.values() for op in _ops(recipe)).most_common()),
        "inputs": [spec.model_dump(mode="json") for spec in graph.inputs if spec.role not in ("weight", "table")],
        "outputs": [spec.model_dump(mode="json") for spec in graph.outputs],
    }


def _ops(recipe: Recipe) -> Iterable[str]:
    yield recipe.op
    for part in recipe.parts:
        yield from _ops(part)


def _op_counts(path: Path, graph: GraphIO, read: _ReadGraph) -> dict[str, int] | None:
    """Count nodes by operator, custom ones as `seekforge.Name`; None without onnx, and for other files."""
    if not graph.file.endswith(".onnx") or importlib.util.find_spec("onnx") is None:
        return None
    model = read(path, graph)
    counted = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in model.graph.node)
    return dict(counted.most_common())


def _engine(path: Path) -> dict[str, Any]:
    manifest: Manifest = load_manifest(path)
    files_of_engine(path, manifest)
    config = ModelConfig.parse(manifest.config, str(path / MANIFEST))
    check = manifest.self_check
    return {
        "model": _model(config),
        "parameters": parameters(config),
        "seekforge_version": manifest.seekforge_version,
        "target": manifest.target.model_dump(mode="json"),
        "versions": manifest.versions,
        "numerics": manifest.numerics["name"],
        "layers": list(manifest.layer_range),
        "limits": manifest.limits.model_dump(mode="json"),
        "cache": manifest.cache.model_dump(mode="json"),
        "files": {file.path: file.bytes for file in manifest.files},
        "num_bytes": sum(file.bytes for file in manifest.files),
        "graphs": {name: _graph(path, graph, {}, read_engine_graph) for name, graph in manifest.graphs.items()},
        "stages": {name: [stage.file for stage in stages] for name, stages in manifest.stages.items()},
        "plugins": {op: use.model_dump(mode="json") for op, use in manifest.plugins.items()},
        "audit": None if manifest.audit is None else manifest.audit.model_dump(mode="json"),
        "weights": None if manifest.weights is None else manifest.weights.model_dump(mode="json"),
        "quantization": None if manifest.quantization is None else manifest.quantization.model_dump(mode="json"),
        "quality": None if manifest.quality is None else manifest.quality.model_dump(mode="json"),
        "build": manifest.build,
        "digest": manifest.digest,
        "self_check": None
        if check is None
        else {"num_tokens": len(check.prompt_ids), "num_rows": len(check.rows), "tolerance": check.tolerance},
    }
