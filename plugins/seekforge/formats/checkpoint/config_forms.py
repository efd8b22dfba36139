"""The forms in which `config.json` of one and the same model is written, brought to the plain one.

transformers 5 writes other keys than the released checkpoint (`rope_parameters` for `rope_scaling` and `rope_theta`,
`mlp_layer_types` beside `first_k_dense_replace`), `null` where nothing is said, and leaves out what its own class has
fixed. What says the same is read as the same. What says something else is refused by its own name, since a key that
is passed over in silence would give wrong text.

Sources: transformers 5.24, models/deepseek_v32/configuration_deepseek_v32.py (`DeepseekV32Config`),
modeling_rope_utils.py (`_compute_yarn_parameters`: defaults of beta_fast and beta_slow); the modeling
code of deepseek-ai/DeepSeek-V3 (`DeepseekV3YarnRotaryEmbedding`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from seekforge.common.errors import ConfigError
from seekforge.formats.checkpoint.quantization_forms import plain_quantization

#: What every model of this type has, and transformers 5 therefore does not write of a model that it made itself.
_FIXED: Final[dict[str, Any]] = {
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}
#: What null says of a key that has a value for nothing.
_NOTHING: Final[dict[str, Any]] = {"num_nextn_predict_layers": 0}
_ARCHITECTURES: Final = {
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}
#: `model_type` of models that are of another type by their architecture -> that type.
TYPE_ALIASES: Final = {"kimi_k2": "deepseek_v3"}
#: Other names of a key, as transformers' class knows them.
_ALIASES: Final = {"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"}
_ROPE_KEYS: Final = (
    "type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
)  # fmt: skip


def plain_form(raw: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a decoded `config.json` in the plain form: the keys of the released checkpoint.

    Args:
        raw: the decoded JSON, of a `model_type` that is known.
        origin: what to call it in an error.

    Returns:
        The plain form, and a sentence for each thing that was taken for granted and could be of interest.

    Raises:
        ConfigError: two keys contradict each other, or one asks for what this project does not compute.
    """
    config = dict(raw)
    notes: list[str] = []
    _type(config, origin, notes)
    for alias, key in _ALIASES.items():
        _same(config, alias, key, origin)
    _layer_types(config, origin)
    if config.get("mlp_bias", False):
        raise ConfigError(f"{origin}: mlp_bias is {config['mlp_bias']!r}, expected false: DeepSeek-V3.2 has no biases")
    if config.get("rope_parameters") is not None:  # written by transformers 5
        config.setdefault("architectures", [_ARCHITECTURES[config["model_type"]]])
        for key, value in _FIXED.items():
            config.setdefault(key, value)
    for key, value in _NOTHING.items():
        if key in config and config[key] is None:
            config[key] = value
    if config.get("architectures", ...) is None:
        config["architectures"] = [_ARCHITECTURES[config["model_type"]]]
    if config["model_type"] == "glm_moe_dsa":
        config.setdefault("bos_token_id", 0)  # as its class has it: the released file has none, and no text begins so
        config["indexer_types"] = _indexer_types(config, origin)
    _rope(config, origin)
    _one_of(config, "eos_token_id")
    quantization, more = plain_quantization(config, origin)
    config["quantization_config"] = quantization
    notes += more
    return config, tuple(notes)


def _type(config: dict[str, Any], origin: str, notes: list[str]) -> None:
    """Take a model of another name for what its architecture says it is."""
    name, architectures = config["model_type"], config.get("architectures")
    if name not in TYPE_ALIASES:
        return
    expected = [_ARCHITECTURES[TYPE_ALIASES[name]]]
    if architectures != expected:
        raise ConfigError(
            f"{origin}: model_type is {name!r} and architectures {architectures!r:.100}, expected {expected}: models "
            "of that type are read where they are DeepSeek-V3 by another name"
        )
    config["model_type"] = TYPE_ALIASES[name]
    notes.append(f"model_type {name!r} is read as {TYPE_ALIASES[name]!r}, which it is by its architectures")


