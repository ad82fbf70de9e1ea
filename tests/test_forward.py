"""Forward against the float64 reference, over all types, strides and options. `tolerances` derives how far off a result may be."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import umfa
from cases import CODES, DTYPES, OPTIONS, STYLES, Sizes, problem, problem_with, to_layout
from tolerances import SMALLEST, UNIT, assert_within


def check(made, **others):
    """Run a problem and compare output and logsumexp with the reference."""
    output, logsumexp = made.run(**others)
    exact = made.bounds.at
    assert output.dtype == DTYPES[made.output_dtype]
    assert logsumexp.dtype == (np.float64 if made.arithmetic == "float64" else np.float32)
    assert_within(output, exact.output, made.bounds.output, "output")
    assert_within(logsumexp, exact.logsumexp, made.bounds.logsumexp, "logsumexp")
    return output, logsumexp


def test_tolerances__a_typical_problem__are_not_vacuous():
    made = problem(np.random.default_rng(0), Sizes(rows=64, columns=64, channels=64, value_channels=64))
    assert 1e-7 < made.bounds.output.max() < 1e-4
    assert made.bounds.logsumexp.max() < 1e-4


@pytest.mark.parametrize("option", OPTIONS)
def test_attention__each_option__equals_the_reference(option):
    made = problem_with(option)
    check(made)
    if option not in ("plain", "causal_upper_left", "scale_zero"):
        plain = problem_with("plain").bounds.at
        assert not np.allclose(plain.output, made.bounds.at.output, atol=1e-3) or "window_wide" in option, "the option must matter"


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8", "int4"])
def test_attention__each_option_and_type__equals_the_reference(option, dtype):
    check(problem_with(option, seed=1, dtypes=(dtype,) * 3, sizes=Sizes(rows=7, columns=70, channels=24, value_channels=24)))


@pytest.mark.parametrize("dtypes", list(itertools.product(("float32", "float16", "bfloat16", "int8", "int4"), repeat=3)), ids="-".join)
def test_attention__each_mix_of_types__equals_the_reference(dtypes):
    check(problem(np.random.default_rng(2), Sizes(channels=11), dtypes=dtypes, causal=True))


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("other", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_attention__one_float64_operand__computes_in_float64(place, other):
    dtypes = [other] * 3
    dtypes[place] = "float64"
    check(problem(np.random.default_rng(3), dtypes=tuple(dtypes), causal="lower_right"))


@pytest.mark.parametrize("channels", [1, 3, 17, 32, 64, 65, 128, 200, 1024])
@pytest.mark.parametrize("value_channels", [1, 64, 1024])
@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_attention__head_sizes__equal_the_reference(channels, value_channels, dtype):
    sizes = Sizes(batch=1, heads=2, kv_heads=1, rows=9, columns=21, channels=channels, value_channels=value_channels)
    check(problem(np.random.default_rng(channels), sizes, dtypes=(dtype,) * 3))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 70), (70, 1), (64, 64), (65, 63), (33, 257), (130, 129)])
def test_attention__lengths_around_tiles__equal_the_reference(rows, columns):
    check(problem(np.random.default_rng(4), Sizes(batch=1, rows=rows, columns=columns), causal="lower_right"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention__first_tiles_that_are_excluded__leave_no_trace(dtype):
    """Until a row attends something, its largest score is -inf."""
    sizes = Sizes(batch=1, heads=1, kv_heads=1, rows=70, columns=300, channels=17, value_channels=9)
    check(problem(np.random.default_rng(0), sizes, dtypes=(dtype,) * 3, window=(5, 0), query_offset=200))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [*DTYPES, *CODES])
def test_attention__strides__equal_the_reference(layout, style, dtype):
    sizes = Sizes(channels=13, value_channels=8)
    check(problem(np.random.default_rng(5), sizes, dtypes=(dtype,) * 3, styles=(style,) * 3, layout=layout, causal=True))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, bool])
def test_attention__strides_of_a_mask__equal_the_reference(style, kind, rng):
    from cases import place

    sizes = Sizes()
    mask = rng.random(sizes.scores) < 0.7 if kind is bool else rng.normal(size=sizes.scores).astype(kind)
    check(problem(rng, sizes, mask=place(mask, style, rng, poison=False if kind is bool else np.nan)))


@pytest.mark.parametrize("byte", [1, 2, 128, 255])
def test_attention__boolean_mask_of_other_bytes__nonzero_attends(byte, rng):
    mask = (rng.random((19, 37)) < 0.5) * np.uint8(byte)
    made = problem(rng, mask=mask.view(bool))
    expected = made.with_keywords(mask=mask != 0)
    assert made.run()[0].tobytes() == expected.run()[0].tobytes()
    check(expected)


@pytest.mark.parametrize(
    "shape", [(), (1,), (37,), (19, 1), (19, 37), (4, 1, 1), (1, 19, 37), (2, 1, 1, 37), (1, 4, 19, 1), (2, 4, 19, 37)]
)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_attention__masks_that_broadcast__equal_the_reference(shape, kind, rng):
    if shape == ():
        mask = np.array(True) if kind == "bool" else np.array(0.5, np.float32)
    else:
        mask = rng.random(shape) < 0.7 if kind == "bool" else rng.normal(size=shape).astype(np.float32)
    check(problem(rng, mask=mask))


@pytest.mark.parametrize("shape", [(19, 17), (2, 19, 17)])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_attention__fewer_axes__are_one_head_and_one_sequence(shape, layout, rng):
    q, k, v = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    output, logsumexp = umfa.attention(q, k, v, causal=True, layout=layout, return_lse=True)
    assert output.shape == shape
    assert logsumexp.shape == shape[:-1]
    four = [tensor.reshape(-1, 1, *shape[-2:]) for tensor in (q, k, v)]
    expected, expected_lse = umfa.attention(*four, causal=True, return_lse=True)
    assert output.tobytes() == expected.tobytes()
    assert logsumexp.tobytes() == expected_lse.tobytes()


@pytest.mark.parametrize("dtype", [*DTYPES, *CODES])
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_attention__out_of_any_float_type__is_the_result_rounded_once(dtype, out_dtype, rng):
    made = problem(rng, dtypes=(dtype, "float32", "float32"))
    out = np.empty(made.sizes.output, DTYPES[out_dtype])
    assert umfa.attention(*made.arguments, out=out) is out
    bound = made.bounds.output + UNIT[out_dtype] * np.abs(made.bounds.at.output) + SMALLEST[out_dtype]
    assert_within(out, made.bounds.at.output, bound)


# Few query rows have kernels of their own.
SINGLE_AND_SEVERAL = pytest.mark.parametrize("rows", [1, 5])


def one_key(value, out_dtype, rows):
    """Attention of some rows to a single key, whose weight is exactly 1: the output is the value."""
    query, key = np.zeros((value.shape[0], 1, rows, 4), np.float32), np.zeros((value.shape[0], 1, 1, 4), np.float32)
    out = umfa.attention(query, key, value, out=np.empty((*value.shape[:2], rows, value.shape[3]), out_dtype))
    assert all(out[:, :, row].tobytes() == out[:, :, 0].tobytes() for row in range(rows))
    return out[:, :, :1]


@SINGLE_AND_SEVERAL
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_attention__every_number_of_16_bits__is_read_and_written_exactly(dtype, rows):
    numbers = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype]).reshape(1024, 1, 1, 64)
    with np.errstate(all="ignore"):
        real = numbers.astype(np.float64)
        # What lies below float32's smallest normal number, in bfloat16, may be flushed.
        served = np.isfinite(real) & (np.abs(real) >= np.finfo(np.float32).tiny)
    numbers = np.where(served, numbers, DTYPES[dtype](0))
    assert (one_key(numbers, np.float64, rows) == numbers.astype(np.float64)).all()
    assert (one_key(numbers, DTYPES[dtype], rows) == numbers).all()


def rounded(numbers, dtype):
    """float64 to another type, to nearest even, once; ml_dtypes would round twice, by way of float32."""
    if dtype == "bfloat16":
        fraction, exponent = np.frexp(numbers)
        numbers = np.ldexp(np.rint(np.ldexp(fraction, 8)), exponent - 8)
    return numbers.astype(DTYPES[dtype])


@SINGLE_AND_SEVERAL
@pytest.mark.parametrize("source", ["float32", "float64"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_attention__output_between_two_numbers__is_rounded_to_nearest_even(source, target, rows, rng):
    """Halfway cases of all exponents, and their neighbours, beside random numbers."""
    with np.errstate(all="ignore"):
        exact = np.arange(2**16, dtype=np.uint16).view(DTYPES["bfloat16" if target == "bfloat16" else "float16"]).astype(np.float64)
        if target == "float32":
            exact = exact + np.spacing(exact.astype(np.float32)) * rng.integers(0, 3, exact.size)
        exact = np.sort(exact[np.isfinite(exact)])
        step = np.spacing(exact.astype(np.float32)) if target == "float32" else np.append(np.diff(exact), 0)
        halfway = (exact + step / 2).astype(DTYPES[source])
        near = [np.nextafter(halfway, DTYPES[source](side)) for side in (-np.inf, np.inf)]
        numbers = np.concatenate([halfway, *near, rng.normal(size=5000).astype(DTYPES[source])])
        # What float32 does not hold as a normal number may be flushed.
        numbers = numbers[np.isfinite(numbers) & (np.abs(numbers) >= np.finfo(np.float32).tiny)]
        numbers = np.resize(numbers, (numbers.size // 64, 1, 1, 64))
        expected = rounded(numbers.astype(np.float64), target)
    got = one_key(numbers, DTYPES[target], rows)
    wrong = got != expected
    assert not wrong.any(), (numbers[wrong][0], got[wrong][0], expected[wrong][0])


@pytest.mark.parametrize("style", ["permuted", "sliced", "negative"])
def test_attention__out_with_strides__writes_its_elements_and_nothing_else(style, rng):
    from cases import place

    made = problem(rng)
    expected, _ = made.run()
    out = place(np.zeros(made.sizes.output, np.float32), style, rng)
    memory = out
    while memory.base is not None:
        memory = memory.base
    before = memory.copy()
    umfa.attention(*made.arguments, out=out)
    assert (out == expected).all()
    out[...] = 0
    assert memory.tobytes() == before.tobytes()


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_attention__grouped_heads__share_keys_of_consecutive_heads(kv_heads):
    check(problem(np.random.default_rng(6), Sizes(heads=6, kv_heads=kv_heads)))


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda values: np.array(values, np.int32), lambda values: np.array(values, np.uint8)]
)
def test_attention__lengths_and_offsets_of_any_kind__are_read(kind, rng):
    made = problem(rng, causal=True, kv_lengths=[30, 0], query_offset=[7, 2])
    expected, _ = check(made)
    output, _ = made.run(kv_lengths=kind([30, 0]), query_offset=kind([7, 2]))
    assert output.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("keywords", "expected_rows"),
    [
        ({"causal": True}, "all"),
        ({"causal": True, "query_offset": -1}, "all but the first"),
        ({"causal": True, "query_offset": -100}, "none"),
        ({"causal": "lower_right"}, "last"),
        ({"query_offset": 2**61 - 1, "causal": True}, "all"),
        ({"query_offset": -(2**61) + 1, "causal": True}, "none"),
        ({"query_offset": 2**61 - 1, "window": (2**63 - 1, -1)}, "all"),
        ({"query_offset": 2**61 - 1, "window": (-1, 0)}, "all"),
        ({"query_offset": -(2**61) + 1, "window": (0, 2**63 - 1)}, "all"),
        ({"query_offset": 2**61 - 1, "window": (0, 0)}, "none"),
        ({"query_offset": 2**61 - 1, "window": (3, -1), "causal": True}, "none"),
        ({"query_offset": -(2**61) + 1, "window": (0, 0)}, "none"),
        ({"query_offset": -(2**61) + 1, "window": (-1, 3)}, "none"),
    ],
)
def test_attention__positions_far_out__exclude_by_64_bit_arithmetic(keywords, expected_rows):
    made = problem(np.random.default_rng(7), Sizes(rows=9, columns=3), **keywords)
    _, logsumexp = check(made)
    attending = np.isfinite(logsumexp[0, 0])
    expected = {"all": [True] * 9, "none": [False] * 9, "all but the first": [False] + [True] * 8, "last": [False] * 6 + [True] * 3}
    assert attending.tolist() == expected[expected_rows]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("keywords", [{"kv_lengths": [0, 0]}, {"mask": np.zeros((1, 1), bool)}, {"window": (0, 0), "query_offset": 1000}])
def test_attention__empty_rows__are_zero_with_minus_infinity_or_the_sink(sinks, keywords, rng):
    values = np.array([-1.0, -np.inf, 0.5, 30.0], np.float32)
    made = problem(rng, **keywords, **({"sinks": values} if sinks else {}))
    output, logsumexp = made.run()
    assert (output == 0).all()
    assert (logsumexp == (values[:, None] if sinks else -np.inf)).all()


@pytest.mark.parametrize(
    "sizes",
    [Sizes(columns=0), Sizes(rows=0), Sizes(batch=0), Sizes(rows=0, columns=0), Sizes(batch=0, columns=0)],
    ids=["columns", "rows", "batch", "rows_columns", "batch_columns"],
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "int4"])
def test_attention__empty_dimensions__are_legal(sizes, dtype, rng):
    output, logsumexp = problem(rng, sizes, dtypes=(dtype,) * 3, causal="lower_right", kv_lengths=[0] * sizes.batch).run()
    assert output.shape == sizes.output
    assert (output == 0).all()
    assert (logsumexp == -np.inf).all()


@pytest.mark.parametrize("layout", ["bshd"])
def test_flash_attention_forward__four_axes__is_attention_in_bshd(layout, rng, context):
    made = problem(rng, layout=layout, causal=True)
    expected, _ = check(made)
    output = umfa.flash_attention_forward(context, *made.arguments, causal=True)
    assert to_layout(output, layout).tobytes() == np.ascontiguousarray(expected).tobytes() or (to_layout(output, layout) == expected).all()
    scaled = umfa.flash_attention_forward(context, *made.arguments, softmax_scale=0.3)
    assert_within(to_layout(scaled, layout), made.with_keywords(causal=False, scale=0.3).bounds.at.output, made.bounds.output.max() * 2)


@st.composite
def problems(draw):
    """Problems with odd sizes, types, strides and a few options at once."""
    kv_heads = draw(st.integers(1, 3))
    sizes = Sizes(
        batch=draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 3)),
        rows=draw(st.integers(1, 70)),
        columns=draw(st.integers(1, 70)),
        channels=draw(st.sampled_from([1, 2, 3, 5, 8, 16, 17, 32, 64, 65, 128, 200])),
        value_channels=draw(st.sampled_from([1, 2, 3, 5, 8, 16, 17, 32, 64, 65, 128, 200])),
    )
    dtypes = draw(st.tuples(*[st.sampled_from([*DTYPES, *CODES])] * 3))
    styles = draw(st.tuples(*[st.sampled_from(STYLES)] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = problem(rng, sizes, dtypes=dtypes, styles=styles, layout=draw(st.sampled_from(["bhsd", "bshd"])))
    keywords = {}
    for option in draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4)):
        keywords.update(OPTIONS[option](rng, sizes, DTYPES[made.arithmetic]))
    if keywords.get("causal") == "lower_right":
        keywords.pop("query_offset", None)
    return made.with_keywords(**keywords)


@given(problems())
@settings(max_examples=200 if settings().max_examples < 200 else settings().max_examples)
def test_attention__anything__equals_the_reference(made):
    check(made)


@pytest.mark.parametrize("rows", [1, 64])
def test_attention__constant_values_over_many_keys__stay_constant(rows):
    """Sums of tens of thousands of weights must not drift."""
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 1, length, 8)).astype(np.float32) for length in (rows, 30_000))
    output = umfa.attention(q, k, np.ones((1, 1, 30_000, 4), np.float32))
    np.testing.assert_allclose(output, 1, rtol=4e-6)
