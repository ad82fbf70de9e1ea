"""What can be wrong with an argument or a field of mfa.h: every one that the header declares, and the values that are refused.

Which functions, arguments, structures and fields there are, and which pointers may be NULL, is read from the header. RULES adds what the
header says in words: the values of a field that are refused whatever the rest is, and the status.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import check_abi
import native
from native import ALLOCATION_FAILED, INVALID_ARGUMENT, INVALID_CONTEXT, INVALID_DIMENSIONS, UNSUPPORTED

TEXT = check_abi.HEADER.read_text()
HEADER = check_abi.read_header(TEXT)
NAN, INF = math.nan, math.inf
LEAST, MOST = -(2**31), 2**31 - 1

# Addresses that are not what they should be: the distance to the right one, or a place where an array wraps around.
UNALIGNED = "unaligned"
WRAPPING = "wrapping"


class Mistake(NamedTuple):
    """A bad value at a place such as "attention.query.strides.2" of a call, and what has to come of it."""

    place: str
    value: Any
    status: int


def _flags(*values: int) -> list[tuple[Any, int]]:
    return [(value, INVALID_ARGUMENT) for value in (*values, LEAST, MOST)]


_NO_SIZE = [(-1, INVALID_DIMENSIONS), (2**32, INVALID_DIMENSIONS), (2**63 - 1, INVALID_DIMENSIONS), (-(2**63), INVALID_DIMENSIONS)]
_NO_STRIDE = [(2**62, INVALID_DIMENSIONS), (2**63 - 1, INVALID_DIMENSIONS), (-(2**63), INVALID_DIMENSIONS), (-(2**58), INVALID_DIMENSIONS)]
_NO_ARRAY = [(UNALIGNED, INVALID_ARGUMENT), (WRAPPING, INVALID_DIMENSIONS)]
_NOT_FINITE = [(value, INVALID_ARGUMENT) for value in (NAN, INF, -INF)]
_NO_STRUCTURE = [(0, INVALID_ARGUMENT), (7, INVALID_ARGUMENT), ("-1", INVALID_ARGUMENT), (2**32 - 1, UNSUPPORTED)]
_NO_PRECISION = _flags(-1, 5, 6, 7, 9, 15, 17, 32)

# "+2" stands for two more than is right. An empty list: every value is legal, or what is wrong depends on other fields, and a test of its
# own knows.
RULES: dict[str, dict[str, list[tuple[Any, int]]]] = {
    "mfa_context_options_t": {
        "struct_size": _NO_STRUCTURE,
        "device": _flags(-1, 4, 99),
        "num_threads": [(257, INVALID_ARGUMENT), (2**32 - 1, INVALID_ARGUMENT)],
        "reserved": [(1, INVALID_ARGUMENT), (2**32 - 1, INVALID_ARGUMENT)],
        "allocate": [(0, INVALID_ARGUMENT)],
        "deallocate": [(0, INVALID_ARGUMENT)],
        "allocator_state": [],
    },
    # The library writes the rest.
    "mfa_context_info_t": {field: [] for field in HEADER.structs["mfa_context_info_t"]}
    | {"struct_size": [(0, INVALID_ARGUMENT), (7, INVALID_ARGUMENT)]},
    "mfa_quantization_t": {
        "struct_size": _NO_STRUCTURE,
        "granularity": _flags(-1, 6, 99),
        "block_size": [],
        "group_size": [],
        "rotated": _flags(-1, 2),
        "reserved": _flags(-1, 1),
        "scales": _NO_ARRAY,
        "zero_points": _NO_ARRAY,
        "channel_means": _NO_ARRAY,
    },
    "mfa_tensor_t": {
        "struct_size": _NO_STRUCTURE,
        "precision": [*_NO_PRECISION, (native.BOOL, INVALID_ARGUMENT)],
        "data": [(0, INVALID_ARGUMENT), *_NO_ARRAY],
        "buffer": [(1, INVALID_ARGUMENT), (0x5A5A, INVALID_ARGUMENT), (2**64 - 1, INVALID_ARGUMENT)],
        "buffer_offset": [],
        # Two more than are right: no other tensor of the problem agrees, and a mask does not broadcast.
        **{f"shape.{axis}": [*_NO_SIZE, ("+2", INVALID_DIMENSIONS)] for axis in range(4)},
        **{f"strides.{axis}": _NO_STRIDE for axis in range(4)},
    },
    "mfa_quantization_scheme_t": {
        "struct_size": _NO_STRUCTURE,
        "precision": [*_NO_PRECISION, *_flags(native.FP32, native.FP16, native.BF16, native.FP64, native.BOOL)[:-2]],
        "granularity": _flags(-1, 6, 99),
        "block_size": [],
        "group_size": [],
        "asymmetric": _flags(-1, 2),
        "smooth": _flags(-1, 2),
        "rotate": _flags(-1, 2),
    },
    "mfa_attention_t": {
        "struct_size": _NO_STRUCTURE,
        "causal": _flags(-1, 2),
        "softmax_scale": _NOT_FINITE,
        "softcap": [*_NOT_FINITE, (-1.0, INVALID_ARGUMENT), (-5e-324, INVALID_ARGUMENT)],
        "logsumexp": _NO_ARRAY,
        "alignment": _flags(-1, 2),
        "num_query_offsets": [(0, INVALID_DIMENSIONS), (3, INVALID_DIMENSIONS), (2**32 - 1, INVALID_DIMENSIONS)],
        "query_offsets": [(0, INVALID_ARGUMENT), *_NO_ARRAY],
        "window_left": [(-2, INVALID_ARGUMENT), (-(2**63), INVALID_ARGUMENT)],
        "window_right": [(-2, INVALID_ARGUMENT), (-(2**63), INVALID_ARGUMENT)],
        "kv_lengths": _NO_ARRAY,
        "alibi_slopes": _NO_ARRAY,
        "sinks": _NO_ARRAY,
        "dropout_p": [*_NOT_FINITE, (-5e-324, INVALID_ARGUMENT), (1 + 2**-52, INVALID_ARGUMENT)],
        "seed": [],
        "dropout_offset": [],
        "reserved": _flags(-1, 1),
    },
    "mfa_attention_gradients_t": {
        "struct_size": _NO_STRUCTURE,
        "d_values_given": _flags(-1, 2),
        "grad_logsumexp": _NO_ARRAY,
        "d_values": _NO_ARRAY,
        "grad_sinks": _NO_ARRAY,
        "grad_alibi_slopes": _NO_ARRAY,
    },
}


class Declared(NamedTuple):
    """A parameter or a field: its type without stars and const, how many stars, and whether NULL is refused."""

    name: str
    type: str
    stars: int
    checked: bool


def _declared(text: str) -> Declared:
    """From one declaration of the header, nullability included."""
    checked = "MFA_CHECKED" in text.rpartition("*")[2]
    plain = check_abi.normalise(check_abi.strip_macros(text))
    name = re.search(r"(\w+)(\[\d+\])?$", plain)[1]
    kind = re.sub(r"\bconst\b|\*|\b" + name + r"\b.*$", " ", plain).strip()
    return Declared(name, kind, plain.count("*"), checked)


def parameters(function: str) -> list[Declared]:
    """The parameters of a function, as the header declares them."""
    plain = re.sub(r"/\*.*?\*/", " ", TEXT, flags=re.S)
    inside = re.search(rf"\b{function}\(([^;]*)\);", plain)[1].strip()
    return [] if inside == "void" else [_declared(part) for part in inside.split(",")]


def fields(structure: str) -> list[Declared]:
    """The fields of a structure, each element of an array by itself."""
    plain = re.sub(r"/\*.*?\*/", " ", TEXT, flags=re.S)
    body = re.search(rf"typedef struct \w+ \{{([^}}]*)\}} {structure};", plain)[1]
    found = []
    for part in filter(str.strip, body.split(";")):
        count = re.search(r"\[(\d+)\]\s*$", part)
        one = _declared(part)
        found += [one._replace(name=f"{one.name}.{index}") for index in range(int(count[1]))] if count else [one]
    return found


def of_structure(place: str, structure: str) -> Iterator[Mistake]:
    """All mistakes in a structure, and in those that it points to."""
    for field in fields(structure):
        inside = f"{place}.{field.name}"
        if field.type in RULES:
            if field.checked:
                yield Mistake(inside, 0, INVALID_ARGUMENT)
            yield from of_structure(inside, field.type)
        else:
            if field.checked:
                yield Mistake(inside, 0, INVALID_ARGUMENT)
            yield from (Mistake(inside, value, status) for value, status in RULES[structure][field.name])


# Plain arguments, of all functions that have one of that name.
_SIZE_OF_RECORD = [("+1", INVALID_DIMENSIONS)]
PLAIN: dict[str, list[tuple[Any, int]]] = {
    "num_heads": [(0, INVALID_DIMENSIONS)],
    "head_dim": [(0, INVALID_DIMENSIONS), (1025, INVALID_DIMENSIONS), (65535, INVALID_DIMENSIONS)],
    "softmax_scale": _NOT_FINITE,
    **{f"{name}_precision": [*_NO_PRECISION, (native.BOOL, INVALID_ARGUMENT), (native.FP64, UNSUPPORTED)] for name in "qkv"},
    **{f"{name}_scale": [*_NOT_FINITE, (0.0, INVALID_ARGUMENT), (-1.0, INVALID_ARGUMENT)] for name in "qkv"},
    "statistics_precision": [*_NO_PRECISION, *_flags(native.FP16, native.BF16, native.INT8, native.INT4, native.BOOL)[:-2]],
    "operation": _flags(-1, 3, 99),
}
OF_ONE_FUNCTION: dict[tuple[str, str], list[tuple[Any, int]]] = {
    ("mfa_create_buffer", "size"): [(2**63, INVALID_DIMENSIONS), (2**64 - 1, INVALID_DIMENSIONS), (2**62, ALLOCATION_FAILED)],
    ("mfa_create_buffer_from_memory", "size"): [(2**63, INVALID_DIMENSIONS), (2**64 - 1, INVALID_DIMENSIONS)],
    ("mfa_attention_initialize", "struct_size"): [(0, INVALID_ARGUMENT), (7, INVALID_ARGUMENT), ("-1", INVALID_ARGUMENT)],
    **{
        (function, name): _SIZE_OF_RECORD
        for function in ("mfa_attention_backward_query_quantized", "mfa_attention_backward_kv_quantized")
        for name in ("batch_size", "seq_len_q", "seq_len_kv")
    },
    **{
        (function, f"{name}_{part}"): [("+1", INVALID_ARGUMENT)]
        for function, names in (("mfa_attention_backward_query_quantized", "q"), ("mfa_attention_backward_kv_quantized", "qkv"))
        for name in names
        for part in ("scale", "zero_point")
    },
}
# Arguments of which every value is legal.
LEGAL = {
    "batch_size",
    "seq_len_q",
    "seq_len_kv",
    "causal",
    *(f"transpose_{name}" for name in "qkvo"),
    *(f"{name}_zero_point" for name in "qkv"),
}
# Functions whose answer is no status, or that end what they are given: tests of their own call them.
APART = {
    "mfa_buffer_contents",
    "mfa_buffer_size",
    "mfa_destroy_buffer",
    "mfa_destroy_context",
    "mfa_device_is_available",
    "mfa_last_error",
    "mfa_status_string",
    "mfa_version",
    "mfa_version_string",
}
HANDLES = ("NULL", "destroyed", "an address", "minus one", "a buffer")


def of_function(function: str) -> Iterator[Mistake]:
    """All mistakes in the arguments of a function, and in the structures that they point to."""
    for parameter in parameters(function):
        name = parameter.name
        if name == "context" and parameter.stars == 1:
            yield from (Mistake(name, handle, INVALID_CONTEXT) for handle in HANDLES)
        elif parameter.stars:
            if parameter.checked:
                yield Mistake(name, 0, INVALID_ARGUMENT)
            if parameter.type in RULES and function != "mfa_attention_initialize":  # which writes its structure
                yield from of_structure(name, parameter.type)
            elif name.endswith("_ptr") or name.startswith("logsumexp"):
                yield from (Mistake(name, value, status) for value, status in _NO_ARRAY)
        else:
            found = [*PLAIN.get(name, []), *OF_ONE_FUNCTION.get((function, name), [])]
            assert found or name in LEGAL, f"{name} of {function} has no rule"
            yield from (Mistake(name, value, status) for value, status in found)
