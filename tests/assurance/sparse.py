"""Memory of many GiB of which little is there: tensors whose elements lie far apart, and arrays that repeat a few pages.

Linux only: pages are there once they are touched, and one page can be in many places.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

FAR = 2**32  # an index that 32 bits cannot hold

_NORESERVE = 0x4000  # MAP_NORESERVE: nobody promises that there is memory for all of it
_FIXED = 0x10  # MAP_FIXED
_library = ctypes.CDLL(None, use_errno=True)
_library.mmap.restype = ctypes.c_void_p
_library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


class Sparse:
    """Bytes in pages of their own, which are there once they are touched; `start` is their address."""

    def __init__(self, size: int):
        self.size = -(-size // 16384) * 16384 + 16384
        self.memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        address = int(self.bytes.__array_interface__["data"][0])
        self.start = -(-address // 16384) * 16384  # where a page of a GPU begins
        self.size = address + self.size - self.start
        self.bytes = self.bytes[self.start - address :]

    def repeat(self, size: int, period: bytes) -> None:
        """Make the first `size` bytes repeat the bytes of `period`, whole pages that are there once."""
        assert size % len(period) == 0
        file = os.memfd_create("period")
        os.write(file, period)
        for offset in range(0, size, len(period)):
            place = _library.mmap(
                self.start + offset, len(period), mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED, file, 0
            )  # fmt: skip
            assert place == self.start + offset, f"mmap() failed: {os.strerror(ctypes.get_errno())}"
        os.close(file)


def stretched(values: np.ndarray, axis: int, backwards: bool = False) -> tuple[np.ndarray, Sparse | None]:
    """A copy of an array, the elements of which along an axis lie far apart, and its memory.

    Forwards each lies more than 2^32 elements from the next; backwards all together reach as far, by strides that 32 bits can hold. An axis
    of one element cannot be stretched: then the copy is contiguous, and there is no such memory.
    """
    count = values.shape[axis]
    if count < 2:
        return values.copy(), None
    others = [size for other, size in enumerate(values.shape) if other != axis]
    stride = max(FAR // (count - 1) if backwards else FAR, int(np.prod(others))) + 9
    strides, inner = [0] * values.ndim, 1
    for other in reversed(range(values.ndim)):
        if other != axis:
            strides[other], inner = inner, inner * values.shape[other]
    strides[axis] = -stride if backwards else stride
    memory = Sparse(((count - 1) * stride + inner) * values.itemsize)
    first = (count - 1) * stride * values.itemsize if backwards else 0
    flat = memory.bytes[first : first + values.itemsize].view(values.dtype)
    copy = np.lib.stride_tricks.as_strided(flat, values.shape, [step * values.itemsize for step in strides])
    copy[...] = values
    return copy, memory


def resident() -> int:
    """The resident memory of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024
    raise AssertionError("/proc/self/status does not tell")
