"""libsoftmetal as tests use it: kernels of a test, compiled and run by ctypes; recorded dispatches, run again by another program."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cffi
import numpy as np

import build_softmetal
from metal_translator import source_hash

SLOTS = 31


class _Binding(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("length", ctypes.c_uint64)]


class _Constant(ctypes.Structure):
    _fields_ = [("index", ctypes.c_uint32), ("size", ctypes.c_uint32), ("value", ctypes.c_void_p)]


class _Job(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("bindings", ctypes.POINTER(_Binding)),
        ("threadgroup_lengths", ctypes.POINTER(ctypes.c_uint32)),
        ("constants", ctypes.POINTER(_Constant)),
        ("constant_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
    ]


class DeviceError(Exception):
    """The report of a dispatch that failed."""


class SoftwareDevice:
    """A libsoftmetal with the kernels of one source."""

    def __init__(self, text: str, name: str, folder: Path):
        self.library = ctypes.CDLL(str(build_softmetal.build(folder / f"lib{Path(name).stem}.so", {name: text})))
        self.library.sm_library_find.restype = ctypes.c_void_p
        self.library.sm_library_find.argtypes = [ctypes.c_uint64]
        self.library.sm_library_kernel.restype = ctypes.c_void_p
        self.library.sm_library_kernel.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self.library.sm_library_kernel_count.argtypes = [ctypes.c_void_p]
        self.library.sm_kernel_name.restype = ctypes.c_char_p
        self.library.sm_kernel_name.argtypes = [ctypes.c_void_p]
        self.library.sm_run.argtypes = [ctypes.POINTER(_Job), ctypes.c_char_p, ctypes.c_size_t]
        found = self.library.sm_library_find(source_hash(text))
        assert found, "a library knows its source"
        kernels = [self.library.sm_library_kernel(found, index) for index in range(self.library.sm_library_kernel_count(found))]
        self.kernels = {self.library.sm_kernel_name(kernel).decode(): kernel for kernel in kernels}

    def run(
        self,
        kernel: str,
        buffers: Mapping[int, np.ndarray],
        grid: int | Sequence[int],
        threadgroup: int | Sequence[int],
        constants: Mapping[int, Any] | None = None,
        memory: Mapping[int, int] | None = None,
    ) -> None:
        """Dispatch `grid` threads. `constants` are NumPy scalars by index, `memory` lengths of threadgroup memory.

        Raises
        ------
        DeviceError
            With the device's report.
        """
        job = _Job(kernel=self.kernels[kernel])
        bound = (_Binding * SLOTS)()
        for index, array in buffers.items():
            bound[index] = _Binding(array.ctypes.data, array.nbytes)
        job.bindings = bound
        lengths = (ctypes.c_uint32 * SLOTS)()
        for index, length in (memory or {}).items():
            lengths[index] = length
        job.threadgroup_lengths = lengths
        values = {index: np.array([value]) for index, value in (constants or {}).items()}
        job.constants = (_Constant * max(1, len(values)))(
            *(_Constant(index, value.nbytes, value.ctypes.data) for index, value in values.items())
        )
        job.constant_count = len(values)
        for name, sizes in (("grid", grid), ("threadgroup", threadgroup)):
            sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
            setattr(job, name, (ctypes.c_uint32 * 3)(*sizes, *(1,) * (3 - len(sizes))))
        report = ctypes.create_string_buffer(4096)
        if self.library.sm_run(ctypes.byref(job), report, len(report)) != 0:
            raise DeviceError(report.value.decode())


def dispatched(folder: Path) -> list[tuple[str, tuple[int, int, int]]]:
    """The kernels and grids, in threads, of the recorded dispatches in a folder, in their order."""
    found = []
    for path in sorted(folder.glob("*.dispatch")):
        data = path.read_bytes()
        length = int.from_bytes(data[8:16], "little")
        grid = np.frombuffer(data, np.uint64, 3, 16 + length)
        found.append((data[16 : 16 + length].decode(), (int(grid[0]), int(grid[1]), int(grid[2]))))
    return found


def replay(program: Path, recorded: Sequence[Path], order: str = "forward") -> subprocess.CompletedProcess[str]:
    """Run recorded dispatches again, threads in another order."""
    environment = os.environ | {"SOFTMETAL_ORDER": order}
    environment.pop("SOFTMETAL_RECORD", None)
    return subprocess.run([str(program), *map(str, recorded)], env=environment, capture_output=True, text=True)


def _declarations() -> str:
    """What cffi can read of softmetal.h: no preprocessor but the numbers."""
    text = (build_softmetal.CORE / "Loader" / "include" / "softmetal.h").read_text()
    text = re.sub(r"#ifdef __cplusplus\n.*?#endif\n", "", text, flags=re.DOTALL)
    return re.sub(r"^#(?!define \w+ \d+$).*$", "", text, flags=re.MULTILINE)


ffi = cffi.FFI()
ffi.cdef(_declarations())


def open_interface() -> Any:
    """The libsoftmetal that libmfa uses, with the functions of softmetal.h."""
    return ffi.dlopen(str(build_softmetal.LINK))
