"""The kernels that multiply codes as integers: within what rounding weights to 8 bits can cost, and bit for bit where nothing may matter.

The other suites leave them out (see conftest.py): their bounds are those of FP32 arithmetic.
"""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import umfa
from cases import OPTIONS, Operand, Problem, Sizes, problem, quantized_operand, smoothed_problem
from tolerances import assert_within

BLOCK = 128  # key columns that share a largest weight


INSTRUCTION_SETS = ("dotprod", "i8mm") if platform.machine() in ("arm64", "aarch64") else ("avx2", "avxvnni", "avx512vnni")


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def contexts(request, integer_contexts):
    """Contexts with integer kernels by their number of threads, and "reference", one with the reference kernels."""
    return integer_contexts(request.param, (1, 2, 3, 7))


def rounding_bound(made: Problem) -> np.ndarray:
    """What rounding weights to multiples of 1/255 of the largest product of weight and value scale of a block adds to the bound.

    Small ones are rounded up or down, the others to the nearest.
    """
    at, value, argument = made.bounds.at, made.value.real, made.value.argument
    scales = np.ones(value.shape[:3])
    if argument.granularity in ("tensor", "head", "token"):
        scales = np.broadcast_to(argument.scales.reshape(argument.scales.shape + (1,) * (3 - argument.scales.ndim)), value.shape[:3])
    group = at.weights.shape[1] // value.shape[1]
    scales, sizes = np.repeat(scales, group, axis=1), np.repeat(np.abs(value), group, axis=1)
    bound = np.zeros(at.output.shape)
    for first in range(0, value.shape[2], BLOCK):
        part = slice(first, first + BLOCK)
        products = at.weights[..., part] * scales[:, :, None, part]
        largest = products.max(axis=-1, keepdims=True)
        error = np.where(products < 8.1 / 255 * largest, largest / 255, largest / 510) * at.attended[..., part]
        bound += (error / scales[:, :, None, part]) @ sizes[:, :, part]
    return 1.01 * bound + 1e-4 * (at.weights @ sizes)  # weights are first rounded to 1/128 of their unit; exponentials are short


def check(made: Problem, context: umfa.MFAContext) -> np.ndarray:
    """Compare with the reference on the dequantised operands, and see that it was not the reference kernel that ran."""
    output, logsumexp = made.run(context=context)
    at = made.bounds.at
    assert_within(output, at.output, made.bounds.output + rounding_bound(made), "output")
    finite = np.where(np.isfinite(at.logsumexp), np.abs(at.logsumexp), 0)
    assert_within(logsumexp, at.logsumexp, 1e-4 * np.maximum(1, np.maximum(finite, made.bounds.scores)), "logsumexp")
    return output


def integer_problem(
    rng, sizes=None, dtypes=("int8", "int8", "int8"), granularities=("token",) * 3, asymmetric=False, **keywords
) -> Problem:
    """A problem on codes; only INT4 has zero points here, small ones."""
    sizes = sizes or Sizes(rows=70, columns=300, channels=40, value_channels=24)
    operands = []
    for shape, dtype, granularity in zip((sizes.query, sizes.key, sizes.value), dtypes, granularities):
        operands.append(quantized_operand(rng, shape, dtype, granularity=granularity, asymmetric=asymmetric and dtype == "int4"))
    return Problem(sizes, *operands, {"scale": 0.02, **keywords}, "int8", "float32")


@pytest.mark.parametrize("option", [name for name in OPTIONS if not name.startswith(("dropout", "all", "scale"))])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_attention__each_option_on_integers__is_within_the_rounding_of_weights(option, dtype, contexts, rng):
    sizes = Sizes(rows=70, columns=300, channels=40, value_channels=24)
    made = integer_problem(rng, sizes, (dtype,) * 3).with_keywords(**OPTIONS[option](rng, sizes, np.float32))
    output = check(made, contexts[2])
    reference = made.run(context=contexts["reference"])[0]
    assert output.tobytes() != reference.tobytes(), "the integer kernel must have run"


@pytest.mark.parametrize("dtypes", list(itertools.product(("int8", "int4"), repeat=3)), ids="-".join)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_attention__each_mix_of_codes__is_within_the_rounding_of_weights(dtypes, asymmetric, contexts, rng):
    check(integer_problem(rng, dtypes=dtypes, asymmetric=asymmetric, causal=True), contexts[2])


@pytest.mark.parametrize(
    "granularities", [("tensor",) * 3, ("head",) * 3, ("token",) * 3, ("block", "block", "token"), ("token", "token", "channel")]
)
def test_attention__each_granularity__is_within_the_rounding_of_weights(granularities, contexts, rng):
    check(integer_problem(rng, granularities=granularities), contexts[2])


