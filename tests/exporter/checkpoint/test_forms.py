"""A checkpoint in each form that people have gives the model of the plain form, or is refused by the form's name.

Equal means: the same config, and the same bytes in every weight input of the plain form's program. One test takes many
forms at once through export and build to the same engine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, processors

from seekforge.common.cli.console import Stages
from seekforge.common.errors import SeekforgeError
from seekforge.exporter.builder.onnxruntime.build import build
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.checkpoint.validate import scan_values
from seekforge.exporter.program.export import export
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_index import INDEX_FILE
from seekforge.formats.checkpoint.shard_writer import write_shard
from seekforge.formats.loader import Loader, allocate
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.program import load_bindings, load_program
from seekforge.formats.targets import load_target
from seekforge.formats.weight_recipes import Recipe, TensorSource, evaluate, tensors_of
from seekforge.runtime.cli import main as cli
from seekforge.runtime.text.tokenizer import Tokenizer as RuntimeTokenizer

Raw = dict[str, Any]
Tensors = dict[str, np.ndarray]
Change = Callable[[Path], object]
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps."


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of our own to change: its shards are links, as in the cache of the hub."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny_checkpoint.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        elif path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path, tiny_programs: dict[str, Path]) -> dict[str, dict[str, Recipe]]:
    """The plain form's bindings."""
    return load_bindings(tiny_programs["fp8"])


def digest(recipes: dict[str, Recipe], source: TensorSource) -> dict[str, str]:
    """Weight input -> digest of its bytes; computed tables are a matter of the config."""
    return {
        name: hashlib.sha256(np.ascontiguousarray(evaluate(recipe, source)).view(np.uint8)).hexdigest()
        for name, recipe in recipes.items()
        if tensors_of(recipe)
    }


@pytest.fixture(scope="module")
def weights(plain: dict[str, dict[str, Recipe]], tiny_source: Checkpoint) -> dict[str, dict[str, str]]:
    """The plain form's weight inputs, digested."""
    return {graph: digest(recipes, tiny_source) for graph, recipes in plain.items()}


