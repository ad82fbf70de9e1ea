"""The conformance suite: the cases, the runners of all languages, the backends, and what results are held to.

`tests/test_conformance.py` makes tests of it, `tests/conformance/report.py` the matrix in docs/conformance.md.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tools"))
import build_library
import build_objc
import cargo
import expected as expectations
import inputs
import umfa
from build_library import BuildError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

Case = dict[str, Any]
Answer = dict[str, Any]

SCRATCH = ROOT / ".build" / "conformance"
SECONDS = 300
LIBRARY = Path(umfa.__file__).parent / ("libmfa.dylib" if sys.platform == "darwin" else "libmfa.so")


class UnavailableError(Exception):
    """Why a language or backend cannot be tried here, in words for the person at the keyboard."""


@functools.cache
def cases() -> tuple[Case, ...]:
    """All cases of the file."""
    return tuple(json.loads(line) for line in (HERE / "cases.jsonl").read_text().splitlines())


# ---- Backends ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """A device, and the kernels it may use."""

    name: str
    device: str
    kernels: str | None = None

    def environment(self) -> dict[str, str]:
        """The environment of a runner."""
        variables = {name: text for name, text in os.environ.items() if name != "MFA_KERNELS"}
        # It lies beside the library of the Python package, and not beside what other languages are linked with.
        variables.setdefault("MFA_SOFTMETAL", str(LIBRARY.parent / "libsoftmetal.so"))
        return variables if self.kernels is None else {**variables, "MFA_KERNELS": self.kernels}

    def check(self) -> None:
        """Raise UnavailableError if it is not here."""
        if self.device not in ("cpu", *_devices()):
            raise UnavailableError(f"there is no device {self.device!r} here")
        if self.kernels and "," not in self.kernels and self.kernels not in ("reference", "float", "integer"):
            probe = "import sys, umfa; umfa.MFAContext(device='cpu', num_threads=1)"
            done = subprocess.run([sys.executable, "-c", probe], env=self.environment(), capture_output=True, check=False)
            if done.returncode:
                raise UnavailableError(f"this processor has no {self.kernels}")


@functools.cache
def _devices() -> tuple[str, ...]:
    return tuple(name for name, found in umfa.info()["devices"].items() if found)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", "cpu"),
        Backend("cpu, reference kernels", "cpu", "reference"),
        Backend("cpu, baseline", "cpu", "baseline"),
        Backend("cpu, avx2", "cpu", "avx2"),
        Backend("cpu, avxvnni", "cpu", "avxvnni"),
        Backend("cpu, avx512", "cpu", "avx512"),
        Backend("cpu, avx512vnni", "cpu", "avx512vnni"),
        Backend("softmetal", "softmetal"),
        Backend("metal", "metal"),
    )
}


# ---- Languages ---------------------------------------------------------------------------------------------------------------------------


def _compile(source: Path, made: Path, *arguments: str) -> None:
    clang = shutil.which("clang") or shutil.which("cc")
    if clang is None:
        raise UnavailableError("needs a C compiler")
    made.parent.mkdir(parents=True, exist_ok=True)
    command = [clang, "-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "include"), str(source)]
    subprocess.run([*command, *arguments, "-o", str(made)], check=True)


def compile_preloaded(source: Path, library: Path) -> None:
    """Compile functions that stand before the library's by LD_PRELOAD."""
    if sys.platform != "linux":
        raise UnavailableError(f"{source.name} finds libmfa as Linux does")
    _compile(source, library, "-shared", "-fPIC")


def _c() -> list[str]:
    program = SCRATCH / "runner_c"
    _compile(HERE / "runner.c", program, str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}")
    return [str(program)]


def _python() -> list[str]:
    return [sys.executable, str(HERE / "runner.py")]


