"""What one plugin call costs the host: a script, not a test. `python -m tests.benchmarks.plugin_calls [--json]`

Times TensorRT's call of `enqueue` in processor time of one thread, for every operator of a step of DeepSeek-V3.2, with
shapes as TensorRT-RTX's own objects hold them and another set of addresses each time, down to the driver: that one is
pretended (`pretended_driver.c`), so no GPU is needed and its own work, a few microseconds a launch, is not in it, and
neither is the way from TensorRT into Python. Needs the `gpu` and `trt` extras and a C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.support.kernel_cases import fake_kernels, input_shapes

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.sizing.calls import Call, StepShape, step_calls
from seekforge.plugins.kernels.kernel_set import Image
from seekforge.plugins.kernels.launch_plan import op_kernels, statics_of
from seekforge.plugins.kernels.launcher import CudaDriver, OpLauncher
from seekforge.plugins.operator import OpSpec
from seekforge.plugins.registry import SPECS
from seekforge.plugins.tensorrt import library
from seekforge.plugins.tensorrt.plugin import make_fields, register

SM: Final = 90
#: Steps that are timed.
STEPS: Final = {"decode of 32": StepShape(32, 1, 32768), "2,048 tokens of a prompt": StepShape(1, 2048, 32768)}
#: Layers whose addresses take turns, calls of each in a round, and rounds, of which the fastest counts.
LAYERS, TURNS, ROUNDS = 60, 4, 5


def pretend_driver() -> Any:
    """Load the pretended driver under the name by which the bindings look for CUDA's; before they are imported."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "libcuda.so.1"
        source = Path(__file__).with_name("pretended_driver.c")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(path)], check=True
        )
        driver = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    driver.pretended_launches.restype = ctypes.c_long
    return driver


class Loaded(CudaDriver):
    """The launcher's own driver, but for the comparison of parameters with code that is not there."""

    def load(self, image: Image, cubin: bytes) -> Any:
        """Return a handle that the pretended driver made."""
        return self._core.ObjectCode.from_cubin(cubin).get_kernel(image.entry)


class Launchers:
    """A `LauncherSource` of kernels that were never compiled."""

    def __init__(self, statics: Mapping[str, Any]) -> None:
        self.statics, self.driver = statics, Loaded()

    def launcher(self, op: str, *, attrs: Mapping[str, Any], products: str, digest: str) -> OpLauncher:
        """Return the launcher of an operator."""
        kernels = fake_kernels(op, self.statics, SM)
        return OpLauncher(kernels, attrs, dict.fromkeys(kernels.images, b"\x7fELF"), self.driver)


def addresses_of(spec: OpSpec, layer: int) -> tuple[list[int], list[int], int]:
    """Return addresses of inputs, outputs and workspace that are those of no other layer."""
    first = (1 + layer) << 32
    inputs = [first + (i << 20) for i in range(len(spec.inputs))]
    aliases = dict(spec.aliases)
    named = dict(zip((arg.name for arg in spec.inputs), inputs, strict=True))
    outputs = [named.get(aliases.get(arg.name, ""), first + ((64 + i) << 20)) for i, arg in enumerate(spec.outputs)]
    return inputs, outputs, first + (128 << 20)


def time_call(trt: Any, pretended: Any, call: Call) -> tuple[float, float, int]:
    """Return the processor time of a call's first run and of a later one, µs, and how many launches it has."""
    spec = SPECS[call.op]
    source = Launchers(statics_of(call.op, call.bound))
    fields, kept = make_fields(trt, {attr.name: call.bound[attr.name] for attr in spec.attrs})
    creator = next(one for one in register(trt, source).creators if one.name == call.op)  # pyright: ignore[reportArgumentType]
    plugin = creator.create_plugin(call.op, fields, trt.TensorRTPhase.RUNTIME)
    assert kept
    described = []
    for shapes in (input_shapes(spec, call.bound), spec.output_shapes(call.bound)):
        described.append([trt.PluginTensorDesc() for _ in shapes])
        for one, shape in zip(described[-1], shapes, strict=True):
            one.dims = trt.Dims(shape)
    layers = [addresses_of(spec, layer) for layer in range(LAYERS)]

    def microseconds(turns: int) -> float:
        began = time.process_time_ns()
        for _ in range(turns):
            for inputs, outputs, workspace in layers[:turns] if turns == 1 else layers:
                plugin.enqueue(*described, inputs, outputs, workspace, 77)
                if turns == 1:
                    break
        return (time.process_time_ns() - began) / 1e3 / (1 if turns == 1 else turns * len(layers))

    before = pretended.pretended_launches()
    first = microseconds(1)
    launches = pretended.pretended_launches() - before
    assert launches == len(op_kernels(call.op).plan(call.bound, SM).launches), call.op
    return first, min(microseconds(TURNS) for _ in range(ROUNDS)), launches


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    pretended = pretend_driver()
    trt = library.load("tensorrt-rtx")
    config = load_preset("full").config
    rows = []
    for step, shape in STEPS.items():
        found: dict[str, list[tuple[int, float, float, int]]] = defaultdict(list)
        for call in step_calls(config, shape, kv_format="fp8_ds"):
            found[call.op].append((call.count, *time_call(trt, pretended, call)))
        for op, kinds in found.items():
            count = sum(one[0] for one in kinds)
            first, later, launches = (sum(one[0] * one[i] for one in kinds) / count for i in (1, 2, 3))
            rows.append(
                {"step": step, "op": op, "calls": count, "launches": launches, "first_us": first, "call_us": later}
            )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'step':26}{'operator':16}{'calls':>6}{'launches':>10}{'first µs':>10}{'µs a call':>10}{'ms a step':>11}")
    for row in rows:
        print(
            f"{row['step']:26}{row['op']:16}{row['calls']:6}{row['launches']:10.1f}"
            f"{row['first_us']:10.1f}{row['call_us']:10.1f}{row['calls'] * row['call_us'] / 1e3:11.1f}"
        )
    for step in STEPS:
        total = sum(row["calls"] * row["call_us"] for row in rows if row["step"] == step) / 1e3
        print(f"{step}: {total:.1f} ms of host time for the plugin calls of a step")


if __name__ == "__main__":
    main()
