"""What only the C descriptors can say: gradients of other types, d_values that are given, buffers as operands, allocators."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import native
from cases import DTYPES, STYLES, place
from native import NULL, SUCCESS, Context, Descriptor, Flat, address, ffi, lib, message

GRADIENTS = ("grad_query", "grad_key", "grad_value")


@pytest.fixture(scope="module")
def context():
    with Context() as handle:
        yield handle


class Training:
    """A problem after forward, and what backward needs; arrays are ``[batch, heads, tokens, channels]`` views."""

    def __init__(self, context, rng, sizes=(2, 7, 11, 3, 9), **fields):
        self.flat = Flat(rng, causal=True, sizes=sizes)
        self.attention = self.flat.general(**fields)
        assert lib.mfa_attention_run_forward(context, self.attention.pointer) == SUCCESS, message(context)
        self.grad_output = self.flat.grad_output.swapaxes(1, 2)
        batch, rows, columns, heads, channels = self.flat.sizes
        self.shapes = dict(zip(GRADIENTS, ((batch, heads, rows, channels), *[(batch, heads, columns, channels)] * 2)))

    def backward(self, context, results, **fields):
        tensors = {name: native.tensor(array) for name, array in results.items()}
        fields = {"grad_output": native.tensor(self.grad_output), **fields}
        gradients = Descriptor("mfa_attention_gradients_t", **tensors, **fields)
        return lib.mfa_attention_run_backward(context, self.attention.pointer, gradients.pointer)

    def expected(self, context):
        results = {name: np.zeros(shape, np.float32) for name, shape in self.shapes.items()}
        assert self.backward(context, results) == SUCCESS, message(context)
        return results


@pytest.mark.parametrize("style", [style for style in STYLES if style != "broadcast"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 7, 11, 3, 9), (1, 210, 250, 2, 33)], ids=["one tile", "many tiles"])
def test_mfa_attention_run_backward__gradients_of_any_type_and_strides__are_those_of_float32_rounded(sizes, dtype, style, context, rng):
    training = Training(context, rng, sizes)
    expected = training.expected(context)
    results = {name: place(np.zeros(shape, DTYPES[dtype]), style, rng, poison=7) for name, shape in training.shapes.items()}
    assert training.backward(context, results) == SUCCESS, message(context)
    for name, array in results.items():
        assert (array == expected[name].astype(DTYPES[dtype])).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_mfa_attention_run_backward__grad_output_of_any_type__is_read_as_it_is(dtype, context, rng):
    training = Training(context, rng)
    rounded = training.grad_output.astype(DTYPES[dtype])
    training.grad_output = rounded.astype(np.float32)
    expected = training.expected(context)
    training.grad_output = rounded
    results = {name: np.zeros(shape, np.float32) for name, shape in training.shapes.items()}
    assert training.backward(context, results) == SUCCESS, message(context)
    for name, array in results.items():
        assert array.tobytes() == expected[name].tobytes(), name


def test_mfa_attention_run_backward__d_values_given__are_read(context, rng):
    training = Training(context, rng)
    d_values = np.full_like(training.flat.logsumexp, 7)
    results = {name: np.zeros(shape, np.float32) for name, shape in training.shapes.items()}
    assert training.backward(context, results, d_values=d_values) == SUCCESS
    expected = (training.grad_output * training.flat.views[3]).sum(axis=-1)
    np.testing.assert_allclose(d_values, expected, rtol=1e-4, atol=1e-5)
    written = d_values.copy()
    again = {name: np.zeros(shape, np.float32) for name, shape in training.shapes.items()}
    assert training.backward(context, again, d_values=d_values, d_values_given=1) == SUCCESS
    assert d_values.tobytes() == written.tobytes()
    for name in GRADIENTS:
        assert again[name].tobytes() == results[name].tobytes()
    d_values[...] = 100
    assert training.backward(context, again, d_values=d_values, d_values_given=1) == SUCCESS
    assert (again["grad_query"] != results["grad_query"]).any()
    assert again["grad_value"].tobytes() == results["grad_value"].tobytes()  # does not depend on d_values


def test_mfa_attention_run_backward__without_the_output__computes_it_again(context, rng):
    training = Training(context, rng)
    expected = training.expected(context)
    training.flat.output[...] = np.nan
    training.attention.pointer.output = NULL
    results = {name: np.zeros(shape, np.float32) for name, shape in training.shapes.items()}
    assert training.backward(context, results) == SUCCESS
    for name in GRADIENTS:
        np.testing.assert_allclose(results[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chosen", [names for count in range(4) for names in itertools.combinations(GRADIENTS, count)], ids=str)
def test_mfa_attention_run_backward__null_gradients__are_not_computed(chosen, context, rng):
    training = Training(context, rng)
    expected = training.expected(context)
    results = {name: np.zeros(training.shapes[name], np.float32) for name in chosen}
    assert training.backward(context, results) == SUCCESS, message(context)
    for name in chosen:
        assert results[name].tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("kind", ["allocated", "around memory"])
def test_mfa_attention__buffers_as_operands__give_the_bits_of_addresses(kind, context, rng):
    training = Training(context, rng)
    flat = training.flat
    expected = flat.output.copy()
    buffers, offset = [], 64
    for array in (*flat.arrays, flat.output):
        made = ffi.new("mfa_buffer_t **")
        if kind == "allocated":
            assert lib.mfa_create_buffer(context, array.nbytes + offset, made) == SUCCESS
            contents = lib.mfa_buffer_contents(made[0])
            assert int(ffi.cast("uintptr_t", contents)) % 4096 == 0
            assert not any(ffi.buffer(contents, array.nbytes + offset)[:])
            ffi.memmove(ffi.cast("char *", contents) + offset, array.tobytes(), array.nbytes)
        else:
            memory = np.zeros(array.nbytes + offset, np.uint8)
            memory[offset:] = array.view(np.uint8).ravel()
            assert lib.mfa_create_buffer_from_memory(context, address(memory), memory.nbytes, made) == SUCCESS
            assert lib.mfa_buffer_contents(made[0]) == address(memory)
            buffers.append(memory)
        assert lib.mfa_buffer_size(made[0]) == array.nbytes + offset
        buffers.append(made)
    handles = [made[0] for made in buffers if not isinstance(made, np.ndarray)]
    for name, handle in zip(("query", "key", "value", "output"), handles):
        tensor = ffi.cast("mfa_tensor_t *", getattr(training.attention.pointer, name))
        tensor.data, tensor.buffer, tensor.buffer_offset = NULL, handle, offset
    ffi.memmove(ffi.cast("char *", lib.mfa_buffer_contents(handles[3])) + offset, bytes(flat.output.nbytes), flat.output.nbytes)
    # A buffer may be used by any context on its device.
    with Context() as other:
        assert lib.mfa_attention_run_forward(other, training.attention.pointer) == SUCCESS, message(other)
    written = ffi.buffer(ffi.cast("char *", lib.mfa_buffer_contents(handles[3])) + offset, flat.output.nbytes)[:]
    assert written == expected.tobytes()
    for handle in handles:
        assert lib.mfa_destroy_buffer(handle) == SUCCESS


class Allocator:
    """An allocator that keeps account."""

    def __init__(self):
        self.live, self.count, self.mistakes = {}, 0, []
        self.allocate = ffi.callback("mfa_allocate_function", self._allocate)
        self.deallocate = ffi.callback("mfa_deallocate_function", self._deallocate)

    def _allocate(self, state, size, alignment):
        if alignment < 64 or alignment & (alignment - 1):
            self.mistakes.append(f"alignment {alignment}")
        memory = np.empty(size + alignment, np.uint8)
        start = memory.ctypes.data + -memory.ctypes.data % alignment
        self.live[start] = (memory, size, alignment)
        self.count += 1
        return ffi.cast("void *", start)

    def _deallocate(self, state, memory, size, alignment):
        found = self.live.pop(int(ffi.cast("uintptr_t", memory)), None)
        if found is None or found[1:] != (size, alignment):
            self.mistakes.append(f"given back {size} bytes that were {found and found[1:]}")


def test_mfa_create_context_with_options__allocator__gets_back_what_it_gave(context, rng):
    allocator = Allocator()
    options = native.new("mfa_context_options_t", device=1, num_threads=2, allocate=allocator.allocate, deallocate=allocator.deallocate)
    handle, buffer = ffi.new("mfa_context_t **"), ffi.new("mfa_buffer_t **")
    assert lib.mfa_create_context_with_options(options, handle) == SUCCESS
    flat = Flat(rng, ("float32", "int8", "float16"))
    plain = Flat(np.random.default_rng(0))
    plain.__dict__.update({name: value for name, value in flat.__dict__.items() if name not in ("output", "logsumexp")})
    assert flat.forward_quantized(handle[0]) == SUCCESS
    assert flat.backward_query(handle[0]) == SUCCESS
    assert allocator.count > 0
    count = allocator.count
    assert flat.forward_quantized(handle[0]) == SUCCESS
    assert allocator.count == count, "workspace is used again"
    assert lib.mfa_create_buffer(handle[0], 1000, buffer) == SUCCESS
    assert int(ffi.cast("uintptr_t", lib.mfa_buffer_contents(buffer[0]))) in allocator.live
    assert lib.mfa_destroy_context(handle[0]) == SUCCESS
    assert len(allocator.live) == 1, "the buffer lives on"
    assert lib.mfa_destroy_buffer(buffer[0]) == SUCCESS
    assert not allocator.live
    assert not allocator.mistakes
    assert plain.forward_quantized(context) == SUCCESS
    assert plain.output.tobytes() == flat.output.tobytes()


def test_mfa_attention_initialize__older_and_newer_sizes__fill_what_there_is():
    size = ffi.sizeof("mfa_attention_t")
    memory = ffi.new("char[]", b"\x5a" * (size + 32))
    attention = ffi.cast("mfa_attention_t *", memory)
    assert lib.mfa_attention_initialize(attention, size + 32) == SUCCESS
    assert attention.struct_size == size
    assert (attention.window_left, attention.window_right, attention.softmax_scale) == (-1, -1, 1.0)
    assert attention.query == NULL
    assert attention.dropout_p == 0
    assert lib.mfa_attention_initialize(attention, size - 1) != SUCCESS
    assert lib.mfa_attention_initialize(attention, 0) != SUCCESS


@pytest.mark.parametrize("kind", ["context", "buffer"])
def test_mfa_handles__of_what_was_destroyed__do_not_stand_for_what_came_after(kind, context):
    """A place in the table of handles is used again, and an old handle must not find what is there now."""

    def make():
        if kind == "context":
            return Context(1).handle
        handle = ffi.new("mfa_buffer_t **")
        assert lib.mfa_create_buffer(context, 64, handle) == SUCCESS
        return handle[0]

    destroy, refused = {"context": (lib.mfa_destroy_context, 1), "buffer": (lib.mfa_destroy_buffer, 5)}[kind]
    old = make()
    assert destroy(old) == SUCCESS
    others = [make() for _ in range(8)]  # one of them in the old one's place, whatever was free before
    assert destroy(old) == refused
    if kind == "context":
        assert lib.mfa_create_buffer(old, 64, ffi.new("mfa_buffer_t **")) == refused
    else:
        assert lib.mfa_buffer_contents(old) == NULL
        assert lib.mfa_buffer_size(old) == 0
    assert [destroy(other) for other in others] == [SUCCESS] * len(others)


def test_mfa_attention__sizes_whose_product_overflows_without_memory__return_3(context):
    """Broadcast by strides of 0, tensors of 2^93 elements reach nowhere: only their sizes are too large."""
    number = np.zeros(1, np.float32)
    large = native.tensor(number, shape=(2**31 - 1, 2**31 - 1, 2**31 - 1, 1), strides=(0, 0, 0, 0))
    attention = native.attention(large, large, large)
    assert lib.mfa_attention_kernel_name(context, attention.pointer, 1, ffi.new("char **")) == native.INVALID_DIMENSIONS
    assert "the product of its sizes overflows" in message(context)
