"""Compare the binary interface of libmfa with its record, and the library with its header.

    python tools/check_abi.py --check      fail if include/mfa.h differs from tools/abi.json, or the library from include/mfa.h
    python tools/check_abi.py --update     write tools/abi.json anew: the interface changes on purpose

The record holds every prototype, every constant, and the size of every struct with the offset and type of its fields, as a C compiler lays
them out. Programs that were compiled against an older header keep working as long as entries are only added to it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "include" / "mfa.h"
RECORD = ROOT / "tools" / "abi.json"
# The link that `just build` puts into the Python package always leads to the library that was built last.
LIBRARY = ROOT / "python" / "src" / "umfa" / ("libmfa.dylib" if sys.platform == "darwin" else "libmfa.so")
# A field that sized structs read before they know how long they are, so it has to stay where it is.
FIRST_FIELD = "struct_size"


class Header(NamedTuple):
    """What mfa.h declares, without nullability, visibility and comments."""

    functions: dict[str, str]  # name: prototype
    callbacks: dict[str, str]  # name: the type's declaration
    constants: dict[str, int]
    structs: dict[str, dict[str, str]]  # name: the type of each field, by its name


class AbiError(Exception):
    """The interface is not what it should be, or cannot be read."""


def normalise(text: str) -> str:
    """One line; a space after commas and pointer stars, none before them or beside parentheses."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ?([(),*]) ?", r"\1", text)
    return re.sub(r"\*(?=\w)", "* ", text.replace(",", ", "))


def strip_macros(text: str) -> str:
    """Remove comments and the macros for visibility and nullability: what remains is plain C."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    return re.sub(r"\b(MFA_API|MFA_NULLABLE|MFA_CHECKED)\b", " ", text)


def read_header(text: str) -> Header:
    """Parse the C subset that mfa.h keeps to: fixed-size types, flat structs, one declaration a field's type, integer constants."""
    constants = {name: int(value) for name, value in re.findall(r"^#define (MFA_\w+) (-?\d+)\b", text, flags=re.M)}
    plain = strip_macros(re.sub(r"^\s*#.*$", "", text, flags=re.M))
    structs = {}
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\}\s*(\w+);", plain, flags=re.S):
        fields = {}
        for declaration in filter(None, map(normalise, body.split(";"))):
            match = re.fullmatch(r"([^,]+?) (\w+)(\[\d+\])?", declaration)
            if match is None:
                raise AbiError(f"cannot read a field of {name}: {declaration}")
            fields[match[2]] = match[1] + (match[3] or "")
        structs[name] = fields
    declarations = [normalise(statement) for statement in re.sub(r"\{.*?\}", "", plain.replace('extern "C" {', ""), flags=re.S).split(";")]
    callbacks = {match[1]: line for line in declarations if (match := re.match(r"typedef .*\(\* (\w+)\)\(", line))}
    functions = {match[1]: line for line in declarations if (match := re.match(r"(?!typedef)[^(]*?(mfa_\w+)\(", line))}
    return Header(functions, callbacks, constants, structs)


def compiler() -> str:
    """A C compiler."""
    for name in ("clang", "gcc", "cc"):
        if path := shutil.which(name):
            return path
    raise AbiError("needs a C compiler (clang, gcc or cc) to lay out the structs of mfa.h")


def layouts(header: Header) -> dict[str, Any]:
    """Sizes and offsets of all structs, as a compiled program tells them."""
    lines = []
    for name, types in header.structs.items():
        lines.append(f'printf("%zu %zu\\n", sizeof({name}), _Alignof({name}));')
        for field in types:
            lines.append(f'printf("%zu %zu\\n", offsetof({name}, {field}), sizeof((({name}*)0)->{field}));')
    source = "#include <mfa.h>\n#include <stdio.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "layouts"
        program.with_suffix(".c").write_text(source)
        subprocess.run([compiler(), "-std=c11", f"-I{HEADER.parent}", program.with_suffix(".c"), "-o", program], check=True)
        answers = iter(map(int, subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()))
    result: dict[str, Any] = {}
    for name, types in header.structs.items():
        sizes = {"size": next(answers), "alignment": next(answers)}
        fields = {field: {"type": type_name, "offset": next(answers), "size": next(answers)} for field, type_name in types.items()}
        result[name] = {**sizes, "fields": fields}
    return result