def _rust() -> list[str]:
    try:
        with cargo.prepared() as environment:
            if cargo.run(["cargo", "build", "--quiet", "--package", "mfa", "--example", "conformance"], environment):
                raise AssertionError("the runner in Rust cannot be built")
            program = Path(environment["CARGO_TARGET_DIR"]) / "debug" / "examples" / "conformance"
    except (cargo.LeftOutError, BuildError) as reason:
        raise UnavailableError(str(reason)) from None
    # Cargo tells only what it runs itself where the library is; this is the one that the other languages use.
    variable = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"
    return ["/usr/bin/env", f"{variable}={LIBRARY.parent}", str(program)]


def _umfa_rs() -> list[str]:
    if importlib.util.find_spec("umfa_rs") is None:
        raise UnavailableError("umfa_rs is not there; ./justw test-rust builds it")
    return [sys.executable, str(HERE / "runner.py"), "--module", "umfa_rs"]


def _swift() -> list[str]:
    try:
        swift = build_library.find_swift()
    except BuildError as reason:
        raise UnavailableError(str(reason)) from None
    build = [swift, "build", "--package-path", str(ROOT), "--configuration", "release", "--product", "conformance"]
    # Compiled with the library's flags, so that its objects are used as they are.
    build += [*build_library.KERNEL_FLAGS, *build_library.linker_flags("release")]
    environment = {**os.environ, "MFA_CONFORMANCE": "1"}
    for step in build, [*build, "--show-bin-path"]:
        done = subprocess.run(step, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, f"the runner in Swift cannot be built: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return [str(Path(done.stdout.strip()) / "conformance")]


def _objective_c() -> list[str]:
    try:
        return [str(build_objc.build("conformance"))]
    except build_objc.LeftOutError as reason:
        raise UnavailableError(str(reason)) from None


# Languages whose runners also show the memory that a refused call was to write.
SHOWING_MEMORY = ("C", "Rust", "Swift")

# What makes each language's runner: gives its command, to which the device and the number of threads are appended.
LANGUAGES: dict[str, Callable[[], list[str]]] = {
    "C": _c,
    "Python": _python,
    "Rust": _rust,
    "Python, by umfa_rs": _umfa_rs,
    "Swift": _swift,
    "Objective-C": _objective_c,
}
# The one device of a language that does not have all.
ONLY_DEVICE = {"Objective-C": "metal" if sys.platform == "darwin" else "softmetal"}


@functools.cache
def command(language: str) -> tuple[str, ...]:
    """The runner of a language, made when it is first asked for."""
    return tuple(LANGUAGES[language]())


@functools.cache
def run(language: str, backend: str, threads: int = 2, again: int = 0) -> dict[str, Answer]:
    """What a language answers to every case on a backend, by the cases' names. `again`: a number to run it once more."""
    BACKENDS[backend].check()
    if ONLY_DEVICE.get(language, BACKENDS[backend].device) != BACKENDS[backend].device:
        raise UnavailableError(f"its only device is {ONLY_DEVICE[language]!r}")
    runner = [*command(language), BACKENDS[backend].device, str(threads)]
    if language == "Python" and threads == 2:
        runner += ["--values", str(values_folder(backend))]
    return _ask(f"{language}'s runner on {backend}", runner, BACKENDS[backend].environment())[0]


def _ask(name: str, runner: list[str], environment: dict[str, str]) -> tuple[dict[str, Answer], str]:
    """What a runner answers to every case, and what it says on standard error."""
    text = "".join(json.dumps(case) + "\n" for case in cases())
    done = subprocess.run(runner, input=text, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False)
    if done.returncode:
        raise AssertionError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["id"] for answer in answers] == [case["id"] for case in cases()], f"{name} did not answer every case"
    return {answer["id"]: answer for answer in answers}, done.stderr


def run_divided(backend: str) -> tuple[dict[str, Answer], int]:
    """What C's runner answers if each sequence of a batch is computed in a call of its own, and how many calls were so divided."""
    runner = [*command("C"), BACKENDS[backend].device, "2"]
    library = SCRATCH / "alone.so"
    compile_preloaded(HERE / "alone.c", library)
    environment = {**BACKENDS[backend].environment(), "LD_PRELOAD": str(library)}
    answers, said = _ask(f"C's runner on {backend}, batches divided", runner, environment)
    found = re.search(r"alone: (\d+) calls divided", said)
    assert found, said
    return answers, int(found[1])


