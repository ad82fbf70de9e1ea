"""Attention, forward and backward, on arrays of any kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from umfa._layouts import LAYOUTS, axes_in, four_dimensional, statistics_shape
from umfa._library import NULL, ffi, lib
from umfa._scalars import attribute, choice, describe, flag, integer, real
from umfa.arrays import (
    BOOL,
    FLOATS,
    FP32,
    FP64,
    INT8,
    NUMPY,
    ArrayView,
    Framework,
    is_recorded,
    is_tensor,
    numpy_of,
    precision_name,
    view_of,
)
from umfa.context import MFAContext, context_for
from umfa.errors import InvalidArgumentError, InvalidDimensionsError, InvalidTypeError, MFAError, UnsupportedError
from umfa.quantization import QuantizationConfig, QuantizedTensor

__all__ = ["attention", "attention_backward", "flash_attention_forward"]

_ATTENTION_SIZE = ffi.sizeof("mfa_attention_t")
_GRADIENTS_SIZE = ffi.sizeof("mfa_attention_gradients_t")
_TENSOR_SIZE = ffi.sizeof("mfa_tensor_t")
_from_buffer = ffi.from_buffer
_LOWER_RIGHT = ffi.integer_const("MFA_ALIGNMENT_LOWER_RIGHT")
_INT64 = (-(2**63), 2**63 - 1)
_NAMES = ("q", "k", "v", "mask")
_GRADIENTS = ("query", "key", "value", "mask", "sinks", "alibi_slopes")


class _Workspace:
    """The C structures of one call. They are kept and used again, because making them costs more than filling them."""

    __slots__ = ("attention", "blank", "dtype", "gradients", "key", "mask", "output", "query", "shape", "signature", "value")

    def __init__(self) -> None:
        self.signature: tuple[Any, ...] | None = None  # of the call that the structures are filled for, where `_signature` gave one
        self.shape: tuple[int, ...] = ()  # of that call's result
        self.dtype: Any = None  # of that call's result
        self.query, self.key, self.value, self.output, self.mask = (_new_tensor() for _ in range(5))
        attention = ffi.new("mfa_attention_t *")
        lib.mfa_attention_initialize(attention, _ATTENTION_SIZE)
        attention.query = self.query
        attention.key = self.key
        attention.value = self.value
        attention.output = self.output
        self.attention = attention
        self.blank = bytes(ffi.buffer(attention))
        self.gradients: dict[str, Any] = {}

    def gradient(self, name: str) -> Any:
        """The tensor structure of a gradient, made when it is first asked for."""
        if name not in self.gradients:
            self.gradients[name] = _new_tensor()
        return self.gradients[name]


def _new_tensor() -> Any:
    tensor = ffi.new("mfa_tensor_t *")
    tensor.struct_size = _TENSOR_SIZE
    return tensor


# Workspaces that no call is using. A call takes one out, so threads and re-entrant calls never share one.
_idle: list[_Workspace] = []


class _Options(NamedTuple):
    """The options that forward and backward share, as the user gave them."""

    mask: Any
    causal: Any
    window: Any
    scale: Any
    softcap: Any
    alibi_slopes: Any
    sinks: Any
    kv_lengths: Any
    query_offset: Any
    dropout_p: Any
    seed: Any
    dropout_offset: Any
    quantize: Any


class _Problem:
    """What `_prepare` found out, and all memory that the structures point into."""

    __slots__ = ("axes", "keepalive", "layout", "mask", "output_precision", "query", "seed", "sizes", "statistics", "vectors", "views")

    axes: int
    keepalive: list[Any]
    layout: str
    mask: ArrayView | None
    output_precision: int
    query: ArrayView
    seed: int
    sizes: tuple[int, ...]
    statistics: int
    vectors: dict[str, Any]
    views: tuple[ArrayView, ArrayView, ArrayView]


def _set(tensor: Any, view: ArrayView, layout: str) -> tuple[int, ...]:
    """Fill the structure of a view that has 2 to 4 axes; returns its sizes in the library's order."""
    sizes = four_dimensional(view.shape, layout)
    tensor.precision = view.precision
    tensor.data = view.pointer
    tensor.shape = sizes
    tensor.strides = four_dimensional(view.strides, layout, 0)
    tensor.quantization = view.quantization
    return sizes


