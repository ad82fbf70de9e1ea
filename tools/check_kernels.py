"""Check the kernels of core/CPUKernels: those of this processor where they run, those of others under emulation.

What this machine cannot execute is compiled for whom it is meant and executed by an emulator, instruction by instruction:

- kernels for arm64 by qemu-aarch64, statically linked;
- kernels for AVX-512 and AVX-VNNI by Bochs, an emulator of whole PCs, which neither qemu nor valgrind can stand in for. The program gets a
  PC of its own, whose firmware is tests/kernels/bare_pc.S.

Each runs tests/kernels/check_kernels.c, which holds kernels to the portable FP64 reference kernels. Emulators and libraries that are not
there are installed by apt-get where that is possible; else a part is left out, and says why.

    python tools/check_kernels.py [native | arm64 | x86-64 ...] [--times FACTOR] [--sanitize] [--kernels NAME,NAME…] [--first NUMBER]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "core" / "CPUKernels"
PROGRAM = ROOT / "tests" / "kernels"
SCRATCH = ROOT / ".build" / "check-kernels"

# Those of tools/build_library.py: what is checked is what is built.
KERNEL_FLAGS = ["-std=gnu17", "-O3", "-fno-math-errno"]
PROGRAM_FLAGS = ["-std=gnu17", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]

# How much a part does: the number of problems, and about the multiplications of each.
NATIVE_PROBLEMS, NATIVE_WORK = 200, 4_000_000
EMULATED_PROBLEMS, EMULATED_WORK = 56, 300_000

# Beyond this a program has lost its way.
MOST_SECONDS = 3600

PARTS = ("native", "arm64", "x86-64")

# One part at a time: it takes all processors, and another may need the same objects.
COMPILING = threading.Lock()


class LeftOutError(Exception):
    """Why a part cannot run here, in words for the person at the keyboard."""


class CheckError(Exception):
    """What went wrong."""


@dataclass(frozen=True)
class Outcome:
    """What became of a part: "passed", "failed" or "left out", in `words` where and why, and what the program printed."""

    part: str
    state: str
    words: str
    output: str = ""


def run(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without input and keep what it prints."""
    words = [str(word) for word in command]
    variables = {**os.environ, **environment}
    try:
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=variables, timeout=MOST_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CheckError(f"{shlex.join(words)} did not end within {MOST_SECONDS} s") from None


# ---- Compiling ---------------------------------------------------------------------------------------------------------------------------


def find_clang() -> str:
    """Clang on PATH, or that beside the Swift compiler."""
    clang = shutil.which("clang")
    if clang:
        return clang
    swift = shutil.which("swift")
    beside = Path(swift).resolve().with_name("clang") if swift else None
    if beside is None or not beside.exists():
        raise LeftOutError("needs clang, which comes with Swift")
    return str(beside)


@functools.cache
def sources_digest() -> str:
    """Changes with any source that a part is compiled from."""
    digest = hashlib.sha256()
    for folder in (KERNELS, PROGRAM):
        for path in sorted(folder.rglob("*.[chS]")):
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


def instruction_set(source: Path) -> str:
    """The last word of the name of a kernel's file, such as "avx512vnni"."""
    return source.stem.rpartition("_")[2]


def call(*command: str | Path) -> None:
    """Run a tool that must succeed."""
    answer = run(command)
    if answer.returncode != 0:
        raise CheckError(f"{shlex.join(map(str, command))}\n{answer.stderr.strip()}")


