"""Attention and merging as functions that PyTorch's autograd can differentiate.

Imports PyTorch, and is imported only once that has been.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from umfa._scalars import describe
from umfa.arrays import is_tensor
from umfa.attention import _backward, _compute, _Options
from umfa.context import MFAContext
from umfa.errors import InvalidTypeError, UnsupportedError
from umfa.merge import _merge
from umfa.quantization import QuantizedTensor

__all__ = ["attention", "merge"]

# The inputs that have gradients, in the order in which `Attention` takes them.
_DIFFERENTIABLE = ("query", "key", "value", "mask", "alibi_slopes", "sinks")


class _FirstOrder(torch.autograd.Function):  # type: ignore[misc]  # PyTorch is an extra, and Any to the type checker
    """The identity on gradients that cannot be differentiated again: an attempt is an error, not a part of a loss that is missing.

    It takes what the gradients were computed from too, lest PyTorch, asked for derivatives by some of that alone, leaves this out as having
    nothing to do with them.
    """

    @staticmethod
    def forward(ctx: Any, function: str, gradients: int, *tensors: Any) -> tuple[Any, ...]:
        ctx.function = function
        return tensors[:gradients]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise UnsupportedError(f"{ctx.function}: expected to be differentiated once, got a gradient of its gradients (create_graph=True)")


def _once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Make a backward one of first order. It is called with the context, the saved tensors and the gradients.

    The tensors are asked for once: checkpoints do not give them a second time.
    PyTorch's own `once_differentiable` lets second derivatives through as 0 where the gradient of the output is a constant, as it is for a
    plain sum.
    """

    @functools.wraps(backward)
    def computed_once(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, saved, *grad_outputs)
        if not torch.is_grad_enabled():
            return gradients
        gradients = tuple(gradient if gradient is None else gradient.requires_grad_() for gradient in gradients)
        results: tuple[Any, ...] = _FirstOrder.apply(ctx.function, len(gradients), *gradients, *saved, *grad_outputs)
        return results

    return computed_once


class _Call(NamedTuple):
    """What a call was given beside the inputs that have gradients."""

    function: str
    context: MFAContext | None
    layout: str
    options: _Options
    names: tuple[str, str, str, str]


class Attention(torch.autograd.Function):  # type: ignore[misc]
    """Output and logsumexp of attention; backward computes the gradients that are asked for."""

    @staticmethod
    def forward(ctx: Any, call: _Call, q: Any, k: Any, v: Any, mask: Any, alibi_slopes: Any, sinks: Any) -> tuple[Any, Any]:
        ctx.function = call.function
        options = call.options._replace(mask=mask, alibi_slopes=alibi_slopes, sinks=sinks)
        output, lse, seed = _compute(call.function, call.context, q, k, v, call.layout, options, None, True, call.names)
        ctx.call = call._replace(options=call.options._replace(seed=seed, kv_lengths=None, query_offset=None))
        # Tensors are left to PyTorch, which notices if one is modified before backward. Of others the small ones are copied.
        inputs = (q, k, v, mask, *map(_kept, (alibi_slopes, sinks, options.kv_lengths, options.query_offset)))
        ctx.save_for_backward(output, lse, *(value if is_tensor(value) else None for value in inputs))
        ctx.others = tuple(None if is_tensor(value) else value for value in inputs)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_output: Any, grad_lse: Any) -> tuple[Any, ...]:
        needed = [name for name, wanted in zip(_DIFFERENTIABLE, ctx.needs_input_grad[1:], strict=True) if wanted]
        if not needed or (grad_output is None and grad_lse is None):
            return (None,) * (1 + len(_DIFFERENTIABLE))
        output, lse, *tensors = saved
        q, k, v, mask, alibi_slopes, sinks, kv_lengths, query_offset = (
            other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)
        )
        if grad_output is None:  # nothing depends on the output, but on lse
            grad_output = output.new_zeros(()).expand(output.shape)
        call: _Call = ctx.call
        gradients = _backward(
            f"{call.function} (backward)",
            call.context,
            grad_output.resolve_neg(),
            q,
            k,
            v,
            output,
            lse,
            call.layout,
            call.options._replace(mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, kv_lengths=kv_lengths, query_offset=query_offset),
            grad_lse if grad_lse is None else grad_lse.resolve_neg(),
            tuple(needed),
        )
        found = dict(zip(needed, gradients, strict=True))
        return (None, *(found.get(name) for name in _DIFFERENTIABLE))


