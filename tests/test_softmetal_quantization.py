"""Quantising on the software Metal device: the tests of the CPU backend once more, and that attention quantises there too."""

from __future__ import annotations

import numpy as np
import pytest

import test_quantization
import umfa
from cases import Sizes, problem
from software_context import *  # noqa: F403
from software_device import dispatched
from test_quantization import standard_normal  # noqa: F401
from umfa.scheme_errors import quantize_by

if not umfa.info()["devices"]["softmetal"]:
    pytest.skip("libsoftmetal is not built", allow_module_level=True)

for name, function in list(vars(test_quantization).items()):
    if name.startswith("test_"):
        assert name not in globals()
        globals()[name] = function


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("tokens", [1, 3, 1000])
def test_softmetal__means__have_the_bits_of_a_sum_in_double(tokens, scale, rng):
    """Numbers of all sizes and signs, so that each addition rounds and much cancels."""
    values = rng.normal(size=(1, 2, tokens, 64)) * 2.0 ** rng.integers(-20, 21, (1, 2, tokens, 64)) * scale
    values = values.astype(np.float32)
    values[:, :, tokens // 2 :, ::2] = -values[:, :, : tokens - tokens // 2, ::2]
    found = umfa.quantize(values, "int8", granularity="token", smooth=True)
    with umfa.MFAContext(device="cpu") as cpu:
        expected = umfa.quantize(values, "int8", granularity="token", smooth=True, context=cpu)
    assert np.asarray(found.channel_means).tobytes() == np.asarray(expected.channel_means).tobytes()
    assert np.asarray(found.data).tobytes() == np.asarray(expected.data).tobytes()


@pytest.mark.parametrize("config", test_quantization.CONFIGS)
def test_softmetal__quantised_on_the_fly__gives_the_bits_of_codes_quantised_before(config, rng):
    made = problem(rng, Sizes(channels=64, value_channels=64))
    schemes = test_quantization.CONFIGS[config].schemes
    codes = [operand if scheme is None else quantize_by(operand, scheme) for operand, scheme in zip(made.arguments, schemes)]
    fused, before = umfa.attention(*made.arguments, quantize=test_quantization.CONFIGS[config]), umfa.attention(*codes)
    assert fused.tobytes() == before.tobytes()


def test_softmetal__quantised_on_the_fly__is_quantised_on_the_device(rng, tmp_path, monkeypatch):
    made = problem(rng, Sizes(batch=1, rows=40, channels=64, value_channels=64))
    monkeypatch.setenv("SOFTMETAL_RECORD", str(tmp_path))
    umfa.attention(*made.arguments, quantize="int8")
    kernels = [kernel for kernel, _ in dispatched(tmp_path)]
    assert kernels.count("quantize_write_metal_128") == 3
    assert kernels[-1].startswith("attention_forward_metal")
