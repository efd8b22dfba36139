"""`config.json` of a checkpoint: read, checked key by key, frozen.

The keys are the checkpoint's own words (spec §1.1). A key that is missing, of the wrong type or of a
value that this project does not compute is refused by name: a wrong constant would give wrong text.
"""

# pyright: reportIncompatibleVariableOverride=false, reportGeneralTypeIssues=false
# A kind of config narrows what keys may be; the records are frozen, so nothing else can be assigned.

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from seekforge.common.errors import ConfigError
from seekforge.common.reading import is_there, read_json
from seekforge.common.records import MISSING, OpenRecord, Positive, Record, RecordError, Size, above_zero, finite
from seekforge.formats.checkpoint.config_forms import TYPE_ALIASES, plain_form
from seekforge.formats.checkpoint.quantization_forms import (
    MODELOPT_FILE,
    leaves_out,
    plain_quantization,
    says_nothing_of_weights,
)
from seekforge.formats.numerics import FP8_BLOCK, Numerics
from seekforge.formats.weight_recipes.stored import WeightForm

Factor = Annotated[float, above_zero()]


def _at_least_one(value: float) -> float:
    if value < 1:
        raise RecordError(f"is {value}, expected at least 1")
    return value


def _blocks(value: tuple[int, int]) -> tuple[int, int]:
    if value != (FP8_BLOCK, FP8_BLOCK):
        raise RecordError(f"is {list(value)}, expected {[FP8_BLOCK, FP8_BLOCK]}")
    return value


class RopeScaling(Record):
    """YaRN parameters (spec §3.2)."""

    type: Literal["yarn"]
    factor: Annotated[float, finite, _at_least_one]
    original_max_position_embeddings: Positive
    beta_fast: Factor
    beta_slow: Factor
    mscale: Annotated[float, finite]
    mscale_all_dim: Annotated[float, finite]


class QuantizationConfig(Record):
    """How weights are stored and activations quantized (spec §5)."""

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"]
    weight_block_size: Annotated[tuple[int, int], _blocks]
    activation_scheme: Literal["dynamic"]
    scale_fmt: Literal["ue8m0"]


class StoredWeights(Record):
    """The form of matrices that were quantized by ModelOpt or LLM Compressor (spec §2.7).

    Attributes:
        quant_method: whose form it is.
        form: how matrices are held.
        ignore: modules that are BF16; `*` stands for any run of characters.
    """

    quant_method: Literal["modelopt", "compressed-tensors"]
    form: Literal["nvfp4", "fp8_tensor", "ct_fp8_blocks", "ct_fp8_channel", "ct_fp8_tensor", "ct_nvfp4"]
    ignore: tuple[str, ...]


#: Far more than any model has; each is some names of tensors, which are listed before a checkpoint is looked at.
_MOST_LAYERS: Final = 1000
_MOST_EXPERTS: Final = 200_000


class LayerKind(NamedTuple):
    """What layers of one model can differ in: whether it has routed experts, and an indexer of its own."""

    is_moe: bool
    has_indexer: bool


