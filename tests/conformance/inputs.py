"""The inputs of conformance cases, as inputs.h makes them."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

QUERY, KEY, VALUE, GRAD_OUTPUT, GRAD_LOGSUMEXP, MASK, SINKS, ALIBI_SLOPES = range(8)
SCALES, ZERO_POINTS, CHANNEL_MEANS = 16, 32, 48
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def words(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """The word of each place of a tensor."""
    with np.errstate(over="ignore"):
        index = np.arange(math.prod(shape), dtype=np.uint64)
        z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(((seed * 256 + stream) * 0xBF58476D1CE4E5B9) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z ^ (z >> np.uint64(31))).reshape(shape)


def _high(word: np.ndarray, bits: int) -> np.ndarray:
    return (word >> np.uint64(64 - bits)).astype(np.int64)


def _sum(word: np.ndarray) -> np.ndarray:
    return sum((word >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64) for shift in (0, 16, 32, 48))


def reals(seed: int, stream: int, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Nearly normal numbers that the dtype holds exactly."""
    total = _sum(words(seed, stream, shape))
    exact = (total - 131070) * 2.0**-15 if dtype in ("float32", "float64") else ((total >> 10) - 128) * 2.0**-5
    return exact.astype(DTYPES[dtype])


def codes(seed: int, stream: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Codes as int64."""
    word = words(seed, stream, shape)
    return _high(word, 8) - 128 if dtype == "int8" else _high(word, 4) - 8


def scales(seed: int, operand: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Scales of an operand: 0, 1 or 2."""
    return ((8 + _high(words(seed, SCALES + operand, shape), 3)) * (2.0**-8 if dtype == "int8" else 2.0**-5)).astype(np.float32)


def zero_points(seed: int, operand: int, shape: tuple[int, ...]) -> np.ndarray:
    """Zero points of an operand."""
    return (_high(words(seed, ZERO_POINTS + operand, shape), 3) - 4).astype(np.int32)


def mask(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A mask: three quarters attend, or an eighth is excluded."""
    if dtype == "bool":
        return _high(words(seed, MASK, shape), 2) != 0
    numbers = reals(seed, MASK, shape, dtype)
    numbers[_high(words(seed, MASK, shape), 3) == 0] = -np.inf
    return numbers


def slopes(seed: int, count: int, dtype: str = "float32") -> np.ndarray:
    """Slopes of heads."""
    return ((1 + _high(words(seed, ALIBI_SLOPES, (count,)), 3)) * 2.0**-4).astype(DTYPES[dtype])


def hash_of(array: np.ndarray) -> str:
    """The hash of an array's bytes in memory order: h = h * prime + byte, in 64 bits."""
    content = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).astype(np.uint64)
    with np.errstate(over="ignore"):
        powers = np.full(content.size + 1, 0x100000001B3, np.uint64)
        powers[0] = 1
        powers = np.multiply.accumulate(powers)
        value = np.uint64(0xCBF29CE484222325) * powers[-1] + (content * powers[-2::-1] if content.size else content).sum(dtype=np.uint64)
    return f"{int(value):016x}"
