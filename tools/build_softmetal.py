"""Build libsoftmetal, the software Metal device, and softmetal-replay. Linux only.

    python tools/build_softmetal.py [--sanitizer address|thread]

Translates the kernels of core/MetalBackend/Kernels, compiles them with the executor of core/SoftMetal, and prints the path of what it made:
the library, with a link beside the libmfa that Python uses; with a sanitizer, softmetal-replay. Objects are kept under .build-softmetal by
what they are made of, so nothing is stale and nothing is compiled twice.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from metal_translator import MissingCompilerError, TranslationError, check_address_spaces, compiler, flatten, translate

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "core" / "SoftMetal"
KERNELS = ROOT / "core" / "MetalBackend" / "Kernels"
FOLDER = ROOT / ".build-softmetal"
LINK = ROOT / "python" / "src" / "umfa" / "libsoftmetal.so"

# The library runs where it was built.
FLAGS = ["-std=c++20", "-g", "-fPIC", "-fvisibility=hidden", "-march=native", "-Wall", "-Wextra", "-Werror"]
if platform.machine() == "x86_64":
    # Half precision is rounded at each operation, as on a GPU; arm64 does nothing else.
    FLAGS.append("-fexcess-precision=16")
KERNEL_FLAGS = ["-nostdinc++", "-ffp-contract=off", "-Wno-unused-function", "-Wno-unused-const-variable", "-Wno-unused-parameter"]
SANITIZERS = {"": ["-O2", "-fno-math-errno"], "address": ["-O1", "-fsanitize=address"], "thread": ["-O1", "-fsanitize=thread"]}


class BuildError(Exception):
    """Why something could not be built."""


def run(command: list[str]) -> None:
    """Run a compiler."""
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if answer.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{answer.stderr.strip()}")


def headers_digest() -> str:
    """A digest of everything that any object includes."""
    digest = hashlib.sha256()
    for path in sorted(CORE.rglob("*")):
        if path.is_file() and path.suffix != ".cpp":
            digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_object(text: str, name: str, flags: list[str]) -> Path:
    """The object of a C++ text, compiled now or before."""
    command = [compiler(), *FLAGS, "-I", str(CORE / "Loader" / "include"), "-I", str(CORE / "Executor"), *flags]
    key = hashlib.sha256("\0".join([*command, headers_digest(), text]).encode()).hexdigest()[:24]
    folder = FOLDER / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{key}-{name}.o"
    if not made.exists():
        source = folder / f"{key}-{name}.{os.getpid()}.{threading.get_ident()}.cpp"
        source.write_text(text, encoding="utf-8")
        partial = source.with_suffix(".o")
        try:
            run([*command, "-c", str(source), "-o", str(partial)])
            partial.replace(made)
        finally:
            source.unlink()
    return made


def kernel_sources() -> dict[str, str]:
    """The flattened sources of all kernels, by their files' names."""
    return {path.name: flatten(path) for path in sorted(KERNELS.glob("*.metal"))}


def build(output: Path, sources: Mapping[str, str], *, sanitizer: str = "", program: bool = False) -> Path:
    """Build a device that has the kernels of some sources.

    Parameters
    ----------
    output
        The library, or the program softmetal-replay.
    sources
        Flattened texts by name.
    sanitizer
        ``"address"``, ``"thread"`` or none.
    program
        Whether to make the program.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    BuildError, metal_translator.TranslationError
        If a source is not legal or does not compile.
    """
    flags = SANITIZERS[sanitizer]
    # ThreadSanitizer is to look at kernels, not at what switches between their fibers.
    executor_flags = ["-O2", "-DSOFTMETAL_THREAD_SANITIZER"] if sanitizer == "thread" else flags
    names = ["executor.cpp", "dispatch.cpp", "objects.cpp", *(["replay.cpp"] if program else [])]
    jobs = [((CORE / "Executor" / name).read_text(encoding="utf-8"), Path(name).stem, executor_flags) for name in names]
    for name, text in sources.items():
        jobs.append((translate(text, name), Path(name).stem, ["-I", str(CORE / "Headers"), *KERNEL_FLAGS, *flags]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check_address_spaces, sources.values(), sources))
        objects = list(pool.map(lambda job: compile_object(*job), jobs))
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    linked = ["-pthread"] if program else ["-shared", "-pthread", "-Wl,-z,defs"]
    if sanitizer == "thread":
        # The sanitizer's run-time of Swift's toolchain is made of parts of libdispatch.
        runtime = Path(compiler()).resolve().parent.parent / "lib" / "swift" / "linux"
        if runtime.is_dir():
            linked += [f"-L{runtime}", f"-Wl,-rpath,{runtime}", "-ldispatch", "-lBlocksRuntime"]
    run([compiler(), *flags, *map(str, objects), *linked, "-o", str(partial)])
    partial.replace(output)
    return output


def build_library() -> Path:
    """Build libsoftmetal with the kernels of the backend, and link it where libmfa looks for it."""
    library = build(FOLDER / "libsoftmetal.so", kernel_sources())
    if not (LINK.is_symlink() and LINK.resolve() == library.resolve()):
        LINK.unlink(missing_ok=True)
        LINK.symlink_to(library)
    return library


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description="Build the software Metal device.")
    parser.add_argument("--sanitizer", choices=["address", "thread"], default="")
    sanitizer = parser.parse_args().sanitizer
    if sys.platform != "linux":
        sys.exit("build_softmetal: the software Metal device is for Linux; a Mac has the real one")
    try:
        if sanitizer:
            print(build(FOLDER / f"softmetal-replay-{sanitizer}", kernel_sources(), sanitizer=sanitizer, program=True))
        else:
            print(build_library())
    except MissingCompilerError as error:
        # A tool for development: all else works without.
        print(f"build_softmetal: {error}", file=sys.stderr)
    except (BuildError, TranslationError) as error:
        sys.exit(f"build_softmetal: {error}")


if __name__ == "__main__":
    main()
