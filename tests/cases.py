"""Attention problems for tests: operands of any type and strides, options, and the same problem as the reference takes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

import reference
from tolerances import Bounds

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
STYLES = ("contiguous", "permuted", "sliced", "negative", "broadcast")
CODES = ("int8", "int4")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a problem, in the library's words."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    rows: int = 19
    columns: int = 37
    channels: int = 17
    value_channels: int = 9

    @property
    def query(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.rows, self.channels

    @property
    def key(self) -> tuple[int, int, int, int]:
        return self.batch, self.kv_heads, self.columns, self.channels

    @property
    def value(self) -> tuple[int, int, int, int]:
        return self.batch, self.kv_heads, self.columns, self.value_channels

    @property
    def output(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.rows, self.value_channels

    @property
    def statistics(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.rows

    @property
    def scores(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.rows, self.columns


def to_layout(tensor: np.ndarray, layout: str) -> np.ndarray:
    """A view of a ``[batch, heads, tokens, channels]`` array with its axes in the order of `layout`, or back."""
    return tensor if layout == "bhsd" else tensor.swapaxes(1, 2)


def place(values: np.ndarray, style: str, rng: np.random.Generator, poison: Any = None) -> np.ndarray:
    """An array equal to `values` (except with "broadcast", which repeats a part of them) that lies in memory as `style` says.

    What lies between the elements of a sliced array is poison: NaN, or the largest code.
    """
    if poison is None:
        poison = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else np.nan
    if style == "contiguous":
        return np.ascontiguousarray(values)
    if style == "permuted":
        order = rng.permutation(values.ndim)
        return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
    if style == "sliced":
        steps = rng.integers(1, 4, values.ndim)
        memory = np.full([size * step + 2 for size, step in zip(values.shape, steps)], poison, values.dtype)
        view = memory[tuple(slice(1, 1 + size * step, step) for size, step in zip(values.shape, steps))]
        view[...] = values
        return view
    if style == "negative":
        backwards = (slice(None, None, -1),) * values.ndim
        return np.ascontiguousarray(values[backwards])[backwards]
    assert style == "broadcast", style
    axes = np.flatnonzero(rng.integers(0, 2, values.ndim - 1))  # not the last: then all scores of a row could be equal
    first = values[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(values.ndim))]
    return np.broadcast_to(np.ascontiguousarray(first), values.shape)


@dataclass(frozen=True)
class Operand:
    """Q, K or V: what the library gets, in a layout, and the real numbers ``[batch, heads, tokens, channels]`` that it stands for."""

    argument: Any
    real: np.ndarray

    def __repr__(self) -> str:
        if not isinstance(self.argument, np.ndarray):
            return repr(self.argument)
        return f"<{self.argument.dtype} {self.argument.shape}, strides of {self.argument.strides} bytes>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def float_operand(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: str = "float32",
    style: str = "contiguous",
    layout: str = "bhsd",
    size: float = 1.0,
) -> Operand:
    """Normal numbers."""
    values = to_layout((size * rng.normal(size=shape)).astype(DTYPES[dtype]), layout)
    argument = place(values, style, rng)
    return Operand(argument, to_layout(argument, layout).astype(np.float64))


def quantized_operand(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: str = "int8",
    style: str = "contiguous",
    layout: str = "bhsd",
    granularity: str = "tensor",
    asymmetric: bool = False,
) -> Operand:
    """Any codes, also those that quantising never makes, with scales (and zero points, in and out of range) of their own."""
    import umfa

    low, high = reference.INT_LIMITS[dtype]
    codes = to_layout(rng.integers(low, high + 1, shape), layout)
    if dtype == "int8":
        data = place(codes.astype(np.int8), style, rng)
        codes = to_layout(data.astype(np.int64), layout)
    else:
        packed = reference.pack_int4(codes)
        if shape[-1] % 2:
            packed[..., -1] |= rng.integers(0, 16, packed.shape[:-1]).astype(np.uint8) << 4  # a pad nibble means nothing
        data = place(packed, style, rng)
        codes = to_layout(reference.unpack_int4(data, shape[-1]), layout)
    scale_shape = reference.scale_shape(shape, granularity, 5, 3)
    scales = np.asarray(rng.uniform(0.5, 2.0, scale_shape) / (high * 0.6), np.float32)
    zero_points = np.asarray(rng.integers(-high, high + 9, scale_shape), np.int32) if asymmetric else None
    sizes = {"block": {"block_size": 5}, "group": {"group_size": 3}}.get(granularity, {})
    argument = umfa.QuantizedTensor(
        data, scales, zero_points, shape=to_layout(np.empty(shape, bool), layout).shape, granularity=granularity, layout=layout, **sizes
    )
    quantized = reference.Quantized(codes, scales, zero_points, None, granularity, 5, 3)
    return Operand(argument, reference.dequantize(quantized).astype(np.float64))


def operand(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, style: str = "contiguous", layout: str = "bhsd") -> Operand:
    """An operand of any type; codes have scales a tensor or a token, with or without zero points."""
    if dtype in CODES:
        granularity = ("tensor", "token")[rng.integers(2)]
        return quantized_operand(rng, shape, dtype, style, layout, granularity, bool(rng.integers(2)))
    return float_operand(rng, shape, dtype, style, layout)


@dataclass(frozen=True)
class Problem:
    """One call of ``umfa.attention`` and what the reference says about it."""

    sizes: Sizes
    query: Operand
    key: Operand
    value: Operand
    keywords: dict[str, Any] = field(default_factory=dict)
    query_dtype: str = "float32"
    arithmetic: str = "float32"

    @property
    def layout(self) -> str:
        return self.keywords.get("layout", "bhsd")

    @property
    def output_dtype(self) -> str:
        return "float32" if self.query_dtype in CODES else self.query_dtype

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        return self.query.argument, self.key.argument, self.value.argument

    @property
    def real(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.query.real, self.key.real, self.value.real

    @cached_property
    def options(self) -> reference.Options:
        """The keywords in the reference's words."""
        words = dict(self.keywords)
        causal, scale = words.pop("causal", False), words.pop("scale", None)
        words.pop("layout", None)
        words["softmax_scale"] = float(1 / np.sqrt(self.sizes.channels) if scale is None else scale)
        words["softcap"] = float(words.get("softcap", 0))
        if words.get("window") is None:
            words.pop("window", None)
        words["causal"], words["lower_right"] = causal is not False, causal == "lower_right"
        return reference.Options(**words)

    @cached_property
    def bounds(self) -> Bounds:
        """The reference's results (`Bounds.at`) and how far from them is allowed."""
        return Bounds(*self.real, self.options, arithmetic=self.arithmetic, dtype=self.output_dtype)

    def run(self, **others: Any) -> tuple[np.ndarray, np.ndarray]:
        """Output ``[batch, heads, tokens, channels]`` and logsumexp."""
        import umfa

        output, logsumexp = umfa.attention(*self.arguments, **{**self.keywords, **others}, return_lse=True)
        return to_layout(output, self.layout), logsumexp

    def with_keywords(self, **keywords: Any) -> Problem:
        """The same operands with other options."""
        return replace(self, keywords={**self.keywords, **keywords})


