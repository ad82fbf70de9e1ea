"""Bad input to every public function: an MFAError with function, argument, expected and got; outputs untouched; never a crash."""

from __future__ import annotations

import contextlib
import inspect
import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import umfa
from umfa import errors

NAN, INF = float("nan"), float("inf")
Q = np.random.default_rng(0).normal(size=(2, 4, 6, 8)).astype(np.float32)
K = np.random.default_rng(1).normal(size=(2, 2, 7, 8)).astype(np.float32)
V = np.random.default_rng(2).normal(size=(2, 2, 7, 5)).astype(np.float32)
OUTPUT, LSE = umfa.attention(Q, K, V, return_lse=True)

DIMENSIONS, ARGUMENT, TYPE, UNSUPPORTED = (
    umfa.InvalidDimensionsError,
    umfa.InvalidArgumentError,
    umfa.InvalidTypeError,
    umfa.UnsupportedError,
)

OPTIONS = [
    ("mask", np.ones((6, 8), bool), DIMENSIONS),
    ("mask", np.ones((3, 1, 6, 7), bool), DIMENSIONS),
    ("mask", np.ones((1, 1, 1, 6, 7), bool), DIMENSIONS),
    ("mask", np.ones((6, 7), np.uint8), TYPE),
    ("mask", np.ones((6, 7), np.int64), TYPE),
    ("mask", np.ones((6, 7), complex), TYPE),
    ("mask", [[True] * 7] * 6, TYPE),
    ("mask", True, TYPE),
    ("causal", "left", ARGUMENT),
    ("causal", "", ARGUMENT),
    ("causal", None, TYPE),
    ("causal", 1, TYPE),
    ("causal", np.ones(3, bool), TYPE),
    ("window", 3, TYPE),
    ("window", "33", TYPE),
    ("window", (1,), ARGUMENT),
    ("window", (1, 2, 3), ARGUMENT),
    ("window", (-2, 0), ARGUMENT),
    ("window", (0, 2**63), ARGUMENT),
    ("window", (0.5, 1), TYPE),
    ("window", (None, 1), TYPE),
    ("window", {1: 2}, ARGUMENT),
    ("scale", NAN, ARGUMENT),
    ("scale", INF, ARGUMENT),
    ("scale", 10**400, ARGUMENT),
    ("scale", "1", TYPE),
    ("scale", True, TYPE),
    ("scale", 1j, TYPE),
    ("scale", np.ones(2), TYPE),
    ("softcap", NAN, ARGUMENT),
    ("softcap", -1, ARGUMENT),
    ("softcap", INF, ARGUMENT),
    ("softcap", None, TYPE),
    ("alibi_slopes", np.ones(3), DIMENSIONS),
    ("alibi_slopes", np.ones((4, 1)), DIMENSIONS),
    ("alibi_slopes", 0.5, DIMENSIONS),
    ("alibi_slopes", ["a"] * 4, TYPE),
    ("alibi_slopes", [1j] * 4, TYPE),
    ("alibi_slopes", [None] * 4, TYPE),
    ("alibi_slopes", "abcd", TYPE),
    ("sinks", np.ones(2), DIMENSIONS),
    ("sinks", [[1], [2, 3]], TYPE),
    ("sinks", np.ones(4, bool), TYPE),
    ("sinks", object(), TYPE),
    ("kv_lengths", [8, 7], DIMENSIONS),
    ("kv_lengths", [-1, 7], DIMENSIONS),
    ("kv_lengths", [2**63, 7], DIMENSIONS),
    ("kv_lengths", [2**64, 7], DIMENSIONS),
    ("kv_lengths", [7], DIMENSIONS),
    ("kv_lengths", 7, DIMENSIONS),
    ("kv_lengths", [[7, 7]], TYPE),
    ("kv_lengths", np.array([[7, 7]]), DIMENSIONS),
    ("kv_lengths", [7.0, 7.0], TYPE),
    ("kv_lengths", [True, True], TYPE),
    ("kv_lengths", "77", TYPE),
    ("query_offset", 0.5, TYPE),
    ("query_offset", [0, 1, 2], DIMENSIONS),
    ("query_offset", 2**61, ARGUMENT),
    ("query_offset", -(2**63), ARGUMENT),
    ("query_offset", 2**64, ARGUMENT),
    ("query_offset", np.array([2**64 - 1, 0], np.uint64), ARGUMENT),
    ("query_offset", "0", TYPE),
    ("query_offset", True, TYPE),
    ("dropout_p", NAN, ARGUMENT),
    ("dropout_p", -0.1, ARGUMENT),
    ("dropout_p", 1.0000001, ARGUMENT),
    ("dropout_p", None, TYPE),
    ("seed", -1, ARGUMENT),
    ("seed", 2**64, ARGUMENT),
    ("seed", 1.0, TYPE),
    ("seed", "1", TYPE),
    ("dropout_offset", -1, ARGUMENT),
    ("dropout_offset", 2**32, ARGUMENT),
    ("dropout_offset", None, TYPE),
    ("quantize", "int3", ARGUMENT),
    ("quantize", "float16", ARGUMENT),
    ("quantize", True, TYPE),
    ("quantize", 8, TYPE),
    ("context", 1, TYPE),
]
LAYOUTS = [("layout", "sbhd", ARGUMENT), ("layout", None, TYPE), ("layout", ["bhsd"], TYPE), ("layout", b"bhsd", TYPE)]
OUTPUTS = [
    ("out", np.zeros((2, 4, 6, 8), np.float32), DIMENSIONS),
    ("out", np.zeros((4, 6, 5), np.float32), DIMENSIONS),
    ("out", np.zeros((2, 4, 6, 5), np.int8), TYPE),
    ("out", np.zeros((2, 4, 6, 5), bool), TYPE),
    ("out", np.zeros((2, 4, 6, 5), np.int32), TYPE),
    ("out", True, TYPE),
    ("out", np.broadcast_to(np.float32(0), (2, 4, 6, 5)), ARGUMENT),
    ("out", Q[..., :5], ARGUMENT),
    ("return_lse", 1, TYPE),
    ("return_lse", None, TYPE),
]


