"""Attention, its gradients and quantisation in plain NumPy: the formulas of docs/numerics.md, written down once more and independently.

Attention works in float64 on arrays ``[batch, heads, tokens, channels]``, and materialises every matrix that it speaks of: it is meant to
be read, not to be fast. Quantisation works in float32, one rounding an operation, because it is defined bit by bit.

Only what is attended takes part in a sum. Whatever is excluded is left out rather than multiplied by 0, so that no NaN of a masked value
comes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray

INT_RANGE = {"int8": 127, "int4": 7}
INT_LIMITS = {"int8": (-128, 127), "int4": (-8, 7)}


# ---- Attention ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Everything about a problem that is not Q, K or V."""

    softmax_scale: float
    softcap: float = 0.0
    mask: Array | None = None
    causal: bool = False
    lower_right: bool = False
    query_offset: int | Sequence[int] | None = None
    window: tuple[int, int] = (-1, -1)
    kv_lengths: Sequence[int] | None = None
    alibi_slopes: Array | None = None
    sinks: Array | None = None
    dropout_p: float = 0.0
    seed: int = 0
    dropout_offset: int = 0


@dataclass(frozen=True)
class Forward:
    """Results of `forward` and the matrices on the way to them, ``[batch, num_heads, seq_len_q, seq_len_kv]``."""

    output: Array
    logsumexp: Array
    products: Array  # c of the formulas
    scores: Array  # s, meaningful where attended
    attended: Array
    distances: Array  # i + off - j, [batch, 1, seq_len_q, seq_len_kv]
    weights: Array  # p, 0 where not attended
    sink_weights: Array  # what the sink takes of each row, [batch, num_heads, seq_len_q]
    dropout: Array  # 0, 1 or 1 / (1 - dropout_p)


def offsets(rows: int, lengths: Array, options: Options) -> Array:
    """off of each sequence."""
    if options.query_offset is not None:
        return np.broadcast_to(np.asarray(options.query_offset, np.int64), lengths.shape)
    return lengths - rows if options.lower_right else np.zeros_like(lengths)


def weighted_sum(weights: Array, attended: Array, values: Array) -> Array:
    """sum_j weights[i,j] * values[j,:] over the attended j. A value that is not finite makes every row that attends it NaN."""
    finite = np.isfinite(values)
    total = np.where(attended, weights, 0.0) @ np.where(finite, values, 0.0)
    reached = attended.astype(np.float64) @ (~finite).astype(np.float64) > 0
    return np.where(reached, np.nan, total)


