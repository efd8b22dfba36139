"""A toy engine with the inputs and outputs of a real one, written by hand, and a byte-level tokenizer.

Its hidden state is a weighted mean of the embeddings of all tokens so far, read back through the block table from
the latent cache that the same step wrote in place: a wrong slot, a lost write or a stale row changes the logits.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from seekforge.formats.engine.manifest import (
    ENGINE_FORMAT,
    Cache,
    Limits,
    Manifest,
    SelfCheck,
    SelfCheckRow,
    Target,
    digest_file,
    load_manifest,
    save_manifest,
)
from seekforge.formats.program import TEMPLATE_FILE, GraphIO, TensorSpec, role_of

VOCAB, TOP, HIDDEN, INDEX_DIM, BLOCK = 320, 32, 16, 128, 64
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CORPUS = ["the cat sat on the mat", "日本語のテキスト", "emoji 🎉 and 👩‍👩‍👧 here", "naïve café"] * 3

# onnx.parser takes no dots in names: `_L0` becomes `.0` afterwards.
GRAPH = """
toy (int64[B,Q] input_ids, int64[B,Q] positions, int64[B,Q] slot_mapping, int32[B,MB] block_table,
     int64[N] logits_index, float[S,16] latent_cache_L{layer}, float[S,128] index_cache_L{layer} {extra_input})
 => (float[B,Q,16] hidden, float[N,32] top_logits, int32[N,32] top_ids, float[N] logsumexp, float[N,320] logits,
     float[S,16] latent_cache_out_L{layer}, float[S,128] index_cache_out_L{layer}, int32[B,Q,1] topk_indices_L{layer})
{{
  zero = Constant<value_int = 0>()
  one = Constant<value_int = 1>()
  minus = Constant<value_int = -1>()
  last = Constant<value_ints = [-1]>()
  rows = Constant<value_ints = [-1, 16]>()
  block = Constant<value_int = 64>()
  no = Constant<value_float = 0.0>()
  ten = Constant<value_float = 0.3>()
  slots = Max(slot_mapping, zero)
  slots_1 = Unsqueeze(slots, last)
  embedded = Gather(embedding, input_ids)
  latent_cache_out_L{layer} = ScatterND(latent_cache_L{layer}, slots_1, embedded)
  keys_1 = Concat<axis = -1>(embedded, embedded, embedded, embedded, embedded, embedded, embedded, embedded)
  index_cache_out_L{layer} = ScatterND(index_cache_L{layer}, slots_1, keys_1)
  table = Cast<to = 7>(block_table)
  table_1 = Unsqueeze(table, last)
  firsts = Mul(table_1, block)
  offsets = Range(zero, block, one)
  read_2 = Add(firsts, offsets)
  shape = Constant<value_ints = [0, -1]>()
  read = Reshape(read_2, shape)
  keys = Gather(latent_cache_out_L{layer}, read)
  read_shape = Shape(read)
  length = Gather(read_shape, one)
  logical = Range(zero, length, one)
  at = Unsqueeze(positions, last)
  distance = Sub(at, logical)
  visible = GreaterOrEqual(distance, zero)
  distance_f = Cast<to = 1>(distance)
  scaled = Mul(distance_f, ten)
  negative = Neg(scaled)
  decay = Exp(negative)
  weights = Where(visible, decay, no)
  mixed = MatMul(weights, keys)
  {hidden}
  flat = Reshape(hidden, rows)
  wanted = Gather(flat, logits_index)
  logits = MatMul(wanted, head)
  k = Constant<value_ints = [32]>()
  top_logits, top_ids_l = TopK<axis = -1, largest = 1, sorted = 1>(logits, k)
  top_ids = Cast<to = 6>(top_ids_l)
  axis = Constant<value_ints = [1]>()
  logsumexp = ReduceLogSumExp<keepdims = 0>(logits, axis)
  topk_l = ArgMax<axis = -1, keepdims = 1>(weights)
  topk_indices_L{layer} = Cast<to = 6>(topk_l)
}}
"""


@dataclass(frozen=True)
class Toy:
    """The toy model in numpy, for expected values."""

    embedding: np.ndarray
    head: np.ndarray

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits after the last of `ids`, [VOCAB], f64."""
        distance = np.arange(len(ids))[::-1]
        hidden = np.exp(-0.3 * distance) @ self.embedding[ids].astype(np.float64)
        return hidden @ self.head.astype(np.float64)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Return the `count` most likely continuations, one after the other."""
        out: list[int] = []
        for _ in range(count):
            out.append(int(self.logits([*ids, *out]).argmax()))
        return out


def make_toy() -> Toy:
    """Random weights whose best logit leads clearly."""
    rng = np.random.default_rng(5)
    embedding = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
    return Toy(embedding, rng.standard_normal((HIDDEN, VOCAB)).astype(np.float32))


def make_tokenizer() -> Tokenizer:
    """Make a small byte-level BPE with DeepSeek's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BOS, EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<｜User｜>", special=False), AddedToken("<think>", special=False)])
    return tokenizer


