"""Contexts: lifetime, threads, processes."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

import umfa
from processes import in_child
from umfa.context import default_context

X = np.random.default_rng(0).normal(size=(1, 4, 33, 16)).astype(np.float32)
EXPECTED = umfa.attention(X, X, X)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def attend(context=None):
    assert np.array_equal(umfa.attention(X, X, X, context=context), EXPECTED)


def test_with__closes():
    with umfa.MFAContext() as context:
        assert not context.closed
        attend(context)
    assert context.closed
    assert "closed" in repr(context)


def test_close__twice_is_harmless():
    context = umfa.MFAContext()
    context.close()
    context.close()


def test_closed__every_use_fails_clearly():
    context = umfa.MFAContext()
    context.close()
    uses = [
        lambda: umfa.attention(X, X, X, context=context),
        lambda: umfa.flash_attention_forward(context, X, X, X),
        lambda: umfa.attention_backward(X, X, X, X, X, np.zeros(X.shape[:3], np.float32), context=context),
        lambda: umfa.merge(X, np.zeros(X.shape[:3], np.float32), X, np.zeros(X.shape[:3], np.float32), context=context),
        lambda: umfa.quantize(X, context=context),
        lambda: umfa.quantize(X).dequantize(context=context),
        lambda: umfa.MFABuffer(8, context),
        lambda: umfa.info(context),
        lambda: context.num_threads,
        lambda: context.device,
        lambda: context.__enter__(),
    ]
    for use in uses:
        with pytest.raises(umfa.InvalidContextError, match=r"umfa\..*expected an open context, got a closed one") as caught:
            use()
        assert caught.value.status == 1
        assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 256])
def test_num_threads__is_taken_and_does_not_change_results(count):
    with umfa.MFAContext("cpu", count) as context:
        assert context.num_threads == count
        attend(context)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_num_threads__does_not_change_codes(contexts, dtype):
    expected = umfa.quantize(X, dtype)
    for context in contexts.values():
        found = umfa.quantize(X, dtype, context=context)
        assert np.array_equal(found.data, expected.data)
        assert np.array_equal(found.scales, expected.scales)
        assert np.array_equal(found.dequantize(context=context), expected.dequantize())
    with pytest.raises(umfa.InvalidTypeError, match=r"umfa.quantize: context"):
        umfa.quantize(X, dtype, context=1)


def test_num_threads__default_follows_the_environment():
    script = "import umfa; print(umfa.MFAContext().num_threads)"
    answer = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "MFA_NUM_THREADS": "3"}, capture_output=True, text=True, check=True
    )
    assert answer.stdout == "3\n"


@pytest.mark.parametrize("words", ["abc", "-5", "0", "1.5", "2 ", "257", "99999999999999999999"])
def test_num_threads__nonsense_in_the_environment__is_refused(words, monkeypatch):
    monkeypatch.setenv("MFA_NUM_THREADS", words)
    with pytest.raises(umfa.DeviceUnavailableError, match=rf"MFA_NUM_THREADS takes a number from 1 to 256 \(got \"{re.escape(words)}\"\)"):
        umfa.MFAContext(device="cpu")
    with umfa.MFAContext(device="cpu", num_threads=2) as context:
        assert context.num_threads == 2
    monkeypatch.setenv("MFA_NUM_THREADS", "")
    umfa.MFAContext(device="cpu").close()


@pytest.mark.parametrize("count", [0, -1, 257, 2**32, 2**64, 10**400])
def test_num_threads__illegal(count):
    with pytest.raises(umfa.InvalidArgumentError, match=r"umfa.MFAContext: num_threads: expected 1 ... 256"):
        umfa.MFAContext(num_threads=count)


@pytest.mark.parametrize("count", ["2", 2.0, True, [2], np.ones(2, int), float("nan")])
def test_num_threads__not_a_number(count):
    with pytest.raises(umfa.InvalidTypeError, match=r"umfa.MFAContext: num_threads"):
        umfa.MFAContext(num_threads=count)


@pytest.mark.parametrize("device", ["", "CPU", "cuda", None, 1, b"cpu", ["cpu"]])
def test_device__unknown(device):
    with pytest.raises(umfa.InvalidArgumentError, match=r"umfa.MFAContext: device: expected one of 'auto', 'cpu', 'metal', 'softmetal'"):
        umfa.MFAContext(device)


@pytest.mark.parametrize("device", ["metal", "softmetal"])
def test_device__not_here(device):
    if umfa.info()["devices"][device]:
        pytest.skip(f"asks for a device that is absent, and {device} is not")
    with pytest.raises(umfa.DeviceUnavailableError) as caught:
        umfa.MFAContext(device)
    assert caught.value.status == 7


def test_details__say_what_it_is(context):
    details = context.details()
    assert details["device"] == context.device == "cpu"
    assert details["num_threads"] >= 1
    assert details["instruction_set"]


@pytest.mark.parametrize("wrong", [3, "context", object(), np.zeros(3), umfa.MFAContext])
def test_not_a_context(wrong):
    for use in (
        lambda: umfa.attention(X, X, X, context=wrong),
        lambda: umfa.flash_attention_forward(wrong, X, X, X),
        lambda: umfa.MFABuffer(8, wrong),
        lambda: umfa.info(wrong),
    ):
        with pytest.raises(umfa.InvalidTypeError, match="expected an umfa.MFAContext"):
            use()
    with pytest.raises(umfa.InvalidTypeError):
        umfa.MetalSDPA(wrong)


def test_flash_attention_forward__needs_a_context():
    with pytest.raises(umfa.InvalidTypeError, match="ctx"):
        umfa.flash_attention_forward(None, X, X, X)


def test_copies__are_refused(context):
    for use in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(umfa.InvalidTypeError, match="copied or pickled"):
            use(context)


def test_dropped__is_destroyed():
    context = umfa.MFAContext()
    attend(context)
    gone = weakref.ref(context)
    del context
    gc.collect()
    assert gone() is None


def test_default__is_one_a_thread():
    found = []
    attend()
    thread = threading.Thread(target=lambda: (attend(), found.append(default_context())))
    thread.start()
    thread.join()
    assert default_context() is default_context()
    assert found[0] is not default_context()


def test_default__closed_by_someone__is_replaced():
    default_context().close()
    attend()


def test_threads__may_share_a_context():
    failures = []
    bad = X[:, :3]

    def work(context):
        try:
            for _ in range(50):
                attend(context)
                with pytest.raises(ValueError, match="num_kv_heads"):
                    umfa.attention(X, bad, bad, context=context)
        except BaseException as error:
            failures.append(error)

    with umfa.MFAContext() as context:
        threads = [threading.Thread(target=work, args=(context,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_close__waits_for_a_call_in_another_thread():
    x = np.ones((1, 2, 2048, 64), np.float32)
    outcomes = []

    def work(context):
        try:
            outcomes.append(umfa.attention(x, x, x, context=context)[0, 0, 0, 0])
        except umfa.InvalidContextError:
            outcomes.append(1.0)

    context = umfa.MFAContext()
    thread = threading.Thread(target=work, args=(context,))
    thread.start()
    context.close()
    thread.join()
    assert outcomes == [1.0]


def test_interpreter_lock__is_released():
    x = np.ones((1, 4, 2048, 64), np.float32)
    started, counted = threading.Event(), [0]
    done = threading.Event()

    def count():
        started.set()
        while not done.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    started.wait()
    before = counted[0]
    with umfa.MFAContext(num_threads=1) as context:
        umfa.attention(x, x, x, context=context)
    during = counted[0] - before
    done.set()
    thread.join()
    assert during > 0


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork__every_context_works_in_the_child():
    with umfa.MFAContext(num_threads=3) as context:
        attend(context)
        attend()

        def child():
            attend(context)
            attend()
            context.close()
            with umfa.MFAContext(num_threads=2) as another:
                attend(another)

        in_child(child)
        in_child(lambda: in_child(child))
        attend(context)
        attend()


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork__while_another_thread_is_inside():
    x = np.ones((1, 4, 1024, 64), np.float32)
    stop = threading.Event()

    def work(context):
        while not stop.is_set():
            umfa.attention(x, x, x, context=context)

    with umfa.MFAContext(num_threads=2) as context, umfa.MFAContext(num_threads=2) as idle:
        thread = threading.Thread(target=work, args=(context,))
        thread.start()
        try:
            for _ in range(5):
                in_child(lambda: (attend(), attend(idle), gc.collect()))
        finally:
            stop.set()
            thread.join()


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork__multiprocessing_pool():
    import multiprocessing

    attend()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(_attention_of_x, range(4))
    assert all(np.array_equal(result, EXPECTED) for result in results)


def _attention_of_x(_):
    return umfa.attention(X, X, X)
