"""The kernels of an engine's plugins: the plans carry their digests, which need no compiling, the engine the code."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from seekforge.common.errors import EnvironmentFault, TargetError
from seekforge.exporter.builder.kernel_choice import settle
from seekforge.exporter.sizing.calls import StepShape, step_calls
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.program import Program
from seekforge.formats.targets import TargetConfig
from seekforge.plugins.cost.card import card_of
from seekforge.plugins.cost.work import Load
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.index import KERNELS, kernel_sm
from seekforge.plugins.kernels.kernel_set import KernelSet
from seekforge.plugins.kernels.providers.choice import AUTO, read_choice
from seekforge.plugins.kernels.sizes import operators

#: Shows a bar for a stage: `Stages.steps_bar`.
StepsBar = Callable[[str], AbstractContextManager[Callable[[float], None]]]


def kernel_tasks(
    program: Program,
    config: ModelConfig,
    target: TargetConfig,
    plugins: Collection[str],
    providers: Collection[str] = (),
    *,
    dry: bool = False,
) -> list[aot.Task]:
    """Return what must be compiled for the plugins of an engine.

    Args:
        program, config, target: what is built.
        plugins: op_types of its plugins.
        providers: who else than Triton provides their kernels (`TensorRtOptions.providers`). What is left to the cost
            model is chosen for the largest decode step on the target's first SM, and compiled for it.
        dry: compile nothing; what is left to the cost model counts as Triton's.

    Raises:
        ShapeError: there are no kernels for the model's sizes.
        TargetError: a named provider has none for them, or its operator is no plugin.
        EnvironmentFault: a compiler or a library is not installed.
    """
    sizes = operators(
        config,
        kv_format=target.kv_format,
        numerics=program.numerics,
        parallelism=program.parallelism,
        nvfp4_experts=target.nvfp4_experts,
    )
    try:
        aot.compiler()
    except EnvironmentFault as error:
        raise EnvironmentFault(f"{error}; or pass --no-kernels for an engine that can be looked at, not run") from None
    choice = read_choice(providers)
    for op, provider in choice.items():
        if provider != AUTO and op not in plugins:
            raise TargetError(f"--kernels {op}={provider}: {op} is no plugin of this engine; leave it out")
    if dry:
        choice = {op: provider for op, provider in choice.items() if provider != AUTO}
    settled = _settled({op: one for op, one in choice.items() if op in plugins}, program, config, target)
    sms = dict.fromkeys(kernel_sm(sm) for sm in target.sms)
    return aot.tasks({op: sizes[op] for op in plugins}, sms, settled)


def _settled(
    choice: Mapping[str, str], program: Program, config: ModelConfig, target: TargetConfig
) -> Mapping[str, str]:
    """Return op_type -> provider; the cost model is asked where the choice leaves it to it."""
    if not choice:
        return choice
    if target.gpu is None:
        raise TargetError(
            f"--kernels: target {target.name} says nothing of its GPU, so nothing can be compared; name it"
        )
    limits = target.limits
    shape = StepShape(batch=limits.max_batch_size, queries=1, context=limits.max_model_len)
    calls = step_calls(config, shape, kv_format=target.kv_format, parallelism=program.parallelism)
    load = Load(context=shape.context, num_experts=config.n_routed_experts)
    with aot.cache_folder() as cache:
        return settle(choice, calls, card_of(target), load, cache=cache)


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


def sources_of(sets: Collection[KernelSet]) -> dict[str, str]:
    """Return op_type -> what made its kernels: provider and version."""
    return {one.op: one.compiler for one in sets}


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
