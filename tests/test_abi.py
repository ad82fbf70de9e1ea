"""The binary interface is the recorded one, the library exports what the header declares, and the check notices when either is not so."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest

import check_abi

ROOT = Path(__file__).resolve().parent.parent


def test_interface_is_as_recorded() -> None:
    assert check_abi.check(check_abi.LIBRARY) == []


def test_library_exports_the_functions_of_the_header_and_nothing_else() -> None:
    declared = set(check_abi.read_header(check_abi.HEADER.read_text()).functions)
    assert check_abi.exported_symbols(check_abi.LIBRARY) == declared
    assert all(name.startswith("mfa_") for name in declared)


def test_every_declaration_with_visibility_is_seen() -> None:
    text = check_abi.HEADER.read_text()
    declared = check_abi.read_header(text).functions
    assert len(declared) == sum(line.startswith("MFA_API ") for line in text.splitlines())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("constants", "MFA_SUCCESS"), 9, "constants.MFA_SUCCESS: recorded 9, now 0"),
        (("functions", "mfa_gone"), "void mfa_gone(void)", "functions.mfa_gone: recorded, now gone"),
        (("structs", "mfa_tensor_t", "size"), 8, "structs.mfa_tensor_t.size: recorded 8, now 104"),
        (("structs", "mfa_tensor_t", "fields", "data", "offset"), 4, "structs.mfa_tensor_t.fields.data.offset: recorded 4, now 8"),
    ],
)
def test_a_change_of_the_interface_is_noticed(place: tuple[str, ...], value: object, message: str) -> None:
    current = check_abi.describe()
    recorded = copy.deepcopy(current)
    entry = recorded
    for name in place[:-1]:
        entry = entry[name]
    entry[place[-1]] = value
    assert check_abi.differences(recorded, current) == [message]


def test_a_new_function_is_noticed() -> None:
    current = check_abi.describe()
    recorded = copy.deepcopy(current)
    del recorded["functions"]["mfa_version"]
    assert check_abi.differences(recorded, current) == ["functions.mfa_version: new"]


def test_a_library_with_other_exports_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text("int mfa_version(void) { return 0; }\nint stray(void) { return 0; }\n")
    library = tmp_path / "libother.so"
    subprocess.run([check_abi.compiler(), "-shared", "-fPIC", source, "-o", library], check=True)
    problems = check_abi.check_library(library)
    assert "libother.so lacks mfa_quantize, which mfa.h declares" in problems
    assert "libother.so exports stray, which mfa.h does not declare" in problems


def test_command_line_reports_problems(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "check_abi.py"), "--check", "--library", str(tmp_path / "absent.so")]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1
    assert "there is no library at" in answer.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads the symbols of an ELF library")
def test_library_has_its_own_name_and_stays_loaded() -> None:
    # Worker threads run code of the library: dlclose() must not unmap it.
    answer = subprocess.run(["readelf", "--dynamic", check_abi.LIBRARY], check=True, capture_output=True, text=True).stdout
    assert "soname: [libmfa.so]" in answer
    assert "NODELETE" in answer
    needed = [line.split("[")[1].rstrip("]") for line in answer.splitlines() if "(NEEDED)" in line]
    assert not any("swift" in name or "dispatch" in name for name in needed), needed
