"""Compiles the C files beside this one with the machine's compiler, and loads them."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["NativeError", "find_compiler", "load"]

_NAMES = ("clang", "gcc", "cc")
_SECONDS = 120


class NativeError(Exception):
    """There is no compiler, or it failed; the message says which."""


def find_compiler() -> str:
    """The C compiler: the one that the environment variable CC names, else the first of clang, gcc and cc on PATH.

    Returns
    -------
    str
        Its path.

    Raises
    ------
    NativeError
        If there is none.
    """
    given = os.environ.get("CC")
    for name in (given,) if given else _NAMES:
        if path := shutil.which(name):
            return path
    raise NativeError(f"CC names {given}, which is no program" if given else f"none of {', '.join(_NAMES)} is on PATH")


def load(source: str, *options: str) -> ctypes.CDLL:
    """Compile a C file of this package into a temporary library and load it.

    Parameters
    ----------
    source : str
        The file's name.
    *options : str
        Further options of the compiler.

    Returns
    -------
    ctypes.CDLL
        The library; its file is gone already.

    Raises
    ------
    NativeError
        If it cannot be compiled.
    """
    return _load(find_compiler(), source, options)


@functools.cache
def _load(compiler: str, source: str, options: tuple[str, ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="umfa-bench-") as folder:
        library = Path(folder) / ("library.dylib" if sys.platform == "darwin" else "library.so")
        command = [compiler, "-std=c11", "-O3", "-fPIC", "-shared", *options, str(Path(__file__).with_name(source)), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
            return ctypes.CDLL(str(library))
        except subprocess.CalledProcessError as error:
            raise NativeError(f"{compiler} does not compile {source}: {error.stderr.strip()}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeError(f"{compiler} cannot be used: {error}") from error