def config(change: Callable[[Raw], object]) -> Change:
    """Edit config.json."""

    def edit(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        change(raw)
        (folder / "config.json").write_text(json.dumps(raw))

    return edit


def quantization(**values: Any) -> Change:
    return config(lambda raw: raw["quantization_config"].update(values))


def tensors(change: Callable[[Tensors], object]) -> Change:
    """Edit the tensors, and write them as one file."""

    def edit(folder: Path) -> None:
        with Checkpoint.open(folder) as checkpoint:
            found = {name: checkpoint.tensor(name) for name in checkpoint.names}
        change(found)
        for path in [*folder.glob("*.safetensors"), *folder.glob(INDEX_FILE)]:
            path.unlink()
        write_shard(folder / "model.safetensors", found)

    return edit


def tokenizer(change: Callable[[Tokenizer], object]) -> Change:
    def edit(folder: Path) -> None:
        path = folder / "tokenizer.json"
        opened = Tokenizer.from_file(str(path))
        change(opened)
        opened.save(str(path))

    return edit


def as_transformers_5_writes(raw: Raw) -> None:
    """What `DeepseekV32Config.save_pretrained` of transformers 5.24 makes of a released config.json."""
    scaling, theta = raw.pop("rope_scaling"), raw.pop("rope_theta")
    raw["rope_parameters"] = scaling | {"rope_theta": theta, "rope_type": scaling["type"]}
    raw["dtype"] = raw.pop("torch_dtype")
    number, dense = raw["num_hidden_layers"], raw["first_k_dense_replace"]
    raw |= {
        "layer_types": ["indexed_attention"] * number,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (number - dense),
        "head_dim": 64, "qk_head_dim": 128, "mlp_bias": False, "output_router_logits": False, "pad_token_id": None,
        "transformers_version": "5.24.0",
    }  # fmt: skip
    raw["quantization_config"] |= {"modules_to_not_convert": None, "dequantize": False, "expert_dtype": "fp8"}


def as_transformers_5_makes(raw: Raw) -> None:
    """The same of a config that its own class made: what that class has fixed is not written."""
    as_transformers_5_writes(raw)
    for key in ("moe_layer_freq", "scoring_func", "topk_method", "ep_size"):
        del raw[key]
    raw["rope_parameters"].pop("type")
    raw["num_local_experts"] = raw.pop("n_routed_experts")


def rename(key: str, to: str) -> Callable[[Raw], object]:
    return lambda raw: raw["rope_scaling"].update({to: raw["rope_scaling"].pop(key)})


def scales_as(dtype: Any) -> Change:
    def change(found: Tensors) -> None:
        found.update({name: array.astype(dtype) for name, array in found.items() if name.endswith("_scale_inv")})

    return tensors(change)


def norms_as(dtype: Any) -> Change:
    """Store the F32 tensors that are no scales in another type, with values that it has."""

    def change(found: Tensors) -> None:
        for name in [name for name in found if name.endswith("e_score_correction_bias")]:
            found[name] = found[name].astype(dtype)

    return tensors(change)


def drop_copies(found: Tensors) -> None:
    for name in [name for name in found if name.endswith(("4.embed_tokens.weight", "shared_head.head.weight"))]:
        del found[name]


def drop_mtp(found: Tensors) -> None:
    for name in [name for name in found if name.startswith("model.layers.4.")]:
        del found[name]


def add_rotary(found: Tensors) -> None:
    for layer in range(4):
        found[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.full(32, np.inf, np.float32)
    found["model.rotary_emb.inv_freq"] = np.ones(32, ml_dtypes.bfloat16)


def without_index(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()


def through_links(folder: Path) -> None:
    """As snapshots/COMMIT in the cache of the hub: every file is a link into blobs."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and not path.is_symlink():
            path.rename(blobs / path.name)
            path.symlink_to(f"../blobs/{path.name}")


SAME: dict[str, Change] = {
    "transformers 5, saved": config(as_transformers_5_writes),
    "transformers 5, made": config(as_transformers_5_makes),
    "rope_type": config(rename("type", "rope_type")),
    "rope_type and type": config(lambda raw: raw["rope_scaling"].update(rope_type="yarn")),
    "rope_scaling and rope_parameters": config(
        lambda raw: raw.update(rope_parameters=raw["rope_scaling"] | {"rope_theta": raw["rope_theta"]})
    ),
    "beta_fast and beta_slow absent": config(
        lambda raw: [raw["rope_scaling"].pop(f"beta_{e}") for e in ("fast", "slow")]
    ),
    "floats as whole numbers": config(lambda raw: raw["rope_scaling"].update(factor=40, mscale=1, mscale_all_dim=1)),
    "attention_factor as mscale gives it": config(lambda raw: raw["rope_scaling"].update(attention_factor=1.0)),
    "nulls": config(lambda raw: raw.update(pad_token_id=None, rope_parameters=None, dtype=None, layer_types=None)),
    "extra keys": config(lambda raw: raw.update(pretraining_tp=1, auto_map={"AutoConfig": "x.Y"}, head_dim=192)),
    "eos_token_id as a list": config(lambda raw: raw.update(eos_token_id=[1])),
    "scale_fmt absent": config(lambda raw: raw["quantization_config"].pop("scale_fmt")),
    "scale_fmt null": quantization(scale_fmt=None),
    "scale_fmt float": quantization(scale_fmt="float"),
    "fmt and activation_scheme absent": config(
        lambda raw: [raw["quantization_config"].pop(key) for key in ("fmt", "activation_scheme")]
    ),
    "modules_to_not_convert": quantization(modules_to_not_convert=["lm_head", "model.embed_tokens"]),
    "shards without an index": without_index,
    "one file": tensors(lambda found: None),
    "files as links": through_links,
    "rotary buffers left over": tensors(add_rotary),
    "MTP without copies": tensors(drop_copies),
    "scales in BF16": scales_as(ml_dtypes.bfloat16),
    "scales in E8M0": scales_as(ml_dtypes.float8_e8m0fnu),
    "scales in F16": tensors(
        lambda found: found.update(
            {n: a.astype(np.float16) for n, a in found.items() if n.endswith("o_proj.weight_scale_inv")}
        )
    ),
}


@pytest.mark.parametrize("form", SAME)
def test_a_form_gives_the_plain_model(
    form: str,
    copy: Path,
    tiny_config: ModelConfig,
    plain: dict[str, dict[str, Recipe]],
    weights: dict[str, dict[str, str]],
) -> None:
    SAME[form](copy)
    with open_checkpoint(copy) as opened:
        assert opened.config.first_difference(tiny_config) is None
        scan_values(opened.checkpoint, opened.config)
        for graph in ("model", "mtp"):
            assert digest(plain[graph], opened.checkpoint) == weights[graph]


def test_every_way_of_loading_widens_scales(
    copy: Path, tiny_source: Checkpoint, plain: dict[str, dict[str, Recipe]]
) -> None:
    """The loader of GPU engines reads bytes by itself."""
    scales_as(ml_dtypes.float8_e8m0fnu)(copy)
    recipes = {name: recipe for name, recipe in plain["model"].items() if tensors_of(recipe)}
    buffers = allocate(recipes)
    with Checkpoint.open(copy) as checkpoint:
        report = Loader(checkpoint, recipes, buffers, scan=True).run()
    assert report.families["self_attn.o_proj"].num_powers_of_two == report.families["self_attn.o_proj"].num_tensors
    for name, recipe in recipes.items():
        assert np.array_equal(buffers[name].view(np.uint8), evaluate(recipe, tiny_source).view(np.uint8)), name


def test_nan_in_e8m0_scales_is_named(copy: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"

    def damage(found: Tensors) -> None:
        found[name] = np.full(found[name].shape, np.nan, ml_dtypes.float8_e8m0fnu)

    tensors(damage)(copy)
    with open_checkpoint(copy) as opened, pytest.raises(SeekforgeError, match=r"o_proj\.weight_scale_inv' holds nan"):
        scan_values(opened.checkpoint, opened.config)


@pytest.mark.parametrize("says", [0, 1])
def test_an_mtp_layer_that_is_absent_is_no_fault(
    says: int, copy: Path, tmp_path: Path, tiny_programs: dict[str, Path]
) -> None:
    tensors(drop_mtp)(copy)
    config(lambda raw: raw.update(num_nextn_predict_layers=says))(copy)
    exported = export(copy, tmp_path / "program", numerics=NUMERICS["fp8"])
    assert exported.program.config["num_nextn_predict_layers"] == 0 and list(exported.num_nodes) == ["model"]
    assert any("without its MTP layer" in line for line in exported.warnings) == bool(says)
    whole = load_program(tiny_programs["fp8"])
    assert exported.program.graphs["model"].sha256 == whole.graphs["model"].sha256
    assert load_bindings(tmp_path / "program")["model"] == load_bindings(tiny_programs["fp8"])["model"]


def test_many_forms_at_once_give_the_same_engine(
    copy: Path, tmp_path: Path, tiny_engines: dict[str, Path], tiny_programs: dict[str, Path]
) -> None:
    """Export and build to the end: the same program, the same weights, and prompts that nothing cuts."""
    scales_as(ml_dtypes.bfloat16)(copy)
    tensors(add_rotary)(copy)
    tensors(drop_copies)(copy)
    config(as_transformers_5_makes)(copy)
    quantization(scale_fmt=None)(copy)
    tokenizer(cut_and_fill)(copy)
    tokenizer(begin_every_text)(copy)
    exported = export(copy, tmp_path / "program", numerics=NUMERICS["fp8"])
    said = "\n".join(exported.warnings)
    for word in (
        "scale_fmt is absent",
        "5 tensors are passed over",
        "truncation to 3 tokens",
        "padding to 64",
        "adds 1",
    ):
        assert said.count(word) == 1, word
    assert exported.program.graphs == load_program(tiny_programs["fp8"]).graphs
    assert load_bindings(tmp_path / "program") == load_bindings(tiny_programs["fp8"])
    build(
        tmp_path / "program", tmp_path / "engine", target=load_target("cpu"), checkpoint_folder=copy,
        force=False, progress=Stages(quiet=True),
    )  # fmt: skip
    for name in ("weights.bin", "model.onnx", "mtp.onnx"):
        ours, theirs = (folder / name for folder in (tmp_path / "engine", tiny_engines["fp8"]))
        assert ours.read_bytes() == theirs.read_bytes(), name
    expected = RuntimeTokenizer(tiny_engines["fp8"] / "tokenizer.json").encode(TEXT)
    assert RuntimeTokenizer(tmp_path / "engine" / "tokenizer.json").encode(TEXT) == expected
    assert json.loads((tmp_path / "engine" / "tokenizer.json").read_text())["truncation"] is None


# --- tokenizers -----------------------------------------------------------------------------------------------


def cut_and_fill(opened: Tokenizer) -> None:
    opened.enable_truncation(3)
    opened.enable_padding(length=64)


def begin_every_text(opened: Tokenizer) -> None:
    begin = opened.id_to_token(0)
    opened.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])  # pyright: ignore


def in_sequence(*parts: Any) -> Callable[[Tokenizer], object]:
    def change(opened: Tokenizer) -> None:
        opened.decoder = decoders.Sequence(list(parts))  # pyright: ignore

    return change


@pytest.mark.parametrize(
    "change",
    [
        cut_and_fill,
        begin_every_text,
        in_sequence(decoders.ByteLevel()),
        in_sequence(decoders.ByteFallback(), decoders.Fuse(), decoders.ByteLevel()),
    ],
)
def test_a_tokenizer_gives_the_same_tokens_and_text(
    change: Callable[[Tokenizer], object], copy: Path, tiny_checkpoint: Path
) -> None:
    """Also in an engine that was built when its tokenizer.json was copied as it was."""
    tokenizer(change)(copy)
    changed, usual = (RuntimeTokenizer(folder / "tokenizer.json") for folder in (copy, tiny_checkpoint))
    ids = usual.encode(TEXT)
    assert len(ids) > 10 and changed.encode(TEXT) == ids and changed.decode(ids) == TEXT


# --- what is refused --------------------------------------------------------------------------------------------


def fuse_experts(found: Tensors) -> None:
    found["model.layers.1.mlp.experts.gate_up_proj"] = np.zeros((16, 256, 512), ml_dtypes.bfloat16)


def as_the_demo_names(found: Tensors) -> None:
    found["layers.0.attn.wq_a.weight"] = np.zeros((256, 512), ml_dtypes.bfloat16)


def in_f32(name: str) -> Change:
    return tensors(lambda found: found.update({name: found[name].astype(np.float32)}))


def compressed(ignore: Any = (), **weights: Any) -> Callable[[Raw], object]:
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}} if weights else {}
    form = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": list(ignore)}
    return lambda raw: raw.update(quantization_config=form | groups)


def modelopt(**said: Any) -> Callable[[Raw], object]:
    return lambda raw: raw.update(quantization_config={"quant_method": "modelopt"} | said)


def cut_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:20_000])


def forget_tokens(folder: Path) -> None:
    """A vocabulary that ends early, of which the file itself is well-formed."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] != 1]
    raw["model"]["vocab"] = {token: number for token, number in raw["model"]["vocab"].items() if number != 1}
    path.write_text(json.dumps(raw))


def one_shard_less(folder: Path) -> None:
    without_index(folder)
    (folder / "model-00002-of-000003.safetensors").unlink()


def two_series(folder: Path) -> None:
    without_index(folder)
    shutil.copyfile(folder / "model-00001-of-000003.safetensors", folder / "other-00001-of-00001.safetensors")


REFUSED: dict[str, tuple[Change, str]] = {
    "no quantization": (
        config(lambda raw: raw.pop("quantization_config")),
        "has dtype f8e4m3, expected bf16; config.json has no quantization_config, so weights are BF16",
    ),
    "null quantization": (
        config(lambda raw: raw.update(quantization_config=None)),
        "config.json has no quantization_config, so weights are BF16",
    ),
    "ModelOpt": (quantization(quant_method="modelopt"), "quant_algo is None (NVIDIA ModelOpt), expected 'NVFP4' or"),
    "ModelOpt in INT4": (config(modelopt(quant_algo="W4A16_AWQ")), "quant_algo is 'W4A16_AWQ'"),
    "ModelOpt in other blocks": (config(modelopt(quant_algo="NVFP4", group_size=32)), "group_size is 32"),
    "ModelOpt of no names": (config(modelopt(quant_algo="NVFP4", ignore=[3])), "ignore is [3], expected a list"),
    "NVFP4 of FP8 weights": (config(modelopt(quant_algo="NVFP4")), "config and weights are of different models"),
    "compressed-tensors": (config(compressed()), "config_groups is None, expected one group"),
    "compressed-tensors in INT4": (
        config(compressed(type="int", num_bits=4, strategy="group")),
        "weights of type 'int' with 4 bits by 'group'",
    ),
    "compressed-tensors in other blocks": (
        config(compressed(type="float", num_bits=8, strategy="block", block_structure=[64, 64])),
        "block_structure is [64, 64]",
    ),
    "compressed-tensors with an expression": (
        config(compressed(type="float", num_bits=8, strategy="channel", ignore=["re:(a+)+$"])),
        "ignore has 're:(a+)+$', expected names, or expressions of letters",
    ),
    "FBGEMM": (quantization(quant_method="fbgemm_fp8"), "'fbgemm_fp8' (FBGEMM)"),
    "AWQ": (quantization(quant_method="awq", bits=4), "'awq' (AWQ)"),
    "unknown": (quantization(quant_method="magic"), "quant_method is 'magic'"),
    "static": (quantization(activation_scheme="static"), "activation_scheme is 'static'"),
    "e5m2": (quantization(fmt="e5m2"), "fmt is 'e5m2'"),
    "per tensor": (quantization(weight_block_size=None), "no weight_block_size"),
    "other blocks": (quantization(weight_block_size=[64, 64]), "weight_block_size [64, 64]"),
    "fp4 experts": (quantization(expert_dtype="fp4"), "expert_dtype is 'fp4'"),
    "scale_fmt": (quantization(scale_fmt="e3m4"), "scale_fmt is 'e3m4'"),
    "type against rope_type": (
        config(lambda raw: raw["rope_scaling"].update(rope_type="linear")),
        "rope_type is 'linear' and type is 'yarn'",
    ),
    "other RoPE": (config(lambda raw: raw["rope_scaling"].update(type="linear")), "rope_scaling.type"),
    "two thetas": (config(lambda raw: raw["rope_scaling"].update(rope_theta=5)), "rope_theta is 10000"),
    "two factors": (
        config(lambda raw: raw.update(rope_parameters=raw["rope_scaling"] | {"factor": 2})),
        "rope_parameters.factor is 2",
    ),
    "one RoPE per kind of layer": (
        config(lambda raw: raw.update(rope_parameters={"full_attention": raw.pop("rope_scaling")})),
        "one entry for each kind of layer (full_attention)",
    ),
    "attention_factor": (
        config(lambda raw: raw["rope_scaling"].update(attention_factor=2.0)),
        "attention_factor is 2.0",
    ),
    "truncate": (config(lambda raw: raw["rope_scaling"].update(truncate=False)), "truncate is False"),
    "biases": (config(lambda raw: raw.update(mlp_bias=True)), "mlp_bias is True"),
    "other attention": (config(lambda raw: raw.update(layer_types=["full_attention"] * 4)), "'full_attention'"),
    "mixed layers": (
        config(lambda raw: raw.update(mlp_layer_types=["sparse", "dense", "sparse", "sparse"])),
        "mlp_layer_types is no run",
    ),
    "dense layers": (
        config(lambda raw: raw.update(mlp_layer_types=["dense"] * 2 + ["sparse"] * 2)),
        "first_k_dense_replace is 1",
    ),
    "two numbers of experts": (config(lambda raw: raw.update(num_local_experts=8)), "num_local_experts is 8"),
    "fused experts": (tensors(fuse_experts), "holds all experts of a layer"),
    "the demo's names": (tensors(as_the_demo_names), "inference/convert.py"),
    "a router bias in BF16": (
        norms_as(ml_dtypes.bfloat16),
        "'model.layers.1.mlp.gate.e_score_correction_bias' has dtype bf16, expected f32",
    ),
    "a norm in F32": (in_f32("model.norm.weight"), "'model.norm.weight' has dtype f32, expected bf16"),
    "a shard less": (one_shard_less, "number 2 is missing"),
    "two series": (two_series, "cannot be said which belong together"),
    "tokenizer cut off": (cut_tokenizer, "cannot be read as a tokenizer"),
    "tokenizer without an end": (forget_tokens, "no token of id 1, the eos_token_id"),
    "more tokens than the model": (
        tokenizer(lambda opened: opened.add_tokens([f"<extra {i}>" for i in range(20)])),
        "config.json has vocab_size 1024",
    ),
    "decoder": (tokenizer(in_sequence(decoders.Metaspace())), "its decoder is Sequence of Metaspace"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_another_form_is_refused_by_its_name(form: str, copy: Path, tmp_path: Path) -> None:
    change, message = REFUSED[form]
    change(copy)
    result = CliRunner().invoke(cli.main, ["export", str(copy), str(tmp_path / "out"), "--quiet"])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr and "original checkpoint" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_plain_rope_is_yarn_that_scales_nothing(copy: Path, tiny_config: ModelConfig) -> None:
    """As transformers writes a model of its own: `rope_type` default."""
    config(lambda raw: raw.update(rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 1e4}))(copy)
    found = ModelConfig.load(copy)
    assert found.rope_scaling.factor == 1 and found.softmax_scale == tiny_config.qk_head_dim**-0.5
