"""Loads libmfa and checks that it is the library that this package was built for.

The library lies inside the package and is looked for nowhere else. Developers may name another one in ``MFA_LIBRARY``.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from umfa.errors import MFAError, error_for_status

__all__ = ["NULL", "error_of_call", "ffi", "lib", "library_path", "version"]

_BUILD = "build it with `./justw build` in a clone, or `pip install ./python`, which takes Swift 6.3 or newer"

try:
    from umfa._mfa_cffi import ffi as _ffi
except ImportError as error:
    raise ImportError(f"umfa: the generated module umfa._mfa_cffi is missing or broken ({error}): {_BUILD}") from error

ffi: Any = _ffi
NULL: Any = ffi.NULL
version: str = ".".join(str(ffi.integer_const(f"MFA_VERSION_{part}")) for part in ("MAJOR", "MINOR", "PATCH"))


def _find() -> Path:
    given = os.environ.get("MFA_LIBRARY")
    path = Path(given) if given else Path(__file__).with_name("libmfa.dylib" if sys.platform == "darwin" else "libmfa.so")
    if not path.is_file():
        raise ImportError(f"umfa: MFA_LIBRARY names {path}, which is not a file" if given else f"umfa: there is no {path}: {_BUILD}")
    return path.absolute()


def _load(path: Path) -> Any:
    try:
        library = ffi.dlopen(str(path), ffi.RTLD_NOW)
        number = library.mfa_version()
    except (OSError, AttributeError, ffi.error) as error:
        raise ImportError(f"umfa: {path} cannot be used: {error}") from error
    found = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    # Below 1.0 a minor version may change anything; patches only add.
    if found.split(".")[:2] != version.split(".")[:2]:
        raise ImportError(f"umfa: expected libmfa {version}, got {found} in {path}: {_BUILD}")
    attention = ffi.new("mfa_attention_t *")
    size = ffi.sizeof("mfa_attention_t")
    if library.mfa_attention_initialize(attention, size) != 0 or attention.struct_size != size:
        raise ImportError(f"umfa: {path} was built from another mfa.h (its mfa_attention_t is not one of {size} bytes): {_BUILD}")
    return library


library_path: Path = _find()
lib: Any = _load(library_path)


def error_of_call(function: str, status: int, handle: Any) -> MFAError:
    """The exception for a call that returned `status`, with the library's own words.

    Parameters
    ----------
    function : str
        The Python function that the user called.
    status : int
        What the C function returned; not 0.
    handle : cdata
        The context of the call, or NULL if it has none.
    """
    words = ffi.string(lib.mfa_last_error(handle)).decode("utf-8", "replace")
    words = re.sub(r"^mfa_\w+: ", "", words)  # the Python function takes the place of the C one
    return error_for_status(status, f"{function}: {words or ffi.string(lib.mfa_status_string(status)).decode()}")
