"""Buffers: memory of the library's, or the caller's, with a device's own handle."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from umfa._library import ffi, lib
from umfa._scalars import describe, integer
from umfa.arrays import ITEM_SIZES, view_of
from umfa.context import MFAContext, context_for
from umfa.errors import InvalidArgumentError, InvalidDimensionsError, InvalidTypeError

__all__ = ["MFABuffer"]

_LARGEST_SIZE = 2**63 - 1


def _destroy(created: Any, process: int, destroy: Any = lib.mfa_destroy_buffer, current_process: Any = os.getpid) -> None:
    # What a forked child drops by itself is its parent's.
    if created[0] and current_process() == process:
        destroy(created[0])


class _Memory:
    """A buffer of the library's. NumPy views hold it, so that closing an `MFABuffer` never takes memory from under them.

    `create` writes its handle to the address that it gets.
    """

    __slots__ = ("__weakref__", "address", "handle", "keepalive", "size", "writable")

    def __init__(self, create: Callable[[Any], None], writable: bool, keepalive: Any) -> None:
        created = ffi.new("mfa_buffer_t **")
        # There before the buffer is, which an interrupt may follow at once.
        weakref.finalize(self, _destroy, created, os.getpid()).atexit = False
        create(created)
        self.handle = created[0]
        self.writable = writable
        self.keepalive = keepalive
        self.size = int(lib.mfa_buffer_size(self.handle))
        self.address = int(ffi.cast("uintptr_t", lib.mfa_buffer_contents(self.handle)))

    @property
    def __array_interface__(self) -> dict[str, Any]:
        data = (self.address, not self.writable) if self.size else bytearray()  # NumPy takes no NULL
        return {"shape": (self.size,), "typestr": "|u1", "data": data, "version": 3}


class MFABuffer:
    """Memory with a size and a device's own handle.

    Buffers are optional on the CPU, where any array will do. On a GPU, arrays that lie in a buffer are used without a copy. A buffer has no
    shape: `array` gives NumPy arrays on it, to fill and to pass to `attention`; it also has the buffer protocol (``memoryview(buffer)``
    from Python 3.12 on, ``numpy.asarray(buffer)`` always).

    Parameters
    ----------
    size : int
        Bytes to allocate: zeroed, aligned to the page. 0 is legal.
    context : MFAContext, optional
        Whose device the memory is for; by default the thread's default context.

    Raises
    ------
    OutOfMemoryError
        If there is no such memory.
    InvalidDimensionsError
        For a negative or too large size.

    Examples
    --------
    >>> with umfa.MFABuffer(4 * 1024 * 64) as buffer:
    ...     q = buffer.array((1024, 64), "float32")
    ...     q[:] = 1
    """

    __slots__ = ("__weakref__", "_memory")

    _memory: _Memory | None

    def __init__(self, size: int, context: MFAContext | None = None) -> None:
        function = "umfa.MFABuffer"
        self._memory = None
        size = integer(function, "size", size, 0, _LARGEST_SIZE, InvalidDimensionsError)
        own = context_for(function, context)
        self._memory = _Memory(lambda created: own.call(function, lib.mfa_create_buffer, size, created), True, None)

    @classmethod
    def from_array(cls, array: Any, context: MFAContext | None = None) -> MFABuffer:
        """A buffer on the memory of an array, without a copy.

        Parameters
        ----------
        array : array
            Contiguous: NumPy, PyTorch on the CPU, a DLPack producer, or an object with the buffer protocol. It is kept alive.
        context : MFAContext, optional
            Whose device the memory is for.

        Returns
        -------
        MFABuffer
            Read-only if the array is.

        Raises
        ------
        InvalidArgumentError
            If the array is not contiguous.
        """
        function = "umfa.MFABuffer.from_array"
        view = view_of(function, "array", array)
        count = 1
        for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
            if size != 1 and stride != count and 0 not in view.shape:
                raise InvalidArgumentError(
                    f"{function}: array: expected a contiguous array, got shape {view.shape} with strides {view.strides}"
                )
            count *= size
        own, size = context_for(function, context), count * ITEM_SIZES[view.precision]
        buffer = cls.__new__(cls)
        buffer._memory = _Memory(
            lambda created: own.call(function, lib.mfa_create_buffer_from_memory, view.pointer, size, created), view.writable, view
        )
        return buffer

    @property
    def size(self) -> int:
        """Bytes."""
        return self._open("size").size

    @property
    def address(self) -> int:
        """The host address of the first byte; 0 if there is none."""
        return self._open("address").address

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._memory is None

    def array(self, shape: int | tuple[int, ...], dtype: Any = "float32", offset: int = 0) -> np.ndarray[Any, Any]:
        """A NumPy array on the buffer's memory.

        Parameters
        ----------
        shape : tuple of int
            Its shape; it is contiguous.
        dtype : dtype
            Its dtype.
        offset : int
            Bytes from the buffer's begin to the array's.

        Returns
        -------
        numpy.ndarray
            It keeps the memory alive, also after `close`.

        Raises
        ------
        InvalidDimensionsError
            If the array does not fit into the buffer.
        """
        function = "umfa.MFABuffer.array"
        memory = self._open("array")
        try:
            item = np.dtype(dtype)
        except Exception:
            raise InvalidTypeError(f"{function}: dtype: expected a dtype, got {describe(dtype)}") from None
        if item.hasobject:
            raise InvalidTypeError(f"{function}: dtype: expected plain numbers, got {item}")
        try:
            sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        except Exception:
            raise InvalidTypeError(f"{function}: shape: expected whole numbers, got {describe(shape)}") from None
        checked = tuple(integer(function, "shape", size, 0, _LARGEST_SIZE) for size in sizes)
        start = integer(function, "offset", offset, 0, _LARGEST_SIZE)
        count = item.itemsize
        for size in checked:
            count *= size
        if start + count > memory.size:
            raise InvalidDimensionsError(
                f"{function}: shape: expected at most {memory.size} bytes, got {checked} of {item} from byte {start} on"
            )
        flat: np.ndarray[Any, Any] = np.asarray(memory)
        return np.ndarray(checked, item, flat, start)

    def close(self) -> None:
        """Give the memory back, as soon as no array lies on it. Closing twice is harmless."""
        self._memory = None

    def _open(self, name: str) -> _Memory:
        if self._memory is None:
            raise InvalidArgumentError(f"umfa.MFABuffer.{name}: expected an open buffer, got a closed one")
        return self._memory

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._open("__array_interface__").__array_interface__

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(np.asarray(self._open("__buffer__")))

    def __len__(self) -> int:
        return self.size

    def __enter__(self) -> MFABuffer:
        self._open("__enter__")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<umfa.MFABuffer, closed>" if self._memory is None else f"<umfa.MFABuffer of {self._memory.size} bytes>"

    def __reduce__(self) -> NoReturn:
        raise InvalidTypeError("umfa.MFABuffer: a buffer cannot be copied or pickled; copy an array on it instead")
