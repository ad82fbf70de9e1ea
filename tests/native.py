"""The C functions as C callers use them: addresses and structures by hand. For tests of the C interface; others use the package."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np

from umfa._library import NULL, ffi, lib

SUCCESS, INVALID_CONTEXT, ALLOCATION_FAILED, INVALID_DIMENSIONS, EXECUTION_FAILED, INVALID_ARGUMENT, UNSUPPORTED, UNAVAILABLE = range(8)
FP32, FP16, BF16, FP64, INT4, INT8, BOOL = (
    ffi.integer_const(f"MFA_PRECISION_{name}") for name in ("FP32", "FP16", "BF16", "FP64", "INT4", "INT8", "BOOL")
)
PRECISIONS = {"float32": FP32, "float16": FP16, "bfloat16": BF16, "float64": FP64, "int4": INT4, "int8": INT8}
DTYPES = {FP32: np.float32, FP16: np.float16, BF16: ml_dtypes.bfloat16, FP64: np.float64, INT4: np.uint8, INT8: np.int8, BOOL: np.bool_}

__all__ = ["NULL", "ffi", "lib"]


def address(array: np.ndarray | None) -> Any:
    """The address of an array's first element; NULL for None."""
    return NULL if array is None else ffi.cast("void *", array.__array_interface__["data"][0])


class Context:
    """A context made by the C function, destroyed at the end of a with block."""

    def __init__(self, num_threads: int = 0, device: int = lib.MFA_DEVICE_CPU):
        options = new("mfa_context_options_t", device=device, num_threads=num_threads)
        handle = ffi.new("mfa_context_t **")
        assert lib.mfa_create_context_with_options(options, handle) == SUCCESS
        self.handle = handle[0]

    def __enter__(self) -> Any:
        return self.handle

    def __exit__(self, *_: object) -> None:
        lib.mfa_destroy_context(self.handle)


def message(handle: Any) -> str:
    """The last error of a context, or of this thread for NULL."""
    return ffi.string(lib.mfa_last_error(handle)).decode()


def new(kind: str, **fields: Any) -> Any:
    """A structure with its size and some fields set."""
    structure = ffi.new(f"{kind} *")
    structure.struct_size = ffi.sizeof(kind)
    for name, value in fields.items():
        setattr(structure, name, value)
    return structure


class Descriptor:
    """A structure together with all that it points to."""

    def __init__(self, kind: str, keep: Any = (), **fields: Any):
        self.keep = [keep]
        plain = {}
        for name, value in fields.items():
            self.keep.append(value)
            plain[name] = value.pointer if isinstance(value, Descriptor) else address(value) if isinstance(value, np.ndarray) else value
        for name in ("query_offsets", "kv_lengths"):
            if isinstance(fields.get(name), np.ndarray):
                plain[name] = ffi.cast("int64_t *", plain[name])
        for name in ("scales", "channel_means"):
            if isinstance(fields.get(name), np.ndarray):
                plain[name] = ffi.cast("float *", plain[name])
        if isinstance(fields.get("zero_points"), np.ndarray):
            plain["zero_points"] = ffi.cast("int32_t *", plain["zero_points"])
        self.pointer = new(kind, **plain)


