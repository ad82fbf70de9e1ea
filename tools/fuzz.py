"""Fuzz libmfa with libFuzzer: build the targets of tests/fuzzing, run them, keep what they find.

    python tools/fuzz.py [TARGET ...] [--executions N] [--plain] [--record] [--seeds]

There are two builds: one under sanitizers, and with `--plain` one without them, whose kernels are compiled as those that are shipped, and
which is several times as fast. It cannot see reads outside memory; writes, wrong results and crashes it can.

A target runs on its seeds, which tests/fuzzing/corpus holds, and on what earlier runs added to .build-fuzzing/corpus. An input that makes
it fail is kept in .build-fuzzing/findings; `tools/fuzz.py TARGET --reproduce FILE` runs it alone. `--record` writes what all runs since the
targets were built have counted to tests/assurance/records, `--seeds` chooses the seeds anew from all inputs that are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import build_library

ROOT = build_library.ROOT
SOURCES = ROOT / "tests" / "fuzzing"
SEEDS = SOURCES / "corpus"
SCRATCH = ROOT / ".build-fuzzing"
FINDINGS = SCRATCH / "findings"

TARGETS = ("descriptor", "strides", "quantization", "training", "kernels")
PARTS = ("core/CABI", "core/MFACore", "core/CPUBackend", "core/CPUKernels")

# Each build's name in build_library.SANITIZERS, and what its programs are linked with.
BUILDS = {"sanitized": ("fuzzing", "fuzzer,address"), "plain": ("counters", "fuzzer")}

# A round, after which its executions count; inputs are longer than any of them is read.
ROUND = 50_000
LONGEST_INPUT = 192
MOST_SECONDS_PER_INPUT = 20
SEEDS_PER_TARGET = 12
MOST_CANDIDATES = 400

# Swift allocates much in each call: remembering where costs more than the call. Leaks have a suite of their own.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=4:malloc_context_size=0:allocator_may_return_null=1"}


class UnavailableError(Exception):
    """Why there is no fuzzing here, in words for the person at the keyboard."""


@dataclass(frozen=True)
class Outcome:
    """What a run did: how often it executed its target, and what it printed before the first finding, if there is one."""

    executions: int
    finding: str = ""


def find_clang() -> str:
    """The clang of the Swift toolchain, if it has libFuzzer, as that of Xcode has not."""
    if sys.platform != "linux":
        raise UnavailableError("fuzzing is set up for Linux only")
    try:
        clang = Path(build_library.find_swift()).resolve().with_name("clang")
    except build_library.BuildError as error:
        raise UnavailableError(str(error)) from None
    name = f"libclang_rt.fuzzer-{platform.machine()}.a"
    answer = subprocess.run([clang, f"-print-file-name={name}"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if not Path(answer.stdout.strip()).is_file():
        raise UnavailableError(f"the toolchain of {clang} has no {name}")
    return str(clang)


def folder_of(build: str) -> Path:
    """Where a build's programs are."""
    return SCRATCH / "targets" / build


def build_targets(build: str = "sanitized") -> None:
    """Build the library with counters, and the targets; quick if nothing changed.

    Targets are not instrumented: what guides a fuzzer is where the library goes.
    """
    clang = find_clang()
    sanitizer, sanitizers = BUILDS[build]
    library = build_library.build_library(sanitizer=sanitizer)
    digest = hashlib.sha256(clang.encode() + library.read_bytes())
    for path in [*sorted(SOURCES.glob("*.[ch]")), ROOT / "include" / "mfa.h"]:
        digest.update(path.read_bytes())
    folder = folder_of(build)
    stamp = folder / "stamp"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    folder.mkdir(parents=True, exist_ok=True)
    # SwiftPM replaces its library, while runs may be using it.
    library = Path(shutil.copy2(library, folder))
    compiler = [clang, "-std=gnu17", "-O2", "-g1", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "include")]
    if build == "sanitized":
        compiler.append("-DPOISONED")
    for target in TARGETS:
        sources = [str(SOURCES / f"fuzz_{target}.c"), str(SOURCES / "fuzzing.c")]
        objects = [str(folder / f"{target}_{n}.o") for n in range(len(sources))]
        for source, made in zip(sources, objects, strict=True):
            subprocess.run([*compiler, "-c", source, "-o", made], check=True)
        linker = [f"-fsanitize={sanitizers}", "-fuse-ld=lld", str(library), "-Wl,-rpath,$ORIGIN", "-lm"]
        subprocess.run([clang, *objects, *linker, "-o", str(program(target, build))], check=True)
        count_file(target, build).unlink(missing_ok=True)
    stamp.write_text(digest.hexdigest())


