"""The backward kernels of one pass: tiles beyond the first, and query gradients to which many items add in turn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import umfa
from cases import CODES, DTYPES, OPTIONS, Sizes, problem, problem_with
from conftest import THREAD_COUNTS
from test_backward import check, random_gradients, run_backward
from test_properties import bits, part

OPERANDS = ("query", "key", "value")
MANY_TILES = Sizes(batch=2, heads=4, kv_heads=2, rows=230, columns=310, channels=24, value_channels=40)


def gradients_of(made, context=None, names=OPERANDS):
    """Gradients by name."""
    grad_out, grad_lse = random_gradients(made, np.random.default_rng(0))
    return run_backward(made, grad_out, grad_lse, names, context=context)


@pytest.mark.parametrize("option", OPTIONS)
def test_attention_backward__each_option_over_many_tiles__equals_the_reference(option):
    check(problem_with(option, seed=3, sizes=MANY_TILES))


@pytest.mark.parametrize("channels", [64, 65, 128, 129])
def test_attention_backward__each_size_of_tiles__equals_the_reference(channels):
    sizes = Sizes(batch=1, heads=1, kv_heads=1, rows=200, columns=199, channels=channels, value_channels=channels)
    check(problem_with("causal", sizes=sizes))


@pytest.mark.parametrize("option", ["plain", "causal", "causal_lengths_lower_right", "window", "mask_bool", "all"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int4"])
def test_attention_backward__any_number_of_threads_over_many_tiles__gives_the_same_bits(option, dtype, contexts):
    made = problem_with(option, sizes=MANY_TILES, dtypes=(dtype,) * 3)
    first = bits(*gradients_of(made, contexts[1]).values())
    for count in THREAD_COUNTS[1:]:
        assert bits(*gradients_of(made, contexts[count]).values()) == first, f"{count} threads"


@pytest.mark.parametrize("option", ["plain", "causal_offsets", "lengths", "window", "mask_additive"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_backward__many_tiles_alone_or_in_a_batch__give_the_same_bits(option, dtype):
    made = problem_with(option, sizes=MANY_TILES, dtypes=(dtype,) * 3)
    grad_out, grad_lse = random_gradients(made, np.random.default_rng(0))
    together = run_backward(made, grad_out, grad_lse, OPERANDS)
    for index in range(made.sizes.batch):
        alone = run_backward(part(made, index), grad_out[index : index + 1], grad_lse[index : index + 1], OPERANDS)
        assert bits(*alone.values()) == bits(*(gradient[index] for gradient in together.values()))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "keywords",
    [
        {"causal": "lower_right", "kv_lengths": [5, 0]},
        {"causal": True, "query_offset": -150},
        {"causal": True, "query_offset": 400},
        {"window": (3, 3)},
        {"window": (100, 0), "query_offset": [90, -200]},
        {"kv_lengths": [0, 97]},
        {"mask": np.arange(310) // 96 == 1},
        {"mask": np.arange(310) // 96 != 0, "causal": True},
    ],
    ids=lambda keywords: " ".join(keywords),
)
def test_attention_backward__tiles_that_are_skipped__are_waited_for_by_none(keywords, count, contexts, rng):
    check(problem(rng, MANY_TILES, **keywords), context=contexts[count])
    check(problem(rng, MANY_TILES, dtypes=("float16",) * 3, **keywords), context=contexts[count])


@pytest.mark.parametrize("names", [names for count in (1, 2) for names in itertools.combinations(OPERANDS, count)], ids="-".join)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_attention_backward__a_part_of_the_gradients_over_many_tiles__is_what_it_is_among_all(names, dtype, contexts):
    made = problem_with("causal", sizes=MANY_TILES, dtypes=(dtype,) * 3)
    everything, some = gradients_of(made), gradients_of(made, contexts[2], names)
    assert list(some) == list(names)
    for name, gradient in some.items():
        assert gradient.tobytes() == everything[name].tobytes()


@pytest.mark.parametrize("dtype", [*DTYPES, *CODES])
def test_attention_backward__more_threads_than_processors__ends_with_the_same_bits(dtype, contexts):
    sizes = Sizes(batch=1, heads=1, kv_heads=1, rows=400, columns=1700, channels=8, value_channels=8)
    made = problem_with("causal_lower_right", sizes=sizes, dtypes=(dtype,) * 3)
    first = bits(*gradients_of(made, contexts[1]).values())
    with umfa.MFAContext(device="cpu", num_threads=16) as crowd:
        for _ in range(5):
            assert bits(*gradients_of(made, crowd).values()) == first


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("operand", ["query", "key", "value", "grad_out"])
@pytest.mark.parametrize("place", ["excluded", "attended"])
def test_attention_backward__what_is_not_finite_in_a_later_tile__reaches_only_what_attends_it(place, operand, poison, rng):
    """Rows from 120 on attend columns from 150 on; a poisoned row or column is on one side of that, or has nothing to attend."""
    sizes = Sizes(batch=1, heads=1, kv_heads=1, rows=230, columns=310, channels=24, value_channels=24)
    mask = np.ones((230, 310), bool)
    mask[:120, 150:] = False
    at = {"query": 130, "grad_out": 130, "key": 200, "value": 200}[operand]
    if place == "excluded":
        mask[at, :] &= operand in ("key", "value")
        mask[:, at] &= operand in ("query", "grad_out")
    tensors = {name: rng.normal(size=sizes.query if name in ("query", "grad_out") else sizes.key) for name in ("query", "key", "value")}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    tensors["grad_out"] = rng.normal(size=sizes.output).astype(np.float32)

    def gradients(given):
        operands = [given[name] for name in OPERANDS]
        out, lse = umfa.attention(*operands, mask=mask, return_lse=True)
        return umfa.attention_backward(given["grad_out"], *operands, out, lse, mask=mask)

    clean = gradients(tensors)
    poisoned = {name: array.copy() for name, array in tensors.items()}
    poisoned[operand][0, 0, at, 3] = poison
    for one, other, name in zip(gradients(poisoned), clean, OPERANDS):
        if place == "excluded":
            assert one.tobytes() == other.tobytes(), name
        elif name == "query":
            touched = np.arange(230) >= 120 if operand in ("key", "value") else np.arange(230) == at
            assert np.isfinite(one[0, 0, ~touched]).all()
            assert one[0, 0, ~touched].tobytes() == other[0, 0, ~touched].tobytes()
            assert not np.isfinite(one[0, 0, touched]).all()
