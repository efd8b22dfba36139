"""The bodies of the fused nodes, in standard ONNX operators and the program's own; attributes are sizes of the model.

Shapes: B sequences, Q tokens of each, H heads, C latent values, R rotary values, Hi heads of D values of an
indexer. All tensors are f32, indices as in the operators' contracts.
"""

from __future__ import annotations

import onnx

from seekforge.plugins.dsa_attention.spec import SPEC as DSA_ATTENTION
from seekforge.plugins.functions.builder import Attrs, Text, fake_quantize, onnx_type, swiglu
from seekforge.plugins.mla_attention.spec import SPEC as MLA_ATTENTION
from seekforge.plugins.operator import DOMAIN


def add_rms_norm(attrs: Attrs) -> onnx.FunctionProto:
    """`AddRmsNorm(x, residual, weight) -> norm, total`: total = x + residual, and its RMSNorm; [..., N] all three."""
    text = Text()
    text.add(f"""
  total = Add(x, residual)
  norm = RMSNormalization<axis = -1, epsilon = {_exact(attrs["epsilon"])}>(total, weight)
""")
    return _function(text, "AddRmsNorm", "x, residual, weight", "norm, total", attrs)


def swiglu_form(attrs: Attrs) -> onnx.FunctionProto:
    """`SwiGlu(gate_up [..., 2N]) -> act [..., N]`: silu(gate) · up."""
    text = Text()
    text.add(f"act = Identity({swiglu(text, 'gate_up', 'a_', dtype='f32')})")
    return _function(text, "SwiGlu", "gate_up", "act", attrs)


def fake_quantize_form(attrs: Attrs) -> onnx.FunctionProto:
    """`FakeQuantize(x [..., K]) -> y`: rounded to e4m3 with a power of two per 128 values, and back; same shape."""
    text = Text()
    text.add(f"y = Identity({fake_quantize(text, 'x', 'q_', dtype='f32', bodies='ort')})")
    return _function(text, "FakeQuantize", "x", "y", attrs)


def route_all(attrs: Attrs) -> onnx.FunctionProto:
    """`MoeRouteAll(logits, bias) -> expert_ids, expert_weights, routing`: `MoeRoute`, and its weights as [T, E].

    Experts that were not chosen have 0 there.
    """
    text = Text()
    passed = ", ".join(f"{name} = {_value(attrs[name])}" for name in sorted(attrs))
    text.add(f"""
  expert_ids, expert_weights = {DOMAIN}.MoeRoute<{passed}>(logits, bias)
  shape = Shape(logits)
  zeros = Expand({text.f32(0)}, shape)
  places = Cast<to = {onnx_type("i64")}>(expert_ids)
  routing = ScatterElements<axis = 1>(zeros, places, expert_weights)
""")
    return _function(text, "MoeRouteAll", "logits, bias", "expert_ids, expert_weights, routing", attrs)


def query_rows(attrs: Attrs) -> onnx.FunctionProto:
    """`QueryRows(q_b [B, Q, H · (nope + R)], cos, sin) -> q_nope [H, B · Q, nope], q_pe [B, Q, H, R]`, rotated."""
    heads, nope, rope = int(attrs["heads"]), int(attrs["nope"]), int(attrs["rope"])
    text = Text()
    text.add(f"""
  q4 = Reshape(q_b, {text.ints(0, 0, heads, nope + rope)})
  nope4, rope4 = Split<axis = 3>(q4, {text.ints(nope, rope)})
  nope3 = Reshape(nope4, {text.ints(-1, heads, nope)})
  q_nope = Transpose<perm = [1, 0, 2]>(nope3)
  rope3 = Reshape(rope4, {text.ints(0, 0, heads * rope)})
  turned = RotaryEmbedding<interleaved = 1, num_heads = {heads}, rotary_embedding_dim = {rope}>(rope3, cos, sin)
  q_pe = Reshape(turned, {text.ints(0, 0, heads, rope)})
""")
    return _function(text, "QueryRows", "q_b, cos, sin", "q_nope, q_pe", attrs)


def index_query(attrs: Attrs) -> onnx.FunctionProto:
    """`IndexQuery(flat_q [B, Q, Hi · D], cos, sin, hadamard?) -> index_q [B, Q, Hi, D]`, its first values rotated."""
    heads, dim = int(attrs["heads"]), int(attrs["dim"])
    text = Text()
    text.add(f"turned = {_rope(attrs, heads)}(flat_q, cos, sin)")
    text.add(f"{'split' if attrs['hadamard'] else 'index_q'} = Reshape(turned, {text.ints(0, 0, heads, dim)})")
    if attrs["hadamard"]:
        text.add("index_q = MatMul(split, hadamard)")
    inputs = "flat_q, cos, sin" + (", hadamard" if attrs["hadamard"] else "")
    return _function(text, "IndexQuery", inputs, "index_q", attrs)


