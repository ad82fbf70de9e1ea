"""The six flat C functions, called as C does, against the reference and against the descriptors that they fill."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import native
import reference
from native import (
    INVALID_ARGUMENT,
    INVALID_CONTEXT,
    INVALID_DIMENSIONS,
    NULL,
    SUCCESS,
    UNSUPPORTED,
    Context,
    Descriptor,
    Flat,
    address,
    ffi,
    lib,
)
from tolerances import Bounds, assert_within

TYPES = ("float32", "float16", "bfloat16", "int8", "int4")
MIXES = list(itertools.product(TYPES, repeat=3))
TRANSPOSES = list(itertools.product((False, True), repeat=4))
RECORDS = 4096


@pytest.fixture
def context():
    with Context() as handle:
        yield handle


def bounds_of(flat: Flat, real=None) -> Bounds:
    dtype = str(np.dtype(flat.output_dtype))
    return Bounds(*(real or flat.real), reference.Options(flat.scale, causal=flat.causal), dtype=dtype)


def check_forward(flat: Flat, real=None, logsumexp: bool = True):
    bounds = bounds_of(flat, real)
    assert_within(flat.views[3], bounds.at.output, bounds.output, "output")
    if logsumexp:
        assert_within(flat.logsumexp, bounds.at.logsumexp, bounds.logsumexp, "logsumexp")


def check_backward(flat: Flat):
    options = reference.Options(flat.scale, causal=flat.causal)
    grad_output = flat.grad_output.swapaxes(1, 2).astype(np.float64)
    exact = reference.backward(*flat.real, grad_output, options)
    bounds = Bounds(*flat.real, options).gradients(grad_output)
    for name in ("query", "key", "value"):
        assert_within(getattr(flat, f"grad_{name}").swapaxes(1, 2), exact[name], bounds[name], name)
    np.testing.assert_allclose(flat.d_values, exact["d_values"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("precisions", MIXES, ids="-".join)
def test_flat__each_mix_of_types__equals_the_reference_forward_and_backward(precisions, causal, context, rng):
    flat = Flat(rng, precisions, causal=causal)
    assert flat.forward_quantized(context) == SUCCESS
    check_forward(flat)
    assert flat.backward_query(context) == SUCCESS
    assert flat.backward_kv(context) == SUCCESS
    check_backward(flat)


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=str)
@pytest.mark.parametrize("precision", TYPES)
def test_flat__transposed_operands__equal_the_reference_forward_and_backward(precision, transposes, context, rng):
    flat = Flat(rng, (precision,) * 3, transposes, causal=True)
    assert flat.forward_quantized(context) == SUCCESS
    check_forward(flat)
    assert flat.backward_query(context) == SUCCESS
    assert flat.backward_kv(context) == SUCCESS
    check_backward(flat)


@pytest.mark.parametrize("channels", [1, 2, 3, 16, 17, 64, 65, 1024])
@pytest.mark.parametrize("precision", TYPES)
def test_flat__head_sizes__equal_the_reference(precision, channels, context, rng):
    flat = Flat(rng, (precision,) * 3, (True, False, True, False), (1, 5, 6, 2, channels))
    assert flat.forward_quantized(context) == SUCCESS
    check_forward(flat)


@pytest.mark.parametrize("precisions", MIXES, ids="-".join)
def test_mfa_attention_forward__codes__have_scale_one_and_no_zero_point(precisions, context, rng):
    flat = Flat(rng, precisions, (False, True, False, True))
    flat.scale = 0.001
    assert flat.forward(context) == SUCCESS
    real = []
    for values, name, scale, zero_point in zip(flat.real, precisions, flat.scales, flat.zero_points):
        real.append(values / scale + zero_point if name in ("int8", "int4") else values)
    check_forward(
        flat, [np.rint(values) if name in ("int8", "int4") else values for values, name in zip(real, precisions)], logsumexp=False
    )
    assert (flat.logsumexp == 7).all()


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("transposes", [(False,) * 4, (True,) * 4, (False, True, True, False)], ids=str)
def test_flat__beside_the_descriptors__gives_the_same_bits(precision, transposes, context, rng):
    flat = Flat(rng, (precision,) * 3, transposes, (2, 40, 70, 3, 17), causal=True)
    assert flat.forward_quantized(context) == SUCCESS
    assert flat.backward_query(context) == SUCCESS
    assert flat.backward_kv(context) == SUCCESS
    expected = {name: array.copy() for name, array in flat.outputs.items()}
    for array in flat.outputs.values():
        array[...] = 7

    attention = flat.general()
    assert lib.mfa_attention_run_forward(context, attention.pointer) == SUCCESS, native.message(context)
    # The flat backward functions have no output to read.
    attention.pointer.output = NULL
    tensors = {f"grad_{name}": native.tensor(getattr(flat, f"grad_{name}").swapaxes(1, 2)) for name in ("output", "query", "key", "value")}
    gradients = Descriptor("mfa_attention_gradients_t", **tensors, d_values=flat.d_values)
    assert lib.mfa_attention_run_backward(context, attention.pointer, gradients.pointer) == SUCCESS, native.message(context)
    for name, array in flat.outputs.items():
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("precision", TYPES)
def test_flat__without_logsumexp__gives_the_same_output_and_no_record(precision, context, rng):
    flat = Flat(rng, (precision,) * 3)
    assert flat.forward_quantized(context) == SUCCESS
    expected = flat.output.copy()
    other = Flat(rng, (precision,) * 3)
    other.arrays, other.scales, other.zero_points, other.real = flat.arrays, flat.scales, flat.zero_points, flat.real
    assert other.forward_quantized(context, logsumexp_ptr=NULL) == SUCCESS
    assert other.output.tobytes() == expected.tobytes()
    assert (other.logsumexp == 7).all()
    assert other.backward_query(context) == INVALID_DIMENSIONS


def test_flat__seven_threads__give_the_bits_of_one(rng):
    results = []
    for count in (1, 2, 3, 7):
        with Context(count) as handle:
            flat = Flat(np.random.default_rng(0), ("float32", "int8", "float16"), sizes=(2, 150, 170, 3, 40))
            assert flat.forward_quantized(handle) == SUCCESS
            assert flat.backward_query(handle) == SUCCESS
            assert flat.backward_kv(handle) == SUCCESS
            results.append({name: array.tobytes() for name, array in flat.outputs.items()})
    assert all(result == results[0] for result in results)


# ---- Training records --------------------------------------------------------------------------------------------------------------------


def test_flat_backward__without_a_forward__returns_3_and_writes_nothing(context, rng):
    flat = Flat(rng)
    before = flat.snapshot()
    assert flat.backward_query(context) == INVALID_DIMENSIONS
    assert flat.backward_kv(context) == INVALID_DIMENSIONS
    assert flat.snapshot() == before
    assert "record" in native.message(context)


def test_flat_backward__in_another_context__returns_3(context, rng):
    flat = Flat(rng)
    assert flat.forward_quantized(context) == SUCCESS
    with Context() as other:
        assert flat.backward_query(other) == INVALID_DIMENSIONS
    assert flat.backward_query(context) == SUCCESS


def test_flat_backward__after_mfa_attention_forward__returns_3(context, rng):
    """That function has no logsumexp, and so leaves no record."""
    flat = Flat(rng)
    assert flat.forward(context) == SUCCESS
    assert flat.backward_query(context) == INVALID_DIMENSIONS


@pytest.mark.parametrize("change", ["batch_size", "seq_len_q", "seq_len_kv", "num_heads", "head_dim"])
def test_flat_backward__other_dimensions_than_the_record__returns_3(change, context, rng):
    flat = Flat(rng)
    assert flat.forward_quantized(context) == SUCCESS
    size = dict(zip(("batch_size", "seq_len_q", "seq_len_kv", "num_heads", "head_dim"), flat.sizes))[change]
    before = flat.snapshot()
    assert flat.backward_query(context, **{change: size - 1}) == INVALID_DIMENSIONS
    assert flat.backward_kv(context, **{change: size - 1}) == INVALID_DIMENSIONS
    assert flat.snapshot() == before
    assert flat.backward_query(context) == SUCCESS


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("part", ["scale", "zero_point"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_flat_backward__other_scales_of_codes_than_the_record__returns_5(precision, part, name, context, rng):
    flat = Flat(rng, (precision,) * 3)
    assert flat.forward_quantized(context) == SUCCESS
    index = "qkv".index(name)
    changed = {f"{name}_{part}": flat.scales[index] * 1.5 if part == "scale" else flat.zero_points[index] + 1}
    before = flat.snapshot()
    if name == "q":
        assert flat.backward_query(context, **changed) == INVALID_ARGUMENT
    assert flat.backward_kv(context, **changed) == INVALID_ARGUMENT
    assert flat.snapshot() == before
    assert flat.backward_query(context) == SUCCESS


@pytest.mark.parametrize("scale", [0.0, -1.0, 3.0, float("nan"), float("inf")])
def test_flat__scales_of_float_operands__are_ignored(scale, context, rng):
    flat = Flat(rng)
    plain = Flat(rng)
    plain.arrays = flat.arrays
    changed = {f"{name}_scale": scale for name in "qkv"} | {f"{name}_zero_point": 5 for name in "qkv"}
    assert plain.forward_quantized(context) == SUCCESS
    assert flat.forward_quantized(context, **changed) == SUCCESS
    assert flat.output.tobytes() == plain.output.tobytes()
    assert flat.backward_query(context, q_scale=scale, q_zero_point=-9) == SUCCESS
    assert flat.backward_kv(context, **changed) == SUCCESS
    check_backward(flat)


def test_flat_forward__the_same_address_again__replaces_the_record(context, rng):
    """Backward follows the later forward: other mask, scale, types and sizes."""
    first = Flat(rng, causal=False)
    assert first.forward_quantized(context) == SUCCESS
    second = Flat(rng, ("int8", "float16", "int4"), (True, False, True, False), (1, 5, 6, 2, 8), causal=True)
    second.scale = 0.5
    second.logsumexp = first.logsumexp.ravel()[: 1 * 2 * 5].reshape(1, 2, 5)
    assert second.forward_quantized(context) == SUCCESS
    assert second.backward_query(context) == SUCCESS
    assert second.backward_kv(context) == SUCCESS
    check_backward(second)
    assert first.backward_query(context) == INVALID_DIMENSIONS


def test_flat_forward__that_is_refused__leaves_the_record(context, rng):
    flat = Flat(rng)
    assert flat.forward_quantized(context) == SUCCESS
    assert flat.forward_quantized(context, softmax_scale=float("nan"), causal=True) == INVALID_ARGUMENT
    assert flat.forward_quantized(context, head_dim=0) == INVALID_DIMENSIONS
    assert flat.backward_query(context) == SUCCESS
    assert flat.backward_kv(context) == SUCCESS
    check_backward(flat)


def test_flat_backward__twice__gives_the_same_bits(context, rng):
    flat = Flat(rng)
    assert flat.forward_quantized(context) == SUCCESS
    results = []
    for _ in range(2):
        assert flat.backward_query(context) == SUCCESS
        assert flat.backward_kv(context) == SUCCESS
        results.append(flat.snapshot())
    assert results[0] == results[1]


def test_flat_backward__the_output_destroyed__is_not_needed(context, rng):
    flat = Flat(rng)
    assert flat.forward_quantized(context) == SUCCESS
    flat.output[...] = np.nan
    assert flat.backward_query(context) == SUCCESS
    assert flat.backward_kv(context) == SUCCESS
    check_backward(flat)


def test_flat_backward__key_and_value__read_the_d_values_that_are_passed(context, rng):
    flat = Flat(rng)
    assert flat.forward_quantized(context) == SUCCESS
    assert flat.backward_query(context) == SUCCESS
    assert flat.backward_kv(context) == SUCCESS
    expected = flat.grad_key.copy()
    flat.d_values[...] = 100
    assert flat.backward_kv(context) == SUCCESS
    assert not np.allclose(flat.grad_key, expected, atol=0.1)


@pytest.mark.parametrize("beyond", [0, 1, 3])
def test_flat_forward__more_records_than_are_kept__drops_the_oldest(beyond, context, rng):
    flat = Flat(rng, sizes=(1, 1, 1, 1, 1))
    statistics = np.zeros(RECORDS + beyond, np.float32)

    def at(index):
        return {"logsumexp_ptr": address(statistics[index:])}

    for index in range(RECORDS + beyond):
        assert flat.forward_quantized(context, **at(index)) == SUCCESS
    for index in range(beyond):
        assert flat.backward_query(context, **at(index)) == INVALID_DIMENSIONS
    for index in (beyond, beyond + 1, RECORDS // 2, RECORDS + beyond - 1):
        assert flat.backward_query(context, **at(index)) == SUCCESS


# ---- Empty dimensions --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(0, 7, 11, 3, 9), (2, 0, 11, 3, 9), (0, 0, 11, 3, 9), (2, 0, 0, 3, 9)], ids=str)
@pytest.mark.parametrize("precision", TYPES)
def test_flat__no_sequence_or_no_query__writes_zeros_to_gradients_without_a_record(precision, sizes, context, rng):
    flat = Flat(rng, (precision,) * 3, sizes=sizes)
    nothing = {"query_ptr": NULL, "output_ptr": NULL, "logsumexp_ptr": NULL}
    assert flat.forward(context) == SUCCESS
    assert flat.forward_quantized(context, **nothing) == SUCCESS
    words = {"query_ptr": NULL, "grad_output_ptr": NULL, "logsumexp_ptr": NULL}
    assert flat.backward_query(context, **words, grad_query_ptr=NULL, d_values_ptr=NULL) == SUCCESS
    assert flat.backward_kv(context, **words, d_values_ptr=NULL) == SUCCESS
    assert (flat.grad_key == 0).all()
    assert (flat.grad_value == 0).all()


@pytest.mark.parametrize("precision", TYPES)
def test_flat__no_key__gives_zeros_and_minus_infinity(precision, context, rng):
    flat = Flat(rng, (precision,) * 3, sizes=(2, 7, 0, 3, 9))
    assert flat.forward_quantized(context, key_ptr=NULL, value_ptr=NULL) == SUCCESS
    assert (flat.output == 0).all()
    assert (flat.logsumexp == -np.inf).all()
    assert flat.backward_query(context, key_ptr=NULL, value_ptr=NULL) == SUCCESS
    assert flat.backward_kv(context, key_ptr=NULL, value_ptr=NULL, grad_key_ptr=NULL, grad_value_ptr=NULL) == SUCCESS
    assert (flat.grad_query == 0).all()
    assert (flat.d_values == 0).all()


@pytest.mark.parametrize(
    "sizes", [(2, 7, 11, 0, 9), (2, 7, 11, 3, 0), (2, 7, 11, 3, 1025), (2, 7, 11, 3, 65535), (0, 7, 11, 0, 9), (2, 0, 11, 3, 0)], ids=str
)
def test_flat__no_heads_or_illegal_channels__returns_3(sizes, context, rng):
    flat = Flat(rng)
    changed = dict(zip(("batch_size", "seq_len_q", "seq_len_kv", "num_heads", "head_dim"), sizes))
    before = flat.snapshot()
    for call in (flat.forward, flat.forward_quantized, flat.backward_query, flat.backward_kv):
        assert call(context, **changed) == INVALID_DIMENSIONS
    assert flat.snapshot() == before


# ---- What is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_flat__float64__returns_6(name, context, rng):
    flat = Flat(rng)
    before = flat.snapshot()
    assert flat.forward(context, **{f"{name}_precision": native.FP64}) == UNSUPPORTED
    assert flat.forward_quantized(context, **{f"{name}_precision": native.FP64}) == UNSUPPORTED
    assert flat.snapshot() == before


@pytest.mark.parametrize("code", [-1, 5, 6, 7, 9, 16, 17, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_flat__unknown_precision__returns_5(name, code, context, rng):
    flat = Flat(rng)
    before = flat.snapshot()
    assert flat.forward(context, **{f"{name}_precision": code}) == INVALID_ARGUMENT
    assert flat.forward_quantized(context, **{f"{name}_precision": code}) == INVALID_ARGUMENT
    assert flat.snapshot() == before


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_flat__illegal_scale_of_codes__returns_5(name, scale, context, rng):
    flat = Flat(rng, ("int8",) * 3)
    before = flat.snapshot()
    assert flat.forward_quantized(context, **{f"{name}_scale": scale}) == INVALID_ARGUMENT
    assert flat.snapshot() == before
    assert flat.forward(context) == SUCCESS


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_flat__softmax_scale_that_is_not_finite__returns_5(scale, context, rng):
    flat = Flat(rng)
    before = flat.snapshot()
    assert flat.forward(context, softmax_scale=scale) == INVALID_ARGUMENT
    assert flat.forward_quantized(context, softmax_scale=scale) == INVALID_ARGUMENT
    assert flat.snapshot() == before


@pytest.mark.parametrize("pointer", ["query_ptr", "key_ptr", "value_ptr", "output_ptr"])
def test_flat_forward__null_operands__return_5(pointer, context, rng):
    flat = Flat(rng)
    before = flat.snapshot()
    assert flat.forward(context, **{pointer: NULL}) == INVALID_ARGUMENT
    assert flat.forward_quantized(context, **{pointer: NULL}) == INVALID_ARGUMENT
    assert flat.snapshot() == before


@pytest.mark.parametrize(
    "pointer",
    [f"{name}_ptr" for name in ("query", "key", "value", "grad_output", "logsumexp", "grad_query", "d_values", "grad_key", "grad_value")],
)
def test_flat_backward__null_operands__return_5(pointer, context, rng):
    flat = Flat(rng)
    assert flat.forward_quantized(context) == SUCCESS
    before = flat.snapshot()
    if pointer not in ("grad_key_ptr", "grad_value_ptr"):
        assert flat.backward_query(context, **{pointer: NULL}) == INVALID_ARGUMENT
    if pointer != "grad_query_ptr":
        assert flat.backward_kv(context, **{pointer: NULL}) == INVALID_ARGUMENT
    assert flat.snapshot() == before


@pytest.mark.parametrize("handle", ["null", "destroyed", "an address", "a buffer", "minus one"])
def test_flat__invalid_context__returns_1(handle, context, rng):
    flat = Flat(rng)
    if handle == "destroyed":
        with Context() as value:
            pass
    elif handle == "a buffer":
        made = ffi.new("mfa_buffer_t **")
        assert lib.mfa_create_buffer(context, 64, made) == SUCCESS
        value = made[0]
    else:
        value = {"null": NULL, "an address": address(flat.output), "minus one": ffi.cast("void *", -1)}[handle]
    value = ffi.cast("void *", value)
    before = flat.snapshot()
    for call in (flat.forward, flat.forward_quantized, flat.backward_query, flat.backward_kv):
        assert call(value) == INVALID_CONTEXT
        # Whatever else is wrong, the context comes first.
        assert call(value, head_dim=0, query_ptr=NULL) == INVALID_CONTEXT
    assert flat.snapshot() == before
    if handle == "a buffer":
        assert lib.mfa_destroy_buffer(made[0]) == SUCCESS


OVERLAPS = {
    "forward": (("output_ptr", "query_ptr", "key_ptr", "value_ptr", "logsumexp_ptr"), ("output_ptr", "logsumexp_ptr")),
    "query": (
        ("query_ptr", "key_ptr", "value_ptr", "grad_output_ptr", "logsumexp_ptr", "grad_query_ptr", "d_values_ptr"),
        ("grad_query_ptr", "d_values_ptr"),
    ),
    "kv": (
        ("query_ptr", "key_ptr", "value_ptr", "grad_output_ptr", "logsumexp_ptr", "d_values_ptr", "grad_key_ptr", "grad_value_ptr"),
        ("grad_key_ptr", "grad_value_ptr"),
    ),
}
PAIRS = [
    (call, output, other) for call, (pointers, outputs) in OVERLAPS.items() for output in outputs for other in pointers if other != output
]


@pytest.mark.parametrize(("call", "output", "other"), PAIRS, ids=str)
def test_flat__output_that_overlaps_anything__returns_5(call, output, other, context, rng):
    flat = Flat(rng)
    assert flat.forward_quantized(context) == SUCCESS
    run = {"forward": flat.forward_quantized, "query": flat.backward_query, "kv": flat.backward_kv}[call]
    names = dict(zip(("query_ptr", "key_ptr", "value_ptr"), flat.arrays)) | {f"{name}_ptr": array for name, array in flat.outputs.items()}
    names["grad_output_ptr"] = flat.grad_output
    before = flat.snapshot()
    # The record is found by the address of logsumexp, so that one stays where it is.
    moved, target = (other, output) if output != "logsumexp_ptr" and other != "logsumexp_ptr" else (output, other)
    if moved == "logsumexp_ptr" and call != "forward":
        moved, target = target, moved
    for shift in (0, 4):
        assert run(context, **{moved: ffi.cast("char *", address(names[target])) + shift}) == INVALID_ARGUMENT
    assert flat.snapshot() == before


def test_flat__neighbours_in_memory__do_not_overlap(context, rng):
    flat = Flat(rng)
    memory = np.zeros(flat.output.size + flat.logsumexp.size, np.float32)
    flat.output = memory[: flat.output.size].reshape(flat.output.shape)
    flat.logsumexp = memory[flat.output.size :].reshape(flat.logsumexp.shape)
    assert flat.forward_quantized(context) == SUCCESS
    check_forward(flat)


def test_flat__inputs_that_share_memory__are_legal(context, rng):
    flat = Flat(rng, sizes=(2, 7, 7, 3, 9))
    flat.arrays = [flat.arrays[0]] * 3
    flat.real = [flat.real[0]] * 3
    assert flat.forward_quantized(context) == SUCCESS
    check_forward(flat)


def test_flat__sizes_whose_product_overflows__return_3(context, rng):
    flat = Flat(rng)
    before = flat.snapshot()
    for changed in (
        {"batch_size": 2**32 - 1, "seq_len_q": 2**32 - 1},
        {"seq_len_kv": 2**32 - 1, "num_heads": 2**32 - 1},
        {"batch_size": 2**31, "num_heads": 2**31},
    ):
        for call in (flat.forward, flat.forward_quantized, flat.backward_query, flat.backward_kv):
            assert call(context, **changed) == INVALID_DIMENSIONS
            # Sizes come before pointers.
            assert call(context, **changed, query_ptr=NULL) == INVALID_DIMENSIONS
    assert flat.snapshot() == before


def test_flat__addresses_inside_a_buffer__are_host_memory(context, rng):
    flat = Flat(rng)
    assert flat.forward_quantized(context) == SUCCESS
    made = ffi.new("mfa_buffer_t **")
    query = flat.arrays[0]
    assert lib.mfa_create_buffer(context, query.nbytes, made) == SUCCESS
    contents = lib.mfa_buffer_contents(made[0])
    ffi.memmove(contents, query.tobytes(), query.nbytes)
    expected = flat.output.copy()
    assert flat.forward_quantized(context, query_ptr=contents) == SUCCESS
    assert flat.output.tobytes() == expected.tobytes()
    assert lib.mfa_destroy_buffer(made[0]) == SUCCESS


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": 0, "query_ptr": NULL, "q_precision": 99, "softmax_scale": float("nan")}, INVALID_DIMENSIONS),
        ({"query_ptr": NULL, "q_precision": 99}, INVALID_ARGUMENT),
        ({"q_precision": native.FP64, "softmax_scale": float("nan")}, INVALID_ARGUMENT),
        ({"q_precision": native.FP64, "k_precision": 99}, INVALID_ARGUMENT),
        ({"q_precision": native.FP64}, UNSUPPORTED),
    ],
)
def test_flat__several_mistakes__report_the_first_in_order(changes, expected, context, rng):
    flat = Flat(rng)
    assert flat.forward_quantized(context, **changes) == expected


def test_flat_backward__record_before_scales_but_after_pointers__in_order(context, rng):
    flat = Flat(rng, ("int8",) * 3)
    assert flat.forward_quantized(context) == SUCCESS
    assert flat.backward_query(context, seq_len_q=6, q_scale=9.0) == INVALID_DIMENSIONS
    assert flat.backward_query(context, seq_len_q=6, query_ptr=NULL) == INVALID_ARGUMENT
    assert flat.backward_query(context, q_scale=9.0, grad_query_ptr=address(flat.grad_output)) == INVALID_ARGUMENT
