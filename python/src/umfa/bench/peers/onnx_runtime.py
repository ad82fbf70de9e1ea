"""ONNX Runtime on the CPU: the standard's operator `Attention`, and for decoding its own `GroupQueryAttention`."""

from __future__ import annotations

from typing import Any

import numpy as np

from umfa.bench.peers import Peer, Prepared, is_quantized
from umfa.bench.problem import Array, Case, inputs_of

__all__ = ["PEER"]

_LARGEST_CODES = {"int8": 127, "int4": 7}


def _variants(case: Case) -> tuple[str, ...]:
    if case.is_decode:
        return ("fp32", "int8 K, V", "int4 K, V")
    return () if case.operation == "backward" or case.keys == 1 else ("fp32",)


def _session(nodes: list[Any], inputs: dict[str, tuple[Any, ...]], outputs: dict[str, Any], threads: int) -> Any:
    """A session that runs `nodes`; `inputs` has each one's type and shape, `outputs` each one's type."""
    import onnx
    import onnxruntime

    helper = onnx.helper
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
    )
    operators = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=operators, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait for work by spinning would take it from the engine that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _rows(array: Array) -> Array:
    """``[1, heads, tokens, head_dim]`` as ``[1, tokens, heads * head_dim]``."""
    return np.ascontiguousarray(array.transpose(0, 2, 1, 3)).reshape(1, array.shape[2], -1)


def _prepare(case: Case, variant: str, threads: int) -> Prepared:
    if case.is_decode:
        return _prepare_decode(case, variant, threads)
    import onnx

    inputs = inputs_of(case)
    cache_bytes = inputs.key.nbytes + inputs.value.nbytes
    feeds = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    node = onnx.helper.make_node("Attention", list(feeds), ["output"], is_causal=int(case.causal))
    kind = onnx.TensorProto.FLOAT
    session = _session([node], {name: (kind, array.shape) for name, array in feeds.items()}, {"output": kind}, threads)
    return Prepared(lambda: session.run(None, feeds)[0], lambda output: (output,), cache_bytes=cache_bytes)


def _codes(array: Array, codes: str) -> tuple[Array, Array]:
    """One scale for the tensor, which is what the operator takes; INT4 in pairs, with 8 added, the even channel in the low half."""
    scale = np.float32(np.abs(array).max() / _LARGEST_CODES[codes])
    numbers = np.rint(array / scale).astype(np.int8)
    if codes == "int4":
        numbers = ((numbers[..., 0::2] + 8) | ((numbers[..., 1::2] + 8) << 4)).astype(np.uint8)
    return numbers, np.array([scale])


def _prepare_decode(case: Case, variant: str, threads: int) -> Prepared:
    """A step of decoding: the last token is entered into the cache in place, and the query reads all of it."""
    import onnx
    import onnxruntime

    kinds = onnx.TensorProto
    query, key, value = inputs_of(case)[:3]
    feeds = {"query": _rows(query), "key": _rows(key[:, :, -1:]), "value": _rows(value[:, :, -1:])}
    operands = [*feeds, "past_key", "past_value", "last_token", "tokens"]
    attributes: dict[str, Any] = {}
    cache_kind = kinds.FLOAT
    if is_quantized(variant):
        codes = variant[:4]
        feeds["past_key"], key_scale = _codes(key, codes)
        feeds["past_value"], value_scale = _codes(value, codes)
        cache_kind = {"int8": kinds.INT8, "int4": kinds.UINT8}[codes]
        attributes = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": int(codes[3:])}
    else:
        feeds["past_key"], feeds["past_value"] = key.copy(), value.copy()
    feeds["last_token"], feeds["tokens"] = np.array([case.keys - 1], np.int32), np.array([case.keys], np.int32)
    if is_quantized(variant):
        feeds["key_scale"], feeds["value_scale"] = key_scale, value_scale
        operands += ["", "", "", "", "", "key_scale", "value_scale"]
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        operands,
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
        **attributes,
    )
    numbers = {
        np.dtype(np.float32): kinds.FLOAT,
        np.dtype(np.int32): kinds.INT32,
        np.dtype(np.int8): kinds.INT8,
        np.dtype(np.uint8): kinds.UINT8,
    }
    session = _session(
        [node],
        {name: (numbers[array.dtype], array.shape) for name, array in feeds.items()},
        {"output": kinds.FLOAT, "present_key": cache_kind, "present_value": cache_kind},
        threads,
    )
    binding = session.io_binding()
    placed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name, array in placed.items():
        binding.bind_ortvalue_input(name, array)
    binding.bind_output("output")
    for name in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{name}", placed[f"past_{name}"])

    def step() -> Any:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    shape = (1, case.heads, 1, case.head_dim)
    cache_bytes = feeds["past_key"].nbytes + feeds["past_value"].nbytes
    return Prepared(step, lambda output: (output.numpy().reshape(shape),), cache_bytes=cache_bytes)


PEER = Peer("ONNX Runtime", ("onnxruntime", "onnx"), ("onnxruntime", "onnx"), _variants, _prepare)
