"""What differs between operating systems: the one place that asks for calls which not every system has.

Linux has everything, macOS what the CPU path needs; Windows lacks too much of it (signals, rename over an open file,
memory maps that may be unlinked), and is refused with a sentence instead of failing somewhere in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from seekforge.common.errors import EnvironmentFault

#: Tells a process that was started to do a part of the work which process that was.
_PARENT = "SEEKFORGE_PARENT_PID"
#: Bytes of one read: macOS refuses 2 GiB and more.
_MOST_AT_ONCE = 1 << 30
#: Of Linux's <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM: stop as if interrupted, so that nothing half-written and no process stays behind."""


def check_platform() -> None:
    """Refuse a system that seekforge does not run on.

    Raises:
        EnvironmentFault: it is Windows.
    """
    if sys.platform in ("win32", "cygwin", "msys"):
        raise EnvironmentFault("seekforge runs on Linux and macOS, and this is Windows; use it inside WSL 2")


def read_at(file: int, out: memoryview, offset: int) -> int:
    """Read from a place of an open file into `out`, without moving the file's position.

    Args:
        file: descriptor.
        out: bytes to fill.
        offset: the offset in the file.

    Returns:
        How many bytes came, 0 at the end of the file; possibly fewer than `out` holds.

    Raises:
        OSError: the file cannot be read.
    """
    out = out[:_MOST_AT_ONCE]
    if hasattr(os, "preadv"):
        return os.preadv(file, [out], offset)
    data = os.pread(file, len(out), offset)  # macOS before 11: one copy more
    out[: len(data)] = data
    return len(data)


def read_all_at(file: int, out: memoryview, offset: int) -> int:
    """Fill `out` from a place of an open file, as `read_at`; returns how many bytes came before the file ended."""
    filled = 0
    while filled < len(out):
        count = read_at(file, out[filled:], offset + filled)
        if count == 0:
            break
        filled += count
    return filled


def peak_bytes() -> int:
    """Return the most main memory that this process has held; 0 where nobody tells.

    `ru_maxrss` will not do where there is better: it begins with what the process had that started this one.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        resource = importlib.import_module("resource")
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def cpu_seconds() -> float:
    """Return the processor time that this process has used."""
    times = os.times()
    return times.user + times.system


def child_environment() -> dict[str, str]:
    """Return the environment for a process that does a part of this one's work, and calls `end_with_parent`."""
    return {**os.environ, _PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """End this process when the one that started it for a part of its work ends, however that ends.

    A process that is killed cannot end those it started. Without effect where this one was started by anyone else.
    """
    parent = os.environ.pop(_PARENT, "")
    if parent.isdecimal():
        end_with(int(parent))


def end_with(parent: int) -> None:
    """End this process when its parent does, whose process id this is, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), name="seekforge-parent", daemon=True).start()
    if os.getppid() != parent:  # it ended before it was asked
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
