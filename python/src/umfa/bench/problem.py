"""The problems that are measured, their data, and what they give in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Case", "Inputs", "expected", "inputs_of", "relative_error"]

Array = np.ndarray[Any, Any]

_CHECKED_ROWS = 64


@dataclass(frozen=True)
class Case:
    """One problem, of batch size 1.

    Attributes
    ----------
    operation : {"forward", "backward"}
        What is computed.
    heads, kv_heads, queries, keys, head_dim : int
        Its sizes.
    causal : bool
        Row i attends columns up to i.
    layout : {"bhsd", "bshd"}
        What follows what in memory: of each head its tokens, or of each token its heads.
    """

    operation: str
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    causal: bool = False
    layout: str = "bhsd"

    @classmethod
    def square(cls, operation: str, heads: int, tokens: int, head_dim: int, causal: bool = False, layout: str = "bhsd") -> Case:
        """Self-attention: as many keys as queries, as many heads of either."""
        return cls(operation, heads, heads, tokens, tokens, head_dim, causal, layout)

    @property
    def is_decode(self) -> bool:
        """Whether a single query reads a cache: the time is that of reading keys and values."""
        return self.queries == 1 and self.keys > 1

    @property
    def name(self) -> str:
        """Heads, tokens and head size, as tables show them; the layout where it is the rarer one."""
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        tokens = str(self.keys) if self.queries == self.keys else f"{self.queries}:{self.keys}"
        layout = "" if self.layout == "bhsd" else f" {self.layout}"
        return f"{heads},{tokens},{self.head_dim}{' causal' if self.causal else ''}{layout}"

    @property
    def work(self) -> int:
        """Multiplications and additions of the matrix products: two of them in forward, five in backward."""
        pairs = self.queries * (self.queries + 1) // 2 if self.causal else self.queries * self.keys
        return (10 if self.operation == "backward" else 4) * self.heads * pairs * self.head_dim


class Inputs(NamedTuple):
    """Float32 arrays ``[1, heads, tokens, head_dim]``, whose strides are those of the case's layout."""

    query: Array
    key: Array
    value: Array
    grad_output: Array


@functools.lru_cache(maxsize=1)
def inputs_of(case: Case) -> Inputs:
    """Make the operands of a case: standard normal numbers, the same at each run.

    Parameters
    ----------
    case : Case
        The problem.

    Returns
    -------
    Inputs
        Shared by all that ask for the same case; not to be changed.
    """
    generator = np.random.default_rng(0)
    query, grad_output = (generator.standard_normal((1, case.heads, case.queries, case.head_dim), np.float32) for _ in range(2))
    key, value = (generator.standard_normal((1, case.kv_heads, case.keys, case.head_dim), np.float32) for _ in range(2))
    if case.layout == "bshd":
        query, key, value, grad_output = (
            np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2) for array in (query, key, value, grad_output)
        )
    for array in (query, key, value, grad_output):
        array.flags.writeable = False
    return Inputs(query, key, value, grad_output)


@functools.lru_cache(maxsize=1)
def expected(case: Case) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    """What a case gives in float64, of as many rows and heads as take no time to compute.

    Parameters
    ----------
    case : Case
        The problem.

    Returns
    -------
    values : tuple of ndarray
        Forward: at most 64 rows of the output, spread over the sequence, of all heads. Backward: the gradients of query, key and value of
        the first head.
    parts : tuple
        For each of them the index of the part of the whole result.
    """
    inputs = inputs_of(case)
    if case.operation == "backward":
        parts = (np.s_[:, :1],) * 3
        return _gradients(inputs, case), parts
    rows = np.unique(np.linspace(0, case.queries - 1, min(_CHECKED_ROWS, case.queries)).round().astype(int))
    result = np.empty((1, case.heads, len(rows), case.head_dim))
    sharing = case.heads // case.kv_heads
    for shared in range(case.kv_heads):
        heads = slice(shared * sharing, (shared + 1) * sharing)
        weights = _weights(inputs.query[0][heads][:, rows], inputs.key[0, shared], rows, case.causal)
        result[0, heads] = weights @ inputs.value[0, shared].astype(np.float64)
    return (result,), (np.s_[:, :, rows],)


def _weights(query: Array, key: Array, rows: Array, causal: bool) -> Array:
    scores = query.astype(np.float64) @ key.T.astype(np.float64) / np.sqrt(query.shape[-1])
    if causal:
        scores[..., np.arange(key.shape[0]) > rows[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    normalised: Array = weights / weights.sum(-1, keepdims=True)
    return normalised


def _gradients(inputs: Inputs, case: Case) -> tuple[Array, ...]:
    query, key, value, grad_output = (array[0, 0].astype(np.float64) for array in inputs)
    weights = _weights(query, key, np.arange(case.queries), case.causal)
    grad_weights = grad_output @ value.T
    grad_scores = weights * (grad_weights - np.sum(weights * grad_weights, -1, keepdims=True)) / np.sqrt(case.head_dim)
    return tuple(gradient[None, None] for gradient in (grad_scores @ key, grad_scores.T @ query, weights.T @ grad_output))


def relative_error(case: Case, result: tuple[Array, ...]) -> float:
    """Compare a result with `expected`.

    Parameters
    ----------
    case : Case
        The problem.
    result : tuple of ndarray
        The output, or the gradients of query, key and value, in the order batch, heads, tokens, channels.

    Returns
    -------
    float
        Root mean square of the difference over that of what is expected; the largest of the gradients' three.
    """
    values, parts = expected(case)
    errors = [np.mean((found[part] - value) ** 2) / np.mean(value**2) for found, value, part in zip(result, values, parts, strict=True)]
    return float(np.sqrt(max(errors)))
