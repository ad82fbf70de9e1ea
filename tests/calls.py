"""Problems of cases.py as the C functions take them: descriptors, results that begin as 7, and gradients of everything."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

import native
import umfa
from cases import Problem
from native import NULL, Descriptor


class Arrays(Protocol):
    """Where the arrays of a problem lie."""

    def put(self, array: np.ndarray | None, dtype: Any = None) -> np.ndarray | None:
        """The same array there."""


class HostArrays:
    """In the host's memory, where they are."""

    def put(self, array: np.ndarray | None, dtype: Any = None) -> np.ndarray | None:
        return array if array is None else np.asarray(array, dtype)


class Call:
    """A problem as descriptors, with every array wherever `arrays.put` puts it, and its results."""

    def __init__(self, made: Problem, arrays: Arrays):
        put, words = arrays.put, dict(made.keywords)
        sizes = made.sizes
        self.operands = []
        tensors = []
        for operand, shape in zip(made.arguments, (sizes.query, sizes.key, sizes.value)):
            quantization: Any = NULL
            data = operand
            if isinstance(operand, umfa.QuantizedTensor):
                data = operand.data
                granularity = ("tensor", "head", "token", "block", "channel", "group").index(operand.granularity)
                parts = {"scales": put(operand.scales), "zero_points": put(operand.zero_points), "granularity": granularity}
                parts["channel_means"] = put(operand.channel_means)
                self.operands.append(parts)
                quantization = Descriptor("mfa_quantization_t", **{name: part for name, part in parts.items() if part is not None})
            placed = put(data)
            self.operands.append(placed)
            precision = native.INT4 if data.dtype == np.uint8 else None
            tensors.append(native.tensor(placed, precision, shape, quantization=quantization))
        real = np.float64 if made.arithmetic == "float64" else np.float32
        self.output = put(np.full(sizes.output, 7, real))
        self.logsumexp = put(np.full(sizes.statistics, 7, real))
        causal = words.get("causal", False)
        fields: dict[str, Any] = {"logsumexp": self.logsumexp, "causal": int(causal is not False)}
        fields["softmax_scale"] = words.get("scale", 1 / np.sqrt(sizes.channels))
        fields["alignment"] = int(causal == "lower_right")
        if "window" in words:
            fields["window_left"], fields["window_right"] = words["window"]
        if "query_offset" in words:
            fields["query_offsets"] = put(np.atleast_1d(words["query_offset"]), np.int64)
            fields["num_query_offsets"] = fields["query_offsets"].size
        if "kv_lengths" in words:
            self.lengths = fields["kv_lengths"] = put(words["kv_lengths"], np.int64)
        for name in ("alibi_slopes", "sinks"):
            if name in words:
                fields[name] = put(words[name])
        if "mask" in words:
            mask = put(words["mask"])
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            fields["mask"] = native.tensor(mask)
        for name in ("softcap", "dropout_p", "seed", "dropout_offset"):
            if name in words:
                fields[name] = words[name]
        self.descriptor = native.attention(*tensors, native.tensor(self.output), **fields)

    @property
    def pointer(self) -> Any:
        return self.descriptor.pointer

    def untouched(self) -> bool:
        return bool((self.output == 7).all() and (self.logsumexp == 7).all())


class Gradients:
    """All gradients of a call, for a gradient of its output that depends on its shape alone."""

    def __init__(self, call: Call, arrays: Arrays, **words: Any):
        put, real = arrays.put, call.output.dtype
        rng = np.random.default_rng(7)
        self.results: dict[str, np.ndarray] = {}
        fields: dict[str, Any] = {"grad_output": native.tensor(put(rng.normal(size=call.output.shape).astype(real)))}
        fields["grad_logsumexp"] = put(rng.normal(size=call.logsumexp.shape).astype(real))
        for name in ("query", "key", "value", "mask"):
            tensor = getattr(call.pointer, name)
            if tensor and (name != "mask" or tensor.precision != native.BOOL):
                shape = tuple(max(size, 1) for size in tensor.shape)
                made = self.results[name] = put(np.full(shape, 7, real))
                fields[f"grad_{name}"] = native.tensor(made)
        statistics = {"d_values": call.logsumexp.shape}
        for name in ("sinks", "alibi_slopes"):
            if getattr(call.pointer, name):
                statistics[f"grad_{name}"] = call.logsumexp.shape[1:2]
        for name, shape in statistics.items():
            fields[name] = self.results[name] = put(np.full(shape, 7, real))
        self.descriptor = Descriptor("mfa_attention_gradients_t", **fields)

    @property
    def pointer(self) -> Any:
        return self.descriptor.pointer

    def untouched(self) -> bool:
        return all((array == 7).all() for array in self.results.values())