@pytest.mark.parametrize("channels", [1, 3, 4, 17, 64, 65, 128, 200, 1024])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 131), (16, 128), (65, 129), (64, 257)])
def test_attention__head_sizes_and_tiles__are_within_the_rounding_of_weights(channels, rows, columns, contexts, rng):
    sizes = Sizes(batch=1, heads=2, kv_heads=1, rows=rows, columns=columns, channels=channels, value_channels=min(channels + 3, 1024))
    check(integer_problem(rng, sizes, scale=0.1 / np.sqrt(channels)), contexts[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"sinks": np.array([0.5, -1, 2, 0], np.float32)}], ids=["plain", "softcap", "sinks"]
)
def test_attention__smoothed_and_rotated_keys__are_within_the_rounding_of_weights(causal, options, contexts, rng):
    sizes = Sizes(rows=40, columns=150, channels=32, value_channels=32)
    check(smoothed_problem(rng, sizes, causal=causal, **options), contexts[2])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_attention__quantised_on_the_fly__is_as_exact_as_promised(scheme, contexts, rng):
    q, k, v = (rng.normal(size=(1, 4, 512, 64)).astype(np.float32) for _ in range(3))
    exact = umfa.attention(q, k, v, context=contexts["reference"])
    error = umfa.attention(q, k, v, quantize=scheme, context=contexts[2]) - exact
    assert np.sqrt(np.mean(error**2) / np.mean(exact**2)) < {"int8": 0.016, "int4": 0.15}[scheme]


def test_attention__a_key_scale_that_is_huge__leaves_the_rows_before_it_the_same_for_any_threads(contexts, rng):
    """With few threads a row shares its item with rows that attend that key, with many it does not."""
    q, k, v = (umfa.quantize(each, "int8") for each in rng.normal(size=(3, 1, 8, 256, 32)).astype(np.float32))
    q.scales[...] = 1e9
    k.scales[...] = 1e-14
    k.scales[..., 100] = 1e31  # times that of a query: infinite
    first, *others = (
        umfa.attention(q, k, v, causal=True, scale=1.0, return_lse=True, context=contexts[threads]) for threads in (1, 2, 3, 7)
    )
    for each in others:
        assert all(np.array_equal(a[:, :, :100], b[:, :, :100]) for a, b in zip(first, each))


@pytest.mark.parametrize("option", ["plain", "causal_lower_right", "lengths", "mask_bool", "alibi", "softcap"])
def test_attention__threads_runs_and_batches__never_change_a_bit(option, contexts, rng):
    sizes = Sizes(batch=3, rows=70, columns=300, channels=40, value_channels=24)
    made = integer_problem(rng, sizes).with_keywords(**OPTIONS[option](rng, sizes, np.float32))
    first = [result.tobytes() for result in made.run(context=contexts[1])]
    for threads in (1, 2, 3, 7):
        assert [result.tobytes() for result in made.run(context=contexts[threads])] == first


def test_attention__a_padded_sequence_of_codes__gives_the_bits_of_the_unpadded(contexts, rng):
    made = integer_problem(rng, Sizes(batch=1, rows=37, columns=300, channels=40, value_channels=24))
    long = made.with_keywords(kv_lengths=[203]).run(context=contexts[2])
    shorter = []
    for operand in (made.key, made.value):
        codes = operand.argument
        cut = umfa.QuantizedTensor(
            codes.data[:, :, :203],
            np.ascontiguousarray(codes.scales[:, :, :203]),
            None,
            shape=(*codes.shape[:2], 203, codes.shape[3]),
            granularity="token",
        )
        shorter.append(cut)
    short = umfa.attention(made.query.argument, *shorter, scale=0.02, return_lse=True, context=contexts[2])
    assert [each.tobytes() for each in long] == [each.tobytes() for each in short]


def test_attention__grouped_heads_of_codes__give_the_bits_of_repeated_ones(contexts, rng):
    made = integer_problem(rng, Sizes(batch=2, heads=4, kv_heads=2, rows=37, columns=140, channels=40, value_channels=24))
    repeated = []
    for operand in (made.key, made.value):
        codes = operand.argument
        repeated.append(
            umfa.QuantizedTensor(
                np.repeat(codes.data, 2, axis=1),
                np.repeat(codes.scales, 2, axis=1),
                None,
                shape=(2, 4, *codes.shape[2:]),
                granularity="token",
            )
        )
    grouped = made.run(context=contexts[2])
    alone = umfa.attention(made.query.argument, *repeated, scale=0.02, return_lse=True, context=contexts[2])
    assert [each.tobytes() for each in grouped] == [each.tobytes() for each in alone]


