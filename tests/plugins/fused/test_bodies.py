"""The fused nodes: the library against their bodies, in sizes of models and in odd ones, of one and of many tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from seekforge.common import dtypes
from seekforge.plugins.functions.attach import attach
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.native import FUSED
from seekforge.plugins.native.library import keep_row_bits
from seekforge.plugins.operator import DOMAIN, DOMAIN_VERSION
from seekforge.plugins.testing import Draw, max_error, run_model
from seekforge.plugins.torch_ops import DTYPE_NAMES

F32 = Specialization("f32", "float8", "f32", "ort")
#: f32 sums in another order, and another exponential; a weight bent by 1 % moves the results by 1e-3 and more.
TOLERANCE = 3e-6
Attrs = Mapping[str, int | float | str]


def run(
    op_type: str, attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor], library: Path | None
) -> list[Tensor]:
    """Run one fused node; `outputs` tell shapes and dtypes."""

    def values(tensors: Sequence[Tensor], prefix: str) -> list[onnx.ValueInfoProto]:
        kinds = [dtypes.ONNX[DTYPE_NAMES[t.dtype]] for t in tensors]
        return [
            onnx.helper.make_tensor_value_info(f"{prefix}{n}", kind, list(t.shape))
            for n, (kind, t) in enumerate(zip(kinds, tensors, strict=True))
        ]

    taken, made = values(inputs, "in"), values(outputs, "out")
    node = onnx.helper.make_node(op_type, [v.name for v in taken], [v.name for v in made], domain=DOMAIN, **attrs)
    graph = onnx.helper.make_graph([node], op_type, taken, made)
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
    attach(model, F32)
    if library is not None:
        del model.functions[:]
    results = [torch.empty_like(t) for t in outputs]
    run_model(
        model,
        {f"in{n}": t for n, t in enumerate(inputs)},
        {f"out{n}": t for n, t in enumerate(results)},
        library=library,
        threads=2,
    )
    return results


def assert_same(op_type: str, attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor], library: Path) -> None:
    expected = run(op_type, attrs, inputs, outputs, None)
    got = run(op_type, attrs, inputs, outputs, library)
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        if one.dtype == torch.float32:
            assert max_error(one, other) < TOLERANCE, (op_type, number)
        else:
            assert torch.equal(one, other), (op_type, number)


STEPS = [(1, 1), (2, 3), (1, 70)]


@pytest.mark.parametrize("width", [1024, 13])
@pytest.mark.parametrize(("b", "q"), STEPS)
def test_add_rms_norm(b: int, q: int, width: int, library: Path) -> None:
    draw = Draw(width)
    x = draw.normal(b, q, width)
    inputs = [x, draw.normal(b, q, width), draw.normal(width)]
    assert_same("AddRmsNorm", {"epsilon": 1e-6}, inputs, [x, x], library)


@pytest.mark.parametrize("width", [384, 5])
@pytest.mark.parametrize("rows", [1, 100])
def test_swiglu_reaches_both_ends(rows: int, width: int, library: Path) -> None:
    x = Draw(rows).normal(rows, 2 * width) * 4
    x[0, 0], x[0, 1], x[0, 2] = 100.0, -100.0, 0.0
    assert_same("SwiGlu", {}, [x], [x[:, :width]], library)


@pytest.mark.parametrize("shape", [(1, 128), (3, 70, 384)])
def test_fake_quantize_gives_the_same_numbers(shape: tuple[int, ...], library: Path) -> None:
    x = Draw(shape[0]).normal(*shape) * torch.exp2(Draw(1).uniform(*shape[:-1], 1, low=-20, high=20))
    x[..., 5] = 0.0
    (expected,), (got,) = (run("FakeQuantize", {}, [x], [x], of) for of in (None, library))
    assert torch.equal(got, expected)


def test_route_all(library: Path) -> None:
    draw = Draw(1)
    attrs = {"n_group": 4, "topk_group": 2, "top_k": 4, "norm": 1, "scale": 2.5}
    logits, bias = draw.normal(33, 16), draw.normal(16) * 0.1
    outputs = [torch.empty(33, 4, dtype=torch.int32), torch.empty(33, 4), torch.empty(33, 16)]
    assert_same("MoeRouteAll", attrs, [logits, bias], outputs, library)


def angles(draw: Draw, b: int, q: int, rope: int) -> tuple[Tensor, Tensor]:
    turn = draw.normal(b, q, rope // 2)
    return turn.cos(), turn.sin()


@pytest.mark.parametrize(("b", "q"), STEPS)
def test_query_rows(b: int, q: int, library: Path) -> None:
    draw = Draw(q)
    heads, nope, rope = 3, 24, 16
    inputs = [draw.normal(b, q, heads * (nope + rope)), *angles(draw, b, q, rope)]
    outputs = [torch.empty(heads, b * q, nope), torch.empty(b, q, heads, rope)]
    assert_same("QueryRows", {"heads": heads, "nope": nope, "rope": rope}, inputs, outputs, library)


@pytest.mark.parametrize("hadamard", [0, 1])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(("b", "q"), STEPS)
def test_index_query(b: int, q: int, interleaved: int, hadamard: int, library: Path) -> None:
    draw = Draw(q)
    heads, dim, rope = 5, 128, 64
    inputs = [draw.normal(b, q, heads * dim), *angles(draw, b, q, rope)]
    inputs += [draw.normal(dim, dim)] if hadamard else []
    attrs = {"heads": heads, "dim": dim, "rope": rope, "interleaved": interleaved, "hadamard": hadamard}
    assert_same("IndexQuery", attrs, inputs, [torch.empty(b, q, heads, dim)], library)


def test_an_input_that_is_missing_is_an_error(library: Path) -> None:
    """A graph of a stranger may leave one out that its attributes ask for."""
    draw = Draw(1)
    attrs = {"heads": 2, "dim": 128, "rope": 64, "interleaved": 0, "hadamard": 1}
    inputs = [draw.normal(1, 1, 256), *angles(draw, 1, 1, 64)]
    with pytest.raises(Exception, match=r"IndexQuery: an input that its attributes ask for is missing"):
        run("IndexQuery", attrs, inputs, [torch.empty(1, 1, 2, 128)], library)


@pytest.mark.parametrize("fp8", [0, 1])
@pytest.mark.parametrize("has_indexer", [True, False])
@pytest.mark.parametrize(("b", "q"), STEPS)
def test_latent_rows(b: int, q: int, has_indexer: bool, fp8: int, library: Path) -> None:
    draw = Draw(q)
    q_lora, dim, latent, rope = 40, 128, 128, 16
    width = q_lora + (dim if has_indexer else 0) + latent + rope
    turned = angles(draw, b, q, rope)
    caches = [draw.normal(2 * 64, latent + rope)] + ([draw.normal(2 * 64, dim)] if has_indexer else [])
    slots = (torch.arange(b * q) + 30).reshape(b, q)
    slots[0, -1] = -1 if q > 1 else 5
    keys = [draw.normal(dim), draw.normal(dim)] if has_indexer else []
    inputs = [draw.normal(b, q, width), draw.normal(q_lora), draw.normal(latent), *keys, *turned, *caches, slots]
    inputs += [draw.normal(dim, dim)] if has_indexer and fp8 else []
    attrs: dict[str, int | float] = {"q_lora": q_lora, "latent": latent, "rope": rope, "epsilon": 1e-6, "kv_fp8": fp8}
    if has_indexer:
        attrs |= {"dim": dim, "key_epsilon": 1e-6, "interleaved": 0, "indexer_fp8": fp8, "hadamard": fp8}
    shapes = [(q_lora,), (latent,), (rope,), *([(dim,), (dim,)] if has_indexer else [])]
    outputs = [*(torch.empty(b, q, *shape) for shape in shapes), *caches]
    name = "LatentRows" if has_indexer else "PlainLatentRows"
    expected, got = run(name, attrs, inputs, outputs, None), run(name, attrs, inputs, outputs, library)
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        rows = slice(1, None) if number >= len(shapes) else slice(None)  # slot 0 is scrap
        # a value beside the border of two FP8 numbers may round to the other one
        differing = ((one[rows] - other[rows]).abs() > 1e-5 * other[rows].abs().max()).float().mean()
        assert differing <= (2e-3 if fp8 and number >= len(shapes) else 0), number


@pytest.mark.parametrize("operator", ["HeadAttention", "HeadMlaAttention"])
@pytest.mark.parametrize(("b", "q"), STEPS)
def test_head_attention(b: int, q: int, operator: str, library: Path) -> None:
    draw = Draw(q)
    heads, latent, rope = 6, 64, 16
    cache, table = draw.normal(8 * 64, latent + rope), draw.block_table(b, 3, 8)
    positions = (torch.arange(q) + 100)[None].expand(b, q).contiguous()
    chosen = torch.where(torch.arange(150) <= positions.unsqueeze(-1), torch.arange(150), -1).int()
    last = chosen if operator == "HeadAttention" else positions
    inputs = [draw.normal(heads, b * q, latent), draw.normal(b, q, heads, rope), cache, table, last]
    outputs = [torch.empty(heads, b * q, latent), *(torch.empty(b, q, heads, latent) for _ in range(2))]
    assert_same(operator, {"scale": 0.1}, inputs, outputs, library)


def experts_case(tokens: int, top_k: int, hidden: int, inter: int, experts: int = 9) -> list[Tensor]:
    draw = Draw(tokens)
    ids = torch.tensor([draw.order(experts)[:top_k].tolist() for _ in range(tokens)]).reshape(tokens, top_k)
    w13, w2 = draw.normal(experts, hidden, 2 * inter) / hidden**0.5, draw.normal(experts, inter, hidden) / inter**0.5
    return [draw.normal(tokens, hidden), ids.int(), draw.uniform(tokens, top_k), w13, w2]


@pytest.mark.parametrize(("hidden", "inter"), [(640, 128), (40, 27)])
@pytest.mark.parametrize("tokens", [0, 1, 8, 150])
def test_folded_experts(tokens: int, hidden: int, inter: int, library: Path) -> None:
    inputs = experts_case(tokens, 4, hidden, inter)
    assert_same("FoldedExperts", {"act_quant": "none"}, inputs, inputs[:1], library)


def test_experts_of_a_few_tokens_do_not_depend_on_company(library: Path) -> None:
    inputs = experts_case(8, 4, 640, 128)
    together = run("FoldedExperts", {"act_quant": "none"}, inputs, inputs[:1], library)[0]
    for token in range(8):
        alone = [part[token : token + 1].contiguous() for part in inputs[:3]] + inputs[3:]
        (result,) = run("FoldedExperts", {"act_quant": "none"}, alone, alone[:1], library)
        assert torch.equal(result, together[token : token + 1])


def test_few_rows_give_the_bits_of_many_where_that_is_asked_for(library: Path) -> None:
    inputs = experts_case(40, 4, 640, 128)
    few = [part[:10].contiguous() for part in inputs[:3]] + inputs[3:]
    most, some = (torch.bincount(one[1].flatten(), minlength=9) for one in (inputs, few))
    assert most.max() > 8 >= some.max() and some.min() > 1

    def equal() -> bool:
        together, alone = (
            run("FoldedExperts", {"act_quant": "none"}, one, one[:1], library)[0] for one in (inputs, few)
        )
        return torch.equal(together[:10], alone)

    keep_row_bits(True)
    keep_row_bits(True)
    assert equal()
    keep_row_bits(False)
    assert equal(), "the other one who asked is still there"
    keep_row_bits(False)


def test_experts_that_there_are_not_and_sizes_that_differ_are_errors(library: Path) -> None:
    attrs, good = {"act_quant": "none"}, experts_case(3, 2, 40, 27)
    for place, bad in [
        (1, torch.tensor([[0, 1], [2, 9], [3, 4]], dtype=torch.int32)),
        (1, torch.tensor([[0, 1], [2, -2], [3, 4]], dtype=torch.int32)),
        (2, good[2][:2]),
        (3, good[3][:8]),
        (4, good[4][:, :26]),
    ]:
        inputs = [*good[:place], bad.contiguous(), *good[place + 1 :]]
        with pytest.raises(Exception, match=r"FoldedExperts: (sizes of the inputs|expert_ids names an expert)"):
            run("FoldedExperts", attrs, inputs, good[:1], library)
    with pytest.raises(Exception, match="no whole blocks of 128"):
        run("FoldedExperts", {"act_quant": "ue8m0"}, good, good[:1], library)


def test_every_fused_node_has_a_test_here() -> None:
    text = Path(__file__).read_text()
    assert [name for name in FUSED if f'"{name}"' not in text] == []
