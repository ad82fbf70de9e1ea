"""Writes quantization.jsonl: what quantising and dequantising must give, bit for bit.

    python tests/vectors/generate_quantization.py [--check]

Each line is one case, an object of JSON. Tensors are contiguous ``[batch, heads, tokens, channels]``; arrays are hexadecimal, the bytes in
the order of a little-endian machine. ``--check`` compares with the file instead of writing it.

| field | meaning |
| --- | --- |
| name | what the case is about |
| kind | "quantize": input to all that follows; "refuse": the input must be refused; "dequantize": codes to dequantized alone |
| input_type, input | float32, float16, bfloat16 or float64, and the elements |
| shape | batch, heads, tokens, channels |
| lengths | null, or how many tokens of each sequence take part; the codes of the others are 0 here |
| dtype, granularity, block_size, group_size, symmetric, smooth, rotate | the scheme |
| codes | INT8: a byte each. INT4: rows of ceil(channels / 2) bytes |
| scales, zero_points, channel_means | float32, int32 or null, float32 or null, in the shapes of the granularity |
| dequantized | float32 |

The values come from reference.py, which works in NumPy's float32; verify_quantization.c computes them again in C.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

DIRECTORY = Path(__file__).resolve().parent
sys.path.insert(0, str(DIRECTORY.parent))

import reference  # noqa: E402 - lies beside this directory, which is no package

FILE = DIRECTORY / "quantization.jsonl"
GRANULARITIES = ("tensor", "head", "token", "block", "channel", "group")
SIZES = {"block": {"block_size": 3}, "group": {"group_size": 4}}
SMALLEST_NORMAL = 2.0**-126


def numbers(seed: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bell-shaped numbers of about unit size, the same for ever: from a hash, not from a library's generator."""
    count = int(np.prod(shape))
    uniform = np.frombuffer(hashlib.shake_256(seed.encode()).digest(8 * count), "<u2").reshape(count, 4)
    return ((uniform.astype(np.float64).sum(axis=1) - 4 * 32767.5) / 37837).reshape(shape)


def as_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Elements of an input type; bfloat16, which NumPy does not have, as its upper 16 bits of float32, rounded to even."""
    with np.errstate(over="ignore"):
        if kind != "bfloat16":
            return values.astype(np.dtype(kind).newbyteorder("<"))
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def as_float32(bits: np.ndarray, kind: str) -> np.ndarray:
    """What quantising starts from: the input rounded to float32."""
    if kind == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return bits.astype(np.float32)


def hexadecimal(array: np.ndarray | None) -> str | None:
    """The bytes of an array."""
    return None if array is None else np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes().hex()


def quantized(real: np.ndarray, lengths: list[int] | None, dtype: str, granularity: str, **scheme: Any) -> reference.Quantized:
    """The reference's result; with lengths, that of each shorter sequence on its own, or of all rows that take part."""
    if lengths is None:
        return reference.quantize(real, dtype, granularity, **scheme)
    codes = np.zeros(real.shape, np.int64)
    if granularity == "tensor":
        rows = np.concatenate([real[b, :, :length].reshape(-1, real.shape[3]) for b, length in enumerate(lengths)])
        whole = reference.quantize(rows[None, None], dtype, granularity, **scheme)
        start = 0
        for b, length in enumerate(lengths):
            stop = start + real.shape[1] * length
            codes[b, :, :length] = whole.codes[0, 0, start:stop].reshape(real.shape[1], length, real.shape[3])
            start = stop
        return reference.Quantized(codes, whole.scales, whole.zero_points, None, granularity, rotated=whole.rotated)
    sizes = {name: scheme[name] for name in ("block_size", "group_size") if name in scheme}
    shape = reference.scale_shape(real.shape, granularity, **sizes)
    scales = np.ones(shape, np.float32)
    zero_points = np.zeros(shape, np.int32)
    means = np.zeros((real.shape[0], real.shape[1], real.shape[3]), np.float32)
    part = None
    for b, length in enumerate(lengths):
        part = reference.quantize(real[b : b + 1, :, :length], dtype, granularity, **scheme)
        codes[b, :, :length] = part.codes[0]
        place = (b, slice(None), slice(part.scales.shape[2])) if granularity in ("token", "block", "group") else (b,)
        scales[place] = part.scales[0]
        if part.zero_points is not None:
            zero_points[place] = part.zero_points[0]
        if part.channel_means is not None:
            means[b] = part.channel_means[0]
    return reference.Quantized(
        codes,
        scales,
        None if scheme.get("symmetric", True) else zero_points,
        means if scheme.get("smooth") else None,
        granularity,
        **sizes,
        rotated=scheme.get("rotated", False),
    )


