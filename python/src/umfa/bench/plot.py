"""Draws a run: a panel a case, a bar a row."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from umfa.bench import BenchError
from umfa.bench.groups import Row
from umfa.bench.run import Result

__all__ = ["check_path", "save"]

_COLOURS = {"umfa": "#2f6fb0", "PyTorch": "#e8833a", "ONNX Runtime": "#7a6ea8", "OpenVINO": "#4f9d69", "ggml": "#b0554f"}
_OTHER_COLOUR = "#9aa0a6"
_COLUMNS = 3
_UNITS = {"overhead": ("µs", 1e6), "memory": ("MB", 1e-6)}
_MILLISECONDS = ("ms", 1e3)


def _figure_module() -> Any:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        raise BenchError("A plot needs matplotlib, not installed here: pip install 'umfa[bench]'") from None


def check_path(path: Path) -> None:
    """Find out, before anything is measured, whether a plot can be drawn there.

    Parameters
    ----------
    path : Path
        The file that is to be written.

    Raises
    ------
    BenchError
        If matplotlib is not installed, does not know the ending, or the directory does not exist.
    """
    formats = _figure_module().Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise BenchError(f"The plot's ending must be one of {', '.join(sorted(formats))}: {path}")
    if not path.absolute().parent.is_dir():
        raise BenchError(f"The plot's directory does not exist: {path.absolute().parent}")


def save(result: Result, path: Path) -> None:
    """Draw the medians, with the quartiles as whiskers, and beside each bar how many times as fast as PyTorch's fp32 it is.

    Parameters
    ----------
    result : Result
        A run.
    path : Path
        The file to write; its ending chooses the format.

    Raises
    ------
    BenchError
        If matplotlib is not installed, or no row could be measured.
    OSError
        If the file cannot be written.
    """
    if not result.rows:
        raise BenchError("There is nothing to draw: no row could be measured")
    cases = list(dict.fromkeys((row.group, row.case) for row in result.rows))
    panels = [[row for row in result.rows if (row.group, row.case) == each] for each in cases]
    # A line of panels is as high as its longest one needs, so that all bars are of one height.
    lines = [panels[start : start + _COLUMNS] for start in range(0, len(panels), _COLUMNS)]
    bars = [max(len(rows) for rows in line) for line in lines]
    figure = _figure_module().Figure(figsize=(5.2 * len(lines[0]), sum(0.24 * count + 0.9 for count in bars) + 0.6), layout="constrained")
    axes = list(
        figure.subplots(len(lines), len(lines[0]), squeeze=False, gridspec_kw={"height_ratios": [count + 3 for count in bars]}).flat
    )
    for position, (axis, rows, (group, case)) in enumerate(zip(axes, panels, cases)):
        _draw(axis, rows, group, case)
        axis.set_ylim(bars[position // _COLUMNS] - 0.5, -0.5)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    figure.suptitle(f"{result.processor}, {result.instruction_set} kernels, {threads}", fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def _draw(axis: Any, rows: list[Row], group: str, case: str) -> None:
    unit, scale = _UNITS.get(group, _MILLISECONDS)
    names = [f"{row.name}, {row.threads}" if group == "threads" else row.name for row in rows]
    values, whiskers = [], []
    for row in rows:
        if group == "memory":
            values.append((row.extra_bytes or 0) * scale)
            whiskers.append((0.0, 0.0))
        elif row.time is not None:
            values.append(row.time.median * scale)
            whiskers.append(((row.time.median - row.time.lower_quartile) * scale, (row.time.upper_quartile - row.time.median) * scale))
    colours = [_COLOURS.get(row.engine, _OTHER_COLOUR) for row in rows]
    positions = range(len(rows))
    axis.barh(positions, values, xerr=list(zip(*whiskers)), color=colours, height=0.7, ecolor="#444444", capsize=1.5)
    axis.set_yticks(positions, names)
    for position, row, value, whisker in zip(positions, rows, values, whiskers):
        label = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + (f" ({row.ratio:.2f} x)" if row.ratio is not None else "")
        axis.annotate(label, (value + whisker[1], position), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_xlim(0, max((value + whisker[1] for value, whisker in zip(values, whiskers)), default=1) * 1.35 or 1)
    axis.set_title(f"{group} {case}, {unit}", fontsize=9, loc="left")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0, labelsize=7)
    axis.tick_params(axis="x", labelsize=7, colors="#666666")
