"""QuantizedTensor as a Python object: parts, shapes, memory, copies. Its numbers are tested elsewhere."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import umfa

X = np.random.default_rng(0).normal(size=(2, 3, 10, 9)).astype(np.float32)
SCALE_SHAPES = {"tensor": (), "token": (2, 3, 10)}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("granularity", list(SCALE_SHAPES))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_parts(dtype, granularity, symmetric, layout, kind):
    x = X if layout == "bhsd" else X.transpose(0, 2, 1, 3)
    if kind == "torch":
        x = pytest.importorskip("torch").from_numpy(x)
    made = umfa.quantize(x, dtype, granularity, symmetric=symmetric, layout=layout)
    assert made.shape == tuple(x.shape)
    assert made.ndim == 4
    assert tuple(made.data.shape) == (*x.shape[:-1], 9 if dtype == "int8" else 5)
    assert str(made.data.dtype).removeprefix("torch.") == {"int8": "int8", "int4": "uint8"}[dtype]
    assert tuple(made.scales.shape) == SCALE_SHAPES[granularity]
    assert (made.zero_points is None) == symmetric
    assert made.channel_means is None
    assert (made.dtype, made.granularity, made.layout, made.rotated) == (dtype, granularity, layout, False)
    scales = made.scales.size if kind == "numpy" else made.scales.numel()
    assert made.nbytes == 60 * (9 if dtype == "int8" else 5) + scales * 4 * (1 if symmetric else 2)
    real = made.dequantize()
    assert type(real) is type(made.data) is type(x)
    assert tuple(real.shape) == made.shape
    assert abs(np.asarray(real) - np.asarray(x)).max() < (0.03 if dtype == "int8" else 0.6)
    assert f"{dtype} [2, " in repr(made)
    assert ("asymmetric" in repr(made)) != symmetric


def test_parts__are_the_memory_that_attention_reads():
    k = umfa.quantize(X)
    before = umfa.attention(X, k, X)
    k.scales[:] *= 2
    after = umfa.attention(X, k, X)
    assert not np.array_equal(before, after)
    with pytest.raises(ValueError, match="resize"):
        k.data.resize(100_000, refcheck=False)


def test_made_of_parts__shares_them_and_is_equal():
    made = umfa.quantize(X, "int4", symmetric=False)
    again = umfa.QuantizedTensor(made.data, made.scales, made.zero_points, shape=made.shape, granularity="token")
    assert np.shares_memory(again.data, made.data)
    assert np.shares_memory(again.scales, made.scales)
    assert np.array_equal(again.dequantize(), made.dequantize())
    strided = np.zeros((2, 3, 10, 11), np.uint8)[..., ::2][..., :5]
    strided[:] = made.data
    scales, zero_points = made.scales[:, ::-1].copy(), made.zero_points[:, ::-1].copy()
    other = umfa.QuantizedTensor(strided[:, ::-1], scales, zero_points, shape=made.shape)
    assert np.array_equal(other.dequantize(), made.dequantize()[:, ::-1])
    scales *= 2
    assert np.array_equal(other.dequantize(), 2 * made.dequantize()[:, ::-1])


@pytest.mark.parametrize("which", ["scales", "zero_points", "channel_means"])
def test_made_of_parts__that_are_not_contiguous__is_refused(which):
    shape = (2, 3, 16, 5)
    parts = {
        "scales": np.ones(shape[:3], np.float32),
        "zero_points": np.zeros(shape[:3], np.int32),
        "channel_means": np.zeros((2, 3, 5), np.float32),
    }
    umfa.QuantizedTensor(np.zeros(shape, np.int8), **parts)
    parts[which] = np.repeat(parts[which], 2, axis=2)[:, :, ::2]
    with pytest.raises(umfa.InvalidArgumentError, match=rf"QuantizedTensor: {which}: expected a contiguous array.*kv_lengths"):
        umfa.QuantizedTensor(np.zeros(shape, np.int8), **parts)


def test_cache_that_grows__is_read_as_it_is_at_each_call():
    q, keys, values = np.random.default_rng(5).standard_normal((3, 1, 2, 12, 16), dtype=np.float32)
    codes, scales = np.zeros((2, 1, 2, 12, 16), np.int8), np.ones((2, 1, 2, 12), np.float32)
    cache = [umfa.QuantizedTensor(*parts) for parts in zip(codes, scales)]
    for t in range(12):
        for n, new in enumerate((keys, values)):
            token = umfa.quantize(new[:, :, t : t + 1])
            codes[n, :, :, t : t + 1], scales[n, :, :, t : t + 1] = token.data, token.scales
        output = umfa.attention(q[:, :, t : t + 1], *cache, kv_lengths=[t + 1], causal="lower_right")
        whole = [umfa.quantize(x[:, :, : t + 1]) for x in (keys, values)]
        assert np.array_equal(output, umfa.attention(q[:, :, t : t + 1], *whole))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda tensor: pickle.loads(pickle.dumps(tensor))])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_copies__are_equal(copied, kind):
    x = X if kind == "numpy" else pytest.importorskip("torch").from_numpy(X)
    made = umfa.quantize(x, "int4", symmetric=False)
    other = copied(made)
    assert type(other.data) is type(made.data)
    assert np.array_equal(np.asarray(other.dequantize()), np.asarray(made.dequantize()))
    assert repr(other) == repr(made)


def test_layout__must_be_that_of_the_call():
    made = umfa.quantize(X)
    with pytest.raises(umfa.InvalidArgumentError, match="layout 'bshd'"):
        umfa.attention(X, made, X, layout="bshd")
    flat = umfa.quantize(X[0, 0])
    umfa.attention(flat, flat, flat, layout="bshd")


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_query__says_what_comes_back(kind):
    x = X if kind == "numpy" else pytest.importorskip("torch").from_numpy(X)
    made = umfa.quantize(x)
    output = umfa.attention(made, made, made)
    assert type(output) is type(x)
    assert str(output.dtype).endswith("float32")


def test_storage_of_a_tensor__cannot_be_resized_under_it():
    torch = pytest.importorskip("torch")
    data = torch.zeros(1, 1, 4, 8, dtype=torch.int8)
    made = umfa.QuantizedTensor(data, torch.ones(1, 1, 4))
    with pytest.raises(RuntimeError, match="resizable"):
        data.untyped_storage().resize_(0)
    made.dequantize()


def test_quantize_option__leaves_quantised_operands_alone():
    k, v = umfa.quantize(X), umfa.quantize(X, "int4")
    assert np.array_equal(umfa.attention(X, k, v, quantize="int8"), umfa.attention(umfa.quantize(X), k, v))
    config = umfa.QuantizationConfig(query=None, key="int8", value=umfa.QuantizationScheme("int4", "token"))
    expected = umfa.attention(X, umfa.quantize(X, smooth=True), umfa.quantize(X, "int4", "token"))
    assert np.array_equal(umfa.attention(X, X, X, quantize=config), expected)


def test_quantize_option__as_a_name__is_the_default_scheme_of_each_operand():
    k, v = umfa.quantize(X, "int4", smooth=True, rotate=True), umfa.quantize(X, "int4")
    expected = umfa.attention(umfa.quantize(X, "int8", rotate=True), k, v)
    assert np.array_equal(umfa.attention(X, X, X, quantize="int4"), expected)
    assert np.array_equal(umfa.attention(X, X, X, quantize=umfa.QuantizationConfig("int8", "int4", "int4")), expected)
    k, v = umfa.quantize(X, smooth=True, rotate=True), umfa.quantize(X)
    expected = umfa.attention(umfa.quantize(X, rotate=True), k, v)
    assert np.array_equal(umfa.attention(X, X, X, quantize="int8"), expected)
    assert np.array_equal(umfa.attention(X, X, X, quantize=umfa.QuantizationConfig()), expected)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantize_option__as_a_name__follows_the_rotation_of_the_other_operand(dtype, rotate):
    made = umfa.quantize(X, dtype, rotate=rotate)
    v = umfa.quantize(X)
    for config in ("int8", umfa.QuantizationConfig(key=umfa.QuantizationScheme(dtype, rotate=True))):
        assert np.array_equal(umfa.attention(X, made, X, quantize=config), umfa.attention(umfa.quantize(X, rotate=rotate), made, v))
    expected = umfa.attention(made, umfa.quantize(X, rotate=rotate, smooth=True), v)
    assert np.array_equal(umfa.attention(made, X, X, quantize="int8"), expected)
    config = umfa.QuantizationConfig(query=umfa.QuantizationScheme("int8", rotate=rotate))
    assert [scheme.rotate for scheme in config.schemes] == [rotate, rotate, False]
    config = umfa.QuantizationConfig(key=umfa.QuantizationScheme("int8", rotate=rotate))
    assert [scheme.rotate for scheme in config.schemes] == [rotate, rotate, False]
    config = umfa.QuantizationConfig(query=umfa.QuantizationScheme("int8", rotate=not rotate))
    with pytest.raises(umfa.InvalidArgumentError, match="rotation"):
        umfa.attention(X, made, X, quantize=config)


def test_keys_and_values_quantised_by_name__serve_a_float_query():
    k, v = umfa.quantize(X, "int4"), umfa.quantize(X, "int4")
    assert k.zero_points is not None
    expected = umfa.attention(X, k.dequantize(), v.dequantize())
    np.testing.assert_allclose(umfa.attention(X, k, v), expected, atol=1e-5)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantize_option__on_operands_too_large_for_the_workspace__is_served_part_by_part(quantize, rng):
    batch, heads, kv_heads, rows, columns, channels = 2, 4, 2, 300, 12000, 128
    query = rng.normal(size=(batch, heads, rows, channels)).astype(np.float32)
    key, value = rng.normal(size=(2, batch, kv_heads, columns, channels)).astype(np.float32)
    options = {
        "kv_lengths": np.array([columns - 5, 900]),
        "query_offset": [columns - rows, 700],
        "causal": True,
        "mask": rng.random((batch, heads, 1, columns)) < 0.9,
        "alibi_slopes": np.linspace(0.001, 0.1, heads, dtype=np.float32),
        "sinks": np.linspace(-1, 1, heads, dtype=np.float32),
        "return_lse": True,
    }
    with umfa.MFAContext(device="cpu", num_threads=1) as context:
        parts = umfa.attention(query, key, value, **options, quantize=quantize, context=context)
        assert context.details()["workspace_bytes"] < 12 << 20
        infinite = query.copy()
        infinite[-1, -1, -1, -1] = np.inf
        out = np.full_like(query, 7)
        with pytest.raises(umfa.InvalidArgumentError, match="query"):
            umfa.attention(infinite, key, value, quantize=quantize, out=out, context=context)
        assert (out == 7).all()
    with umfa.MFAContext(device="cpu", num_threads=16) as context:  # whose threads want more rows than a part has
        whole = umfa.attention(query, key, value, **options, quantize=quantize, context=context)
        assert context.details()["workspace_bytes"] > 12 << 20
    for got, expected in zip(parts, whole, strict=True):
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("dtype", "limit"), [("int8", 0.53), ("int4", 0.31)])
def test_keys_and_values_by_default__take_little_memory(dtype, limit):
    x = np.zeros((1, 8, 1024, 128), np.float32)
    assert umfa.quantize(x, dtype).nbytes <= limit * 2 * x.size
    assert umfa.quantize(x, dtype, smooth=True, rotate=True).nbytes <= limit * 2 * x.size


def test_schemes__are_values():
    scheme = umfa.QuantizationScheme("int4")
    assert scheme == umfa.QuantizationScheme("int4", "token", symmetric=False)
    assert umfa.QuantizationScheme("int4", "token").symmetric
    assert umfa.QuantizationScheme("int8") == umfa.QuantizationScheme("int8", "token", symmetric=True)
    assert umfa.QuantizationScheme(granularity="block").block_size == 64
    assert umfa.QuantizationScheme(granularity="group").group_size == 32
    config = umfa.QuantizationConfig("int4", None, scheme)
    assert config.schemes == (scheme, None, scheme)
    assert config == umfa.QuantizationConfig("int4", None, umfa.QuantizationScheme("int4"))
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(copy.deepcopy(config))
    with pytest.raises(umfa.InvalidArgumentError, match="umfa.QuantizationConfig: key"):
        umfa.QuantizationConfig(key="fp8")


S = np.ones((2, 3, 10), np.float32)
CODES = np.zeros((2, 3, 10, 9), np.int8)
PACKED = np.zeros((2, 3, 10, 5), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((X, S), {}, umfa.InvalidTypeError),
        ((None, S), {}, umfa.InvalidTypeError),
        ((CODES, None), {}, umfa.InvalidTypeError),
        ((CODES, S.astype(float)), {}, umfa.InvalidTypeError),
        ((CODES, S[:1]), {}, umfa.InvalidDimensionsError),
        ((CODES, np.float32(1)), {}, umfa.InvalidDimensionsError),
        ((CODES, S), {"granularity": "tensor"}, umfa.InvalidDimensionsError),
        ((CODES, S, S), {}, umfa.InvalidTypeError),
        ((CODES, S, np.zeros((2, 3), np.int32)), {}, umfa.InvalidDimensionsError),
        ((CODES, S, None, S), {}, umfa.InvalidDimensionsError),
        ((CODES[0, 0, 0], S), {}, umfa.InvalidDimensionsError),
        ((CODES, S), {"shape": (2, 3, 10, 8)}, umfa.InvalidDimensionsError),
        ((CODES, S), {"shape": 5}, umfa.InvalidTypeError),
        ((CODES, S), {"layout": "bshd"}, umfa.InvalidDimensionsError),
        ((CODES, S), {"rotated": 1}, umfa.InvalidTypeError),
        ((CODES, S), {"granularity": "block", "block_size": 0}, umfa.InvalidArgumentError),
        ((PACKED, S), {}, umfa.InvalidArgumentError),
        ((PACKED, S), {"shape": (2, 3, 10, 11)}, umfa.InvalidDimensionsError),
        ((PACKED, S), {"shape": (2, 3, 10, -9)}, umfa.InvalidArgumentError),
        ((PACKED, S), {"shape": ()}, umfa.InvalidDimensionsError),
    ],
)
def test_parts_that_do_not_fit__are_refused(arguments, options, error):
    with pytest.raises(error, match=r"umfa\.QuantizedTensor: \w+: expected"):
        umfa.QuantizedTensor(*arguments, **options)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_not_positive__are_refused(scale):
    made = umfa.quantize(X)
    made.scales[1, 1, 1] = scale
    with pytest.raises(umfa.InvalidArgumentError, match="scale"):
        umfa.attention(X, made, X)
    with pytest.raises(umfa.InvalidArgumentError, match="scale"):
        made.dequantize()


@pytest.mark.parametrize(
    "name", ["shape", "dtype", "granularity", "block_size", "group_size", "rotated", "layout", "data", "scales", "nbytes"]
)
def test_what_it_is__cannot_be_changed(name):
    with pytest.raises(AttributeError):
        setattr(umfa.quantize(X), name, (9, 9, 9, 9))


def test_producer_that_changes_its_mind__is_checked_again():
    class Fickle:
        calls = 0

        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **options):
            self.calls += 1
            return (CODES if self.calls == 1 else CODES[:1].copy()).__dlpack__(**options)

    with pytest.raises(umfa.InvalidDimensionsError):
        umfa.QuantizedTensor(Fickle(), S)


def test_empty():
    made = umfa.quantize(np.zeros((2, 3, 0, 8), np.float32))
    assert made.dequantize().shape == (2, 3, 0, 8)
    assert not umfa.attention(X[..., :8], made, made).any()


def test_quantized_tensor__as_an_array__is_refused():
    tensor = umfa.quantize(np.ones((1, 1, 2, 4), np.float32))
    with pytest.raises(TypeError, match="dequantize"):
        np.asarray(tensor)
