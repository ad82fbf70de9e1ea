"""Runs conformance cases through a Python package: cases on standard input, one line each, to results on standard output.

    python runner.py DEVICE THREADS [--module umfa_rs]

The package is `umfa`, or `umfa_rs`, which has its names and options. What cannot be said in it (a NULL pointer, an unknown code, the flat
functions' transposed operands) is skipped, with the reason. With `--values FOLDER` the results of each case are saved there, for whoever
compares them with the reference.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as pytest does
import inputs
from cases import to_layout
from expected import operand, options, shapes, statistics_dtype

Case = dict[str, Any]
package: Any  # the module that cases run through
MOST_ELEMENTS = 1 << 22


class InexpressibleError(Exception):
    """Why a case cannot be said in this language."""


def check_expressible(case: Case) -> None:
    """Refuse what takes pointers and codes of one's own."""
    for field in ("null", "query_precision_code", "value_precision_code", "transpose_q", "transpose_k", "transpose_v", "transpose_o"):
        if field in case:
            raise InexpressibleError(f"{field} is for callers of C")
    if case.get("alignment", 0) not in (0, 1):
        raise InexpressibleError("alignment is a name, checked as such")
    if any(np.prod([float(size) for size in shape]) > MOST_ELEMENTS for shape in shapes(case).values()):
        raise InexpressibleError("arrays of this size do not exist")


def argument(case: Case, name: str, number: int) -> Any:
    """Query, key or value as `umfa.attention` takes it."""
    layout, shape = case["layout"], shapes(case)[name]
    made = operand(case, name, shape, number, layout)
    elements = np.ascontiguousarray(made.elements)
    if made.quantized is None:
        return elements
    quantized, granularity = made.quantized, made.quantized.granularity
    return package.QuantizedTensor(
        elements,
        quantized.scales,
        quantized.zero_points,
        quantized.channel_means,
        shape=to_layout(np.empty(shape, bool), layout).shape,
        granularity=granularity,
        block_size=quantized.block_size if granularity == "block" else None,
        group_size=quantized.group_size if granularity == "group" else None,
        rotated=quantized.rotated,
        layout=layout,
    )


def scheme(case: Case, name: str) -> Any:
    """How an operand is to be quantised."""
    field = f"quantize_{name}"
    if field not in case:
        return None
    return package.QuantizationScheme(
        case[field],
        case[f"{field}_granularity"],
        symmetric=not case.get(f"{field}_asymmetric", False),
        smooth=case.get(f"{field}_smooth", False),
        rotate=case.get(f"{field}_rotate", False),
    )


def keywords(case: Case) -> dict[str, Any]:
    """The options of `umfa.attention`."""
    given = options(case)
    words: dict[str, Any] = {"scale": given.softmax_scale, "softcap": given.softcap, "layout": case["layout"]}
    if given.causal:
        words["causal"] = "lower_right" if given.lower_right else True
    elif given.lower_right:
        raise InexpressibleError("alignment without causal")
    if "window_left" in case or "window_right" in case:
        words["window"] = given.window
    for word in ("mask", "kv_lengths", "alibi_slopes", "sinks", "query_offset"):
        if getattr(given, word) is not None:
            words[word] = getattr(given, word)
    if "dropout_p" in case:
        words |= {"dropout_p": given.dropout_p, "seed": given.seed, "dropout_offset": given.dropout_offset}
    if any(f"quantize_{name}" in case and case[name] in ("int8", "int4") for name in ("query", "key", "value")):
        raise InexpressibleError("operands that come quantised are taken as they are")
    schemes = [scheme(case, name) for name in ("query", "key", "value")]
    if any(schemes):
        words["quantize"] = package.QuantizationConfig(*schemes)
    return words


def run_attention(case: Case, context: Any) -> dict[str, np.ndarray]:
    """Forward, or backward after it."""
    arguments = [argument(case, name, number) for number, name in enumerate(("query", "key", "value"))]
    words = keywords(case)
    output, lse = package.attention(*arguments, **words, return_lse=True, context=context)
    if case["operation"] == "forward":
        return {"output": output, "logsumexp": lse}
    seed, shape, dtype = case["input_seed"], shapes(case)["output"], statistics_dtype(case)
    grad_output = np.ascontiguousarray(to_layout(inputs.reals(seed, inputs.GRAD_OUTPUT, shape, case["output"]), case["layout"]))
    grad_lse = inputs.reals(seed, inputs.GRAD_LOGSUMEXP, shape[:3], dtype) if case.get("grad_logsumexp") else None
    names = tuple(case["gradients"].split(","))
    given = None if case.get("without_output") else output
    found = package.attention_backward(grad_output, *arguments, given, lse, **words, grad_lse=grad_lse, gradients=names, context=context)
    return dict(zip(names, found, strict=True))


