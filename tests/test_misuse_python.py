"""Bad input to the Python functions: every argument of each. An exception of umfa's that names the function; not a byte changed."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest

import umfa

NAN, INF = math.nan, math.inf
Q = np.ones((2, 4, 5, 8), np.float32)
K = np.ones((2, 2, 7, 8), np.float32)
V = np.ones((2, 2, 7, 6), np.float32)
TYPE, VALUE, DIMENSIONS = umfa.InvalidTypeError, umfa.InvalidArgumentError, umfa.InvalidDimensionsError
NOT_ARRAYS = [None, 3, "text", b"bytes", object(), [1.0, 2.0], {"a": 1}, lambda: None]
NOT_FLOATS = [Q.astype(np.int64), Q.astype(np.int16), Q.astype(np.complex64), Q.astype(object), Q.astype("U3"), Q > 0, Q.astype(np.uint8)]
NOT_NUMBERS = [None, "1", [1.0], object(), True, 1j]
BOTH = (TYPE, DIMENSIONS)
NOT_OPERANDS = {TYPE: [*NOT_ARRAYS, *NOT_FLOATS, np.ma.array(Q)], VALUE: [Q.astype(">f4")]}
NOT_OPERANDS |= {DIMENSIONS: [Q[0, 0, 0], Q[None], Q[0], Q[..., :0], Q[:1]], BOTH: [np.float32(1)]}
NOT_VECTORS = {
    TYPE: ["text", object(), np.ones(4, complex), np.ones(4, bool)],
    DIMENSIONS: [1.0, np.ones(3), np.ones((4, 1))],
}


def also(mistakes, error, *values):
    """The same mistakes, and some more."""
    return {**mistakes, error: [*mistakes.get(error, []), *values]}


# For each argument the exceptions, and the values that raise them.
ATTENTION_MISTAKES = {
    "q": also(NOT_OPERANDS, DIMENSIONS, Q[..., :7], Q[:, :3], Q[:, :0]),
    "k": also(NOT_OPERANDS, DIMENSIONS, K[..., :7], K[:, :1], K[:, :, :6]),
    "v": also(NOT_OPERANDS, DIMENSIONS, V[:, :1], V[:, :, :6], np.ones((2, 2, 7, 1025), np.float32)),
    "mask": {
        TYPE: [*NOT_ARRAYS[1:], np.ones((5, 7), np.int8), np.ones((5, 7), np.int64)],
        DIMENSIONS: [np.ones(shape, bool) for shape in ((5, 8), (4, 7), (5, 0), (3, 1, 1), (1, 1, 1, 5, 7))],
    },
    "causal": {TYPE: [None, 1, 0, 2.0, object(), []], VALUE: ["upper", ""]},
    "window": {
        TYPE: [3, "ab", (1.5, 2), (None, 1), object()],
        VALUE: [(1,), (1, 2, 3), (-2, 0), (0, -5), (2**63, 0)],
    },
    "scale": {TYPE: NOT_NUMBERS[1:], VALUE: [NAN, INF, -INF, 10**400]},
    "softcap": {TYPE: NOT_NUMBERS, VALUE: [NAN, INF, -1.0, 10**400]},
    "alibi_slopes": NOT_VECTORS,
    "sinks": NOT_VECTORS,
    "kv_lengths": {
        TYPE: ["ab", [1.0, 2.0], np.array([True, False])],
        DIMENSIONS: [7, [7], [7, 7, 7], [7, 8], [-1, 7]],
        BOTH: [object()],
        (DIMENSIONS, VALUE): [[2**63, 0]],
    },
    "query_offset": {
        TYPE: ["ab", 1.5, [1.5, 2.5], object()],
        DIMENSIONS: [[1], [1, 2, 3]],
        VALUE: [2**61, -(2**61), 2**64, [2**61, 0]],
    },
    "dropout_p": {TYPE: NOT_NUMBERS, VALUE: [NAN, -0.1, 1.1, INF]},
    "seed": {TYPE: [1.5, "1", True, object()], VALUE: [-1, 2**64]},
    "dropout_offset": {TYPE: [1.5, "1", None], VALUE: [-1, 2**32]},
    "layout": {TYPE: [None, 3], VALUE: ["bhds", ""]},
    "quantize": {TYPE: [8, True, object(), umfa.QuantizationScheme()], VALUE: ["int2", ""]},
    "context": {TYPE: ["cpu", 3, object()]},
}


def listed(mistakes):
    """(argument, value, error) of each mistake."""
    return [(argument, value, error) for argument, errors in mistakes.items() for error, values in errors.items() for value in values]


OUT_SHAPE = (2, 4, 5, 6)
OUT_MISTAKES = [
    *[(value, TYPE) for value in NOT_ARRAYS[1:]],
    (np.zeros(OUT_SHAPE, np.int8), TYPE),
    (np.zeros(OUT_SHAPE, np.int64), TYPE),
    (np.zeros(OUT_SHAPE, bool), TYPE),
    (np.zeros((2, 4, 5, 8), np.float32), DIMENSIONS),
    (np.zeros((2, 5, 4, 6), np.float32), DIMENSIONS),
    (np.zeros((4, 5, 6), np.float32), DIMENSIONS),
    (np.broadcast_to(np.zeros(6, np.float32), OUT_SHAPE), VALUE),
    (np.frombuffer(bytes(4 * 240), np.float32).reshape(OUT_SHAPE), VALUE),
    (np.lib.stride_tricks.as_strided(np.zeros(300, np.float32), OUT_SHAPE, (480, 120, 20, 4)), VALUE),
]
PYTHON_MISTAKES = listed(ATTENTION_MISTAKES)
PYTHON_MISTAKES += [("out", value, error) for value, error in OUT_MISTAKES] + [("return_lse", value, TYPE) for value in (None, 1, "yes")]


def numbered(mistakes):
    return [f"{argument}-{index}-{type(value).__name__}" for index, (argument, value, _) in enumerate(mistakes)]


def refused(error, function, argument, call):
    """Run `call`; it must raise `error`, whose message names the function and says what came."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert text.startswith((f"umfa.{function}: ", f"{function}: ")), text
    assert isinstance(caught.value, umfa.MFAError)
    assert isinstance(caught.value, (ValueError, TypeError, NotImplementedError))
    return text


