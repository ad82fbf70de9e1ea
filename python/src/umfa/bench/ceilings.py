"""What this machine can do at most: operations on floats and on small integers, and reading memory. Native code; see ceilings.c."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from umfa.bench.native import load

__all__ = ["FLOATS", "INTEGERS", "READ", "Ceiling", "Ceilings"]

FLOATS = "floats"
INTEGERS = "integers"
READ = "read"

_LINE = 64
_STREAMS = (1, 2, 4, 8)
_READING_SECONDS = 0.004
_ITERATIONS = 20_000
_TRIES = 5
_MOST_THREADS = 256


@dataclass(frozen=True)
class Ceiling:
    """The best reading of a rate.

    Attributes
    ----------
    kind : {"floats", "integers", "read"}
        Operations on FP32, on 8-bit or 16-bit integers, or reading memory.
    name : str
        The instructions, or the bytes that are read.
    exact : bool
        False if the instructions can saturate on the way.
    threads : int
        Threads that ran side by side.
    size : int
        Bytes that are read again and again, in all threads together; 0 for operations.
    per_second : float
        Operations (a multiplication and an addition are two) or bytes.
    """

    kind: str
    name: str
    exact: bool
    threads: int
    size: int
    per_second: float


class _Rate:
    """Something whose rate is measured each time that it is called; the best reading is kept.

    Parameters
    ----------
    about : Ceiling
        What it is, with nothing measured yet.
    units : float
        Operations or bytes of one repeat, in all threads together.
    run : callable
        ``run(thread, repeats)``; releases the interpreter's lock.
    pool : ThreadPoolExecutor
        Where to run if there is more than one thread.
    """

    def __init__(self, about: Ceiling, units: float, run: Callable[[int, int], Any], pool: ThreadPoolExecutor) -> None:
        self.ceiling = about
        self._units = units
        self._run = run
        self._pool = pool
        self._repeats = 1

    def settle(self) -> None:
        """Choose how often to repeat, so that a reading takes a few milliseconds, and take the first readings."""
        seconds = min(self._time() for _ in range(2))
        self._repeats = max(1, round(_READING_SECONDS / max(seconds, 1e-9)))
        for _ in range(_TRIES):
            self()

    def __call__(self) -> None:
        per_second = self._units * self._repeats / self._time()
        self.ceiling = replace(self.ceiling, per_second=max(self.ceiling.per_second, per_second))

    def _time(self) -> float:
        threads = range(self.ceiling.threads)
        start = time.perf_counter()
        if len(threads) == 1:
            self._run(0, self._repeats)
        else:
            list(self._pool.map(lambda thread: self._run(thread, self._repeats), threads))
        return time.perf_counter() - start


class Ceilings:
    """The rates of this machine, each measured when it is first asked for, and again whenever its `turns` are taken.

    Raises
    ------
    NativeError
        If there is no C compiler to make the loops with.
    """

    def __init__(self) -> None:
        library = load("ceilings.c")
        library.ceilings_name.restype = ctypes.c_char_p
        library.ceilings_run.argtypes = [ctypes.c_int32, ctypes.c_int64]
        library.ceilings_run.restype = None
        library.ceilings_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32]
        library.ceilings_read.restype = ctypes.c_uint64
        self._library = library
        self._rates: dict[tuple[str, int, int], list[_Rate]] = {}
        self._pool = ThreadPoolExecutor(_MOST_THREADS)
        self._memory = np.empty(0, np.uint8)

    def turns(self, kind: str, threads: int, size: int = 0) -> list[Callable[[], None]]:
        """What to call in between other measurements to take these readings again.

        Parameters
        ----------
        kind : {"floats", "integers", "read"}
            What is measured.
        threads : int
            Threads side by side.
        size : int
            For ``"read"``: how many bytes.

        Returns
        -------
        list of callable
            The fastest way. For integers also the fastest exact one, where that is another. Empty where no loop is written for the
            processor.
        """
        return list(self._measured(kind, threads, size))

    def limit(self, kind: str, threads: int, size: int = 0) -> float:
        """The best reading of the fastest way.

        Parameters
        ----------
        kind, threads, size
            As in `turns`.

        Returns
        -------
        float
            Operations or bytes a second; 0 where no loop is written for the processor.
        """
        return max((rate.ceiling.per_second for rate in self._measured(kind, threads, size)), default=0.0)

    def all(self) -> list[Ceiling]:
        """All that has been measured."""
        return [rate.ceiling for rates in self._rates.values() for rate in rates]

    def _measured(self, kind: str, threads: int, size: int) -> list[_Rate]:
        key = (kind, threads, size)
        if key not in self._rates:
            found = self._reads(threads, size) if kind == READ else self._operations(kind, threads)
            for rate in found:
                rate.settle()
            found.sort(key=lambda rate: rate.ceiling.per_second)
            exact = [rate for rate in found if rate.ceiling.exact]
            self._rates[key] = list(dict.fromkeys(exact[-1:] + found[-1:]))
        return self._rates[key]

    def _operations(self, kind: str, threads: int) -> list[_Rate]:
        library = self._library
        rates = []
        for index in range(library.ceilings_count()):
            if not library.ceilings_is_here(index) or bool(library.ceilings_of_integers(index)) != (kind == INTEGERS):
                continue

            def run(_: int, repeats: int, index: int = index) -> None:
                library.ceilings_run(index, _ITERATIONS * repeats)

            name, exact = library.ceilings_name(index).decode(), bool(library.ceilings_is_exact(index))
            units = float(library.ceilings_operations(index)) * _ITERATIONS * threads
            rates.append(_Rate(Ceiling(kind, name, exact, threads, 0, 0.0), units, run, self._pool))
        return rates

    def _reads(self, threads: int, size: int) -> list[_Rate]:
        """Each thread reads a part of its own."""
        if self._memory.size < size + _LINE:
            self._memory = np.ones(size + _LINE, np.uint8)
        part = size // threads // _LINE * _LINE
        rates = []
        for streams in _STREAMS:

            def run(thread: int, repeats: int, streams: int = streams) -> None:
                address = -(-self._memory.ctypes.data // _LINE) * _LINE
                for _ in range(repeats):
                    self._library.ceilings_read(address + thread * part, part, streams)

            about = Ceiling(READ, f"{size / 1e6:.0f} MB, streams: {streams}", True, threads, size, 0.0)
            rates.append(_Rate(about, float(part * threads), run, self._pool))
        return rates