def _repeat_heads(tensor: Array, num_heads: int) -> Array:
    return np.repeat(tensor, num_heads // tensor.shape[1], axis=1)


def _sum_groups(gradient: Array, num_kv_heads: int) -> Array:
    batch, heads, tokens, channels = gradient.shape
    return gradient.reshape(batch, num_kv_heads, heads // num_kv_heads, tokens, channels).sum(axis=2)


def _transposed(matrix: Array) -> Array:
    return np.swapaxes(matrix, -1, -2)


def forward(query: Array, key: Array, value: Array, options: Options) -> Forward:
    """Output and logsumexp."""
    query, key, value = (np.asarray(tensor, np.float64) for tensor in (query, key, value))
    batch, num_heads, rows, _ = query.shape
    columns = key.shape[2]
    shape = (batch, num_heads, rows, columns)
    key, value = _repeat_heads(key, num_heads), _repeat_heads(value, num_heads)
    lengths = np.full(batch, columns, np.int64) if options.kv_lengths is None else np.asarray(options.kv_lengths, np.int64)

    with np.errstate(all="ignore"):
        products = options.softmax_scale * (query @ _transposed(key))
        scores = options.softcap * np.tanh(products / options.softcap) if options.softcap > 0 else products

        positions = np.arange(rows)[:, None] + offsets(rows, lengths, options)[:, None, None, None]
        distances = positions - np.arange(columns)
        attended = np.broadcast_to(np.arange(columns) < lengths[:, None, None, None], shape).copy()
        if options.causal:
            attended &= distances >= 0
        left, right = options.window
        if left >= 0:
            attended &= distances <= left
        if right >= 0:
            attended &= distances >= -right
        if options.mask is not None:
            mask = np.asarray(options.mask)
            if mask.dtype == bool:
                attended &= mask
            else:
                mask = mask.astype(np.float64)
                attended &= mask != -np.inf
                scores = scores + mask
        if options.alibi_slopes is not None:
            scores = scores - np.asarray(options.alibi_slopes, np.float64)[:, None, None] * np.abs(distances).astype(np.float64)

        sinks = np.full(num_heads, -np.inf) if options.sinks is None else np.asarray(options.sinks, np.float64)
        sinks = np.broadcast_to(sinks[:, None], shape[:3])
        highest = np.maximum(np.where(attended, scores, -np.inf).max(axis=-1, initial=-np.inf), sinks)
        reference = np.where(np.isfinite(highest), highest, 0.0)
        total = np.where(attended, np.exp(scores - reference[..., None]), 0.0).sum(axis=-1) + np.exp(sinks - reference)
        logsumexp = np.log(total) + reference
        # exp(s - logsumexp), but for scores so large that they swallow the logarithm of the sum.
        weights = np.where(attended, np.exp(scores - reference[..., None]) / total[..., None], 0.0)
        sink_weights = np.where(sinks == -np.inf, 0.0, np.exp(sinks - reference) / total)
        dropout = dropout_factors(shape, options)
        output = weighted_sum(dropout * weights, attended, value)
    return Forward(output, logsumexp, products, scores, attended, distances, weights, sink_weights, dropout)


def backward(
    query: Array, key: Array, value: Array, grad_output: Array, options: Options, grad_logsumexp: Array | None = None
) -> dict[str, Array]:
    """Gradients under the names "query", "key", "value", "mask", "sinks", "alibi_slopes", and "d_values"; those that there are."""
    query, key, value, grad_output = (np.asarray(tensor, np.float64) for tensor in (query, key, value, grad_output))
    at = forward(query, key, value, options)
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    key, value = _repeat_heads(key, num_heads), _repeat_heads(value, num_heads)
    attended, transposed = at.attended, _transposed(at.attended)
    grad_logsumexp = np.zeros_like(at.logsumexp) if grad_logsumexp is None else np.asarray(grad_logsumexp, np.float64)

    with np.errstate(all="ignore"):
        saturation = np.tanh(at.products / options.softcap) if options.softcap > 0 else np.zeros_like(at.products)
        grad_weights = at.dropout * (grad_output @ _transposed(value))
        d_values = np.where(attended, at.weights * grad_weights, 0.0).sum(axis=-1)
        change = (grad_logsumexp - d_values)[..., None]
        grad_scores = np.where(attended, at.weights * (grad_weights + change), 0.0)
        grad_products = np.where(attended, grad_scores * (1 - saturation**2), 0.0)

        grad_key = weighted_sum(_transposed(grad_products), transposed, query)
        grad_value = weighted_sum(_transposed(at.dropout * at.weights), transposed, grad_output)
        gradients = {
            "query": options.softmax_scale * weighted_sum(grad_products, attended, key),
            "key": options.softmax_scale * _sum_groups(grad_key, num_kv_heads),
            "value": _sum_groups(grad_value, num_kv_heads),
            "d_values": d_values,
        }
        if options.mask is not None and np.asarray(options.mask).dtype != bool:
            gradients["mask"] = sum_to_shape(grad_scores, np.shape(options.mask))
        if options.sinks is not None:
            terms = at.sink_weights * (grad_logsumexp - d_values)
            no_sink = np.asarray(options.sinks, np.float64)[:, None] == -np.inf
            gradients["sinks"] = np.where(no_sink, 0.0, terms).sum(axis=(0, 2))
        if options.alibi_slopes is not None:
            terms = np.where(attended, grad_scores * np.abs(at.distances).astype(np.float64), 0.0)
            gradients["alibi_slopes"] = -terms.sum(axis=(0, 2, 3))
    return gradients


def sum_to_shape(matrix: Array, shape: tuple[int, ...]) -> Array:
    """`matrix` summed over the axes along which `shape` broadcasts to it."""
    padded = (1,) * (matrix.ndim - len(shape)) + tuple(shape)
    axes = tuple(axis for axis, size in enumerate(padded) if size == 1)
    return matrix.sum(axis=axes, keepdims=True).reshape(shape)


# ---- Dropout -----------------------------------------------------------------------------------------------------------------------------


def philox(counter: Sequence[Array], key: tuple[int, int]) -> list[Array]:
    """Philox4x32-10 (Salmon et al. 2011) of arrays of 32-bit counters, held as uint64."""
    low_mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    words = [np.asarray(word, np.uint64) for word in counter]
    first_key, second_key = key
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [
            (second >> shift) ^ words[1] ^ np.uint64(first_key),
            second & low_mask,
            (first >> shift) ^ words[3] ^ np.uint64(second_key),
            first & low_mask,
        ]
        first_key = (first_key + 0x9E3779B9) & 0xFFFFFFFF
        second_key = (second_key + 0xBB67AE85) & 0xFFFFFFFF
    return words


def dropout_factors(shape: tuple[int, int, int, int], options: Options) -> Array:
    """drop of the formulas."""
    if options.dropout_p == 0:
        return np.ones(shape)
    batch, num_heads, rows, columns = shape
    heads = (np.arange(batch * num_heads, dtype=np.uint64) & np.uint64(0xFFFFFFFF)).reshape(batch, num_heads, 1, 1)
    column = np.arange(columns, dtype=np.uint64)
    counter = np.broadcast_arrays(
        column >> np.uint64(2), np.arange(rows, dtype=np.uint64)[:, None], heads, np.uint64(options.dropout_offset)
    )
    words = np.stack(philox(counter, (options.seed & 0xFFFFFFFF, options.seed >> 32)), axis=-1)
    word = np.take_along_axis(words, np.broadcast_to((column & np.uint64(3)).astype(np.int64), shape)[..., None], axis=-1)[..., 0]
    kept = word >= np.uint64(int(options.dropout_p * 2.0**32))
    return np.where(kept, 1 / (1 - options.dropout_p) if options.dropout_p < 1 else 0.0, 0.0)


# ---- Quantisation ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """Codes as int64 ``[B, H, S, D]`` and what gives them a meaning, in the shapes of the granularity."""

    codes: Array
    scales: Array
    zero_points: Array | None
    channel_means: Array | None
    granularity: str
    block_size: int = 0
    group_size: int = 0
    rotated: bool = False


def rotate(values: Array) -> Array:
    """The Walsh-Hadamard transform of each block of channels, in float32; its own inverse."""
    channels = values.shape[-1]
    size = channels & -channels
    blocks = np.array(values, np.float32).reshape(*values.shape[:-1], channels // size, size)
    distance = 1
    while distance < size:
        pairs = blocks.reshape(*blocks.shape[:-1], size // (2 * distance), 2, distance)
        first, second = pairs[..., 0, :].copy(), pairs[..., 1, :].copy()
        pairs[..., 0, :] = first + second
        pairs[..., 1, :] = first - second
        distance *= 2
    return (blocks * np.float32(1 / np.sqrt(size))).reshape(values.shape)


def scale_shape(shape: tuple[int, ...], granularity: str, block_size: int = 0, group_size: int = 0) -> tuple[int, ...]:
    """The shape of scales and zero points."""
    batch, heads, tokens, channels = shape
    return {
        "tensor": lambda: (),
        "head": lambda: (batch, heads),
        "token": lambda: (batch, heads, tokens),
        "block": lambda: (batch, heads, -(-tokens // block_size)),
        "channel": lambda: (batch, heads, channels),
        "group": lambda: (batch, heads, tokens, -(-channels // group_size)),
    }[granularity]()


def scale_index(shape: tuple[int, ...], granularity: str, block_size: int = 0, group_size: int = 0) -> Array:
    """For each element of a tensor, the index of its scale in the flattened scales."""
    scales = np.arange(int(np.prod(scale_shape(shape, granularity, block_size, group_size), dtype=np.int64)))
    scales = scales.reshape(scale_shape(shape, granularity, block_size, group_size))
    token, channel = np.arange(shape[2]), np.arange(shape[3])
    expanded = {
        "tensor": lambda: scales.reshape(1, 1, 1, 1),
        "head": lambda: scales[:, :, None, None],
        "token": lambda: scales[:, :, :, None],
        "block": lambda: scales[:, :, token // block_size, None],
        "channel": lambda: scales[:, :, None, :],
        "group": lambda: scales[:, :, :, channel // group_size],
    }[granularity]()
    return np.broadcast_to(expanded, shape)


def quantize(
    values: Array,
    dtype: str,
    granularity: str = "tensor",
    *,
    block_size: int = 0,
    group_size: int = 0,
    symmetric: bool = True,
    smooth: bool = False,
    rotated: bool = False,
) -> Quantized:
    """Codes, scales, zero points and means, bit for bit; ValueError where a value that takes part is not finite."""
    with np.errstate(all="ignore"):
        real = np.asarray(values).astype(np.float32)
        if rotated:
            real = rotate(real)
        means = None
        if smooth:
            means = np.zeros((real.shape[0], real.shape[1], real.shape[3]), np.float64)
            for token in range(real.shape[2]):
                means += real[:, :, token, :].astype(np.float64)
            means = (means / real.shape[2] if real.shape[2] else means).astype(np.float32)
            real = real - means[:, :, None, :]
    if not np.isfinite(real).all():
        raise ValueError("a value that takes part is not finite")

    shape = scale_shape(real.shape, granularity, block_size, group_size)
    index = scale_index(real.shape, granularity, block_size, group_size)
    count = int(np.prod(shape, dtype=np.int64))
    # The lowest and highest value of each scale. 0 takes part, as it does in both definitions.
    low, high = np.zeros(count, np.float32), np.zeros(count, np.float32)
    np.minimum.at(low, index.ravel(), real.ravel())
    np.maximum.at(high, index.ravel(), real.ravel())
    minimum, maximum = INT_LIMITS[dtype]
    limit = INT_RANGE[dtype]
    with np.errstate(all="ignore"):
        if symmetric:
            scales = np.maximum(-low, high) / np.float32(limit)
            zero_points = np.zeros(count, np.int64)
            minimum = -limit
        else:
            steps = np.float32(maximum - minimum)
            scales = high / steps - low / steps
            zero_points = np.clip(minimum - np.rint(low / scales).astype(np.float64), minimum, maximum)
        degenerate = scales < np.finfo(np.float32).tiny
        scales = np.where(degenerate, np.float32(1), scales).astype(np.float32)
        zero_points = np.where(degenerate, 0, np.nan_to_num(zero_points)).astype(np.int64)
        codes = np.rint(real / scales[index]).astype(np.int64) + zero_points[index]
        codes = np.where(degenerate[index], 0, np.clip(codes, minimum, maximum))
    return Quantized(
        codes,
        scales.reshape(shape),
        None if symmetric else zero_points.astype(np.int32).reshape(shape),
        means,
        granularity,
        block_size,
        group_size,
        rotated,
    )


def dequantize(quantized: Quantized) -> Array:
    """The real values that codes stand for, in float32, bit for bit."""
    codes = np.asarray(quantized.codes, np.int64)
    index = scale_index(codes.shape, quantized.granularity, quantized.block_size, quantized.group_size)
    scales = np.asarray(quantized.scales, np.float32).ravel()
    differences = codes
    if quantized.zero_points is not None:
        differences = codes - np.asarray(quantized.zero_points, np.int64).ravel()[index]
    with np.errstate(all="ignore"):
        values = scales[index] * differences.astype(np.float32)
        if quantized.channel_means is not None:
            values = values + np.asarray(quantized.channel_means, np.float32)[:, :, None, :]
        return rotate(values) if quantized.rotated else values


def pack_int4(codes: Array) -> Array:
    """Two codes a byte along the last axis, the even one in the low nibble; a pad nibble is 0."""
    codes = np.asarray(codes, np.int64)
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return ((codes[..., 0::2] & 15) | ((codes[..., 1::2] & 15) << 4)).astype(np.uint8)


def unpack_int4(packed: Array, channels: int) -> Array:
    """The codes of `pack_int4`, as int64."""
    packed = np.asarray(packed, np.int64)
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., :channels]
    return np.where(nibbles >= 8, nibbles - 16, nibbles)


# ---- What a test compares with -----------------------------------------------------------------------------------------------------------


def codes_of(quantized: Any, channels: int) -> Array:
    """The codes of a ``umfa.QuantizedTensor``, unpacked."""
    data = np.asarray(quantized.data)
    return unpack_int4(data, channels) if data.dtype == np.uint8 else data.astype(np.int64)
