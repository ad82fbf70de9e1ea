"""Speed, memory and error of `umfa` beside other engines, in one interleaved run. The command line calls it ``umfa bench``.

`problem` has the cases, `peers` an engine a file, `groups` what is measured of them, `timing` how, `ceilings` what the machine can do at
most, `run` puts it together and `report` and `plot` show it. What an engine needs is imported when it is used; an engine that is not here
is named with the reason. docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

__all__ = ["BenchError"]


class BenchError(Exception):
    """The benchmark cannot run as asked; the message says why."""
