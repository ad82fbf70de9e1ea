"""umfa.merge: parts of the keys beside all of them at once, in every kind of array; absent parts; gradients."""

from __future__ import annotations

import numpy as np
import pytest

import umfa

TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def heads(rng, layout="bhsd", dtype=np.float32, rows=9, columns=40, channels=8):
    """Query, key and value, [batch, heads, tokens, channels] or [batch, tokens, heads, channels]."""
    arrays = [rng.normal(size=(2, 4, count, channels)).astype(dtype) for count in (rows, columns, columns)]
    return arrays if layout == "bhsd" else [array.swapaxes(1, 2) for array in arrays]


def tokens(array, layout, begin, end):
    return array[:, :, begin:end] if layout == "bhsd" else array[:, begin:end]


def part(q, k, v, begin, end, layout="bhsd", **options):
    return umfa.attention(q, tokens(k, layout, begin, end), tokens(v, layout, begin, end), layout=layout, return_lse=True, **options)


# ---- Parts become the whole --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("split", [0, 1, 17, 40])
def test_split_keys__become_the_whole(rng, layout, split):
    q, k, v = heads(rng, layout)
    output, lse = umfa.merge(*part(q, k, v, 0, split, layout), *part(q, k, v, split, 40, layout), layout=layout)
    expected, expected_lse = umfa.attention(q, k, v, layout=layout, return_lse=True)
    assert (output.shape, output.dtype, lse.shape, lse.dtype) == (expected.shape, np.float32, (2, 4, 9), np.float32)
    assert output.flags.c_contiguous
    np.testing.assert_allclose(output, expected, **TOLERANCE)
    np.testing.assert_allclose(lse, expected_lse, **TOLERANCE)


@pytest.mark.parametrize("start", range(5))
def test_ring_of_five__in_any_order(rng, start):
    q, k, v = heads(rng)
    sinks = rng.normal(size=4).astype(np.float32)
    slopes = np.abs(rng.normal(size=4)).astype(np.float32)
    options = {"causal": True, "window": (20, -1), "alibi_slopes": slopes}
    bounds = [0, 3, 11, 12, 30, 40]
    merged = None
    for step in range(5):
        index = (start + step) % 5
        begin, end = bounds[index], bounds[index + 1]
        own = part(q, k, v, begin, end, query_offset=25 - begin, sinks=sinks if index == 2 else None, **options)
        merged = own if merged is None else umfa.merge(*merged, *own)
    output, lse = umfa.attention(q, k, v, query_offset=25, sinks=sinks, return_lse=True, **options)
    np.testing.assert_allclose(merged[0], output, **TOLERANCE)
    np.testing.assert_allclose(merged[1], lse, **TOLERANCE)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_fewer_axes(rng, axes, layout):
    q, k, v = (array[0, 0] if axes == 2 else array[:, 0] for array in heads(rng))
    first = umfa.attention(q, k[..., :7, :], v[..., :7, :], return_lse=True)
    second = umfa.attention(q, k[..., 7:, :], v[..., 7:, :], return_lse=True)
    output, lse = umfa.merge(*first, *second, layout=layout)
    expected, expected_lse = umfa.attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(output, expected, **TOLERANCE)
    np.testing.assert_allclose(lse, expected_lse, **TOLERANCE)


def test_float64__keeps_its_precision(rng):
    q, k, v = heads(rng, dtype=np.float64)
    output, lse = umfa.merge(*part(q, k, v, 0, 13), *part(q, k, v, 13, 40))
    expected, expected_lse = umfa.attention(q, k, v, return_lse=True)
    assert output.dtype == lse.dtype == np.float64
    np.testing.assert_allclose(output, expected, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-13, atol=1e-14)


def test_scores_that_are_far_apart__do_not_overflow():
    ones = np.ones((1, 1, 1, 3), np.float32)
    output, lse = umfa.merge(ones, np.full((1, 1, 1), 3e38, np.float32), 2 * ones, np.full((1, 1, 1), -3e38, np.float32))
    assert (output == 1).all()
    assert lse == np.float32(3e38)
    output, lse = umfa.merge(ones, np.full((1, 1, 1), -3e38, np.float32), 3 * ones, np.full((1, 1, 1), -3e38, np.float32))
    assert (output == 2).all()
    assert lse == np.float32(-3e38)


def test_quantised_parts__merge_like_others(rng):
    q, k, v = heads(rng)
    merged = umfa.merge(*part(q, k, v, 0, 20, quantize="int8"), *part(q, k, v, 20, 40))
    assert np.abs(merged[0] - umfa.attention(q, k, v)).max() < 0.03


