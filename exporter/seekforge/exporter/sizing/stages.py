"""How layers are divided into pipeline stages, and the weights of a rank in each."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from seekforge.exporter.models.parameters import num_shares
from seekforge.exporter.sizing.matrices import Matrix, Precision, end_matrices, held_bytes, layer_matrices
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism


def rank_share(matrix: Matrix, parallelism: Parallelism) -> int:
    """Return into how many equal parts ranks divide a matrix, or all of its copies."""
    return num_shares(matrix.sharding, matrix.rows, parallelism.tp)


def rank_weight_bytes(matrix: Matrix, parallelism: Parallelism, precision: Precision) -> int:
    """Bytes of a matrix on one rank."""
    return held_bytes(matrix, precision) // rank_share(matrix, parallelism)


def pipeline_stages(config: ModelConfig, parallelism: Parallelism) -> tuple[tuple[int, int], ...]:
    """Return the half-open layer range of each pipeline stage; cuts keep the fullest stage least full.

    What counts is the FP8 weights of a rank, the MTP module on the last stage included where the model has one: the
    same stages for every precision and every use of the model, since a program has them.
    """
    return _cut(config, parallelism)  # pyright: ignore[reportArgumentType] - frozen, so hashable


@functools.lru_cache(maxsize=1024)
def _cut(config: ModelConfig, parallelism: Parallelism) -> tuple[tuple[int, int], ...]:
    num_layers, pp = config.num_hidden_layers, parallelism.pp
    if pp == 1:
        return ((0, num_layers),)
    mtp = config.mtp_layer is not None
    weights = [_stage_bytes(config, (n, n + 1), parallelism, "fp8", mtp=mtp) for n in range(num_layers)]
    low, high = max(weights), sum(weights)
    while low < high:
        limit = (low + high) // 2
        if _count_stages(weights, limit) <= pp:
            high = limit
        else:
            low = limit + 1
    result: list[tuple[int, int]] = []
    start = 0
    while start < num_layers:
        stop, total = start, 0
        left = pp - len(result) - 1  # stages after this one need a layer each
        while stop < num_layers - left and total + weights[stop] <= low:
            total += weights[stop]
            stop += 1
        result.append((start, stop))
        start = stop
    return tuple(result)


def stages(
    config: ModelConfig, parallelism: Parallelism, precision: Precision, *, mtp: bool
) -> list[tuple[range, int]]:
    """Return each pipeline stage's layers and weight bytes per rank."""
    cut = pipeline_stages(config, parallelism)
    return [(range(*layers), _cached_bytes(config, layers, parallelism, precision, mtp)) for layers in cut]  # pyright: ignore[reportArgumentType] - frozen, so hashable


@functools.lru_cache(maxsize=4096)
def _cached_bytes(
    config: ModelConfig, layers: tuple[int, int], parallelism: Parallelism, precision: Precision, mtp: bool
) -> int:
    return _stage_bytes(config, layers, parallelism, precision, mtp=mtp)


def _stage_bytes(
    config: ModelConfig, layers: tuple[int, int], parallelism: Parallelism, precision: Precision, *, mtp: bool
) -> int:
    """Bytes on one rank of some layers, and of the ends of the model where they are among them."""
    first, last = end_matrices(config)
    matrices = [matrix for layer in range(*layers) for matrix in layer_matrices(config, layer)]
    if layers[0] == 0:
        matrices += first
    if layers[1] == config.num_hidden_layers:
        matrices += last
        if mtp and config.mtp_layer is not None:
            matrices += layer_matrices(config, config.mtp_layer)
            if layers[0] > 0:
                matrices += first  # the MTP module embeds tokens too
    return sum(rank_weight_bytes(matrix, parallelism, precision) for matrix in matrices)


def _count_stages(weights: Sequence[int], limit: int) -> int:
    count, total = 1, 0
    for weight in weights:
        if total + weight > limit:
            count, total = count + 1, 0
        total += weight
    return count
