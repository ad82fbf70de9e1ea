"""Forward attention by the Metal kernels, on the software device.

All of the CPU backend's tests of forward run here once more, with a context on the software device in the place of the default one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

import build_softmetal
import test_forward
import test_special_values
import umfa
from cases import CODES, DTYPES, Sizes, problem, problem_with
from software_context import *  # noqa: F403

if not umfa.info()["devices"]["softmetal"]:
    pytest.skip("libsoftmetal is not built", allow_module_level=True)

for module in (test_forward, test_special_values):
    for name, function in list(vars(module).items()):
        if name.startswith("test_attention__"):
            assert name not in globals()
            globals()[name] = function


def test_softmetal__says_what_it_is(device):
    found = umfa.info(device)
    assert found["device"] == device.device == "softmetal"
    kernels = found["kernels"]
    assert {kernels["forward"][name] for name in ("float32", "int8", "int4")} == {"attention_forward_metal_64x32"}
    assert kernels["forward"]["float16"] == "attention_forward_fp16_metal_64x32"
    assert kernels["forward"]["bfloat16"] == "attention_forward_bf16_metal_64x32"
    assert "fp64_reference" in kernels["forward"]["float64"]
    assert device.details()["fallback_precisions"] == 1 << umfa.arrays.FP64


@pytest.mark.parametrize("channels", [31, 32, 33, 64, 65, 128, 129, 300])
def test_softmetal__each_head_size__equals_the_reference(channels, device):
    sizes = Sizes(batch=1, heads=2, kv_heads=1, rows=40, columns=70, channels=channels, value_channels=channels)
    test_forward.check(problem(np.random.default_rng(channels), sizes, causal=True))


@pytest.mark.parametrize("dtype", [name for name in (*DTYPES, *CODES) if name != "float64"])
def test_softmetal__the_longest_sequence_that_tests_use__equals_the_reference(dtype):
    sizes = Sizes(batch=1, heads=1, kv_heads=1, rows=512, columns=512, channels=64, value_channels=64)
    made = problem(np.random.default_rng(0), sizes, dtypes=(dtype,) * 3)
    output, _ = test_forward.check(made)
    limit = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}.get(dtype, 5e-3)
    exact = made.bounds.at.output
    assert np.abs(output.astype(np.float64) - exact).max() <= limit * max(1, np.abs(exact).max())


@pytest.mark.parametrize("granularity", ["tensor", "head", "token", "block", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", CODES)
def test_softmetal__quantised_operands__give_what_their_real_values_give(dtype, symmetric, granularity, rng):
    q, k, v = (rng.normal(size=(2, heads, tokens, 40)).astype(np.float32) for heads, tokens in ((4, 35), (2, 50), (2, 50)))
    sizes = {"block": {"block_size": 16}, "group": {"group_size": 8}}.get(granularity, {})
    rotate = granularity in ("token", "tensor")
    words = {"granularity": granularity, "symmetric": symmetric, **sizes}
    codes = [
        umfa.quantize(q, dtype, rotate=rotate, **words),
        umfa.quantize(k, dtype, smooth=True, rotate=rotate, **words),
        umfa.quantize(v, dtype, **words),
    ]
    output, logsumexp = umfa.attention(*codes, return_lse=True, softcap=3.0)
    real = [operand.dequantize() for operand in codes]
    expected, expected_logsumexp = umfa.attention(*real, return_lse=True, softcap=3.0)
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(logsumexp, expected_logsumexp, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["reverse", "random:5"])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_softmetal__threads_in_any_order__give_the_same_bits(option, order, monkeypatch):
    made = problem_with(option, sizes=Sizes(rows=70, columns=90, channels=64, value_channels=32))
    expected = made.run()
    monkeypatch.setenv("SOFTMETAL_ORDER", order)
    for got, wanted in zip(made.run(), expected):
        assert got.tobytes() == wanted.tobytes()


def test_softmetal__in_a_batch_and_padded__gives_the_same_bits(rng):
    q, k, v = (rng.normal(size=(3, 2, tokens, 64)).astype(np.float32) for tokens in (33, 100, 100))
    output = umfa.attention(q, k, v, kv_lengths=[70, 100, 0], causal="lower_right")
    alone = umfa.attention(q[:1], k[:1, :, :70], v[:1, :, :70], causal="lower_right")
    assert output[:1].tobytes() == alone.tobytes()
    assert not output[2].any()


def test_softmetal__tiles_that_a_mask_excludes__are_not_needed(rng):
    """A block-diagonal mask leaves most tiles out; the result is that of each block alone."""
    q, k, v = (rng.normal(size=(1, 1, 128, 16)).astype(np.float32) for _ in range(3))
    blocks = np.arange(128) // 32
    output = umfa.attention(q, k, v, mask=blocks[:, None] == blocks)
    for start in range(0, 128, 32):
        part = slice(start, start + 32)
        np.testing.assert_allclose(output[:, :, part], umfa.attention(q[:, :, part], k[:, :, part], v[:, :, part]), rtol=0, atol=1e-6)


def test_softmetal__memory_of_the_device_and_whole_pages__is_used_where_it_is(device, rng):
    made = problem(rng, Sizes(batch=1, heads=4, kv_heads=4, rows=64, columns=64, channels=64, value_channels=64))
    expected, _ = made.run()
    pages = np.frombuffer(mmap.mmap(-1, 2 * 65536), np.float32)
    start = -pages.ctypes.data % 16384 // 4
    q = pages[start : start + 16384].reshape(1, 4, 64, 64)
    q[...] = made.query.argument
    with umfa.MFABuffer(3 * 65536, device) as buffer:
        k, v, out = (buffer.array((1, 4, 64, 64), offset=offset * 65536) for offset in range(3))
        k[...], v[...] = made.key.argument, made.value.argument
        umfa.attention(q, k, v, out=out, context=device)
        assert out.tobytes() == expected.tobytes()
        backwards = out[:, :, ::-1]
        umfa.attention(q[:, :, ::-1], k[:, ::1], v, out=backwards, context=device)
        assert out.tobytes() == expected.tobytes()


def test_softmetal__keys_past_the_lengths_that_cannot_be_read__are_not_read(rng):
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    whole = np.frombuffer(memory, np.float32)
    tokens = mmap.PAGESIZE // 4 // 16
    keys = whole.reshape(1, 1, 2 * tokens, 16)
    keys[...] = rng.normal(size=keys.shape)
    q = rng.normal(size=(1, 1, 5, 16)).astype(np.float32)
    expected = umfa.attention(q, keys[:, :, :tokens].copy(), keys[:, :, :tokens].copy())
    libc = ctypes.CDLL(None, use_errno=True)
    second = ctypes.c_void_p(whole.ctypes.data + mmap.PAGESIZE)
    assert libc.mprotect(second, mmap.PAGESIZE, mmap.PROT_READ & 0) == 0
    try:
        output = umfa.attention(q, keys, keys, kv_lengths=[tokens])
    finally:
        libc.mprotect(second, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
    assert output.tobytes() == expected.tobytes()


def test_softmetal__what_it_leaves_to_the_cpu__is_computed_on_the_same_memory(device, rng):
    made = problem(rng, causal=True, dtypes=("float64",) * 3)
    with umfa.MFAContext(device="cpu") as cpu:
        for got, wanted in zip(made.run(context=device), made.run(context=cpu)):
            assert got.tobytes() == wanted.tobytes()


def run_alone(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


def test_softmetal__a_library_that_is_not_there__is_unavailable():
    code = "import umfa; print(umfa.info()['devices']['softmetal']); umfa.MFAContext(device='softmetal')"
    answer = run_alone(code, MFA_SOFTMETAL="/no/such/libsoftmetal.so")
    assert answer.stdout == "False\n"
    assert (
        'DeviceUnavailableError: umfa.MFAContext: the device "softmetal" needs libsoftmetal, a development tool: /no/such/' in answer.stderr
    )


def test_softmetal__another_library__is_refused(tmp_path):
    library = build_softmetal.build(
        tmp_path / "libother.so", {"other.metal": "kernel void other(device int* x [[buffer(0)]]) { x[0] = 1; }\n"}
    )
    code = "import numpy, umfa; x = numpy.ones((2, 4), 'f'); umfa.attention(x, x, x, context=umfa.MFAContext(device='softmetal'))"
    answer = run_alone(code, MFA_SOFTMETAL=str(library))
    assert "libsoftmetal was built from other kernels than this library" in answer.stderr


def test_softmetal__in_a_process_that_was_forked_off__is_unavailable():
    code = """
import os, numpy, umfa
x = numpy.ones((1, 1, 2, 4), "f")
context = umfa.MFAContext(device="softmetal")
umfa.attention(x, x, x, context=context)
if os.fork() == 0:
    try:
        umfa.attention(x, x, x, context=context)
    except umfa.DeviceUnavailableError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
umfa.attention(x, x, x, context=context)
"""
    answer = run_alone(code)
    assert answer.returncode == 0, answer.stderr
    assert 'a context on "softmetal" cannot be used in a process that was forked off' in answer.stdout