def named(values):
    return [pytest.param(*value, id=f"{value[0]}-{index}") for index, value in enumerate(values)]


def refused(error, function, *arguments, **options):
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"umfa.{function.__qualname__}: ")
    return str(caught.value)


@pytest.mark.parametrize(("name", "value", "error"), named(OPTIONS + LAYOUTS + OUTPUTS))
def test_attention(name, value, error):
    out = np.full((2, 4, 6, 5), 7, np.float32)
    message = refused(error, umfa.attention, Q, K, V, **{"out": out, name: value})
    assert name in message or name in ("scale", "out", "query_offset"), message
    assert (out == 7).all()


@pytest.mark.parametrize(("name", "value", "error"), named(OPTIONS + LAYOUTS))
def test_attention_backward(name, value, error):
    refused(error, umfa.attention_backward, OUTPUT, Q, K, V, OUTPUT, LSE, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"), named([option for option in OPTIONS if option[0] not in ("scale", "context")] + OUTPUTS)
)
def test_flash_attention_forward(name, value, error, context):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (Q, K, V))
    if name == "out" and getattr(value, "ndim", 0) == 4:
        value = value.transpose(0, 2, 1, 3)
    refused(error, umfa.flash_attention_forward, context, q, k, v, **{name: value})


@pytest.mark.parametrize("scale", [NAN, INF, 10**400])
def test_flash_attention_forward__scale(scale, context):
    refused(ARGUMENT, umfa.flash_attention_forward, context, Q, Q, Q, softmax_scale=scale)
    refused(TYPE, umfa.flash_attention_forward, context, Q, Q, Q, softmax_scale=str(scale))


@pytest.mark.parametrize(
    ("shapes", "error"),
    [
        (((2, 4, 6, 8), (2, 3, 7, 8), (2, 3, 7, 8)), DIMENSIONS),
        (((2, 4, 6, 8), (1, 4, 7, 8), (1, 4, 7, 8)), DIMENSIONS),
        (((2, 4, 6, 8), (2, 4, 7, 9), (2, 4, 7, 8)), DIMENSIONS),
        (((2, 4, 6, 8), (2, 4, 7, 8), (2, 4, 6, 8)), DIMENSIONS),
        (((2, 4, 6, 8), (2, 4, 7, 8), (2, 2, 7, 8)), DIMENSIONS),
        (((2, 4, 6, 8), (4, 7, 8), (4, 7, 8)), DIMENSIONS),
        (((2, 4, 6, 8), (2, 4, 7, 8), (2, 4, 7, 8, 1)), DIMENSIONS),
        (((8,), (8,), (8,)), DIMENSIONS),
        (((), (), ()), DIMENSIONS),
        (((1, 2, 4, 6, 8),) * 3, DIMENSIONS),
        (((2, 4, 6, 0),) * 3, DIMENSIONS),
        (((2, 0, 6, 8),) * 3, DIMENSIONS),
        (((2, 4, 6, 1025),) * 3, DIMENSIONS),
        (((2, 4, 6, 8), (2, 4, 6, 8), (2, 4, 6, 1025)), DIMENSIONS),
        (((2, 4, 6, 8), (2, 0, 6, 8), (2, 0, 6, 8)), DIMENSIONS),
    ],
)
def test_shapes(shapes, error):
    operands = [np.zeros(shape, np.float32) for shape in shapes]
    refused(error, umfa.attention, *operands)
    refused(error, umfa.attention_backward, operands[0], *operands, operands[0], np.zeros(shapes[0][:-1], np.float32))


