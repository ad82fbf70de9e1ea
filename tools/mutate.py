"""Plant typical errors into the sources, one at a time, and see which test catches each.

    python tools/mutate.py                      every error of tests/assurance/mutations.toml
    python tools/mutate.py 'metal-*' NAME ...   those whose names match
    python tools/mutate.py --missing            those without a result that still holds
    python tools/mutate.py --confirm            plants nothing: whether the tests that noticed errors pass without them
    python tools/mutate.py --list               their names

A suite that nobody has seen fail proves nothing. Errors are planted in copies of the tree below .build-mutation, which keep what was built,
so that each costs one incremental build; the tests that should notice are run first, then ever more of them. What came of it is written to
tests/assurance/records/mutation.json. It takes about an hour on two processors, so it is run by hand.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import json
import os
import queue
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import metal_translator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "assurance"))
import figures  # type: ignore[import-not-found]  # tests are not checked for types

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "assurance" / "mutations.toml"
RECORDS = ROOT / "tests" / "assurance" / "records" / "mutation.json"
FOLDER = ROOT / ".build-mutation"

# What has to be built before tests see a change of a source:
#   none     nothing: Python; tests of Rust and Objective-C build what they run themselves
#   objects  the objects that the source belongs to, and the library: C and Swift
#   metal    the kernels for GPUs, as the software device runs them
#   device   the software device
BUILDS = ("none", "objects", "metal", "device")
# Tests that are run when the chosen ones have passed: those of the part, then all.
WIDER = {
    "none": "pytest tests -k 'python or sdpa or check or softmetal_device or header or tools'",
    "objects": "pytest test_forward.py test_backward.py test_kernels.py test_decode.py test_merge.py test_integer_kernels.py"
    " test_integer_backward.py test_quantization.py test_descriptors.py test_flat.py",
    "metal": "pytest tests -k softmetal",
    "device": "pytest tests -k softmetal",
}
EVERYTHING = "pytest tests"
INSTRUCTION_SETS = ("avx2", "avxvnni", "avx512", "avx512vnni", "neon", "dotprod", "i8mm")

# A test that runs longer has met an error that keeps it from ending.
MOST_SECONDS = 900
MOST_SECONDS_OF_A_TEST = 200


class TableError(Exception):
    """What is wrong with the table of errors, or why an error cannot be planted."""


class RunError(Exception):
    """Why nothing can be said about an error."""


# ---- The table ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """An error and where it is planted.

    Attributes
    ----------
    name, part, error
        Its name, the part of the product that it is in, what it is and why it is typical.
    file, text, replacement
        The first `text` behind `after`, which stands in the file once, is replaced; without `after`, the text itself stands there once.
    build
        What has to be built: one of `BUILDS`.
    tests
        Command lines of the tests that should notice it, the quickest first.
    kernels
        In which of the kernels that share a header in C the error is planted, by the names of their files; none: in all of them. An error
        in one kernel compiles faster and is harder to notice.
    """

    name: str
    part: str
    error: str
    file: str
    text: str
    replacement: str
    build: str
    tests: tuple[str, ...]
    after: str = ""
    kernels: tuple[str, ...] = ()

    def plant(self, source: str) -> str:
        """The source with the error.

        Raises
        ------
        TableError
            If the place is not there, or is not the only one.
        """
        anchor = self.after or self.text
        count = source.count(anchor)
        if count != 1:
            raise TableError(f"{self.name}: {self.file} must have this text once, and has it {count} times:\n{anchor}")
        start = source.index(anchor) + len(self.after)
        place = source.find(self.text, start)
        if place < 0:
            raise TableError(f"{self.name}: {self.file} must have this text behind the other one:\n{self.text}")
        return source[:place] + self.replacement + source[place + len(self.text) :]

    @property
    def digest(self) -> str:
        """Changes with what is planted."""
        parts = (self.file, self.after, self.text, self.replacement, *self.kernels)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def read_table(path: Path = TABLE) -> list[Mutation]:
    """All errors of a table, in its order.

    Raises
    ------
    TableError
        If an entry lacks something or says too much.
    """
    mutations = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]:
        name = entry.get("name", "(an entry without a name)")
        try:
            fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
            mutation = Mutation(**fields)
        except TypeError as error:
            raise TableError(f"{path.name}: {name}: {error}") from None
        if mutation.build not in BUILDS:
            raise TableError(f"{path.name}: {name}: `build` must be one of {', '.join(BUILDS)} (got {mutation.build})")
        if mutation.text == mutation.replacement or not mutation.tests:
            raise TableError(f"{path.name}: {name}: expected a change, and tests that notice it")
        mutations.append(mutation)
    names = [mutation.name for mutation in mutations]
    for name in names:
        if names.count(name) > 1:
            raise TableError(f"{path.name}: the name {name} is there more than once")
    return mutations


# ---- Running tests -----------------------------------------------------------------------------------------------------------------------


def test_file(name: str, folder: Path) -> str:
    """The path of a file of tests, which may have any place below tests/.

    Raises
    ------
    RunError
        If there is none of that name, or more than one.
    """
    found = [path.relative_to(folder).as_posix() for path in (folder / "tests").rglob(name)]
    if len(found) != 1:
        raise RunError(f"{name} must be there once below tests/ (got {found})")
    return found[0]


def command_of(line: str, folder: Path) -> list[str]:
    """The words of a command line; `pytest` gets the options with which it says who failed."""
    words = [test_file(word, folder) if re.fullmatch(r"test_\w+\.py", word) else word for word in shlex.split(line)]
    if words[0] == "pytest":
        # Left out are tests that compare sources, with this table or with a copy: they would notice any change, also one that is no error.
        options = ["-x", "-v", "--no-header", "--tb=no", "-p", "no:cacheprovider", "--ignore-glob=*/test_mutation.py"]
        options.append("--deselect=tests/test_softmetal_device.py::TestTranslator::test_kernels_of_the_backend__are_what_swift_has")
        options += [f"--timeout={MOST_SECONDS_OF_A_TEST}", "--timeout-method=thread"]
        words = [sys.executable, "-m", "pytest", *options, *words[1:]]
    elif words[0] == "python":
        words[0] = sys.executable
    return words


def failing_test(output: str) -> str | None:
    """The test that failed by pytest's own list, or the one that was running when its process ended."""
    running = None
    for line in output.splitlines():
        if not line.startswith("tests/"):
            continue
        found = re.match(r"(tests/\S+?::.*?)\s+(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", line)
        if found is None:
            running = line.split(" ")[0].strip() if "::" in line else running
        elif found[2] in ("FAILED", "ERROR"):
            return found[1]
        else:
            running = None
    return running


