"""One suite for every language and backend: statuses, errors against the reference, equal bytes. See tests/conformance/suite.py."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

import make_cases
import reference
import suite

THREADS = (1, 3, 7, 16)


def answers(language: str, backend: str, threads: int = 2, again: int = 0):
    """The answers of a runner; skips where there is none."""
    try:
        return suite.run(language, backend, threads, again)
    except suite.UnavailableError as reason:
        pytest.skip(f"{language} on {backend}: {reason}")


def complaints(check) -> str:
    """What a check finds, case by case."""
    found = [complaint for complaint in map(check, suite.cases()) if complaint]
    return "\n".join([f"{len(found)} cases:", *found[:20]]) if found else ""


def test_cases__the_file__is_what_its_script_makes():
    assert make_cases.FILE.read_text() == make_cases.lines()


def test_cases__there_are_enough__of_every_operation_and_status():
    cases = suite.cases()
    assert len(cases) >= 400
    assert {case["operation"] for case in cases} == {
        "forward", "backward", "quantize", "dequantize", "merge", "flat_forward", "flat_backward"
    }  # fmt: skip
    assert {case["status"] for case in cases} == {0, 3, 5, 6}


@pytest.mark.parametrize("backend", suite.BACKENDS)
@pytest.mark.parametrize("language", suite.LANGUAGES)
def test_each_language__on_each_backend__answers_with_the_documented_statuses(language, backend):
    found = answers(language, backend)
    assert not complaints(lambda case: None if "skipped" in found[case["id"]] else suite.wrong_status(case, found[case["id"]]))


@pytest.mark.parametrize("backend", suite.BACKENDS)
def test_each_backend__every_case__is_within_its_bound(backend):
    answers("Python", backend)
    assert not complaints(lambda case: suite.out_of_bounds(case, backend))


@pytest.mark.parametrize("backend", suite.BACKENDS)
@pytest.mark.parametrize("language", [name for name in suite.LANGUAGES if name != "C"])
def test_each_language__on_each_backend__gives_the_bytes_and_words_of_c(language, backend):
    answers("C", backend)
    answers(language, backend)
    assert not complaints(lambda case: suite.other_than_c(case, language, backend))


@pytest.mark.parametrize("backend", suite.BACKENDS)
@pytest.mark.parametrize("language", suite.SHOWING_MEMORY)
def test_each_backend__a_refused_call__writes_nothing(language, backend):
    found = answers(language, backend)
    assert not complaints(lambda case: None if "skipped" in found[case["id"]] else suite.written(case, found[case["id"]]))


@pytest.mark.parametrize("backend", suite.BACKENDS)
def test_each_backend__from_run_to_run_and_for_any_number_of_threads__gives_the_same_bytes(backend):
    first = answers("C", backend)
    assert answers("C", backend, again=1) == first
    for threads in THREADS if backend != "softmetal" else ():
        other = answers("C", backend, threads)
        assert [name for name in first if other[name] != first[name]] == [], f"{threads} threads"


@pytest.mark.parametrize("backend", suite.BACKENDS)
def test_each_backend__a_sequence_alone__gives_the_bytes_that_it_has_in_a_batch(backend):
    together = answers("C", backend)
    try:
        alone, divided = suite.run_divided(backend)
    except suite.UnavailableError as reason:
        pytest.skip(str(reason))
    assert [name for name in together if alone[name] != together[name]] == []
    assert divided > len(suite.cases()) / 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_reference__small_problems__equal_fifty_digits(causal, softcap, sinks):
    rng = np.random.default_rng(5)
    query, key, value, grad_output = (rng.normal(size=(1, 1, 3, 4)) for _ in range(4))
    sink = rng.normal(size=1) if sinks else None
    options = reference.Options(softmax_scale=0.7, softcap=softcap, causal=causal, sinks=sink)
    at = reference.forward(query, key, value, options)
    gradients = reference.backward(query, key, value, grad_output, options)
    with mpmath.workdps(50):

        def loss(*numbers: mpmath.mpf) -> mpmath.mpf:
            return mpmath.fsum(
                each * mpmath.mpf(weight)
                for each, weight in zip(_attention(numbers, options), grad_output.ravel(), strict=True)
            )  # fmt: skip

        flat = [mpmath.mpf(number) for number in np.concatenate([query.ravel(), key.ravel(), value.ravel()])]
        output = _attention(flat, options)
        np.testing.assert_allclose([float(each) for each in output], at.output.ravel(), rtol=1e-13, atol=1e-14)
        step = mpmath.mpf(10) ** -20
        exact = []
        for index in range(len(flat)):
            up, down = list(flat), list(flat)
            up[index] += step
            down[index] -= step
            exact.append(float((loss(*up) - loss(*down)) / (2 * step)))
    found = np.concatenate([gradients[name].ravel() for name in ("query", "key", "value")])
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-13)


def _attention(numbers, options):
    """Attention of 3 rows over 3 keys of 4 channels, digit by digit."""
    tensors = [[[numbers[start + 4 * row + channel] for channel in range(4)] for row in range(3)] for start in (0, 12, 24)]
    query, key, value = tensors
    outputs = []
    for i, row in enumerate(query):
        scores = []
        for j, column in enumerate(key):
            score = mpmath.mpf(options.softmax_scale) * mpmath.fdot(row, column)
            if options.softcap:
                score = options.softcap * mpmath.tanh(score / options.softcap)
            scores.append(mpmath.exp(score) if j <= i or not options.causal else mpmath.mpf(0))
        total = mpmath.fsum(scores) + (mpmath.exp(mpmath.mpf(float(options.sinks[0]))) if options.sinks is not None else 0)
        outputs += [mpmath.fdot(scores, [each[channel] for each in value]) / total for channel in range(4)]
    return outputs
