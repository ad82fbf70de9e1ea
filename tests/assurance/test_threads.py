"""Threads, forks, exits and unloading around calls: results keep their bits, nothing crashes, hangs or races.

`threads.c` does what a program in C may do, also under ThreadSanitizer; what Python adds, its interpreter's lock and its pools of
processes, is below.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import build_library
import figures
import umfa
from cases import OPTIONS, Sizes, problem_with
from processes import run_alone
from test_backward import random_gradients, run_backward

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="threads and memory are read from /proc")
with_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork() here")

SOURCE = Path(__file__).with_name("threads.c")
LIBRARY = Path(umfa.__file__).parent / build_library.LIBRARY_NAME


# ---- A program in C ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def program(sanitizer: str = "") -> Path:
    """The program of threads.c with the library, or with one that has a sanitizer."""
    library, flags = LIBRARY, []
    swift = shutil.which("swift")
    clang = shutil.which("clang") or shutil.which("cc")
    if sanitizer:
        if swift is None or sys.platform != "linux":
            pytest.skip("needs Swift on Linux")
        library = build_library.build_library(sanitizer=sanitizer)
        clang = str(Path(swift).resolve().with_name("clang"))
        # The toolchain's runtime of ThreadSanitizer knows the queues of libdispatch, and so needs it.
        answer = subprocess.run([swift, "-print-target-info"], capture_output=True, text=True, check=True)
        folder = json.loads(answer.stdout)["paths"]["runtimeLibraryPaths"][0]
        flags = [f"-fsanitize={sanitizer}", f"-L{folder}", "-ldispatch", "-lBlocksRuntime", f"-Wl,-rpath,{folder}"]
    if clang is None:
        pytest.skip("needs a C compiler")
    made = figures.MADE / f"threads{sanitizer}"
    made.parent.mkdir(parents=True, exist_ok=True)
    command = [clang, "-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-I", str(figures.ROOT / "include"), str(SOURCE)]
    subprocess.run([*command, str(library), f"-Wl,-rpath,{library.parent}", *flags, "-pthread", "-o", str(made)], check=True)
    return made


def run_program(*words: str | int, sanitizer: str = "") -> int:
    """Run it; returns how many results it compared."""
    environment = {name: value for name, value in os.environ.items() if name != "MFA_KERNELS"}
    environment["TSAN_OPTIONS"] = "exitcode=99"
    done = subprocess.run(
        [str(program(sanitizer)), *map(str, words)], capture_output=True, text=True, timeout=600, env=environment, check=False
    )  # fmt: skip
    assert done.returncode == 0, f"{words} ended with {done.returncode}: {done.stderr[-4000:]}"
    return int(done.stdout)


@pytest.mark.parametrize("how", ["churn", "shared"])
@pytest.mark.parametrize("threads", [2, 8, 32])
def test_threads__contexts_of_their_own_or_one_for_all__give_the_bits_of_one_thread(threads, how):
    compared = run_program(how, threads, figures.pick(64, 2048) // threads)
    figures.add("threads", results_of_threads_with_the_bits_of_one=compared)


@on_linux
@pytest.mark.skipif(not figures.FULL, reason="builds the library with a sanitizer: in full size only")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "words", [("churn", 2, 60), ("churn", 8, 15), ("churn", 32, 5), ("shared", 8, 20), ("shared", 32, 5), ("exit", 4, 0)], ids=str
)
def test_threads__under_thread_sanitizer__have_no_race(words):
    compared = run_program(*words, sanitizer="thread")
    figures.add("threads", of_these_under_ThreadSanitizer_without_a_report=compared)


@on_linux
@pytest.mark.skipif(not figures.FULL, reason="builds the library with a sanitizer: in full size only")
@pytest.mark.timeout(1800)
def test_threads__a_race_of_the_program__is_found():
    with pytest.raises(AssertionError, match="ended with 99: [^$]*data race"):
        run_program("race", 4, sanitizer="thread")


@with_fork
@pytest.mark.parametrize("threads", [1, 6])
def test_fork__while_threads_compute__leaves_child_and_parent_whole(threads):
    forks = figures.pick(12, 200)
    run_program("fork", threads, forks)
    figures.add("threads", children_of_forks_in_mid_call_that_computed_right=forks)


@pytest.mark.parametrize("by_a_thread", [0, 1])
def test_exit__with_live_contexts_and_running_calls__is_clean(by_a_thread):
    count = figures.pick(5, 100)
    for _ in range(count):
        run_program("exit", 8, by_a_thread)
    figures.add("threads", exits_in_mid_call_with_code_0=count)


# ---- dlopen() and dlclose() --------------------------------------------------------------------------------------------------------------

RELOAD = """
    import _ctypes
    import ctypes
    from pathlib import Path

    path, count = {path!r}, {count}
    memory = (ctypes.c_float * 4096)(*[0.5] * 4096)

    def state():
        words = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        maps = Path("/proc/self/maps").read_text().splitlines()
        libraries = sum("libmfa" in line for line in maps)
        return [int(words["VmRSS"].split()[0]), int(words["Threads"]), len(maps), libraries]

    def use():
        handle = _ctypes.dlopen(path, 2)
        library = ctypes.CDLL(path, handle=handle)
        context = ctypes.c_void_p()
        assert library.mfa_create_context(ctypes.byref(context)) == 0
        sizes = [ctypes.c_uint32(size) for size in (1, 32, 32, 1)]
        assert library.mfa_attention_forward(context, memory, memory, memory, ctypes.byref(memory, 8192), *sizes, ctypes.c_uint16(16),
                                             ctypes.c_float(1), False, 0, 0, 0, False, False, False, False) == 0
        assert library.mfa_destroy_context(context) == 0
        _ctypes.dlclose(handle)

    for _ in range(count // 10):
        use()
    print(*state())
    for _ in range(count):
        use()
    print(*state())
"""


@on_linux
def test_dlopen_and_dlclose__again_and_again__leave_memory_and_threads_as_they_were():
    """The library stays in memory, since its threads outlive any dlclose(): it is loaded once, and does not grow."""
    count = 1000
    lines = run_alone(textwrap.dedent(RELOAD).format(path=str(LIBRARY), count=count)).splitlines()
    before, after = ([int(number) for number in line.split()] for line in lines)
    assert after[1:3] == before[1:3], "threads or maps"
    assert after[3] > 0, "it was unloaded, so docs/assurance.md is wrong"
    assert after[0] - before[0] < 1024, "KiB"
    figures.record(
        "threads", times_dlopen_and_dlclose=count, KiB_more_after_that=after[0] - before[0], threads_more_after_that=after[1] - before[1]
    )


# ---- Threads of Python -------------------------------------------------------------------------------------------------------------------


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
    import numpy as np
    import umfa
    from processes import in_child
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 4, 150, 32), np.float32) for _ in range(3))
    context = umfa.MFAContext(num_threads=3)

    def compute(context):
        out, lse = umfa.attention(q, k, v, causal=True, return_lse=True, context=context)
        return [array.tobytes() for array in (out, lse, *umfa.attention_backward(out, q, k, v, out, lse, causal=True, context=context))]

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
