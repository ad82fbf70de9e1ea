"""Backward attention by the Metal kernels, on the software device: the tests of the CPU backend once more."""

from __future__ import annotations

import numpy as np
import pytest

import test_backward
import test_float_backward
import test_special_values
import umfa
from cases import Sizes, problem_with
from software_context import *  # noqa: F403
from test_backward import NAMES, random_gradients, run_backward

if not umfa.info()["devices"]["softmetal"]:
    pytest.skip("libsoftmetal is not built", allow_module_level=True)

# About threads of the CPU.
LEFT_OUT = {
    "test_attention_backward__more_threads_than_processors__ends_with_the_same_bits",
    "test_attention_backward__any_number_of_threads_over_many_tiles__gives_the_same_bits",
}
for module, prefix in (
    (test_backward, "test_attention_backward__"),
    (test_float_backward, "test_attention_backward__"),
    (test_special_values, "test_attention_backward__"),
):
    for name, function in list(vars(module).items()):
        if name.startswith(prefix) and name not in LEFT_OUT:
            assert name not in globals()
            globals()[name] = function


def test_softmetal__backward_kernels__are_chosen_by_head_size(device):
    kernels = umfa.info(device)["kernels"]
    for dtype in ("float32", "float16", "bfloat16", "int8", "int4"):
        assert kernels["backward_query"][dtype] == "attention_backward_query_metal_64"
        assert kernels["backward_key_value"][dtype] == "attention_backward_key_value_metal_64"
    assert "fp64_reference" in kernels["backward_query"]["float64"]


@pytest.mark.parametrize("channels", [31, 32, 33, 64, 65, 128, 129, 300])
def test_softmetal__backward_of_each_head_size__equals_the_reference(channels):
    sizes = Sizes(batch=1, heads=2, kv_heads=1, rows=40, columns=70, channels=channels, value_channels=max(1, 160 - channels))
    test_backward.check(problem_with("all", seed=channels, sizes=sizes))


@pytest.mark.parametrize("option", ["plain", "all"])
def test_softmetal__gradients__are_those_of_the_cpu(option, device):
    """Within 1e-4 of the largest."""
    made = problem_with(option, sizes=Sizes(rows=130, columns=150, channels=64, value_channels=64))
    grad_out, grad_lse = random_gradients(made, np.random.default_rng(1))
    names = NAMES if option == "all" else NAMES[:3]
    with umfa.MFAContext(device="cpu") as cpu:
        expected = run_backward(made, grad_out, grad_lse, names, context=cpu)
    for name, gradient in run_backward(made, grad_out, grad_lse, names).items():
        assert np.abs(gradient - expected[name]).max() <= 1e-4 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize("order", ["reverse", "random:5"])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_softmetal__backward_threads_in_any_order__give_the_same_bits(option, order, monkeypatch):
    made = problem_with(option, sizes=Sizes(rows=70, columns=90, channels=64, value_channels=32))
    grad_out, grad_lse = random_gradients(made, np.random.default_rng(1))
    expected = run_backward(made, grad_out, grad_lse)
    monkeypatch.setenv("SOFTMETAL_ORDER", order)
    for name, gradient in run_backward(made, grad_out, grad_lse).items():
        assert gradient.tobytes() == expected[name].tobytes(), name
