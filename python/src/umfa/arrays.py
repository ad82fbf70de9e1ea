"""Adapters: NumPy arrays, PyTorch CPU tensors and DLPack producers become one kind of view, without a copy.

A view says where the elements lie: address, shape, strides in elements, precision. Strides may be 0 (broadcast) or negative. Nothing here
reads elements. PyTorch is never imported: where a tensor comes in, it has been imported by someone.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from umfa._library import NULL, ffi
from umfa._scalars import describe
from umfa.errors import InvalidArgumentError, InvalidDimensionsError, InvalidTypeError, MFAError, OutOfMemoryError, UnsupportedError

if TYPE_CHECKING:
    from umfa._mps import MpsTensors

__all__ = [
    "BF16",
    "BOOL",
    "FLOATS",
    "FP16",
    "FP32",
    "FP64",
    "INT4",
    "INT8",
    "ITEM_SIZES",
    "NUMPY",
    "ArrayView",
    "Framework",
    "allocate",
    "framework_named",
    "is_recorded",
    "is_tensor",
    "numpy_of",
    "precision_name",
    "view_of",
]

FP32: int = ffi.integer_const("MFA_PRECISION_FP32")
FP16: int = ffi.integer_const("MFA_PRECISION_FP16")
BF16: int = ffi.integer_const("MFA_PRECISION_BF16")
FP64: int = ffi.integer_const("MFA_PRECISION_FP64")
INT4: int = ffi.integer_const("MFA_PRECISION_INT4")
INT8: int = ffi.integer_const("MFA_PRECISION_INT8")
BOOL: int = ffi.integer_const("MFA_PRECISION_BOOL")
FLOATS = frozenset({FP32, FP16, BF16, FP64})
_NAMES = {FP32: "float32", FP16: "float16", BF16: "bfloat16", FP64: "float64", INT4: "uint8", INT8: "int8", BOOL: "bool"}
ITEM_SIZES = {FP32: 4, FP16: 2, BF16: 2, FP64: 8, INT4: 1, INT8: 1, BOOL: 1}
_ADDRESS = ffi.typeof("void *")
_LARGEST_SIZE = 2**32 - 1  # of a dimension, in mfa.h


def precision_name(precision: int) -> str:
    """The dtype's name of a precision code; packed INT4 lies in uint8."""
    return _NAMES[precision]


class Framework(Protocol):
    """A library of arrays: makes the results that go back to the caller."""

    name: str

    def empty(self, function: str, shape: tuple[int, ...], precision: int) -> Any:
        """A new contiguous array, not initialised."""
        ...

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Any:
        """A NumPy array (not bfloat16) as an array of this library, on the same memory."""
        ...

    def random_seed(self) -> int:
        """64 random bits of the library's own generator."""
        ...

    def written(self, array: Any) -> None:
        """Told after an array of the caller's was written into."""
        ...


class ArrayView:
    """Where an array's elements lie.

    Attributes
    ----------
    pointer : cdata
        Address of the element with all indices 0.
    shape, strides : tuple of int
        Strides are in elements.
    precision : int
        ``MFA_PRECISION_*``; uint8 is INT4, packed.
    writable : bool
        Whether the elements may be written.
    framework : Framework
        Where the array comes from.
    array : object
        Keeps the memory alive, and in place.
    quantization : cdata
        ``mfa_quantization_t *``, NULL for plain arrays.
    """

    __slots__ = ("array", "framework", "pointer", "precision", "quantization", "shape", "strides", "writable")

    def __init__(
        self,
        pointer: Any,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        precision: int,
        writable: bool,
        framework: Framework,
        array: Any,
        quantization: Any = NULL,
    ) -> None:
        self.pointer = pointer
        self.shape = shape
        self.strides = strides
        self.precision = precision
        self.writable = writable
        self.framework = framework
        self.array = array
        self.quantization = quantization


