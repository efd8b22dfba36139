"""Launch compiled kernels: the only file that talks to a CUDA driver. No torch, no Triton.

An `OpLauncher` holds one operator's kernels, loaded once for the current device, and turns a call into launches on a
foreign stream. It allocates no device memory, loads nothing and waits for nothing in `enqueue`, so a call can be
captured in a CUDA graph. What the shapes of a call decide is worked out once and kept: launches, parameters, grids; a
call that comes again sets its addresses and launches. The driver is a small protocol: tests put one in that records.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from seekforge.common.errors import EngineError, EnvironmentFault
from seekforge.common.requirements import install
from seekforge.plugins.kernels.arguments import CallArguments
from seekforge.plugins.kernels.cuda_driver import too_old
from seekforge.plugins.kernels.index import Descriptors
from seekforge.plugins.kernels.kernel_set import Image, KernelSet, read_cubin, read_kernels
from seekforge.plugins.kernels.launch_plan import WORKSPACE, LaunchPlan, op_kernels
from seekforge.plugins.kernels.sm_limits import has_fp8
from seekforge.plugins.registry import FP8_OPS, SPECS

#: Shapes whose calls are kept per launcher, those seen first leaving first; a server sees few.
MAX_CALLS: Final = 512
#: Environment variable: 0 lets each launch start only when the one before it has ended, on every SM.
PROGRAMMATIC: Final = "SEEKFORGE_PROGRAMMATIC_LAUNCH"
#: Dynamic shared memory that a kernel may use without asking.
_SHARED_DEFAULT: Final = 48 * 1024


class Driver(Protocol):
    """What launching needs of CUDA."""

    def load(self, image: Image, cubin: bytes) -> Any:
        """Load a cubin on the current device and return a handle of its kernel."""
        ...

    def prepare(self, kernel: Any, image: Image, grid: tuple[int, int, int], parameters: int) -> Any:
        """Return a launch that can be repeated.

        Args:
            kernel: what `load` returned.
            image: its image.
            grid: blocks, or clusters where the image has them.
            parameters: address of an array of pointers, one to each parameter in order, the hidden ones included. It
                and the values must stay while the launch is used; a launch takes the values that are there then.
        """
        ...

    def launch(self, prepared: Sequence[Any], stream: int) -> None:
        """Launch on a stream, in order, what `prepare` returned."""
        ...


class CudaDriver:
    """The real one, over cuda-core and cuda-bindings. Not run on a GPU yet."""

    def __init__(self) -> None:
        try:
            self._core: Any = importlib.import_module("cuda.core")
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise EnvironmentFault(
                f"kernels are launched with cuda-core, which cannot be imported ({error}); {install('gpu')}"
            ) from None
        self._success = self._driver.CUresult.CUDA_SUCCESS
        self._launch_kernel = self._driver.cuLaunchKernelEx
        self._programmatic = os.environ.get(PROGRAMMATIC) != "0"

    def load(self, image: Image, cubin: bytes) -> Any:
        """Load a cubin, compare its parameters with the descriptor, and raise the shared memory limit.

        Raises:
            EnvironmentFault: the driver is too old for it.
            EngineError: it is not what the descriptor says.
        """
        fault = too_old(f"kernels ({image.entry})", image.driver, self._checked(self._driver.cuDriverGetVersion()))
        if fault is not None:
            raise EnvironmentFault(fault)
        kernel = self._core.ObjectCode.from_cubin(cubin).get_kernel(image.entry)
        layout = [(int(p.offset), int(p.size)) for p in kernel.arguments_info]
        if layout != [(p.offset, p.size) for p in image.params]:
            raise EngineError(
                f"{image.entry}: takes {layout}, its descriptor says otherwise; compile the kernels again"
            )
        shared = image.resources.shared_bytes
        if shared > _SHARED_DEFAULT:
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            device = self._checked(self._driver.cuCtxGetDevice())
            self._checked(self._driver.cuKernelSetAttribute(attribute, shared, kernel.handle, device))
        return kernel

    def prepare(self, kernel: Any, image: Image, grid: tuple[int, int, int], parameters: int) -> Any:
        """Make CUDA's description of a launch, the arguments of `cuLaunchKernelEx`."""
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid[0] * image.num_ctas, grid[1], grid[2]
        config.blockDimX, config.blockDimY, config.blockDimZ = image.num_warps * 32, 1, 1
        config.sharedMemBytes = image.resources.shared_bytes
        attributes = []
        if image.num_ctas > 1:
            attribute = self._driver.CUlaunchAttribute()
            attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster = attribute.value.clusterDim
            cluster.x, cluster.y, cluster.z = image.num_ctas, 1, 1
            attributes.append(attribute)
        if image.programmatic and self._programmatic:
            attribute = self._driver.CUlaunchAttribute()
            attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        # launching takes a kernel that belongs to no context as a function, cast by the caller
        return config, self._driver.CUfunction(int(kernel.handle)), parameters

    def launch(self, prepared: Sequence[Any], stream: int) -> None:
        """Launch one after the other.

        Raises:
            EngineError: CUDA refuses one.
        """
        handle, launch, success = self._driver.CUstream(stream), self._launch_kernel, self._success
        for config, function, parameters in prepared:
            config.hStream = handle
            result = launch(config, function, parameters, 0)
            if result[0] != success:
                self._checked(result)

    def _checked(self, result: tuple[Any, ...]) -> Any:
        if result[0] != self._success:
            raise EngineError(f"CUDA: {result[0].name}")
        return result[1] if len(result) > 1 else None