def _operand(function: str, argument: str, array: Any, layout: str) -> ArrayView:
    """The view of query, key or value."""
    if isinstance(array, QuantizedTensor):
        if array.layout != layout and len(array.shape) == 4:
            raise InvalidArgumentError(
                f"{function}: {argument}: expected a tensor of layout {layout!r}, got one that was quantised as {array.layout!r}"
            )
        return array._view
    view = view_of(function, argument, array)
    if view.precision not in FLOATS and view.precision != INT8:
        hint = "; INT4 codes come as an umfa.QuantizedTensor" if view.precision != BOOL else ""
        got = precision_name(view.precision)
        raise InvalidTypeError(f"{function}: {argument}: expected dtype float32, float16, bfloat16, float64 or int8, got {got}{hint}")
    return view


def _rotation(query: ArrayView, key: ArrayView) -> bool | None:
    """Whether the one of query and key that comes quantised is rotated; None if neither does."""
    for view in (query, key):
        if view.precision not in FLOATS:
            return bool(view.quantization and view.quantization.rotated)
    return None


def _prepare(
    function: str,
    workspace: _Workspace,
    q: Any,
    k: Any,
    v: Any,
    layout: str,
    options: _Options,
    backward: bool,
    names: tuple[str, str, str, str],
) -> _Problem:
    """Check the arguments that forward and backward share, and fill the workspace's structures."""
    mask, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths, query_offset, dropout_p, seed, dropout_offset, quantize = options
    choice(function, "layout", layout, LAYOUTS)
    attention = workspace.attention
    ffi.memmove(attention, workspace.blank, _ATTENTION_SIZE)
    workspace.signature = None

    query = _operand(function, names[0], q, layout)
    key = _operand(function, names[1], k, layout)
    value = _operand(function, names[2], v, layout)
    axes = len(query.shape)
    for argument, view in zip(names[:3], (query, key, value), strict=True):
        if not 2 <= len(view.shape) <= 4:
            axes_in(function, argument, len(view.shape), layout)
        if len(view.shape) != axes:
            raise InvalidDimensionsError(f"{function}: {argument}: expected {axes} axes like {names[0]}, got {len(view.shape)}")
    batch, heads, rows, channels = _set(workspace.query, query, layout)
    columns = _set(workspace.key, key, layout)[2]
    _set(workspace.value, value, layout)

    problem = _Problem()
    problem.axes = axes
    problem.layout = layout
    problem.query = query
    problem.views = (query, key, value)
    problem.sizes = (batch, heads, rows, columns)
    problem.statistics = FP64 if FP64 in (query.precision, key.precision, value.precision) else FP32
    problem.output_precision = query.precision if query.precision in FLOATS else FP32
    problem.mask = None
    problem.vectors = {}
    problem.keepalive = keepalive = [q, k, v, mask]

    if scale is None:
        attention.softmax_scale = 1.0 / math.sqrt(channels) if channels else 1.0
    else:
        attention.softmax_scale = real(function, "scale", scale)
    if mask is not None:
        _set_mask(function, names[3], workspace, problem, mask)
    if causal is not False:
        _set_causal(function, attention, causal)
    if window is not None:
        attention.window_left, attention.window_right = _window(function, window)
    if type(softcap) is not float or softcap != 0.0:
        attention.softcap = real(function, "softcap", softcap)
    if kv_lengths is not None:
        lengths = _integers(function, "kv_lengths", kv_lengths, (batch,), InvalidDimensionsError)
        attention.kv_lengths = _point(keepalive, "int64_t *", lengths)
    if query_offset is not None:
        offsets = _query_offsets(function, query_offset, batch)
        attention.query_offsets = _point(keepalive, "int64_t *", offsets)
        attention.num_query_offsets = offsets.size
    for name, vector in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if vector is not None:
            numbers = _reals(function, name, vector, heads, problem.statistics)
            problem.vectors[name] = vector
            setattr(attention, name, _point(keepalive, "void *", numbers))
    if type(dropout_p) is not float or dropout_p != 0.0 or seed is not None or type(dropout_offset) is not int or dropout_offset != 0:
        _set_dropout(function, attention, query.framework, dropout_p, seed, dropout_offset, backward)
    problem.seed = attention.seed
    if quantize is not None:
        schemes = QuantizationConfig._structures_of(function, quantize, _rotation(query, key))
        for name, scheme, view in zip(("quantize_query", "quantize_key", "quantize_value"), schemes, problem.views, strict=True):
            if view.precision in FLOATS:
                setattr(attention, name, scheme)
        keepalive.append(schemes)
    return problem


