"""Properties that hold without a reference: what must not change a result, mostly not by one bit, and what must change it how."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

import reference
import umfa
from cases import CODES, DTYPES, OPTIONS, STYLES, Operand, Sizes, place, problem, problem_with, to_layout
from conftest import THREAD_COUNTS
from test_backward import check as check_backward, names_of, random_gradients, run_backward
from test_forward import check, problems
from tolerances import assert_within


def bits(*arrays):
    return [np.ascontiguousarray(array).tobytes() for array in arrays]


def everything(made, context=None):
    """Bits of output, logsumexp and all gradients."""
    grad_out, grad_lse = random_gradients(made, np.random.default_rng(0))
    forward = made.run(context=context)
    return bits(*forward), bits(*run_backward(made, grad_out, grad_lse, names_of(made), context=context).values())


# ---- Determinism -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_attention__any_number_of_threads__gives_the_same_bits(option, contexts):
    made = problem_with(option, sizes=Sizes(rows=150, columns=170, channels=24, value_channels=24))
    first = everything(made, contexts[1])
    for count in THREAD_COUNTS[1:]:
        assert contexts[count].num_threads == count
        assert everything(made, contexts[count]) == first, f"{count} threads"


@pytest.mark.parametrize("dtype", [*DTYPES, *CODES])
def test_attention__run_to_run__gives_the_same_bits(dtype, contexts):
    made = problem_with("all", dtypes=(dtype,) * 3)
    first = everything(made, contexts[7])
    for _ in range(5):
        assert everything(made, contexts[7]) == first


@pytest.mark.parametrize("dtype", [*DTYPES, *CODES])
@pytest.mark.parametrize("count", THREAD_COUNTS[1:])
def test_attention__types_and_threads__give_the_same_bits(dtype, count, contexts):
    made = problem_with("causal", sizes=Sizes(rows=70, columns=140), dtypes=(dtype,) * 3)
    assert everything(made, contexts[count]) == everything(made, contexts[1])


@given(problems())
def test_attention__anything_on_three_threads__gives_the_bits_of_one(contexts, made):
    assert everything(made, contexts[3]) == everything(made, contexts[1])


# ---- What must not change a bit ----------------------------------------------------------------------------------------------------------


def part(made, index):
    """The sequence `index` of a problem's batch as a problem of its own."""
    keywords = {
        name: value[index : index + 1]
        if (name in ("kv_lengths", "query_offset") and np.ndim(value))
        or (name == "mask" and np.ndim(value) == 4 and np.shape(value)[0] > 1)
        else value
        for name, value in made.keywords.items()
    }
    operands = [
        Operand(operand.argument[index : index + 1], operand.real[index : index + 1]) for operand in (made.query, made.key, made.value)
    ]
    return type(made)(Sizes(**{**vars(made.sizes), "batch": 1}), *operands, keywords, made.query_dtype, made.arithmetic)