def view_of(function: str, argument: str, array: Any) -> ArrayView:
    """The view of an array-like object.

    Parameters
    ----------
    function, argument : str
        What the user called, and which argument this is: for messages.
    array : object
        A NumPy array, a PyTorch tensor on the CPU, a DLPack producer on the CPU, or an object with the buffer protocol.

    Raises
    ------
    InvalidTypeError
        For another object, or a dtype that is not served.
    InvalidArgumentError
        For memory that cannot be read as it lies: unaligned, in the other byte order, lazily negated.
    UnsupportedError
        For memory that the CPU cannot read.
    """
    reader = _READERS.get(type(array))
    if reader is None:
        reader = _reader_for(function, argument, array)
    return reader(function, argument, array)


def framework_named(name: str) -> Framework:
    """The framework of that name, ``"numpy"`` or ``"torch"``."""
    return NUMPY if name == "numpy" else _torch_framework()


def numpy_of(function: str, argument: str, view: ArrayView) -> np.ndarray[Any, Any]:
    """A NumPy array on a view's memory; not for bfloat16. It is to be checked anew: a DLPack producer may give another one each time."""
    array = view.array
    if isinstance(array, np.ndarray):
        return array
    if view.framework is not NUMPY:
        # PyTorch does not resize a storage that NumPy has seen.
        tensor: np.ndarray[Any, Any] = array.detach().numpy()
        return tensor
    try:
        shared: np.ndarray[Any, Any] = np.from_dlpack(array[1])
    except Exception as error:
        raise InvalidTypeError(f"{function}: {argument}: expected an array that NumPy can share: {error}") from error
    return shared


def is_tensor(array: Any) -> bool:
    """Whether this is a PyTorch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, getattr(torch, "Tensor", ()))


def is_recorded(*arrays: Any) -> bool:
    """Whether PyTorch's autograd follows what is computed from one of these: it requires grad, or forward-mode derivatives are in use."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    tensor = getattr(torch, "Tensor", ())
    for array in arrays:  # a loop, since this is on the way of every call
        if isinstance(array, tensor):
            break
    else:
        return False
    torch = _torch_framework().torch
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(is_tensor(array) and array.requires_grad for array in arrays)


# ---- NumPy -----------------------------------------------------------------------------------------------------------------------------


