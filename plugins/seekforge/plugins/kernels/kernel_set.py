"""Compiled kernels as data: a `KernelSet` is one JSON file beside its cubins, read without torch, Triton or CUDA."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from seekforge.common.errors import EngineError
from seekforge.common.paths import inside, name_fault
from seekforge.common.reading import SETTINGS_BYTES, parse_json, read_bytes, read_text
from seekforge.plugins.kernels.launch_plan import Scalar
from seekforge.plugins.operator import TRITON
from seekforge.plugins.registry import KERNEL_FORMS, SPECS

#: Version of the descriptor file.
FORMAT: Final = 4

#: What CUDA takes as arguments of one launch, and the largest file of one kernel, bytes.
_MOST_ARGUMENT_BYTES: Final = 32_768
_MOST_CUBIN_BYTES: Final = 256 << 20


@dataclass(frozen=True)
class Param:
    """One parameter as the cubin declares it; `name` is empty for the two hidden scratch pointers."""

    name: str
    type: str
    offset: int
    size: int


@dataclass(frozen=True)
class Resources:
    """What an image costs, read from the compiled code.

    Attributes:
        registers: how many a thread has.
        stack_bytes: bytes of stack per thread; more than 0 nearly always means spilled registers.
        shared_bytes: dynamic shared memory per block.
        tensor_columns: columns of tensor memory per block.
        occupancy: resident warps over the most an SM holds, from the numbers above.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int
    occupancy: float


@dataclass(frozen=True)
class Image:
    """One compiled kernel: all that a launcher needs.

    Attributes:
        variant: name of the `Variant` that it was made from.
        entry: symbol in the cubin.
        cubin: file name beside the descriptor.
        sha256: digest of that file.
        num_warps: warps per block of the launch; can be more than was asked for.
        num_ctas: blocks per cluster.
        scratch_bytes: hidden global scratch per block.
        scratch_align: its alignment.
        params: the parameters in order, the two hidden ones of Triton's kernels last.
        main_loop: as in `Variant`.
        driver: the CUDA version that a driver must have to load it, 13000 for 13.0 (`cuda_driver.needed_driver`).
        programmatic: whether it waits by itself for the launches before it, so that it may start before they end.
        resources: registers and the like.
    """

    variant: str
    entry: str
    cubin: str
    sha256: str
    num_warps: int
    num_ctas: int
    scratch_bytes: int
    scratch_align: int
    params: tuple[Param, ...]
    main_loop: bool
    driver: int
    programmatic: bool
    resources: Resources


@dataclass(frozen=True)
class KernelSet:
    """All images of one operator for one SM and one set of static sizes: the content of a descriptor file.

    Attributes:
        digest: that of everything from which the images are made, without the SM: an engine for several SMs has one.
        statics: sizes and attributes that are fixed in the code.
        compiler: name and version; of a library's kernels with its name and version, and a digest of its headers.
        provider: where the kernels come from (`providers.choice`).
    """

    op: str
    op_version: int
    sm: int
    digest: str
    statics: Mapping[str, Scalar]
    compiler: str
    images: Mapping[str, Image]
    format: int = field(default=FORMAT)
    provider: str = TRITON


#: Triton type -> struct code; pointers are "Q".
_CODES: Final[dict[str, str]] = {"i1": "b", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f"}


def argument_code(param: Param) -> str:
    """Return the `struct` code of a parameter, little endian without padding."""
    return "Q" if not param.name or param.type.startswith("*") else _CODES[param.type]


def to_json(kernels: KernelSet) -> str:
    """Return the text of a descriptor file."""
    return json.dumps(asdict(kernels), indent=1, sort_keys=True) + "\n"


def from_json(text: str, *, where: str) -> KernelSet:
    """Undo `to_json`.

    Raises:
        EngineError: the text is damaged or of another version.
    """
    try:
        raw = parse_json(text)
        if raw["format"] != FORMAT:
            raise EngineError(f"{where}: format {raw['format']}, expected {FORMAT}; compile the kernels again")
        images = {}
        for name, image in raw["images"].items():
            params = tuple(_typed(Param, param) for param in image["params"])
            images[name] = _typed(Image, image | {"params": params, "resources": _typed(Resources, image["resources"])})
            _check_image(images[name])
        return _typed(KernelSet, raw | {"images": images})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{where}: damaged kernel descriptor ({error}); compile the kernels again") from None


_T = TypeVar("_T")
_PLAIN: Final = {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,)}


