"""What a Metal context does with objects of the framework: buffers, command buffers, other devices, and what goes wrong with them."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

import build_softmetal
import native
import reference
import software_device
import umfa
from calls import Call, Gradients
from cases import CODES, OPTIONS, Problem, Sizes, problem, problem_with
from metal_translator import source_hash
from native import (
    ALLOCATION_FAILED,
    EXECUTION_FAILED,
    INVALID_ARGUMENT,
    INVALID_DIMENSIONS,
    NULL,
    SUCCESS,
    UNSUPPORTED,
    Descriptor,
    lib,
    message,
)

if not umfa.info()["devices"]["softmetal"]:
    pytest.skip("libsoftmetal is not built", allow_module_level=True)

sm_ffi = software_device.ffi
sm = software_device.open_interface()
DECODE = Sizes(batch=2, heads=4, kv_heads=2, rows=2, columns=300, channels=32, value_channels=32)
SMALL = Sizes(batch=2, heads=2, kv_heads=1, rows=9, columns=40, channels=16, value_channels=24)


def handle_of(pointer: Any) -> Any:
    """An object of libsoftmetal as libmfa takes it."""
    return native.ffi.cast("void *", int(sm_ffi.cast("uintptr_t", pointer)))


class DeviceArrays:
    """Arrays in buffers of a device, made through the device's own interface and wrapped for libmfa."""

    def __init__(self, context: Any, device: Any = None):
        self.context = context
        self.device = device or sm.sm_device_default()
        self.wrapped: list[Any] = []

    def buffer(self, size: int) -> Any:
        """A buffer of Metal's."""
        made = sm.sm_device_new_buffer(self.device, size)
        assert made
        return made

    def wrap(self, buffer: Any) -> Any:
        """A buffer of libmfa's around one of Metal's, which is given up."""
        found = native.ffi.new("mfa_buffer_t **")
        assert lib.mfa_create_buffer_from_metal(self.context, handle_of(buffer), found) == SUCCESS, message(self.context)
        sm.sm_release(buffer)
        self.wrapped.append(found[0])
        return found[0]

    def put(self, array: np.ndarray | None, dtype: Any = None) -> np.ndarray | None:
        """The same array, in the strides that it has, in memory of the device."""
        if array is None:
            return None
        array = np.asarray(array) if dtype is None else np.asarray(array, dtype)
        low, high = np.lib.array_utils.byte_bounds(array) if array.size else (0, 1)
        buffer = self.wrap(self.buffer(high - low))
        memory = (ctypes.c_char * (high - low)).from_address(int(native.ffi.cast("uintptr_t", lib.mfa_buffer_contents(buffer))))
        offset = array.__array_interface__["data"][0] - low if array.size else 0
        placed = np.ndarray(array.shape, array.dtype, memory, offset, array.strides)
        if 0 in array.strides:
            np.ndarray(high - low, np.uint8, memory)[:] = np.frombuffer((ctypes.c_char * (high - low)).from_address(low), np.uint8)
        else:
            placed[...] = array
        return placed

    def release(self) -> None:
        for buffer in self.wrapped:
            assert lib.mfa_destroy_buffer(buffer) == SUCCESS


@pytest.fixture(scope="module")
def umfa_context():
    with umfa.MFAContext(device="softmetal", num_threads=1) as made:
        yield made


@pytest.fixture
def context(umfa_context):
    """The handle of a context on the software device."""
    return umfa_context._handle


@pytest.fixture
def arrays(context):
    made = DeviceArrays(context)
    yield made
    made.release()


@pytest.fixture
def queue():
    made = sm.sm_device_new_command_queue(sm.sm_device_default())
    yield made
    sm.sm_release(made)


@pytest.fixture(params=[1, 0], ids=["retained", "unretained"])
def commands(queue, request):
    """A command buffer of the caller's."""
    made = sm.sm_command_queue_new_command_buffer(queue, request.param)
    yield made
    sm.sm_release(made)


def run(commands: Any) -> None:
    """Commit and wait."""
    assert sm.sm_command_buffer_commit(commands) == 0
    sm.sm_command_buffer_wait_until_completed(commands)
    error = sm.sm_command_buffer_error(commands)
    assert not error, sm_ffi.string(error)


def test_objects__are_counted_and_recognised():
    buffer = sm.sm_device_new_buffer(sm.sm_device_default(), 100)
    assert sm.sm_kind(buffer) == sm.SM_KIND_BUFFER
    assert sm.sm_buffer_length(buffer) == 100
    assert sm.sm_buffer_device(buffer) == sm.sm_device_default()
    assert bytes(sm_ffi.buffer(sm.sm_buffer_contents(buffer), 100)) == bytes(100)
    assert sm.sm_label(buffer) == sm_ffi.NULL
    sm.sm_set_label(buffer, b"keys")
    assert sm_ffi.string(sm.sm_label(buffer)) == b"keys"
    assert sm.sm_retain(buffer) == buffer
    sm.sm_release(buffer)
    assert sm.sm_kind(buffer) == sm.SM_KIND_BUFFER
    sm.sm_release(buffer)
    assert sm.sm_kind(buffer) == sm.SM_KIND_NONE
    assert sm.sm_retain(buffer) == sm_ffi.NULL
    sm.sm_release(buffer)
    assert sm.sm_kind(sm_ffi.NULL) == sm.SM_KIND_NONE