@functools.cache
def values_folder(backend: str) -> Path:
    """Where the Python runner keeps its results on a backend, until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="conformance-")
    _folders.append(folder)
    return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []


# ---- What results are held to ------------------------------------------------------------------------------------------------------------


def wrong_status(case: Case, answer: Answer) -> str | None:
    """What is wrong with the status of an answer."""
    if answer["status"] != case["status"]:
        return f"{case['id']}: status {answer['status']}, not {case['status']}: {answer['message']}"
    if case["status"] and not answer["message"]:
        return f"{case['id']}: refused without a message"
    return None


def written(case: Case, answer: Answer) -> str | None:
    """What a call that was refused has written. Runners fill what is to be written with 0xA5 before."""
    if case["status"] == 0:
        return None
    untouched = {inputs.hash_of(np.full(count, 0xA5, np.uint8)) for count in _sizes(case)}
    first_pass = ("query", "d_values") if "backward_k_scale" in case else ()  # of two calls the second is refused
    for name, content in answer["outputs"].items():
        if content not in untouched and name not in first_pass:
            return f"{case['id']}: {name} was written although the call was refused"
    return None


def _sizes(case: Case) -> set[int]:
    """How many bytes the results of a case may have."""
    counts = {0}
    for shape in (*expectations.shapes(case).values(), (case.get("num_heads", 1),)):
        elements = int(np.prod([float(size) for size in shape]))
        rows = int(np.prod([float(size) for size in shape[:3]]))
        if elements <= 1 << 22:
            counts |= {elements * size for size in (1, 2, 4, 8)}
        if rows <= 1 << 22:
            counts |= {rows * 4, rows * 8}
    return counts


@functools.cache
def _expected(identifier: str) -> dict[str, np.ndarray]:
    return expectations.expected(next(case for case in cases() if case["id"] == identifier))


def out_of_bounds(case: Case, backend: str) -> str | None:
    """Where Python's results on a backend are farther from the reference than the case allows."""
    answer = run("Python", backend)[case["id"]]
    if case["status"] or "skipped" in answer:
        return None
    exact = _expected(case["id"])
    with np.load(values_folder(backend) / (case["id"].replace("/", "+") + ".npz")) as found:
        for name, wanted in exact.items():
            got, real = found[name].astype(np.float64), np.asarray(wanted).astype(np.float64)
            got = got.reshape(real.shape)
            if not np.array_equal(np.isfinite(got), np.isfinite(real)) or not np.array_equal(np.isposinf(got), np.isposinf(real)):
                return f"{case['id']}: {name} is not finite where it should be, or the reverse"
            finite = np.isfinite(real)
            if not finite.any():
                continue
            error = np.abs(got[finite] - real[finite]).max() / max(1.0, np.abs(real[finite]).max())
            if error > case["bound"]:
                return f"{case['id']}: {name} is off by {error:.2e} of the largest, allowed are {case['bound']:.1e}"
    return None


def other_than_c(case: Case, language: str, backend: str) -> str | None:
    """Where a language's answer is not C's: other bytes, another status, or a message without C's in it."""
    answer, model = run(language, backend)[case["id"]], run("C", backend)[case["id"]]
    if "skipped" in answer:
        return None
    if answer["status"] != model["status"]:
        return f"{case['id']}: status {answer['status']} ({answer['message']}), in C {model['status']} ({model['message']})"
    if not case["status"] and answer["outputs"] != model["outputs"]:
        names = [name for name in model["outputs"] if answer["outputs"].get(name) != model["outputs"][name]]
        return f"{case['id']}: other bytes than in C: {', '.join(names) or 'results that C does not have'}"
    own = answer["message"].startswith(("umfa.", "umfa_rs."))  # a package of Python's has words for what it finds before the library does
    if case["status"] and not own and _plain(model["message"]) not in answer["message"]:
        return f"{case['id']}: says {answer['message']!r}, in C {model['message']!r}"
    return None


def _plain(message: str) -> str:
    """A message of the library without the function's name."""
    return message.partition(": ")[2]
