"""Compile kernels ahead of time: variants -> cubins, descriptors and an index, on any machine, without a GPU.

Work is cut into one process per operator and SM, so that no target sees another's compiler state
(Triton 3.6 keeps the first conversion from FP8 that it compiles for every later target of the process). An image is
cached under a hash of everything that it is made from: the sources, the variant, the SM and the compiler.
Triton is imported only inside the worker processes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.common.cores import usable_cores
from seekforge.common.errors import EnvironmentFault, TargetError
from seekforge.common.files import replace_file
from seekforge.common.requirements import install
from seekforge.common.temporary import temporary_folder
from seekforge.common.user_cache import user_cache
from seekforge.common.workers import Workers
from seekforge.plugins.kernels import rules, sass
from seekforge.plugins.kernels.cuda_driver import needed_driver
from seekforge.plugins.kernels.kernel_set import FORMAT, Image, KernelSet, Param, Resources, from_json, to_json
from seekforge.plugins.kernels.launch_plan import Scalar, Variant, op_kernels, statics_of
from seekforge.plugins.kernels.sm_limits import SHARED_LIMIT, occupancy
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


def compiler() -> str:
    """Return the compiler's name and version.

    Raises:
        EnvironmentFault: it is not installed.
    """
    try:
        return f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentFault(
            f"triton is not installed, and kernels are compiled with it; {install('kernels')} (no GPU is needed)"
        ) from None


def image_key(op: str, variant: Variant, sm: int, *, compiler: str) -> str:
    """Return the digest of all that one image is made from. Neither the compiler nor a GPU is needed to tell it."""
    head = json.dumps([_MADE, compiler, sm, asdict(variant)], sort_keys=True)
    sources = _DEVICE_LIB.read_bytes() + (_OPERATORS / SPECS[op].torch_name / "kernel.py").read_bytes()
    return hashlib.sha256(head.encode() + b"\0" + sources).hexdigest()


def _sources(op: str) -> bytes:
    """Return the text that images of `op` depend on: device code, and the choices of tiles and in `launch.py`."""
    folder = _OPERATORS / SPECS[op].torch_name
    tiles = (_OPERATORS / "linear_tile.py", _OPERATORS / "latent_tile.py")
    files = (_DEVICE_LIB, *tiles, folder / "kernel.py", folder / "launch.py")
    return b"\0".join(path.read_bytes() for path in files)


def set_digest(op: str, statics: Mapping[str, Scalar]) -> str:
    """Return the digest of an operator's kernels: the same for every SM, since one engine may serve several."""
    spec = SPECS[op]
    head = json.dumps([FORMAT, op, spec.version, compiler(), dict(statics)], sort_keys=True)
    return hashlib.sha256(head.encode() + b"\0" + _sources(op)).hexdigest()


def tasks(ops: Mapping[str, Mapping[str, Any]], sms: Iterable[int]) -> list[Task]:
    """Return the work for operators and SMs, the longest first.

    Args:
        ops: op_type -> its sizes and attributes (at least the static ones).
        sms: compute capabilities.

    Raises:
        ShapeError: there are no kernels for the sizes.
        TargetError: there are none for an SM.
    """
    sms = tuple(sms)
    for sm in sms:
        if sm not in SHARED_LIMIT:
            raise TargetError(f"sm {sm}: kernels are compiled for {', '.join(map(str, SHARED_LIMIT))}")
    tasks = []
    for op, bound in ops.items():
        statics = statics_of(op, bound)
        digest = set_digest(op, statics)
        tasks += [Task(op, sm, digest, statics) for sm in sms]
    loops = {op: sum(v.main_loop for v in op_kernels(op).variants(statics_of(op, ops[op]), 90)) for op in ops}
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
    for variant in op_kernels(task.op).variants(task.statics, task.sm):
        images[variant.name] = _cached(task, variant, cache)
    return KernelSet(task.op, SPECS[task.op].version, task.sm, task.digest, task.statics, compiler(), images)


def _cached(task: Task, variant: Variant, cache: Path) -> Image:
    record = cache / f"{image_key(task.op, variant, task.sm, compiler=compiler())}.json"
    if record.is_file():
        try:
            image = from_json(record.read_text(encoding="utf-8"), where=str(record)).images[variant.name]
            if hashlib.sha256((cache / image.cubin).read_bytes()).hexdigest() == image.sha256:
                return image
        except Exception:
            pass
    image, cubin = compile_variant(task.op, variant, task.sm)
    replace_file(cache / image.cubin, cubin)
    one = KernelSet(
        task.op, SPECS[task.op].version, task.sm, task.digest, task.statics, compiler(), {variant.name: image}
    )
    replace_file(record, to_json(one).encode())
    return image


