"""Floating-point environments that a caller can be in."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import check_kernels
import figures

# Bits of the control register: of a caller who wants speed, other rounding, or to be told of every exception, and of one in whose
# computations everything has happened already.
MODES: dict[str, dict[str, tuple[int, int]]] = {
    # MXCSR and the x87 control word: bits to be set, bits to be cleared.
    "x86_64": {
        "denormals flushed": (0x8040, 0),
        "results flushed": (0x8000, 0),
        "rounding up": (0x0C00_0000_4000, 0),
        "rounding to zero": (0x0C00_0000_6000, 0),
        "exceptions trap": (0, 0x0F80),
        "all raised": (0x003F, 0),
        "all of it": (0x0C00_0000_E07F, 0x0F80),
    },
    "aarch64": {
        "denormals flushed": (1 << 24, 0),
        "rounding up": (1 << 22, 0),
        "rounding to zero": (3 << 22, 0),
        "all raised": (0x9F << 32, 0),
        "all of it": (0x9F << 32 | 1 << 24 | 3 << 22, 0),
    },
}
HERE = MODES.get(platform.machine(), {})


@functools.cache
def _helper() -> Any:
    library = figures.MADE / "libfloating.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("floating.c")
    try:
        command = [check_kernels.find_clang(), "-std=gnu17", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
    except check_kernels.LeftOutError as reason:
        pytest.skip(str(reason))
    subprocess.run(command, check=True)
    helper = ctypes.CDLL(str(library))
    helper.floating_get.restype = ctypes.c_uint64
    helper.floating_set.argtypes = [ctypes.c_uint64]
    return helper


class Watch:
    """What the environment was when the block began its work and when it had done it."""

    before = after = 0


@contextlib.contextmanager
def environment(mode: str | None) -> Iterator[Watch]:
    """Run a block in an environment of HERE, or in the present one. It should only call the library: Python computes there too."""
    helper, watch = _helper(), Watch()
    own = helper.floating_get()
    bits, cleared = HERE[mode] if mode else (0, 0)
    helper.floating_set((own | bits) & ~cleared)
    watch.before = helper.floating_get()
    try:
        yield watch
        watch.after = helper.floating_get()
    finally:
        helper.floating_set(own)
