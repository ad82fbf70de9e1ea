"""Memory that cannot be had: the n-th allocation of a call fails, for every n, once or from then on.

Status 2 and words, nothing written, nothing leaked, and the context serves the next call as if nothing had been. Memory is that of the
caller's allocator (mfa_context_options_t), and on the software device its buffers and command buffers.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import figures
import native
import umfa
from calls import Call, Gradients, HostArrays
from cases import CODES, OPTIONS, Sizes, problem, problem_with, smoothed_problem
from native import ALLOCATION_FAILED, FP32, INT4, INT8, NULL, SUCCESS, Descriptor, address, ffi, lib, message

SIZES = Sizes(batch=2, heads=2, kv_heads=1, rows=9, columns=40, channels=16, value_channels=16)
FEW_ROWS = Sizes(batch=2, heads=2, kv_heads=1, rows=2, columns=300, channels=16, value_channels=16)
PAD = 64


class HostMemory:
    """An allocator that refuses when told to, and knows what is out. What it gives is full of rubbish and has canaries behind it."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.free.argtypes = [ctypes.c_void_p]
        self.live: dict[int, tuple[int, int]] = {}
        self.requests, self.granted, self.forever = 0, -1, False
        self.complaints: list[str] = []
        self.allocate = ffi.callback("mfa_allocate_function", self._allocate)
        self.deallocate = ffi.callback("mfa_deallocate_function", self._deallocate)

    def fail(self, granted: int, forever: bool = False) -> int:
        """Give so many more, then refuse one, or all; a negative number: refuse none. How many were asked for since the last time."""
        requests, self.requests, self.granted, self.forever = self.requests, 0, granted, forever
        return requests

    def _allocate(self, state: Any, size: int, alignment: int) -> Any:
        self.requests += 1
        if self.granted == 0:
            self.granted = 0 if self.forever else -1
            return NULL
        self.granted -= self.granted > 0
        found = ctypes.c_void_p()
        if alignment < 64 or alignment & (alignment - 1):
            self.complaints.append(f"an alignment of {alignment}")
        assert self.library.posix_memalign(ctypes.byref(found), ctypes.c_size_t(alignment), ctypes.c_size_t(size + PAD)) == 0
        ctypes.memset(found, 0xA5, size + PAD)
        self.live[found.value] = (size, alignment)
        return ffi.cast("void *", found.value)

    def _deallocate(self, state: Any, memory: Any, size: int, alignment: int) -> None:
        place = int(ffi.cast("uintptr_t", memory))
        if self.live.pop(place, None) != (size, alignment):
            self.complaints.append(f"{size} bytes aligned to {alignment} given back that are not out")
            return
        if ctypes.string_at(place + size, PAD) != b"\xa5" * PAD:
            self.complaints.append(f"bytes behind {size} were written")
        self.library.free(place)

    def count(self) -> int:
        """Pieces that are out."""
        return len(self.live)

    def check(self) -> None:
        """That nothing is out, and nothing was wrong."""
        assert not self.live
        assert not self.complaints


class DeviceMemory:
    """The memory of the software device."""

    def __init__(self) -> None:
        import software_device

        self.interface = software_device.open_interface()
        self.before = self.count()

    def fail(self, granted: int, forever: bool = False) -> int:
        return int(self.interface.sm_fail_memory(granted, forever))

    def count(self) -> int:
        sm = self.interface
        return int(sum(sm.sm_live_count(kind) for kind in (sm.SM_KIND_BUFFER, sm.SM_KIND_COMMAND_BUFFER)))

    def check(self) -> None:
        # The device's own thread lets go of a command buffer after its results are there.
        deadline = time.monotonic() + 10
        while self.count() != self.before and time.monotonic() < deadline:
            time.sleep(0.0005)
        assert self.count() == self.before


class Subject(NamedTuple):
    """A call whose results begin anew each time: what runs it, the bytes that it may write, and what has to come before it in a context."""

    call: Callable[[Any], int]
    memory: Callable[[], bytes]
    prepare: Callable[[Any], None] = lambda context: None


def of_problem(made: Any, backward: bool) -> Subject:
    arrays = HostArrays()
    call = Call(made, arrays)
    results = {"output": call.output, "logsumexp": call.logsumexp}
    if not backward:

        def forward(context: Any) -> int:
            for array in results.values():
                array[...] = 7
            return int(lib.mfa_attention_run_forward(context, call.pointer))

        return Subject(forward, lambda: b"".join(array.tobytes() for array in results.values()))
    with native.Context(1) as context:
        assert lib.mfa_attention_run_forward(context, call.pointer) == SUCCESS
    gradients = Gradients(call, arrays)

    def run(context: Any) -> int:
        for array in gradients.results.values():
            array[...] = 7
        return int(lib.mfa_attention_run_backward(context, call.pointer, gradients.pointer))

    return Subject(run, lambda: b"".join(array.tobytes() for array in gradients.results.values()))


