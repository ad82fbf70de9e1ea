"""The output of ``umfa check``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from umfa.check import CheckResult

__all__ = ["as_values", "render"]


def render(results: Sequence[CheckResult]) -> Table:
    """Lay out the results, a check a row.

    Parameters
    ----------
    results : sequence of CheckResult
        What was measured.

    Returns
    -------
    rich.table.Table
        With a section for each group.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check")
    table.add_column("quantity")
    table.add_column("measured", justify="right")
    table.add_column("bound", justify="right")
    table.add_column("")
    group = ""
    for result in results:
        if result.group != group:
            table.add_section()
            table.add_row(result.group, style="bold")
            group = result.group
        table.add_row(
            f"  {result.name}",
            result.quantity,
            "error" if math.isnan(result.measured) and result.message else _number(result.measured),
            _number(result.bound),
            "ok" if result.passed else "FAILED",
            style=None if result.passed else "red",
        )
    return table


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}"


def as_values(results: Sequence[CheckResult]) -> dict[str, Any]:
    """Turn the results into plain values.

    Parameters
    ----------
    results : sequence of CheckResult
        What was measured.

    Returns
    -------
    dict
        ``passed``, and ``checks``: the fields of each result and whether it passed; a measurement that is not finite is None.
    """
    rows = []
    for result in results:
        row = asdict(result) | {"passed": result.passed}
        if not math.isfinite(result.measured):
            row["measured"] = None
        rows.append(row)
    return {"passed": all(result.passed for result in results), "checks": rows}