def test_objects__begin_with_the_class_of_their_kind():
    before, other = (sm.sm_device_new_buffer(sm.sm_device_default(), 8) for _ in range(2))
    queue = sm.sm_device_new_command_queue(sm.sm_device_default())
    marker = sm_ffi.cast("void *", 0x1234)
    try:
        sm.sm_set_class(sm.SM_KIND_BUFFER, marker)
        after = sm.sm_device_new_buffer(sm.sm_device_default(), 8)
        assert [sm_ffi.cast("void **", each)[0] for each in (before, other, after)] == [marker] * 3
        assert sm_ffi.cast("void **", queue)[0] == sm_ffi.NULL
    finally:
        sm.sm_set_class(sm.SM_KIND_BUFFER, sm_ffi.NULL)
    for each in (before, other, after, queue):
        sm.sm_release(each)


def test_buffers__around_memory__give_it_back_when_the_last_reference_goes():
    page = os.sysconf("SC_PAGESIZE")
    memory = (ctypes.c_char * (2 * page))()
    start = ctypes.addressof(memory)
    aligned = sm_ffi.cast("void *", start + -start % page)
    given = []

    @sm_ffi.callback("void(void *, void *, uint64_t)")
    def give_back(state, address, length):
        given.append((address, length))

    device = sm.sm_device_default()
    buffer = sm.sm_device_new_buffer_no_copy(device, aligned, page, give_back, sm_ffi.NULL)
    sm.sm_retain(buffer)
    sm.sm_release(buffer)
    assert given == []
    sm.sm_release(buffer)
    assert given == [(aligned, page)]
    assert not sm.sm_device_new_buffer_no_copy(device, aligned, page - 1, give_back, sm_ffi.NULL)
    assert not sm.sm_device_new_buffer_no_copy(device, aligned + 4, page, give_back, sm_ffi.NULL)
    assert not sm.sm_device_new_buffer(device, 0)


def test_command_buffers__of_a_queue__complete_in_the_order_of_their_commits(queue):
    seen, done = [], threading.Event()

    @sm_ffi.callback("void(void *, sm_command_buffer *)")
    def completed(state, commands):
        seen.append((int(sm_ffi.cast("intptr_t", state)), sm.sm_command_buffer_status(commands)))
        if len(seen) == 8:
            done.set()

    made = [sm.sm_command_queue_new_command_buffer(queue, 1) for _ in range(8)]
    for number, commands in enumerate(made):
        sm.sm_command_buffer_wait_until_completed(commands)  # does not wait for what was never committed
        assert sm.sm_command_buffer_status(commands) == sm.SM_STATUS_NOT_ENQUEUED
        assert sm.sm_command_buffer_gpu_end_time(commands) == 0
        assert sm.sm_command_buffer_add_completed_handler(commands, completed, sm_ffi.cast("void *", number)) == 0
    for commands in made:
        assert sm.sm_command_buffer_commit(commands) == 0
        assert sm.sm_command_buffer_commit(commands) == 1
        assert sm.sm_command_buffer_add_completed_handler(commands, completed, sm_ffi.NULL) == 1
    sm.sm_command_buffer_wait_until_completed(made[-1])
    assert done.wait(10)
    assert seen == [(number, sm.SM_STATUS_COMPLETED) for number in range(8)]
    for commands in made:
        assert 0 < sm.sm_command_buffer_gpu_start_time(commands) <= sm.sm_command_buffer_gpu_end_time(commands)
        sm.sm_release(commands)


def test_buffer_from_metal__is_its_memory_and_holds_it(context):
    metal = sm.sm_device_new_buffer(sm.sm_device_default(), 100)
    buffer = native.ffi.new("mfa_buffer_t **")
    assert lib.mfa_create_buffer_from_metal(context, handle_of(metal), buffer) == SUCCESS
    assert lib.mfa_buffer_size(buffer[0]) == 100
    assert lib.mfa_buffer_contents(buffer[0]) == handle_of(sm.sm_buffer_contents(metal))
    sm.sm_release(metal)
    assert sm.sm_kind(metal) == sm.SM_KIND_BUFFER
    assert lib.mfa_destroy_buffer(buffer[0]) == SUCCESS
    assert sm.sm_kind(metal) == sm.SM_KIND_NONE


def test_buffer_from_metal__another_device_s_released_or_none__returns_5(context):
    buffer = native.ffi.new("mfa_buffer_t **")
    device = sm.sm_device_create(b"another GPU", 1009)
    foreign = sm.sm_device_new_buffer(device, 64)
    released = sm.sm_device_new_buffer(sm.sm_device_default(), 64)
    sm.sm_release(released)
    memory = np.zeros(8)
    for pointer, words in (
        (handle_of(foreign), '`metal_buffer` belongs to another device, "another GPU"'),
        (handle_of(released), "`metal_buffer` is released, or is not a buffer of Metal"),
        (handle_of(device), "is not a buffer of Metal"),
        (native.address(memory), "is not a buffer of Metal"),
        (NULL, "`metal_buffer` must not be NULL"),
    ):
        assert lib.mfa_create_buffer_from_metal(context, pointer, buffer) == INVALID_ARGUMENT
        assert words in message(context)
        assert buffer[0] == NULL
    sm.sm_release(foreign)
    sm.sm_release(device)


