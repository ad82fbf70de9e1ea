"""What brings Rust its crates says what is missing, leaves the user's files alone, and lists what it needs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cargo
import debian_crates

ROOT = Path(__file__).resolve().parent.parent


def test_missing_rust__is_left_out_with_words(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "check_rust.py")]
    answer = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert answer.returncode == 0
    assert answer.stderr == "check_rust: left out: needs Rust >= 1.85, and there is no `cargo` on PATH: see https://rustup.rs\n"


def test_missing_apt__is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(debian_crates.LeftOutError, match="there is no `apt-get`"):
        debian_crates.prepare_apt()


def test_mirrors__are_those_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "apt-get"
    uris = (
        "http://mirror.example/debian/",
        "http://mirror.example/debian/",
        "http://other.example/debian-security/",
        "http://x.example/apt",
    )
    program.write_text("#!/bin/sh\n" + "".join(f"echo {uri}\n" for uri in uris))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert debian_crates.mirrors() == ["http://mirror.example/debian/"]


def test_lock_file__of_the_user_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, mine, yours = tmp_path / "Cargo.lock", tmp_path / "mine", tmp_path / "yours"
    monkeypatch.setattr(cargo, "LOCK", lock)
    lock.write_text("the user's")
    cargo.exchange(mine, yours)
    assert not lock.exists()
    lock.write_text("made with Debian's crates")
    cargo.exchange(yours, mine)
    assert lock.read_text() == "the user's"
    cargo.exchange(mine, yours)
    assert lock.read_text() == "made with Debian's crates"


def test_list__has_packages_of_all_direct_dependencies() -> None:
    text = debian_crates.LIST.read_text()
    assert text.startswith("# ")
    manifest = (ROOT / "rust" / "Cargo.toml").read_text()
    names = re.findall(r"^([\w-]+) = ", manifest.partition("[workspace.dependencies]")[2].partition("\n[")[0], flags=re.M)
    assert names
    for name in names:
        assert f"librust-{name}-dev" in debian_crates.listed(), name
    assert debian_crates.listed() == sorted(set(debian_crates.listed()))


def test_versions__are_one() -> None:
    header = (ROOT / "include" / "mfa.h").read_text()
    version = ".".join(re.findall(r"#define MFA_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))
    assert f'\nversion = "{version}"\n' in (ROOT / "rust" / "Cargo.toml").read_text()
    for manifest in (ROOT / "rust").glob("*/Cargo.toml"):
        for wanted in re.findall(r'path = "\.\./[\w-]+", version = "([\d.]+)"', manifest.read_text()):
            assert wanted == version


def test_packages_of_crates__are_found_by_name_and_version() -> None:
    owners = {"heck-0.5.0-1+really0.5.0": "librust-heck-dev", "syn-2.0.119": "librust-syn-2-dev", "syn-3.0.9": "librust-syn-dev"}
    assert debian_crates.packages_of({"heck-0.5.0", "syn-2.0.119"}, owners) == {"librust-heck-dev", "librust-syn-2-dev"}
