"""Which layouts a model can have: what must divide, read off its family's table of parameters.

`plan`, `export` and whatever follows ask here, so that what one proposes the other takes. No torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from seekforge.common.errors import ConfigError
from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import Tensor
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.parallelism import Parallelism


def check_parallelism(config: ModelConfig, parallelism: Parallelism) -> None:
    """Compare a layout with the sizes of a model.

    Raises:
        ConfigError: something does not divide; it says what, and the nearest sizes that do.
    """
    fault = fault_of(config, parallelism)
    if fault is not None:
        raise ConfigError(f"{parallelism.options}: {fault}; {_remedy(config, parallelism)}")


def fault_of(config: ModelConfig, parallelism: Parallelism) -> str | None:
    """Return why a model cannot be laid out so, or None.

    Heads and columns are cut into equal parts, and FP8 matrices between their blocks of 128x128 only. Where there is
    one rank nothing is cut, and nothing has to divide.
    """
    tp, pp = parallelism.tp, parallelism.pp
    if pp > config.num_hidden_layers:
        return f"num_hidden_layers is {config.num_hidden_layers}, expected a layer for each of {pp} stages"
    if tp == 1:
        return "there is one rank to deal experts out to" if parallelism.ep else None
    return _fault(config, tp, parallelism.ep)  # pyright: ignore[reportArgumentType] - frozen, so hashable


def whole_vocabulary(config: ModelConfig, parallelism: Parallelism) -> str | None:
    """Return the sentence that says that each rank has embedding and head whole, where they cannot be divided."""
    if parallelism.tp == 1 or parallelism.divides_vocabulary(config):
        return None
    return (
        f"vocab_size is {config.vocab_size}, which {parallelism.tp} ranks do not divide into equal parts: each has "
        "embedding and head whole"
    )


@functools.lru_cache(maxsize=4096)
def _fault(config: ModelConfig, tp: int, ep: bool) -> str | None:
    return next((fault for tensor in _divided(config) if (fault := _fault_of_tensor(tensor, tp, ep))), None)


def _divided(config: ModelConfig) -> Iterator[Tensor]:
    """Yield the tensors that ranks divide: of the ends, and of a layer of each kind."""
    family = family_of(config)
    kinds = {config.layer_kind(layer): layer for layer in range(config.num_hidden_layers)}
    layers = [family.layer_tensors(config, layer) for layer in kinds.values()]
    for tensors in (*family.end_tensors(config), *layers):
        yield from (tensor for tensor in tensors if tensor.sharding != "none")


def _fault_of_tensor(tensor: Tensor, tp: int, ep: bool) -> str | None:
    """Return why `tp` ranks cannot divide a tensor, or None."""
    if tensor.sharding == "vocabulary":
        return None
    if tensor.sharding == "experts" and ep:
        if tensor.count % tp:
            return f"n_routed_experts is {tensor.count}, expected equally many for each of {tp} ranks"
        return None
    assert tensor.axis is not None
    if tensor.units % tp:
        return f"{tensor.units_key} is {tensor.units}, expected equal parts for {tp} ranks"
    size = tensor.shape[tensor.axis]
    if tensor.dtype == "f8e4m3" and tensor.held is None and size % (tp * FP8_BLOCK):
        blocks = f"whole blocks of {FP8_BLOCK} {'rows' if tensor.axis == 0 else 'columns'}"
        return f"{tensor.units_key} is {tensor.units}, expected equal parts for {tp} ranks in {blocks} ({size} in all)"
    return None


def _remedy(config: ModelConfig, parallelism: Parallelism) -> str:
    """Say which layouts next to one that is refused a model can have."""
    tp, pp, ep = parallelism.tp, parallelism.pp, parallelism.ep
    if pp > config.num_hidden_layers:
        return f"pass --pp {config.num_hidden_layers} at most"
    fitting = [n for n in range(2, config.num_attention_heads + 1) if _fault(config, n, ep) is None]  # pyright: ignore[reportArgumentType]
    if not fitting:
        return f"this model runs on one rank of a stage only: leave out --tp{' and --ep' if ep else ''}"
    nearest = [max((n for n in fitting if n < tp), default=None), min((n for n in fitting if n > tp), default=None)]
    return "pass " + " or ".join(f"--tp {n}" for n in nearest if n is not None)