def test_attention__mistakes__cover_all_arguments():
    assert set(ATTENTION_MISTAKES) | {"out", "return_lse"} == set(inspect.signature(umfa.attention).parameters)


@pytest.mark.parametrize(("argument", "value", "error"), PYTHON_MISTAKES, ids=numbered(PYTHON_MISTAKES))
def test_attention__each_mistake__raises_and_leaves_out_alone(argument, value, error):
    out = np.full(OUT_SHAPE, 7, np.float32)
    arguments = {"q": Q, "k": K, "v": V, "out": out, argument: value}
    refused(error, "attention", argument, lambda: umfa.attention(**arguments))
    assert (out == 7).all()
    assert (Q == 1).all()


@pytest.mark.parametrize(("argument", "value", "error"), PYTHON_MISTAKES, ids=numbered(PYTHON_MISTAKES))
def test_flash_attention_forward__each_mistake__raises_and_leaves_out_alone(argument, value, error, context):
    names = {"scale": "softmax_scale", "context": "ctx"}
    if argument == "layout":
        pytest.raises(TypeError, umfa.flash_attention_forward, None, Q, K, V, layout=value)
        return
    if (
        isinstance(value, np.ndarray)
        and argument in ("q", "k", "v", "out")
        and value.ndim == 4
        and value.dtype != object
        and not np.ma.isMaskedArray(value)
    ):
        value = value.swapaxes(1, 2)
    q, k, v = (tensor.swapaxes(1, 2) for tensor in (Q, K, V))
    out = np.full((2, 5, 4, 6), 7, np.float32)
    with umfa.MFAContext() as ctx:
        arguments = {"ctx": ctx, "q": q, "k": k, "v": v, "out": out, names.get(argument, argument): value}
        refused(error, "flash_attention_forward", argument, lambda: umfa.flash_attention_forward(**arguments))
    assert (out == 7).all()


