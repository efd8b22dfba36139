"""`quantization_config`: in which form a checkpoint holds its weights, by the words of whoever wrote it.

DeepSeek's own is brought to its plain form. ModelOpt's and LLM Compressor's are reduced to what decides how weights
are read: a form (`weight_recipes.stored.WeightForm`), and the modules that it leaves in BF16. What cannot be read
exactly is refused by its name. None at all means BF16.

Sources: transformers 5.24, utils/quantization_config.py (`FineGrainedFP8Config`); NVIDIA TensorRT Model Optimizer,
unified Hugging Face export (`quant_algo`, `exclude_modules`); vllm-project/compressed-tensors, `QuantizationConfig`
and `QuantizationArgs` (`config_groups`, `strategy`, `ignore`).
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from seekforge.common.errors import ConfigError
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.quantization.nvfp4 import BLOCK as NVFP4_BLOCK

#: Who writes other quantized formats, by `quant_method`.
_OTHERS: Final = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fbgemm_fp8": "FBGEMM",
    "gptq": "GPTQ",
    "mxfp4": "MXFP4",
    "quark": "AMD Quark",
    "torchao": "torchao",
}
#: Where a checkpoint is that seekforge reads; said where a file itself cannot be mended.
TAKE: Final = "take a checkpoint in DeepSeek's own FP8 format, such as deepseek-ai/DeepSeek-V3.2, or one in BF16"
#: Where ModelOpt says it, where config.json does not.
MODELOPT_FILE: Final = "hf_quant_config.json"
#: Where config.json says it; LLM Compressor once called it otherwise.
_KEYS: Final = ("quantization_config", "compression_config")
#: `quant_algo` of ModelOpt -> form.
_MODELOPT: Final = {"NVFP4": "nvfp4", "FP8": "fp8_tensor"}
_MOST_PATTERNS: Final = 4096
#: Of a regular expression: letters that stand for themselves, a dot, escaped or not, and any run of characters.
_PLAIN_EXPRESSION: Final = re.compile(r"\^?(?:[A-Za-z0-9_]|\\\.|\.\*|\.)*\$?")


def says_nothing_of_weights(config: Mapping[str, Any]) -> bool:
    """Whether a decoded config.json leaves it to `MODELOPT_FILE`, or to BF16, how weights are held."""
    return all(config.get(key) is None for key in _KEYS)


def plain_quantization(config: Mapping[str, Any], origin: str) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return `quantization_config` in its plain form, None for BF16 weights; and what was taken for granted.

    Args:
        config: the decoded `config.json`.
        origin: what to call it in an error.

    Raises:
        ConfigError: it is malformed, or of a form that is not read.
    """
    quantization = next((config[key] for key in _KEYS if config.get(key) is not None), None)
    if quantization is None:
        return None, ()
    if not isinstance(quantization, dict):
        raise ConfigError(
            f"{origin}: quantization_config is {quantization!r}, expected an object with quant_method, ..."
        )
    form = {key: value for key, value in quantization.items() if value is not None}
    inner = form.get("quantization")
    algorithm = inner.get("quant_algo") if isinstance(inner, dict) else form.get("quant_algo")
    method = str(form.get("quant_method", algorithm)).lower()
    if "form" in form and method in ("modelopt", "compressed-tensors"):  # ours, as program.json has it
        return form, ()
    if method in ("modelopt", "modelopt_fp4") or ("quant_method" not in form and algorithm is not None):
        return _modelopt(form, origin)
    if method == "compressed-tensors":
        return _compressed_tensors(form, origin)
    return _fp8(form, origin)


def _stored(method: str, form: str, ignore: Any, origin: str, key: str) -> dict[str, Any]:
    if not isinstance(ignore, list) or not all(isinstance(one, str) and one for one in ignore):
        raise ConfigError(f"{origin}: quantization_config.{key} is {ignore!r:.100}, expected a list of names")
    if len(ignore) > _MOST_PATTERNS or any(len(one) > 300 for one in ignore):
        raise ConfigError(
            f"{origin}: quantization_config.{key} has {len(ignore):,} names, expected at most {_MOST_PATTERNS:,} of at "
            "most 300 letters"
        )
    return {"quant_method": method, "form": form, "ignore": [_pattern(one, origin, key) for one in ignore]}


