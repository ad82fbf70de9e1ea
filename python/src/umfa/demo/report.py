"""Shows what the demo measured: tables for the terminal, a plot, JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from umfa.demo import DemoUnavailableError, require
from umfa.demo.run import Answer, DemoResult

__all__ = ["answer_table", "caption", "check_plot_path", "heading", "measurement_table", "save_plot", "to_json"]

_BASELINE = "umfa fp32"
_ENGINE_COLOURS = {"NumPy": "#9aa0a6", "PyTorch": "#e8833a", "umfa": "#2f6fb0"}


def heading(result: DemoResult) -> str:
    """Say in a line what was run.

    Parameters
    ----------
    result : DemoResult
        A run.

    Returns
    -------
    str
        Model, amount of text, versions and threads.
    """
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return (
        f"all-MiniLM-L6-v2 ({result.layers} layers, {result.heads} heads of {result.head_dim}) reads {result.documents} help topics of "
        f"Python, {result.tokens:,} tokens, on {threads} of each engine: {versions}"
    )


def measurement_table(result: DemoResult) -> Table:
    """Lay out the measurements, a method a row.

    Parameters
    ----------
    result : DemoResult
        A run.

    Returns
    -------
    rich.table.Table
        At most 80 columns wide.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("attention")
    for title in ("time\nms", "K, V\nMB", "error\nrel.", "cosine\nmin", "cosine\nmean", "top 1\nkept", "top 3\nkept"):
        table.add_column(title, justify="right")
    questions = len(result.answers)
    for row in result.measurements:
        table.add_row(
            row.method,
            f"{row.attention_seconds * 1e3:,.0f}",
            f"{row.kv_bytes / 1e6:.0f}",
            f"{row.relative_rmse:.1e}",
            f"{row.cosine_min:.5f}",
            f"{row.cosine_mean:.5f}",
            f"{row.top1_kept}/{questions}",
            f"{row.top3_kept}/{questions}",
            style="bold" if row.engine == "umfa" else None,
        )
    return table


def caption(result: DemoResult) -> str:
    """Explain the columns of `measurement_table`.

    Parameters
    ----------
    result : DemoResult
        A run.

    Returns
    -------
    str
        A few lines.
    """
    timed = "" if result.repeats == 1 else f", of each the median of {result.repeats}"
    return (
        f"time: all attention calls, quantising Q, K and V included{timed}. K, V: keys and values of all layers, with their scales. "
        "error: RMSE of attention against float64 on the same inputs, relative. cosine: of the texts' embeddings with those of "
        f"{_BASELINE}. kept: questions whose best topic, or best three in order, stay those of {_BASELINE}."
    )


def _deviations(answer: Answer) -> str:
    """Name the methods that answer otherwise than the baseline."""
    expected = answer.topics[_BASELINE]
    parts = []
    for method, topics in answer.topics.items():
        if topics[0] != expected[0]:
            parts.append(f"{method}: {topics[0]}")
        elif topics != expected:
            parts.append(f"{method}: 2nd, 3rd")
    return "\n".join(parts) or "-"


def answer_table(result: DemoResult) -> Table:
    """Lay out the questions with their answers and who answers otherwise.

    Parameters
    ----------
    result : DemoResult
        A run.

    Returns
    -------
    rich.table.Table
        A question a row.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("question", max_width=36)
    table.add_column("best three topics", max_width=24)
    table.add_column("answered otherwise by")
    for answer in result.answers:
        table.add_row(answer.question, ", ".join(answer.topics[_BASELINE]), _deviations(answer))
    return table


def to_json(result: DemoResult) -> dict[str, Any]:
    """Turn a run into plain values.

    Parameters
    ----------
    result : DemoResult
        A run.

    Returns
    -------
    dict
        The fields of `DemoResult`, as `json.dumps` takes them.
    """
    return asdict(result)


def check_plot_path(path: Path) -> None:
    """Find out, before anything is computed, whether a plot can be drawn there.

    Parameters
    ----------
    path : Path
        The file that is to be written.

    Raises
    ------
    DemoUnavailableError
        If matplotlib is not installed, does not know the ending, or the directory does not exist.
    """
    (figure,) = require("matplotlib.figure")
    formats = figure.Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise DemoUnavailableError(f"The plot's ending must be one of {', '.join(sorted(formats))}: {path}")
    if not path.absolute().parent.is_dir():
        raise DemoUnavailableError(f"The plot's directory does not exist: {path.absolute().parent}")


def save_plot(result: DemoResult, path: Path) -> None:
    """Draw time, memory and error of each method side by side.

    Parameters
    ----------
    result : DemoResult
        A run.
    path : Path
        The file to write; its ending chooses the format. See `check_plot_path`.

    Raises
    ------
    DemoUnavailableError
        If matplotlib is not installed.
    OSError
        If the file cannot be written.
    """
    (figure_module,) = require("matplotlib.figure")

    rows = result.measurements
    labels = [row.method for row in rows]
    colours = [_ENGINE_COLOURS[row.engine] for row in rows]
    figure = figure_module.Figure(figsize=(11, 0.45 * len(rows) + 1.9), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    panels = (
        ("Attention time, ms", [row.attention_seconds * 1e3 for row in rows], "{:,.0f}", False),
        ("Keys and values, MB", [row.kv_bytes / 1e6 for row in rows], "{:.0f}", False),
        ("Relative error (RMSE against float64)", [row.relative_rmse for row in rows], "{:.1e}", True),
    )
    for axis, (title, values, form, logarithmic) in zip(axes, panels, strict=True):
        bars = axis.barh(labels, values, color=colours, height=0.66)
        for bar, value in zip(bars, values, strict=True):
            axis.annotate(
                form.format(value),
                (value, bar.get_y() + bar.get_height() / 2),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color="#333333",
            )
        if logarithmic:
            axis.set_xscale("log")
            axis.set_xlim(min(values) / 3, max(values) * 30)
        else:
            axis.set_xlim(0, max(values) * 1.18)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8, colors="#666666")
        axis.grid(axis="x", color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[0].invert_yaxis()
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    figure.suptitle(
        f"Attention of all-MiniLM-L6-v2 over {result.documents} help topics of Python ({result.tokens:,} tokens), {threads}",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=150)
