"""No call touches a byte beyond its buffers or writes one of its inputs: every buffer lies between pages that nobody may touch.

`guarded_calls.c` stands before libmfa in the C runner of the conformance suite and moves the buffers of each call. The cases are those of
that suite and a sweep of ragged sizes; on guarded buffers, in whatever layout, they give the bytes that they give without. In the layout
with gaps the keys and values past the lengths are not there at all.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import figures
import suite

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guarded_calls.c finds libmfa as Linux does")

SOURCE = Path(__file__).with_name("guarded_calls.c")
PLACES = ("end", "begin")
LAYOUTS = ("kept", "gaps", "transposed")

BACKENDS = {
    **suite.BACKENDS,
    "cpu, float kernels": suite.Backend("cpu, float kernels", "cpu", "float"),
    "cpu, integer kernels": suite.Backend("cpu, integer kernels", "cpu", "integer"),
}
# Where tiles, vectors and registers end, and beside that.
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 200, 255, 256, 257, 511, 513)
CHANNELS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 80, 96, 100, 127, 128, 129, 160, 192, 256, 257)
FLOATS = ("float32", "float16", "bfloat16")
GRANULARITIES = ("tensor", "head", "token", "block", "channel", "group")


@functools.cache
def guards() -> Path:
    """The library that moves buffers."""
    library = suite.ROOT / ".build" / "assurance" / "guarded_calls.so"
    try:
        suite.compile_preloaded(SOURCE, library)
    except suite.UnavailableError as reason:
        pytest.skip(str(reason))
    return library


def run(backend: str, cases: tuple[suite.Case, ...], **variables: str) -> tuple[list[suite.Answer], str]:
    """What the C runner answers to the cases, and what it said on standard error.

    On one thread, since workers of the pool let no signal be handled.
    """
    try:
        BACKENDS[backend].check()
        runner = suite.command("C")
    except suite.UnavailableError as reason:
        pytest.skip(f"{backend}: {reason}")
    text = "".join(json.dumps(case) + "\n" for case in cases)
    environment = {**BACKENDS[backend].environment(), **variables}
    done = subprocess.run(
        [*runner, BACKENDS[backend].device, "1"], input=text, capture_output=True, text=True, env=environment, check=False
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.endswith("}")]
    last = cases[len(answers)]["id"] if len(answers) < len(cases) else "none"
    assert done.returncode == 0, f"{backend}, {variables}: ended with {done.returncode} in the case {last}: {done.stderr[-2000:]}"
    return answers, done.stderr


@functools.cache
def plain(backend: str, cases: tuple[str, ...]) -> list[suite.Answer]:
    """The answers without guards."""
    return run(backend, tuple(json.loads(case) for case in cases))[0]


def guarded(backend: str, cases: tuple[suite.Case, ...], place: str, layout: str, **variables: str) -> tuple[list[suite.Answer], str]:
    """What the C runner answers on guarded buffers, and what was said on standard error."""
    return run(backend, cases, LD_PRELOAD=str(guards()), GUARD_PLACE=place, GUARD_LAYOUT=layout, **variables)


# ---- A sweep of sizes --------------------------------------------------------------------------------------------------------------------


def sweep(count: int, work: int) -> tuple[suite.Case, ...]:
    """Cases of ragged sizes, of every type and option, drawn from their number."""
    return tuple(drawn(np.random.default_rng(number), number, work) for number in range(count))


def drawn(rng: np.random.Generator, number: int, work: int) -> suite.Case:
    """One case of the sweep; its multiplications are about `work` at most."""

    def one_of(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    def chance(share: float) -> bool:
        return bool(rng.random() < share)

    operation = one_of(
        "forward", "forward", "decode", "backward", "backward", "quantize", "dequantize", "merge", "flat_forward", "flat_backward"
    )
    channels, channels_v = int(one_of(*CHANNELS)), int(one_of(*CHANNELS))
    rows, columns = int(one_of(*(TOKENS if operation != "decode" else (1, 2, 3, 4)))), int(one_of(*TOKENS))
    while rows * columns * (channels + channels_v) > work:
        rows, columns = max(rows // 2, 1), max(columns - columns // 3, 1)
    kv_heads, group = int(one_of(1, 1, 2)), int(one_of(1, 1, 3))
    flat = operation.startswith("flat")
    sizes = {
        "batch_size": int(one_of(1, 1, 2)), "num_heads": kv_heads * (1 if flat else group), "num_kv_heads": kv_heads, "seq_len_q": rows,
        "seq_len_kv": columns, "head_dim": channels, "head_dim_v": channels if flat or chance(0.5) else channels_v,
    }  # fmt: skip
    case: suite.Case = {
        "id": f"sweep/{operation}/{number}", "operation": "forward" if operation == "decode" else operation, "input_seed": 1000 + number,
        "status": 0, "layout": one_of("bhsd", "bshd"), "softmax_scale": 0.25, **sizes,
    }  # fmt: skip
    if operation in ("quantize", "dequantize"):
        # A rotation needs whole rows, and the C interface smooths whatever has means.
        names = {"codes": one_of("int8", "int4"), "codes_granularity": one_of(*GRANULARITIES), "codes_zero_points": chance(0.5)}
        names |= {"codes_block_size": int(one_of(1, 5, 64)), "codes_group_size": int(one_of(1, 3, 32))}
        names |= {"codes_channel_means": chance(0.3), "codes_rotated": chance(0.3)}
        return {**case, **names, "query": one_of("float64", *FLOATS), "output": one_of("float64", *FLOATS)}
    types = (one_of(*FLOATS, "int8", "int8", "int4"),) * 3 if chance(0.7) else tuple(one_of(*FLOATS, "int8", "int4") for _ in range(3))
    if operation == "merge":
        return {**case, "query": one_of(*FLOATS), "key": one_of(*FLOATS), "output": one_of(*FLOATS)}
    if chance(0.07) and not flat:
        types = ("float64",) * 3
    case |= dict(zip(("query", "key", "value"), types, strict=True))
    case["output"] = case["gradient"] = "float32" if types[0] in ("int8", "int4") else types[0]
    if flat:
        case |= {f"transpose_{letter}": chance(0.3) for letter in "qkvo"}
        if operation == "flat_backward" or chance(0.5):
            case |= {"q_scale": 0.03125, "k_scale": 0.0625, "v_scale": 0.015625, "q_zero_point": 2, "k_zero_point": -1, "v_zero_point": 3}
        return {**case, "causal": chance(0.5)}
    granularity, zero_points = one_of("token", "token", *GRANULARITIES), chance(0.3)
    for name, dtype in zip(("query", "key", "value"), types, strict=True):
        if dtype in ("int8", "int4"):
            case[f"{name}_granularity"], case[f"{name}_zero_points"] = granularity, zero_points
            case |= {f"{name}_block_size": int(one_of(5, 64)), f"{name}_group_size": int(one_of(3, 32))}
    if types[1] in ("int8", "int4") and chance(0.2):
        case["key_channel_means"] = True
    if set(types) <= set(FLOATS) and operation != "backward" and chance(0.2):
        for name in ("query", "key", "value"):
            case |= {f"quantize_{name}": one_of("int8", "int4"), f"quantize_{name}_granularity": granularity}
            case |= {f"quantize_{name}_block_size": 5, f"quantize_{name}_group_size": 3, f"quantize_{name}_asymmetric": zero_points}
    batch = sizes["batch_size"]
    if chance(0.5):
        case["causal"] = True
        case |= one_of({"alignment": 1}, {}, {"query_offsets": [int(rng.integers(-3, columns + 3)) for _ in range(batch)]})
    if chance(0.2):
        case |= {"window_left": int(rng.integers(-1, columns + 1)), "window_right": int(rng.integers(-1, columns + 1))}
    if chance(0.3):
        case["kv_lengths"] = [int(rng.integers(0, columns + 1)) for _ in range(batch)]
    if chance(0.3):
        case["mask"] = one_of("bool", "float32", "float16", "bfloat16", "float64")
        case["mask_shape"] = [int(one_of(1, size)) for size in (batch, sizes["num_heads"], rows, columns)]
    case |= {"softcap": 2.0} if chance(0.2) else {}
    case |= {"alibi_slopes": True} if chance(0.2) else {}
    case |= {"sinks": True} if chance(0.2) else {}
    case |= {"dropout_p": 0.25, "seed": number} if chance(0.1) else {}
    if operation == "backward":
        gradients = ["query", "key", "value"] if chance(0.7) else [one_of("query", "key", "value")]
        gradients += ["mask"] if case.get("mask", "bool") != "bool" and chance(0.5) else []
        gradients += [name for name in ("sinks", "alibi_slopes") if name in case and chance(0.5)]
        case |= {"gradients": ",".join(gradients), "grad_logsumexp": chance(0.3), "without_output": chance(0.3)}
    return case


def many_heads() -> tuple[suite.Case, ...]:
    """Decoding with so many heads side by side that rows share cache sets, which kernels copy: of head sizes that end within a vector."""
    made = []
    for number, (channels, key, value) in enumerate(
        (channels, *types)
        for channels in (8, 16, 24, 32, 40, 48, 96)
        for types in (("int8", "float32"), ("float16", "int8"), ("int4", "float32"), ("int8", "int8"), ("int4", "int8"), ("float16",) * 2)
    ):
        case: suite.Case = {
            "id": f"many heads/{number}", "operation": "forward", "input_seed": 5000 + number, "status": 0, "layout": "bshd",
            "batch_size": 1, "num_heads": 64, "num_kv_heads": 64, "seq_len_q": 1, "seq_len_kv": 70, "head_dim": channels,
            "head_dim_v": channels, "softmax_scale": 0.25, "query": "float32", "key": key, "value": value, "output": "float32",
        }  # fmt: skip
        made.append(case | {f"{name}_granularity": "token" for name in ("key", "value") if case[name] in ("int8", "int4")})
    return tuple(made)


# ---- Tests -------------------------------------------------------------------------------------------------------------------------------

# "kept" and "gaps" have what is last in a tensor last in memory, and gaps end before the keys past the lengths.
MODES = figures.pick(
    (("begin", "kept"), ("end", "gaps")), (("end", "kept"), ("begin", "kept"), ("end", "gaps"), ("begin", "transposed"))
)  # fmt: skip
# The best instruction set is that of "cpu" itself.
TRIED = figures.pick(
    ("cpu", "cpu, reference kernels", "cpu, baseline", "cpu, float kernels", "softmetal"),
    tuple(name for name in BACKENDS if name != f"cpu, {figures.instruction_set()}"),
)


@pytest.mark.parametrize(("place", "layout"), MODES)
@pytest.mark.parametrize("backend", TRIED)
def test_each_backend__buffers_between_forbidden_pages__gives_the_same_bytes(backend, place, layout):
    cases = everything()[:: figures.pick(4, 3) if backend == "softmetal" else 1]
    expected = plain(backend, tuple(json.dumps(case) for case in cases))
    found, said = guarded(backend, cases, place, layout)
    counted = re.search(r"guarded_calls: (\d+) calls, (\d+) buffers, (\d+) calls untouched", said)
    assert counted, said
    other = [case["id"] for case, one, two in zip(cases, found, expected, strict=True) if one != two]
    figures.add(
        "guard pages",
        guarded_calls_without_an_access_beyond_a_buffer=int(counted[1]),
        buffers_of_these_calls=int(counted[2]),
        cases_with_the_bytes_of_unguarded_calls=len(cases) - len(other),
        cases_with_other_bytes=len(other),
    )
    assert not other, f"{len(other)} cases give other bytes on guarded buffers: {other[:10]}"
    assert int(counted[3]) <= sum(case["status"] != 0 for case in cases), "calls that the library accepts were left as they are"


@pytest.mark.parametrize("backend", ["cpu", "cpu, float kernels"])
def test_many_heads__a_forbidden_page_behind_the_last_one__gives_the_same_bytes(backend):
    found, _ = guarded(backend, many_heads(), "end", "kept")
    assert found == plain(backend, tuple(json.dumps(case) for case in many_heads()))


def everything() -> tuple[suite.Case, ...]:
    """The cases of the conformance suite, those of the sweep, and those of many heads."""
    return suite.cases() + sweep(figures.pick(200, 500), figures.pick(1 << 19, 1 << 21)) + many_heads()


def test_guarded_calls__every_case_of_the_sweep__is_one_that_the_library_accepts():
    answers, _ = run("cpu", everything())
    assert [answer["id"] for answer in answers[len(suite.cases()) :] if answer["status"]] == []
    kernels = {answer["kernel"] for answer in answers if answer.get("kernel")}
    figures.record("guard pages", cases=len(everything()), kernels_on_the_best_instruction_set=len(kernels))


BUFFERS = (
    "query", "key", "value", "output", "mask", "logsumexp", "kv_lengths", "query_offsets", "alibi_slopes", "sinks",
    "scales of query", "scales of key", "scales of value", "zero points", "channel means",
    "grad_output", "grad_logsumexp", "d_values", "grad_query", "grad_key", "grad_value", "grad_mask", "grad_sinks", "grad_alibi_slopes",
    "input", "scales of input", "scales of output", "output_a", "output_b", "logsumexp_a", "logsumexp_b",
    "workspace",
)  # fmt: skip


@pytest.mark.parametrize("place", figures.pick(PLACES[:1], PLACES))
def test_guarded_calls__each_buffer_a_little_too_far__is_found(place):
    """The guards work: where a buffer is not wholly there, the first call that uses it is stopped, and the message names it."""
    for name in BUFFERS:
        cases = tuple(case for case in suite.cases() if case["status"] == 0)
        with pytest.raises(AssertionError, match=rf"guarded_calls: mfa_\w+: {name}( \(a result\))?: byte \d+ of \d+ was touched"):
            guarded("cpu", cases, place, "kept", GUARD_SHIFT=name)
    figures.record("guard pages", kinds_of_buffers_whose_guards_were_tried=len(BUFFERS))
