"""Bad input to the C functions that takes more than one bad value: what does not go together, overlaps, or lies in arrays, and the order in
which several mistakes are reported. The documented status, not a byte changed, and the context as good as before. test_misuse_everywhere.py
has each bad value by itself.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

import native
import umfa
from native import (
    ALLOCATION_FAILED,
    INT8,
    INVALID_ARGUMENT,
    INVALID_CONTEXT,
    INVALID_DIMENSIONS,
    NULL,
    SUCCESS,
    UNAVAILABLE,
    UNSUPPORTED,
    Context,
    Descriptor,
    address,
    ffi,
    lib,
    message,
)

NAN, INF = math.nan, math.inf
CANARY = 0x5A


class Guarded:
    """An array with canaries before and after it in memory."""

    PAD = 256

    def __init__(self, shape, dtype=np.float32):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.memory = np.full(size + 2 * self.PAD, CANARY, np.uint8)
        self.array = self.memory[self.PAD : self.PAD + size].view(dtype).reshape(shape)


class Given:
    """A problem that is right in all respects, as structures, to be spoilt by a test."""

    def __init__(self, rng, dtype=np.float32):
        self.shapes = {
            "query": (2, 4, 5, 8),
            "key": (2, 2, 7, 8),
            "value": (2, 2, 7, 6),
            "output": (2, 4, 5, 6),
            "mask": (1, 4, 1, 7),
            "grad_output": (2, 4, 5, 6),
        }
        self.arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in self.shapes.items()}
        statistics = np.float64 if dtype == np.float64 else np.float32
        self.arrays |= {name: np.full(4, 0.5, statistics) for name in ("alibi_slopes", "sinks")}
        self.arrays |= {"kv_lengths": np.array([7, 3]), "query_offsets": np.array([1, 2])}
        shapes = {
            "output": (2, 4, 5, 6),
            "logsumexp": (2, 4, 5),
            "d_values": (2, 4, 5),
            "grad_query": (2, 4, 5, 8),
            "grad_key": (2, 2, 7, 8),
            "grad_value": (2, 2, 7, 6),
            "grad_mask": (1, 4, 1, 7),
            "grad_sinks": (4,),
            "grad_alibi_slopes": (4,),
        }
        self.guarded = {name: Guarded(shape, dtype if name == "output" else statistics) for name, shape in shapes.items()}
        self.arrays |= {name: guarded.array for name, guarded in self.guarded.items()}
        self.arrays["logsumexp"][...] = 1
        names = ("query", "key", "value", "output", "mask", "grad_output", "grad_query", "grad_key", "grad_value", "grad_mask")
        self.descriptors = {name: native.tensor(self.arrays[name]) for name in names}
        options = {name: self.arrays[name] for name in ("logsumexp", "alibi_slopes", "sinks", "kv_lengths", "query_offsets")}
        tensors = [self.descriptors[name] for name in names[:4]]
        self.keep = native.attention(*tensors, mask=self.descriptors["mask"], num_query_offsets=2, causal=1, softmax_scale=0.25, **options)
        self.attention = self.keep.pointer
        results = {name: self.descriptors[name] for name in names[5:]}
        results |= {name: self.arrays[name] for name in ("d_values", "grad_sinks", "grad_alibi_slopes")}
        self.keep_gradients = Descriptor("mfa_attention_gradients_t", **results)
        self.gradients = self.keep_gradients.pointer

    def tensor(self, name):
        return self.descriptors[name].pointer

    def scheme(self, **fields):
        """A scheme for `quantize_query` and the like, kept alive."""
        scheme = Descriptor("mfa_quantization_scheme_t", **{"precision": INT8, "granularity": 2, **fields})
        self.keep.keep.append(scheme)
        return scheme.pointer

    def quantized(self, name, **fields):
        """Make an operand INT8 with a quantization of these fields."""
        codes = np.ones(self.shapes[name], np.int8)
        scales, zero_points = np.ones(600, np.float32), np.zeros(600, np.int32)
        quantization = Descriptor("mfa_quantization_t", **{"scales": scales, "zero_points": zero_points, **fields})
        self.keep.keep.append((codes, quantization))
        tensor = self.tensor(name)
        tensor.precision, tensor.data, tensor.quantization = INT8, address(codes), quantization.pointer

    def snapshot(self):
        memory = {name: guarded.memory.tobytes() for name, guarded in self.guarded.items()}
        return memory | {name: array.tobytes() for name, array in self.arrays.items() if name not in memory}

    def run(self, context, call):
        """The status of one of the four functions that take a problem."""
        if call == "forward":
            return lib.mfa_attention_run_forward(context, self.attention)
        if call == "backward":
            return lib.mfa_attention_run_backward(context, self.attention, self.gradients)
        if call == "workspace_size":
            return lib.mfa_attention_workspace_size(context, self.attention, NULL, ffi.new("uint64_t *"))
        if call == "workspace_size of backward":
            return lib.mfa_attention_workspace_size(context, self.attention, self.gradients, ffi.new("uint64_t *"))
        assert call == "kernel_name"
        return lib.mfa_attention_kernel_name(context, self.attention, 0, ffi.new("char **"))


@pytest.fixture(scope="module")
def context():
    with Context() as handle:
        yield handle


@pytest.fixture
def given(rng):
    return Given(rng)


CALLS = ("forward", "backward", "workspace_size", "workspace_size of backward", "kernel_name")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_attention__a_problem_that_is_right__is_served(call, dtype, context, rng):
    given = Given(rng, dtype)
    before = given.snapshot()
    assert given.run(context, call) == SUCCESS, message(context)
    after = given.snapshot()
    changed = {name for name in before if before[name] != after[name]}
    expected = {"forward": {"output", "logsumexp"}, "backward": set(given.guarded) - {"output", "logsumexp"}}
    assert changed == expected.get(call, set())
    for guarded in given.guarded.values():
        pad = Guarded.PAD
        assert (guarded.memory[:pad] == CANARY).all()
        assert (guarded.memory[-pad:] == CANARY).all()


def setting(where, field, value):
    """A mistake: one field of one structure."""

    def spoil(given):
        structure = {"attention": given.attention, "gradients": given.gradients}.get(where) or given.tensor(where)
        name, _, index = field.partition(".")
        if index:
            getattr(structure, name)[int(index)] = value
        else:
            setattr(structure, name, value)

    return spoil


def values_of(name, values):
    """A mistake in an array that the library reads."""

    def spoil(given):
        given.arrays[name][...] = values

    return spoil


def sharing(where, field, other, shift=0):
    """A mistake: a pointer to the memory of another one, given as structure.field; `shift` bytes into it."""

    def spoil(given):
        def structure(name):
            return {"attention": given.attention, "gradients": given.gradients}.get(name) or given.tensor(name)

        name, _, source = other.partition(".")
        target = getattr(structure(name), source or "data")
        setattr(structure(where), field, ffi.cast("char *", target) + shift)

    return spoil


def scheme(name, **fields):
    def spoil(given):
        setattr(given.attention, f"quantize_{name}", given.scheme(**fields))

    return spoil


def quantization(name, **fields):
    def spoil(given):
        given.quantized(name, **fields)

    return spoil


def both(*spoils):
    def spoil(given):
        for one in spoils:
            one(given)

    return spoil


def longer(kind, structure, extra):
    """A structure of a later version: with more bytes behind it."""
    size = ffi.sizeof(kind)
    memory = ffi.new("char[]", size + 16)
    ffi.memmove(memory, structure, size)
    memory[size + 8] = extra
    made = ffi.cast(f"{kind} *", memory)
    made.struct_size = size + 16
    return made, memory


def unserved(given):
    """A mistake that no rule forbids: a scheme of a later version, which sets a field that this one does not know."""
    made, memory = longer("mfa_quantization_scheme_t", given.scheme(), b"\1")
    given.keep.keep.append(memory)
    given.attention.quantize_value = made


SIZE, ARGUMENT = INVALID_DIMENSIONS, INVALID_ARGUMENT
OPERANDS = ("query", "key", "value")
COMMON = {
    "softcap NaN": (setting("attention", "softcap", NAN), ARGUMENT),
    "lower right with offsets": (setting("attention", "alignment", 1), ARGUMENT),
    "query_offsets too large": (values_of("query_offsets", [0, 2**61]), ARGUMENT),
    "query_offsets too small": (values_of("query_offsets", [-(2**63), 0]), ARGUMENT),
    "kv_lengths negative": (values_of("kv_lengths", [7, -1]), SIZE),
    "kv_lengths too large": (values_of("kv_lengths", [8, 0]), SIZE),
    "kv_lengths largest": (values_of("kv_lengths", [2**63 - 1, 0]), SIZE),
    "mask of two batches": (both(setting("mask", "shape.0", 3), setting("mask", "strides.0", 0)), SIZE),
    "mask of codes": (setting("mask", "precision", INT8), ARGUMENT),
    "heads no multiple": (
        both(setting("query", "shape.1", 3), setting("output", "shape.1", 3), setting("grad_output", "shape.1", 3)),
        SIZE,
    ),
    "more key heads than query heads": (both(setting("key", "shape.1", 5), setting("value", "shape.1", 5)), SIZE),
    "rotated query alone": (quantization("query", rotated=1), ARGUMENT),
    "rotated value": (quantization("value", rotated=1), ARGUMENT),
    "smoothed query": (quantization("query", channel_means=np.zeros(64, np.float32)), ARGUMENT),
    "smoothed value": (quantization("value", channel_means=np.zeros(64, np.float32)), ARGUMENT),
    "quantise codes again": (both(quantization("query"), scheme("query")), ARGUMENT),
    "smooth queries": (scheme("query", smooth=1), ARGUMENT),
    "smooth values": (scheme("value", smooth=1), ARGUMENT),
    "rotate keys alone": (scheme("key", rotate=1), ARGUMENT),
    "rotate values": (scheme("value", rotate=1), ARGUMENT),
    "unserved": (unserved, UNSUPPORTED),
}
for operand in OPERANDS:
    COMMON |= {
        f"{operand}: data NULL": (setting(operand, "data", NULL), ARGUMENT),
        f"{operand}: negative size": (setting(operand, "shape.2", -1), SIZE),
        f"{operand}: batch of 3": (setting(operand, "shape.0", 3), SIZE),
        f"{operand}: no heads": (setting(operand, "shape.1", 0), SIZE),
        f"{operand}: no channels": (setting(operand, "shape.3", 0), SIZE),
        f"{operand}: 1025 channels": (setting(operand, "shape.3", 1025), SIZE),
        f"{operand}: block size 0": (quantization(operand, granularity=3, block_size=0), SIZE),
        f"{operand}: group size 0": (quantization(operand, granularity=5, group_size=0), SIZE),
        f"{operand}: odd strides of INT4": (
            both(quantization(operand), setting(operand, "precision", native.INT4), setting(operand, "strides.2", 7)),
            ARGUMENT,
        ),
        f"{operand}: scheme with block size 0": (scheme(operand, granularity=3, block_size=0), SIZE),
        f"{operand}: scheme with group size 0": (scheme(operand, granularity=5, group_size=0), SIZE),
    }
# What only calls that read data can see.
READING = {}
for operand in OPERANDS:
    for bad in (0.0, -1.0, NAN, INF):
        READING[f"{operand}: scale {bad}"] = (quantization(operand, scales=np.full(1, bad, np.float32)), ARGUMENT)
    for bad in (NAN, INF):
        READING[f"{operand}: {bad} to quantise"] = (both(scheme(operand), values_of(operand, bad)), ARGUMENT)
FORWARD = {
    "output of codes": (setting("output", "precision", INT8), ARGUMENT),
    "output: one row too many": (setting("output", "shape.2", 6), SIZE),
    "output: channels of the query": (setting("output", "shape.3", 8), SIZE),
    "output: stride 0": (setting("output", "strides.2", 0), ARGUMENT),
    "output: elements that coincide": (setting("output", "strides.2", 5), ARGUMENT),
    "output on the query": (
        sharing("output", "data", "query"),
        ARGUMENT,
    ),
    "output on the mask": (
        sharing("mask", "data", "output"),
        ARGUMENT,
    ),
    "output on logsumexp": (
        sharing("attention", "logsumexp", "output"),
        ARGUMENT,
    ),
    "output on sinks": (sharing("attention", "sinks", "output"), ARGUMENT),
    "logsumexp on kv_lengths": (
        sharing("attention", "logsumexp", "attention.kv_lengths"),
        ARGUMENT,
    ),
    "logsumexp unaligned": (
        sharing("attention", "logsumexp", "attention.logsumexp", shift=2),
        ARGUMENT,
    ),
}
GRADIENTS = ("grad_query", "grad_key", "grad_value", "grad_mask")
BACKWARD = {
    "d_values given but NULL": (both(setting("gradients", "d_values_given", 1), setting("gradients", "d_values", NULL)), ARGUMENT),
    "logsumexp NULL": (setting("attention", "logsumexp", NULL), ARGUMENT),
    "grad_output of codes": (setting("grad_output", "precision", INT8), ARGUMENT),
    "grad_output of other shape": (setting("grad_output", "shape.2", 4), SIZE),
    "grad_sinks without sinks": (setting("attention", "sinks", NULL), ARGUMENT),
    "grad_alibi_slopes without slopes": (setting("attention", "alibi_slopes", NULL), ARGUMENT),
    "grad_mask without a mask": (setting("attention", "mask", NULL), ARGUMENT),
    "grad_mask of a bool mask": (setting("mask", "precision", native.BOOL), ARGUMENT),
    "d_values on logsumexp": (sharing("gradients", "d_values", "attention.logsumexp"), ARGUMENT),
    "grad_sinks on sinks": (sharing("gradients", "grad_sinks", "attention.sinks"), ARGUMENT),
    "grad_sinks on grad_alibi_slopes": (sharing("gradients", "grad_sinks", "gradients.grad_alibi_slopes"), ARGUMENT),
}
for gradient in GRADIENTS:
    BACKWARD |= {
        f"{gradient}: of codes": (setting(gradient, "precision", INT8), ARGUMENT),
        f"{gradient}: of other shape": (setting(gradient, "shape.3", 5), SIZE),
        f"{gradient}: stride 0": (setting(gradient, "strides.3", 0), ARGUMENT),
        f"{gradient}: on its tensor": (
            sharing(gradient, "data", gradient.removeprefix("grad_")),
            ARGUMENT,
        ),
        f"{gradient}: on grad_output": (
            sharing(gradient, "data", "grad_output"),
            ARGUMENT,
        ),
    }
MISTAKES = [(call, name, *mistake) for call in CALLS for name, mistake in COMMON.items()]
MISTAKES += [(call, name, *mistake) for call in ("forward", "backward") for name, mistake in READING.items()]
MISTAKES += [(call, name, *mistake) for call in ("forward", "workspace_size", "kernel_name") for name, mistake in FORWARD.items()]
MISTAKES += [(call, name, *mistake) for call in ("backward", "workspace_size of backward") for name, mistake in BACKWARD.items()]


@pytest.mark.parametrize(
    ("call", "spoil", "expected"), [(call, *rest) for call, _, *rest in MISTAKES], ids=[f"{call}-{name}" for call, name, *_ in MISTAKES]
)
def test_mfa_attention__each_mistake__returns_its_status_and_changes_nothing(call, spoil, expected, context, given):
    spoil(given)
    before = given.snapshot()
    assert given.run(context, call) == expected, message(context)
    assert message(context)
    assert given.snapshot() == before
    # The context is as good as before.
    assert Given(np.random.default_rng(0)).run(context, call) == SUCCESS


ORDERED = [
    ("sizes before pointers", both(COMMON["query: data NULL"][0], COMMON["key: negative size"][0]), SIZE),
    ("pointers before codes", both(COMMON["query: data NULL"][0], COMMON["mask of codes"][0]), ARGUMENT, "query"),
    ("codes before scalars", both(COMMON["softcap NaN"][0], COMMON["mask of codes"][0]), ARGUMENT, "mask"),
    ("scalars before arrays", both(COMMON["softcap NaN"][0], COMMON["kv_lengths negative"][0]), ARGUMENT, "softcap"),
    ("lengths before scales", both(COMMON["kv_lengths negative"][0], READING["query: scale 0.0"][0]), SIZE),
    ("lengths before overlap", both(COMMON["kv_lengths negative"][0], FORWARD["output on the query"][0]), SIZE),
    ("scales before what is quantised", both(READING["query: scale 0.0"][0], READING["key: nan to quantise"][0]), ARGUMENT, "scales"),
    ("codes before what is not served", both(COMMON["mask of codes"][0], COMMON["unserved"][0]), ARGUMENT),
    ("scales before what is not served", both(READING["query: scale 0.0"][0], COMMON["unserved"][0]), ARGUMENT),
    ("what is quantised before what is not served", both(READING["key: nan to quantise"][0], COMMON["unserved"][0]), ARGUMENT),
    ("overlap before what is not served", both(FORWARD["output on the query"][0], COMMON["unserved"][0]), ARGUMENT),
]


@pytest.mark.parametrize(
    ("spoil", "expected", "words"), [(one[1], one[2], one[3] if len(one) > 3 else "") for one in ORDERED], ids=[one[0] for one in ORDERED]
)
def test_mfa_attention__several_mistakes__reports_the_first_in_order(spoil, expected, words, context, given):
    spoil(given)
    before = given.snapshot()
    assert given.run(context, "forward") == expected
    assert words in message(context)
    assert given.snapshot() == before


HANDLES = ("NULL", "destroyed", "an address", "minus one", "a buffer")


@pytest.fixture(scope="module")
def handles(context):
    """Handles that are none."""
    with Context() as destroyed:
        pass
    buffer = ffi.new("mfa_buffer_t **")
    assert lib.mfa_create_buffer(context, 16, buffer) == SUCCESS
    memory = np.zeros(8)
    yield {
        "NULL": NULL,
        "destroyed": destroyed,
        "an address": ffi.cast("mfa_context_t *", address(memory)),
        "minus one": ffi.cast("mfa_context_t *", -1),
        "a buffer": ffi.cast("mfa_context_t *", buffer[0]),
    }
    assert lib.mfa_destroy_buffer(buffer[0]) == SUCCESS


@pytest.mark.parametrize("name", HANDLES)
@pytest.mark.parametrize("call", CALLS)
def test_mfa_attention__invalid_context__returns_1_before_all_else(name, call, handles, given):
    before = given.snapshot()
    assert given.run(handles[name], call) == INVALID_CONTEXT
    given.attention.struct_size = 0
    assert given.run(handles[name], call) == INVALID_CONTEXT
    assert given.snapshot() == before
    assert message(NULL)


@pytest.mark.parametrize("name", HANDLES)
def test_mfa_functions__invalid_context__return_1(name, handles, given):
    handle = handles[name]
    buffer, sentinel = ffi.new("mfa_buffer_t **"), ffi.cast("mfa_buffer_t *", 0x1234)
    buffer[0] = sentinel
    memory = np.zeros(8)
    info = native.new("mfa_context_info_t")
    tensor = given.tensor("query")
    assert lib.mfa_destroy_context(handle) == INVALID_CONTEXT
    assert lib.mfa_context_get_info(handle, info) == INVALID_CONTEXT
    assert lib.mfa_create_buffer(handle, 16, buffer) == INVALID_CONTEXT
    assert lib.mfa_create_buffer_from_memory(handle, address(memory), 16, buffer) == INVALID_CONTEXT
    assert lib.mfa_create_buffer_from_metal(handle, address(memory), buffer) == INVALID_CONTEXT
    assert lib.mfa_quantize(handle, tensor, tensor) == INVALID_CONTEXT
    assert lib.mfa_dequantize(handle, tensor, tensor) == INVALID_CONTEXT
    assert lib.mfa_attention_encode_forward(handle, address(memory), given.attention) == INVALID_CONTEXT
    assert lib.mfa_attention_encode_backward(handle, address(memory), given.attention, given.gradients) == INVALID_CONTEXT
    assert buffer[0] == sentinel
    assert message(handle)


def test_mfa_functions__null_structures__return_5(context, given):
    assert lib.mfa_attention_run_forward(context, NULL) == INVALID_ARGUMENT
    assert lib.mfa_attention_run_backward(context, NULL, given.gradients) == INVALID_ARGUMENT
    assert lib.mfa_attention_run_backward(context, given.attention, NULL) == INVALID_ARGUMENT
    assert lib.mfa_attention_workspace_size(context, given.attention, NULL, NULL) == INVALID_ARGUMENT
    assert lib.mfa_attention_workspace_size(context, NULL, NULL, ffi.new("uint64_t *")) == INVALID_ARGUMENT
    assert lib.mfa_attention_kernel_name(context, given.attention, 0, NULL) == INVALID_ARGUMENT
    assert lib.mfa_attention_kernel_name(context, NULL, 0, ffi.new("char **")) == INVALID_ARGUMENT
    assert lib.mfa_context_get_info(context, NULL) == INVALID_ARGUMENT
    assert lib.mfa_attention_initialize(NULL, 64) == INVALID_ARGUMENT
    assert lib.mfa_quantize(context, NULL, given.tensor("query")) == INVALID_ARGUMENT
    assert lib.mfa_quantize(context, given.tensor("query"), NULL) == INVALID_ARGUMENT
    assert lib.mfa_dequantize(context, NULL, given.tensor("query")) == INVALID_ARGUMENT
    assert lib.mfa_dequantize(context, given.tensor("query"), NULL) == INVALID_ARGUMENT
    assert lib.mfa_create_buffer(context, 16, NULL) == INVALID_ARGUMENT
    assert lib.mfa_create_buffer_from_memory(context, NULL, 16, ffi.new("mfa_buffer_t **")) == INVALID_ARGUMENT
    assert lib.mfa_create_buffer_from_memory(context, address(np.zeros(8)), 16, NULL) == INVALID_ARGUMENT
    assert lib.mfa_create_context(NULL) == INVALID_ARGUMENT
    assert lib.mfa_create_context_with_options(NULL, NULL) == INVALID_ARGUMENT
    assert lib.mfa_destroy_buffer(NULL) == INVALID_ARGUMENT


@pytest.mark.parametrize("operation", [-(2**31), -2, -1, 3, 99, 2**31 - 1])
def test_mfa_attention_kernel_name__unknown_operation__returns_5(operation, context, given):
    name = ffi.new("char **")
    assert lib.mfa_attention_kernel_name(context, given.attention, operation, name) == INVALID_ARGUMENT
    assert name[0] == NULL


@pytest.mark.parametrize("operation", range(3))
def test_mfa_attention_kernel_name__each_operation__is_named_after_it(operation, context, given):
    name = ffi.new("char **")
    assert lib.mfa_attention_kernel_name(context, given.attention, operation, name) == SUCCESS
    assert ffi.string(name[0]).decode().startswith("attention_backward" if operation else "attention_forward")


# ---- Contexts and buffers ----------------------------------------------------------------------------------------------------------------


@ffi.callback("mfa_allocate_function")
def allocate_nothing(state, size, alignment):
    return NULL


@ffi.callback("mfa_deallocate_function")
def deallocate_nothing(state, memory, size, alignment):
    pass


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"struct_size": 0}, INVALID_ARGUMENT),
        ({"struct_size": 4}, INVALID_ARGUMENT),
        ({"device": 4}, INVALID_ARGUMENT),
        ({"device": -1}, INVALID_ARGUMENT),
        ({"device": 2**31 - 1}, INVALID_ARGUMENT),
        ({"num_threads": 257}, INVALID_ARGUMENT),
        ({"num_threads": 2**32 - 1}, INVALID_ARGUMENT),
        ({"reserved": 1}, INVALID_ARGUMENT),
        ({"allocate": allocate_nothing}, INVALID_ARGUMENT),
        ({"deallocate": deallocate_nothing}, INVALID_ARGUMENT),
    ],
    ids=str,
)
def test_mfa_create_context_with_options__bad_options__returns_5_and_leaves_the_handle(fields, expected):
    options, handle = native.new("mfa_context_options_t", **fields), ffi.new("mfa_context_t **")
    handle[0] = sentinel = ffi.cast("mfa_context_t *", 0x1234)
    assert lib.mfa_create_context_with_options(options, handle) == expected
    assert handle[0] == sentinel
    assert message(NULL)


@pytest.mark.parametrize("device", [2, 3])
def test_mfa_create_context_with_options__absent_device__returns_7(device):
    if lib.mfa_device_is_available(device):
        pytest.skip("asks for a device that is absent, and this one is not")
    options, handle = native.new("mfa_context_options_t", device=device), ffi.new("mfa_context_t **")
    assert lib.mfa_create_context_with_options(options, handle) == UNAVAILABLE
    assert handle[0] == NULL


@pytest.mark.parametrize("device", [-1, 4, 99, 2**31 - 1, -(2**31)])
def test_mfa_device_is_available__unknown_code__is_0(device):
    assert lib.mfa_device_is_available(device) == 0
    assert lib.mfa_device_is_available(1) == 1


@pytest.mark.parametrize(("extra", "expected"), [(b"\0", SUCCESS), (b"\1", UNSUPPORTED)])
def test_mfa_descriptors__longer_than_known__are_served_if_the_rest_is_zero(extra, expected, context, given):
    options, keep = longer("mfa_context_options_t", native.new("mfa_context_options_t"), extra)
    handle = ffi.new("mfa_context_t **")
    assert lib.mfa_create_context_with_options(options, handle) == expected
    if expected == SUCCESS:
        assert lib.mfa_destroy_context(handle[0]) == SUCCESS
    before = given.snapshot()
    attention, keep_attention = longer("mfa_attention_t", given.attention, extra)
    assert lib.mfa_attention_run_forward(context, attention) == expected
    gradients, keep_gradients = longer("mfa_attention_gradients_t", given.gradients, extra)
    assert lib.mfa_attention_run_backward(context, given.attention, gradients) == expected
    for name in ("query", "mask", "output"):
        tensor, keep_tensor = longer("mfa_tensor_t", given.tensor(name), extra)
        setattr(given.attention, name, tensor)
        assert lib.mfa_attention_run_forward(context, given.attention) == expected
        setattr(given.attention, name, given.tensor(name))
    assert (given.snapshot() == before) == (expected == UNSUPPORTED)
    del keep, keep_attention, keep_gradients, keep_tensor


def test_mfa_destroy_context__twice__returns_1():
    handle = ffi.new("void **")
    assert lib.mfa_create_context(handle) == SUCCESS
    assert lib.mfa_destroy_context(handle[0]) == SUCCESS
    assert lib.mfa_destroy_context(handle[0]) == INVALID_CONTEXT


def test_mfa_create_context__many_times__never_gives_a_handle_again():
    seen = set()
    for _ in range(1000):
        with Context(1) as handle:
            seen.add(int(ffi.cast("uintptr_t", handle)))
    assert len(seen) == 1000


@pytest.mark.parametrize(("size", "expected"), [(2**63, INVALID_DIMENSIONS), (2**64 - 1, INVALID_DIMENSIONS), (2**62, ALLOCATION_FAILED)])
def test_mfa_create_buffer__impossible_size__is_refused(size, expected, context):
    buffer = ffi.new("mfa_buffer_t **")
    assert lib.mfa_create_buffer(context, size, buffer) == expected
    assert buffer[0] == NULL


@pytest.mark.parametrize("size", [2**64 - 1, 2**64 - 16])
def test_mfa_create_buffer_from_memory__range_that_wraps__returns_3(size, context):
    buffer = ffi.new("mfa_buffer_t **")
    assert lib.mfa_create_buffer_from_memory(context, address(np.zeros(8)), size, buffer) == INVALID_DIMENSIONS
    assert buffer[0] == NULL


def test_mfa_create_buffer_from_metal__on_the_cpu__returns_6(context):
    assert lib.mfa_create_buffer_from_metal(context, address(np.zeros(8)), ffi.new("mfa_buffer_t **")) == UNSUPPORTED


def test_mfa_attention_encode__on_the_cpu__returns_6(context, given):
    memory = np.zeros(8)
    before = given.snapshot()
    assert lib.mfa_attention_encode_forward(context, address(memory), given.attention) == UNSUPPORTED
    assert lib.mfa_attention_encode_backward(context, address(memory), given.attention, given.gradients) == UNSUPPORTED
    assert given.snapshot() == before


def test_mfa_buffers__zero_bytes_destroyed_or_invented__are_recognised(context):
    buffer = ffi.new("mfa_buffer_t **")
    assert lib.mfa_create_buffer(context, 0, buffer) == SUCCESS
    assert lib.mfa_buffer_contents(buffer[0]) == NULL
    assert lib.mfa_destroy_buffer(buffer[0]) == SUCCESS
    for handle in (
        buffer[0],
        NULL,
        ffi.cast("mfa_buffer_t *", -1),
        ffi.cast("mfa_buffer_t *", context),
        ffi.cast("mfa_buffer_t *", address(np.zeros(8))),
    ):
        assert lib.mfa_destroy_buffer(handle) == INVALID_ARGUMENT
        assert lib.mfa_buffer_contents(handle) == NULL
        assert lib.mfa_buffer_size(handle) == 0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"buffer_offset": 0}, SUCCESS),
        ({"buffer_offset": 4}, SUCCESS),
        ({"buffer_offset": 8}, INVALID_DIMENSIONS),
        ({"buffer_offset": 2}, INVALID_ARGUMENT),
        ({"buffer_offset": 2**64 - 4}, INVALID_DIMENSIONS),
        ({"buffer_offset": 2**63}, INVALID_DIMENSIONS),
        ({"strides.2": 2**40}, INVALID_DIMENSIONS),
        ({"strides.2": -8}, INVALID_DIMENSIONS),
        ({"data": "query"}, INVALID_ARGUMENT),
        ({"buffer": "destroyed"}, INVALID_ARGUMENT),
    ],
    ids=str,
)
def test_mfa_attention__views_into_a_buffer__must_lie_within(fields, expected, context, given):
    buffer = ffi.new("mfa_buffer_t **")
    query = given.arrays["query"]
    assert lib.mfa_create_buffer(context, query.nbytes + 4, buffer) == SUCCESS
    ffi.memmove(lib.mfa_buffer_contents(buffer[0]), query.tobytes(), query.nbytes)
    tensor = given.tensor("query")
    data, tensor.data, tensor.buffer = tensor.data, NULL, buffer[0]
    for field, value in fields.items():
        if field == "data":
            tensor.data = data
        elif field == "buffer":
            assert lib.mfa_destroy_buffer(buffer[0]) == SUCCESS
        else:
            setting("query", field, value)(given)
    before = given.snapshot()
    assert given.run(context, "forward") == expected, message(context)
    if expected != SUCCESS:
        assert given.snapshot() == before
    lib.mfa_destroy_buffer(buffer[0])


def test_mfa_context__allocator_without_memory__returns_2_and_writes_nothing(given):
    options = native.new("mfa_context_options_t", device=1, num_threads=1, allocate=allocate_nothing, deallocate=deallocate_nothing)
    handle = ffi.new("mfa_context_t **")
    assert lib.mfa_create_context_with_options(options, handle) == SUCCESS
    before = given.snapshot()
    assert given.run(handle[0], "forward") == ALLOCATION_FAILED
    assert given.run(handle[0], "backward") == ALLOCATION_FAILED
    assert lib.mfa_create_buffer(handle[0], 64, ffi.new("mfa_buffer_t **")) == ALLOCATION_FAILED
    assert given.snapshot() == before
    # Whatever else is wrong comes first.
    for spoil in (COMMON["softcap NaN"][0], FORWARD["output on the query"][0], READING["key: nan to quantise"][0]):
        spoilt = Given(np.random.default_rng(0))
        spoil(spoilt)
        assert spoilt.run(handle[0], "forward") == INVALID_ARGUMENT
    assert lib.mfa_destroy_context(handle[0]) == SUCCESS


def test_mfa_last_error__messages__belong_to_their_context(context, given):
    with Context() as other:
        assert message(other) == ""
        given.attention.softcap = NAN
        assert given.run(context, "forward") == INVALID_ARGUMENT
        assert "softcap" in message(context)
        assert message(other) == ""
    assert message(ffi.cast("mfa_context_t *", -1)) == message(NULL)


@pytest.mark.parametrize("status", [*range(8), -1, 8, 2**31 - 1, -(2**31)])
def test_mfa_status_string__any_number__has_words(status):
    words = ffi.string(lib.mfa_status_string(status)).decode()
    assert words
    assert (words == "unknown status") == (status not in range(8))


def test_mfa_version__both_forms__agree():
    number = lib.mfa_version()
    assert ffi.string(lib.mfa_version_string()).decode() == f"{number // 10000}.{number // 100 % 100}.{number % 100}" == umfa.__version__


# ---- Quantising in C ---------------------------------------------------------------------------------------------------------------------

QUANTIZE_MISTAKES = {
    "codes as input": (lambda source, target, scheme: setattr(source, "precision", INT8), INVALID_ARGUMENT),
    "bool as input": (lambda source, target, scheme: setattr(source, "precision", native.BOOL), INVALID_ARGUMENT),
    "float as output": (lambda source, target, scheme: setattr(target, "precision", 0), INVALID_ARGUMENT),
    "unknown output": (lambda source, target, scheme: setattr(target, "precision", 9), INVALID_ARGUMENT),
    "input NULL": (lambda source, target, scheme: setattr(source, "data", NULL), INVALID_ARGUMENT),
    "no quantization": (lambda source, target, scheme: setattr(target, "quantization", NULL), INVALID_ARGUMENT),
    "no scales": (lambda source, target, scheme: setattr(scheme, "scales", NULL), INVALID_ARGUMENT),
    "unknown granularity": (lambda source, target, scheme: setattr(scheme, "granularity", 6), INVALID_ARGUMENT),
    "rotated 2": (lambda source, target, scheme: setattr(scheme, "rotated", 2), INVALID_ARGUMENT),
    "block size 0": (lambda source, target, scheme: setattr(scheme, "granularity", 3), INVALID_DIMENSIONS),
    "group size 0": (lambda source, target, scheme: setattr(scheme, "granularity", 5), INVALID_DIMENSIONS),
    "other shape": (lambda source, target, scheme: target.shape.__setitem__(2, 4), INVALID_DIMENSIONS),
    "negative size": (lambda source, target, scheme: source.shape.__setitem__(2, -1), INVALID_DIMENSIONS),
    "output with stride 0": (lambda source, target, scheme: target.strides.__setitem__(2, 0), INVALID_ARGUMENT),
    "output on the input": (lambda source, target, scheme: setattr(target, "data", source.data), INVALID_ARGUMENT),
    "scales on the input": (lambda source, target, scheme: setattr(scheme, "scales", ffi.cast("float *", source.data)), INVALID_ARGUMENT),
    "scales on the output": (lambda source, target, scheme: setattr(scheme, "scales", ffi.cast("float *", target.data)), INVALID_ARGUMENT),
    "zero points on the scales": (
        lambda source, target, scheme: setattr(scheme, "zero_points", ffi.cast("int32_t *", scheme.scales)),
        INVALID_ARGUMENT,
    ),
    "NaN": (lambda source, target, scheme: ffi.cast("float *", source.data).__setitem__(3, NAN), INVALID_ARGUMENT),
}


@pytest.mark.parametrize("name", QUANTIZE_MISTAKES)
def test_mfa_quantize__each_mistake__returns_its_status_and_changes_nothing(name, context, rng):
    spoil, expected = QUANTIZE_MISTAKES[name]
    values, codes, scales = rng.normal(size=(1, 2, 5, 8)).astype(np.float32), Guarded((1, 2, 5, 8), np.int8), Guarded((10,))
    scheme = Descriptor("mfa_quantization_t", granularity=2, scales=scales.array)
    source, target = native.tensor(values), native.tensor(codes.array, INT8, quantization=scheme)
    assert lib.mfa_quantize(context, source.pointer, target.pointer) == SUCCESS
    for guarded in (codes, scales):
        guarded.memory[...] = CANARY
    spoil(source.pointer, target.pointer, scheme.pointer)
    before = values.tobytes(), codes.memory.tobytes(), scales.memory.tobytes()
    assert lib.mfa_quantize(context, source.pointer, target.pointer) == expected, message(context)
    assert (values.tobytes(), codes.memory.tobytes(), scales.memory.tobytes()) == before


DEQUANTIZE_MISTAKES = {
    "float as input": (lambda source, target, scheme: setattr(source, "precision", 0), INVALID_ARGUMENT),
    "codes as output": (lambda source, target, scheme: setattr(target, "precision", INT8), INVALID_ARGUMENT),
    "input NULL": (lambda source, target, scheme: setattr(source, "data", NULL), INVALID_ARGUMENT),
    "no scales": (lambda source, target, scheme: setattr(scheme, "scales", NULL), INVALID_ARGUMENT),
    "scale 0": (lambda source, target, scheme: scheme.scales.__setitem__(9, 0.0), INVALID_ARGUMENT),
    "scale NaN": (lambda source, target, scheme: scheme.scales.__setitem__(0, NAN), INVALID_ARGUMENT),
    "other shape": (lambda source, target, scheme: target.shape.__setitem__(3, 7), INVALID_DIMENSIONS),
    "output with stride 0": (lambda source, target, scheme: target.strides.__setitem__(1, 0), INVALID_ARGUMENT),
    "output on the scales": (lambda source, target, scheme: setattr(scheme, "scales", ffi.cast("float *", target.data)), INVALID_ARGUMENT),
}


@pytest.mark.parametrize("name", DEQUANTIZE_MISTAKES)
def test_mfa_dequantize__each_mistake__returns_its_status_and_changes_nothing(name, context, rng):
    spoil, expected = DEQUANTIZE_MISTAKES[name]
    codes, values, scales = rng.integers(-128, 128, (1, 2, 5, 8)).astype(np.int8), Guarded((1, 2, 5, 8)), np.ones(10, np.float32)
    scheme = Descriptor("mfa_quantization_t", granularity=2, scales=scales)
    source, target = native.tensor(codes, INT8, quantization=scheme), native.tensor(values.array)
    assert lib.mfa_dequantize(context, source.pointer, target.pointer) == SUCCESS
    values.memory[...] = CANARY
    spoil(source.pointer, target.pointer, scheme.pointer)
    before = values.memory.tobytes()
    assert lib.mfa_dequantize(context, source.pointer, target.pointer) == expected, message(context)
    assert values.memory.tobytes() == before


# ---- Packed tensors, which are no misuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [2, 3])
def test_mfa_attention__slices_of_packed_tensors__are_inputs_and_gradients(axis, context, rng):
    """[B, S, 3, H, D] and [B, S, H, 3, D]: address ranges intersect, elements do not."""
    shape = (2, 19, 3, 4, 8) if axis == 2 else (2, 19, 4, 3, 8)
    packed, gradients = rng.normal(size=shape).astype(np.float32), np.zeros(shape, np.float32)

    def slices(tensor):
        return [tensor[(slice(None),) * axis + (index,)].swapaxes(1, 2) for index in range(3)]

    output, logsumexp = np.zeros((2, 19, 4, 8), np.float32).swapaxes(1, 2), np.zeros((2, 4, 19), np.float32)
    attention = native.attention(*map(native.tensor, slices(packed)), native.tensor(output), logsumexp=logsumexp, causal=1)
    assert lib.mfa_attention_run_forward(context, attention.pointer) == SUCCESS, message(context)
    grad_output = native.tensor(rng.normal(size=(2, 19, 4, 8)).astype(np.float32).swapaxes(1, 2))
    results = dict(zip(("grad_query", "grad_key", "grad_value"), slices(gradients)))
    request = Descriptor(
        "mfa_attention_gradients_t", grad_output=grad_output, **{name: native.tensor(array) for name, array in results.items()}
    )
    assert lib.mfa_attention_run_backward(context, attention.pointer, request.pointer) == SUCCESS, message(context)
    copies = {name: np.zeros_like(array, order="C") for name, array in results.items()}
    request = Descriptor(
        "mfa_attention_gradients_t", grad_output=grad_output, **{name: native.tensor(array) for name, array in copies.items()}
    )
    assert lib.mfa_attention_run_backward(context, attention.pointer, request.pointer) == SUCCESS
    for name, array in results.items():
        assert (array == copies[name]).all()
        assert (array != 0).any()
    # The output into the packed inputs' place of another tensor: a slice that no input uses.
    four = np.zeros((2, 19, 4, 4, 8), np.float32)
    four[:, :, :3] = packed if axis == 2 else packed.swapaxes(2, 3)
    views = [four[:, :, index].swapaxes(1, 2) for index in range(4)]
    attention = native.attention(*map(native.tensor, views), causal=1)
    assert lib.mfa_attention_run_forward(context, attention.pointer) == SUCCESS, message(context)
    assert (views[3] == output).all()


@pytest.mark.parametrize("shift", [1, 4, 31])
def test_mfa_attention__slices_that_share_elements__return_5(shift, context, rng):
    memory = rng.normal(size=2 * 19 * 3 * 32 + 64).astype(np.float32)
    views = [memory[index * 32 :][: 2 * 19 * 96 - 64 * (index > 0) or None] for index in range(3)]
    strided = [np.lib.stride_tricks.as_strided(view, (2, 4, 19, 8), (4 * 19 * 96, 32, 4 * 96, 4)) for view in views]
    output = np.lib.stride_tricks.as_strided(memory[shift:], (2, 4, 19, 8), (4 * 19 * 96, 32, 4 * 96, 4))
    before = memory.tobytes()
    attention = native.attention(*map(native.tensor, strided), native.tensor(output))
    assert lib.mfa_attention_run_forward(context, attention.pointer) == INVALID_ARGUMENT
    assert memory.tobytes() == before