@dataclass(frozen=True)
class _Call:
    """What the shapes of a call decide: its launches as the driver prepared them, and their parameters."""

    launches: tuple[Any, ...]
    arguments: CallArguments


class OpLauncher:
    """The kernels of one operator, ready to run on the current device.

    Args:
        kernels: their descriptor.
        attrs: attribute values of the operator.
        cubins: variant -> code.
        driver: loads and launches.

    Raises:
        EngineError: the kernels were compiled for other attributes.
    """

    def __init__(
        self, kernels: KernelSet, attrs: Mapping[str, Any], cubins: Mapping[str, bytes], driver: Driver
    ) -> None:
        self.kernels, self._attrs, self._driver = kernels, dict(attrs), driver
        self._spec, self._module = SPECS[kernels.op], op_kernels(kernels.op, kernels.provider)
        self._spec.check_attrs(self._attrs)
        self._check(self._attrs)
        self._loaded = {name: driver.load(image, cubins[name]) for name, image in kernels.images.items()}
        self._results = (*(arg.name for arg in self._spec.outputs), WORKSPACE)
        self._calls: dict[tuple[tuple[int, ...], ...], _Call] = {}
        self._lock = threading.Lock()

    @staticmethod
    def open(path: Path, attrs: Mapping[str, Any], driver: Driver) -> OpLauncher:
        """Load the kernels that the descriptor at `path` lists.

        Raises:
            EngineError: a file is missing or damaged, or was compiled for other attributes.
        """
        kernels = read_kernels(path)
        cubins = {name: read_cubin(path, image) for name, image in kernels.images.items()}
        return OpLauncher(kernels, attrs, cubins, driver)

    def _check(self, bound: Mapping[str, Any]) -> None:
        for name, value in self.kernels.statics.items():
            if name in bound and bound[name] != value:
                raise EngineError(
                    f"{self.kernels.op}: the kernels were compiled for {name} {value!r}, "
                    f"this call has {bound[name]!r}; compile them for this model"
                )

    def workspace_bytes(self, shapes: Sequence[Sequence[int]]) -> int:
        """Return scratch that is enough for inputs of these shapes and of all smaller ones."""
        return self._module.workspace_bytes(self._spec.bind(shapes, self._attrs), self.kernels.sm)

    def plan(self, shapes: Sequence[Sequence[int]]) -> LaunchPlan:
        """Return the launches for these input shapes.

        Raises:
            ShapeError, EngineError: the shapes break the contract, or are not those the kernels are compiled for.
        """
        bound = self._spec.bind(shapes, self._attrs)
        self._check(bound)
        return self._module.plan(bound, self.kernels.sm)

    def _prepare(self, shapes: tuple[tuple[int, ...], ...]) -> _Call:
        """Return all of a call but its addresses, and keep it."""
        launches = self.plan(shapes).launches
        images = [self.kernels.images[launch.variant] for launch in launches]
        pairs = [(image, launch.arguments) for image, launch in zip(images, launches, strict=True)]
        arguments = CallArguments(pairs, (*self._spec.named(shapes), *self._results))
        prepared = [
            self._driver.prepare(self._loaded[launch.variant], image, launch.grid, parameters)
            for launch, image, parameters in zip(launches, images, arguments.parameters, strict=True)
        ]
        while len(self._calls) >= MAX_CALLS:
            del self._calls[next(iter(self._calls))]
        call = self._calls[shapes] = _Call(tuple(prepared), arguments)
        return call

    def enqueue(
        self,
        input_shapes: Sequence[tuple[int, ...]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch on `stream`. Threads take turns: addresses are those of one call until all of it is launched.

        Args:
            input_shapes: shapes of the inputs in the order of the spec.
            inputs: device addresses, in the order of the spec.
            outputs: the same. An aliased output has the address of its input.
            workspace: address of `workspace_bytes` of scratch.
            stream: CUstream handle.

        Raises:
            ShapeError, EngineError: as `plan`, or CUDA refuses a launch.
        """
        shapes = tuple(input_shapes)
        with self._lock:
            call = self._calls.get(shapes) or self._prepare(shapes)
            call.arguments.set_addresses([*inputs, *outputs, workspace])
            self._driver.launch(call.launches, stream)


class KernelFolder:
    """Gives the launchers of an engine folder to plugins, for one GPU: a `LauncherSource`.

    Args:
        engine: the engine folder; kernels lie in `kernels/`.
        sm: compute capability of the GPU. 86 runs the kernels of 80.
        driver: loads and launches.
    """

    def __init__(self, engine: Path, sm: int, driver: Driver) -> None:
        self._descriptors, self._driver = Descriptors(engine, sm), driver
        self._launchers: dict[tuple[str, str, tuple[tuple[str, Any], ...]], OpLauncher] = {}

    def launcher(self, op: str, *, attrs: Mapping[str, Any], products: str, digest: str) -> OpLauncher:
        """Return the kernels of `op` with this digest, loaded: once, however many layers use them.

        Raises:
            EngineError: there are none, they are damaged, were compiled for other attributes, or multiply otherwise
                than the engine was built for.
        """
        key = (op, digest, tuple(sorted(attrs.items())))
        launcher = self._launchers.get(key)
        if launcher is None:
            launcher = OpLauncher.open(self._descriptors.find(op, digest), attrs, self._driver)
            self._launchers[key] = launcher
        native = "fp8" if has_fp8(launcher.kernels.sm) else "bf16"
        if op in FP8_OPS and products not in ("", native):
            raise EngineError(f"{op}: built for {products} products, kernels of sm{launcher.kernels.sm} have {native}")
        return launcher