def compile_variant(op: str, variant: Variant, sm: int) -> tuple[Image, bytes]:
    """Compile one variant for one SM; call it in a process that serves one SM only.

    Raises:
        TargetError: it does not compile, or the result could not run.
    """
    where = f"{op} {variant.name} sm{sm}"
    triton = importlib.import_module("triton")
    backend = importlib.import_module("triton.backends.compiler")
    source_class = importlib.import_module("triton.compiler").ASTSource
    function = getattr(importlib.import_module(f"seekforge.plugins.{SPECS[op].torch_name}.kernel"), variant.kernel)
    aligned = [name for name, kind in variant.types.items() if kind.startswith("*")] + list(variant.aligned)
    source = source_class(
        function,
        signature={name: variant.types.get(name, "constexpr") for name in function.arg_names},
        constexprs=dict(variant.constants),
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    with temporary_folder("seekforge-kernels") as scratch:
        os.environ["TRITON_CACHE_DIR"] = str(scratch)  # ours is the cache; Triton's depends on the process
        try:
            made = triton.compile(source, target=backend.GPUTarget("cuda", sm, 32), options=options)
        except Exception as error:
            raise TargetError(f"{where}: does not compile: {type(error).__name__}: {error}") from None
        cubin, ptx, meta = made.asm["cubin"], made.asm["ptx"], made.metadata
    layout, registers, stack = _inspect(cubin)
    names = [(name, variant.types[name]) for name in function.arg_names if name in variant.types]
    names += [("", "*u8"), ("", "*u8")]
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.S)
    declared = entry.group(1).count(".param") if entry else -1
    if not len(layout) == len(names) == declared:
        raise TargetError(f"{where}: {len(names)} parameters expected, PTX has {declared}, the cubin {len(layout)}")
    fault = rules.unrunnable(
        ptx,
        sm=sm,
        shared_bytes=meta.shared,
        tmem=getattr(meta, "tmem_size", 0) or 0,
        scratch=meta.global_scratch_size,
        profile=meta.profile_scratch_size,
    )
    if fault:
        raise TargetError(f"{where}: {fault}")
    try:
        driver = needed_driver(cubin)
    except TargetError as error:
        raise TargetError(f"{where}: {error}") from None
    sha256 = hashlib.sha256(cubin).hexdigest()
    shared = meta.shared
    image = Image(
        variant=variant.name,
        entry=meta.name,
        cubin=f"{sha256[:32]}.cubin",
        sha256=sha256,
        num_warps=meta.num_warps,
        num_ctas=meta.num_ctas,
        scratch_bytes=meta.global_scratch_size,
        scratch_align=meta.global_scratch_align,
        params=tuple(
            Param(name, kind, offset, size) for (name, kind), (offset, size) in zip(names, layout, strict=True)
        ),
        main_loop=variant.main_loop,
        driver=driver,
        resources=Resources(
            registers, stack, shared,
            round(occupancy(registers=registers, shared_bytes=shared, num_warps=meta.num_warps, sm=sm), 3),
        ),
    )  # fmt: skip
    return image, cubin


def _inspect(cubin: bytes) -> tuple[list[tuple[int, int]], int, int]:
    """Return ([(offset, size) per parameter], registers per thread, stack bytes per thread) from the cubin itself."""
    tool = _tool("cuobjdump")
    with temporary_folder("seekforge-kernels") as folder:
        file = folder / "kernel.cubin"
        file.write_bytes(cubin)

        def dump(option: str) -> str:
            return subprocess.run(
                [tool, option, file], capture_output=True, text=True, errors="replace", check=True
            ).stdout

        elf, usage = dump("-elf"), dump("--dump-resource-usage")
    parameters = re.findall(r"Ordinal\s*:\s*(0x\w+)\s*Offset\s*:\s*(0x\w+)\s*Size\s*:\s*(0x\w+)", elf)
    layout = [(off, size) for _, off, size in sorted((int(o, 16), int(a, 16), int(s, 16)) for o, a, s in parameters)]
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise TargetError(f"cuobjdump reports no registers; {install('kernels')}")
    return layout, int(match.group(1)), int(match.group(2))


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
        [_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, errors="replace", check=False
    )
    try:
        code = sass.read(made.stdout)
    except ValueError as error:
        raise TargetError(f"{cubin}: {error}; nvdisasm ended with {made.returncode} {made.stderr.strip()}") from None
    cache.mkdir(parents=True, exist_ok=True)
    replace_file(record, sass.to_json(code).encode())
    return code


def _tool(name: str) -> Path:
    """Return where the compiler's wheel has one of NVIDIA's tools."""
    compiler()  # says what to install
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None  # compiler() found the distribution
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


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
