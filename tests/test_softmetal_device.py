"""The software Metal device by itself: the translator's checks, the executor's results and its reports, races and overruns.

SOFTMETAL_SANITIZER=address or thread compiles the replayed kernels with that sanitizer: `./justw test-metal-asan`, `test-metal-tsan`.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import build_softmetal
import embed_kernels
import umfa
from cases import Problem, Sizes, problem, problem_with
from metal_translator import TranslationError, check_address_spaces, translate
from software_device import DeviceError, SoftwareDevice, dispatched, replay
from test_backward import random_gradients, run_backward

if not umfa.info()["devices"]["softmetal"]:
    pytest.skip("libsoftmetal is not built", allow_module_level=True)

SANITIZER = os.environ.get("SOFTMETAL_SANITIZER", "")
ORDERS = ("forward", "reverse", "random:1", "random:2")
HEAD = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"

# The lines of the kernels are part of what tests look for: "#line" names them.
KERNELS = (
    HEAD
    + r"""
constant int factor [[function_constant(0)]];
constant bool has_factor = is_function_constant_defined(factor);
constant constexpr int WIDTH = 64;

kernel void scale(const device float* x [[buffer(0)]], device float* y [[buffer(1)]], constant uint& count [[buffer(2)]],
                  uint i [[thread_position_in_grid]])
{
    if (i >= count) { return; }
    y[i] = has_factor ? x[i] * float(factor) : x[i];
}

kernel void ragged(device uint* seen [[buffer(0)]], uint2 at [[thread_position_in_grid]], uint2 size [[threads_per_threadgroup]],
                   uint2 grid [[threads_per_grid]])
{
    seen[at.y * grid.x + at.x] += size.x * 100 + size.y;
}

kernel void sum_lanes(const device int* x [[buffer(0)]], device int* sums [[buffer(1)]], device int* others [[buffer(2)]],
                      uint i [[thread_position_in_grid]])
{
    sums[i] = simd_sum(x[i]);
    others[i] = simd_shuffle_xor(x[i], 1);
}

kernel void sum_after_return(const device int* x [[buffer(0)]], device int* sums [[buffer(1)]], uint i [[thread_position_in_grid]])
{
    if (i >= 20) { return; }
    sums[i] = simd_sum(x[i]);
}

kernel void count(device atomic_uint* counter [[buffer(0)]], device atomic_float* total [[buffer(1)]])
{
    atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
    atomic_fetch_add_explicit(total, 0.5f, memory_order_relaxed);
}

template <typename T, int SIZE>
kernel void reverse(const device T* x [[buffer(0)]], device T* y [[buffer(1)]], uint i [[thread_index_in_threadgroup]])
{
    threadgroup T shared[SIZE];
    shared[i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = shared[SIZE - 1 - i];
}
template [[host_name("reverse_float")]] [[kernel]] decltype(reverse<float, WIDTH>) reverse<float, WIDTH>;
template [[host_name("reverse_char")]] [[kernel]] decltype(reverse<char, 2 * WIDTH>) reverse<char, 2 * WIDTH>;

kernel void host_memory(const device float* x [[buffer(0)]], device float* y [[buffer(1)]], threadgroup float* shared [[threadgroup(0)]],
                        ushort i [[thread_index_in_threadgroup]], ushort n [[threads_per_threadgroup]])
{
    shared[i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = shared[n - 1 - i];
}

kernel void multiply(const device float* a [[buffer(0)]], const device half* b [[buffer(1)]], device float* c [[buffer(2)]])
{
    simdgroup_float8x8 left;
    simdgroup_half8x8 right;
    simdgroup_load(left, a, 8);
    simdgroup_load(right, b, 8, ulong2(0, 0), true);
    simdgroup_float8x8 product = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
    simdgroup_multiply_accumulate(product, left, right, product);
    product.thread_elements() *= 2.0f;
    simdgroup_store(product, c, 8);
}

kernel void uninitialised(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]])
{
    threadgroup float shared[32];
    y[i] = shared[i];
}

kernel void vectors(device float4* y [[buffer(0)]], const device char* codes [[buffer(1)]])
{
    const float2 low = float2(1.0f, 2.0f);
    y[0] = float4(low, float2(codes[0]));
    y[1] = float4(3.0f);
    y[2] = float4(half4(half(0.5f)));
    y[3] = float4(float3(1.0f, 2.0f, 3.0f).zyx, as_type<float>(0x3f800000u));
}

