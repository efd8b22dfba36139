"""The communicator of tensor-parallel ranks, on a stand-in for nccl4py that has the names of the real one alone."""

from __future__ import annotations

import ctypes
import sys
import threading
import types

import numpy as np
import pytest

from seekforge.common.errors import EngineError, EnvironmentFault
from seekforge.runtime.backends.tensorrt import nccl
from seekforge.runtime.backends.tensorrt.nccl import NcclGroup, unique_id

_ID = bytes(range(128))


class Communicator:
    """As nccl4py 0.6 has it: `init`, `ptr`, `abort`, `destroy`."""

    made: list[Communicator]

    def __init__(self, num_ranks: int, rank: int, unique: bytes) -> None:
        self.num_ranks, self.rank, self.unique = num_ranks, rank, unique
        self.ptr, self.calls = 0xC0FFEE, []

    @classmethod
    def init(cls, nranks: int, rank: int, unique_id: bytes) -> Communicator:
        if unique_id != _ID:
            raise RuntimeError("unhandled\nsystem error")
        cls.made.append(cls(nranks, rank, unique_id))
        return cls.made[-1]

    def abort(self) -> None:
        self.calls.append("abort")

    def destroy(self) -> None:
        self.calls.append("destroy")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> type[Communicator]:
    Communicator.made = []
    core = types.SimpleNamespace(
        Communicator=Communicator,
        UniqueId=types.SimpleNamespace(from_bytes=bytes),
        get_unique_id=lambda: bytearray(_ID),
    )
    monkeypatch.setitem(sys.modules, "nccl", types.SimpleNamespace(core=core))
    monkeypatch.setitem(sys.modules, "nccl.core", core)
    return Communicator


def test_a_group_has_a_communicator_and_agrees(library: type[Communicator]) -> None:
    said: list[int] = []

    def host_sum(part: np.ndarray) -> np.ndarray:
        said.append(int(part[0]))
        return part + 1  # the other rank says yes

    group = NcclGroup(unique_id(), 1, 2, host_sum)
    (made,) = library.made
    assert (made.num_ranks, made.rank, made.unique) == (2, 1, _ID)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    assert pointer(group.communicator, None) == 0xC0FFEE
    assert group.agree(True) and not group.agree(False) and said == [1, 0]
    group.close()
    assert made.calls == ["destroy"] and not group.is_aborted
    group.abort()
    assert group.is_aborted
    group.abort()
    group.close()
    assert made.calls == ["destroy", "abort"], "what was aborted is given back"


@pytest.mark.parametrize(("call", "words"), [("abort", "no abort"), ("destroy", "the communicator was not given back")])
def test_a_communicator_that_never_answers_is_left(
    call: str, words: str, library: type[Communicator], monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(library, call, lambda self: never.wait())
    monkeypatch.setattr(nccl, "_ANSWER_S", 0.1)
    group = NcclGroup(unique_id(), 0, 2, lambda part: part)
    with pytest.raises(EngineError, match=rf"^NCCL: {words} within 0 s$"):
        (group.abort if call == "abort" else group.close)()
    never.set()
    assert group.is_aborted == (call == "abort")


def test_faults_are_one_line(library: type[Communicator], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"^NCCL: unhandled system error$"):
        NcclGroup(b"other", 0, 2, lambda part: part)
    monkeypatch.setitem(sys.modules, "nccl.core", None)
    with pytest.raises(EnvironmentFault, match=r"engines of several GPUs need NCCL .*nccl4py"):
        unique_id()


def test_names_are_those_of_the_module_that_ships() -> None:
    """Where nccl4py is installed with its library, the stand-in above has its names."""
    core = pytest.importorskip("nccl.core", reason="nccl4py is not installed")
    assert all(hasattr(core.Communicator, name) for name in ("init", "ptr", "abort", "destroy"))
    assert callable(core.get_unique_id) and callable(core.UniqueId.from_bytes)
    assert nccl._nccl() is core
