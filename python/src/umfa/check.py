"""A self-test of the installed library on the machine at hand: what it computes, against the formulas in float64.

Small differential checks go through types, options, quantisation and gradients; then the published error bounds are measured on the
problem that they are published for. ``umfa check`` prints the results; `run_checks` gives them to programs.

Examples
--------
>>> all(result.passed for result in umfa.check.run_checks())
True
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import umfa

__all__ = ["Check", "CheckResult", "checks", "reference_attention", "reference_gradients", "run_checks"]

_FLOAT32_ERROR = 2e-6
_LSE_ERROR = 1e-5  # relative to max(1, |lse|, largest |score| of the row)
_GRADIENT_ERROR = 1e-5
# Rounding the output to the type, as root mean square, and as much again for what is rounded before.
_TYPE_ERRORS = {"float64": 1e-13, "float32": _FLOAT32_ERROR, "float16": 5e-4, "bfloat16": 4e-3}
_BOUND_SHAPE = (1, 8, 1024, 64)


@dataclass(frozen=True)
class CheckResult:
    """What a check measured.

    Attributes
    ----------
    group : str
        What kind of check it is.
    name : str
        What was checked.
    quantity : str
        What was measured.
    measured : float
        The measurement; NaN if the library refused or failed.
    bound : float
        What it must stay below; 0 demands 0.
    message : str
        The library's error, if there was one.
    """

    group: str
    name: str
    quantity: str
    measured: float
    bound: float
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether the measurement keeps to its bound."""
        return self.measured < self.bound or self.measured == self.bound == 0


@dataclass(frozen=True)
class Check:
    """A check that can be run.

    Attributes
    ----------
    group, name, quantity : str
        As in `CheckResult`.
    bound : float
        As in `CheckResult`.
    measure : callable
        ``(context) -> float``.
    """

    group: str
    name: str
    quantity: str
    bound: float
    measure: Callable[[umfa.MFAContext], float]

    def run(self, context: umfa.MFAContext) -> CheckResult:
        """Run the check.

        Parameters
        ----------
        context : umfa.MFAContext
            Where to compute.

        Returns
        -------
        CheckResult
            What was measured. An error of the library is a failed check, not an exception.
        """
        try:
            measured, message = self.measure(context), ""
        except umfa.MFAError as error:
            measured, message = math.nan, str(error)
        return CheckResult(self.group, self.name, self.quantity, measured, self.bound, message)


