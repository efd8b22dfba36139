from __future__ import annotations

import pytest

from seekforge.common.records import RecordError
from seekforge.formats.engine.ranks import Ranks, crossing, is_handed, is_handed_on, received_name, sum_name
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.program import GraphIO, TensorSpec

PIECES = {"model": (("model.0", "model.1"), ("model.2",)), "mtp": ((), ("mtp.0",))}


def test_stages_have_pieces_of_both_graphs() -> None:
    ranks = Ranks(parallelism=Parallelism(tp=2, pp=2), pipeline_stages=((0, 2), (2, 4)), pieces=PIECES)
    assert ranks.stems(0) == ["model.0", "model.1"] and ranks.stems(1) == ["model.2", "mtp.0"]
    assert ranks.weight_file(3) == "weights.rank3.bin"
    assert Ranks.model_validate(ranks.model_dump(mode="json")) == ranks


@pytest.mark.parametrize(
    ("parallelism", "said"),
    [(Parallelism(), "2 to 4096 ranks"), (Parallelism(tp=2, dp=2), "one replica"), (Parallelism(tp=2), "expected 1")],
)
def test_layouts_that_cannot_be_are_refused(parallelism: Parallelism, said: str) -> None:
    with pytest.raises(RecordError, match=said):
        Ranks(parallelism=parallelism, pipeline_stages=((0, 2), (2, 4)), pieces=PIECES)


def test_names_say_where_a_value_goes() -> None:
    assert sum_name("partial.3") == "sum.3"
    assert is_handed_on("intermediate_out.1") and received_name("intermediate_out.1") == "intermediate.1"
    assert all(map(is_handed, ("partial.0", "sum.0", "local.2", "intermediate.1"))) and not is_handed("logits")


def test_a_value_crosses_stages_that_do_not_read_it() -> None:
    """Place 0 is made anew by each stage; what lies in place 1 is made by the first and read by the last alone."""

    def specs(name: str, places: list[int]) -> tuple[TensorSpec, ...]:
        shape = ("B", "Q", 8)
        return tuple(TensorSpec(name=f"{name}.{i}", dtype="bf16", shape=shape, role="intermediate") for i in places)

    def piece(taken: list[int], made: list[int]) -> GraphIO:
        outputs = specs("intermediate_out", made)
        return GraphIO(file="a.plan", sha256="", inputs=specs("intermediate", taken), outputs=outputs, aliases={})

    stages = [[piece([], [2]), piece([2], [0, 1])], [piece([0], [0])], [piece([0, 1], [])]]
    both = ["intermediate.0", "intermediate.1"]
    assert [list(crossing(stages, border)) for border in range(4)] == [[], both, both, []]
