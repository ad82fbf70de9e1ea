"""Calls by the hundred thousand, successes and refusals in any mix, in a process whose resident memory stays as it is."""

from __future__ import annotations

import figures
from test_memory import on_linux, run_measured

# Each makes one call of the kinds that its name says; `index` is the number of the call.
BODIES = {
    "forward": "umfa.attention(q, q, q, causal=True, return_lse=True)",
    "fused": "umfa.attention(q, q, q, quantize='int4', context=context)",
    "backward": "backward()",
    "quantize": "umfa.quantize(q, 'int8', 'token', symmetric=False, smooth=True, rotate=True).dequantize()",
    "contexts": "umfa.MFAContext(num_threads=2).close()",
    "buffers": "umfa.MFABuffer(65536).close()",
    "refused in Python": "refused(lambda: umfa.attention(q, q, q[:, :, :3]))",
    "refused in C": "refused(lambda: umfa.attention(q, q, q, softcap=float('nan'), context=context))",
    "an operand that raises": "refused(lambda: umfa.attention(q, q, q, mask=Raising()))",
    "training records": "record(index)",
    "C": "one_of(index)",
}
# The functions of C: calls that succeed between calls that are refused, on contexts that come and go.
PROGRAM = """
    import native, test_misuse
    from native import NULL, ffi, lib
    q = np.random.default_rng(0).standard_normal((1, 2, 9, 16), np.float32)
    context = umfa.MFAContext(num_threads=2)
    flat = native.Flat(np.random.default_rng(0), sizes=(1, 1, 1, 1, 1))
    statistics = np.zeros(20000, np.float32)
    handle = native.Context(2).handle
    given = test_misuse.Given(np.random.default_rng(0))
    cell, buffer = ffi.new("mfa_context_t **"), ffi.new("mfa_buffer_t **")
    options = native.new("mfa_context_options_t", device=1, num_threads=2)

    class Raising:
        def __array__(self, *_, **__):
            raise umfa.InvalidArgumentError("by design")

    def refused(call):
        try:
            call()
        except umfa.MFAError:
            return
        raise AssertionError("that was not refused")

    def backward():
        out, lse = umfa.attention(q, q, q, return_lse=True)
        umfa.attention_backward(out, q, q, q, out, lse)

    def record(index):
        flat.logsumexp = statistics[index % 20000:][:1].reshape(1, 1, 1)
        assert flat.forward_quantized(handle) == 0

    def spoilt(call):
        given.attention.softcap = float("nan")
        status = given.run(handle, call)
        given.attention.softcap = 0
        return status

    def short_lived(_):
        assert lib.mfa_create_context_with_options(options, cell) == 0
        assert lib.mfa_create_buffer(cell[0], 4096, buffer) == 0
        assert given.run(cell[0], "forward") == 0
        assert lib.mfa_destroy_context(cell[0]) == 0
        assert lib.mfa_destroy_buffer(buffer[0]) == 0

    EXPECTED = (
        lambda: given.run(handle, "forward") == 0,
        lambda: spoilt("forward") == 5,
        lambda: given.run(handle, "backward") == 0,
        lambda: spoilt("backward") == 5,
        lambda: given.run(NULL, "forward") == 1,
        lambda: given.run(handle, "workspace_size") == 0,
        lambda: spoilt("kernel_name") == 5,
        lambda: lib.mfa_create_buffer(handle, 2**62, buffer) == 2,
        lambda: lib.mfa_quantize(handle, NULL, NULL) == 5,
        lambda: short_lived(0) is None,
    )

    def one_of(index):
        assert EXPECTED[index % len(EXPECTED)](), index % len(EXPECTED)

    def growth(call, warm, count):
        for index in range(warm):
            call(index)
        before = resident()
        for index in range(count):
            call(index)
        return resident() - before

    bodies = {
        BODIES
    }
    for name, call in bodies.items():
        print(name, round(1024 * growth(call, *SIZES[name])), sep=": ", flush=True)
"""


@on_linux
def test_library__called_again_and_again__does_not_grow():
    sizes = {}
    for name in BODIES:
        # The heap settles within some hundred calls, the table of training records when its 4,096 are there.
        warm = figures.pick(6000 if name == "training records" else 800, 10_000)
        sizes[name] = warm, figures.pick(2000, 100_000 if name in ("C", "refused in C") else 20_000)
    bodies = "".join(f"{name!r}: lambda index: {body}, " for name, body in BODIES.items())
    answer = run_measured(PROGRAM.replace("BODIES", bodies).replace("SIZES", repr(sizes)), timeout=figures.pick(240, 1500))
    grown = {name: int(figure) for name, figure in (line.split(": ") for line in answer.splitlines())}
    assert grown.keys() == BODIES.keys()
    figures.record("leaks", calls=sum(count for _, count in sizes.values()))
    figures.record("leaks", **{f"growth in KiB, {name}": figure for name, figure in grown.items()})
    # So a leak of 256 bytes a call is found in a short run, of 16 in a full one of the functions of C.
    assert max(grown.values()) < figures.pick(512, 1536), grown
