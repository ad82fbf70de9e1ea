"""How far a result may be from the float64 reference: bounds from the arithmetic, element by element, not numbers that happened to pass.

u is the unit roundoff of an arithmetic. A sum of n products x*y, computed in any order, is off by about u * (4 + sqrt(n)) * sum(abs(x*y)):
the square root because roundings are independent, the 4 for the roundings of the factors and of what is done to the sum. Errors go through
the formulas to first order:

    e_s  = u * ((4 + sqrt(head_dim)) * sum(abs(softmax_scale * q * k)) + 4 * (abs(capped c) + abs(mask) + abs(slope * distance)))
    p    is off by 2 * e * p, where e is the largest e_s of the row (its own score's error and that of logsumexp)
    O    is off by 2 * e * sum(p * abs(V)) + u * (4 + sqrt(columns)) * sum(p * abs(V)) + u_out * abs(O)

and so on through backward. `SLACK` multiplies the whole.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

import reference

UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
SMALLEST = {
    "float32": float(np.finfo(np.float32).tiny),
    "float16": 2.0**-24,
    "bfloat16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).tiny),
    "float64": float(np.finfo(np.float64).tiny),
}
SLACK = 2.0


def _products(left: np.ndarray, right: np.ndarray, unit: float) -> np.ndarray:
    """The error of left @ right of arrays that are not negative."""
    return unit * (4 + np.sqrt(left.shape[-1])) * (left @ right)


class Bounds:
    """The bounds of one problem, forward and backward.

    `unit` is the roundoff of the arithmetic that the kernels use, `dtype` the name of the output's type.
    """

    def __init__(self, query, key, value, options: reference.Options, *, arithmetic: str = "float32", dtype: str = "float32"):
        self.unit = UNIT[arithmetic]
        self.options = options
        self._query, self._key, self._value = query, key, value
        self.query, num_heads = np.abs(query), query.shape[1]
        self.num_kv_heads = key.shape[1]
        self.key = np.repeat(np.abs(key), num_heads // key.shape[1], axis=1)
        self.value = np.repeat(np.abs(value), num_heads // key.shape[1], axis=1)
        self.at = reference.forward(query, key, value, options)
        at, u = self.at, self.unit
        self.scale = abs(options.softmax_scale)

        capped = np.minimum(np.abs(at.products), options.softcap) if options.softcap > 0 else np.abs(at.products)
        bias = np.zeros_like(at.products)
        if options.mask is not None and np.asarray(options.mask).dtype != bool:
            bias = bias + np.abs(np.asarray(options.mask, np.float64))
        if options.alibi_slopes is not None:
            bias = bias + np.abs(np.asarray(options.alibi_slopes, np.float64))[:, None, None] * np.abs(at.distances)
        score_error = _products(self.scale * self.query, np.swapaxes(self.key, -1, -2), u) + 4 * u * (capped + bias)
        # Of a row: the error of any attended score, and so of logsumexp.
        self.row_error = np.where(at.attended, score_error, 0).max(axis=-1, initial=0)[..., None]
        self.scores = np.where(at.attended, np.abs(at.scores), 0).max(axis=-1, initial=0)

        weights = at.dropout * at.weights
        self.output_error = 2 * self.row_error * (weights @ self.value) + _products(weights, self.value, u)
        self.output_error += UNIT[dtype] * np.abs(at.output)
        # Weights below the smallest normal number may be flushed.
        self.smallest = SMALLEST[arithmetic]
        flushed = self.smallest * (at.attended * at.dropout) @ self.value
        self.output = SLACK * self.output_error + flushed + SMALLEST[dtype]
        relative = 1e-5 if arithmetic == "float32" else 1e-13
        lse = np.where(np.isfinite(at.logsumexp), np.abs(at.logsumexp), 0)
        self.logsumexp = relative * np.maximum(1, np.maximum(lse, self.scores))

    def gradients(self, grad_output, grad_logsumexp=None, *, dtypes: dict[str, str] | None = None) -> dict[str, np.ndarray]:
        """Bounds of each gradient, by name; `dtypes` are the types that gradients are written in (float32 where absent)."""
        at, u, options = self.at, self.unit, self.options
        grad_output_size = np.abs(grad_output)
        change = 0.0 if grad_logsumexp is None else grad_logsumexp
        saturation = np.tanh(at.products / options.softcap) if options.softcap > 0 else np.zeros_like(at.products)
        value = np.repeat(self._value, self.query.shape[1] // self.num_kv_heads, axis=1)
        grad_weights = at.dropout * (grad_output @ np.swapaxes(value, -1, -2))
        weights_error = at.dropout * _products(grad_output_size, np.swapaxes(self.value, -1, -2), u)
        d_values = (at.weights * grad_weights).sum(axis=-1)
        # d_values may come from the output as it was rounded, or from Q, K and V.
        size = (at.weights * np.abs(grad_weights)).sum(axis=-1)
        d_error = (at.weights * weights_error).sum(axis=-1) + (2 * self.row_error[..., 0] + u * (4 + np.sqrt(at.weights.shape[-1]))) * size
        d_error += (grad_output_size * self.output_error).sum(axis=-1)
        d_error += u * (4 + np.sqrt(grad_output.shape[-1])) * (grad_output_size * np.abs(at.output)).sum(axis=-1)

        difference = grad_weights + (change - d_values)[..., None]
        sizes = np.abs(grad_weights) + (np.abs(change) + np.abs(d_values))[..., None]
        grad_scores = at.weights * difference
        scores_error = at.weights * ((2 * self.row_error + 8 * u) * np.abs(difference) + weights_error + d_error[..., None] + 2 * u * sizes)
        # Weights, and products with them, below the smallest normal number may be flushed.
        scores_error += 4 * self.smallest * at.attended * (1 + sizes)
        slope = 1 - saturation**2
        cap_error = 8 * u + (2 * np.abs(saturation) * slope * self.row_error / options.softcap if options.softcap > 0 else 0)
        products_error = scores_error * slope + np.abs(grad_scores) * cap_error
        grad_products = np.abs(grad_scores) * slope
        dropped = at.dropout * at.weights

        def transposed(matrix):
            return np.swapaxes(matrix, -1, -2)

        def grouped(matrix):
            return reference._sum_groups(matrix, self.num_kv_heads)

        bounds = {
            "query": self.scale * (products_error @ self.key + _products(grad_products, self.key, u)),
            "key": self.scale * grouped(transposed(products_error) @ self.query + _products(transposed(grad_products), self.query, u)),
            "value": grouped(
                transposed(dropped * (2 * self.row_error + 4 * u) + self.smallest * at.dropout * at.attended) @ grad_output_size
                + _products(transposed(dropped), grad_output_size, u)
            ),
        }
        summed = u * (4 + np.sqrt(grad_scores.size))
        if options.mask is not None and np.asarray(options.mask).dtype != bool:
            bounds["mask"] = reference.sum_to_shape(scores_error + summed * np.abs(grad_scores), np.shape(options.mask))
        if options.alibi_slopes is not None:
            distance = np.abs(at.distances)
            bounds["alibi_slopes"] = ((scores_error + summed * np.abs(grad_scores)) * distance).sum(axis=(0, 2, 3))
        if options.sinks is not None:
            size = np.abs(change - d_values)
            bounds["sinks"] = (at.sink_weights * ((2 * self.row_error[..., 0] + 8 * u + summed) * size + d_error)).sum(axis=(0, 2))
        exact = reference.backward(self._query, self._key, self._value, grad_output, options, grad_logsumexp)
        for name in bounds:
            dtype = (dtypes or {}).get(name, "float32")
            bounds[name] = SLACK * (bounds[name] + UNIT[dtype] * np.abs(exact[name])) + SMALLEST[dtype]
        return bounds


def assert_within(got, expected, bound, what: str = "result") -> None:
    """Every element is within its bound, and NaN, Inf or what the type cannot hold are where they are expected."""
    got, expected = np.asarray(got), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    with np.errstate(all="ignore"):
        held = expected.astype(got.dtype)
    got, finite = got.astype(np.float64), np.isfinite(held.astype(np.float64))
    mismatch = finite != np.isfinite(got)
    assert not mismatch.any(), (
        f"{what}: finite differs at {np.argwhere(mismatch)[:5].tolist()}: {got[mismatch][:5]} for {expected[mismatch][:5]}"
    )
    assert np.isfinite(np.broadcast_to(bound, got.shape)[finite]).all(), f"{what}: the bound says nothing"
    difference = np.where(finite, np.abs(np.where(finite, got, 0) - np.where(finite, expected, 0)), 0)
    excess = difference > bound
    if excess.any():
        worst = np.unravel_index(np.argmax(np.where(excess, difference / np.broadcast_to(bound, difference.shape), 0)), difference.shape)
        limit = np.broadcast_to(bound, difference.shape)[worst]
        raise AssertionError(
            f"{what}: {excess.sum()} of {excess.size} elements are off, worst at {tuple(map(int, worst))}: "
            f"{got[worst]!r} for {expected[worst]!r}, off by {difference[worst]:.3g} where {limit:.3g} is allowed"
        )