@pytest.mark.parametrize("option", [option for option in OPTIONS if "dropout" not in option and option != "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_attention__alone_or_in_a_batch__gives_the_same_bits(option, dtype):
    made = problem_with(option, sizes=Sizes(batch=3, rows=70, columns=90), dtypes=(dtype,) * 3)
    output, logsumexp = made.run()
    grad_out, grad_lse = random_gradients(made, np.random.default_rng(0))
    gradients = run_backward(made, grad_out, grad_lse, ("query", "key", "value"))
    for index in range(3):
        one = part(made, index)
        assert bits(*one.run()) == bits(output[index], logsumexp[index])
        alone = run_backward(one, grad_out[index : index + 1], grad_lse[index : index + 1], ("query", "key", "value"))
        assert bits(*alone.values()) == bits(*(gradient[index] for gradient in gradients.values()))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_attention__quantised_on_the_fly_alone_or_in_a_batch__gives_the_same_bits(scheme, rng):
    made = problem(rng, Sizes(batch=3), causal=True, quantize=scheme)
    output, logsumexp = made.run()
    for index in range(3):
        assert bits(*part(made, index).run()) == bits(output[index], logsumexp[index])


@pytest.mark.parametrize(
    "option", ["plain", "causal", "causal_lower_right", "softcap", "alibi", "sinks", "window", "mask_bool", "dropout", "all"]
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8", "int4"])
def test_attention__padded_with_poison__gives_the_bits_of_the_unpadded(option, dtype):
    """Keys and values past kv_lengths: NaN for floats, any codes for codes."""
    length, padded = 53, 90
    sizes = Sizes(batch=1, rows=37, columns=padded)
    made = problem_with(option, sizes=sizes, dtypes=(dtype,) * 3)
    shorter = Sizes(**{**vars(sizes), "columns": length})
    keywords = {name: value for name, value in made.keywords.items() if name != "kv_lengths"}
    if "mask" in keywords:
        mask = np.array(np.broadcast_to(keywords["mask"], made.sizes.scores))
        mask[..., length:] = True if mask.dtype == bool else np.nan
        keywords["mask"] = mask
    whole = type(made)(sizes, made.query, made.key, made.value, {**keywords, "kv_lengths": [length]}, dtype, made.arithmetic)
    if dtype in DTYPES:
        for operand in (whole.key, whole.value):
            operand.argument[:, :, length:] = np.nan
        key, value = (Operand(operand.argument[:, :, :length], operand.real[:, :, :length]) for operand in (whole.key, whole.value))
    else:
        key, value = (Operand(first_tokens(operand.argument, length), operand.real[:, :, :length]) for operand in (whole.key, whole.value))
    if "mask" in keywords:
        keywords["mask"] = keywords["mask"][..., :length]
    unpadded = type(made)(shorter, made.query, key, value, keywords, dtype, made.arithmetic)
    check(unpadded)
    assert bits(*whole.run()) == bits(*unpadded.run())
    grad_out, grad_lse = random_gradients(whole, np.random.default_rng(0))
    long, short = (run_backward(each, grad_out, grad_lse, ("query", "key", "value")) for each in (whole, unpadded))
    assert bits(long["query"]) == bits(short["query"])
    for name in ("key", "value"):
        assert bits(long[name][:, :, :length]) == bits(short[name])
        assert (long[name][:, :, length:] == 0).all()


def first_tokens(tensor, length):
    """The first tokens of a quantised tensor, sharing its codes."""
    take = {"tensor": lambda part: part, "token": lambda part: part[..., :length].copy()}[tensor.granularity]
    zero_points = None if tensor.zero_points is None else take(tensor.zero_points)
    shape = (*tensor.shape[:2], length, tensor.shape[3])
    return umfa.QuantizedTensor(tensor.data[:, :, :length], take(tensor.scales), zero_points, shape=shape, granularity=tensor.granularity)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["bool", "additive", "causal", "window", "lengths"])
def test_attention__poison_under_a_mask__gives_the_bits_without(kind, dtype, poison, rng):
    sizes = Sizes(rows=70, columns=90)
    hidden = np.zeros(sizes.columns, bool)
    if kind in ("bool", "additive"):
        hidden[[0, 5, 33, 64, 65, 89]] = True
        visible = np.broadcast_to(~hidden, sizes.scores)
        keywords = {"mask": visible if kind == "bool" else np.where(visible, rng.normal(size=sizes.scores), -np.inf).astype(np.float32)}
    elif kind == "causal":
        hidden[70:] = True
        keywords = {"causal": True}
    elif kind == "window":
        hidden[75:] = True
        keywords = {"window": (-1, 5)}
    else:
        hidden[60:] = True
        keywords = {"kv_lengths": [60, 31]}
    made = problem(rng, sizes, dtypes=(dtype,) * 3, **keywords)
    clean = everything(made)
    for operand in (made.key, made.value):
        operand.argument[:, :, hidden] = poison
    got = everything(made)
    assert got[0] == clean[0]
    assert got[1] == clean[1]


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_attention__nan_in_one_value__leaves_all_other_rows_their_bits(dtype, rng):
    sizes = Sizes(rows=70, columns=90)
    mask = rng.random((sizes.rows, sizes.columns)) < 0.5
    made = problem(rng, sizes, dtypes=(dtype,) * 3, mask=mask)
    (clean, clean_lse), _ = made.run(), made.bounds
    made.value.argument[0, 1, 40, 3] = np.nan
    output, logsumexp = made.run()
    expected = np.zeros(sizes.output, bool)
    expected[0, 2:, :, 3] = mask[:, 40]
    assert (np.isnan(output) == expected).all()
    reached = expected.any(axis=-1)
    assert reached.any()
    assert bits(output[~reached], logsumexp[~reached]) == bits(clean[~reached], clean_lse[~reached])
    assert_within(np.where(expected, clean, output), clean, 2 * made.bounds.output)
    assert_within(logsumexp, clean_lse, 2 * made.bounds.logsumexp)


@pytest.mark.parametrize("option", ["plain", "causal_lower_right", "lengths", "all"])
@pytest.mark.parametrize("dtype", [*DTYPES, "int8", "int4"])
@pytest.mark.parametrize("how", ["copied", "stride 0"])
def test_attention__grouped_heads__give_the_bits_of_repeated_ones(option, dtype, how):
    made = problem_with(option, sizes=Sizes(heads=6, kv_heads=2), dtypes=("float32" if dtype in CODES else dtype, dtype, dtype))
    repeated = []
    for operand in (made.key, made.value):
        argument, real = operand.argument, np.repeat(operand.real, 3, axis=1)
        if dtype in CODES:
            take = (lambda part: part) if argument.granularity == "tensor" else (lambda part: np.repeat(part, 3, axis=1))
            zero_points = None if argument.zero_points is None else take(argument.zero_points)
            shape = (argument.shape[0], 6, *argument.shape[2:])
            data = repeat(argument.data, how)
            argument = umfa.QuantizedTensor(data, take(argument.scales), zero_points, shape=shape, granularity=argument.granularity)
        else:
            argument = repeat(argument, how)
        repeated.append(Operand(argument, real))
    many = type(made)(Sizes(**{**vars(made.sizes), "kv_heads": 6}), made.query, *repeated, made.keywords, made.query_dtype, made.arithmetic)
    assert bits(*many.run()) == bits(*made.run())
    check(many)


def repeat(array, how):
    """Each of two heads three times."""
    if how == "copied":
        return np.repeat(array, 3, axis=1)
    batch, heads, tokens, channels = array.shape
    # [2, 2, ...] -> [2, 2, 3, ...] with stride 0 cannot be merged to 6 heads without a copy, so batch 1 has one head three times, twice.
    return np.broadcast_to(array[:, :, None], (batch, heads, 3, tokens, channels)).reshape(batch, 6, tokens, channels)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention__one_head_broadcast_by_stride_0__gives_the_bits_of_grouped_heads(dtype, rng):
    made = problem(rng, Sizes(heads=6, kv_heads=1), dtypes=(dtype,) * 3)
    key, value = (np.broadcast_to(operand.argument, (2, 6, *operand.argument.shape[2:])) for operand in (made.key, made.value))
    assert key.strides[1] == 0
    output, logsumexp = umfa.attention(made.query.argument, key, value, return_lse=True)
    assert bits(output, logsumexp) == bits(*made.run())


@given(problems(), st.tuples(*[st.sampled_from(STYLES[1:4])] * 3), st.integers(0, 2**32 - 1))
def test_attention__strided__gives_the_bits_of_contiguous(made, styles, seed):
    rng = np.random.default_rng(seed)
    contiguous, strided = [], []
    for operand, style in zip((made.query, made.key, made.value), styles):
        argument = operand.argument
        if isinstance(argument, umfa.QuantizedTensor):
            parts = {name: getattr(argument, name) for name in ("shape", "granularity", "layout")}
            for kind, target in (("contiguous", contiguous), (style, strided)):
                data = place(np.ascontiguousarray(argument.data), kind, rng)
                target.append(umfa.QuantizedTensor(data, argument.scales, argument.zero_points, **parts))
        else:
            contiguous.append(np.ascontiguousarray(argument))
            strided.append(place(np.ascontiguousarray(argument), style, rng))
    expected = umfa.attention(*contiguous, **made.keywords, return_lse=True)
    assert bits(*umfa.attention(*strided, **made.keywords, return_lse=True)) == bits(*expected)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_attention__layouts__give_the_same_bits(option, dtype):
    one = problem_with(option, dtypes=(dtype,) * 3, sizes=Sizes(channels=16, value_channels=8))
    other = problem_with(option, dtypes=(dtype,) * 3, sizes=Sizes(channels=16, value_channels=8), layout="bshd")
    if dtype in CODES:
        # Codes are drawn in the layout's order, so take those of the first.
        def swapped(operand):
            tensor = operand.argument
            parts = (np.ascontiguousarray(tensor.data.swapaxes(1, 2)), tensor.scales, tensor.zero_points)
            shape = tuple(tensor.shape[axis] for axis in (0, 2, 1, 3))
            return Operand(umfa.QuantizedTensor(*parts, shape=shape, granularity=tensor.granularity, layout="bshd"), operand.real)
    else:

        def swapped(operand):
            return Operand(np.ascontiguousarray(operand.argument.swapaxes(1, 2)), operand.real)

    operands = [swapped(operand) for operand in (one.query, one.key, one.value)]
    other = type(one)(one.sizes, *operands, {**one.keywords, "layout": "bshd"}, one.query_dtype, one.arithmetic)
    assert bits(*other.run()) == bits(*one.run())


@pytest.mark.parametrize("power", [-30, -3, 1, 60])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention__values_times_a_power_of_two__scale_the_output_exactly(power, dtype, rng):
    made = problem(rng, dtypes=(dtype,) * 3, causal=True)
    output, _ = made.run()
    scaled = umfa.attention(made.query.argument, made.key.argument, made.value.argument * DTYPES[dtype](2.0**power), causal=True)
    assert bits(scaled) == bits(output * DTYPES[dtype](2.0**power))


@pytest.mark.parametrize("power", [-4, 5])
def test_attention__queries_times_a_power_of_two__equals_the_scale_times_it(power, rng):
    made = problem(rng, scale=0.25)
    query = made.query.argument * np.float32(2.0**power)
    scaled = umfa.attention(query, made.key.argument, made.value.argument, scale=0.25 / 2.0**power, return_lse=True)
    assert bits(*scaled) == bits(*made.run())


# ---- What changes a result in a known way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["plain", "sinks", "softcap", "mask_additive", "mask_bool"])
def test_attention__keys_in_another_order__give_the_same_result(option, rng):
    made = problem_with(option, sizes=Sizes(rows=33, columns=80))
    order = rng.permutation(80)
    keywords = dict(made.keywords)
    if "mask" in keywords:
        keywords["mask"] = keywords["mask"][..., order]
    key, value = made.key.argument[:, :, order], made.value.argument[:, :, order]
    output, logsumexp = umfa.attention(made.query.argument, key, value, **keywords, return_lse=True)
    expected, expected_lse = made.run()
    assert_within(output, expected, 2 * made.bounds.output)
    assert_within(logsumexp, expected_lse, 2 * made.bounds.logsumexp)


@pytest.mark.parametrize("option", ["plain", "softcap", "mask_additive", "mask_bool", "causal", "window", "alibi"])
@pytest.mark.parametrize("splits", [[1], [40], [64], [79], [10, 20, 30], [0, 80]], ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_merge__keys_in_parts__equal_the_whole(option, splits, layout):
    made = problem_with(option, sizes=Sizes(rows=33, columns=80), layout=layout)
    parts = []
    for first, last in itertools.pairwise([0, *splits, 80]):
        keywords = {**made.keywords, "query_offset": -first}
        if "mask" in keywords:
            keywords["mask"] = keywords["mask"][..., first:last]
        key, value = (to_layout(to_layout(operand.argument, layout)[:, :, first:last], layout) for operand in (made.key, made.value))
        parts.append(umfa.attention(made.query.argument, key, value, **keywords, return_lse=True))
    expected = made.bounds.at
    for order in (parts, parts[::-1]):
        output, logsumexp = order[0]
        for part in order[1:]:
            output, logsumexp = umfa.merge(output, logsumexp, *part, layout=layout)
        assert_within(to_layout(output, layout), expected.output, 2 * len(parts) * made.bounds.output)
        assert_within(logsumexp, expected.logsumexp, len(parts) * made.bounds.logsumexp)


@pytest.mark.parametrize("option", ["plain", "causal", "window", "alibi", "softcap", "mask_additive"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention__constant_values__give_the_constant(option, dtype):
    made = problem_with(option, dtypes=(dtype,) * 3)
    value = np.full(made.sizes.value, 1.5, DTYPES[dtype])
    output, logsumexp = umfa.attention(made.query.argument, made.key.argument, value, **made.keywords, return_lse=True)
    attending = np.isfinite(logsumexp)
    assert attending.any()
    np.testing.assert_allclose(output[attending].astype(np.float64), 1.5, rtol=1e-5 if dtype == "float32" else 1e-3)
    assert (output[~attending] == 0).all()


def test_attention__a_constant_added_to_the_mask__moves_only_logsumexp(rng):
    made = problem(rng, mask=np.zeros((1, 1), np.float32))
    output, logsumexp = made.run()
    moved, moved_lse = made.run(mask=np.full((1, 1), 3.0, np.float32))
    assert_within(moved, output, 2 * made.bounds.output)
    assert_within(moved_lse, logsumexp + 3.0, 3 * made.bounds.logsumexp)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"causal": True}, {"window": (-1, 0)}),
        ({"causal": True}, {"causal": "upper_left"}),
        ({"causal": True}, {"causal": True, "query_offset": 0}),
        ({"causal": "lower_right"}, {"causal": True, "query_offset": 18}),
        ({"causal": "lower_right", "kv_lengths": [37, 20]}, {"causal": True, "kv_lengths": [37, 20], "query_offset": [18, 1]}),
        ({}, {"window": (-1, -1)}),
        ({}, {"kv_lengths": [37, 37]}),
        ({}, {"mask": np.ones((19, 37), bool)}),
        ({}, {"mask": np.zeros((19, 37), np.float16)}),
        ({}, {"alibi_slopes": [0.0] * 4}),
        ({}, {"sinks": [-np.inf] * 4}),
        ({}, {"dropout_p": 0.0, "seed": 3}),
        ({}, {"softcap": 1e6}),
        ({"causal": True}, {"mask": np.tri(19, 37, dtype=bool)}),
        ({"mask": np.tri(19, 37, dtype=bool)}, {"mask": np.where(np.tri(19, 37), 0, -np.inf)}),
        ({"kv_lengths": [0, 9]}, {"mask": (np.arange(37) < np.array([0, 9])[:, None])[:, None, None, :]}),
    ],
)
def test_attention__two_ways_to_say_the_same__give_the_same_result(one, other):
    first, second = (problem(np.random.default_rng(9), **keywords) for keywords in (one, other))
    results = [made.run() for made in (first, second)]
    assert_within(results[0][0], results[1][0], 2 * first.bounds.output)
    assert_within(results[0][1], results[1][1].astype(np.float64), 2 * first.bounds.logsumexp)
    check(first)
    check(second)


# ---- Dropout -----------------------------------------------------------------------------------------------------------------------------


def test_attention__dropout_with_the_same_seed__gives_the_same_bits(rng):
    made = problem(rng, dropout_p=0.5, seed=2**64 - 1, dropout_offset=2**32 - 1)
    assert bits(*made.run()) == bits(*made.run())
    check(made)


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": 2**32}, {"dropout_offset": 1}])
def test_attention__dropout_with_another_seed_or_offset__drops_others(change, rng):
    made = problem(rng, dropout_p=0.5, seed=0, dropout_offset=0)
    output, logsumexp = made.run()
    other, other_lse = made.run(**change)
    assert (output != other).mean() > 0.9
    assert bits(logsumexp) == bits(other_lse)


def test_attention__dropout_without_a_seed__draws_one(rng):
    made = problem(rng, dropout_p=0.5)
    assert bits(made.run()[0]) != bits(made.run()[0])


@pytest.mark.parametrize("probability", [1e-12, 0.1, 0.5, 0.9])
def test_attention__dropout__keeps_the_share_that_it_says(probability):
    sizes = Sizes(batch=1, heads=2, kv_heads=1, rows=300, columns=300, channels=1, value_channels=1)
    made = problem(np.random.default_rng(0), sizes, dropout_p=probability, seed=1, scale=0.0)
    values = np.ones(sizes.value, np.float32)
    output = umfa.attention(made.query.argument, made.key.argument, values, scale=0.0, dropout_p=probability, seed=1)
    kept = output.astype(np.float64) * (1 - probability)
    assert kept.mean() == pytest.approx(1 - probability, abs=4 * np.sqrt(probability / sizes.rows**2 / 2) + 1e-6)


def test_attention__dropout_with_known_scores__follows_the_counter(rng):
    """With one value channel a column and equal weights, the output shows each element that was kept."""
    sizes = Sizes(batch=2, heads=3, kv_heads=1, rows=5, columns=67, channels=1, value_channels=67)
    options = reference.Options(0.0, dropout_p=0.3, seed=0xFEDCBA9876543210, dropout_offset=17)
    key, query = np.zeros(sizes.key, np.float32), np.zeros(sizes.query, np.float32)
    value = np.broadcast_to(np.eye(67, dtype=np.float32), sizes.value)
    output = umfa.attention(query, key, value, dropout_p=0.3, seed=options.seed, dropout_offset=17)
    assert ((output > 0) == (reference.dropout_factors(sizes.scores, options) > 0)).all()


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_attention_backward__grouped_heads__is_the_sum_over_repeated_ones(name, rng):
    made = problem(rng, Sizes(heads=4, kv_heads=2))
    many = umfa.attention_backward
    grad_out, _ = random_gradients(made, rng)
    got = check_backward(made)
    grouped = run_backward(made, grad_out)[name]
    key, value = (np.repeat(operand.argument, 2, axis=1) for operand in (made.key, made.value))
    out, lse = umfa.attention(made.query.argument, key, value, return_lse=True)
    (single,) = many(grad_out, made.query.argument, key, value, out, lse, gradients=(name,))
    if name != "query":
        single = single.reshape(2, 2, 2, *single.shape[2:]).sum(axis=2)
    assert set(got) == {"query", "key", "value"}
    np.testing.assert_allclose(grouped, single, rtol=1e-5, atol=1e-6)


def test_attention__a_view_of_a_packed_tensor__gives_the_bits_of_copies(rng):
    packed = rng.normal(size=(2, 19, 3, 4, 17)).astype(np.float32)
    q, k, v = (packed[:, :, index] for index in range(3))
    expected = umfa.attention(*map(np.ascontiguousarray, (q, k, v)), layout="bshd", causal=True)
    assert bits(umfa.attention(q, k, v, layout="bshd", causal=True)) == bits(expected)
    assert bits(to_layout(expected, "bshd")) == bits(umfa.attention(*(to_layout(tensor, "bshd") for tensor in (q, k, v)), causal=True))


@pytest.mark.parametrize("element", [(0, 0), (3, 5), (4, 66)])
def test_attention__dropout_at_the_threshold__keeps_the_word_that_equals_it(element):
    """A word is kept from floor(dropout_p * 2^32) on, to the last bit."""
    i, j = element
    word = int(reference.philox((j >> 2, i, 0, 0), (9, 0))[j & 3])
    zeros = np.zeros((1, 1, 5, 1), np.float32), np.zeros((1, 1, 67, 1), np.float32)
    value = np.eye(67, dtype=np.float32)[None, None]
    for probability, kept in ((word / 2**32, True), ((word + 0.5) / 2**32, True), ((word + 1) / 2**32, False)):
        output = umfa.attention(*zeros, value, dropout_p=probability, seed=9)
        assert (output[0, 0, i, j] > 0) == kept