def _scores(
    query: np.ndarray,
    key: np.ndarray,
    *,
    scale: float | None = None,
    mask: np.ndarray | None = None,
    causal: bool | str = False,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: np.ndarray | None = None,
    kv_lengths: np.ndarray | None = None,
) -> np.ndarray:
    """The scores of every query row with every key, -inf where it may not look."""
    batch_size, num_heads, seq_len_q, head_dim = query.shape
    seq_len_kv = key.shape[2]
    lengths = np.full(batch_size, seq_len_kv) if kv_lengths is None else kv_lengths
    offsets = lengths - seq_len_q if causal == "lower_right" else np.zeros(batch_size, dtype=np.int64)
    # Position of each key relative to each row's own: [batch, 1, row, column].
    distance = np.arange(seq_len_kv) - np.arange(seq_len_q)[:, None] - offsets[:, None, None, None]

    repeated = np.repeat(key, num_heads // key.shape[1], axis=1)
    scores = (1 / math.sqrt(head_dim) if scale is None else scale) * (query @ repeated.swapaxes(-1, -2))
    if softcap > 0:
        scores = softcap * np.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * np.abs(distance)
    left, right = (-1, -1) if window is None else window
    allowed = np.broadcast_to(np.arange(seq_len_kv) < lengths[:, None, None, None], scores.shape)
    if causal:
        allowed = allowed & (distance <= 0)
    if left >= 0:
        allowed = allowed & (distance >= -left)
    if right >= 0:
        allowed = allowed & (distance <= right)
    if mask is not None and mask.dtype == bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask
    return np.where(allowed, scores, -np.inf)


def _softmax(scores: np.ndarray, sinks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights and logsumexp of each row; a row without a key has weights 0."""
    sink = np.full((*scores.shape[:-1], 1), -np.inf)
    if sinks is not None:
        sink[...] = sinks[:, None, None]
    largest = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    largest = np.where(np.isneginf(largest), 0, largest)
    exponentials = np.exp(scores - largest)
    total = exponentials.sum(axis=-1, keepdims=True) + np.exp(sink - largest)
    with np.errstate(divide="ignore"):
        logsumexp = largest + np.log(total)
    return exponentials / np.where(total > 0, total, 1), logsumexp[..., 0]


def reference_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, *, sinks: np.ndarray | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Compute attention by its formulas, in float64, with the whole score matrix in memory.

    Parameters
    ----------
    query, key, value : ndarray
        ``[batch, heads, tokens, channels]``; key and value may have fewer heads.
    sinks : ndarray, optional
        ``[heads]``.
    **options
        ``scale``, ``mask``, ``causal``, ``window``, ``softcap``, ``alibi_slopes`` and ``kv_lengths``, as in `umfa.attention`.

    Returns
    -------
    output : ndarray of float64
        ``[batch, heads, tokens, channels]``.
    logsumexp : ndarray of float64
        ``[batch, heads, tokens]``.
    """
    query, key, value = (np.asarray(operand, dtype=np.float64) for operand in (query, key, value))
    weights, logsumexp = _softmax(_scores(query, key, **options), sinks)
    return weights @ np.repeat(value, query.shape[1] // value.shape[1], axis=1), logsumexp


def reference_gradients(
    grad_output: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, *, causal: bool | str = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the gradients of attention by their formulas, in float64.

    Parameters
    ----------
    grad_output : ndarray
        ``[batch, heads, tokens, channels]``.
    query, key, value : ndarray
        As in `reference_attention`.
    causal : bool or str
        As in `umfa.attention`.

    Returns
    -------
    tuple of ndarray of float64
        The gradients of query, key and value.
    """
    grad_output, query, key, value = (np.asarray(operand, dtype=np.float64) for operand in (grad_output, query, key, value))
    group = query.shape[1] // key.shape[1]
    keys, values = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    scale = 1 / math.sqrt(query.shape[-1])
    weights, _ = _softmax(_scores(query, key, causal=causal), None)
    grad_weights = grad_output @ values.swapaxes(-1, -2)
    row_sums = np.sum(weights * grad_weights, axis=-1, keepdims=True)
    grad_scores = weights * (grad_weights - row_sums)

    def over_group(gradient: np.ndarray) -> np.ndarray:
        batch_size, num_heads, tokens, channels = gradient.shape
        summed: np.ndarray = gradient.reshape(batch_size, num_heads // group, group, tokens, channels).sum(axis=2)
        return summed

    return (
        scale * (grad_scores @ keys),
        over_group(scale * (grad_scores.swapaxes(-1, -2) @ query)),
        over_group(weights.swapaxes(-1, -2) @ grad_output),
    )


def _operands(*shapes: tuple[int, ...], dtype: Any = np.float32) -> list[np.ndarray]:
    """Standard-normal tensors, the same at every call."""
    generator = np.random.default_rng(20)
    return [generator.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes]


def _rmse(measured: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((measured.astype(np.float64) - expected) ** 2)))


def _relative_rmse(measured: np.ndarray, expected: np.ndarray) -> float:
    return _rmse(measured, expected) / float(np.sqrt(np.mean(expected**2)))


def _differing(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.count_nonzero(left.view(np.uint32) != right.view(np.uint32)))


def _type_checks() -> Iterator[Check]:
    types: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "float64": np.float64}
    if importlib.util.find_spec("ml_dtypes") is not None:
        import ml_dtypes

        types["bfloat16"] = ml_dtypes.bfloat16
    for name, dtype in types.items():

        def measure(context: umfa.MFAContext, dtype: Any = dtype) -> float:
            q, k, v = _operands((2, 4, 65, 64), (2, 4, 97, 64), (2, 4, 97, 48), dtype=dtype)
            expected, _ = reference_attention(q, k, v)
            return _relative_rmse(umfa.attention(q, k, v, context=context), expected)

        yield Check("types", name, "relative RMSE", _TYPE_ERRORS[name], measure)


def _option_checks() -> Iterator[Check]:
    generator = np.random.default_rng(21)
    lengths = np.array([0, 41], dtype=np.int64)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], dtype=np.float32)
    cases: dict[str, dict[str, Any]] = {
        "causal, upper left": {"causal": True},
        "causal, lower right": {"causal": "lower_right"},
        "sliding window": {"window": (9, 4)},
        "boolean mask": {"mask": generator.random((2, 1, 33, 70)) < 0.7},
        "additive mask": {"mask": generator.standard_normal((1, 4, 33, 70), dtype=np.float32)},
        "lengths, NaN beyond": {"kv_lengths": lengths},
        "softcap": {"softcap": 1.5},
        "ALiBi": {"alibi_slopes": slopes},
        "sinks": {"sinks": slopes * 4},
        "scale": {"scale": -0.3},
        "all together": {
            "causal": "lower_right",
            "window": (30, -1),
            "mask": generator.random((2, 1, 33, 70)) < 0.9,
            "kv_lengths": np.array([70, 52], dtype=np.int64),
            "softcap": 3.0,
            "alibi_slopes": slopes,
            "sinks": slopes,
        },
    }
    for name, options in cases.items():

        def measure(context: umfa.MFAContext, options: dict[str, Any] = options) -> float:
            # Two query heads share a key/value head.
            q, k, v = _operands((2, 4, 33, 32), (2, 2, 70, 32), (2, 2, 70, 32))
            expected, _ = reference_attention(q, k, v, **options)
            if options.get("kv_lengths") is lengths:
                k[1, :, 41:] = v[1, :, 41:] = np.nan
            return _relative_rmse(umfa.attention(q, k, v, context=context, **options), expected)

        yield Check("options", name, "relative RMSE", _FLOAT32_ERROR, measure)

    def measure_logsumexp(context: umfa.MFAContext) -> float:
        q, k, v = _operands((2, 4, 33, 32), (2, 2, 70, 32), (2, 2, 70, 32))
        _, expected = reference_attention(q, k, v)
        _, logsumexp = umfa.attention(q, k, v, return_lse=True, context=context)
        largest = np.abs(_scores(q.astype(np.float64), k.astype(np.float64))).max(axis=-1)
        return float(np.max(np.abs(logsumexp - expected) / np.maximum(np.maximum(np.abs(expected), largest), 1)))

    yield Check("options", "logsumexp", "relative error", _LSE_ERROR, measure_logsumexp)


def _gradient_checks() -> Iterator[Check]:
    for position, name in enumerate(("query", "key", "value")):

        def measure(context: umfa.MFAContext, position: int = position, name: str = name) -> float:
            q, k, v, grad_output = _operands((2, 4, 33, 32), (2, 2, 70, 32), (2, 2, 70, 32), (2, 4, 33, 32))
            output, logsumexp = umfa.attention(q, k, v, causal="lower_right", return_lse=True, context=context)
            (gradient,) = umfa.attention_backward(
                grad_output, q, k, v, output, logsumexp, causal="lower_right", gradients=(name,), context=context
            )
            expected = reference_gradients(grad_output, q, k, v, causal="lower_right")[position]
            return _relative_rmse(gradient, expected)

        yield Check("gradients", name, "relative RMSE", _GRADIENT_ERROR, measure)


def _determinism_checks() -> Iterator[Check]:
    def measure_threads(context: umfa.MFAContext) -> float:
        q, k, v = _operands((2, 4, 130, 64), (2, 4, 257, 64), (2, 4, 257, 64))
        with umfa.MFAContext(device=context.device, num_threads=1) as one, umfa.MFAContext(device=context.device, num_threads=3) as three:
            return _differing(umfa.attention(q, k, v, context=one), umfa.attention(q, k, v, context=three))

    def measure_strides(context: umfa.MFAContext) -> float:
        (packed,) = _operands((2, 129, 3, 4, 64))
        views = [packed[:, :, index] for index in range(3)]
        strided = umfa.attention(*views, layout="bshd", context=context)
        contiguous = umfa.attention(*(np.ascontiguousarray(view) for view in views), layout="bshd", context=context)
        return _differing(strided, contiguous)

    yield Check("determinism", "1 and 3 threads", "different elements", 0.0, measure_threads)
    yield Check("determinism", "strided and contiguous", "different elements", 0.0, measure_strides)


def _configuration(dtype: str, granularity: str | None) -> umfa.QuantizationConfig | str:
    """One granularity for all operands; None: what the dtype's name alone stands for."""
    if granularity is None:
        return dtype
    scheme = umfa.QuantizationScheme(dtype, granularity)
    return umfa.QuantizationConfig(scheme, scheme, scheme)


def _quantisation_checks() -> Iterator[Check]:
    """Attention on codes against attention on the numbers that they stand for: only the weights' rounding is left."""
    for dtype in ("int8", "int4"):
        for granularity in ("tensor", "token"):

            def measure(context: umfa.MFAContext, dtype: str = dtype, granularity: str = granularity) -> float:
                operands = _operands((2, 4, 65, 64), (2, 4, 97, 64), (2, 4, 97, 64))
                quantized = [umfa.quantize(operand, dtype, granularity) for operand in operands]
                expected, _ = reference_attention(*(tensor.dequantize() for tensor in quantized))
                return _relative_rmse(umfa.attention(*quantized, context=context), expected)

            yield Check("quantised operands", f"{dtype}, {granularity} scales", "relative RMSE", 0.016, measure)


def _bound_checks() -> Iterator[Check]:
    """The published bounds: float inputs, quantised by the call, against float64 attention on the inputs as they were."""
    cases: list[tuple[str, str | None, str, float]] = [
        ("int8", "tensor", "absolute RMSE", 0.002),
        ("int8", "token", "absolute RMSE", 0.002),
        ("int8", "token", "relative RMSE", 0.016),
        ("int8", None, "relative RMSE", 0.016),
        ("int4", "tensor", "absolute RMSE", 0.02),
        ("int4", None, "relative RMSE", 0.15),
    ]
    expected: list[np.ndarray] = []
    for dtype, granularity, quantity, bound in cases:

        def measure(context: umfa.MFAContext, dtype: str = dtype, granularity: str | None = granularity, quantity: str = quantity) -> float:
            operands = _operands(_BOUND_SHAPE, _BOUND_SHAPE, _BOUND_SHAPE)
            if not expected:
                expected.append(reference_attention(*operands)[0])
            output = umfa.attention(*operands, quantize=_configuration(dtype, granularity), context=context)
            return (_rmse if quantity == "absolute RMSE" else _relative_rmse)(output, expected[0])

        scheme = "default scheme" if granularity is None else f"{granularity} scales"
        yield Check("error bounds, (1, 8, 1024, 64)", f"{dtype}, {scheme}", quantity, bound, measure)


def checks() -> list[Check]:
    """List all checks.

    Returns
    -------
    list of Check
        In the order of the table.
    """
    groups = (_type_checks, _option_checks, _gradient_checks, _determinism_checks, _quantisation_checks, _bound_checks)
    return [check for group in groups for check in group()]


def run_checks(context: umfa.MFAContext | None = None, progress: Callable[[CheckResult], None] | None = None) -> list[CheckResult]:
    """Run all checks.

    Parameters
    ----------
    context : umfa.MFAContext, optional
        Where to compute; by default a new context on the default device.
    progress : callable, optional
        Called with each result.

    Returns
    -------
    list of CheckResult
        One a check.
    """
    if context is None:
        with umfa.MFAContext() as own:
            return run_checks(own, progress)
    results = []
    for check in checks():
        results.append(check.run(context))
        if progress is not None:
            progress(results[-1])
    return results
