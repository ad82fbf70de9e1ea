"""Quantised tensors: INT8 and INT4 codes with their scales, and how to make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from umfa._layouts import LAYOUTS, axes_in, four_dimensional
from umfa._library import NULL, ffi, lib
from umfa._scalars import attribute, choice, describe, flag, integer
from umfa.arrays import FLOATS, FP32, INT4, INT8, NUMPY, ArrayView, allocate, framework_named, numpy_of, precision_name, view_of
from umfa.context import MFAContext, context_for
from umfa.errors import InvalidArgumentError, InvalidDimensionsError, InvalidTypeError

__all__ = ["QuantizationConfig", "QuantizationScheme", "QuantizedTensor", "quantize"]

_PRECISIONS = {"int8": INT8, "int4": INT4}
_GRANULARITIES = {
    name: ffi.integer_const(f"MFA_GRANULARITY_{name.upper()}") for name in ("tensor", "head", "token", "block", "channel", "group")
}
# Granularity and symmetry where no granularity is named; docs/quantization.md says why.
_DEFAULT_SHARING = {"int8": ("token", True), "int4": ("token", False)}
_DEFAULT_BLOCK_SIZE = 64
_DEFAULT_GROUP_SIZE = 32
_LARGEST_UINT32 = 2**32 - 1


@dataclass(frozen=True)
class QuantizationScheme:
    """How one tensor is quantised: the arguments of `quantize`, as a value.

    Parameters
    ----------
    dtype : {"int8", "int4"}
        Codes.
    granularity : {"tensor", "head", "token", "block", "channel", "group"}, optional
        Which elements share a scale. By default what suits the dtype: ``"token"``, for INT4 with zero points.
    block_size : int, optional
        Tokens that share a scale, for ``"block"``; 64 by default.
    group_size : int, optional
        Channels that share a scale, for ``"group"``; 32 by default.
    symmetric : bool, optional
        False: with zero points. By default True, except for INT4 without a `granularity`.
    smooth : bool
        Subtract each channel's mean over the tokens first (keys only).
    rotate : bool
        Apply a Walsh-Hadamard transform to each row first (query and key alike).
    """

    dtype: str = "int8"
    granularity: str | None = None
    block_size: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    smooth: bool = False
    rotate: bool = False

    def __post_init__(self) -> None:
        fields = (self.dtype, self.granularity, self.block_size, self.group_size, self.symmetric, self.smooth, self.rotate)
        for name, value in _checked_fields("umfa.QuantizationScheme", *fields).items():
            object.__setattr__(self, name, value)

    def _structure(self) -> Any:
        """The scheme as an ``mfa_quantization_scheme_t *``."""
        scheme = ffi.new("mfa_quantization_scheme_t *")
        scheme.struct_size = ffi.sizeof("mfa_quantization_scheme_t")
        scheme.precision = _PRECISIONS[self.dtype]
        scheme.granularity = _GRANULARITIES[str(self.granularity)]
        scheme.block_size = self.block_size or 0
        scheme.group_size = self.group_size or 0
        scheme.asymmetric = not self.symmetric
        scheme.smooth = self.smooth
        scheme.rotate = self.rotate
        return scheme


def _checked_fields(
    function: str, dtype: Any, granularity: Any, block_size: Any, group_size: Any, symmetric: Any, smooth: Any, rotate: Any
) -> dict[str, Any]:
    """The fields of a scheme, with the defaults replaced by what they stand for."""
    dtype = choice(function, "dtype", dtype, _PRECISIONS)
    default_symmetric = True
    if granularity is None:
        granularity, default_symmetric = _DEFAULT_SHARING[dtype]
    granularity = choice(function, "granularity", granularity, _GRANULARITIES)
    return {
        "dtype": dtype,
        "granularity": granularity,
        "block_size": _size(function, "block", block_size, granularity, _DEFAULT_BLOCK_SIZE),
        "group_size": _size(function, "group", group_size, granularity, _DEFAULT_GROUP_SIZE),
        "symmetric": default_symmetric if symmetric is None else bool(flag(function, "symmetric", symmetric)),
        "smooth": bool(flag(function, "smooth", smooth)),
        "rotate": bool(flag(function, "rotate", rotate)),
    }


def _size(function: str, kind: str, size: int | None, granularity: str, default: int) -> int | None:
    """The block or group size that belongs to a granularity: None where it has none."""
    if granularity == kind:
        return default if size is None else integer(function, f"{kind}_size", size, 1, _LARGEST_UINT32)
    if size is not None:
        raise InvalidArgumentError(f"{function}: {kind}_size: expected None with granularity {granularity!r}, got {describe(size)}")
    return None


@dataclass(frozen=True)
class QuantizationConfig:
    """How `attention` quantises its float operands before it computes with them.

    Each operand has a `QuantizationScheme`, or the name of a dtype, or None: it stays as it is. Operands that come quantised are taken as
    they are.

    A name stands for the scheme that suits the operand best: scales a token, for INT4 with zero points; keys are smoothed; queries and keys
    are rotated. Where only one of query and key has a name, its rotation follows the other one, as that comes or as its scheme says.

    Parameters
    ----------
    query, key, value : QuantizationScheme or {"int8", "int4"}, optional
        Scheme of each operand; ``"int8"`` by default.

    Examples
    --------
    >>> config = umfa.QuantizationConfig(query="int8", key="int4", value=umfa.QuantizationScheme("int4", "group", group_size=64))
    >>> output = umfa.attention(q, k, v, quantize=config)
    """

    query: QuantizationScheme | str | None = "int8"
    key: QuantizationScheme | str | None = "int8"
    value: QuantizationScheme | str | None = "int8"

    def __post_init__(self) -> None:
        for name in ("query", "key", "value"):
            scheme = getattr(self, name)
            if scheme is not None and not isinstance(scheme, QuantizationScheme):
                choice("umfa.QuantizationConfig", name, scheme, _PRECISIONS)
        structures = {
            rotated: tuple(NULL if scheme is None else scheme._structure() for scheme in self._schemes(rotated))
            for rotated in (None, False, True)
        }
        object.__setattr__(self, "_structures", structures)

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizationConfig, (self.query, self.key, self.value)

    @property
    def schemes(self) -> tuple[QuantizationScheme | None, QuantizationScheme | None, QuantizationScheme | None]:
        """The schemes of query, key and value when all three come as floats: what the names stand for."""
        return self._schemes(None)

    def _schemes(self, rotated: bool | None) -> tuple[QuantizationScheme | None, QuantizationScheme | None, QuantizationScheme | None]:
        """The schemes, where one of query and key comes quantised, rotated or not; None: neither does."""

        def scheme(
            given: QuantizationScheme | str | None, other: QuantizationScheme | str | None, smooth: bool
        ) -> QuantizationScheme | None:
            if not isinstance(given, str):
                return given
            rotate = rotated
            if rotate is None:
                rotate = other.rotate if isinstance(other, QuantizationScheme) else other is not None
            return QuantizationScheme(given, smooth=smooth, rotate=rotate)

        value = QuantizationScheme(self.value) if isinstance(self.value, str) else self.value
        return scheme(self.query, self.key, False), scheme(self.key, self.query, True), value

    @staticmethod
    def _structures_of(function: str, quantize: Any, rotated: bool | None = None) -> tuple[Any, Any, Any]:
        """The C schemes of query, key and value that an argument ``quantize=`` of `attention` stands for; `rotated` as in `_schemes`."""
        if not isinstance(quantize, QuantizationConfig):
            if not isinstance(quantize, str):
                raise InvalidTypeError(
                    f"{function}: quantize: expected None, 'int8', 'int4' or an umfa.QuantizationConfig, got {describe(quantize)}"
                )
            quantize = _NAMED_CONFIGS[choice(function, "quantize", quantize, _NAMED_CONFIGS)]
        structures: tuple[Any, Any, Any] = quantize._structures[rotated]
        return structures


# Queries are not stored, so INT4 would save nothing there.
_NAMED_CONFIGS = {"int8": QuantizationConfig("int8", "int8", "int8"), "int4": QuantizationConfig("int8", "int4", "int4")}


class QuantizedTensor:
    """A tensor as INT8 or INT4 codes with scales; made by `quantize`, accepted by `attention` in place of an array.

    Each code stands for the real number ``scale * (code - zero_point)``, plus the channel's mean if the tensor was smoothed, with the
    rotation undone if it was rotated. Made directly, from parts that were stored, it checks their shapes and shares their memory: it
    follows what is written there.

    Parameters
    ----------
    data : array
        Codes. INT8: int8 of the tensor's shape. INT4: uint8 ``[..., ceil(head_dim / 2)]``, two codes a byte along the channels, the even
        channel in the low nibble.
    scales : array
        float32, contiguous. With B, H, S and D the sizes of the tensor (H its own head count), in this order whatever the layout:
        ``tensor`` [], ``head`` [B, H], ``token`` [B, H, S], ``block`` [B, H, ceil(S / block_size)], ``channel`` [B, H, D], ``group``
        [B, H, S, ceil(D / group_size)].
    zero_points : array, optional
        int32, of the shape of `scales`; None: all 0.
    channel_means : array, optional
        float32 [B, H, D]; None: not smoothed.
    shape : tuple of int, optional
        Shape of the tensor; needed for INT4, whose data do not tell whether head_dim is odd.
    granularity : str
        Which elements share a scale.
    block_size, group_size : int, optional
        For those granularities.
    rotated : bool
        Whether the codes are those of the Walsh-Hadamard transform of each row.
    layout : {"bhsd", "bshd"}
        Order of the tensor's axes, as in `attention`.
    """

    __slots__ = (
        "_block_size",
        "_channel_means",
        "_data",
        "_dtype",
        "_framework",
        "_granularity",
        "_group_size",
        "_layout",
        "_rotated",
        "_scales",
        "_shape",
        "_view",
        "_zero_points",
    )

    def __init__(
        self,
        data: Any,
        scales: Any,
        zero_points: Any = None,
        channel_means: Any = None,
        *,
        shape: tuple[int, ...] | None = None,
        granularity: str = "token",
        block_size: int | None = None,
        group_size: int | None = None,
        rotated: bool = False,
        layout: str = "bhsd",
    ) -> None:
        function = "umfa.QuantizedTensor"
        try:
            view = view_of(function, "data", data)
        except InvalidTypeError:
            dtype = str(attribute(data, "dtype"))
            if dtype.rpartition(".")[2] in ("int8", "uint8", "None"):  # something else is wrong with it
                raise
            raise InvalidTypeError(f"{function}: data: expected dtype int8, or uint8 for INT4, got {dtype}") from None
        if view.precision in (INT8, INT4):
            self._framework = view.framework
            self._data = numpy_of(function, "data", view)
            view = view_of(function, "data", self._data)
        if view.precision not in (INT8, INT4):
            raise InvalidTypeError(f"{function}: data: expected dtype int8, or uint8 for INT4, got {precision_name(view.precision)}")
        self._dtype = "int8" if view.precision == INT8 else "int4"
        self._shape = self._checked_shape(function, shape)
        self._layout = choice(function, "layout", layout, LAYOUTS)
        self._granularity = choice(function, "granularity", granularity, _GRANULARITIES)
        self._block_size = _size(function, "block", block_size, self.granularity, _DEFAULT_BLOCK_SIZE)
        self._group_size = _size(function, "group", group_size, self.granularity, _DEFAULT_GROUP_SIZE)
        self._rotated = bool(flag(function, "rotated", rotated))
        axes_in(function, "data", len(self.shape), self.layout)
        expected = _scales_shape(self.shape, self.layout, self.granularity, self.block_size, self.group_size)
        self._scales = _part(function, "scales", scales, np.float32, expected)
        self._zero_points = None if zero_points is None else _part(function, "zero_points", zero_points, np.int32, expected)
        means_shape = _scales_shape(self.shape, self.layout, "channel", None, None)
        self._channel_means = None if channel_means is None else _part(function, "channel_means", channel_means, np.float32, means_shape)
        self._describe()

    def _checked_shape(self, function: str, shape: Any) -> tuple[int, ...]:
        stored = self._data.shape
        if shape is None:
            if self.dtype == "int4":
                raise InvalidArgumentError(f"{function}: shape: expected the tensor's shape for INT4 data, got None")
            return tuple(stored)
        try:
            sizes = tuple(shape)
        except Exception:
            raise InvalidTypeError(f"{function}: shape: expected a tuple of whole numbers, got {describe(shape)}") from None
        checked = tuple(integer(function, "shape", size, 0, _LARGEST_UINT32) for size in sizes)
        expected = checked if self.dtype == "int8" or not checked else (*checked[:-1], (checked[-1] + 1) // 2)
        if tuple(stored) != expected:
            raise InvalidDimensionsError(
                f"{function}: data: expected shape {expected} for an {self.dtype} tensor of shape {checked}, got {stored}"
            )
        return checked

    def _describe(self) -> None:
        """Prepare the C structures. They point into arrays that nobody can resize: users get views of them."""
        quantization = ffi.new("mfa_quantization_t *")
        quantization.struct_size = ffi.sizeof("mfa_quantization_t")
        quantization.granularity = _GRANULARITIES[self.granularity]
        quantization.block_size = self.block_size or 0
        quantization.group_size = self.group_size or 0
        quantization.rotated = self.rotated
        memory = []
        for name, kind, part in (
            ("scales", "float *", self._scales),
            ("zero_points", "int32_t *", self._zero_points),
            ("channel_means", "float *", self._channel_means),
        ):
            if part is not None:
                address = ffi.from_buffer(part)
                memory.append(address)
                setattr(quantization, name, ffi.cast(kind, address))
        view = view_of("umfa.QuantizedTensor", "data", self._data)
        strides = view.strides
        if self.dtype == "int4":
            # In codes: two a byte, except that the channels' own stride is that of the bytes.
            strides = (*(2 * stride for stride in strides[:-1]), strides[-1])
        self._view = ArrayView(
            view.pointer, self.shape, strides, view.precision, view.writable, self._framework, (self._data, memory), quantization
        )

    @property
    def data(self) -> Any:
        """The codes, as the kind of array that the tensor was made of."""
        return self._framework.from_numpy(self._data)

    @property
    def scales(self) -> Any:
        """The scales, float32; their shape says the granularity."""
        return self._framework.from_numpy(self._scales)

    @property
    def zero_points(self) -> Any:
        """The zero points, int32, of the shape of `scales`; None for a symmetric tensor."""
        return None if self._zero_points is None else self._framework.from_numpy(self._zero_points)

    @property
    def channel_means(self) -> Any:
        """What smoothing subtracted, float32 [B, H, D]; None for a tensor that is not smoothed."""
        return None if self._channel_means is None else self._framework.from_numpy(self._channel_means)

    # Read-only: the C structures, which say the same, are made once.

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that the codes stand for."""
        return self._shape

    @property
    def dtype(self) -> str:
        """``"int8"`` or ``"int4"``."""
        return self._dtype

    @property
    def granularity(self) -> str:
        """Which elements share a scale."""
        return self._granularity

    @property
    def block_size(self) -> int | None:
        """Tokens that share a scale; None unless the granularity is ``"block"``."""
        return self._block_size

    @property
    def group_size(self) -> int | None:
        """Channels that share a scale; None unless the granularity is ``"group"``."""
        return self._group_size

    @property
    def rotated(self) -> bool:
        """Whether the codes are those of the Walsh-Hadamard transform of each row."""
        return self._rotated

    @property
    def layout(self) -> str:
        """``"bhsd"`` or ``"bshd"``."""
        return self._layout

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and means together."""
        parts = (self._data, self._scales, self._zero_points, self._channel_means)
        return sum(int(part.nbytes) for part in parts if part is not None)

    def __array__(self, *_arguments: Any, **_options: Any) -> Any:
        """Refuse: whether codes or numbers are wanted is for the caller to say."""
        raise TypeError("umfa.QuantizedTensor: use .dequantize() for its numbers or .data for its codes")

    def dequantize(self, *, context: MFAContext | None = None) -> Any:
        """The real numbers that the codes stand for.

        Parameters
        ----------
        context : MFAContext, optional
            By default one a thread.

        Returns
        -------
        array
            float32, of the tensor's shape, as the kind of array that it was made of.

        Raises
        ------
        InvalidArgumentError
            If a scale is not finite and positive.
        """
        function = "umfa.QuantizedTensor.dequantize"
        result = self._framework.empty(function, self.shape, FP32)
        source = _tensor(function, "data", self._view, self.layout)
        target = _tensor(function, "result", view_of(function, "result", result), self.layout)
        context_for(function, context).call(function, lib.mfa_dequantize, source, target)
        return result

    def __repr__(self) -> str:
        extras = "".join(
            f", {word}"
            for word, present in (
                ("asymmetric", self._zero_points is not None),
                ("smoothed", self._channel_means is not None),
                ("rotated", self.rotated),
            )
            if present
        )
        return f"<umfa.QuantizedTensor {self.dtype} {list(self.shape)} ({self.layout}), scales per {self.granularity}{extras}>"

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self._data, self._scales, self._zero_points, self._channel_means)
        options = (self.shape, self.granularity, self.block_size, self.group_size, self.rotated, self.layout)
        return _rebuild, (self._framework.name, parts, options)


def _rebuild(framework: str, parts: tuple[Any, ...], options: tuple[Any, ...]) -> QuantizedTensor:
    """The inverse of pickling."""
    shape, granularity, block_size, group_size, rotated, layout = options
    data, *others = parts
    aligned = (part if part is None else np.require(part, requirements=["A"]) for part in others)  # buffers out of band may lie anywhere
    tensor = QuantizedTensor(
        data, *aligned, shape=shape, granularity=granularity, block_size=block_size, group_size=group_size, rotated=rotated, layout=layout
    )
    if framework != tensor._framework.name:
        tensor._framework = framework_named(framework)
        tensor._describe()
    return tensor


def _part(function: str, argument: str, array: Any, dtype: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Scales, zero points or means as a NumPy array on the given memory.

    That has to be contiguous: a copy would not follow what is written to it later, as the codes do.
    """
    if attribute(array, "requires_grad") is True:
        array = array.detach()
    try:
        checked = np.asarray(array)
    except Exception as error:
        raise InvalidTypeError(f"{function}: {argument}: expected an array, got {describe(array)}: {error}") from None
    if checked.dtype != dtype:
        raise InvalidTypeError(f"{function}: {argument}: expected dtype {np.dtype(dtype)}, got {checked.dtype}")
    if checked.shape != shape:
        raise InvalidDimensionsError(f"{function}: {argument}: expected shape {shape}, got {checked.shape}")
    if not (checked.flags.c_contiguous and checked.flags.aligned):
        raise InvalidArgumentError(
            f"{function}: {argument}: expected a contiguous array of aligned elements, whose memory is shared, got strides of"
            f" {checked.strides} bytes for shape {shape}: pass a copy, or for a part of a cache all of it and kv_lengths"
        )
    return checked


