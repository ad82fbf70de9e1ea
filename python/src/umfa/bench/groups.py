"""What is measured: forward, decoding, backward, the overhead of a call, threads, memory. Each group gives rows."""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

import umfa
from umfa._library import ffi, lib
from umfa.bench.ceilings import FLOATS, INTEGERS, READ, Ceilings
from umfa.bench.machine import Loss, Usage, cpu_count, process_seconds
from umfa.bench.native import NativeError, load
from umfa.bench.peers import Peer, Prepared, is_quantized
from umfa.bench.problem import Case, expected, relative_error
from umfa.bench.timing import Pace, Summary, interleave, summarize

__all__ = ["GROUPS", "LeftOut", "Plan", "Row", "Session", "measure"]

GROUPS = ("forward", "decode", "backward", "overhead", "threads", "memory")

_BASELINE = ("PyTorch", "fp32")
# Beyond this work a case compares with PyTorch's fp32 only: every further engine would add half a minute to a run.
_MOST_WORK_OF_ALL = 5e10
_THREADED = {"umfa": ("fp32", "int8"), "PyTorch": ("fp32",)}
# These take as much memory as their neighbours: BF16 as FP16, INT4 from floats as INT8 from them.
_WITHOUT_MEMORY = ("bf16", "int4 from fp32")
_CALLS_FROM_C = 1000
_MEMORY_SECONDS = 300


@dataclass(frozen=True)
class Row:
    """One way to compute one case, measured.

    Attributes
    ----------
    group, case, engine, variant : str
        What it is: see `GROUPS`, `Case.name`, `Peer`.
    threads : int
        Threads that the engine was given.
    kernels : tuple of str
        The kernels, of an engine that tells.
    time : Summary, optional
        Seconds of a call.
    per_second : float, optional
        Operations a second; for decoding, bytes of keys and values.
    limit : {"floats", "integers", "read"}, optional
        Which ceiling bounds it,
    limit_per_second : float, optional
        what that is,
    share : float, optional
        and what share of it is reached.
    ratio : float, optional
        How many times as fast as PyTorch's fp32 in the same run; in the group ``threads``, as the same on one thread.
    error : float, optional
        Root mean square against float64, relative.
    cache_bytes : int
        Keys and values with their scales.
    idle : float, optional
        For ``threads``: the share of wall time times threads in which the process used no CPU.
    extra_bytes : int, optional
        For ``memory``: what the process held at most during the call beyond what it held before; the output is part of it.
    loss : Loss, optional
        What the machine lost to others meanwhile.
    """

    group: str
    case: str
    engine: str
    variant: str
    threads: int
    kernels: tuple[str, ...] = ()
    time: Summary | None = None
    per_second: float | None = None
    limit: str | None = None
    limit_per_second: float | None = None
    share: float | None = None
    ratio: float | None = None
    error: float | None = None
    cache_bytes: int = 0
    idle: float | None = None
    extra_bytes: int | None = None
    loss: Loss | None = None

    @property
    def name(self) -> str:
        """Engine and variant."""
        return f"{self.engine} {self.variant}"


