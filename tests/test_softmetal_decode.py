"""Few query rows over many keys by the Metal kernels, on the software device: the tests of the CPU's decode kernels once more."""

from __future__ import annotations

import pytest

import test_decode
import umfa
from cases import Sizes, problem, problem_with
from software_context import by_default, device, rng  # noqa: F401
from software_device import dispatched
from test_decode import THREADS

if not umfa.info()["devices"]["softmetal"]:
    pytest.skip("libsoftmetal is not built", allow_module_level=True)

for name, function in list(vars(test_decode).items()):
    if name.startswith("test_"):
        assert name not in globals()
        globals()[name] = function


@pytest.fixture
def floats(device):  # noqa: F811
    return device


@pytest.fixture
def integers(device):  # noqa: F811
    return device


@pytest.fixture
def all_contexts(device):  # noqa: F811
    return {(family, threads): device for family in test_decode.FAMILIES for threads in THREADS}


@pytest.fixture(params=["float32", "int8"])
def contexts(request, device):  # noqa: F811
    return {"dtype": request.param, **dict.fromkeys(THREADS, device)}


@pytest.mark.parametrize(("heads", "rows", "kernel"), [(2, 4, "64x8"), (4, 4, "64x8"), (16, 4, "64x32"), (24, 1, "64x32")])
def test_softmetal__rows_that_share_keys__read_them_once(heads, rows, kernel, rng, tmp_path, monkeypatch):  # noqa: F811
    """There are as many threadgroups as it takes to give each simdgroup 128 columns of a key/value head."""
    made = problem(rng, Sizes(batch=1, heads=heads, kv_heads=2, rows=rows, columns=1025, channels=64, value_channels=64))
    monkeypatch.setenv("SOFTMETAL_RECORD", str(tmp_path))
    made.run()
    assert dispatched(tmp_path) == [
        (f"attention_decode_metal_{kernel}", (3 * 128, 2, 1)),
        ("attention_decode_merge_metal", (rows * 128, heads, 1)),
    ]


def test_softmetal__few_rows__have_kernels_of_their_own(device):  # noqa: F811
    kernels = umfa.info(device)["kernels"]["decode"]
    assert {kernels[dtype] for dtype in ("float32", "float16", "bfloat16", "int8", "int4")} == {"attention_decode_metal_64x8"}


@pytest.mark.parametrize("order", ["reverse", "random:5"])
@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("heads", [4, 24])
def test_softmetal__few_rows_by_threads_in_any_order__have_the_same_bits(heads, option, order, monkeypatch):
    sizes = Sizes(heads=heads, rows=3, columns=1100, channels=64, value_channels=32)
    made = problem_with(option, sizes=sizes)
    expected = made.run()
    monkeypatch.setenv("SOFTMETAL_ORDER", order)
    for got, wanted in zip(made.run(), expected):
        assert got.tobytes() == wanted.tobytes()
