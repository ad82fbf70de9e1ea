"""umfa_rs, the Rust crate `mfa` as a Python module: against the float64 reference, and bit for bit against umfa.

What the module computes, the safe crate computes, so these are the crate's tests too. `./justw test-rust` builds the module.
"""

from __future__ import annotations

import gc
import inspect
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import umfa
from cases import CODES, DTYPES, OPTIONS, STYLES, Sizes, problem, problem_with, to_layout
from test_backward import names_of, random_gradients
from tolerances import assert_within

umfa_rs = pytest.importorskip("umfa_rs", reason="umfa_rs is not there; ./justw test-rust builds it")

ROOT = Path(__file__).resolve().parent.parent
X = np.random.default_rng(0).normal(size=(2, 3, 10, 9)).astype(np.float32)


def operand(argument):
    """An operand as umfa_rs takes it."""
    if not isinstance(argument, umfa.QuantizedTensor):
        return argument
    names = ("shape", "granularity", "block_size", "group_size", "rotated", "layout")
    parts = (argument.data, argument.scales, argument.zero_points, argument.channel_means)
    return umfa_rs.QuantizedTensor(*parts, **{name: getattr(argument, name) for name in names})


def check(made):
    """Forward and all gradients of a problem, against the reference and against umfa."""
    import reference

    operands = [operand(argument) for argument in made.arguments]
    out, lse = umfa_rs.attention(*operands, **made.keywords, return_lse=True)
    exact = made.bounds.at
    assert out.dtype == DTYPES[made.output_dtype]
    assert_within(to_layout(out, made.layout), exact.output, made.bounds.output, "output")
    assert_within(lse, exact.logsumexp, made.bounds.logsumexp, "logsumexp")
    same_out, same_lse = umfa.attention(*made.arguments, **made.keywords, return_lse=True)
    assert np.array_equal(out.view(np.uint8), same_out.view(np.uint8))
    assert np.array_equal(lse, same_lse)
    assert np.array_equal(umfa_rs.attention(*operands, **made.keywords).view(np.uint8), out.view(np.uint8))

    grad_out, grad_lse = random_gradients(made, np.random.default_rng(0))
    names = names_of(made)
    gradients = umfa_rs.attention_backward(grad_out, *operands, out, lse, **made.keywords, grad_lse=grad_lse, gradients=names)
    same = umfa.attention_backward(grad_out, *made.arguments, out, lse, **made.keywords, grad_lse=grad_lse, gradients=names)
    real_grad = to_layout(grad_out, made.layout).astype(np.float64)
    exact = reference.backward(*made.real, real_grad, made.options, grad_lse)
    bounds = made.bounds.gradients(real_grad, grad_lse, dtypes={name: str(array.dtype) for name, array in zip(names, gradients)})
    for name, gradient, expected in zip(names, gradients, same):
        assert gradient.dtype == expected.dtype
        assert np.array_equal(gradient, expected, equal_nan=True), name
        plain = to_layout(gradient, made.layout) if name in ("query", "key", "value") else gradient
        assert_within(plain, exact[name], bounds[name], f"gradient of {name}")


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option__equals_the_reference_and_umfa(option):
    check(problem_with(option))