def problem(
    rng: np.random.Generator,
    sizes: Sizes | None = None,
    *,
    dtypes: tuple[str, str, str] = ("float32",) * 3,
    styles: tuple[str, str, str] = ("contiguous",) * 3,
    layout: str = "bhsd",
    **keywords: Any,
) -> Problem:
    """A problem of these sizes and types. `keywords` are those of ``umfa.attention``."""
    sizes = sizes or Sizes()
    operands = [
        operand(rng, shape, dtype, style, layout) for shape, dtype, style in zip((sizes.query, sizes.key, sizes.value), dtypes, styles)
    ]
    if layout != "bhsd":
        keywords["layout"] = layout
    return Problem(sizes, *operands, keywords, dtypes[0], "float64" if "float64" in dtypes else "float32")


# Each makes the keywords of one option for sizes and a type of statistics. Together they are all options of attention.
OPTIONS = {
    "plain": lambda rng, sizes, real: {},
    "scale": lambda rng, sizes, real: {"scale": 0.3},
    "scale_zero": lambda rng, sizes, real: {"scale": 0.0},
    "scale_negative": lambda rng, sizes, real: {"scale": -0.5},
    "causal": lambda rng, sizes, real: {"causal": True},
    "causal_upper_left": lambda rng, sizes, real: {"causal": "upper_left"},
    "causal_lower_right": lambda rng, sizes, real: {"causal": "lower_right"},
    "causal_offset": lambda rng, sizes, real: {"causal": True, "query_offset": int(rng.integers(-3, sizes.columns + 3))},
    "causal_offsets": lambda rng, sizes, real: {"causal": True, "query_offset": rng.integers(-5, sizes.columns, sizes.batch)},
    "causal_lengths_lower_right": lambda rng, sizes, real: {
        "causal": "lower_right",
        "kv_lengths": rng.integers(0, sizes.columns + 1, sizes.batch),
    },
    "window": lambda rng, sizes, real: {"window": (int(rng.integers(0, 9)), int(rng.integers(0, 9)))},
    "window_left": lambda rng, sizes, real: {"window": (int(rng.integers(0, 9)), -1)},
    "window_right": lambda rng, sizes, real: {"window": (-1, int(rng.integers(0, 9)))},
    "window_causal_offset": lambda rng, sizes, real: {
        "window": (int(rng.integers(0, 9)), 5),
        "causal": True,
        "query_offset": int(rng.integers(-3, 9)),
    },
    "window_wide": lambda rng, sizes, real: {"window": (2**63 - 1, 2**63 - 1)},
    "lengths": lambda rng, sizes, real: {"kv_lengths": rng.integers(0, sizes.columns + 1, sizes.batch)},
    "softcap": lambda rng, sizes, real: {"softcap": 1.25},
    "alibi": lambda rng, sizes, real: {"alibi_slopes": (2.0 ** -rng.integers(1, 9, sizes.heads)).astype(real)},
    "alibi_offset": lambda rng, sizes, real: {"alibi_slopes": rng.normal(size=sizes.heads).astype(real), "query_offset": 3},
    "sinks": lambda rng, sizes, real: {"sinks": rng.normal(size=sizes.heads).astype(real)},
    "sinks_none_in_one_head": lambda rng, sizes, real: {"sinks": np.array([-np.inf] + [1.0] * (sizes.heads - 1), real)},
    "dropout": lambda rng, sizes, real: {
        "dropout_p": 0.4,
        "seed": int(rng.integers(2**63)) * 2 + 1,
        "dropout_offset": int(rng.integers(2**32)),
    },
    "dropout_all": lambda rng, sizes, real: {"dropout_p": 1.0, "seed": 5},
    "mask_bool": lambda rng, sizes, real: {"mask": rng.random(sizes.scores) < 0.6},
    "mask_bool_broadcast": lambda rng, sizes, real: {"mask": rng.random((sizes.batch, 1, 1, sizes.columns)) < 0.6},
    "mask_additive": lambda rng, sizes, real: {"mask": additive_mask(rng, sizes.scores)},
    "mask_additive_row": lambda rng, sizes, real: {"mask": additive_mask(rng, (sizes.rows, 1))},
    "mask_additive_float16": lambda rng, sizes, real: {"mask": additive_mask(rng, (sizes.heads, 1, sizes.columns)).astype(np.float16)},
    "mask_additive_bfloat16": lambda rng, sizes, real: {"mask": additive_mask(rng, (1, sizes.columns)).astype(ml_dtypes.bfloat16)},
    "mask_additive_float64": lambda rng, sizes, real: {
        "mask": additive_mask(rng, (sizes.batch, 1, sizes.rows, sizes.columns)).astype(np.float64)
    },
    "all": lambda rng, sizes, real: {
        "causal": "lower_right",
        "window": (11, -1),
        "kv_lengths": rng.integers(0, sizes.columns + 1, sizes.batch),
        "softcap": 2.0,
        "alibi_slopes": rng.uniform(0, 0.5, sizes.heads).astype(real),
        "sinks": rng.normal(size=sizes.heads).astype(real),
        "mask": additive_mask(rng, (sizes.batch, 1, sizes.rows, sizes.columns)),
        "dropout_p": 0.25,
        "seed": 99,
    },
}


