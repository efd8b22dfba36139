"""The process that compiles one graph: a crash of the compiler ends this process, not the build.

Started by `compiler.compile_graph` with the path of a request (JSON). Writes the plan, and one JSON object per line to
its standard output: progress, then a result or errors. Imports neither torch nor onnx, so that its memory
is the compiler's.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from seekforge.common.cli.terminal import echo
from seekforge.common.errors import EnvironmentFault, SeekforgeError
from seekforge.common.files import replace_file
from seekforge.common.system import cpu_seconds, end_with_parent, peak_bytes
from seekforge.plugins.kernels.cuda_driver import startup_fault
from seekforge.plugins.tensorrt.library import load
from seekforge.plugins.tensorrt.plugin import register

#: Seconds between two reports of the steps of one phase, and the depth down to which every step is reported: there
#: are few, and all else is a part of them.
_INTERVAL_S, _ALWAYS_DEPTH = 0.1, 2
#: What TensorRT-RTX 1.7 says of a network that cannot have the flag: for what it knows, and in general.
_UNCAPTURABLE = re.compile("kREQUIRE_USER_ALLOCATION is not compatible|requireUserAllocation && !isStreamCapturable")
#: What both libraries say once for every optimization profile, in order: what a context needs, scratch included.
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")


class Reporter:
    """Writes events to the descriptor that was standard output; whatever else is printed goes to the log."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, event: str, **fields: Any) -> None:
        """Write one event."""
        self._out.write(json.dumps({"event": event, **fields}) + "\n")
        self._out.flush()


def main(path: str) -> int:
    """Compile what the request at `path` asks for."""
    reporter = Reporter()
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        result = compile_request(request, reporter)
    except SeekforgeError as error:
        reporter.send("failed", messages=[str(error)], kind=type(error).__name__)
        return 1
    except CompileError as error:
        reporter.send("failed", messages=error.messages, kind="EngineError")
        return 1
    reporter.send("done", **result)
    return 0


class CompileError(Exception):
    """TensorRT refused; its messages."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("; ".join(messages))
        self.messages = messages


def compile_request(request: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Parse, check what became of the operators, compile, write the plan.

    Raises:
        CompileError: the parser or the builder refused.
        EnvironmentFault: the library is missing, or finds no GPU where it needs one, or another than the target's.
    """
    trt = load(request["flavour"])
    _check_gpu(request)
    logger = _logger(trt)
    registration = register(trt, sms=request["sms"])
    started = time.perf_counter()
    builder = _builder(trt, logger, request)
    network = builder.create_network(_network_flags(trt, request["flavour"]))
    parser = trt.OnnxParser(network, logger)
    reporter.send("stage", name="parse")
    if not parser.parse(Path(request["model"]).read_bytes()):
        raise CompileError(_parser_messages(parser, registration.failures) or logger.errors)
    layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    parsed = time.perf_counter()
    expected = request["plugins"]
    made = {op: count for op, count in registration.made.items() if count}
    if layers["PLUGIN_V3"] != sum(expected.values()) or made != {op: n for op, n in expected.items() if n}:
        raise CompileError(
            [f"{layers['PLUGIN_V3']} plugin layers of {made}, expected {expected}: an operator was not taken as plugin"]
        )
    taps = _mark_debug(network, request["taps"])
    reporter.send("stage", name="compile")
    config = _config(trt, builder, network, request, _monitor(trt, reporter))
    plan, capturable = _build(trt, builder, network, config, logger)
    if plan is None:
        raise CompileError([*registration.failures, *logger.errors] or ["the builder gave no plan and no reason"])
    Path(request["plan"]).write_bytes(plan)
    if request.get("timing_cache"):
        cache = config.get_timing_cache()
        replace_file(Path(request["timing_cache"]), bytes(cache.serialize()))
    return {
        "layers": dict(layers),
        "products": _products(network),
        "plugins": made,
        "workspaces": registration.workspaces,
        "plan_bytes": plan.nbytes,
        "parse_seconds": parsed - started,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": cpu_seconds(),
        "peak_bytes": peak_bytes(),
        "version": trt.__version__,
        "taps": taps,
        "capturable": capturable,
        "activation_bytes": _per_profile(logger.activation_bytes, len(request["profiles"])),
    }


def _build(trt: Any, builder: Any, network: Any, config: Any, logger: Any) -> tuple[Any, bool | None]:
    """Return the plan, or None, and whether its runs can be captured in a CUDA graph; None: the library does not say.

    TensorRT-RTX promises that of a plan whose memory is the user's, and refuses to build one that could not keep it.
    Such a network is built without the promise.
    """
    flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)  # TensorRT has none
    if flag is None:
        return builder.build_serialized_network(network, config), None
    config.set_flag(flag)
    before = len(logger.errors)
    plan = builder.build_serialized_network(network, config)
    if plan is not None or not any(map(_UNCAPTURABLE.search, logger.errors[before:])):
        return plan, True
    del logger.errors[before:]
    logger.activation_bytes.clear()
    echo("[WARNING] seekforge: not capturable, built without REQUIRE_USER_ALLOCATION", err=True)
    config.clear_flag(flag)
    return builder.build_serialized_network(network, config), False


def _mark_debug(network: Any, names: list[str]) -> dict[str, str]:
    """Make tensors of the network debug tensors; return name -> type.

    Raises:
        CompileError: the network has no such tensor, or refuses.
    """
    wanted, marked = set(names), {}
    for i in range(network.num_layers if wanted else 0):
        layer = network.get_layer(i)
        for place in range(layer.num_outputs):
            tensor = layer.get_output(place)
            if tensor.name in wanted and tensor.name not in marked and network.mark_debug(tensor):
                marked[tensor.name] = tensor.dtype.name
    missing = sorted(wanted - marked.keys())
    if missing:
        raise CompileError([f"tap {missing[0]} and {len(missing) - 1} more cannot be debug tensors"])
    return {name: marked[name] for name in names}


