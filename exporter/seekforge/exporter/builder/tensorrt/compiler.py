"""Compile one graph in a process of its own, with progress, a log, and errors that name the place in the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seekforge.common import errors
from seekforge.common.errors import EngineError, SeekforgeError
from seekforge.common.system import child_environment
from seekforge.common.temporary import temporary_folder
from seekforge.exporter.builder.options import CompilerOptions
from seekforge.exporter.builder.tensorrt.diagnostics import explain, size_text, too_tight
from seekforge.plugins.tensorrt.library import Flavour

#: Input name -> smallest, typical and largest shape.
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made.

    `layers` and `products` are counted before fusion; `workspaces`: op_type -> most scratch that a plugin asked for;
    `taps`: debug tensor -> its type; `capturable`: whether runs of the plan can be captured in a CUDA graph, None where
    the library does not say; `activation_bytes`: memory that a context of each profile needs, scratch included, or none
    where the library does not say.
    """

    layers: dict[str, int]
    products: dict[str, int]
    plugins: dict[str, int]
    plan_bytes: int
    parse_seconds: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    version: str
    capturable: bool | None
    taps: dict[str, str] = field(default_factory=dict)
    workspaces: dict[str, int] = field(default_factory=dict)
    activation_bytes: list[int] = field(default_factory=list)


#: Phase -> the phase inside it that takes nearly all its time, as TensorRT-RTX 1.7 names them.
_LONG = {"Building engine": "Building engine from subgraph", "Building engine from subgraph": "Computing profile costs"}
#: What the steps of such a phase count, all together; the rest is the long one.
_SHORT_SHARE = 0.1


@dataclass
class _Phase:
    """An open phase, which is the part [start, stop] of the whole."""

    name: str
    steps: int
    start: float
    stop: float
    done: int = 0

    def at(self, done: int) -> float:
        """Return where in the whole the phase is after so many of its steps."""
        share = _SHORT_SHARE if self.name in _LONG else 1.0
        return self.start + (self.stop - self.start) * share * min(done / self.steps, 1.0)


@dataclass
class Phases:
    """Turns nested phases with steps into one fraction that never falls. Pure.

    The first phase without a parent is the whole; a phase inside another is what is left of one of its steps, or of all
    where it takes nearly all the time.
    """

    fraction: float = 0.0
    _open: list[_Phase] = field(default_factory=list)

    def update(self, event: Mapping[str, Any]) -> float:
        """Take one event of the worker and return the fraction done."""
        name = event.get("name")
        match event["event"]:
            case "phase":
                stop = 1.0
                if self._open:
                    outer = self._open[-1]
                    stop = outer.stop if _LONG.get(outer.name) == name else outer.at(outer.done + 1)
                self._open.append(_Phase(str(name), max(int(event["steps"]), 1), min(self.fraction, stop), stop))
            case "step":
                for phase in self._open:
                    if phase.name == name:
                        phase.done = max(phase.done, int(event["step"]) + 1)
                        self.fraction = max(self.fraction, phase.at(phase.done))
            case "finish" if any(phase.name == name for phase in self._open):
                phase = self._open.pop()
                while phase.name != name:
                    phase = self._open.pop()
                self.fraction = max(self.fraction, phase.stop)
        return self.fraction


def compile_graph(
    *,
    flavour: Flavour,
    model: bytes,
    plan: Path,
    plugins: Mapping[str, int],
    sms: Sequence[int],
    profiles: Sequence[Shapes],
    options: CompilerOptions,
    log: Path,
    progress: Callable[[float], None] = lambda fraction: None,
    taps: Sequence[str] = (),
    target: str = "",
    alike: int = 0,
) -> Compiled:
    """Compile an ONNX model into the file `plan`.

    Args:
        flavour: which library.
        model: serialized ONNX.
        plan: file to write.
        plugins: op_type -> how many plugin layers there must be; others are an error.
        sms: SMs that the plan shall run on (TensorRT-RTX).
        profiles: shapes of each optimization profile.
        options: what the library is told beside the graph.
        log: file that everything the library says is appended to.
        progress: told the fraction of compiling that is done.
        taps: tensors that become debug tensors of the plan: they cost nothing until a runtime asks for them.
        target: what messages call that which is compiled for.
        alike: how many layers the plan serves beside each one in it, for messages.

    Raises:
        EngineError: the library refused or crashed; the message names the place in the model and the log.
        EnvironmentFault: the library is missing, needs a GPU, or finds another than the target's.
    """
    with temporary_folder(".compile", parent=plan.parent) as folder:
        source = folder / "graph.onnx"
        source.write_bytes(model)
        request = folder / "request.json"
        request.write_text(
            json.dumps(
                {
                    "flavour": flavour,
                    "target": target,
                    "model": str(source),
                    "plan": str(plan),
                    "plugins": dict(plugins),
                    "taps": list(taps),
                    "sms": list(sms),
                    "profiles": [dict(shapes) for shapes in profiles],
                    "workspace_bytes": options.workspace_bytes,
                    "optimization_level": options.optimization_level,
                    "timing_cache": None if options.timing_cache is None else str(options.timing_cache),
                }
            ),
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "seekforge.exporter.builder.tensorrt.worker", str(request)]
        return _run(command, log, progress, workspace_bytes=options.workspace_bytes, alike=alike)


def _run(
    command: list[str],
    log: Path,
    progress: Callable[[float], None],
    *,
    workspace_bytes: int | None = None,
    alike: int = 0,
) -> Compiled:
    phases = Phases()
    last: dict[str, Any] = {}
    stage = "start"
    path = os.pathsep.join(filter(None, sys.path))  # also from a source tree
    environment = child_environment() | {"PYTHONPATH": path}
    before = log.stat().st_size if log.is_file() else 0
    with log.open("a", encoding="utf-8") as errors_to:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors_to, text=True, errors="replace", env=environment
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                last = json.loads(line)
                if last["event"] == "stage":
                    stage = last["name"]
                elif last["event"] in ("phase", "step", "finish"):
                    progress(phases.update(last))
        except BaseException:  # also when interrupted: no compiler is left behind
            process.kill()
            process.wait()
            raise
        code = process.wait()
    if last.get("event") == "done":
        return Compiled(**{key: value for key, value in last.items() if key != "event"})
    failed = last.get("event") == "failed"
    if failed:
        kind = getattr(errors, last["kind"], EngineError)
        assert issubclass(kind, SeekforgeError)
        if kind is not EngineError:
            raise kind(last["messages"][0])
    if workspace_bytes is not None:
        said = log.read_bytes()[before:].decode("utf-8", "replace")
        tight = too_tight([*(last["messages"] if failed else []), *said.splitlines()], workspace_bytes, alike)
        if tight is not None:
            raise EngineError(f"{tight} (log: {log})")
    if failed:
        raise EngineError(f"{explain(last['messages'], alike)} (log: {log})")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    hint = ""
    if workspace_bytes is not None:
        hint = f", with --workspace {size_text(workspace_bytes)}, which may be too small: pass more, or leave it out"
    raise EngineError(f"the compiler crashed ({how}) in stage {stage!r}{hint}; its last words are in {log}")
