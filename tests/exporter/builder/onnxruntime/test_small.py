"""The `small` preset end to end: what a prefill costs in memory. Slow: it writes 0.9 GB of weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.onnxruntime.build import build
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.program.export import export
from seekforge.formats.engine.weight_file import WEIGHTS
from seekforge.formats.numerics import EXACT
from seekforge.formats.targets import load_target

_PREFILL = """
import json, resource, sys
from seekforge.runtime import LLM, SamplingParams
prompt = [20 + i * 7919 % 2000 for i in range(2048)]
with LLM(sys.argv[1], max_model_len=2112, self_check=False) as llm:
    output = llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0))[0]
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"rss": rss, "n": len(output.outputs[0].token_ids)}))
"""


@pytest.mark.slow
def test_a_prefill_of_2048_tokens_stays_under_2_gb_beyond_the_weights(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "ck", "small")
    export(tmp_path / "ck", tmp_path / "program", numerics=EXACT)
    build(
        tmp_path / "program",
        tmp_path / "engine",
        target=load_target("cpu", ["limits.max_model_len=4096"]),
        checkpoint_folder=tmp_path / "ck",
        force=False,
        progress=Stages(quiet=True),
    )
    command = [sys.executable, "-c", _PREFILL, str(tmp_path / "engine")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured = json.loads(done.stdout)
    weights = (tmp_path / "engine" / WEIGHTS).stat().st_size
    assert measured["n"] == 1
    assert measured["rss"] - weights < 2e9