def _set_mask(function: str, argument: str, workspace: _Workspace, problem: _Problem, mask: Any) -> None:
    view = view_of(function, argument, mask)
    if view.precision not in FLOATS and view.precision != BOOL:
        raise InvalidTypeError(f"{function}: {argument}: expected dtype bool or a float type, got {precision_name(view.precision)}")
    missing = problem.axes - len(view.shape)
    if missing < 0:
        raise InvalidDimensionsError(f"{function}: {argument}: expected at most {problem.axes} axes, got shape {tuple(view.shape)}")
    _set_scores(workspace.mask, view, missing)
    workspace.attention.mask = workspace.mask
    problem.mask = view


def _set_scores(tensor: Any, view: ArrayView, missing: int) -> None:
    """Fill the structure of a mask: axes in the order of scores whatever the layout; leading ones may be missing."""
    tensor.precision = view.precision
    tensor.data = view.pointer
    tensor.shape = four_dimensional((1,) * missing + view.shape, "bhsd")
    tensor.strides = four_dimensional((0,) * missing + view.strides, "bhsd", 0)


def _set_causal(function: str, attention: Any, causal: Any) -> None:
    if isinstance(causal, str):
        attention.causal = 1
        if choice(function, "causal", causal, ("upper_left", "lower_right")) == "lower_right":
            attention.alignment = _LOWER_RIGHT
    else:
        try:
            attention.causal = flag(function, "causal", causal)
        except InvalidTypeError:
            raise InvalidTypeError(
                f"{function}: causal: expected False, True, 'upper_left' or 'lower_right', got {describe(causal)}"
            ) from None


def _window(function: str, window: Any) -> tuple[int, int]:
    if isinstance(window, (str, bytes)) or not hasattr(type(window), "__iter__") or not hasattr(type(window), "__len__"):
        raise InvalidTypeError(f"{function}: window: expected (left, right), got {describe(window)}")
    try:
        sides = tuple(window)
    except Exception:
        raise InvalidTypeError(f"{function}: window: expected (left, right), got {describe(window)}") from None
    if len(sides) != 2:
        raise InvalidArgumentError(f"{function}: window: expected two numbers, (left, right), got {len(sides)}")
    left, right = (integer(function, "window", side, -1, _INT64[1]) for side in sides)
    return left, right


def _set_dropout(
    function: str, attention: Any, framework: Framework, dropout_p: Any, seed: Any, dropout_offset: Any, backward: bool
) -> None:
    probability = real(function, "dropout_p", dropout_p)
    attention.dropout_p = probability
    attention.dropout_offset = integer(function, "dropout_offset", dropout_offset, 0, 2**32 - 1)
    if seed is not None:
        attention.seed = integer(function, "seed", seed, 0, 2**64 - 1)
    elif probability > 0:
        if backward:
            raise InvalidArgumentError(f"{function}: seed: expected that of the forward call, as dropout_p is {probability}, got None")
        attention.seed = framework.random_seed()


def _point(keepalive: list[Any], kind: str, array: Any) -> Any:
    """The address of a contiguous array, which is kept alive."""
    memory = ffi.from_buffer(array)
    keepalive.append(memory)
    return ffi.cast(kind, memory)


def _small_array(function: str, argument: str, values: Any, expected: str) -> Any:
    """A NumPy array of a few numbers, however they come."""
    if attribute(values, "requires_grad") is True:
        values = values.detach()
    if is_tensor(values) and str(values.dtype) == "torch.bfloat16":
        values = values.float()  # NumPy has no bfloat16 of its own
    if isinstance(values, (str, bytes)):
        raise InvalidTypeError(f"{function}: {argument}: expected {expected}, got {describe(values)}")
    try:
        return np.asarray(values)
    except Exception as error:
        raise InvalidTypeError(f"{function}: {argument}: expected {expected}, got {describe(values)}: {error}") from None


def _integers(function: str, argument: str, values: Any, shape: tuple[int, ...], error: type[MFAError]) -> Any:
    """Whole numbers as contiguous int64; `error` for ones that do not fit."""
    expected = f"whole numbers of shape {shape}"
    if isinstance(values, (list, tuple)):
        # Not left to NumPy, which makes floats of large ones.
        values = np.array([integer(function, argument, value, *_INT64, error) for value in values], np.int64)
    array = _small_array(function, argument, values, expected)
    if array.dtype.kind not in "iu":
        raise InvalidTypeError(f"{function}: {argument}: expected {expected}, got dtype {array.dtype}")
    if array.shape != shape:
        raise InvalidDimensionsError(f"{function}: {argument}: expected {expected}, got shape {array.shape}")
    if array.dtype.kind == "u" and array.size and array.max() > _INT64[1]:
        raise error(f"{function}: {argument}: expected at most {_INT64[1]}, got {array.max()}")
    return np.require(array, np.int64, "C")


