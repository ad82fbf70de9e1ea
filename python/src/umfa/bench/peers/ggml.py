"""ggml, the library below llama.cpp, as the package llama-cpp-python brings it."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from umfa.bench.peers import Peer, Prepared
from umfa.bench.problem import Array, Case, inputs_of

__all__ = ["PEER"]

_FOLDER_VARIABLE = "UMFA_BENCH_GGML"
_PACKAGE = "llama_cpp"

# Codes of ggml's types, and their bytes an element.
_TYPES = {"fp32": (0, 4.0), "fp16": (1, 2.0), "q4_0": (2, 18 / 32), "q8_0": (8, 34 / 32)}
_EXTRA_BYTES = 16 << 20


def _variants(case: Case) -> tuple[str, ...]:
    if case.is_decode:
        return ("fp16", "q8_0 K, V", "q4_0 K, V")
    return () if case.operation == "backward" or case.keys == 1 else ("fp16",)


class _InitializeParameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _GraphPlan(ctypes.Structure):
    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    )


def _folder() -> Path:
    """Where the libraries lie: in the folder that UMFA_BENCH_GGML names, else in llama-cpp-python."""
    if given := os.environ.get(_FOLDER_VARIABLE):
        return Path(given)
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise ImportError(f"no package {_PACKAGE}; or name a folder with libggml-base and libggml-cpu in {_FOLDER_VARIABLE}")
    return Path(found.origin).parent / "lib"


class _Library:
    """The functions that are used of it."""

    def __init__(self) -> None:
        folder = _folder()
        paths = [next(iter(sorted(folder.glob(f"lib{name}.[sd]*"))), None) for name in ("ggml-base", "ggml-cpu")]
        if None in paths:
            raise ImportError(f"{folder} has no libggml-base and libggml-cpu")
        base, cpu = (ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in paths)
        pointer, size, number, real, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_float, ctypes.c_int

        def function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
            found = getattr(library, name)
            found.restype, found.argtypes = result, arguments
            return found

        self.initialize = function(base, "ggml_init", pointer, _InitializeParameters)
        self.free = function(base, "ggml_free", None, pointer)
        self.new_tensor = function(base, "ggml_new_tensor_4d", pointer, pointer, integer, *[number] * 4)
        self.data = function(base, "ggml_get_data", pointer, pointer)
        self.quantize = function(base, "ggml_quantize_chunk", size, integer, pointer, pointer, number, number, number, pointer)
        self.attention = function(base, "ggml_flash_attn_ext", pointer, *[pointer] * 5, real, real, real)
        self.new_graph = function(base, "ggml_new_graph", pointer, pointer)
        self.expand = function(base, "ggml_build_forward_expand", None, pointer, pointer)
        self.plan = function(cpu, "ggml_graph_plan", _GraphPlan, pointer, integer, pointer)
        self.compute = function(cpu, "ggml_graph_compute", integer, pointer, ctypes.POINTER(_GraphPlan))
        function(cpu, "ggml_cpu_init", None)()


class _Graph:
    """One attention call, with its memory."""

    def __init__(self, case: Case, codes: str, threads: int) -> None:
        self._library = library = _Library()
        inputs = inputs_of(case)
        self._shape = (1, case.queries, case.heads, case.head_dim)
        mask_bytes = 2 * case.queries * case.keys if case.causal else 0
        cache_bytes = round((inputs.key.size + inputs.value.size) * _TYPES[codes][1])
        memory = 2 * inputs.query.nbytes + cache_bytes + mask_bytes + _EXTRA_BYTES
        self._context = library.initialize(_InitializeParameters(memory, None, False))
        weakref.finalize(self, library.free, self._context)
        query = self._tensor(inputs.query, "fp32")
        key, value = (self._tensor(array, codes) for array in (inputs.key, inputs.value))
        mask = None
        if case.causal:
            mask = self._tensor(np.triu(np.full((1, 1, case.queries, case.keys), -np.inf, np.float16), 1), "fp16")
        self._output = library.attention(self._context, query, key, value, mask, 1 / math.sqrt(case.head_dim), 0.0, 0.0)
        self._graph = library.new_graph(self._context)
        library.expand(self._graph, self._output)
        self._plan = library.plan(self._graph, threads, None)
        self._work = np.empty(self._plan.work_size + 64, np.uint8)
        self._plan.work_data = self._work.ctypes.data

    def _tensor(self, array: Array, codes: str) -> Any:
        library = self._library
        kind, _ = _TYPES[codes]
        tensor = library.new_tensor(self._context, kind, *reversed(array.shape))
        if codes in ("fp32", "fp16"):
            converted = np.ascontiguousarray(array, np.float32 if codes == "fp32" else np.float16)
            ctypes.memmove(library.data(tensor), converted.ctypes.data, converted.nbytes)
        else:
            source = np.ascontiguousarray(array)
            rows, channels = array.size // array.shape[-1], array.shape[-1]
            library.quantize(kind, source.ctypes.data, library.data(tensor), 0, rows, channels, None)
        return tensor

    def compute(self) -> None:
        """Run it; the result is in `output`."""
        if self._library.compute(self._graph, ctypes.byref(self._plan)) != 0:
            raise RuntimeError("ggml_graph_compute failed")

    def output(self) -> Array:
        """The result in the order batch, heads, tokens, channels."""
        address = ctypes.cast(self._library.data(self._output), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, self._shape).transpose(0, 2, 1, 3).copy()


def _prepare(case: Case, variant: str, threads: int) -> Prepared:
    codes = variant[:4]
    graph = _Graph(case, codes, threads)
    inputs = inputs_of(case)
    cache_bytes = round((inputs.key.size + inputs.value.size) * _TYPES[codes][1])
    return Prepared(graph.compute, lambda _: (graph.output(),), cache_bytes=cache_bytes)


class _Ggml(Peer):
    """Loaded by its files instead of imported."""

    def why_missing(self) -> str:
        try:
            _Library()
        except (ImportError, OSError, AttributeError) as error:
            return f"ggml cannot be loaded ({error}): pip install {' '.join(self.packages)}"
        return ""


PEER = _Ggml("ggml", (), ("llama-cpp-python",), _variants, _prepare)
