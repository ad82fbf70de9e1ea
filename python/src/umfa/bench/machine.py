"""What the machine says about itself: its processor, who else used it, the memory of this process."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Loss", "MemoryPeak", "UnreadableError", "Usage", "cpu_count", "process_seconds", "processor_name", "timestamp"]

_STAT = Path("/proc/stat")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_IDLE, _IO_WAIT, _STEAL = 3, 4, 7
_RESET_PEAK = "5"


class UnreadableError(Exception):
    """What a system does not tell; the message says it."""


def processor_name() -> str:
    """The processor's name as its system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_seconds() -> float:
    """CPU time of this process so far, all threads, in user and kernel mode."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class Loss:
    """Shares of the machine's CPU time that this process did not get.

    Attributes
    ----------
    stolen : float
        What the hypervisor gave to other machines.
    others : float
        What other processes of this machine used.
    """

    stolen: float
    others: float


@dataclass(frozen=True)
class Usage:
    """A reading of the CPU time that was spent since the machine started, in seconds."""

    total: float
    busy: float
    stolen: float
    own: float

    @classmethod
    def now(cls) -> Usage | None:
        """Read it; None where the system does not tell."""
        try:
            fields = _STAT.read_text().split("\n", 1)[0].split()[1:9]
            ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
            idle, stolen = ticks[_IDLE] + ticks[_IO_WAIT], ticks[_STEAL]
        except (OSError, ValueError, IndexError):
            return None
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return cls(sum(ticks), sum(ticks) - idle - stolen, stolen, own)

    @staticmethod
    def loss(before: Usage | None, after: Usage | None) -> Loss | None:
        """What was lost between two readings; None if there was none or no time between them."""
        if before is None or after is None or after.total <= before.total:
            return None
        total = after.total - before.total
        others = (after.busy - before.busy) - (after.own - before.own)
        return Loss(max(0.0, after.stolen - before.stolen) / total, max(0.0, others) / total)


class MemoryPeak:
    """The most memory that this process holds in a ``with`` block beyond what it held at the block's start.

    The kernel keeps the peak of a process's resident memory (VmHWM in /proc/self/status), and writing 5 to /proc/self/clear_refs sets it
    back to what is resident now.

    Attributes
    ----------
    extra_bytes : int
        After the block.

    Raises
    ------
    UnreadableError
        At the block's start, if the system has no such files.
    """

    extra_bytes = 0

    def __enter__(self) -> MemoryPeak:
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self._before = self._read("VmHWM")
        except OSError as error:
            raise UnreadableError(f"the peak of a process's memory cannot be read on {sys.platform} here: {error}") from None
        return self

    def __exit__(self, *error: object) -> None:
        self.extra_bytes = max(0, self._read("VmHWM") - self._before)

    @staticmethod
    def _read(name: str) -> int:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise UnreadableError(f"{_STATUS} has no {name}")


def timestamp() -> str:
    """The time now, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
