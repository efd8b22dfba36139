"""Write a checkpoint folder that is file for file what a DeepSeek-V3.2 download is, with random weights.

Random, but not any: a model with plain Gaussian weights is useless as a test. Its router has no opinion, its
index scores tie, its block scales are all equal, so that a wrong rank, a wrong tie rule or a transposed scale
passes unseen. The rules of `_draw` give every one of these something to be wrong about (ties: spec §3.7, §14).
Every tensor is drawn from the seed and its own name: same seed, same bytes, whatever the order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import ConfigError
from seekforge.common.files import atomic_folder, write_json
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.checkpoint.schema import ExpectedTensor, expected_tensors, totals
from seekforge.exporter.checkpoint.tokenizer import write_tokenizer
from seekforge.exporter.checkpoint.validate import OnBytes
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.shard_index import INDEX_FILE
from seekforge.formats.checkpoint.shard_writer import ShardWriter
from seekforge.formats.end_of_sequence import end_ids
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.weight_recipes.stored import encode

#: More would take hours to draw; `--sparse` makes the true structure of any size.
_MAX_PARAMETERS = 20_000_000_000

_ROUTER_LOGIT_STD = 1.25
_LOGIT_STD = 3.0
_NORM_SPREAD = 0.1
#: What a block adds is small beside the residual stream, as in a trained deep model: rounding noise then stays
#: near the size at which it arose (FP8 against FP32: 0.10 of the logits' spread on `tiny`; 0.39 with a gain of 1).
_BRANCH_GAIN = 0.3
#: Block magnitudes of an FP8 weight are spread over 2^±1.5, so that neighboring blocks differ in scale.
_BLOCK_SPREAD_LOG2 = 1.5


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What `new_checkpoint` wrote.

    Attributes:
        path: the folder.
        num_files: files in it.
        num_tensors: tensors, scales included.
        num_parameters: elements, scales not included.
        num_bytes: bytes of tensor data (`total_size` of the index).
        disk_bytes: bytes that all files take on disk.
    """

    path: Path
    num_files: int
    num_tensors: int
    num_parameters: int
    num_bytes: int
    disk_bytes: int


def new_checkpoint(
    out: Path,
    preset: str | Preset,
    *,
    seed: int = 0,
    force: bool = False,
    progress: OnBytes | None = None,
) -> WrittenCheckpoint:
    """Write a checkpoint of a preset with random weights.

    Memory: the largest tensor, three times. `out` appears only when it is complete.

    Args:
        out: the folder to make.
        preset: a name of `configs/models`, or a preset itself.
        seed: the same seed gives the same bytes.
        force: replace a checkpoint that stands at `out`.
        progress: told the bytes written so far and in all, after each tensor.

    Raises:
        ConfigError: the preset is unknown, malformed, or too large to draw.
        OutputError: `out` is not empty (without `force`), or cannot be written (no permission, disk full).
    """
    chosen = load_preset(preset) if isinstance(preset, str) else preset
    tensors = expected_tensors(chosen.config)
    size = totals(tensors)
    if size.num_parameters > _MAX_PARAMETERS:
        raise ConfigError(
            f"preset {chosen.name!r} has {size.num_parameters / 1e9:.0f} billion parameters "
            f"({size.num_bytes / 1e9:.0f} GB); pass --sparse to write its structure without values"
        )
    shards = split_into_shards(tensors, chosen.num_shards)
    with atomic_folder(out, force=force, marker="config.json") as folder:
        _write_weights(folder, chosen.config, tensors, shards, seed, progress)
        write_sidecars(folder, chosen, shards)
        return describe(folder, out, tensors)


def describe(folder: Path, out: Path, tensors: dict[str, ExpectedTensor]) -> WrittenCheckpoint:
    """Measure the finished `folder`, which is about to be called `out`."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    size = totals(tensors)
    return WrittenCheckpoint(
        path=out,
        num_files=len(stats),
        num_tensors=size.num_tensors,
        num_parameters=size.num_parameters,
        num_bytes=size.num_bytes,
        disk_bytes=sum(stat.st_blocks * 512 for stat in stats),
    )


def split_into_shards(tensors: dict[str, ExpectedTensor], num_shards: int) -> dict[str, list[str]]:
    """Cut `tensors`, in their order, into shards of about equal size.

    A cut that falls on an FP8 weight is made right after it: its scale opens the next shard, as happens in the
    released checkpoint.

    Returns:
        Shard file name -> tensor names.
    """
    total = sum(tensor.num_bytes for tensor in tensors.values())
    shards: list[list[str]] = [[]]
    written = 0
    for name, tensor in tensors.items():
        shards[-1].append(name)
        written += tensor.num_bytes
        full = written >= total * len(shards) / num_shards
        if full and len(shards) < num_shards and tensor.part_of is None:
            shards.append([])
    shards = [names for names in shards if names]
    return {f"model-{i:05d}-of-{len(shards):06d}.safetensors": names for i, names in enumerate(shards, 1)}


def write_sidecars(folder: Path, preset: Preset, shards: dict[str, list[str]]) -> None:
    """Write everything that is not weights: configs, index, tokenizer."""
    tensors = expected_tensors(preset.config)
    write_json(folder / "config.json", preset.config_json)
    write_json(
        folder / INDEX_FILE,
        {
            "metadata": {"total_size": totals(tensors).num_bytes},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        },
    )
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": preset.config.bos_token_id,
            "eos_token_id": preset.config.eos_token_id,
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 0.95,
            "transformers_version": preset.config_json.get("transformers_version"),
        },
    )
    write_tokenizer(folder, preset.config.vocab_size, end_ids(preset.config.eos_token_id))


def layouts(
    tensors: dict[str, ExpectedTensor], shards: dict[str, list[str]]
) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Return the layout of each shard file, as `formats.safetensors` takes it."""
    return {
        file: {name: (tensors[name].dtype, tensors[name].shape) for name in names} for file, names in shards.items()
    }