def _query_offsets(function: str, query_offset: Any, batch: int) -> Any:
    if isinstance(query_offset, int):
        return np.array([integer(function, "query_offset", query_offset, *_INT64)], np.int64)
    shape = () if attribute(query_offset, "shape") == () else (batch,)
    return _integers(function, "query_offset", query_offset, shape, InvalidArgumentError).reshape(-1)


def _reals(function: str, argument: str, values: Any, heads: int, precision: int) -> Any:
    """Slopes or sinks as the library takes them: contiguous, float32, or float64 with float64 operands."""
    expected = f"real numbers of shape ({heads},)"
    array = _small_array(function, argument, values, expected)
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16" and array.size:
        raise InvalidTypeError(f"{function}: {argument}: expected {expected}, got dtype {array.dtype}")
    if array.shape != (heads,):
        raise InvalidDimensionsError(f"{function}: {argument}: expected {expected}, one a query head, got shape {array.shape}")
    with np.errstate(over="ignore"):
        return np.require(array, np.float64 if precision == FP64 else np.float32, "C")


def _writable(function: str, argument: str, array: Any, problem: _Problem) -> ArrayView:
    """The view of an array that a result is written into."""
    view = view_of(function, argument, array)
    if view.precision not in FLOATS:
        raise InvalidTypeError(f"{function}: {argument}: expected a float dtype, got {precision_name(view.precision)}")
    if not view.writable:
        raise InvalidArgumentError(f"{function}: {argument}: expected an array that may be written, got a read-only one")
    _same_axes(function, argument, view, problem)
    return view


def _same_axes(function: str, argument: str, view: ArrayView, problem: _Problem) -> None:
    if len(view.shape) != problem.axes:
        raise InvalidDimensionsError(f"{function}: {argument}: expected {problem.axes} axes like q, got shape {tuple(view.shape)}")


def _statistics(function: str, argument: str, array: Any, problem: _Problem) -> Any:
    """The address of a row statistic that the caller passes; contiguous, or copied to be so. Kept alive."""
    view = view_of(function, argument, array)
    if view.precision != problem.statistics:
        raise InvalidTypeError(
            f"{function}: {argument}: expected dtype {precision_name(problem.statistics)}, got {precision_name(view.precision)}"
        )
    expected = statistics_shape(problem.sizes, problem.axes)
    numbers = np.require(numpy_of(function, argument, view), np.float64 if problem.statistics == FP64 else np.float32, "C")
    if numbers.shape != expected:
        raise InvalidDimensionsError(f"{function}: {argument}: expected shape {expected}, got {numbers.shape}")
    return _point(problem.keepalive, "void *", numbers)


def _forward(
    function: str,
    context: MFAContext | None,
    q: Any,
    k: Any,
    v: Any,
    layout: str,
    options: _Options,
    out: Any,
    return_lse: Any,
    names: tuple[str, str, str, str] = _NAMES,
    signature: tuple[Any, ...] | None = None,
) -> Any:
    """Attention, recorded or not. `names` are those of its arguments to the user; `signature` is that of a call that may be repeated."""
    with_lse = return_lse is not False and flag(function, "return_lse", return_lse)
    if is_recorded(q, k, v, options.mask, options.alibi_slopes, options.sinks, out):
        if out is not None:
            raise UnsupportedError(
                f"{function}: out: expected None where an input or `out` itself requires grad, in grad mode, as autograd cannot follow what"
                f" is written into an array; use the result, or torch.no_grad()"
            )
        from umfa import _autograd  # imports PyTorch, which is there

        result, lse = _autograd.attention(function, context, q, k, v, layout, options, names)
    else:
        result, lse, _ = _compute(function, context, q, k, v, layout, options, out, with_lse, names, signature)
    return (result, lse) if with_lse else result