def _same(config: dict[str, Any], alias: str, key: str, origin: str) -> None:
    """Move `alias` to `key`; both are fine where they agree."""
    value = config.pop(alias, None)
    if value is None:
        return
    if config.setdefault(key, value) != value:
        raise ConfigError(
            f"{origin}: {alias} is {value!r} and {key} is {config[key]!r}, two names of one thing; leave one out"
        )


def _one_of(config: dict[str, Any], key: str) -> None:
    """Take the only value of a list of one."""
    value = config.get(key)
    if isinstance(value, list) and len(value) == 1:
        config[key] = value[0]


def _indexer_types(config: Mapping[str, Any], origin: str) -> Any:
    """Return for each layer whether it chooses keys itself (`full`) or shares an earlier choice (`shared`).

    GLM-5.2 lists it; before that it was said by a pattern, or by a frequency with an offset, and GLM-5 says nothing:
    every layer chooses. Source: transformers 5.24, models/glm_moe_dsa/configuration_glm_moe_dsa.py.
    """
    stated, pattern = config.get("indexer_types"), config.get("index_topk_pattern")
    layers = config.get("num_hidden_layers")
    if stated is not None or type(layers) is not int:
        return stated
    words = {"F": "full", "S": "shared", "full": "full", "shared": "shared"}
    if pattern is not None:
        if not isinstance(pattern, str | list) or not all(isinstance(one, str) and one in words for one in pattern):
            raise ConfigError(f"{origin}: index_topk_pattern is {pattern!r:.60}, expected an F or S for each layer")
        return [words[one] for one in pattern]
    frequency, offset = config.get("index_topk_freq") or 1, config.get("index_skip_topk_offset", 2)
    if type(frequency) is not int or type(offset) is not int or frequency < 1:
        raise ConfigError(
            f"{origin}: index_topk_freq is {frequency!r:.60} and index_skip_topk_offset {offset!r:.60}, expected whole "
            "numbers, the first at least 1"
        )
    return ["shared" if max(layer - offset + 1, 0) % frequency else "full" for layer in range(layers)]


def _layer_types(config: dict[str, Any], origin: str) -> None:
    """Compare the lists of layers that transformers writes with what a DeepSeek-V3.2 is."""
    attention = config.pop("layer_types", None)
    if isinstance(attention, list):
        other = next((kind for kind in attention if kind != "indexed_attention"), None)
        if other is not None:
            raise ConfigError(f"{origin}: layer_types has {other!r}, expected indexed_attention in every layer")
    mlps, layers = config.pop("mlp_layer_types", None), config.get("num_hidden_layers")
    if not isinstance(mlps, list):
        return
    dense = next((number for number, kind in enumerate(mlps) if kind != "dense"), len(mlps))
    if any(kind != "sparse" for kind in mlps[dense:]) or (type(layers) is int and len(mlps) != layers):
        raise ConfigError(
            f"{origin}: mlp_layer_types is no run of dense layers with sparse ones behind it, one for each of the "
            f"{layers} layers; DeepSeek-V3.2 has only such"
        )
    first = config.setdefault("first_k_dense_replace", dense)
    if type(first) is int and min(first, len(mlps)) != dense:
        raise ConfigError(
            f"{origin}: mlp_layer_types begins with {dense} dense layers and first_k_dense_replace is {first}, two "
            "names of one thing; leave one of them out"
        )


# --- rotary embedding -----------------------------------------------------------------------------------------


