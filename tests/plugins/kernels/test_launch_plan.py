"""Descriptors, argument packing, occupancy and the launcher over a driver that records."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.kernel_cases import copy_parameters, fake_kernels, input_shapes, pack_arguments

from seekforge.common.errors import EngineError, ShapeError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.sizing.calls import StepShape, step_calls
from seekforge.plugins.kernels.arguments import CallArguments
from seekforge.plugins.kernels.kernel_set import Image, from_json, read_cubin, read_kernels, to_json
from seekforge.plugins.kernels.launch_plan import WORKSPACE, Buffer, Workspace, op_kernels, statics_of
from seekforge.plugins.kernels.launcher import KernelFolder, OpLauncher
from seekforge.plugins.kernels.sm_limits import SMS, occupancy
from seekforge.plugins.registry import SPECS, WITH_KERNELS

STATICS = {"C": 512, "R": 64, "D": 128, "kv_format": "fp8_ds", "index_format": "fp8_ds"}
STATICS |= {"kv_fp8": True, "indexer_fp8": True}
ATTRS = {name: STATICS[name] for name in ("kv_format", "index_format", "kv_fp8", "indexer_fp8")}
SHAPES = [(9, 64, 656), (9, 8448), (2, 3, 512), (2, 3, 64), (2, 3, 128), (2, 3)]
IMAGE = fake_kernels("DsaCacheWrite", STATICS, 90).images["write"]
VALUES = {"latent_ptr": 16, "index_ptr": 32, "c_ptr": 48, "k_pe_ptr": 64, "index_k_ptr": 80, "slot_ptr": 96}
VALUES |= {"num_tokens": 6, "num_slots": 576}


class Recorder:
    """A driver that loads nothing and remembers what it was asked."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launched: list[tuple[str, tuple[int, int, int], bytes, int]] = []
        self.prepared = 0

    def load(self, image: Image, cubin: bytes) -> Any:
        self.loaded.append(image.variant)
        return image.variant

    def prepare(self, kernel: Any, image: Image, grid: tuple[int, int, int], parameters: int) -> Any:
        self.prepared += 1
        return kernel, image, grid, parameters

    def launch(self, prepared: Sequence[Any], stream: int) -> None:
        for kernel, image, grid, parameters in prepared:
            self.launched.append((kernel, grid, copy_parameters(image, parameters), stream))


def launcher(driver: Recorder) -> OpLauncher:
    kernels = fake_kernels("DsaCacheWrite", STATICS, 90)
    return OpLauncher(kernels, ATTRS, dict.fromkeys(kernels.images, b""), driver)


def test_parameters_are_where_a_c_struct_has_them() -> None:
    buffers = {name: Buffer(name) for name in VALUES if name.endswith("_ptr")}
    arguments = CallArguments([(IMAGE, VALUES | buffers)], list(buffers))
    arguments.set_addresses([VALUES[name] for name in buffers])
    (parameters,) = arguments.parameters
    assert copy_parameters(IMAGE, parameters) == struct.pack("<QQQQQQixxxxqQQ", 16, 32, 48, 64, 80, 96, 6, 576, 0, 0)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({name: v for name, v in VALUES.items() if name != "c_ptr"}, "the kernel takes"),
        (VALUES | {"other": 1}, "the kernel takes"),
        (VALUES | {"num_tokens": 2**31}, "num_tokens = 2147483648 is no i32"),
        (VALUES | {"num_tokens": Buffer("c_ptr")}, "num_tokens is an address, the kernel takes i32"),
    ],
)
def test_wrong_arguments_are_refused(values: dict[str, Buffer | int], fault: str) -> None:
    with pytest.raises(EngineError, match=fault):
        CallArguments([(IMAGE, values)], ["c_ptr"])


@pytest.mark.parametrize(
    ("addresses", "fault"),
    [([16], "1 addresses, expected 2"), ([16, 32, 48], "3 addresses"), ([16, -1], "no address")],
)
def test_wrong_addresses_are_refused(addresses: list[int], fault: str) -> None:
    arguments = CallArguments(
        [(IMAGE, VALUES | {"c_ptr": Buffer("c"), "latent_ptr": Buffer("latent")})], ["latent", "c"]
    )
    with pytest.raises(EngineError, match=fault):
        arguments.set_addresses(addresses)


