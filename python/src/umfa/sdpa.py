"""PyTorch's scaled dot-product attention, computed by this library."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from umfa._scalars import describe, flag
from umfa.arrays import is_recorded, view_of
from umfa.attention import _forward, _Options
from umfa.context import MFAContext
from umfa.errors import InvalidDimensionsError, InvalidTypeError, OutOfMemoryError, UnsupportedError
from umfa.quantization import QuantizationConfig

__all__ = ["MetalSDPA"]

_FUNCTION = "umfa.MetalSDPA"
_NAMES = ("query", "key", "value", "attn_mask")


class MetalSDPA:
    """A function with the signature of ``torch.nn.functional.scaled_dot_product_attention``.

    Nothing is installed into PyTorch: call it where you would call that function. Autograd follows it, as it follows `attention`. Where
    PyTorch's own back ends disagree with each other, it is always the same:

    * a mask and `is_causal` may be given together, and then both apply (some of PyTorch's back ends refuse that, its CPU's does the same);
    * the result of a row whose columns are all masked is 0, and so are its gradients (not NaN);
    * keys and values that are masked never reach the result or a gradient, not even a NaN.

    Under ``torch.autocast`` it computes, as PyTorch's function does, in the type that this chooses, whatever floats but float64 it is
    given.

    Tensors on Apple's GPU ("mps") are computed where they lie, by the thread's default context; this has never run on a Mac. What is not
    served there goes to PyTorch's own function, with one warning.

    Parameters
    ----------
    context : MFAContext, optional
        Where to compute; by default each thread's default context.
    quantize : {"int8", "int4"} or QuantizationConfig, optional
        As in `attention`.

    Examples
    --------
    >>> metal_sdpa = umfa.MetalSDPA()
    >>> output = metal_sdpa(q, k, v, is_causal=True)
    """

    def __init__(self, context: MFAContext | None = None, quantize: str | QuantizationConfig | None = None) -> None:
        if context is not None and not isinstance(context, MFAContext):
            raise InvalidTypeError(f"{_FUNCTION}: context: expected an umfa.MFAContext, got {describe(context)}")
        if quantize is not None:
            QuantizationConfig._structures_of(_FUNCTION, quantize)
        self.context = context
        self.quantize = quantize
        self._has_warned = False

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Attention on PyTorch tensors.

        Parameters
        ----------
        query : torch.Tensor
            ``[..., num_heads, seq_len_q, head_dim]`` on the CPU, or on Apple's GPU ("mps"); also without heads, and with any number of
            leading batch axes.
        key : torch.Tensor
            ``[..., num_heads, seq_len_kv, head_dim]``; axes before the last two broadcast.
        value : torch.Tensor
            ``[..., num_heads, seq_len_kv, head_dim_v]``.
        attn_mask : torch.Tensor, optional
            bool (True: attend) or float (added to the scores); broadcasts to ``[..., num_heads, seq_len_q, seq_len_kv]``.
        dropout_p : float
            Probability of dropping a weight, with a seed drawn from PyTorch's generator. As in PyTorch it applies whenever it is not 0.
        is_causal : bool
            Row i attends columns up to i (aligned upper left).
        scale : float, optional
            ``1 / sqrt(head_dim)`` by default.
        enable_gqa : bool
            Permit fewer key and value heads than query heads: consecutive query heads share one.

        Returns
        -------
        torch.Tensor
            ``[..., num_heads, seq_len_q, head_dim_v]``, contiguous, of the dtype of `query`, under autocast of that.

        Raises
        ------
        InvalidTypeError
            For what is not a tensor, or dtypes that differ.
        InvalidDimensionsError
            For shapes that do not match; without `enable_gqa` also for head counts that differ.
        UnsupportedError
            For a tensor on another device.
        MFAError
            As `attention`.
        """
        given = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if not getattr(query, "is_mps", False):
            return self._compute(*given)
        try:
            return self._compute(*given)
        except UnsupportedError as error:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(f"{_FUNCTION}: left to PyTorch from now on where needed: {error}", RuntimeWarning, stacklevel=2)
            attention = sys.modules["torch"].nn.functional.scaled_dot_product_attention
            return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def _compute(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Any:
        """What a call does, by this library alone."""
        torch: Any = sys.modules.get("torch")
        query, key, value, attn_mask = _autocast(torch, query, key, value, attn_mask)
        for argument, tensor in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
            if torch is None or not isinstance(tensor, torch.Tensor):
                if argument == "attn_mask" and tensor is None:
                    continue
                raise InvalidTypeError(
                    f"{_FUNCTION}: {argument}: expected a PyTorch tensor, got {describe(tensor)}; for other arrays use umfa.attention"
                )
            if argument != "attn_mask" and tensor.dtype != query.dtype:
                raise InvalidTypeError(f"{_FUNCTION}: {argument}: expected dtype {query.dtype} like query, got {tensor.dtype}")
            if argument != "attn_mask" and tensor.dim() < 2:
                raise InvalidDimensionsError(f"{_FUNCTION}: {argument}: expected at least 2 axes, got shape {tuple(tensor.shape)}")
            view_of(_FUNCTION, argument, tensor)
        causal = bool(flag(_FUNCTION, "is_causal", is_causal))
        grouped = bool(flag(_FUNCTION, "enable_gqa", enable_gqa))

        query, key, value = _broadcast(torch, query, key, value, grouped)
        axes = query.dim()
        if attn_mask is not None:
            if attn_mask.dim() > axes:
                raise InvalidDimensionsError(f"{_FUNCTION}: attn_mask: expected at most {axes} axes, got shape {tuple(attn_mask.shape)}")
            attn_mask = attn_mask[(None,) * (axes - attn_mask.dim())]
        options = _Options(
            mask=attn_mask,
            causal=causal,
            window=None,
            scale=scale,
            softcap=0.0,
            alibi_slopes=None,
            sinks=None,
            kv_lengths=None,
            query_offset=None,
            dropout_p=dropout_p,
            seed=None,
            dropout_offset=0,
            quantize=self.quantize,
        )
        if axes <= 4:
            missing = (None,) * (4 - axes)
            if attn_mask is not None:
                options = options._replace(mask=attn_mask[missing])
            result = self._attention(query[missing], key[missing], value[missing], options, None)
            return result.view(result.shape[4 - axes :])
        if is_recorded(query, key, value, attn_mask):
            return self._over_batches(query, key, value, options, None)
        try:
            result = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
        except RuntimeError as error:
            raise OutOfMemoryError(f"{_FUNCTION}: no memory for the result: {error}") from None
        return self._over_batches(query, key, value, options, result)

    def _attention(self, query: Any, key: Any, value: Any, options: _Options, out: Any) -> Any:
        return _forward(_FUNCTION, self.context, query, key, value, "bhsd", options, out, False, _NAMES)

    def _over_batches(self, query: Any, key: Any, value: Any, options: _Options, out: Any) -> Any:
        """Attention on tensors of equal batch axes, into `out` or, if that is None, new memory.

        The operands are not copied: axes that are one in memory become one, over others runs a loop.
        """
        if query.dim() == 4:
            return self._attention(query, key, value, options, out)
        mask = options.mask
        batches = query.shape[:2]
        try:
            merged_query, merged_key, merged_value = (_merged(tensor) for tensor in (query, key, value))
            if mask is not None:
                one = mask.shape[0] == mask.shape[1] == 1
                mask = _merged(mask if one else mask.expand(*batches, *mask.shape[2:]))
        except RuntimeError:
            parts = [
                self._over_batches(
                    query[index],
                    key[index],
                    value[index],
                    options if mask is None else options._replace(mask=mask[index if mask.shape[0] > 1 else 0]),
                    None if out is None else out[index],
                )
                for index in range(batches[0])
            ]
            return sys.modules["torch"].stack(parts) if out is None else out
        options = options._replace(mask=mask)
        result = self._over_batches(merged_query, merged_key, merged_value, options, None if out is None else _merged(out))
        return result.unflatten(0, batches) if out is None else out


def _autocast(torch: Any, *tensors: Any) -> tuple[Any, ...]:
    """The tensors in the type that ``torch.autocast`` chooses where it is on; float64 stays, and all beside a float64 query."""
    query = tensors[0]
    device = query.device.type if torch is not None and isinstance(query, torch.Tensor) and query.dtype != torch.float64 else None
    if device not in ("cpu", "mps") or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Any) -> Any:
        is_cast = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if is_cast and tensor.device.type == device else tensor

    return tuple(map(cast, tensors))


