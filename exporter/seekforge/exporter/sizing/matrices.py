"""The parameters of a model from its family's table: how many, and in how many bytes.

No torch, no GPU, no file. Formulas are those of spec §2.4 and §9.1, and tests hold them against the numbers there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from seekforge.exporter.checkpoint.schema import expected_tensors, totals
from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import EXPERT, Sharding, Tensor
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.quantization.nvfp4 import row_bytes

Precision = Literal["fp8", "bf16", "nvfp4"]


@dataclass(frozen=True)
class Matrix:
    """One or several equal parameter tensors.

    Attributes:
        name: name of the module, or of the tensor where it is no weight; below its layer.
        rows, cols: out and in features; cols 1 for a vector.
        dtype: f8e4m3 (with f32 scales of 128×128 blocks), bf16 or f32.
        sharding: what divides it.
        count: how many; experts.
        active: how many of them one token multiplies with; 0 for what is no matrix product.
        held: the type in which engines hold it, and multiply with it, where that is another.
        is_head: whether only rows that get logits are multiplied with it.
    """

    name: str
    rows: int
    cols: int
    dtype: Literal["f8e4m3", "bf16", "f32"]
    sharding: Sharding = "none"
    count: int = 1
    active: int = 1
    held: Literal["bf16", "f32"] | None = None
    is_head: bool = False

    @property
    def elements(self) -> int:
        """Parameters, all copies."""
        return self.rows * self.cols * self.count

    @property
    def has_nvfp4(self) -> bool:
        """Whether engines of precision nvfp4 hold it in NVFP4: routed experts."""
        return self.dtype == "f8e4m3" and self.sharding == "experts"

    @property
    def scales(self) -> int:
        """f32 scales, all copies."""
        blocks = -(-self.rows // FP8_BLOCK) * -(-self.cols // FP8_BLOCK)
        return blocks * self.count if self.dtype == "f8e4m3" else 0

    def num_bytes(self, precision: Precision = "fp8") -> int:
        """Bytes of all copies; with `bf16`, FP8 weights are held dequantized, with `nvfp4` experts in NVFP4."""
        if self.dtype == "f8e4m3":
            if precision == "bf16":
                return 2 * self.elements
            row = row_bytes(self.cols) if precision == "nvfp4" and self.has_nvfp4 else self.cols
            return self.rows * row * self.count + 4 * self.scales
        return self.elements * (2 if self.dtype == "bf16" else 4)


def _matrices(tensors: Iterable[Tensor]) -> list[Matrix]:
    """Return rows of a family's table as matrices, but for copies of others."""
    return [
        Matrix(
            one.module.replace(f".{EXPERT}", ""),
            one.shape[0],
            one.shape[1] if len(one.shape) == 2 else 1,
            one.dtype,
            one.sharding,
            one.count,
            one.active,
            one.held,
            one.is_head,
        )
        for one in tensors
        if one.copy_of is None
    ]


def layer_matrices(config: ModelConfig, layer: int) -> list[Matrix]:
    """Return the parameters of a layer as the checkpoint holds them (spec §2.3), MTP extras included."""
    return _matrices(family_of(config).layer_tensors(config, layer))


def end_matrices(config: ModelConfig) -> tuple[list[Matrix], list[Matrix]]:
    """Return the parameters before the first layer and those behind the last one."""
    first, last = family_of(config).end_tensors(config)
    return _matrices(first), _matrices(last)


def all_matrices(config: ModelConfig, *, mtp: bool) -> Iterator[Matrix]:
    """All parameters, each once: embedding and head are shared with the MTP module."""
    first, last = end_matrices(config)
    yield from first
    for layer in range(config.num_hidden_layers):
        yield from layer_matrices(config, layer)
    yield from last
    if mtp and config.mtp_layer is not None:
        yield from layer_matrices(config, config.mtp_layer)


def all_layers(config: ModelConfig, *, mtp: bool) -> range:
    """Return the numbers of all layers, that of the MTP module included where it is asked for."""
    return range(config.num_hidden_layers + (mtp and config.mtp_layer is not None))


def num_indexers(config: ModelConfig, layers: Iterable[int]) -> int:
    """Return how many of some layers choose keys by an indexer of their own, and cache its keys."""
    return sum(config.has_indexer(layer) for layer in layers)


def num_parameters(config: ModelConfig, *, mtp: bool = False) -> int:
    """Parameters without scales (spec §9.1)."""
    return sum(matrix.elements for matrix in all_matrices(config, mtp=mtp))


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets in the main model, embedding and head included (spec §9.1)."""
    return sum(
        matrix.rows * matrix.cols * (matrix.active if matrix.sharding == "experts" else matrix.count)
        for matrix in all_matrices(config, mtp=False)
    )


def checkpoint_bytes(config: ModelConfig) -> int:
    """Tensor bytes of the whole checkpoint, whose MTP layer carries its own embedding and head (spec §2.4)."""
    if config.stored_form != "fp8_blocks":
        return totals(expected_tensors(config)).num_bytes
    copied = set(family_of(config).mtp_copies(config).values())
    copies = [matrix for matrices in end_matrices(config) for matrix in matrices if f"{matrix.name}.weight" in copied]
    return sum(matrix.num_bytes() for matrix in (*all_matrices(config, mtp=True), *copies))


def weight_bytes(config: ModelConfig, *, mtp: bool = False, precision: Precision = "fp8") -> int:
    """Weight bytes that engines hold on one GPU, see `held_bytes`."""
    return sum(held_bytes(matrix, precision) for matrix in all_matrices(config, mtp=mtp))


def held_bytes(matrix: Matrix, precision: Precision) -> int:
    """Bytes of a matrix as an engine holds it.

    What is multiplied stays BF16 even where a step gives f32 results: `Bf16Linear` does both (spec §5.3).
    """
    if matrix.held == "f32":
        return 4 * matrix.elements
    return matrix.num_bytes(precision if matrix.held is None else "bf16")