#line 1001 "faults.metal"
kernel void divergent(device int* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]])
{
    if (i < 50) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    y[i] = 1;
}

#line 1011
kernel void two_barriers(device int* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]])
{
    if (i < 32) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    } else {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    y[i] = 1;
}

#line 1021
kernel void two_reductions(device int* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]])
{
    if (i % 2 == 0) {
        y[i] = simd_sum(1);
    } else {
        y[i] = simd_max(1);
    }
}

kernel void too_much_memory(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]])
{
    threadgroup float shared[8193];
    shared[i] = 1.0f;
    y[i] = shared[i];
}

[[kernel, max_total_threads_per_threadgroup(64)]] void small(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]])
{
    y[i] = 1.0f;
}

#line 1041
kernel void race(const device float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_index_in_threadgroup]])
{
    threadgroup float shared[64];
    shared[i] = x[i];
    y[i] = shared[63 - i];
}

#line 1051
kernel void overrun(const device float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_index_in_threadgroup]])
{
    y[i] = i == 63 ? x[i + 1] : x[i];
}

#line 1061
kernel void overrun_of_threadgroup_memory(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]])
{
    threadgroup float shared[64];
    shared[i + 1] = 1.0f;
    y[i] = 1.0f;
}
"""
)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return SoftwareDevice(KERNELS, "kernels.metal", tmp_path_factory.mktemp("softmetal"))


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    monkeypatch.setenv("SOFTMETAL_ORDER", request.param)
    return request.param


class TestExecutor:
    def test_function_constants__are_defined_or_not(self, device, order):
        x, count = np.arange(100, dtype=np.float32), np.array([90], np.uint32)
        for constants, expected in (({0: np.int32(3)}, 3 * x), ({}, x)):
            y = np.zeros(100, np.float32)
            device.run("scale", {0: x, 1: y, 2: count}, 100, 32, constants)
            assert (y[:90] == expected[:90]).all()
            assert (y[90:] == 0).all()

    def test_grid__that_is_no_multiple_of_the_threadgroup__has_smaller_ones_at_its_edge(self, device, order):
        seen = np.zeros((10, 37), np.uint32)
        device.run("ragged", {0: seen}, (37, 10), (16, 4))
        assert (seen[:8, :32] == 1604).all()
        assert (seen[:8, 32:] == 504).all()
        assert (seen[8:, :32] == 1602).all()
        assert (seen[8:, 32:] == 502).all()

    def test_simdgroup__that_is_not_full__reduces_what_is_there(self, device, order, rng):
        x = rng.integers(-1000, 1000, 83).astype(np.int32)
        sums, others = np.zeros_like(x), np.zeros_like(x)
        device.run("sum_lanes", {0: x, 1: sums, 2: others}, 83, 83)
        for first in (0, 32, 64):
            assert (sums[first : first + 32] == x[first : first + 32].sum()).all()
        partner = np.arange(83) ^ 1
        assert (others[partner < 83] == x[partner[partner < 83]]).all()
        assert others[82] == -1, "a lane that does not exist gives ones"

    def test_lanes_that_have_returned__take_no_part(self, device, order, rng):
        x, sums = rng.integers(0, 9, 32).astype(np.int32), np.zeros(32, np.int32)
        device.run("sum_after_return", {0: x, 1: sums}, 32, 32)
        assert (sums[:20] == x[:20].sum()).all()

    def test_atomics__count_across_threadgroups(self, device, order):
        counter, total = np.zeros(1, np.uint32), np.zeros(1, np.float32)
        device.run("count", {0: counter, 1: total}, 1000, 64)
        assert counter[0] == 1000
        assert total[0] == 500

    @pytest.mark.parametrize(("name", "dtype", "size"), [("reverse_float", np.float32, 64), ("reverse_char", np.int8, 128)])
    def test_threadgroup_memory__is_shared_after_a_barrier(self, device, order, name, dtype, size):
        x, y = np.arange(size).astype(dtype), np.zeros(size, dtype)
        device.run(name, {0: x, 1: y}, size, size)
        assert (y == x[::-1]).all()

    def test_threadgroup_memory_of_the_host__has_its_length(self, device, order):
        x, y = np.arange(96, dtype=np.float32), np.zeros(96, np.float32)
        device.run("host_memory", {0: x, 1: y}, 96, 96, memory={0: 96 * 4})
        assert (y == x[::-1]).all()

    def test_matrices__multiply(self, device, order, rng):
        a, b = rng.normal(size=(8, 8)).astype(np.float32), rng.normal(size=(8, 8)).astype(np.float16)
        c = np.zeros((8, 8), np.float32)
        device.run("multiply", {0: a, 1: b, 2: c}, 32, 32)
        np.testing.assert_allclose(c, 2 * (1 + a.astype(np.float64) @ b.T.astype(np.float64)), rtol=1e-5, atol=1e-5)

    def test_memory_that_nobody_wrote__is_nan(self, device):
        y = np.zeros(32, np.float32)
        device.run("uninitialised", {0: y}, 32, 32)
        assert np.isnan(y).all()

    def test_vectors__are_made_of_parts_and_char_has_a_sign(self, device):
        y, codes = np.zeros((4, 4), np.float32), np.array([-5], np.int8)
        device.run("vectors", {0: y, 1: codes}, 1, 1)
        assert y.tolist() == [[1, 2, -5, -5], [3] * 4, [0.5] * 4, [3, 2, 1, 1]]


class TestReports:
    @pytest.mark.parametrize(
        ("kernel", "words"),
        [
            (
                "divergent",
                ["14 threads, the first is 50, at the end of the kernel", "50 threads", "threadgroup_barrier, faults.metal:1004"],
            ),
            ("two_barriers", ["faults.metal:1014", "faults.metal:1016"]),
            ("two_reductions", ["faults.metal:1024", "faults.metal:1026", "a simd reduction"]),
        ],
    )
    def test_threads_in_different_places__are_named_by_file_and_line(self, device, order, kernel, words):
        with pytest.raises(DeviceError, match=rf"kernel '{kernel}', threadgroup \(0, 0, 0\)") as caught:
            device.run(kernel, {0: np.zeros(64, np.int32)}, 64, 64)
        seen = [word for word in words if word in str(caught.value)]
        # In some orders the report comes before the last threads have gone anywhere.
        assert seen == words if order == "forward" and kernel == "divergent" else seen

    def test_a_failure__leaves_the_device_usable(self, device):
        with pytest.raises(DeviceError):
            device.run("divergent", {0: np.zeros(64, np.int32)}, 64, 64)
        self_test = TestExecutor()
        self_test.test_threadgroup_memory__is_shared_after_a_barrier(device, "", "reverse_float", np.float32, 64)

    @pytest.mark.parametrize(
        ("kernel", "buffers", "grid", "threadgroup", "options", "words"),
        [
            ("small", {}, 64, 64, {}, "kernel 'small': 'y', index 0: no buffer is bound"),
            ("scale", {0: 400, 1: 400, 2: 2}, 100, 32, {}, "'count', index 2: the buffer has 2 bytes, 4 are needed"),
            ("small", {0: 400}, 128, 128, {}, "a threadgroup has 1 to 64 threads (got 128)"),
            ("scale", {0: 400, 1: 400, 2: 4}, 2048, 2048, {}, "a threadgroup has 1 to 1024 threads"),
            ("scale", {0: 400, 1: 400, 2: 4}, 100, 32, {"constants": {0: np.int64(1)}}, "function constant 'factor' has 4 bytes (got 8)"),
            ("too_much_memory", {0: 400}, 32, 32, {}, "more than 32768 bytes of threadgroup memory (32772)"),
            ("host_memory", {0: 400, 1: 400}, 32, 32, {}, "'shared', index 0: the length of threadgroup memory is not set"),
            ("host_memory", {0: 400, 1: 400}, 32, 32, {"memory": {0: 100}}, "a multiple of 16 (got 100)"),
            ("host_memory", {0: 400, 1: 400}, 32, 32, {"memory": {0: 32784}}, "at most 32768 bytes (got 32784)"),
            ("multiply", {0: 256, 1: 128, 2: 256}, 16, 16, {}, "a simdgroup_matrix product needs all 32 lanes"),
        ],
    )
    def test_a_dispatch_that_is_wrong__is_refused(self, device, kernel, buffers, grid, threadgroup, options, words):
        with pytest.raises(DeviceError, match=re.escape(words)):
            device.run(kernel, {index: np.zeros(size, np.uint8) for index, size in buffers.items()}, grid, threadgroup, **options)


KERNEL = "kernel void k(device float* y [[buffer(0)]]) {{ {} }}"


class TestTranslator:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (KERNEL.format("double x = 1;"), "there is no type double"),
            (KERNEL.format("goto end; end: ;"), "there is no goto"),
            (KERNEL.format("static int count = 0;"), "variables of functions cannot be static"),
            (KERNEL.format("y[0] = std::exp(y[0]);"), "there is no C++ standard library"),
            (KERNEL.format('asm("nop");'), "the run-time compiler accepts no inline assembly"),
            (KERNEL.format("float* p = y;"), "the pointer 'p' needs an address space: constant, device, thread, threadgroup"),
            (KERNEL.format("threadgroup_barrier(mem_flags::mem_none);"), "threadgroup_barrier with mem_none orders no memory"),
            (KERNEL.format("threadgroup float x = 1;"), "a threadgroup variable is declared alone and without a value"),
            (KERNEL.format("threadgroup float x[4], z[4];"), "a threadgroup variable is declared alone and without a value"),
            ("float square(float& x) { return x * x; }", "the reference 'x' needs an address space"),
            ("struct S { virtual void f(); };", "there are no virtual functions"),
            ("kernel void k(float x [[buffer(0)]]) {}", "'x': [[buffer(n)]] is for pointers and references to device or constant"),
            (
                "kernel void k(device float* x [[threadgroup(0)]]) {}",
                "'x': [[threadgroup(n)]] is for pointers and references to threadgroup",
            ),
            ("kernel void k(device float* x) {}", "the kernel's parameter 'x' has no attribute"),
            ("kernel void k(device float* x [[buffer(31)]]) {}", "'x': an index is 0 to 30 (got 31)"),
            ("kernel void k(device int* x [[buffer(1)]], device int* y [[buffer(1)]]) {}", "'y' and 'x' have the same index: buffer(1)"),
            ("kernel void k(int i [[thread_position_in_grid]]) {}", "'i': [[thread_position_in_grid]] is uint or ushort"),
            ("kernel void k(uint i [[sample_id]]) {}", "the attribute [[sample_id]] is not known"),
            ("kernel int k() { return 0; }", "the kernel 'k' returns int, not void"),
        ],
    )
    def test_what_the_language_forbids__is_refused_with_its_place(self, text, words):
        with pytest.raises(TranslationError, match=re.escape(words)) as caught:
            translate(f"{HEAD}\n\n{text}\n", "wrong.metal")
        assert str(caught.value).startswith("wrong.metal:6: error: ")

    def test_what_looks_like_a_pointer__is_none(self):
        body = "int a = 2, b = 3; y[a * b] = float(a * b); y[uint(a) & b] = 1; thread float* p = 0; auto q = p; const device float* r = y;"
        assert "kernel_rows" in translate(HEAD + KERNEL.format(body), "right.metal")

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("thread float x = 1; device float* p = &x;", "cannot initialize a variable of type '__global float *__private'"),
            ("threadgroup float shared[4]; device float* p = shared;", "cannot initialize a variable of type '__global float *__private'"),
            ("threadgroup float shared[4]; set(shared[0], y[0]);", "no matching function for call to 'set'"),
            ("set(y[0], 1);", "no matching function for call to 'set'"),
            ("c = 1;", "cannot assign to variable 'c'"),
            ("simdgroup_float8x8 m; simdgroup_load(m, &m, 8);", "no matching function for call to 'simdgroup_load'"),
            ("y[0] = erf(y[0]);", "use of undeclared identifier 'erf'"),
        ],
    )
    def test_address_spaces_that_do_not_match__are_refused_with_their_place(self, body, words):
        function = "void set(thread float& x, float y) { x = y; }"
        text = f"{HEAD}\n{function}\nkernel void k(device float* y [[buffer(0)]], constant float& c [[buffer(1)]]) {{ {body} }}\n"
        with pytest.raises(TranslationError, match=re.escape(words)) as caught:
            check_address_spaces(text, "wrong.metal")
        assert str(caught.value).startswith("wrong.metal:6:")

    def test_kernels_of_the_backend__are_what_swift_has(self):
        assert embed_kernels.GENERATED.read_text() == embed_kernels.generate()


SIZES = Sizes(batch=1, rows=37, columns=70, channels=40, value_channels=64)


def record_forward(context):
    """Calls that together pass through all of the forward kernel."""
    for option in ("plain", "all", "mask_bool"):
        for dtype in ("float32", "int4"):
            problem_with(option, seed=1, dtypes=(dtype,) * 3, sizes=SIZES).run(context=context)
    careful_problem().run(context=context)


def record_backward(context):
    """Of the backward kernels."""
    for option, dtype in (
        ("plain", "float32"),
        ("all", "float32"),
        ("all", "int4"),
        ("mask_bool", "float32"),
        ("mask_additive_row", "int8"),
    ):
        made = problem_with(option, seed=1, dtypes=(dtype,) * 3, sizes=SIZES)
        grad_out, grad_lse = random_gradients(made, np.random.default_rng(2))
        run_backward(made, grad_out, grad_lse, context=context)
    for operand in ("query", "key", "grad_out"):
        made = careful_problem(None)
        grad_out, _ = random_gradients(made, np.random.default_rng(3))
        # Seen by the last simdgroup alone, as it loads a tile; the row or column is attended by nobody.
        {"query": made.query.argument, "key": made.key.argument, "grad_out": grad_out}[operand][0, 0, 31, 39] = np.nan
        run_backward(made, grad_out, context=context)


def record_decode(context):
    """Of the decode kernels."""
    for option in ("plain", "all"):
        for dtype in ("float32", "int4"):
            made = problem_with(option, seed=1, dtypes=(dtype,) * 3, sizes=replace(SIZES, rows=2, columns=300))
            made.run(context=context)


def record_quantisation(context):
    """Of the kernels that quantise."""
    rng = np.random.default_rng(4)
    for channels in (40, 64):
        x = rng.normal(size=(1, 2, 70, channels)).astype(np.float32)
        for dtype, granularity, rotate in (("int8", "channel", True), ("int4", "token", True), ("int4", "block", False)):
            codes = umfa.quantize(x, dtype, granularity, symmetric=dtype == "int8", smooth=True, rotate=rotate, context=context)
            codes.dequantize(context=context)


# By source: what records dispatches, and which instances of its kernels these are. The others are left out: less to compile.
RECORDED = {
    "attention_forward.metal": (record_forward, "attention_forward_metal_64x32"),
    "attention_backward.metal": (
        record_backward,
        r"attention_backward_(?:query|key_value)_metal_64|attention_backward_(?:mask|heads)_metal",
    ),
    "attention_decode.metal": (record_decode, "attention_decode_metal_64x8|attention_decode_merge_metal"),
    "quantize.metal": (record_quantisation, "(quantize_(scan|write)|dequantize)_metal_128|quantize_means_metal"),
}


def careful_problem(poison: float | None = np.nan) -> Problem:
    """A NaN that no row attends, seen by the last simdgroup alone, which has nothing to do in the next tile.

    If it were to vote on the mask of that tile before the others have read what it says of the NaN, they would not know.
    """
    sizes = Sizes(batch=1, heads=1, kv_heads=1, rows=32, columns=70, channels=40, value_channels=64)
    mask = np.ones((sizes.rows, sizes.columns), bool)
    mask[:, 5] = False
    mask[24:, 32:] = False
    if poison is None:
        mask[:, 31] = mask[31, :] = False
    made = problem(np.random.default_rng(1), sizes, mask=mask)
    if poison is not None:
        made.value.argument[0, 0, 5, 40] = poison
    return made


def kept_source(name: str) -> str:
    """A source of kernels with no other instances than those of the recorded dispatches."""
    text = build_softmetal.kernel_sources()[name]
    kept = RECORDED[name][1]

    def keep(match: re.Match[str]) -> str:
        return match[0] if re.fullmatch(kept, match[1]) else ""

    return re.sub(r'^template \[\[host_name\("(\w+)"\)\]\][^;]*;$', keep, text, flags=re.MULTILINE)


@pytest.fixture(scope="module", params=RECORDED)
def source(request):
    """The name of a source."""
    return request.param


@pytest.fixture(scope="module")
def recorded(source, tmp_path_factory):
    """Dispatches that together pass through all of a source."""
    folder = tmp_path_factory.mktemp("recorded")
    record, kernels = RECORDED[source]
    with pytest.MonkeyPatch.context() as patch, umfa.MFAContext(device="softmetal") as context:
        patch.setenv("SOFTMETAL_RECORD", str(folder))
        record(context)
    names = [kernel for kernel, _ in dispatched(folder)]
    found = [path for path, kernel in zip(sorted(folder.glob("*.dispatch")), names) if re.fullmatch(kernels, kernel)]
    assert {kernel for kernel in names if re.fullmatch(kernels, kernel)} == set(re.findall(r"\w+", source_kernels(source)))
    return found


def source_kernels(name: str) -> str:
    """The names of the kernels that stay of a source."""
    text = kept_source(name)
    instances = re.findall(r'^template \[\[host_name\("(\w+)"\)', text, flags=re.MULTILINE)
    plain = re.findall(r"^\[\[kernel[^\n]*\]\] void (\w+_metal)\(", text, flags=re.MULTILINE)
    return " ".join([*instances, *plain])


@pytest.fixture(scope="module")
def program(source, tmp_path_factory):
    """Replays dispatches of a source."""
    sources = {source: kept_source(source)}
    return build_softmetal.build(tmp_path_factory.mktemp("replay") / "replay", sources, sanitizer=SANITIZER, program=True)


BARRIER = re.compile(r"(?:threadgroup|simdgroup)_barrier\(mem_flags::mem_threadgroup\);|\bWAIT;")
KERNEL_DEFINITION = re.compile(r"^\[\[kernel[^\n]*\]\] void (\w+)\(.*?^}$", re.MULTILINE | re.DOTALL)


def without_barrier(text: str, barrier: re.Match[str]) -> tuple[str, str]:
    """A source without one barrier, and without the kernels that do not have it; and the pattern of names of those that do."""
    kernels = list(KERNEL_DEFINITION.finditer(text))
    inside = next((kernel for kernel in kernels if kernel.start() < barrier.start() < kernel.end()), None)
    mutated = text[: barrier.start()] + ";" + " " * (len(barrier[0]) - 1) + text[barrier.end() :]
    if inside is None:
        return mutated, ".*"
    for kernel in reversed(kernels):
        if kernel is not inside and not text[: kernel.start()].endswith("template <int CHANNELS>\n"):
            mutated = mutated[: kernel.start()] + mutated[kernel.end() :]
    name = inside[1]
    mutated = re.sub(
        r'^template \[\[host_name\("\w+"\)\]\][^;]*;$', lambda line: line[0] if f" {name}<" in line[0] else "", mutated, flags=re.MULTILINE
    )
    return mutated, rf"{name}(?:_metal)?(?:_\d+(?:x\d+)?)?"


class TestReplay:
    @pytest.mark.parametrize("order", ORDERS)
    def test_threads_in_any_order__write_the_same(self, program, recorded, order):
        answer = replay(program, recorded, order)
        assert answer.returncode == 0, answer.stderr

    @pytest.mark.timeout(3600 if SANITIZER else 300)
    @pytest.mark.skipif(SANITIZER == "address", reason="AddressSanitizer knows nothing of barriers")
    def test_every_barrier_is_needed(self, source, recorded, tmp_path):
        """Without any one of them there is another result, a report, or (with ThreadSanitizer) a race."""
        text = kept_source(source)
        barriers = list(BARRIER.finditer(text))
        assert barriers
        names = dict(zip(sorted(recorded[0].parent.glob("*.dispatch")), dispatched(recorded[0].parent)))

        def answers(number):
            mutated, kernels = without_barrier(text, barriers[number])
            program = build_softmetal.build(tmp_path / f"replay{number}", {source: mutated}, sanitizer=SANITIZER, program=True)
            dispatches = [path for path in recorded if re.fullmatch(kernels, names[path][0])]
            assert dispatches
            return any(replay(program, dispatches, order).returncode for order in ORDERS)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(answers, range(len(barriers))))
        unneeded = [text[: barriers[number].start()].count("\n") + 1 for number, is_needed in enumerate(found) if not is_needed]
        assert not unneeded, f"nothing tells that the barriers of these lines are missing: {unneeded}"

    @pytest.mark.parametrize(
        ("sanitizer", "kernel", "words"),
        [
            ("address", "overrun", ["heap-buffer-overflow", "faults.metal:1053"]),
            ("address", "overrun_of_threadgroup_memory", ["use-after-poison", "faults.metal:1064"]),
            ("thread", "race", ["data race", "faults.metal:1044", "faults.metal:1045"]),
        ],
    )
    def test_a_fault__is_found_by_its_sanitizer(self, device, sanitizer, kernel, words, tmp_path, monkeypatch):
        if sanitizer != SANITIZER:
            pytest.skip(f"needs SOFTMETAL_SANITIZER={sanitizer}")
        monkeypatch.setenv("SOFTMETAL_RECORD", str(tmp_path))
        y, x = np.zeros(64, np.float32), np.zeros(64, np.float32)
        device.run(kernel, {0: y} if kernel.endswith("memory") else {0: x, 1: y}, 64, 64)
        program = build_softmetal.build(tmp_path / "replay", {"kernels.metal": KERNELS}, sanitizer=sanitizer, program=True)
        answer = replay(program, list(tmp_path.glob("*.dispatch")))
        assert answer.returncode != 0
        for word in words:
            assert word in answer.stderr
