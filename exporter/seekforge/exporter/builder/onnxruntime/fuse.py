"""Put pieces of layers together to the nodes of `plugins.fused`, in a folded graph.

A decode step at batch 1 is bound by the weights that it reads and by the number of its nodes. Each rule here looks for
one piece by its structure and puts one node in its place that gives every value of the piece that something else reads
or that is a tap: names stay. A piece that looks otherwise is left as it is, which costs time and changes nothing; a
test counts the nodes of a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import onnx
from onnx import TensorProto, helper, numpy_helper

from seekforge.plugins.block_fp8_linear.spec import SPEC as BLOCK_FP8_LINEAR
from seekforge.plugins.dsa_attention.spec import SPEC as DSA_ATTENTION
from seekforge.plugins.dsa_cache_write.spec import SPEC as DSA_CACHE_WRITE
from seekforge.plugins.dsa_indexer.spec import SPEC as DSA_INDEXER
from seekforge.plugins.mla_attention.spec import SPEC as MLA_ATTENTION
from seekforge.plugins.mla_cache_write.spec import SPEC as MLA_CACHE_WRITE
from seekforge.plugins.moe_experts.spec import SPEC as MOE_EXPERTS
from seekforge.plugins.moe_route.spec import SPEC as MOE_ROUTE
from seekforge.plugins.operator import DOMAIN
from seekforge.plugins.sum_ranks.spec import SPEC as SUM_RANKS

#: Operators that give numbers of type f32 in a folded graph, whose casts to f32 do nothing.
_GIVE_F32: Final = frozenset(
    [
        "Add",
        "Mul",
        "MatMul",
        "MatMulNBits",
        "QMoE",
        "RMSNormalization",
        "LayerNormalization",
        "RotaryEmbedding",
        BLOCK_FP8_LINEAR.name,
        "FoldedLinear",
        "FoldedExperts",
        MOE_EXPERTS.name,
        DSA_ATTENTION.name,
        MLA_ATTENTION.name,
        SUM_RANKS.name,
        "AddRmsNorm",
        "SwiGlu",
    ]
)
#: Operators that give what they take.
_PASS_ON: Final = frozenset(("Reshape", "Split", "Transpose", "Cast"))

_Values = Mapping[str, Any]


class _Piece(Exception):
    """A node that was looked for is another one."""


class _Graph:
    """A graph whose nodes are looked up by the values that they make and read."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes = list(graph.node)
        self.outputs = {value.name for value in graph.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self._attributes: dict[str, _Values] = {}
        self.index()

    def index(self) -> None:
        """Note anew who makes and who reads what."""
        self.producer: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self._ids = {id(node) for node in self.nodes}
        for node in self.nodes:
            self._note(node)

    def _note(self, node: onnx.NodeProto) -> None:
        self.producer.update((name, node) for name in node.output if name)
        for name in set(_reads(node)):
            self.readers[name].append(node)

    def has(self, node: onnx.NodeProto) -> bool:
        """Whether a node is still part of the graph."""
        return id(node) in self._ids

    def made_by(self, value: str, *op_types: str) -> onnx.NodeProto:
        """Return the node that makes `value`, one of these operators."""
        node = self.producer.get(value)
        if node is None or node.op_type not in op_types:
            raise _Piece
        return node

    def read_by(self, value: str, op_type: str) -> onnx.NodeProto:
        """Return the one reader of `value` with this operator."""
        readers = [node for node in self.readers[value] if node.op_type == op_type]
        if len(readers) != 1:
            raise _Piece
        return readers[0]

    def is_constant(self, value: str) -> bool:
        """Whether a value is a weight or a constant: nothing makes it, and it is no input of the step."""
        return value not in self.producer

    def width(self, value: str) -> int:
        """Return the last size of a constant or of an input."""
        if value in self.constants:
            return self.constants[value].dims[-1]
        for known in self.graph.input:
            if known.name == value:
                return known.type.tensor_type.shape.dim[-1].dim_value
        raise _Piece

    def ints(self, value: str) -> list[int]:
        """Return a constant list of integers."""
        if value not in self.constants:
            raise _Piece
        return [int(one) for one in numpy_helper.to_array(self.constants[value]).reshape(-1)]

    def replace(self, op_type: str, name: str, inputs: list[str], outputs: list[str], attrs: _Values) -> None:
        """Let one node give `outputs` in place of the nodes that do; those whose values nobody reads then go.

        Raises:
            _Piece: an earlier node of this operator has other attributes.
        """
        if self._attributes.setdefault(op_type, attrs) != attrs:
            raise _Piece  # all nodes of an operator share one body
        node = helper.make_node(op_type, inputs, outputs, name=name, domain=DOMAIN, **attrs)
        replaced = [self.producer[output] for output in outputs]
        for other, output in zip(replaced, outputs, strict=True):
            unused = f"{output}/unused"
            other.output[list(other.output).index(output)] = unused
            self.producer[unused] = other
        self.nodes.append(node)
        self._ids.add(id(node))
        self._note(node)
        self.clean(replaced)

    def read(self, node: onnx.NodeProto, number: int, value: str) -> None:
        """Let an input of a node be another value; what made the one before goes if nobody reads it."""
        before = node.input[number]
        node.input[number] = value
        self.readers[before] = [one for one in self.readers[before] if one is not node]
        self.readers[value].append(node)
        self.clean([self.producer[before]])

    def clean(self, suspects: Iterable[onnx.NodeProto]) -> None:
        """Drop those of these nodes that nobody reads, and what nobody reads then."""
        waiting = list(suspects)
        while waiting:
            node = waiting.pop()
            if not self.has(node) or any(self.readers[name] or name in self.outputs for name in node.output):
                continue
            self._ids.discard(id(node))
            for name in node.output:
                if self.producer.get(name) is node:
                    del self.producer[name]
            for name in set(_reads(node)):
                self.readers[name] = [one for one in self.readers[name] if one is not node]
                if name in self.producer:
                    waiting.append(self.producer[name])

    def write(self) -> None:
        """Put the nodes back, each behind those that it reads, else in their order."""
        known = {value.name for value in self.graph.input} | self.constants.keys() | {""}
        ordered: list[onnx.NodeProto] = []
        waiting = sorted((node for node in self.nodes if self.has(node)), key=self._place)
        while waiting:
            later = []
            for node in waiting:
                if all(name in known for name in _reads(node)):
                    ordered.append(node)
                    known.update(node.output)
                else:
                    later.append(node)
            assert len(later) < len(waiting), "fusing made a cycle"
            waiting = later
        del self.graph.node[:]
        self.graph.node.extend(ordered)

    def _place(self, node: onnx.NodeProto) -> int:
        return self._first.get(node.output[0], len(self._first))

    def remember_order(self) -> None:
        """Note where values were made, so that fused nodes stand where their pieces did."""
        self._first = {name: number for number, node in enumerate(self.nodes) for name in node.output}


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = {name for one in attribute.g.node for name in one.output}
            inner |= {value.name for value in (*attribute.g.input, *attribute.g.initializer)}
            yield from (name for one in attribute.g.node for name in _reads(one) if name not in inner)


def fuse(model: onnx.ModelProto) -> None:
    """Fuse what can be, in place; weights are constants or inputs, bodies are not attached yet."""
    graph = _Graph(model.graph)
    graph.remember_order()
    _drop_casts(graph)
    graph.clean(graph.nodes)
    for op_type, rule in _RULES:
        for node in [node for node in graph.nodes if node.op_type == op_type]:
            if graph.has(node):
                try:
                    rule(graph, node)
                except _Piece:
                    continue
    graph.write()


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


def _drop_casts(graph: _Graph) -> None:
    """Take casts of f32 to f32 out. A tap or an output keeps its name, which then belongs to what was cast."""
    f32 = {value.name for value in graph.graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    f32 |= {name for name, tensor in graph.constants.items() if tensor.data_type == TensorProto.FLOAT}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        for number, name in enumerate(node.input):
            while name in renamed:
                name = renamed[name]
            node.input[number] = name
        is_f32 = node.op_type in _GIVE_F32 or (node.op_type in (*_PASS_ON, "Gather") and node.input[0] in f32)
        if node.op_type == "Cast" and _attribute(node, "to") == TensorProto.FLOAT:
            source, result = node.input[0], node.output[0]
            if source in f32 and source in graph.producer:
                maker = graph.producer[source]
                if "/" in source and source not in graph.outputs:  # no tap: the result's name takes its place
                    maker.output[:] = [result if name == source else name for name in maker.output]
                    graph.producer[result] = maker
                    renamed[source] = result
                    for other in kept:
                        other.input[:] = [result if name == source else name for name in other.input]
                    f32.add(result)
                    continue
                renamed[result] = source
                if result not in graph.outputs:
                    continue  # else both names are asked for: the cast stays, and what reads it reads its source
            is_f32 = True
        if is_f32:
            f32.update(node.output)
        kept.append(node)
    graph.nodes = kept
    graph.index()


# --- the rules: each takes a node of its operator, and raises _Piece where the piece looks otherwise -----------------


def _add_rms_norm(graph: _Graph, norm: onnx.NodeProto) -> None:
    total = graph.made_by(norm.input[0], "Add")
    if any(map(graph.is_constant, total.input)) or _attribute(norm, "axis", -1) != -1:
        raise _Piece
    inputs = [*total.input, norm.input[1]]
    outputs = [norm.output[0], total.output[0]]
    graph.replace("AddRmsNorm", norm.name, inputs, outputs, {"epsilon": _attribute(norm, "epsilon")})


def _swiglu(graph: _Graph, product: onnx.NodeProto) -> None:
    silu = graph.made_by(product.input[0], "Mul")
    split = graph.made_by(product.input[1], "Split")
    sigmoid = graph.made_by(silu.input[1], "Sigmoid")
    gate, up = split.output
    if silu.input[0] != gate or sigmoid.input[0] != gate or product.input[1] != up:
        raise _Piece
    graph.replace("SwiGlu", product.name, [split.input[0]], [product.output[0]], {})


def _route_all(graph: _Graph, scatter: onnx.NodeProto) -> None:
    ids = graph.made_by(scatter.input[1], "Cast").input[0]
    route = graph.made_by(ids, MOE_ROUTE.name)
    if scatter.input[2] != route.output[1]:
        raise _Piece
    outputs = [*route.output, scatter.output[0]]
    attrs = {name: _attribute(route, name) for name in ("n_group", "topk_group", "top_k", "norm", "scale")}
    graph.replace("MoeRouteAll", route.name, list(route.input), outputs, attrs)


def _query_rows(graph: _Graph, turn: onnx.NodeProto) -> None:
    reshape = graph.made_by(turn.input[0], "Reshape")
    split = graph.made_by(reshape.input[0], "Split")
    source = graph.made_by(split.input[0], "Reshape")
    nope, rope = graph.ints(split.input[1])
    transpose = graph.read_by(split.output[0], "Transpose")
    result = graph.read_by(turn.output[0], "Reshape")
    heads = _attribute(turn, "num_heads", 1)
    if reshape.input[0] != split.output[1] or list(_attribute(transpose, "perm")) != [1, 0, 2]:
        raise _Piece
    if not _attribute(turn, "interleaved", 0) or _attribute(turn, "rotary_embedding_dim", 0) != rope:
        raise _Piece
    outputs = [transpose.output[0], result.output[0]]
    attrs = {"heads": heads, "nope": nope, "rope": rope}
    graph.replace("QueryRows", turn.name, [source.input[0], *turn.input[1:]], outputs, attrs)


def _turned(graph: _Graph, value: str) -> tuple[onnx.NodeProto, list[str]]:
    """Return the RoPE behind a rotated index key or query, and the Hadamard matrix if it is multiplied with one."""
    node = graph.made_by(value, "Reshape", "RotaryEmbedding")
    hadamard: list[str] = []
    if node.op_type == "Reshape" and graph.producer[node.input[0]].op_type == "MatMul":
        product = graph.producer[node.input[0]]
        hadamard = [product.input[1]]
        if not graph.is_constant(hadamard[0]):
            raise _Piece
        node = graph.made_by(graph.made_by(product.input[0], "Reshape").input[0], "RotaryEmbedding")
    elif node.op_type == "Reshape":
        node = graph.made_by(node.input[0], "RotaryEmbedding")
    return node, hadamard


def _rope_of(turn: onnx.NodeProto) -> dict[str, int]:
    return {"rope": _attribute(turn, "rotary_embedding_dim"), "interleaved": _attribute(turn, "interleaved", 0)}


def _index_query(graph: _Graph, indexer: onnx.NodeProto) -> None:
    _index_weights(graph, indexer.input[1])
    turn, hadamard = _turned(graph, indexer.input[0])
    heads = _attribute(turn, "num_heads", 1)
    dim = graph.width(indexer.input[2].replace("_out.", "."))
    attrs = {"heads": heads, "dim": dim, "hadamard": int(bool(hadamard)), **_rope_of(turn)}
    graph.replace("IndexQuery", turn.name, [*turn.input, *hadamard], [indexer.input[0]], attrs)


def _index_weights(graph: _Graph, value: str) -> None:
    """Multiply the tokens as they are: a Reshape before and one behind a product change no number of it."""
    scaled = graph.made_by(value, "Mul")
    reshape = graph.made_by(scaled.input[0], "Reshape")
    product = graph.made_by(reshape.input[0], "MatMul", "MatMulNBits")
    flat = graph.made_by(product.input[0], "Reshape")
    if len(graph.readers[product.output[0]]) != 1:
        raise _Piece
    graph.read(product, 0, flat.input[0])
    graph.read(scaled, 0, product.output[0])


def _latent_rows(graph: _Graph, write: onnx.NodeProto) -> None:
    has_indexer = write.op_type == DSA_CACHE_WRITE.name
    caches = list(write.input[: 2 if has_indexer else 1])
    c, pe, *keys, slots = write.input[len(caches) :]
    norm, turn = graph.made_by(c, "RMSNormalization"), graph.made_by(pe, "RotaryEmbedding")
    split = graph.made_by(norm.input[0], "Split")
    q_norm = graph.read_by(split.output[0], "RMSNormalization")
    sizes = graph.ints(split.input[1])
    if split.output[-1] != turn.input[0] or split.output[-2] != norm.input[0] or len(sizes) != (4 if keys else 3):
        raise _Piece
    if not _attribute(turn, "interleaved", 0) or _attribute(norm, "epsilon") != _attribute(q_norm, "epsilon"):
        raise _Piece
    attrs = {
        "q_lora": sizes[0],
        "latent": sizes[-2],
        "rope": sizes[-1],
        "epsilon": _attribute(norm, "epsilon"),
        "kv_fp8": _attribute(write, "kv_fp8"),
    }
    weights = [q_norm.input[1], norm.input[1]]
    if not keys:
        inputs = [split.input[0], *weights, *turn.input[1:], *caches, slots]
        outputs = [q_norm.output[0], c, pe, *write.output]
        graph.replace("PlainLatentRows", write.name, inputs, outputs, attrs)
        return
    key_turn, hadamard = _turned(graph, keys[0])
    key_norm = graph.made_by(key_turn.input[0], "LayerNormalization")
    if key_norm.input[0] != split.output[1] or list(key_turn.input[1:]) != list(turn.input[1:]):
        raise _Piece
    if _attribute(key_turn, "rotary_embedding_dim") != sizes[-1]:
        raise _Piece
    attrs |= {
        "dim": sizes[1],
        "key_epsilon": _attribute(key_norm, "epsilon"),
        "interleaved": _attribute(key_turn, "interleaved", 0),
        "indexer_fp8": _attribute(write, "indexer_fp8"),
        "hadamard": int(bool(hadamard)),
    }
    inputs = [split.input[0], *weights, *key_norm.input[1:], *turn.input[1:], *caches, slots, *hadamard]
    outputs = [q_norm.output[0], c, pe, key_norm.output[0], keys[0], *write.output]
    graph.replace("LatentRows", write.name, inputs, outputs, attrs)


def _head_attention(graph: _Graph, attention: onnx.NodeProto) -> None:
    reshape = graph.made_by(attention.input[0], "Reshape")
    transpose = graph.made_by(reshape.input[0], "Transpose")
    behind = graph.read_by(attention.output[0], "Reshape")
    result = graph.read_by(behind.output[0], "Transpose")
    if any(list(_attribute(node, "perm")) != [1, 0, 2] for node in (transpose, result)):
        raise _Piece
    name = "HeadAttention" if attention.op_type == DSA_ATTENTION.name else "HeadMlaAttention"
    inputs = [transpose.input[0], *attention.input[1:]]
    outputs = [result.output[0], attention.input[0], attention.output[0]]
    graph.replace(name, attention.name, inputs, outputs, {"scale": _attribute(attention, "scale")})


#: Operator at which a rule begins -> the rule; in the order in which they are applied.
_RULES: Final[tuple[tuple[str, Callable[[_Graph, onnx.NodeProto], None]], ...]] = (
    ("RMSNormalization", _add_rms_norm),
    ("Mul", _swiglu),
    ("ScatterElements", _route_all),
    ("RotaryEmbedding", _query_rows),
    (DSA_CACHE_WRITE.name, _latent_rows),
    (MLA_CACHE_WRITE.name, _latent_rows),
    (DSA_INDEXER.name, _index_query),
    (DSA_ATTENTION.name, _head_attention),
    (MLA_ATTENTION.name, _head_attention),
)
