"""What a quantisation scheme does to a tensor: the error of quantising and dequantising it, and the memory that it takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umfa.quantization import QuantizationScheme, QuantizedTensor, quantize

__all__ = ["SHARING", "SchemeError", "measure", "memory_ratio", "quantize_by", "scheme_name", "schemes"]

SHARING: tuple[tuple[str, int | None], ...] = (
    ("tensor", None),
    ("head", None),
    ("block", 128),
    ("block", 64),
    ("channel", None),
    ("token", None),
    ("group", 64),
    ("group", 32),
    ("group", 16),
)
"""Which elements share a scale, with the size of a block or group: roughly from the coarsest to the finest."""


@dataclass(frozen=True)
class SchemeError:
    """What `measure` found.

    Attributes
    ----------
    scheme : QuantizationScheme
        The scheme.
    relative_rmse : float
        Root mean square of the error, as a share of the root mean square of the tensor; 0 for a tensor of zeros.
    max_abs : float
        The largest error.
    nbytes : int
        Codes, scales, zero points and means together.
    fp16_ratio : float
        `nbytes` as a share of what the tensor takes in FP16.
    """

    scheme: QuantizationScheme
    relative_rmse: float
    max_abs: float
    nbytes: int
    fp16_ratio: float


def schemes(
    dtypes: Iterable[str] = ("int8", "int4"),
    sharing: Iterable[tuple[str, int | None]] = SHARING,
    symmetric: Sequence[bool] = (True, False),
    smooth: Sequence[bool] = (False,),
    rotate: Sequence[bool] = (False,),
) -> list[QuantizationScheme]:
    """List the schemes that combine the given choices.

    Parameters
    ----------
    dtypes : iterable of {"int8", "int4"}
        Codes.
    sharing : iterable of (str, int or None)
        Granularities, each with its block or group size.
    symmetric, smooth, rotate : sequence of bool
        Values of those options.

    Returns
    -------
    list of QuantizationScheme
        In the order of the arguments, the last varying fastest.
    """
    return [
        QuantizationScheme(
            dtype,
            granularity,
            block_size=size if granularity == "block" else None,
            group_size=size if granularity == "group" else None,
            symmetric=without_zero_points,
            smooth=smoothed,
            rotate=rotated,
        )
        for dtype, (granularity, size), without_zero_points, smoothed, rotated in itertools.product(
            dtypes, sharing, symmetric, smooth, rotate
        )
    ]


def scheme_name(scheme: QuantizationScheme) -> str:
    """Name a scheme in words.

    Parameters
    ----------
    scheme : QuantizationScheme
        The scheme.

    Returns
    -------
    str
        Such as ``"int4 group 32, asymmetric, rotated"``.
    """
    size = scheme.block_size or scheme.group_size
    words = [f"{scheme.dtype} {scheme.granularity}" + (f" {size}" if size else "")]
    options = {"asymmetric": not scheme.symmetric, "smoothed": scheme.smooth, "rotated": scheme.rotate}
    return ", ".join([*words, *(word for word, used in options.items() if used)])


def quantize_by(x: Any, scheme: QuantizationScheme, layout: str = "bhsd") -> QuantizedTensor:
    """Quantise a tensor by a scheme.

    Parameters
    ----------
    x : array
        As in `quantize`.
    scheme : QuantizationScheme
        The scheme.
    layout : {"bhsd", "bshd"}
        Order of the axes of `x`.

    Returns
    -------
    QuantizedTensor
        What `quantize` gives.
    """
    return quantize(
        x,
        scheme.dtype,
        scheme.granularity,
        block_size=scheme.block_size,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        smooth=scheme.smooth,
        rotate=scheme.rotate,
        layout=layout,
    )


def measure(x: np.ndarray[Any, Any], scheme: QuantizationScheme, layout: str = "bhsd") -> SchemeError:
    """Quantise and dequantise a tensor, and compare.

    Parameters
    ----------
    x : ndarray
        A float tensor with elements, as in `quantize`.
    scheme : QuantizationScheme
        The scheme.
    layout : {"bhsd", "bshd"}
        Order of the axes of `x`.

    Returns
    -------
    SchemeError
        The error, taken in float64, and the memory.
    """
    quantized = quantize_by(x, scheme, layout)
    exact = np.asarray(x).astype(np.float64)
    error = np.asarray(quantized.dequantize(), np.float64) - exact
    square = float(np.mean(np.square(exact)))
    return SchemeError(
        scheme,
        math.sqrt(float(np.mean(np.square(error))) / square) if square else 0.0,
        float(np.max(np.abs(error))),
        quantized.nbytes,
        quantized.nbytes / (2 * x.size),
    )


def memory_ratio(scheme: QuantizationScheme, head_dim: int, tokens: int = 1024) -> float:
    """Say how much memory a scheme takes, scales, zero points and means included.

    Parameters
    ----------
    scheme : QuantizationScheme
        The scheme.
    head_dim : int
        Channels of a head.
    tokens : int
        Tokens of a sequence, over which `channel` scales and means are shared.

    Returns
    -------
    float
        As a share of FP16.
    """
    zeros = np.zeros((1, 1, tokens, head_dim), np.float32)
    return quantize_by(zeros, scheme).nbytes / (2 * zeros.size)
