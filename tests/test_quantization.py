"""Quantising and dequantising, bit for bit, and what quantised attention costs in accuracy."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

import reference
import umfa
from cases import CODES, DTYPES, OPTIONS, STYLES, Operand, Sizes, place, problem, quantized_operand, to_layout
from test_backward import run_backward
from tolerances import Bounds, assert_within

GRANULARITIES = ("tensor", "head", "token", "block", "channel", "group")
MOST_USED = ("tensor", "token")
GROUPS = {"block": {"block_size": 7}, "group": {"group_size": 5}}


def quantize(values, dtype, granularity, **keywords):
    """``umfa.quantize`` with the sizes that a granularity needs."""
    return umfa.quantize(values, dtype, granularity, **GROUPS.get(granularity, {}), **keywords)


def assert_bits(got: umfa.QuantizedTensor, expected: reference.Quantized, layout: str = "bhsd"):
    """Codes, scales, zero points and means are those of the reference."""
    data = to_layout(np.asarray(got.data), layout)
    codes = expected.codes.astype(np.int8) if got.dtype == "int8" else reference.pack_int4(expected.codes)
    assert data.dtype == codes.dtype
    assert got.scales.tobytes() == expected.scales.tobytes()
    for name in ("zero_points", "channel_means"):
        one, other = getattr(got, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype
            assert one.tobytes() == other.tobytes(), name
    assert np.ascontiguousarray(data).tobytes() == codes.tobytes()


def check(values, dtype, granularity, layout="bhsd", **keywords):
    """Quantise and dequantise `values`, which are in `layout`."""
    words = {("rotated" if name == "rotate" else name): value for name, value in keywords.items()}
    expected = reference.quantize(to_layout(values, layout), dtype, granularity, **GROUPS.get(granularity, {}), **words)
    got = quantize(values, dtype, granularity, layout=layout, **keywords)
    assert got.shape == values.shape
    assert_bits(got, expected, layout)
    assert to_layout(got.dequantize(), layout).tobytes() == reference.dequantize(expected).tobytes()
    return got, expected


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("rotate", [False, True], ids=["straight", "rotate"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", CODES)
def test_quantize__each_scheme__gives_the_bits_of_the_reference(dtype, granularity, symmetric, rotate, smooth, rng):
    for shape in ((2, 3, 19, 24), (1, 1, 1, 1), (1, 2, 33, 17), (2, 1, 5, 1024)):
        values = (rng.normal(size=shape) + 0.5 * rng.normal(size=shape[-1])).astype(np.float32)
        check(values, dtype, granularity, symmetric=symmetric, rotate=rotate, smooth=smooth)


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 17, 32, 48, 64, 65, 100, 128, 200, 1023, 1024])
@pytest.mark.parametrize("granularity", MOST_USED)
@pytest.mark.parametrize("dtype", CODES)
def test_quantize__head_sizes__give_the_bits_of_the_reference(dtype, granularity, channels, rng):
    values = rng.normal(size=(1, 2, 9, channels)).astype(np.float32)
    for symmetric, rotate in itertools.product((True, False), repeat=2):
        check(values, dtype, granularity, symmetric=symmetric, rotate=rotate)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("dtype", CODES)
def test_quantize__types_and_strides__give_the_bits_of_the_reference(dtype, kind, style, layout, rng):
    for channels, prepared in ((13, True), (13, False), (32, True), (32, False)):
        values = place(to_layout(rng.normal(size=(2, 3, 11, channels)), layout).astype(DTYPES[kind]), style, rng)
        for granularity, symmetric in itertools.product(MOST_USED, (True, False)):
            check(values, dtype, granularity, layout=layout, symmetric=symmetric, smooth=prepared, rotate=prepared)


@pytest.mark.parametrize("dtype", CODES)
def test_quantize__quotients_near_the_middle_between_integers__give_the_bits_of_the_reference(dtype, rng):
    highest = {"int8": 127, "int4": 7}[dtype]
    largest = rng.uniform(0.5, 2, size=(1, 4, 64, 1)).astype(np.float32)
    middles = (rng.integers(-highest, highest, size=(1, 4, 64, 32)) + 0.5).astype(np.float32)
    values = middles * (largest / np.float32(highest))
    values = np.nextafter(values, values + rng.choice([-1, 0, 1], size=values.shape).astype(np.float32))
    values[..., :1] = largest
    check(values, dtype, "token", symmetric=True)


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5)])
@pytest.mark.parametrize("dtype", CODES)
def test_quantize__fewer_axes__are_one_head_and_one_sequence(dtype, shape, rng):
    values = rng.normal(size=shape).astype(np.float32)
    for granularity in MOST_USED:
        got = umfa.quantize(values, dtype, granularity)
        expected = reference.quantize(values.reshape(-1, 1, *shape[-2:]), dtype, granularity)
        assert got.shape == shape
        assert got.scales.tobytes() == expected.scales.tobytes()
        assert got.dequantize().tobytes() == reference.dequantize(expected).tobytes()


SPECIAL = {
    "zeros": [0.0, -0.0, 0.0, 0.0],
    "one value": [3.0, 3.0, 3.0, 3.0],
    "ties": [127.0, 0.5, 1.5, -2.5],
    "ties of int4": [7.0, 0.5, 1.5, -2.5],
    "positive": [1.0, 2.0, 3.5, 255.0],
    "negative": [-1.0, -2.0, -3.5, -255.0],
    "huge": [3.4e38, -3.4e38, 1e38, 1.0],
    "denormal": [1e-40, -1e-41, 3e-45, 0.0],
    "smallest scale": [127 * 1.1754944e-38, 1e-38, 0.0, -1e-37],
    "below the smallest scale": [126.9 * 1.1754944e-38, 1e-38, 0.0, -1e-37],
    "outlier": [1e30, 1e-30, 1.0, -1.0],
}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("rotate", [False, True], ids=["straight", "rotate"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("dtype", CODES)
def test_quantize__special_values__give_the_bits_of_the_reference(dtype, name, granularity, rotate, symmetric):
    values = np.array(SPECIAL[name], np.float32).reshape(1, 1, 2, 2)
    if rotate and name == "huge":
        pytest.raises(umfa.InvalidArgumentError, quantize, values, dtype, granularity, rotate=True, symmetric=symmetric)
        return
    got, _ = check(values, dtype, granularity, symmetric=symmetric, rotate=rotate)
    if (
        name in ("zeros", "denormal", "below the smallest scale")
        and granularity == "tensor"
        and symmetric
        and not rotate
        and dtype == "int8"
    ):
        assert got.scales == 1
        assert (got.data == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("granularity", MOST_USED)
@pytest.mark.parametrize("dtype", CODES)
def test_quantize__a_value_that_is_not_finite_in_float32__is_refused(dtype, granularity, kind, value, rng):
    values = rng.normal(size=(2, 3, 11, 13)).astype(DTYPES[kind])
    with np.errstate(over="ignore"):
        values[1, 2, 10, 12] = np.float64(value)
    with pytest.raises(umfa.InvalidArgumentError):
        umfa.quantize(values, dtype, granularity)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 0, 8), (0, 3, 4, 8)])
@pytest.mark.parametrize("granularity", MOST_USED)
@pytest.mark.parametrize("dtype", CODES)
def test_quantize__no_tokens__gives_scale_one_and_means_of_zero(dtype, granularity, shape, smooth):
    got = umfa.quantize(np.zeros(shape, np.float32), dtype, granularity, symmetric=False, smooth=smooth)
    assert got.scales.shape == reference.scale_shape(shape, granularity)
    assert (got.scales == 1).all()
    assert (got.zero_points == 0).all()
    if smooth:
        assert got.channel_means.shape == (shape[0], 3, 8)
        assert (got.channel_means == 0).all()
    assert got.dequantize().shape == shape


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantize__any_number_of_threads__gives_the_same_bits(granularity, contexts, rng):
    values = rng.normal(size=(3, 5, 130, 33)).astype(np.float32)
    expected = reference.quantize(values, "int8", granularity, **GROUPS.get(granularity, {}), smooth=True)
    for context in contexts.values():
        got = quantize(values, "int8", granularity, smooth=True, context=context)
        assert_bits(got, expected)
        assert got.dequantize(context=context).tobytes() == reference.dequantize(expected).tobytes()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", CODES)
def test_dequantize__any_codes__gives_the_bits_of_the_reference(dtype, granularity, asymmetric, style, rng):
    operand = quantized_operand(rng, (2, 3, 11, 13), dtype, style, "bhsd", granularity, asymmetric)
    got = operand.argument.dequantize()
    assert got.dtype == np.float32
    assert got.tobytes() == operand.real.astype(np.float32).tobytes()


@pytest.mark.parametrize("zero_point", [-(2**31), 2**31 - 1, 2**24 + 1, -(2**24) - 3, 128])
@pytest.mark.parametrize("dtype", CODES)
def test_dequantize__any_zero_point__is_subtracted_in_64_bits_and_rounded_once(dtype, zero_point, rng):
    low, high = reference.INT_LIMITS[dtype]
    codes = rng.integers(low, high + 1, (1, 2, 5, 9))
    data = codes.astype(np.int8) if dtype == "int8" else reference.pack_int4(codes)
    parts = np.asarray(0.37, np.float32), np.asarray(zero_point, np.int32)
    got = umfa.QuantizedTensor(data, *parts, shape=codes.shape, granularity="tensor").dequantize()
    assert got.tobytes() == reference.dequantize(reference.Quantized(codes, *parts, None, "tensor")).tobytes()


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_dequantize__illegal_scales__are_refused(scale, rng):
    tensor = umfa.quantize(rng.normal(size=(1, 2, 5, 9)).astype(np.float32), "int8", "token")
    tensor.scales[0, 1, 4] = scale
    with pytest.raises(umfa.InvalidArgumentError):
        tensor.dequantize()
    with pytest.raises(umfa.InvalidArgumentError):
        umfa.attention(tensor, tensor, tensor)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", CODES)
def test_quantize__then_dequantize__is_off_by_half_a_step_at_most(dtype, symmetric, granularity, rng):
    values = rng.normal(size=(2, 3, 33, 20)).astype(np.float32)
    got = quantize(values, dtype, granularity, symmetric=symmetric)
    sizes = GROUPS.get(granularity, {})
    step = got.scales.ravel()[reference.scale_index(values.shape, granularity, sizes.get("block_size", 0), sizes.get("group_size", 0))]
    assert (np.abs(got.dequantize() - values) <= (0.5 if symmetric else 1.0) * step * (1 + 1e-5)).all()


@pytest.mark.parametrize("granularity", MOST_USED)
@pytest.mark.parametrize("dtype", CODES)
def test_quantize__again__changes_no_code(dtype, granularity, rng):
    once = umfa.quantize(rng.normal(size=(2, 3, 11, 14)).astype(np.float32), dtype, granularity)
    twice = umfa.quantize(once.dequantize(), dtype, granularity)
    assert once.data.tobytes() == twice.data.tobytes()


@pytest.mark.parametrize(("dtype", "granularity", "keywords", "expected"), [
    ("int8", "tensor", {}, 2 * 3 * 40 * 17 + 4),
    ("int8", "token", {}, 2 * 3 * 40 * 17 + 4 * 2 * 3 * 40),
    ("int8", "token", {"symmetric": False}, 2 * 3 * 40 * 17 + 8 * 2 * 3 * 40),
    ("int4", "tensor", {}, 2 * 3 * 40 * 9 + 4),
    ("int4", "token", {"smooth": True}, 2 * 3 * 40 * 9 + 4 * 2 * 3 * 40 + 4 * 2 * 3 * 17),
])  # fmt: skip
def test_quantize__nbytes__is_codes_scales_zero_points_and_means(dtype, granularity, keywords, expected, rng):
    assert umfa.quantize(rng.normal(size=(2, 3, 40, 17)).astype(np.float32), dtype, granularity, **keywords).nbytes == expected


# ---- Attention ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", CODES)
def test_attention__codes_of_each_granularity__equals_the_reference(dtype, asymmetric, granularity, rng):
    sizes = Sizes()
    operands = [
        quantized_operand(rng, shape, dtype, "contiguous", "bhsd", granularity, asymmetric)
        for shape in (sizes.query, sizes.key, sizes.value)
    ]
    made = type(problem(rng))(sizes, *operands, {"causal": True}, dtype)
    output, logsumexp = made.run()
    assert_within(output, made.bounds.at.output, made.bounds.output)
    assert_within(logsumexp, made.bounds.at.logsumexp, made.bounds.logsumexp)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("rotate", [False, True])
def test_attention__smoothed_and_rotated_codes__equals_the_reference(rotate, smooth, option, rng):
    sizes = Sizes(channels=24)
    query, key, value = (rng.normal(size=shape).astype(np.float32) for shape in (sizes.query, sizes.key, sizes.value))
    key += 2 * rng.normal(size=24).astype(np.float32)
    tensors = (
        umfa.quantize(query, "int8", "token", rotate=rotate),
        umfa.quantize(key, "int8", "token", rotate=rotate, smooth=smooth),
        umfa.quantize(value, "int8", "token"),
    )
    real = [tensor.dequantize().astype(np.float64) for tensor in tensors]
    keywords = OPTIONS[option](rng, sizes, np.float32)
    made = type(problem(rng))(sizes, *map(Operand, tensors, real), keywords, "int8")
    output, logsumexp = made.run()
    assert_within(output, made.bounds.at.output, made.bounds.output)
    assert_within(logsumexp, made.bounds.at.logsumexp, made.bounds.logsumexp)


@pytest.mark.parametrize("rotated", [("query",), ("key",), ("value",), ("query", "key", "value")])
def test_attention__rotations_that_do_not_match__are_refused(rotated, rng):
    tensors = [
        umfa.quantize(rng.normal(size=(1, 2, 5, 8)).astype(np.float32), "int8", rotate=name in rotated)
        for name in ("query", "key", "value")
    ]
    with pytest.raises(umfa.InvalidArgumentError):
        umfa.attention(*tensors)


@pytest.mark.parametrize("place_", range(3))
def test_attention__smoothing_of_other_than_keys__is_refused(place_, rng):
    tensors = [umfa.quantize(rng.normal(size=(1, 2, 5, 8)).astype(np.float32), "int8", smooth=index == place_) for index in range(3)]
    if place_ == 1:
        assert umfa.attention(*tensors).shape == (1, 2, 5, 8)
    else:
        with pytest.raises(umfa.InvalidArgumentError):
            umfa.attention(*tensors)


def fused_problem(rng, config, **keywords):
    """A problem that is quantised on the fly, whose reference takes the reference's own codes."""
    sizes = Sizes(channels=24, value_channels=16)
    made = problem(rng, sizes, **keywords)
    lengths = keywords.get("kv_lengths")
    operands = []
    for name, scheme in zip(("query", "key", "value"), config.schemes):
        operand = getattr(made, name)
        real = operand.real
        if scheme is not None:
            words = {"symmetric": scheme.symmetric, "smooth": scheme.smooth, "rotated": scheme.rotate}
            words |= {"block_size": scheme.block_size or 0, "group_size": scheme.group_size or 0}
            valid = lengths if lengths is not None and name != "query" else [real.shape[2]] * sizes.batch
            if scheme.granularity == "tensor":
                # One scale over sequences of several lengths: zeros in place of what lies beyond leave it as it is.
                used = (np.arange(real.shape[2]) < np.reshape(valid, (-1, 1)))[:, None, :, None]
                real = reference.dequantize(reference.quantize(np.where(used, real, 0), scheme.dtype, "tensor", **words)).astype(np.float64)
            else:
                whole, real = real, np.zeros_like(real)
                for b, length in enumerate(valid):
                    codes = reference.quantize(whole[b : b + 1, :, :length], scheme.dtype, scheme.granularity, **words)
                    real[b, :, :length] = reference.dequantize(codes)[0]
        operands.append(Operand(operand.argument, real))
    exact = type(made)(sizes, *operands, made.keywords)
    return made.with_keywords(quantize=config), Bounds(*exact.real, exact.options), exact


