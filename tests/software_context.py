"""Fixtures that put a context on the software Metal device in the place of the default one: `from software_context import *`."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

import umfa
import umfa.context

__all__ = ["by_default", "context", "contexts", "device", "rng"]


@pytest.fixture(scope="module")
def device():
    """A context on the software device."""
    with umfa.MFAContext(device="softmetal", num_threads=2) as made:
        yield made


@pytest.fixture(autouse=True)
def by_default(device, monkeypatch):
    monkeypatch.setattr(umfa.context._default, "context", device, raising=False)


@pytest.fixture
def context(device):
    return device


@pytest.fixture
def contexts(device):
    return dict.fromkeys((1, 2, 3, 7), device)


@pytest.fixture
def rng(request):
    """The random numbers that the same test of the CPU backend has."""
    file, _, name = request.node.nodeid.partition("::")
    function = getattr(request.node, "function", None)
    original = f"tests/{function.__module__}.py" if function is not None else file
    return np.random.default_rng(zlib.crc32(f"{original}::{name}".encode()))
