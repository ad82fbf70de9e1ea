"""The kernels of FP32 arithmetic of each instruction set that this processor has, not only those that it would choose."""

from __future__ import annotations

import itertools
import platform

import numpy as np
import pytest
from hypothesis import given, strategies as st

import reference
import test_backward
import test_forward
import umfa
from cases import CODES, DTYPES, OPTIONS, Sizes, problem_with

ON_X86 = ("avx2,reference", "avx512,reference", "avx2,float", "avx512,float")
ON_ARM = ("baseline,float",)
KERNELS = ("baseline,reference", *(ON_ARM if platform.machine() in ("arm64", "aarch64") else ON_X86))


@pytest.fixture(scope="module")
def kernels():
    """A context for each instruction set and family that is here."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for words in KERNELS:
            patch.setenv("MFA_KERNELS", words)
            try:
                made[words] = umfa.MFAContext(device="cpu", num_threads=2)
            except umfa.DeviceUnavailableError:
                continue
    yield made
    for context in made.values():
        context.close()


@pytest.fixture(params=KERNELS)
def context(request, kernels):
    """The context of one instruction set and family."""
    instruction_set = request.param.split(",")[0]
    if request.param not in kernels:
        pytest.skip(f"this processor has no {instruction_set}")
    made = kernels[request.param]
    assert made.details()["instruction_set"] == instruction_set
    return made


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, *CODES])
def test_attention__each_instruction_set__equals_the_reference(option, dtype, context):
    made = problem_with(option, seed=2, dtypes=(dtype,) * 3, sizes=Sizes(rows=67, columns=70, channels=33, value_channels=20))
    test_forward.check(made, context=context)
    test_backward.check(made, context=context)


@pytest.mark.parametrize("channels", [1, 3, 17, 32, 64, 65, 128, 200, 1024])
def test_attention__each_instruction_set_and_head_size__equals_the_reference(channels, context):
    sizes = Sizes(batch=1, heads=2, kv_heads=1, rows=9, columns=130, channels=channels, value_channels=channels)
    made = problem_with("causal_lower_right", sizes=sizes)
    test_forward.check(made, context=context)
    test_backward.check(made, context=context)


@given(test_forward.problems(), st.integers(0, 2**32 - 1))
def test_attention__anything_on_each_instruction_set__equals_the_reference(kernels, made, seed):
    assert "baseline,reference" in kernels
    for context in kernels.values():
        test_forward.check(made, context=context)
        test_backward.check(made, seed, context=context)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("dtype", CODES)
def test_quantize__each_instruction_set__gives_the_bits_of_the_reference(dtype, granularity, symmetric, rotate, context, rng):
    for channels, smooth in itertools.product((1, 7, 32, 48, 64, 128, 200, 1024), (False, True)):
        values = rng.normal(size=(1, 2, 9, channels)).astype(np.float32)
        words = {"symmetric": symmetric, "smooth": smooth}
        got = umfa.quantize(values, dtype, granularity, **words, rotate=rotate, context=context)
        expected = reference.quantize(values, dtype, granularity, **words, rotated=rotate)
        assert reference.codes_of(got, channels).tobytes() == expected.codes.tobytes()
        assert got.scales.tobytes() == expected.scales.tobytes()
        assert got.dequantize(context=context).tobytes() == reference.dequantize(expected).tobytes()


@pytest.mark.parametrize("name", ["", "no such kernels"])
def test_mfa_context__kernels_that_do_not_exist__are_refused(name, monkeypatch):
    monkeypatch.setenv("MFA_KERNELS", name)
    if not name:
        umfa.MFAContext().close()
        return
    with pytest.raises(umfa.DeviceUnavailableError, match="MFA_KERNELS"):
        umfa.MFAContext()
