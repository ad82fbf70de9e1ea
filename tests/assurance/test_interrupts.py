"""Exceptions in the middle of Python's functions: wherever a signal can interrupt them, from objects that they look at, and by signals.

Whatever was interrupted, nothing is left behind: no context, no buffer, no array that somebody holds, no lock. The next call works.
"""

from __future__ import annotations

import dis
import gc
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import figures
import umfa
import umfa.buffer
import umfa.context
from umfa._library import ffi, lib

PACKAGE = str(Path(umfa.__file__).parent)


class Interrupt(KeyboardInterrupt):
    """Ours, not the user's."""


class Handles:
    """Stands in for the library in a module, and notes the contexts and buffers that it makes."""

    def __init__(self) -> None:
        self.contexts: list[Any] = []
        self.buffers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(lib, name)
        if not name.startswith("mfa_create"):
            return function

        def create(*arguments: Any) -> int:
            status = function(*arguments)
            if status == 0:
                (self.buffers if "buffer" in name else self.contexts).append(arguments[-1][0])
            return status

        return create

    def living(self) -> int:
        info = ffi.new("mfa_context_info_t *")
        info.struct_size = ffi.sizeof("mfa_context_info_t")
        living = sum(lib.mfa_context_get_info(handle, info) == 0 for handle in self.contexts)
        return living + sum(lib.mfa_buffer_size(handle) > 0 for handle in self.buffers)


@pytest.fixture
def handles(monkeypatch):
    made = Handles()
    monkeypatch.setattr(umfa.context, "lib", made)
    monkeypatch.setattr(umfa.buffer, "lib", made)
    return made


# Python looks for signals after calls, at the begin of functions and where loops begin anew, and nowhere else.
WATCHFUL = ("CALL", "RESUME", "JUMP_BACKWARD")


def interrupted(work: Callable[[], Any], after: int) -> bool:
    """Run `work` and raise an exception at the place of the package, of those where a signal can, that comes after so many.

    Returns whether there was one.
    """
    left = after

    def at_call(frame: FrameType, event: str, argument: Any) -> Any:
        # Python swallows what is raised in a finalizer.
        if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name == "_destroy":
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        code, before = frame.f_code.co_code, ""

        def at_instruction(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left, before
            if event == "exception":
                before = ""  # after a call that failed, Python does not look
            elif event == "opcode":
                left -= before.startswith(WATCHFUL)
                if left < 0:
                    raise Interrupt
                before = dis.opname[code[frame.f_lasti]]
            return at_instruction

        return at_instruction

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def arrays() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(1, 2, 5, 8)).astype(np.float32) for _ in range(3))


def own_context(q, k, v):
    with umfa.MFAContext(num_threads=2) as context:
        return umfa.attention(q, k, v, context=context)


def forgotten_context(q, k, v):
    umfa.MFAContext(num_threads=1)


def own_buffer(q, k, v):
    with umfa.MFABuffer(256) as buffer:
        buffer.array((8, 8))[...] = 1


def wrapping_buffer(q, k, v):
    umfa.MFABuffer.from_array(q).close()


def repeated(q, k, v):
    umfa.attention(q, k, v, causal=True)  # whatever came before, the next call does not repeat it
    for _ in range(3):
        umfa.attention(q, k, v)


def backward(q, k, v):
    output, lse = umfa.attention(q, k, v, return_lse=True)
    return umfa.attention_backward(output, q, k, v, output, lse)


WORK: dict[str, Callable[..., Any]] = {
    "attention": lambda q, k, v: umfa.attention(q, k, v, causal=True, kv_lengths=[3]),
    "fused": lambda q, k, v: umfa.attention(q, k, v, quantize="int8"),
    "repeated": repeated,
    "backward": backward,
    "quantize": lambda q, k, v: umfa.quantize(q, "int4", "token").dequantize(),
    "merge": lambda q, k, v: umfa.merge(*umfa.attention(q, k, v, return_lse=True), *umfa.attention(q, k, v, return_lse=True)),
    "own context": own_context,
    "forgotten context": forgotten_context,
    "buffer": own_buffer,
    "buffer on an array": wrapping_buffer,
}