def _write_weights(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, ExpectedTensor],
    shards: dict[str, list[str]],
    seed: int,
    progress: OnBytes | None,
) -> None:
    total = sum(tensor.num_bytes for tensor in tensors.values())
    written = 0
    home = {name: file for file, names in shards.items() for name in names}
    with ExitStack() as stack:
        writers = {
            file: stack.enter_context(ShardWriter(folder / file, layout))
            for file, layout in layouts(tensors, shards).items()
        }
        for name, array in draw_tensors(config, tensors, seed):
            writers[home[name]].write(name, array)
            written += array.nbytes
            if progress is not None:
                progress(written, total)


# --- values -------------------------------------------------------------------------------------------------


def draw_tensors(
    config: ModelConfig, tensors: dict[str, ExpectedTensor], seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor of `tensors`, a scale right after its weight; one at a time."""
    for name, tensor in tensors.items():
        if tensor.form is not None:
            module = name.removesuffix("_packed")
            yield from encode(tensor.form, module, _draw(config, module, tensor, seed)).items()
        elif tensor.part_of is None:
            # the MTP layer's copies are drawn as what they repeat
            yield name, _draw(config, tensor.copy_of or name, tensor, seed).astype(NUMPY[tensor.dtype])


def _draw(config: ModelConfig, name: str, tensor: ExpectedTensor, seed: int) -> np.ndarray:
    """Draw one tensor in f32. The scales keep activations near one and decisions spread (module head)."""
    random = np.random.Generator(np.random.PCG64(_entropy(seed, name)))
    shape = tensor.matrix or tensor.shape
    fan_in = shape[-1] ** -0.5
    match tensor.draw:
        case "bias":
            # Near 2 neighboring BF16 values are 1/64 apart: rounding this F32 bias would change the choice.
            return random.uniform(2.0, 2.1, shape).astype(np.float32)
        case "shift":
            return _normal(random, shape, 0.2)
        case "norm":
            return 1 + _normal(random, shape, _NORM_SPREAD)
        case "embedding":
            return _normal(random, shape, 1.0)
        case "head":
            return _normal(random, shape, _LOGIT_STD * fan_in)
        case "router":
            return _normal(random, shape, _ROUTER_LOGIT_STD * fan_in)
        case "plain":
            return _normal(random, shape, fan_in)
    weight = _normal(random, shape, (_BRANCH_GAIN if tensor.draw == "branch" else 1.0) * fan_in)
    _spread_blocks(weight, random)
    if tensor.draw == "paired_heads":
        # Antipodal head pairs: of each pair exactly one ReLU is open, so that no key scores an exact zero
        # and rank `index_topk` is never decided among ties. FP8 keeps the negation exact.
        heads = weight.reshape(-1, config.index_head_dim, shape[1])
        pairs = heads.shape[0] // 2
        heads[1 : 2 * pairs : 2] = -heads[0 : 2 * pairs : 2]
    return weight


def _entropy(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")


def _normal(random: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    values = random.standard_normal(shape, np.float32)
    values *= np.float32(std)
    return values


def _spread_blocks(weight: np.ndarray, random: np.random.Generator) -> None:
    """Scale each 128×128 block by its own factor; the mean square over the factors is one."""
    rows, columns = -(-weight.shape[0] // FP8_BLOCK), -(-weight.shape[1] // FP8_BLOCK)
    factor = np.exp2(random.uniform(-_BLOCK_SPREAD_LOG2, _BLOCK_SPREAD_LOG2, (rows, columns)))
    factor /= np.sqrt(np.mean(factor**2, axis=1, keepdims=True))
    for row in range(rows):
        weight[row * FP8_BLOCK : (row + 1) * FP8_BLOCK] *= np.repeat(factor[row].astype(np.float32), FP8_BLOCK)[
            : weight.shape[1]
        ]
