"""Measures the memory of one call, in a process that does nothing else: ``python -m umfa.bench.memory REQUEST``, with a request in JSON.

Prints JSON: what the call took at its peak, or the reason why that is not known.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from dataclasses import replace
from typing import Any

from umfa.bench.machine import MemoryPeak
from umfa.bench.peers import all_peers
from umfa.bench.problem import Case

__all__ = ["measure_memory"]

_WARM_TOKENS = 64


def measure_memory(engine: str, variant: str, threads: int, case: Case) -> dict[str, Any]:
    """Call an engine once and see how far the memory of this process rises.

    The engine has computed a small problem of the same kind before, so that its libraries are loaded and its threads run. What it allocates
    for the case while preparing it, operands above all, counts as soon as it is written to: operands before the call, workspace in it.

    Parameters
    ----------
    engine, variant : str
        What to measure.
    threads : int
        Threads of the engine.
    case : Case
        The problem.

    Returns
    -------
    dict
        ``extra_bytes``, with the output; ``seconds``, of this first call; ``kernels``; ``cache_bytes``.

    Raises
    ------
    UnreadableError
        If the system does not tell a process's peak.
    """
    peer = next(peer for peer in all_peers() if peer.name == engine)
    small = replace(case, heads=1, kv_heads=1, queries=_WARM_TOKENS, keys=_WARM_TOKENS)
    peer.prepare(small, variant, threads).call()
    prepared = peer.prepare(case, variant, threads)
    _return_free_memory()
    with MemoryPeak() as peak:
        start = time.perf_counter()
        result = prepared.call()
        seconds = time.perf_counter() - start
    del result  # held until here, so that it was counted
    return {
        "extra_bytes": peak.extra_bytes,
        "seconds": seconds,
        "kernels": list(prepared.kernels),
        "cache_bytes": prepared.cache_bytes,
    }


def _return_free_memory() -> None:
    """Give back what was freed: a call that used it again would seem to need less."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library
    if trim is not None:
        trim(0)


def main() -> None:
    """Do what the request on the command line says."""
    request = json.loads(sys.argv[1])
    try:
        found = measure_memory(request["engine"], request["variant"], request["threads"], Case(**request["case"]))
    except Exception as error:  # the caller shows the reason, whatever an engine raises
        found = {"reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
