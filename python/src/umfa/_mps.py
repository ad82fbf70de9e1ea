"""PyTorch tensors on Apple's GPU (device "mps"), by the MTLBuffer that each lies in.

Such a tensor's storage has no address but an object of Metal's, an MTLBuffer. The library wraps it, and finds it again by its host
address: GPU and host share their memory on Apple silicon. PyTorch's own work on the GPU is waited for before its memory is looked at; the
library's is done when a call returns. It has never run on a Mac: docs/metal-kernels.md.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import numpy as np

from umfa._library import NULL, ffi, lib
from umfa.arrays import INT4, INT8, ITEM_SIZES, ArrayView
from umfa.context import MFAContext, default_context
from umfa.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError

__all__ = ["MpsTensors"]


class _Wrapped:
    """A buffer of the library's around a storage; lives as long as somebody uses it."""

    __slots__ = ("__weakref__", "address", "size", "storage")

    def __init__(self, function: str, argument: str, context: MFAContext, storage: Any) -> None:
        created = ffi.new("mfa_buffer_t **")
        # There before the buffer is, which an interrupt may follow at once.
        weakref.finalize(self, _destroy, created, os.getpid()).atexit = False
        context.call(f"{function}: {argument}", lib.mfa_create_buffer_from_metal, ffi.cast("void *", storage.data_ptr()), created)
        self.storage = storage
        self.size = int(lib.mfa_buffer_size(created[0]))
        self.address = int(ffi.cast("uintptr_t", lib.mfa_buffer_contents(created[0])))


def _destroy(created: Any, process: int) -> None:
    if created[0] and os.getpid() == process:  # what a forked child drops is its parent's
        lib.mfa_destroy_buffer(created[0])


class MpsTensors:
    """The framework of tensors on "mps". `framework` is that of PyTorch's tensors on the CPU."""

    name = "torch"

    def __init__(self, framework: Any) -> None:
        self._framework = framework
        self.torch = framework.torch

    def empty(self, function: str, shape: tuple[int, ...], precision: int) -> Any:
        """A new tensor on "mps"."""
        return self._framework.empty(function, shape, precision, "mps")

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Any:
        """A copy on "mps"."""
        return self.torch.from_numpy(array).to("mps")

    def random_seed(self) -> int:
        """64 random bits of PyTorch's own generator."""
        return int(self._framework.random_seed())

    def written(self, tensor: Any) -> None:
        """Told after a tensor was written into."""
        self._framework.written(tensor)

    def read(self, function: str, argument: str, tensor: Any) -> ArrayView:
        """The view of a tensor.

        Raises
        ------
        UnsupportedError
            If the host cannot read its memory, or the default context is not on a GPU.
        """
        precision = self._framework.precisions.get(tensor.dtype)
        if precision is None or precision in (INT4, INT8):
            raise InvalidTypeError(
                f"{function}: {argument}: expected float32, float16, bfloat16 or a bool mask, got {tensor.dtype} on 'mps'"
            )
        if tensor.is_neg():
            raise InvalidArgumentError(
                f"{function}: {argument}: expected plain memory, got a lazily negated view; use {argument}.resolve_neg()"
            )
        shape, strides, size = tuple(tensor.shape), tensor.stride(), ITEM_SIZES[precision]
        if 0 in shape:
            return ArrayView(NULL, shape, strides, precision, True, self, tensor)
        context = default_context()
        if context.device == "cpu":
            raise UnsupportedError(f"{function}: {argument}: expected a default context on a GPU, got one on {context.device!r}")
        self.torch.mps.synchronize()
        buffer = _Wrapped(function, argument, context, tensor.untyped_storage())
        # Never data_ptr() of the tensor: PyTorch adds the offset to the object's own address.
        offset = tensor.storage_offset() * size
        end = offset + size * (1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)))
        if end > buffer.size:
            raise InvalidArgumentError(f"{function}: {argument}: expected a storage of {end} bytes or more, got {buffer.size}")
        return ArrayView(ffi.cast("void *", buffer.address + offset), shape, strides, precision, True, self, (tensor, buffer))
