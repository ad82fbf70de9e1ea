"""Callers that mean harm, in processes of their own, where a crash would show: random descriptors, invented handles, races."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from native import INVALID_ARGUMENT, INVALID_DIMENSIONS, SUCCESS
from processes import run_alone

FUZZ = """
    import sys
    sys.path.insert(0, {folder!r})
    import numpy as np
    import native
    from native import NULL, ffi, lib, new

    rng = np.random.default_rng({seed})
    with native.Context(2) as context:
        buffers = []
        for size in (4096, 64, 0):
            buffer = ffi.new("mfa_buffer_t **")
            assert lib.mfa_create_buffer(context, size, buffer) == 0
            buffers.append(buffer[0])
        output_buffer = ffi.new("mfa_buffer_t **")
        assert lib.mfa_create_buffer(context, 4096, output_buffer) == 0

        def pick(right, *wrong):
            return right if rng.random() < 0.96 else wrong[rng.integers(len(wrong))]

        def one_of(*choices):
            return choices[rng.integers(len(choices))]

        def tensor(shape, output=False):
            made = new("mfa_tensor_t", precision=pick(one_of(0, 1, 2) if output else one_of(0, 0, 1, 2, 3, 4, 8), 16, 5, -1))
            made.buffer = output_buffer[0] if output else pick(buffers[0], buffers[1], buffers[2], NULL)
            made.buffer_offset = pick(one_of(0, 8, 64), 3, 4095, 2**40, 2**64 - 1)
            sizes = [int(size) for size in shape]
            if rng.random() < 0.05:
                sizes[rng.integers(4)] = one_of(0, 1, 2, -1, 2**32, 1025, 2**62)
            strides = [2 * sizes[1] * sizes[2] * sizes[3], 2 * sizes[2] * sizes[3], 2 * sizes[3], 1]
            if rng.random() < 0.1:
                strides[rng.integers(3)] = one_of(0, -2, 6, 2**31, -(2**62), 2**62, 2**63 - 1, -(2**63))
            made.shape, made.strides = sizes, [((stride + 2**63) % 2**64) - 2**63 for stride in strides]
            return made

        counts = [0] * 8
        scales = ffi.new("float[4096]", [1.0] * 4096)
        for _ in range({count}):
            batch, heads, group, rows, columns, channels, value_channels = (int(rng.integers(1, 4)) for _ in range(7))
            shapes = {{
                "query": (batch, heads * group, rows, channels),
                "key": (batch, heads, columns, channels),
                "value": (batch, heads, columns, value_channels),
                "output": (batch, heads * group, rows, value_channels),
                "mask": (one_of(1, batch), one_of(1, heads * group), one_of(1, rows), one_of(1, columns)),
            }}
            tensors = {{name: tensor(shape, name == "output") for name, shape in shapes.items()}}
            sizes = {{"block_size": pick(2, 0, 2**32 - 1), "group_size": pick(2, 0, 2**32 - 1)}}
            quantization = new("mfa_quantization_t", scales=scales, granularity=pick(one_of(0, 1, 2, 3, 4, 5), 9), **sizes)
            attention = ffi.new("mfa_attention_t *")
            assert lib.mfa_attention_initialize(attention, ffi.sizeof("mfa_attention_t")) == 0
            for name in ("query", "key", "value", "output"):
                tensors[name].quantization = one_of(quantization, NULL)
                setattr(attention, name, tensors[name])
            attention.mask = one_of(tensors["mask"], NULL, NULL)
            attention.causal, attention.alignment = pick(one_of(0, 1), 2), pick(one_of(0, 0, 1), 5)
            attention.window_left, attention.window_right = pick(one_of(-1, 0, 2, 2**63 - 1), -2), one_of(-1, 0, 2, 2**63 - 1)
            attention.softcap = pick(one_of(0.0, 1.5), -1.0)
            attention.dropout_p = pick(one_of(0.0, 0.5, 1.0), 2.0)
            lengths = ffi.new("int64_t[4]", [pick(one_of(0, columns), columns + 1)] * 4)
            offsets = ffi.new("int64_t[4]", [pick(one_of(0, -5, 2**60), 2**62)] * 4)
            attention.kv_lengths = one_of(lengths, NULL, NULL)
            attention.query_offsets, number = pick(one_of((offsets, batch), (NULL, 0), (NULL, 0)), (NULL, 1), (offsets, 7))
            attention.num_query_offsets = number
            status = lib.mfa_attention_run_forward(context, attention)
            assert 0 <= status < 8 and status not in (1, 4, 7), status
            counts[status] += 1
            gradients = new("mfa_attention_gradients_t", grad_output=tensors["output"], grad_query=tensors["query"])
            assert 0 <= lib.mfa_attention_run_backward(context, attention, gradients) < 8
            assert 0 <= lib.mfa_quantize(context, tensors["query"], tensors["output"]) < 8
            assert 0 <= lib.mfa_dequantize(context, tensors["output"], tensors["query"]) < 8
        print(*counts)
