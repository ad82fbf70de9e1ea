"""Memory, threads and fork: nothing grows with seq_len_q * seq_len_kv or with the number of calls, and calls side by side do not meet."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import native
import umfa
from cases import OPTIONS, Sizes, problem, problem_with
from native import NULL, SUCCESS, Context, Descriptor, ffi, lib
from test_backward import random_gradients, run_backward

on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
with_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork() here")


def run_alone(code, timeout=240):
    """Run a program, with helpers to read resident memory, in a process of its own."""
    helpers = f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent / "assurance")!r}]
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
    program = textwrap.dedent(helpers) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


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
    output = run_alone(
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
    output = run_alone(
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
    output = run_alone(
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


# ---- Threads -----------------------------------------------------------------------------------------------------------------------------


def in_threads(count, work):
    """Run work(index) on `count` threads at once and raise what failed."""
    failures, barrier = [], threading.Barrier(count)

    def run(index):
        try:
            barrier.wait()
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("contexts", ["own", "shared", "default"])
def test_attention__on_many_threads__gives_the_bits_of_one(contexts):
    problems = [problem_with(option, seed=index, sizes=Sizes(rows=90, columns=110)) for index, option in enumerate(list(OPTIONS)[:8])]
    expected = []
    for made in problems:
        grad_out, grad_lse = random_gradients(made, np.random.default_rng(0))
        expected.append([array.tobytes() for array in (*made.run(), *run_backward(made, grad_out, grad_lse).values())])
    shared = umfa.MFAContext(num_threads=3)

    def work(index):
        context = {"own": lambda: umfa.MFAContext(num_threads=1 + index % 3), "shared": lambda: shared, "default": lambda: None}[contexts]()
        made = problems[index]
        grad_out, grad_lse = random_gradients(made, np.random.default_rng(0))
        for _ in range(15):
            got = (*made.run(context=context), *run_backward(made, grad_out, grad_lse, context=context).values())
            assert [array.tobytes() for array in got] == expected[index]

    in_threads(8, work)
    shared.close()


def test_attention__during_a_call__lets_other_python_threads_run():
    """The interpreter's lock is released: another thread never stands still for as long as a call takes."""
    q = np.ones((1, 8, 1500, 64), np.float32)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    shares = []
    for _ in range(5):  # one undisturbed call is enough; the machine may be busy
        begin = time.perf_counter()
        umfa.attention(q, q, q)
        end = time.perf_counter()
        during = np.array([begin, *[moment for moment in ticks if begin <= moment <= end], end])
        shares.append(np.diff(during).max() / (end - begin))
        ticks.clear()
    done.set()
    thread.join()
    assert min(shares) < 0.5


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantize__on_many_threads__gives_the_bits_of_one(dtype, rng):
    values = rng.normal(size=(2, 4, 60, 33)).astype(np.float32)
    expected = umfa.quantize(values, dtype, "token")

    def work(index):
        for _ in range(20):
            got = umfa.quantize(values, dtype, "token")
            assert got.data.tobytes() == expected.data.tobytes()
            assert got.scales.tobytes() == expected.scales.tobytes()

    in_threads(6, work)


# ---- fork() ------------------------------------------------------------------------------------------------------------------------------

FORK = """
    import os
    import threading
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 4, 150, 32), np.float32) for _ in range(3))
    context = umfa.MFAContext(num_threads=3)

    def compute(context):
        out, lse = umfa.attention(q, k, v, causal=True, return_lse=True, context=context)
        return [array.tobytes() for array in (out, lse, *umfa.attention_backward(out, q, k, v, out, lse, causal=True, context=context))]

    def in_child(work):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        for _ in range(600):
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                assert status == 0, status
                return
            __import__("time").sleep(0.1)
        os.kill(child, 9)
        raise AssertionError("the child hangs")

    def same(context):
        assert compute(context) == expected
"""


@with_fork
@pytest.mark.parametrize("before", ["compute(context); compute(None)", "pass"], ids=["after calls", "before any call"])
def test_attention__after_fork__works_in_child_and_parent(before):
    run_alone(
        textwrap.dedent(FORK)
        + textwrap.dedent(
            f"""
            {before}
            expected = None

            def child():
                global expected
                expected = compute(umfa.MFAContext(num_threads=1))
                same(context)
                same(umfa.MFAContext(num_threads=3))
                same(None)
                in_child(lambda: same(context))

            in_child(child)
            expected = compute(umfa.MFAContext(num_threads=1))
            same(context)
            same(None)
            in_child(lambda: same(context))
            context.close()
            """
        )
    )


@with_fork
@pytest.mark.parametrize("threads", [1, 3])
def test_attention__fork_while_another_thread_computes__works_in_child_and_parent(threads):
    run_alone(
        textwrap.dedent(FORK)
        + textwrap.dedent(
            f"""
            busy = umfa.MFAContext(num_threads={threads})
            expected = compute(context)
            stop = threading.Event()

            def work():
                while not stop.is_set():
                    assert compute(busy) == expected

            thread = threading.Thread(target=work)
            thread.start()

            def child():
                same(context)
                same(busy)
                same(None)
                busy.close()

            for _ in range(15):
                in_child(child)
            stop.set()
            thread.join()
            same(busy)
            """
        )
    )


@with_fork
def test_flat__training_record__survives_fork():
    run_alone(
        textwrap.dedent(FORK)
        + textwrap.dedent(
            """
            import native
            handle = native.Context(3).handle
            flat = native.Flat(np.random.default_rng(0))
            assert flat.forward_quantized(handle) == 0

            def child():
                assert flat.backward_query(handle) == 0
                assert flat.backward_kv(handle) == 0

            in_child(child)
            child()
            """
        )
    )


@with_fork
def test_attention__in_a_pool_of_forked_processes__gives_the_bits_of_the_parent():
    run_alone(
        textwrap.dedent(FORK)
        + textwrap.dedent(
            """
            import hashlib
            import multiprocessing
            expected = compute(None)

            def digest(index):
                return hashlib.sha256(b"".join(compute(None))).hexdigest()

            with multiprocessing.get_context("fork").Pool(3) as pool:
                assert pool.map(digest, range(12)) == [digest(0)] * 12
            """
        )
    )