@dataclass(frozen=True)
class LeftOut:
    """Something that could not be measured, and why."""

    group: str
    case: str
    engine: str
    variant: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The cases of each group, and how long to measure each.

    Attributes
    ----------
    cases : dict of str to tuple of Case
        For each group of `GROUPS` that is to be measured.
    pace : Pace
        Of all groups.
    """

    cases: dict[str, tuple[Case, ...]]
    pace: Pace

    @classmethod
    def full(cls, layout: str = "bhsd") -> Plan:
        """What a run without options measures, in a layout of `Case`."""
        sizes = ((12, 256, 32), (8, 1024, 64), (8, 2048, 128), (16, 4096, 128))
        return cls(
            {
                "forward": _squares("forward", sizes, (False, True), layout),
                "decode": tuple(_decode(tokens, layout) for tokens in (4096, 32768)),
                "backward": _squares("backward", sizes[1:3], (False, True), layout),
                "overhead": _squares("forward", ((1, 1, 64),), (False,)),
                "threads": _squares("forward", sizes[2:], (False,), layout),
                "memory": _squares("forward", ((4, 16384, 128),), (True,), layout),
            },
            Pace(rounds=15, seconds=1.5),
        )

    @classmethod
    def quick(cls, layout: str = "bhsd") -> Plan:
        """Less of it, in half a minute."""
        return cls(
            {
                "forward": _squares("forward", ((12, 256, 32), (8, 1024, 64)), (False, True), layout),
                "decode": (_decode(4096, layout),),
                "backward": _squares("backward", ((8, 512, 64),), (False, True), layout),
                "overhead": _squares("forward", ((1, 1, 64),), (False,)),
                "threads": _squares("forward", ((8, 1024, 64),), (False,), layout),
                "memory": _squares("forward", ((4, 2048, 128),), (True,), layout),
            },
            Pace(rounds=5, seconds=0.15, least=3),
        )


def _squares(operation: str, sizes: Sequence[tuple[int, int, int]], causal: tuple[bool, ...], layout: str = "bhsd") -> tuple[Case, ...]:
    return tuple(Case.square(operation, *each, masked, layout) for each in sizes for masked in causal)


def _decode(tokens: int, layout: str) -> Case:
    return Case("forward", heads=32, kv_heads=8, queries=1, keys=tokens, head_dim=128, layout=layout)


@dataclass
class Session:
    """What all groups share, and what they found.

    Attributes
    ----------
    peers : sequence of Peer
        The engines that are here.
    ceilings : Ceilings or None
        None where there is no C compiler.
    threads : int
        For every engine alike, except in the group ``threads``.
    pace : Pace
        How long to measure.
    only : str
        Rows are measured whose group, case, engine and variant, written with spaces between, contain this; and PyTorch's fp32 beside them.
    """

    peers: Sequence[Peer]
    ceilings: Ceilings | None
    threads: int
    pace: Pace
    only: str = ""
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def chosen(self, group: str, case: Case) -> list[tuple[Peer, str]]:
        """The engines and their variants that are to be measured on a case."""
        found = [(peer, variant) for peer in self.peers for variant in _variants(group, case, peer)]
        kept = [each for each in found if self._matches(group, case, each[0].name, each[1])]
        return [each for each in found if each in kept or (kept and (each[0].name, each[1]) == _BASELINE)]

    def _matches(self, group: str, case: Case, engine: str, variant: str) -> bool:
        return self.only.lower() in f"{group} {case.name} {engine} {variant}".lower()

    def leave_out(self, group: str, case: Case, engine: str, variant: str, reason: object) -> None:
        """Keep a reason, in one line."""
        words = " ".join(str(reason).split()) or type(reason).__name__
        self.left_out.append(LeftOut(group, case.name, engine, variant, words))


def _variants(group: str, case: Case, peer: Peer) -> tuple[str, ...]:
    if case.layout not in peer.layouts:
        return ()
    variants = peer.variants(case)
    if group == "threads":
        return tuple(variant for variant in variants if variant in _THREADED.get(peer.name, ()))
    if group == "memory":
        return tuple(variant for variant in variants if variant not in _WITHOUT_MEMORY)
    if case.work < _MOST_WORK_OF_ALL or peer.name == "umfa":
        return variants
    return tuple(variant for variant in variants if (peer.name, variant) == _BASELINE)


def measure(session: Session, group: str, case: Case) -> None:
    """Measure one case of a group; the rows, and what could not be measured, go to the session.

    Parameters
    ----------
    session : Session
        Where they go.
    group : str
        One of `GROUPS`.
    case : Case
        The problem.
    """
    {"overhead": _overhead, "threads": _threads, "memory": _memory}.get(group, _speed)(session, group, case)


@dataclass
class _Candidate:
    """An engine with a case prepared."""

    engine: str
    variant: str
    threads: int
    prepared: Prepared
    error: float


def _prepare(session: Session, group: str, case: Case, peer: Peer, variant: str, threads: int) -> _Candidate | None:
    """Prepare a case, call it once and compare the result; None if that fails, with the reason kept."""
    expected(case)  # computed here, so that its failure would not look like the engine's
    try:
        prepared = peer.prepare(case, variant, threads)
        error = relative_error(case, prepared.result(prepared.call()))
    except Exception as failure:  # an engine that cannot do this raises whatever it likes
        session.leave_out(group, case, peer.name, variant, failure)
        return None
    return _Candidate(peer.name, variant, threads, prepared, error)


def _ceiling_turns(session: Session, wanted: set[tuple[str, int, int]]) -> list[Callable[[], None]]:
    if session.ceilings is None:
        return []
    return [turn for each in sorted(wanted) for turn in session.ceilings.turns(*each)]


def _limit_of(case: Case, candidate: _Candidate) -> tuple[str, int, int]:
    """The ceiling that bounds a candidate: kind, threads, bytes that are read."""
    if case.is_decode:
        # Caches of nearly the same size share a ceiling: that of the nearest half power of two.
        return (READ, candidate.threads, round(2 ** (round(2 * math.log2(candidate.prepared.cache_bytes)) / 2)))
    return (INTEGERS if is_quantized(candidate.variant) else FLOATS, candidate.threads, 0)


def _timed(
    session: Session, calls: list[Callable[[], Any]], ceilings: set[tuple[str, int, int]], pause: bool
) -> tuple[list[Summary], Loss | None]:
    """Time calls, with readings of the ceilings in between."""
    turns = _ceiling_turns(session, ceilings)
    before = Usage.now()
    samples = interleave([*calls, *turns], session.pace, pause)
    loss = Usage.loss(before, Usage.now())
    return [summarize(each) for each in samples[: len(calls)]], loss


def _row(session: Session, group: str, case: Case, candidate: _Candidate, summary: Summary, loss: Loss | None, **more: Any) -> Row:
    kind, threads, size = _limit_of(case, candidate)
    cache_bytes = candidate.prepared.cache_bytes
    per_second = (cache_bytes if kind == READ else case.work) / summary.median
    limit = session.ceilings.limit(kind, threads, size) if session.ceilings is not None else 0.0
    return Row(
        group,
        case.name,
        candidate.engine,
        candidate.variant,
        candidate.threads,
        candidate.prepared.kernels,
        summary,
        per_second,
        kind if limit else None,
        limit or None,
        per_second / limit if limit else None,
        error=candidate.error,
        cache_bytes=cache_bytes,
        loss=loss,
        **more,
    )


def _speed(session: Session, group: str, case: Case) -> None:
    prepared = (_prepare(session, group, case, peer, variant, session.threads) for peer, variant in session.chosen(group, case))
    candidates = [candidate for candidate in prepared if candidate is not None]
    ceilings = {_limit_of(case, candidate) for candidate in candidates}
    summaries, loss = _timed(session, [candidate.prepared.call for candidate in candidates], ceilings, session.threads > 1)
    medians = {(candidate.engine, candidate.variant): summary.median for candidate, summary in zip(candidates, summaries)}
    for candidate, summary in zip(candidates, summaries):
        ratio = medians[_BASELINE] / summary.median if _BASELINE in medians else None
        session.rows.append(_row(session, group, case, candidate, summary, loss, ratio=ratio))


def _threads(session: Session, group: str, case: Case) -> None:
    """The same on one thread and on several, and how long the threads had nothing to do."""
    threads = max(2, session.threads)
    if cpu_count() < threads:
        session.leave_out(group, case, "all", "", f"{threads} threads need {threads} CPUs, and this process may use {cpu_count()}")
        return
    candidates, meters = [], []
    for peer, variant in session.chosen(group, case):
        for count in (1, threads):
            candidate = _prepare(session, group, case, peer, variant, count)
            if candidate is not None:
                candidates.append(candidate)
                meters.append(_Meter(candidate.prepared.call))
    summaries, loss = _timed(session, list(meters), {_limit_of(case, candidate) for candidate in candidates}, pause=True)
    alone = {(each.engine, each.variant): summary.median for each, summary in zip(candidates, summaries) if each.threads == 1}
    for candidate, summary, meter in zip(candidates, summaries, meters):
        single = alone.get((candidate.engine, candidate.variant))
        ratio = None if single is None else single / summary.median
        idle = max(0.0, 1 - meter.cpu_seconds / (meter.wall_seconds * candidate.threads))
        session.rows.append(_row(session, group, case, candidate, summary, loss, ratio=ratio, idle=idle))


class _Meter:
    """A call that adds up its wall time and the CPU time of the process."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.wall_seconds = self.cpu_seconds = 0.0

    def __call__(self) -> Any:
        cpu, start = process_seconds(), time.perf_counter()
        result = self._call()
        self.wall_seconds += time.perf_counter() - start
        self.cpu_seconds += process_seconds() - cpu
        return result


