"""The self-test itself: that it passes, covers what it promises, and would notice a library that computes wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

import umfa
from umfa.check import Check, CheckResult, checks, reference_attention, reference_gradients, run_checks


@pytest.fixture(scope="module")
def results() -> list[CheckResult]:
    seen: list[CheckResult] = []
    results = run_checks(progress=seen.append)
    assert seen == results
    return results


def test_everything_passes(results: list[CheckResult]) -> None:
    assert [dataclasses.astuple(result) for result in results if not result.passed] == []


def test_the_published_bounds_are_measured(results: list[CheckResult]) -> None:
    measured = {(result.name, result.quantity): result.bound for result in results if result.group.startswith("error bounds")}
    assert measured == {
        ("int8, tensor scales", "absolute RMSE"): 0.002,
        ("int8, token scales", "absolute RMSE"): 0.002,
        ("int8, token scales", "relative RMSE"): 0.016,
        ("int8, default scheme", "relative RMSE"): 0.016,
        ("int4, tensor scales", "absolute RMSE"): 0.02,
        ("int4, default scheme", "relative RMSE"): 0.15,
    }


def test_no_bound_is_vacuous(results: list[CheckResult]) -> None:
    for result in results:
        # Kernels may round the weights of quantised operands to 8 bits, and need not; float64 is far more exact than it must be.
        if result.bound > 0 and result.group != "quantised operands" and result.name != "float64":
            assert result.measured > result.bound / 500, f"{result.group}, {result.name}: {result.measured} is far below {result.bound}"


def test_checks_have_names_of_their_own() -> None:
    names = [(check.group, check.name, check.quantity) for check in checks()]
    assert len(set(names)) == len(names) >= 25


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = umfa.attention

    def wrong(*operands: Any, **options: Any) -> Any:
        result = right(*operands, **options)
        output = result[0] if isinstance(result, tuple) else result
        output[..., 0] = -output[..., 0]
        return result

    monkeypatch.setattr(umfa, "attention", wrong)
    with umfa.MFAContext() as context:
        passed = {(check.group, check.name) for check in checks() if check.run(context).passed}
    # Gradients come from elsewhere, a wrong result may still be a repeatable one, and an error of a few channels is within INT4's bound.
    assert {group for group, _ in passed} <= {"gradients", "determinism", "options"}
    assert {name for group, name in passed if group == "options"} == {"logsumexp"}


def test_results_that_depend_on_threads_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = umfa.attention
    monkeypatch.setattr(
        umfa, "attention", lambda *operands, context, **options: right(*operands, context=context, **options) + context.num_threads
    )
    with umfa.MFAContext() as context:
        (check,) = (check for check in checks() if check.name == "1 and 3 threads")
        assert not check.run(context).passed


def test_an_error_of_the_library_is_a_failed_check() -> None:
    def measure(context: umfa.MFAContext) -> float:
        umfa.attention(np.zeros((2, 2), np.float32), np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), context=context)
        return 0.0

    with umfa.MFAContext() as context:
        result = Check("group", "name", "quantity", 1.0, measure).run(context)
    assert not result.passed
    assert math.isnan(result.measured)
    assert "head_dim" in result.message or "umfa.attention" in result.message


@pytest.mark.parametrize(
    ("measured", "bound", "passed"),
    [(0.5, 1.0, True), (1.0, 1.0, False), (math.nan, 1.0, False), (0.0, 0.0, True), (1.0, 0.0, False), (math.inf, 1.0, False)],
)
def test_passed(measured: float, bound: float, passed: bool) -> None:
    assert CheckResult("group", "name", "quantity", measured, bound).passed is passed


def test_the_reference_by_hand() -> None:
    query = np.array([[[[2.0]], [[0.0]]]])
    key = np.array([[[[1.0], [0.0], [5.0]]]])
    value = np.array([[[[3.0], [7.0], [100.0]]]])
    output, logsumexp = reference_attention(query, key, value, scale=math.log(2), kv_lengths=np.array([2]))
    # Head 0: weights 4 and 1 of the first two keys; head 1: equal weights.
    np.testing.assert_allclose(output, [[[[19 / 5]], [[5.0]]]])
    np.testing.assert_allclose(logsumexp, [[[math.log(5)], [math.log(2)]]])
    output, logsumexp = reference_attention(query, key, value, kv_lengths=np.array([0]), sinks=np.array([1.0, -math.inf]))
    np.testing.assert_array_equal(output, 0)
    np.testing.assert_array_equal(logsumexp, [[[1.0], [-math.inf]]])


def test_the_reference_gradients_by_differences() -> None:
    generator = np.random.default_rng(5)
    operands = [generator.standard_normal(shape) for shape in ((1, 4, 5, 3), (1, 2, 7, 3), (1, 2, 7, 2))]
    grad_output = generator.standard_normal((1, 4, 5, 2))
    gradients = reference_gradients(grad_output, *operands, causal="lower_right")
    step = 1e-6
    for operand, gradient in zip(operands, gradients, strict=True):
        for index in np.ndindex(operand.shape):
            kept = operand[index]
            ends = []
            for moved in (kept + step, kept - step):
                operand[index] = moved
                ends.append(np.sum(grad_output * reference_attention(*operands, causal="lower_right")[0]))
            operand[index] = kept
            assert gradient[index] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)
