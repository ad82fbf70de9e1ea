"""The kernels for few query rows over many keys: against the reference, and bit for bit where nothing may matter.

The float kernel has the bounds of FP32 arithmetic. The integer kernel rounds queries to 16 bits, unless they come as codes, and weights to
15 bits: `integer_bounds` says what that can cost.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import reference
import umfa
from cases import (
    CODES,
    DTYPES,
    OPTIONS,
    Operand,
    Problem,
    Sizes,
    float_operand,
    place,
    problem,
    problem_with,
    quantized_operand,
    smoothed_problem,
)
from test_forward import check
from tolerances import assert_within

BLOCK = 128  # key columns of codes that share a largest weight; a block of floats has half as many
PART = 8 * BLOCK  # key columns of an item, likewise
COLUMNS = [edge + more for edge in (BLOCK // 2, BLOCK, PART // 2, PART) for more in (-1, 0, 1)]
FAMILIES = ("float", "integer")
THREADS = (1, 2, 3, 7)


@pytest.fixture(scope="module")
def all_contexts():
    """Contexts by their family of kernels and their number of threads."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for family in FAMILIES:
            patch.setenv("MFA_KERNELS", family)
            for threads in THREADS:
                made[family, threads] = umfa.MFAContext(device="cpu", num_threads=threads)
    yield made
    for context in made.values():
        context.close()


def decodes(context: umfa.MFAContext, dtype: str) -> bool:
    """Whether a decode kernel serves operands of this type."""
    return "decode" in umfa.info(context)["kernels"]["decode"][dtype]


@pytest.fixture
def floats(all_contexts):
    """A context whose decode kernel computes in FP32."""
    context = all_contexts["float", 2]
    if not decodes(context, "float32"):
        pytest.skip("this processor has no decode kernel for floats")
    return context


@pytest.fixture
def integers(all_contexts):
    """A context whose decode kernel multiplies codes."""
    context = all_contexts["integer", 2]
    if not decodes(context, "int8"):
        pytest.skip("this processor has no decode kernel for codes")
    return context


@pytest.fixture(params=FAMILIES)
def contexts(request, all_contexts):
    """The contexts of one family by their number of threads, and a type of keys and values that it serves as "dtype"."""
    dtype = {"float": "float32", "integer": "int8"}[request.param]
    if not decodes(all_contexts[request.param, 1], dtype):
        pytest.skip("this processor has no decode kernel of this family")
    return {"dtype": dtype, **{threads: all_contexts[request.param, threads] for threads in THREADS}}