def test_a_call_is_launched_on_the_stream_that_is_given() -> None:
    driver = Recorder()
    op = launcher(driver)
    assert driver.loaded == ["write"]
    inputs, outputs = [0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000], [0x1000, 0x2000]
    op.enqueue(SHAPES, inputs, outputs, 0, 77)
    op.enqueue(SHAPES, inputs, outputs, 0, 78)
    assert driver.loaded == ["write"], "nothing is loaded in enqueue"
    values = struct.pack("<QQQQQQixxxxqQQ", 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 6, 576, 0, 0)
    assert driver.launched == [("write", (2, 1, 1), values, stream) for stream in (77, 78)]


STEPS = [StepShape(1, 1, 200), StepShape(3, 2, 70_000), StepShape(300, 1, 4096), StepShape(2, 2500, 5000)]


@pytest.mark.parametrize("kv_format", ["bf16", "fp8_ds"])
@pytest.mark.parametrize("sm", SMS)
def test_the_driver_gets_what_the_plan_says_for_every_operator_and_shape(sm: int, kv_format: str) -> None:
    """All shapes through one launcher of each operator, twice, each time with other addresses."""
    config, ops, checked = load_preset("full").config, dict[str, OpLauncher](), set[str]()
    driver = Recorder()
    calls = [call for step in STEPS for call in step_calls(config, step, kv_format=kv_format)]
    for turn, call in enumerate(calls * 2):
        spec = SPECS[call.op]
        if call.op not in ops:
            kernels = fake_kernels(call.op, statics_of(call.op, call.bound), sm)
            attrs = {attr.name: call.bound[attr.name] for attr in spec.attrs}
            ops[call.op] = OpLauncher(kernels, attrs, dict.fromkeys(kernels.images, b""), driver)
        shapes = input_shapes(spec, call.bound)
        names = [*spec.named(shapes), *(arg.name for arg in spec.outputs), WORKSPACE]
        addresses = {name: (1 + turn) * 2**40 + i * 2**32 for i, name in enumerate(names)}
        first, last = [addresses[name] for name in names[:-1]], addresses[WORKSPACE]
        num_inputs, driver.launched[:] = len(shapes), []
        ops[call.op].enqueue(shapes, first[:num_inputs], first[num_inputs:], last, turn)
        images = ops[call.op].kernels.images
        assert driver.launched == [
            (one.variant, one.grid, pack_arguments(images[one.variant], one.arguments, addresses), turn)
            for one in op_kernels(call.op).plan(call.bound, sm).launches
        ], (call.op, call.what)
        checked.add(call.op)
    assert checked == set(WITH_KERNELS) - {"MlaCacheWrite", "MlaAttention"}
    launches = sum(len(op_kernels(call.op).plan(call.bound, sm).launches) for call in calls)
    assert driver.prepared <= launches, "a shape is prepared once"


def test_a_call_of_another_shape_has_launches_of_its_own() -> None:
    driver = Recorder()
    op = launcher(driver)
    for rows in (2, 5, 2):
        op.enqueue([*SHAPES[:2], *((rows, *shape[1:]) for shape in SHAPES[2:])], [16] * 6, [16] * 2, 0, 77)
    small, large, again = ((grid, struct.unpack_from("<i", raw, 48)) for _, grid, raw, _ in driver.launched)
    assert small == again == ((2, 1, 1), (6,)) and large == ((4, 1, 1), (15,))
    assert driver.prepared == 2


def test_calls_that_are_kept_are_bounded_and_the_oldest_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seekforge.plugins.kernels.launcher.MAX_CALLS", 3)
    driver = Recorder()
    op = launcher(driver)
    for rows, prepared in ((1, 1), (2, 2), (3, 3), (1, 3), (4, 4), (2, 4), (3, 4), (1, 5)):
        op.enqueue([*SHAPES[:2], *((rows, *shape[1:]) for shape in SHAPES[2:])], [16] * 6, [16] * 2, 0, 77)
        assert driver.prepared == prepared and len(op._calls) <= 3
        assert struct.unpack_from("<i", driver.launched[-1][2], 48) == (3 * rows,)