def program(target: str, build: str = "sanitized") -> Path:
    """The executable of a target."""
    return folder_of(build) / f"fuzz_{target}"


def grown(target: str) -> Path:
    """The folder for inputs that runs have added."""
    folder = SCRATCH / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def count_file(target: str, build: str) -> Path:
    """Where runs count their executions. Each target has a file of its own, so that several may run at once."""
    return folder_of(build) / f"executions-{target}.json"


def executed(target: str, build: str) -> int:
    """How often a target was executed since it was built."""
    place = count_file(target, build)
    return int(json.loads(place.read_text())) if place.exists() else 0


def call(target: str, *arguments: str | Path, build: str = "sanitized") -> subprocess.CompletedProcess[str]:
    """Run a target's program and keep what it prints."""
    command = [str(program(target, build)), *map(str, arguments)]
    variables = {**os.environ, **ENVIRONMENT}
    for name in ("MFA_KERNELS", "MFA_NUM_THREADS"):
        variables.pop(name, None)
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=variables
    )


def run(target: str, executions: int, seconds: float = 0, keep: bool = True, build: str = "sanitized") -> Outcome:
    """Execute a target so often, on its seeds and on inputs made from them.

    Parameters
    ----------
    target
        One of `TARGETS`.
    executions
        How often at least; 0: the seeds alone, once.
    seconds
        After which to stop all the same; 0: never.
    keep
        Whether inputs that reach something new are kept for later runs.
    build
        One of `BUILDS`.

    Returns
    -------
    Outcome
        The executions, and the first finding.
    """
    FINDINGS.mkdir(parents=True, exist_ok=True)
    # The first folder gets what is new.
    with tempfile.TemporaryDirectory() as unkept:
        answer = call(
            target,
            f"-runs={executions}",
            f"-max_total_time={int(seconds)}",
            f"-max_len={LONGEST_INPUT}",
            f"-timeout={MOST_SECONDS_PER_INPUT}",
            "-len_control=0",
            "-entropic=0",
            "-detect_leaks=0",
            "-print_final_stats=1",
            "-verbosity=1",
            f"-artifact_prefix={FINDINGS}/{target}-",
            grown(target) if keep else unkept,
            SEEDS / target,
            build=build,
        )
    units = re.search(r"number_of_executed_units:\s+(\d+)", answer.stderr)
    count = int(units[1]) if units else 0
    if answer.returncode == 0:
        return Outcome(count)
    return Outcome(count, "\n".join(line for line in answer.stderr.splitlines() if not re.match(r"#\d+\s", line)))


def run_rounds(target: str, executions: int, build: str = "sanitized") -> Outcome:
    """Execute a target so often, counting round by round, so that nothing is lost if somebody stops it."""
    done = 0
    while done < executions:
        outcome = run(target, min(ROUND, executions - done), build=build)
        count_file(target, build).write_text(json.dumps(executed(target, build) + outcome.executions))
        done += outcome.executions
        print(f"{target}: {done:,} of {executions:,} executions", flush=True)
        if outcome.finding:
            return Outcome(done, outcome.finding)
    return Outcome(done)


@dataclass
class Reached:
    """How many functions of a part of the library were entered, and edges of control flow taken, of how many."""

    functions: int = 0
    all_functions: int = 0
    edges: int = 0
    all_edges: int = 0


def coverage() -> dict[str, Reached]:
    """How much of each part of the library the corpora reach, by the plain build, whose kernels have no edges of sanitizers.

    A function that is compiled several times, as those of kernels are for each instruction set, counts once, as far as the version reaches
    that reaches furthest: no processor runs all. Edges without a line of source do not count where they were not taken: those are the traps
    that the compiler puts behind every sum and index in Swift.
    """
    functions: dict[tuple[str, str], tuple[int, int]] = {}
    for target in TARGETS:
        listing = call(target, "-runs=0", "-print_coverage=1", "-detect_leaks=0", grown(target), SEEDS / target, build="plain").stderr
        for entry in re.split(r"^(?=(?:UN)?COVERED_FUNC:)", listing, flags=re.M)[1:]:
            head = re.match(r"\w+: hits: \d+ edges: (\d+)/(\d+) (\S+) (.+?)(:\d+)*$", entry, flags=re.M)
            if head is None:
                continue
            key = (os.path.normpath(os.path.relpath(head[4], ROOT)), head[3])
            traps = len(re.findall(r"UNCOVERED_PC: .*:0$", entry, flags=re.M))
            # Two targets may reach different edges of a function; then this is the lower bound of what both reach.
            functions[key] = max(functions.get(key, (-1, 0)), (int(head[1]), int(head[2]) - traps))
    sums = {part: Reached() for part in PARTS}
    for (source, _), (taken, edges) in functions.items():
        for part, reached in sums.items():
            if source.startswith(part + "/"):
                reached.functions += taken > 0
                reached.all_functions += 1
                reached.edges += taken
                reached.all_edges += edges
    return sums