@pytest.mark.parametrize("style", ["permuted", "sliced", "negative"])
def test_attention__codes_at_any_strides__give_the_bits_of_contiguous_ones(style, contexts, rng):
    sizes = Sizes(batch=2, rows=37, columns=140, channels=40, value_channels=24)
    made = problem(rng, sizes, dtypes=("int8",) * 3, styles=(style,) * 3, scale=0.02)
    contiguous = []
    for operand in (made.query, made.key, made.value):
        codes = operand.argument
        contiguous.append(
            umfa.QuantizedTensor(
                np.ascontiguousarray(codes.data), codes.scales, codes.zero_points, shape=codes.shape, granularity=codes.granularity
            )
        )
    strided = made.run(context=contexts[2])
    plain = umfa.attention(*contiguous, scale=0.02, return_lse=True, context=contexts[2])
    assert [each.tobytes() for each in strided] == [each.tobytes() for each in plain]


@pytest.mark.parametrize("zero_point", [-120, 120, 1000])
@pytest.mark.parametrize("place", range(3))
def test_attention__zero_points_beyond_a_byte__get_the_bits_of_the_reference_kernel(place, zero_point, contexts, rng):
    made = integer_problem(rng, dtypes=("int4",) * 3, asymmetric=True)
    argument = made.arguments[place]
    argument.zero_points[...] = zero_point
    results = [made.run(context=contexts[which]) for which in (2, "reference")]
    assert [each.tobytes() for each in results[0]] == [each.tobytes() for each in results[1]]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("options", [{}, {"sinks": np.array([0.5, -1, 2, 0], np.float32)}], ids=["plain", "sinks"])
@pytest.mark.parametrize("addition", [-1e9, -1e5, -1e4, 1e4, 1e9])
def test_attention__rows_whose_scores_are_all_far_from_0__get_the_bits_of_the_reference_kernel(addition, options, dtype, contexts, rng):
    """The logarithms of value scales would be lost beside them. Far below the others' they matter to nobody."""
    sizes = Sizes(rows=70, columns=300, channels=40, value_channels=24)
    mask = np.zeros((sizes.rows, sizes.columns), np.float32)
    mask[::2] = addition
    mask[1::4, 20:] = -abs(addition)
    made = integer_problem(rng, sizes, (dtype,) * 3, mask=mask, **options)
    results, references = (made.run(context=contexts[which]) for which in (2, "reference"))
    for result, reference in zip(results, references, strict=True):
        assert result[:, :, ::2].tobytes() == reference[:, :, ::2].tobytes()
    assert_within(
        results[0][:, :, 1::2], made.bounds.at.output[:, :, 1::2], (made.bounds.output + rounding_bound(made))[:, :, 1::2], "output"
    )
    assert results[0][:, :, 1::4].tobytes() != references[0][:, :, 1::4].tobytes(), "the integer kernel must have run"


@pytest.mark.parametrize("addition", [-5000, 5000])
def test_attention__scores_rather_far_from_0__cost_no_more_than_their_rounding(addition, contexts, rng):
    """What is taken off is the highest score, not a rounded sum with it."""
    sizes = Sizes(rows=70, columns=300, channels=40, value_channels=24)
    made = integer_problem(rng, sizes, ("int8", "int4", "int4"), mask=np.full((1, 1), addition, np.float32))
    output, logsumexp = made.run(context=contexts[2])
    unit = np.spacing(np.float32(abs(addition) / np.log(2)))  # of binary logarithms of weights, rounded a few times
    bound = made.bounds.output + rounding_bound(made) + 2 * unit * np.abs(made.value.real).max()
    assert_within(output, made.bounds.at.output, bound, "output")
    assert output.tobytes() != made.run(context=contexts["reference"])[0].tobytes(), "the integer kernel must have run"


def with_zero_point(operand: Operand, zero_point: int) -> Operand:
    """The same codes with another zero point, the same for all."""
    argument = operand.argument
    real = operand.real + argument.scales[..., None].astype(np.float64) * (argument.zero_points[..., None] - zero_point)
    argument.zero_points[...] = zero_point
    return Operand(argument, real)


