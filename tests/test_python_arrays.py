"""Arrays go in as they lie: same addresses, no copies, every stride, and what cannot be read in place is refused."""

from __future__ import annotations

import ctypes
import gc
import tracemalloc
import weakref

import numpy as np
import pytest

import umfa
from umfa import arrays

ml_dtypes = pytest.importorskip("ml_dtypes")
FLOAT_DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def view(array):
    return arrays.view_of("function", "argument", array)


def address_of(found):
    return int(arrays.ffi.cast("uintptr_t", found.pointer))


def strided_forms(array):
    """The same memory, seen in many ways."""
    yield array
    yield array.transpose(0, 2, 1, 3)
    yield array[:, ::2, 1:, ::3]
    yield array[::-1, :, ::-1, ::-2]
    yield np.broadcast_to(array[:1], (5, *array.shape[1:]))
    yield array[:, :, :0]
    read_only = array[:]
    read_only.flags.writeable = False
    yield read_only


class Producer:
    """A DLPack producer and nothing else."""

    def __init__(self, array, device=(1, 0), versioned=True):
        self.array = array
        self.device = device
        self.versioned = versioned

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if not self.versioned:
            if options:
                raise TypeError("max_version")
            return self.array.__dlpack__()
        return self.array.__dlpack__(**options)


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, np.int8, np.uint8, np.bool_])
def test_numpy__any_strides__same_memory(dtype):
    for array in strided_forms(np.ones((2, 4, 6, 9), dtype)):
        found = view(array)
        assert address_of(found) == array.__array_interface__["data"][0]
        assert found.shape == array.shape
        assert tuple(stride * array.itemsize for stride in found.strides) == array.strides
        assert found.writable == array.flags.writeable
        assert found.framework is arrays.NUMPY


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int8", "uint8", "bool"])
def test_torch__any_strides__same_memory(dtype):
    torch = pytest.importorskip("torch")
    whole = torch.ones(2, 4, 6, 9).to(getattr(torch, dtype))
    forms = [
        whole,
        whole.transpose(1, 2),
        whole[:, ::2, 1:, ::3],
        whole[:1].expand(5, 4, 6, 9),
        whole[:, :, :0],
        torch.nn.Parameter(whole, False),
    ]
    for tensor in forms:
        found = view(tensor)
        assert address_of(found) == tensor.data_ptr()
        assert found.shape == tuple(tensor.shape)
        assert found.strides == tensor.stride()
        assert arrays.precision_name(found.precision) == dtype


@pytest.mark.parametrize("versioned", [True, False])
def test_dlpack__any_strides__same_memory(versioned):
    array = np.ones((2, 4, 6, 9), np.float32)
    for form in (array, array.transpose(0, 2, 1, 3), array[:, ::2, 1:, ::3], array[:, ::-1]):
        found = view(Producer(form, versioned=versioned))
        assert address_of(found) == form.__array_interface__["data"][0]
        assert found.shape == form.shape
        assert tuple(4 * stride for stride in found.strides) == form.strides


def test_dlpack__result__is_numpy_and_equal():
    q = np.random.default_rng(0).normal(size=(1, 2, 5, 8)).astype(np.float32)
    output = umfa.attention(Producer(q), Producer(q, versioned=False), q)
    assert type(output) is np.ndarray
    assert np.array_equal(output, umfa.attention(q, q, q))


def test_dlpack__torch_bfloat16__is_read():
    torch = pytest.importorskip("torch")
    tensor = torch.randn(1, 2, 5, 8).to(torch.bfloat16)
    output = umfa.attention(Producer(tensor), Producer(tensor), Producer(tensor))
    assert output.dtype == ml_dtypes.bfloat16
    expected = umfa.attention(tensor, tensor, tensor)
    assert np.array_equal(output.astype(np.float32), expected.to(torch.float32).numpy())


def test_dlpack__memory_is_given_back():
    array = np.ones((1, 1, 2, 4), np.float32)
    alive = weakref.ref(array)
    producer = Producer(array)
    for _ in range(3):
        umfa.attention(producer, producer, producer)
    del array, producer
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("producer", "error"),
    [
        (Producer(np.ones((2, 3), np.float32), device=(2, 0)), umfa.UnsupportedError),
        (Producer(np.ones((2, 3), np.int32)), umfa.InvalidTypeError),
        (Producer(np.ones((2, 3), np.complex64)), umfa.InvalidTypeError),
        (Producer(object()), umfa.InvalidTypeError),
        (Producer(np.ones((2, 3)), device=None), umfa.InvalidTypeError),
    ],
)
def test_dlpack__what_cannot_be_read__is_refused(producer, error):
    with pytest.raises(error, match="function: argument: "):
        view(producer)