def run_quantize(case: Case, context: Any) -> dict[str, np.ndarray]:
    """Quantise a tensor."""
    granularity, layout = case["codes_granularity"], case["layout"]
    values = inputs.reals(case["input_seed"], inputs.QUERY, shapes(case)["query"], case["query"])
    made = package.quantize(
        np.ascontiguousarray(to_layout(values, layout)),
        case["codes"],
        granularity,
        case["codes_block_size"] if granularity == "block" else None,
        case["codes_group_size"] if granularity == "group" else None,
        symmetric=not case.get("codes_zero_points", False),
        smooth=case.get("codes_channel_means", False),
        rotate=case.get("codes_rotated", False),
        layout=layout,
        context=context,
    )
    found = {"codes": made.data, "scales": made.scales, "zero_points": made.zero_points, "channel_means": made.channel_means}
    return {name: array for name, array in found.items() if array is not None}


def run_dequantize(case: Case, context: Any) -> dict[str, np.ndarray]:
    """Dequantise a tensor."""
    if case["output"] != "float32":
        raise InexpressibleError("QuantizedTensor.dequantize() gives float32")
    renamed = {name.replace("codes", "query", 1): value for name, value in case.items()}
    return {"output": argument(renamed, "query", 0).dequantize(context=context)}


def run_merge(case: Case, context: Any) -> dict[str, np.ndarray]:
    """Merge two results."""
    seed, shape, layout = case["input_seed"], shapes(case)["query"], case["layout"]
    if not hasattr(package, "merge"):
        raise InexpressibleError(f"{package.__name__} has no merge()")
    if case["output"] != case["query"]:
        raise InexpressibleError("the result of umfa.merge has the type of its first argument")
    a, b = (np.ascontiguousarray(to_layout(inputs.reals(seed, n, shape, case[name]), layout)) for n, name in enumerate(("query", "key")))
    lse_a, lse_b = (inputs.reals(seed, stream, shape[:3]) for stream in (inputs.GRAD_LOGSUMEXP, inputs.MASK))
    output, lse = package.merge(a, lse_a, b, lse_b, layout=layout, context=context)
    return {"output": output, "logsumexp": lse}


def run_flat(case: Case, context: Any) -> dict[str, np.ndarray]:
    """The flat functions have no counterpart in Python; what computes the same in their layout stands for them."""
    if not hasattr(package, "flash_attention_forward"):
        raise InexpressibleError(f"{package.__name__} has no flash_attention_forward()")
    if case["operation"] == "flat_backward":
        raise InexpressibleError("training records are for callers of C")
    arguments = []
    for number, (name, letter) in enumerate((("query", "q"), ("key", "k"), ("value", "v"))):
        fields = (
            {**case, "layout": "bshd", f"{name}_granularity": "tensor"} if case[name] in ("int8", "int4") else {**case, "layout": "bshd"}
        )
        made = operand(fields, name, shapes(case)[name], number, "bshd")
        elements = np.ascontiguousarray(made.elements)
        if case[name] in ("int8", "int4"):
            zero = case.get(f"{letter}_zero_point", 0)
            elements = package.QuantizedTensor(
                elements,
                np.float32(case.get(f"{letter}_scale", 1.0)),
                np.int32(zero) if zero else None,
                shape=to_layout(np.empty(shapes(case)[name], bool), "bshd").shape,
                granularity="tensor",
                layout="bshd",
            )
        arguments.append(elements)
    scale = float(np.float32(float(case["softmax_scale"])))
    causal = bool(case.get("causal", False))
    output, lse = package.flash_attention_forward(context, *arguments, causal=causal, softmax_scale=scale, return_lse=True)
    return {"output": output, **({"logsumexp": lse} if "q_scale" in case else {})}


RUN = {
    "forward": run_attention,
    "backward": run_attention,
    "quantize": run_quantize,
    "dequantize": run_dequantize,
    "merge": run_merge,
    "flat_forward": run_flat,
    "flat_backward": run_flat,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device")
    parser.add_argument("threads", type=int)
    parser.add_argument("--module", default="umfa")
    parser.add_argument("--values", type=Path)
    chosen = parser.parse_args()
    global package
    package = importlib.import_module(chosen.module)
    make_context = package.MFAContext if chosen.module == "umfa" else package.MfaContext
    with make_context(device=chosen.device, num_threads=chosen.threads) as context:
        for line in sys.stdin:
            case = json.loads(line)
            answer: dict[str, Any] = {"id": case["id"], "outputs": {}, "status": 0, "message": ""}
            try:
                check_expressible(case)
                results = RUN[case["operation"]](case, context)
                answer["outputs"] = {name: inputs.hash_of(array) for name, array in results.items()}
                if chosen.values:
                    np.savez(
                        chosen.values / (case["id"].replace("/", "+") + ".npz"), **{n: a.astype(np.float64) for n, a in results.items()}
                    )
            except InexpressibleError as reason:
                answer = {"id": case["id"], "skipped": str(reason)}
            except package.MFAError as error:
                answer |= {"status": error.status, "message": str(error)}
            print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