@pytest.mark.parametrize("through", ["buffer", "address"])
def test_run_forward__views_into_a_buffer_of_metal__are_read_and_written_there(through, context, arrays, rng):
    """Strided views of one buffer, a token of Q, K, V and the output after the other."""
    heads, tokens, channels = 2, 33, 16
    row = 4 * heads * channels
    operands = [rng.normal(size=(1, heads, tokens, channels)).astype(np.float32) for _ in range(3)]
    before = 64
    buffer = arrays.wrap(arrays.buffer(before + 4 * tokens * row))
    start = int(native.ffi.cast("uintptr_t", lib.mfa_buffer_contents(buffer)))
    memory = np.frombuffer((ctypes.c_char * (before + 4 * tokens * row)).from_address(start), np.float32)
    packed = memory[before // 4 :].reshape(1, tokens, 4, heads, channels)
    tensors = []
    for place in range(4):
        view = packed[:, :, place].swapaxes(1, 2)
        view[...] = operands[place] if place < 3 else 7
        made = native.tensor(view)
        if through == "buffer":
            made.pointer.data = NULL
            made.pointer.buffer = buffer
            made.pointer.buffer_offset = before + place * heads * channels * 4
        tensors.append(made)
    given = native.attention(*tensors, softmax_scale=0.25)
    assert lib.mfa_attention_run_forward(context, given.pointer) == SUCCESS, message(context)
    expected = umfa.attention(*operands, scale=0.25)
    assert packed[:, :, 3].swapaxes(1, 2).tobytes() == expected.tobytes() or np.allclose(
        packed[:, :, 3].swapaxes(1, 2), expected, rtol=0, atol=1e-5
    )
    assert (memory[: before // 4] == 0).all()
    for place, operand in enumerate(operands):
        assert (packed[:, :, place].swapaxes(1, 2) == operand).all()

    tensors[0].pointer.shape[2] = tensors[3].pointer.shape[2] = tokens + 1
    if through == "buffer":
        assert lib.mfa_attention_run_forward(context, given.pointer) == INVALID_DIMENSIONS
        assert "must lie within its buffer" in message(context)


def test_run_backward__on_buffers_of_metal__is_computed_on_their_contents(context, arrays, umfa_context, rng):
    made = problem(rng, SMALL)
    q, k, v = (arrays.put(argument) for argument in made.arguments)
    out, lse = umfa.attention(q, k, v, return_lse=True, context=umfa_context)
    grad_out = arrays.put(rng.normal(size=out.shape).astype(np.float32))
    gradients = umfa.attention_backward(grad_out, q, k, v, out, lse, context=umfa_context)
    expected = umfa.attention_backward(grad_out.copy(), *made.arguments, out.copy(), lse.copy())
    for got, wanted in zip(gradients, expected):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [SMALL, DECODE], ids=["tiles", "decode"])
@pytest.mark.parametrize("dtypes", [("float32",) * 3, ("int8", "int4", "float16")], ids=["float32", "mixed"])
@pytest.mark.parametrize("option", [name for name in OPTIONS if not name.endswith("float64")])
def test_encode_forward__run_by_the_caller__is_what_run_forward_writes(option, dtypes, sizes, context, arrays, queue):
    made = problem_with(option, seed=3, sizes=sizes, dtypes=dtypes)
    expected, call = Call(made, arrays), Call(made, arrays)
    assert lib.mfa_attention_run_forward(context, expected.pointer) == SUCCESS, message(context)
    commands = sm.sm_command_queue_new_command_buffer(queue, 0)
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS, message(context)
    assert sm.sm_command_buffer_status(commands) == sm.SM_STATUS_NOT_ENQUEUED
    assert call.untouched()
    run(commands)
    sm.sm_release(commands)
    assert call.output.tobytes() == expected.output.tobytes()
    assert call.logsumexp.tobytes() == expected.logsumexp.tobytes()


@pytest.mark.parametrize("dtypes", [("float32",) * 3, ("int8", "int4", "float16")], ids=["float32", "mixed"])
@pytest.mark.parametrize("option", ["plain", "all", "mask_additive", "causal_offsets", "causal_lengths_lower_right", "dropout", "sinks"])
def test_encode_backward__run_by_the_caller__is_what_run_backward_writes(option, dtypes, context, arrays, queue):
    """Forward and backward in one command buffer: backward reads what forward writes."""
    made = problem_with(option, seed=3, sizes=SMALL, dtypes=dtypes)
    first, call = Call(made, arrays), Call(made, arrays)
    expected, gradients = Gradients(first, arrays), Gradients(call, arrays)
    assert lib.mfa_attention_run_forward(context, first.pointer) == SUCCESS
    assert lib.mfa_attention_run_backward(context, first.pointer, expected.pointer) == SUCCESS, message(context)
    commands = sm.sm_command_queue_new_command_buffer(queue, 0)
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS
    assert lib.mfa_attention_encode_backward(context, handle_of(commands), call.pointer, gradients.pointer) == SUCCESS, message(context)
    assert gradients.untouched()
    run(commands)
    sm.sm_release(commands)
    assert len(gradients.results) >= 4
    for name, result in gradients.results.items():
        assert result.tobytes() == expected.results[name].tobytes(), name


def test_encode_backward__memory_that_is_in_no_buffer__returns_5_and_names_it(context, arrays, commands):
    call = Call(problem_with("all", sizes=SMALL), arrays)
    for name in ("grad_output", "grad_query", "grad_key", "grad_value", "grad_mask"):
        gradients = Gradients(call, arrays)
        getattr(gradients.pointer, name).data = native.address(np.zeros(10000))
        assert lib.mfa_attention_encode_backward(context, handle_of(commands), call.pointer, gradients.pointer) == INVALID_ARGUMENT
        assert f"`{name}` must lie in a buffer of the device" in message(context)
    for name in ("grad_logsumexp", "d_values", "grad_sinks", "grad_alibi_slopes"):
        gradients = Gradients(call, arrays)
        setattr(gradients.pointer, name, native.address(np.zeros(1000)))
        assert lib.mfa_attention_encode_backward(context, handle_of(commands), call.pointer, gradients.pointer) == INVALID_ARGUMENT
        assert f"`{name}` must lie in a buffer of the device" in message(context)
    run(commands)


def test_encode_backward__without_query_rows__returns_6(context, arrays, commands):
    call = Call(problem(np.random.default_rng(0), SMALL), arrays)
    gradients = Gradients(call, arrays)
    for tensor in (call.pointer.query, call.pointer.output, gradients.pointer.grad_output, gradients.pointer.grad_query):
        tensor.shape[2] = 0
    assert lib.mfa_attention_encode_backward(context, handle_of(commands), call.pointer, gradients.pointer) == UNSUPPORTED
    assert "gradients without query rows" in message(context)


@pytest.mark.parametrize("option", ["plain", "causal_lengths_lower_right", "all"])
@pytest.mark.parametrize("granularity", [0, 2, 4])
def test_encode_forward__operands_quantised_on_the_way_in__is_what_run_forward_writes(granularity, option, context, arrays, commands):
    made = problem_with(option, seed=3, sizes=SMALL)
    expected, call = Call(made, arrays), Call(made, arrays)
    scheme = Descriptor("mfa_quantization_scheme_t", precision=native.INT8, granularity=granularity)
    for each in (expected, call):
        each.pointer.quantize_query = each.pointer.quantize_key = each.pointer.quantize_value = scheme.pointer
    assert lib.mfa_attention_run_forward(context, expected.pointer) == SUCCESS
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS, message(context)
    run(commands)
    assert call.output.tobytes() == expected.output.tobytes()
    assert call.logsumexp.tobytes() == expected.logsumexp.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_encode_forward__values_that_cannot_be_quantised__make_the_rows_that_they_reach_nan(name, bad, context, arrays, commands):
    made = problem(
        np.random.default_rng(0), Sizes(batch=1, heads=2, kv_heads=2, rows=8, columns=8, channels=16, value_channels=16), causal=True
    )
    expected, call = Call(made, arrays), Call(made, arrays)
    scheme = Descriptor("mfa_quantization_scheme_t", precision=native.INT8, granularity=2)
    for each in (expected, call):
        each.pointer.quantize_query = each.pointer.quantize_key = each.pointer.quantize_value = scheme.pointer
    call.operands[("query", "key", "value").index(name)][0, 1, 5, 3] = bad
    assert lib.mfa_attention_run_forward(context, expected.pointer) == SUCCESS
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS, message(context)
    run(commands)
    reached = np.zeros((1, 2, 8), bool)
    reached[0, 1, 5 : 6 if name == "query" else None] = True
    assert (np.isnan(call.output).all(-1) == reached).all()
    assert call.output[~reached].tobytes() == expected.output[~reached].tobytes()


def test_encode_forward__first_tiles_that_a_mask_excludes__are_not_needed(context, arrays, commands):
    """There is no CPU here to compute again what a kernel is not sure of."""
    sizes = Sizes(batch=1, heads=1, kv_heads=1, rows=70, columns=100, channels=40, value_channels=24)
    mask = (np.arange(100) // 32 == 1 + np.arange(70)[:, None] // 32) | (np.arange(100) >= 96)
    made = problem(np.random.default_rng(0), sizes, mask=mask)
    call = Call(made, arrays)
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS
    run(commands)
    np.testing.assert_allclose(call.output, reference.forward(*made.real, made.options).output, rtol=0, atol=1e-5)


def test_encode_forward__reads_its_operands_when_the_command_buffer_runs(context, arrays, commands):
    made, other = (problem_with("all", seed=seed, sizes=SMALL) for seed in (1, 2))
    call, expected = Call(made, arrays), Call(other, arrays)
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS
    for array, wanted in zip(call.operands, expected.operands):
        array[...] = wanted
    again = Call(made, arrays)
    for array, wanted in zip(again.operands, expected.operands):
        array[...] = wanted
    assert lib.mfa_attention_run_forward(context, again.pointer) == SUCCESS
    run(commands)
    assert call.output.tobytes() == again.output.tobytes()


def test_encode_forward__several_calls__run_in_their_order(context, arrays, commands):
    """The second reads what the first writes."""
    sizes = Sizes(batch=1, heads=2, kv_heads=2, rows=40, columns=40, channels=16, value_channels=16)
    made = problem(np.random.default_rng(0), sizes)
    first, second = Call(made, arrays), Call(made, arrays)
    for descriptor in (second.pointer.query, second.pointer.key):
        descriptor.data = native.address(first.output)
    for call in (first, second):
        assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS
    run(commands)
    q, k, v = made.arguments
    middle = umfa.attention(q, k, v)
    np.testing.assert_allclose(second.output, umfa.attention(middle, middle, v), rtol=0, atol=1e-5)


def test_encode_forward__holds_what_it_needs_until_the_command_buffer_has_run(context, commands):
    """Buffers that the caller destroys before, and temporary memory, which nobody else holds."""
    made = problem_with("causal_lengths_lower_right", sizes=SMALL)
    arrays = DeviceArrays(context)
    call = Call(made, arrays)
    metal = arrays.buffer(call.output.nbytes)
    found = sm_ffi.buffer(sm.sm_buffer_contents(metal), call.output.nbytes)
    sm.sm_retain(metal)
    call.pointer.output.data = lib.mfa_buffer_contents(arrays.wrap(metal))
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS
    arrays.release()
    run(commands)
    output = np.frombuffer(found, np.float32).reshape(call.output.shape)
    np.testing.assert_allclose(output, made.run()[0], rtol=0, atol=1e-5)
    sm.sm_release(metal)
    assert sm.sm_kind(metal) == sm.SM_KIND_NONE


def test_dispatch__a_buffer_that_nobody_holds__ends_in_an_error_that_says_so(queue):
    source = build_softmetal.kernel_sources()["attention_sequences.metal"]
    kernel = sm.sm_library_kernel(sm.sm_library_find(source_hash(source)), 0)
    parameters = np.array([1, 1, 1 << 32 | 1, 0], np.int64)  # one sequence with a length
    for retains, status in ((1, sm.SM_STATUS_COMPLETED), (0, sm.SM_STATUS_ERROR)):
        commands = sm.sm_command_queue_new_command_buffer(queue, retains)
        arguments = sm_ffi.new("sm_argument[]", sm.SM_BUFFER_SLOTS)
        arguments[0].bytes, arguments[0].length = sm_ffi.from_buffer(parameters), parameters.nbytes
        for index in (1, 2, 3):
            arguments[index].buffer = sm.sm_device_new_buffer(sm.sm_device_default(), 64)
        lengths = sm_ffi.new("uint32_t[]", sm.SM_BUFFER_SLOTS)
        dispatch = sm_ffi.new("sm_dispatch *", {"kernel": kernel, "arguments": arguments, "threadgroup_lengths": lengths})
        dispatch.grid = dispatch.threadgroup = (1, 1, 1)
        assert sm.sm_command_buffer_dispatch(commands, dispatch) == 0
        for index in (1, 2, 3):
            sm.sm_release(arguments[index].buffer)
        sm.sm_command_buffer_commit(commands)
        sm.sm_command_buffer_wait_until_completed(commands)
        assert sm.sm_command_buffer_status(commands) == status
        assert sm.sm_command_buffer_dispatch(commands, dispatch) == 1
        if not retains:
            assert b"the buffer at index 1 was released before the work was done" in sm_ffi.string(sm.sm_command_buffer_error(commands))
        sm.sm_release(commands)


def test_encode_forward__lengths_out_of_range__are_clamped(context, arrays, commands):
    made = problem(np.random.default_rng(0), SMALL, kv_lengths=[3, 4], causal="lower_right")
    call = Call(made, arrays)
    call.lengths[:] = [-(2**40), 2**62]
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS
    run(commands)
    expected = made.with_keywords(kv_lengths=[0, SMALL.columns]).run()
    np.testing.assert_allclose(call.output, expected[0], rtol=0, atol=1e-5)
    assert np.isneginf(call.logsumexp[0]).all()


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", CODES)
def test_encode_forward__bad_scales__make_the_rows_that_they_reach_nan(dtype, name, scale, context, arrays, commands):
    sizes = Sizes(batch=2, heads=2, kv_heads=2, rows=8, columns=8, channels=16, value_channels=16)
    rng = np.random.default_rng(0)
    codes = [umfa.quantize(rng.normal(size=sizes.query).astype(np.float32), dtype, granularity="token") for _ in range(3)]
    made = problem(rng, sizes, causal=True)
    call, good = (
        Call(Problem(sizes, *[type(made.query)(each, each.dequantize()) for each in codes], made.keywords), arrays) for _ in range(2)
    )
    scales = call.operands[2 * ("query", "key", "value").index(name)]["scales"]
    scales[1, 0, 5] = scale
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS, message(context)
    run(commands)
    assert lib.mfa_attention_run_forward(context, good.pointer) == SUCCESS
    reached = np.zeros(sizes.statistics, bool)
    reached[1, 0, 5 : 6 if name == "query" else None] = True
    assert (np.isnan(call.output).all(-1) == reached).all()
    assert call.output[~reached].tobytes() == good.output[~reached].tobytes()
    if name != "value":
        assert (np.isnan(call.logsumexp) == reached).all()


@pytest.mark.parametrize("size", [1e20, -1e20])
@pytest.mark.parametrize("sizes", [SMALL, DECODE], ids=["tiles", "decode"])
def test_encode_forward__scores_beyond_float__are_nan(sizes, size, context, arrays, commands):
    """Also those that are all -inf by arithmetic: such a row is not empty."""
    made = problem(np.random.default_rng(0), sizes, scale=1e30)
    call = Call(made, arrays)
    call.operands[0][0, 1, 1] = size
    call.operands[1][0] = np.abs(call.operands[1][0])
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS
    run(commands)
    assert np.argwhere(np.isnan(call.logsumexp)).tolist() == [[0, 1, 1]]
    assert np.isnan(call.output[0, 1, 1]).all()


def test_encode_forward__offsets_out_of_range__are_clamped(context, arrays, commands):
    made = problem(np.random.default_rng(0), SMALL, causal=True, query_offset=np.array([2**60, -(2**60)]))
    call = Call(made, arrays)
    offsets = np.ndarray(2, np.int64, (ctypes.c_char * 16).from_address(int(native.ffi.cast("uintptr_t", call.pointer.query_offsets))))
    offsets[:] = [2**63 - 1, -(2**63)]
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS
    run(commands)
    np.testing.assert_allclose(call.output, made.run()[0], rtol=0, atol=1e-5)
    assert np.isneginf(call.logsumexp[1]).all()


def test_encode_forward__whole_pages_of_the_caller_s__are_read_and_written_there(context, commands, rng):
    page = 16384
    whole = mmap.mmap(-1, 9 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    first = -start % page
    found = native.ffi.new("mfa_buffer_t **")
    memory = native.ffi.cast("void *", start + first)
    assert lib.mfa_create_buffer_from_memory(context, memory, 8 * page, found) == SUCCESS
    views = np.frombuffer(whole, np.float32, 8 * page // 4, first).reshape(4, -1)
    shape = (1, 2, 20, 16)
    q, k, v, out = (view[5 : 5 + np.prod(shape)].reshape(shape) for view in views)
    for operand in (q, k, v):
        operand[...] = rng.normal(size=shape)
    given = native.attention(*map(native.tensor, (q, k, v, out)), softmax_scale=0.25)
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), given.pointer) == SUCCESS, message(context)
    run(commands)
    np.testing.assert_allclose(out, umfa.attention(q, k, v, scale=0.25), rtol=0, atol=1e-5)
    assert lib.mfa_destroy_buffer(found[0]) == SUCCESS


def test_encode_forward__empty_problems__record_nothing_or_empty_rows(context, arrays, commands):
    made = problem(np.random.default_rng(0), SMALL)
    call = Call(made, arrays)
    for tensor in (call.pointer.key, call.pointer.value):
        tensor.shape[2] = 0
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS
    run(commands)
    assert (call.output == 0).all()
    assert np.isneginf(call.logsumexp).all()


def test_encode__what_the_kernels_cannot_serve__returns_6_with_the_reason(context, arrays, commands):
    made = problem(np.random.default_rng(0), SMALL)
    call = Call(made, arrays)
    call.pointer.softmax_scale = 1e300
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == UNSUPPORTED
    assert "softmax_scale" in message(context)
    call = Call(made, arrays)
    double = arrays.put(made.query.real)
    call.pointer.query.precision, call.pointer.query.data = native.FP64, native.address(double)
    call.pointer.logsumexp = NULL
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == UNSUPPORTED
    assert "FP64: left to the CPU" in message(context)
    gradients = Gradients(call, arrays)
    assert lib.mfa_attention_encode_backward(context, handle_of(commands), call.pointer, gradients.pointer) in (
        INVALID_ARGUMENT,
        UNSUPPORTED,
    )
    call = Call(made, arrays)
    gradients = Gradients(call, arrays)
    call.pointer.softmax_scale = 1e300
    assert lib.mfa_attention_encode_backward(context, handle_of(commands), call.pointer, gradients.pointer) == UNSUPPORTED
    assert "a softmax_scale or softcap beyond the range of float: left to the CPU, which cannot be encoded" in message(context)
    run(commands)
    assert gradients.untouched()


def test_encode_forward__memory_that_is_in_no_buffer__returns_5_and_names_it(context, arrays, commands, rng):
    made = problem_with("all", sizes=SMALL)
    outside = rng.normal(size=SMALL.statistics).astype(np.float32)
    for name in ("logsumexp", "alibi_slopes", "sinks", "kv_lengths"):
        call = Call(made, arrays)
        pointer = native.address(np.zeros(64))
        setattr(call.pointer, name, native.ffi.cast("int64_t *", pointer) if name == "kv_lengths" else pointer)
        assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == INVALID_ARGUMENT
        assert f"`{name}` must lie in a buffer of the device" in message(context)
        assert call.untouched()
    for name in ("query", "key", "value", "output", "mask"):
        call = Call(made, arrays)
        getattr(call.pointer, name).data = native.address(np.zeros(10000))
        assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == INVALID_ARGUMENT
        assert f"`{name}` must lie in a buffer of the device" in message(context)
    run(commands)
    assert outside.size


@pytest.mark.parametrize("name", ["query", "key", "value", "output", "mask", "logsumexp", "alibi_slopes", "sinks"])
def test_encode_forward__memory_that_ends_behind_its_buffer__returns_5_and_names_it(name, context, arrays, commands):
    call = Call(problem_with("all", sizes=SMALL), arrays)
    holder, field = (call.pointer, name) if name in ("logsumexp", "alibi_slopes", "sinks") else (getattr(call.pointer, name), "data")
    setattr(holder, field, native.ffi.cast("char *", getattr(holder, field)) + 4)
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == INVALID_ARGUMENT
    assert f"`{name}` must lie in a buffer of the device" in message(context)
    assert call.untouched()
    run(commands)


def test_encode_forward__a_wrong_command_buffer__returns_5(context, arrays, queue):
    call = Call(problem(np.random.default_rng(0), SMALL), arrays)
    device = sm.sm_device_create(b"another GPU", 1009)
    foreign_queue = sm.sm_device_new_command_queue(device)
    foreign = sm.sm_command_queue_new_command_buffer(foreign_queue, 1)
    committed, released = (sm.sm_command_queue_new_command_buffer(queue, 1) for _ in range(2))
    run(committed)
    sm.sm_release(released)
    for pointer, words in (
        (handle_of(foreign), '`command_buffer` belongs to another device, "another GPU"'),
        (handle_of(committed), "`command_buffer` was committed before"),
        (handle_of(released), "`command_buffer` is released, or is not a command buffer of Metal"),
        (handle_of(queue), "is not a command buffer of Metal"),
        (native.address(call.output), "is not a command buffer of Metal"),
        (NULL, "`command_buffer` must not be NULL"),
    ):
        assert lib.mfa_attention_encode_forward(context, pointer, call.pointer) == INVALID_ARGUMENT
        assert words in message(context)
        assert call.untouched()
    call.pointer.query.shape[3] = 2000
    assert lib.mfa_attention_encode_forward(context, NULL, call.pointer) == INVALID_DIMENSIONS, "sizes come first"
    for each in (foreign, foreign_queue, device, committed):
        sm.sm_release(each)


def test_buffers__of_one_context__are_found_by_another_on_the_device(context, arrays, commands):
    call = Call(problem(np.random.default_rng(0), SMALL), arrays)
    with umfa.MFAContext(device="softmetal", num_threads=1) as other:
        assert lib.mfa_attention_encode_forward(other._handle, handle_of(commands), call.pointer) == SUCCESS
    run(commands)
    assert not call.untouched()


def test_gpu_seconds__are_those_of_the_last_call_that_ran_there(umfa_context, rng):
    made = problem(rng, Sizes(batch=1, heads=1, kv_heads=1, rows=64, columns=64, channels=32, value_channels=32))
    out, lse = made.run(context=umfa_context)
    seconds = umfa_context.details()["gpu_seconds"]
    assert 0 < seconds < 60
    assert umfa_context.details()["gpu_seconds"] == seconds, "asking changes nothing"
    umfa.attention(*(argument.astype(np.float64) for argument in made.arguments), context=umfa_context)
    assert umfa_context.details()["gpu_seconds"] == 0, "the CPU computed"
    with umfa.MFAContext(device="cpu") as cpu:
        made.run(context=cpu)
        assert cpu.details()["gpu_seconds"] == 0


def test_context_info__of_the_first_version__is_filled_as_far_as_it_goes(context):
    info = native.new("mfa_context_info_t")
    info.gpu_seconds = -1
    first = native.ffi.offsetof("mfa_context_info_t", "gpu_seconds")
    info.struct_size = first
    assert lib.mfa_context_get_info(context, info) == SUCCESS
    assert info.gpu_seconds == -1
    assert info.device == native.ffi.integer_const("MFA_DEVICE_SOFTMETAL")
    info.struct_size = first - 1
    assert lib.mfa_context_get_info(context, info) == INVALID_ARGUMENT


class TestFaults:
    """Each is made by the software device; nothing is written, and the context works afterwards."""

    @pytest.fixture
    def context(self):
        """One whose kernels are not compiled yet."""
        with umfa.MFAContext(device="softmetal", num_threads=1) as made:
            yield made._handle

    @pytest.mark.parametrize(
        ("fault", "status", "words"),
        [
            ("compile", EXECUTION_FAILED, "could not be compiled: program_source:1:1: error:"),
            ("memory", ALLOCATION_FAILED, "bytes on the device could not be had"),
            ("execute", EXECUTION_FAILED, 'the device "softmetal" failed: the GPU gave up'),
        ],
    )
    def test_run_forward(self, fault, status, words, context, arrays, monkeypatch):
        call = Call(problem_with("all", sizes=SMALL), arrays)
        monkeypatch.setenv("SOFTMETAL_FAULT", fault)
        assert lib.mfa_attention_run_forward(context, call.pointer) == status
        assert words in message(context)
        assert call.untouched()
        monkeypatch.delenv("SOFTMETAL_FAULT")
        assert lib.mfa_attention_run_forward(context, call.pointer) == SUCCESS
        assert not call.untouched()

    @pytest.mark.parametrize(("fault", "status"), [("compile", EXECUTION_FAILED), ("memory", ALLOCATION_FAILED)])
    def test_encode_forward(self, fault, status, context, arrays, queue, monkeypatch):
        call = Call(problem_with("all", sizes=SMALL), arrays)
        commands = sm.sm_command_queue_new_command_buffer(queue, 1)
        monkeypatch.setenv("SOFTMETAL_FAULT", fault)
        assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == status
        monkeypatch.delenv("SOFTMETAL_FAULT")
        run(commands)
        assert call.untouched(), "nothing was recorded"
        sm.sm_release(commands)

    def test_encode_forward__a_gpu_that_fails__tells_the_caller(self, context, arrays, queue, monkeypatch):
        call = Call(problem(np.random.default_rng(0), SMALL), arrays)
        commands = sm.sm_command_queue_new_command_buffer(queue, 1)
        assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS
        monkeypatch.setenv("SOFTMETAL_FAULT", "execute")
        sm.sm_command_buffer_commit(commands)
        sm.sm_command_buffer_wait_until_completed(commands)
        assert b"the GPU gave up" in sm_ffi.string(sm.sm_command_buffer_error(commands))
        assert call.untouched()
        sm.sm_release(commands)

    def test_create_buffer(self, context, monkeypatch):
        monkeypatch.setenv("SOFTMETAL_FAULT", "memory")
        buffer = native.ffi.new("mfa_buffer_t **")
        assert lib.mfa_create_buffer(context, 100, buffer) == ALLOCATION_FAILED
        assert buffer[0] == NULL

    def test_a_gpu_without_simdgroup_matrices(self):
        code = """
import umfa
print(umfa.info()["devices"]["softmetal"], umfa.MFAContext().device)
try:
    umfa.MFAContext(device="softmetal")
except umfa.UnsupportedError as error:
    print(error)
"""
        environment = os.environ | {"SOFTMETAL_FAMILY": "1006"}
        answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert answer.stdout.splitlines()[0] == "False cpu"
        assert "simdgroup matrices (the family Apple7: an M1 or later) are not a feature of this GPU" in answer.stdout


KERNELS_OF_A_FAMILY = """
import sys
import numpy as np, ml_dtypes, umfa
rng = np.random.default_rng(0)
with umfa.MFAContext(device="softmetal") as device, umfa.MFAContext(device="cpu") as cpu:
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        for channels in (32, 64, 128, 200):
            q, k, v = (rng.normal(size=(1, 1, tokens, channels)).astype(dtype) for tokens in (40, 70, 70))
            words = {"causal": "lower_right", "scale": 0.1, "return_lse": True}
            got, wanted = (umfa.attention(q, k, v, context=each, out=np.empty(q.shape, "f"), **words) for each in (device, cpu))
            assert device.details()["gpu_seconds"] > 0
            for one, other in zip(got, wanted):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    print(*umfa.info(device)["kernels"]["forward"].values())
"""


@pytest.mark.parametrize("family", [1007, 1008, 1009, 1010])
def test_every_family__has_kernels_for_every_head_size_and_type(family):
    environment = os.environ | {"SOFTMETAL_FAMILY": str(family)}
    answer = subprocess.run([sys.executable, "-c", KERNELS_OF_A_FAMILY], env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "attention_forward_metal_64x32" in answer.stdout


@pytest.mark.parametrize(("family", "name"), [(1008, "attention_forward_metal_128x16"), (1009, "attention_forward_metal_128x32")])
def test_tiles__of_wide_heads__are_narrower_on_older_families(family, name):
    code = """
import os, numpy as np
import native
from native import lib
handle = native.ffi.new("mfa_context_t **")
assert lib.mfa_create_context_with_options(native.new("mfa_context_options_t", device=3), handle) == 0
x = np.zeros((1, 1, 8, 128), np.float32)
given = native.attention(*[native.tensor(x)] * 3, native.tensor(np.zeros_like(x)))
name = native.ffi.new("const char **")
assert lib.mfa_attention_kernel_name(handle[0], given.pointer, 0, name) == 0
print(native.ffi.string(name[0]).decode())
"""
    environment = os.environ | {"SOFTMETAL_FAMILY": str(family), "PYTHONPATH": os.path.dirname(__file__)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert answer.stdout.strip() == name, answer.stderr


def test_reference__agrees_with_an_encoded_call(context, arrays, commands):
    made = problem_with("causal_offsets", seed=5, sizes=SMALL)
    call = Call(made, arrays)
    assert lib.mfa_attention_encode_forward(context, handle_of(commands), call.pointer) == SUCCESS
    run(commands)
    expected = reference.forward(*made.real, made.options)
    np.testing.assert_allclose(call.output, expected.output, rtol=0, atol=1e-5)
