"""Interleaved timing: every candidate is called once a round, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Pace", "Summary", "interleave", "summarize", "turns_of"]

_WARM_SECONDS = 0.05
_TURN_SECONDS = 0.01
_PAUSE_SECONDS = 0.003


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes
    ----------
    rounds : int
        In how many rounds a candidate takes part at most.
    seconds : float
        After about that long a candidate takes part in no more rounds,
    least : int
        but in no fewer than this.
    """

    rounds: int
    seconds: float
    least: int = 3


@dataclass(frozen=True)
class Summary:
    """Seconds of a call: median, quartiles and least of `samples` turns."""

    median: float
    lower_quartile: float
    upper_quartile: float
    least: float
    samples: int

    def divided(self, calls: int) -> Summary:
        """Those of one call, where each sample is of so many."""
        return Summary(self.median / calls, self.lower_quartile / calls, self.upper_quartile / calls, self.least / calls, self.samples)


def summarize(samples: Sequence[float]) -> Summary:
    """Reduce the times of a candidate's turns.

    Parameters
    ----------
    samples : sequence of float
        At least one.

    Returns
    -------
    Summary
        Quartiles by linear interpolation, both the sample itself if there is one.
    """
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0], samples[0], 1)
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, lower, upper, min(samples), len(samples))


def turns_of(cost: float, pace: Pace) -> int:
    """The number of rounds in which a candidate takes part whose turn takes `cost` seconds."""
    return max(min(pace.least, pace.rounds), int(min(pace.rounds, pace.seconds / max(cost, 1e-9))))


class _Candidate:
    """A call, and how its turns are spent."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.samples: list[float] = []
        seconds = self._time(1)
        # What is shorter runs once more before the clock starts, so that its data are in the caches that they fit in.
        self.is_warmed = seconds < _WARM_SECONDS
        if self.is_warmed:
            seconds = min(seconds, self._time(1))
        self.calls = max(1, int(_TURN_SECONDS / max(seconds, 1e-9)))
        self.cost = seconds * (self.calls + self.is_warmed)

    def _time(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self.call()
        return (time.perf_counter() - start) / calls

    def take_turn(self) -> None:
        if self.is_warmed:
            self.call()
        self.samples.append(self._time(self.calls))


def interleave(
    calls: Sequence[Callable[[], Any]], pace: Pace, pause: bool = False, advance: Callable[[], Any] | None = None
) -> list[list[float]]:
    """Time calls in rounds, each call once or, if it is short, several times in a row a round.

    Parameters
    ----------
    calls : sequence of callable
        What is timed. Each has been called before, so that it has compiled and allocated what it needs.
    pace : Pace
        How long to measure.
    pause : bool
        Rest for a moment before each turn, so that the waiting threads of another engine have gone to sleep.
    advance : callable, optional
        Called after each turn.

    Returns
    -------
    list of list of float
        For each call the seconds of one call in each of its turns.
    """
    candidates = [_Candidate(call) for call in calls]
    turns = [turns_of(candidate.cost, pace) for candidate in candidates]
    rounds = max(turns, default=0)
    for position in range(rounds):
        for candidate, count in zip(candidates, turns, strict=True):
            # Fewer turns than rounds are spread over all of them.
            if (position + 1) * count // rounds > position * count // rounds:
                if pause:
                    time.sleep(_PAUSE_SECONDS)
                candidate.take_turn()
                if advance is not None:
                    advance()
    return [candidate.samples for candidate in candidates]