@dataclass(frozen=True)
class Build:
    """A way to compile the program with all kernels.

    Attributes
    ----------
    name
        The folder for the program.
    flags, linker_flags
        For compiling, and for linking.
    for_bochs
        Bochs knows the encodings of AVX-512 only: vpdpbusd and its like of AVX-VNNI are assembled with those. It does not decode gathers
        and scatters by index registers above the 15th: the compiler makes none.
    """

    name: str
    flags: tuple[str, ...] = ()
    linker_flags: tuple[str, ...] = ()
    for_bochs: bool = False

    def compile(self) -> Path:
        """The program. Objects are kept until a source changes."""
        sources = [*sorted(KERNELS.rglob("*.c")), *sorted(PROGRAM.glob("*.c"))]
        with COMPILING, ThreadPoolExecutor(os.cpu_count()) as pool:
            folder = objects_folder()
            objects = list(pool.map(lambda source: self._compile_file(source, folder), sources))
        program = SCRATCH / self.name / "check_kernels"
        program.parent.mkdir(parents=True, exist_ok=True)
        linker = [] if sys.platform == "darwin" else ["-fuse-ld=lld"]
        unfinished = program.with_suffix(f".{threading.get_ident()}")  # another part may be running the program meanwhile
        call(find_clang(), *self.flags, *self.linker_flags, *linker, *objects, "-lm", "-lpthread", "-o", unfinished)
        unfinished.replace(program)
        return program

    def _compile_file(self, source: Path, folder: Path) -> Path:
        flags = [*self.flags, *(PROGRAM_FLAGS if source.parent == PROGRAM else KERNEL_FLAGS)]
        if self.for_bochs and instruction_set(source).startswith("avx512"):
            flags += ["-mno-gather", "-mno-scatter"]
        encoded_anew = self.for_bochs and instruction_set(source) == "avxvnni"
        key = hashlib.sha256(f"{find_clang()} {flags} {encoded_anew} {source}".encode()).hexdigest()[:16]
        made = folder / f"{source.stem}-{key}.o"
        if made.exists():
            return made
        command: list[str | Path] = [find_clang(), *flags, "-I", KERNELS, "-I", KERNELS / "include", source]
        if encoded_anew:
            assembly = made.with_suffix(".s")
            call(*command, "-S", "-o", assembly)
            assembly.write_text(assembly.read_text().replace("{vex}", "{evex}"))
            command = [find_clang(), *self.flags, assembly]
        unfinished = made.with_suffix(f".{os.getpid()}")
        call(*command, "-c", "-o", unfinished)
        unfinished.replace(made)
        return made


def objects_folder() -> Path:
    """Where objects of the present sources are; those of others are removed."""
    folder = SCRATCH / "objects"
    present = folder / sources_digest()[:16]
    if not present.exists():
        shutil.rmtree(folder, ignore_errors=True)
        present.mkdir(parents=True, exist_ok=True)
    return present


# ---- Installing --------------------------------------------------------------------------------------------------------------------------


def install(*patterns: str) -> None:
    """Install the newest Debian package of each pattern.

    Raises
    ------
    LeftOutError
        If that is impossible here.
    """
    names = " ".join(patterns)
    if shutil.which("apt-get") is None:
        raise LeftOutError(f"needs {names} (Debian's names), and there is no apt-get")
    if os.geteuid() != 0:
        raise LeftOutError(f"needs {names}: needs root for apt-get")
    impatience = ["-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=0"]
    run(["apt-get", "update", *impatience])
    chosen = []
    for pattern in patterns:
        found = re.findall(r"^(\S+) - ", run(["apt-cache", "search", "--names-only", f"^{pattern}$"]).stdout, flags=re.M)
        if not found:
            raise LeftOutError(f"needs {pattern}, which apt-get does not find")
        chosen.append(max(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]))
    answer = run(["apt-get", "install", "--yes", "--no-install-recommends", *impatience, *chosen], DEBIAN_FRONTEND="noninteractive")
    if answer.returncode != 0:
        raise LeftOutError(f"needs {names}, which apt-get does not install: {answer.stderr.strip().splitlines()[-1:]}")


def find_program(names: Sequence[str], *patterns: str) -> str:
    """One of the programs, installed if it is not there."""
    for attempt in range(2):
        for name in names:
            found = shutil.which(name)
            if found:
                return found
        if attempt == 0:
            install(*patterns)
    raise LeftOutError(f"needs {names[0]}")


