"""MetalSDPA beside PyTorch's scaled_dot_product_attention: shapes, broadcasting, options, errors."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import umfa

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def sdpa():
    return umfa.MetalSDPA()


def same(ours, theirs, tolerance=2e-6):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


SHAPES = [
    ((2, 8, 4, 6), (2, 8, 5, 6), (2, 8, 5, 7)),
    ((8, 4, 6), (8, 5, 6), (8, 5, 6)),
    ((4, 6), (5, 6), (5, 7)),
    ((2, 8, 4, 6), (1, 8, 5, 6), (2, 1, 5, 6)),
    ((2, 1, 4, 6), (2, 8, 5, 6), (2, 8, 5, 6)),
    ((2, 8, 4, 6), (8, 5, 6), (5, 6)),
    ((2, 3, 8, 4, 6), (2, 1, 8, 5, 6), (1, 3, 8, 5, 6)),
    ((3, 1, 2, 2, 4, 6), (1, 2, 2, 2, 5, 6), (3, 2, 1, 2, 5, 6)),
    ((0, 8, 4, 6), (0, 8, 5, 6), (0, 8, 5, 6)),
    ((2, 0, 3, 8, 4, 6), (2, 0, 3, 8, 5, 6), (2, 0, 3, 8, 5, 6)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_shapes__as_torch(sdpa, shapes):
    q, k, v = (torch.randn(shape) for shape in shapes)
    same(sdpa(q, k, v), F.scaled_dot_product_attention(q, k, v))
    same(sdpa(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize(
    "shape", [(4, 5), (1, 5), (1, 1), (8, 4, 5), (1, 4, 5), (3, 1, 1, 5), (2, 1, 1, 4, 5), (1, 3, 8, 4, 5), (2, 3, 8, 4, 5)], ids=str
)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks__as_torch(sdpa, shape, kind):
    q, k, v = torch.randn(2, 3, 8, 4, 6), torch.randn(2, 3, 8, 5, 6), torch.randn(2, 3, 8, 5, 6)
    mask = torch.randn(shape)
    mask = mask > -1 if kind is torch.bool else mask
    same(sdpa(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))
    same(sdpa(q, k, v, mask, is_causal=True), F.scaled_dot_product_attention(q, k, v, both(mask)))


def both(mask):
    below = torch.ones(4, 5, dtype=torch.bool).tril()
    return mask & below if mask.dtype is torch.bool else torch.where(below, mask, -torch.inf)


def test_batch_axes_that_are_not_one_in_memory__are_not_copied(sdpa):
    q = torch.randn(3, 2, 8, 4, 6).transpose(0, 1)
    k = torch.randn(3, 8, 5, 6).expand(2, 3, 8, 5, 6)
    v = torch.randn(2, 3, 8, 5, 6)
    mask = torch.rand(3, 2, 1, 4, 5).transpose(0, 1) > 0.2
    same(sdpa(q, k, v), F.scaled_dot_product_attention(q, k, v))
    same(sdpa(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize("shapes", [((2, 8, 4, 6), (2, 2, 5, 6)), ((8, 4, 6), (4, 5, 6)), ((2, 3, 8, 4, 6), (3, 1, 5, 6))], ids=str)
def test_grouped_heads__as_torch(sdpa, shapes):
    q, k, v = torch.randn(shapes[0]), torch.randn(shapes[1]), torch.randn(shapes[1])
    expected = F.scaled_dot_product_attention(q, *(x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v)))
    same(sdpa(q, k, v, enable_gqa=True), expected)


@pytest.mark.parametrize(("key_heads", "value_heads"), [(2, 4), (1, 8), (4, 1), (8, 2)])
def test_grouped_heads__of_keys_and_values_apart__as_torch(sdpa, key_heads, value_heads):
    q, k, v = (torch.randn(2, heads, 5, 6, requires_grad=True) for heads in (8, key_heads, value_heads))
    output, expected = (function(q, k, v, is_causal=True, enable_gqa=True) for function in (sdpa, F.scaled_dot_product_attention))
    same(output, expected)
    for ours, theirs in zip(*(torch.autograd.grad(result.square().sum(), (q, k, v)) for result in (output, expected))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(umfa.InvalidDimensionsError):
        sdpa(q, torch.randn(2, 3, 5, 6), v, enable_gqa=True)


def test_grouped_heads__without_the_flag__are_refused(sdpa):
    q, k = torch.randn(2, 8, 4, 6), torch.randn(2, 2, 4, 6)
    with pytest.raises(umfa.InvalidDimensionsError, match="enable_gqa=True"):
        sdpa(q, k, k)
    with pytest.raises(umfa.InvalidDimensionsError, match="num_kv_heads"):
        sdpa(q, torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6), enable_gqa=True)
    with pytest.raises(umfa.InvalidDimensionsError, match="enable_gqa"):
        sdpa(q[0, 0], k[0, 0], k[0, 0], enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes__as_torch(sdpa, dtype):
    q, k, v = (torch.randn(2, 3, 40, 24).to(dtype) for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    output = sdpa(q, k, v)
    assert output.dtype == dtype
    assert (output.double() - exact).abs().max() < {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-6)


@pytest.mark.parametrize("chosen", [torch.float16, torch.bfloat16])
def test_autocast__as_torch(sdpa, chosen):
    q, k, v = (torch.randn(2, 3, 40, 24, requires_grad=True) for _ in range(3))
    mask = torch.randn(40, 40)
    with torch.autocast("cpu", dtype=chosen):
        for operands in ((q, k, v), (q, k, v.to(chosen)), (q.half(), k.bfloat16(), v)):
            output, theirs = sdpa(*operands, mask), F.scaled_dot_product_attention(*operands, mask)
            assert output.dtype == theirs.dtype == chosen
            same(output.float(), theirs.float(), 2e-2)
            ours, others = (torch.autograd.grad(result.square().sum(), (q, k, v)) for result in (output, theirs))
            for gradient, other in zip(ours, others):
                assert gradient.dtype == other.dtype == torch.float32
                same(gradient, other, 5e-2)
        wide = [x.double() for x in (q, k, v)]
        assert sdpa(*wide).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert sdpa(q, k, v).dtype == torch.float32
    assert sdpa(q, k, v).dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, -0.5, 1, 0.3, np.float32(0.3)])
def test_scale__as_torch(sdpa, scale):
    q = torch.randn(2, 3, 4, 6)
    same(sdpa(q, q, q, scale=scale), F.scaled_dot_product_attention(q, q, q, scale=float(scale)))


def test_strides__as_torch(sdpa):
    packed = torch.randn(2, 9, 3, 4, 8)
    q, k, v = (packed[:, :, index].transpose(1, 2) for index in range(3))
    same(sdpa(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_dropout__draws_from_torchs_generator(sdpa):
    q = torch.randn(1, 2, 64, 8)
    torch.manual_seed(5)
    first, second = sdpa(q, q, q, dropout_p=0.5), sdpa(q, q, q, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(first, sdpa(q, q, q, dropout_p=0.5))
    assert not torch.equal(first, second)
    assert not sdpa(q, q, q, dropout_p=1.0).any()
    five = q.expand(3, 2, 2, 64, 8)
    assert sdpa(five.transpose(0, 1), five.transpose(0, 1), five.transpose(0, 1), dropout_p=0.5).isfinite().all()


def test_other_devices__are_refused(sdpa):
    plain, far = torch.randn(2, 4, 6), torch.empty(2, 4, 6, device="meta")
    for operands in ((far, far, far), (plain, far, plain), (plain, plain, plain, torch.empty(4, 4, device="meta"))):
        with pytest.raises(
            umfa.UnsupportedError, match=r"umfa.MetalSDPA: \w+: expected a tensor on the CPU, got one on 'meta'; use \w+\.cpu\(\)"
        ):
            sdpa(*operands)


Q = torch.zeros(2, 3, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((Q.numpy(), Q, Q), {}, umfa.InvalidTypeError),
        ((Q, None, Q), {}, umfa.InvalidTypeError),
        ((Q, Q.double(), Q), {}, umfa.InvalidTypeError),
        ((Q.int(), Q.int(), Q.int()), {}, umfa.InvalidTypeError),
        ((Q[0, 0, 0], Q, Q), {}, umfa.InvalidDimensionsError),
        ((Q, Q[:, :, :, :5], Q), {}, umfa.InvalidDimensionsError),
        ((Q, Q[:, :, :3], Q), {}, umfa.InvalidDimensionsError),
        ((Q[:, :, :, :0], Q[:, :, :, :0], Q), {}, umfa.InvalidDimensionsError),
        ((Q, Q, Q), {"attn_mask": np.zeros((4, 4))}, umfa.InvalidTypeError),
        ((Q, Q, Q), {"attn_mask": torch.zeros(4, 4, dtype=torch.int32)}, umfa.InvalidTypeError),
        ((Q, Q, Q), {"attn_mask": torch.zeros(4, 3)}, umfa.InvalidDimensionsError),
        ((Q, Q, Q), {"attn_mask": torch.zeros(1, 1, 1, 4, 4)}, umfa.InvalidDimensionsError),
        ((Q[None], Q[None], Q[None]), {"attn_mask": torch.zeros(1, 3, 1, 4, 4)}, umfa.InvalidDimensionsError),
        ((Q, Q, Q), {"dropout_p": 1.5}, umfa.InvalidArgumentError),
        ((Q, Q, Q), {"dropout_p": float("nan")}, umfa.InvalidArgumentError),
        ((Q, Q, Q), {"dropout_p": "0.5"}, umfa.InvalidTypeError),
        ((Q, Q, Q), {"is_causal": 1}, umfa.InvalidTypeError),
        ((Q, Q, Q), {"is_causal": "lower_right"}, umfa.InvalidTypeError),
        ((Q, Q, Q), {"enable_gqa": None}, umfa.InvalidTypeError),
        ((Q, Q, Q), {"scale": float("inf")}, umfa.InvalidArgumentError),
        ((Q, Q, Q), {"scale": 1j}, umfa.InvalidTypeError),
    ],
)
def test_bad_input(sdpa, arguments, options, error):
    with pytest.raises(error, match=r"umfa.MetalSDPA: "):
        sdpa(*arguments, **options)


def test_quantize__and_context():
    q = torch.randn(1, 2, 40, 32)
    exact = F.scaled_dot_product_attention(q, q, q)
    with umfa.MFAContext(num_threads=1) as context:
        output = umfa.MetalSDPA(context, quantize="int8")(q, q, q)
        assert 0 < (output - exact).abs().max() < 0.05
        assert torch.equal(output, umfa.attention(q, q, q, quantize="int8"))
    with pytest.raises(umfa.InvalidContextError):
        umfa.MetalSDPA(context)(q, q, q)
    with pytest.raises(umfa.InvalidArgumentError, match=r"umfa.MetalSDPA: quantize"):
        umfa.MetalSDPA(quantize="int3")


def test_copies__work(sdpa):
    q = torch.randn(2, 4, 6)
    for other in (copy.deepcopy(sdpa), pickle.loads(pickle.dumps(umfa.MetalSDPA(quantize=umfa.QuantizationConfig("int8"))))):
        other(q, q, q)


def output_of(example):
    script = str(ROOT / "python/examples" / f"{example}.py")
    return subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout.splitlines()


def test_example__sdpa_replacement():
    differences = {line[:28].strip(): float(line[28:]) for line in output_of("pytorch_sdpa_replacement")[1:]}
    assert len(differences) == 9
    for call, difference in differences.items():
        assert difference < {"bfloat16": 8e-3, "int8 beside exact": 0.05, "int4 beside exact": 0.5}.get(call, 3e-6), call


def test_example__numpy():
    assert output_of("numpy_attention")[-1].endswith(" True")


def test_example__transformers():
    pytest.importorskip("transformers")
    logits, gradients, same_text = (line[32:] for line in output_of("transformers_attention")[-3:])
    assert float(logits) < 3e-6
    assert float(gradients) < 3e-6
    assert same_text == "True"


def test_example__training():
    losses = {line[:14].strip(): np.array(line[14:].split(), float) for line in output_of("training")[1:]}
    assert list(losses) == ["PyTorch", "umfa", "umfa, INT8"]
    for name, found in losses.items():
        assert (np.diff(found) < 0).all()
        assert np.abs(found - losses["PyTorch"]).max() < {"umfa": 0.01}.get(name, 0.1)
