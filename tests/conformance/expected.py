"""What conformance cases should give: the reference's results on the inputs of `inputs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import inputs
import reference
from cases import to_layout

Case = dict[str, Any]


@dataclass(frozen=True)
class Operand:
    """Query, key or value of a case: elements as they lie in memory, and the real numbers that they stand for, in the order bhsd."""

    elements: np.ndarray  # in the case's layout; INT4 packed
    real: np.ndarray
    quantized: reference.Quantized | None


def shapes(case: Case) -> dict[str, tuple[int, int, int, int]]:
    """Shapes of query, key, value and output, in the order bhsd."""
    heads = case.get("num_heads", 1)
    kv_heads, channels = case.get("num_kv_heads", heads), case["head_dim"]
    batch, rows, columns, channels_v = case["batch_size"], case["seq_len_q"], case.get("seq_len_kv", 1), case.get("head_dim_v", channels)
    return {
        "query": (batch, heads, rows, channels),
        "key": (batch, kv_heads, columns, channels),
        "value": (batch, kv_heads, columns, channels_v),
        "output": (batch, heads, rows, channels_v),
    }


def statistics_dtype(case: Case) -> str:
    """The type of logsumexp and the like."""
    return "float64" if "float64" in (case.get("query"), case.get("key"), case.get("value")) else "float32"


def operand(case: Case, name: str, shape: tuple[int, ...], number: int, layout: str) -> Operand:
    """Query, key, value, or what is dequantised."""
    dtype, seed = case[name], case["input_seed"]
    if dtype not in ("int8", "int4"):
        values = inputs.reals(seed, number, shape, dtype)
        return Operand(to_layout(values, layout), values.astype(np.float64), None)
    codes = inputs.codes(seed, number, shape, dtype)
    elements = to_layout(codes.astype(np.int8), layout) if dtype == "int8" else reference.pack_int4(to_layout(codes, layout))
    if f"{name}_granularity" not in case:
        return Operand(elements, codes.astype(np.float64), None)
    granularity = case[f"{name}_granularity"]
    block, group = case.get(f"{name}_block_size", 1), case.get(f"{name}_group_size", 1)
    scale_shape = reference.scale_shape(shape, granularity, block, group)
    scales = inputs.scales(seed, number, scale_shape, dtype)
    zero_points = inputs.zero_points(seed, number, scale_shape) if case.get(f"{name}_zero_points") else None
    mean_shape = (shape[0], shape[1], shape[3])
    means = inputs.reals(seed, inputs.CHANNEL_MEANS + number, mean_shape) if case.get(f"{name}_channel_means") else None
    rotated = case.get(f"{name}_rotated", False)
    quantized = reference.Quantized(codes, scales, zero_points, means, granularity, block, group, rotated)
    return Operand(elements, reference.dequantize(quantized).astype(np.float64), quantized)


def options(case: Case) -> reference.Options:
    """The options of a case for the reference."""
    seed, dtype = case["input_seed"], statistics_dtype(case)
    heads = case.get("num_heads", 1)
    offset = case.get("query_offsets")
    return reference.Options(
        softmax_scale=float(case["softmax_scale"]),
        softcap=float(case.get("softcap", 0.0)),
        mask=inputs.mask(seed, tuple(case["mask_shape"]), case["mask"]) if "mask" in case else None,
        causal=bool(case.get("causal", False)),
        lower_right=case.get("alignment", 0) == 1,
        query_offset=offset[0] if offset is not None and len(offset) == 1 else offset,
        window=(case.get("window_left", -1), case.get("window_right", -1)),
        kv_lengths=case.get("kv_lengths"),
        alibi_slopes=inputs.slopes(seed, heads, dtype) if case.get("alibi_slopes") else None,
        sinks=inputs.reals(seed, inputs.SINKS, (heads,), dtype) if case.get("sinks") else None,
        dropout_p=float(case.get("dropout_p", 0.0)),
        seed=case.get("seed", 0),
        dropout_offset=case.get("dropout_offset", 0),
    )


def flat_operand(case: Case, name: str, shape: tuple[int, ...], number: int) -> np.ndarray:
    """The real numbers of an operand of a flat function."""
    dtype, letter = case[name], name[0]
    if dtype not in ("int8", "int4"):
        return inputs.reals(case["input_seed"], number, shape, dtype).astype(np.float64)
    codes = inputs.codes(case["input_seed"], number, shape, dtype)
    return np.float64(np.float32(case.get(f"{letter}_scale", 1))) * (codes - case.get(f"{letter}_zero_point", 0))


def expected(case: Case) -> dict[str, np.ndarray]:
    """What a case with status 0 should give, in the layout of its memory, as float64 (quantising: as it is, bit for bit)."""
    layout, shape, seed = case.get("layout", "bhsd"), shapes(case), case["input_seed"]
    operation = case["operation"]
    if operation == "quantize":
        values = inputs.reals(seed, inputs.QUERY, shape["query"], case["query"]).astype(np.float32)
        made = reference.quantize(
            values,
            case["codes"],
            case["codes_granularity"],
            block_size=case.get("codes_block_size", 1),
            group_size=case.get("codes_group_size", 1),
            symmetric=not case.get("codes_zero_points", False),
            smooth=case.get("codes_channel_means", False),
            rotated=case.get("codes_rotated", False),
        )
        codes = to_layout(made.codes.astype(np.int8), layout)
        found = {"codes": codes if case["codes"] == "int8" else reference.pack_int4(to_layout(made.codes, layout)), "scales": made.scales}
        if case.get("codes_zero_points"):
            found["zero_points"] = made.zero_points
        if case.get("codes_channel_means"):
            found["channel_means"] = made.channel_means
        return found
    if operation == "dequantize":
        return {"output": to_layout(operand(case, "codes", shape["query"], 0, "bhsd").real, layout)}
    if operation == "merge":
        return _merged(case, shape["query"], layout)
    if operation.startswith("flat"):
        return _flat(case, shape)
    real = [operand(case, name, shape[name], number, layout).real for number, name in enumerate(("query", "key", "value"))]
    if operation == "forward":
        at = reference.forward(*real, options(case))
        return {"output": to_layout(at.output, layout), "logsumexp": at.logsumexp}
    grad_output = inputs.reals(seed, inputs.GRAD_OUTPUT, shape["output"], case["output"]).astype(np.float64)
    grad_lse = None
    if case.get("grad_logsumexp"):
        grad_lse = inputs.reals(seed, inputs.GRAD_LOGSUMEXP, shape["output"][:3], statistics_dtype(case))
    gradients = reference.backward(*real, grad_output, options(case), grad_lse)
    names = case["gradients"].split(",")
    return {name: to_layout(gradients[name], layout) if name in shape else gradients[name] for name in names}


def _merged(case: Case, shape: tuple[int, ...], layout: str) -> dict[str, np.ndarray]:
    seed = case["input_seed"]
    a, b = (inputs.reals(seed, number, shape, case[name]).astype(np.float64) for number, name in enumerate(("query", "key")))
    lse_a, lse_b = (inputs.reals(seed, stream, shape[:3]).astype(np.float64) for stream in (inputs.GRAD_LOGSUMEXP, inputs.MASK))
    lse = np.logaddexp(lse_a, lse_b)
    return {"output": to_layout(np.exp(lse_a - lse)[..., None] * a + np.exp(lse_b - lse)[..., None] * b, layout), "logsumexp": lse}


def _flat(case: Case, shape: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    real = [flat_operand(case, name, shape[name], number) for number, name in enumerate(("query", "key", "value"))]
    settings = reference.Options(softmax_scale=float(np.float32(case["softmax_scale"])), causal=case.get("causal", False))
    if case["operation"] == "flat_forward":
        at = reference.forward(*real, settings)
        output = np.swapaxes(at.output, 2, 3) if case.get("transpose_o") else at.output.transpose(0, 2, 1, 3)
        return {"output": output, **({"logsumexp": at.logsumexp} if "q_scale" in case else {})}
    grad_output = inputs.reals(case["input_seed"], inputs.GRAD_OUTPUT, shape["output"]).astype(np.float64)
    gradients = reference.backward(*real, grad_output, settings)
    found = {name: gradients[name].transpose(0, 2, 1, 3) for name in ("query", "key", "value")}
    return {**found, "d_values": gradients["d_values"]}
