"""Do the values of a manifest agree with each other? It can be edited and sealed anew, so its digest says little.

What a value means is said more than once: sizes of caches also by the shapes of the graphs, the vocabulary also by the
logits, limits also by tables and profiles. All that is compared here, when a manifest is read; the graphs' own shapes
are compared where they are opened (`runtime.backends`), so that an edit of one place is an error and not another text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from seekforge.common.dtypes import NUMPY, itemsize
from seekforge.common.errors import ConfigError
from seekforge.formats.engine.limits import MOST, range_fault, step_fault
from seekforge.formats.numerics import numerics_from_dict
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.program import GraphIO, TensorSpec, role_of
from seekforge.formats.step_io import RESULTS

if TYPE_CHECKING:
    from seekforge.formats.engine.manifest import Cache, Manifest

#: Tables with one row for each position.
ROPE_TABLES: Final = ("rope_cos", "rope_sin")
#: dtype of the latent cache, by format; packed caches are bytes.
_CACHE_DTYPES: Final = {"f32": ("f32",), "bf16": ("bf16",), "fp8_ds": ("i8", "u8")}
#: Roles of outputs that only parity asks for.
_SHOWN: Final = ("tap", "debug")
#: What a GPU's account says of one device; the cache is sized by it.
_DEVICE_BYTES: Final = ("weights", "scratch", "activations", "reserve", "total", "usable")


def disagreement(manifest: Manifest) -> str | None:
    """Return the first value of a manifest that cannot be, with what it is held against; None: there is none."""
    for faults in (_sizes, _graphs, _caches, _vocabulary, _self_check, _profiles, _ranks, _others):
        fault = next(faults(manifest), None)
        if fault is not None:
            return fault
    return None


def _sizes(manifest: Manifest) -> Iterator[str]:
    longest = _whole(manifest.config, "max_position_embeddings")
    for fault in (
        range_fault(manifest.limits, longest, "limits.{}".format),
        step_fault(manifest.limits, "limits.{}".format),
    ):
        if fault is not None:
            yield fault
    for graph, graph_io in manifest.graphs.items():
        for spec in graph_io.with_role("table"):
            if spec.name in ROPE_TABLES and spec.shape and int(spec.shape[0]) < manifest.limits.max_model_len:
                said = manifest.limits.max_model_len
                yield f"limits.max_model_len is {said}, {spec.name} of graph {graph} has {spec.shape[0]} positions"
    if manifest.cache.block_size != BLOCK_SIZE:
        yield f"cache.block_size is {manifest.cache.block_size}, the graphs are made for {BLOCK_SIZE}"
    first, last = manifest.layer_range
    layers = _whole(manifest.config, "num_hidden_layers")
    if not 0 <= first < last <= (layers if layers is not None else MOST):
        yield f"layer_range is {first} to {last}, expected layers of the {layers} in config.num_hidden_layers"


def _graphs(manifest: Manifest) -> Iterator[str]:
    sealed = {file.path: file.sha256 for file in manifest.files}
    for graph in manifest.graphs:
        if graph not in ("model", "mtp"):
            yield f"graphs has {graph!r}, expected 'model' and perhaps 'mtp'"
    for graph in manifest.stages:
        if graph not in manifest.graphs or not manifest.stages[graph]:
            yield f"stages.{graph} belongs to no graph or is empty"
    for graph, graph_io in manifest.graphs.items():
        for where, one in [
            (f"graphs.{graph}", graph_io),
            *((f"stages.{graph}", stage) for stage in manifest.plans(graph)),
        ]:
            yield from (f"{where}: {fault}" for fault in _graph_io_faults(one))
            if one.sha256 and sealed.get(one.file, one.sha256) != one.sha256:
                yield f"{where}.sha256 is {one.sha256[:12]}, of {one.file} under 'files' {sealed[one.file][:12]}"


def _graph_io_faults(graph_io: GraphIO) -> Iterator[str]:
    specs = (*graph_io.inputs, *graph_io.outputs)
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        yield f"the tensor {next(name for name in names if names.count(name) > 1)!r} is listed twice"
    for spec in specs:
        yield from _tensor(spec)
    inputs, outputs = {spec.name for spec in graph_io.inputs}, {spec.name for spec in graph_io.outputs}
    for output, source in graph_io.aliases.items():
        if output not in outputs or source not in inputs:
            yield f"aliases pairs {output!r} with {source!r}, which are no output and input of the graph"
        kind, _, layer = output.rpartition(".")
        if f"{kind.removesuffix('_out')}.{layer}" != source:
            yield f"aliases pairs {output!r} with {source!r}, expected the cache of the same name"
        output_spec, input_spec = graph_io.named(output), graph_io.named(source)
        sizes = zip(output_spec.shape, input_spec.shape)
        alike = all(a == b or isinstance(a, str) or isinstance(b, str) for a, b in sizes)
        if output_spec.dtype != input_spec.dtype or len(output_spec.shape) != len(input_spec.shape) or not alike:
            yield f"{output!r} and {source!r} are one cache of different shapes or types"


def _tensor(spec: TensorSpec) -> Iterator[str]:
    if spec.dtype not in NUMPY:
        yield f"{spec.name!r} has dtype {spec.dtype!r}, expected one of {', '.join(NUMPY)}"
    if len(spec.shape) > 8 or not all(dim if isinstance(dim, str) else 0 <= dim <= MOST for dim in spec.shape):
        yield f"{spec.name!r} has the shape {list(spec.shape)!r:.100}, expected up to 8 sizes or names of sizes"
    elif spec.role in ("weight", "table") and not all(isinstance(dim, int) for dim in spec.shape):
        yield f"{spec.name!r} is a {spec.role} of the shape {list(spec.shape)}, expected fixed sizes"
    if spec.role in _SHOWN:  # any value inside may be shown, under its own name
        return
    expected = "result" if spec.name in RESULTS else role_of(spec.name)
    if expected is not None and spec.role != expected:
        yield f"{spec.name!r} has the role {spec.role!r}, expected {expected!r}"
    if expected is None and spec.role == "bookkeeping":
        yield f"{spec.name!r} has the role {spec.role!r}, which no tensor of that name has"


def _caches(manifest: Manifest) -> Iterator[str]:
    cache = manifest.cache
    if "model" not in manifest.graphs:  # which is refused by whoever runs it
        return
    widths = {"latent_cache": cache.latent_dim} | ({"index_cache": cache.index_dim} if cache.index_dim else {})
    for graph, graph_io in manifest.graphs.items():
        layers: dict[str, list[int]] = {kind: [] for kind in widths}
        for spec in graph_io.with_role("cache"):
            kind, _, layer = spec.name.partition(".")
            if kind not in layers:  # a model of other caches: the backend holds them against its graphs
                return
            if not layer.isdecimal() or len(spec.shape) < 2 or not all(isinstance(dim, int) for dim in spec.shape[1:]):
                yield f"cache {spec.name!r} of graph {graph} has the shape {list(spec.shape)}, expected [slots, width]"
                return
            layers[kind].append(int(layer))
            if spec.dtype not in _CACHE_DTYPES[cache.kv_format]:
                yield f"cache.kv_format is {cache.kv_format}, {spec.name!r} of graph {graph} holds {spec.dtype}"
            if cache.kv_format != "fp8_ds" and spec.shape[1:] != (widths[kind],):
                yield f"{spec.name!r} of graph {graph} has rows {list(spec.shape[1:])}, cache says {widths[kind]}"
        of_graph = [cache.mtp_layer] if graph == "mtp" else list(cache.layers)
        for kind in widths:
            expected = of_graph if kind == "latent_cache" else [one for one in of_graph if _has_indexer(manifest, one)]
            if layers[kind] != expected:
                key = "mtp_layer" if graph == "mtp" else "layers"
                yield f"cache.{key} is {expected!r:.100}, graph {graph} has {kind} of {layers[kind]!r:.100}"
    if cache.layers != tuple(range(*manifest.layer_range)):
        first, last = manifest.layer_range
        yield f"cache.layers is {list(cache.layers)!r:.100}, layer_range is {first} to {last}"
    if (cache.mtp_layer is None) != ("mtp" not in manifest.graphs):
        yield f"cache.mtp_layer is {cache.mtp_layer}, graphs are {', '.join(manifest.graphs)}"
    num_bytes = cache_block_bytes(manifest.graphs.values(), cache)
    if cache.bytes_per_block != num_bytes:
        yield f"cache.bytes_per_block is {cache.bytes_per_block}, the caches of the graphs take {num_bytes}"
    config = manifest.config
    ours, rope = _whole(config, "kv_lora_rank"), _whole(config, "qk_rope_head_dim")
    if ours is not None and rope is not None and cache.latent_dim != ours + rope:
        yield f"cache.latent_dim is {cache.latent_dim}, config.kv_lora_rank + qk_rope_head_dim is {ours + rope}"
    if cache.index_dim != (_whole(config, "index_head_dim") or cache.index_dim):
        yield f"cache.index_dim is {cache.index_dim}, config.index_head_dim {config['index_head_dim']}"


def _has_indexer(manifest: Manifest, layer: int | None) -> bool:
    """Whether a layer chooses keys itself: all do, but for those that `indexer_types` says share a choice."""
    types = manifest.config.get("indexer_types")
    if not isinstance(types, list | tuple) or layer is None or not 0 <= layer < len(types):
        return True
    return types[layer] == "full"


def cache_block_bytes(graphs: Iterable[GraphIO], cache: Cache) -> int:
    """Return what one block takes in the caches of some graphs: rows of a packed cache are blocks, others slots."""
    rows = 1 if cache.kv_format == "fp8_ds" else cache.block_size
    specs = [spec for graph_io in graphs for spec in graph_io.with_role("cache")]
    return sum(rows * itemsize(spec.dtype) * math.prod(int(dim) for dim in spec.shape[1:]) for spec in specs)


def _vocabulary(manifest: Manifest) -> Iterator[str]:
    size = manifest.vocab_size
    for key in ("vocab_size", "bos_token_id"):
        said = _whole(manifest.config, key)
        if said is not None and said != getattr(manifest, key):
            yield f"{key} is {getattr(manifest, key)}, config.{key} {said}"
    if not 1 <= manifest.num_top_logits <= size <= MOST:
        yield f"vocab_size is {size} and num_top_logits {manifest.num_top_logits}, expected at least one and not more"
    said = manifest.config.get("eos_token_id")
    ends = said if isinstance(said, list | tuple) else [] if said is None else [said]
    if not manifest.eos_token_ids or any(end not in manifest.eos_token_ids for end in ends):
        yield f"eos_token_id is {manifest.eos_token_id!r:.100}, config.eos_token_id {said}"
    for key, token in [("bos_token_id", manifest.bos_token_id), *(("eos_token_id", i) for i in manifest.eos_token_ids)]:
        if not 0 <= token < size:
            yield f"{key} is {token}, expected an id below vocab_size {size}"
    widths = {"logits": (size,), "top_logits": (manifest.num_top_logits,), "top_ids": (manifest.num_top_logits,)}
    hidden = _whole(manifest.config, "hidden_size")
    for graph, graph_io in manifest.graphs.items():
        for spec in graph_io.outputs:
            if spec.name in widths and spec.shape[1:] != widths[spec.name]:
                rows, wanted = list(spec.shape[1:]), list(widths[spec.name])
                yield f"{spec.name} of graph {graph} has rows {rows}, expected {wanted}"
            if spec.name == "hidden" and hidden is not None and spec.shape[-1:] != (hidden,):
                yield f"hidden of graph {graph} has the shape {list(spec.shape)}, config.hidden_size is {hidden}"


def _self_check(manifest: Manifest) -> Iterator[str]:
    check = manifest.self_check
    if check is None:
        return
    length, size = len(check.prompt_ids), manifest.vocab_size
    if not 1 <= length <= manifest.limits.max_model_len or not all(0 <= token < size for token in check.prompt_ids):
        yield f"self_check.prompt_ids has {length} ids, expected 1 to max_model_len, each below vocab_size {size}"
    if not 0 <= check.tolerance < math.inf:
        yield f"self_check.tolerance is {check.tolerance}, expected a finite number"
    for number, row in enumerate(check.rows):
        if not 0 <= row.position < length:
            yield f"self_check.rows.{number}.position is {row.position}, expected 0 to {length - 1}"
        if len(row.top_ids) != len(row.top_logits) or not all(0 <= token < size for token in row.top_ids):
            yield f"self_check.rows.{number}: expected a logit for each of top_ids, each below vocab_size {size}"


def _profiles(manifest: Manifest) -> Iterator[str]:
    plans: dict[str, GraphIO] = {}
    for graph in manifest.graphs:
        for one in manifest.plans(graph):
            plans.setdefault(Path(one.file).stem, one)  # of stages that are alike the first names the plan's tensors
    for name, by_plan in manifest.profiles.items():
        for plan, shapes in by_plan.items():
            graph_io = plans.get(plan)
            if graph_io is None:
                yield f"profiles.{name} has {plan!r}, which is no plan of the graphs"
                continue
            ranks = {spec.name: len(spec.shape) for spec in graph_io.inputs}
            for tensor, bounds in shapes.items():
                where = f"profiles.{name}.{plan}.{tensor}"
                if tensor not in ranks:
                    yield f"{where}: the plan has no such input"
                elif len(bounds) != 3 or any(len(bound) != ranks[tensor] for bound in bounds):
                    yield f"{where}: expected three shapes of {ranks[tensor]} sizes"
                elif not all(0 <= low <= mid <= high <= MOST for low, mid, high in zip(*bounds, strict=True)):
                    bound_lists = [list(bound) for bound in bounds]
                    yield f"{where} is {bound_lists!r:.200}, expected smallest, typical and largest shape"
    most = manifest.max_cache_blocks() if manifest.profiles else None
    if most is not None and most * BLOCK_SIZE < manifest.limits.max_model_len:
        longest = manifest.limits.max_model_len
        yield f"limits.max_model_len is {longest}, the profiles take {most} blocks of {BLOCK_SIZE}"


def _ranks(manifest: Manifest) -> Iterator[str]:
    if manifest.ranks is None:
        return
    for graph in manifest.graphs:
        files = [Path(piece.file).stem for piece in manifest.plans(graph)]
        named = [piece for pieces in manifest.ranks.pieces.get(graph, ()) for piece in pieces]
        if named != files:
            yield f"ranks.pieces.{graph} is {named!r:.100}, stages.{graph} has {files!r:.100}"
    if set(manifest.ranks.pieces) != set(manifest.graphs):
        yield f"ranks.pieces has {', '.join(manifest.ranks.pieces)}, graphs are {', '.join(manifest.graphs)}"
    borders = [manifest.layer_range[0], *(stop for _, stop in manifest.ranks.pipeline_stages)]
    if tuple(itertools.pairwise(borders)) != manifest.ranks.pipeline_stages or borders[-1] != manifest.layer_range[1]:
        said = [list(one) for one in manifest.ranks.pipeline_stages]
        yield f"ranks.pipeline_stages is {said!r:.100}, layer_range is {list(manifest.layer_range)}"
    accounts = manifest.ranks.stage_bytes
    expected = manifest.ranks.parallelism.pp if manifest.target.backend != "onnxruntime" else 0
    if len(accounts) != expected or any(key not in account for account in accounts for key in _DEVICE_BYTES):
        yield f"ranks.stage_bytes has {len(accounts)} accounts, expected {expected} with {', '.join(_DEVICE_BYTES)}"


def _others(manifest: Manifest) -> Iterator[str]:
    if manifest.numerics:
        try:
            numerics_from_dict(manifest.numerics)
        except ConfigError as error:
            yield str(error)
    if manifest.audit is not None:
        needed = ("total", "usable") if manifest.audit.oversize else _DEVICE_BYTES
        missing = [key for key in needed if key not in manifest.audit.device_bytes]
        if missing:
            yield f"audit.device_bytes has no {missing[0]!r}, expected {', '.join(_DEVICE_BYTES)}"
    if manifest.quantization is not None and not 1 <= manifest.quantization.block_size <= 1 << 16:
        yield f"quantization.block_size is {manifest.quantization.block_size}, expected at least 1"
    for file in manifest.files:
        if file.bytes < 0:
            yield f"files: {file.path} has {file.bytes} bytes"


def _whole(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int else None
