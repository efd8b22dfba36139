"""Messages of a compiler are told by the place in the model."""

from __future__ import annotations

import pytest

from seekforge.exporter.builder.tensorrt.diagnostics import explain, place


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "layers.3.self_attn.o_proj/BlockFp8Linear",
            "layer 3, the output projection of the attention (operator BlockFp8Linear)",
        ),
        ("layers.12/Mul_4", "layer 12 (operator Mul)"),
        ("lm_head/MatMul", "the head (operator MatMul)"),
        ("(Unnamed Layer* 8) [Constant]", None),
    ],
)
def test_places(name: str, expected: str | None) -> None:
    assert place(name) == expected


def test_the_first_place_and_the_first_message_are_told() -> None:
    said = explain(["Internal  error", "in node layers.7.mlp.gate/MoeRoute_3: bad"])
    assert said == "layer 7, the router (operator MoeRoute): Internal error"
    assert explain(["no place here"]) == "no place here"


@pytest.mark.parametrize(("alike", "expected"), [(1, "layer 7 (and 1 layer like it), the router"), (56, "56 layers")])
def test_of_layers_that_are_alike_all_are_told(alike: int, expected: str) -> None:
    assert expected in explain(["in node layers.7.mlp.gate/MoeRoute: bad"], alike)