def _signature(q: Any, k: Any, v: Any, layout: str, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What tells plain calls on NumPy arrays apart: of two with one signature, if all arrays are contiguous, only addresses differ.

    Most of what a small call costs is looking at its arguments; a loop makes it with the same ones again and again. None: not that plain.
    """
    mask, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths, query_offset, dropout_p, seed, dropout_offset, quantize = given
    if not (type(q) is type(k) is type(v) is np.ndarray and mask is window is alibi_slopes is sinks is kv_lengths is query_offset is None):
        return None
    # Types too, since 1 equals True, and an object of the user's whatever it likes.
    if not (seed is quantize is None and type(dropout_p) is type(softcap) is float and type(dropout_offset) is int and type(layout) is str):
        return None
    if dropout_p != 0.0 or dropout_offset != 0 or not (scale is None or type(scale) is float) or type(causal) not in (bool, str):
        return None
    return layout, causal, scale, softcap, q.dtype, q.shape, k.dtype, k.shape, v.dtype, v.shape


def _repeat(function: str, context: MFAContext | None, q: Any, k: Any, v: Any, signature: tuple[Any, ...]) -> np.ndarray[Any, Any] | None:
    """The result of a call that has the signature of the last one. None if it has not, or is refused: the long way has words for that."""
    if not isinstance(context, MFAContext):
        context = context_for(function, context)
    try:
        workspace = _idle.pop()
    except IndexError:
        return None
    result = None
    if workspace.signature == signature:
        try:
            result = np.empty(workspace.shape, workspace.dtype)
            # An array that is not contiguous is refused here, one that is not aligned by the library.
            workspace.query.data = _from_buffer(q)
            workspace.key.data = _from_buffer(k)
            workspace.value.data = _from_buffer(v)
            workspace.output.data = _from_buffer(result)
            context._run_forward(function, workspace.attention)
        except (ValueError, MemoryError):
            result = None
    _idle.append(workspace)
    return result


def _attend(
    function: str,
    context: MFAContext | None,
    q: Any,
    k: Any,
    v: Any,
    layout: str,
    given: tuple[Any, ...],
    out: Any,
    return_lse: Any,
) -> Any:
    """What `attention` does. `given` is what makes `_Options`: not made yet, as that takes longer than the checks of a repeated call."""
    signature = _signature(q, k, v, layout, given) if out is None and return_lse is False else None
    if signature is not None:
        result = _repeat(function, context, q, k, v, signature)
        if result is not None:
            return result
    return _forward(function, context, q, k, v, layout, _Options._make(given), out, return_lse, signature=signature)


def _compute(
    function: str,
    context: MFAContext | None,
    q: Any,
    k: Any,
    v: Any,
    layout: str,
    options: _Options,
    out: Any,
    with_lse: bool | int,
    names: tuple[str, str, str, str],
    signature: tuple[Any, ...] | None = None,
) -> tuple[Any, Any, int]:
    """The result, its logsumexp (None unless asked for) and the seed that was used. What is computed, autograd does not see."""
    context = context_for(function, context)
    try:
        workspace = _idle.pop()
    except IndexError:
        workspace = _Workspace()
    if signature is not None and not (q.flags.c_contiguous and k.flags.c_contiguous and v.flags.c_contiguous):
        signature = None  # it does not tell strides apart
    problem = _prepare(function, workspace, q, k, v, layout, options, False, names)
    framework = problem.query.framework
    if out is None:
        result = framework.empty(function, (*problem.query.shape[:-1], problem.views[2].shape[-1]), problem.output_precision)
        view = view_of(function, "out", result)
    else:
        result = out
        view = _writable(function, "out", out, problem)
    _set(workspace.output, view, layout)
    lse = None
    if with_lse:
        lse = framework.empty(function, statistics_shape(problem.sizes, problem.axes), problem.statistics)
        lse_view = view_of(function, "lse", lse)
        workspace.attention.logsumexp = lse_view.pointer
    context.call(function, lib.mfa_attention_run_forward, workspace.attention)
    if signature is not None:
        workspace.signature, workspace.shape, workspace.dtype = signature, result.shape, result.dtype
    _idle.append(workspace)
    if out is not None:
        view.framework.written(out)
    return result, lse, problem.seed


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    causal: bool | str = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    query_offset: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    dropout_offset: int = 0,
    layout: str = "bhsd",
    quantize: str | QuantizationConfig | None = None,
    out: Any = None,
    return_lse: bool = False,
    context: MFAContext | None = None,
) -> Any:
    """Scaled dot-product attention, exact or quantised, in memory that does not grow with the product of the sequence lengths.

    ``softmax(scale * q @ k^T + mask) @ v`` by the algorithm of FlashAttention [1]_, with the options below. Arrays may be NumPy's
    (bfloat16: `ml_dtypes`), PyTorch's on the CPU, or DLPack producers, in any mix and of any strides, and are used where they lie, without
    a copy. The result comes back as what `q` was.

    PyTorch's autograd follows it: where `q`, `k`, `v`, `mask`, `alibi_slopes` or `sinks` is a tensor that requires grad, in grad mode, the
    result and `lse` have gradients, of first order; with `quantize`, straight-through ones. Backward reads the inputs again. PyTorch makes
    sure that tensors are unchanged by then; leave other arrays unchanged yourself.

    Parameters
    ----------
    q : array or QuantizedTensor
        Queries, ``[batch, num_heads, seq_len_q, head_dim]``: float32, float16, bfloat16, float64 or int8 (codes of scale 1). Without heads
        ``[batch, seq_len_q, head_dim]``, or ``[seq_len_q, head_dim]``.
    k : array or QuantizedTensor
        Keys, ``[batch, num_kv_heads, seq_len_kv, head_dim]``; `num_heads` is a multiple of `num_kv_heads`, and consecutive query heads
        share a key head.
    v : array or QuantizedTensor
        Values, ``[batch, num_kv_heads, seq_len_kv, head_dim_v]``.
    mask : array, optional
        bool (True: attend) or a float type (added to the scores, not multiplied by `scale`; -inf masks). Broadcasts to ``[batch, num_heads,
        seq_len_q, seq_len_kv]`` in either layout, without the axes that `q` does not have; it is not expanded in memory.
    causal : bool or {"upper_left", "lower_right"}
        Row i attends columns up to ``i + off``. True or ``"upper_left"``: off is 0. ``"lower_right"``: off is ``seq_len_kv - seq_len_q``,
        with the batch's entry of `kv_lengths` in place of `seq_len_kv` where given.
    window : tuple of int, optional
        ``(left, right)``: row i attends columns from ``i + off - left`` to ``i + off + right``; -1 is no limit on that side.
    scale : float, optional
        Factor of the scores; ``1 / sqrt(head_dim)`` by default.
    softcap : float
        If not 0, scores s become ``softcap * tanh(s / softcap)`` before the mask is added.
    alibi_slopes : array, optional
        ``[num_heads]``: ``slope * abs(i + off - j)`` is subtracted from the scores [2]_.
    sinks : array, optional
        ``[num_heads]``: a score that takes part in the softmax's sum and has no value.
    kv_lengths : array of int, optional
        ``[batch]``: keys and values from there on are not read.
    query_offset : int or array of int, optional
        off itself, one number or one a batch; not together with ``"lower_right"``.
    dropout_p : float
        Probability with which a weight is dropped; the others are divided by ``1 - dropout_p``.
    seed : int, optional
        64 bits that determine what is dropped. By default drawn: from PyTorch's generator if `q` is a tensor, else from the system's.
    dropout_offset : int
        32 more bits, to use one seed for many calls.
    layout : {"bhsd", "bshd"}
        Order of the four axes of `q`, `k`, `v`, `out`: heads before tokens (PyTorch) or after them (FlashAttention).
    quantize : {"int8", "int4"} or QuantizationConfig, optional
        Quantise the float operands on the way in. ``"int8"`` is ``QuantizationConfig("int8", "int8", "int8")``, ``"int4"`` is
        ``QuantizationConfig("int8", "int4", "int4")``. With smoothing, which is part of both, or scales per tensor, head or channel, a
        causal result depends on later tokens, within the quantisation error.
    out : array, optional
        Where to write the result: any float type and strides, not overlapping an input. Not where gradients are recorded.
    return_lse : bool
        Also return the logsumexp of each row's scores, which `attention_backward` needs.
    context : MFAContext, optional
        By default one a thread.

    Returns
    -------
    output : array
        `out`, or a new contiguous array of the layout's shape with the head size of `v`; of the dtype of `q`, float32 if that is quantised.
        A row whose columns are all masked is 0.
    lse : array
        Only with `return_lse`: natural logarithm, ``[batch, num_heads, seq_len_q]`` in either layout (without the axes that `q` does not
        have); float32, float64 if an operand is float64. -inf for a row whose columns are all masked.

    Raises
    ------
    InvalidDimensionsError
        If shapes do not match.
    InvalidArgumentError
        For values that are not allowed, memory that cannot be used as it lies, a read-only or overlapping `out`.
    InvalidTypeError
        For types and dtypes that are not allowed.
    UnsupportedError
        For a tensor that is not on the CPU, `out` together with gradients, and for what the device does not serve.
    InvalidContextError
        If the context is closed.
    OutOfMemoryError
        If there is no memory for the result or for workspace.

    References
    ----------
    .. [1] Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
    .. [2] Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation", 2021.

    Examples
    --------
    >>> q = numpy.random.randn(1, 8, 1024, 64).astype("float32")
    >>> output = umfa.attention(q, q, q, causal=True)
    >>> output, lse = umfa.attention(q, q, q, quantize="int8", return_lse=True)
    """
    function = "umfa.attention"
    given = (mask, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths, query_offset, dropout_p, seed, dropout_offset, quantize)
    return _attend(function, context, q, k, v, layout, given, out, return_lse)


def flash_attention_forward(
    ctx: MFAContext,
    q: Any,
    k: Any,
    v: Any,
    causal: bool | str = False,
    softmax_scale: float | None = None,
    *,
    mask: Any = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    query_offset: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    dropout_offset: int = 0,
    quantize: str | QuantizationConfig | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention in the layout of the C functions: tokens before heads.

    The same as `attention` with ``layout="bshd"``, on a given context.

    Parameters
    ----------
    ctx : MFAContext
        Where to compute.
    q, k, v : array or QuantizedTensor
        ``[batch, tokens, heads, channels]``, ``[batch, tokens, channels]`` or ``[tokens, channels]``.
    causal : bool or {"upper_left", "lower_right"}
        As in `attention`.
    softmax_scale : float, optional
        Factor of the scores; ``1 / sqrt(head_dim)`` by default.
    mask, window, softcap, alibi_slopes, sinks, kv_lengths, query_offset, dropout_p, seed, dropout_offset, quantize, out, return_lse
        As in `attention`.

    Returns
    -------
    output : array
        Of the shape of `q` with the head size of `v`.
    lse : array
        Only with `return_lse`.

    Raises
    ------
    MFAError
        As `attention`.

    Examples
    --------
    >>> with umfa.MFAContext() as ctx:
    ...     output = umfa.flash_attention_forward(ctx, q, k, v, causal=True)
    """
    function = "umfa.flash_attention_forward"
    if not isinstance(ctx, MFAContext):
        raise InvalidTypeError(f"{function}: ctx: expected an umfa.MFAContext, got {describe(ctx)}")
    scale = softmax_scale if softmax_scale is None else real(function, "softmax_scale", softmax_scale)
    given = (mask, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths, query_offset, dropout_p, seed, dropout_offset, quantize)
    return _attend(function, ctx, q, k, v, "bshd", given, out, return_lse)


def attention_backward(
    grad_out: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    mask: Any = None,
    causal: bool | str = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    query_offset: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    dropout_offset: int = 0,
    layout: str = "bhsd",
    quantize: str | QuantizationConfig | None = None,
    context: MFAContext | None = None,
    grad_lse: Any = None,
    gradients: Sequence[str] = ("query", "key", "value"),
) -> tuple[Any, ...]:
    """Gradients of `attention`, given that of its output.

    Nothing but `lse` is kept from forward: weights are computed again, tile by tile. Gradients of quantised operands are with respect to
    the real numbers that their codes stand for (straight-through).

    Parameters
    ----------
    grad_out : array
        Gradient of the output, of its shape; any float type.
    q, k, v : array or QuantizedTensor
        What `attention` got.
    out : array or None
        What `attention` returned; None: what is needed of it is computed again.
    lse : array
        The logsumexp that `attention` returned with ``return_lse=True``.
    mask, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths, query_offset, dropout_p, seed, dropout_offset, layout, quantize
        What `attention` got. `seed` must be given if `dropout_p` is not 0.
    context : MFAContext, optional
        By default one a thread.
    grad_lse : array, optional
        Gradient of `lse`, of its shape and dtype; 0 by default.
    gradients : sequence of {"query", "key", "value", "mask", "sinks", "alibi_slopes"}
        Which gradients to compute. That of a mask has the mask's own shape.

    Returns
    -------
    tuple of array
        The gradients in the order asked, each of the shape, kind and dtype of what it belongs to; float32 where that is quantised.

    Raises
    ------
    MFAError
        As `attention`; also `InvalidArgumentError` for the gradient of an input that was not given.

    Examples
    --------
    >>> output, lse = umfa.attention(q, k, v, causal=True, return_lse=True)
    >>> grad_q, grad_k, grad_v = umfa.attention_backward(grad_output, q, k, v, output, lse, causal=True)
    """
    function = "umfa.attention_backward"
    options = _Options(
        mask, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths, query_offset, dropout_p, seed, dropout_offset, quantize
    )
    return _backward(function, context, grad_out, q, k, v, out, lse, layout, options, grad_lse, _gradient_names(function, gradients))


def _backward(
    function: str,
    context: MFAContext | None,
    grad_out: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    layout: str,
    options: _Options,
    grad_lse: Any,
    gradients: tuple[str, ...],
) -> tuple[Any, ...]:
    """What `attention_backward` does."""
    context = context_for(function, context)
    try:
        workspace = _idle.pop()
    except IndexError:
        workspace = _Workspace()
    problem = _prepare(function, workspace, q, k, v, layout, options, True, _NAMES)
    request = ffi.new("mfa_attention_gradients_t *")
    request.struct_size = _GRADIENTS_SIZE

    grad_output_view = _float_input(function, "grad_out", grad_out, problem)
    request.grad_output = workspace.gradient("output")
    _set(request.grad_output, grad_output_view, layout)
    if out is None:
        workspace.attention.output = NULL
    else:
        out_view = _float_input(function, "out", out, problem)
        _set(workspace.output, out_view, layout)
    workspace.attention.logsumexp = _statistics(function, "lse", lse, problem)
    if grad_lse is not None:
        request.grad_logsumexp = _statistics(function, "grad_lse", grad_lse, problem)

    results = [_gradient(function, name, workspace, problem, request) for name in gradients]
    context.call(function, lib.mfa_attention_run_backward, workspace.attention, request)
    _idle.append(workspace)
    return tuple(
        _like(result, problem.vectors[name]) if name in problem.vectors else result for name, result in zip(gradients, results, strict=True)
    )


def _gradient_names(function: str, gradients: Any) -> tuple[str, ...]:
    if isinstance(gradients, (str, bytes)):
        raise InvalidTypeError(f"{function}: gradients: expected a sequence of names, got {describe(gradients)}; write ({gradients!r},)")
    try:
        names = tuple(gradients)
    except Exception:
        raise InvalidTypeError(f"{function}: gradients: expected a sequence of names, got {describe(gradients)}") from None
    for name in names:
        choice(function, "gradients", name, _GRADIENTS)
    if len(set(names)) != len(names):
        raise InvalidArgumentError(f"{function}: gradients: expected each name once, got {describe(names)}")
    return names


def _float_input(function: str, argument: str, array: Any, problem: _Problem) -> ArrayView:
    view = view_of(function, argument, array)
    if view.precision not in FLOATS:
        raise InvalidTypeError(f"{function}: {argument}: expected a float dtype, got {precision_name(view.precision)}")
    _same_axes(function, argument, view, problem)
    problem.keepalive.append(view)
    return view


def _gradient(function: str, name: str, workspace: _Workspace, problem: _Problem, request: Any) -> Any:
    """Make the array of one gradient and enter it into the request."""
    if name in ("sinks", "alibi_slopes"):
        if name not in problem.vectors:
            raise InvalidArgumentError(f"{function}: gradients: expected names of inputs, got {name!r} without {name}=")
        result = NUMPY.empty(function, problem.sizes[1:2], problem.statistics)
        setattr(request, f"grad_{name}", _point(problem.keepalive, "void *", result))
        return result
    tensor = workspace.gradient(name)
    if name == "mask":
        of = problem.mask
        if of is None or of.precision not in FLOATS:
            raise InvalidArgumentError(f"{function}: gradients: expected names of inputs, got 'mask' without an additive mask=")
    else:
        of = problem.views[("query", "key", "value").index(name)]
    result = of.framework.empty(function, of.shape, of.precision if of.precision in FLOATS else FP32)
    view = view_of(function, name, result)
    if name == "mask":
        _set_scores(tensor, view, problem.axes - len(view.shape))
    else:
        _set(tensor, view, problem.layout)
    setattr(request, f"grad_{name}", tensor)
    problem.keepalive.append(view)
    return result


def _like(result: Any, vector: Any) -> Any:
    """The gradient of slopes or sinks as what these were."""
    if isinstance(vector, np.ndarray):
        return result.astype(vector.dtype, copy=False) if vector.dtype.kind == "f" or vector.dtype.name == "bfloat16" else result
    if is_tensor(vector):
        view = view_of("umfa.attention_backward", "gradients", vector)
        tensor = view.framework.from_numpy(result)
        return tensor.to(vector.dtype) if vector.dtype.is_floating_point else tensor
    return result
