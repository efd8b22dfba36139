"""The kernels of an engine's plugins: the plans carry their digests, which need no compiling, the engine the code."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path

from seekforge.common.errors import EnvironmentFault
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.program import Program
from seekforge.formats.targets import TargetConfig
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.index import KERNELS, kernel_sm
from seekforge.plugins.kernels.kernel_set import KernelSet
from seekforge.plugins.kernels.sizes import operators

#: Shows a bar for a stage: `Stages.steps_bar`.
StepsBar = Callable[[str], AbstractContextManager[Callable[[float], None]]]


def kernel_tasks(
    program: Program, config: ModelConfig, target: TargetConfig, plugins: Collection[str]
) -> list[aot.Task]:
    """Return what must be compiled for the plugins of an engine.

    Raises:
        ShapeError: there are no kernels for the model's sizes.
        EnvironmentFault: the compiler is not installed.
    """
    sizes = operators(config, kv_format=target.kv_format, numerics=program.numerics, parallelism=program.parallelism)
    try:
        aot.compiler()
    except EnvironmentFault as error:
        raise EnvironmentFault(f"{error}; or pass --no-kernels for an engine that can be looked at, not run") from None
    return aot.tasks({op: sizes[op] for op in plugins}, dict.fromkeys(kernel_sm(sm) for sm in target.sms))


def compile_kernels(tasks: list[aot.Task], engine: Path, steps_bar: StepsBar) -> list[KernelSet]:
    """Compile `tasks` into the engine folder; images that another build has compiled are taken from the cache.

    Raises:
        TargetError: a kernel does not compile.
    """
    sms = " and ".join(f"sm{sm}" for sm in dict.fromkeys(task.sm for task in tasks))
    with steps_bar(f"kernels: compile for {sms}") as bar:
        done: list[KernelSet] = []

        def advance(task: aot.Task, made: KernelSet | None) -> None:
            if made is not None:
                done.append(made)
                bar(len(done) / len(tasks))

        with aot.cache_folder() as cache:
            return aot.build(tasks, engine / KERNELS, cache=cache, progress=advance)


def kernel_files(engine: Path, sets: Collection[KernelSet]) -> list[str]:
    """Return the files of kernels in an engine, relative to it, in a fixed order."""
    if not sets:
        return []
    return sorted(str(path.relative_to(engine)) for path in (engine / KERNELS).rglob("*") if path.is_file())


def digests_of(tasks: Collection[aot.Task]) -> dict[str, str]:
    """Return op_type -> digest; it is the same on every SM."""
    return {task.op: task.digest for task in tasks}


def min_drivers(sets: Collection[KernelSet]) -> dict[str, int]:
    """Return SM -> the CUDA version that a driver must have to load every kernel for it."""
    needed: dict[str, int] = {}
    for one in sorted(sets, key=lambda one: one.sm):
        for image in one.images.values():
            needed[str(one.sm)] = max(image.driver, needed.get(str(one.sm), 0))
    return needed


def count_images(sets: Collection[KernelSet]) -> dict[str, int]:
    """Return op_type -> number of compiled kernels."""
    counted: dict[str, int] = {}
    for one in sets:
        counted[one.op] = counted.get(one.op, 0) + len(one.images)
    return dict(sorted(counted.items()))