def run_tests(line: str, folder: Path, variables: Mapping[str, str]) -> str | None:
    """Run a command line of tests in a folder. What it found, in words; None if all is well.

    Raises
    ------
    RunError
        If no test has run at all.
    """
    words = command_of(line, folder)
    process = subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return f"{failing_test(output) or line}: did not end"
    if process.returncode == 0:
        if "pytest" in words and " passed" not in output:
            raise RunError(f"`{line}` runs no test here:\n{output[-2000:]}")
        return None
    if "pytest" not in words:
        return line
    found = failing_test(output)
    if process.returncode < 0:
        return f"{found or line}: {signal.Signals(-process.returncode).name}"
    if process.returncode not in (1, 2) or found is None:
        if "Timeout" in output:
            return f"{found or line}: did not end"
        error = re.search(r"^ERROR (tests/\S+)", output, flags=re.M)
        if error is None:
            raise RunError(f"`{line}` ended with {process.returncode}:\n{output[-3000:]}")
        return f"{error[1]}: cannot be loaded"
    return found


# ---- A copy of the tree ------------------------------------------------------------------------------------------------------------------


class Tree:
    """A copy of the sources with builds of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.package = folder / "python" / "src" / "umfa"
        self.variables = {"PYTHONPATH": str(self.package.parent), "PYTHONDONTWRITEBYTECODE": "1"}

    def refresh(self) -> None:
        """Make the copy what the tree is now. What is the same keeps its time, so nothing is built for it."""
        listing = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
        wanted = {name for name in listing.stdout.decode().split("\0") if name and (ROOT / name).is_file()}
        note = self.folder / ".sources"
        for name in set(note.read_text().split("\n") if note.exists() else []) - wanted - {""}:
            (self.folder / name).unlink(missing_ok=True)
        for name in wanted:
            source, target = ROOT / name, self.folder / name
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        note.write_text("\n".join(sorted(wanted)))
        # Generated from the header, in which no error is planted.
        shutil.copy(ROOT / "python/src/umfa/_mfa_cffi.py", self.package)

    def call(self, *words: str, given: str = "") -> str:
        """Run a tool in the copy with `given` on its standard input; what it prints.

        Raises
        ------
        RunError
            If it fails.
        """
        command = [sys.executable, *words]
        answer = subprocess.run(command, cwd=self.folder, input=given, capture_output=True, text=True, errors="replace")
        if answer.returncode != 0:
            raise RunError(answer.stdout + answer.stderr)
        return answer.stdout

    def build(self) -> None:
        """Build everything from the sources as they are.

        Raises
        ------
        RunError
            If it cannot be built.
        """
        library = Path(self.call("tools/build_library.py").split("\n")[-2])
        link = self.package / library.name
        if not link.is_symlink():
            link.symlink_to(library)
        self.call("tools/build_softmetal.py")

    @functools.cached_property
    def instruction_sets(self) -> set[str]:
        """Those that this processor has, of the names of kernels."""
        words = [sys.executable, "-c", "import umfa; umfa.MFAContext(device='cpu', num_threads=1)"]
        variables = {**os.environ, **self.variables}
        return {
            name
            for name in INSTRUCTION_SETS
            if subprocess.run(words, env={**variables, "MFA_KERNELS": name}, capture_output=True).returncode == 0
        }

    def commands_for(self, mutation: Mutation) -> list[Command]:
        """The commands that compile what an error's file belongs to, and at last the one that links the library.

        SwiftPM keeps its commands in a manifest. Called by themselves, they compile no more than what changes, and what they have made can
        be put back. A header is compiled with those kernels that this processor can execute.
        """
        compiling, linking = [], []
        file = self.folder / mutation.file
        for entry in re.split(r"\n(?=  \")", (self.folder / ".build" / "release.yaml").read_text()):
            found = re.search(r"^    args: (\[.*\])$", entry, flags=re.M)
            if found is None:
                continue
            inputs, outputs = (json.loads(each) for each in re.findall(r"^    (?:in|out)puts: (\[.*\])$", entry, flags=re.M))
            command = Command(json.loads(found[1]), [Path(name) for name in outputs if name.startswith("/")])
            dependencies = re.search(r"^    deps: \"(.*)\"$", entry, flags=re.M)
            if dependencies is not None and Path(dependencies[1]).exists():
                inputs = Path(dependencies[1]).read_text().replace("\\\n", " ").split()
                name = command.outputs[0].name.removesuffix(".c.o")
                wanted = name in mutation.kernels if mutation.kernels else name.rpartition("_")[2] not in self.lacking
                if wanted and any(Path(each).resolve() == file for each in inputs if each.startswith(str(self.folder))):
                    compiling.append(command)
            elif any(output.name.startswith("libmfa.") for output in command.outputs):
                linking.append(command)
            elif str(file) in inputs and "-c" in command.words:
                compiling.append(command)
        if not compiling or len(linking) != 1:
            raise RunError(f"{mutation.name}: SwiftPM's manifest names nothing that {mutation.file} belongs to")
        return [*compiling, *linking]

    @property
    def lacking(self) -> set[str]:
        """Instruction sets that this processor lacks."""
        return set(INSTRUCTION_SETS) - self.instruction_sets


@dataclass(frozen=True)
class Command:
    """A command of SwiftPM's and the files that it makes."""

    words: list[str]
    outputs: list[Path]


