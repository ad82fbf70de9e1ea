"""What ``umfa demo`` does with its options."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

import umfa
from umfa.demo import DemoUnavailableError, require
from umfa.demo.corpus import load_documents
from umfa.demo.methods import UmfaMethod
from umfa.demo.model import MAX_TOKENS, SentenceEncoder
from umfa.demo.report import answer_table, caption, check_plot_path, heading, measurement_table, save_plot, to_json
from umfa.demo.run import measure, thread_limit
from umfa.demo.search import search

__all__ = ["answer", "compare"]

ProgressBar = Callable[[Console, str, int], AbstractContextManager[Callable[[int, str, int], Any]]]
"""``(console, description, total)`` -> a context manager that gives ``advance(done, description, total)``."""

_MODULES = ("safetensors.numpy", "threadpoolctl", "tokenizers")
_QUICK_TOKENS = 64


def compare(
    console: Console,
    progress_bar: ProgressBar,
    *,
    threads: int,
    repeats: int,
    quick: bool,
    plot: Path,
    json_path: Path | None,
    model: Path | None,
) -> None:
    """Measure every precision, print the tables, write the plot and the figures.

    Parameters
    ----------
    console : rich.console.Console
        Where to print.
    progress_bar : callable
        Makes the bar, see `ProgressBar`.
    threads, repeats : int
        See `umfa.demo.run.measure`.
    quick : bool
        Read only the beginning of each topic.
    plot : Path
        Where to draw.
    json_path : Path, optional
        Where to write the figures.
    model : Path, optional
        A directory with the model's files.

    Raises
    ------
    DemoUnavailableError
        If something that the demo needs is not here, or a file cannot be written.
    """
    # What is missing is found, and all of it named, before the work; so is a plot that could not be written after it.
    require("matplotlib.figure", *_MODULES)
    check_plot_path(plot)
    encoder = SentenceEncoder.load(model)
    documents = load_documents()
    max_tokens = _QUICK_TOKENS if quick else MAX_TOKENS
    with progress_bar(console, "preparing", len(documents)) as advance:
        result = measure(encoder, documents, threads=threads, repeats=repeats, max_tokens=max_tokens, progress=advance)
    console.print(heading(result), highlight=False)
    console.print(measurement_table(result))
    console.print(caption(result), style="dim", highlight=False)
    console.print(answer_table(result))
    try:
        save_plot(result, plot)
        if json_path is not None:
            json_path.write_text(json.dumps(to_json(result), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DemoUnavailableError(f"The demo cannot write its results: {error}") from error
    console.print(f"Took {result.seconds:.0f} s. Plot: {plot.resolve()}", highlight=False, soft_wrap=True)
    if json_path is not None:
        console.print(f"Figures: {json_path.resolve()}", highlight=False, soft_wrap=True)


def answer(
    console: Console, progress_bar: ProgressBar, question: str, *, precision: str, threads: int, quick: bool, model: Path | None
) -> None:
    """Print the topics that answer a question, each with its best passage.

    Parameters
    ----------
    console : rich.console.Console
        Where to print.
    progress_bar : callable
        Makes the bar, see `ProgressBar`.
    question : str
        What is asked.
    precision : {"fp32", "fp16", "int8", "int4"}
        What attention is computed in.
    threads : int
        For every engine alike.
    quick : bool
        Read only the beginning of each topic.
    model : Path, optional
        A directory with the model's files.

    Raises
    ------
    DemoUnavailableError
        If something that the demo needs is not here.
    """
    require(*_MODULES)
    encoder = SentenceEncoder.load(model)
    documents = load_documents()
    with (
        progress_bar(console, "reading", len(documents)) as advance,
        thread_limit(threads),
        umfa.MFAContext(num_threads=threads) as context,
    ):
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            advance(done, "reading" if done < len(documents) else "quoting", len(documents))

        hits = search(
            encoder,
            UmfaMethod(precision, context),
            documents,
            question,
            max_tokens=_QUICK_TOKENS if quick else MAX_TOKENS,
            advance=report,
        )
    for hit in hits:
        console.print(f"[bold]{hit.document.name}[/bold]  {hit.score:.2f}", highlight=False)
        console.print(hit.excerpt, markup=False, highlight=False)
        console.print()
    console.print(f"Attention in {precision}. More: python -c \"help('{hits[0].document.name}')\"", style="dim", highlight=False)