CONFIGS = {
    "int8": umfa.QuantizationConfig(),
    "int4": umfa.QuantizationConfig("int8", "int4", "int4"),
    "int4 queries": umfa.QuantizationConfig("int4", "int4", "int4"),
    "tensor": umfa.QuantizationConfig(*[umfa.QuantizationScheme("int8", "tensor")] * 3),
    "asymmetric tensor": umfa.QuantizationConfig(*[umfa.QuantizationScheme("int4", "tensor", symmetric=False)] * 3),
    "head": umfa.QuantizationConfig(*[umfa.QuantizationScheme("int8", "head")] * 3),
    "block": umfa.QuantizationConfig(*[umfa.QuantizationScheme("int8", "block", block_size=8)] * 3),
    "channel": umfa.QuantizationConfig(*[umfa.QuantizationScheme("int8", "channel")] * 3),
    "group": umfa.QuantizationConfig(*[umfa.QuantizationScheme("int8", "group", group_size=5)] * 3),
    "asymmetric": umfa.QuantizationConfig(*[umfa.QuantizationScheme("int8", "token", symmetric=False)] * 3),
    "keys and values": umfa.QuantizationConfig(None, "int8", "int4"),
    "queries": umfa.QuantizationConfig("int8", None, None),
    "rotated and smoothed": umfa.QuantizationConfig(
        umfa.QuantizationScheme("int4", "token", rotate=True), umfa.QuantizationScheme("int4", "token", rotate=True, smooth=True), "int8"
    ),
}


