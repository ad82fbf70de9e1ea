"""Layouts: how the axes of the arrays that users pass map to the library's batch, heads, tokens, channels."""

from __future__ import annotations

from umfa.errors import InvalidDimensionsError

__all__ = ["LAYOUTS", "axes_in", "four_dimensional", "statistics_shape"]

LAYOUTS = ("bhsd", "bshd")


def axes_in(function: str, argument: str, count: int, layout: str) -> None:
    """Check that an array has 2, 3 or 4 axes.

    Four axes are those of the layout; three are batch, tokens and channels of one head; two are tokens and channels.
    """
    if not 2 <= count <= 4:
        four = "[batch, heads, tokens, channels]" if layout == "bhsd" else "[batch, tokens, heads, channels]"
        shapes = f"{four}, [batch, tokens, channels] or [tokens, channels]"
        raise InvalidDimensionsError(f"{function}: {argument}: expected {shapes}, got {count} axes")


def four_dimensional(values: tuple[int, ...], layout: str, missing: int = 1) -> tuple[int, ...]:
    """Sizes or strides in the order batch, heads, tokens, channels; `missing` for axes that the array does not have."""
    if len(values) == 4:
        return values if layout == "bhsd" else (values[0], values[2], values[1], values[3])
    if len(values) == 3:
        return values[0], missing, values[1], values[2]
    return missing, missing, values[0], values[1]


def statistics_shape(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Shape of logsumexp: [batch, heads, tokens], without the axes that the query does not have."""
    batch, heads, tokens = sizes[:3]
    return (batch, heads, tokens) if count == 4 else (batch, tokens) if count == 3 else (tokens,)