def links(flags: Sequence[str]) -> bool:
    """Whether a program with a C library can be linked with these flags."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    source = SCRATCH / "links.c"
    source.write_text('#include <math.h>\n#include <stdio.h>\nint main(int n, char** v) { return printf("%g", exp(n + !v)) < 0; }\n')
    return run([find_clang(), *flags, "-fuse-ld=lld", source, "-lm", "-o", source.with_suffix("")]).returncode == 0


# ---- Emulators ---------------------------------------------------------------------------------------------------------------------------

IMAGE_ADDRESS = 0x100000
STACK_BYTES = 8 << 20


def bare_image(program: bytes, arguments: Sequence[str]) -> bytes:
    """What tests/kernels/bare_pc.S expects at 1 MiB: a header, the segments of a static program, its stack with its arguments."""
    entry, headers = struct.unpack_from("<QQ", program, 24)
    header_bytes, header_count = struct.unpack_from("<HH", program, 54)
    segments = [struct.unpack_from("<IIQQQQQQ", program, headers + n * header_bytes) for n in range(header_count)]
    loaded = [segment for segment in segments if segment[0] == 1]
    end = max(address + size for _, _, _, address, _, _, size, _ in loaded)
    stack = (end + STACK_BYTES) & ~0xFFF
    image = bytearray(stack + 0x10000 - IMAGE_ADDRESS)
    for _, _, offset, address, _, size, _, _ in loaded:
        image[address - IMAGE_ADDRESS : address - IMAGE_ADDRESS + size] = program[offset : offset + size]
    # The stack of a new process: arguments, environment, and of the auxiliary vector the size of a page and sixteen random bytes.
    texts, addresses = bytearray(), []
    for argument in arguments:
        addresses.append(stack + 0x1000 + len(texts))
        texts += argument.encode() + b"\0"
    random_bytes = stack + 0x1000 + len(texts)
    texts += bytes(range(16))
    page_size, random = 6, 25
    words = [len(arguments), *addresses, 0, 0, page_size, 4096, random, random_bytes, 0, 0]
    for place, data in ((stack, struct.pack(f"<{len(words)}Q", *words)), (stack + 0x1000, texts)):
        image[place - IMAGE_ADDRESS : place - IMAGE_ADDRESS + len(data)] = data
    image[:24] = struct.pack("<3Q", entry, stack, stack + 0x10000)
    return bytes(image)


BOCHS_SETTINGS = """
cpu: model=tigerlake, count=1, ips=100000000, reset_on_triple_fault=0
memory: guest=512, host=512
romimage: file={folder}/firmware, address=0xffff0000
vgaromimage: file={folder}/no_firmware
vga: extension=none
optramimage1: file={folder}/image, address=0x100000
port_e9_hack: enabled=1
clock: sync=none
display_library: term
log: {folder}/log
panic: action=fatal
error: action=ignore
info: action=report
debug: action=ignore
"""


def run_in_bochs(program: Path, arguments: Sequence[str], bochs: str) -> tuple[int, str]:
    """Run a static program on an emulated PC: its exit code and what it printed."""
    folder = program.parent
    firmware = folder / "firmware.o"
    call(find_clang(), "-c", PROGRAM / "bare_pc.S", "-o", firmware)
    lld = Path(find_clang()).resolve().with_name("ld.lld")
    call(lld, "-Ttext", "0xffff0000", "--oformat", "binary", "-e", "0", firmware, "-o", folder / "firmware")
    (folder / "no_firmware").write_bytes(bytes(512))
    (folder / "image").write_bytes(bare_image(program.read_bytes(), [program.name, *arguments]))
    (folder / "settings").write_text(BOCHS_SETTINGS.format(folder=folder))
    command: list[str | Path] = [bochs, "-q", "-f", folder / "settings"]
    usage = run([bochs, "--help"])
    if "-rc " in usage.stdout + usage.stderr:  # built with a debugger, which waits to be told to continue
        (folder / "debugger").write_text("continue\nquit\n")
        command += ["-rc", folder / "debugger"]
    # The display, which nobody looks at, wants to know a kind of terminal.
    answer = run(command, TERM="linux")
    match = re.search("\x02(.*)\x04(.)", answer.stdout, flags=re.S)
    if match:
        return ord(match[2]) - ord("0"), match[1]
    # It ended by a fault: what was printed before, and where.
    printed = answer.stdout.partition("\x02")[2]
    return 1, printed + "\nthe emulated processor stopped:\n" + "\n".join(
        re.findall(r"^.*(?:PANIC|RIP=).*$", (folder / "log").read_text(), flags=re.M)
    )


# ---- Parts -------------------------------------------------------------------------------------------------------------------------------


def is_x86() -> bool:
    """Whether this machine is an x86-64 one."""
    return platform.machine() in ("x86_64", "AMD64")


def listed_sets(listing: str) -> tuple[list[str], list[str]]:
    """The instruction sets of a program's table, in order: those that it runs here, and those that it does not."""
    here: list[str] = []
    elsewhere: list[str] = []
    for line in listing.splitlines():
        words = line.split()
        sets = elsewhere if "not run here" in line else here
        if words[1] not in sets:
            sets.append(words[1])
    return here, elsewhere