def allocate(function: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """A new NumPy array, not initialised."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError, OverflowError) as error:
        raise _allocation_error(function, shape, error) from None


class _NumPy:
    name = "numpy"

    def empty(self, function: str, shape: tuple[int, ...], precision: int) -> np.ndarray[Any, Any]:
        return allocate(function, shape, _NUMPY_DTYPES.get(precision) or _bfloat16(function))

    def from_numpy(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return array.view()  # a view cannot be resized

    def random_seed(self) -> int:
        return int.from_bytes(os.urandom(8), "little")

    def written(self, array: Any) -> None:
        pass


NUMPY: Framework = _NumPy()
_NUMPY_DTYPES: dict[int, Any] = {
    FP32: np.dtype(np.float32),
    FP16: np.dtype(np.float16),
    FP64: np.dtype(np.float64),
    INT8: np.dtype(np.int8),
    INT4: np.dtype(np.uint8),
    BOOL: np.dtype(np.bool_),
}
# Keyed by dtype, which tells byte orders apart. bfloat16 joins when it is first seen.
_NUMPY_PRECISIONS: dict[Any, int] = {dtype: precision for precision, dtype in _NUMPY_DTYPES.items()}


def _bfloat16(function: str) -> Any:
    """The dtype bfloat16 of ml_dtypes, for a result in it."""
    try:
        import ml_dtypes
    except ImportError:
        raise InvalidTypeError(
            f"{function}: a bfloat16 result in NumPy needs the package ml_dtypes: pip install 'umfa[bfloat16]'"
        ) from None
    dtype = _NUMPY_DTYPES[BF16] = np.dtype(ml_dtypes.bfloat16)
    _NUMPY_PRECISIONS[dtype] = BF16
    return dtype


def _numpy_precision(function: str, argument: str, dtype: Any) -> int:
    """The precision of a dtype that the table does not have: bfloat16 the first time, else an error."""
    if dtype.name == "bfloat16" and dtype.isnative and "ml_dtypes" in sys.modules and dtype == _bfloat16(function):
        return BF16
    if not dtype.isnative:
        raise InvalidArgumentError(
            f"{function}: {argument}: expected the machine's own byte order, got {dtype.str}; convert it with"
            " .astype(dtype.newbyteorder('='))"
        )
    raise _dtype_error(function, argument, str(dtype))


def _dtype_error(function: str, argument: str, got: str) -> InvalidTypeError:
    return InvalidTypeError(
        f"{function}: {argument}: expected dtype float32, float16, bfloat16, float64 (operands: also int8; masks: also bool), got {got}"
    )


def _read_numpy(function: str, argument: str, array: Any) -> ArrayView:
    precision = _NUMPY_PRECISIONS.get(array.dtype)
    if precision is None:
        precision = _numpy_precision(function, argument, array.dtype)
    flags = array.flags
    if flags.c_contiguous and flags.aligned:
        pointer = ffi.from_buffer(array)
    else:
        if not flags.aligned:
            raise InvalidArgumentError(
                f"{function}: {argument}: expected aligned elements, got an unaligned array; copy it with"
                " numpy.require(array, requirements='A')"
            )
        pointer = ffi.cast(_ADDRESS, array.__array_interface__["data"][0])
    shape = array.shape
    size = ITEM_SIZES[precision]
    strides = array.strides
    if size != 1:
        strides = tuple([stride // size for stride in strides])
    return ArrayView(pointer, shape, strides, precision, flags.writeable, NUMPY, array)


def _read_numpy_subclass(function: str, argument: str, array: Any) -> ArrayView:
    if isinstance(array, np.ma.MaskedArray):
        raise InvalidTypeError(
            f"{function}: {argument}: expected a plain array, got a masked one; pass array.data, and what is masked as mask= or kv_lengths="
        )
    return _read_numpy(function, argument, array.view(np.ndarray))


# ---- PyTorch ---------------------------------------------------------------------------------------------------------------------------


class _Torch:
    name = "torch"

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.strided = torch.strided
        self.dtypes = {
            FP32: torch.float32,
            FP16: torch.float16,
            BF16: torch.bfloat16,
            FP64: torch.float64,
            INT8: torch.int8,
            INT4: torch.uint8,
            BOOL: torch.bool,
        }
        self.precisions = {dtype: precision for precision, dtype in self.dtypes.items()}

    @cached_property
    def mps(self) -> MpsTensors:
        from umfa._mps import MpsTensors  # which imports this module

        return MpsTensors(self)

    def empty(self, function: str, shape: tuple[int, ...], precision: int, device: str = "cpu") -> Any:
        # device= because the user may have set another default device.
        try:
            return self.torch.empty(shape, dtype=self.dtypes[precision], device=device)
        except (MemoryError, RuntimeError, TypeError, ValueError) as error:
            raise _allocation_error(function, shape, error) from None

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Any:
        return self.torch.from_numpy(array)

    def random_seed(self) -> int:
        # Two halves: PyTorch has no way to draw all 64 bits at once.
        low, high = self.torch.randint(0, 2**32, (2,), dtype=self.torch.int64, device="cpu").tolist()
        return int(low | high << 32)

    def written(self, array: Any) -> None:
        # Tells autograd, as PyTorch's own in-place functions do. Tensors made in inference mode have no such counter.
        if not array.is_inference():
            self.torch.autograd.graph.increment_version(array)

    def read(self, function: str, argument: str, tensor: Any) -> ArrayView:
        if tensor.is_mps:
            return self.mps.read(function, argument, tensor)
        if not tensor.is_cpu:
            raise UnsupportedError(
                f"{function}: {argument}: expected a tensor on the CPU, got one on {str(tensor.device)!r}; use {argument}.cpu()"
            )
        if tensor.layout is not self.strided:
            raise InvalidTypeError(
                f"{function}: {argument}: expected a dense (strided) tensor, got layout {tensor.layout}; use {argument}.to_dense()"
            )
        precision = self.precisions.get(tensor.dtype)
        if precision is None:
            raise _dtype_error(function, argument, str(tensor.dtype))
        if tensor.is_neg():
            raise InvalidArgumentError(
                f"{function}: {argument}: expected plain memory, got a lazily negated view; use {argument}.resolve_neg()"
            )
        shape = tuple(tensor.shape)
        strides = tensor.stride()
        try:
            address = tensor.data_ptr()
            available = tensor.untyped_storage().nbytes() // ITEM_SIZES[precision] - tensor.storage_offset()
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedError(f"{function}: {argument}: expected a tensor with memory, got {type(tensor).__name__}: {error}") from None
        # A storage can be resized under its tensors; PyTorch has strides of 0 or more.
        if 0 not in shape:
            needed = 1 + sum([(size - 1) * stride for size, stride in zip(shape, strides, strict=True)])
            if needed > available or not address:
                raise InvalidArgumentError(
                    f"{function}: {argument}: expected a tensor with memory for all its elements, got a storage that ends after"
                    f" {max(available, 0)} of {needed}"
                )
        if address % ITEM_SIZES[precision]:
            raise InvalidArgumentError(
                f"{function}: {argument}: expected aligned elements, got an unaligned tensor; use {argument}.clone()"
            )
        return ArrayView(ffi.cast(_ADDRESS, address), shape, strides, precision, True, self, tensor)

    def read_subclass(self, function: str, argument: str, tensor: Any) -> ArrayView:
        # Parameters and subclasses that only add attributes are memory like any other; those that take part in dispatch are not.
        if type(tensor).__torch_dispatch__ is not self.torch.Tensor.__torch_dispatch__:
            raise UnsupportedError(
                f"{function}: {argument}: expected a tensor with memory of its own, got a {type(tensor).__name__}, which stands for others"
            )
        return self.read(function, argument, tensor)


_torch: _Torch | None = None


def _torch_framework() -> _Torch:
    global _torch
    if _torch is None:
        import torch  # imported long ago by whoever made the tensor

        _torch = _Torch(torch)
    return _torch


# ---- DLPack ----------------------------------------------------------------------------------------------------------------------------

_DLPACK_CPU_DEVICES = frozenset({1, 3, 11, 13})  # kDLCPU, and host memory that CUDA, ROCm or CUDA's managed allocator registered
_DLPACK_READ_ONLY = 1
_DLPACK_PRECISIONS = {(2, 32): FP32, (2, 16): FP16, (4, 16): BF16, (2, 64): FP64, (0, 8): INT8, (1, 8): INT4, (6, 8): BOOL}

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is_valid.restype = ctypes.c_int
_capsule_is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _read_dlpack(function: str, argument: str, producer: Any) -> ArrayView:
    try:
        device = int(producer.__dlpack_device__()[0])
    except Exception as error:
        raise InvalidTypeError(f"{function}: {argument}: {type(producer).__name__}.__dlpack_device__ failed: {error}") from error
    if device not in _DLPACK_CPU_DEVICES:
        raise UnsupportedError(
            f"{function}: {argument}: expected memory on the CPU, got a DLPack device of type {device}; copy it to the CPU first"
        )
    try:
        try:
            capsule = producer.__dlpack__(max_version=(1, 0))
        except TypeError:
            capsule = producer.__dlpack__()
    except MFAError:
        raise
    except Exception as error:
        raise InvalidTypeError(f"{function}: {argument}: {type(producer).__name__}.__dlpack__ failed: {error}") from error
    # The capsule is kept, not consumed: as long as it lives, so does the memory, and its own destructor gives that back.
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        managed = ffi.cast("DLManagedTensorVersioned *", _capsule_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise UnsupportedError(f"{function}: {argument}: expected DLPack 1.x, got version {managed.major}.{managed.minor}")
        writable = not managed.flags & _DLPACK_READ_ONLY
    elif _capsule_is_valid(capsule, b"dltensor"):
        managed = ffi.cast("DLManagedTensor *", _capsule_pointer(capsule, b"dltensor"))
        writable = False  # this version cannot say; some producers hand out what must not change
    else:
        raise InvalidTypeError(f"{function}: {argument}: expected {type(producer).__name__}.__dlpack__ to return a fresh DLPack capsule")
    tensor = managed.dl_tensor
    precision = _DLPACK_PRECISIONS.get((tensor.dtype.code, tensor.dtype.bits))
    if precision is None or tensor.dtype.lanes != 1:
        raise _dtype_error(
            function, argument, f"DLPack type code {tensor.dtype.code} with {tensor.dtype.bits} bits and {tensor.dtype.lanes} lanes"
        )
    if tensor.ndim < 0 or (tensor.ndim and not tensor.shape):
        raise InvalidTypeError(f"{function}: {argument}: expected a DLPack tensor with a shape, got {tensor.ndim} dimensions without one")
    shape = tuple(tensor.shape[0 : tensor.ndim]) if tensor.ndim else ()
    strides = tuple(tensor.strides[0 : tensor.ndim]) if tensor.strides else _contiguous_strides(shape)
    address = int(ffi.cast("uintptr_t", tensor.data)) + tensor.byte_offset
    if address % ITEM_SIZES[precision]:
        raise InvalidArgumentError(f"{function}: {argument}: expected aligned elements, got an unaligned DLPack tensor")
    if not tensor.data and 0 not in shape:
        raise InvalidArgumentError(f"{function}: {argument}: expected a DLPack tensor with memory, got a NULL address")
    return ArrayView(ffi.cast(_ADDRESS, address), shape, strides, precision, writable, NUMPY, (capsule, producer))


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


# ---- Which adapter reads what ------------------------------------------------------------------------------------------------------------


def _read_buffer(function: str, argument: str, array: Any) -> ArrayView:
    try:
        viewed = np.asarray(memoryview(array))
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidTypeError(
            f"{function}: {argument}: expected an array, got a {type(array).__name__} that cannot be viewed: {error}"
        ) from None
    return _read_numpy(function, argument, viewed)


def _reader_for(function: str, argument: str, array: Any) -> _Reader:
    """The adapter for a type that is seen for the first time."""
    kind = type(array)
    reader: _Reader
    if isinstance(array, np.ndarray):
        reader = _read_numpy_subclass
    elif is_tensor(array):
        framework = _torch_framework()
        reader = framework.read if kind is framework.torch.Tensor else framework.read_subclass
    elif hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        reader = _read_dlpack
    elif _has_buffer(array):
        return _read_buffer  # not remembered: cheap, and types with buffers are many
    else:
        raise InvalidTypeError(
            f"{function}: {argument}: expected a NumPy array, a PyTorch tensor on the CPU or a DLPack producer, got {describe(array)}"
        )
    if kind.__module__ in ("torch", "numpy", "torch.nn.parameter"):
        _READERS[kind] = reader  # types of users are not kept alive
    return reader


def _has_buffer(array: Any) -> bool:
    try:
        memoryview(array).release()
    except (TypeError, ValueError, BufferError):
        return False
    return True


def _allocation_error(function: str, shape: tuple[int, ...], error: Exception) -> MFAError:
    if any(not 0 <= size <= _LARGEST_SIZE for size in shape):
        return InvalidDimensionsError(f"{function}: expected sizes up to {_LARGEST_SIZE}, got a result of shape {shape}")
    return OutOfMemoryError(f"{function}: no memory for a result of shape {shape}: {error}")


_Reader = Callable[[str, str, Any], ArrayView]
_READERS: dict[type, _Reader] = {np.ndarray: _read_numpy}