class ModelConfig(OpenRecord):
    """A model. Field names are the keys of `config.json`; those of an indexer are 0 where attention is dense."""

    architectures: tuple[str, ...]
    model_type: Literal["deepseek_v32", "deepseek_v3", "glm_moe_dsa"]
    hidden_size: Positive
    num_hidden_layers: Positive
    first_k_dense_replace: Size
    moe_layer_freq: Literal[1]
    num_attention_heads: Positive
    num_key_value_heads: Positive
    q_lora_rank: Positive
    kv_lora_rank: Positive
    qk_nope_head_dim: Positive
    qk_rope_head_dim: Positive
    v_head_dim: Positive
    intermediate_size: Positive
    moe_intermediate_size: Positive
    n_routed_experts: Positive
    num_experts_per_tok: Positive
    n_shared_experts: Positive
    n_group: Positive
    topk_group: Positive
    scoring_func: Literal["sigmoid"]
    topk_method: Literal["noaux_tc"]
    norm_topk_prob: Literal[True]
    routed_scaling_factor: Factor
    index_n_heads: Size
    index_head_dim: Size
    index_topk: Size
    num_nextn_predict_layers: Literal[0, 1]
    vocab_size: Positive
    hidden_act: Literal["silu"]
    rms_norm_eps: Factor
    rope_theta: Factor
    rope_scaling: RopeScaling
    max_position_embeddings: Positive
    attention_bias: Literal[False]
    tie_word_embeddings: Literal[False]
    bos_token_id: Size
    eos_token_id: Size | tuple[Size, ...]
    quantization_config: QuantizationConfig | StoredWeights | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_hidden_layers > _MOST_LAYERS:
            raise RecordError(f"num_hidden_layers is {self.num_hidden_layers}, expected at most {_MOST_LAYERS}")
        if self.num_hidden_layers * self.n_routed_experts > _MOST_EXPERTS:
            raise RecordError(
                f"n_routed_experts is {self.n_routed_experts} in each of {self.num_hidden_layers} layers, expected at "
                f"most {_MOST_EXPERTS} in all"
            )
        for key in (
            "hidden_size",
            "q_lora_rank",
            "kv_lora_rank",
            "intermediate_size",
            "moe_intermediate_size",
        ):
            if getattr(self, key) % FP8_BLOCK:
                raise RecordError(f"{key} is {getattr(self, key)}, expected a multiple of {FP8_BLOCK} (FP8 block)")
        if self.num_attention_heads * self.v_head_dim % FP8_BLOCK:
            raise RecordError(
                f"num_attention_heads * v_head_dim is {self.num_attention_heads * self.v_head_dim}, "
                f"expected a multiple of {FP8_BLOCK} (FP8 block)"
            )
        if self.qk_rope_head_dim % 2:
            raise RecordError(f"qk_rope_head_dim is {self.qk_rope_head_dim}, expected even")
        if self.n_routed_experts % self.n_group or self.n_routed_experts // self.n_group < 2:
            raise RecordError(
                f"n_routed_experts is {self.n_routed_experts} over n_group {self.n_group}, "
                "expected the same number in each group, at least 2"
            )
        if self.topk_group > self.n_group:
            raise RecordError(f"topk_group is {self.topk_group}, expected at most n_group {self.n_group}")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > reachable:
            raise RecordError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, expected at most the {reachable} experts "
                "of topk_group groups"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise RecordError(
                f"first_k_dense_replace is {self.first_k_dense_replace}, expected at most num_hidden_layers"
            )

    @staticmethod
    def parse(raw: Any, origin: str) -> ModelConfig:
        """Check a decoded `config.json`.

        Args:
            raw: the decoded JSON.
            origin: what to call it in an error, normally its path.

        Raises:
            ConfigError: not an object, another model type, a key missing, of the wrong type or value.
        """
        if not isinstance(raw, dict):
            raise ConfigError(f"{origin}: holds a JSON {type(raw).__name__}, expected an object with model keys")
        demo_keys = {"dim", "n_layers", "n_activated_experts", "inter_dim"} & set(raw)
        if demo_keys and "hidden_size" not in raw:
            raise ConfigError(
                f"{origin}: has the key {sorted(demo_keys)[0]!r} of the demo's inference/config_671B_v3.2.json; "
                "pass the checkpoint's config.json (with hidden_size, num_hidden_layers, ...)"
            )
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or TYPE_ALIASES.get(model_type, model_type) not in MODEL_TYPES:
            known = " or ".join(map(repr, MODEL_TYPES))
            raise ConfigError(
                f"{origin}: model_type is {model_type!r}, expected {known}; "
                "seekforge does DeepSeek-V3.2, DeepSeek-V3, GLM-5 and models of the same types"
            )
        plain, _ = plain_form(raw, origin)
        try:
            return MODEL_TYPES[plain["model_type"]].model_validate(plain)
        except RecordError as error:
            raise ConfigError(f"{origin}: {_line(error)}") from None

    @staticmethod
    def load(path: Path) -> ModelConfig:
        """Read `path` (a `config.json`, or a folder that holds one).

        Raises:
            ConfigError: as `parse`, and when the file is missing or not JSON.
        """
        return ModelConfig.read(path)[0]

    @staticmethod
    def read(path: Path) -> tuple[ModelConfig, tuple[str, ...]]:
        """Read as `load`, and return beside it what was taken for granted (`config_forms.plain_form`).

        A folder whose config.json says nothing of its weights may say it in hf_quant_config.json, as ModelOpt does.
        """
        folder = path if path.is_dir() else None
        path = path / "config.json" if folder is not None else path
        raw = _decoded(path, "a checkpoint folder must hold config.json")
        if folder is not None and isinstance(raw, dict) and says_nothing_of_weights(raw):
            said = folder / MODELOPT_FILE
            if is_there(said):
                quantization = _decoded(said, "download it again")
                # what is wrong with it is not wrong with config.json
                plain_quantization({"quantization_config": quantization or {}}, str(said))
                raw["quantization_config"] = quantization
        config = ModelConfig.parse(raw, str(path))
        return config, plain_form(raw, str(path))[1]

    # --- weights -------------------------------------------------------------------------------------------

    def weight_form(self, name: str) -> WeightForm:
        """Return how the checkpoint holds a matrix "….weight" that programs can have as FP8 blocks."""
        stored = self.quantization_config
        if isinstance(stored, QuantizationConfig):
            return "fp8_blocks"
        if stored is None or leaves_out(stored.ignore, name.removesuffix(".weight")):
            return "bf16"
        return stored.form

    @property
    def stored_form(self) -> WeightForm:
        """How the checkpoint holds matrices, but for those that it leaves in BF16."""
        stored = self.quantization_config
        return "bf16" if stored is None else stored.form if isinstance(stored, StoredWeights) else "fp8_blocks"

    def keeps_weights(self, numerics: Numerics) -> bool:
        """Whether programs of these numerics multiply with the checkpoint's values, and not with FP8 blocks."""
        return self.stored_form != "fp8_blocks" and not numerics.quantizes_activations

    # --- derived sizes -------------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        """Query and key width of one head in the naive form: nope + rope."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer for attention: latent + rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def mtp_layer(self) -> int | None:
        """Absolute number of the MTP layer, or None when the model has none."""
        return self.num_hidden_layers if self.num_nextn_predict_layers else None

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5 · m², m = 0.1·mscale_all_dim·ln(factor) + 1 (spec §1.2)."""
        m = 0.1 * self.rope_scaling.mscale_all_dim * math.log(self.rope_scaling.factor) + 1.0
        return self.qk_head_dim**-0.5 * m * m

    @property
    def index_scale(self) -> float:
        """What the head weights of the indexer carry: index_head_dim^-0.5 · index_n_heads^-0.5."""
        return self.index_head_dim**-0.5 * self.index_n_heads**-0.5

    @property
    def num_top_logits(self) -> int:
        """How many of the largest logits a step returns per row."""
        return min(256, self.vocab_size)

    def first_difference(self, other: ModelConfig) -> tuple[str, Any, Any] | None:
        """Return the first key with another value in `other`, ours and theirs; None: there is none."""
        for key in type(self).model_fields:
            value, other_value = getattr(self, key), getattr(other, key)
            if value != other_value:
                return key, value, other_value
        return None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` has routed experts (the MTP layer always does)."""
        return layer >= self.first_k_dense_replace or layer == self.mtp_layer

    def index_source(self, layer: int) -> int | None:
        """Return the layer whose indexer chooses the keys of `layer`; None where attention is dense."""
        return layer if self.index_topk else None

    def has_indexer(self, layer: int) -> bool:
        """Whether `layer` chooses keys by an indexer of its own."""
        return self.index_source(layer) == layer

    def shares_indices(self, layer: int) -> bool:
        """Whether `layer` attends to the keys that an earlier layer chose."""
        return self.index_source(layer) not in (None, layer)

    def layer_kind(self, layer: int) -> LayerKind:
        """Return what layers of this model can differ in."""
        return LayerKind(self.is_moe_layer(layer), self.has_indexer(layer))