def _check_gpu(request: dict[str, Any]) -> None:
    """Refuse to compile for another GPU than the one that is here: TensorRT compiles for that one alone.

    Raises:
        EnvironmentFault: the GPU here is not of an SM that is asked for.
    """
    sm = present_sm() if request["flavour"] == "tensorrt" else None
    if sm is None or sm in request["sms"]:  # without any GPU the library itself says so
        return
    what = f"target {request['target']}" if request["target"] else "the plan"
    wanted = " or ".join(f"sm{one}" for one in request["sms"])
    raise EnvironmentFault(
        f"this GPU is sm{sm}, {what} needs {wanted}; "
        "build where such a GPU is, or for a target of this one ('seekforge targets' lists them)"
    )


def present_sm() -> int | None:
    """Return the compute capability of the GPU that TensorRT compiles on, 89 for an L40S, or None where none answers.

    That is the first one: CUDA_VISIBLE_DEVICES chooses among several.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        if int(driver.cuInit(0)[0]):
            return None
    except (ImportError, RuntimeError):  # no bindings, or no driver behind them
        return None
    kind = driver.CUdevice_attribute
    fault, major = driver.cuDeviceGetAttribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 0)
    worse, minor = driver.cuDeviceGetAttribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0)
    return None if int(fault) or int(worse) else 10 * int(major) + int(minor)


def _why_no_gpu() -> str:
    """Return the driver's own word on why it does not start, and a break, or nothing when it does or says nothing."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        (error,) = driver.cuInit(0)
        if not int(error):
            return ""
        name, text = (ask(error)[1].decode() for ask in (driver.cuGetErrorName, driver.cuGetErrorString))
        fault, version = driver.cuDriverGetVersion()
    except (ImportError, RuntimeError):  # no bindings, or no driver behind them
        return ""
    return startup_fault(int(error), name, text, driver=0 if int(fault) else int(version), runtime=0) + "; "


def _builder(trt: Any, logger: Any, request: dict[str, Any]) -> Any:
    try:
        builder = trt.Builder(logger)
    except Exception as error:  # the binding raises whatever pybind makes of a null pointer
        builder, reason = None, str(error)
    else:
        reason = "; ".join(logger.errors)
    if builder is None:
        sms = " and ".join(f"sm{sm}" for sm in request["sms"])
        where = ""
        if request["flavour"] == "tensorrt":
            where = f"; {_why_no_gpu()}build on a machine with a GPU of {sms}"
        raise EnvironmentFault(f"{request['flavour']} cannot start here ({' '.join(reason.split())}){where}")
    return builder


def _network_flags(trt: Any, flavour: str) -> int:
    """Strong typing is all there is from TensorRT 11 on, and in TensorRT-RTX; before, it must be asked for."""
    if flavour == "tensorrt" and int(trt.__version__.partition(".")[0]) < 11:
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0


def _config(trt: Any, builder: Any, network: Any, request: dict[str, Any], monitor: Any) -> Any:
    config = builder.create_builder_config()
    # f32 is f32: TF32 keeps ten bits of the Hadamard table (±128^-½), of what inlined attention and scores multiply
    config.clear_flag(trt.BuilderFlag.TF32)
    if request["flavour"] == "tensorrt-rtx":
        config.num_compute_capabilities = len(request["sms"])
        for i, sm in enumerate(request["sms"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.progress_monitor = monitor
    if request.get("workspace_bytes"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    if request.get("optimization_level") is not None:
        config.builder_optimization_level = request["optimization_level"]
    if request.get("timing_cache"):
        path = Path(request["timing_cache"])
        config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), False)
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (smallest, typical, largest) in shapes.items():
            profile.set_shape(name, smallest, typical, largest)
        config.add_optimization_profile(profile)
    return config


def _per_profile(said: list[int], num_profiles: int) -> list[int]:
    """Return the bytes of each profile, or none where the library did not say them all: then nothing is known."""
    return said if len(said) == num_profiles else []


def _products(network: Any) -> dict[str, int]:
    """Count native matrix products by the type that they multiply."""
    counts: Counter[str] = Counter()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name == "MATRIX_MULTIPLY":
            counts[layer.get_input(0).dtype.name] += 1
    return dict(counts)


def _parser_messages(parser: Any, failures: list[str]) -> list[str]:
    messages = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        messages.append(f"{error.node_name()}: {failures[-1] if failures else error.desc()}")
    return messages


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Everything to the log; errors and sizes also kept."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.activation_bytes: list[int] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            said = _ACTIVATIONS.search(message)
            if said:
                self.activation_bytes.append(int(said[1]))
            if severity <= trt.ILogger.Severity.INFO:
                echo(f"[{severity.name}] {message}", err=True)

    return Logger()


def _monitor(trt: Any, reporter: Reporter) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Turns nested phases into events, those of inner phases not more often than people can see."""

        def __init__(self) -> None:
            super().__init__()
            self.depth: dict[str | None, int] = {}
            self.last: dict[str, float] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.depth[phase_name] = 1 + self.depth.get(parent_phase, 0)
            reporter.send("phase", name=phase_name, parent=parent_phase, steps=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            outer = self.depth.get(phase_name, 1) <= _ALWAYS_DEPTH
            if outer or now - self.last.get(phase_name, -math.inf) >= _INTERVAL_S:
                self.last[phase_name] = now
                reporter.send("step", name=phase_name, step=step)
            return True

        def phase_finish(self, phase_name: str) -> None:
            reporter.send("finish", name=phase_name)

    return Monitor()


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(sys.argv[1]))