def case(
    name: str,
    values: np.ndarray,
    dtype: str,
    granularity: str,
    *,
    input_type: str = "float32",
    lengths: list[int] | None = None,
    symmetric: bool = True,
    smooth: bool = False,
    rotate: bool = False,
    **sizes: int,
) -> dict[str, Any]:
    """One line: what becomes of an input, or that it is refused."""
    bits = as_bits(np.asarray(values), input_type)
    sizes = sizes or SIZES.get(granularity, {})
    line: dict[str, Any] = {
        "name": name,
        "kind": "quantize",
        "input_type": input_type,
        "shape": list(bits.shape),
        "lengths": lengths,
        "dtype": dtype,
        "granularity": granularity,
        "block_size": sizes.get("block_size", 0),
        "group_size": sizes.get("group_size", 0),
        "symmetric": symmetric,
        "smooth": smooth,
        "rotate": rotate,
        "input": hexadecimal(bits),
    }
    try:
        made = quantized(
            as_float32(bits, input_type), lengths, dtype, granularity, symmetric=symmetric, smooth=smooth, rotated=rotate, **sizes
        )
    except ValueError:
        return line | {"kind": "refuse"}
    return line | results(made, dtype)


def results(made: reference.Quantized, dtype: str) -> dict[str, Any]:
    """The fields that quantising fills."""
    return {
        "codes": hexadecimal(made.codes.astype(np.int8) if dtype == "int8" else reference.pack_int4(made.codes)),
        "scales": hexadecimal(made.scales),
        "zero_points": hexadecimal(made.zero_points),
        "channel_means": hexadecimal(made.channel_means),
        "dequantized": hexadecimal(reference.dequantize(made)),
    }


def combinations() -> Iterator[dict[str, Any]]:
    """Every option with every other."""
    for dtype, granularity, symmetric, smooth, rotate in itertools.product(
        ("int8", "int4"), GRANULARITIES, (True, False), (False, True), (False, True)
    ):
        name = f"{dtype} {granularity}, {'symmetric' if symmetric else 'asymmetric'}{', smooth' * smooth}{', rotate' * rotate}"
        values = numbers(name, (1, 2, 5, 6)) + numbers(name + " means", (1, 2, 1, 6))
        yield case(name, values, dtype, granularity, symmetric=symmetric, smooth=smooth, rotate=rotate)


def shapes() -> Iterator[dict[str, Any]]:
    """Head sizes odd, even, with blocks of several powers of two; one token, none; blocks and groups that do not divide."""
    for channels in (1, 2, 3, 5, 7, 8, 12, 16, 17, 31, 32, 48, 65, 96, 128):
        for dtype in ("int8", "int4"):
            name = f"head_dim {channels}, {dtype}"
            yield case(name, numbers(name, (1, 1, 3, channels)), dtype, "token", symmetric=False, rotate=True)
    yield case("head_dim 1024", numbers("head_dim 1024", (1, 1, 1, 1024)), "int4", "group", group_size=100, symmetric=False, rotate=True)
    for tokens, block_size in ((1, 1), (1, 64), (7, 1), (7, 2), (7, 7), (9, 4)):
        name = f"{tokens} tokens in blocks of {block_size}"
        yield case(name, numbers(name, (2, 1, tokens, 3)), "int8", "block", block_size=block_size, symmetric=False, smooth=True)
    for channels, group_size in ((5, 1), (5, 2), (5, 5), (5, 32), (12, 5)):
        name = f"{channels} channels in groups of {group_size}"
        yield case(name, numbers(name, (1, 2, 2, channels)), "int4", "group", group_size=group_size, symmetric=False)
    for granularity in GRANULARITIES:
        yield case(f"no tokens, {granularity}", np.zeros((1, 2, 0, 5)), "int8", granularity, symmetric=False, smooth=True, rotate=True)