def latent_rows(attrs: Attrs) -> onnx.FunctionProto:
    """`LatentRows`: from the joint projection qkv_a [B, Q, …] to the normed query latent and rows of both caches."""
    text = Text()
    latent, rope, dim = int(attrs["latent"]), int(attrs["rope"]), int(attrs["dim"])
    text.add(f"q_a, key, c, pe = Split<axis = 2>(qkv_a, {text.ints(int(attrs['q_lora']), dim, latent, rope)})")
    _latent_norms(text, attrs)
    text.add(f"""
  index_k_norm = LayerNormalization<axis = -1, epsilon = {_exact(attrs["key_epsilon"])}>(key, key_weight, key_bias)
  {"turned" if attrs["hadamard"] else "index_k"} = {_rope(attrs, 1)}(index_k_norm, cos, sin)
""")
    if attrs["hadamard"]:
        text.add("index_k = MatMul(turned, hadamard)")
    formats = "kv_format = 'f32', index_format = 'f32'".replace("'", '"')
    text.add(f"""
  latent_cache_out, index_cache_out = {DOMAIN}.DsaCacheWrite<{formats}, kv_fp8 = {int(attrs["kv_fp8"])},
    indexer_fp8 = {int(attrs["indexer_fp8"])}>(latent_cache, index_cache, kv_latent, k_pe, index_k, slot_mapping)
""")
    inputs = "qkv_a, q_weight, kv_weight, key_weight, key_bias, cos, sin, latent_cache, index_cache, slot_mapping"
    outputs = "q_a_norm, kv_latent, k_pe, index_k_norm, index_k, latent_cache_out, index_cache_out"
    return _function(text, "LatentRows", inputs + (", hadamard" if attrs["hadamard"] else ""), outputs, attrs)


def plain_latent_rows(attrs: Attrs) -> onnx.FunctionProto:
    """`PlainLatentRows`: the same of a layer without an indexer."""
    text = Text()
    latent, rope = int(attrs["latent"]), int(attrs["rope"])
    text.add(f"q_a, c, pe = Split<axis = 2>(qkv_a, {text.ints(int(attrs['q_lora']), latent, rope)})")
    _latent_norms(text, attrs)
    text.add(f"""
  latent_cache_out = {DOMAIN}.MlaCacheWrite<kv_format = "f32", kv_fp8 = {int(attrs["kv_fp8"])}>
    (latent_cache, kv_latent, k_pe, slot_mapping)
""")
    inputs = "qkv_a, q_weight, kv_weight, cos, sin, latent_cache, slot_mapping"
    return _function(text, "PlainLatentRows", inputs, "q_a_norm, kv_latent, k_pe, latent_cache_out", attrs)


def _latent_norms(text: Text, attrs: Attrs) -> None:
    epsilon = _exact(attrs["epsilon"])
    text.add(f"""
  q_a_norm = RMSNormalization<axis = -1, epsilon = {epsilon}>(q_a, q_weight)
  kv_latent = RMSNormalization<axis = -1, epsilon = {epsilon}>(c, kv_weight)
  k_pe = RotaryEmbedding<interleaved = 1, num_heads = 1, rotary_embedding_dim = {int(attrs["rope"])}>(pe, cos, sin)
""")


def head_attention(attrs: Attrs) -> onnx.FunctionProto:
    """`HeadAttention`: `DsaAttention` with queries and results as the products per head have them, [H, B · Q, C]."""
    return _head_attention(attrs, DSA_ATTENTION.name, "HeadAttention", "topk_indices")


def head_mla_attention(attrs: Attrs) -> onnx.FunctionProto:
    """`HeadMlaAttention`: the same of `MlaAttention`."""
    return _head_attention(attrs, MLA_ATTENTION.name, "HeadMlaAttention", "positions")


def _head_attention(attrs: Attrs, operator: str, name: str, last: str) -> onnx.FunctionProto:
    text = Text()
    text.add(f"""
  lead = Shape<start = 0, end = 3>(q_pe)
  latent_dim = Shape<start = 2, end = 3>(q_heads)
  by_token = Transpose<perm = [1, 0, 2]>(q_heads)
  shape = Concat<axis = 0>(lead, latent_dim)
  q_latent = Reshape(by_token, shape)
  o_latent = {DOMAIN}.{operator}<scale = {_exact(attrs["scale"])}, kv_format = "f32">
    (q_latent, q_pe, latent_cache, block_table, {last})
  by_token_shape = Shape(by_token)
  o_by_token = Reshape(o_latent, by_token_shape)
  o_heads = Transpose<perm = [1, 0, 2]>(o_by_token)
""")
    inputs = f"q_heads, q_pe, latent_cache, block_table, {last}"
    return _function(text, name, inputs, "o_heads, q_latent, o_latent", attrs)


def _rope(attrs: Attrs, heads: int) -> str:
    turned = int(attrs["rope"])
    interleaved = int(attrs["interleaved"])
    return f"RotaryEmbedding<interleaved = {interleaved}, num_heads = {heads}, rotary_embedding_dim = {turned}>"


def _exact(value: int | float | str | bool) -> str:
    """Return an f32 attribute as text that is read as the same number."""
    return format(float(value), ".17e")


def _value(value: int | float | str | bool) -> str:
    return _exact(value) if isinstance(value, float) else str(int(value))


def _function(text: Text, name: str, inputs: str, outputs: str, attrs: Attrs) -> onnx.FunctionProto:
    doc = f"fused for ONNX Runtime on a CPU: seekforge.plugins.fused, {name}"
    return text.function(name, inputs.split(", "), outputs.split(", "), sorted(attrs), doc)