def _write_graph(folder: Path, file: str, toy: Toy, layer: int, mtp: bool) -> GraphIO:
    hidden = "hidden = Add(mixed, hidden_in)" if mtp else "hidden = Identity(mixed)"
    text = GRAPH.format(layer=layer, extra_input=", float[B,Q,16] hidden_in" if mtp else "", hidden=hidden)
    graph = onnx.parser.parse_graph(text)
    for names in [graph.input, graph.output]:
        for value in names:
            value.name = value.name.replace(f"_L{layer}", f".{layer}")
    for node in graph.node:
        node.input[:] = [name.replace(f"_L{layer}", f".{layer}") for name in node.input]
        node.output[:] = [name.replace(f"_L{layer}", f".{layer}") for name in node.output]
    graph.initializer.append(numpy_helper.from_array(toy.embedding, "embedding"))
    graph.initializer.append(numpy_helper.from_array(toy.head, "head"))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, folder / file, save_as_external_data=True, location=f"{file}.data", size_threshold=0)

    def specs(values: Any) -> tuple[TensorSpec, ...]:
        out = []
        for value in values:
            tensor = value.type.tensor_type
            shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
            role = role_of(value.name) or "result"
            dtype = {1: "f32", 6: "i32", 7: "i64"}[tensor.elem_type]
            out.append(TensorSpec(name=value.name, dtype=dtype, shape=shape, role=role))
        return tuple(out)

    return GraphIO(
        file=file,
        sha256="",
        inputs=specs(graph.input),
        outputs=specs(graph.output),
        aliases={f"{kind}_cache_out.{layer}": f"{kind}_cache.{layer}" for kind in ("latent", "index")},
    )


def write_toy_engine(folder: Path) -> None:
    """Write a whole engine folder."""
    folder.mkdir(parents=True)
    toy = make_toy()
    make_tokenizer().save(str(folder / "tokenizer.json"))
    graphs = {
        "model": _write_graph(folder, "model.onnx", toy, 0, mtp=False),
        "mtp": _write_graph(folder, "mtp.onnx", toy, 1, mtp=True),
    }
    prompt = list(range(10, 90))
    rows = []
    for position in (0, 63, 64, 79):
        logits = toy.logits(prompt[: position + 1])
        top = np.argsort(-logits, kind="stable")[:8]
        lse = float(np.log(np.exp(logits - logits.max()).sum()) + logits.max())
        rows.append(
            SelfCheckRow(position=position, top_ids=tuple(top), top_logits=tuple(logits[top]), logsumexp=lse),
        )
    files = ("model.onnx", "model.onnx.data", "mtp.onnx", "mtp.onnx.data", "tokenizer.json")
    save_manifest(
        folder,
        Manifest(
            format=ENGINE_FORMAT,
            seekforge_version="0.1.0",
            target=Target(name="cpu", backend="onnxruntime"),
            versions={},
            runtime_versions={"onnxruntime": metadata.version("onnxruntime")},
            program_sha256="",
            numerics={},
            layer_range=(0, 1),
            graphs=graphs,
            cache=Cache(
                block_size=BLOCK,
                layers=(0,),
                mtp_layer=1,
                kv_format="f32",
                latent_dim=HIDDEN,
                index_dim=INDEX_DIM,
                bytes_per_block=2 * BLOCK * (HIDDEN + INDEX_DIM) * 4,
            ),
            limits=Limits(max_model_len=1024, max_batch_size=8, max_num_batched_tokens=512),
            vocab_size=VOCAB,
            num_top_logits=TOP,
            bos_token_id=0,
            eos_token_id=1,
            generation={"temperature": 1.0, "top_p": 0.95},
            tokenizer="tokenizer.json",
            files=tuple(digest_file(folder, name) for name in files),
            self_check=SelfCheck(
                prompt_ids=tuple(prompt), rows=tuple(rows), tolerance=1e-3, reason="f32 sums", source="numpy, f64"
            ),
            config={},
            build={},
        ),
    )


def write_chat_engine(
    folder: Path,
    toy_engine: Path,
    *,
    model_type: str = "deepseek_v32",
    template: str | None = None,
    tokens: Sequence[str] = (),
) -> None:
    """Write a copy of the toy engine that has the tokens of DeepSeek-V3.2's conversations.

    Args:
        folder: the folder to make.
        toy_engine: what is copied.
        model_type: the family that it says it is of.
        template: the chat template of its checkpoint.
        tokens: further special tokens.
    """
    shutil.copytree(toy_engine, folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("</think>", "<｜Assistant｜>")])
    tokenizer.add_tokens([AddedToken(text, special=True) for text in tokens])
    (folder / "tokenizer.json").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    manifest = load_manifest(folder)
    names = [file.path for file in manifest.files]
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        names.append(TEMPLATE_FILE)
    files = tuple(digest_file(folder, name) for name in names)
    (folder / "manifest.json").unlink()
    changed = {"files": files, "config": {"model_type": model_type}}
    limits = manifest.limits.model_copy(update={"max_model_len": 3072})  # the text about tools is long in its tokens
    save_manifest(folder, manifest.model_copy(update={**changed, "limits": limits}))
