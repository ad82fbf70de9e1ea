"""Sizes that numbers of 32 or 64 bits cannot hold: what memory cannot have is refused, what it can have is computed right."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import figures
import native
import reference
from native import INVALID_ARGUMENT, INVALID_DIMENSIONS, NULL, SUCCESS, UNSUPPORTED, Context, Descriptor, ffi, lib
from sparse import FAR, Sparse, resident, stretched

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory of many GiB that is not there is made as on Linux")

# ---- What is refused ---------------------------------------------------------------------------------------------------------------------

LARGEST = 2**63 - 1
SIZES = (0, 1, 2, 3, 255, 2**15, 2**16, 2**21, 2**31 - 1, 2**31, 2**32 - 1)
STRIDES = (0, 1, -1, 2, 2**20, 2**31, 2**32, -(2**32), 2**40, 2**58, 2**59, 2**60, -(2**60), 2**61, 2**62, -(2**62), 2**63 - 2, -(2**63))
ADDRESS = 2**46  # nothing is there; inquiries read no data
UNITS = {native.FP32: 4, native.FP16: 2, native.FP64: 8, native.INT8: 1, native.INT4: 1}


def refused(shape: list[int], strides: list[int], precision: int) -> bool:
    """Whether memory cannot have a tensor, by the rules of mfa.h in integers without limits."""
    if 0 in shape:
        return False
    if 8 * np.prod(np.array(shape, object)) > LARGEST:
        return True
    spans = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    if precision == native.INT4:  # two codes a byte, by the strides of bytes
        spans = [(size - 1) * (stride // 2) for size, stride in zip(shape[:3], strides[:3], strict=True)]
        spans.append(((shape[3] + 1) // 2 - 1) * strides[3])
    below, above = -sum(span for span in spans if span < 0), sum(span for span in spans if span > 0)
    if max(below, above) > LARGEST // 8 - 1:
        return True
    unit = UNITS[precision]
    return below * unit > ADDRESS or ADDRESS + above * unit + unit >= 2**64


def tensor_of(shape: list[int], strides: list[int], precision: int) -> Any:
    return native.new("mfa_tensor_t", precision=precision, data=ffi.cast("void *", ADDRESS), shape=shape, strides=strides)


def contiguous(shape: list[int], precision: int = native.FP32) -> list[int]:
    """Strides in codes or elements, wrapped as C would."""
    sizes = [*shape[:3], shape[3] + shape[3] % 2 if precision == native.INT4 else shape[3]]
    steps = [sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1]
    return [(step + 2**63) % 2**64 - 2**63 for step in steps]


@pytest.mark.parametrize("name", ["query", "key", "value", "output", "mask"])
def test_attention__any_shape_and_strides__are_refused_exactly_if_memory_cannot_have_them(name, rng):
    """Status 3 is given where exact integers say so, and nowhere else."""
    counted = {True: 0, False: 0}
    with Context(1) as context:
        for _ in range(figures.pick(300, 4000)):
            batch, heads, rows, columns = (int(rng.choice(SIZES)) for _ in range(4))
            channels = int(rng.choice((1, 2, 3, 64, 1024)))
            heads = heads or 1
            precision = int(rng.choice(list(UNITS) if name in ("query", "key", "value") else (native.FP32, native.FP16)))
            queries, keys, scores = [batch, heads, rows, channels], [batch, heads, columns, channels], [batch, heads, rows, columns]
            shapes = {"query": queries, "key": keys, "value": keys, "output": queries, "mask": scores}
            tensors, wrong = {}, False
            for each, shape in shapes.items():
                kind, strides = native.FP32, contiguous(shape)
                if each == name:
                    kind, strides = precision, contiguous(shape, precision)
                    for axis in range(4):
                        if rng.random() < 0.4:
                            strides[axis] = int(rng.choice(np.array(STRIDES, object)))
                    if kind == native.INT4:
                        strides = [stride - stride % 2 for stride in strides[:3]] + strides[3:]
                if each != "mask" or name == "mask":
                    tensors[each] = tensor_of(shape, strides, kind)
                    wrong = wrong or refused(shape, strides, kind)
            attention = native.attention(*(tensors[each] for each in ("query", "key", "value", "output")))
            attention.pointer.mask = tensors.get("mask", NULL)
            status = lib.mfa_attention_workspace_size(context, attention.pointer, NULL, ffi.new("uint64_t *"))
            assert (status == INVALID_DIMENSIONS) == wrong, (
                status,
                native.message(context),
                shapes,
                list(tensors[name].strides),
                precision,
            )
            # What else may be wrong is an output that overlaps itself or something, or a workspace that no machine has.
            assert status in (SUCCESS, native.ALLOCATION_FAILED, INVALID_DIMENSIONS, INVALID_ARGUMENT, UNSUPPORTED)
            counted[wrong] += 1
    assert min(counted.values()) > 20, counted
    figures.add("sizes", shapes_and_strides_tried=sum(counted.values()), of_these_refused_rightly=counted[True])


# ---- What is computed --------------------------------------------------------------------------------------------------------------------

Place = Callable[[str, np.ndarray], np.ndarray]
Values = dict[str, np.ndarray]

FLOATS = {"float64": np.float64, "float32": np.float32, "float16": native.DTYPES[native.FP16], "bfloat16": native.DTYPES[native.BF16]}
HEADS, KV_HEADS, BATCH = 4, 2, 2
# Rows, columns and channels: decoding over several blocks, rows that fill no vector, several tiles.
SHAPES = ((3, 300, 32), (21, 37, 7), (70, 150, 32))


def quantization(rng: np.random.Generator, shape: tuple[int, ...]) -> Descriptor:
    return Descriptor(
        "mfa_quantization_t",
        granularity=ffi.integer_const("MFA_GRANULARITY_TOKEN"),
        scales=rng.uniform(0.01, 0.02, shape[:3]).astype(np.float32),
    )


class Problem:
    """Attention of a type, forward and backward, on tensors that lie where they are put."""

    def __init__(self, dtype: str, rows: int, columns: int, channels: int):
        rng = np.random.default_rng(rows)
        self.dtype, self.precision = dtype, native.PRECISIONS[dtype]
        self.real = FLOATS.get(dtype, np.float32)
        wide = np.float64 if dtype == "float64" else np.float32
        keys = (BATCH, KV_HEADS, columns, channels)
        self.shapes = {"query": (BATCH, HEADS, rows, channels), "key": keys, "value": keys}
        self.output_shape, self.scores = self.shapes["query"], (BATCH, HEADS, rows, columns)
        self.inputs: Values = {"mask": rng.normal(size=self.scores).astype(np.float32)}
        self.inputs["mask"][rng.random(self.scores) < 0.2] = -np.inf
        self.scales = {}
        for name, shape in self.shapes.items():
            if dtype in FLOATS:
                self.inputs[name] = rng.normal(size=shape).astype(self.real)
                continue
            low, high = reference.INT_LIMITS[dtype]
            codes = rng.integers(low, high + 1, shape)
            self.inputs[name] = codes.astype(np.int8) if dtype == "int8" else reference.pack_int4(codes)
            self.scales[name] = quantization(rng, shape)
        self.inputs["grad_output"] = rng.normal(size=self.output_shape).astype(self.real)
        self.logsumexp, self.d_values = (np.zeros(self.output_shape[:3], wide) for _ in range(2))

    def run(self, context: Any, place: Place, backward: bool = True) -> dict[str, bytes]:
        """The bytes of all results."""
        placed = {name: place(name, array) for name, array in self.inputs.items()}
        operands = [
            native.tensor(placed[name], self.precision, shape, quantization=self.scales[name].pointer if self.scales else NULL)
            for name, shape in self.shapes.items()
        ]
        results = {"output": place("output", np.zeros(self.output_shape, self.real))}
        described = native.attention(
            *operands, native.tensor(results["output"]), mask=native.tensor(placed["mask"]), logsumexp=self.logsumexp, softmax_scale=0.3
        )
        assert lib.mfa_attention_run_forward(context, described.pointer) == SUCCESS, native.message(context)
        if backward:
            shapes = {"grad_query": "query", "grad_key": "key", "grad_value": "value"}
            results |= {name: place(name, np.zeros(self.shapes[of], self.real)) for name, of in shapes.items()}
            results["grad_mask"] = place("grad_mask", np.zeros(self.scores, np.float32))
            wanted = Descriptor(
                "mfa_attention_gradients_t",
                grad_output=native.tensor(placed["grad_output"]),
                d_values=self.d_values,
                **{name: native.tensor(array) for name, array in results.items() if name != "output"},
            )
            assert lib.mfa_attention_run_backward(context, described.pointer, wanted.pointer) == SUCCESS, native.message(context)
        found = {name: array.tobytes() for name, array in results.items()}
        return {**found, "logsumexp": self.logsumexp.tobytes()}


class Far:
    """Puts tensors where an index is beyond 2^32, along one axis; on a device with memory of its own in buffers of it."""

    def __init__(self, context: Any, device: int, axis: int, backwards: bool):
        self.context, self.device, self.axis, self.backwards = context, device, axis, backwards
        self.memories: list[Sparse] = []
        self.buffers: list[Any] = []

    def __call__(self, name: str, array: np.ndarray) -> np.ndarray:
        copy, memory = stretched(array, self.axis, self.backwards)
        assert memory is not None, f"{name} has one element along axis {self.axis}"
        self.memories.append(memory)
        if self.device != lib.MFA_DEVICE_CPU:
            buffer = ffi.new("mfa_buffer_t **")
            status = lib.mfa_create_buffer_from_memory(self.context, ffi.cast("void *", memory.start), memory.size, buffer)
            assert status == SUCCESS, native.message(self.context)
            self.buffers.append(buffer[0])
        return copy

    def close(self) -> None:
        for buffer in self.buffers:
            lib.mfa_destroy_buffer(buffer)


_most_resident = [0]


def far_away(tensors: int, mebibytes: int = 0) -> None:
    """Count a problem that gave the bits of compact memory, and what it made resident."""
    _most_resident.append(mebibytes)
    figures.add("sizes", problems_beyond_32_bits_with_the_bits_of_compact_memory=1, tensors_of_these_problems=tensors)
    figures.record("sizes", MiB_made_resident_by_one_problem_at_most=max(_most_resident))


@contextlib.contextmanager
def backend(kernels: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, int]]:
    """A context with some kernels, or on a device."""
    device = lib.MFA_DEVICE_SOFTMETAL if kernels == "softmetal" else lib.MFA_DEVICE_CPU
    if not lib.mfa_device_is_available(device):
        pytest.skip(f"there is no device {kernels!r} here")
    monkeypatch.setenv("MFA_KERNELS", "" if kernels == "softmetal" else kernels)
    with Context(2, device) as context:
        yield context, device


# By default, the kernels that are best here.
TRIED = [
    (kernels, dtype)
    for kernels in ("", "float", "reference", "baseline", "softmetal")
    for dtype in (*FLOATS, "int8", "int4")
    if (kernels, dtype) not in (("float", "float64"), ("softmetal", "float64"))
]


@on_linux
@pytest.mark.parametrize(("kernels", "dtype"), TRIED)
def test_attention__elements_more_than_two_to_the_32_apart__gives_the_bits_of_compact_memory(kernels, dtype, monkeypatch):
    before = resident()
    with backend(kernels, monkeypatch) as (context, device):
        for shape in SHAPES:
            problem = Problem(dtype, *shape)
            expected = problem.run(context, lambda name, array: array.copy())
            for axis, backwards in figures.pick(((2, False),), [(axis, way) for axis in range(4) for way in (False, True)]):
                far = Far(context, device, axis, backwards)
                found = problem.run(context, far)
                mebibytes = resident() - before
                assert mebibytes < 4096, "this is not sparse"
                far.close()
                assert [name for name in found if found[name] != expected[name]] == [], f"{shape}, axis {axis}, {backwards=}"
                far_away(len(far.memories), mebibytes)


@on_linux
@pytest.mark.parametrize("kernels", ["", "reference", "baseline", "softmetal"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantize__elements_more_than_two_to_the_32_apart__gives_the_bits_of_compact_memory(dtype, kernels, monkeypatch, rng):
    values = rng.normal(size=(2, 3, 9, 12)).astype(np.float32)
    shape = (*values.shape[:3], 12 if dtype == "int8" else 6)

    def run(context: Any, place: Place) -> list[bytes]:
        source = place("input", values)
        codes = place("codes", np.zeros(shape, np.int8 if dtype == "int8" else np.uint8))
        back = place("output", np.zeros_like(values))
        scales = Descriptor("mfa_quantization_t", granularity=2, scales=np.zeros(values.shape[:3], np.float32))
        tensor = native.tensor(codes, native.PRECISIONS[dtype], values.shape, quantization=scales.pointer)
        assert lib.mfa_quantize(context, native.tensor(source).pointer, tensor.pointer) == SUCCESS, native.message(context)
        assert lib.mfa_dequantize(context, tensor.pointer, native.tensor(back).pointer) == SUCCESS, native.message(context)
        return [codes.tobytes(), back.tobytes()]

    with backend(kernels, monkeypatch) as (context, device):
        expected = run(context, lambda name, array: array.copy())
        for axis in range(4):
            far = Far(context, device, axis, axis % 2 == 1)
            assert run(context, far) == expected, f"axis {axis}"
            far.close()
            far_away(3)


@on_linux
def test_merge__elements_more_than_two_to_the_32_apart__gives_the_bits_of_compact_memory(rng):
    parts = [rng.normal(size=(2, 3, 9, 12)).astype(np.float32) for _ in range(2)]
    statistics = [rng.normal(size=(2, 3, 9)).astype(np.float32) for _ in range(3)]

    def run(context: Any, place: Place) -> bytes:
        a, b = (native.tensor(place("part", array)) for array in parts)
        output = place("output", np.zeros_like(parts[0]))
        lse_a, lse_b, lse = (native.address(array) for array in statistics)
        status = lib.mfa_attention_merge(context, a.pointer, lse_a, b.pointer, lse_b, native.tensor(output).pointer, lse, native.FP32)
        assert status == SUCCESS, native.message(context)
        return output.tobytes()

    with Context(2) as context:
        expected = run(context, lambda name, array: array.copy())
        for axis in range(4):
            far = Far(context, lib.MFA_DEVICE_CPU, axis, False)
            assert run(context, far) == expected, f"axis {axis}"
            far_away(3)


@on_linux
@pytest.mark.skipif(not figures.FULL, reason="takes minutes: in full size only")
@pytest.mark.timeout(1800)
def test_attention__more_than_two_to_the_32_rows__writes_each_of_them():
    """Results are contiguous arrays of 16 GiB that repeat 2 MiB, but for those of the last head, which are what 32 bits cannot count."""
    heads, rows, repeated = 2**16 + 1, 2**16, 4 * FAR
    period = bytes(2**21)
    memories = [Sparse(repeated + 4 * rows) for _ in range(2)]
    for memory in memories:
        memory.repeat(repeated, period)
    output, logsumexp = (memory.bytes[: repeated + 4 * rows].view(np.float32) for memory in memories)
    output[-rows:] = 7
    before = resident()
    query = native.tensor(np.ones((1, 1, 1, 1), np.float32), shape=(1, heads, rows, 1), strides=(0, 0, 0, 1))
    keys = native.tensor(np.ones((1, 1, 1, 1), np.float32), shape=(1, 1, 0, 1), strides=(0, 0, 0, 1))
    sinks = 1 + np.arange(heads, dtype=np.float32) % 8  # as many heads repeat as 2 MiB hold
    made = native.tensor(output.reshape(1, heads, rows, 1))
    described = native.attention(query, keys, keys, made, logsumexp=logsumexp.reshape(1, heads, rows), sinks=sinks)
    with Context() as context:
        assert lib.mfa_attention_run_forward(context, described.pointer) == SUCCESS, native.message(context)
    assert not output[-rows:].any(), "a row of the last head was not written"
    assert (logsumexp[-rows:] == sinks[-1]).all()
    assert (logsumexp[: 8 * rows] == np.repeat(sinks[:8], rows)).all()
    assert not output[: 8 * rows].any()
    figures.record("sizes", query_rows_of_one_call=heads * rows)
    assert resident() - before < 2 * 4 * FAR // 2**20 + 1024, "pages that are in many places count in each"
