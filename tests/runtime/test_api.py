"""What other programs rely on: names and types of the Python interface, logging, and processes that fork."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seekforge.common.errors import EngineError
from seekforge.runtime import LLM, AsyncLLM, SamplingParams
from seekforge.runtime.llm import LLMOptions

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def test_asyncllm_has_the_keywords_of_llm() -> None:
    known = {one.name for one in inspect.signature(LLM).parameters.values() if one.kind == one.KEYWORD_ONLY}
    assert known == {*LLMOptions.__annotations__, "max_waiting"}
    assert {"generate", "stream", "chat", "close"} <= set(dir(AsyncLLM))
    for name in ("generate", "stream", "chat"):
        ours, theirs = (set(inspect.signature(getattr(cls, name)).parameters) for cls in (AsyncLLM, LLM))
        assert ours ^ theirs <= {"prompt", "prompts"}, name
    assert inspect.signature(AsyncLLM.chat).parameters == inspect.signature(LLM.chat_stream).parameters


def test_a_library_is_silent_unless_somebody_listens() -> None:
    script = "import seekforge, logging; logging.getLogger('seekforge.runtime').error('unheard')"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == done.stderr == ""


def test_who_listens_hears(caplog: pytest.LogCaptureFixture) -> None:
    import seekforge  # noqa: F401 - adds the handler that is silent

    with caplog.at_level(logging.WARNING, "seekforge"):
        logging.getLogger("seekforge.runtime.x").warning("heard")
    assert "heard" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_forks_lives_on_and_its_child_is_told(toy_engine: Path) -> None:
    with LLM(toy_engine, threads=2, num_blocks=20) as llm:
        expected = llm.generate("the cat", GREEDY)[0].outputs[0].token_ids
        child = os.fork()
        if child == 0:
            try:
                llm.generate("the cat", GREEDY)
            except EngineError as error:
                os._exit(7 if "forked" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert llm.generate("the cat", GREEDY)[0].outputs[0].token_ids == expected
