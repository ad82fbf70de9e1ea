"""Build programs of Objective-C with MFABridge: its examples and those of its tests.

    python tools/build_objc.py [--run] [PROGRAM ...]

Builds the examples of objc/examples (or the programs that are named) into .build-objc and prints their paths, or runs them. libmfa is there
already: `./justw build`. On a Mac the framework Metal and ARC are used; this has not yet been run on one. On Linux Metal is objc/linux over
the software device, and Foundation is GNUstep's, which is installed by apt-get where that is possible; else a program cannot be built, and
the reason is told.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import build_softmetal
from check_kernels import LeftOutError, find_clang, install

ROOT = Path(__file__).resolve().parent.parent
OBJC = ROOT / "objc"
FOLDER = ROOT / ".build-objc"
EXAMPLES = ("quick_start", "attention")
LIBRARY = ROOT / "python" / "src" / "umfa" / ("libmfa.dylib" if sys.platform == "darwin" else "libmfa.so")
PACKAGES = ("gobjc", "libgnustep-base-dev", "gnustep-make")

FLAGS = ["-g", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
FLAGS += [f"-I{ROOT / 'include'}", f"-I{OBJC / 'MFABridge' / 'include'}"]


class BuildError(Exception):
    """Why something could not be built."""


def run(command: Sequence[str], text: str = "") -> str:
    """Run a command with a text as its input and return what it prints."""
    answer = subprocess.run(command, input=text, capture_output=True, text=True)
    if answer.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{answer.stderr.strip()}")
    return answer.stdout.strip()


def source_of(program: str) -> Path:
    """The main source of a program, by the folder or the name of its file."""
    for candidate in (OBJC / "examples" / program / "main.m", OBJC / "tests" / f"{program}.m"):
        if candidate.exists():
            return candidate
    raise BuildError(f"there is no program {program} in objc/examples or objc/tests")


def require() -> None:
    """See that all is there that programs need, and install what apt-get can.

    Raises
    ------
    LeftOutError
        If something is missing and cannot be installed here.
    """
    if not LIBRARY.exists():
        raise LeftOutError("needs libmfa: ./justw build")
    find_clang()
    if sys.platform == "darwin":
        return
    if not build_softmetal.LINK.exists():
        raise LeftOutError("needs the software Metal device: ./justw build")
    if not (shutil.which("gnustep-config") and shutil.which("gcc") and _runtime("include/objc/objc.h").exists()):
        install(*PACKAGES)


def _runtime(name: str) -> Path:
    """A file of GCC's, which has the run-time library of Objective-C that GNUstep uses."""
    return Path(run(["gcc", f"-print-file-name={name}"]))


def _blocks() -> tuple[Path, Path]:
    """The folder of <Block.h> and the library behind it, parts of Swift's toolchain."""
    for clang in (find_clang(), shutil.which("swift")):
        library = Path(clang).resolve().parent.parent / "lib" if clang else Path()
        header, archive = library / "swift" / "Block" / "Block.h", library / "swift_static" / "linux" / "libBlocksRuntime.a"
        if header.exists() and archive.exists():
            return header.parent, archive
    raise LeftOutError("needs the run-time library of blocks, which comes with Swift")


def linux_flags() -> list[str]:
    """What GNUstep and objc/linux ask of the compiler."""
    given = shlex.split(run(["gnustep-config", "--objc-flags"]))
    flags = [flag for flag in given if flag.startswith(("-D", "-f"))] + ["-pthread", "-fblocks", f"-I{OBJC / 'linux'}"]
    flags += [f"-I{ROOT / 'core' / 'SoftMetal' / 'Loader' / 'include'}"]
    for flag in given:
        if flag.startswith("-I") and Path(flag[2:]).is_absolute() and Path(flag[2:]).exists():
            flags += ["-isystem", flag[2:]]
    # GCC's folder has headers of the compiler too, which must not stand before clang's.
    return [*flags, "-idirafter", str(_runtime("include")), "-idirafter", str(_blocks()[0])]


def check_arc(source: Path) -> None:
    """Compile a source with ARC, which GCC's run-time library does not have: nothing is made of it.

    Raises
    ------
    BuildError
        With what the compiler says.
    """
    command = [find_clang(), *FLAGS, "-fobjc-arc"]
    if sys.platform == "darwin":
        run([*command, "-fsyntax-only", str(source)])
        return
    command += [*linux_flags(), "-fobjc-runtime=gnustep-2.0"]
    # An inline function of GCC's headers looks into an object, which ARC forbids.
    text = run([*command, "-E", str(source)]).replace("return object->class_pointer;", "return 0;")
    run([*command, "-Wno-unused-command-line-argument", "-fsyntax-only", "-x", "objective-c-cpp-output", "-"], text)


def build(program: str, *, sanitizer: str = "") -> Path:
    """Build a program.

    Parameters
    ----------
    program
        The folder of an example, or the name of a test's file.
    sanitizer
        ``"address"`` or none.

    Returns
    -------
    Path
        The program.

    Raises
    ------
    LeftOutError
        If something is missing here.
    BuildError
        If a source does not compile.
    """
    require()
    FOLDER.mkdir(exist_ok=True)
    made = FOLDER / f"{program}{f'-{sanitizer}' if sanitizer else ''}"
    sources = [OBJC / "MFABridge" / "MFABridge.m", source_of(program)]
    flags = [*FLAGS, *([f"-fsanitize={sanitizer}"] if sanitizer else [])]
    if sys.platform == "darwin":
        libraries = ["-framework", "Foundation", "-framework", "Metal", f"-L{LIBRARY.parent}", "-lmfa"]
        libraries.append(f"-Wl,-rpath,{LIBRARY.parent}")
        # Programs of tests count references by themselves.
        if program in EXAMPLES:
            flags.append("-fobjc-arc")
    else:
        sources.append(OBJC / "linux" / "Metal.m")
        flags += [*linux_flags(), "-fobjc-runtime=gcc"]
        # Side by side, as libmfa looks for the device; the program then has the same one.
        for library in (LIBRARY, build_softmetal.LINK):
            link = FOLDER / library.name
            if not (link.is_symlink() and link.resolve() == library.resolve()):
                link.unlink(missing_ok=True)
                link.symlink_to(library.resolve())
        libraries = [f"-L{FOLDER}", "-lmfa", "-lsoftmetal", "-Wl,-rpath,$ORIGIN", "-fuse-ld=lld", f"-L{_runtime('libgcc.a').parent}"]
        # The functions of blocks come first: GNUstep has some of the same names, which copy nothing.
        libraries += [str(_blocks()[1]), "-lgnustep-base", "-lobjc", "-lm", "-pthread"]
    partial = made.with_name(f"{made.name}.{os.getpid()}")
    run([find_clang(), *flags, *map(str, sources), "-o", str(partial), *libraries])
    partial.replace(made)
    return made


def main() -> None:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description="Build programs of Objective-C with MFABridge.")
    parser.add_argument("program", nargs="*", help=f"default: {' '.join(EXAMPLES)}")
    parser.add_argument("--run", action="store_true", help="run what was built")
    arguments = parser.parse_args()
    try:
        for program in arguments.program or EXAMPLES:
            made = build(program)
            if not arguments.run:
                print(made)
            elif subprocess.run([made], stdin=subprocess.DEVNULL).returncode != 0:
                sys.exit(f"build_objc: {program} failed")
    except (LeftOutError, BuildError) as error:
        sys.exit(f"build_objc: {error}")


if __name__ == "__main__":
    main()
