"""Shows what a run measured: tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from umfa.bench.ceilings import READ
from umfa.bench.groups import Row
from umfa.bench.machine import Loss
from umfa.bench.run import Result

__all__ = ["render"]

_TITLES = {
    "forward": "Forward",
    "decode": "Decoding, one query",
    "backward": "Backward, forward not included",
    "overhead": "A call on the smallest problem",
    "threads": "Threads",
    "memory": "Peak memory of a call, the output included",
}


def _number(form: str, scale: float, pick: Callable[[Row], float | None]) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = pick(row)
        return "" if value is None else form.format(value * scale)

    return show


def _quartiles(scale: float) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        return "" if row.time is None else f"{row.time.lower_quartile * scale:,.2f} - {row.time.upper_quartile * scale:,.2f}"

    return show


def _median(row: Row) -> float | None:
    return None if row.time is None else row.time.median


_MILLISECONDS = (("ms", _number("{:,.2f}", 1e3, _median)), ("quartiles", _quartiles(1e3)))
_RATIO = ("times\nPyTorch", _number("{:.2f}", 1, lambda row: row.ratio))
_SHARE = ("of\nlimit", _number("{:.0f} %", 100, lambda row: row.share))
_ERROR = ("error", _number("{:.1e}", 1, lambda row: row.error))
_OPERATIONS = (*_MILLISECONDS, _RATIO, ("G op/s", _number("{:.0f}", 1e-9, lambda row: row.per_second)), _SHARE, _ERROR)
_COLUMNS = {
    "forward": _OPERATIONS,
    "backward": _OPERATIONS,
    "decode": (
        *_MILLISECONDS,
        _RATIO,
        ("K, V\nMB", _number("{:.1f}", 1e-6, lambda row: row.cache_bytes)),
        ("GB/s", _number("{:.1f}", 1e-9, lambda row: row.per_second)),
        _SHARE,
        _ERROR,
    ),
    "overhead": (("µs", _number("{:,.2f}", 1e6, _median)), ("quartiles", _quartiles(1e6))),
    "threads": (
        ("threads", lambda row: str(row.threads)),
        *_MILLISECONDS,
        ("times\none thread", _number("{:.2f}", 1, lambda row: row.ratio)),
        ("idle", _number("{:.0f} %", 100, lambda row: row.idle)),
        _SHARE,
    ),
    "memory": (
        ("MB", _number("{:,.1f}", 1e-6, lambda row: row.extra_bytes)),
        ("seconds", _number("{:.2f}", 1, _median)),
    ),
}
_CAPTION = (
    "ms: median of the rounds, beside it their quartiles. times PyTorch: how many times as fast as PyTorch's fp32. op/s: multiplications "
    "and additions of the matrix products. of limit: of what this machine can do at most, floats by multiply-add, integers by the fastest "
    "dot product, decoding by reading as many bytes. error: root mean square against float64, relative."
)


def _lost(loss: Loss | None) -> str:
    if loss is None:
        return "the system does not tell what was lost to others"
    return f"lost: {loss.stolen:.1%} stolen, {loss.others:.1%} used by others"


def _tables(rows: list[Row]) -> Iterator[RenderableType]:
    """A table a case, in the order in which they were measured."""
    for group, case in dict.fromkeys((row.group, row.case) for row in rows):
        of_case = [row for row in rows if (row.group, row.case) == (group, case)]
        yield Text(f"{_TITLES[group]}: {case} ({_lost(of_case[0].loss)})", style="bold")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for header, _ in _COLUMNS[group]:
            table.add_column(header, justify="right", no_wrap=True)
        for row in of_case:
            style = "bold" if row.engine == "umfa" else None
            table.add_row(row.name, *(show(row) for _, show in _COLUMNS[group]), style=style)
        yield table


def _kernels(rows: list[Row]) -> Iterator[str]:
    """Each kernel, with what it was used for."""
    uses: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for kernel in row.kernels:
            variants = uses.setdefault(kernel, {}).setdefault(row.group, [])
            if row.variant not in variants:
                variants.append(row.variant)
    for kernel, groups in uses.items():
        yield f"{kernel}: " + "; ".join(f"{group} {', '.join(variants)}" for group, variants in groups.items())


def _limits(result: Result) -> Iterator[str]:
    if result.no_ceilings:
        yield f"Limits of this machine were not measured: {result.no_ceilings}"
    for ceiling in result.ceilings:
        unit = "GB/s" if ceiling.kind == READ else "G op/s"
        threads = "1 thread" if ceiling.threads == 1 else f"{ceiling.threads} threads"
        exact = "" if ceiling.exact else " (may saturate)"
        yield f"{ceiling.kind}, {threads}: {ceiling.per_second * 1e-9:,.1f} {unit}, {ceiling.name}{exact}"


def render(result: Result) -> Group:
    """Lay out a run.

    Parameters
    ----------
    result : Result
        A run.

    Returns
    -------
    rich.console.Group
        What it ran on, a table a case, what they mean, kernels, limits, what was left out.
    """
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    here = ", ".join(f"{engine.name} {engine.version}".strip() for engine in result.engines if not engine.missing)
    missing = [f"{engine.name}: {engine.missing}" for engine in result.engines if engine.missing]
    parts: list[RenderableType] = [
        Text(f"{result.processor}, {result.cpus} CPUs, {result.instruction_set} kernels; {threads} of each engine: {here}"),
        Text(),
        *_tables(result.rows),
        Text(_CAPTION, style="dim"),
    ]
    left_out = [f"{each.group} {each.case}, {each.engine} {each.variant}: {each.reason}" for each in result.left_out]
    notes = (("Kernels", list(_kernels(result.rows))), ("Limits", list(_limits(result))), ("Not here", missing), ("Left out", left_out))
    for title, lines in notes:
        if lines:
            parts += [Text(), Text(title, style="bold"), *(Text(line) for line in lines)]
    parts += [Text(), Text(f"Took {result.seconds:.0f} s; {_lost(result.loss)}.")]
    return Group(*parts)