def _overhead(session: Session, group: str, case: Case) -> None:
    """The smallest problem: what is left is the call. From C by the flat function, from Python by ours and by PyTorch's."""
    context = umfa.MFAContext(device="cpu", num_threads=session.threads)
    query, key, value = (np.ones((1, 1, 1, case.head_dim), np.float32) for _ in range(3))
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("umfa", "flash_attention_forward, NumPy"): lambda: umfa.flash_attention_forward(context, query, key, value),
        ("umfa", "attention, NumPy"): lambda: umfa.attention(query, key, value, context=context),
    }
    try:
        calls["umfa", "mfa_attention_forward, from C"] = _loop_in_c(context, case.head_dim)
    except NativeError as error:
        session.leave_out(group, case, "umfa", "mfa_attention_forward, from C", error)
    for peer, variant in session.chosen(group, case):
        if (peer.name, variant) == _BASELINE:
            candidate = _prepare(session, group, case, peer, variant, session.threads)
            if candidate is not None:
                calls[_BASELINE] = candidate.prepared.call
    summaries, loss = _timed(session, list(calls.values()), set(), pause=False)
    for (engine, variant), summary in zip(calls, summaries):
        one_call = summary.divided(_CALLS_FROM_C) if variant.endswith("from C") else summary
        session.rows.append(Row(group, case.name, engine, variant, session.threads, time=one_call, loss=loss))


