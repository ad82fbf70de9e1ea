"""Backward attention by the Metal kernels, on the software device: the CPU backend's tests once more."""

from __future__ import annotations

import pytest

import test_backward
import umfa
import umfa.context

if not umfa.info()["devices"]["softmetal"]:
    pytest.skip("libsoftmetal is not built", allow_module_level=True)

for name, function in list(vars(test_backward).items()):
    if name.startswith("test_attention_backward__"):
        globals()[name] = function


@pytest.fixture(scope="module")
def device():
    """A context on the software device."""
    with umfa.MFAContext(device="softmetal", num_threads=2) as made:
        yield made


@pytest.fixture(autouse=True)
def by_default(device, monkeypatch):
    monkeypatch.setattr(umfa.context._default, "context", device, raising=False)