def types() -> Iterator[dict[str, Any]]:
    """Inputs of every type; some of their values are denormal or need rounding to float32."""
    for kind, dtype in itertools.product(("float32", "float16", "bfloat16", "float64"), ("int8", "int4")):
        name = f"{kind} to {dtype}"
        values = numbers(name, (1, 2, 4, 6)) * np.array([1, 1, 2.0**-7, 1, 2.0**-20, 1])
        for smooth, rotate in ((False, False), (True, True)):
            yield case(f"{name}{', smooth, rotate' * smooth}", values, dtype, "token", input_type=kind, smooth=smooth, rotate=rotate)
    denormal = np.array([[3e-8, -6e-8, 5.96e-8, 1e-7], [6e-5, -3e-5, 1e-6, 0.0]]).reshape(1, 1, 2, 4)
    yield case("denormals of float16", denormal, "int8", "token", input_type="float16")
    yield case("float64 between two float32", np.array([1 + 2.0**-24, 1 + 3 * 2.0**-25, 1 + 2.0**-23, -1.0]).reshape(1, 1, 1, 4),
               "int8", "tensor", input_type="float64", smooth=True)  # fmt: skip


def special_values() -> Iterator[dict[str, Any]]:
    """What rounding, scales and zero points do at their limits."""
    lists = {
        "zeros": [0.0, -0.0, 0.0, 0.0],
        "one value": [3.0, 3.0, 3.0, 3.0],
        "negative": [-1.0, -2.0, -3.5, -255.0],
        "positive": [1.0, 2.0, 3.5, 255.0],
        "ties of int8": [127.0, 0.5, 1.5, -2.5],
        "ties of int4": [7.0, 0.5, 1.5, -2.5],
        "ties with a zero point": [-127.5, 127.5, 0.5, -1.5],
        "a zero point between two": [-2.5, 12.5, 3.0, 0.0],
        "a zero point at its limit": [-1.0, -0.25, -1e-6, -0.5],
        "denormals": [1e-40, -1e-41, 3e-45, 0.0],
        "scale at the smallest normal": [127 * SMALLEST_NORMAL, 1e-38, 0.0, -1e-37],
        "scale below the smallest normal": [126.9 * SMALLEST_NORMAL, 1e-38, 0.0, -1e-37],
        "int4 scale at the smallest normal": [7 * SMALLEST_NORMAL, SMALLEST_NORMAL / 2, 0.0, -SMALLEST_NORMAL],
        "int4 scale below the smallest normal": [6.9 * SMALLEST_NORMAL, SMALLEST_NORMAL, 0.0, -1e-38],
        "huge": [3.4e38, -3.4e38, 1e38, 1.0],
        "large but finite when rotated": [1.6e38, -1.6e38, 1e38, 1.0],
        "outlier": [1e30, 1e-30, 1.0, -1.0],
    }
    for (name, values), dtype, symmetric, rotate in itertools.product(lists.items(), ("int8", "int4"), (True, False), (False, True)):
        if rotate and not name.startswith(("huge", "large", "denormals")):
            continue
        words = f"{name}, {dtype}, {'symmetric' if symmetric else 'asymmetric'}{', rotate' * rotate}"
        yield case(words, np.array(values).reshape(1, 1, 2, 2), dtype, "tensor", symmetric=symmetric, rotate=rotate)
    yield case("a mean that cancels", np.array([1e8, 1.0, -1e8, 1.0, 1.0, 1e-8]).reshape(1, 1, 6, 1), "int8", "channel", smooth=True)
    yield case("huge, smoothed", np.array([3.4e38, -3.4e38, -3.4e38, -3.4e38]).reshape(1, 1, 4, 1), "int8", "tensor", smooth=True)


