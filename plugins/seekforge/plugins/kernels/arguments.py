"""The arguments of a launch: buffers to addresses, values to the bytes that a kernel takes."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from seekforge.common.errors import EngineError
from seekforge.plugins.kernels.kernel_set import Image, argument_code
from seekforge.plugins.kernels.launch_plan import Buffer


def resolve(arguments: Mapping[str, Buffer | int | float], addresses: Mapping[str, int]) -> dict[str, int | float]:
    """Return arguments with addresses in place of buffers.

    Args:
        arguments: those of a `Launch`.
        addresses: tensor name, or `WORKSPACE` -> device address.
    """
    return {
        name: addresses[value.name] + value.offset if isinstance(value, Buffer) else value
        for name, value in arguments.items()
    }


def pack_arguments(image: Image, values: Mapping[str, int | float], *, scratch: int = 0) -> bytes:
    """Return the raw parameter buffer of a launch: user arguments, global scratch, profile scratch (null).

    Raises:
        EngineError: an argument is missing, left over or out of range.
    """
    named = [param.name for param in image.params if param.name]
    if set(named) != set(values):
        raise EngineError(f"{image.entry}: arguments {sorted(values)}, the kernel takes {sorted(named)}")
    last = image.params[-1]
    buffer = bytearray(last.offset + last.size)
    hidden = iter((scratch, 0))
    for param in image.params:
        value = values[param.name] if param.name else next(hidden)
        try:
            struct.pack_into("<" + argument_code(param), buffer, param.offset, value)
        except struct.error as error:
            raise EngineError(f"{image.entry}: {param.name} = {value!r} is no {param.type} ({error})") from None
    return bytes(buffer)
