"""Calls that repeat the one before: what they reuse must never be seen."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

import umfa

CALLS = {
    "plain": {},
    "causal": {"causal": True},
    "lower right": {"causal": "lower_right"},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "layout": {"layout": "bshd"},
    "window": {"window": (1, 1)},
    "mask": {"mask": np.tri(6, 6, dtype=bool)},
    "dropout": {"dropout_p": 0.5, "seed": 3},
    "quantised": {"quantize": "int8"},
    "offset": {"query_offset": 2, "causal": True},
}


def operands(rng, shape=(2, 6, 6, 4), dtype=np.float32):
    return [rng.normal(size=shape).astype(dtype) for _ in range(3)]


@pytest.mark.parametrize("second", CALLS)
@pytest.mark.parametrize("first", CALLS)
def test_attention__one_call_after_another__gives_what_it_gives_alone(first, second, rng):
    q, k, v = operands(rng)
    other = operands(rng)
    alone = umfa.attention(q, k, v, return_lse=True, **CALLS[second])[0]  # a call that wants logsumexp reuses nothing
    for _ in range(2):
        umfa.attention(*other, **CALLS[first])
    for _ in range(2):
        assert umfa.attention(q, k, v, **CALLS[second]).tobytes() == alone.tobytes()


@pytest.mark.parametrize("change", ["dtype", "shape", "kv", "strides", "read-only", "integer scale"])
def test_attention__arrays_of_another_kind__are_not_taken_for_the_last_ones(change, rng):
    before = q, k, v = operands(rng)
    keywords = {}
    if change == "dtype":
        q = q.astype(np.float16)
    elif change == "shape":
        q = q[:, :, :5].copy()
    elif change == "kv":
        k, v = k[:, :3].copy(), v[:, :3].copy()
    elif change == "strides":
        q = np.asfortranarray(q)
    elif change == "read-only":
        q = q.copy()
        q.flags.writeable = False
    else:
        keywords["scale"] = 1
    expected = umfa.attention(q, k, v, return_lse=True, **keywords)[0]
    for _ in range(2):  # right before, since a call of another kind forgets them
        umfa.attention(*before)
    got = umfa.attention(q, k, v, **keywords)
    assert got.dtype == expected.dtype
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("which", range(3))
def test_attention__contiguous_arrays_after_others_of_their_shape__are_read_as_they_lie(which, rng):
    contiguous, other = operands(rng), operands(rng)
    other[which] = np.asfortranarray(other[which])
    expected = umfa.attention(*contiguous, return_lse=True)[0]
    for _ in range(2):
        umfa.attention(*other)
    assert umfa.attention(*contiguous).tobytes() == expected.tobytes()


def test_attention__an_unaligned_array_in_a_repeated_call__is_refused_as_in_the_first(rng):
    q, k, v = operands(rng)
    unaligned = np.frombuffer(bytes(k.nbytes + 1), np.uint8)[1:].view(np.float32).reshape(k.shape)
    for _ in range(2):
        umfa.attention(q, k, v)
    with pytest.raises(umfa.InvalidArgumentError, match=r"^umfa\.attention: k: expected aligned elements, got an unaligned array"):
        umfa.attention(q, unaligned, v)


class EqualToAll:
    """Also to what a call before was given."""

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0


@pytest.mark.parametrize("argument", ["layout", "causal", "scale", "softcap", "dropout_p", "seed", "dropout_offset", "return_lse"])
def test_attention__a_repeated_call_with_an_object_that_equals_all__is_refused(argument, rng):
    q, k, v = operands(rng)
    for _ in range(2):
        umfa.attention(q, k, v)
    with pytest.raises(umfa.InvalidTypeError, match=f"umfa.attention: {argument}: "):
        umfa.attention(q, k, v, **{argument: EqualToAll()})


def test_attention__repeated_calls__keep_no_array(rng):
    q, k, v = operands(rng)
    before = [sys.getrefcount(array) for array in (q, k, v)]
    for _ in range(3):
        result = umfa.attention(q, k, v)
    for strange in (np.asfortranarray(q), q[:, :, :5].copy()):
        umfa.attention(strange, k, v)
        assert sys.getrefcount(strange) == 3  # this name, the loop's tuple, the argument
    assert [sys.getrefcount(array) for array in (q, k, v)] == before
    assert sys.getrefcount(result) == 2


def test_attention__results_of_repeated_calls__do_not_share_memory(rng):
    q, k, v = operands(rng)
    results = [umfa.attention(q, k, v) for _ in range(4)]
    kept = results[1].copy()
    results[2][:] = 0
    assert not any(np.shares_memory(one, other) for one in results for other in results if one is not other)
    assert results[1].tobytes() == kept.tobytes()


def test_attention__a_repeated_call_on_a_closed_context__is_refused(rng):
    q, k, v = operands(rng)
    context = umfa.MFAContext(device="cpu", num_threads=1)
    for _ in range(2):
        umfa.attention(q, k, v, context=context)
    context.close()
    with pytest.raises(umfa.InvalidContextError):
        umfa.attention(q, k, v, context=context)


def test_attention__errors_of_repeated_calls__are_those_of_the_first(rng):
    q, k, v = operands(rng)
    for _ in range(2):
        with pytest.raises(umfa.InvalidDimensionsError, match="num_heads"):
            umfa.attention(q, k[:, :4].copy(), v[:, :4].copy())
        with pytest.raises(umfa.InvalidArgumentError):
            umfa.attention(q, k, v, scale=float("nan"))


def test_attention__repeated_in_threads__never_mixes_their_arrays(rng):
    made = [operands(rng) for _ in range(4)]
    expected = [umfa.attention(*each, return_lse=True)[0].tobytes() for each in made]
    wrong = []

    def work(index):
        for _ in range(300):
            if umfa.attention(*made[index]).tobytes() != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
