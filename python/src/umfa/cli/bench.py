"""What ``umfa bench`` does with its options."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

from umfa.bench import BenchError, plot
from umfa.bench.report import render
from umfa.bench.run import run, to_json

__all__ = ["bench"]

ProgressBar = Callable[[Console, str, int], AbstractContextManager[Callable[[int, str, int], Any]]]
"""``(console, description, total)`` -> a context manager that gives ``advance(done, description, total)``."""


def bench(
    console: Console,
    progress_bar: ProgressBar,
    *,
    groups: Sequence[str],
    threads: int,
    repeats: int | None,
    quick: bool,
    only: str,
    layout: str,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Measure, print the tables, write the figures and the plot.

    Parameters
    ----------
    console : rich.console.Console
        Where to print.
    progress_bar : callable
        Makes the bar, see `ProgressBar`.
    groups, threads, quick, only, layout
        See `umfa.bench.run.run`.
    repeats : int, optional
        Its `rounds`.
    json_path, plot_path : Path, optional
        Where to write.

    Raises
    ------
    BenchError
        If nothing is to be measured, or a file cannot be written.
    """
    # A file that could not be written is refused before the work.
    if plot_path is not None:
        plot.check_path(plot_path)
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise BenchError(f"The directory of the figures does not exist: {json_path.absolute().parent}")
    with progress_bar(console, "measuring", 1) as advance:
        result = run(groups, threads=threads, rounds=repeats, quick=quick, only=only, layout=layout, progress=advance)
    console.print(render(result), highlight=False)
    try:
        if plot_path is not None:
            plot.save(result, plot_path)
            console.print(f"Plot: {plot_path.resolve()}", highlight=False, soft_wrap=True)
        if json_path is not None:
            json_path.write_text(json.dumps(to_json(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
            console.print(f"Figures: {json_path.resolve()}", highlight=False, soft_wrap=True)
    except OSError as error:
        raise BenchError(f"The results cannot be written: {error}") from error