def _loop_in_c(context: umfa.MFAContext, head_dim: int) -> Callable[[], None]:
    function = lib.mfa_attention_forward
    declared = ffi.getctype(ffi.typeof(function), "name")
    library = load("overhead.c", f"-DFORWARD_TYPE(name)={declared}")
    library.overhead_seconds.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint16]
    library.overhead_seconds.restype = ctypes.c_double
    address = int(ffi.cast("uintptr_t", function))

    def loop() -> None:
        def run(handle: Any) -> int:
            seconds = library.overhead_seconds(address, int(ffi.cast("uintptr_t", handle)), _CALLS_FROM_C, head_dim)
            return 0 if seconds >= 0 else 4

        context.call("umfa.bench", run)

    return loop


def _memory(session: Session, group: str, case: Case) -> None:
    """Each engine in a process of its own."""
    for peer, variant in session.chosen(group, case):
        request = {"engine": peer.name, "variant": variant, "threads": session.threads, "case": asdict(case)}
        command = [sys.executable, "-m", "umfa.bench.memory", json.dumps(request)]
        before = Usage.now()
        found: dict[str, Any]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_MEMORY_SECONDS, check=False)
            found = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"reason": f"the process ended with {done.returncode}"}
        except (subprocess.TimeoutExpired, ValueError) as error:
            found = {"reason": str(error)}
        if "reason" in found:
            session.leave_out(group, case, peer.name, variant, found["reason"])
            continue
        loss = Usage.loss(before, Usage.now())
        seconds = found["seconds"]
        session.rows.append(
            Row(
                group,
                case.name,
                peer.name,
                variant,
                session.threads,
                tuple(found["kernels"]),
                summarize([seconds]),
                case.work / seconds,
                extra_bytes=found["extra_bytes"],
                cache_bytes=found["cache_bytes"],
                loss=loss,
            )
        )