def _kept(values: Any) -> Any:
    """A small input as it is now, should the caller change it before backward."""
    return copy.copy(values) if isinstance(values, (np.ndarray, list)) else values


def attention(
    function: str,
    context: MFAContext | None,
    q: Any,
    k: Any,
    v: Any,
    layout: str,
    options: _Options,
    names: tuple[str, str, str, str],
) -> tuple[Any, Any]:
    """Output and logsumexp, recorded."""
    if not (is_tensor(q) or (isinstance(q, QuantizedTensor) and q._framework.name == "torch")):
        raise InvalidTypeError(
            f"{function}: {names[0]}: expected a PyTorch tensor, as the result is what that is, and another input requires grad,"
            f" got {describe(q)}"
        )
    call = _Call(function, context, layout, options._replace(mask=None, alibi_slopes=None, sinks=None), names)
    results: tuple[Any, Any] = Attention.apply(call, q, k, v, options.mask, options.alibi_slopes, options.sinks)
    return results


class Merge(torch.autograd.Function):  # type: ignore[misc]
    """Output and logsumexp of two merged parts.

    With w_x = exp(lse_x - lse), the weight of part x, and g and h the gradients of output and lse, those of a part are::

        grad_out_x = w_x * g
        grad_lse_x = w_x * (dot(g, out_x - out) + h),  and out_a - out = w_b * (out_a - out_b)
    """

    @staticmethod
    def forward(
        ctx: Any, function: str, context: MFAContext | None, layout: str, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any
    ) -> tuple[Any, Any]:
        ctx.function = function
        output, lse = _merge(context, out_a, lse_a, out_b, lse_b, layout)
        ctx.heads_last = layout == "bshd" and out_a.dim() == 4
        ctx.save_for_backward(out_a, lse_a, out_b, lse_b, lse)
        return output, lse

    @staticmethod
    @_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_output: Any, grad_lse: Any) -> tuple[Any, ...]:
        out_a, lse_a, out_b, lse_b, lse = saved

        def over_channels(row_values: Any) -> Any:
            return (row_values.transpose(1, 2) if ctx.heads_last else row_values).unsqueeze(-1)

        def over_rows(channel_sums: Any) -> Any:
            return channel_sums.transpose(1, 2) if ctx.heads_last else channel_sums

        # An absent part weighs nothing and its output means nothing: it is selected away, not multiplied by 0.
        has_a, has_b = lse_a != -torch.inf, lse_b != -torch.inf
        weight_a, weight_b = torch.exp(lse_a - lse), torch.exp(lse_b - lse)
        grad_output = grad_output.to(lse.dtype)
        difference = out_a.to(lse.dtype) - out_b.to(lse.dtype)
        shared = torch.where(has_a & has_b, weight_a * weight_b * over_rows((grad_output * difference).sum(-1)), 0)
        return (
            None,
            None,
            None,
            torch.where(over_channels(has_a), over_channels(weight_a) * grad_output, 0).to(out_a.dtype),
            torch.where(has_a, weight_a * grad_lse + shared, 0).to(lse_a.dtype),
            torch.where(over_channels(has_b), over_channels(weight_b) * grad_output, 0).to(out_b.dtype),
            torch.where(has_b, weight_b * grad_lse - shared, 0).to(lse_b.dtype),
        )


def merge(function: str, context: MFAContext | None, parts: tuple[Any, Any, Any, Any], layout: str) -> tuple[Any, Any]:
    """Output and logsumexp of two merged parts, recorded."""
    for argument, part in zip(("out_a", "lse_a", "out_b", "lse_b"), parts, strict=True):
        if not is_tensor(part):
            raise InvalidTypeError(
                f"{function}: {argument}: expected a PyTorch tensor, as another input requires grad, got {describe(part)}"
            )
    results: tuple[Any, Any] = Merge.apply(function, context, layout, *parts)
    return results