@pytest.mark.parametrize("zero_point", [-119, -60, -9, -8, 8, 9, 60, 119])
@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_attention__zero_points_within_a_byte__are_within_the_rounding_of_weights(place, zero_point, contexts, rng):
    """Kernels for codes that are as small as INT4's leave others to one for INT8."""
    made = integer_problem(rng, dtypes=("int4",) * 3, asymmetric=True)
    operands = {name: with_zero_point(getattr(made, name), zero_point if name == place else 1) for name in ("query", "key", "value")}
    made = replace(made, **operands)
    output = check(made, contexts[2])
    assert output.tobytes() != made.run(context=contexts["reference"])[0].tobytes(), "an integer kernel must have run"


def test_attention__int4_codes_as_far_from_0_as_they_can_be__do_not_saturate(contexts, rng):
    """Sums of 16 bits hold a few steps of such codes: all of one sign, times the largest queries and the largest weights."""
    sizes = Sizes(rows=33, columns=260, channels=72, value_channels=40)
    made = integer_problem(rng, sizes, ("int8", "int4", "int4"), asymmetric=True, scale=1e-6)
    largest = np.repeat([-128, 127], [3, 30])[None, None, :, None]
    made.query.argument.data[...] = largest
    made.key.argument.data[...], made.value.argument.data[...] = 0x88, 0x77
    codes = {"query": (largest, 0), "key": (-8, 8), "value": (7, -8)}
    operands = {}
    for name, (code, zero_point) in codes.items():
        argument = getattr(made, name).argument
        if argument.zero_points is not None:
            argument.zero_points[...] = zero_point
        operands[name] = Operand(argument, argument.scales[..., None].astype(np.float64) * np.full(argument.shape, code - zero_point))
    check(replace(made, **operands), contexts[2])


@pytest.mark.parametrize("causal", [False, True])
def test_attention__scales_whose_product_overflows__get_the_bits_of_the_reference_kernel(causal, contexts, rng):
    """A key of zeros scores 0, however large its scale: infinity times 0 would be no number."""
    made = integer_problem(rng, scale=1.0, causal=causal)
    query, key = made.query.argument, made.key.argument
    query.scales[...] = 1e25
    key.scales[...] = 1e-27
    key.scales[:, :, 0], key.data[:, :, 0] = 1e25, 0
    results = [made.run(context=contexts[which]) for which in (2, "reference")]
    assert np.isfinite(results[1][0]).all()
    assert [each.tobytes() for each in results[0]] == [each.tobytes() for each in results[1]]


@pytest.mark.parametrize(("place", "zero_point"), [(0, 1000), (1, 50), (2, 50)])
def test_attention__zero_points_beyond_a_kernel__matter_to_their_sequence_alone(place, zero_point, contexts, rng):
    """Which kernel computes a sequence depends neither on its batch nor on how many heads share keys."""
    sizes = Sizes(batch=2, heads=4, kv_heads=2, rows=9, columns=140, channels=40, value_channels=24)
    made = integer_problem(rng, sizes, dtypes=("int4",) * 3, asymmetric=True)
    for argument in made.arguments:
        argument.zero_points[...] = rng.integers(-8, 8, argument.zero_points.shape)
    made.arguments[place].zero_points[0, 1, 3] = zero_point
    grouped = made.run(context=contexts[2])

    def part(codes, index, repeats=1):
        def of(array):
            return np.repeat(array[index], repeats, axis=1)

        shape = (codes.data[index].shape[0], codes.shape[1] * repeats, *codes.shape[2:])
        return umfa.QuantizedTensor(of(codes.data), of(codes.scales), of(codes.zero_points), shape=shape, granularity="token")

    query, *keys_and_values = made.arguments
    everything = slice(None)
    repeated = [part(each, everything, 2) for each in keys_and_values]
    alone = umfa.attention(query, *repeated, scale=0.02, return_lse=True, context=contexts[2])
    assert [each.tobytes() for each in grouped] == [each.tobytes() for each in alone]
    for index in (slice(0, 1), slice(1, 2)):
        single = umfa.attention(*[part(each, index) for each in made.arguments], scale=0.02, return_lse=True, context=contexts[2])
        assert [each.tobytes() for each in single] == [each[index].tobytes() for each in grouped]


def test_attention__values_of_zero_with_scale_one__cost_the_others_no_bits(contexts, rng):
    """A row of zeros quantises to scale 1, which may be far above the others' scales."""
    q, k, v = (rng.normal(size=(1, 2, 256, 32)).astype(np.float32) for _ in range(3))
    v[:, :, ::3] = 0
    v *= 1e-3
    codes = [umfa.quantize(each, "int8") for each in (q, k, v)]
    assert codes[2].scales.max() == 1
    exact = umfa.attention(*codes, context=contexts["reference"])
    error = umfa.attention(*codes, context=contexts[2]) - exact
    assert np.sqrt(np.mean(error**2) / np.mean(exact**2)) < 0.012