# ---- Absent parts ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 7.0])
def test_a_part_whose_lse_is_minus_infinity__is_absent(rng, rubbish):
    q, k, v = heads(rng)
    output, lse = (array.copy() for array in part(q, k, v, 0, 20))
    other, other_lse = (array.copy() for array in part(q, k, v, 20, 40))
    expected, expected_lse = (array.copy() for array in umfa.attention(q, k, v, return_lse=True))
    for absent, statistic, there in ((output, lse, (other, other_lse)), (other, other_lse, (output, lse))):
        row = 2 if absent is output else 5
        absent[0, 1, row], statistic[0, 1, row] = rubbish, -np.inf
        expected[0, 1, row], expected_lse[0, 1, row] = there[0][0, 1, row], there[1][0, 1, row]
    output[1, 2, 3] = other[1, 2, 3] = rubbish
    lse[1, 2, 3] = other_lse[1, 2, 3] = expected_lse[1, 2, 3] = -np.inf
    expected[1, 2, 3] = 0
    merged, merged_lse = umfa.merge(output, lse, other, other_lse)
    np.testing.assert_allclose(merged, expected, **TOLERANCE)
    np.testing.assert_allclose(merged_lse, expected_lse, **TOLERANCE)
    for row in ((0, 1, 2), (0, 1, 5), (1, 2, 3)):  # what is alone is taken as it is
        assert np.array_equal(merged[row], expected[row])
        assert merged_lse[row] == expected_lse[row]


def test_a_nan_that_is_there__shows():
    nan, ones, zeros = np.full((1, 2), np.nan, np.float32), np.ones((1, 2), np.float32), np.zeros(1, np.float32)
    assert np.isnan(umfa.merge(nan, zeros, ones, zeros)[0]).all()
    assert np.isnan(umfa.merge(ones, zeros * np.nan, ones, zeros)[1]).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (0, 3, 4), (0, 4)], ids=str)
def test_no_rows(shape):
    empty, statistics = np.empty(shape, np.float32), np.empty(shape[:-1], np.float32)
    output, lse = umfa.merge(empty, statistics, empty, statistics)
    assert (output.shape, lse.shape) == (shape, shape[:-1])


# ---- Kinds of arrays ---------------------------------------------------------------------------------------------------------------------


