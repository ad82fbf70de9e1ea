"""Memory: nothing grows with seq_len_q * seq_len_kv or with the number of calls."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest

import native
import umfa
from cases import Sizes, problem
from native import NULL, SUCCESS, Context, Descriptor, ffi, lib
from processes import run_alone

on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")


# Lays open what memory is resident, in MiB.
HELPERS = """\
import gc
import numpy as np
import umfa

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1])

def resident():
    gc.collect()
    return status("VmRSS") / 1024

def reset_peak():
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

def peak():
    return status("VmHWM") / 1024

reset_peak()
lowest = peak()
np.ones(2**23)
assert 60 < peak() - lowest < 70, "peak memory cannot be measured"
"""


def run_measured(code, timeout=240):
    """Run a program, with helpers to read resident memory, in a process of its own."""
    return run_alone(HELPERS + textwrap.dedent(code), timeout)


# ---- What a call needs -------------------------------------------------------------------------------------------------------------------


def workspace(rows, columns, backward=False, precision=native.FP32, threads=2, **options):
    """The bytes that a call of these lengths needs. Its memory is never touched, so it may be large."""
    heads, channels = 8, 64
    dtype = native.DTYPES[precision]

    def virtual(tokens, kind=dtype):
        return native.tensor(np.empty((1, heads, tokens, channels), kind), None if kind != dtype else precision)

    output = virtual(rows, np.float32)
    statistics = np.empty((1, heads, rows), np.float32)
    attention = native.attention(virtual(rows), virtual(columns), virtual(columns), output, logsumexp=statistics, **options)
    gradients = NULL
    if backward:
        tensors = {"grad_query": rows, "grad_key": columns, "grad_value": columns, "grad_output": rows}
        keep = Descriptor("mfa_attention_gradients_t", **{name: virtual(tokens, np.float32) for name, tokens in tensors.items()})
        gradients = keep.pointer
    size = ffi.new("uint64_t *")
    with Context(threads) as context:
        assert lib.mfa_attention_workspace_size(context, attention.pointer, gradients, size) == SUCCESS, native.message(context)
    return size[0]


def scheme(granularity):
    return Descriptor("mfa_quantization_scheme_t", precision=native.INT8, granularity=granularity)


WORKSPACE_OPTIONS = {
    "plain": dict,
    "causal": lambda: {"causal": 1, "alignment": 1},
    "mask": lambda: {"mask": native.tensor(np.zeros((1, 1, 1, 1), np.float32))},
    "dropout": lambda: {"dropout_p": 0.5},
    "softcap": lambda: {"softcap": 1.0},
    "slopes and sinks": lambda: {"alibi_slopes": np.ones(8, np.float32), "sinks": np.ones(8, np.float32)},
    "quantised on the fly": lambda: {"quantize_query": scheme(2), "quantize_key": scheme(2), "quantize_value": scheme(0)},
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", WORKSPACE_OPTIONS)
def test_mfa_attention_workspace_size__longer_sequences__grow_at_most_linearly(name, backward):
    def size(rows, columns):
        return workspace(rows, columns, backward, **WORKSPACE_OPTIONS[name]())

    for short, long in (((2048, 2048), (32768, 32768)), ((2048, 2048), (2048, 32768)), ((2048, 2048), (32768, 2048))):
        assert size(*long) <= 16 * size(*short)
    # Less than the operands themselves, of which there are at least four; scores would be 32 GiB.
    assert 0 < size(32768, 32768) <= 8 * 64 * 32768 * 4 * 4


@pytest.mark.parametrize("precision", [native.FP32, native.FP16, native.BF16, native.INT8])
def test_mfa_attention_workspace_size__without_fused_quantising__does_not_grow_with_keys(precision):
    assert workspace(64, 65536, precision=precision) == workspace(64, 1024, precision=precision)


def test_mfa_context__after_a_call__holds_what_the_inquiry_said(rng):
    made = problem(rng, Sizes(rows=100, columns=100))
    with umfa.MFAContext(num_threads=2) as context:
        assert context.details()["workspace_bytes"] == 0
        made.run(context=context)
        held = context.details()["workspace_bytes"]
        assert held > 0
        for _ in range(20):
            made.run(context=context)
        assert context.details()["workspace_bytes"] == held


# ---- Resident memory ---------------------------------------------------------------------------------------------------------------------


@on_linux
def test_attention__8192_tokens__needs_a_fraction_of_the_scores():
    """All scores would be 256 MiB."""
    output = run_measured(
        """
        rng = np.random.default_rng(0)
        q, k, v, grad = (rng.standard_normal((1, 1, 8192, 16), np.float32) for _ in range(4))
        small = [tensor[:, :, :64] for tensor in (q, k, v)]
        keywords = {"mask": np.ones((1, 8192), bool), "causal": True, "dropout_p": 0.1, "seed": 1}
        umfa.attention(*small)
        before = resident()
        reset_peak()
        out, lse = umfa.attention(q, k, v, **keywords, return_lse=True)
        print(peak() - before)
        reset_peak()
        gradients = umfa.attention_backward(grad, q, k, v, out, lse, **keywords)
        print(peak() - before)
        reset_peak()
        umfa.attention(q, k, v, quantize="int8")
        print(peak() - before)
        """
    )
    growth = [float(line) for line in output.split()]
    assert len(growth) == 3
    assert max(growth) < 32, growth


@on_linux
def test_attention__broadcast_and_strided_operands__are_not_copied():
    """A mask of 4 GiB and keys of 2 GiB, if they were expanded."""
    output = run_measured(
        """
        rng = np.random.default_rng(0)
        q = rng.standard_normal((1, 64, 16, 64), np.float32)
        k = np.broadcast_to(rng.standard_normal((1, 1, 1, 64), np.float32), (1, 64, 131072, 64))
        mask = np.broadcast_to(np.zeros((1, 1, 1, 131072), np.float32), (1, 64, 16, 131072))
        big = rng.standard_normal((1, 16, 64, 64), np.float32)
        umfa.attention(q, q, q)
        before = resident()
        reset_peak()
        umfa.attention(q[:, :1], k[:, :1], k[:, :1], mask=mask[:, :1])
        umfa.attention(big.swapaxes(1, 2), q, q)
        print(peak() - before)
        """
    )
    assert float(output) < 16


@on_linux
def test_mfa_context__many_of_them__share_their_threads():
    output = run_measured(
        """
        q = np.zeros((1, 8, 200, 16), np.float32)
        before = status("Threads")
        contexts = [umfa.MFAContext(num_threads=4) for _ in range(50)]
        for context in contexts:
            umfa.attention(q, q, q, context=context)
        print(status("Threads") - before)
        """
    )
    assert 0 < int(output) <= 8