LSE = np.zeros((2, 4, 5), np.float32)
OUT = np.ones(OUT_SHAPE, np.float32)
BACKWARD_MISTAKES = [mistake for mistake in PYTHON_MISTAKES if mistake[0] not in ("out", "return_lse")]
BACKWARD_MISTAKES += [("grad_out", value, error) for value, error in OUT_MISTAKES[:13]] + [("grad_out", None, TYPE)]
BACKWARD_MISTAKES += [("out", value, error) for value, error in OUT_MISTAKES[:13]]
for name in ("lse", "grad_lse"):
    BACKWARD_MISTAKES += [
        (name, value, TYPE) for value in (3.0, "text", object(), LSE.astype(np.float64), LSE.astype(np.float16), LSE.astype(int))
    ]
    BACKWARD_MISTAKES += [(name, value, DIMENSIONS) for value in (LSE[:1], LSE[..., None], LSE.swapaxes(1, 2), LSE.ravel())]
BACKWARD_MISTAKES += [("lse", None, TYPE)]
BACKWARD_MISTAKES += [
    ("gradients", "query", TYPE),
    ("gradients", None, TYPE),
    ("gradients", 3, TYPE),
    ("gradients", ("nothing",), VALUE),
    ("gradients", ("query", "query"), VALUE),
    ("gradients", ("mask",), VALUE),
    ("gradients", ("sinks",), VALUE),
    ("gradients", ("alibi_slopes",), VALUE),
    ("gradients", (3,), TYPE),
    ("dropout_p", 0.5, VALUE),
]


def test_attention_backward__mistakes__cover_all_arguments():
    assert {argument for argument, *_ in BACKWARD_MISTAKES} == set(inspect.signature(umfa.attention_backward).parameters)


@pytest.mark.parametrize(("argument", "value", "error"), BACKWARD_MISTAKES, ids=numbered(BACKWARD_MISTAKES))
def test_attention_backward__each_mistake__raises(argument, value, error):
    arguments = {"grad_out": OUT, "q": Q, "k": K, "v": V, "out": OUT, "lse": LSE, argument: value}
    refused(error, "attention_backward", argument, lambda: umfa.attention_backward(**arguments))
    assert (Q == 1).all()
    assert (OUT == 1).all()


def test_attention__lower_right_with_offsets__raises():
    refused(VALUE, "attention", "query_offset", lambda: umfa.attention(Q, K, V, causal="lower_right", query_offset=1))


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "lengths"])
def test_attention__out_on_an_input__raises_and_changes_nothing(name, rng):
    memory = rng.normal(size=2 * 4 * 7 * 8).astype(np.float32)
    before = memory.copy()
    q = k = v = rng.normal(size=(2, 4, 7, 8)).astype(np.float32)
    shared = memory.reshape(2, 4, 7, 8)
    keywords = {}
    if name == "mask":
        keywords["mask"] = memory[: 4 * 49].reshape(4, 7, 7)
    elif name == "lengths":
        keywords["kv_lengths"] = memory.view(np.int64)[:2]
        keywords["kv_lengths"][:] = 3
        before = memory.copy()
    q, k, v = (shared if name == letter else tensor for letter, tensor in (("q", q), ("k", k), ("v", v)))
    with pytest.raises(umfa.InvalidArgumentError):
        umfa.attention(q, k, v, out=shared, **keywords)
    assert memory.tobytes() == before.tobytes()


QUANTIZE_ARGUMENT_MISTAKES = [mistake for mistake in listed({"x": NOT_OPERANDS}) if mistake[2] is not DIMENSIONS] + [
    ("x", Q[0, 0, 0], DIMENSIONS),
    ("x", Q[None], DIMENSIONS),
    ("x", Q[..., :0], DIMENSIONS),
    ("x", Q.astype(np.int8), TYPE),
    ("dtype", "int2", VALUE),
    ("dtype", None, TYPE),
    ("dtype", np.int8, TYPE),
    ("granularity", "row", VALUE),
    ("granularity", 3, TYPE),
    ("block_size", 0, VALUE),
    ("block_size", 4, VALUE),
    ("group_size", 4, VALUE),
    ("block_size", "4", VALUE),
    ("symmetric", 1, TYPE),
    ("smooth", "yes", TYPE),
    ("rotate", 2, TYPE),
    ("layout", "bhds", VALUE),
    ("layout", None, TYPE),
    ("context", "cpu", TYPE),
]


