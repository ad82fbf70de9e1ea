"""`umfa` itself."""

from __future__ import annotations

from typing import Any

import numpy as np

import umfa
from umfa._library import ffi, lib
from umfa.arrays import view_of
from umfa.attention import _Options, _prepare, _set, _Workspace
from umfa.bench.peers import Peer, Prepared
from umfa.bench.problem import Array, Case, inputs_of

__all__ = ["PEER"]

_NAMES = ("q", "k", "v", "mask")
_FORWARD = ("fp32", "fp16", "bf16", "int8", "int8 from fp32", "int4 K, V", "int4 from fp32")
_DECODE = ("fp32", "fp16", "bf16", "int8 K, V", "int8 K, V and query", "int4 K, V", "int4 K, V, int8 query")
_BACKWARD = ("fp32", "fp16", "bf16", "int8")
_ONE_TOKEN = ("fp32",)


def _variants(case: Case) -> tuple[str, ...]:
    if case.keys == 1:
        return _ONE_TOKEN
    if case.operation == "backward":
        return _BACKWARD
    return _DECODE if case.is_decode else _FORWARD


def _floats(array: Array, precision: str) -> Array:
    if precision == "bf16":
        import ml_dtypes  # NumPy has no bfloat16 of its own

        return array.astype(ml_dtypes.bfloat16)
    return array.astype({"fp32": np.float32, "fp16": np.float16}[precision])


def _laid_out(case: Case, array: Array) -> Array:
    """An array ``[1, heads, tokens, head_dim]`` with its axes in the order of the case's layout, or back again."""
    return array.swapaxes(1, 2) if case.layout == "bshd" else array


def _operands(case: Case, variant: str, context: umfa.MFAContext) -> tuple[Any, Any, Any, str | None]:
    """Query, key and value of a variant, and what `quantize=` is."""
    query, key, value = (_laid_out(case, array) for array in inputs_of(case)[:3])
    codes = variant[:4]
    options: dict[str, Any] = {"layout": case.layout, "context": context}
    if variant.endswith("from fp32"):
        return query, key, value, codes
    if codes in ("int8", "int4"):
        keys, values = (umfa.quantize(array, codes, **options) for array in (key, value))
        if case.is_decode:
            return query, keys, values, codes if "query" in variant else None
        return umfa.quantize(query, "int8", **options), keys, values, None
    return _floats(query, variant), _floats(key, variant), _floats(value, variant), None


def _kernel_names(
    context: umfa.MFAContext, case: Case, operands: tuple[Any, Any, Any], quantize: str | None, output: Any, lse: Any
) -> tuple[str, ...]:
    """What the library would run for this call."""
    workspace = _Workspace()
    is_backward = case.operation == "backward"
    options = _Options(None, case.causal, None, None, 0.0, None, None, None, None, 0.0, None, 0, quantize)
    problem = _prepare("umfa.bench", workspace, *operands, case.layout, options, is_backward, _NAMES)
    view = view_of("umfa.bench", "out", output)
    _set(workspace.output, view, case.layout)
    if lse is not None:
        statistics = view_of("umfa.bench", "lse", lse)
        workspace.attention.logsumexp = statistics.pointer
        problem.keepalive.append(statistics)
    name = ffi.new("const char **")
    names = []
    for operation in ("BACKWARD_QUERY", "BACKWARD_KEY_VALUE") if is_backward else ("FORWARD",):
        code = ffi.integer_const(f"MFA_OPERATION_{operation}")
        context.call("umfa.bench", lib.mfa_attention_kernel_name, workspace.attention, code, name)
        names.append(ffi.string(name[0]).decode())
    return tuple(names)


def _prepare_case(case: Case, variant: str, threads: int) -> Prepared:
    context = umfa.MFAContext(device="cpu", num_threads=threads)
    query, key, value, quantize = _operands(case, variant, context)
    cache_bytes = key.nbytes + value.nbytes

    def forward() -> Any:
        return umfa.attention(query, key, value, causal=case.causal, quantize=quantize, layout=case.layout, context=context)

    if case.operation == "forward":
        output = np.empty_like(_laid_out(case, inputs_of(case).query), query.dtype if isinstance(query, np.ndarray) else np.float32)
        kernels = _kernel_names(context, case, (query, key, value), quantize, output, None)
        return Prepared(forward, lambda result: (_laid_out(case, np.asarray(result, np.float32)),), kernels, cache_bytes)

    output, lse = umfa.attention(query, key, value, causal=case.causal, return_lse=True, layout=case.layout, context=context)
    grad_output = _laid_out(case, inputs_of(case).grad_output).astype(output.dtype)

    def backward() -> Any:
        options: dict[str, Any] = {"causal": case.causal, "layout": case.layout, "context": context}
        return umfa.attention_backward(grad_output, query, key, value, output, lse, **options)

    kernels = _kernel_names(context, case, (query, key, value), quantize, output, lse)

    def result_of(gradients: Any) -> tuple[Array, ...]:
        return tuple(_laid_out(case, np.asarray(gradient, np.float32)) for gradient in gradients)

    return Prepared(backward, result_of, kernels, cache_bytes)


PEER = Peer("umfa", (), (), _variants, _prepare_case, ("bhsd", "bshd"))