@pytest.mark.parametrize("option", ["mask_bool", "sinks", "alibi", "causal_lower_right", "plain"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8", "int4"])
def test_options_and_types__equal_the_reference_and_umfa(option, dtype):
    if option not in OPTIONS:
        option = next(name for name in OPTIONS if name.startswith(option.split("_")[0]))
    check(problem_with(option, seed=1, dtypes=(dtype,) * 3, sizes=Sizes(rows=7, columns=20, channels=24, value_channels=24)))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [*DTYPES, *CODES])
def test_strides__equal_the_reference_and_umfa(layout, style, dtype):
    check(problem(np.random.default_rng(5), Sizes(channels=13), dtypes=(dtype,) * 3, styles=(style,) * 3, layout=layout, causal=True))


@pytest.mark.parametrize("axes", [2, 3])
def test_fewer_axes__are_kept(axes):
    x = X[(0,) * (4 - axes)]
    out, lse = umfa_rs.attention(x, x, x, return_lse=True)
    same_out, same_lse = umfa.attention(x, x, x, return_lse=True)
    assert out.shape == x.shape
    assert np.array_equal(out, same_out)
    assert np.array_equal(lse, same_lse)


QUANTIZATIONS = {
    "int8": {},
    "int4": {"dtype": "int4"},
    "tensor": {"granularity": "tensor"},
    "head": {"granularity": "head", "symmetric": False},
    "block": {"granularity": "block", "block_size": 4},
    "channel": {"granularity": "channel"},
    "group": {"dtype": "int4", "granularity": "group", "group_size": 3, "symmetric": False},
    "smooth_rotated": {"smooth": True, "rotate": True},
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_quantize__equals_umfa_bit_for_bit(name, layout):
    made = umfa_rs.quantize(X, **QUANTIZATIONS[name], layout=layout)
    same = umfa.quantize(X, **QUANTIZATIONS[name], layout=layout)
    for part in ("data", "scales", "zero_points", "channel_means"):
        got, expected = getattr(made, part), getattr(same, part)
        assert (got is None) == (expected is None)
        if got is not None:
            assert got.dtype == expected.dtype
            assert np.array_equal(got, expected)
    for part in ("shape", "dtype", "granularity", "block_size", "group_size", "rotated", "layout", "ndim", "nbytes"):
        assert getattr(made, part) == getattr(same, part), part
    assert np.array_equal(made.dequantize(), same.dequantize())


@pytest.mark.parametrize("quantize", ["int8", "int4", "config", "schemes"])
def test_quantize_on_the_way_in__equals_umfa_bit_for_bit(quantize):
    def argument(module):
        if quantize == "config":
            return module.QuantizationConfig(query=None, key="int8", value="int4")
        if quantize == "schemes":
            scheme = module.QuantizationScheme("int8", "group", group_size=3, rotate=True)
            return module.QuantizationConfig(query="int8", key=scheme, value=module.QuantizationScheme("int4"))
        return quantize

    assert np.array_equal(umfa_rs.attention(X, X, X, quantize=argument(umfa_rs)), umfa.attention(X, X, X, quantize=argument(umfa)))
    keys = umfa.quantize(X, rotate=True, smooth=True)
    expected = umfa.attention(X, keys, X, quantize="int8")
    assert np.array_equal(umfa_rs.attention(X, operand(keys), X, quantize="int8"), expected)


@pytest.mark.parametrize("function", ["attention", "attention_backward", "quantize"])
def test_signatures__are_those_of_umfa(function):
    def words(module):
        parameters = inspect.signature(getattr(module, function)).parameters.values()
        return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]

    assert words(umfa_rs) == words(umfa)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.attention(X, X[..., :4], X), "InvalidDimensionsError"),
        (lambda m: m.attention(X, X, X, softcap=-1.0), "InvalidArgumentError"),
        (lambda m: m.attention(X, X, X, causal="left"), "InvalidArgumentError"),
        (lambda m: m.attention(X, X, X, causal=1.5), "InvalidTypeError"),
        (lambda m: m.attention(X, X, X, window=(1, 2, 3)), "InvalidArgumentError"),
        (lambda m: m.attention(X, X, X, window=5), "InvalidTypeError"),
        (lambda m: m.attention(X, X, X, window=(-2, 0)), "InvalidArgumentError"),
        (lambda m: m.attention(X, X, X, layout="sbhd"), "InvalidArgumentError"),
        (lambda m: m.attention(X, X, X, kv_lengths=[1]), "InvalidDimensionsError"),
        (lambda m: m.attention(X, X, X, kv_lengths=[1, 99]), "InvalidDimensionsError"),
        (lambda m: m.attention(X, X, X, kv_lengths=[1.5, 2]), "InvalidTypeError"),
        (lambda m: m.attention(X, X, X, sinks=[1.0]), "InvalidDimensionsError"),
        (lambda m: m.attention(X, X, X, scale="1"), "InvalidTypeError"),
        (lambda m: m.attention(X, X, X, scale=float("nan")), "InvalidArgumentError"),
        (lambda m: m.attention(X, X, X, seed=-1), "InvalidArgumentError"),
        (lambda m: m.attention(X, X, X, mask=X.astype(np.int8)), "InvalidTypeError"),
        (lambda m: m.attention(X, X, X, out=X), "InvalidArgumentError"),
        (lambda m: m.attention(X, X, X, quantize="int2"), "InvalidArgumentError"),
        (lambda m: m.attention(X, X, X, quantize=8), "InvalidTypeError"),
        (lambda m: m.attention(X.astype(np.int32), X, X), "InvalidTypeError"),
        (lambda m: m.attention(X.tolist(), X, X), "InvalidTypeError"),
        (lambda m: m.attention(X.astype(">f4"), X, X), "InvalidArgumentError"),
        (lambda m: m.attention(np.ma.masked_array(X), X, X), "InvalidTypeError"),
        (lambda m: m.attention(X[0, 0, 0], X, X), "InvalidDimensionsError"),
        (lambda m: m.attention(X, X, X, context=3), "InvalidTypeError"),
        (lambda m: m.attention_backward(X, X, X, X, X, X[..., 0], gradients=("query", "query")), "InvalidArgumentError"),
        (lambda m: m.attention_backward(X, X, X, X, X, X[..., 0], gradients=("sinks",)), "InvalidArgumentError"),
        (lambda m: m.attention_backward(X, X, X, X, X, X[..., 0], gradients="query"), "InvalidTypeError"),
        (lambda m: m.attention_backward(X, X, X, X, X, X[..., 0], dropout_p=0.5), "InvalidArgumentError"),
        (lambda m: m.attention_backward(X, X, X, X, X, X[..., 0, 0]), "InvalidDimensionsError"),
        (lambda m: m.quantize(X * np.nan), "InvalidArgumentError"),
        (lambda m: m.quantize(X, "int8", "group", group_size=0), "InvalidArgumentError"),
        (lambda m: m.quantize(X, "int8", "token", group_size=4), "InvalidArgumentError"),
        (lambda m: m.QuantizedTensor(X.astype(np.int8), X[0, 0, 0]), "InvalidDimensionsError"),
        (lambda m: m.QuantizedTensor(X.view(np.uint8), X), "InvalidArgumentError"),
        (lambda m: m.QuantizedTensor(X, X), "InvalidTypeError"),
        (lambda m: m.MFABuffer(-1) if m is umfa else m.MfaBuffer(-1), "InvalidDimensionsError"),
        (lambda m: m.MFAContext(num_threads=0) if m is umfa else m.MfaContext(num_threads=0), "InvalidArgumentError"),
        (lambda m: m.MFAContext(device="gpu") if m is umfa else m.MfaContext(device="gpu"), "InvalidArgumentError"),
    ],
)
def test_errors__are_those_of_umfa(call, error):
    with pytest.raises(getattr(umfa_rs, error)) as caught:
        call(umfa_rs)
    with pytest.raises(getattr(umfa, error)) as expected:
        call(umfa)
    assert caught.value.status == expected.value.status
    assert str(caught.value).startswith("umfa_rs.")
    bases = [base.__name__ for base in type(caught.value).__mro__]
    assert bases == [base.__name__ for base in type(expected.value).__mro__]