@pytest.mark.parametrize("name", WORK)
def test_umfa__interrupted_anywhere__leaves_nothing_behind(name, handles):
    expected = umfa.attention(*arrays())
    handles.contexts.clear()  # the thread's own one
    count, at = 0, 0
    while True:
        given = arrays()
        watched = [weakref.ref(array) for array in given]
        was_interrupted = interrupted(lambda given=given: WORK[name](*given), at)
        del given
        if any(reference() is not None for reference in watched) or handles.living():
            gc.collect()
        assert all(reference() is None for reference in watched), at
        assert handles.living() == 0, at
        handles.contexts.clear()
        handles.buffers.clear()
        if not was_interrupted:
            break
        count += 1
        # The lock of a context lets its own thread in again: another one shows whether it is free.
        if count % 50 == 1:
            assert_free(umfa.context.default_context())
        at += 1
    assert count
    assert_free(umfa.context.default_context())
    np.testing.assert_array_equal(umfa.attention(*arrays()), expected)
    figures.add("interrupts", places_at_which_a_call_was_interrupted=count)


def assert_free(context: umfa.MFAContext) -> None:
    """That nobody holds the lock of a context: another thread can use it."""
    thread = threading.Thread(target=lambda: umfa.attention(*arrays(), context=context), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "somebody holds the lock"


class Raising:
    """An operand that raises when it is looked at, in one of the ways in which it can be."""

    def __init__(self, how: str, error: type[BaseException], array: np.ndarray):
        self.how, self.error, self.array = how, error, array

    def __getattr__(self, name: str) -> Any:
        if name == self.how:
            raise self.error("by design")
        raise AttributeError(name)


def method(name: str) -> type[Raising]:
    """A class whose method of that name raises."""

    def fail(self: Raising, *arguments: Any, **words: Any) -> Any:
        raise self.error("by design")

    return type("Raising", (Raising,), {name: fail, "shape": (1, 2, 5, 8), "dtype": np.dtype("float32")})


HOOKS = (
    "__array__",
    "__array_interface__",
    "__array_struct__",
    "__dlpack__",
    "__dlpack_device__",
    "__len__",
    "__index__",
    "__float__",
    "__bool__",
)


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt, RecursionError], ids=lambda error: error.__name__)
@pytest.mark.parametrize("hook", HOOKS)
def test_umfa__operands_that_raise__leave_nothing_behind(hook, error, handles):
    umfa.attention(*arrays())
    handles.contexts.clear()  # the thread's own one
    places = ("q", "k", "v", "mask", "out", "kv_lengths", "sinks", "alibi_slopes", "query_offset", "scale", "softcap", "seed")
    for make in (lambda array: method(hook)(hook, error, array), lambda array: Raising(hook, error, array)):
        for place in places:
            q, k, v = arrays()
            words: dict[str, Any] = {"q": q, "k": k, "v": v}
            watched = [weakref.ref(array) for array in (q, k, v)]
            words[place] = make(q)
            with pytest.raises(BaseException) as caught:
                umfa.attention(**words)
            assert isinstance(caught.value, (error, umfa.MFAError)), caught.value
            del caught, words, q, k, v
            if any(reference() is not None for reference in watched):
                gc.collect()
            assert all(reference() is None for reference in watched), place
            figures.add("interrupts", operands_that_raised=1)
    assert handles.living() == 0
    assert_free(umfa.context.default_context())


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals come by setitimer()")
def test_umfa__a_signal_in_the_middle_of_a_long_call__ends_it_after_the_call(handles):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 4, 500, 64)).astype(np.float32)
    expected = umfa.attention(q, q, q).tobytes()
    handles.contexts.clear()  # the thread's own one
    begin = time.perf_counter()
    umfa.attention(q, q, q)
    usual = time.perf_counter() - begin

    def on_alarm(number: int, frame: Any) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, on_alarm)
    interruptions = 0
    try:
        for _ in range(figures.pick(30, 1000)):
            context = None
            delay = float(rng.uniform(1e-4, 1.2 * usual))
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                with umfa.MFAContext(num_threads=2) as context:
                    umfa.attention(q, q, q, context=context)
                    umfa.quantize(q, "int8", context=context)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                interruptions += 1
            context = None
            assert handles.living() == 0
            handles.contexts.clear()
            assert umfa.attention(q, q, q).tobytes() == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interruptions
    figures.add("interrupts", calls_interrupted_by_a_signal=interruptions)
