"""NaN, infinities, denormals and numbers at the edge of a type: a result is not finite exactly where the float64 formulas say so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import reference
import umfa
from cases import DTYPES, Problem, Sizes, problem
from test_backward import names_of, random_gradients, run_backward

SIZES = Sizes(batch=1, heads=2, kv_heads=1, rows=37, columns=70, channels=8, value_channels=6)
FLOAT_MAX = float(np.finfo(np.float32).max)


def reread(made: Problem) -> Problem:
    """The problem after its arguments were written into."""
    operands = [type(operand)(operand.argument, np.asarray(operand.argument, np.float64)) for operand in (made.query, made.key, made.value)]
    return Problem(made.sizes, *operands, made.keywords, made.query_dtype, made.arithmetic)


def assert_same(got, expected, what, relative=1e-4):
    """Finite where expected is, once it is rounded to the type of `got`, and equal there."""
    got, expected = np.asarray(got), np.asarray(expected, np.float64)
    with np.errstate(all="ignore"):
        held = np.isfinite(expected.astype(got.dtype).astype(np.float64))
    got = got.astype(np.float64)
    wrong = held != np.isfinite(got)
    assert not wrong.any(), f"{what}: {wrong.sum()} elements, first {np.argwhere(wrong)[0]}: {got[wrong][0]} for {expected[wrong][0]}"
    if held.any():
        size = np.abs(expected[held]).max()
        np.testing.assert_allclose(got[held], expected[held], rtol=relative, atol=relative * size, err_msg=what)


def check(made: Problem, relative=1e-4):
    made = reread(made)
    relative = max(relative, {"float16": 2e-3, "bfloat16": 2e-2}.get(made.query_dtype, 0))
    output, logsumexp = made.run()
    exact = reference.forward(*made.real, made.options)
    assert_same(output, exact.output, "output", relative)
    # Beyond float32 a finite logsumexp is the largest number or infinity, of its own sign.
    limit = float(np.finfo(logsumexp.dtype).max)
    beyond = np.isfinite(exact.logsumexp) & (np.abs(exact.logsumexp) > limit)
    assert (np.sign(logsumexp[beyond]) == np.sign(exact.logsumexp[beyond])).all()
    assert (np.abs(logsumexp[beyond]) >= limit).all()
    assert_same(np.where(beyond, 0, logsumexp), np.where(beyond, 0, exact.logsumexp), "logsumexp", relative)
    return output, logsumexp


def check_backward(made: Problem, grad_out, grad_lse=None, relative=1e-3):
    made = reread(made)
    got = run_backward(made, grad_out, grad_lse, names_of(made))
    exact = reference.backward(*made.real, np.asarray(grad_out, np.float64), made.options, grad_lse)
    for name, gradient in got.items():
        assert_same(gradient, exact[name], f"gradient of {name}", relative)
    return got


def masked(kind: str, column: int, rng) -> dict:
    """Keywords that hide `column` from some rows, from all, or from none."""
    some = np.ones((SIZES.rows, SIZES.columns), bool)
    some[::2, column] = False
    return {
        "attended": {},
        "masked": {"mask": np.arange(SIZES.columns) != column},
        "masked in some rows": {"mask": some},
        "additive in some rows": {"mask": np.where(some, rng.normal(size=some.shape), -np.inf).astype(np.float32)},
        "causal": {"causal": True},
        "window": {"window": (10, 10)},
        "past the length": {"kv_lengths": [column]},
        "dropped in part": {"dropout_p": 0.5, "seed": 3},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": np.array([0.5, -np.inf], np.float32)},
    }[kind]


KINDS = (
    "attended",
    "masked",
    "masked in some rows",
    "additive in some rows",
    "causal",
    "window",
    "past the length",
    "dropped in part",
    "softcap",
    "sinks",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_attention__a_value_that_is_not_finite__reaches_what_the_formulas_say(kind, where, value, dtype, rng):
    column = 20
    made = problem(rng, SIZES, dtypes=(dtype,) * 3, **masked(kind, column, rng))
    getattr(made, where).argument[0, 0, column, 2] = value
    output, _ = check(made)
    reached = not np.isfinite(output.astype(np.float64)).all()
    if kind in ("masked", "past the length") and where != "query":
        assert not reached
    elif kind == "attended" and not (where == "key" and np.isinf(value)):
        assert reached


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["query", "key", "value", "grad_output", "grad_logsumexp"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_attention_backward__a_value_that_is_not_finite__reaches_what_the_formulas_say(kind, where, value, rng):
    column = 20
    made = problem(rng, SIZES, **masked(kind, column, rng))
    grad_out, grad_lse = random_gradients(made, rng)
    if where == "grad_output":
        grad_out[0, 1, 7, 3] = value
    elif where == "grad_logsumexp":
        grad_lse[0, 1, 7] = value
    else:
        getattr(made, where).argument[0, 0, column, 2] = value
    check_backward(made, grad_out, grad_lse)


def test_attention_backward__nan_in_a_row_without_keys__reaches_nothing(rng):
    mask = np.ones((SIZES.rows, SIZES.columns), bool)
    mask[5] = False
    made = problem(rng, SIZES, mask=mask)
    grad_out, _ = random_gradients(made, rng)
    grad_out[0, :, 5] = np.nan
    made.query.argument[0, :, 5] = np.inf
    got = check_backward(made, grad_out)
    assert all(np.isfinite(gradient).all() for gradient in got.values())


@pytest.mark.parametrize("value", [np.nan, np.inf, FLOAT_MAX, -FLOAT_MAX, 1e-40], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("operands", ["float32", "float64"])
def test_attention__special_values_in_an_additive_mask__reach_what_the_formulas_say(value, dtype, operands, rng):
    mask = rng.normal(size=(SIZES.rows, SIZES.columns))
    with np.errstate(over="ignore"):
        mask = mask.astype(DTYPES[dtype])
        mask[3, 7] = mask[4] = np.float64(value)
    check(problem(rng, SIZES, dtypes=(operands,) * 3, mask=mask))


@pytest.mark.parametrize("lowest", [float(np.finfo(dtype).min) for dtype in (np.float16, np.float32)] + [-3.0e38, -1e39, -1e300], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_attention__lowest_number_as_a_mask__is_a_number(lowest, backward, rng):
    """Rows that have nothing else attend to all of it alike; in other rows it has no weight."""
    mask = np.zeros((SIZES.rows, SIZES.columns), np.float64)
    mask[:, 30:] = lowest
    mask[5] = lowest
    made = problem(rng, SIZES, mask=mask.astype(np.float32) if abs(lowest) < 3.5e38 else mask)
    if backward:
        # Gradients of rows whose logsumexp float32 does not hold are out of reach.
        if abs(lowest) < 1e6:
            grad_out, grad_lse = random_gradients(made, rng)
            check_backward(made, grad_out, grad_lse, relative=1e-2)
        else:
            rest = made.with_keywords(mask=np.delete(made.keywords["mask"], 5, axis=0))
            rest = Problem(
                Sizes(**{**vars(SIZES), "rows": SIZES.rows - 1}),
                type(made.query)(*(np.delete(array, 5, axis=2) for array in (made.query.argument, made.query.real))),
                made.key,
                made.value,
                rest.keywords,
            )
            check_backward(rest, *random_gradients(rest, rng))
        return
    output, logsumexp = check(made, relative=4 * 2**-24 * abs(lowest) if abs(lowest) < 1e6 else 1e-4)
    if abs(lowest) > 1e6:
        np.testing.assert_allclose(output[0, 1, 5], made.value.real[0, 0].mean(axis=0), rtol=1e-4, atol=1e-5)
    without = made.with_keywords(mask=np.zeros((1, 1), np.float32))
    shorter, _ = without.run(kv_lengths=[30])
    np.testing.assert_allclose(np.delete(output, 5, axis=2), np.delete(shorter, 5, axis=2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("highest", [1e39, 1e300, 3e38])
def test_attention__additive_mask_beyond_float32__picks_its_columns(highest, rng):
    mask = np.zeros((SIZES.rows, SIZES.columns))
    mask[:, 11] = highest
    mask[3, 12] = highest
    made = problem(rng, SIZES, mask=mask)
    output, _ = check(made)
    np.testing.assert_allclose(output[0, 0, 0], made.value.real[0, 0, 11], rtol=1e-5)
    np.testing.assert_allclose(output[0, 0, 3], made.value.real[0, 0, 11:13].mean(axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sink", [np.nan, np.inf, -np.inf, FLOAT_MAX, -FLOAT_MAX, 100.0, -100.0], ids=str)
@pytest.mark.parametrize("keywords", [{}, {"kv_lengths": [0]}, {"softcap": 3.0}])
def test_attention__special_sinks__give_what_the_formulas_say(sink, keywords, rng):
    made = problem(rng, SIZES, sinks=np.array([sink, 0.25], np.float32), **keywords)
    output, logsumexp = check(made)
    assert np.isfinite(output[:, 1]).all()
    if keywords.get("kv_lengths"):
        assert (output == 0).all()
        assert (logsumexp[0, 1] == np.float32(0.25)).all()


@pytest.mark.parametrize("slope", [np.nan, np.inf, -np.inf, FLOAT_MAX, 1e30, -1e30, 1e-40], ids=str)
def test_attention__special_slopes__give_what_the_formulas_say(slope, rng):
    check(problem(rng, SIZES, alibi_slopes=np.array([slope, 0.5], np.float32)))


@pytest.mark.parametrize("sinks", [None, [0.5, -np.inf]])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention__scores_that_are_all_minus_infinity__are_nan_without_a_sink(sinks, dtype, rng):
    made = problem(rng, SIZES, dtypes=(dtype,) * 3, sinks=None if sinks is None else np.array(sinks, DTYPES[dtype]))
    made.query.argument[0, :, 5] = 0
    made.query.argument[0, :, 5, 0] = 1
    made.key.argument[0, 0, :, 0] = -np.inf
    made.query.argument[0, :, 6:, 0] = 1
    made.query.argument[0, :, :5, 0] = 1
    output, logsumexp = check(made)
    assert np.isnan(output[0, 1]).all()
    if sinks is None:
        assert np.isnan(output).all()
        assert not np.isfinite(logsumexp).any()
    else:
        assert (output[0, 0] == 0).all()
        assert (logsumexp[0, 0] == 0.5).all()


@pytest.mark.parametrize("size", [1e10, 1e19, 1e25, 3e38])
@pytest.mark.parametrize("keywords", [{}, {"causal": True}, {"softcap": 30.0}, {"sinks": np.zeros(2, np.float32)}])
def test_attention__products_beyond_float32__give_what_the_formulas_say(size, keywords, rng):
    made = problem(rng, SIZES, **keywords)
    with np.errstate(over="ignore"):
        made.query.argument[...] = np.clip(made.query.argument.astype(np.float64) * size, -FLOAT_MAX, FLOAT_MAX)
        made.key.argument[...] = np.clip(made.key.argument.astype(np.float64) * size, -FLOAT_MAX, FLOAT_MAX)
    check(made)


@pytest.mark.parametrize("largest", [1e3, -1e5, 2e6, -1e7, 1.6e7, -1e9, 1e9, 1e10, -1e10, -1e12])
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("with_sink", [False, True])
def test_attention__close_scores_of_any_size__share_the_weight(largest, rows, with_sink, rng):
    """Scores are numbers that float32 has, next to one another: their differences are exact, however large they are."""
    sink = largest if largest <= -1e10 else 5.0  # a share for what float32 arithmetic has lost, or none
    keywords = {"sinks": np.array([sink, sink], np.float32)} if with_sink else {}
    made = problem(rng, dataclasses.replace(SIZES, rows=rows), scale=1.0, **keywords)
    step = max(1.0, float(np.spacing(np.float32(abs(largest)))))
    made.query.argument[...] = 0
    made.query.argument[..., 0] = 1
    made.key.argument[..., 0] = largest - step * (np.arange(SIZES.columns) % 3)
    check(made, relative=1e-5 if abs(largest) < 3e6 else 1e-4)


def test_attention__rows_with_a_finite_mask_first__leave_the_others_their_bits():
    """A finite number in place of -inf, in columns that fill blocks: weights of such rows follow it, and other rows' bits do not change."""
    sizes = dataclasses.replace(SIZES, columns=300)
    made, plain = (problem(np.random.default_rng(5), sizes, mask=np.zeros((1, 1, sizes.rows, sizes.columns), np.float32)) for _ in range(2))
    made.keywords["mask"][:, :, ::2, :256] = -1e9
    masked, logsumexp = made.run()
    expected, expected_logsumexp = plain.run()
    np.testing.assert_array_equal(masked[:, :, 1::2], expected[:, :, 1::2])
    np.testing.assert_array_equal(logsumexp[:, :, 1::2], expected_logsumexp[:, :, 1::2])
    check(made)