def test_out__is_written_where_it_lies():
    memory = np.zeros((2, 3, 20, 9), np.float32)
    out = memory[:, :, ::2]
    assert umfa_rs.attention(X, X, X, out=out) is out
    assert np.array_equal(out, umfa.attention(X, X, X))
    assert not memory[:, :, 1::2].any()
    out.flags.writeable = False
    with pytest.raises(umfa_rs.InvalidArgumentError, match="read-only"):
        umfa_rs.attention(X, X, X, out=out)


def test_tensors_of_pytorch__are_read_without_a_copy():
    torch = pytest.importorskip("torch")
    assert np.array_equal(umfa_rs.attention(*(torch.from_numpy(X),) * 3), umfa.attention(X, X, X))


def test_contexts__close_and_wait_for_calls():
    with umfa_rs.MfaContext("cpu", 2) as context:
        assert (context.device, context.num_threads, context.closed) == ("cpu", 2, False)
        assert context.instruction_set == umfa.MFAContext().details()["instruction_set"]
        expected = umfa.attention(X, X, X)
        results = []
        threads = [threading.Thread(target=lambda: results.append(umfa_rs.attention(X, X, X, context=context))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 8
        assert all(np.array_equal(result, expected) for result in results)
    assert context.closed
    context.close()
    with pytest.raises(umfa_rs.InvalidContextError, match="closed"):
        umfa_rs.attention(X, X, X, context=context)
    assert "closed" in repr(context)


def test_interpreter__runs_on_during_a_call():
    x = np.ones((1, 4, 2048, 64), np.float32)
    done, ticks = threading.Event(), []

    def tick():
        while not done.wait(0.001):
            ticks.append(None)

    thread = threading.Thread(target=tick)
    thread.start()
    umfa_rs.attention(x, x, x)
    before = len(ticks)
    umfa_rs.attention(x, x, x)
    during = len(ticks) - before
    done.set()
    thread.join()
    assert during >= 2


def test_buffer__is_memory_with_the_buffer_protocol():
    with umfa_rs.MfaBuffer(4 * X.size) as buffer:
        array = buffer.array(X.shape)
        array[...] = X
        assert np.array_equal(np.frombuffer(buffer, np.float32).reshape(X.shape), X)
        assert memoryview(buffer).nbytes == len(buffer) == buffer.size == 4 * X.size
        assert array.ctypes.data == buffer.address
        assert buffer.address % os.sysconf("SC_PAGE_SIZE") == 0
        assert np.array_equal(umfa_rs.attention(array, array, array), umfa.attention(X, X, X))
        part = buffer.array((9,), offset=4 * 9)
        assert np.shares_memory(part, array)
        with pytest.raises(umfa_rs.InvalidDimensionsError):
            buffer.array((X.size + 1,))
        with pytest.raises(umfa_rs.InvalidDimensionsError):
            buffer.array((1,), offset=-4)
        with pytest.raises(umfa_rs.InvalidTypeError):
            buffer.array((1,), object)
    assert buffer.closed
    with pytest.raises(umfa_rs.InvalidArgumentError, match="closed"):
        buffer.array((1,))
    del buffer
    gc.collect()
    assert np.array_equal(array, X), "a view keeps the memory alive"


def test_buffer_of_an_array__shares_its_memory():
    x = X.copy()
    buffer = umfa_rs.MfaBuffer.from_array(x)
    buffer.array(x.shape)[0, 0, 0, 0] = 5
    assert x[0, 0, 0, 0] == 5
    x.flags.writeable = False
    assert not umfa_rs.MfaBuffer.from_array(x).array(x.shape).flags.writeable
    with pytest.raises(umfa_rs.InvalidArgumentError, match="contiguous"):
        umfa_rs.MfaBuffer.from_array(X[..., ::2])
    before = sys.getrefcount(x)
    made = umfa_rs.MfaBuffer.from_array(x)
    assert sys.getrefcount(x) == before + 1
    del made
    assert sys.getrefcount(x) == before


def test_parts_of_a_tensor__are_the_memory_that_attention_reads():
    keys = umfa_rs.quantize(X, "int4", symmetric=False)
    before = umfa_rs.attention(X, keys, X)
    keys.scales[...] *= 2
    assert not np.array_equal(umfa_rs.attention(X, keys, X), before)
    with pytest.raises(ValueError, match="resize"):
        keys.data.resize(100_000, refcheck=False)
    keys.data.shape = -1
    assert keys.data.shape == (2, 3, 10, 5)
    again = umfa_rs.QuantizedTensor(keys.data, keys.scales, keys.zero_points, shape=X.shape)
    assert np.shares_memory(again.data, keys.data)
    assert np.shares_memory(again.scales, keys.scales)
    with pytest.raises(umfa_rs.InvalidArgumentError, match=r"QuantizedTensor: scales: expected a contiguous array.*kv_lengths"):
        umfa_rs.QuantizedTensor(keys.data, np.repeat(keys.scales, 2, axis=2)[:, :, ::2], shape=X.shape)


def test_calls__do_not_leak():
    x = np.ones((1, 8, 256, 64), np.float32)

    def work():
        keys = umfa_rs.quantize(x)
        out, lse = umfa_rs.attention(x, keys, x, return_lse=True)
        umfa_rs.attention_backward(out, x, keys, x, out, lse)
        umfa_rs.MfaBuffer(1 << 20).array((1 << 18,)).fill(1)
        with pytest.raises(umfa_rs.MFAError):
            umfa_rs.attention(x, x, x, softcap=-1.0)

    def resident():
        with open("/proc/self/statm") as file:
            return 4096 * int(file.read().split()[1])

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("memory is measured by Linux's /proc")
    for _ in range(5):
        work()
    before = resident()
    for _ in range(50):
        work()
    assert resident() - before < 20 << 20


def test_child_after_fork__computes():
    program = (
        "import os, numpy, umfa_rs; x = numpy.ones((1, 2, 64, 16), 'float32'); umfa_rs.attention(x, x, x); pid = os.fork()\n"
        "if pid == 0: os._exit(int(not numpy.allclose(umfa_rs.attention(x, x, x), 1)))\n"
        "os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60).returncode == 0


@pytest.mark.parametrize("document", ["docs/rust.md", "rust/umfa-rs/README.md"])
def test_python_in_the_documents__runs(document):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(), flags=re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, document, "exec"), {})