def _scales_shape(shape: tuple[int, ...], layout: str, granularity: str, block_size: int | None, group_size: int | None) -> tuple[int, ...]:
    batch, heads, tokens, channels = four_dimensional(shape, layout)
    if granularity == "tensor":
        return ()
    if granularity == "head":
        return batch, heads
    if granularity == "token":
        return batch, heads, tokens
    if granularity == "block":
        return batch, heads, -(-tokens // (block_size or 1))
    if granularity == "channel":
        return batch, heads, channels
    return batch, heads, tokens, -(-channels // (group_size or 1))


def _tensor(function: str, argument: str, view: ArrayView, layout: str) -> Any:
    """An ``mfa_tensor_t *`` of a view. The view keeps the memory alive."""
    axes_in(function, argument, len(view.shape), layout)
    tensor = ffi.new("mfa_tensor_t *")
    tensor.struct_size = ffi.sizeof("mfa_tensor_t")
    tensor.precision = view.precision
    tensor.data = view.pointer
    tensor.shape = four_dimensional(view.shape, layout)
    tensor.strides = four_dimensional(view.strides, layout, 0)
    tensor.quantization = view.quantization
    return tensor


def quantize(
    x: Any,
    dtype: str = "int8",
    granularity: str | None = None,
    block_size: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    smooth: bool = False,
    rotate: bool = False,
    layout: str = "bhsd",
    *,
    context: MFAContext | None = None,
) -> QuantizedTensor:
    """Quantise a tensor to INT8 or INT4.

    Parameters
    ----------
    x : array
        float32, float16, bfloat16 or float64, of any strides: NumPy, PyTorch on the CPU or a DLPack producer. Shapes as in `attention`.
    dtype : {"int8", "int4"}
        Codes: symmetric -127 ... 127 and -7 ... 7, asymmetric -128 ... 127 and -8 ... 7.
    granularity : {"tensor", "head", "token", "block", "channel", "group"}, optional
        Which elements share a scale; the finer, the smaller the error and the larger the scales. By default what suits the dtype:
        ``"token"``, for INT4 with zero points.
    block_size : int, optional
        Tokens that share a scale, for ``"block"``; 64 by default.
    group_size : int, optional
        Channels that share a scale, for ``"group"``; 32 by default.
    symmetric : bool, optional
        False: with zero points, for data that do not lie around 0 and for few codes. By default True, except for INT4 without a
        `granularity`.
    smooth : bool
        Subtract each channel's mean over the tokens first, as SageAttention does [1]_. For keys only.
    rotate : bool
        Apply a Walsh-Hadamard transform to each row first, which spreads outliers over the channels, as QuaRot does [2]_. Query and key of
        one call are rotated alike.
    layout : {"bhsd", "bshd"}
        Order of the axes, as in `attention`.
    context : MFAContext, optional
        By default one a thread. Codes do not depend on its number of threads.

    Returns
    -------
    QuantizedTensor
        On new memory, of the framework of `x`.

    Raises
    ------
    InvalidArgumentError
        For an unknown choice, or a value of `x` that is not finite.
    InvalidTypeError
        For a dtype that is not a float type.
    InvalidDimensionsError
        For a shape that is not one of `attention`'s.
    UnsupportedError
        For a granularity that this version does not serve.

    References
    ----------
    .. [1] Zhang et al., "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration", 2024.
    .. [2] Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024.

    Examples
    --------
    >>> keys = umfa.quantize(k, "int8", granularity="token")
    >>> output = umfa.attention(q, keys, v)
    """
    function = "umfa.quantize"
    layout = choice(function, "layout", layout, LAYOUTS)
    fields = _checked_fields(function, dtype, granularity, block_size, group_size, symmetric, smooth, rotate)
    scheme = QuantizationScheme(**fields)
    view = view_of(function, "x", x)
    if view.precision not in FLOATS:
        raise InvalidTypeError(f"{function}: x: expected dtype float32, float16, bfloat16 or float64, got {precision_name(view.precision)}")
    source = _tensor(function, "x", view, layout)
    shape = view.shape
    code_shape = shape if dtype == "int8" else (*shape[:-1], (shape[-1] + 1) // 2)
    scale_shape = _scales_shape(shape, layout, str(scheme.granularity), scheme.block_size, scheme.group_size)
    means_shape = _scales_shape(shape, layout, "channel", None, None)
    result = QuantizedTensor(
        NUMPY.empty(function, code_shape, _PRECISIONS[dtype]),
        allocate(function, scale_shape, np.float32),
        None if scheme.symmetric else allocate(function, scale_shape, np.int32),
        allocate(function, means_shape, np.float32) if scheme.smooth else None,
        shape=shape,
        granularity=str(scheme.granularity),
        block_size=scheme.block_size,
        group_size=scheme.group_size,
        rotated=scheme.rotate,
        layout=layout,
    )
    if view.framework is not NUMPY:
        result._framework = view.framework
        result._describe()
    target = _tensor(function, "result", result._view, layout)
    context_for(function, context).call(function, lib.mfa_quantize, source, target)
    return result