def test_tensors_and_arrays__mix_and_the_first_output_says_what_comes_back(rng):
    torch = pytest.importorskip("torch")
    q, k, v = heads(rng)
    first, second = part(q, k, v, 0, 20), part(q, k, v, 20, 40)
    expected, expected_lse = umfa.merge(*first, *second)
    output, lse = umfa.merge(torch.from_numpy(first[0]), first[1], second[0], torch.from_numpy(second[1]))
    assert isinstance(output, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    assert np.array_equal(output, expected)
    assert np.array_equal(lse, expected_lse)
    output, lse = umfa.merge(first[0], torch.from_numpy(first[1]), torch.from_numpy(second[0]), second[1])
    assert type(output) is type(lse) is np.ndarray
    assert np.array_equal(output, expected)


class Producer:
    """Nothing but a DLPack producer."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_dlpack_producers(rng):
    q, k, v = heads(rng)
    arrays = *part(q, k, v, 0, 20), *part(q, k, v, 20, 40)
    expected, expected_lse = umfa.merge(*arrays)
    output, lse = umfa.merge(*map(Producer, arrays))
    assert type(output) is np.ndarray
    assert np.array_equal(output, expected)
    assert np.array_equal(lse, expected_lse)


@pytest.mark.parametrize("dtype_a", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype_b", ["float16", "bfloat16", "float32", "float64"])
def test_float_types__mix(rng, dtype_a, dtype_b):
    torch = pytest.importorskip("torch")
    q, k, v = heads(rng)
    (a, lse_a), (b, lse_b) = (tuple(map(torch.from_numpy, part(q, k, v, *bounds))) for bounds in ((0, 20), (20, 40)))
    a, b = a.to(getattr(torch, dtype_a)), b.to(getattr(torch, dtype_b))
    expected, _ = umfa.merge(a.double(), lse_a, b.double(), lse_b)
    output, lse = umfa.merge(a, lse_a, b, lse_b)
    assert (output.dtype, lse.dtype) == (a.dtype, torch.float32)
    assert torch.equal(output, expected.to(a.dtype))


def test_statistics__of_two_types_become_float64(rng):
    q, k, v = heads(rng)
    (a, lse_a), (b, lse_b) = part(q, k, v, 0, 20), part(q, k, v, 20, 40)
    expected, expected_lse = umfa.merge(a, lse_a.astype(np.float64), b, lse_b.astype(np.float64))
    for output, lse in (umfa.merge(a, lse_a.astype(np.float64), b, lse_b), umfa.merge(a, lse_a, b, lse_b.astype(np.float64))):
        assert (output.dtype, lse.dtype) == (np.float32, np.float64)
        assert np.array_equal(output, expected)
        assert np.array_equal(lse, expected_lse)


def test_any_strides(rng):
    q, k, v = heads(rng)
    (a, lse_a), (b, lse_b) = part(q, k, v, 0, 20), part(q, k, v, 20, 40)
    expected, expected_lse = umfa.merge(a, lse_a, b[:1, :, :, :].repeat(2, 0), lse_b)
    strided = np.ascontiguousarray(a[..., ::-1].T).T[..., ::-1], np.asfortranarray(lse_a)
    output, lse = umfa.merge(*strided, np.broadcast_to(b[:1], b.shape), lse_b[::-1][::-1])
    assert np.array_equal(output, expected)
    assert np.array_equal(lse, expected_lse)


def test_results__do_not_depend_on_the_number_of_threads(rng, contexts):
    q, k, v = heads(rng)
    parts = *part(q, k, v, 0, 20), *part(q, k, v, 20, 40)
    expected, expected_lse = umfa.merge(*parts)
    for context in contexts.values():
        output, lse = umfa.merge(*parts, context=context)
        assert np.array_equal(output, expected)
        assert np.array_equal(lse, expected_lse)


# ---- Bad input ---------------------------------------------------------------------------------------------------------------------------

OUT, LSE = np.zeros((2, 4, 9, 8), np.float32), np.zeros((2, 4, 9), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((OUT, LSE, OUT[:, :, :8], LSE), {}, umfa.InvalidDimensionsError, r"out_b: expected shape \(2, 4, 9, 8\) like out_a, got"),
        ((OUT, LSE, OUT[0], LSE), {}, umfa.InvalidDimensionsError, "out_b: "),
        ((OUT, LSE[:1], OUT, LSE), {}, umfa.InvalidDimensionsError, r"lse_a: expected shape \(2, 4, 9\), got \(1, 4, 9\)"),
        ((OUT, LSE, OUT, LSE[..., None]), {}, umfa.InvalidDimensionsError, "lse_b: "),
        ((OUT, LSE, OUT, LSE), {"layout": "bshd"}, umfa.InvalidDimensionsError, r"lse_a: expected shape \(2, 9, 4\)"),
        ((LSE[0, 0], LSE[0, 0], OUT, LSE), {}, umfa.InvalidDimensionsError, "out_a: "),
        ((OUT[None], LSE, OUT, LSE), {}, umfa.InvalidDimensionsError, "out_a: .*got 5 axes"),
        ((OUT[:, :0], LSE[:, :0], OUT[:, :0], LSE[:, :0]), {}, umfa.InvalidDimensionsError, "num_heads"),
        ((OUT[..., :0], LSE, OUT[..., :0], LSE), {}, umfa.InvalidDimensionsError, "head_dim"),
        ((OUT.astype(np.int8), LSE, OUT, LSE), {}, umfa.InvalidTypeError, "out_a: expected a float dtype, got int8"),
        ((OUT, LSE, OUT, LSE.astype(np.float16)), {}, umfa.InvalidTypeError, "lse_b: expected dtype float32 or float64, got float16"),
        ((OUT, LSE.tolist(), OUT, LSE), {}, umfa.InvalidTypeError, "lse_a: "),
        ((umfa.quantize(OUT), LSE, OUT, LSE), {}, umfa.InvalidTypeError, "out_a: "),
        ((OUT, LSE, None, LSE), {}, umfa.InvalidTypeError, "out_b: "),
        ((OUT, LSE, OUT, LSE), {"layout": "sbhd"}, umfa.InvalidArgumentError, "layout: "),
        ((OUT, LSE, OUT, LSE), {"context": 3}, umfa.InvalidTypeError, "context: "),
    ],
)
def test_bad_input(arguments, options, error, match):
    with pytest.raises(error, match=rf"umfa.merge: .*{match}"):
        umfa.merge(*arguments, **options)


# ---- Gradients ---------------------------------------------------------------------------------------------------------------------------


class TestGradients:
    """Under PyTorch's autograd."""

    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch")
        self.torch.manual_seed(0)

    def leaf(self, *shape, dtype=None):
        return self.torch.randn(*shape, dtype=dtype or self.torch.float64).requires_grad_()

    @pytest.mark.parametrize(
        ("shape", "rows", "layout"),
        [
            ((2, 3, 4, 2), (2, 3, 4), "bhsd"),
            ((2, 4, 3, 2), (2, 3, 4), "bshd"),
            ((2, 4, 3), (2, 4), "bshd"),
            ((4, 3), (4,), "bhsd"),
        ],
        ids=str,
    )
    def test_gradcheck(self, shape, rows, layout):
        parts = self.leaf(*shape), self.leaf(*rows), self.leaf(*shape), self.leaf(*rows)
        assert self.torch.autograd.gradcheck(lambda *parts: umfa.merge(*parts, layout=layout), parts, eps=1e-6, atol=1e-5)

    def test_absent_parts__have_gradient_0_whatever_they_hold(self):
        torch = self.torch
        out_a, lse_a, out_b, lse_b = self.leaf(5, 3), self.leaf(5), self.leaf(5, 3), self.leaf(5)
        with torch.no_grad():
            out_a[1], lse_a[1] = torch.nan, -torch.inf
            out_b[2], lse_b[2] = torch.inf, -torch.inf
            out_a[3], out_b[3], lse_a[3], lse_b[3] = torch.nan, torch.nan, -torch.inf, -torch.inf
        output, lse = umfa.merge(out_a, lse_a, out_b, lse_b)
        grad_output, grad_lse = torch.randn_like(output), torch.randn_like(lse)
        grad_output[3] = grad_lse[3] = torch.nan  # of log(0), say
        torch.autograd.backward((output, lse), (grad_output, grad_lse))
        for grad, grad_lse_part, absent in ((out_a.grad, lse_a.grad, [1, 3]), (out_b.grad, lse_b.grad, [2, 3])):
            assert grad.isfinite().all()
            assert grad_lse_part.isfinite().all()
            assert not grad[absent].any()
            assert not grad_lse_part[absent].any()
        assert torch.equal(out_a.grad[2], grad_output[2])
        assert torch.equal(lse_b.grad[1], grad_lse[1])

    def test_split_attention__has_the_gradients_of_the_whole(self):
        torch = self.torch
        q, k, v = (self.leaf(2, 3, 12, 4, dtype=torch.float32) for _ in range(3))
        parts = [part(q, k, v, begin, begin + 4, causal=True, query_offset=-begin) for begin in (0, 4, 8)]
        output, lse = umfa.merge(*umfa.merge(*parts[0], *parts[1]), *parts[2])
        grad_output, grad_lse = torch.randn_like(output), torch.randn_like(lse)
        ours = torch.autograd.grad((output, lse), (q, k, v), (grad_output, grad_lse))
        whole = torch.autograd.grad(umfa.attention(q, k, v, causal=True, return_lse=True), (q, k, v), (grad_output, grad_lse))
        for gradient, other in zip(ours, whole):
            torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-5)

    def test_types__each_gradient_has_that_of_its_part(self):
        torch = self.torch
        parts = [
            self.leaf(5, 3, dtype=torch.float16),
            self.leaf(5, dtype=torch.float32),
            self.leaf(5, 3, dtype=torch.float32),
            self.leaf(5, dtype=torch.float64),
        ]
        output, lse = umfa.merge(*parts)
        (output.sum() + lse.sum()).backward()
        for x in parts:
            assert (x.grad.dtype, x.grad.shape) == (x.dtype, x.shape)

    def test_what_is_not_a_tensor__is_refused(self):
        out, lse = self.leaf(5, 3), np.zeros(5)
        with pytest.raises(umfa.InvalidTypeError, match=r"umfa.merge: lse_a: expected a PyTorch tensor"):
            umfa.merge(out, lse, out, lse)
        with self.torch.no_grad():
            assert not umfa.merge(out, lse, out, lse)[0].requires_grad

    def test_second_derivatives__are_refused(self):
        torch = self.torch
        out, lse = self.leaf(5, 3), self.leaf(5)
        (gradient,) = torch.autograd.grad(umfa.merge(out, lse, 2 * out, 2 * lse)[0].sum(), lse, create_graph=True)
        with pytest.raises(umfa.UnsupportedError, match=r"umfa.merge: expected to be differentiated once"):
            gradient.sum().backward()