"""

HOSTILE = {
    "a context destroyed while its buffers live": """
        import native
        from native import ffi, lib
        buffer = ffi.new("mfa_buffer_t **")
        with native.Context() as context:
            assert lib.mfa_create_buffer(context, 4096, buffer) == 0
        memory = ffi.cast("char *", lib.mfa_buffer_contents(buffer[0]))
        memory[4095] = b"x"
        assert lib.mfa_buffer_size(buffer[0]) == 4096
        assert lib.mfa_destroy_buffer(buffer[0]) == 0
    """,
    "every small number as a handle": """
        import native
        from native import NULL, ffi, lib
        context = native.Context().handle
        buffer = ffi.new("mfa_buffer_t **")
        assert lib.mfa_create_buffer(context, 16, buffer) == 0
        for number in [*range(-64, 5000), *(1 << bit for bit in range(64))]:
            handle = ffi.cast("mfa_context_t *", number)
            assert lib.mfa_destroy_context(handle) == 1
            assert lib.mfa_last_error(handle) != NULL
            assert lib.mfa_destroy_buffer(ffi.cast("mfa_buffer_t *", number)) == 5
            assert lib.mfa_buffer_contents(ffi.cast("mfa_buffer_t *", number)) == NULL
        assert lib.mfa_destroy_buffer(buffer[0]) == 0
        assert lib.mfa_destroy_context(context) == 0
    """,
    "a context closed by another thread during a call": """
        import threading
        import numpy as np
        import umfa
        q = np.ones((1, 8, 600, 64), np.float32)
        for _ in range(20):
            context = umfa.MFAContext(num_threads=2)
            thread = threading.Thread(target=context.close)
            thread.start()
            try:
                umfa.attention(q, q, q, context=context)
            except umfa.InvalidContextError:
                pass
            thread.join()
    """,
    "a context destroyed in C by another thread during a call": """
        import threading
        import numpy as np
        import native
        from native import lib
        rng = np.random.default_rng(0)
        for _ in range(20):
            context = native.Context(2).handle
            flat = native.Flat(rng, sizes=(1, 600, 600, 4, 64))
            thread = threading.Thread(target=lib.mfa_destroy_context, args=(context,))
            thread.start()
            assert flat.forward_quantized(context) in (0, 1)
            thread.join()
            assert flat.forward_quantized(context) == 1
    """,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_library__hostile_caller__does_not_crash(name):
    run_alone(HOSTILE[name], timeout=120)


@pytest.mark.parametrize("seed", range(3))
def test_mfa_attention__random_descriptors_on_buffers__never_crash(seed):
    folder = str(Path(__file__).parent)
    counts = [int(count) for count in run_alone(textwrap.dedent(FUZZ).format(folder=folder, seed=seed, count=3000)).split()]
    assert counts[SUCCESS] > 5
    assert counts[INVALID_DIMENSIONS] > 100
    assert counts[INVALID_ARGUMENT] > 100
