"""The reference itself: known answers, numbers computed by hand, and its gradients against finite differences."""

from __future__ import annotations

import numpy as np
import pytest

import reference


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox__published_vectors__known_answers(counter, key, expected):
    assert [int(word) for word in reference.philox(counter, key)] == list(expected)


def test_dropout_factors__element_by_element__follow_the_counter():
    options = reference.Options(1.0, dropout_p=0.25, seed=0x0123456789ABCDEF, dropout_offset=7)
    factors = reference.dropout_factors((2, 3, 5, 11), options)
    for b, h, i, j in np.ndindex(factors.shape):
        words = reference.philox((j >> 2, i, b * 3 + h, 7), (0x89ABCDEF, 0x01234567))
        assert factors[b, h, i, j] == (1 / 0.75 if int(words[j & 3]) >= 2**30 else 0.0)
    assert 0 < np.count_nonzero(factors) < factors.size


def test_forward__two_keys__as_computed_by_hand():
    query, key = np.array([[[[1.0]]]]), np.array([[[[0.0], [np.log(3.0)]]]])
    value = np.array([[[[4.0], [8.0]]]])
    result = reference.forward(query, key, value, reference.Options(1.0))
    assert result.output.item() == pytest.approx(7.0)
    assert result.logsumexp.item() == pytest.approx(np.log(4.0))
    result = reference.forward(query, key, value, reference.Options(1.0, sinks=np.array([np.log(4.0)])))
    assert result.output.item() == pytest.approx(3.5)
    assert result.logsumexp.item() == pytest.approx(np.log(8.0))


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"causal": True}, ["100", "110"]),
        ({"causal": True, "lower_right": True}, ["110", "111"]),
        ({"causal": True, "query_offset": -1}, ["000", "100"]),
        ({"window": (0, 1)}, ["110", "011"]),
        ({"window": (-1, 0), "query_offset": 1}, ["110", "111"]),
        ({"kv_lengths": [2]}, ["110", "110"]),
        ({"kv_lengths": [2], "causal": True, "lower_right": True}, ["100", "110"]),
        ({"mask": np.array([[0.0, -np.inf, -1e300]])}, ["101", "101"]),
        ({"mask": np.array([[True, False, True]]), "causal": True}, ["100", "100"]),
    ],
)
def test_forward__options_that_exclude__exclude_the_columns_of_the_formulas(keywords, expected):
    tensors = np.ones((1, 1, 2, 1)), np.ones((1, 1, 3, 1)), np.ones((1, 1, 3, 1))
    attended = reference.forward(*tensors, reference.Options(1.0, **keywords)).attended[0, 0]
    assert ["".join("01"[int(column)] for column in row) for row in attended] == expected


def _full_problem(seed: int):
    """A problem with all options at once, and one without any that is not smooth in the inputs."""
    rng = np.random.default_rng(seed)
    query, key, value = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(2, 2, 6, 5)), rng.normal(size=(2, 2, 6, 2))
    options = {
        "softcap": 1.5,
        "mask": rng.normal(size=(1, 4, 3, 1)),
        "causal": True,
        "query_offset": [2, 3],
        "window": (4, -1),
        "kv_lengths": [6, 5],
        "alibi_slopes": rng.uniform(0.1, 0.5, 4),
        "sinks": rng.normal(size=4),
        "dropout_p": 0.3,
        "seed": 11,
    }
    return query, key, value, options, rng.normal(size=(2, 4, 3, 2)), rng.normal(size=(2, 4, 3))


@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "sinks", "alibi_slopes"])
def test_backward__all_options__equals_finite_differences(name):
    query, key, value, keywords, grad_output, grad_logsumexp = _full_problem(3)
    tensors = {"query": query, "key": key, "value": value, **keywords}

    def loss(array):
        given = {**tensors, name: array}
        options = reference.Options(0.7, **{option: given[option] for option in keywords})
        result = reference.forward(given["query"], given["key"], given["value"], options)
        return (result.output * grad_output).sum() + (result.logsumexp * grad_logsumexp).sum()

    gradients = reference.backward(query, key, value, grad_output, reference.Options(0.7, **keywords), grad_logsumexp)
    expected = finite_differences(loss, tensors[name])
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradients[name], expected, rtol=1e-6, atol=1e-8)


def finite_differences(function, array, step: float = 1e-5):
    """The gradient of a scalar function, by central differences."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        moved = array.copy()
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


def test_backward__all_options__d_values_are_the_row_sums_of_output():
    query, key, value, keywords, grad_output, _ = _full_problem(4)
    options = reference.Options(0.7, **keywords)
    output = reference.forward(query, key, value, options).output
    d_values = reference.backward(query, key, value, grad_output, options)["d_values"]
    np.testing.assert_allclose(d_values, (grad_output * output).sum(axis=-1), rtol=1e-12, atol=1e-12)


def test_quantize__symmetric__as_computed_by_hand():
    values = np.array([1.27, -0.635, 0.005, 0.015], np.float32).reshape(1, 1, 2, 2)
    quantized = reference.quantize(values, "int8")
    assert quantized.scales == np.float32(1.27) / np.float32(127)
    assert quantized.codes.ravel()[:2].tolist() == [127, -64]  # -63.5 goes to the even neighbour
    per_token = reference.quantize(values, "int4", "token")
    assert per_token.codes.tolist() == [[[[7, -4], [2, 7]]]]
    assert per_token.scales.shape == (1, 1, 2)


def test_quantize__asymmetric__as_computed_by_hand():
    values = np.array([0.0, 15.0, 3.4, 7.6], np.float32).reshape(1, 1, 1, 4)
    quantized = reference.quantize(values, "int4", symmetric=False)
    assert quantized.scales == 1
    assert quantized.zero_points == -8
    assert quantized.codes.ravel().tolist() == [-8, 7, -5, 0]
    assert reference.dequantize(quantized).ravel().tolist() == [0, 15, 3, 8]


def test_quantize__constant_zero__scale_is_one():
    for symmetric in (True, False):
        quantized = reference.quantize(np.zeros((1, 2, 3, 4)), "int8", "token", symmetric=symmetric)
        assert (quantized.scales == 1).all()
        assert (quantized.codes == 0).all()


@pytest.mark.parametrize("channels", [1, 2, 6, 8, 17, 48, 64])
def test_rotate__twice__is_the_identity(channels):
    values = np.random.default_rng(0).normal(size=(1, 1, 3, channels)).astype(np.float32)
    rotated = reference.rotate(values)
    np.testing.assert_allclose(reference.rotate(rotated), values, atol=1e-5)
    np.testing.assert_allclose((rotated**2).sum(axis=-1), (values**2).sum(axis=-1), rtol=1e-5)


def test_rotate__four_channels__is_in_sylvester_order():
    rotated = reference.rotate(np.eye(4, dtype=np.float32).reshape(1, 1, 4, 4))[0, 0]
    assert (rotated * 2).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 17])
def test_pack_int4__any_width__round_trips(channels):
    codes = np.random.default_rng(0).integers(-8, 8, (2, 3, channels))
    packed = reference.pack_int4(codes)
    assert packed.shape == (2, 3, (channels + 1) // 2)
    assert (reference.unpack_int4(packed, channels) == codes).all()
    if channels % 2:
        assert (packed[..., -1] >> 4 == 0).all()


def test_pack_int4__even_channel__is_in_the_low_nibble():
    assert reference.pack_int4(np.array([1, -2, -8])).tolist() == [0xE1, 0x08]
