from __future__ import annotations

from pathlib import Path

import pytest

from seekforge.common.errors import OutputError
from seekforge.runtime.evaluation.answers import ANSWERS, Answer, AnswerStore, request_digest
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.text.segments import Segment, SegmentedText


def test_what_was_answered_is_there_when_the_folder_is_opened_again(tmp_path: Path) -> None:
    answer = Answer(request="a", logprob=-1.25e-17, is_greedy=True)
    text = Answer(request="b", text="naïve\u2028🎉", reasoning="so", finish_reason="stop", num_tokens=3)
    with AnswerStore(tmp_path / "out") as store:
        assert store.get("a") is None and store.num_read == 0
        store.add(answer)
        store.add(text)
        with AnswerStore(tmp_path / "out") as second:  # at any time, not only after the end
            assert second.num_read == 2
    with AnswerStore(tmp_path / "out") as store:
        assert (store.get("a"), store.get("b"), store.num_read) == (answer, text, 2)


def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    with AnswerStore(tmp_path) as store:
        store.add(Answer(request="a", logprob=-1))
    path = tmp_path / ANSWERS
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    with AnswerStore(tmp_path) as store:
        assert store.num_read == 1
        store.add(Answer(request="b", logprob=-2))
    with AnswerStore(tmp_path) as store:
        assert store.get("b") == Answer(request="b", logprob=-2)


@pytest.mark.parametrize(
    "line", [b"{}\n", b"no JSON\n", b'{"request": 7}\n', b'{"request": "a", "extra": 1}\n', b"\xff\n"]
)
def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / ANSWERS
    path.write_bytes(line)
    with pytest.raises(OutputError, match="holds something else than answers"):
        AnswerStore(tmp_path)
    assert path.read_bytes() == line


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match=f"holds files but no {ANSWERS}"):
        AnswerStore(tmp_path)
    assert not (tmp_path / ANSWERS).exists()


def test_a_digest_is_of_all_that_an_answer_depends_on() -> None:
    params = SamplingParams(temperature=0)
    questions = [
        request_digest("engine", [1, 2], num_scored=1),
        request_digest("other", [1, 2], num_scored=1),
        request_digest("engine", [1, 2], num_scored=2),
        request_digest("engine", [1, 3], num_scored=1),
        request_digest("engine", [1, 2], params=params),
        request_digest("engine", [1, 2], params=params, repeat=1),
        request_digest("engine", [1, 2], params=SamplingParams(temperature=0, stop=["x"])),
        request_digest("engine", SegmentedText((Segment("a", True),)), params=params),
        request_digest("engine", SegmentedText((Segment("a"),)), params=params),
        request_digest("engine", SegmentedText((Segment("a"),), in_reasoning=True), params=params),
    ]
    assert len(set(questions)) == len(questions)
    assert questions[0] == request_digest("engine", [1, 2], num_scored=1)