@pytest.mark.parametrize("shape", [(1, 1, 2**40, 8), (1, 1, 2**33, 8), (2**33, 1, 1, 8), (2**25, 2**25, 4, 8)], ids=str)
def test_sizes_that_cannot_be(shape):
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0, 0, 0, 0))
    small = np.zeros((1, 1, 1, 8), np.float32)
    for operands in ((huge, huge, huge), (small, huge, huge), (huge, small, small)):
        with pytest.raises((umfa.InvalidDimensionsError, umfa.OutOfMemoryError)):
            umfa.attention(*operands)
    with pytest.raises((umfa.InvalidDimensionsError, umfa.OutOfMemoryError)):
        umfa.quantize(huge)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("grad_out", OUTPUT[..., :4], DIMENSIONS),
        ("grad_out", OUTPUT[0], DIMENSIONS),
        ("grad_out", OUTPUT.astype(np.int8), TYPE),
        ("grad_out", None, TYPE),
        ("out", OUTPUT[..., :4], DIMENSIONS),
        ("out", "out", TYPE),
        ("lse", LSE[..., :5], DIMENSIONS),
        ("lse", LSE[..., None], DIMENSIONS),
        ("lse", LSE.astype(np.float64), TYPE),
        ("lse", LSE.astype(np.float16), TYPE),
        ("lse", None, TYPE),
        ("grad_lse", LSE[:1], DIMENSIONS),
        ("grad_lse", LSE.astype(bool), TYPE),
        ("gradients", "query", TYPE),
        ("gradients", ("q",), ARGUMENT),
        ("gradients", ("query", "query"), ARGUMENT),
        ("gradients", (None,), TYPE),
        ("gradients", 5, TYPE),
        ("gradients", None, TYPE),
        ("gradients", ("mask",), ARGUMENT),
        ("gradients", ("sinks",), ARGUMENT),
        ("gradients", ("alibi_slopes",), ARGUMENT),
        ("dropout_p", 0.5, ARGUMENT),
    ],
)
def test_attention_backward__its_own_arguments(name, value, error):
    arguments = {"grad_out": OUTPUT, "q": Q, "k": K, "v": V, "out": OUTPUT, "lse": LSE, name: value}
    message = refused(error, umfa.attention_backward, **arguments)
    assert name in message or name in ("dropout_p", "grad_out", "out")


def test_attention_backward__gradient_of_a_boolean_mask():
    mask = np.ones((6, 7), bool)
    refused(ARGUMENT, umfa.attention_backward, OUTPUT, Q, K, V, OUTPUT, LSE, mask=mask, gradients=("mask",))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "int2"}, ARGUMENT),
        ({"dtype": None}, TYPE),
        ({"dtype": np.int8}, TYPE),
        ({"granularity": "row"}, ARGUMENT),
        ({"granularity": 3}, TYPE),
        ({"block_size": 4}, ARGUMENT),
        ({"group_size": 4}, ARGUMENT),
        ({"granularity": "block", "block_size": 0}, ARGUMENT),
        ({"granularity": "block", "block_size": -1}, ARGUMENT),
        ({"granularity": "block", "block_size": 2**32}, ARGUMENT),
        ({"granularity": "group", "group_size": 2.0}, TYPE),
        ({"symmetric": 1}, TYPE),
        ({"smooth": None}, TYPE),
        ({"rotate": "yes"}, TYPE),
        ({"layout": "hbsd"}, ARGUMENT),
    ],
)
def test_quantize(options, error):
    refused(error, umfa.quantize, Q, **options)
    if "layout" not in options:
        with pytest.raises(error):
            umfa.QuantizationScheme(**options)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (None, TYPE),
        ([[1.0]], TYPE),
        (Q.astype(np.int8), TYPE),
        (Q.astype(bool), TYPE),
        (Q[0, 0, 0], DIMENSIONS),
        (np.float32(1), DIMENSIONS),
        (Q[None], DIMENSIONS),
        (np.where(Q > 2, np.nan, Q), ARGUMENT),
        (np.where(Q > 2, np.inf, Q), ARGUMENT),
        (np.full((4, 8), 1e300), ARGUMENT),
    ],
)
def test_quantize__x(x, error):
    refused(error, umfa.quantize, x)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("position", range(3))