def _broadcast(torch: Any, query: Any, key: Any, value: Any, grouped: bool) -> tuple[Any, Any, Any]:
    """Give the three tensors equal batch axes (and heads, unless they are grouped), by strides of 0."""
    kept = 3 if grouped else 2
    if min(query.dim(), key.dim(), value.dim()) < kept:
        raise InvalidDimensionsError(f"{_FUNCTION}: enable_gqa: expected tensors with heads, got shapes {_shapes(query, key, value)}")
    try:
        leading = torch.broadcast_shapes(*(tensor.shape[:-kept] for tensor in (query, key, value)))
    except RuntimeError:
        hint = "" if grouped else "; for fewer key and value heads pass enable_gqa=True"
        raise InvalidDimensionsError(
            f"{_FUNCTION}: expected axes before the last {kept} that broadcast, got shapes {_shapes(query, key, value)}{hint}"
        ) from None
    query, key, value = (tensor.expand(*leading, *tensor.shape[-kept:]) for tensor in (query, key, value))
    if grouped:
        heads, key_heads, value_heads = (tensor.shape[-3] for tensor in (query, key, value))
        if key_heads != value_heads and key_heads and value_heads and heads % key_heads == heads % value_heads == 0:
            # PyTorch groups them independently. The library does not, so this rare case takes copies.
            key, value = (tensor.repeat_interleave(heads // tensor.shape[-3], -3) for tensor in (key, value))
    return query, key, value


def _shapes(*tensors: Any) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def _merged(tensor: Any) -> Any:
    """A view with the first two axes as one; RuntimeError if their strides do not allow that."""
    return tensor.view(tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])
