"""What each operator can do on which hardware: refused with a sentence before any work, and listed for the docs.

Limits of the plugin are those that the kernels are cut for; limits of the inlined form are TensorRT's. Only plain
values are compared, so that export, build and documentation read one table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, Literal

from seekforge.plugins.formats.model_config import ModelConfig

#: How an operator runs: as a plugin, or as standard operators in its place.
Face = Literal["plugin", "inlined"]

#: The operators of a layer, in the order in which it uses them.
OPS: Final = ("BlockFp8Linear", "DsaCacheWrite", "DsaIndexer", "DsaAttention", "MoeRoute", "MoeExperts")
#: The first SM that multiplies in FP8.
FP8_SM: Final = 89


@dataclass(frozen=True)
class Limit:
    """A condition on the model's config.

    Attributes:
        op: ONNX op_type.
        faces: where it holds.
        key: key of config.json.
        accepts: whether a value is fine.
        expected: in words.
    """

    op: str
    faces: tuple[Face, ...]
    key: str
    accepts: Callable[[int], bool]
    expected: str


def _at_most(limit: int) -> tuple[Callable[[int], bool], str]:
    return (lambda value: value <= limit), f"at most {limit}"


def _multiple(factor: int) -> tuple[Callable[[int], bool], str]:
    return (lambda value: value % factor == 0), f"a multiple of {factor}"


LIMITS: Final[tuple[Limit, ...]] = (
    Limit("BlockFp8Linear", ("plugin", "inlined"), "hidden_size", *_multiple(128)),
    Limit("DsaCacheWrite", ("plugin",), "kv_lora_rank", *_multiple(128)),
    Limit("DsaIndexer", ("plugin",), "index_topk", *_at_most(2048)),
    Limit("DsaIndexer", ("inlined",), "index_topk", *_at_most(3840)),  # TensorRT's TopK
    Limit("DsaIndexer", ("plugin",), "index_n_heads", *_multiple(16)),
    Limit("DsaAttention", ("plugin",), "kv_lora_rank", *_multiple(128)),
    Limit("DsaAttention", ("plugin",), "qk_rope_head_dim", *_multiple(16)),
    Limit("MoeRoute", ("plugin",), "n_routed_experts", *_at_most(512)),
    Limit("MoeRoute", ("plugin",), "num_experts_per_tok", *_at_most(16)),
    Limit("MoeExperts", ("plugin",), "num_experts_per_tok", *_at_most(16)),
    Limit("MoeExperts", ("plugin", "inlined"), "moe_intermediate_size", *_multiple(128)),
)


def refusals(config: ModelConfig, *, plugins: Collection[str], ops: Collection[str]) -> list[str]:
    """Return one sentence for every limit that a model breaks; none: it can be built.

    Args:
        config: of the model.
        plugins: op_types that run as plugins; the other `ops` are inlined.
        ops: op_types of the program.
    """
    found = []
    for limit in LIMITS:
        face: Face = "plugin" if limit.op in plugins else "inlined"
        value = getattr(config, limit.key)
        if limit.op in ops and face in limit.faces and not limit.accepts(value):
            form = "as a plugin" if face == "plugin" else "inlined"
            found.append(f"{limit.op} {form} takes {limit.key} {limit.expected}, the model has {value}")
    return found


def support(op: str, sm: int | None) -> str:
    """Say in a few words how an operator runs on an SM; None is a CPU."""
    if sm is None:
        return "f32, inlined"
    if op not in ("BlockFp8Linear", "MoeExperts"):
        return "plugin or inlined (f32)" if op in ("DsaIndexer", "DsaAttention") else "plugin or inlined"
    products = "FP8 products" if sm >= FP8_SM else "FP8 weights, BF16 products"
    return f"plugin: {products}; inlined: BF16 products"
