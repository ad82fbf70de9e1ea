"""The work and the output of ``umfa quantize``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from umfa._layouts import four_dimensional
from umfa.errors import MFAError
from umfa.quantization import QuantizationScheme
from umfa.scheme_errors import SHARING, SchemeError, measure, scheme_name, schemes

__all__ = ["Found", "LeftOut", "Report", "TensorFile", "UnusableFileError", "as_values", "open_file", "render", "study"]

_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_AXES = (2, 3, 4)


class UnusableFileError(Exception):
    """What was asked for cannot be read or measured; the message says why."""


@dataclass(frozen=True)
class TensorFile:
    """A file with tensors.

    Attributes
    ----------
    path : Path
        The file.
    tensors : dict of str to (str, tuple of int)
        The type and shape of each tensor, in the order of the file.
    read : callable
        Reads a tensor by its name.
    """

    path: Path
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Found:
    """The errors of all schemes on one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    errors: tuple[SchemeError, ...]

    def is_best(self, error: SchemeError) -> bool:
        """Whether no scheme of the same codes has a smaller error, nor an equal one with less memory."""
        alike = [other for other in self.errors if other.scheme.dtype == error.scheme.dtype]
        return error == min(alike, key=lambda other: (other.relative_rmse, other.nbytes))

    def is_efficient(self, error: SchemeError) -> bool:
        """Whether no scheme of the same codes is better in error or memory without being worse in the other."""
        cost = (error.relative_rmse, error.nbytes)
        others = [(other.relative_rmse, other.nbytes) for other in self.errors if other.scheme.dtype == error.scheme.dtype]
        return not any(other != cost and other[0] <= cost[0] and other[1] <= cost[1] for other in others)


@dataclass(frozen=True)
class LeftOut:
    """A tensor that was not measured."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `study` found in a file."""

    path: Path
    found: tuple[Found, ...]
    left_out: tuple[LeftOut, ...]


