"""The engine's side of a quality check, on the toy engine: tokens in, tokens and likelihoods out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seekforge.common.errors import RequestError
from seekforge.common.system import child_environment
from seekforge.formats.quality_run import ANSWER, RunAnswer, RunRequest, RunRow, selections_file
from seekforge.runtime.llm import LLM
from seekforge.runtime.quality import measure
from seekforge.runtime.sampling.params import SamplingParams

ROWS = (
    RunRow(ids=(20, 21, 22), max_tokens=6),
    RunRow(ids=tuple(range(30, 60)), max_tokens=0),
    RunRow(ids=(40,), max_tokens=9),
)


def test_rows_are_generated_and_predicted_as_requests_are(toy_engine: Path, tmp_path: Path) -> None:
    answer = measure(toy_engine, RunRequest(rows=ROWS, threads=1), tmp_path)
    with LLM(toy_engine, threads=1) as llm:
        for row, completion, nll in zip(ROWS, answer.completions, answer.nll_sums, strict=True):
            params = SamplingParams(temperature=0, max_tokens=row.max_tokens or 1, prompt_logprobs=0)
            (output,) = llm.generate(list(row.ids), params)
            if row.max_tokens:
                assert completion == output.outputs[0].token_ids and nll is None
            else:
                entries = [entry for entry in output.prompt_logprobs or () if entry is not None]
                assert completion == () and len(entries) == 29
                assert nll == pytest.approx(-sum(entry.logprob for entry in entries))
    assert answer.drafts is None and answer.speed is None and not list(tmp_path.iterdir())


def test_drafts_are_counted_and_timed_beside_runs_without(toy_engine: Path, tmp_path: Path) -> None:
    request = RunRequest(rows=ROWS, num_speculative_tokens=2, timed=(0, 2), rounds=2, selections=(1,), threads=1)
    answer = measure(toy_engine, request, tmp_path)
    plain = measure(toy_engine, RunRequest(rows=ROWS, threads=1), tmp_path)
    assert answer.completions == plain.completions
    drafts, speed = answer.drafts, answer.speed
    assert drafts is not None and drafts.num_speculative_tokens == 2 and len(drafts.proposed) == 2
    assert drafts.proposed[0] >= drafts.proposed[1] >= drafts.accepted[1] and drafts.proposed[0] > 0
    assert drafts.acceptance == drafts.accepted[0] / drafts.proposed[0]
    # every token but the first of a row comes of a step: by itself, or with drafts that came true
    steps = sum(map(len, answer.completions)) - 2 - sum(drafts.accepted)
    assert drafts.tokens_per_step == pytest.approx(1 + sum(drafts.accepted) / drafts.proposed[0]) and steps > 0
    assert drafts.speedup is not None and drafts.speedup > 0
    assert speed is not None and speed.prefill_tok_s > 0 and speed.decode_tok_s > 0
    with np.load(tmp_path / selections_file(1), allow_pickle=False) as chosen:
        names = sorted(chosen)
        assert names and all(name.startswith("topk_indices.") for name in names)
        assert all(chosen[name].shape[0] == 30 and chosen[name].dtype == np.int32 for name in names)


def test_drafting_is_a_switch_where_there_are_drafts(toy_engine: Path) -> None:
    with LLM(toy_engine, num_speculative_tokens=1, speculation_off_switch=False, threads=1) as llm:
        assert llm.drafting
        llm.drafting = False
        llm.generate([20, 21], SamplingParams(temperature=0, max_tokens=8))
        assert llm.metrics().drafts_proposed == (0,)
        llm.drafting = True
        llm.generate([20, 21], SamplingParams(temperature=0, max_tokens=8))
        assert llm.metrics().drafts_proposed[0] > 0
    with LLM(toy_engine, threads=1) as llm:
        assert not llm.drafting
        with pytest.raises(RequestError, match="num_speculative_tokens"):
            llm.drafting = True


def test_the_process_answers_in_a_folder_and_refuses_in_one_line(toy_engine: Path, tmp_path: Path) -> None:
    request = tmp_path / "request.json"

    def run(engine: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "seekforge.runtime.quality", str(engine), str(request), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, env=child_environment())

    request.write_text(RunRequest(rows=ROWS[:1], threads=1).model_dump_json())
    done = run(toy_engine)
    assert done.returncode == 0, done.stderr
    answer = RunAnswer.model_validate(json.loads((tmp_path / ANSWER).read_text()))
    assert len(answer.completions[0]) == 6
    refused = run(tmp_path / "nothing")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
