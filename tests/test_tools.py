"""The tools that everything else stands on fail with words that help, and hand on what the caller configured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import build_library
import environment

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def only_swift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a program in the place of Swift that prints a text, and nothing else on PATH."""

    def install(text: str) -> None:
        program = tmp_path / "swift"
        program.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{text}\nEND\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return install


def test_missing_swift_is_named(only_swift) -> None:
    with pytest.raises(build_library.BuildError, match=r"needs Swift >= 6\.3, and there is no `swift` on PATH: see https://"):
        build_library.find_swift()


def test_old_swift_is_refused(only_swift) -> None:
    only_swift("Swift version 6.2.4 (swift-6.2.4-RELEASE)\nTarget: x86_64-unknown-linux-gnu")
    with pytest.raises(build_library.BuildError, match=r"needs Swift >= 6\.3, and .*/swift is 6\.2"):
        build_library.find_swift()


@pytest.mark.parametrize("version", ["Swift version 6.3 (x)", "Apple Swift version 6.10.1 (y)", "Swift version 7.0-dev"])
def test_newer_swift_is_accepted(only_swift, version: str) -> None:
    only_swift(version)
    assert build_library.find_swift().endswith("/swift")


def test_command_line_of_the_build_says_why_it_failed(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "build_library.py")]
    answer = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr.startswith("build_library: libmfa needs Swift >= 6.3")


def test_every_requirement_is_pinned() -> None:
    lines = environment.requirements()
    assert any(line.startswith("uv==") for line in lines)
    assert all(re.match(r"[\w-]+==[\w.]+( ; (python_version (<|>=) \"3\.\d+\"|sys_platform == \"linux\"))?$", line) for line in lines)


def test_pip_settings_reach_uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not environment.has_pip(getattr(sys, "_base_executable", sys.executable)):
        pytest.skip("the base interpreter has no pip to ask")
    settings = tmp_path / "pip.conf"
    settings.write_text("[global]\nfind-links =\n    /folder/one\n    /folder/two\ncert = /certificates.pem\n")
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_", "SSL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://packages.example")
    environment.pip_settings.cache_clear()
    try:
        links = ["--find-links", "/folder/one", "--find-links", "/folder/two"]
        assert environment.uv_arguments() == [*links, "--index", "https://packages.example"]
        assert environment.uv_environment()["SSL_CERT_FILE"] == "/certificates.pem"
    finally:
        environment.pip_settings.cache_clear()


def test_unknown_installer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUSTW_INSTALLER", "conda")
    with pytest.raises(environment.SetupError, match="JUSTW_INSTALLER must be uv or pip: conda"):
        environment.uv_wanted()


def test_justw_lists_recipes_from_any_folder(tmp_path: Path) -> None:
    if not environment.STAMP.exists():
        pytest.skip("these tests do not run in the environment that ./justw makes")
    answer = subprocess.run([ROOT / "justw"], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    for recipe in ("build", "demo", "test", "check", "fmt", "wheels", "clean"):
        assert re.search(rf"^    {recipe}\b.*# [A-Z]", answer.stdout, flags=re.M), recipe


def test_justw_names_an_interpreter_that_does_not_do(tmp_path: Path) -> None:
    # A folder without .venv, so that justw has to look for Python.
    for name in ("justw", "requirements-dev.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    program = "/nowhere/python"
    answer = subprocess.run(["bash", tmp_path / "justw"], env={**os.environ, "PYTHON": program}, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr == f"justw: PYTHON must name a Python >= 3.10: {program}\n"
