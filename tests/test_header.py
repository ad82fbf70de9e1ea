"""include/mfa.h compiles in every dialect and compiler that it promises, and keeps the functions that are fixed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import check_abi

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "include"
WARNINGS = ["-Wall", "-Wextra", "-pedantic", "-Werror"]
DIALECTS = [
    ("gcc", "c99", "c"),
    ("gcc", "c11", "c"),
    ("g++", "c++17", "c++"),
    ("clang", "c99", "c"),
    ("clang", "c11", "c"),
    ("clang++", "c++17", "c++"),
]

# Refers to every part of the header, and includes it twice.
PROGRAM = """
#include "mfa.h"
#include "mfa.h"
int main(void) {
    mfa_context_options_t options = {0};
    mfa_attention_t attention;
    options.struct_size = sizeof options;
    options.device = MFA_DEVICE_CPU;
    (void)options;
    (void)attention;
    return MFA_SUCCESS;
}
"""


@pytest.mark.parametrize(("compiler", "standard", "language"), DIALECTS)
def test_header_compiles_without_warnings(compiler: str, standard: str, language: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    source = tmp_path / ("program.c" if language == "c" else "program.cpp")
    # C++ wants every member in an initialiser that has one.
    source.write_text(PROGRAM if language == "c" else PROGRAM.replace("= {0}", "= {}"))
    command = [compiler, f"-std={standard}", *WARNINGS, f"-I{INCLUDE}", "-fsyntax-only", str(source)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_fixed_prototypes_are_in_the_header_to_the_letter() -> None:
    recorded = check_abi.read_header((ROOT / "tests" / "fixed_prototypes.h").read_text())
    header = check_abi.read_header((INCLUDE / "mfa.h").read_text())
    assert len(recorded.functions) == 6
    assert len(recorded.constants) == 6
    for name, prototype in recorded.functions.items():
        assert header.functions[name] == prototype
    for name, value in recorded.constants.items():
        assert header.constants[name] == value


def test_fixed_statuses() -> None:
    constants = check_abi.read_header((INCLUDE / "mfa.h").read_text()).constants
    statuses = {name: value for name, value in constants.items() if name == "MFA_SUCCESS" or name.startswith("MFA_ERROR_")}
    assert statuses == {
        "MFA_SUCCESS": 0,
        "MFA_ERROR_INVALID_CONTEXT": 1,
        "MFA_ERROR_ALLOCATION_FAILED": 2,
        "MFA_ERROR_INVALID_DIMENSIONS": 3,
        "MFA_ERROR_EXECUTION_FAILED": 4,
        "MFA_ERROR_INVALID_ARGUMENT": 5,
        "MFA_ERROR_UNSUPPORTED": 6,
        "MFA_ERROR_DEVICE_UNAVAILABLE": 7,
    }


def test_every_pointer_states_its_nullability() -> None:
    text = re.sub(r"/\*.*?\*/", " ", (INCLUDE / "mfa.h").read_text(), flags=re.S)
    text = re.sub(r"^\s*#.*$", "", text, flags=re.M)
    # The star of a function pointer's type declares a type, not a pointer that is passed.
    bare = re.findall(r"[^\n]*\*(?!\s*(?:MFA_NULLABLE|MFA_CHECKED|mfa_\w+_function\b))[^\n]*", text)
    assert bare == []


def test_clang_sees_no_pointer_without_nullability(tmp_path: Path) -> None:
    if shutil.which("clang") is None:
        pytest.skip("clang is not installed")
    source = tmp_path / "program.c"
    source.write_text(PROGRAM)
    command = ["clang", "-std=c11", "-Werror=nullability-completeness", f"-I{INCLUDE}", "-fsyntax-only", str(source)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
