"""Which tensors a checkpoint of a given config has: name, dtype, shape (spec §2.2, §2.3), by its family's table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from seekforge.common.dtypes import itemsize
from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import Draw, Tensor, in_order
from seekforge.exporter.models.shared.parameters import ATTENTION
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.weight_recipes.stored import WeightForm, stored_parts

#: A buffer that transformers once saved: what RoPE computes from the config.
_ROTARY = re.compile(rf"model\.(layers\.\d+\.{ATTENTION}\.)?rotary_emb\.inv_freq")
#: Scales that ModelOpt and LLM Compressor fix beforehand for the inputs of products, and for FP8 caches.
_FIXED_SCALE = re.compile(rf"model\.layers\.\d+\.(.*\.input(_global)?_scale|{ATTENTION}\.(\w+\.)?[kv]_scale)")


@dataclass(frozen=True)
class ExpectedTensor:
    """What the config says of one tensor.

    Attributes:
        dtype: our name of the element type.
        shape: sizes, outermost first.
        draw: how random values are drawn.
        copy_of: the main model's tensor that this one of the MTP layer repeats; such a one may be absent.
        form: how the matrix is held whose first tensor it is, of those that programs can have as FP8 blocks; else None.
        matrix: shape of the matrix whose values a tensor holds, or helps to hold.
        part_of: the first tensor of the matrix, for its further ones; else None.
        is_read: whether values hang on it; a tensor that nothing reads may be absent.
    """

    dtype: str
    shape: tuple[int, ...]
    draw: Draw = field(default="blocks", compare=False)
    copy_of: str | None = field(default=None, compare=False)
    form: WeightForm | None = field(default=None, compare=False)
    matrix: tuple[int, ...] | None = field(default=None, compare=False)
    part_of: str | None = field(default=None, compare=False)
    is_read: bool = field(default=True, compare=False)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model that it holds; 0 for scales."""
        return 0 if self.part_of is not None else math.prod(self.matrix or self.shape)

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return self.num_elements * itemsize(self.dtype)


@dataclass(frozen=True)
class Totals:
    """Sizes of a checkpoint (spec §2.4).

    Attributes:
        num_tensors: tensors, scales included.
        num_parameters: elements, scales not included.
        num_bytes: bytes of tensor data, scales included, headers not.
    """

    num_tensors: int
    num_parameters: int
    num_bytes: int


def expected_tensors(config: ModelConfig) -> dict[str, ExpectedTensor]:
    """Return every tensor of a checkpoint of `config`, in layer order; a weight's scale follows it.

    Returns:
        Tensor name -> dtype and shape: `embed_tokens`, layers 0 … num_hidden_layers - 1, the final norm and
        `lm_head`, and the MTP layer with its copies of embedding and head when the config has one.
    """
    return dict(_all(config))


def needless_tensors(names: Iterable[str]) -> dict[str, str]:
    """Return those of `names` that hold nothing of a model, with the reason."""
    reasons = {
        _ROTARY: "left over: RoPE is computed from config.json",
        _FIXED_SCALE: "scales of activations or caches, which round nothing here",
    }
    return {name: why for name in names for pattern, why in reasons.items() if pattern.fullmatch(name)}


def totals(tensors: dict[str, ExpectedTensor]) -> Totals:
    """Add up `tensors`."""
    return Totals(
        num_tensors=len(tensors),
        num_parameters=sum(tensor.num_parameters for tensor in tensors.values()),
        num_bytes=sum(t.num_bytes for t in tensors.values()),
    )


def _all(config: ModelConfig) -> Iterator[tuple[str, ExpectedTensor]]:
    family = family_of(config)
    first, last = family.end_tensors(config)
    pieces: list[tuple[str, tuple[Tensor, ...]]] = [("", first)]
    pieces += [(f"model.layers.{i}.", family.layer_tensors(config, i)) for i in range(config.num_hidden_layers)]
    pieces.append(("", last))
    if config.mtp_layer is not None:
        pieces.append((f"model.layers.{config.mtp_layer}.", family.layer_tensors(config, config.mtp_layer)))
    for prefix, tensors in pieces:
        for name, tensor in in_order(tensors, prefix):
            if tensor.dtype != "f8e4m3":
                yield name, ExpectedTensor(tensor.dtype, tensor.shape, tensor.draw, tensor.copy_of)
                continue
            form = config.weight_form(name)
            first, *others = stored_parts(form, name, tensor.shape)
            yield first.name, ExpectedTensor(first.dtype, first.shape, tensor.draw, form=form, matrix=tensor.shape)
            for part in others:
                yield (
                    part.name,
                    ExpectedTensor(part.dtype, part.shape, part_of=first.name, is_read=part.is_read),
                )
