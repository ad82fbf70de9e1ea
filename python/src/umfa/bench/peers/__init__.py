"""The engines that are measured, each a file with a `PEER`.

To add one: write a file here with a `Peer` of its own, and name it in `all_peers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from umfa.bench.problem import Array, Case

__all__ = ["Peer", "Prepared", "all_peers", "is_quantized"]


@dataclass(frozen=True)
class Prepared:
    """A case with its operands converted and in place, ready to be called as often as one likes.

    Attributes
    ----------
    call : callable
        Computes; this is what is timed.
    result : callable
        Turns what `call` returned into the output, or the gradients of query, key and value: arrays in the order batch, heads, tokens,
        channels.
    kernels : tuple of str
        The names of the kernels, of an engine that tells.
    cache_bytes : int
        Keys and values as they are kept, with their scales.
    """

    call: Callable[[], Any]
    result: Callable[[Any], tuple[Array, ...]]
    kernels: tuple[str, ...] = ()
    cache_bytes: int = 0


@dataclass(frozen=True)
class Peer:
    """An engine.

    Attributes
    ----------
    name : str
        As tables show it.
    modules : tuple of str
        What it imports.
    packages : tuple of str
        What brings them, as pip calls it; the first one's version is the engine's.
    variants : callable
        ``variants(case)``: the types, or ways, in which this engine computes a case, by the names that tables show. Nothing is imported
        for it.
    prepare : callable
        ``prepare(case, variant, threads)``: a `Prepared`. What it raises is shown as the reason why there is no figure.
    layouts : tuple of str
        Those of `Case` that it reads without a copy of its own.
    """

    name: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    variants: Callable[[Case], tuple[str, ...]]
    prepare: Callable[[Case, str, int], Prepared]
    layouts: tuple[str, ...] = ("bhsd",)

    def why_missing(self) -> str:
        """Why the engine cannot be used here; empty if it can."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # a broken installation raises whatever it likes
                return f"{module} cannot be imported ({error}): pip install {' '.join(self.packages)}"
        return ""

    def version(self) -> str:
        """The version that is installed; empty where it has none."""
        try:
            return metadata.version(self.packages[0])
        except (metadata.PackageNotFoundError, IndexError):
            return ""


def is_quantized(variant: str) -> bool:
    """Whether a variant multiplies small integers, by its name."""
    return variant.startswith(("int8", "int4", "u8", "q8", "q4"))


def all_peers() -> tuple[Peer, ...]:
    """`umfa` and the engines beside it, in the order of the tables."""
    from umfa.bench.peers import ggml, onnx_runtime, open_vino, own, pytorch

    return tuple(module.PEER for module in (own, pytorch, onnx_runtime, open_vino, ggml))