@pytest.mark.parametrize(("value_channels", "heads"), [(16, 2), (32, 1), (32, 2), (16, 1)])
@pytest.mark.parametrize("rows", [5, 16, 37])
def test_attention__nan_in_values_between_others__leaves_the_library_as_it_is(value_channels, heads, rows, rng):
    """Values are used where they lie if their rows are close; what is not finite is then taken out of a copy."""
    sizes = dataclasses.replace(SIZES, rows=rows, columns=128, heads=heads, kv_heads=heads, channels=16, value_channels=value_channels)
    made = problem(rng, sizes, layout="bshd")
    made.value.argument[0, 7, 0, 3] = made.value.real[0, 0, 7, 3] = np.nan
    for _ in range(3):
        assert_same(made.run()[0], reference.forward(*made.real, made.options).output, "output")


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("first", [-1e20, 1e20])
@pytest.mark.parametrize("second", [-1e20, 1e20, 2e20, -2e20])
def test_attention__partial_sums_beyond_float32__give_what_the_formulas_say(first, second, softcap, rng):
    """Products of one key overflow, in its favour, against it, or cancel; those of the others do not."""
    made = problem(rng, SIZES, softcap=softcap, scale=1.0)
    made.query.argument[...] = 0
    made.query.argument[..., :2] = 1e20
    made.key.argument[...] *= np.float32(1e-20)
    made.key.argument[0, 0, 33, :2] = first, second
    check(made)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention__values_at_the_limit_of_the_type__do_not_overflow(dtype, rng):
    made = problem(rng, SIZES, dtypes=(dtype,) * 3)
    limit = float(np.finfo(np.float32).max) if dtype == "float32" else float(np.finfo(np.float16).max) if dtype == "float16" else 3.3e38
    made.value.argument[...] = limit
    output, _ = made.run()
    np.testing.assert_allclose(output.astype(np.float64), limit, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_attention__denormal_values__are_read_or_flushed(dtype, rng):
    made = problem(rng, SIZES, dtypes=(dtype,) * 3)
    smallest = {"float32": 1e-40, "float16": 6e-7, "bfloat16": 1e-40, "float64": 1e-310}[dtype]
    made.value.argument[...] = smallest
    output, _ = made.run()
    expected = float(made.value.argument[0, 0, 0, 0])
    assert expected > 0
    output = output.astype(np.float64)
    if dtype == "float16":  # denormals of float16 are numbers in float32
        np.testing.assert_allclose(output, expected, rtol=1e-6)
    else:
        assert ((output == 0) | (np.abs(output - expected) <= 0.02 * expected)).all()


@pytest.mark.parametrize("softcap", [1e-300, 1e-40, 1e-30, 1e-3, 1e3, 1e6, 1e30, 3e38, 1e300], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_attention__extreme_softcaps__give_what_the_formulas_say(softcap, backward, rng):
    made = problem(rng, SIZES, softcap=softcap)
    if backward:
        check_backward(made, *random_gradients(made, rng))
    else:
        check(made)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-300, 1e-38, 1e38, 1e39, 1e300])
