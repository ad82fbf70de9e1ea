"""A whole run: which engines are here, all groups, what the machine is."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

import umfa
from umfa.bench import BenchError
from umfa.bench.ceilings import Ceiling, Ceilings
from umfa.bench.groups import GROUPS, LeftOut, Plan, Row, Session, measure
from umfa.bench.machine import Loss, Usage, cpu_count, processor_name, timestamp
from umfa.bench.native import NativeError
from umfa.bench.peers import Peer, all_peers
from umfa.bench.timing import Pace

__all__ = ["FORMAT", "Engine", "Result", "run", "to_json"]

FORMAT = 1

_WITHOUT_LIMIT = float("inf")


@dataclass(frozen=True)
class Engine:
    """An engine that was looked for.

    Attributes
    ----------
    name : str
        As rows name it.
    version : str
        Empty where it is unknown.
    missing : str
        Why it is not here; empty if it is.
    """

    name: str
    version: str
    missing: str


@dataclass(frozen=True)
class Result:
    """A run.

    Attributes
    ----------
    started : str
        When, in UTC.
    seconds : float
        How long it took.
    processor : str
        Its name.
    cpus : int
        CPUs that the process may use.
    instruction_set : str
        That the kernels of `umfa` were compiled for.
    threads : int
        Threads of every engine.
    pace : Pace
        How long each case was measured.
    quick : bool
        Whether the short plan was used.
    versions : dict of str to str
        Of Python, NumPy and the system.
    engines : list of Engine
        Ours and the others.
    ceilings : list of Ceiling
        The machine's limits.
    no_ceilings : str
        Why there are none; empty if there are.
    loss : Loss, optional
        What the machine lost to others during the whole run.
    rows : list of Row
        What was measured.
    left_out : list of LeftOut
        What was not.
    """

    started: str
    seconds: float
    processor: str
    cpus: int
    instruction_set: str
    threads: int
    pace: Pace
    quick: bool
    versions: dict[str, str]
    engines: list[Engine]
    ceilings: list[Ceiling]
    no_ceilings: str
    loss: Loss | None
    rows: list[Row]
    left_out: list[LeftOut]


def _look_for(peer: Peer) -> Engine:
    version = umfa.__version__ if peer.name == "umfa" else peer.version()
    return Engine(peer.name, version, peer.why_missing())


def run(
    groups: Sequence[str] = (),
    *,
    threads: int = 1,
    rounds: int | None = None,
    quick: bool = False,
    only: str = "",
    layout: str = "bhsd",
    plan: Plan | None = None,
    peers: Sequence[Peer] | None = None,
    progress: Callable[[int, str, int], Any] | None = None,
) -> Result:
    """Measure.

    Parameters
    ----------
    groups : sequence of str
        Which of `GROUPS`; by default all.
    threads : int
        For every engine alike.
    rounds : int, optional
        Rounds of every case, however long they take; by default up to 15, fewer where they are long.
    quick : bool
        Fewer and smaller cases.
    only : str
        See `Session`.
    layout : {"bhsd", "bshd"}
        Of the operands of all groups but ``overhead``: see `Case`. Engines that would copy them are left out.
    plan : Plan, optional
        Other cases than those of `Plan.full` and `Plan.quick`.
    peers : sequence of Peer, optional
        Other engines than `all_peers`.
    progress : callable, optional
        Told ``(cases done, the next one, cases in all)``.

    Returns
    -------
    Result
        All figures.

    Raises
    ------
    BenchError
        If nothing is to be measured.
    """
    start, started, before = time.perf_counter(), timestamp(), Usage.now()
    if plan is None:
        plan = Plan.quick(layout) if quick else Plan.full(layout)
    pace = plan.pace if rounds is None else Pace(rounds, _WITHOUT_LIMIT, plan.pace.least)
    wanted = [name for name in GROUPS if name in plan.cases and (not groups or name in groups)]
    candidates = tuple(all_peers() if peers is None else peers)
    session = Session(candidates, None, threads, pace, only)
    chosen = {(group, case): session.chosen(group, case) for group in wanted for case in plan.cases[group]}
    cases = [each for each, found in chosen.items() if found]
    if not cases:
        raise BenchError(f"Nothing to measure: no group, case, engine and type contain {only!r}")
    # Only now, as importing an engine can take seconds.
    needed = {peer.name for found in chosen.values() for peer, _ in found}
    engines = [_look_for(peer) for peer in candidates if peer.name in needed]
    here = {engine.name for engine in engines if not engine.missing}
    session.peers = [peer for peer in candidates if peer.name in here]
    no_ceilings = ""
    try:
        session.ceilings = Ceilings()
    except NativeError as error:
        no_ceilings = str(error)
    for done, (group, case) in enumerate(cases):
        if progress is not None:
            progress(done, f"{group} {case.name}", len(cases))
        measure(session, group, case)
    with umfa.MFAContext(device="cpu", num_threads=threads) as context:
        instruction_set = str(context.details()["instruction_set"])
    return Result(
        started=started,
        seconds=time.perf_counter() - start,
        processor=processor_name(),
        cpus=cpu_count(),
        instruction_set=instruction_set,
        threads=threads,
        pace=pace,
        quick=quick,
        versions={"Python": platform.python_version(), "NumPy": np.__version__, "system": f"{sys.platform} {platform.machine()}"},
        engines=engines,
        ceilings=session.ceilings.all() if session.ceilings is not None else [],
        no_ceilings=no_ceilings,
        loss=Usage.loss(before, Usage.now()),
        rows=session.rows,
        left_out=session.left_out,
    )


def to_json(result: Result) -> dict[str, Any]:
    """Turn a run into plain values.

    Parameters
    ----------
    result : Result
        A run.

    Returns
    -------
    dict
        ``format``, the number of this layout, and the fields of `Result`; seconds without limit are None.
    """
    pace = asdict(result.pace)
    if result.pace.seconds == _WITHOUT_LIMIT:
        pace["seconds"] = None
    return {"format": FORMAT, **asdict(replace(result)), "pace": pace}
