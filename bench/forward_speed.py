"""Time of `umfa.attention` beside PyTorch's scaled dot product attention, in one interleaved run.

Prints, per shape and precision, with and without causality, the median times, how many times as fast as PyTorch's fp32 that is, and the
relative error against float64. One thread unless told
otherwise. The share of the machine that others took while it ran ("steal") is read from the kernel where it says so.

    python bench/forward_speed.py [--threads 1] [--repeats 15] [--quick]
"""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import umfa

SHAPES = [(12, 256, 32), (8, 1024, 64), (8, 2048, 128)]


def processor_name() -> str:
    """The processor's name as its system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def stolen_share(before: list[int], after: list[int]) -> float:
    """The share of processor time that the hypervisor gave to others, between two readings of /proc/stat."""
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return spent[7] / max(1, sum(spent[:8]))


def processor_ticks() -> list[int]:
    """User, nice, system, idle, iowait, irq, softirq and steal ticks since boot; zeros where the system does not tell."""
    try:
        return [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return [0] * 8


def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray, causal: bool) -> np.ndarray:
    """Attention in float64, head by head."""
    result = np.empty(query.shape, np.float64)
    for head in range(query.shape[1]):
        q, k, v = (x[0, head].astype(np.float64) for x in (query, key, value))
        scores = q @ k.T / np.sqrt(q.shape[-1])
        if causal:
            scores[~np.tri(*scores.shape, dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result[0, head] = weights @ v / weights.sum(-1, keepdims=True)
    return result


def relative_error(result: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square of the difference over that of the reference."""
    return float(np.sqrt(np.mean((result.astype(np.float64) - reference) ** 2) / np.mean(reference**2)))


def cases(
    context: umfa.MFAContext, query: np.ndarray, key: np.ndarray, value: np.ndarray, causal: bool
) -> dict[str, Callable[[], np.ndarray]]:
    """What is timed: our precisions, and PyTorch in fp32 where it is installed."""
    floats = (query, key, value)
    operands: dict[str, tuple[Any, ...]] = {
        "fp32": floats,
        "fp16": tuple(x.astype(np.float16) for x in floats),
        "int8": tuple(umfa.quantize(x, "int8") for x in floats),
        "int4 K, V": (umfa.quantize(query, "int8"), umfa.quantize(key, "int4"), umfa.quantize(value, "int4")),
    }

    def call(operands: tuple[Any, ...], scheme: str | None = None) -> Callable[[], np.ndarray]:
        return lambda: umfa.attention(*operands, causal=causal, quantize=scheme, context=context)

    calls = {f"umfa {name}": call(each) for name, each in operands.items()}
    calls["umfa int8 from fp32"] = call(floats, "int8")
    calls["umfa int4 from fp32"] = call(floats, "int4")
    try:
        import torch
    except ImportError:
        return calls
    tensors = [torch.from_numpy(x) for x in floats]
    calls["torch fp32"] = lambda: torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal).numpy()
    return calls


def main(
    threads: Annotated[int, typer.Option(help="Threads of both sides.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed rounds; each calls every case once.")] = 15,
    quick: Annotated[bool, typer.Option(help="The smallest shape only.")] = False,
) -> None:
    """Measure and print the table."""
    console = Console()
    try:
        import torch

        torch.set_num_threads(threads)
    except ImportError:
        console.print("PyTorch is not installed: no ratio to it is shown.")
    ticks = processor_ticks()
    table = Table(title=f"Forward attention, {threads} thread(s), medians of {repeats} interleaved rounds")
    for column in ("heads, tokens, head_dim", "case", "ms", "GFLOP/s", "times as fast", "relative error"):
        table.add_column(column, justify="left" if column == "case" else "right")
    rng = np.random.default_rng(0)
    with umfa.MFAContext(device="cpu", num_threads=threads) as context:
        for (heads, tokens, head_dim), causal in itertools.product(SHAPES[:1] if quick else SHAPES, (False, True)):
            query, key, value = (rng.standard_normal((1, heads, tokens, head_dim), np.float32) for _ in range(3))
            calls = cases(context, query, key, value, causal)
            reference = exact(query, key, value, causal)
            errors = {name: relative_error(call(), reference) for name, call in calls.items()}
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(repeats):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(samples) for name, samples in times.items()}
            operations = 4 * heads * tokens * tokens * head_dim / (2 if causal else 1)
            for name, seconds in medians.items():
                ratio = f"{medians['torch fp32'] / seconds:.2f}" if "torch fp32" in medians else "-"
                shape = f"{heads}, {tokens}, {head_dim}{' causal' if causal else ''}"
                table.add_row(shape, name, f"{seconds * 1e3:.2f}", f"{operations / seconds / 1e9:.0f}", ratio, f"{errors[name]:.1e}")
            table.add_section()
    console.print(table)
    console.print(f"{processor_name()}; {stolen_share(ticks, processor_ticks()):.1%} of the machine was lost to others.")


if __name__ == "__main__":
    typer.run(main)
