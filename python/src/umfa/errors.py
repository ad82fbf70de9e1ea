"""Errors: one class for each status of the C library, each also the built-in exception that Python users expect.

==========================  ======  ==================  =====================================================================
class                       status  also a              raised for
==========================  ======  ==================  =====================================================================
`InvalidContextError`       1       `RuntimeError`      a closed context
`OutOfMemoryError`          2       `MemoryError`       memory for a result or for workspace that could not be had
`InvalidDimensionsError`    3       `ValueError`        sizes that are illegal or disagree
`ExecutionError`            4       `RuntimeError`      a kernel that failed; outputs are undefined, the context stays usable
`InvalidArgumentError`      5       `ValueError`        values that are not allowed, overlapping or read-only outputs
`InvalidTypeError`          5       `TypeError` too     an `InvalidArgumentError` about the type or dtype of an argument
`UnsupportedError`          6       `NotImplemented-    what is legal but not served; the message names it and says what to do
                                    Error`
`DeviceUnavailableError`    7       `RuntimeError`      a device that this machine does not have
==========================  ======  ==================  =====================================================================
"""

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
    "error_for_status",
]


class MFAError(Exception):
    """Base class of all errors that `umfa` raises by itself.

    The message names the function, the argument, what was expected and what came.

    Attributes
    ----------
    status : int
        The status code of the C library (``MFA_ERROR_*`` in ``mfa.h``); 0 in an error that stands for no status.
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


_CLASSES: dict[int, type[MFAError]] = {
    error.status: error
    for error in (
        InvalidContextError,
        OutOfMemoryError,
        InvalidDimensionsError,
        ExecutionError,
        InvalidArgumentError,
        UnsupportedError,
        DeviceUnavailableError,
    )
}


def error_for_status(status: int, message: str) -> MFAError:
    """The exception for a status code of the C library; plain `MFAError` for one that this version does not know."""
    error = _CLASSES.get(status, MFAError)(message)
    error.status = status
    return error