def open_file(path: Path) -> TensorFile:
    """Find out what a file holds.

    Parameters
    ----------
    path : Path
        A file that ends in ``.safetensors`` or ``.npy``.

    Returns
    -------
    TensorFile
        Its tensors; their elements are not read yet.

    Raises
    ------
    UnusableFileError
        If it cannot be read, or needs a package that is not installed.
    """
    if not path.is_file():
        raise UnusableFileError(f"There is no file {path}")
    if path.suffix == ".npy":
        return _open_npy(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    raise UnusableFileError(f"Expected a file that ends in .safetensors or .npy, got {path}")


def _open_npy(path: Path) -> TensorFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UnusableFileError(f"{path} cannot be read: {error}") from error

    def read(name: str) -> np.ndarray[Any, Any]:  # noqa: ARG001 - there is but one
        # The library wants the machine's own order of bytes.
        return np.array(array, array.dtype.newbyteorder("="))

    return TensorFile(path, {path.stem: (array.dtype.name, array.shape)}, read)


def _open_safetensors(path: Path) -> TensorFile:
    try:
        import safetensors
    except ImportError:
        raise UnusableFileError(f"Reading {path} needs safetensors, not installed here: pip install safetensors") from None
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401 - gives NumPy, and so safetensors, bfloat16
    try:
        file: Any = safetensors.safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise UnusableFileError(f"{path} cannot be read: {error}") from error

    def read(name: str) -> np.ndarray[Any, Any]:
        try:
            array: np.ndarray[Any, Any] = file.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise UnusableFileError(f"{path}: {name} cannot be read: {error}") from error
        except Exception as error:  # which one depends on the version of safetensors
            raise UnusableFileError(f"{path}: {name} is bfloat16, which needs ml_dtypes: pip install ml_dtypes safetensors") from error
        return array

    types = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    return TensorFile(path, {name: (_FLOATS.get(dtype, dtype), shape) for name, (dtype, shape) in types.items()}, read)


def study(
    file: TensorFile,
    names: Sequence[str] = (),
    *,
    layout: str = "bhsd",
    dtypes: Sequence[str] = ("int8", "int4"),
    smooth: bool = False,
    rotate: bool = False,
    advance: Callable[[int, str, int], None] | None = None,
) -> Report:
    """Measure all schemes on tensors of a file.

    Parameters
    ----------
    file : TensorFile
        The file.
    names : sequence of str
        Which tensors; by default every float tensor with 2 to 4 axes. One that is named must be fit to be quantised.
    layout : {"bhsd", "bshd"}
        Order of the axes of tensors with four.
    dtypes : sequence of {"int8", "int4"}
        Codes.
    smooth, rotate : bool
        Options of all schemes.
    advance : callable, optional
        Called with the number of tensors that are done, the current one's name and the number of all.

    Returns
    -------
    Report
        The errors, and what was left out.

    Raises
    ------
    UnusableFileError
        If a named tensor is missing or cannot be quantised, or if no tensor can.
    """
    for name in names:
        if name not in file.tensors:
            raise UnusableFileError(f"{file.path} has no tensor {name!r}; it has {_listed(file.tensors)}")
        if reason := _unfit(*file.tensors[name]):
            raise UnusableFileError(f"{file.path}: {name}: {reason}")
    chosen = list(dict.fromkeys(names)) or [name for name, description in file.tensors.items() if not _unfit(*description)]
    if not chosen:
        described = [f"{name} ({dtype} {list(shape)})" for name, (dtype, shape) in file.tensors.items()]
        raise UnusableFileError(f"{file.path} has no float tensor with 2 to 4 axes and elements; it has {_listed(described)}")
    found, left_out = [], []
    for done, name in enumerate(chosen):
        if advance is not None:
            advance(done, name, len(chosen))
        dtype, shape = file.tensors[name]
        x = file.read(name)
        try:
            errors = tuple(measure(x, scheme, layout) for scheme in _schemes_for(shape, layout, dtypes, smooth, rotate))
        except MFAError as error:
            if names:
                raise UnusableFileError(f"{file.path}: {name}: {error}") from error
            left_out.append(LeftOut(name, str(error)))
        else:
            found.append(Found(name, dtype, shape, errors))
    if not found:
        raise UnusableFileError("\n".join(f"{file.path}: {one.name}: {one.reason}" for one in left_out))
    return Report(file.path, tuple(found), tuple(left_out))


def _unfit(dtype: str, shape: tuple[int, ...]) -> str:
    """Why a tensor cannot be quantised, as far as its description tells; empty if it can."""
    if dtype not in _FLOATS.values():
        return f"expected a float type ({', '.join(_FLOATS.values())}), got {dtype}"
    if len(shape) not in _AXES:
        return f"expected 2 to 4 axes, got shape {list(shape)}"
    return "" if math.prod(shape) else f"expected a tensor with elements, got shape {list(shape)}"


def _listed(names: Collection[str], most: int = 8) -> str:
    if not names:
        return "none at all"
    listed = ", ".join(list(names)[:most])
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


def _schemes_for(shape: tuple[int, ...], layout: str, dtypes: Sequence[str], smooth: bool, rotate: bool) -> Iterator[QuantizationScheme]:
    """All schemes but those whose blocks or groups are the whole tensor's length: `head` and `token` are the same."""
    _, _, tokens, channels = four_dimensional(shape, layout)
    longest = {"block": tokens, "group": channels}
    sharing = [(granularity, size) for granularity, size in SHARING if size is None or size < longest[granularity]]
    yield from schemes(dtypes, sharing, smooth=(smooth,), rotate=(rotate,))


def render(report: Report) -> Group:
    """Lay out a report.

    Parameters
    ----------
    report : Report
        What `study` found.

    Returns
    -------
    rich.console.Group
        A table a tensor.
    """
    parts: list[Any] = []
    for found in report.found:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        # All rows are smoothed and rotated alike: the title says it.
        options = [word for word, used in (("smoothed", found.errors[0].scheme.smooth), ("rotated", found.errors[0].scheme.rotate)) if used]
        table.title = Text(", ".join([f"{found.name}  {found.dtype} {list(found.shape)}", *options]), style="bold")
        table.add_column("scheme", no_wrap=True)
        for header in ("RMSE", "largest", "bytes", "of FP16"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        previous = ""
        for error in found.errors:
            if previous not in ("", error.scheme.dtype):
                table.add_section()
            previous = error.scheme.dtype
            best = found.is_best(error)
            table.add_row(
                scheme_name(replace(error.scheme, smooth=False, rotate=False)),
                f"{100 * error.relative_rmse:#.3g} %",
                f"{error.max_abs:.3g}",
                f"{error.nbytes:,}",
                f"{100 * error.fp16_ratio:.1f} %",
                " ".join(_marks(found, error)),
                style="bold green" if best else None,
            )
        parts.append(table)
    for one in report.left_out:
        parts.append(Text(f"Left out {one.name}: {one.reason}", style="yellow"))
    parts.append(
        Text(
            "Errors of quantising and dequantising: RMSE, relative to the tensor's root mean square, and the largest. best: the least "
            "error of these codes; +: nothing has less error in this memory, or takes less memory at this error; default: what "
            "umfa.quantize does unless told otherwise."
        )
    )
    return Group(*parts)


def _is_default(scheme: QuantizationScheme) -> bool:
    return scheme == QuantizationScheme(scheme.dtype, smooth=scheme.smooth, rotate=scheme.rotate)


def _marks(found: Found, error: SchemeError) -> list[str]:
    if found.is_best(error):
        marks = ["best"]
    else:
        marks = ["+"] if found.is_efficient(error) else []
    return [*marks, "default"] if _is_default(error.scheme) else marks


def as_values(report: Report) -> dict[str, Any]:
    """Turn a report into plain values.

    Parameters
    ----------
    report : Report
        What `study` found.

    Returns
    -------
    dict
        ``file``; ``tensors``, each with its ``schemes``; ``left_out``.
    """
    return {
        "file": str(report.path),
        "tensors": [
            {
                "name": found.name,
                "dtype": found.dtype,
                "shape": list(found.shape),
                "schemes": [
                    {
                        **asdict(error.scheme),
                        "relative_rmse": error.relative_rmse,
                        "max_abs": error.max_abs,
                        "nbytes": error.nbytes,
                        "fp16_ratio": error.fp16_ratio,
                        "best": found.is_best(error),
                        "efficient": found.is_efficient(error),
                        "default": _is_default(error.scheme),
                    }
                    for error in found.errors
                ],
            }
            for found in report.found
        ],
        "left_out": [asdict(one) for one in report.left_out],
    }