def smoothed_problem(rng: np.random.Generator, sizes: Sizes, **keywords: Any) -> Problem:
    """A problem on INT8 operands of which the query and the key are rotated, and the key, whose channels have a bias, is smoothed."""
    import umfa

    values = [rng.normal(size=shape).astype(np.float32) for shape in (sizes.query, sizes.key, sizes.value)]
    values[1] += 3 * rng.normal(size=(1, 1, 1, sizes.channels)).astype(np.float32)
    codes = [
        umfa.quantize(values[0], "int8", rotate=True),
        umfa.quantize(values[1], "int8", smooth=True, rotate=True),
        umfa.quantize(values[2], "int8"),
    ]
    operands = [Operand(each, each.dequantize().astype(np.float64)) for each in codes]
    return Problem(sizes, *operands, keywords, "int8", "float32")


def additive_mask(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers, a fifth of them -inf."""
    mask = rng.normal(size=shape).astype(np.float32)
    mask[rng.random(shape) < 0.2] = -np.inf
    return mask


def problem_with(
    option: str,
    seed: int = 0,
    sizes: Sizes | None = None,
    dtypes: tuple[str, str, str] = ("float32",) * 3,
    **keywords: Any,
) -> Problem:
    """A problem with one of `OPTIONS`."""
    rng = np.random.default_rng(seed)
    sizes = sizes or Sizes()
    made = problem(rng, sizes, dtypes=dtypes, **keywords)
    return made.with_keywords(**OPTIONS[option](rng, sizes, DTYPES[made.arithmetic]))