def check_native(options: argparse.Namespace) -> Outcome:
    """Kernels that this processor executes."""
    sanitizer = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer") if options.sanitize else ()
    program = Build("sanitized" if options.sanitize else "native", sanitizer).compile()
    here, _ = listed_sets(run([program, "--list"]).stdout)
    answer = run([program, *arguments_of(options, NATIVE_PROBLEMS, NATIVE_WORK)])
    words = f"executed natively{', with sanitizers' if options.sanitize else ''}: {', '.join(here)}"
    return Outcome("native", "passed" if answer.returncode == 0 else "failed", words, answer.stdout + answer.stderr)


def check_arm64(options: argparse.Namespace) -> Outcome:
    """Kernels for arm64, on other processors."""
    if not is_x86():
        raise LeftOutError("executed natively")
    flags = ("--target=aarch64-linux-gnu", "-static")
    if not links(flags):
        install("libc6-dev-arm64-cross", "libgcc-[0-9]+-dev-arm64-cross")
        if not links(flags):
            raise LeftOutError("clang does not link programs for aarch64-linux-gnu")
    qemu = find_program(("qemu-aarch64", "qemu-aarch64-static"), "qemu-user")
    program = Build("arm64", flags[:1], flags[1:]).compile()
    here, elsewhere = listed_sets(run([qemu, "-cpu", "max", program, "--list"]).stdout)
    sets = here + elsewhere
    answer = run(
        [qemu, "-cpu", "max", program, "--quick", "--sets", ",".join(sets), *arguments_of(options, EMULATED_PROBLEMS, EMULATED_WORK)]
    )
    words = f"emulated by qemu: {', '.join(sets)}"
    return Outcome("arm64", "passed" if answer.returncode == 0 else "failed", words, answer.stdout + answer.stderr)


def check_x86(options: argparse.Namespace) -> Outcome:
    """Kernels for x86-64 that this processor does not execute."""
    if sys.platform != "linux" or not is_x86():
        raise LeftOutError("kernels for x86-64 are emulated on Linux, x86-64 only")
    program = Build("native").compile()
    _, missing = listed_sets(run([program, "--list"]).stdout)
    if not missing:
        raise LeftOutError("all executed natively")
    bochs = find_program(("bochs-bin", "bochs"), "bochs", "bochs-term")
    program = Build("x86-64", linker_flags=("-static",), for_bochs=True).compile()
    arguments = ["--quick", "--sets", ",".join(missing), *arguments_of(options, EMULATED_PROBLEMS, EMULATED_WORK)]
    code, output = run_in_bochs(program, arguments, bochs)
    return Outcome("x86-64", "passed" if code == 0 else "failed", f"emulated by Bochs: {', '.join(missing)}", output)


def arguments_of(options: argparse.Namespace, problems: int, work: int) -> list[str]:
    """The program's arguments."""
    arguments = ["--problems", str(max(1, int(problems * options.times))), "--work", str(work), "--first", str(options.first)]
    if options.kernels:
        arguments += ["--kernels", options.kernels]
    return arguments


def check(part: str, options: argparse.Namespace) -> Outcome:
    """Run one part, whatever comes of it."""
    checks = {"native": check_native, "arm64": check_arm64, "x86-64": check_x86}
    try:
        return checks[part](options)
    except LeftOutError as reason:
        return Outcome(part, "left out", str(reason))
    except CheckError as error:
        return Outcome(part, "failed", "does not compile", str(error))


def check_all(parts: Sequence[str], options: argparse.Namespace) -> list[Outcome]:
    """Run parts beside one another, as far as there are processors."""
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda part: check(part, options), parts))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        description="Check the kernels of core/CPUKernels, under emulation where this processor lacks something."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--times", type=float, default=1, help="how many times as many problems as usual")
    parser.add_argument("--first", type=int, default=0, help="the number of the first problem")
    parser.add_argument("--kernels", help="names of the kernels to check, with commas between them")
    parser.add_argument(
        "--sanitize", action="store_true", help="check what runs natively with the sanitizers for addresses and undefined behaviour"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    return options


def main() -> None:
    """Check what the command line asks for, and say what was executed where."""
    options = parse()
    outcomes = check_all(options.parts or PARTS, options)
    for outcome in outcomes:
        if outcome.output:
            print(f"{outcome.part}:\n{outcome.output.strip()}\n")
    for outcome in outcomes:
        print(f"{outcome.part:8} {outcome.state:9} {outcome.words}")
    sys.exit(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    main()
