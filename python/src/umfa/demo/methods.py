"""The ways to compute attention that the demo compares: plain NumPy, PyTorch, and `umfa` in each of its precisions."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

import umfa
from umfa.scheme_errors import quantize_by

__all__ = ["Method", "NumpyMethod", "TorchMethod", "UmfaMethod", "all_methods", "numpy_attention"]

Operands = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Query, key and value."""


def numpy_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, kv_lengths: np.ndarray) -> np.ndarray:
    """Compute attention as one writes it in NumPy: two batched products around a softmax of the whole score matrix.

    With float64 inputs it is also the reference that every method's error is measured against.

    Parameters
    ----------
    query, key, value : ndarray
        ``[batch, tokens, heads, channels]``.
    kv_lengths : ndarray of int64
        ``[batch]``: keys from here on are padding.

    Returns
    -------
    ndarray
        ``[batch, tokens, heads, channels]``, in the type of the inputs.
    """
    heads_first = (0, 2, 1, 3)
    scale = query.dtype.type(1 / math.sqrt(query.shape[-1]))
    weights = (query * scale).transpose(heads_first) @ key.transpose(0, 2, 3, 1)
    if kv_lengths.min() < key.shape[1]:
        padding = np.arange(key.shape[1]) >= kv_lengths[:, None, None, None]
        np.copyto(weights, -np.inf, where=padding)
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    output: np.ndarray = weights @ value.transpose(heads_first)
    output /= weights.sum(axis=-1, keepdims=True)
    return output.transpose(heads_first)


class Method(ABC):
    """A way to compute attention.

    Attributes
    ----------
    engine : str
        Who computes.
    precision : str
        The type of the operands: ``"fp32"``, ``"fp16"``, ``"int8"`` or ``"int4"``.
    """

    engine: str
    precision: str

    @property
    def name(self) -> str:
        """Engine and precision."""
        return f"{self.engine} {self.precision}"

    def prepare(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> Operands:
        """Bring float32 operands into the float type that this method is given: what a model of that type would compute anyway.

        Parameters
        ----------
        query, key, value : ndarray of float32
            ``[batch, tokens, heads, channels]``.

        Returns
        -------
        tuple of ndarray
            The three operands that `attend` takes.
        """
        return query, key, value

    def kv_bytes(self, key: np.ndarray, value: np.ndarray) -> int:
        """Count the memory that keys and values take in this method's precision, scales included.

        Parameters
        ----------
        key, value : ndarray
            What `prepare` returned.

        Returns
        -------
        int
            Bytes.
        """
        return key.nbytes + value.nbytes

    @abstractmethod
    def attend(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, kv_lengths: np.ndarray) -> np.ndarray:
        """Compute attention.

        Parameters
        ----------
        query, key, value : ndarray
            What `prepare` returned.
        kv_lengths : ndarray of int64
            ``[batch]``: keys from here on are padding.

        Returns
        -------
        ndarray
            ``[batch, tokens, heads, channels]``, a float type.
        """

    def __call__(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, kv_lengths: np.ndarray) -> np.ndarray:
        """Prepare and attend: what the model calls.

        Parameters
        ----------
        query, key, value : ndarray of float32
            ``[batch, tokens, heads, channels]``.
        kv_lengths : ndarray of int64
            ``[batch]``.

        Returns
        -------
        ndarray of float32
            ``[batch, tokens, heads, channels]``.
        """
        return self.attend(*self.prepare(query, key, value), kv_lengths).astype(np.float32, copy=False)


class NumpyMethod(Method):
    """Plain NumPy, float32."""

    engine = "NumPy"
    precision = "fp32"

    def attend(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, kv_lengths: np.ndarray) -> np.ndarray:
        """Compute attention, see `Method.attend`."""
        return numpy_attention(query, key, value, kv_lengths)


class TorchMethod(Method):
    """PyTorch's `scaled_dot_product_attention`, float32.

    Parameters
    ----------
    torch : module
        PyTorch, imported by the caller.
    """

    engine = "PyTorch"
    precision = "fp32"

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def attend(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, kv_lengths: np.ndarray) -> np.ndarray:
        """Compute attention, see `Method.attend`."""
        torch = self._torch
        mask = None
        if kv_lengths.min() < key.shape[1]:
            mask = (torch.arange(key.shape[1]) < torch.from_numpy(kv_lengths)[:, None])[:, None, None, :]
        operands = (torch.from_numpy(operand).transpose(1, 2) for operand in (query, key, value))
        with torch.inference_mode():
            output = torch.nn.functional.scaled_dot_product_attention(*operands, attn_mask=mask)
        result: np.ndarray = output.transpose(1, 2).numpy()
        return result


class UmfaMethod(Method):
    """`umfa.attention`.

    Parameters
    ----------
    precision : {"fp32", "fp16", "int8", "int4"}
        What is computed with. For the integer types query, key and value come in float32 and are quantised within the call, by the default
        scheme of that type: the time is part of the call's.
    context : umfa.MFAContext, optional
        By default the thread's own.
    """

    engine = "umfa"

    def __init__(self, precision: str, context: umfa.MFAContext | None = None) -> None:
        self.precision = precision
        self._quantize = precision if precision in ("int8", "int4") else None
        self._context = context

    def prepare(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> Operands:
        """Bring float32 operands into the float type that this method is given, see `Method.prepare`."""
        if self.precision == "fp16":
            return query.astype(np.float16), key.astype(np.float16), value.astype(np.float16)
        return query, key, value

    def kv_bytes(self, key: np.ndarray, value: np.ndarray) -> int:
        """Count the memory that keys and values take in this method's precision, see `Method.kv_bytes`."""
        if self._quantize is None:
            return super().kv_bytes(key, value)
        _, *schemes = umfa.QuantizationConfig("int8", self._quantize, self._quantize).schemes
        return sum(quantize_by(x, scheme, "bshd").nbytes for x, scheme in zip((key, value), schemes, strict=True) if scheme is not None)

    def attend(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, kv_lengths: np.ndarray) -> np.ndarray:
        """Compute attention, see `Method.attend`."""
        output: np.ndarray = umfa.attention(
            query, key, value, kv_lengths=kv_lengths, layout="bshd", quantize=self._quantize, context=self._context
        )
        return output


def all_methods(context: umfa.MFAContext) -> list[Method]:
    """List every method that this machine has: NumPy, PyTorch if it is installed, and the four of `umfa`.

    Parameters
    ----------
    context : umfa.MFAContext
        Where `umfa` computes.

    Returns
    -------
    list of Method
        In the order of the demo's table.
    """
    methods: list[Method] = [NumpyMethod()]
    if importlib.util.find_spec("torch") is not None:
        import torch

        methods.append(TorchMethod(torch))
    methods.extend(UmfaMethod(precision, context) for precision in ("fp32", "fp16", "int8", "int4"))
    return methods