def of_quantizing(precision: int, granularity: int, back: bool, **flags: int) -> Subject:
    shape = (2, 3, 40, 32)
    rng = np.random.default_rng(0)
    reals = rng.normal(size=shape).astype(np.float32)
    codes = np.zeros((*shape[:3], 16) if precision == INT4 else shape, native.DTYPES[precision])
    parts = {"scales": np.full(8000, 1, np.float32), "zero_points": np.zeros(8000, np.int32)}
    if flags.pop("smooth", 0):
        parts["channel_means"] = np.zeros(200, np.float32)
    scheme = Descriptor("mfa_quantization_t", granularity=granularity, block_size=7, group_size=8, **parts, **flags)
    real, code = native.tensor(reals), native.tensor(codes, precision, shape, quantization=scheme)
    written = [reals] if back else [codes, *parts.values()]

    def run(context: Any) -> int:
        for array in written:
            array[...] = 7
        if back:
            return int(lib.mfa_dequantize(context, code.pointer, real.pointer))
        reals[...] = np.linspace(-3, 3, reals.size).reshape(shape)
        return int(lib.mfa_quantize(context, real.pointer, code.pointer))

    return Subject(run, lambda: b"".join(array.tobytes() for array in written))


def of_merge() -> Subject:
    rng = np.random.default_rng(0)
    outputs = [rng.normal(size=(2, 3, 9, 8)).astype(np.float32) for _ in range(3)]
    statistics = [rng.normal(size=(2, 3, 9)).astype(np.float32) for _ in range(3)]
    tensors = [native.tensor(array) for array in outputs]

    def run(context: Any) -> int:
        outputs[2][...] = statistics[2][...] = 7
        words = [word for tensor, array in zip(tensors, statistics) for word in (tensor.pointer, address(array))]
        return int(lib.mfa_attention_merge(context, *words, FP32))

    return Subject(run, lambda: outputs[2].tobytes() + statistics[2].tobytes())


def of_flat(name: str, precision: str) -> Subject:
    flat = native.Flat(np.random.default_rng(0), (precision,) * 3, sizes=(2, 40, 70, 3, 24))
    written = {
        "forward": ["output"],
        "forward_quantized": ["output", "logsumexp"],
        "backward_query": ["grad_query", "d_values"],
        "backward_kv": ["grad_key", "grad_value"],
    }[name]

    with native.Context(1) as other:
        assert flat.forward_quantized(other) == SUCCESS
        assert flat.backward_query(other) == SUCCESS

    def prepare(context: Any) -> None:
        """Leave the training record that backward looks for."""
        if name.startswith("backward"):
            assert flat.forward_quantized(context) == SUCCESS, message(context)

    def run(context: Any) -> int:
        for array in written:
            getattr(flat, array)[...] = 7
        return int(getattr(flat, name)(context))

    return Subject(run, lambda: b"".join(getattr(flat, array).tobytes() for array in written), prepare)


def of_buffer() -> Subject:
    cell = ffi.new("mfa_buffer_t **")

    def run(context: Any) -> int:
        cell[0] = NULL
        status = int(lib.mfa_create_buffer(context, 100_000, cell))
        if status == SUCCESS:
            assert bytes(ffi.buffer(lib.mfa_buffer_contents(cell[0]), 100_000)) == bytes(100_000)
            assert lib.mfa_destroy_buffer(cell[0]) == SUCCESS
            cell[0] = ffi.cast("mfa_buffer_t *", 1)
        return status

    return Subject(run, lambda: bytes(ffi.buffer(cell)))


def subjects() -> Iterator[tuple[str, Callable[[], Subject]]]:
    """Calls that allocate, by name: each path through the planning of a call."""
    for option in OPTIONS:
        for backward in (False, True):
            yield (
                f"{'backward' if backward else 'forward'} {option}",
                lambda o=option, b=backward: of_problem(problem_with(o, sizes=SIZES), b),
            )
    for dtype in ("float16", "bfloat16", "float64", *CODES):
        for sizes in (SIZES, FEW_ROWS):
            for backward in (False, True):
                yield (
                    f"{'backward' if backward else 'forward'} {dtype} {sizes.rows} rows",
                    lambda d=dtype, s=sizes, b=backward: of_problem(problem(np.random.default_rng(0), s, dtypes=(d,) * 3), b),
                )
    for backward in (False, True):
        yield f"smoothed {backward}", lambda b=backward: of_problem(smoothed_problem(np.random.default_rng(0), SIZES), b)
    for precision in CODES:
        for granularity in range(6):
            for flags in ({}, {"asymmetric": 1}, {"rotate": 1}, {"smooth": 1, "rotate": 1}):
                yield f"fused {precision} {granularity} {flags}", lambda p=precision, g=granularity, f=flags: of_fused(p, g, f)
    for precision in (INT8, INT4):
        for granularity in range(6):
            for back in (False, True):
                for flags in ({}, {"rotated": 1}, {"smooth": 1}):
                    name = f"{'dequantize' if back else 'quantize'} {precision} {granularity} {flags}"
                    yield name, lambda p=precision, g=granularity, b=back, f=flags: of_quantizing(p, g, b, **f)
    for precision in ("float32", "int8"):
        for name in ("forward", "forward_quantized", "backward_query", "backward_kv"):
            yield f"flat {name} {precision}", lambda n=name, p=precision: of_flat(n, p)
    yield "merge", of_merge
    yield "create_buffer", of_buffer


