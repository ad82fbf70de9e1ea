"""What this installation is: versions, devices, kernels."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

import numpy as np

from umfa._library import ffi, lib, library_path, version
from umfa.arrays import BF16, FP16, FP32, FP64, INT4, INT8, ITEM_SIZES
from umfa.context import MFAContext, context_for

__all__ = ["info"]

_PRECISIONS = {"float32": FP32, "float16": FP16, "bfloat16": BF16, "float64": FP64, "int8": INT8, "int4": INT4}
_DEVICES = ("cpu", "metal", "softmetal")
# Operations as libmfa names them, and the query rows of a problem that asks for each; "decode" is forward for a single row.
_OPERATIONS = {
    "forward": ("forward", 64),
    "decode": ("forward", 1),
    "backward_query": ("backward_query", 64),
    "backward_key_value": ("backward_key_value", 64),
}
_HEAD_DIM = 64


def info(context: MFAContext | None = None) -> dict[str, Any]:
    """What this installation is and which kernels it would use.

    Parameters
    ----------
    context : MFAContext, optional
        By default the thread's default context.

    Returns
    -------
    dict
        ``version`` of the package, ``library_version`` and ``library`` (path) of libmfa, ``devices`` (name to whether it is here),
        ``device``, ``num_threads``, ``instruction_set``, ``workspace_bytes`` of the context, ``precisions`` (names of the operands' types
        that its device serves), ``kernels`` (operation to type to the kernel's name, at head size 64; None where there is none;
        ``decode`` is forward for one query), ``python``, ``platform``, ``packages`` (name to version, None if not installed). Everything
        in it can be written as JSON.

    Raises
    ------
    InvalidContextError
        If the context is closed.
    """
    context = context_for("umfa.info", context)
    details = context.details()
    served = {name: code for name, code in _PRECISIONS.items() if details["operand_precisions"] >> code & 1}
    return {
        "version": version,
        "library_version": ffi.string(lib.mfa_version_string()).decode(),
        "library": str(library_path),
        "devices": {name: bool(lib.mfa_device_is_available(ffi.integer_const(f"MFA_DEVICE_{name.upper()}"))) for name in _DEVICES},
        "device": details["device"],
        "num_threads": details["num_threads"],
        "instruction_set": details["instruction_set"],
        "workspace_bytes": details["workspace_bytes"],
        "precisions": list(served),
        "kernels": {
            title: {name: _kernel(context, operation, rows, code) for name, code in served.items()}
            for title, (operation, rows) in _OPERATIONS.items()
        },
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "packages": {name: _package_version(name) for name in ("numpy", "cffi", "torch", "ml_dtypes", "transformers")},
    }


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _kernel(context: MFAContext, operation: str, rows: int, precision: int) -> str | None:
    """The name of the kernel for a small problem of one type."""
    memory = {name: np.zeros(ITEM_SIZES[FP64] * rows * _HEAD_DIM, np.uint8) for name in ("query", "key", "value", "output", "logsumexp")}
    pointers = {name: ffi.from_buffer(array) for name, array in memory.items()}
    tensors = {}
    for name in ("query", "key", "value", "output"):
        tensor = tensors[name] = ffi.new("mfa_tensor_t *")
        tensor.struct_size = ffi.sizeof("mfa_tensor_t")
        tensor.precision = FP32 if name == "output" and precision in (INT8, INT4) else precision
        tensor.data = pointers[name]
        tensor.shape = (1, 1, rows, _HEAD_DIM)
        tensor.strides = (rows * _HEAD_DIM, rows * _HEAD_DIM, _HEAD_DIM, 1)
    attention = ffi.new("mfa_attention_t *")
    lib.mfa_attention_initialize(attention, ffi.sizeof("mfa_attention_t"))
    for name, tensor in tensors.items():
        setattr(attention, name, tensor)
    attention.logsumexp = pointers["logsumexp"]
    name = ffi.new("const char **")
    code = ffi.integer_const(f"MFA_OPERATION_{operation.upper()}")
    try:
        context.call("umfa.info", lib.mfa_attention_kernel_name, attention, code, name)
    except NotImplementedError:
        return None
    return str(ffi.string(name[0]).decode())