def test_quantize__mistakes__cover_all_arguments():
    assert {argument for argument, *_ in QUANTIZE_ARGUMENT_MISTAKES} == set(inspect.signature(umfa.quantize).parameters)


@pytest.mark.parametrize(("argument", "value", "error"), QUANTIZE_ARGUMENT_MISTAKES, ids=numbered(QUANTIZE_ARGUMENT_MISTAKES))
def test_quantize__each_mistake__raises(argument, value, error):
    with pytest.raises(error) as caught:
        umfa.quantize(**{"x": Q, argument: value})
    assert isinstance(caught.value, umfa.MFAError)
    assert argument in str(caught.value) or argument in ("block_size", "group_size", "x")


CODES = np.ones((2, 4, 5, 8), np.int8)
TENSOR_MISTAKES = [
    ("data", Q, TYPE),
    ("data", None, TYPE),
    ("data", CODES[0, 0, 0], DIMENSIONS),
    ("data", CODES.astype(np.uint8), VALUE),
    ("scales", np.ones((2, 4, 6), np.float32), DIMENSIONS),
    ("scales", np.ones((2, 4, 5), np.float64), TYPE),
    ("scales", 1.0, (TYPE, DIMENSIONS)),
    ("scales", None, TYPE),
    ("zero_points", np.zeros((2, 4, 5), np.int64), TYPE),
    ("zero_points", np.zeros((2, 4), np.int32), DIMENSIONS),
    ("channel_means", np.zeros((2, 4, 5), np.float32), DIMENSIONS),
    ("channel_means", np.zeros((2, 4, 8)), TYPE),
    ("shape", (2, 4, 5, 7), DIMENSIONS),
    ("shape", 3, TYPE),
    ("shape", (2, 4, 5, -8), (VALUE, DIMENSIONS)),
    ("granularity", "row", VALUE),
    ("granularity", None, TYPE),
    ("granularity", "head", DIMENSIONS),
    ("block_size", 4, VALUE),
    ("group_size", 4, VALUE),
    ("rotated", 1, TYPE),
    ("layout", "other", VALUE),
]


def test_quantized_tensor__mistakes__cover_all_arguments():
    assert {argument for argument, *_ in TENSOR_MISTAKES} == set(inspect.signature(umfa.QuantizedTensor.__init__).parameters) - {"self"}


@pytest.mark.parametrize(("argument", "value", "error"), TENSOR_MISTAKES, ids=numbered(TENSOR_MISTAKES))
def test_quantized_tensor__each_mistake__raises(argument, value, error):
    arguments = {"data": CODES, "scales": np.ones((2, 4, 5), np.float32), argument: value}
    with pytest.raises(error) as caught:
        umfa.QuantizedTensor(**arguments)
    assert isinstance(caught.value, umfa.MFAError)


PART = np.ones(OUT_SHAPE, np.float32), np.zeros((2, 4, 5), np.float32)
NOT_OUTPUTS = also(NOT_OPERANDS, TYPE, PART[0].astype(np.int8))
NOT_OUTPUTS |= {DIMENSIONS: [PART[0][0, 0, 0], PART[0][None], PART[0][:1], PART[0][..., :5]]}
NOT_STATISTICS = {
    TYPE: [*NOT_ARRAYS, PART[1].astype(np.float16), PART[1].astype(int)],
    DIMENSIONS: [PART[1][:1], PART[1][..., None], PART[1].ravel(), PART[1].swapaxes(1, 2)],
}
MERGE_MISTAKES = listed(
    {
        "out_a": NOT_OUTPUTS,
        "lse_a": NOT_STATISTICS,
        "out_b": NOT_OUTPUTS,
        "lse_b": NOT_STATISTICS,
        "layout": {TYPE: [None, 3], VALUE: ["bhds", ""]},
        "context": {TYPE: ["cpu", 3, object()]},
    }
)


def test_merge__mistakes__cover_all_arguments():
    assert {argument for argument, *_ in MERGE_MISTAKES} == set(inspect.signature(umfa.merge).parameters)


