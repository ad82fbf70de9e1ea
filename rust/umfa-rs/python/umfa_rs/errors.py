"""Errors: one class for each status of the library, each also the built-in exception that Python users expect."""

from __future__ import annotations

__all__ = [
    "DeviceUnavailableError",
    "ExecutionError",
    "InvalidArgumentError",
    "InvalidContextError",
    "InvalidDimensionsError",
    "InvalidTypeError",
    "MFAError",
    "OutOfMemoryError",
    "UnsupportedError",
]


class MFAError(Exception):
    """Base class of all errors that `umfa_rs` raises by itself.

    Attributes
    ----------
    status : int
        The status code of the C library; 0 in an error that stands for no status.
    """

    status: int = 0


class InvalidContextError(MFAError, RuntimeError):
    """The context is closed (status 1)."""

    status = 1


class OutOfMemoryError(MFAError, MemoryError):
    """Memory for a result, a buffer or workspace could not be had (status 2). Nothing was written."""

    status = 2


class InvalidDimensionsError(MFAError, ValueError):
    """Sizes are illegal or do not match (status 3). Nothing was written."""

    status = 3


class ExecutionError(MFAError, RuntimeError):
    """A kernel failed (status 4). Outputs are undefined; the context stays usable."""

    status = 4


class InvalidArgumentError(MFAError, ValueError):
    """An argument has a value that is not allowed (status 5). Nothing was written."""

    status = 5


class InvalidTypeError(InvalidArgumentError, TypeError):
    """An argument has a type or dtype that is not allowed (status 5)."""


class UnsupportedError(MFAError, NotImplementedError):
    """The request is legal, but not served by this device or function (status 6). Nothing was written."""

    status = 6


class DeviceUnavailableError(MFAError, RuntimeError):
    """The device is not here, or a Metal context is used in a child after ``fork()`` (status 7)."""

    status = 7
