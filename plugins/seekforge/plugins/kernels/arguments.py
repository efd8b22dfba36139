"""The parameters of launches where CUDA reads them: packed once for calls of one shape, addresses set for each call."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence

from seekforge.common.errors import EngineError
from seekforge.plugins.kernels.kernel_set import Image, argument_code
from seekforge.plugins.kernels.launch_plan import Buffer

_SLOT = 8


class CallArguments:
    """The parameters of all launches of one operator call, in memory of their own.

    CUDA takes the parameters of a launch as an array of pointers to values. All values of a call lie in one block of
    slots of eight bytes: first the addresses that its launches name, each once, however many take it; then the values
    that the shapes fix; and a null for the hidden scratch pointers, which compiled kernels do not use (`aot` refuses
    them). `set_addresses` overwrites the first part alone.

    Attributes:
        parameters: for each launch the address of its array of pointers, which lives as long as this object.
    """

    def __init__(
        self, launches: Sequence[tuple[Image, Mapping[str, Buffer | int | float]]], names: Sequence[str]
    ) -> None:
        """Pack what no call changes.

        Args:
            launches: image and arguments by name of each launch.
            names: what a `Buffer` may name, in the order in which `set_addresses` is given their addresses.

        Raises:
            EngineError: an argument is missing, left over, of the wrong kind or out of range.
        """
        place = {name: index for index, name in enumerate(names)}
        taken = [value for _, arguments in launches for value in arguments.values() if isinstance(value, Buffer)]
        buffers = {buffer: index for index, buffer in enumerate(dict.fromkeys(taken))}
        self._num_names = len(names)
        self._buffers = [(place[buffer.name], buffer.offset) for buffer in buffers]
        self._pack = struct.Struct(f"<{len(buffers)}Q").pack_into
        num_values = sum(len(image.params) for image, _ in launches)
        self._slots = (ctypes.c_uint64 * (len(buffers) + num_values + 1))()
        self._pointers = (ctypes.c_uint64 * num_values)()
        slots, pointers = ctypes.addressof(self._slots), ctypes.addressof(self._pointers)
        null = len(self._slots) - 1
        free, at, starts = len(buffers), 0, []
        for image, arguments in launches:
            named = [param.name for param in image.params if param.name]
            if set(named) != set(arguments):
                raise EngineError(f"{image.entry}: arguments {sorted(arguments)}, the kernel takes {sorted(named)}")
            starts.append(pointers + _SLOT * at)
            for param in image.params:
                value = arguments[param.name] if param.name else None
                if value is None:
                    slot = null
                elif isinstance(value, Buffer):
                    if not param.type.startswith("*"):
                        raise EngineError(f"{image.entry}: {param.name} is an address, the kernel takes {param.type}")
                    slot = buffers[value]
                else:
                    slot, free = free, free + 1
                    try:
                        struct.pack_into("<" + argument_code(param), self._slots, _SLOT * slot, value)
                    except (struct.error, OverflowError) as error:
                        raise EngineError(
                            f"{image.entry}: {param.name} = {value!r} is no {param.type} ({error})"
                        ) from None
                self._pointers[at] = slots + _SLOT * slot
                at += 1
        self.parameters = tuple(starts)

    def set_addresses(self, addresses: Sequence[int]) -> None:
        """Overwrite the addresses of the last call.

        Args:
            addresses: one for each of the names.

        Raises:
            EngineError: there are more or fewer, or one is none.
        """
        if len(addresses) != self._num_names:
            raise EngineError(f"a call with {len(addresses)} addresses, expected {self._num_names}")
        try:
            self._pack(self._slots, 0, *[addresses[which] + offset for which, offset in self._buffers])
        except struct.error as error:
            raise EngineError(f"a call with something that is no address ({error})") from None
