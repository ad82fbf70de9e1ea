"""Buffers: owned and wrapped memory, and views that outlive them."""

from __future__ import annotations

import gc
import pickle
import sys
import weakref

import numpy as np
import pytest

import umfa


def test_owned__is_zeroed_and_aligned():
    with umfa.MFABuffer(10_000) as buffer:
        assert buffer.size == len(buffer) == 10_000
        assert buffer.address % 4096 == 0
        assert not np.asarray(buffer).any()
        assert np.asarray(buffer).dtype == np.uint8
        assert "10000 bytes" in repr(buffer)


def test_array__lies_in_the_buffer():
    buffer = umfa.MFABuffer(4 * 24 + 8)
    array = buffer.array((2, 3, 4), "float32", 8)
    assert array.ctypes.data == buffer.address + 8
    assert array.flags.c_contiguous
    array[:] = 1
    assert np.asarray(buffer)[8:].view(np.float32).sum() == 24
    assert buffer.array(3, "float16").shape == (3,)
    assert buffer.array((), "float64").shape == ()


def test_attention__on_buffers():
    x = np.random.default_rng(0).normal(size=(1, 2, 9, 8)).astype(np.float32)
    with umfa.MFABuffer(2 * x.nbytes) as buffer:
        operand = buffer.array(x.shape)
        operand[:] = x
        out = buffer.array(x.shape, offset=x.nbytes)
        umfa.attention(operand, operand, operand, out=out)
        assert np.array_equal(out, umfa.attention(x, x, x))
        with pytest.raises(umfa.InvalidArgumentError, match="overlap"):
            umfa.attention(operand, operand, operand, out=buffer.array(x.shape, offset=x.nbytes - 4))


def test_views__outlive_the_buffer():
    buffer = umfa.MFABuffer(1 << 22)
    array = buffer.array((1 << 20,), "float32")
    whole = np.asarray(buffer)
    array[:] = 3
    buffer.close()
    del buffer
    gc.collect()
    assert array.sum() == 3 << 20
    assert whole[2] == 0x40


def test_closed__every_use_fails_clearly():
    buffer = umfa.MFABuffer(16)
    buffer.close()
    buffer.close()
    assert buffer.closed
    assert "closed" in repr(buffer)
    uses = [lambda: buffer.size, lambda: buffer.address, lambda: buffer.array(1), lambda: np.asarray(buffer), lambda: len(buffer)]
    for use in [*uses, lambda: buffer.__enter__()]:
        with pytest.raises(umfa.InvalidArgumentError, match="open buffer"):
            use()


def test_context__may_close_before_the_buffer():
    context = umfa.MFAContext()
    buffer = umfa.MFABuffer(64, context)
    context.close()
    buffer.array(16)[:] = 1
    buffer.close()


@pytest.mark.parametrize("kind", ["numpy", "torch", "bytearray"])
def test_from_array__same_memory(kind):
    if kind == "torch":
        torch = pytest.importorskip("torch")
        array = torch.zeros(6)
        address = array.data_ptr()
    else:
        array = np.zeros(6, np.float32)
        address = array.ctypes.data
        array = memoryview(array).cast("B") if kind == "bytearray" else array
    buffer = umfa.MFABuffer.from_array(array)
    assert buffer.address == address
    assert buffer.size == 24
    buffer.array(6)[:] = 2
    assert np.frombuffer(memoryview(np.asarray(array)), np.float32)[5] == 2


def test_from_array__keeps_it_alive():
    array = np.ones(6, np.float32)
    gone = weakref.ref(array)
    buffer = umfa.MFABuffer.from_array(array)
    seen = buffer.array(6)
    del array, buffer
    gc.collect()
    assert gone() is not None
    assert seen.sum() == 6
    del seen
    gc.collect()
    assert gone() is None


def test_from_array__read_only_stays_so():
    array = np.ones(6, np.float32)
    array.flags.writeable = False
    assert not umfa.MFABuffer.from_array(array).array(6).flags.writeable


def test_from_array__not_contiguous__is_refused():
    with pytest.raises(umfa.InvalidArgumentError, match="contiguous"):
        umfa.MFABuffer.from_array(np.ones((4, 4), np.float32)[:, ::2])
    assert umfa.MFABuffer.from_array(np.ones((4, 1, 4), np.float32)[:, ::-1]).size == 64


@pytest.mark.parametrize("size", [-1, 2**63, 2**64, 10**300])
def test_size__illegal(size):
    with pytest.raises(umfa.InvalidDimensionsError, match=r"umfa.MFABuffer: size"):
        umfa.MFABuffer(size)


@pytest.mark.parametrize("size", [None, 1.5, "8", True, [8]])
def test_size__not_a_number(size):
    with pytest.raises(umfa.InvalidTypeError, match=r"umfa.MFABuffer: size"):
        umfa.MFABuffer(size)


def test_size__more_than_there_is():
    with pytest.raises(MemoryError) as caught:
        umfa.MFABuffer(2**62)
    assert caught.value.status == 2


def test_size__zero():
    buffer = umfa.MFABuffer(0)
    assert buffer.size == 0
    assert np.asarray(buffer).shape == (0,)
    assert buffer.array((0, 4)).shape == (0, 4)
    assert umfa.MFABuffer.from_array(np.ones((0, 3), np.float32)).size == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (((5,), "float32"), umfa.InvalidDimensionsError),
        (((4,), "float32", 1), umfa.InvalidDimensionsError),
        (((2**40, 2**40), "float32"), umfa.InvalidDimensionsError),
        (((-1,), "float32"), umfa.InvalidArgumentError),
        ((2, "float32", -4), umfa.InvalidArgumentError),
        (("4", "float32"), umfa.InvalidTypeError),
        ((None, "float32"), umfa.InvalidTypeError),
        ((2, "no such dtype"), umfa.InvalidTypeError),
        ((1, object), umfa.InvalidTypeError),
        ((2, "float32", None), umfa.InvalidTypeError),
    ],
)
def test_array__illegal(arguments, error):
    with pytest.raises(error, match=r"umfa.MFABuffer.array"):
        umfa.MFABuffer(16).array(*arguments)


def test_pickling__is_refused():
    with pytest.raises(umfa.InvalidTypeError):
        pickle.dumps(umfa.MFABuffer(8))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 brought the buffer protocol to classes")
def test_buffer_protocol():
    buffer = umfa.MFABuffer(8)
    memoryview(buffer)[3] = 7
    assert np.asarray(buffer)[3] == 7
