"""Backward against the reference's formulas, and against finite differences of the library's own forward in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import umfa
from cases import CODES, DTYPES, OPTIONS, STYLES, Sizes, place, problem, problem_with, to_layout
from test_forward import problems
from test_reference import finite_differences
from tolerances import assert_within

NAMES = ("query", "key", "value", "mask", "sinks", "alibi_slopes")


def names_of(made) -> tuple[str, ...]:
    """The gradients that a problem has."""
    names = list(NAMES[:3])
    mask = made.keywords.get("mask")
    if mask is not None and mask.dtype != bool:
        names.append("mask")
    return (*names, *(name for name in NAMES[4:] if made.keywords.get(name) is not None))


def random_gradients(made, rng):
    """A gradient of the output in its type and layout, and one of logsumexp."""
    grad_out = to_layout(rng.normal(size=made.sizes.output).astype(DTYPES[made.output_dtype]), made.layout)
    return grad_out, rng.normal(size=made.sizes.statistics).astype(np.float64 if made.arithmetic == "float64" else np.float32)


def run_backward(made, grad_out, grad_lse=None, names=None, **others):
    """Gradients by name, those of operands ``[batch, heads, tokens, channels]``."""
    import umfa

    out, lse = umfa.attention(*made.arguments, **made.keywords, context=others.get("context"), return_lse=True)
    names = names_of(made) if names is None else names
    results = umfa.attention_backward(
        grad_out, *made.arguments, out, lse, **{**made.keywords, "grad_lse": grad_lse, "gradients": names, **others}
    )
    assert len(results) == len(names)
    return {name: to_layout(result, made.layout) if name in NAMES[:3] else result for name, result in zip(names, results)}


def check(made, seed: int = 0, with_lse: bool = True, **others):
    """Compare all gradients of a problem with the reference."""
    import reference

    grad_out, grad_lse = random_gradients(made, np.random.default_rng(seed))
    if not with_lse:
        grad_lse = None
    got = run_backward(made, grad_out, grad_lse, **others)
    real_grad = to_layout(grad_out, made.layout).astype(np.float64)
    exact = reference.backward(*made.real, real_grad, made.options, grad_lse)
    bounds = made.bounds.gradients(real_grad, grad_lse, dtypes={name: str(gradient.dtype) for name, gradient in got.items()})
    for name, gradient in got.items():
        assert_within(gradient, exact[name], bounds[name], f"gradient of {name}")
    return got


@pytest.mark.parametrize("option", OPTIONS)
def test_attention_backward__each_option__equals_the_reference(option):
    check(problem_with(option))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8", "int4"])
def test_attention_backward__each_option_and_type__equals_the_reference(option, dtype):
    check(problem_with(option, seed=1, dtypes=(dtype,) * 3, sizes=Sizes(rows=7, columns=70, channels=24, value_channels=24)))


@pytest.mark.parametrize("dtypes", list(itertools.product(("float32", "bfloat16", "int8", "int4", "float64"), repeat=3)), ids="-".join)
def test_attention_backward__each_mix_of_types__equals_the_reference(dtypes):
    check(problem(np.random.default_rng(2), Sizes(channels=11), dtypes=dtypes, causal=True))


@pytest.mark.parametrize("channels", [1, 3, 17, 64, 65, 200, 1024])
@pytest.mark.parametrize("value_channels", [1, 64, 1024])
def test_attention_backward__head_sizes__equal_the_reference(channels, value_channels):
    sizes = Sizes(batch=1, heads=2, kv_heads=1, rows=9, columns=21, channels=channels, value_channels=value_channels)
    check(problem(np.random.default_rng(channels), sizes))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 70), (70, 1), (64, 64), (65, 63), (33, 257), (130, 129)])
def test_attention_backward__lengths_around_tiles__equal_the_reference(rows, columns):
    check(problem(np.random.default_rng(4), Sizes(batch=1, rows=rows, columns=columns), causal="lower_right"))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_attention_backward__strides__equal_the_reference(layout, style, dtype):
    sizes = Sizes(channels=13, value_channels=8)
    check(problem(np.random.default_rng(5), sizes, dtypes=(dtype,) * 3, styles=(style,) * 3, layout=layout, causal=True))


@pytest.mark.parametrize("style", STYLES)
def test_attention_backward__strided_gradients_and_results__change_no_bit(style, rng):
    made = problem(rng, Sizes(heads=2, kv_heads=2))
    out, lse = umfa.attention(*made.arguments, return_lse=True)
    grad_out = place(rng.normal(size=made.sizes.output).astype(np.float32), style, rng)
    grad_lse = place(rng.normal(size=made.sizes.statistics).astype(np.float32), style, rng)
    strided = umfa.attention_backward(
        grad_out, *made.arguments, place(out, "permuted", rng), place(lse, "permuted", rng), grad_lse=grad_lse
    )
    plain = umfa.attention_backward(np.ascontiguousarray(grad_out), *made.arguments, out, lse, grad_lse=np.ascontiguousarray(grad_lse))
    for one, other in zip(strided, plain):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_attention_backward__grouped_heads__sum_over_the_group(kv_heads):
    check(problem(np.random.default_rng(6), Sizes(heads=6, kv_heads=kv_heads)))


@pytest.mark.parametrize(
    "shape", [(), (1,), (37,), (19, 1), (19, 37), (4, 1, 1), (1, 19, 37), (2, 1, 1, 37), (1, 4, 19, 1), (2, 4, 19, 37)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_attention_backward__masks_that_broadcast__sum_over_their_axes(shape, dtype, rng):
    got = check(problem(rng, mask=np.asarray(rng.normal(size=shape)).astype(dtype)))
    assert got["mask"].shape == shape
    assert got["mask"].dtype == dtype


@pytest.mark.parametrize("names", [("key",), ("value", "query"), ("sinks",), ("mask", "key"), ("alibi_slopes", "mask", "sinks"), NAMES])
def test_attention_backward__a_part_of_the_gradients__is_what_it_is_among_all(names):
    made = problem_with("all")
    grad_out, grad_lse = random_gradients(made, np.random.default_rng(1))
    everything = run_backward(made, grad_out, grad_lse, NAMES)
    some = run_backward(made, grad_out, grad_lse, names)
    assert list(some) == list(names)
    for name, gradient in some.items():
        assert gradient.tobytes() == everything[name].tobytes()


@pytest.mark.parametrize("option", ["plain", "causal", "softcap", "dropout"])
def test_attention_backward__without_a_gradient_of_logsumexp__is_that_of_zeros(option):
    made = problem_with(option)
    check(made, with_lse=False)
    grad_out, grad_lse = random_gradients(made, np.random.default_rng(1))
    absent, zero = run_backward(made, grad_out), run_backward(made, grad_out, np.zeros_like(grad_lse))
    for name in absent:
        assert (absent[name] == zero[name]).all()


@pytest.mark.parametrize("dtype", [*DTYPES, *CODES])
def test_attention_backward__each_type__gradients_have_the_inputs_type_or_float32(dtype, rng):
    made = problem(rng, dtypes=(dtype, "float32", dtype))
    grad_out, _ = random_gradients(made, rng)
    got = run_backward(made, grad_out)
    expected = np.float32 if dtype in CODES else DTYPES[dtype]
    assert [gradient.dtype for gradient in got.values()] == [expected, np.float32, expected]


def test_attention_backward__packed_codes__gradients_have_the_shape_of_the_values(rng):
    made = problem(rng, Sizes(channels=13), dtypes=("int4",) * 3)
    grad_out, _ = random_gradients(made, rng)
    got = run_backward(made, grad_out)
    assert got["query"].shape == made.sizes.query
    assert got["key"].shape == made.sizes.key


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["kv_lengths", "mask"])
def test_attention_backward__empty_rows__only_the_sink_gets_the_gradient_of_logsumexp(sinks, name, rng):
    values = np.array([-1.0, -np.inf, 0.5, 30.0], np.float32)
    keywords = {"kv_lengths": [0, 0]} if name == "kv_lengths" else {"mask": np.full((1, 1), -np.inf, np.float32)}
    made = problem(rng, **keywords, **({"sinks": values} if sinks else {}))
    grad_out, grad_lse = random_gradients(made, rng)
    got = run_backward(made, grad_out, grad_lse)
    for operand in ("query", "key", "value", *(["mask"] if name == "mask" else [])):
        assert (got[operand] == 0).all()
    if sinks:
        expected = grad_lse.astype(np.float64).sum(axis=(0, 2)) * (values > -np.inf)
        np.testing.assert_allclose(got["sinks"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [Sizes(columns=0), Sizes(rows=0), Sizes(batch=0)], ids=["columns", "rows", "batch"])
def test_attention_backward__empty_dimensions__give_zeros(sizes, rng):
    made = problem(rng, sizes, sinks=np.ones(4, np.float32), alibi_slopes=np.ones(4, np.float32), mask=np.zeros((1, 1), np.float32))
    grad_out, grad_lse = random_gradients(made, rng)
    got = run_backward(made, grad_out, np.zeros_like(grad_lse))
    assert got["key"].shape == sizes.key
    for name, gradient in got.items():
        assert (gradient == 0).all(), name


FULL = {
    "softcap": 1.5,
    "causal": True,
    "query_offset": [2, 3],
    "window": (4, -1),
    "kv_lengths": [6, 5],
    "dropout_p": 0.25,
    "seed": 11,
    "scale": 0.75,
}


@pytest.mark.parametrize("name", NAMES)
def test_attention_backward__float64__equals_finite_differences_of_forward(name, rng):
    sizes = Sizes(heads=4, kv_heads=2, rows=3, columns=6, channels=5, value_channels=2)
    tensors = {"query": rng.normal(size=sizes.query), "key": rng.normal(size=sizes.key), "value": rng.normal(size=sizes.value)}
    tensors |= {"mask": rng.normal(size=(1, 4, 3, 1)), "sinks": rng.normal(size=4), "alibi_slopes": rng.uniform(0.1, 0.5, 4)}
    grad_out, grad_lse = rng.normal(size=sizes.output), rng.normal(size=sizes.statistics)

    def forward(given):
        words = {option: given[option] for option in NAMES[3:]}
        return umfa.attention(*(given[operand] for operand in NAMES[:3]), **words, **FULL, return_lse=True)

    def loss(array):
        output, lse = forward({**tensors, name: array})
        return (output * grad_out).sum() + (lse * grad_lse).sum()

    (gradient,) = umfa.attention_backward(
        grad_out,
        *(tensors[operand] for operand in NAMES[:3]),
        *forward(tensors),
        **{option: tensors[option] for option in NAMES[3:]},
        **FULL,
        grad_lse=grad_lse,
        gradients=(name,),
    )
    expected = finite_differences(loss, tensors[name])
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)


def test_attention_backward__quantised_operands__is_straight_through(rng):
    made = problem(rng, dtypes=("int8", "int4", "int8"), causal=True)
    grad_out, _ = random_gradients(made, rng)
    quantised = run_backward(made, grad_out)
    real = [tensor.astype(np.float32) for tensor in made.real]
    out, lse = umfa.attention(*real, causal=True, return_lse=True)
    expected = umfa.attention_backward(grad_out, *real, out, lse, causal=True)
    for name, gradient in zip(NAMES, expected):
        np.testing.assert_allclose(quantised[name], gradient, rtol=1e-4, atol=1e-5)


@given(problems(), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=100 if settings().max_examples < 100 else settings().max_examples)
def test_attention_backward__anything__equals_the_reference(made, seed, with_lse):
    check(made, seed, with_lse)