def test_fused_quantisation__refuses_what_is_not_finite(value, position):
    operands = [Q.copy(), K.copy(), V.copy()]
    operands[position][1, 1, 3, 2] = value
    out = np.full_like(OUTPUT, 7)
    refused(ARGUMENT, umfa.attention, *operands, quantize="int8", out=out)
    assert (out == 7).all()


def test_read_only_out__is_refused():
    out = np.zeros_like(OUTPUT)
    out.flags.writeable = False
    assert "read-only" in refused(ARGUMENT, umfa.attention, Q, K, V, out=out)


def test_lower_right_and_offset__is_refused():
    refused(ARGUMENT, umfa.attention, Q, K, V, causal="lower_right", query_offset=1)


def test_packed_codes__come_as_quantized_tensors():
    codes = np.zeros((2, 4, 6, 8), np.uint8)
    assert "QuantizedTensor" in refused(TYPE, umfa.attention, codes, codes, codes)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith("Error")])
def test_errors__pickle_with_status(name):
    error = pickle.loads(pickle.dumps(getattr(errors, name)("words")))
    assert str(error) == "words"
    assert isinstance(error, umfa.MFAError)
    assert error.status == getattr(errors, name).status


def test_error_for_status():
    for status in range(1, 8):
        assert errors.error_for_status(status, "").status == status
    assert type(errors.error_for_status(99, "new")) is umfa.MFAError
    assert errors.error_for_status(99, "new").status == 99


class Hostile:
    """Fails at whatever is asked of it."""

    def __getattr__(self, name):
        raise ValueError(name)

    def __repr__(self):
        raise ValueError("repr")

    def __len__(self):
        raise ValueError("len")

    def __iter__(self):
        raise ValueError("iter")

    def __array__(self, *_, **__):
        raise ValueError("array")

    def __index__(self):
        raise ValueError("index")

    def __float__(self):
        raise ValueError("float")

    def __bool__(self):
        raise ValueError("bool")

    def __eq__(self, other):
        raise ValueError("eq")

    __hash__ = None


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.lists(st.one_of(st.integers(-9, 9), st.floats(), st.text(max_size=2)), max_size=5),
    st.tuples(st.integers(), st.integers()),
    st.builds(Hostile),
    st.sampled_from(
        [Q, K, V, Q[0], Q[0, 0], np.zeros(()), np.zeros(0), Q.astype("f8"), Q.astype("f2"), Q.astype("i1"), Q > 0, Q.astype(object)]
    ),
    st.sampled_from(
        [LSE, OUTPUT, umfa.quantize(Q), umfa.quantize(K, "int4"), umfa.QuantizationConfig(), np.array("text"), np.array([None]), dict, int]
    ),
)


@pytest.mark.parametrize(
    "function", [umfa.attention, umfa.attention_backward, umfa.flash_attention_forward, umfa.quantize, umfa.QuantizedTensor]
)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150)
def test_anything_at_all__is_an_error_or_a_result(function, data):
    parameters = list(inspect.signature(function).parameters)
    good = {"q": Q, "k": K, "v": V, "grad_out": OUTPUT, "out": OUTPUT.copy(), "lse": LSE, "x": Q, "data": Q.astype(np.int8), "scales": LSE}
    if function is umfa.flash_attention_forward:
        good = {name: value.swapaxes(1, 2) for name, value in good.items()} | {"ctx": umfa.context.default_context()}
    arguments = {name: good[name] for name in parameters if name in good}
    for name in data.draw(st.lists(st.sampled_from(parameters), min_size=1, max_size=3, unique=True)):
        arguments[name] = data.draw(ANYTHING, label=name)
    with contextlib.suppress(umfa.MFAError):
        function(**arguments)
