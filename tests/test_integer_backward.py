"""The backward kernels that multiply codes as integers: as near as 16 bits allow, or as the output that they are given is."""

from __future__ import annotations

import numpy as np
import pytest

import umfa
from cases import OPTIONS, Problem, Sizes, quantized_operand, smoothed_problem
from test_backward import random_gradients
from test_properties import bits

NAMES = ("query", "key", "value")
MANY_TILES = Sizes(batch=2, heads=4, kv_heads=2, rows=200, columns=211, channels=35, value_channels=24)


@pytest.fixture(scope="module", params=("avx2", "avxvnni", "avx512", "avx512vnni"))
def contexts(request, integer_contexts):
    """Contexts with integer kernels by their number of threads, and "reference", one with the reference kernels."""
    return integer_contexts(request.param, (1, 2, 3, 16))


def codes_problem(rng, sizes=MANY_TILES, dtypes=("int8",) * 3, granularities=("token",) * 3, **keywords) -> Problem:
    """A problem on codes without zero points."""
    shapes = (sizes.query, sizes.key, sizes.value)
    operands = [quantized_operand(rng, *each[:2], granularity=each[2]) for each in zip(shapes, dtypes, granularities)]
    return Problem(sizes, *operands, keywords, "int8", "float32")


def gradients(made: Problem, context, out=None, lse=None, seed=0):
    """Gradients by name, from an output and logsumexp that are given."""
    grad_out, grad_lse = random_gradients(made, np.random.default_rng(seed))
    results = umfa.attention_backward(grad_out, *made.arguments, out, lse, **made.keywords, grad_lse=grad_lse, context=context)
    return dict(zip(NAMES, results))


def check(made: Problem, contexts, count=2, share=2e-3):
    """Without an output: within the rounding of two factors to 16 bits. With that of integer kernels: within a tenth of its rounding."""
    out, lse = made.run(context=contexts["reference"])
    expected = gradients(made, contexts["reference"], out, lse)
    for given, allowed in ((None, 5e-4), (out, 5e-4), (made.run(context=contexts[count])[0], share)):
        got = gradients(made, contexts[count], given, lse)
        for name in NAMES:
            difference = np.sqrt(np.mean((got[name] - expected[name]) ** 2) / np.mean(expected[name] ** 2))
            assert difference < allowed, f"gradient of {name}, {'no' if given is None else 'an'} output"
        assert bits(*got.values()) != bits(*expected.values()), "the integer kernel must have run"


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("scale_zero", "dropout_all")])
def test_attention_backward__each_option_on_codes__is_within_their_rounding(option, contexts, rng):
    check(codes_problem(rng).with_keywords(**OPTIONS[option](rng, MANY_TILES, np.float32)), contexts, share=2e-2)


@pytest.mark.parametrize("dtypes", [("int8", "int4", "int4"), ("int4",) * 3, ("int4", "int8", "int8")], ids="-".join)
@pytest.mark.parametrize("granularities", [("tensor",) * 3, ("head", "block", "token")], ids="-".join)
def test_attention_backward__each_mix_of_codes__is_within_their_rounding(dtypes, granularities, contexts, rng):
    check(codes_problem(rng, dtypes=dtypes, granularities=granularities, causal=True), contexts, share=2e-2)


@pytest.mark.parametrize("channels", [1, 2, 17, 64, 128, 129, 1024])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 131), (97, 95), (64, 257)])
def test_attention_backward__head_sizes_and_tiles_of_codes__are_within_their_rounding(channels, rows, columns, contexts, rng):
    sizes = Sizes(batch=1, heads=2, kv_heads=1, rows=rows, columns=columns, channels=channels, value_channels=min(channels + 3, 1024))
    check(codes_problem(rng, sizes, sinks=np.zeros(2, np.float32)), contexts, count=1, share=3e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_backward__smoothed_and_rotated_keys__are_within_their_rounding(causal, contexts, rng):
    sizes = Sizes(rows=140, columns=150, channels=32, value_channels=32)
    check(smoothed_problem(rng, sizes, causal=causal), contexts, share=2e-2)


@pytest.mark.parametrize("option", ["plain", "causal_lower_right", "lengths", "mask_bool", "dropout"])
def test_attention_backward__any_number_of_threads_over_tiles_of_codes__gives_the_same_bits(option, contexts, rng):
    made = codes_problem(rng).with_keywords(**OPTIONS[option](rng, MANY_TILES, np.float32))
    out, lse = made.run(context=contexts[1])
    first = bits(*gradients(made, contexts[1], out, lse).values())
    for count in (1, 2, 3, 16):
        assert bits(*gradients(made, contexts[count], out, lse).values()) == first, f"{count} threads"


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("with_output", [False, True])
def test_attention_backward__an_output_gradient_that_is_not_finite__reaches_only_what_its_row_attends(poison, with_output, contexts, rng):
    sizes = Sizes(batch=1, heads=1, kv_heads=1, rows=200, columns=210, channels=24, value_channels=24)
    made = codes_problem(rng, sizes, causal=True)
    out, lse = made.run(context=contexts[2])
    grad_out = rng.normal(size=sizes.output).astype(np.float32)
    results = []
    for value in (1.0, poison):
        grad_out[0, 0, 130, 3] = value
        given = out if with_output else None
        results.append(umfa.attention_backward(grad_out, *made.arguments, given, lse, causal=True, context=contexts[2]))
    (query, key, value), (query_before, key_before, value_before) = results[1], results[0]
    others = np.arange(200) != 130
    assert not np.isfinite(query[0, 0, 130]).any()
    assert query[0, 0, others].tobytes() == query_before[0, 0, others].tobytes()
    assert not np.isfinite(key[0, 0, :131]).any()
    assert key[0, 0, 131:].tobytes() == key_before[0, 0, 131:].tobytes()
    assert not np.isfinite(value[0, 0, :131, 3]).any()
    assert np.delete(value, 3, axis=-1).tobytes() == np.delete(value_before, 3, axis=-1).tobytes()


def test_attention_backward__zeros_and_tiny_output_gradients__give_tiny_gradients(contexts, rng):
    made = codes_problem(rng)
    out, lse = made.run(context=contexts[2])
    for size in (0.0, 1e-30, 1e-38):
        grad_out = (size * rng.normal(size=made.sizes.output)).astype(np.float32)
        for gradient in umfa.attention_backward(grad_out, *made.arguments, out, lse, context=contexts[2]):
            assert np.abs(gradient).max() <= 1e4 * size
