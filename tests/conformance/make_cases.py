"""Write the conformance cases: tests/conformance/cases.jsonl. `--check` only tells whether the file is what this would write."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("cases.jsonl")

FLOATS = ("float32", "float16", "bfloat16")
CODES = ("int8", "int4")
GRANULARITIES = ("tensor", "head", "token", "block", "channel", "group")
SIZES: dict[str, Any] = {
    "batch_size": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "seq_len_q": 9,
    "seq_len_kv": 37,
    "head_dim": 16,
    "head_dim_v": 12,
    "layout": "bhsd",
    "softmax_scale": 0.25,
}

# Every row of the semantics that an option decides; what a case adds to a plain problem of SIZES.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal_lower_right": {"causal": True, "alignment": 1},
    "causal_offset": {"causal": True, "query_offsets": [20]},
    "causal_offsets": {"causal": True, "query_offsets": [-3, 40]},
    "lower_right_lengths": {"causal": True, "alignment": 1, "kv_lengths": [37, 12]},
    "window": {"window_left": 5, "window_right": 3},
    "window_causal": {"window_left": 4, "window_right": -1, "causal": True, "query_offsets": [10]},
    "window_left_zero": {"window_left": 0, "window_right": -1},
    "lengths": {"kv_lengths": [30, 0]},
    "lengths_one": {"kv_lengths": [1, 37]},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": True},
    "sinks": {"sinks": True},
    "sinks_empty_rows": {"sinks": True, "kv_lengths": [0, 5]},
    "mask_bool": {"mask": "bool", "mask_shape": [2, 4, 9, 37]},
    "mask_bool_broadcast": {"mask": "bool", "mask_shape": [1, 1, 9, 37]},
    "mask_additive": {"mask": "float32", "mask_shape": [2, 4, 9, 37]},
    "mask_additive_broadcast": {"mask": "float32", "mask_shape": [2, 1, 1, 37]},
    "mask_float16": {"mask": "float16", "mask_shape": [1, 4, 9, 37]},
    "mask_bfloat16": {"mask": "bfloat16", "mask_shape": [1, 1, 9, 1]},
    "dropout": {"dropout_p": 0.25, "seed": 12345678901234567890, "dropout_offset": 7},
    "scale_negative": {"softmax_scale": -0.5},
    "scale_zero": {"softmax_scale": 0.0},
    "bshd": {"layout": "bshd"},
    "all": {
        "causal": True,
        "alignment": 1,
        "window_left": 20,
        "window_right": -1,
        "kv_lengths": [33, 37],
        "softcap": 3.0,
        "alibi_slopes": True,
        "sinks": True,
        "mask": "float32",
        "mask_shape": [1, 4, 9, 37],
        "layout": "bshd",
    },
}

# Largest error against the reference, as a share of the largest number of the result (at least 1).
BOUNDS = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
CODES_BOUND = 2e-2  # integer kernels round weights to 8 bits
CODES_GRADIENT_BOUND = 5e-2  # and d_values come from an output so rounded
ROW_GRADIENT_BOUND = 0.2  # the gradient of a number for a whole row is exactly what d_values are off by, summed over the heads
FUSED_BOUND = {"int8": 6e-2, "int4": 6e-1}


def operands(*dtypes: str, granularity: str = "token", **others: Any) -> dict[str, Any]:
    """The fields of query, key and value of these types; codes have scales."""
    fields: dict[str, Any] = {}
    for name, dtype in zip(("query", "key", "value"), dtypes, strict=True):
        fields[name] = dtype
        if dtype in CODES:
            fields[f"{name}_granularity"] = granularity
            if granularity == "block":
                fields[f"{name}_block_size"] = 5
            if granularity == "group":
                fields[f"{name}_group_size"] = 4
    return fields | others


def result(query: str) -> str:
    """The type of a result, by convention."""
    return query if query not in CODES else "float32"


def bound(dtypes: tuple[str, ...]) -> float:
    """The bound of forward on operands of these types."""
    if all(dtype == "float64" for dtype in dtypes):
        return BOUNDS["float64"]
    if any(dtype in CODES for dtype in dtypes[1:]):
        return CODES_BOUND
    return BOUNDS[result(dtypes[0])]


def forward(name: str, dtypes: tuple[str, ...], **fields: Any) -> dict[str, Any]:
    """A case of forward."""
    made = {**SIZES, **operands(*dtypes), "output": result(dtypes[0]), "bound": bound(dtypes), **fields}
    return {"id": f"forward/{name}", "operation": "forward", **made}


def forward_cases() -> Iterator[dict[str, Any]]:
    types = [(dtype,) * 3 for dtype in (*FLOATS, "float64", *CODES)] + [("float16", "int8", "int8")]
    for option, fields in OPTIONS.items():
        for dtypes in types:
            integer_dropout = "dropout_p" in fields and dtypes[0] in CODES
            yield forward(f"{option}/{'-'.join(dict.fromkeys(dtypes))}", dtypes, **fields, **({"bound": 1e-4} if integer_dropout else {}))
    for dtypes in itertools.product(("float32", "bfloat16", "int8", "int4"), repeat=3):
        if len(set(dtypes)) > 1:
            yield forward(f"mixed/{'-'.join(dtypes)}", dtypes, causal=True)
    for granularity, dtype in itertools.product(GRANULARITIES, CODES):
        fields = operands(*(dtype,) * 3, granularity=granularity)
        yield forward(f"granularity/{granularity}/{dtype}", (dtype,) * 3, **fields)
        zero_points = {f"{name}_zero_points": True for name in ("query", "key", "value")}
        yield forward(f"zero_points/{granularity}/{dtype}", (dtype,) * 3, **fields, **zero_points)
    for dtype in CODES:
        smooth = {"query_rotated": True, "key_rotated": True, "key_channel_means": True}
        for option in ("plain", "softcap", "sinks", "causal"):
            yield forward(f"smoothed_rotated/{option}/{dtype}", (dtype,) * 3, **OPTIONS[option], **smooth, bound=5e-2)
    for rows, columns in ((1, 1), (1, 300), (17, 1), (64, 64), (65, 129), (130, 257), (3, 1000)):
        for dtype in ("float32", "float16", "int8"):
            fields = {"seq_len_q": rows, "seq_len_kv": columns, "batch_size": 1, "num_heads": 2, "num_kv_heads": 1}
            yield forward(f"lengths/{rows}-{columns}/{dtype}", (dtype,) * 3, **fields, causal=True, alignment=1)
    for channels in (1, 2, 3, 7, 31, 32, 63, 64, 80, 96, 128, 160, 256):
        for dtype in ("float32", "int8"):
            fields = {"head_dim": channels, "head_dim_v": channels, "batch_size": 1, "num_heads": 2, "num_kv_heads": 2}
            yield forward(f"channels/{channels}/{dtype}", (dtype,) * 3, **fields, softmax_scale=0.5 / channels**0.5)
    for heads, kv_heads in ((1, 1), (8, 1), (6, 3)):
        yield forward(f"heads/{heads}-{kv_heads}/float32", ("float32",) * 3, num_heads=heads, num_kv_heads=kv_heads, causal=True)
    for name in ("batch_size", "seq_len_q", "seq_len_kv"):
        yield forward(f"empty/{name}/float32", ("float32",) * 3, **{name: 0})
    for dtype, floats in itertools.product(CODES, FLOATS):
        schemes: dict[str, Any] = {
            "quantize_query": "int8",
            "quantize_query_granularity": "token",
            "quantize_query_rotate": True,
            "quantize_key": dtype,
            "quantize_key_granularity": "token",
            "quantize_key_asymmetric": dtype == "int4",
            "quantize_key_smooth": True,
            "quantize_key_rotate": True,
            "quantize_value": dtype,
            "quantize_value_granularity": "token",
            "quantize_value_asymmetric": dtype == "int4",
        }
        for option in ("plain", "causal", "lengths", "mask_bool"):
            yield forward(f"fused/{dtype}/{option}/{floats}", (floats,) * 3, **OPTIONS[option], **schemes, bound=FUSED_BOUND[dtype])


def backward_cases() -> Iterator[dict[str, Any]]:
    def backward(name: str, dtypes: tuple[str, ...], **fields: Any) -> dict[str, Any]:
        gradients = ["query", "key", "value"]
        if fields.get("mask", "bool") != "bool":
            gradients.append("mask")
        gradients += [each for each in ("sinks", "alibi_slopes") if fields.get(each)]
        limit = CODES_GRADIENT_BOUND if any(dtype in CODES for dtype in dtypes) else 10 * BOUNDS[result(dtypes[0])]
        if fields.get("mask", "bool") != "bool":
            limit = max(limit, BOUNDS[fields["mask"]])  # its gradient is of its type
            if fields["mask_shape"][3] == 1 and any(dtype in CODES for dtype in dtypes):
                limit = ROW_GRADIENT_BOUND
        made = {
            **SIZES,
            **operands(*dtypes),
            "output": result(dtypes[0]),
            "gradient": result(dtypes[0]),
            "gradients": ",".join(gradients),
            "bound": limit,
            **fields,
        }
        return {"id": f"backward/{name}", "operation": "backward", **made}

    for option, fields in OPTIONS.items():
        for dtype in (*FLOATS, "float64", *CODES):
            yield backward(f"{option}/{dtype}", (dtype,) * 3, **fields, grad_logsumexp=option in ("plain", "sinks", "causal"))
    for names in ("query", "key", "value", "value,query"):
        yield backward(f"part/{names.replace(',', '-')}/float32", ("float32",) * 3, gradients=names)
    for dtype in ("float32", "int8"):
        yield backward(f"without_output/{dtype}", (dtype,) * 3, without_output=True, causal=True)
        yield backward(f"tiles/{dtype}", (dtype,) * 3, seq_len_q=130, seq_len_kv=200, batch_size=1, causal=True)


def quantization_cases() -> Iterator[dict[str, Any]]:
    for granularity, dtype, asymmetric in itertools.product(GRANULARITIES, CODES, (False, True)):
        sizes = {**SIZES, "seq_len_q": 13, "head_dim": 24}
        scheme: dict[str, Any] = {"codes": dtype, "codes_granularity": granularity, "codes_zero_points": asymmetric}
        scheme["codes_block_size" if granularity == "block" else "codes_group_size"] = 5
        kind = f"{granularity}/{dtype}/{'asymmetric' if asymmetric else 'symmetric'}"
        yield {"id": f"quantize/{kind}", "operation": "quantize", **sizes, **scheme, "query": "float32", "bound": 0}
        yield {"id": f"dequantize/{kind}", "operation": "dequantize", **sizes, **scheme, "output": "float32", "bound": 0}
    for dtype, smooth, rotate, floats in itertools.product(CODES, (False, True), (False, True), ("float32", "bfloat16")):
        scheme = {"codes": dtype, "codes_granularity": "token", "codes_channel_means": smooth, "codes_rotated": rotate}
        kind = f"{'smooth' if smooth else 'plain'}-{'rotated' if rotate else 'unrotated'}/{dtype}/{floats}"
        yield {"id": f"quantize/{kind}", "operation": "quantize", **SIZES, **scheme, "query": floats, "bound": 0}
        yield {"id": f"dequantize/{kind}", "operation": "dequantize", **SIZES, **scheme, "output": floats, "bound": 0}
    for channels in (1, 7, 31):
        scheme = {"codes": "int4", "codes_granularity": "token", "head_dim": channels}
        yield {"id": f"quantize/channels-{channels}/int4", "operation": "quantize", **SIZES, **scheme, "query": "float32", "bound": 0}


def merge_cases() -> Iterator[dict[str, Any]]:
    for a, b, output in (("float32",) * 3, ("float16", "float32", "float16"), ("bfloat16", "float16", "float32")):
        fields = {"query": a, "key": b, "output": output, "bound": BOUNDS[output]}
        for layout in ("bhsd", "bshd"):
            yield {"id": f"merge/{a}-{b}-{output}/{layout}", "operation": "merge", **SIZES, **fields, "layout": layout}


def flat_cases() -> Iterator[dict[str, Any]]:
    sizes = {"batch_size": 2, "num_heads": 3, "seq_len_q": 11, "seq_len_kv": 21, "head_dim": 20, "softmax_scale": 0.125}
    for dtype, causal in itertools.product((*FLOATS, *CODES), (False, True)):
        fields = {"query": dtype, "key": dtype, "value": dtype, "output": result(dtype), "causal": causal}
        kind = f"{dtype}/{'causal' if causal else 'full'}"
        limit = {"bound": CODES_BOUND if dtype in CODES else BOUNDS[dtype], "softmax_scale": 1e-4 if dtype in CODES else 0.125}
        yield {"id": f"flat_forward/{kind}", "operation": "flat_forward", **sizes, **fields, **limit}
        scales = {"q_scale": 0.03125, "k_scale": 0.0625, "v_scale": 0.015625, "q_zero_point": 2, "k_zero_point": -1, "v_zero_point": 3}
        quantized = {**scales, "bound": CODES_BOUND if dtype in CODES else BOUNDS[dtype]}
        yield {"id": f"flat_forward_quantized/{kind}", "operation": "flat_forward", **sizes, **fields, **quantized}
        yield {"id": f"flat_backward/{kind}", "operation": "flat_backward", **sizes, **fields, **quantized, "bound": 2e-2}
    for dtype, letter in itertools.product(("float32", "float16", "int8", "int4"), "qkvo"):
        fields = {"query": dtype, "key": dtype, "value": dtype, "output": result(dtype), f"transpose_{letter}": True}
        scales = {"q_scale": 0.03125, "k_scale": 0.0625, "v_scale": 0.015625, "bound": CODES_BOUND if dtype in CODES else BOUNDS[dtype]}
        yield {"id": f"flat_forward_quantized/transpose_{letter}/{dtype}", "operation": "flat_forward", **sizes, **fields, **scales}


def error_cases() -> Iterator[dict[str, Any]]:
    """Calls that are refused: nothing is written, and the message names the argument."""

    def error(name: str, status: int, operation: str = "forward", **fields: Any) -> dict[str, Any]:
        made = {**SIZES, **operands(*("float32",) * 3), "output": "float32", "gradient": "float32", "gradients": "query,key,value"}
        return {"id": f"error/{name}", "operation": operation, **made, **fields, "status": status}

    dimensions: dict[str, dict[str, Any]] = {
        "num_heads_zero": {"num_heads": 0, "num_kv_heads": 0},
        "num_kv_heads_zero": {"num_kv_heads": 0},
        "heads_not_a_multiple": {"num_heads": 4, "num_kv_heads": 3},
        "head_dim_zero": {"head_dim": 0},
        "head_dim_v_zero": {"head_dim_v": 0},
        "head_dim_too_large": {"head_dim": 1025},
        "head_dim_v_too_large": {"head_dim_v": 1025, "seq_len_kv": 4},
        "kv_length_negative": {"kv_lengths": [-1, 3]},
        "kv_length_too_large": {"kv_lengths": [38, 3]},
        "offsets_too_many": {"causal": True, "query_offsets": [1, 2, 3]},
        "mask_shape": {"mask": "bool", "mask_shape": [1, 1, 9, 36]},
        "mask_heads": {"mask": "bool", "mask_shape": [1, 2, 9, 37]},
        "huge_product": {"batch_size": 2**31, "num_heads": 2**31, "num_kv_heads": 2**31},
        "huge_tokens": {"seq_len_q": 2**32 - 1, "batch_size": 2**31, "num_heads": 1024, "num_kv_heads": 1024},
        "huge_keys": {"seq_len_kv": 2**32 - 1, "batch_size": 2**30, "num_heads": 512, "num_kv_heads": 512},
    }
    arguments: dict[str, dict[str, Any]] = {
        "query_null": {"null": "query"},
        "key_data_null": {"null": "key_data"},
        "output_null": {"null": "output"},
        "query_precision_unknown": {"query_precision_code": 99},
        "value_precision_negative": {"value_precision_code": -1},
        "scale_nan": {"softmax_scale": "nan"},
        "scale_infinite": {"softmax_scale": "inf"},
        "softcap_negative": {"softcap": -1.0},
        "softcap_nan": {"softcap": "nan"},
        "window_below_minus_one": {"window_left": -2},
        "window_right_below_minus_one": {"window_right": -7},
        "dropout_above_one": {"dropout_p": 1.5},
        "dropout_negative": {"dropout_p": -0.25},
        "dropout_nan": {"dropout_p": "nan"},
        "offset_with_lower_right": {"causal": True, "alignment": 1, "query_offsets": [3]},
        "alignment_unknown": {"alignment": 7},
        "rotation_of_query_alone": {**operands("int8", "int8", "int8"), "query_rotated": True},
        "rotation_of_value": {**operands("int8", "int8", "int8"), "value_rotated": True},
        "means_of_query": {**operands("int8", "int8", "int8"), "query_channel_means": True},
        "scheme_of_a_float": {"quantize_key": "float16", "quantize_key_granularity": "token"},
        "scheme_of_codes": {**operands("float32", "int8", "float32"), "quantize_key": "int8", "quantize_key_granularity": "token"},
        "scheme_smooths_values": {"quantize_value": "int8", "quantize_value_granularity": "token", "quantize_value_smooth": True},
    }
    for name, fields in dimensions.items():
        yield error(name, 3, **fields)
        yield error(f"backward/{name}", 3, "backward", **fields)
    for name, fields in arguments.items():
        yield error(name, 5, **fields)
    flat = {"num_heads": 3, "seq_len_q": 11, "seq_len_kv": 21, "head_dim": 20, "num_kv_heads": 3, "head_dim_v": 20}
    yield error("flat/head_dim_zero", 3, "flat_forward", **{**flat, "head_dim": 0, "head_dim_v": 0})
    yield error("flat/num_heads_zero", 3, "flat_forward", **{**flat, "num_heads": 0, "num_kv_heads": 0})
    yield error("flat/query_null", 5, "flat_forward", **flat, null="query")
    yield error("flat/output_null", 5, "flat_forward", **flat, null="output")
    yield error("flat/precision_unknown", 5, "flat_forward", **flat, query_precision_code=17)
    yield error("flat/precision_float64", 6, "flat_forward", **flat, query_precision_code=3)
    yield error("flat/scale_nan", 5, "flat_forward", **{**flat, "softmax_scale": "nan"})
    yield error("flat/no_training_record", 3, "flat_backward", **flat, null="record")
    int8 = operands(*("int8",) * 3)
    scales = {"q_scale": 0.03125, "k_scale": 0.0625, "v_scale": 0.015625}
    yield error("flat/other_scale_in_backward", 5, "flat_backward", **{**flat, **int8, **scales}, backward_k_scale=0.5)
    yield error("flat/scale_zero", 5, "flat_forward", **{**flat, **int8, **scales, "k_scale": 0.0})


def all_cases() -> list[dict[str, Any]]:
    """Every case, with a seed of its own."""
    generators = (forward_cases, backward_cases, quantization_cases, merge_cases, flat_cases, error_cases)
    cases = [case for generator in generators for case in generator()]
    for number, case in enumerate(cases):
        case["input_seed"] = number + 1
        case.setdefault("status", 0)
    return cases


def lines() -> str:
    """The file's text: a line for its version, then one for each case."""
    cases = all_cases()
    assert len({case["id"] for case in cases}) == len(cases), "two cases have one name"
    return "".join(json.dumps(case) + "\n" for case in cases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file would change")
    text = lines()
    if not parser.parse_args().check:
        FILE.write_text(text)
    elif FILE.read_text() != text:
        print("tests/conformance/cases.jsonl is not what tests/conformance/make_cases.py makes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
