"""OpenVINO's CPU plug-in: scaled dot-product attention, and decoding with the cache as the model's state."""

from __future__ import annotations

from typing import Any

import numpy as np

from umfa.bench.peers import Peer, Prepared
from umfa.bench.problem import Array, Case, inputs_of

__all__ = ["PEER"]

_CACHE_BYTES = {"fp32": 4.0, "u8 K, V": 1.0 + 8 / 128}
_CACHE_TYPES = {"fp32": "f32", "u8 K, V": "u8"}


def _variants(case: Case) -> tuple[str, ...]:
    if case.is_decode:
        return tuple(_CACHE_TYPES)
    return () if case.operation == "backward" or case.keys == 1 else ("fp32",)


def _compile(model: Any, threads: int, **options: str) -> Any:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", **options}
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


def _prepare(case: Case, variant: str, threads: int) -> Prepared:
    if case.is_decode:
        return _prepare_decode(case, variant, threads)
    import openvino
    from openvino import opset13

    operands = [np.ascontiguousarray(array) for array in inputs_of(case)[:3]]
    parameters = [opset13.parameter(list(array.shape), np.float32) for array in operands]
    request = _compile(openvino.Model([opset13.scaled_dot_product_attention(*parameters, causal=case.causal)], parameters), threads)
    for index, array in enumerate(operands):
        request.set_input_tensor(index, openvino.Tensor(array.copy()))

    def call() -> Any:
        request.infer()
        return request.get_output_tensor()

    return Prepared(call, lambda output: (output.data.copy(),), cache_bytes=operands[1].nbytes + operands[2].nbytes)


def _stateful_model(case: Case) -> Any:
    """Keys and values of a token are appended to the state, which the query reads as a whole; each key head serves its query heads."""
    import openvino
    from openvino import opset13
    from openvino.op.util import Variable, VariableInfo

    def constant(*numbers: int) -> Any:
        return opset13.constant(np.array(numbers))

    def token(name: str, heads: int) -> Any:
        parameter = opset13.parameter([-1, heads, -1, case.head_dim], np.float32)
        parameter.output(0).set_names({name})
        parameter.friendly_name = name
        return parameter

    query, key, value = token("query", case.heads), token("key", case.kv_heads), token("value", case.kv_heads)
    beams = opset13.parameter([-1], np.int32)
    beams.output(0).set_names({"beams"})
    beams.friendly_name = "beams"
    sinks, caches = [], []
    for parameter, name in ((key, "past_key"), (value, "past_value")):
        shape = [-1, case.kv_heads, -1, case.head_dim]
        batch = opset13.gather(opset13.shape_of(parameter), constant(0), opset13.constant(0))
        empty = opset13.broadcast(opset13.constant(np.float32(0)), opset13.concat([batch, constant(case.kv_heads, 0, case.head_dim)], 0))
        info = VariableInfo()
        info.data_shape = openvino.PartialShape(shape)
        info.data_type = openvino.Type.f32
        info.variable_id = name
        variable = Variable(info)
        past = opset13.gather(openvino.op.read_value(empty, variable), beams, opset13.constant(0))
        whole = opset13.concat([past, parameter], 2)
        sinks.append(openvino.op.assign(whole, variable))
        sharing = case.heads // case.kv_heads
        sizes = opset13.shape_of(whole)
        front, back = (opset13.gather(sizes, constant(*axes), opset13.constant(0)) for axes in ((0, 1), (2, 3)))
        repeated = opset13.broadcast(
            opset13.unsqueeze(whole, constant(2)), opset13.concat([front, constant(sharing), back], 0), broadcast_spec="BIDIRECTIONAL"
        )
        caches.append(opset13.reshape(repeated, constant(0, case.heads, -1, case.head_dim), True))
    attention = opset13.scaled_dot_product_attention(query, *caches, causal=False)
    return openvino.Model([opset13.result(attention)], sinks, [query, key, value, beams])


def _prepare_decode(case: Case, variant: str, threads: int) -> Prepared:
    """A step of decoding. Each call appends its token, so that the cache grows by one a call, which no run notices."""
    import openvino

    query, key, value = inputs_of(case)[:3]
    request = _compile(_stateful_model(case), threads, KV_CACHE_PRECISION=_CACHE_TYPES[variant])

    def tensor(array: Array) -> Any:
        return openvino.Tensor(np.ascontiguousarray(array).copy())

    past = {"past_key": key[:, :, :-1], "past_value": value[:, :, :-1]}
    for state in request.query_state():
        state.state = tensor(past[state.name])
    request.set_tensor("beams", tensor(np.zeros(1, np.int32)))
    request.set_tensor("query", tensor(query))
    request.set_tensor("key", tensor(key[:, :, -1:]))
    request.set_tensor("value", tensor(value[:, :, -1:]))

    def step() -> Any:
        request.infer()
        return request.get_output_tensor()

    cache_bytes = round((key.size + value.size) * _CACHE_BYTES[variant])
    return Prepared(step, lambda output: (output.data.copy(),), cache_bytes=cache_bytes)


PEER = Peer("OpenVINO", ("openvino",), ("openvino",), _variants, _prepare)
