"""How a side of a comparison is asked and answers: JSON, a line each, over the pipes of a process of its own.

The standard library alone: the Python of another library runs this too. A side is started with two arguments: its
options as JSON, of which `cores` and `clock` are of interest here, and the descriptor that its answers go to, so that
whatever a library prints is none.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

#: Returns seconds.
Clock = Callable[[], float]
#: name -> seconds on the wall, or processor seconds of the process, all threads together.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def serve(make: Callable[[dict[str, Any], Clock], Mapping[str, Callable[..., Any]]]) -> None:
    """Answer requests until stdin ends.

    Args:
        make: is given the options and the clock, and returns name -> function. A request is [name, keywords]; its
            answer {"result": value} or {"error": sentence}. The first answer, to no request, says that all is loaded.
    """
    options = json.loads(sys.argv[1])
    answers = os.fdopen(int(sys.argv[2]), "w", encoding="utf-8")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, options["cores"])

    def answer(work: Callable[[], Any]) -> Any:
        try:
            result = work()
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            answers.write(json.dumps(said) + "\n")
            answers.flush()
            return None
        answers.write(json.dumps({"result": result if isinstance(result, (int, float)) else None}) + "\n")
        answers.flush()
        return result

    functions = answer(lambda: make(options, CLOCKS[options["clock"]]))
    if functions is None:
        return
    for line in sys.stdin:
        name, keywords = json.loads(line)
        answer(functools.partial(functions[name], **keywords))