def _rope(config: dict[str, Any], origin: str) -> None:
    """Bring `rope_parameters`, or the names within `rope_scaling`, to `rope_scaling` and `rope_theta`."""
    parameters, scaling = config.pop("rope_parameters", None), config.get("rope_scaling")
    if parameters is None and scaling is None:
        if "rope_scaling" in config:  # null: there is none
            config["rope_scaling"] = _no_scaling(config)
        return
    for key, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{origin}: {key} is {value!r}, expected an object with type, factor, ...")
        if value and all(isinstance(part, dict) for part in value.values()):
            raise ConfigError(
                f"{origin}: {key} has one entry for each kind of layer ({', '.join(sorted(value))}), expected one for "
                "all: DeepSeek-V3.2 has one kind"
            )
    first, second = (_rope_form(value, origin) for value in (parameters, scaling))
    for key in first.keys() & second.keys():
        if first[key] != second[key]:
            raise ConfigError(
                f"{origin}: rope_parameters.{key} is {first[key]!r} and rope_scaling.{key} is {second[key]!r}, two "
                "names of one thing; leave one of them out"
            )
    rope = first | second
    if "rope_theta" in rope:
        theta = rope.pop("rope_theta")
        if config.setdefault("rope_theta", theta) != theta:
            raise ConfigError(
                f"{origin}: rope_theta is {config['rope_theta']!r} and rope_parameters.rope_theta {theta!r}, two names "
                "of one thing; leave one of them out"
            )
    if rope.get("type") == "default":
        scaled = next((key for key in ("factor", "mscale", "mscale_all_dim") if rope.get(key, 1) != 1), None)
        if scaled is not None:
            raise ConfigError(
                f"{origin}: rope_scaling has {scaled} {rope[scaled]!r} and the type default, which scales nothing; "
                'write "type": "yarn" if it is YaRN'
            )
        config["rope_scaling"] = _no_scaling(config)
        return
    config["rope_scaling"] = _yarn(rope, config, origin)


def _no_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Plain RoPE, as the YaRN of factor 1 that it is."""
    return {
        "type": "yarn",
        "factor": 1,
        "original_max_position_embeddings": config.get("max_position_embeddings", 1),
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1,
        "mscale_all_dim": 1,
    }


def _rope_form(value: Mapping[str, Any] | None, origin: str) -> dict[str, Any]:
    rope = {key: item for key, item in (value or {}).items() if item is not None}
    _same(rope, "rope_type", "type", f"{origin}: in rope_scaling")
    return rope


def _yarn(rope: dict[str, Any], config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return what of YaRN is computed; what would change it otherwise is refused."""
    rope.setdefault("beta_fast", 32)
    rope.setdefault("beta_slow", 1)
    if rope.get("truncate", True) is not True:
        raise ConfigError(
            f"{origin}: rope_scaling.truncate is {rope['truncate']!r}, expected true or absent: DeepSeek's YaRN rounds "
            "the ends of its ramp"
        )
    partial = rope.get("partial_rotary_factor", 1)
    if partial not in (1, _ratio(config)):
        raise ConfigError(
            f"{origin}: rope_scaling.partial_rotary_factor is {partial!r}, expected it absent: qk_rope_head_dim says "
            "what is rotated"
        )
    if "attention_factor" in rope:
        stated, computed = rope["attention_factor"], _magnitude(rope)
        if computed is not None and stated != computed:
            raise ConfigError(
                f"{origin}: rope_scaling.attention_factor is {stated!r}, expected it absent, or {computed!r} as "
                "mscale and mscale_all_dim give it"
            )
    return {key: rope[key] for key in _ROPE_KEYS if key in rope}


def _ratio(config: Mapping[str, Any]) -> float | None:
    """What part of a head is rotated."""
    nope, rope = config.get("qk_nope_head_dim"), config.get("qk_rope_head_dim")
    if type(nope) is not int or type(rope) is not int or nope + rope <= 0:
        return None
    return rope / (nope + rope)


def _magnitude(rope: Mapping[str, Any]) -> float | None:
    """The factor on cosines and sines that mscale and mscale_all_dim give; None: they are not numbers."""
    values = [rope.get(key) for key in ("factor", "mscale", "mscale_all_dim")]
    if not all(type(value) in (int, float) for value in values):
        return None
    factor, mscale, mscale_all_dim = (float(value or 0) for value in values)
    if factor <= 1:
        return 1.0
    first, second = (0.1 * weight * math.log(factor) + 1.0 for weight in (mscale, mscale_all_dim))
    return first / second if second else None
