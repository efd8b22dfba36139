"""Which prompts prove an engine whose weights are codes: one long one of a few, and one single token tightly."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from seekforge.common.errors import EngineError
from seekforge.exporter.builder.onnxruntime import self_check
from seekforge.formats.engine.manifest import SelfCheck, SelfCheckRow

LONGEST = 136


def candidates(reference: object, length: int, count: int, draw: int = 0) -> list[self_check._Candidate]:
    row = SelfCheckRow(position=length - 1, top_ids=(1,), top_logits=(1.0,), logsumexp=2.0)
    check = SelfCheck(prompt_ids=(7,) * length, rows=(row,), tolerance=1.0, reason="measured", source="PyTorch")
    return [self_check._Candidate(check, change=0.1, spread=1.0)] * count


@pytest.fixture
def prove(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], tuple[SelfCheck, list[int]]]:
    """Checks an engine that agrees on prompts of some lengths; returns the check and the lengths it was asked."""

    def run(agreeing: set[int]) -> tuple[SelfCheck, list[int]]:
        asked: list[int] = []

        def difference(check: SelfCheck, session: object) -> str | None:
            asked.append(len(check.prompt_ids))
            return None if asked[-1] in agreeing else f"differs on {asked[-1]} tokens within {check.tolerance:g}"

        monkeypatch.setattr(self_check, "_candidates", candidates)
        monkeypatch.setattr(self_check, "_difference", difference)
        return self_check._coded_check(None, None, LONGEST), asked  # type: ignore[arg-type]

    return run


def test_a_flip_on_one_long_prompt_does_not_refuse_an_engine(prove) -> None:
    check, asked = prove({LONGEST - 2, 1})
    assert asked == [LONGEST, LONGEST - 1, LONGEST - 2, 1]
    assert len(check.prompt_ids) == 1


def test_an_engine_that_agrees_on_no_long_prompt_is_refused(prove) -> None:
    with pytest.raises(EngineError, match=f"differs on {LONGEST} tokens within 1"):
        prove({1})


def test_an_engine_must_give_one_token_tightly(prove) -> None:
    with pytest.raises(EngineError, match=r"differs on 1 tokens within 0\.0001"):
        prove({LONGEST})
