"""Checks of plain arguments: numbers, flags and choices. Each returns what the C structures take, or raises with expected and got."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from typing import Any

from umfa.errors import InvalidArgumentError, InvalidTypeError, MFAError

__all__ = ["attribute", "choice", "describe", "flag", "integer", "real"]

_LONGEST = 80


def describe(value: object) -> str:
    """A few words for a value in a message: its repr where that is short, else its type."""
    try:
        words = repr(value)
    except Exception:
        words = ""
    name = type(value).__name__
    return f"{words} ({name})" if 0 < len(words) <= _LONGEST and "\n" not in words else f"an object of type {name}"


def attribute(value: object, name: str) -> Any:
    """An attribute of the user's object; None if it has none, or fails to say."""
    try:
        return getattr(value, name, None)
    except Exception:
        return None


def real(function: str, argument: str, value: Any) -> float:
    """A real number as a float. Python's, NumPy's and zero-dimensional arrays will do; not bool, str or complex."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or attribute(value, "shape") == ()):
        raise InvalidTypeError(f"{function}: {argument}: expected a real number, got {describe(value)}")
    try:
        return float(value)
    except OverflowError:
        raise InvalidArgumentError(f"{function}: {argument}: expected a number that fits a double, got a larger one") from None
    except Exception:
        raise InvalidTypeError(f"{function}: {argument}: expected a real number, got {describe(value)}") from None


def integer(function: str, argument: str, value: Any, low: int, high: int, error: type[MFAError] = InvalidArgumentError) -> int:
    """A whole number from `low` to `high`; `error` for one outside."""
    if type(value) is not int:
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)
        except Exception:
            raise InvalidTypeError(f"{function}: {argument}: expected a whole number, got {describe(value)}") from None
    if not low <= value <= high:
        got = str(value) if -(2**128) < value < 2**128 else f"a number of {value.bit_length()} bits"
        raise error(f"{function}: {argument}: expected {low} ... {high}, got {got}")
    return int(value)


def flag(function: str, argument: str, value: Any) -> int:
    """A Python or NumPy bool as 0 or 1."""
    if value is False or value is True:
        return int(value)
    if type(value).__name__ in ("bool", "bool_") and attribute(value, "shape") == ():
        return int(bool(value))
    raise InvalidTypeError(f"{function}: {argument}: expected True or False, got {describe(value)}")


def choice(function: str, argument: str, value: Any, choices: Iterable[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str):
        raise InvalidTypeError(f"{function}: {argument}: expected one of {', '.join(map(repr, choices))}, got {describe(value)}")
    if value not in choices:
        raise InvalidArgumentError(f"{function}: {argument}: expected one of {', '.join(map(repr, choices))}, got {describe(value)}")
    return value