class Planted:
    """An error in a tree, while a `with` block lasts."""

    def __init__(self, tree: Tree, mutation: Mutation):
        self.tree = tree
        self.mutation = mutation
        self.path = tree.folder / mutation.file
        self.kept: dict[Path, tuple[bytes, os.stat_result]] = {}
        self.sources: dict[str, str] = {}

    def keep(self, path: Path) -> None:
        """Note a file that has to be as it is now."""
        self.kept[path] = path.read_bytes(), path.stat()

    def __enter__(self) -> Planted:
        source = self.path.read_text(encoding="utf-8")
        self.sources = self.metal_sources() if self.mutation.build == "metal" else {}
        self.keep(self.path)
        self.path.write_text(self.mutation.plant(source), encoding="utf-8")
        return self

    def metal_sources(self) -> dict[str, str]:
        """The texts of the kernels for GPUs, as they are now."""
        return {path.name: metal_translator.flatten(path) for path in (self.tree.folder / "core/MetalBackend/Kernels").glob("*.metal")}

    def build(self) -> None:
        """Build what has changed.

        Raises
        ------
        RunError
            If it does not pass the compiler, or a tool.
        """
        if self.mutation.build == "objects":
            *compiling, linking = self.tree.commands_for(self.mutation)
            for path in (path for command in (*compiling, linking) for path in command.outputs if path.is_file()):
                self.keep(path)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(self.run, compiling))
            self.run(linking)
        elif self.mutation.build in ("metal", "device"):
            self.keep(self.tree.folder / ".build-softmetal" / "libsoftmetal.so")
            # The library asks for kernels by the hash of their text. The wrong ones get that of the right ones, and the library stays.
            texts = {text: self.sources[name] for name, text in self.metal_sources().items()} if self.sources else {}
            self.tree.call("-c", BUILD_KERNELS, given=json.dumps(texts))

    def run(self, command: Command) -> None:
        """Run one of SwiftPM's commands."""
        answer = subprocess.run(
            command.words, cwd=self.tree.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        if answer.returncode != 0:
            raise RunError(answer.stdout + answer.stderr)

    def __exit__(self, *_: object) -> None:
        for path, (content, state) in self.kept.items():
            path.write_bytes(content)
            # With their times, so that to SwiftPM nothing has happened; but what tests have built themselves has to be built again.
            if self.mutation.build != "none":
                os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


BUILD_KERNELS = """
import json, sys
sys.path.insert(0, "tools")
import build_softmetal, metal_translator
right, hash_of = json.load(sys.stdin), metal_translator.source_hash
metal_translator.source_hash = lambda text: hash_of(right.get(text, text))
try:
    build_softmetal.build_library()
except (build_softmetal.BuildError, metal_translator.TranslationError) as error:
    sys.exit(str(error))
"""


# ---- What comes of it --------------------------------------------------------------------------------------------------------------------


def try_one(mutation: Mutation, tree: Tree, only_chosen: bool) -> dict[str, Any]:
    """Plant an error, build, and run tests until one fails: the chosen ones, then, unless `only_chosen`, others."""
    result: dict[str, Any] = {"digest": mutation.digest, "caught_by": None, "stage": "not caught"}
    stages = [("chosen tests", mutation.tests), ("tests of the part", [WIDER[mutation.build]]), ("all tests", [EVERYTHING])]
    with Planted(tree, mutation) as planted:
        begin = time.monotonic()
        try:
            planted.build()
        except RunError as error:
            words = [line for line in str(error).splitlines() if "error" in line.lower()] or str(error).splitlines()[-1:]
            result |= {"caught_by": f"the build: {shorten(words[0], tree)}", "stage": "build"}
        result["build_seconds"] = round(time.monotonic() - begin, 1)
        begin = time.monotonic()
        for stage, lines in stages[:1] if only_chosen else stages:
            for line in lines:
                found = run_tests(line, tree.folder, tree.variables) if result["caught_by"] is None else None
                if found is not None:
                    result |= {"caught_by": found, "stage": stage}
        result["test_seconds"] = round(time.monotonic() - begin, 1)
    return result


def shorten(words: str, tree: Tree) -> str:
    """A message of a compiler without the folder of the copy."""
    return words.strip().replace(f"{tree.folder}/", "")[:200]


def check_without_errors(results: Mapping[str, dict[str, Any]], tree: Tree) -> None:
    """See that the tests which have noticed errors pass where there are none: else their failure would mean nothing.

    Raises
    ------
    RunError
        If one fails.
    """
    notices = {str(result["caught_by"]) for result in results.values() if result["stage"] != "build" and result["caught_by"]}
    nodes = {re.sub(r": (did not end|cannot be loaded|SIG[A-Z]+)$", "", notice) for notice in notices}
    tests = []
    for node in sorted(node for node in nodes if node.startswith("tests/")):
        path, _, name = node.partition("::")
        tests.append(f"{test_file(Path(path).name, tree.folder)}::{name}")
    for line in (f"pytest {shlex.join(tests)}" if tests else "", *sorted(node for node in nodes if not node.startswith("tests/"))):
        found = run_tests(line, tree.folder, tree.variables) if line else None
        if found is not None:
            raise RunError(f"{found} fails without any error")


def read_records() -> dict[str, dict[str, Any]]:
    """What is known of each error."""
    if not RECORDS.exists():
        return {}
    errors: dict[str, dict[str, Any]] = json.loads(RECORDS.read_text())["errors"]
    return errors


def write_records(results: Mapping[str, dict[str, Any]], table: Sequence[Mutation]) -> None:
    """Keep the results of errors that are still in the table, in its order, in the form of tests/assurance/figures.py."""
    kept = {
        mutation.name: {"part": mutation.part, "error": mutation.error, **results[mutation.name]}
        for mutation in table
        if mutation.name in results
    }
    stages = [result["stage"] for result in kept.values()]
    counts = {
        "errors planted": len(kept),
        "caught by the tests that should": stages.count("chosen tests"),
        "caught by other tests": stages.count("tests of the part") + stages.count("all tests"),
        "caught by the compiler or a tool": stages.count("build"),
        "caught by nobody": stages.count("not caught"),
    }
    content = {**figures.circumstances(), "size": "full", "figures": counts, "errors": kept}
    RECORDS.parent.mkdir(exist_ok=True)
    RECORDS.write_text(json.dumps(content, indent=1) + "\n")


def make_tree(number: int) -> Tree:
    """A copy of the tree, built."""
    folder = FOLDER / f"tree-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    tree = Tree(folder)
    tree.refresh()
    tree.build()
    return tree


def run_all(chosen: Sequence[Mutation], table: Sequence[Mutation], jobs: int, only_chosen: bool) -> list[str]:
    """Try errors, `jobs` at a time. The names of those that nobody has caught.

    Raises
    ------
    RunError
        If nothing can be said about one.
    """
    trees: queue.Queue[Tree] = queue.Queue()
    for number in range(1, jobs + 1):
        trees.put(make_tree(number))
    results = read_records()
    survivors: list[str] = []
    unknown: list[str] = []

    def attempt(mutation: Mutation) -> None:
        tree = trees.get()
        try:
            result = try_one(mutation, tree, only_chosen)
        except RunError as error:
            print(f"{mutation.name}: {error}", flush=True)
            unknown.append(mutation.name)
            return
        finally:
            trees.put(tree)
        results[mutation.name] = result
        write_records(results, table)
        if result["caught_by"] is None:
            survivors.append(mutation.name)
        seconds = f"{result['build_seconds']:.0f} s + {result['test_seconds']:.0f} s"
        print(f"{mutation.name}: {result['stage']}, {seconds}: {result['caught_by'] or 'NOBODY'}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(attempt, chosen))
    check_without_errors({mutation.name: results[mutation.name] for mutation in chosen if mutation.name not in unknown}, trees.get())
    return [*survivors, *unknown]


def main() -> None:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(description="Plant errors and see which test catches each.")
    parser.add_argument("names", nargs="*", help="patterns of names, as of files (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names and what they are")
    parser.add_argument("--missing", action="store_true", help="only errors without a result that still holds")
    parser.add_argument("--chosen", action="store_true", help="only the tests that should notice an error, no others after them")
    parser.add_argument("--confirm", action="store_true", help="plant nothing; run the tests that have noticed these errors")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once, each in a copy of its own (default: 1)")
    arguments = parser.parse_args()
    try:
        table = read_table()
        for mutation in table:
            mutation.plant((ROOT / mutation.file).read_text(encoding="utf-8"))
        chosen = [mutation for mutation in table if any(fnmatch.fnmatch(mutation.name, each) for each in arguments.names or ["*"])]
        if arguments.missing:
            known = read_records()
            chosen = [each for each in chosen if known.get(each.name, {}).get("digest") != each.digest or not known[each.name]["caught_by"]]
        if arguments.list:
            for mutation in chosen:
                print(f"{mutation.name}\n    {mutation.error}\n    {mutation.file}")
            return
        if not chosen:
            sys.exit("mutate: no error has such a name, or all have results that hold")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if arguments.confirm:
            known = read_records()
            check_without_errors({mutation.name: known[mutation.name] for mutation in chosen if mutation.name in known}, make_tree(1))
            print("all of them pass without an error")
            return
        survivors = run_all(chosen, table, max(arguments.jobs, 1), arguments.chosen)
    except (TableError, RunError) as error:
        sys.exit(f"mutate: {error}")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} errors caught")
    if survivors:
        sys.exit(f"mutate: nobody has caught {', '.join(survivors)}")


if __name__ == "__main__":
    main()