def of_fused(precision: str, granularity: int, flags: dict[str, int]) -> Subject:
    subject_problem = problem(np.random.default_rng(0), SIZES, causal=True)
    call = Call(subject_problem, HostArrays())
    kept = []
    for name in ("query", "key", "value"):
        mine = {
            flag: value for flag, value in flags.items() if flag == "asymmetric" or (flag == "rotate" and name != "value") or name == "key"
        }
        kept.append(
            Descriptor(
                "mfa_quantization_scheme_t",
                precision=native.PRECISIONS[precision],
                granularity=granularity,
                block_size=7,
                group_size=8,
                **mine,
            )
        )
        setattr(call.pointer, f"quantize_{name}", kept[-1].pointer)
    call.descriptor.keep.append(kept)

    def run(context: Any) -> int:
        call.output[...] = call.logsumexp[...] = 7
        return int(lib.mfa_attention_run_forward(context, call.pointer))

    return Subject(run, lambda: call.output.tobytes() + call.logsumexp.tobytes())


def new_context(device: int, memory: HostMemory) -> Any:
    options = native.new("mfa_context_options_t", device=device, num_threads=2, allocate=memory.allocate, deallocate=memory.deallocate)
    handle = ffi.new("mfa_context_t **")
    assert lib.mfa_create_context_with_options(options, handle) == SUCCESS
    return handle[0]


def starve(subject: Subject, device: int, host: HostMemory, memory: HostMemory | DeviceMemory) -> int:
    """Refuse each allocation of a call in turn; how many there were to be refused."""
    context = new_context(device, host)
    subject.prepare(context)
    assert subject.call(context) == SUCCESS, message(context)
    expected = subject.memory()
    lib.mfa_destroy_context(context)
    host.check()
    refused, small = 0, of_merge()
    for forever in (False, True):
        for granted in range(1000):
            context = new_context(device, host)
            if forever:  # some workspace is there, and has to grow
                assert small.call(context) == SUCCESS
            subject.prepare(context)
            memory.fail(granted, forever)
            status = subject.call(context)
            after = subject.memory()
            served = memory.fail(-1) <= granted
            refused += not served
            if served:
                assert status == SUCCESS
                assert after == expected
            else:
                assert status == ALLOCATION_FAILED, (granted, message(context))
                assert "could not be had" in message(context)
                assert set(after) <= set(np.full(1, 7, np.float32).tobytes() + np.full(1, 7.0).tobytes() + b"\7\0"), "something was written"
                assert subject.call(context) == SUCCESS, "the context does not serve the next call"
                assert subject.memory() == expected
            assert lib.mfa_destroy_context(context) == SUCCESS
            host.check()
            memory.check()
            if served:
                break
    return refused


SUBJECTS = dict(subjects())


@pytest.mark.parametrize("name", figures.pick(list(dict.fromkeys([*list(SUBJECTS)[::3], "merge", "create_buffer"])), list(SUBJECTS)))
def test_cpu__an_allocation_that_fails__is_status_2_and_leaves_nothing(name):
    host = HostMemory()
    refused = starve(SUBJECTS[name](), native.lib.MFA_DEVICE_CPU, host, host)
    assert refused
    figures.add("allocation", calls_starved_on_the_CPU=1, allocations_refused_on_the_CPU=refused)


@pytest.mark.skipif(not umfa.info()["devices"]["softmetal"], reason="libsoftmetal is not built")
@pytest.mark.parametrize("name", figures.pick(list(SUBJECTS)[1::36], list(SUBJECTS)))
def test_software_device__memory_that_cannot_be_had__is_status_2_and_leaves_nothing(name):
    host = HostMemory()
    refused = sum(starve(SUBJECTS[name](), native.lib.MFA_DEVICE_SOFTMETAL, host, memory) for memory in (host, DeviceMemory()))
    assert refused
    figures.add("allocation", calls_starved_on_the_software_device=1, allocations_refused_on_the_software_device=refused)
