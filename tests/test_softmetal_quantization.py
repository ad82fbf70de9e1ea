"""Quantising on the software Metal device: the CPU backend's tests once more."""

from __future__ import annotations

import pytest

import test_quantization
import umfa
import umfa.context

if not umfa.info()["devices"]["softmetal"]:
    pytest.skip("libsoftmetal is not built", allow_module_level=True)

for name, function in list(vars(test_quantization).items()):
    if name.startswith("test_"):
        globals()[name] = function


@pytest.fixture(scope="module")
def device():
    """A context on the software device."""
    with umfa.MFAContext(device="softmetal", num_threads=2) as made:
        yield made


@pytest.fixture(autouse=True)
def by_default(device, monkeypatch):
    monkeypatch.setattr(umfa.context._default, "context", device, raising=False)


@pytest.fixture
def contexts(device):
    return dict.fromkeys((1, 2, 3, 7), device)
