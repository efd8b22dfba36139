"""Launch compiled kernels: the only file that talks to a CUDA driver. No torch, no Triton.

An `OpLauncher` holds one operator's kernels, loaded once for the current device, and turns a call into launches on a
foreign stream. It allocates nothing, loads nothing and waits for nothing in `enqueue`, so a call can be captured
in a CUDA graph. The driver is a small protocol: tests put one in that records.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from seekforge.common.errors import EngineError, EnvironmentFault
from seekforge.common.requirements import install
from seekforge.plugins.kernels.arguments import resolve
from seekforge.plugins.kernels.cuda_driver import too_old
from seekforge.plugins.kernels.index import Descriptors
from seekforge.plugins.kernels.kernel_set import Image, KernelSet, argument_code, read_cubin, read_kernels
from seekforge.plugins.kernels.launch_plan import WORKSPACE, LaunchPlan, op_kernels
from seekforge.plugins.kernels.sm_limits import has_fp8
from seekforge.plugins.registry import FP8_OPS, SPECS

#: Shapes whose plans are remembered per launcher; a server sees few.
_PLANS: Final = 512
#: Dynamic shared memory that a kernel may use without asking.
_SHARED_DEFAULT: Final = 48 * 1024
_NUMPY: Final[dict[str, Any]] = {
    "b": np.int8, "i": np.int32, "q": np.int64, "I": np.uint32, "Q": np.uint64, "f": np.float32,
}  # fmt: skip


class Driver(Protocol):
    """What launching needs of CUDA."""

    def load(self, image: Image, cubin: bytes) -> Any:
        """Load a cubin on the current device and return a handle of its kernel."""
        ...

    def launch(
        self, kernel: Any, image: Image, grid: tuple[int, int, int], values: Sequence[int | float], stream: int
    ) -> None:
        """Launch on a stream. `values` are all parameters in order, the hidden ones included."""
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

    def launch(
        self, kernel: Any, image: Image, grid: tuple[int, int, int], values: Sequence[int | float], stream: int
    ) -> None:
        """Launch; every scalar gets its exact width, since cuda-core passes a Python int as 8 bytes."""
        arguments = [_NUMPY[argument_code(p)](value) for p, value in zip(image.params, values, strict=True)]
        cluster = {"cluster": (image.num_ctas, 1, 1)} if image.num_ctas > 1 else {}
        config = self._core.LaunchConfig(
            grid=grid, block=image.num_warps * 32, shmem_size=image.resources.shared_bytes, **cluster
        )
        self._core.launch(self._core.Stream.from_handle(stream), config, kernel, *arguments)

    def _checked(self, result: tuple[Any, ...]) -> Any:
        if result[0] != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"CUDA: {result[0].name}")
        return result[1] if len(result) > 1 else None


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
        self._spec, self._module = SPECS[kernels.op], op_kernels(kernels.op)
        self._spec.check_attrs(self._attrs)
        self._check(self._attrs)
        self._loaded = {name: driver.load(image, cubins[name]) for name, image in kernels.images.items()}
        self._plans: dict[tuple[tuple[int, ...], ...], LaunchPlan] = {}

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
        """Return the launches for these input shapes; made once per shape.

        Raises:
            ShapeError, EngineError: the shapes break the contract, or are not those the kernels are compiled for.
        """
        key = tuple(map(tuple, shapes))
        plan = self._plans.get(key)
        if plan is None:
            bound = self._spec.bind(key, self._attrs)
            self._check(bound)
            plan = self._module.plan(bound, self.kernels.sm)
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def enqueue(
        self,
        input_shapes: Sequence[Sequence[int]],
        output_shapes: Sequence[Sequence[int]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch on `stream`.

        Args:
            input_shapes: shapes of the inputs in the order of the spec.
            output_shapes: not used; they follow from the inputs.
            inputs: device addresses, in the order of the spec.
            outputs: the same. An aliased output has the address of its input.
            workspace: address of `workspace_bytes` of scratch.
            stream: CUstream handle.
        """
        addresses = {arg.name: at for arg, at in zip(self._spec.inputs, inputs, strict=True)}
        addresses |= {arg.name: at for arg, at in zip(self._spec.outputs, outputs, strict=True)}
        addresses[WORKSPACE] = workspace
        for launch in self.plan(input_shapes).launches:
            image = self.kernels.images[launch.variant]
            values = resolve(launch.arguments, addresses)
            row = [values[param.name] if param.name else 0 for param in image.params]
            self._driver.launch(self._loaded[launch.variant], image, launch.grid, row, stream)


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
