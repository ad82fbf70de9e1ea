"""MFABridge, the interface of Objective-C: the same bytes as the C functions write on the same device, errors, memory, examples.

Cases are run by objc/tests/run_cases.m, which reads them from a file and prints what became of them.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import build_objc
import native
import reference
import umfa
from cases import OPTIONS, Problem, Sizes, problem, problem_with
from check_kernels import LeftOutError
from native import (
    EXECUTION_FAILED,
    INVALID_ARGUMENT,
    INVALID_DIMENSIONS,
    NULL,
    SUCCESS,
    UNSUPPORTED,
    Descriptor,
    lib,
)

ROOT = Path(__file__).resolve().parent.parent
SMALL = Sizes(batch=2, heads=2, kv_heads=1, rows=9, columns=40, channels=16, value_channels=24)
DEVICE = lib.MFA_DEVICE_METAL if sys.platform == "darwin" else lib.MFA_DEVICE_SOFTMETAL
GRANULARITIES = ("tensor", "head", "token", "block", "channel", "group")
STATUS_NOT_ENQUEUED = 0
# What is on the stack where the run-time library of Objective-C is at work on classes, theirs to keep; not where objects are made.
SUPPRESSIONS = "leak:libobjc.so\n"

try:
    build_objc.require()
except LeftOutError as error:
    pytest.skip(f"Objective-C: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def context():
    """The handle of a context on the device of Metal."""
    with native.Context(num_threads=1, device=DEVICE) as made:
        yield made


@pytest.fixture(scope="module")
def runner():
    return build_objc.build("run_cases")


@pytest.fixture(scope="module")
def checked_runner():
    return build_objc.build("run_cases", sanitizer="address")


class Case:
    """A problem as the runner reads it, and as descriptors of C on the same arrays, which get the expected results."""

    def __init__(self, call: str, **words: Any):
        self.words: dict[str, Any] = {"call": call, "buffers": {}, "tensors": {}, "arrays": {}, **words}
        self.arrays: dict[str, np.ndarray] = {}
        self.descriptors: dict[str, Descriptor] = {}

    def put(self, name: str, array: np.ndarray, before: int = 0) -> dict[str, Any]:
        """An array in a buffer of its own, `before` bytes into it; where it is."""
        array = np.ascontiguousarray(array)
        self.arrays[name] = array
        data = bytes(range(before)) + array.tobytes()
        self.words["buffers"][name] = {"data": base64.b64encode(data).decode()}
        return {"buffer": name, "offset": before}

    def array(self, name: str, array: np.ndarray, before: int = 0) -> None:
        """An array of plain numbers."""
        self.words["arrays"][name] = self.put(name, array, before)

    def tensor(self, name: str, given: Any, shape: Any = None, before: int = 0) -> None:
        """An array or a quantised tensor as one of the four-dimensional tensors."""
        quantization: Any = NULL
        data = given.data if isinstance(given, umfa.QuantizedTensor) else given
        words = self.put(name, data, before)
        if isinstance(given, umfa.QuantizedTensor):
            parts: dict[str, Any] = {"granularity": GRANULARITIES.index(given.granularity), "rotated": int(given.rotated)}
            parts |= {"block_size": given.block_size or 0, "group_size": given.group_size or 0}
            words["quantization"] = dict(parts)
            for part in ("scales", "zero_points", "channel_means"):
                if getattr(given, part) is not None:
                    array = np.ascontiguousarray(getattr(given, part))
                    words["quantization"][part] = self.put(f"{name}.{part}", array)
                    parts[part] = array
            quantization = Descriptor("mfa_quantization_t", **parts)
        precision = native.INT4 if data.dtype == np.uint8 else None
        made = native.tensor(self.arrays[name], precision, shape, quantization=quantization)
        words["precision"] = made.pointer.precision
        words["shape"] = list(made.pointer.shape)
        words["strides"] = list(made.pointer.strides)
        self.words["tensors"][name] = words
        self.descriptors[name] = made

    def options(self, made: Problem, **schemes: Any) -> dict[str, Any]:
        """Options for the runner, numbers as words, their arrays put in buffers; those of C are returned."""
        words = dict(made.keywords)
        sizes = made.sizes
        causal = words.get("causal", False)
        fields: dict[str, Any] = {"causal": int(causal is not False), "alignment": int(causal == "lower_right")}
        fields["softmax_scale"] = float(words.get("scale", 1 / np.sqrt(sizes.channels)))
        if "window" in words:
            fields["window_left"], fields["window_right"] = words["window"]
        if "query_offset" in words:
            fields["num_query_offsets"] = np.atleast_1d(words["query_offset"]).size
            self.array("query_offsets", np.atleast_1d(words["query_offset"]).astype(np.int64))
        if "kv_lengths" in words:
            self.array("kv_lengths", np.asarray(words["kv_lengths"], np.int64), before=8)
        for name in ("alibi_slopes", "sinks"):
            if name in words:
                self.array(name, words[name], before=8)
        if "mask" in words:
            mask = np.asarray(words["mask"])
            self.tensor("mask", mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
        for name in ("softcap", "dropout_p", "seed", "dropout_offset"):
            if name in words:
                fields[name] = words[name]
        given = {
            name: str(int(value) if name not in ("softmax_scale", "softcap", "dropout_p") else repr(float(value)))
            for name, value in fields.items()
        }
        if "scale" not in words:
            del given["softmax_scale"]  # the default of Objective-C
        self.words["options"] = given | schemes
        for name in ("query_offsets", "kv_lengths", "alibi_slopes", "sinks"):
            if name in self.arrays:
                fields[name] = self.arrays[name]
        for name, scheme in schemes.items():
            fields[name] = Descriptor("mfa_quantization_scheme_t", **scheme)
        if "mask" in self.descriptors:
            fields["mask"] = self.descriptors["mask"]
        return fields

    @property
    def untouched(self) -> dict[str, str]:
        """The bytes of all buffers before the call."""
        return {name: buffer["data"] for name, buffer in self.words["buffers"].items()}

    def expected(self) -> dict[str, str]:
        """The bytes of all buffers, once C has computed on the arrays."""
        found = {}
        for name, buffer in self.words["buffers"].items():
            before = base64.b64decode(buffer["data"])
            data = self.arrays[name].tobytes()
            found[name] = base64.b64encode(before[: len(before) - len(data)] + data).decode()
        return found


def forward_case(made: Problem, output_dtype: Any = np.float32, **words: Any) -> tuple[Case, Descriptor]:
    """Forward of a problem, and its descriptor."""
    schemes = words.pop("schemes", {})
    case = Case("forward", **words)
    sizes = made.sizes
    for name, operand, shape in zip(("query", "key", "value"), made.arguments, (sizes.query, sizes.key, sizes.value)):
        case.tensor(name, operand, shape, before=16)
    case.tensor("output", np.full(sizes.output, 7, output_dtype), before=32)
    case.array("logsumexp", np.full(sizes.statistics, 7, np.float32), before=4)
    fields = case.options(made, **schemes)
    tensors = [case.descriptors[name] for name in ("query", "key", "value", "output")]
    return case, native.attention(*tensors, logsumexp=case.arrays["logsumexp"], **fields)


def run(program: Path, cases: Iterable[Case], folder: Path, **environment: str) -> list[dict[str, Any]]:
    """What the runner says of each case."""
    path = folder / "cases.jsonl"
    path.write_text("".join(json.dumps(case.words) + "\n" for case in cases))
    answer = subprocess.run([program, path], capture_output=True, text=True, env=os.environ | environment, timeout=300)
    assert answer.returncode == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


def check(answers: list[dict[str, Any]], cases: dict[str, Case]) -> None:
    """Every case succeeded, in some time, and wrote the expected bytes and no others."""
    assert len(answers) == len(cases)
    for answer, (name, case) in zip(answers, cases.items()):
        assert answer["ok"], f"{name}: {answer}"
        assert not answer["last_error"], name
        assert 0 < float(answer["seconds"]) < 60, name
        assert "device_error" not in answer, name
        expected = case.expected()
        different = [buffer for buffer in expected if answer["buffers"][buffer] != expected[buffer]]
        assert not different, f"{name}: {different}"


DTYPES = {
    "float32": ("float32",) * 3,
    "float16": ("float16",) * 3,
    "bfloat16": ("bfloat16",) * 3,
    "int8": ("int8",) * 3,
    "int4": ("int4",) * 3,
    "mixed": ("float32", "int4", "int8"),
}


@pytest.mark.parametrize("encode", [None, "retained", "unretained"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_forward__writes_the_bytes_of_the_c_function(dtypes, encode, context, runner, tmp_path):
    cases = {}
    for option in OPTIONS:
        if option.endswith("float64"):
            continue
        made = problem_with(option, seed=3, sizes=SMALL, dtypes=DTYPES[dtypes])
        dtype = np.float32 if dtypes in ("int8", "int4", "mixed") else made.arguments[0].dtype
        case, given = forward_case(made, dtype, **({"encode": encode} if encode else {}))
        assert lib.mfa_attention_run_forward(context, given.pointer) == SUCCESS, native.message(context)
        cases[option] = case
    answers = run(runner, cases.values(), tmp_path)
    check(answers, cases)
    if encode:
        assert {answer["status"] for answer in answers} == {STATUS_NOT_ENQUEUED}


def test_forward__is_attention(context, runner, tmp_path):
    """Not only what C says."""
    made = problem_with("all", sizes=SMALL)
    case, _ = forward_case(made)
    (answer,) = run(runner, [case], tmp_path)
    output = np.frombuffer(base64.b64decode(answer["buffers"]["output"])[32:], np.float32).reshape(SMALL.output)
    np.testing.assert_allclose(output, reference.forward(*made.real, made.options).output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encode", [None, "retained"])
def test_forward__operands_quantised_on_the_way_in__writes_the_bytes_of_the_c_function(encode, context, runner, tmp_path):
    cases = {}
    for precision in (native.INT8, native.INT4):
        for granularity, sizes in ((0, {}), (2, {}), (3, {"block_size": 8}), (5, {"group_size": 8})):
            scheme = {"precision": precision, "granularity": granularity, **sizes}
            key = scheme | {"smooth": 1, "asymmetric": 1}
            schemes = {"quantize_query": scheme | {"rotate": 1}, "quantize_key": key | {"rotate": 1}, "quantize_value": scheme}
            case, given = forward_case(problem(np.random.default_rng(4), SMALL), schemes=schemes, **({"encode": encode} if encode else {}))
            assert lib.mfa_attention_run_forward(context, given.pointer) == SUCCESS, native.message(context)
            cases[f"{precision} {granularity}"] = case
    check(run(runner, cases.values(), tmp_path), cases)


@pytest.mark.parametrize("encode", [None, "retained", "unretained"])
@pytest.mark.parametrize("dtypes", ["float32", "mixed"])
def test_backward__writes_the_bytes_of_the_c_function(dtypes, encode, context, runner, tmp_path):
    cases = {}
    for option in ("plain", "causal_lengths_lower_right", "mask_additive", "mask_bool", "all"):
        made = problem_with(option, seed=5, sizes=SMALL, dtypes=DTYPES[dtypes])
        forward, given = forward_case(made)
        assert lib.mfa_attention_run_forward(context, given.pointer) == SUCCESS, native.message(context)
        case, given = forward_case(made, **({"encode": encode} if encode else {}))
        case.words["call"] = "backward"
        for name in ("output", "logsumexp"):
            # The place stays, the data are what forward wrote.
            case.arrays[name][...] = forward.arrays[name]
            case.words["buffers"][name]["data"] = forward.expected()[name]
        rng = np.random.default_rng(7)
        case.tensor("grad_output", rng.normal(size=SMALL.output).astype(np.float32))
        case.array("grad_logsumexp", rng.normal(size=SMALL.statistics).astype(np.float32))
        case.array("d_values", np.full(SMALL.statistics, 7, np.float32))
        wanted = ["query", "key", "value"] + (["mask"] if option in ("mask_additive", "all") else [])
        for name in wanted:
            case.tensor(f"grad_{name}", np.full(list(case.descriptors[name].pointer.shape), 7, np.float32), before=16)
        for name in ("sinks", "alibi_slopes"):
            if name in case.arrays:
                case.array(f"grad_{name}", np.full(SMALL.heads, 7, np.float32))
        fields: dict[str, Any] = {f"grad_{name}": case.descriptors[f"grad_{name}"] for name in [*wanted, "output"]}
        for name in ("grad_logsumexp", "d_values", "grad_sinks", "grad_alibi_slopes"):
            if name in case.arrays:
                fields[name] = case.arrays[name]
        gradients = Descriptor("mfa_attention_gradients_t", **fields)
        assert lib.mfa_attention_run_backward(context, given.pointer, gradients.pointer) == SUCCESS, native.message(context)
        cases[option] = case
    check(run(runner, cases.values(), tmp_path), cases)


def test_quantize_and_back__writes_the_bytes_of_the_c_functions(context, runner, tmp_path):
    rng = np.random.default_rng(2)
    cases = {}
    values = rng.normal(size=(2, 3, 7, 10)).astype(np.float32)
    for dtype in ("int8", "int4"):
        for granularity in GRANULARITIES:
            sizes = {"block": {"block_size": 3}, "group": {"group_size": 4}}.get(granularity, {})
            made = umfa.quantize(values, dtype, granularity=granularity, symmetric=False, smooth=True, rotate=True, **sizes)
            blank = umfa.QuantizedTensor(
                np.full_like(made.data, 7), np.full_like(made.scales, 7), np.full_like(made.zero_points, 7),
                np.full_like(made.channel_means, 7), shape=made.shape, granularity=granularity, rotated=True, **sizes
            )  # fmt: skip
            case = Case("quantize")
            case.tensor("input", values)
            case.tensor("output", blank, values.shape, before=8)
            assert lib.mfa_quantize(context, case.descriptors["input"].pointer, case.descriptors["output"].pointer) == SUCCESS
            cases[f"{dtype} {granularity}"] = case
            back = Case("dequantize")
            back.tensor("input", made, values.shape)
            back.tensor("output", np.full(values.shape, 7, np.float16))
            assert lib.mfa_dequantize(context, back.descriptors["input"].pointer, back.descriptors["output"].pointer) == SUCCESS
            cases[f"{dtype} {granularity}, back"] = back
    check(run(runner, cases.values(), tmp_path), cases)


def test_merge__writes_the_bytes_of_the_c_function(context, runner, tmp_path):
    rng = np.random.default_rng(2)
    case = Case("merge")
    for name in ("output_a", "output_b", "output"):
        case.tensor(name, rng.normal(size=SMALL.output).astype(np.float32))
    for name in ("logsumexp_a", "logsumexp_b", "logsumexp"):
        case.array(name, rng.normal(size=SMALL.statistics).astype(np.float32))
    words = [
        each
        for part in ("_a", "_b", "")
        for each in (case.descriptors[f"output{part}"].pointer, native.address(case.arrays[f"logsumexp{part}"]))
    ]
    assert lib.mfa_attention_merge(context, *words, native.FP32) == SUCCESS
    check(run(runner, [case], tmp_path), {"merge": case})


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_contiguous_layouts__are_those_of_the_flat_c_function(dtype, context, runner, tmp_path):
    """Tokens first as they are, heads first rearranged; rows of INT4 have a pad code."""
    flat = native.Flat(np.random.default_rng(6), (dtype,) * 3)
    assert flat.forward_quantized(context) == SUCCESS, native.message(context)
    batch, rows, columns, heads, channels = flat.sizes
    cases = {}
    for layout in (0, 1):
        case = Case("forward", options={"softmax_scale": "0.25"})
        arrays = [*flat.arrays, np.full_like(flat.output, 7)]
        for index, (name, tokens) in enumerate((("query", rows), ("key", columns), ("value", columns), ("output", rows))):
            array = arrays[index] if layout == 1 else arrays[index].swapaxes(1, 2)
            words = case.put(name, array)
            words |= {"layout": layout, "shape": [batch, heads, tokens, channels], "precision": [*flat.precisions, native.FP32][index]}
            if index < 3 and dtype != "float32":
                words["quantization"] = {
                    "granularity": 0,
                    "scales": case.put(f"{name}.scales", np.array([flat.scales[index]], np.float32)),
                    "zero_points": case.put(f"{name}.zero_points", np.array([flat.zero_points[index]], np.int32)),
                }
            case.words["tensors"][name] = words
        case.array("logsumexp", np.full_like(flat.logsumexp, 7))
        case.arrays["output"] = np.ascontiguousarray(flat.output if layout == 1 else flat.output.swapaxes(1, 2))
        case.arrays["logsumexp"] = flat.logsumexp
        cases[f"layout {layout}"] = case
    check(run(runner, cases.values(), tmp_path), cases)


def test_forward__float64__is_computed_by_the_cpu_and_timed_by_the_clock(context, runner, tmp_path):
    made = problem_with("all", sizes=SMALL, dtypes=("float64",) * 3)
    case, given = forward_case(made, np.float64)
    case.array("logsumexp", np.full(SMALL.statistics, 7, np.float64), before=8)
    given.pointer.logsumexp = native.address(case.arrays["logsumexp"])
    assert lib.mfa_attention_run_forward(context, given.pointer) == SUCCESS, native.message(context)
    check(run(runner, [case], tmp_path), {"float64": case})


def seed_case(dtype: str, rows: int = 33, channels: int = 24, **changes: Any) -> Case:
    """The method for one head."""
    rng = np.random.default_rng(1)
    case = Case("seed", seq_length=rows, head_dim=channels, scale="0.2", causal=1)
    for name in ("query", "key", "value", "output"):
        if dtype in ("int8", "int4"):
            bytes_of_row = channels if dtype == "int8" else (channels + 1) // 2
            array = rng.integers(-128, 128, (1, 1, rows, bytes_of_row)).astype(np.int8 if dtype == "int8" else np.uint8)
        else:
            array = rng.normal(size=(1, 1, rows, channels)).astype(native.DTYPES[native.PRECISIONS[dtype]])
        if name == "output":
            array = np.full((1, 1, rows, channels), 7, np.float32 if dtype in ("int8", "int4") else array.dtype)
        case.tensor(name, array, (1, 1, rows, channels))
    case.words["precision"] = native.PRECISIONS[dtype]
    case.words |= changes
    return case


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_one_head__writes_the_bytes_of_the_flat_c_function(dtype, context, runner, tmp_path):
    case = seed_case(dtype)
    pointers = [native.address(case.arrays[name]) for name in ("query", "key", "value", "output")]
    code = native.PRECISIONS[dtype]
    status = lib.mfa_attention_forward(context, *pointers, 1, 33, 33, 1, 24, 0.2, True, code, code, code, False, False, False, False)
    assert status == SUCCESS, native.message(context)
    check(run(runner, [case], tmp_path), {dtype: case})


def test_one_head__buffers_too_short_for_the_precision__fail_loudly(runner, tmp_path):
    """FP16 buffers where FP32 ones are asked for, and everything else that cannot be."""
    short = seed_case("float16", precision=native.FP32)
    nothing = {name: seed_case("float32") for name in ("query", "key", "value", "output")}
    for name, case in nothing.items():
        del case.words["buffers"][name]
    cases = {
        "short": (short, INVALID_DIMENSIONS, "must lie within its buffer of 1584 bytes"),
        "wide": (seed_case("float32", rows=100, seq_length=1, head_dim=2000), INVALID_DIMENSIONS, "`head_dim`"),
        "scale": (seed_case("float32", scale="nan"), INVALID_ARGUMENT, "`softmax_scale`"),
        "precision": (seed_case("float32", precision=77), INVALID_ARGUMENT, "`query` must be one of MFA_PRECISION_* (got 77)"),
    }
    cases |= {f"no {name}": (case, INVALID_ARGUMENT, f"the buffer of `{name}`") for name, case in nothing.items()}
    answers = run(runner, [case for case, _, _ in cases.values()], tmp_path)
    for answer, (name, (case, code, words)) in zip(answers, cases.items()):
        assert not answer["ok"], name
        assert (answer["domain"], answer["code"]) == ("MFAErrorDomain", code), name
        assert words in answer["description"], name
        assert answer["last_error"], name
        assert answer["buffers"] == case.untouched, name


def wrong_cases() -> dict[str, tuple[Case, int, str]]:
    """Forward calls with one thing wrong: the case, its code, and words of its description."""
    found: dict[str, tuple[Case, int, str]] = {}

    def fresh(**words: Any) -> Case:
        return forward_case(problem_with("all", sizes=SMALL, dtypes=("int8", "int4", "int8")), **words)[0]

    def without_last_byte(case: Case, name: str) -> None:
        data = base64.b64decode(case.words["buffers"][name]["data"])
        case.words["buffers"][name]["data"] = base64.b64encode(data[:-1]).decode()

    for encode in (None, "retained"):
        words = {"encode": encode} if encode else {}
        how = "encoded" if encode else "run"
        names = [name for name in fresh().words["buffers"] if ".channel_means" not in name]
        for name in names:
            case = fresh(**words)
            without_last_byte(case, name)
            found[f"{name} too short, {how}"] = (case, INVALID_DIMENSIONS, f"`{name}")
            case = fresh(**words)
            case.words["buffers"][name]["other_device"] = 1
            found[f"{name} on another device, {how}"] = (
                case,
                INVALID_ARGUMENT,
                f"the buffer of `{name}`: `metal_buffer` belongs to another",
            )
            case = fresh(**words)
            del case.words["buffers"][name]
            found[f"{name} without a buffer, {how}"] = (case, INVALID_ARGUMENT, f"the buffer of `{name}`")
            case = fresh(**words)
            places = [*case.words["tensors"].values(), *case.words["arrays"].values()]
            places += [part for tensor in case.words["tensors"].values() for part in tensor.get("quantization", {}).values()]
            for place in places:
                if isinstance(place, dict) and place["buffer"] == name:
                    place["offset"] = str(2**63 + 8)
            found[f"{name} at a wild offset, {how}"] = (case, INVALID_DIMENSIONS, f"`{name}")
        for name in ("query", "key", "value", "output"):
            case = fresh(**words)
            del case.words["tensors"][name]
            found[f"no {name}, {how}"] = (case, INVALID_ARGUMENT, f"`{name}` must not be NULL")
        case = fresh(**words)
        case.words["tensors"]["query"]["shape"][1] = -1
        found[f"a negative size, {how}"] = (case, INVALID_DIMENSIONS, "`query`")
        case = fresh(**words)
        case.words["tensors"]["key"]["shape"][2] = 2**40
        found[f"a size beyond 32 bits, {how}"] = (case, INVALID_DIMENSIONS, "`key")
        case = fresh(**words)
        case.words["tensors"]["output"] = dict(case.words["tensors"]["query"], precision=0, quantization=None)
        del case.words["tensors"]["output"]["quantization"]
        case.words["tensors"]["output"]["shape"] = list(SMALL.output)
        found[f"an output in the query's buffer, {how}"] = (case, INVALID_DIMENSIONS, "`output`")
        case = fresh(**words)
        case.words["options"]["softcap"] = "-1"
        found[f"a negative softcap, {how}"] = (case, INVALID_ARGUMENT, "`softcap`")
    case = fresh(encode="committed")
    found["a committed command buffer"] = (case, INVALID_ARGUMENT, "`command_buffer` was committed before")
    case = forward_case(problem(np.random.default_rng(0), SMALL), encode="retained")[0]
    case.words["options"]["softmax_scale"] = "1e300"
    found["what only the CPU can"] = (case, UNSUPPORTED, "softmax_scale")
    return found


def test_forward__what_is_refused__has_written_nothing(runner, tmp_path):
    cases = wrong_cases()
    answers = run(runner, [case for case, _, _ in cases.values()], tmp_path)
    assert len(cases) > 100
    for answer, (name, (case, code, words)) in zip(answers, cases.items()):
        assert not answer["ok"], name
        assert (answer["domain"], answer["code"]) == ("MFAErrorDomain", code), f"{name}: {answer['description']}"
        assert words in answer["description"], f"{name}: {answer['description']}"
        assert answer["last_error"], name
        assert answer["buffers"] == case.untouched, name


def test_forward__a_gpu_that_fails__is_an_error_of_the_call_or_of_the_command_buffer(runner, tmp_path):
    made = problem(np.random.default_rng(0), SMALL)
    cases = [forward_case(made)[0], forward_case(made, encode="retained")[0]]
    ran, encoded = run(runner, cases, tmp_path, SOFTMETAL_FAULT="execute")
    assert not ran["ok"]
    assert ran["code"] == EXECUTION_FAILED
    assert encoded["ok"]
    assert "the GPU gave up" in encoded["device_error"]


def small_cases() -> list[Case]:
    """One of each kind of call, and some that fail."""
    made = problem_with("all", sizes=SMALL, dtypes=("float32", "int8", "int4"))
    cases = [forward_case(made)[0], forward_case(made, encode="retained")[0], forward_case(made, encode="unretained")[0]]
    backward = forward_case(made)[0]
    backward.words["call"] = "backward"
    backward.tensor("grad_output", np.ones(SMALL.output, np.float32))
    backward.tensor("grad_query", np.ones(SMALL.query, np.float32))
    cases += [backward, seed_case("float16"), seed_case("float16", precision=native.FP32)]
    return cases + [case for case, _, _ in list(wrong_cases().values())[::9]]


def test_calls__leave_no_memory_behind__and_touch_none_that_is_not_theirs(checked_runner, tmp_path):
    """Under AddressSanitizer."""
    suppressions = tmp_path / "suppressions"
    suppressions.write_text(SUPPRESSIONS)
    options = {"LSAN_OPTIONS": f"suppressions={suppressions}:print_suppressions=0", "ASAN_OPTIONS": "fast_unwind_on_malloc=0"}
    cases = small_cases()
    assert len(run(checked_runner, cases, tmp_path, **options)) == len(cases)
    # The check finds what it is for.
    cases[0].words["leak"] = 1
    with pytest.raises(AssertionError, match=r"buffers live on[\s\S]*LeakSanitizer"):
        run(checked_runner, cases, tmp_path, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="these objects are Linux's")
@pytest.mark.parametrize("sanitizer", ["", "address"])
def test_metal_for_linux__behaves_like_the_framework(sanitizer, tmp_path):
    program = build_objc.build("check_metal", sanitizer=sanitizer)
    suppressions = tmp_path / "suppressions"
    suppressions.write_text(SUPPRESSIONS)
    environment = {"LSAN_OPTIONS": f"suppressions={suppressions}:print_suppressions=0", "ASAN_OPTIONS": "fast_unwind_on_malloc=0"}
    answer = subprocess.run([program], capture_output=True, text=True, env=os.environ | environment, timeout=120)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.splitlines()[-1] == "all as it should be"


@pytest.mark.parametrize("source", ["MFABridge/MFABridge.m", "examples/quick_start/main.m", "examples/attention/main.m"])
def test_sources__compile_with_arc(source):
    build_objc.check_arc(ROOT / "objc" / source)


def test_check_arc__finds_what_arc_forbids(tmp_path):
    path = tmp_path / "wrong.m"
    path.write_text('#import "MFABridge.h"\nvoid f(id object) { [object retain]; }\n')
    with pytest.raises(build_objc.BuildError, match="ARC forbids explicit message send of 'retain'"):
        build_objc.check_arc(path)


def test_examples__run_and_say_what_they_should():
    answer = subprocess.run([build_objc.build("quick_start")], check=True, capture_output=True, text=True).stdout
    seconds = re.fullmatch(r".+: (\d+\.\d+) s\n", answer)
    assert seconds is not None
    assert float(seconds[1]) > 0
    answer = subprocess.run([build_objc.build("attention")], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^(.+): +([\d.]+) s, relative error ([\d.e+-]+)$", answer, flags=re.M)
    assert [name for name, _, _ in found] == ["fp16", "fp16, encoded", "int8"]
    assert all(float(seconds) > 0 for _, seconds, _ in found)
    assert found[0][2] == found[1][2]


def test_guide__shows_the_example():
    example = (ROOT / "objc" / "examples" / "quick_start" / "main.m").read_text()
    assert f"```objc\n{example}```\n" in (ROOT / "docs" / "objc.md").read_text()


def test_package__on_a_mac__has_the_bridge(tmp_path):
    """The manifest's other half, as SwiftPM reads it; on a Mac it is read anyway."""
    text = (ROOT / "Package.swift").read_text()
    assert text.count("#if os(Linux)") == 1
    (tmp_path / "Package.swift").write_text(text.replace("#if os(Linux)", "#if !os(Linux)" if sys.platform == "linux" else "#if os(Linux)"))
    for folder in ("core", "include", "objc"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    command = ["swift", "package", "--package-path", str(tmp_path), "describe", "--type", "json"]
    described = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout)
    assert "MFABridge" in [product["name"] for product in described["products"]]
    (bridge,) = (target for target in described["targets"] if target["name"] == "MFABridge")
    assert bridge["sources"] == ["MFABridge.m"]
    assert bridge["target_dependencies"] == ["CABI"]


def test_require__without_root__says_what_is_missing(monkeypatch):
    monkeypatch.setattr(build_objc.shutil, "which", lambda name: None if name == "gnustep-config" else f"/usr/bin/{name}")
    monkeypatch.setattr(build_objc.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(build_objc.sys, "platform", "linux")
    with pytest.raises(LeftOutError, match=r"gobjc libgnustep-base-dev gnustep-make: needs root for apt-get"):
        build_objc.require()
