"""PyTorch's `scaled_dot_product_attention`; its fp32 is what the ratios refer to."""

from __future__ import annotations

from typing import Any

from umfa.bench.peers import Peer, Prepared
from umfa.bench.problem import Case, inputs_of

__all__ = ["PEER"]

# Half precision is measured where a run can wait for it: without instructions for it, PyTorch takes several times as long as in fp32.
_LONGEST_HALF = 1024
_HEADS_AS_ROWS = "fp32, heads as rows"


def _variants(case: Case) -> tuple[str, ...]:
    if case.is_decode:
        return ("fp32", _HEADS_AS_ROWS, "fp16", "bf16")
    if case.operation == "backward" or case.keys == 1 or case.keys > _LONGEST_HALF:
        return ("fp32",)
    return ("fp32", "fp16", "bf16")


def _prepare(case: Case, variant: str, threads: int) -> Prepared:
    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[variant[:4]]
    query, key, value, grad_output = (torch.from_numpy(array.copy("K")).to(dtype) for array in inputs_of(case))  # strides stay
    # Query heads that share keys become rows of one head: how a careful user helps an engine that does not see that by itself.
    rows = query.reshape(1, case.kv_heads, -1, case.head_dim) if variant == _HEADS_AS_ROWS else query
    options: dict[str, Any] = {"is_causal": case.causal}
    if case.heads != case.kv_heads and variant != _HEADS_AS_ROWS:
        options["enable_gqa"] = True

    def attend() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(rows, key, value, **options)

    def set_threads() -> None:  # one number for the whole process
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    def forward() -> Any:
        set_threads()
        return attend()

    cache_bytes = key.nbytes + value.nbytes
    if case.operation == "forward":
        return Prepared(forward, lambda result: (result.reshape(query.shape).float().numpy(),), cache_bytes=cache_bytes)

    operands = tuple(tensor.requires_grad_() for tensor in (query, key, value))
    set_threads()
    output = attend()

    def backward() -> Any:
        set_threads()
        return torch.autograd.grad(output, operands, grad_output, retain_graph=True)

    return Prepared(backward, lambda result: tuple(gradient.float().numpy() for gradient in result), cache_bytes=cache_bytes)


PEER = Peer("PyTorch", ("torch",), ("torch",), _variants, _prepare, ("bhsd", "bshd"))