def refused() -> Iterator[dict[str, Any]]:
    """Values that are not finite in float32, or not after rotation."""
    for kind, value in itertools.product(("float32", "float16", "bfloat16", "float64"), (np.nan, np.inf, -np.inf)):
        yield case(f"{value} in {kind}", np.array([1.0, 2.0, value, 3.0]).reshape(1, 1, 2, 2), "int8", "token", input_type=kind)
    yield case("1e39 in float64", np.array([1.0, 1e39]).reshape(1, 1, 1, 2), "int4", "token", input_type="float64")
    yield case("overflow in a rotation", np.array([3e38, 3e38]).reshape(1, 1, 1, 2), "int8", "token", rotate=True)


def with_lengths() -> Iterator[dict[str, Any]]:
    """Only the first tokens of each sequence take part; what follows may be anything."""
    for dtype, granularity, smooth in itertools.product(("int8", "int4"), GRANULARITIES, (False, True)):
        if granularity == "tensor" and smooth:
            continue
        name = f"lengths, {dtype} {granularity}{', smooth' * smooth}"
        values = numbers(name, (3, 2, 5, 4))
        values[1, :, 2:] = np.nan
        values[2] = np.inf
        yield case(name, values, dtype, granularity, lengths=[5, 2, 0], symmetric=False, smooth=smooth, rotate=True)


def dequantizing() -> Iterator[dict[str, Any]]:
    """Codes that quantising does not write: -128 and -8, zero points of 32 bits, scales of any size."""
    zero_points = np.array([0, 1, -1, 127, -128, 1 << 24, 2**31 - 1, -(2**31)], np.int32)
    scales = np.array([1.0, 0.1, 1e28, 1e-38, 1e-45, 2.0**-24, 1e-3, 7.0], np.float32)
    for dtype, limits in reference.INT_LIMITS.items():
        for granularity, rotate, smooth in (
            ("token", False, False),
            ("token", True, True),
            ("channel", True, False),
            ("group", False, True),
        ):
            name = f"any codes, {dtype} {granularity}{', smooth' * smooth}{', rotate' * rotate}"
            size = limits[1] - limits[0] + 1
            uniform = hashlib.shake_256(name.encode()).digest(64)
            codes = np.array([limits[0] + byte % size for byte in uniform], np.int64).reshape(1, 1, 8, 8)
            codes[..., :2] = limits
            shape = reference.scale_shape(codes.shape, granularity, **SIZES.get(granularity, {}))
            made = reference.Quantized(
                codes,
                np.resize(scales, shape),
                np.resize(zero_points, shape),
                numbers(name, (1, 1, 8)).astype(np.float32) if smooth else None,
                granularity,
                **SIZES.get(granularity, {}),
                rotated=rotate,
            )
            yield {
                "name": name,
                "kind": "dequantize",
                "shape": list(codes.shape),
                "lengths": None,
                "dtype": dtype,
                "granularity": granularity,
                "block_size": made.block_size,
                "group_size": made.group_size,
                "symmetric": False,
                "smooth": smooth,
                "rotate": rotate,
            } | results(made, dtype)


def text() -> str:
    """The whole file."""
    parts = (combinations, shapes, types, special_values, refused, with_lengths, dequantizing)
    return "".join(json.dumps(line) + "\n" for part in parts for line in part())


def main() -> int:
    """Write the file or compare with it."""
    if sys.argv[1:] not in ([], ["--check"]):
        print(__doc__)
        return 2
    if sys.argv[1:] == ["--check"]:
        if FILE.read_text(encoding="ascii") != text():
            print(f"{FILE} is not what this program writes")
            return 1
        return 0
    FILE.write_text(text(), encoding="ascii", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