def describe() -> dict[str, Any]:
    """The interface that include/mfa.h declares now, in the form of the record."""
    header = read_header(HEADER.read_text())
    return {
        # The version goes up with every release; all other constants are compiled into callers.
        "constants": {name: value for name, value in header.constants.items() if not name.startswith("MFA_VERSION_")},
        "functions": header.functions,
        "callbacks": header.callbacks,
        "structs": layouts(header),
    }


def differences(recorded: Any, current: Any, path: str = "") -> list[str]:
    """Say where two descriptions differ, an entry a line."""
    if not (isinstance(recorded, dict) and isinstance(current, dict)):
        return [] if recorded == current else [f"{path}: recorded {recorded!r}, now {current!r}"]
    lines = []
    for key in [*recorded, *(key for key in current if key not in recorded)]:
        place = f"{path}.{key}" if path else key
        if key not in current:
            lines.append(f"{place}: recorded, now gone")
        elif key not in recorded:
            lines.append(f"{place}: new")
        else:
            lines += differences(recorded[key], current[key], place)
    return lines


def exported_symbols(library: Path) -> set[str]:
    """Read the names that a shared library gives to others."""
    nm = shutil.which("nm") or shutil.which("llvm-nm")
    if nm is None:
        raise AbiError("needs nm or llvm-nm to read the symbols of libmfa")
    if sys.platform == "darwin":
        answer = subprocess.run([nm, "-gU", library], check=True, capture_output=True, text=True).stdout
        return {line.split()[-1].removeprefix("_") for line in answer.splitlines() if line}
    answer = subprocess.run([nm, "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    # "address type name@@version"; the version itself is an absolute symbol.
    return {words[2].split("@")[0] for words in map(str.split, answer.splitlines()) if words[1] != "A"}


def check_library(library: Path) -> list[str]:
    """Say which functions of the header the library lacks, and what it exports besides."""
    declared = set(read_header(HEADER.read_text()).functions)
    exported = exported_symbols(library)
    missing = [f"{library.name} lacks {name}, which mfa.h declares" for name in sorted(declared - exported)]
    return missing + [f"{library.name} exports {name}, which mfa.h does not declare" for name in sorted(exported - declared)]


def check(library: Path) -> list[str]:
    """Everything that is wrong with the interface; empty if all is well."""
    if not RECORD.exists():
        return ["there is no record: python tools/check_abi.py --update"]
    description = describe()
    problems = differences(json.loads(RECORD.read_text()), description)
    if problems:
        problems.append("if this change is meant: python tools/check_abi.py --update")
    for name, struct in description["structs"].items():
        if next(iter(struct["fields"])) != FIRST_FIELD:
            problems.append(f"{name} does not begin with {FIRST_FIELD}, so it cannot grow")
    if not library.exists():
        return [*problems, f"there is no library at {library}: ./justw build"]
    return problems + check_library(library)


def main() -> None:
    """Check or update as the command line says."""
    parser = argparse.ArgumentParser(description="Compare the binary interface of libmfa with its record, and the library with its header.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail on any difference (the default)")
    action.add_argument("--update", action="store_true", help="write the record anew")
    parser.add_argument("--library", type=Path, default=LIBRARY)
    arguments = parser.parse_args()
    if arguments.update:
        RECORD.write_text(json.dumps(describe(), indent=1) + "\n")
        return
    if problems := check(arguments.library):
        sys.exit("\n".join(["check_abi: the interface of libmfa is not as recorded", *problems]))


if __name__ == "__main__":
    main()