@pytest.mark.parametrize("keywords", [{}, {"causal": True}, {"kv_lengths": [37, 20]}, {"kv_lengths": [0, 1]}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_attention__quantised_on_the_fly__equals_the_reference_on_its_codes(name, keywords, rng):
    made, bounds, _ = fused_problem(rng, CONFIGS[name], **keywords)
    output, logsumexp = made.run()
    assert_within(output, bounds.at.output, bounds.output)
    assert_within(logsumexp, bounds.at.logsumexp, bounds.logsumexp)


@pytest.mark.parametrize("keywords", [{}, {"causal": True}, {"kv_lengths": [37, 20]}], ids=str)
@pytest.mark.parametrize("name", ["int8", "int4", "tensor", "asymmetric", "keys and values", "rotated and smoothed"])
def test_attention_backward__quantised_on_the_fly__is_straight_through(name, keywords, rng):
    made, bounds, exact = fused_problem(rng, CONFIGS[name], **keywords)
    grad_out = rng.normal(size=made.sizes.output).astype(np.float32)
    got = run_backward(made, grad_out, names=("query", "key", "value"))
    expected = reference.backward(*exact.real, grad_out, exact.options)
    limits = bounds.gradients(grad_out.astype(np.float64))
    for operand, gradient in got.items():
        assert_within(gradient, expected[operand], limits[operand], operand)


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_attention__quantised_on_the_fly__refuses_what_is_not_finite_before_it_writes(where, value, rng):
    made = problem(rng, kv_lengths=[37, 20], quantize="int8")
    getattr(made, where).argument[1, 0, 5, 0] = value
    out = np.full(made.sizes.output, 7, np.float32)
    with pytest.raises(umfa.InvalidArgumentError):
        umfa.attention(*made.arguments, **made.keywords, out=out)
    assert (out == 7).all()


def test_attention__quantised_on_the_fly__does_not_see_what_lies_past_the_lengths(rng):
    made = problem(rng, kv_lengths=[37, 20], quantize="int8")
    expected, expected_lse = made.run()
    made.key.argument[1, :, 20:] = np.nan
    made.value.argument[1, :, 20:] = np.inf
    output, logsumexp = made.run()
    assert output.tobytes() == expected.tobytes()
    assert logsumexp.tobytes() == expected_lse.tobytes()


@pytest.fixture(scope="module")
def standard_normal():
    """The operands of the error bounds, and float64 attention on them."""
    rng = np.random.default_rng(2024)
    operands = [rng.standard_normal((1, 8, 1024, 64)).astype(np.float32) for _ in range(3)]
    return operands, reference.forward(*operands, reference.Options(0.125)).output


@pytest.mark.parametrize(
    ("scheme", "absolute", "relative"),
    [
        (umfa.QuantizationScheme("int8", "tensor"), 0.002, None),
        (umfa.QuantizationScheme("int8", "token"), 0.002, 0.016),
        ("int8", None, 0.016),
        (umfa.QuantizationScheme("int4", "tensor"), 0.02, None),
        ("int4", None, 0.15),
    ],
    ids=["int8 tensor", "int8 token", "int8 default", "int4 tensor", "int4 default"],
)
def test_attention__quantised_standard_normal_operands__keep_the_promised_error(scheme, absolute, relative, standard_normal):
    operands, exact = standard_normal
    config = scheme if isinstance(scheme, str) else umfa.QuantizationConfig(scheme, scheme, scheme)
    error = umfa.attention(*operands, quantize=config) - exact
    root_mean_square = np.sqrt((error**2).mean())
    assert root_mean_square > 1e-5, "that is not quantised"
    if absolute:
        assert root_mean_square < absolute
    if relative:
        assert root_mean_square / np.sqrt((exact**2).mean()) < relative


def test_quantized_tensor__any_kind_of_float__keeps_bfloat16_exactly(rng):
    values = rng.normal(size=(1, 1, 4, 8)).astype(ml_dtypes.bfloat16)
    assert_bits(umfa.quantize(values, "int8", "token"), reference.quantize(values.astype(np.float32), "int8", "token"))