def integer_bounds(made: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of output and logsumexp: those of FP32, and the rounding of queries and weights."""
    at, argument = made.bounds.at, made.value.argument
    group = at.weights.shape[1] // made.value.real.shape[1]
    shape = made.value.real.shape[:3]
    scales = np.ones(shape)
    if argument.granularity in ("tensor", "head", "token"):
        scales = np.broadcast_to(argument.scales.reshape(argument.scales.shape + (1,) * (3 - argument.scales.ndim)), shape)
    elif argument.granularity == "block":
        scales = np.repeat(argument.scales, 5, axis=2)[:, :, : shape[2]]
    scales, sizes = (np.repeat(each, group, axis=1) for each in (scales, np.abs(made.value.real)))

    output = made.bounds.output.copy()
    for first in range(0, shape[2], BLOCK):
        part = slice(first, first + BLOCK)
        largest = (at.weights[..., part] * scales[:, :, None, part]).max(axis=-1, keepdims=True)
        error = 1.001 * largest / 65534 * at.attended[..., part]
        output += (error / scales[:, :, None, part]) @ sizes[:, :, part]
    # Sums of codes plus 128, in FP32 once a block is done.
    output += 2.0**-24 * 1024 * (at.weights @ scales[..., None]) + 1e-6 * (at.weights @ sizes)

    query = np.abs(made.query.real)
    key_sizes = np.repeat(np.abs(made.key.real).sum(axis=-1), group, axis=1)[:, :, None]
    rounding = query.max(axis=-1, keepdims=True) / 65534 * 1.001
    if made.key.argument.granularity == "channel":
        factors = made.key.argument.scales
        rounding = (query * np.repeat(factors, group, axis=1)[:, :, None]).max(axis=-1, keepdims=True) / 65534 * 1.001
        key_sizes = np.repeat(np.abs(made.key.real / factors[:, :, None]).sum(axis=-1), group, axis=1)[:, :, None]
    score_error = abs(made.options.softmax_scale) * np.where(at.attended, rounding * key_sizes, 0).max(axis=-1, initial=0)
    output += 2.1 * score_error[..., None] * (at.weights @ sizes)
    finite = np.where(np.isfinite(at.logsumexp), np.abs(at.logsumexp), 0)
    return output, score_error + 2e-5 * np.maximum(1, np.maximum(finite, made.bounds.scores))


def check_integers(made: Problem, context: umfa.MFAContext) -> tuple[np.ndarray, np.ndarray]:
    """Run a problem and compare it with the reference."""
    output, logsumexp = made.run(context=context)
    at, (output_bound, logsumexp_bound) = made.bounds.at, integer_bounds(made)
    assert_within(output, at.output, output_bound, "output")
    assert_within(logsumexp, at.logsumexp, logsumexp_bound, "logsumexp")
    return output, logsumexp


def integer_problem(rng, sizes, dtypes=("int8",) * 3, granularities=("token",) * 3, asymmetric=False, layout="bhsd", **keywords) -> Problem:
    """Keys and values of codes, queries of any type; scores are of a usual size."""
    operands = []
    for shape, dtype, granularity in zip((sizes.query, sizes.key, sizes.value), dtypes, granularities):
        if dtype in CODES:
            operands.append(quantized_operand(rng, shape, dtype, layout=layout, granularity=granularity, asymmetric=asymmetric))
        else:
            operands.append(float_operand(rng, shape, dtype, layout=layout))
    if layout != "bhsd":
        keywords["layout"] = layout
    keywords.setdefault("scale", 0.3 / np.sqrt(sizes.channels))
    return Problem(sizes, *operands, keywords, dtypes[0], "float32")


def bits(results) -> list[bytes]:
    return [each.tobytes() for each in results]


SIZES = Sizes(rows=3, columns=2 * PART + 70, channels=40, value_channels=24)


# ---- Values ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", *CODES])
def test_attention__each_option_on_few_rows__equals_the_reference(option, dtype, floats):
    check(problem_with(option, seed=1, sizes=SIZES, dtypes=(dtype,) * 3), context=floats)


@pytest.mark.parametrize("option", [name for name in OPTIONS if not name.startswith(("dropout", "all", "scale"))])
@pytest.mark.parametrize("dtypes", [("float32", "int8", "int8"), ("int8", "int8", "int8"), ("float32", "int4", "int4")], ids="-".join)
def test_attention__each_option_on_few_rows_of_codes__is_within_the_rounding(option, dtypes, integers, rng):
    made = integer_problem(rng, SIZES, dtypes, asymmetric=dtypes[1] == "int4").with_keywords(**OPTIONS[option](rng, SIZES, np.float32))
    check_integers(made, integers)


@pytest.mark.parametrize("dtypes", list(itertools.product(("float32", "float16", "bfloat16", "int8", "int4"), repeat=3)), ids="-".join)
def test_attention__each_mix_of_types_on_few_rows__equals_the_reference(dtypes, floats):
    check(problem(np.random.default_rng(2), Sizes(rows=2, columns=150, channels=48), dtypes=dtypes, causal="lower_right"), context=floats)


@pytest.mark.parametrize("dtypes", list(itertools.product(("float32", "float16", "int8", "int4"), CODES, CODES)), ids="-".join)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_attention__each_mix_of_codes_on_few_rows__is_within_the_rounding(dtypes, asymmetric, integers, rng):
    sizes = Sizes(rows=2, columns=150, channels=128, value_channels=64)
    check_integers(integer_problem(rng, sizes, dtypes, asymmetric=asymmetric, causal="lower_right"), integers)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "head", "token", "block", "channel", "group"])
@pytest.mark.parametrize("dtype", CODES)
def test_attention__each_granularity_on_few_rows__equals_the_reference(dtype, granularity, asymmetric, floats, rng):
    sizes = Sizes(rows=2, columns=150, channels=64, value_channels=32)
    made = integer_problem(rng, sizes, ("float32", dtype, dtype), (None, granularity, granularity), asymmetric)
    check(made, context=floats)


@pytest.mark.parametrize("granularities", list(itertools.product(("tensor", "head", "token", "block", "channel"), repeat=2)), ids="-".join)
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("query", ["float32", "int8"])
def test_attention__each_granularity_on_few_rows_of_codes__is_within_the_rounding(query, dtype, granularities, integers, rng):
    sizes = Sizes(rows=2, columns=150, channels=64, value_channels=32)
    check_integers(integer_problem(rng, sizes, (query, dtype, dtype), ("token", *granularities)), integers)


@pytest.mark.parametrize("channels", [1, 3, 8, 17, 32, 64, 65, 80, 96, 128, 200, 1024])
@pytest.mark.parametrize("value_channels", [1, 31, 64, 1024])
@pytest.mark.parametrize("dtype", ["float32", "float16", *CODES])
def test_attention__head_sizes_on_few_rows__equal_the_reference(channels, value_channels, dtype, floats, integers, rng):
    sizes = Sizes(batch=1, heads=2, kv_heads=1, rows=1, columns=90, channels=channels, value_channels=value_channels)
    check(problem(rng, sizes, dtypes=("float32", dtype, dtype)), context=floats)
    if dtype in CODES:
        check_integers(integer_problem(rng, sizes, ("float32", dtype, dtype)), integers)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (3, 1), (5, 1), (8, 2), (6, 6)])
def test_attention__any_number_of_rows_that_share_keys__equals_the_reference(rows, heads, kv_heads, floats, integers, rng):
    sizes = Sizes(batch=1, heads=heads, kv_heads=kv_heads, rows=rows, columns=100, channels=32, value_channels=48)
    check(problem(rng, sizes, causal="lower_right"), context=floats)
    if rows <= 4:
        check_integers(integer_problem(rng, sizes, ("float32", "int8", "int8"), causal="lower_right"), integers)


@pytest.mark.parametrize("columns", [1, *COLUMNS, 2 * PART, 3 * PART + 5])
def test_attention__columns_around_blocks_and_parts__equal_the_reference(columns, floats, integers, rng):
    sizes = Sizes(batch=1, rows=1, columns=columns, channels=32, value_channels=32)
    check(problem(rng, sizes), context=floats)
    check_integers(integer_problem(rng, sizes), integers)


@pytest.mark.parametrize(
    "dtypes", [("float32",) * 3, ("float16",) * 3, ("float32", "int8", "int8"), ("float32", "int4", "int4")], ids="-".join
)
def test_attention__few_rows_over_20_000_keys__keep_their_bounds(dtypes, floats, integers, rng):
    sizes = Sizes(batch=1, rows=1, columns=20_000, channels=64, value_channels=64)
    made = problem(rng, sizes, dtypes=dtypes) if dtypes[1] not in CODES else integer_problem(rng, sizes, dtypes)
    check(made, context=floats)
    if dtypes[1] in CODES:
        check_integers(made, integers)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"sinks": np.array([0.5, -1, 2, 0], np.float32)}], ids=["plain", "softcap", "sinks"]
)
def test_attention__smoothed_and_rotated_keys_on_few_rows__equal_the_reference(options, floats, integers, rng):
    sizes = Sizes(rows=2, columns=150, channels=32, value_channels=32)
    made = smoothed_problem(rng, sizes, **options)
    check(made, context=floats)
    check_integers(made, integers)


@pytest.mark.parametrize("zero_point", [127, 128, 5000, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("dtype", CODES)
def test_attention__any_zero_points_on_few_rows__equal_the_reference(zero_point, dtype, floats, integers, rng):
    sizes = Sizes(batch=1, rows=1, columns=90, channels=32, value_channels=32)
    codes = integer_problem(rng, sizes, ("float32", dtype, dtype), asymmetric=True)
    for operand in (codes.key, codes.value):
        operand.argument.zero_points[..., ::3] = zero_point
        operand.argument.scales[..., ::3] /= max(1, abs(zero_point))
    operands = [codes.query, *(Operand(each.argument, each.argument.dequantize().astype(np.float64)) for each in (codes.key, codes.value))]
    made = Problem(sizes, *operands, codes.keywords)
    check(made, context=floats)
    check_integers(made, integers)


@pytest.mark.parametrize("sign", [1, -1])
def test_attention__sums_as_large_as_codes_make_them__stay_within_32_bits(sign, floats, integers):
    """Every channel of the query rounds to the largest number, and every other key has the largest code in all channels."""
    sizes = Sizes(batch=1, heads=1, kv_heads=1, rows=1, columns=BLOCK + 6, channels=1024, value_channels=1024)
    key, value = (np.ones(shape, np.float32) for shape in (sizes.key, sizes.value))
    key[:, :, ::2] *= -1
    value[:, :, ::3] *= -1
    codes = [Operand(each, each.dequantize().astype(np.float64)) for each in (umfa.quantize(key, "int8"), umfa.quantize(value, "int8"))]
    query = np.full(sizes.query, sign, np.float32)
    made = Problem(sizes, Operand(query, query.astype(np.float64)), *codes, {"scale": 1e-3})
    check(made, context=floats)
    check_integers(made, integers)


@pytest.mark.parametrize("sign", [1, -1])
def test_attention__equal_weights_of_the_largest_values__stay_within_32_bits(sign, floats, integers):
    """All weights of a block are its largest, and all values have the largest code."""
    sizes = Sizes(batch=1, heads=1, kv_heads=1, rows=1, columns=2 * BLOCK, channels=64, value_channels=64)
    key, value = np.ones(sizes.key, np.float32), np.full(sizes.value, sign, np.float32)
    codes = [Operand(each, each.dequantize().astype(np.float64)) for each in (umfa.quantize(key, "int8"), umfa.quantize(value, "int8"))]
    query = np.ones(sizes.query, np.float32)
    made = Problem(sizes, Operand(query, query.astype(np.float64)), *codes, {"scale": 0.0})
    check(made, context=floats)
    check_integers(made, integers)


# ---- Bits --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["plain", "causal_lower_right", "lengths", "mask_bool", "alibi", "softcap", "sinks"])
def test_attention__threads_and_runs__never_change_a_bit_of_few_rows(option, contexts, rng):
    sizes = Sizes(batch=3, rows=2, columns=2 * PART + 70, channels=40, value_channels=24)
    dtype = contexts["dtype"]
    made = integer_problem(rng, sizes, ("float32", dtype, dtype)).with_keywords(**OPTIONS[option](rng, sizes, np.float32))
    first = bits(made.run(context=contexts[1]))
    for threads in THREADS:
        assert bits(made.run(context=contexts[threads])) == first


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [0, 1, BLOCK // 2, 200, PART // 2, PART, PART + 3, 2 * PART + 70])
def test_attention__a_padded_cache__gives_the_bits_of_the_unpadded(length, rows, contexts, rng):
    q = rng.normal(size=(1, 4, rows, 32)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 2, 2 * PART + 70, 32)).astype(np.float32)

    def operands(tokens):
        cut = (np.ascontiguousarray(each[:, :, :tokens]) for each in (k, v))
        return [umfa.quantize(each, "int8") if contexts["dtype"] == "int8" else each for each in cut]

    words = {"causal": "lower_right", "return_lse": True, "context": contexts[2]}
    assert bits(umfa.attention(q, *operands(None), kv_lengths=[length], **words)) == bits(umfa.attention(q, *operands(length), **words))


def test_attention__a_sequence_alone__has_the_bits_that_it_has_in_a_batch(contexts, rng):
    dtype = contexts["dtype"]
    made = integer_problem(rng, Sizes(batch=3, rows=1, columns=700, channels=64, value_channels=64), ("float32", dtype, dtype))

    def part(argument, index):
        if isinstance(argument, np.ndarray):
            return argument[index]
        shape = (1, *argument.shape[1:])
        return umfa.QuantizedTensor(argument.data[index], argument.scales[index], None, shape=shape, granularity="token")

    together = made.run(context=contexts[2])
    for index in range(3):
        alone = umfa.attention(
            *(part(each, slice(index, index + 1)) for each in made.arguments), **made.keywords, return_lse=True, context=contexts[2]
        )
        assert bits(alone) == bits(each[index : index + 1] for each in together)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("group", [2, 3, 6])
def test_attention__grouped_heads_on_few_rows__give_the_bits_of_repeated_ones(rows, group, contexts, rng):
    q = rng.normal(size=(1, 6, rows, 48)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 6 // group, 700, 48)).astype(np.float32)
    repeated = [np.repeat(each, group, axis=1) for each in (k, v)]
    pairs = [[umfa.quantize(each, "int8") if contexts["dtype"] == "int8" else each for each in pair] for pair in ((k, v), repeated)]
    words = {"causal": "lower_right", "window": (650, 0), "return_lse": True, "context": contexts[2]}
    assert bits(umfa.attention(q, *pairs[0], **words)) == bits(umfa.attention(q, *pairs[1], **words))


@pytest.mark.parametrize("style", ["permuted", "sliced", "negative"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [*(("float", dtype) for dtype in ("float32", "float16", "bfloat16", *CODES)), *(("integer", dtype) for dtype in CODES)],
)
def test_attention__few_rows_at_any_strides__give_the_bits_of_contiguous_ones(family, dtype, layout, style, all_contexts, rng):
    context = all_contexts[family, 2]
    sizes = Sizes(batch=2, rows=2, columns=140, channels=64, value_channels=32)
    made = problem(rng, sizes, dtypes=("float32", dtype, dtype), styles=(style,) * 3, layout=layout)
    contiguous = []
    for argument in made.arguments:
        if isinstance(argument, np.ndarray):
            contiguous.append(np.ascontiguousarray(argument))
        else:
            scales = {"granularity": argument.granularity, "layout": layout}
            data = np.ascontiguousarray(argument.data)
            contiguous.append(umfa.QuantizedTensor(data, argument.scales, argument.zero_points, shape=argument.shape, **scales))
    plain = umfa.attention(*contiguous, **made.keywords, return_lse=True, context=context)
    assert (made.run(context=context)[0] == (plain[0] if layout == "bhsd" else plain[0].swapaxes(1, 2))).all()
    assert made.run(context=context)[1].tobytes() == plain[1].tobytes()


@pytest.mark.parametrize("columns", [40, PART + 100])
@pytest.mark.parametrize("kv_heads", [2, 5, 16, 19])  # items hold up to 16; rows of even numbers share cache sets, and are copied
@pytest.mark.parametrize("group", [1, 6])
def test_attention__heads_side_by_side__give_the_bits_of_heads_one_behind_the_other(group, kv_heads, columns, contexts, rng):
    q = rng.normal(size=(2, 1, kv_heads * group, 64)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, columns, kv_heads, 64)).astype(np.float32)
    words = {"kv_lengths": [columns, columns - 33], "return_lse": True}

    def attend(layout, threads):
        operands = [each if layout == "bshd" else np.ascontiguousarray(each.swapaxes(1, 2)) for each in (q, k, v)]
        if contexts["dtype"] == "int8":
            operands[1:] = [umfa.quantize(each, "int8", layout=layout) for each in operands[1:]]
        output, lse = umfa.attention(*operands, layout=layout, context=contexts[threads], **words)
        return bits((output if layout == "bhsd" else np.ascontiguousarray(output.swapaxes(1, 2)), lse))

    apart = attend("bhsd", 1)
    for threads in THREADS:
        assert attend("bshd", threads) == apart


def test_attention__rows_of_one_call__have_the_bits_of_calls_of_their_own(contexts, rng):
    dtype = contexts["dtype"]
    made = integer_problem(
        rng, Sizes(batch=1, heads=6, kv_heads=2, rows=3, columns=600, channels=64, value_channels=64), ("float32", dtype, dtype)
    )
    together = made.run(context=contexts[2])
    query, *others = made.arguments
    for row in range(3):
        alone = umfa.attention(query[:, :, row : row + 1], *others, **made.keywords, return_lse=True, context=contexts[2])
        assert bits(alone) == bits(each[:, :, row : row + 1] for each in together)


# ---- What is not finite ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_attention__excluded_values_that_are_not_finite__never_change_a_bit_of_few_rows(dtype, poison, floats, rng):
    q = rng.normal(size=(1, 6, 2, 32)).astype(np.float32)
    k, v = (rng.normal(size=(1, 2, 600, 32)).astype(DTYPES[dtype]) for _ in range(2))
    mask = np.ones((2, 600), bool)
    mask[:, [3, 64, 599]] = False
    mask[1, 100] = False
    words = {"mask": mask, "return_lse": True, "context": floats}
    clean = umfa.attention(q, k, v, **words)
    for each in (k, v):
        each[:, :, [3, 64, 599]] = poison
    assert bits(umfa.attention(q, k, v, **words)) == bits(clean)
    v[:, 1, 100, 5] = poison
    output, logsumexp = umfa.attention(q, k, v, **words)
    assert (logsumexp[:, :3] == clean[1][:, :3]).all()
    assert (logsumexp[:, :, 1] == clean[1][:, :, 1]).all()
    expected = clean[0].copy()
    expected[:, 3:, 0, 5] = np.nan
    assert (np.isfinite(output) == np.isfinite(expected)).all()
    assert (output[:, :, 1] == expected[:, :, 1]).all()
    assert (output[:, :3] == expected[:, :3]).all()


@pytest.mark.parametrize("dtypes", [("float32",) * 3, ("float32", "int8", "int8")], ids="-".join)
@pytest.mark.parametrize("place_of", ["query", "mask"])
def test_attention__attended_scores_that_are_not_finite__are_those_of_the_formulas(dtypes, place_of, all_contexts, rng):
    sizes = Sizes(batch=1, rows=3, columns=600, channels=32, value_channels=32)
    made = integer_problem(rng, sizes, dtypes)
    if place_of == "query":
        made.query.argument[0, 1, 2, 7] = np.nan
        made.query.argument[0, 2, 0, 3] = np.inf
    else:
        mask = np.zeros((3, 600), np.float32)
        mask[1, 3], mask[2, :] = np.nan, -np.inf
        made = made.with_keywords(mask=mask)
    made = Problem(sizes, Operand(made.query.argument, made.query.argument.astype(np.float64)), made.key, made.value, made.keywords)
    for family in FAMILIES:
        output, logsumexp = made.run(context=all_contexts[family, 2])
        at = reference.forward(*made.real, made.options)
        assert (np.isfinite(output) == np.isfinite(at.output)).all()
        assert (np.isnan(logsumexp) == np.isnan(at.logsumexp)).all()


def test_attention__few_rows_that_overflow_on_the_way__are_computed_anew(floats, rng):
    sizes = Sizes(batch=1, rows=2, columns=600, channels=32, value_channels=32)
    made = problem(rng, sizes, scale=1e-38)
    made.query.argument[0, 1, 0] *= 1e30
    made.key.argument[0, 0, 70] *= 1e30
    operands = [Operand(each, each.astype(np.float64)) for each in made.arguments]
    check(Problem(sizes, *operands, made.keywords), context=floats)


def test_attention__large_values_of_codes__are_computed_anew(integers, rng):
    """Sums of codes times scales overflow FP32 where their average does not."""
    sizes = Sizes(batch=1, rows=1, columns=90, channels=32, value_channels=32)
    made = integer_problem(rng, sizes)
    made.value.argument.scales[...] = 2e36
    operands = [*(made.query, made.key), Operand(made.value.argument, made.value.argument.dequantize().astype(np.float64))]
    made = Problem(sizes, *operands, made.keywords, "int8")
    output, _ = made.run(context=integers)
    assert_within(output, made.bounds.at.output, integer_bounds(made)[0])


@pytest.mark.parametrize("words", [{}, {"sinks": np.array([0.5, -1, 2, 0], np.float32)}], ids=["plain", "sinks"])
@pytest.mark.parametrize("case", [{"kv_lengths": [0, 700]}, {"window": (0, 0), "query_offset": 10_000}, {"mask": np.zeros((1, 1), bool)}])
def test_attention__empty_rows_among_few__are_zero(case, words, contexts, rng):
    dtype = contexts["dtype"]
    sizes = Sizes(batch=2, rows=1, columns=700, channels=32, value_channels=32)
    made = integer_problem(rng, sizes, ("float32", dtype, dtype)).with_keywords(**case, **words)
    output, logsumexp = made.run(context=contexts[2])
    at = made.bounds.at
    assert ((output == 0) == (at.output == 0)).all()
    assert (np.isneginf(logsumexp) == np.isneginf(at.logsumexp)).all()
    np.testing.assert_allclose(logsumexp, at.logsumexp, rtol=1e-4, atol=1e-4)


def test_attention__query_at_any_address__is_read(floats, rng):
    made = problem(rng, Sizes(batch=1, rows=1, columns=70, channels=32, value_channels=32))
    moved = [place(each, "sliced", rng) for each in made.arguments]
    assert bits(umfa.attention(*moved, return_lse=True, context=floats)) == bits(made.run(context=floats))
