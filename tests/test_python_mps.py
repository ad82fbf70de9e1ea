"""PyTorch tensors on "mps", by a stand-in: tensors whose storage is a buffer of the software device, and which say that they are on "mps".

It shows which object, offset and strides reach the library, in what order PyTorch's stream is waited for, and what goes to PyTorch instead.
Whether PyTorch on a Mac behaves as the stand-in does, only a Mac can show.
"""

from __future__ import annotations

import ctypes
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest

import software_device
import umfa
import umfa.context
from umfa import _mps, arrays

torch = pytest.importorskip("torch")
if not umfa.info()["devices"]["softmetal"]:
    pytest.skip("libsoftmetal is not built", allow_module_level=True)

sm = software_device.open_interface()
ffi = software_device.ffi


class Storage:
    """What an MPS tensor's storage tells: the address of a buffer object in place of memory's."""

    def __init__(self, buffer: Any):
        self.buffer = buffer

    def data_ptr(self) -> int:
        return int(ffi.cast("uintptr_t", self.buffer))


class StandIn(torch.Tensor):
    """A tensor that says it is on "mps". Views of it are stand-ins too."""

    is_mps = True
    is_cpu = False
    storages: ClassVar[dict[int, Storage]] = {}

    def untyped_storage(self) -> Any:
        return self.storages[torch.Tensor.untyped_storage(self).data_ptr()]

    def data_ptr(self) -> int:
        raise AssertionError("data_ptr() of a tensor on mps is no address")


def on_mps(values: Any) -> StandIn:
    """A contiguous stand-in with these values."""
    values = torch.as_tensor(values)
    size = max(values.numel() * values.element_size(), 16)
    buffer = sm.sm_device_new_buffer(sm.sm_device_default(), size)
    address = int(ffi.cast("uintptr_t", sm.sm_buffer_contents(buffer)))
    memory = np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)
    tensor = torch.from_numpy(memory)[: values.numel() * values.element_size()].view(values.dtype).view(values.shape)
    tensor.copy_(values)
    StandIn.storages[address] = Storage(buffer)
    return tensor.as_subclass(StandIn)


def back(tensor: Any) -> np.ndarray:
    """The values of a stand-in."""
    return tensor.detach().as_subclass(torch.Tensor).numpy().copy()


@pytest.fixture
def stream(monkeypatch):
    """A thread whose default context is on the software device, and how often PyTorch's stream was waited for."""
    waits = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append(1))

    def empty(self, function, shape, precision):
        return on_mps(torch.empty(shape, dtype=self._framework.dtypes[precision]))

    monkeypatch.setattr(_mps.MpsTensors, "empty", empty)
    with umfa.MFAContext(device="softmetal") as context:
        monkeypatch.setattr(umfa.context._default, "context", context, raising=False)
        yield waits


def tensors(rng, shapes=((2, 4, 33, 24), (2, 2, 50, 24), (2, 2, 50, 24)), dtype=torch.float32):
    return [torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_metal_sdpa__tensors_on_mps__are_computed_where_they_lie(dtype, stream, rng):
    q, k, v = tensors(rng, dtype=dtype)
    mask = torch.from_numpy(rng.random((33, 50)) < 0.7)
    output = umfa.MetalSDPA()(on_mps(q), on_mps(k), on_mps(v), on_mps(mask), is_causal=True, enable_gqa=True)
    expected = umfa.MetalSDPA()(q, k, v, mask, is_causal=True, enable_gqa=True)
    assert output.is_mps
    assert stream
    assert (back(output.float()) == expected.float().numpy()).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 3:30],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) if not getattr(x, "is_mps", False) else x,
        lambda x: x[:, :, :, 5:20],
        lambda x: x[:, :1].expand(-1, 2, -1, -1),
        lambda x: x[1:],
    ],
    ids=["rows", "same", "channels", "expanded", "batches"],
)
def test_metal_sdpa__views_on_mps__begin_at_their_offset(view, stream, rng):
    q, k, v = tensors(rng, ((2, 2, 40, 24),) * 3)
    output = umfa.MetalSDPA()(*(view(on_mps(x)) for x in (q, k, v)))
    assert (back(output) == umfa.MetalSDPA()(*(view(x) for x in (q, k, v))).numpy()).all()


def test_metal_sdpa__on_mps__has_gradients(stream, rng):
    plain = [x.requires_grad_() for x in tensors(rng)]
    there = [on_mps(x.detach()).requires_grad_() for x in plain]
    weights = torch.from_numpy(rng.normal(size=(2, 4, 33, 24)).astype(np.float32))
    output = umfa.MetalSDPA()(*there, is_causal=True, enable_gqa=True)
    output.backward(on_mps(weights))
    umfa.MetalSDPA()(*plain, is_causal=True, enable_gqa=True).backward(weights)
    for got, expected in zip(there, plain):
        np.testing.assert_allclose(back(got.grad), expected.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_metal_sdpa__without_elements_on_mps__touches_no_storage(stream, rng):
    q, k, v = tensors(rng, ((1, 2, 0, 8), (1, 2, 5, 8), (1, 2, 5, 8)))
    assert umfa.MetalSDPA()(on_mps(q), on_mps(k), on_mps(v)).shape == (1, 2, 0, 8)


def test_metal_sdpa__a_storage_that_is_too_short__is_refused(stream, rng):
    q, k, v = map(on_mps, tensors(rng))
    short = sm.sm_device_new_buffer(sm.sm_device_default(), 64)
    q.storages[torch.Tensor.untyped_storage(q).data_ptr()] = Storage(short)
    with pytest.raises(umfa.InvalidArgumentError, match=r"query: expected a storage of \d+ bytes or more, got 64"):
        umfa.MetalSDPA()(q, k, v, enable_gqa=True)


def test_metal_sdpa__what_is_not_served_on_mps__goes_to_pytorch_with_one_warning(stream, rng, monkeypatch):
    q, k, v = map(on_mps, tensors(rng, ((1, 2, 9, 8),) * 3))
    asked = []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *given, **words: asked.append((given, words)) or "PyTorch's"
    )
    metal_sdpa = umfa.MetalSDPA()
    with umfa.MFAContext(device="cpu") as cpu, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monkeypatch.setattr(umfa.context._default, "context", cpu)
        for _ in range(2):
            assert metal_sdpa(q, k, v, dropout_p=0.25, is_causal=True, scale=0.5) == "PyTorch's"
    assert len(asked) == 2
    assert asked[0][0][0] is q
    assert asked[0][0][3:] == (None, 0.25, True)
    assert asked[0][1] == {"scale": 0.5, "enable_gqa": False}
    (warning,) = caught
    assert "left to PyTorch" in str(warning.message)
    assert warning.filename == __file__


def test_mps__dtypes_that_are_not_served__are_refused(stream):
    with pytest.raises(umfa.InvalidTypeError, match="expected float32, float16, bfloat16 or a bool mask, got torch.int8 on 'mps'"):
        arrays.view_of("f", "x", on_mps(torch.zeros(4, dtype=torch.int8)))