def choose_seeds(target: str) -> None:
    """Replace the seeds by a few inputs that reach the most, found one by one; what was a finding once stays."""
    scratch = SCRATCH / "seeds" / target
    shutil.rmtree(scratch, ignore_errors=True)
    control, kept, candidates = scratch / "control", scratch / "kept", scratch / "candidates"
    kept.mkdir(parents=True)
    candidates.mkdir()
    inputs = sorted([*grown(target).iterdir(), *(SEEDS / target).glob("seed-*")])
    for path in random.Random(0).sample(inputs, min(len(inputs), MOST_CANDIDATES)):
        shutil.copy(path, candidates)
    call(target, "-merge=1", f"-merge_control_file={control}", f"-max_len={LONGEST_INPUT}", kept, candidates)
    lines = control.read_text().splitlines()
    count, first = int(lines[0]), 2
    files = [Path(line) for line in lines[first : first + count]]
    features = {int(line.split()[1]): set(line.split()[2:]) for line in lines[first + count :] if line.startswith("FT ")}
    chosen: list[Path] = []
    while features and len(chosen) < SEEDS_PER_TARGET:
        best = max(features, key=lambda n: len(features[n]))
        taken = features.pop(best)
        chosen.append(files[best])
        for rest in features.values():
            rest -= taken
    contents = [path.read_bytes() for path in chosen]
    folder = SEEDS / target
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("seed-*"):
        path.unlink()
    for content in contents:
        (folder / f"seed-{hashlib.sha256(content).hexdigest()[:12]}").write_bytes(content)


def write_record() -> None:
    """Put what the present targets have counted, and the coverage that their corpora reach, into the record of fuzzing by hand."""
    sys.path.insert(0, str(ROOT / "tests" / "assurance"))
    import figures  # type: ignore[import-not-found]  # tests are not checked for types

    reached = {}
    for part, counts in coverage().items():
        reached[f"functions reached in {part}"] = f"{counts.functions:,} of {counts.all_functions:,}"
        share = 100 * counts.edges / max(counts.all_edges, 1)
        reached[f"edges reached in {part}"] = f"{counts.edges:,} of {counts.all_edges:,} ({share:.0f} %)"
    counted = {(build, target): executed(target, build) for build in BUILDS for target in TARGETS}
    sanitized = sum(count for (build, _), count in counted.items() if build == "sanitized")
    findings = len([path for path in FINDINGS.glob("*") if path.is_file()])
    inputs = sum(len(list(grown(target).iterdir())) for target in TARGETS)
    figures.record(
        "fuzzing",
        by_hand=True,
        executions=sum(counted.values()),
        **{"of these under sanitizers": sanitized},
        **{f"executions of {target}": sum(counted[build, target] for build in BUILDS) for target in TARGETS},
        **{"inputs kept for what they reach": inputs, "findings that are open": findings},
        **reached,
    )


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description="Fuzz libmfa.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} (default: all)")
    parser.add_argument("--executions", type=int, default=100_000, help="of each target (default: 100000)")
    parser.add_argument("--plain", action="store_true", help="without sanitizers: several times as fast, and blind to reads outside memory")
    parser.add_argument("--reproduce", type=Path, metavar="FILE", help="run this input alone, and show what happens")
    parser.add_argument("--seeds", action="store_true", help="choose the seeds anew, instead of running")
    parser.add_argument("--record", action="store_true", help="write the record of what was run, instead of running")
    options = parser.parse_args()
    targets = options.targets or TARGETS
    build = "plain" if options.plain else "sanitized"
    unknown = set(targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target is called {', '.join(sorted(unknown))}: there are {', '.join(TARGETS)}")
    if options.record:
        write_record()
        return 0
    try:
        build_targets(build)
    except (UnavailableError, build_library.BuildError) as error:
        sys.exit(f"fuzz: {error}")
    if options.reproduce:
        answer = call(targets[0], f"-timeout={MOST_SECONDS_PER_INPUT}", options.reproduce, build=build)
        print(answer.stderr)
        return answer.returncode
    if options.seeds:
        for target in targets:
            choose_seeds(target)
        return 0
    found = False
    for target in targets:
        outcome = run_rounds(target, options.executions, build)
        if outcome.finding:
            found = True
            print(f"{target} found something; the input is in {FINDINGS}:\n{outcome.finding}")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