@pytest.mark.parametrize("capsule", [None, 5, "capsule", ctypes.py_object(3)])
def test_dlpack__something_else_for_a_capsule__is_refused(capsule):
    class Liar:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **_):
            return capsule

    with pytest.raises(umfa.InvalidTypeError, match="DLPack capsule"):
        view(Liar())


def test_buffer_protocol__same_memory():
    memory = bytearray(32)
    found = view(memoryview(memory).cast("f"))
    assert address_of(found) == ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert found.shape == (8,)


@pytest.mark.parametrize("dtype", [">f4", ">f2", ">f8"])
def test_other_byte_order__is_refused(dtype):
    array = np.ones((1, 1, 2, 4), dtype)
    with pytest.raises(umfa.InvalidArgumentError, match="byte order"):
        umfa.attention(array, array, array)


def test_unaligned__is_refused():
    array = np.frombuffer(bytearray(4 * 8 + 1), np.float32, 8, 1).reshape(1, 1, 2, 4)
    with pytest.raises(umfa.InvalidArgumentError, match="aligned"):
        umfa.attention(array, array, array)


@pytest.mark.parametrize("dtype", ["c8", "c16", "i4", "i8", "u2", "O", "S4", "U2", "M8[s]", "f4,f4", "g"])
def test_other_dtypes__are_refused(dtype):
    array = np.zeros((1, 1, 2, 4), dtype)
    with pytest.raises(TypeError, match="dtype") as caught:
        umfa.attention(array, array, array)
    assert isinstance(caught.value, umfa.MFAError)
    assert caught.value.status == 5


@pytest.mark.parametrize("thing", [None, 3, "text", [[1.0]], object(), {}, np.float32, 1j, bytearray(b"1234"), lambda: 0, float("nan")])
def test_what_is_not_an_array__is_refused(thing):
    array = np.zeros((1, 1, 2, 4), np.float32)
    for operands in ((thing, array, array), (array, thing, array), (array, array, thing)):
        with pytest.raises(umfa.MFAError, match=r"umfa\.attention: [qkv]: expected"):
            umfa.attention(*operands)


def test_masked_arrays__are_refused():
    array = np.ma.ones((1, 1, 2, 4), np.float32)
    with pytest.raises(umfa.InvalidTypeError, match="masked"):
        umfa.attention(array, array, array)


def test_subclasses_of_arrays__are_read():
    class Named(np.ndarray):
        pass

    plain = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    named = plain.view(Named)
    assert np.array_equal(umfa.attention(named, named, named), umfa.attention(plain, plain, plain))


class TestTorch:
    """What only tensors can be."""

    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch")

    def refused(self, tensor, error, match):
        with pytest.raises(error, match=match):
            umfa.attention(tensor, tensor, tensor)

    def test_other_devices__are_refused(self):
        self.refused(self.torch.empty(1, 1, 2, 4, device="meta"), umfa.UnsupportedError, r"q\.cpu\(\)")

    def test_sparse__is_refused(self):
        self.refused(self.torch.eye(4).to_sparse(), umfa.InvalidTypeError, "to_dense")

    def test_lazily_negated__is_refused(self):
        self.refused(self.torch.view_as_complex(self.torch.ones(2, 4, 2)).conj().imag, umfa.InvalidArgumentError, "resolve_neg")

    def test_complex__is_refused(self):
        self.refused(self.torch.ones(2, 4, dtype=self.torch.complex64), umfa.InvalidTypeError, "complex64")

    def test_out__that_requires_grad__is_refused_in_grad_mode_only(self):
        plain, out = self.torch.ones(2, 4), self.torch.zeros(2, 4, requires_grad=True)
        with pytest.raises(umfa.UnsupportedError, match=r"umfa.attention: out: .*no_grad"):
            umfa.attention(plain, plain, plain, out=out)
        with self.torch.no_grad():
            assert umfa.attention(plain, plain, plain, out=out) is out

    @pytest.mark.parametrize("size", [0, 8, 31])
    def test_storage_that_shrank__is_refused(self, size):
        tensor = self.torch.ones(2, 4)
        tensor.untyped_storage().resize_(size)
        self.refused(tensor, umfa.InvalidArgumentError, "storage")

    def test_unaligned__is_refused(self):
        self.refused(
            self.torch.frombuffer(bytearray(33), dtype=self.torch.float32, offset=1).reshape(2, 4), umfa.InvalidArgumentError, "clone"
        )

    def test_fake_tensors__are_refused(self):
        fake = pytest.importorskip("torch._subclasses.fake_tensor")
        with fake.FakeTensorMode():
            tensor = self.torch.ones(2, 4)
        self.refused(tensor, umfa.UnsupportedError, "memory of its own")

    def test_tensors_in_vmap__are_refused(self):
        with pytest.raises(umfa.UnsupportedError, match="memory"):
            self.torch.vmap(lambda x: umfa.attention(x, x, x))(self.torch.ones(3, 2, 4))

    def test_default_device__does_not_matter(self):
        tensor = self.torch.ones(1, 1, 2, 4)
        with self.torch.device("meta"):
            assert umfa.attention(tensor, tensor, tensor).is_cpu

    def test_out__tells_autograd(self):
        tensor, out = self.torch.ones(2, 4), self.torch.zeros(2, 4)
        version = out._version
        assert umfa.attention(tensor, tensor, tensor, out=out) is out
        assert out._version == version + 1

    def test_mixed_kinds__come_back_as_the_query(self):
        tensor = self.torch.randn(1, 2, 5, 8)
        array = tensor.numpy()
        assert isinstance(umfa.attention(tensor, array, array), self.torch.Tensor)
        assert type(umfa.attention(array, tensor, tensor)) is np.ndarray

    def test_importing_umfa__does_not_import_torch(self):
        import subprocess
        import sys

        subprocess.run([sys.executable, "-c", "import sys, umfa; assert 'torch' not in sys.modules"], check=True)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_result__has_the_querys_dtype(dtype):
    q, other = np.ones((1, 1, 2, 4), dtype), np.ones((1, 1, 3, 4), np.float16)
    output, lse = umfa.attention(q, other, other, return_lse=True)
    assert output.dtype == dtype
    assert lse.dtype == (np.float64 if dtype is np.float64 else np.float32)
    assert umfa.attention(umfa.quantize(q), other, other).dtype == (np.float32)
    out = np.empty((1, 1, 2, 4), np.float64)
    assert umfa.attention(q, other, other, out=out) is out


