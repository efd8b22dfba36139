"""What the runtime loads before it serves: nothing that it does not need. `bench_startup.py` measures what it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = ("torch", "triton", "onnx", "onnxscript", "transformers", "seekforge.exporter")
OTHERS = (
    "pydantic",
    "rich",
    "click",
    "yaml",
    "matplotlib",
    "llguidance",
    "cuda",
    "tensorrt",
    "tensorrt_rtx",
    "packaging",
    "seekforge.formats.loader",
    "seekforge.formats.checkpoint.safetensors",
    "seekforge.formats.checkpoint.model_config",
    "seekforge.formats.dump",
    "seekforge.runtime.cli.main",
    "seekforge.runtime.bench",
)

RUN = """
import sys
import seekforge.runtime
assert "numpy" not in sys.modules, "importing the package alone must load nothing"
from seekforge.runtime import LLM, SamplingParams
with LLM({engine!r}, threads=1, num_blocks=9) as llm:
    llm.generate("the cat", SamplingParams(max_tokens=3, presence_penalty=0.5))
{more}
print("\\n".join(sys.modules))
"""


def modules(engine: Path, more: str = "") -> set[str]:
    script = RUN.format(engine=str(engine), more=more)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_generating_on_a_cpu_loads_no_more_than_it_needs(toy_engine: Path) -> None:
    loaded = modules(toy_engine)
    assert sorted(loaded & {*COMPILER, *OTHERS}) == []
    assert {
        "numpy",
        "onnxruntime",
        "tokenizers",
        "seekforge.runtime.sampling.sampler",
    } <= loaded


def test_asyncio_and_grammars_load_no_compiler(toy_engine: Path) -> None:
    pytest.importorskip("llguidance")
    loaded = modules(
        toy_engine,
        "from seekforge.runtime import AsyncLLM, StructuredOutputsParams\n"
        f"with LLM({str(toy_engine)!r}, threads=1, num_blocks=9) as llm:\n"
        "    llm.generate('a', SamplingParams(structured_outputs=StructuredOutputsParams(regex='[xy]')))",
    )
    assert sorted(loaded & set(COMPILER)) == [] and {"llguidance", "asyncio"} <= loaded
