"""The operations of a layer of DeepSeek-V3 (see `models.shared.layer_operations`)."""

from __future__ import annotations

from seekforge.exporter.models.shared import latent_operations
from seekforge.exporter.models.shared.layer_operations import LayerModule, LayerState, Op, Values
from seekforge.exporter.models.shared.mlp_operations import mlp_operations
from seekforge.plugins.mla_attention.reference import mla_attention
from seekforge.plugins.mla_cache_write.reference import mla_cache_write


def cached(owner: LayerModule) -> tuple[str, ...]:
    """Return the points that `write_cache` reads."""
    return ("kv_latent", "k_pe")


def before_cache(owner: LayerModule, state: LayerState) -> list[Op]:
    """Return the operations up to the cache write."""
    return latent_operations.before_cache(owner, state)


def write_cache(owner: LayerModule, state: LayerState, values: Values) -> None:
    """Put this step's rows into the cache of `state`."""
    state.caches["latent_cache"] = mla_cache_write(
        state.caches["latent_cache"],
        values["kv_latent"],
        values["k_pe"],
        state.step.slot_mapping,
        owner.settings.cache_dtype_name,
        False,
    )


def behind_cache(owner: LayerModule, state: LayerState) -> list[Op]:
    """Return the operations behind the cache write: attention and MLP."""
    step = state.step
    return [
        Op(
            "self_attn (attention)",
            "softmax over all keys up to the token",
            ("q_latent", "q_pe"),
            "o_latent",
            lambda v: mla_attention(
                v["q_latent"],
                v["q_pe"],
                state.caches["latent_cache"],
                step.block_table,
                step.positions,
                owner.config.softmax_scale,
                owner.settings.cache_dtype_name,
            ),
        ),
        *latent_operations.output(owner),
        *mlp_operations(owner, state),
    ]