def test_attention__special_scales__give_what_the_formulas_say(scale, value, rng):
    made = problem(rng, SIZES, scale=scale)
    check(made)
    made.key.argument[0, 0, 3, 1] = value
    check(made)


@pytest.mark.parametrize("code", ["int8", "int4"])
def test_attention__large_zero_points__are_subtracted_in_64_bits(code, rng):
    low, high = reference.INT_LIMITS[code]
    codes = rng.integers(low, high + 1, SIZES.key)
    data = codes.astype(np.int8) if code == "int8" else reference.pack_int4(codes)
    query = rng.normal(size=SIZES.query).astype(np.float32)
    for zero_point in (-(2**31), 2**31 - 1, 1000, -1000):
        scale = np.float32(2.0**-31)
        key = umfa.QuantizedTensor(data, np.asarray(scale), np.asarray(zero_point, np.int32), shape=SIZES.key, granularity="tensor")
        real = reference.dequantize(reference.Quantized(codes, np.asarray(scale), np.asarray(zero_point, np.int32), None, "tensor"))
        output, logsumexp = umfa.attention(query, key, key, return_lse=True, scale=1.0)
        exact = reference.forward(query, real, real, reference.Options(1.0))
        assert_same(output, exact.output, "output", 1e-5)
        assert_same(logsumexp, exact.logsumexp, "logsumexp", 1e-5)


@pytest.mark.parametrize("scale", [1e-38, 1e30, 3e38])
def test_attention__extreme_scales_of_codes__give_what_the_formulas_say(scale, rng):
    codes = rng.integers(-100, 101, SIZES.key)
    value = umfa.QuantizedTensor(codes.astype(np.int8), np.asarray(scale, np.float32), granularity="tensor")
    made = problem(rng, SIZES)
    output = umfa.attention(made.query.argument, made.key.argument, value)
    # What the codes stand for is rounded to float32, and may overflow there.
    real = reference.dequantize(reference.Quantized(codes, np.asarray(scale, np.float32), None, None, "tensor"))
    exact = reference.forward(made.query.real, made.key.real, real, made.options)
    assert_same(output, exact.output, "output", 1e-4)
