"""The golden file of quantisation: its generator writes it, a program in C agrees with it, and the library gives its bits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import umfa

DIRECTORY = Path(__file__).resolve().parent / "vectors"
FILE = DIRECTORY / "quantization.jsonl"
CASES = [json.loads(line) for line in FILE.read_text(encoding="ascii").splitlines()]
INPUT_TYPES = {"float32": "<f4", "float16": "<f2", "float64": "<f8"}


def named(kind: str, with_lengths: bool = False) -> list:
    """The cases of a kind, as parameters of a test."""
    chosen = [case for case in CASES if case["kind"] == kind and (case["lengths"] is not None) == with_lengths]
    assert chosen
    return [pytest.param(case, id=case["name"]) for case in chosen]


def array(case: dict, field: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(case[field]), dtype).reshape(shape)


def input_of(case: dict) -> np.ndarray:
    if case["input_type"] == "bfloat16":
        return array(case, "input", "<u2", case["shape"]).view(ml_dtypes.bfloat16)
    return array(case, "input", INPUT_TYPES[case["input_type"]], case["shape"])


def quantize(case: dict, values: np.ndarray) -> umfa.QuantizedTensor:
    return umfa.quantize(
        values,
        case["dtype"],
        case["granularity"],
        block_size=case["block_size"] or None,
        group_size=case["group_size"] or None,
        symmetric=case["symmetric"],
        smooth=case["smooth"],
        rotate=case["rotate"],
    )


def data_shape(case: dict) -> tuple[int, ...]:
    *outer, channels = case["shape"]
    return (*outer, channels if case["dtype"] == "int8" else (channels + 1) // 2)


def data_of(case: dict) -> np.ndarray:
    return array(case, "codes", "i1" if case["dtype"] == "int8" else "u1", data_shape(case))


def hexadecimal(values: np.ndarray | None) -> str | None:
    return None if values is None else values.astype(values.dtype.newbyteorder("<")).tobytes().hex()


# ---- The file ----------------------------------------------------------------------------------------------------------------------------


def test_file__is_what_its_generator_writes():
    answer = subprocess.run([sys.executable, DIRECTORY / "generate_quantization.py", "--check"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_file__covers_each_option_with_each_other():
    options = ("dtype", "granularity", "symmetric", "smooth", "rotate")
    assert len({tuple(case[option] for option in options) for case in CASES if case["kind"] == "quantize"}) == 2 * 6 * 2 * 2 * 2
    assert {case["input_type"] for case in CASES if case["kind"] == "quantize"} == {*INPUT_TYPES, "bfloat16"}
    assert len({case["name"] for case in CASES}) == len(CASES)
    assert FILE.stat().st_size < 500_000


# ---- The program in C --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verify(tmp_path_factory):
    """Runs the verifier on a text; gives its exit code and what it printed."""
    compiler = shutil.which("clang") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    directory = tmp_path_factory.mktemp("verifier")
    program = directory / "verify_quantization"
    command = [compiler, "-std=c11", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, DIRECTORY / "verify_quantization.c", "-lm", "-o", program], check=True)

    def run(text: str) -> tuple[int, str]:
        path = directory / "cases.jsonl"
        path.write_text(text, encoding="ascii")
        answer = subprocess.run([program, path], capture_output=True, text=True, timeout=60)
        return answer.returncode, answer.stdout + answer.stderr

    return run


def test_verifier__agrees_with_every_case(verify):
    assert verify(FILE.read_text(encoding="ascii")) == (0, f"{len(CASES)} of {len(CASES)} cases agree\n")


@pytest.mark.parametrize("field", ["codes", "scales", "zero_points", "channel_means", "dequantized"])
def test_verifier__finds_one_changed_bit(verify, field):
    case = next(case for case in CASES if case["name"] == "int4 group, asymmetric, smooth, rotate")
    digits = case[field]
    middle = len(digits) // 2
    changed = digits[:middle] + format(int(digits[middle], 16) ^ 1, "x") + digits[middle + 1 :]
    code, output = verify(json.dumps(case | {field: changed}) + "\n")
    assert code == 1
    assert f"{case['name']}: {field} differs" in output


def test_verifier__finds_a_case_that_should_be_refused_and_one_that_should_not(verify):
    accepted = next(case for case in CASES if case["kind"] == "quantize")
    refused = next(case for case in CASES if case["kind"] == "refuse")
    nothing = dict.fromkeys(("scales", "zero_points", "channel_means", "dequantized")) | {"codes": ""}
    assert verify(json.dumps(accepted | {"kind": "refuse"}) + "\n")[0] == 1
    assert verify(json.dumps(refused | nothing | {"kind": "quantize"}) + "\n")[0] == 1


def test_verifier__does_not_accept_a_file_without_cases(verify):
    assert verify("")[0] == 1
    assert verify("{}\n")[0] == 2


# ---- The library -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", named("quantize"))
def test_quantize__gives_the_bits_of_the_file(case):
    made = quantize(case, input_of(case))
    assert made.data.shape == data_shape(case)
    assert hexadecimal(made.data) == case["codes"]
    for field in ("scales", "zero_points", "channel_means"):
        assert hexadecimal(getattr(made, field)) == case[field], field
    assert hexadecimal(made.dequantize()) == case["dequantized"]


@pytest.mark.parametrize("case", named("refuse"))
def test_quantize__refuses_what_the_file_says(case):
    with pytest.raises(umfa.InvalidArgumentError):
        quantize(case, input_of(case))


@pytest.mark.parametrize("case", named("dequantize"))
def test_dequantize__any_codes__gives_the_bits_of_the_file(case):
    batch, heads, tokens, channels = case["shape"]
    groups = -(-channels // (case["group_size"] or 1))
    shape = {"token": (batch, heads, tokens), "channel": (batch, heads, channels), "group": (batch, heads, tokens, groups)}
    made = umfa.QuantizedTensor(
        data_of(case),
        array(case, "scales", "<f4", shape[case["granularity"]]),
        array(case, "zero_points", "<i4", shape[case["granularity"]]),
        array(case, "channel_means", "<f4", (batch, heads, channels)) if case["smooth"] else None,
        shape=tuple(case["shape"]),
        granularity=case["granularity"],
        group_size=case["group_size"] or None,
        rotated=case["rotate"],
    )
    assert hexadecimal(made.dequantize()) == case["dequantized"]


@pytest.mark.parametrize("case", named("quantize", with_lengths=True))
def test_attention__quantised_on_the_fly_with_lengths__sees_the_numbers_of_the_file(case):
    """Keys quantised within the call, only as far as the lengths reach, give what attention on the file's numbers gives."""
    batch, heads, _, channels = case["shape"]
    lengths = np.array(case["lengths"])
    query = np.linspace(-1, 1, batch * heads * 3 * channels, dtype=np.float32).reshape(batch, heads, 3, channels)
    sizes = {name: case[name] or None for name in ("block_size", "group_size")}
    scheme = umfa.QuantizationScheme(
        case["dtype"], case["granularity"], **sizes, symmetric=case["symmetric"], smooth=case["smooth"], rotate=case["rotate"]
    )
    # Queries of INT8 steps of their own make rotated ones, which is all that rotated keys go with.
    queries = umfa.quantize(query, "int8", "token", rotate=case["rotate"])
    keys = array(case, "dequantized", "<f4", case["shape"])
    values = np.linspace(-2, 2, keys.size, dtype=np.float32).reshape(keys.shape)
    config = umfa.QuantizationConfig(None, scheme, None)
    output, lse = umfa.attention(queries, input_of(case), values, kv_lengths=lengths, quantize=config, return_lse=True)
    expected, expected_lse = umfa.attention(queries.dequantize(), keys, values, kv_lengths=lengths, return_lse=True)
    # Integer kernels may round the weights to 8 bits; a wrong scale, mean or length is far outside of that.
    np.testing.assert_allclose(output, expected, atol=0.02)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-2)