def tensor(array: np.ndarray, precision: int | None = None, shape: Any = None, strides: Any = None, quantization: Any = NULL) -> Descriptor:
    """A tensor descriptor of a four-dimensional array in the order batch, heads, tokens, channels."""
    if precision is None:
        precision = PRECISIONS.get(str(array.dtype), BOOL)
    if strides is None:
        strides = [stride // array.itemsize for stride in array.strides]
        if precision == INT4:
            strides = [2 * stride for stride in strides[:3]] + [strides[3]]
    return Descriptor(
        "mfa_tensor_t", precision=precision, data=array, shape=list(shape or array.shape), strides=list(strides), quantization=quantization
    )


def attention(query: Any, key: Any, value: Any, output: Any = NULL, **fields: Any) -> Descriptor:
    """A problem's descriptor with the defaults of mfa_attention_initialize()."""
    made = Descriptor("mfa_attention_t", query=query, key=key, value=value, output=output)
    structure = made.pointer
    blank = ffi.new("mfa_attention_t *")
    assert lib.mfa_attention_initialize(blank, ffi.sizeof("mfa_attention_t")) == SUCCESS
    for name in ("softmax_scale", "window_left", "window_right"):
        setattr(structure, name, getattr(blank, name))
    others = Descriptor("mfa_attention_t", **fields)
    made.keep.append(others)
    for name in fields:
        setattr(structure, name, getattr(others.pointer, name))
    return made


class Flat:
    """The arguments of one call of the flat functions, by name, to be changed before the call."""

    def __init__(
        self,
        rng: np.random.Generator,
        precisions: tuple[str, str, str] = ("float32",) * 3,
        transposes: tuple[bool, bool, bool, bool] = (False,) * 4,
        sizes: tuple[int, int, int, int, int] = (2, 7, 11, 3, 9),
        causal: bool = False,
    ):
        batch, rows, columns, heads, channels = self.sizes = sizes
        self.precisions = [PRECISIONS[name] for name in precisions]
        self.transposes = transposes
        self.scale, self.causal = 0.25, causal
        self.scales = [float(np.float32(value)) for value in rng.uniform(0.01, 0.02, 3)]
        self.zero_points = [int(value) for value in rng.integers(-9, 10, 3)]
        for index, name in enumerate(precisions):
            if name == "int4":
                self.scales[index] *= 16
        self.real, self.arrays = [], []
        for index, (precision, tokens) in enumerate(zip(self.precisions, (rows, columns, columns))):
            array, real = self._operand(rng, precision, (batch, tokens, heads, channels), transposes[index], index)
            self.arrays.append(array)
            self.real.append(real)
        self.output_dtype = DTYPES[self.precisions[0]] if self.precisions[0] in (FP32, FP16, BF16) else np.float32
        self.output = np.full((batch, heads, channels, rows) if transposes[3] else (batch, rows, heads, channels), 7, self.output_dtype)
        self.logsumexp = np.full((batch, heads, rows), 7, np.float32)
        self.grad_output = rng.normal(size=(batch, rows, heads, channels)).astype(np.float32)
        self.grad_query, self.d_values = np.full_like(self.grad_output, 7), np.full_like(self.logsumexp, 7)
        self.grad_key, self.grad_value = (np.full((batch, columns, heads, channels), 7, np.float32) for _ in range(2))

    def _operand(self, rng, precision, shape, transposed, index):
        if precision in (INT8, INT4):
            low, high = (-128, 128) if precision == INT8 else (-8, 8)
            codes = rng.integers(low, high, shape)
            real = (self.scales[index] * (codes - self.zero_points[index])).astype(np.float64)
            if precision == INT4:
                import reference

                array = reference.pack_int4(codes)
            else:
                array = codes.astype(np.int8)
        else:
            array = rng.normal(size=shape).astype(DTYPES[precision])
            real = array.astype(np.float64)
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1) if transposed else array), real.transpose(0, 2, 1, 3)

    @property
    def views(self) -> list[np.ndarray]:
        """Q, K, V and the output in the order batch, heads, tokens, channels (bytes for INT4)."""
        arrays = [*self.arrays, self.output]
        return [array.swapaxes(2, 3) if flag else array.swapaxes(1, 2) for array, flag in zip(arrays, self.transposes)]

    def forward(self, context: Any, **changes: Any) -> int:
        """mfa_attention_forward()."""
        words = self._words(changes)
        quantized = ("logsumexp_ptr", *[f"{name}_{part}" for name in "qkv" for part in ("scale", "zero_point")])
        return lib.mfa_attention_forward(context, *[value for name, value in words.items() if name not in quantized])

    def forward_quantized(self, context: Any, **changes: Any) -> int:
        """mfa_attention_forward_quantized()."""
        return lib.mfa_attention_forward_quantized(context, *self._words(changes).values())

    def _words(self, changes: dict[str, Any]) -> dict[str, Any]:
        names = ("query_ptr", "key_ptr", "value_ptr")
        words: dict[str, Any] = {name: address(array) for name, array in zip(names, self.arrays)}
        words |= {"output_ptr": address(self.output), "logsumexp_ptr": address(self.logsumexp)}
        words |= dict(zip(("batch_size", "seq_len_q", "seq_len_kv", "num_heads", "head_dim"), self.sizes))
        words |= {"softmax_scale": self.scale, "causal": self.causal}
        words |= {f"{name}_precision": precision for name, precision in zip("qkv", self.precisions)}
        for index, name in enumerate("qkv"):
            words |= {f"{name}_scale": self.scales[index], f"{name}_zero_point": self.zero_points[index]}
        words |= {f"transpose_{name}": flag for name, flag in zip("qkvo", self.transposes)}
        return self._changed(words, changes)

    def backward_query(self, context: Any, **changes: Any) -> int:
        """mfa_attention_backward_query_quantized()."""
        words = self._backward_words(("grad_query_ptr", "d_values_ptr"), (self.grad_query, self.d_values), "q")
        return lib.mfa_attention_backward_query_quantized(context, *self._changed(words, changes).values())

    def backward_kv(self, context: Any, **changes: Any) -> int:
        """mfa_attention_backward_kv_quantized()."""
        names = ("d_values_ptr", "grad_key_ptr", "grad_value_ptr")
        words = self._backward_words(names, (self.d_values, self.grad_key, self.grad_value), "qkv")
        return lib.mfa_attention_backward_kv_quantized(context, *self._changed(words, changes).values())

    def _backward_words(self, names, arrays, scaled) -> dict[str, Any]:
        words = {name: address(array) for name, array in zip(("query_ptr", "key_ptr", "value_ptr"), self.arrays)}
        words |= {"grad_output_ptr": address(self.grad_output), "logsumexp_ptr": address(self.logsumexp)}
        words |= {name: address(array) for name, array in zip(names, arrays)}
        words |= dict(zip(("batch_size", "seq_len_q", "seq_len_kv", "num_heads", "head_dim"), self.sizes))
        for index, name in enumerate(scaled):
            words |= {f"{name}_scale": self.scales[index], f"{name}_zero_point": self.zero_points[index]}
        return words

    @staticmethod
    def _changed(words: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        assert set(changes) <= set(words), "a test names an argument that there is not"
        return {**words, **changes}

    @property
    def outputs(self) -> dict[str, np.ndarray]:
        """All that the four calls write."""
        names = ("output", "logsumexp", "grad_query", "d_values", "grad_key", "grad_value")
        return {name: getattr(self, name) for name in names}

    def snapshot(self) -> dict[str, bytes]:
        """The bytes of inputs and outputs."""
        inputs = {f"input {index}": array for index, array in enumerate([*self.arrays, self.grad_output])}
        return {name: array.tobytes() for name, array in itertools.chain(inputs.items(), self.outputs.items())}

    def general(self, output: Any = None, with_logsumexp: bool = True, **fields: Any) -> Descriptor:
        """The same problem as descriptors."""
        batch, rows, columns, heads, channels = self.sizes
        tensors = []
        for index, (view, precision) in enumerate(zip(self.views, self.precisions)):
            quantization: Any = NULL
            if precision in (INT8, INT4):
                parts = {"scales": np.array(self.scales[index], np.float32), "zero_points": np.array(self.zero_points[index], np.int32)}
                quantization = Descriptor("mfa_quantization_t", **parts)
            shape = (batch, heads, rows if index == 0 else columns, channels)
            tensors.append(tensor(view, precision, shape, quantization=quantization))
        if with_logsumexp:
            fields["logsumexp"] = self.logsumexp
        made = attention(
            *tensors, tensor(self.views[3]) if output is None else output, softmax_scale=self.scale, causal=int(self.causal), **fields
        )
        return made
