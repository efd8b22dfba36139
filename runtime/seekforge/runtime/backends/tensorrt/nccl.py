"""The tensor-parallel ranks of a GPU engine: sums inside of plans, through NCCL. No decisions here.

TensorRT looks for NCCL in the process by itself, and has to find the library that made the communicator: so that is
loaded first (`cuda.CudaDevice`). Nothing of this file runs without several GPUs, so it holds calls of the library only;
tests drive it with one that records.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from seekforge.common.errors import EngineError, EnvironmentFault
from seekforge.common.requirements import install
from seekforge.runtime.backends.tensorrt.waiting import beside

#: Returns the sum over the tensor-parallel ranks of what each of them passes, on the host.
HostSum = Callable[[np.ndarray], np.ndarray]

#: Seconds in which NCCL ends or gives back a communicator, and in which the ranks of one find each other.
_ANSWER_S, MEETING_S = 5.0, 60.0


def unique_id() -> bytes:
    """Return what the ranks of a new group find each other by.

    Raises:
        EnvironmentFault: NCCL is not installed.
        EngineError: it does not start.
    """
    nccl = _nccl()
    return bytes(_called(nccl.get_unique_id))


class NcclGroup:
    """See `device.Group`. The GPU of this rank has to be the current one of the thread that makes it.

    Args:
        unique: the same `unique_id` on all ranks.
        rank, num_ranks: this rank's number among the group, and their number.
        host_sum: adds up over the group.

    Raises:
        EnvironmentFault: NCCL is not installed.
        EngineError: the ranks do not find each other.
    """

    def __init__(self, unique: bytes, rank: int, num_ranks: int, host_sum: HostSum) -> None:
        nccl = _nccl()
        self._num_ranks, self._host_sum = num_ranks, host_sum
        meeting = nccl.UniqueId.from_bytes(unique)
        self._made = _called(nccl.Communicator.init, num_ranks, rank, meeting)
        self._capsule = _capsule(int(self._made.ptr))
        self._is_aborted = False

    @property
    def communicator(self) -> object:
        """The communicator in a capsule, as TensorRT takes it."""
        return self._capsule

    @property
    def is_aborted(self) -> bool:
        """Whether its sums were ended."""
        return self._is_aborted

    def agree(self, fine: bool) -> bool:
        """Return whether all ranks say that it went well."""
        return int(self._host_sum(np.array([int(fine)], np.int64))[0]) == self._num_ranks

    def abort(self) -> None:
        """End every sum that is under way.

        Raises:
            EngineError: NCCL cannot, or does not answer.
        """
        if self._is_aborted:
            return
        self._is_aborted = True
        beside(lambda: _called(self._made.abort), _ANSWER_S, f"NCCL: no abort within {_ANSWER_S:.0f} s")

    def close(self) -> None:
        """Give the communicator back, on all ranks.

        Raises:
            EngineError: NCCL cannot, or does not answer: another rank does not give its own back.
        """
        if self._is_aborted:
            return  # which gave it back
        words = f"NCCL: the communicator was not given back within {_ANSWER_S:.0f} s"
        beside(lambda: _called(self._made.destroy), _ANSWER_S, words)


def _nccl() -> Any:
    try:
        return importlib.import_module("nccl.core")
    except ImportError as error:  # the package, or the library that it looks for
        raise EnvironmentFault(f"engines of several GPUs need NCCL ({error}); {install('nccl')}") from None


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    """Make a call, whose errors are of several classes that have no base of their own."""
    try:
        return function(*arguments)
    except Exception as error:
        raise EngineError(f"NCCL: {' '.join(str(error).split()) or type(error).__name__}") from None


def _capsule(address: int) -> object:
    """Return a pointer in a capsule without a name."""
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return make(address, None, None)