def test_threads_do_not_launch_with_each_others_addresses() -> None:
    driver = Recorder()
    op = launcher(driver)
    original = driver.launch
    inside: list[int] = []

    def slow(prepared: Sequence[Any], stream: int) -> None:
        inside.append(stream)
        time.sleep(0.001)
        original(prepared, stream)

    driver.launch = slow
    threads = [
        threading.Thread(target=op.enqueue, args=(SHAPES, [16 * n] * 6, [16 * n] * 2, 0, n)) for n in range(1, 9)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(inside) == list(range(1, 9))
    assert all(struct.unpack_from("<6Q", raw) == (16 * stream,) * 6 for _, _, raw, stream in driver.launched)


def test_an_empty_step_launches_nothing() -> None:
    driver = Recorder()
    shapes = [(9, 64, 656), (9, 8448), (0, 3, 512), (0, 3, 64), (0, 3, 128), (0, 3)]
    launcher(driver).enqueue(shapes, [0] * 6, [0] * 2, 0, 0)
    assert driver.launched == []


def test_kernels_of_another_model_are_refused() -> None:
    op = launcher(Recorder())
    shapes = [(9, 64, 256), (9, 8448), (2, 3, 128), (2, 3, 64), (2, 3, 128), (2, 3)]
    with pytest.raises(EngineError, match="compiled for C 512, this call has 128"):
        op.plan(shapes)
    kernels = fake_kernels("DsaCacheWrite", STATICS, 90)
    with pytest.raises(EngineError, match="kv_format 'fp8_ds', this call has 'bf16'"):
        OpLauncher(kernels, ATTRS | {"kv_format": "bf16"}, {"write": b""}, Recorder())


def test_descriptors_survive_a_file(tmp_path: Path) -> None:
    kernels = fake_kernels("DsaCacheWrite", STATICS, 90)
    path = tmp_path / "one.json"
    path.write_text(to_json(kernels))
    assert read_kernels(path) == kernels
    for text, fault in (("{", "damaged"), ("{}", "damaged"), (to_json(replace(kernels, format=9)), "format 9")):
        with pytest.raises(EngineError, match=fault):
            from_json(text, where="x")
    path.write_text(to_json(replace(kernels, op_version=9)))
    with pytest.raises(EngineError, match="version 9, this seekforge has version 1"):
        read_kernels(path)


def test_cubins_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    image = replace(IMAGE, cubin="a.cubin", sha256=hashlib.sha256(b"code").hexdigest())
    with pytest.raises(EngineError, match="missing"):
        read_cubin(path, image)
    (tmp_path / "a.cubin").write_bytes(b"code")
    assert read_cubin(path, image) == b"code"
    (tmp_path / "a.cubin").write_bytes(b"edoc")
    with pytest.raises(EngineError, match="sha256 differs"):
        read_cubin(path, image)


def test_workspace_parts_are_aligned() -> None:
    workspace = Workspace()
    assert [workspace.take(n).offset for n in (1, 256, 257, 0)] == [0, 256, 512, 1024]
    assert workspace.size == 1024
    with pytest.raises(ShapeError, match="multiple of 16"):
        Buffer("x", 8)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "sm", "share"),
    [
        (32, 0, 4, 90, 1.0),
        (255, 0, 8, 90, 0.125),
        (168, 115_000, 12, 90, 12 / 64),
        (64, 0, 4, 89, 32 / 48),
        (40, 200_000, 8, 90, 0.125),
        (40, 120_000, 8, 120, 0.0),
    ],
)
def test_occupancy(registers: int, shared: int, warps: int, sm: int, share: float) -> None:
    assert occupancy(registers=registers, shared_bytes=shared, num_warps=warps, sm=sm) == pytest.approx(share)


def test_an_engine_folder_gives_launchers_by_digest(tmp_path: Path) -> None:
    folder = tmp_path / "kernels" / "sm80"
    folder.mkdir(parents=True)
    (folder / "a.cubin").write_bytes(b"code")
    sha256 = hashlib.sha256(b"code").hexdigest()
    attrs = {"act_quant": "ue8m0"}
    entries = []
    for one in (fake_kernels("DsaCacheWrite", STATICS, 80), fake_kernels("BlockFp8Linear", attrs, 80)):
        images = {name: replace(image, cubin="a.cubin", sha256=sha256) for name, image in one.images.items()}
        (folder / f"{one.op}.json").write_text(to_json(replace(one, images=images)))
        entries.append({"op": one.op, "sm": 80, "digest": one.digest, "file": f"sm80/{one.op}.json"})
    (tmp_path / "kernels" / "index.json").write_text(json.dumps({"format": 1, "kernels": entries}))
    kernels = fake_kernels("DsaCacheWrite", STATICS, 80)
    for sm in (80, 86):
        source = KernelFolder(tmp_path, sm, Recorder())
        found = source.launcher(kernels.op, attrs=ATTRS, products="bf16", digest=kernels.digest)
        assert found.kernels.digest == kernels.digest
        with pytest.raises(EngineError, match="built for fp8 products, kernels of sm80 have bf16"):
            source.launcher("BlockFp8Linear", attrs=attrs, products="fp8", digest=kernels.digest)
    with pytest.raises(EngineError, match="no kernels for sm90"):
        KernelFolder(tmp_path, 90, Recorder()).launcher(kernels.op, attrs=ATTRS, products="fp8", digest=kernels.digest)