@pytest.mark.parametrize("lead", [0.0, 5.0, 6.3, 7.0, 10.0, 40.0])
@pytest.mark.parametrize("columns", [128, 1000, 5000])
def test_attention__constant_values__give_the_constant(lead, columns, contexts):
    """One key of each block stands out: the many small weights beside it must not be lost, nor doubled."""
    q = np.zeros((1, 1, 8, 16), np.float32)  # fewer rows are decoded, by another kernel
    q[..., 0] = 1
    k = np.zeros((1, 1, columns, 16), np.float32)
    k[:, :, ::BLOCK, 0] = lead
    v = np.ones((1, 1, columns, 8), np.float32)
    output = umfa.attention(
        q, k, v, scale=1.0, quantize=umfa.QuantizationConfig(*[umfa.QuantizationScheme("int8", "token")] * 3), context=contexts[2]
    )
    np.testing.assert_allclose(output, 1, atol=0.012)


@pytest.mark.parametrize("lead", [0.0, 7.0, 13.0, 60.0])
@pytest.mark.parametrize("causal", [False, True])
def test_attention__a_key_that_leads_to_a_value_of_zero__only_takes_its_share(lead, causal, contexts, rng):
    q, k, v = (rng.normal(size=(1, 2, 200, 32)).astype(np.float32) for _ in range(3))
    q[..., 0], k[..., 0], k[:, :, 0, 0], v[:, :, 0] = 3, 0, lead, 0
    codes = [umfa.quantize(each, "int8") for each in (q, k, v)]
    words = {"causal": causal, "return_lse": True}
    exact, exact_lse = umfa.attention(*codes, **words, context=contexts["reference"])
    output, lse = umfa.attention(*codes, **words, context=contexts[2])
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-4, atol=1e-4)
    assert np.sqrt(np.mean((output - exact) ** 2)) <= 0.02 * np.sqrt(np.mean(exact**2)) + 1e-30


@pytest.mark.parametrize("length", [5, 32, 65, 128, 129, 200])  # fewer rows are decoded, by another kernel
def test_attention__later_tokens__never_change_a_bit_of_causal_rows(length, contexts, rng):
    whole = integer_problem(rng, Sizes(batch=1, rows=200, columns=200, channels=40, value_channels=24), causal=True)
    whole.value.argument.data[:, :, 150] = 0
    first = [
        umfa.QuantizedTensor(
            each.data[:, :, :length],
            np.ascontiguousarray(each.scales[:, :, :length]),
            None,
            shape=(*each.shape[:2], length, each.shape[3]),
            granularity="token",
        )
        for each in whole.arguments
    ]
    long = whole.run(context=contexts[2])
    short = umfa.attention(*first, scale=0.02, causal=True, return_lse=True, context=contexts[2])
    assert [each[:, :, :length].tobytes() for each in long] == [each.tobytes() for each in short]


def test_attention__excluded_codes__never_change_a_bit(contexts, rng):
    made = integer_problem(rng, Sizes(batch=1, rows=40, columns=300, channels=40, value_channels=24))
    mask = rng.random((40, 300)) < 0.7
    mask[:, 17::50] = False
    made = made.with_keywords(mask=mask)
    before = [each.tobytes() for each in made.run(context=contexts[2])]
    for operand in (made.key, made.value):
        operand.argument.data[:, :, 17::50] = 0
        operand.argument.scales[:, :, 17::50] *= 1e-6
    assert [each.tobytes() for each in made.run(context=contexts[2])] == before


def test_attention__an_infinite_bias__makes_the_rows_nan_that_the_formulas_make(contexts, rng):
    made = integer_problem(rng, Sizes(batch=1, rows=40, columns=140, channels=40, value_channels=24))
    mask = np.zeros((40, 140), np.float32)
    mask[7, 3], mask[9, :], mask[11, 5] = np.inf, -np.inf, np.nan
    output, logsumexp = made.with_keywords(mask=mask).run(context=contexts[2])
    assert np.isnan(output[:, :, [7, 11]]).all()
    assert (output[:, :, 9] == 0).all()
    assert np.isneginf(logsumexp[:, :, 9]).all()
    assert np.isfinite(np.delete(output, [7, 11], axis=2)).all()


def test_umfa_check__with_the_kernels_of_this_processor__passes():
    environment = {name: text for name, text in os.environ.items() if name != "MFA_KERNELS"}
    done = subprocess.run([sys.executable, "-m", "umfa.cli", "check"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
