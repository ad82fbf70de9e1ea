"""No result depends on how the calling thread rounds, flushes or traps, and the thread finds its environment as it left it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import figures
import floating
import native
import umfa
from native import FP32, INVALID_ARGUMENT, NULL, SUCCESS, Context, Descriptor, lib, message

pytestmark = pytest.mark.skipif(not floating.HERE, reason="the control register of this processor is not known here")

# Small enough for many, large enough for tiles, several items and threads.
SHAPES = {"tile": (1, 2, 70, 130, 24), "decode": (1, 2, 2, 600, 24)}
VALUES = {
    "zeros": 0.0,
    "negative zeros": -0.0,
    "denormals": 3e-39,
    "smallest": 1e-45,
    "tiny": 2e-38,
    "infinity": np.inf,
    "NaN": np.nan,
    "huge": 3e38,
}
PLACES = ("query", "key", "value", "mask", "grad_output")
KINDS = ("float32", "float16", "bfloat16", "float64", "fused int8", "fused int4")


class Case:
    """Forward and backward of a problem with a special value in a part of one operand."""

    def __init__(self, kind: str, shape: str, value: str, place: str, masked: bool):
        batch, heads, rows, columns, channels = SHAPES[shape]
        dtype = native.DTYPES[native.PRECISIONS.get(kind, FP32)]
        rng = np.random.default_rng(5)
        sizes = {"query": rows, "key": columns, "value": columns, "grad_output": rows}
        self.arrays = {name: rng.normal(size=(batch, heads, tokens, channels)).astype(dtype) for name, tokens in sizes.items()}
        self.arrays["mask"] = rng.normal(size=(1, 1, rows, columns)).astype(np.float32)
        with np.errstate(all="ignore"):
            target = self.arrays[place]
            target[..., 1, :] = np.float64(VALUES[value])
            target[..., 5] = np.float64(VALUES[value])
        if masked:  # columns without any weight, and rows without any column
            self.arrays["mask"][..., 1] = self.arrays["mask"][..., 5] = -np.inf
            self.arrays["mask"][:, :, 1] = -np.inf
        statistics = np.float64 if kind == "float64" else np.float32
        self.results = {"output": np.zeros((batch, heads, rows, channels), statistics)}
        self.results |= {name: np.zeros((batch, heads, rows), statistics) for name in ("logsumexp", "d_values")}
        self.results |= {f"grad_{name}": np.zeros(self.arrays[name].shape, statistics) for name in ("query", "key", "value")}
        tensors = {name: native.tensor(array) for name, array in (self.arrays | self.results).items() if array.ndim == 4}
        options: dict[str, Any] = {"mask": tensors["mask"], "logsumexp": self.results["logsumexp"], "softmax_scale": 0.2}
        if kind.startswith("fused"):
            precision = native.PRECISIONS[kind.split()[1]]
            scheme = Descriptor("mfa_quantization_scheme_t", precision=precision, granularity=2)
            options |= {f"quantize_{name}": scheme for name in ("query", "key", "value")}
        names = ("query", "key", "value", "output")
        self.attention = native.attention(*(tensors[name] for name in names), **options)
        wanted = {name: tensors[name] for name in ("grad_output", "grad_query", "grad_key", "grad_value")}
        self.gradients = Descriptor("mfa_attention_gradients_t", d_values=self.results["d_values"], **wanted)
        self.has_backward = not kind.startswith("fused")

    def run(self, context: Any, mode: str | None) -> list[Any]:
        """Statuses and bytes of all results in an environment; checks that the calls left it alone."""
        for array in self.results.values():
            array[...] = 7
        with floating.environment(mode) as watch:
            statuses = [lib.mfa_attention_run_forward(context, self.attention.pointer)]
        assert watch.after == watch.before, f"{watch.before:x} became {watch.after:x}"
        if self.has_backward:
            with floating.environment(mode) as watch:
                statuses.append(lib.mfa_attention_run_backward(context, self.attention.pointer, self.gradients.pointer))
            assert watch.after == watch.before, f"{watch.before:x} became {watch.after:x}"
        assert set(statuses) <= {SUCCESS, INVALID_ARGUMENT}, message(context)
        return [statuses, *(array.tobytes() for array in self.results.values())]


@pytest.fixture(scope="module", params=[1, 3])
def context(request):
    with Context(request.param) as handle:
        yield handle


@pytest.fixture(scope="module")
def alone():
    with Context(1) as handle:
        yield handle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True], ids=["attended", "masked"])
def test_attention__in_any_environment__gives_the_same_bits(kind, shape, masked, context, alone):
    for place in PLACES:
        for value in VALUES:
            if kind.startswith("fused") and place == "grad_output":
                continue
            case = Case(kind, shape, value, place, masked)
            expected = case.run(alone, None)
            for mode in figures.pick(["denormals flushed", "all of it"], list(floating.HERE)):
                assert case.run(context, mode) == expected, (place, value, mode)
                figures.add("floating point", problems_in_another_environment_with_the_same_bits=1)


@pytest.mark.parametrize("mode", floating.HERE)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantising__in_any_environment__gives_the_same_bits(mode, dtype, context, alone, rng):
    """There and back, with scales that are themselves denormal, and a refusal."""
    shape = (1, 2, 9, 32)
    precision = native.PRECISIONS[dtype]
    values = rng.normal(size=shape).astype(np.float32) * np.float32(10) ** rng.integers(-44, 30, (1, 2, 9, 1)).astype(np.float32)

    def run(handle, mode):
        codes = np.zeros((*shape[:3], 16) if dtype == "int4" else shape, native.DTYPES[precision])
        scales, zero_points = np.zeros(18, np.float32), np.zeros(18, np.int32)
        scheme = Descriptor("mfa_quantization_t", granularity=2, scales=scales, zero_points=zero_points)
        source, target = native.tensor(values), native.tensor(codes, precision, shape, quantization=scheme)
        with floating.environment(mode) as watch:
            first = lib.mfa_quantize(handle, source.pointer, target.pointer)
        assert watch.after == watch.before
        bits = scales.tobytes()
        real = np.zeros(shape, np.float32)
        scales[::3] = 1e-41
        with floating.environment(mode) as watch:
            second = lib.mfa_dequantize(handle, target.pointer, native.tensor(real).pointer)
        assert watch.after == watch.before
        assert (first, second) == (SUCCESS, SUCCESS), message(handle)
        assert (real[0, 0, 0] != 0).any(), "products with a denormal scale are denormal numbers"
        values[0, 0, 3, 3] = np.nan
        with floating.environment(mode) as watch:
            refused = lib.mfa_quantize(handle, source.pointer, target.pointer)
        assert watch.after == watch.before
        assert refused == INVALID_ARGUMENT
        values[0, 0, 3, 3] = 1
        return bits, codes.tobytes(), zero_points.tobytes(), real.tobytes()

    values[0, 0, 0] = values[0, 0, 3, 3] = 1
    assert run(context, mode) == run(alone, None)
    figures.add("floating point", problems_in_another_environment_with_the_same_bits=1)


@pytest.mark.parametrize("mode", floating.HERE)
def test_merge__in_any_environment__gives_the_same_bits(mode, context, alone, rng):
    outputs = [rng.normal(size=(1, 2, 9, 8)).astype(np.float32) * np.float32(1e-38) for _ in range(2)]
    lse = [rng.normal(size=(1, 2, 9)).astype(np.float32) for _ in range(2)]
    outputs[1][0, 0, 3], lse[1][0, 0, 3], lse[1][0, 1, 4] = np.nan, -np.inf, np.inf

    def run(handle, mode):
        output, merged = np.zeros_like(outputs[0]), np.zeros_like(lse[0])
        arguments = [native.tensor(outputs[0]), native.tensor(outputs[1]), native.tensor(output)]
        pointers = [one.pointer for one in arguments]
        statistics = [native.address(array) for array in (*lse, merged)]
        words = [word for pair in zip(pointers, statistics) for word in pair]
        with floating.environment(mode) as watch:
            status = lib.mfa_attention_merge(handle, *words, FP32)
        assert watch.after == watch.before
        assert status == SUCCESS, message(handle)
        return output.tobytes(), merged.tobytes()

    assert run(context, mode) == run(alone, None)
    figures.add("floating point", problems_in_another_environment_with_the_same_bits=1)


@pytest.mark.parametrize("mode", floating.HERE)
def test_flat_functions__in_any_environment__give_the_same_bits(mode, context, alone):
    def run(handle, mode):
        flat = native.Flat(np.random.default_rng(1), ("float32", "int8", "float16"), sizes=(1, 40, 90, 2, 24))
        flat.arrays[0] *= np.float32(1e-38)
        for call in (flat.forward, flat.forward_quantized, flat.backward_query, flat.backward_kv):
            with floating.environment(mode) as watch:
                status = call(handle)
            assert watch.after == watch.before
            assert status == SUCCESS, message(handle)
        return [array.tobytes() for array in flat.outputs.values()]

    assert run(context, mode) == run(alone, None)
    figures.add("floating point", problems_in_another_environment_with_the_same_bits=1)


@pytest.mark.parametrize("mode", floating.HERE)
def test_what_computes_nothing__leaves_the_environment_alone(mode):
    made = native.ffi.new("mfa_context_t **")
    options = native.new("mfa_context_options_t", device=1, num_threads=3)
    bad = native.ffi.new("mfa_attention_t *")
    for call in (
        lambda: lib.mfa_create_context_with_options(options, made),
        lambda: lib.mfa_attention_run_forward(made[0], bad),
        lambda: lib.mfa_attention_run_forward(NULL, bad),
        lambda: lib.mfa_context_get_info(made[0], NULL),
        lambda: lib.mfa_last_error(made[0]),
        lambda: lib.mfa_destroy_context(made[0]),
    ):
        with floating.environment(mode) as watch:
            call()
        assert watch.after == watch.before


@pytest.mark.skipif(not umfa.info()["devices"]["softmetal"], reason="libsoftmetal is not built")
@pytest.mark.parametrize("mode", floating.HERE)
def test_software_device__in_any_environment__gives_the_same_bits(mode):
    with Context(2, native.ffi.integer_const("MFA_DEVICE_SOFTMETAL")) as device:
        for kind, value in (("float32", "denormals"), ("float16", "infinity"), ("fused int8", "tiny")):
            case = Case(kind, "tile", value, "value", True)
            assert case.run(device, mode) == case.run(device, None)
            figures.add("floating point", problems_in_another_environment_with_the_same_bits=1)