def _typed(kind: Callable[..., _T], raw: Mapping[str, Any]) -> _T:
    """Make a dataclass of plain values as JSON has them.

    Raises:
        TypeError: a field is unknown, missing, or of another type.
    """
    made = kind(**raw)
    for one in fields(made):  # pyright: ignore[reportArgumentType]
        value, allowed = getattr(made, one.name), _PLAIN.get(str(one.type))
        if allowed is not None and type(value) not in allowed:
            raise TypeError(f"{one.name} is a {type(value).__name__}, expected {one.type}")
    return made


def _check_image(image: Image) -> None:
    """Refuse sizes that no compiled kernel has, and a cubin that is not a file beside the descriptor."""
    fault = name_fault(image.cubin)
    if fault is not None or "/" in image.cubin:
        raise ValueError(f"cubin {fault or f'is {image.cubin!r}, expected a file beside the descriptor'}")
    names = [param.name for param in image.params]
    named = names[:-2] if names[-2:] == ["", ""] else names
    if "" in named or len(set(named)) != len(named):
        raise ValueError(f"{image.variant} has the parameters {names!r:.200}, expected all with names but the last two")
    for param in image.params:
        if param.name and not param.type.startswith("*") and param.type not in _CODES:
            raise ValueError(f"parameter {param.name} is a {param.type}, expected {', '.join(_CODES)} or a pointer")
        if not (0 <= param.offset <= _MOST_ARGUMENT_BYTES and 0 < param.size <= 8):
            raise ValueError(f"parameter {param.name} lies at {param.offset} with {param.size} bytes")
    if not 0 < image.driver < 1 << 20:
        raise ValueError(f"driver is {image.driver}, expected a CUDA version such as 13000")
    sizes = (image.num_warps, image.num_ctas, image.scratch_align)
    if min(sizes) < 1 or max(sizes) > 1 << 16 or not 0 <= image.scratch_bytes < 1 << 40:
        raise ValueError(f"{image.variant} has sizes out of range")
    if not 0 <= image.resources.shared_bytes < 1 << 20:
        raise ValueError(f"{image.variant} has shared_bytes {image.resources.shared_bytes}")
    if not 0 <= image.resources.tensor_columns < 1 << 10:
        raise ValueError(f"{image.variant} has tensor_columns {image.resources.tensor_columns}")


def read_kernels(path: Path) -> KernelSet:
    """Read a descriptor and check its operator against this seekforge.

    Raises:
        EngineError: the file is damaged, or made for another version of the operator.
    """
    try:
        text = read_text(path, most=SETTINGS_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise EngineError(f"{path}: cannot be read ({reason}); compile the kernels again") from None
    kernels = from_json(text, where=str(path))
    spec = SPECS.get(kernels.op)
    if spec is None or spec.version != kernels.op_version:
        raise EngineError(
            f"{path}: kernels of {kernels.op} version {kernels.op_version}, this seekforge has "
            f"{'no such operator' if spec is None else f'version {spec.version}'}; compile the kernels again"
        )
    known = (TRITON, *KERNEL_FORMS[kernels.op].libraries) if kernels.op in KERNEL_FORMS else ()
    if kernels.provider not in known:
        raise EngineError(
            f"{path}: kernels of provider {kernels.provider[:60]!r}, for {kernels.op} this seekforge has "
            f"{', '.join(known) or 'none'}; compile the kernels again"
        )
    return kernels


def read_cubin(path: Path, image: Image) -> bytes:
    """Return the cubin of an image whose descriptor is at `path`.

    Raises:
        EngineError: the file is missing or is not the one that was compiled.
    """
    file = inside(path.parent, image.cubin, error=EngineError, where=path, again="compile the kernels again")
    try:
        cubin = read_bytes(file, most=_MOST_CUBIN_BYTES)
    except FileNotFoundError:
        raise EngineError(f"{file}: missing; copy the whole folder of kernels, or compile them again") from None
    except OSError as error:
        raise EngineError(f"{file}: cannot be read ({error.strerror}); compile the kernels again") from None
    if hashlib.sha256(cubin).hexdigest() != image.sha256:
        raise EngineError(f"{file}: not what was compiled (sha256 differs); compile the kernels again")
    return cubin
