"""What is written is a DeepSeek-V3.2 download file for file, and a model whose decisions decide something."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seekforge.common.errors import ConfigError, OutputError
from seekforge.exporter.checkpoint.new import new_checkpoint, split_into_shards
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.checkpoint.schema import ExpectedTensor, expected_tensors, totals
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_writer import ShardWriter
from seekforge.formats.quantization.block_fp8 import quantize
from seekforge.formats.weight_recipes import dequantize_into

NUM_TOKENS = 300


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def dense_preset() -> Preset:
    """Four dense layers, no MTP, 512 tokens: the quickest to write."""
    tiny = load_preset("tiny")
    raw = tiny.config_json | {"first_k_dense_replace": 4, "num_nextn_predict_layers": 0, "vocab_size": 512}
    return replace(tiny, config_json=raw, config=ModelConfig.parse(raw, "test"))


# --- files --------------------------------------------------------------------------------------------------


def test_folder_has_the_files_of_a_download(tiny_checkpoint: Path) -> None:
    assert set(digests(tiny_checkpoint)) == {
        "config.json",
        "generation_config.json",
        "model-00001-of-000003.safetensors",
        "model-00002-of-000003.safetensors",
        "model-00003-of-000003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_index_tells_total_size_and_every_tensor(tiny_checkpoint: Path) -> None:
    index = json.loads((tiny_checkpoint / "model.safetensors.index.json").read_text())
    tensors = expected_tensors(load_preset("tiny").config)
    assert index["metadata"]["total_size"] == totals(tensors).num_bytes
    assert index["weight_map"].keys() == tensors.keys()


def test_some_scale_lies_in_another_shard_than_its_weight(tiny_checkpoint: Path) -> None:
    weight_map = json.loads((tiny_checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(weight_map.get(name + "_scale_inv", file) != file for name, file in weight_map.items())


def test_config_files_say_what_the_release_says(tiny_checkpoint: Path) -> None:
    generation = json.loads((tiny_checkpoint / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"], generation["do_sample"]) == (1.0, 0.95, True)
    tokenizer = json.loads((tiny_checkpoint / "tokenizer_config.json").read_text())
    assert (tokenizer["add_bos_token"], tokenizer["model_max_length"]) == (False, 131072)
    assert "chat_template" not in tokenizer
    assert ModelConfig.load(tiny_checkpoint) == load_preset("tiny").config


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    preset = dense_preset()
    new_checkpoint(tmp_path / "a", preset, seed=1)
    new_checkpoint(tmp_path / "b", preset, seed=1)
    new_checkpoint(tmp_path / "c", preset, seed=2)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {name for name in a if name.endswith(".safetensors")}


def test_summary_and_progress_add_up(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    written = new_checkpoint(tmp_path / "out", dense_preset(), progress=lambda *args: seen.append(args))
    assert len(seen) == written.num_tensors
    assert seen[-1] == (written.num_bytes, written.num_bytes)
    assert written.num_files == len(digests(tmp_path / "out"))


@pytest.mark.parametrize(("num_shards", "count"), [(1, 1), (3, 3), (10**6, 7)])
def test_shards_are_about_equal_and_none_is_empty(num_shards: int, count: int) -> None:
    tensors = {f"t{i}": ExpectedTensor("f32", (10,)) for i in range(7)}
    shards = split_into_shards(tensors, num_shards)
    assert len(shards) == count
    assert [name for names in shards.values() for name in names] == list(tensors)
    assert all(re.fullmatch(r"model-\d{5}-of-\d{6}\.safetensors", file) for file in shards)


# --- what cannot be written ---------------------------------------------------------------------------------


def test_full_size_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"685 billion parameters \(689 GB\); pass --sparse"):
        new_checkpoint(tmp_path / "out", "full")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_kept_without_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        new_checkpoint(tmp_path / "out", dense_preset())
    with pytest.raises(OutputError, match=r"no config\.json, so --force will not replace it"):
        new_checkpoint(tmp_path / "out", dense_preset(), force=True)
    assert digests(tmp_path / "out").keys() == {"thesis.txt"}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(OutputError, match="disk is full"):
        new_checkpoint(tmp_path / "out", dense_preset())
    assert not list(tmp_path.iterdir())


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 128), (192, 256), (1, 1), (129, 300)])
def test_quantizing_keeps_three_mantissa_bits(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    stored, scale = quantize(weight)
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = np.empty(shape, np.float32)
    dequantize_into(stored, scale, back)
    # e4m3 rounds to 2^-4 relative above its smallest normal number, 2^-6 of the scale
    assert np.all(np.abs(back - weight) <= np.maximum(np.abs(weight) * 2**-4, scale.max() * 2**-10))


@pytest.mark.parametrize(
    ("amax", "exponent"), [(448, 0), (449, 1), (447, 0), (1.75, -8), (1.0, -8), (2.0, -7), (0, -22)]
)
def test_scales_follow_the_published_rule(amax: float, exponent: int) -> None:
    _, scale = quantize(np.full((1, 1), amax, np.float32))
    assert scale.tolist() == [[2.0**exponent]]


def test_block_scales_differ_within_every_large_weight(tiny_checkpoint: Path) -> None:
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        flat = [
            name
            for name in checkpoint.names
            if name.endswith("_scale_inv")
            and checkpoint.tensor(name).size >= 16
            and len(np.unique(checkpoint.tensor(name))) < 2
        ]
    assert not flat


def test_indexer_heads_are_antipodal_pairs(tiny_checkpoint: Path) -> None:
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        stored = checkpoint.tensor("model.layers.2.self_attn.indexer.wq_b.weight").reshape(8, 2, 128, 256)
        assert np.array_equal(stored[:, 0].view(np.uint8) ^ 0x80, stored[:, 1].view(np.uint8))


def test_rounding_the_router_bias_would_merge_experts(tiny_checkpoint: Path) -> None:
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        bias = checkpoint.tensor("model.layers.1.mlp.gate.e_score_correction_bias")
    rounded = bias.astype(np.dtype("float32")).view(np.uint32) & 0xFFFF_0000
    assert len(np.unique(bias)) == 16 and len(np.unique(rounded)) < 16


# --- in the independent implementation ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint: Path) -> Any:
    """One forward pass of transformers' model over random tokens, with what its parts were given."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed; loading FP8 needs it")
    model, info = transformers.DeepseekV32ForCausalLM.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    seen: dict[str, Any] = {"model": model, "info": info, "indexer": {}, "moe": {}, "residual": []}
    hooks = []
    for i, layer in enumerate(model.model.layers):
        indexer, mlp = layer.self_attn.indexer, layer.mlp
        hooks += [
            indexer.register_forward_pre_hook(
                lambda module, args, kwargs, i=i: seen["indexer"].update({i: (args, kwargs)}), with_kwargs=True
            ),
            mlp.register_forward_pre_hook(lambda module, args, i=i: seen["moe"].update({i: args[0]})),
            layer.register_forward_hook(lambda module, args, out: seen["residual"].append(out)),
        ]
    ids = torch.randint(0, 1024, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen["logits"] = model(ids).logits[0]
    for hook in hooks:
        hook.remove()
    return seen


def test_transformers_loads_every_tensor_but_the_mtp_layer(oracle: Any) -> None:
    assert not oracle["info"]["missing_keys"]
    assert not oracle["info"]["mismatched_keys"]
    assert oracle["info"]["unexpected_keys"]
    assert all(key.startswith("model.layers.4.") for key in oracle["info"]["unexpected_keys"])


def dequantized(folder: Path, name: str) -> np.ndarray:
    with Checkpoint.open(folder) as checkpoint:
        values = np.empty(checkpoint.info(name).shape, np.float32)
        dequantize_into(checkpoint.tensor(name), checkpoint.tensor(name + "_scale_inv"), values)
    return values


@pytest.mark.parametrize("part", ["self_attn.q_b_proj", "self_attn.o_proj", "self_attn.indexer.wk", "mlp.down_proj"])
def test_transformers_dequantizes_as_we_do(oracle: Any, tiny_checkpoint: Path, part: str) -> None:
    name = f"model.layers.0.{part}.weight"
    theirs = oracle["model"].get_parameter(name).detach().numpy()
    assert np.array_equal(theirs, dequantized(tiny_checkpoint, name))


def test_transformers_takes_a_partial_block_for_a_shorter_one(oracle: Any, tiny_checkpoint: Path) -> None:
    """transformers 5.24 has block height = rows / scale rows: 96 of 192 in two blocks, the format says 128.

    So parity tests dequantize first. Once this test fails they need not.
    """
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    theirs = oracle["model"].get_parameter(name).detach().numpy()
    differs = np.any(theirs != dequantized(tiny_checkpoint, name), axis=1)
    assert differs[96:128].all() and not differs[:96].any() and not differs[128:].any()


def test_logits_are_spread_and_answers_differ(oracle: Any) -> None:
    logits = oracle["logits"]
    assert logits.isfinite().all()
    assert 2 < logits.std() < 4
    assert logits.argmax(-1).unique().numel() > NUM_TOKENS // 2


def test_residual_stream_neither_explodes_nor_vanishes(oracle: Any) -> None:
    spreads = [float(hidden.std()) for hidden in oracle["residual"]]
    assert len(spreads) == 4
    assert 0.5 < spreads[0] < spreads[-1] < 5


def test_earlier_tokens_change_the_answer(oracle: Any) -> None:
    torch = pytest.importorskip("torch")
    a = torch.arange(3, 43)[None]
    b = a.clone()
    b[0, 0] = 777
    with torch.no_grad():
        difference = oracle["model"](a).logits[0, -1] - oracle["model"](b).logits[0, -1]
    assert difference.std() > 0.02


def index_scores(oracle: Any, layer: int) -> Any:
    """Index scores [num_tokens, num_tokens] by transformers' formula from what its indexer was given."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    indexer = oracle["model"].model.layers[layer].self_attn.indexer
    args, kwargs = oracle["indexer"][layer]
    names = ("hidden_states", "q_resid", "position_embeddings")
    hidden, q_resid, (cos, sin) = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(names))
    with torch.no_grad():
        q = indexer.wq_b(q_resid).view(1, NUM_TOKENS, -1, 128)
        k = indexer.k_norm(indexer.wk(hidden)).unsqueeze(2)
        q_rot, k_rot = modeling.apply_rotary_pos_emb(q[..., :64], k[..., :64], cos, sin, unsqueeze_dim=2)
        q = torch.cat([q_rot, q[..., 64:]], -1)[0]
        k = torch.cat([k_rot, k[..., 64:]], -1)[0, :, 0]
        return torch.einsum("thk,th->tk", torch.einsum("thd,kd->thk", q, k).relu(), indexer.weights_proj(hidden)[0])


@pytest.mark.parametrize("layer", range(4))
def test_no_row_is_tied_at_the_top_k_boundary(oracle: Any, layer: int) -> None:
    scores = index_scores(oracle, layer)
    for row in range(64, NUM_TOKENS):
        ranked = scores[row, : row + 1].sort(descending=True).values
        assert ranked[63] > ranked[64], row


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_router_uses_every_expert_and_minds_its_bias(oracle: Any, layer: int) -> None:
    torch = pytest.importorskip("torch")
    gate = oracle["model"].model.layers[layer].mlp.gate
    with torch.no_grad():
        logits = (oracle["moe"][layer][0] @ gate.weight.T).float()
    bias = gate.e_score_correction_bias
    assert 0.8 < logits.std() < 2

    def choice(with_bias: Any) -> Any:
        scores = logits.sigmoid() + with_bias
        groups = scores.view(-1, 4, 4).topk(2).values.sum(-1).topk(2).indices
        kept = torch.zeros(NUM_TOKENS, 4, dtype=torch.bool).scatter(1, groups, True).repeat_interleave(4, 1)
        return scores.masked_fill(~kept, -torch.inf).topk(4).indices.sort().values

    right = choice(bias)
    assert right.unique().numel() == 16
    assert right.flatten().bincount().max() < NUM_TOKENS * 4 / 3
    assert (right != choice(bias.bfloat16().float())).any()
    assert (right != choice(torch.zeros(16))).any()
