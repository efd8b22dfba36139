"""What a model family tells the rest of the exporter. Light: what needs torch is imported when it is asked for."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from seekforge.exporter.models.parameters import Parameter, Tensor, joined_name, joins
from seekforge.formats.checkpoint.model_config import LayerKind, ModelConfig

#: How tensor-parallel ranks divide a point: each has heads or columns of its own ("parts"), columns of gate and of up
#: ("pairs"), or a summand of what is added up behind the point ("sum").
Division = Literal["parts", "pairs", "sum"]


@dataclass(frozen=True)
class Taps:
    """Points of a layer that parity looks at, in the order of data; see `program.taps`, which finds them in a graph.

    Attributes:
        attention: points from the norm before the attention to the norm behind it.
        dense, moe: points behind those in a layer of either kind.
        linears: `BlockFp8Linear` by its module: (the point of its input, that of its output).
        norm: the point of a LayerNormalization's result.
        entry_norm, final_norm: the norms that read what layers hand over: that of a layer, and that behind the last.
        per_head: points with an axis of heads.
        required: what every layer's graph shows, or it is not one of the family.
        width: how many values a point has per token, for estimates of memory.
        divided: points that tensor-parallel ranks divide -> how. They have the others alike.
        embedding: the module of the embedding, whose rows ranks may divide.
        dense_output: the module below a layer of the product that a dense MLP ends with, which ranks add up.
    """

    attention: tuple[str, ...]
    dense: tuple[str, ...]
    moe: tuple[str, ...]
    linears: Mapping[str, tuple[str | None, str | None]]
    norm: str
    entry_norm: str
    final_norm: str
    per_head: tuple[str, ...]
    required: frozenset[str]
    width: Callable[[ModelConfig, str], int]
    divided: Mapping[str, Division]
    embedding: str = "embed_tokens"
    dense_output: str = "mlp.down_proj"


@dataclass(frozen=True)
class Family:
    """One model family: a folder beside this file.

    Attributes:
        model_type: value of that key in `config.json`.
        package: dotted name of the folder. `models.weights`, for instance, is `weights` of it: see `module`.
        layer_tensors: tensors of a layer in a checkpoint's order, those of the MTP layer included.
        end_tensors: tensors before the first layer, and those behind the last one.
        layer_parameters: parameters of a layer of a program, by its kind.
        end_parameters: parameters outside layers.
        mtp_parameters: what the MTP module has outside its layer, instead of parameters of that name outside layers.
        codes: kind of weight -> the smallest codes that an int4 engine stores it in, or f32.
        places: what nodes are named after beside modules -> the same in words.
        caches: (model, layer) -> kind of paged cache -> values that one token has in it.
        kv_formats: formats of the caches that engines for GPUs can have, the default first.
        taps: where in a layer parity looks.
    """

    model_type: str
    package: str
    layer_tensors: Callable[[ModelConfig, int], tuple[Tensor, ...]]
    end_tensors: Callable[[ModelConfig], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    layer_parameters: Callable[[LayerKind], tuple[Parameter, ...]]
    end_parameters: Callable[[], tuple[Parameter, ...]]
    mtp_parameters: Callable[[], tuple[Parameter, ...]]
    codes: Mapping[str, str]
    places: Mapping[str, str]
    caches: Callable[[ModelConfig, int], dict[str, int]]
    kv_formats: tuple[Literal["fp8_ds", "bf16"], ...]
    taps: Taps

    def module(self, name: str) -> ModuleType:
        """Import a module of the family's folder, which may need torch."""
        return importlib.import_module(f"{self.package}.{name}")

    def names_before(self, config: ModelConfig) -> set[str]:
        """Return the names of parameters that are read before the first layer."""
        first = {tensor.name for tensor in self.end_tensors(config)[0]}
        return {row.name for row in self.end_parameters() if first.issuperset(row.tensors)}

    def mtp_only(self, config: ModelConfig) -> set[str]:
        """Return the names, below a layer, of tensors that the MTP layer alone has and that are no copies."""
        layer = config.num_hidden_layers
        with_mtp = self.layer_tensors(config.model_copy(update={"num_nextn_predict_layers": 1}), layer)
        without = self.layer_tensors(config.model_copy(update={"num_nextn_predict_layers": 0}), layer)
        return {one.name for one in with_mtp if one.copy_of is None} - {one.name for one in without}

    def mtp_copies(self, config: ModelConfig) -> dict[str, str]:
        """Return the MTP layer's tensors that nothing reads -> those of the main model that they repeat."""
        layer = config.mtp_layer
        if layer is None:
            return {}
        prefix = f"model.layers.{layer}."
        tensors = sorted(self.layer_tensors(config, layer), key=lambda tensor: tensor.name)
        return {prefix + tensor.name: tensor.copy_of for tensor in tensors if tensor.copy_of is not None}

    def words(self) -> dict[str, str]:
        """Return module, below its layer or outside layers -> what it is, for messages."""
        kinds = [LayerKind(*kind) for kind in itertools.product((False, True), repeat=2)]
        tables = [self.layer_parameters(kind) for kind in kinds]
        layers = itertools.chain.from_iterable(tables)
        named = {row.module: row.does for row in (*layers, *self.end_parameters(), *self.mtp_parameters())}
        pairs = (pair for table in tables for pair in joins(table))
        named |= {joined_name(one, other): f"{one.does} and {other.does}" for one, other in pairs}
        return named | dict(self.places)
