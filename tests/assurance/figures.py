"""Figures of reliability: each suite of faults writes down what it counted, and report.py prints it.

What a run counted goes to `.build/assurance/SUITE.json`. A run that is made by hand only, because it takes hours, writes
`records/SUITE.json` beside this file, which is part of the repository.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MADE = Path(os.environ.get("MFA_ASSURANCE_FIGURES", ROOT / ".build" / "assurance"))
RECORDS = Path(__file__).parent / "records"

# MFA_ASSURANCE=full makes the suites as large as docs/assurance.md says; else they are as small as every test run can bear.
FULL = os.environ.get("MFA_ASSURANCE", "short") == "full"

_counted: dict[tuple[Path, str], dict[str, Any]] = {}


def pick(short: Any, full: Any) -> Any:
    """`full` in a run of full size, else `short`: how many calls to make, which shapes to try."""
    return full if FULL else short


def record(suite: str, *, by_hand: bool = False, **figures: Any) -> None:
    """Write figures of the running suite beside those that it wrote before in this process; a new process begins anew.

    Parameters
    ----------
    suite
        Its name, that of its file: "misuse".
    by_hand
        The run is one that no recipe makes; its figures are committed.
    **figures
        A number or a few words each. In the name `_` stands for a space.
    """
    folder = RECORDS if by_hand else MADE
    counted = _counted.setdefault((folder, suite), {})
    counted |= {name.replace("_", " "): figure for name, figure in figures.items()}
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{suite}.json"
    temporary = place.with_suffix(f".{os.getpid()}")
    temporary.write_text(
        json.dumps({**circumstances(), "size": "full" if FULL or by_hand else "short", "figures": counted}, indent=1) + "\n"
    )
    temporary.replace(place)


def add(suite: str, **figures: int) -> None:
    """Add to figures of the running suite, which begin at 0: for parametrised tests, each of which knows its own part only."""
    counted = _counted.get((MADE, suite), {})
    record(suite, **{name: counted.get(name.replace("_", " "), 0) + figure for name, figure in figures.items()})


@functools.cache
def circumstances() -> dict[str, str]:
    """When and on what the figures were counted."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "instruction set": instruction_set(),
    }


def processor() -> str:
    """The processor's name and the number of its cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def instruction_set() -> str:
    """That of the CPU kernels which a context chooses here by itself."""
    import umfa

    with umfa.MFAContext(device="cpu", num_threads=1) as context:
        return str(context.details()["instruction_set"])