class IndexerConfig(ModelConfig):
    """A model whose attention chooses its keys by an indexer."""

    index_n_heads: Positive
    index_head_dim: Positive
    index_topk: Positive

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index_head_dim != FP8_BLOCK:
            raise RecordError(f"index_head_dim is {self.index_head_dim}, expected {FP8_BLOCK} (one FP8 block)")
        if self.qk_rope_head_dim > self.index_head_dim:
            raise RecordError(f"qk_rope_head_dim is {self.qk_rope_head_dim}, expected at most index_head_dim")


class SparseAttentionConfig(IndexerConfig):
    """A model of type `deepseek_v32`: every layer has an indexer."""

    model_type: Literal["deepseek_v32"]

    def __post_init__(self) -> None:
        super().__post_init__()
        extra = self.model_extra
        # Other DSA models carry these; a value other than V3.2's would change results without a sound.
        if extra.get("indexer_rope_interleave", False):
            raise RecordError("indexer_rope_interleave is true, expected false or absent")
        for key in ("index_topk_freq", "index_topk_pattern"):
            if extra.get(key) not in (None, 1):
                raise RecordError(f"{key} is {extra[key]!r}, expected absent: every layer runs its own indexer")


class SharedIndicesConfig(IndexerConfig):
    """A model of type `glm_moe_dsa` (GLM-5, 5.1, 5.2), in which layers may attend to what an earlier layer chose.

    Attributes:
        indexer_types: for each layer of the main model, whether its attention chooses keys itself (`full`) or takes
            those of the last layer before it that does (`shared`); the MTP layer chooses itself.
    """

    model_type: Literal["glm_moe_dsa"]
    indexer_types: tuple[Literal["full", "shared"], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.indexer_types) != self.num_hidden_layers:
            raise RecordError(
                f"indexer_types has {len(self.indexer_types)} entries, expected one for each of "
                f"{self.num_hidden_layers} layers"
            )
        if self.indexer_types[0] != "full":
            raise RecordError("indexer_types begins with 'shared', expected 'full': no layer before it chooses keys")
        for key in ("rope_interleave", "indexer_rope_interleave"):
            if self.model_extra.get(key, True) not in (None, True):
                raise RecordError(f"{key} is {self.model_extra[key]!r}, expected true or absent")

    def index_source(self, layer: int) -> int:
        """Return the layer whose indexer chooses the keys of `layer`."""
        if layer >= self.num_hidden_layers:
            return layer
        return next(number for number in range(layer, -1, -1) if self.indexer_types[number] == "full")


class DenseAttentionConfig(ModelConfig):
    """A model of type `deepseek_v3` (V3, R1, V3.1): every token attends to all before it."""

    model_type: Literal["deepseek_v3"]
    index_n_heads: Literal[0] = 0
    index_head_dim: Literal[0] = 0
    index_topk: Literal[0] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        interleaved = self.model_extra.get("rope_interleave", True)
        if interleaved not in (None, True):
            raise RecordError(f"rope_interleave is {interleaved!r}, expected true or absent")


#: `model_type` -> what its `config.json` must say.
MODEL_TYPES: Final[dict[str, type[ModelConfig]]] = {
    "deepseek_v32": SparseAttentionConfig,
    "deepseek_v3": DenseAttentionConfig,
    "glm_moe_dsa": SharedIndicesConfig,
}


def _line(fault: RecordError) -> str:
    """Say what is wrong with a key, or with several that do not go together."""
    key = ".".join(map(str, fault.path))
    if fault.problem == MISSING:
        return f"the key {key!r} is missing; take the config.json that came with these weights"
    return f"the key {key!r} {fault.problem}" if key else fault.problem


def _decoded(path: Path, advice: str) -> Any:
    try:
        return read_json(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); download it again") from None