def _pattern(name: str, origin: str, key: str) -> str:
    """Return a name, or an expression (`re:…`), as a pattern in which `*` is any run of characters."""
    if not name.startswith("re:"):
        return name
    expression = name.removeprefix("re:")
    if not _PLAIN_EXPRESSION.fullmatch(expression):
        raise ConfigError(
            f"{origin}: quantization_config.{key} has {name!r:.100}, expected names, or expressions of letters, dots "
            "and .*"
        )
    body = expression.removeprefix("^").removesuffix("$").replace(".*", "*").replace("\\.", ".")
    return body if expression.endswith("$") or body.endswith("*") else f"{body}*"


def leaves_out(ignore: Sequence[str], module: str) -> bool:
    """Whether one of the patterns `ignore` names a module, or one that it belongs to."""
    return bool(ignore) and _matcher(tuple(ignore)).match(module) is not None


@functools.lru_cache(maxsize=64)
def _matcher(ignore: tuple[str, ...]) -> re.Pattern[str]:
    bodies = [fnmatch.translate(one).removesuffix(r"\Z").removesuffix(r"\z") for one in ignore]
    return re.compile("(?:" + "|".join(bodies) + r")(?:\..*)?\Z")


def _modelopt(form: dict[str, Any], origin: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    inner = form.get("quantization")
    said = form | inner if isinstance(inner, dict) else form  # hf_quant_config.json has it one level down
    algorithm = said.get("quant_algo")
    stored = _MODELOPT.get(algorithm) if isinstance(algorithm, str) else None
    if stored is None:
        raise ConfigError(
            f"{origin}: quantization_config.quant_algo is {algorithm!r:.60} (NVIDIA ModelOpt), expected "
            f"{' or '.join(map(repr, _MODELOPT))}; {TAKE}"
        )
    size = said.get("group_size", NVFP4_BLOCK)
    if stored == "nvfp4" and size != NVFP4_BLOCK:
        raise ConfigError(f"{origin}: quantization_config.group_size is {size!r:.60}, expected {NVFP4_BLOCK}; {TAKE}")
    key = "exclude_modules" if "exclude_modules" in said else "ignore"
    return _stored("modelopt", stored, said.get(key, []), origin, key), (_UNROUNDED,)


_UNROUNDED: Final = (
    "quantization_config: values of weights are read exactly; scales of activations and caches are passed over, since "
    "nothing rounds activations here (numerics exact, bf16)"
)


def _compressed_tensors(form: dict[str, Any], origin: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    for key in ("transform_config", "sparsity_config"):
        said = form.get(key)
        if said and not (isinstance(said, dict) and said.get("format") == "dense"):
            raise ConfigError(
                f"{origin}: quantization_config.{key} is {said!r:.100}, expected none: weights that were rotated or "
                f"packed sparsely are not what their tensors say; {TAKE}"
            )
    groups = form.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(group := next(iter(groups.values())), dict):
        raise ConfigError(
            f"{origin}: quantization_config.config_groups is {groups!r:.100}, expected one group for all matrices "
            "(LLM Compressor)"
        )
    targets = group.get("targets")
    if targets != ["Linear"]:
        raise ConfigError(
            f"{origin}: quantization_config.config_groups targets {targets!r:.100}, expected ['Linear'] and the "
            "exceptions in ignore"
        )
    weights = group.get("weights")
    said = {key: value for key, value in (weights if isinstance(weights, dict) else {}).items() if value is not None}
    kind = (said.get("type"), said.get("num_bits"), said.get("strategy"))
    forms: dict[tuple[object, ...], str] = {
        ("float", 8, "block"): "ct_fp8_blocks",
        ("float", 8, "channel"): "ct_fp8_channel",
        ("float", 8, "tensor"): "ct_fp8_tensor",
        ("float", 4, "tensor_group"): "ct_nvfp4",
    }
    stored = forms.get(kind) if all(isinstance(one, str | int) for one in kind) else None
    block, size = said.get("block_structure"), said.get("group_size", NVFP4_BLOCK)
    if stored is None or said.get("symmetric", True) is not True:
        raise ConfigError(
            f"{origin}: quantization_config (compressed-tensors) has weights of type {kind[0]!r:.40} with "
            f"{kind[1]!r:.40} bits by {kind[2]!r:.40}, expected float with 8 bits by block, channel or tensor, or with "
            f"4 by tensor_group; {TAKE}"
        )
    if stored == "ct_fp8_blocks" and block not in ([FP8_BLOCK, FP8_BLOCK], f"{FP8_BLOCK}x{FP8_BLOCK}"):
        raise ConfigError(
            f"{origin}: quantization_config.block_structure is {block!r:.60}, expected {[FP8_BLOCK, FP8_BLOCK]}; {TAKE}"
        )
    if stored == "ct_nvfp4" and size != NVFP4_BLOCK:
        raise ConfigError(f"{origin}: quantization_config.group_size is {size!r:.60}, expected {NVFP4_BLOCK}; {TAKE}")
    note = () if stored == "ct_fp8_blocks" else (_UNROUNDED,)
    return _stored("compressed-tensors", stored, form.get("ignore", []), origin, "ignore"), note


def _fp8(form: dict[str, Any], origin: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Complete DeepSeek's format; refuse other ones by their names."""
    notes: list[str] = []
    method = form.get("quant_method", form.get("quant_algo"))
    if method != "fp8":
        who = _OTHERS.get(str(method).lower())
        raise ConfigError(
            f"{origin}: quantization_config.quant_method is {method!r}{f' ({who})' if who else ''}, expected 'fp8' "
            f"with {FP8_BLOCK}×{FP8_BLOCK} blocks; {TAKE}"
        )
    expert = form.get("expert_dtype", "fp8")
    if expert != "fp8":
        raise ConfigError(f"{origin}: quantization_config.expert_dtype is {expert!r}, expected 'fp8'; {TAKE}")
    block = form.get("weight_block_size")
    if not isinstance(block, list | tuple) or list(block) != [FP8_BLOCK, FP8_BLOCK]:
        whole = "no weight_block_size (one scale for a whole matrix)"
        raise ConfigError(
            f"{origin}: quantization_config has {whole if block is None else f'weight_block_size {block!r}'}, expected "
            f"{[FP8_BLOCK, FP8_BLOCK]}; {TAKE}"
        )
    scheme = form.setdefault("activation_scheme", "dynamic")
    if scheme != "dynamic":
        raise ConfigError(
            f"{origin}: quantization_config.activation_scheme is {scheme!r} (scales of activations fixed beforehand), "
            f"expected 'dynamic'; {TAKE}"
        )
    form.setdefault("fmt", "e4m3")
    if form["fmt"] != "e4m3":
        raise ConfigError(f"{origin}: quantization_config.fmt is {form['fmt']!r}, expected 'e4m3'; {TAKE}")
    scales = form.get("scale_fmt")
    if scales in (None, "float"):
        said = "is absent" if scales is None else "is 'float'"
        notes.append(
            f"quantization_config.scale_fmt {said}: scales of weights are read as they are, and those of activations "
            "are powers of two (ue8m0), as in every DeepSeek-V3.2 and DeepSeek-V3.1"
        )
        form["scale_fmt"] = "ue8m0"
    elif scales != "ue8m0":
        raise ConfigError(f"{origin}: quantization_config.scale_fmt is {scales!r}, expected 'ue8m0'; {TAKE}")
    keys = ("quant_method", "fmt", "weight_block_size", "activation_scheme", "scale_fmt")
    return {key: form[key] for key in keys}, tuple(notes)
