"""Every argument of every function of mfa.h, and every field behind it, with every kind of bad value: mistakes.py has the list.

A refused call has the status that the header promises, says which function and which argument, and has changed no byte.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import figures
import mistakes
import native
import sanitized
from mistakes import HEADER, UNALIGNED, WRAPPING, Mistake
from native import ALLOCATION_FAILED, FP32, INT8, NULL, SUCCESS, UNSUPPORTED, Descriptor, address, ffi, lib, message
from test_misuse import Given, Guarded, allocate_nothing, deallocate_nothing

# What a message may call a size that belongs to several tensors.
SHARED_WORDS = {"num_heads", "num_kv_heads", "head_dim", "head_dim_v", "query", "key", "value", "output_b"}


class Stage:
    """One call that is right in all respects: its arguments by name, and all memory that it may write."""

    def __init__(self, function: str, context: Any, variant: str):
        self.function = function
        rng = np.random.default_rng(0)
        self.given = Given(rng)
        self.guarded = dict(self.given.guarded)
        self.cell = Guarded((1,), np.uint64)
        self.guarded["cell"] = self.cell
        self.arguments: dict[str, Any] = {"context": context, **self._plain(variant), **self._own(context, variant, rng)}
        names = [parameter.name for parameter in mistakes.parameters(function)]
        self.arguments = {name: self.arguments[name] for name in names}

    def _plain(self, variant: str) -> dict[str, Any]:
        given = self.given
        if "codes" in variant:
            for name in ("query", "key", "value"):
                given.quantized(name, granularity=2)
        if "fused" in variant:
            for name in ("query", "key", "value"):
                setattr(given.attention, f"quantize_{name}", given.scheme())
        return {
            "attention": given.attention,
            "gradients": NULL if "forward" in variant else given.gradients,
            "command_buffer": address(given.arrays["query"]),
            "operation": 1 if "backward" in variant else 0,
        }

    def _own(self, context: Any, variant: str, rng: np.random.Generator) -> dict[str, Any]:
        cell = address(self.cell.array)
        out = {name: ffi.cast(kind, cell) for name, kind in (("name", "char **"), ("buffer", "mfa_buffer_t **"))}
        if self.function.startswith("mfa_create_context"):
            self.options = native.new("mfa_context_options_t", allocate=allocate_nothing, deallocate=deallocate_nothing)
            kind = "void **" if self.function == "mfa_create_context" else "mfa_context_t **"
            return {"context": ffi.cast(kind, cell), "options": self.options}
        if self.function == "mfa_context_get_info":
            self.info = native.new("mfa_context_info_t")
            return {"info": self.info}
        if self.function.startswith("mfa_create_buffer"):
            memory = address(self.given.arrays["query"])
            return {"size": 64, "memory": memory, "metal_buffer": memory, **out}
        if self.function == "mfa_attention_initialize":
            return {"struct_size": ffi.sizeof("mfa_attention_t")}
        if self.function in ("mfa_quantize", "mfa_dequantize"):
            return self._quantization(rng)
        if self.function == "mfa_attention_merge":
            return self._merge(rng)
        if "context" in HEADER.functions[self.function] and "query_ptr" in HEADER.functions[self.function]:
            return self._flat(context, variant, rng)
        return {"size": ffi.cast("uint64_t *", cell), **out}

    def _quantization(self, rng: np.random.Generator) -> dict[str, Any]:
        shape, count = (2, 2, 5, 8), 20
        reals, codes = Guarded(shape), Guarded(shape, np.int8)
        scales, zero_points = Guarded((count,)), Guarded((count,), np.int32)
        means = Guarded((32,))
        reals.array[...] = rng.normal(size=shape)
        codes.array[...], scales.array[...], zero_points.array[...], means.array[...] = 1, 1, 0, 0
        self.guarded |= {"reals": reals, "codes": codes, "scales": scales, "zero_points": zero_points, "means": means}
        parts = {"scales": scales.array, "zero_points": zero_points.array, "channel_means": means.array}
        self.kept = (
            native.tensor(reals.array),
            native.tensor(codes.array, INT8, quantization=Descriptor("mfa_quantization_t", granularity=2, **parts)),
        )
        real, code = (one.pointer for one in self.kept)
        return {"input": real, "output": code} if self.function == "mfa_quantize" else {"input": code, "output": real}

    def _merge(self, rng: np.random.Generator) -> dict[str, Any]:
        made = {name: Guarded((2, 4, 5, 6)) for name in ("output_a", "output_b", "output")}
        made |= {name: Guarded((2, 4, 5)) for name in ("logsumexp_a", "logsumexp_b", "logsumexp")}
        for guarded in made.values():
            guarded.array[...] = rng.normal(size=guarded.array.shape)
        self.guarded |= made
        self.kept = {name: native.tensor(guarded.array) for name, guarded in made.items() if name.startswith("output")}
        arrays = {name: address(guarded.array) for name, guarded in made.items()}
        return {**arrays, **{name: tensor.pointer for name, tensor in self.kept.items()}, "statistics_precision": FP32}

    def _flat(self, context: Any, variant: str, rng: np.random.Generator) -> dict[str, Any]:
        self.flat = flat = native.Flat(rng, ("int8" if "codes" in variant else "float32",) * 3)
        for name, array in flat.outputs.items():
            self.guarded[name] = guarded = Guarded(array.shape, array.dtype)
            guarded.array[...] = array
            setattr(flat, name, guarded.array)
        # Backward wants the record of a forward call.
        assert flat.forward_quantized(context) == SUCCESS, message(context)
        words = flat._words({}) | {"grad_output_ptr": address(flat.grad_output)}
        return words | {f"{name}_ptr": address(array) for name, array in flat.outputs.items()}

    def call(self) -> int:
        return getattr(lib, self.function)(*self.arguments.values())

    def memory(self) -> list[bytes]:
        """All that the call could write."""
        info = self.arguments.get("info", NULL)
        return [bytes(ffi.buffer(info)) if info else b"", *(guarded.memory.tobytes() for guarded in self.guarded.values())]

    def spoil(self, mistake: Mistake, handles: dict[str, Any]) -> Callable[[], None] | None:
        """Make a mistake; what undoes it, or None if it is none here."""
        head, *path = mistake.place.split(".")
        if not path:
            before = self.arguments[head]
            self.arguments[head] = (
                handles[mistake.value] if isinstance(mistake.value, str) and mistake.value in handles else bad(before, mistake)
            )
            return functools.partial(self.arguments.__setitem__, head, before)
        structure = self.arguments[head]
        while len(path) > (2 if path[-1].isdigit() else 1):
            structure = getattr(structure, path.pop(0))
        if structure == NULL:
            return None
        if path[-1].isdigit():
            name, axis = path[0], int(path[1])
            array = getattr(structure, name)
            # One step along an axis of one element leads nowhere, however long it is.
            if name == "strides" and structure.shape[axis] == 1:
                return None
            before = array[axis]
            array[axis] = bad(before, mistake)
            return functools.partial(array.__setitem__, axis, before)
        before = getattr(structure, path[0])
        setattr(structure, path[0], bad(before, mistake))
        return functools.partial(setattr, structure, path[0], before)


def bad(before: Any, mistake: Mistake) -> Any:
    """The bad value of a mistake, of the type of the good one."""
    value = mistake.value
    if isinstance(before, ffi.CData):
        kind = ffi.typeof(before)
        whole = int(ffi.cast("uintptr_t", before)) + 1 if value == UNALIGNED else 2**64 - 8 if value == WRAPPING else value
        return ffi.cast(kind, whole)
    return before + int(value) if isinstance(value, str) else value


def is_none(function: str, variant: str, mistake: Mistake) -> bool:
    """Whether what is a mistake elsewhere is legal in this call."""
    place, value, _ = mistake
    backward = "backward" in function or "backward" in variant
    return (
        (place == "attention.output" and backward)  # recomputed
        or (place == "attention.mask.precision" and value == native.BOOL and (not backward or function == "mfa_attention_kernel_name"))
        or (place in ("output.data", "input.data") and value == UNALIGNED and function == f"mfa_{'de' * ('input' in place)}quantize")
        or (place.startswith("gradients") and variant.endswith("forward"))
    )


def names(said: str, mistake: Mistake) -> bool:
    """Whether a message names what is wrong."""
    words = {part for part in mistake.place.split(".") if not part.isdigit()}
    if "shape" in words:
        words |= SHARED_WORDS
    if mistake.place.endswith("mask.precision"):
        words |= {"grad_mask"}
    if mistake.place in ("batch_size", "seq_len_q", "seq_len_kv"):
        return "these sizes" in said
    # What cannot be had or served is the whole.
    return mistake.status in (UNSUPPORTED, ALLOCATION_FAILED) or any(f"`{word}`" in said for word in words)


FUNCTIONS = [name for name in HEADER.functions if name not in mistakes.APART]
VARIANTS = {
    "mfa_attention_workspace_size": (
        "plain forward",
        "codes forward",
        "fused forward",
        "plain backward",
        "codes backward",
        "fused backward",
    ),
    "mfa_attention_kernel_name": ("plain forward", "codes forward", "fused forward", "plain backward", "codes backward"),
}


def calls() -> Iterator[tuple[str, str]]:
    """Functions, and the kinds of operands with which they are called."""
    for function in FUNCTIONS:
        signature = HEADER.functions[function]
        default = (
            ("plain", "codes", "fused") if "const mfa_attention_t*" in signature else ("plain", "codes")[: 1 + ("q_scale" in signature)]
        )
        yield from ((function, variant) for variant in VARIANTS.get(function, default))


def belongs(variant: str, place: str) -> bool:
    """Whether a place is tried with these operands: each once, where it is read."""
    kind = "plain"
    if place.startswith("attention.quantize_"):
        kind = "fused"
    elif place[2:] in ("scale", "zero_point") or (place.startswith("attention.") and ".quantization" in place):
        kind = "codes"
    return kind in variant


@pytest.fixture(scope="module")
def context():
    with native.Context(2) as handle:
        yield handle


@pytest.fixture(scope="module")
def handles(context):
    """Handles that are none."""
    with native.Context() as destroyed:
        pass
    buffer = ffi.new("mfa_buffer_t **")
    assert lib.mfa_create_buffer(context, 16, buffer) == SUCCESS
    memory = np.zeros(8)
    values = (NULL, destroyed, address(memory), ffi.cast("void *", -1), buffer[0])
    yield {name: ffi.cast("mfa_context_t *", value) for name, value in zip(mistakes.HANDLES, values)}
    assert lib.mfa_destroy_buffer(buffer[0]) == SUCCESS


@pytest.mark.parametrize(("function", "variant"), list(calls()), ids=lambda word: word.replace(" ", "-"))
def test_every_argument__every_bad_value__is_refused_in_words_and_changes_nothing(function, variant, context, handles):
    stage = Stage(function, context, variant)
    check = Given(np.random.default_rng(0))
    wrong, count, signature = [], 0, HEADER.functions[function]
    for mistake in mistakes.of_function(function):
        if not belongs(variant, mistake.place) or is_none(function, variant, mistake):
            continue
        undo = stage.spoil(mistake, handles)
        if undo is None:
            continue
        before = stage.memory()
        status = stage.call()
        changed = stage.memory() != before
        said = message(stage.arguments["context"] if "mfa_context_t* context" in signature or "_ptr" in signature else NULL)
        undo()
        if status != mistake.status or changed or not said.startswith(f"{function}: ") or not names(said, mistake):
            wrong.append(f"{mistake}: status {status}, {said!r}" + (", and wrote" if changed else ""))
        assert check.run(context, "forward") == SUCCESS, mistake
        count += 1
    assert not wrong, "\n".join(wrong)
    assert count
    figures.add("misuse", calls_refused_as_documented=count)


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="this is the process that the test starts under a sanitizer")
@pytest.mark.skipif(not figures.FULL, reason="the library for a sanitizer takes minutes to build: MFA_ASSURANCE=full")
@pytest.mark.parametrize("sanitizer", ["address", "undefined"])
def test_misuse__under_a_sanitizer__is_as_harmless(sanitizer):
    suites = [Path(__file__), Path(__file__).with_name("test_misuse.py")]
    done = sanitized.python(sanitizer, "-m", "pytest", "--quiet", "--capture=sys", "-p", "no:cacheprovider", *suites)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    figures.record(
        "misuse", **{f"the_same_with_{sanitizer}_sanitizer": sanitized.figures_of(sanitizer, "misuse")["calls refused as documented"]}
    )