@pytest.mark.parametrize(("argument", "value", "error"), MERGE_MISTAKES, ids=numbered(MERGE_MISTAKES))
def test_merge__each_mistake__raises(argument, value, error):
    arguments = {"out_a": PART[0], "lse_a": PART[1], "out_b": PART[0], "lse_b": PART[1], argument: value}
    refused(error, "merge", argument, lambda: umfa.merge(**arguments))


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"device": "gpu"}, VALUE),
        ({"device": None}, TYPE),
        ({"device": 1}, TYPE),
        ({"num_threads": 0}, VALUE),
        ({"num_threads": -1}, VALUE),
        ({"num_threads": 257}, VALUE),
        ({"num_threads": 2**64}, VALUE),
        ({"num_threads": 1.5}, TYPE),
        ({"num_threads": True}, TYPE),
        ({"num_threads": "2"}, TYPE),
    ],
    ids=str,
)
def test_mfa_context__each_mistake__raises(keywords, error):
    with pytest.raises(error) as caught:
        umfa.MFAContext(**keywords)
    assert isinstance(caught.value, umfa.MFAError)


def test_mfa_context__after_close__is_refused_clearly():
    context = umfa.MFAContext()
    context.close()
    context.close()
    assert context.closed
    for call in (
        lambda: umfa.attention(Q, K, V, context=context),
        lambda: umfa.attention_backward(OUT, Q, K, V, OUT, LSE, context=context),
        lambda: umfa.flash_attention_forward(context, Q, Q, Q),
        lambda: context.details(),
        lambda: umfa.MFABuffer(16, context=context),
        lambda: umfa.quantize(Q, context=context),
        lambda: umfa.quantize(Q).dequantize(context=context),
        lambda: umfa.merge(*PART, *PART, context=context),
        lambda: context.__enter__(),
    ):
        with pytest.raises(umfa.InvalidContextError, match="closed"):
            call()


@pytest.mark.parametrize(
    ("size", "error"),
    [(-1, DIMENSIONS), (2**63, DIMENSIONS), (2**62, umfa.OutOfMemoryError), (1.5, TYPE), ("16", TYPE), (None, TYPE)],
    ids=str,
)
def test_mfa_buffer__each_bad_size__raises(size, error):
    with pytest.raises(error):
        umfa.MFABuffer(size)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (((5,), "float32"), DIMENSIONS),
        (((4,), "float32", 1), DIMENSIONS),
        (((-1,), "float32"), VALUE),
        (((2**62, 2**62), "float32"), DIMENSIONS),
        (((4,), "no dtype"), TYPE),
        (((4,), object), TYPE),
        ((object(),), TYPE),
        (((1,), "float32", -4), VALUE),
        (((1,), "float32", 1.5), TYPE),
    ],
    ids=str,
)
def test_mfa_buffer__arrays_that_do_not_fit__are_refused(arguments, error):
    with umfa.MFABuffer(16) as buffer, pytest.raises(error):
        buffer.array(*arguments)


@pytest.mark.parametrize(
    "array", [None, 3, Q[:, :, ::2], Q.swapaxes(0, 1), "text", Q.astype(np.complex64)], ids=lambda value: type(value).__name__
)
def test_mfa_buffer__from_what_is_no_contiguous_array__is_refused(array):
    with pytest.raises(umfa.InvalidArgumentError):
        umfa.MFABuffer.from_array(array)


def test_mfa_buffer__after_close__is_refused_and_arrays_stay():
    buffer = umfa.MFABuffer(64)
    array = buffer.array((16,), "float32")
    array[:] = 3
    buffer.close()
    buffer.close()
    assert (array == 3).all()
    with pytest.raises(umfa.InvalidArgumentError, match="closed"):
        buffer.array((1,), "float32")


def test_attention__impossible_result__raises_and_does_not_crash():
    q = np.broadcast_to(np.float32(1), (2**25, 2**10, 2**10, 2**10))
    with pytest.raises((umfa.InvalidDimensionsError, umfa.OutOfMemoryError)):
        umfa.attention(q, q, q)


def test_umfa__public_functions__are_all_tested_here():
    """A function that is new in umfa needs tests of its arguments here."""
    functions = {name for name in umfa.__all__ if inspect.isfunction(getattr(umfa, name))}
    assert functions == {"attention", "attention_backward", "flash_attention_forward", "info", "merge", "quantize"}
