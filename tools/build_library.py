"""Build libmfa, the shared library behind include/mfa.h.

The one place that knows the linker's flags: just, and the build hook of the Python package, both come here. Run as a program it prints the
path of the library.

    python tools/build_library.py [--configuration release|debug] [--scratch-path FOLDER] [--sanitize NAME]

Names of sanitizers are address, thread, undefined, and for tools/fuzz.py fuzzing and counters. A library that is built so is for tests. The
program that loads it has to have the sanitizer's runtime already: `sanitizer_runtime()` says which, for LD_PRELOAD.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_SWIFT = (6, 3)
LIBRARY_NAME = "libmfa.dylib" if sys.platform == "darwin" else "libmfa.so"

# Kernels are C: vectorised harder than SwiftPM's -O2, and free of errno, which nobody reads. Nothing that changes results.
KERNEL_FLAGS = ["-Xcc", "-O3", "-Xcc", "-fno-math-errno"]

# For fuzzing, counters on every edge, and in Swift, where arguments are checked, operands of comparisons. libFuzzer knows counters of this
# kind only, which Swift has no word for; nor may Swift link libFuzzer, which is the program's.
SWIFT_COUNTERS = [
    *("-Xswiftc", "-Xfrontend", "-Xswiftc", "-sanitize-coverage=edge,trace-cmp", "-Xswiftc", "-gline-tables-only"),
    *("-Xswiftc", "-Xllvm", "-Xswiftc", "-sanitizer-coverage-inline-8bit-counters"),
    *("-Xswiftc", "-Xllvm", "-Xswiftc", "-sanitizer-coverage-pc-table"),
]
KERNEL_COUNTERS = ["-Xcc", "-fsanitize=fuzzer-no-link", "-Xcc", "-fno-sanitize-coverage=trace-cmp", "-Xcc", "-g1"]
# Kernels under several sanitizers are compiled without much optimisation, lest that take minutes; what is left out of "undefined" is what
# "address" finds, and costs most.
CHECKED_KERNEL_COUNTERS = [
    *("-Xcc", "-fsanitize=fuzzer-no-link,undefined", "-Xcc", "-fsanitize-trap=undefined", "-Xcc", "-fno-sanitize-coverage=trace-cmp"),
    *("-Xcc", "-fno-sanitize=null,pointer-overflow,alignment,object-size", "-Xcc", "-O1", "-Xcc", "-g1"),
]

# What SwiftPM is told, and the runtime. Undefined behaviour is C's alone, since Swift traps by itself.
SANITIZERS = {
    "address": (["--sanitize", "address", "-Xcc", "-fno-omit-frame-pointer"], "asan"),
    "thread": (["--sanitize", "thread"], "tsan"),
    "undefined": (["-Xcc", "-fsanitize=undefined", "-Xcc", "-fno-sanitize-recover=undefined"], "ubsan_standalone"),
    "fuzzing": (["--sanitize", "address", *CHECKED_KERNEL_COUNTERS, *SWIFT_COUNTERS], "asan"),
    "counters": (["-Xswiftc", "-Xfrontend", "-Xswiftc", "-sanitize=fuzzer", *KERNEL_COUNTERS, *SWIFT_COUNTERS], ""),
}


class BuildError(Exception):
    """Why the library could not be built, in words for the person at the keyboard."""


def find_swift() -> str:
    """The path of a Swift compiler that is new enough.

    Raises
    ------
    BuildError
        If there is none.
    """
    wanted = ".".join(map(str, MINIMUM_SWIFT))
    swift = shutil.which("swift")
    if swift is None:
        raise BuildError(f"libmfa needs Swift >= {wanted}, and there is no `swift` on PATH: see https://swift.org/install")
    answer = subprocess.run([swift, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    match = re.search(r"Swift version (\d+)\.(\d+)", answer.stdout)
    if match is None:
        raise BuildError(f"`{swift} --version` does not name a version: {(answer.stdout + answer.stderr).strip()!r}")
    if (int(match[1]), int(match[2])) < MINIMUM_SWIFT:
        raise BuildError(f"libmfa needs Swift >= {wanted}, and {swift} is {match[1]}.{match[2]}: see https://swift.org/install")
    return swift


def sanitizer_runtime(sanitizer: str) -> Path:
    """The shared library with the runtime of a sanitizer, from the toolchain that `find_swift()` finds.

    Raises
    ------
    BuildError
        If there is none.
    """
    swift = Path(find_swift()).resolve()
    name = f"libclang_rt.{SANITIZERS[sanitizer][1]}-{platform.machine()}.so"
    answer = subprocess.run(
        [swift.with_name("clang"), f"-print-file-name={name}"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    runtime = Path(answer.stdout.strip())
    if not runtime.is_absolute() or not runtime.is_file():
        raise BuildError(f"the toolchain of {swift} has no {name}")
    return runtime


def linker_flags(configuration: str, sanitizer: str = "") -> list[str]:
    """What `swift build` has to tell the linker, on this system."""
    if sys.platform == "darwin":
        # The counterpart of the version script. macOS has the Swift runtime and resolves symbols eagerly by itself. Not yet run on a Mac.
        return ["-Xlinker", "-exported_symbol", "-Xlinker", "_mfa_*", "-Xlinker", "-dead_strip"]
    # nodelete: worker threads outlive any dlclose(), so the library has to stay.
    # nostart-stop-gc: the Swift runtime finds its tables by the start and stop symbols of their sections, which nothing else refers to.
    words = [f"--version-script={ROOT / 'tools' / 'mfa.map'}", "-soname=libmfa.so", "-z", "nodelete"]
    if configuration == "release" and not sanitizer:
        # The symbols of a sanitizer are undefined until its runtime is loaded.
        words += ["--gc-sections", "-z", "nostart-stop-gc", "-z", "defs"]
    # The toolchain's own linker. Besides being there wherever Swift is, it lists no private symbol in the library's dynamic table.
    return ["-Xswiftc", "-static-stdlib", "-Xswiftc", "-use-ld=lld", *(flag for word in words for flag in ("-Xlinker", word))]


def build_library(configuration: str = "release", scratch_path: str | Path | None = None, sanitizer: str = "") -> Path:
    """Build libmfa with SwiftPM; quick if nothing changed.

    Parameters
    ----------
    configuration
        ``"release"`` or ``"debug"``.
    scratch_path
        Folder for what SwiftPM makes; ``.build`` at the repository's root by default, ``.build-address`` and the like with a sanitizer.
    sanitizer
        A key of `SANITIZERS`, or none.

    Returns
    -------
    Path
        The library. SwiftPM replaces it at the next build: copy or link it.

    Raises
    ------
    BuildError
        If Swift is missing or too old, or does not compile the library.
    """
    scratch = Path(scratch_path) if scratch_path is not None else ROOT / (f".build-{sanitizer}" if sanitizer else ".build")
    command = [find_swift(), "build", "--package-path", str(ROOT), "--scratch-path", str(scratch), "--configuration", configuration]
    command += ["--product", "mfa", *KERNEL_FLAGS, *linker_flags(configuration, sanitizer)]
    if sanitizer:
        command += SANITIZERS[sanitizer][0]
    # SwiftPM tells of its progress on standard output, which belongs to this program's answer.
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode != 0:
        raise BuildError("`swift build` failed; the messages above say why")
    answer = subprocess.run([*command, "--show-bin-path"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    library = Path(answer.stdout.strip()) / LIBRARY_NAME
    if not library.is_file():
        raise BuildError(f"`swift build` succeeded, but there is no library at {library}")
    return library


def main() -> None:
    """Build as the command line says, and print the library's path."""
    parser = argparse.ArgumentParser(description="Build libmfa and print its path.")
    parser.add_argument("--configuration", choices=["release", "debug"], default="release")
    parser.add_argument("--scratch-path", type=Path, help="folder for intermediate files (default: .build, with a sanitizer .build-NAME)")
    parser.add_argument("--sanitize", choices=list(SANITIZERS), default="", help="a library for tests, which watches itself")
    arguments = parser.parse_args()
    try:
        print(build_library(arguments.configuration, arguments.scratch_path, arguments.sanitize))
    except BuildError as error:
        sys.exit(f"build_library: {error}")


if __name__ == "__main__":
    main()