def test_strided_operands__equal_contiguous_ones():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 4, 12, 16)).astype(np.float32) for _ in range(3))
    for forms in zip(*(list(strided_forms(array))[:5] for array in (q, k, v)), strict=True):
        copies = [np.ascontiguousarray(array) for array in forms]
        assert np.array_equal(umfa.attention(*forms), umfa.attention(*copies))
        out = np.zeros((*forms[0].shape[:3], 2 * forms[0].shape[3]), np.float32)[..., ::2]
        umfa.attention(*forms, out=out)
        assert np.array_equal(out, umfa.attention(*copies))


@pytest.mark.parametrize("form", ["contiguous", "strided", "broadcast"])
def test_memory__does_not_grow_by_copies(form):
    tokens = 4096
    base = np.ones((1, 1, 2 * tokens, 64), np.float32)
    k = {"contiguous": base[:, :, :tokens], "strided": base[:, :, ::2], "broadcast": np.broadcast_to(base[:, :, :1], (1, 1, tokens, 64))}[
        form
    ]
    mask = np.broadcast_to(np.ones((1, 1, 1, tokens), bool), (1, 1, 8, tokens))
    q = base[:, :, :8]
    umfa.attention(q, k, k, mask=mask)
    tracemalloc.start()
    try:
        umfa.attention(q, k, k, mask=mask)
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024  # a copy of k would be 1 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (2, 3, 5, 8)])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_missing_axes__are_batch_and_heads(shape, layout):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    output, lse = umfa.attention(x, x, x, layout=layout, return_lse=True)
    four = x if len(shape) == 4 else x.reshape(-1, 1, *shape[-2:]) if layout == "bhsd" else x.reshape(-1, shape[-2], 1, shape[-1])
    expected, expected_lse = umfa.attention(four, four, four, layout=layout, return_lse=True)
    assert np.array_equal(output, expected.reshape(shape))
    assert np.array_equal(lse.ravel(), expected_lse.ravel())
    batch, heads, tokens = (
        (shape[0], *((shape[1], shape[2]) if layout == "bhsd" else (shape[2], shape[1]))) if len(shape) == 4 else (2, 1, 5)
    )
    assert lse.shape == {4: (batch, heads, tokens), 3: (2, 5), 2: (5,)}[len(shape)]


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_random_seed__any_of_its_64_bits__can_be_set(name):
    if name == "torch":
        pytest.importorskip("torch").manual_seed(0)
    drawn = [umfa.arrays.framework_named(name).random_seed() for _ in range(100)]
    assert np.bitwise_or.reduce(np.array(drawn, np.uint64)) == np.uint64(2**64 - 1)
    assert np.bitwise_and.reduce(np.array(drawn, np.uint64)) == 0
