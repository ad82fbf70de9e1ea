"""Merging partial results of attention over disjoint parts of the keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from umfa._layouts import LAYOUTS, four_dimensional, statistics_shape
from umfa._library import ffi, lib
from umfa._scalars import choice
from umfa.arrays import FLOATS, FP32, FP64, ArrayView, is_recorded, numpy_of, precision_name, view_of
from umfa.context import MFAContext, context_for
from umfa.errors import InvalidDimensionsError, InvalidTypeError
from umfa.quantization import _tensor

__all__ = ["merge"]

_FUNCTION = "umfa.merge"


def merge(
    out_a: Any,
    lse_a: Any,
    out_b: Any,
    lse_b: Any,
    *,
    layout: str = "bhsd",
    context: MFAContext | None = None,
) -> tuple[Any, Any]:
    """Merge two results of `attention` for the same queries, over disjoint parts of the keys, into that over all of these keys.

    So keys may be split over calls, threads or machines, as in Flash-Decoding and ring attention [1]_. The result can be merged again, in
    any order: that changes it by rounding only. PyTorch's autograd follows this function as it follows `attention`.

    In `attention`, give sinks to one part only. A part that begins at key p of the whole takes a `query_offset` smaller by p, where that
    matters (`causal`, `window`, `alibi_slopes`), and each part its own `dropout_offset`.

    Parameters
    ----------
    out_a, out_b : array
        The output of each part: any float type and strides, of one shape, as `attention` has it: ``[batch, num_heads, seq_len_q,
        head_dim_v]``, or with fewer axes.
    lse_a, lse_b : array
        The logsumexp of each part, from ``return_lse=True``: float32 or float64, ``[batch, num_heads, seq_len_q]`` in either layout,
        without the axes that the outputs do not have. -inf: the part has nothing for this row; its output there may be anything, also NaN.
    layout : {"bhsd", "bshd"}
        Order of the four axes of `out_a` and `out_b`, as in `attention`.
    context : MFAContext, optional
        By default one a thread.

    Returns
    -------
    output : array
        New and contiguous, of the kind and dtype of `out_a`. 0 for a row that both parts have nothing for.
    lse : array
        Of the same kind; float64 if `lse_a` or `lse_b` is, else float32. -inf for a row that both parts have nothing for.

    Raises
    ------
    InvalidDimensionsError
        If shapes do not match.
    InvalidTypeError
        For types and dtypes that are not allowed; where gradients are recorded, also for an array that is not a tensor.
    MFAError
        As `attention`.

    References
    ----------
    .. [1] Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023.

    Examples
    --------
    >>> first = umfa.attention(q, k[:, :, :512], v[:, :, :512], return_lse=True)
    >>> second = umfa.attention(q, k[:, :, 512:], v[:, :, 512:], return_lse=True)
    >>> output, lse = umfa.merge(*first, *second)
    """
    choice(_FUNCTION, "layout", layout, LAYOUTS)
    if is_recorded(out_a, lse_a, out_b, lse_b):
        from umfa import _autograd  # imports PyTorch, which is there

        return _autograd.merge(_FUNCTION, context, (out_a, lse_a, out_b, lse_b), layout)
    return _merge(context, out_a, lse_a, out_b, lse_b, layout)


def _merge(context: MFAContext | None, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, layout: str) -> tuple[Any, Any]:
    """What `merge` does. What is computed, autograd does not see."""
    context = context_for(_FUNCTION, context)
    view_a, tensor_a = _output("out_a", out_a, layout)
    view_b, tensor_b = _output("out_b", out_b, layout)
    if view_b.shape != view_a.shape:
        raise InvalidDimensionsError(f"{_FUNCTION}: out_b: expected shape {view_a.shape} like out_a, got {view_b.shape}")
    rows = statistics_shape(four_dimensional(view_a.shape, layout), len(view_a.shape))
    numbers = _statistics("lse_a", lse_a, rows), _statistics("lse_b", lse_b, rows)
    dtype = np.result_type(*numbers)
    statistics = [ffi.from_buffer(np.require(array, dtype, "C")) for array in numbers]
    precision = FP64 if dtype == np.float64 else FP32
    framework = view_a.framework
    output = framework.empty(_FUNCTION, view_a.shape, view_a.precision)
    lse = framework.empty(_FUNCTION, rows, precision)
    _, tensor = _output("output", output, layout)
    lse_pointer = view_of(_FUNCTION, "lse", lse).pointer
    context.call(_FUNCTION, lib.mfa_attention_merge, tensor_a, statistics[0], tensor_b, statistics[1], tensor, lse_pointer, precision)
    return output, lse


def _output(argument: str, array: Any, layout: str) -> tuple[ArrayView, Any]:
    """The view of a part's output, which keeps the memory alive, and its C structure."""
    view = view_of(_FUNCTION, argument, array)
    if view.precision not in FLOATS:
        raise InvalidTypeError(f"{_FUNCTION}: {argument}: expected a float dtype, got {precision_name(view.precision)}")
    return view, _tensor(_FUNCTION, argument, view, layout)


def _statistics(argument: str, array: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The logsumexp of a part."""
    view = view_of(_FUNCTION, argument, array)
    if view.precision not in (FP32, FP64):
        raise InvalidTypeError(f"{_FUNCTION}: {argument}: expected dtype float32 or float64, got {precision_name(view.precision)}")
    numbers = numpy_of(_FUNCTION, argument, view)
    if numbers.shape != shape:
        raise InvalidDimensionsError(f"{_FUNCTION}: {argument}: expected shape {shape}, got {numbers.shape}")
    return numbers
