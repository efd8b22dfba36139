"""Compile kernels ahead of time: variants -> cubins, descriptors and an index, on any machine, without a GPU.

Work is cut into one process per operator and SM, so that no target sees another's compiler state
(Triton 3.6 keeps the first conversion from FP8 that it compiles for every later target of the process). An image is
cached under a hash of everything that it is made from: the sources, the variant, the SM and the compiler.
Triton is imported only inside the worker processes; kernels of a library are nvcc's (`providers.compile`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.common.cores import usable_cores
from seekforge.common.errors import EnvironmentFault, TargetError
from seekforge.common.files import replace_file
from seekforge.common.temporary import temporary_folder
from seekforge.common.user_cache import user_cache
from seekforge.common.workers import Workers
from seekforge.plugins.kernels import sass
from seekforge.plugins.kernels.kernel_set import (
    FORMAT,
    Image,
    KernelSet,
    from_json,
    to_json,
)
from seekforge.plugins.kernels.launch_plan import Scalar, Variant, op_kernels, statics_of
from seekforge.plugins.kernels.providers import compile as libraries
from seekforge.plugins.kernels.providers.images import compile_variant, compiler, packaged_tool
from seekforge.plugins.kernels.sm_limits import SHARED_LIMIT
from seekforge.plugins.operator import TRITON
from seekforge.plugins.registry import SPECS

#: The list of descriptors in a folder of kernels: format 1, entries op, sm, digest, file.
INDEX, INDEX_FORMAT = "index.json", 1


_DEVICE_LIB: Final = Path(__file__).with_name("device_lib.py")
#: The folders of operators.
_OPERATORS: Final = Path(__file__).parents[1]

#: Version of the way in which images are made from their sources; what a descriptor says of them is another matter.
_MADE: Final = 1


@dataclass(frozen=True)
class Task:
    """All variants of one operator for one SM: the work of one process."""

    op: str
    sm: int
    digest: str
    statics: Mapping[str, Scalar]
    provider: str = TRITON


def compiler_of(op: str, provider: str) -> str:
    """Return the name and version of what compiles an operator's kernels of a provider.

    Raises:
        EnvironmentFault: it is not installed.
    """
    return compiler() if provider == TRITON else libraries.compiler(op, provider)


def image_key(op: str, variant: Variant, sm: int, *, compiler: str, provider: str = TRITON) -> str:
    """Return the digest of all that one image is made from. Neither the compiler nor a GPU is needed to tell it."""
    head = json.dumps([_MADE, compiler, sm, asdict(variant)], sort_keys=True)
    files = (_DEVICE_LIB, _OPERATORS / SPECS[op].torch_name / "kernel.py")
    if provider != TRITON:
        files = libraries.sources(op, provider)[:1]
    sources = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(head.encode() + b"\0" + sources).hexdigest()


def _sources(op: str, provider: str) -> bytes:
    """Return the text that images of `op` depend on: device code, and the choices of tiles and in `launch.py`."""
    if provider != TRITON:
        return b"\0".join(path.read_bytes() for path in libraries.sources(op, provider))
    folder = _OPERATORS / SPECS[op].torch_name
    tiles = (_OPERATORS / "linear_tile.py", _OPERATORS / "latent_tile.py")
    files = (_DEVICE_LIB, *tiles, folder / "kernel.py", folder / "launch.py")
    return b"\0".join(path.read_bytes() for path in files)


def set_digest(op: str, statics: Mapping[str, Scalar], provider: str = TRITON) -> str:
    """Return the digest of an operator's kernels: the same for every SM, since one engine may serve several.

    It covers the provider: its sources, and in `compiler_of` its versions and the headers of a library.
    """
    spec = SPECS[op]
    head = json.dumps([FORMAT, op, spec.version, compiler_of(op, provider), dict(statics)], sort_keys=True)
    return hashlib.sha256(head.encode() + b"\0" + _sources(op, provider)).hexdigest()


def tasks(
    ops: Mapping[str, Mapping[str, Any]], sms: Iterable[int], providers: Mapping[str, str] | None = None
) -> list[Task]:
    """Return the work for operators and SMs, the longest first.

    Args:
        ops: op_type -> its sizes and attributes (at least the static ones).
        sms: compute capabilities.
        providers: op_type -> provider of its kernels; Triton of those that it does not name.

    Raises:
        EnvironmentFault: a compiler or a library is not installed.
        ShapeError: there are no kernels for the sizes.
        TargetError: there are none for an SM.
    """
    sms, providers = tuple(sms), providers or {}
    for sm in sms:
        if sm not in SHARED_LIMIT:
            raise TargetError(f"sm {sm}: kernels are compiled for {', '.join(map(str, SHARED_LIMIT))}")
    tasks = []
    for op, bound in ops.items():
        provider = providers.get(op, TRITON)
        statics = statics_of(op, bound, provider)
        digest = set_digest(op, statics, provider)
        tasks += [Task(op, sm, digest, statics, provider) for sm in sms]
    newest = max(sms, default=90)  # all SMs have as many loops, but some take less
    loops = {op: sum(v.main_loop for v in op_kernels(op).variants(statics_of(op, ops[op]), newest)) for op in ops}
    return sorted(tasks, key=lambda task: -loops[task.op])


def build(
    work: Sequence[Task],
    out: Path,
    *,
    cache: Path,
    jobs: int | None = None,
    progress: Callable[[Task, KernelSet | None], None] = lambda task, done: None,
) -> list[KernelSet]:
    """Compile `work` into the folder `out`: `index.json`, a descriptor per operator and SM, cubins beside it.

    Args:
        out: made if absent; files of other digests are left alone, the index is replaced.
        cache: folder of images by content hash, shared between builds.
        jobs: processes at a time; None for one per core.
        progress: called with a task when it starts (None) and when it is done.

    Raises:
        TargetError: a kernel does not compile, or compiles to one that could not run. Names it.
        EnvironmentFault: the compiler is missing, or a process of it was ended from outside.
    """
    compiler()
    cache.mkdir(parents=True, exist_ok=True)
    jobs = max(1, min(jobs or usable_cores(), len(work)))
    done: dict[tuple[str, int], KernelSet] = {}  # by digest, which tells sizes apart, and SM
    before = os.environ.pop("TRITON_INTERPRET", None)  # the spawned processes inherit it
    try:
        with Workers(jobs, "compiles kernels") as workers:
            running = {}
            for task in work:
                progress(task, None)
                running[workers.submit(_compile_task, task, cache)] = task
            for future in concurrent.futures.as_completed(running):
                task = running[future]
                done[task.digest, task.sm] = future.result()
                progress(task, done[task.digest, task.sm])
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    order = list(SPECS)
    sets = [done[task.digest, task.sm] for task in sorted(work, key=lambda task: (order.index(task.op), task.sm))]
    write(sets, out, cache=cache)
    return sets


def write(sets: Sequence[KernelSet], out: Path, *, cache: Path) -> None:
    """Write compiled sets and the index that lists them."""
    entries = []
    for kernels in sets:
        folder = out / f"sm{kernels.sm}"
        folder.mkdir(parents=True, exist_ok=True)
        for image in kernels.images.values():
            replace_file(folder / image.cubin, (cache / image.cubin).read_bytes())
        name = f"{SPECS[kernels.op].torch_name}-{kernels.digest[:12]}.json"
        replace_file(folder / name, to_json(kernels).encode())
        entry = {"op": kernels.op, "sm": kernels.sm, "digest": kernels.digest, "file": f"sm{kernels.sm}/{name}"}
        entries.append(entry)
    entries.sort(key=lambda entry: (entry["op"], entry["sm"], entry["digest"]))
    text = json.dumps({"format": INDEX_FORMAT, "kernels": entries}, indent=1) + "\n"
    replace_file(out / INDEX, text.encode())


# --- in a worker process --------------------------------------------------------------------------------------


def _compile_task(task: Task, cache: Path) -> KernelSet:
    images = {}
    for variant in op_kernels(task.op, task.provider).variants(task.statics, task.sm):
        images[variant.name] = _cached(task, variant, cache)
    return _kernel_set(task, images)


def _kernel_set(task: Task, images: Mapping[str, Image]) -> KernelSet:
    made_by = compiler_of(task.op, task.provider)
    version = SPECS[task.op].version
    return KernelSet(task.op, version, task.sm, task.digest, task.statics, made_by, images, provider=task.provider)


def _cached(task: Task, variant: Variant, cache: Path) -> Image:
    made_by = compiler_of(task.op, task.provider)
    record = cache / f"{image_key(task.op, variant, task.sm, compiler=made_by, provider=task.provider)}.json"
    if record.is_file():
        try:
            image = from_json(record.read_text(encoding="utf-8"), where=str(record)).images[variant.name]
            if hashlib.sha256((cache / image.cubin).read_bytes()).hexdigest() == image.sha256:
                return image
        except Exception:
            pass
    image, cubin = compile_variant(task.op, variant, task.sm, task.provider)
    replace_file(cache / image.cubin, cubin)
    replace_file(record, to_json(_kernel_set(task, {variant.name: image})).encode())
    return image


def read_code(cubin: Path, *, cache: Path) -> sass.Code:
    """Return what a cubin's instructions are, from the disassembler that comes with the compiler.

    Args:
        cubin: a file with one kernel, named by its content as a build leaves it.
        cache: folder of what was read before.

    Raises:
        TargetError: it cannot be disassembled, or not be understood.
    """
    reader = hashlib.sha256(Path(sass.__file__).read_bytes()).hexdigest()
    record = cache / f"{cubin.stem}-{reader[:16]}.sass.json"
    if record.is_file():
        with contextlib.suppress(Exception):
            return sass.from_json(record.read_text(encoding="utf-8"))
    made = subprocess.run(
        [packaged_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, errors="replace", check=False
    )
    try:
        code = sass.read(made.stdout)
    except ValueError as error:
        raise TargetError(f"{cubin}: {error}; nvdisasm ended with {made.returncode} {made.stderr.strip()}") from None
    cache.mkdir(parents=True, exist_ok=True)
    replace_file(record, sass.to_json(code).encode())
    return code


def default_cache() -> Path:
    """Return where images are kept between builds: below the user's cache.

    Raises:
        EnvironmentFault: the user has no home.
    """
    cache = user_cache()
    if cache is None:
        raise EnvironmentFault("there is no home folder to keep compiled kernels in; set XDG_CACHE_HOME to a folder")
    return cache / "kernels"


@contextlib.contextmanager
def cache_folder(folder: Path | None = None) -> Iterator[Path]:
    """Give the folder that images are kept in: `folder`, else the user's cache, else a temporary one.

    A user without a home, or with one that cannot be written, compiles anew each time; nothing fails for want of it.
    """
    cache = user_cache() if folder is None else None
    place = folder if cache is None else cache / "kernels"
    if folder is None and place is not None:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            place = None
        if place is not None and not os.access(place, os.W_OK):
            place = None
    if place is not None:
        yield place
        return
    with temporary_folder("seekforge-kernels") as temporary:
        yield temporary
