"""Attention under PyTorch's autograd.

Its gradients beside finite differences, PyTorch's own and those of `attention_backward`; what autograd promises; training.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import umfa

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from umfa import _autograd  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def operands(batch=2, heads=4, kv_heads=4, rows=5, columns=6, channels=3, value_channels=4, dtype=torch.float32):
    return (
        leaf(batch, heads, rows, channels, dtype=dtype),
        leaf(batch, kv_heads, columns, channels, dtype=dtype),
        leaf(batch, kv_heads, columns, value_channels, dtype=dtype),
    )


# ---- Beside finite differences -----------------------------------------------------------------------------------------------------------

DOUBLE = torch.float64
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "lower right": {"causal": "lower_right"},
    "window": {"window": (2, 1)},
    "causal window": {"causal": "lower_right", "window": (2, -1)},
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 1.3},
    "dropout": {"dropout_p": 0.4, "seed": 11, "dropout_offset": 3},
    "lengths": {"kv_lengths": torch.tensor([6, 2])},
    "lengths, lower right": {"kv_lengths": [3, 0], "causal": "lower_right"},
    "offset": {"query_offset": np.array([1, -3]), "causal": True},
    "everything": {
        "causal": "lower_right",
        "window": (4, 0),
        "softcap": 2.0,
        "scale": 0.5,
        "kv_lengths": [6, 5],
        "dropout_p": 0.25,
        "seed": 2**64 - 1,
    },
}


def finite(output, lse):
    """Results that finite differences can be taken of: the logsumexp of a row without keys is -inf."""
    return output, torch.where(lse.isfinite(), lse, 0)


def checked(function, inputs):
    return torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradcheck__query_key_value(options, kv_heads):
    def function(q, k, v):
        return finite(*umfa.attention(q, k, v, return_lse=True, **options))

    assert checked(function, operands(kv_heads=kv_heads, dtype=DOUBLE))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mask_shape", [(5, 6), (2, 1, 1, 6)], ids=str)
def test_gradcheck__every_input(options, mask_shape):
    mask = torch.randn(mask_shape, dtype=DOUBLE)
    mask[..., 1] = -torch.inf

    def function(q, k, v, finite_mask, sinks, slopes):
        masked = torch.where(mask.isfinite(), finite_mask, mask)
        return umfa.attention(q, k, v, mask=masked, sinks=sinks, alibi_slopes=slopes, return_lse=True, **options)

    inputs = (*operands(kv_heads=2, dtype=DOUBLE), leaf(*mask_shape, dtype=DOUBLE), leaf(4, dtype=DOUBLE), leaf(4, dtype=DOUBLE))
    assert checked(function, inputs)


@pytest.mark.parametrize(
    "mask_shape", [(), (6,), (1, 6), (5, 1), (5, 6), (4, 5, 6), (1, 5, 6), (2, 1, 5, 6), (1, 4, 1, 1), (2, 4, 5, 6)], ids=str
)
def test_gradcheck__mask_of_any_shape(mask_shape):
    q, k, v = (x.detach() for x in operands(dtype=DOUBLE))
    assert checked(lambda mask: umfa.attention(q, k, v, mask=mask, causal=True, return_lse=True), (leaf(*mask_shape, dtype=DOUBLE),))


def test_gradcheck__a_mask_that_is_a_broadcast_view():
    q, k, v = operands(dtype=DOUBLE)
    assert checked(lambda q, mask: umfa.attention(q, k, v, mask=mask.expand(2, 4, 5, 6)), (q, leaf(5, 6, dtype=DOUBLE)))


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 5, 4, 3)], ids=str)
def test_gradcheck__tokens_before_heads(shape):
    inputs = tuple(leaf(*shape, dtype=DOUBLE) for _ in range(3))
    with umfa.MFAContext(num_threads=1) as context:
        assert checked(lambda q, k, v: umfa.flash_attention_forward(context, q, k, v, causal=True, return_lse=True), inputs)
    assert checked(lambda q, k, v: umfa.attention(q, k, v, layout="bshd", window=(1, 1)), inputs)


@pytest.mark.parametrize(
    ("shapes", "mask_shape", "options"),
    [
        (((4, 3), (5, 3), (5, 2)), None, {}),
        (((4, 3), (5, 3), (5, 2)), (4, 5), {"is_causal": True}),
        (((2, 4, 3), (2, 5, 3), (1, 5, 2)), (5,), {}),
        (((2, 4, 4, 3), (1, 2, 5, 3), (2, 2, 5, 2)), (4, 1, 5), {"enable_gqa": True, "is_causal": True}),
        (((2, 2, 2, 4, 3), (2, 1, 2, 5, 3), (2, 5, 2)), (2, 1, 4, 5), {"scale": 0.4}),
        (((2, 2, 2, 4, 3), (2, 1, 2, 5, 3), (2, 5, 2)), (2, 1, 1, 4, 5), {}),
    ],
    ids=str,
)
def test_gradcheck__metal_sdpa(shapes, mask_shape, options):
    inputs = tuple(leaf(*shape, dtype=DOUBLE) for shape in (*shapes, *([mask_shape] if mask_shape else [])))
    assert checked(lambda *tensors: umfa.MetalSDPA()(*tensors, **options), inputs)


# ---- Beside PyTorch's own attention ------------------------------------------------------------------------------------------------------


def gradients_of(function, inputs, grad_output=None):
    output = function(*inputs)
    grad_output = torch.randn_like(output, dtype=DOUBLE).to(output.dtype) if grad_output is None else grad_output
    return output, torch.autograd.grad(output, inputs, grad_output), grad_output


SHAPES = [
    ((2, 8, 40, 16), (2, 8, 50, 16), (2, 8, 50, 24)),
    ((8, 40, 16), (8, 50, 16), (8, 50, 16)),
    ((40, 16), (50, 16), (50, 24)),
    ((2, 8, 40, 16), (1, 8, 50, 16), (2, 1, 50, 16)),
    ((2, 8, 40, 16), (8, 50, 16), (50, 16)),
    ((2, 3, 4, 40, 16), (2, 1, 4, 50, 16), (1, 3, 4, 50, 16)),
    ((3, 1, 2, 2, 40, 16), (1, 2, 2, 2, 50, 16), (3, 2, 1, 2, 50, 16)),
    ((2, 3, 4, 2, 40, 16), (2, 3, 4, 2, 50, 16), (2, 3, 4, 2, 50, 16)),
    ((0, 8, 4, 6), (0, 8, 5, 6), (0, 8, 5, 6)),
    ((2, 0, 3, 8, 4, 6), (2, 0, 3, 8, 5, 6), (2, 0, 3, 8, 5, 6)),
    ((2, 8, 0, 6), (2, 8, 5, 6), (2, 8, 5, 6)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_metal_sdpa__gradients_as_torchs(shapes, causal):
    inputs = tuple(leaf(*shape) for shape in shapes)
    output, ours, grad_output = gradients_of(lambda *qkv: umfa.MetalSDPA()(*qkv, is_causal=causal), inputs)
    expected, theirs, _ = gradients_of(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=causal), inputs, grad_output)
    torch.testing.assert_close(output, expected, atol=3e-6, rtol=3e-6)
    for gradient, other, tensor in zip(ours, theirs, inputs):
        assert gradient.shape == tensor.shape
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision__gradients_are_as_near_as_the_dtype_is(dtype):
    inputs = operands(rows=40, columns=50, channels=16, dtype=dtype)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    _, ours, grad_output = gradients_of(umfa.MetalSDPA(), inputs)
    _, theirs, _ = gradients_of(F.scaled_dot_product_attention, exact, grad_output.double())
    for gradient, other in zip(ours, theirs):
        assert gradient.dtype == dtype
        assert (gradient.double() - other).norm() < {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype] * other.norm()


def test_strided_operands__of_one_packed_tensor():
    packed = leaf(2, 9, 3, 4, 8)

    def heads_of(function):
        return lambda packed: function(*(packed[:, :, index].transpose(1, 2) for index in range(3)), is_causal=True)

    _, (ours,), grad_output = gradients_of(heads_of(umfa.MetalSDPA()), (packed,))
    _, (theirs,), _ = gradients_of(heads_of(F.scaled_dot_product_attention), (packed,), grad_output)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_scale_and_softcap__are_doubles():
    inputs = operands(dtype=DOUBLE)
    scale = 1 / 3
    expected = torch.softmax(inputs[0] @ inputs[1].mT * scale, -1) @ inputs[2]
    torch.testing.assert_close(umfa.attention(*inputs, scale=scale), expected, atol=1e-14, rtol=1e-13)
    capped = torch.softmax(0.7 * torch.tanh(inputs[0] @ inputs[1].mT * scale / 0.7), -1) @ inputs[2]
    torch.testing.assert_close(umfa.attention(*inputs, scale=scale, softcap=0.7), capped, atol=1e-14, rtol=1e-13)


def test_one_tensor_in_three_roles__its_gradients_add_up():
    x = leaf(2, 5, 4)
    _, (ours,), grad_output = gradients_of(lambda x: umfa.attention(x, x, x), (x,))
    _, (theirs,), _ = gradients_of(lambda x: F.scaled_dot_product_attention(x, x, x), (x,), grad_output)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# ---- Beside attention_backward -----------------------------------------------------------------------------------------------------------

NAMES = ("query", "key", "value", "mask", "alibi_slopes", "sinks")


def backward_of(inputs, grad_out, output, lse, names, grad_lse=None, **options):
    with torch.no_grad():
        q, k, v, mask, slopes, sinks = inputs
        return umfa.attention_backward(
            grad_out, q, k, v, output, lse, mask=mask, alibi_slopes=slopes, sinks=sinks, grad_lse=grad_lse, gradients=names, **options
        )


def all_inputs():
    return [*operands(rows=20, columns=30, channels=8, value_channels=8, kv_heads=2), leaf(20, 30), leaf(4), leaf(4)]


@pytest.mark.parametrize("wanted", [*((name,) for name in NAMES), ("query", "mask"), ("key", "sinks"), NAMES], ids="+".join)
def test_needed_gradients_only__are_computed(monkeypatch, wanted):
    inputs = [x if name in wanted else x.detach() for name, x in zip(NAMES, all_inputs())]
    q, k, v, mask, slopes, sinks = inputs
    asked = []
    compute = _autograd._backward
    monkeypatch.setattr(_autograd, "_backward", lambda *arguments: asked.append(arguments[-1]) or compute(*arguments))
    output, lse = umfa.attention(q, k, v, mask=mask, alibi_slopes=slopes, sinks=sinks, causal=True, return_lse=True)
    grad_out, grad_lse = torch.randn_like(output), torch.randn_like(lse)
    torch.autograd.backward((output, lse), (grad_out, grad_lse))
    assert asked == [wanted]
    expected = dict(zip(wanted, backward_of(inputs, grad_out, output, lse, wanted, grad_lse, causal=True)))
    for name, x in zip(NAMES, inputs):
        assert (x.grad is None) if name not in wanted else torch.equal(x.grad, expected[name])


def test_the_loss__may_depend_on_output_or_lse_or_both():
    inputs = operands()
    output, lse = umfa.attention(*inputs, return_lse=True)
    assert output.requires_grad
    assert lse.requires_grad
    of_output = torch.autograd.grad(output.sin().sum(), inputs, retain_graph=True)
    of_lse = torch.autograd.grad(lse.sin().sum(), inputs, retain_graph=True, allow_unused=True)
    of_both = torch.autograd.grad(output.sin().sum() + lse.sin().sum(), inputs)
    assert not of_lse[2].any()
    for both, one, other in zip(of_both, of_output, of_lse):
        torch.testing.assert_close(both, one + other)


def test_types__each_gradient_has_that_of_its_tensor():
    q, k, v = leaf(2, 4, 5, 8, dtype=torch.float16), leaf(2, 4, 6, 8, dtype=torch.bfloat16), leaf(2, 4, 6, 8)
    mask, slopes, sinks = leaf(5, 6, dtype=torch.bfloat16), leaf(4, dtype=torch.float64), leaf(4, dtype=torch.bfloat16)
    output, lse = umfa.attention(q, k, v, mask=mask, alibi_slopes=slopes, sinks=sinks, return_lse=True)
    assert (output.dtype, lse.dtype) == (torch.float16, torch.float32)
    (output.float().sum() + lse.sum()).backward()
    for x in (q, k, v, mask, slopes, sinks):
        assert (x.grad.dtype, x.grad.shape) == (x.dtype, x.shape)
        assert x.grad.isfinite().all()


def test_dropout__keeps_the_seed_for_backward():
    inputs = operands(rows=40, columns=40)
    torch.manual_seed(7)
    output = umfa.attention(*inputs, dropout_p=0.5)
    state = torch.get_rng_state()
    first = torch.autograd.grad(output, inputs, torch.ones_like(output), retain_graph=True)
    second = torch.autograd.grad(output, inputs, torch.ones_like(output))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(7)
    low, high = torch.randint(0, 2**32, (2,)).tolist()
    with torch.no_grad():
        again, lse = umfa.attention(*inputs, dropout_p=0.5, seed=low | high << 32, return_lse=True)
        expected = umfa.attention_backward(torch.ones_like(again), *inputs, again, lse, dropout_p=0.5, seed=low | high << 32)
    assert torch.equal(output, again)
    for gradients in zip(first, second, expected):
        assert torch.equal(gradients[0], gradients[1])
        assert torch.equal(gradients[0], gradients[2])


def test_dropout__and_checkpointing():
    inputs = operands(rows=40, columns=40)
    torch.manual_seed(7)
    plain = torch.autograd.grad(umfa.MetalSDPA()(*inputs, dropout_p=0.5).sum(), inputs)
    torch.manual_seed(7)
    output = checkpoint(lambda *qkv: umfa.MetalSDPA()(*qkv, dropout_p=0.5), *inputs, use_reentrant=False)
    for ours, other in zip(torch.autograd.grad(output.sum(), inputs), plain):
        assert torch.equal(ours, other)


# ---- Quantised ---------------------------------------------------------------------------------------------------------------------------

CONFIGS = {
    "int8": "int8",
    "int4": "int4",
    "mixed": umfa.QuantizationConfig("int8", umfa.QuantizationScheme("int4", "group", group_size=4, symmetric=False), None),
    "smoothed and rotated": umfa.QuantizationConfig(
        umfa.QuantizationScheme("int8", rotate=True), umfa.QuantizationScheme("int8", "block", smooth=True, rotate=True), "int8"
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_quantised__gradients_pass_straight_through(config):
    inputs = all_inputs()
    q, k, v, mask, slopes, sinks = inputs
    output, lse = umfa.attention(q, k, v, mask=mask, alibi_slopes=slopes, sinks=sinks, quantize=config, return_lse=True)
    grad_out, grad_lse = torch.randn_like(output), torch.randn_like(lse)
    torch.autograd.backward((output, lse), (grad_out, grad_lse))
    expected = backward_of(inputs, grad_out, output, lse, NAMES, grad_lse, quantize=config)
    for x, gradient in zip(inputs, expected):
        assert x.grad.dtype == x.dtype
        assert torch.equal(x.grad, gradient)


def test_quantised__gradients_are_near_the_exact_ones():
    inputs = operands(rows=64, columns=64, channels=32, value_channels=32)
    _, exact, grad_output = gradients_of(F.scaled_dot_product_attention, inputs)
    _, ours, _ = gradients_of(umfa.MetalSDPA(quantize="int8"), inputs, grad_output)
    for gradient, other in zip(ours, exact):
        assert (gradient - other).norm() < 0.03 * other.norm()


def test_quantized_tensors__take_no_gradient_but_others_do():
    q, k, v = operands(rows=20, columns=30, channels=8)
    keys, values = umfa.quantize(k, "int8"), umfa.quantize(v, "int4")
    real_keys, real_values = keys.dequantize(), values.dequantize()
    output = umfa.attention(q, keys, values)
    assert output.requires_grad
    _, (expected,), grad_output = gradients_of(lambda q: umfa.attention(q, real_keys, real_values), (q,))
    torch.testing.assert_close(torch.autograd.grad(output, q, grad_output)[0], expected, atol=1e-5, rtol=1e-5)

    queries = umfa.quantize(q, "int8")
    output = umfa.attention(queries, k, values)
    assert output.dtype == torch.float32
    (gradient,) = torch.autograd.grad(output.sum(), k)
    assert gradient.shape == k.shape


# ---- What autograd promises --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "kv_lengths", "query_offset", "output", "lse"])
def test_modified_in_place_before_backward__is_an_error(name):
    tensors = {key: x.detach() for key, x in zip(NAMES, all_inputs())}
    tensors |= {"kv_lengths": torch.tensor([30, 20]), "query_offset": torch.tensor([0, 5])}
    leaf_name = "key" if name == "query" else "query"
    tensors[leaf_name].requires_grad_()
    options = {key: x for key, x in tensors.items() if key not in ("query", "key", "value")}
    output, lse = umfa.attention(tensors["query"], tensors["key"], tensors["value"], causal=True, return_lse=True, **options)
    loss = (output + lse.unsqueeze(-1)).sum()
    with torch.no_grad():
        (tensors | {"output": output, "lse": lse})[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_small_inputs_that_are_not_tensors__are_kept_as_they_were():
    inputs = operands()
    lengths, offsets, slopes, sinks = np.array([3, 4]), [1, 2], np.ones(4, np.float32), np.ones(4, np.float32)
    options = {"kv_lengths": lengths, "query_offset": offsets, "alibi_slopes": slopes, "sinks": sinks, "causal": True}
    output = umfa.attention(*inputs, **options)
    expected = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    for changed in (lengths, slopes, sinks):
        changed[:] = 0
    offsets[:] = [-9, -9]
    for gradient, other in zip(torch.autograd.grad(output.sum(), inputs), expected):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("loss", [torch.sum, lambda output: output.square().sum()], ids=["sum", "square"])
def test_second_derivatives__are_refused(loss):
    q, k, v = operands()
    (gradient,) = torch.autograd.grad(loss(umfa.attention(q, k, v)), q, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(loss(umfa.attention(q, k, v)), q)[0])
    with pytest.raises(umfa.UnsupportedError, match=r"umfa.attention: expected to be differentiated once"):
        (gradient.square().sum() + q.square().sum()).backward()


ATTEMPTS = {
    "backward": lambda loss, x: loss.backward(),
    "backward of inputs": lambda loss, x: loss.backward(inputs=[x]),
    "grad": lambda loss, x: torch.autograd.grad(loss, x),
    "grad that may be unused": lambda loss, x: torch.autograd.grad(loss, x, allow_unused=True),
}


@pytest.mark.parametrize("besides", [True, False], ids=["beside another term", "alone"])
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_second_derivatives__by_inputs_that_are_named__are_refused(attempt, besides):
    inputs = operands()
    gradients = torch.autograd.grad(umfa.attention(*inputs).square().sum(), inputs, create_graph=True)
    for gradient, x in itertools.product(gradients, inputs):
        loss = gradient.square().sum() + (x.sum() if besides else 0)
        with pytest.raises(umfa.UnsupportedError, match=r"umfa.attention: expected to be differentiated once"):
            ATTEMPTS[attempt](loss, x)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_second_derivatives_of_merging__by_inputs_that_are_named__are_refused(attempt):
    q, k, v = (x.detach() for x in operands())
    parts = [
        x.requires_grad_()
        for half in (slice(0, 3), slice(3, None))
        for x in umfa.attention(q, k[:, :, half], v[:, :, half], return_lse=True)
    ]
    output, lse = umfa.merge(*parts)
    gradients = torch.autograd.grad(output.square().sum() + lse.sum(), parts, create_graph=True)
    for gradient, x in itertools.product(gradients, parts):
        with pytest.raises(umfa.UnsupportedError, match=r"umfa.merge: expected to be differentiated once"):
            ATTEMPTS[attempt](gradient.square().sum(), x)


def test_gradients_with_a_graph__of_a_checkpoint__are_those_without():
    q, k, v = operands()

    def both(q, k, v):
        first, second = (umfa.attention(q, k[:, :, half], v[:, :, half], return_lse=True) for half in (slice(0, 3), slice(3, None)))
        return umfa.merge(*first, *second)[0]

    for function in (umfa.attention, both):
        expected = torch.autograd.grad(function(q, k, v).square().sum(), (q, k, v))
        loss = checkpoint(function, q, k, v, use_reentrant=False).square().sum()
        for gradient, other in zip(torch.autograd.grad(loss, (q, k, v), create_graph=True), expected):
            assert torch.equal(gradient, other)


def test_backward_twice__needs_retain_graph_and_gives_the_same_bits():
    q, k, v = operands()
    output = umfa.attention(q, k, v)
    output.sum().backward(retain_graph=True)
    first = q.grad.clone()
    output.sum().backward()
    assert torch.equal(q.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode__nothing_is_recorded(mode):
    inputs = operands()
    with mode():
        output, lse = umfa.attention(*inputs, return_lse=True)
        other = umfa.MetalSDPA()(*inputs)
        assert umfa.attention(*inputs, out=torch.empty_like(output)).equal(output)
    assert not any(x.requires_grad or x.grad_fn for x in (output, lse, other))
    assert torch.equal(output, umfa.attention(*inputs))


def test_inputs_without_grad__are_not_recorded():
    q, k, v = (x.detach() for x in operands())
    assert umfa.attention(q, k, v).grad_fn is None
    assert umfa.MetalSDPA()(q, k, v, torch.zeros(5, 6)).grad_fn is None


@pytest.mark.parametrize("which", ["query", "mask", "sinks", "out"])
def test_out__together_with_gradients__is_refused(which):
    tensors = {"query": torch.zeros(2, 4, 5, 3), "mask": torch.zeros(5, 5), "sinks": torch.zeros(4), "out": torch.zeros(2, 4, 5, 3)}
    tensors[which].requires_grad_()
    q, out = tensors.pop("query"), tensors.pop("out")
    with pytest.raises(umfa.UnsupportedError, match=r"umfa.attention: out: expected None where .* requires grad"):
        umfa.attention(q, q, q, out=out, **tensors)


def test_a_query_that_is_not_a_tensor__is_refused_where_others_require_grad():
    q, k, v = operands()
    array = q.detach().numpy()
    for query in (array, umfa.quantize(array), [1.0]):
        with pytest.raises(umfa.InvalidTypeError, match=r"umfa.attention: q: expected a PyTorch tensor"):
            umfa.attention(query, k, v)


def test_other_inputs__may_be_arrays():
    q, k, v = operands()
    mask = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    (gradient,) = torch.autograd.grad(umfa.attention(q, k.detach().numpy(), v.detach().numpy(), mask=mask).sum(), q)
    (expected,) = torch.autograd.grad(umfa.attention(q, k, v, mask=torch.from_numpy(mask)).sum(), q)
    assert torch.equal(gradient, expected)


def test_errors__name_the_call_and_leave_no_graph():
    q, k, v = operands()
    with pytest.raises(umfa.InvalidDimensionsError, match=r"umfa.attention: "):
        umfa.attention(q, k[:, :3], v)
    with pytest.raises(umfa.InvalidArgumentError, match=r"umfa.MetalSDPA: "):
        umfa.MetalSDPA()(q, k, v, dropout_p=2.0)


def test_parameters_and_subclasses__are_tensors():
    class Named(torch.Tensor):
        pass

    q = nn.Parameter(torch.randn(2, 4, 5, 3))
    sinks = nn.Parameter(torch.randn(4))
    named = torch.randn(4).as_subclass(Named).requires_grad_()
    umfa.attention(q, q, q, sinks=sinks, alibi_slopes=named).sum().backward()
    assert q.grad.shape == q.shape
    assert sinks.grad.shape == named.grad.shape == (4,)


def test_what_is_masked__never_reaches_a_gradient():
    q, k, v = operands()
    with torch.no_grad():
        k[0, :, 4:] = torch.nan
        v[0, :, 4:] = torch.inf
    mask = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    mask[0, :, :, 4:] = False
    mask[1, :, 2] = False  # a row without keys
    output = umfa.MetalSDPA()(q, k, v, mask)
    assert not output[1, :, 2].any()
    output.square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
    assert not k.grad[0, :, 4:].any()
    assert not q.grad[1, :, 2].any()


def test_a_closed_context__is_named_in_backward():
    q, k, v = operands()
    with umfa.MFAContext(num_threads=1) as context:
        output = umfa.attention(q, k, v, context=context)
        (expected,) = torch.autograd.grad(output.sum(), q, retain_graph=True)
    assert torch.equal(expected, torch.autograd.grad(umfa.attention(q, k, v).sum(), q)[0])
    with pytest.raises(umfa.InvalidContextError, match=r"umfa.attention \(backward\): context"):
        output.sum().backward()


def test_backward_in_another_thread():
    q, k, v = operands()
    output = umfa.attention(q, k, v)
    thread = threading.Thread(target=lambda: output.sum().backward())
    thread.start()
    thread.join()
    assert torch.equal(q.grad, torch.autograd.grad(umfa.attention(q, k, v).sum(), q)[0])


def test_saved_tensors__may_be_packed():
    q, k, v = operands()
    (expected,) = torch.autograd.grad(umfa.attention(q, k, v).sum(), q)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(force=True).copy(), torch.from_numpy):
        output = umfa.attention(q, k, v)
    assert torch.equal(torch.autograd.grad(output.sum(), q)[0], expected)


def test_a_lazily_negated_gradient__is_taken():
    q, k, v = operands()
    output, lse = umfa.attention(q, k, v, return_lse=True)

    def loss(output, lse):
        return torch.complex(output, output).conj().imag.sum() + torch.complex(lse, lse).conj().imag.sum()

    (gradient,) = torch.autograd.grad(loss(output, lse), q)
    output, lse = umfa.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(-output.sum() - lse.sum(), q)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own forward mode uses it
def test_forward_mode_and_function_transforms__are_refused_rather_than_wrong():
    q, k, v = (x.detach() for x in operands())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match="jvp"):
            umfa.attention(dual, k, v)
        assert torch.equal(umfa.attention(q, k, v), umfa.attention(q, k, v))
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda q: umfa.attention(q, k, v).sum())(q)
    with pytest.raises((RuntimeError, umfa.UnsupportedError)):
        torch.func.vmap(lambda q: umfa.attention(q, k[0], v[0]))(q)


def test_torch__is_not_imported_for_arrays():
    script = "import sys, numpy, umfa; x = numpy.ones((2, 4)); umfa.attention(x, x, x); umfa.MetalSDPA; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- Training ----------------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block over tokens, with a given attention."""

    def __init__(self, attention, vocabulary=11, width=32, heads=4, kv_heads=2):
        super().__init__()
        self.attention, self.heads, self.kv_heads = attention, heads, kv_heads
        self.embed = nn.Embedding(vocabulary, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width * kv_heads // heads)
        self.project = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.unembed = nn.Linear(width, vocabulary)
        self.bias = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, tokens):
        x = self.embed(tokens)
        normal = self.norms[0](x)
        q = self.query(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(normal).unflatten(-1, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4)
        count = tokens.shape[1]
        mask = torch.full((count, count), -torch.inf).triu(1) - self.bias * torch.arange(count)
        x = x + self.project(self.attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2))
        x = x + self.feed(self.norms[1](x))
        return self.unembed(self.norms[2](x))


def trained(attention, steps=12):
    """Losses and first gradients of a block that learns sequences by heart."""
    torch.manual_seed(3)
    block = Block(attention)
    tokens = torch.randint(0, 11, (8, 24))
    optimizer = torch.optim.Adam(block.parameters(), 1e-2)
    losses, first = [], None
    for _ in range(steps):
        loss = F.cross_entropy(block(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        first = first or [parameter.grad.clone() for parameter in block.parameters()]
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), first


@pytest.mark.parametrize(("quantize", "loss_error", "gradient_error"), [(None, 1e-4, 1e-5), ("int8", 0.05, 0.05)])
def test_training__as_with_torchs_own(quantize, loss_error, gradient_error):
    expected, expected_gradients = trained(F.scaled_dot_product_attention)
    losses, gradients = trained(umfa.MetalSDPA(quantize=quantize))
    assert losses[-1] < losses[0] - 0.5
    assert np.abs(losses - expected).max() < loss_error
    for gradient, other in zip(gradients, expected_gradients):
        assert (gradient - other).norm() <= gradient_error * other.norm() + 1e-6
