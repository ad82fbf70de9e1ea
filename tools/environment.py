"""The virtual environment .venv at the repository's root, and how packages get into it.

``./justw`` calls this file with the stamp of the wanted state; other tools import `install`. It runs before anything is installed, so it
needs the standard library only. Packages are installed by uv where uv comes, else by pip (always by pip with ``JUSTW_INSTALLER=pip``).
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"
STAMP = VENV / ".stamp"
REQUIREMENTS = ROOT / "requirements-dev.txt"


class SetupError(Exception):
    """What this machine lacks, in words for its owner."""


@contextmanager
def locked() -> Iterator[None]:
    """Hold off other processes that change the environment; the lock dies with its process."""
    with REQUIREMENTS.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("justw: waiting for another process that installs into .venv", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(*command: str | Path, quiet: bool = False, environment: dict[str, str] | None = None) -> bool:
    """Run a command; `quiet` hides what it prints. True if it succeeded."""
    output = subprocess.DEVNULL if quiet else None
    words = [str(word) for word in command]
    return subprocess.run(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment).returncode == 0


@functools.cache
def pip_settings() -> dict[str, str]:
    """Pip's options by name ("find-links"), from its configuration files and, stronger, from environment variables."""
    interpreter = getattr(sys, "_base_executable", sys.executable)  # .venv itself may have no pip to ask
    listing = subprocess.run([interpreter, "-m", "pip", "config", "list"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    found = {}
    for section in ("global", "install", ":env:"):
        for match in re.finditer(rf"^{section}\.([a-z-]+)=(.*)$", listing, flags=re.M):
            found[match[1]] = " ".join(shlex.split(match[2].replace("\\n", " ")))
    # Without any pip the environment variables still count.
    for name in ("find-links", "index-url", "extra-index-url", "cert", "no-index"):
        value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
        if value:
            found[name] = value
    return found


def find_links() -> list[str]:
    """Folders and pages that pip was told to look for wheels in."""
    return pip_settings().get("find-links", "").split()


def uv_arguments() -> list[str]:
    """Options that give uv what pip reads from its own configuration: uv ignores that."""
    settings = pip_settings()
    arguments = []
    for place in settings.get("find-links", "").split():
        arguments += ["--find-links", place]
    if "UV_DEFAULT_INDEX" not in os.environ and "index-url" in settings:
        arguments += ["--default-index", settings["index-url"]]
    for index in settings.get("extra-index-url", "").split():
        arguments += ["--index", index]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        arguments.append("--no-index")
    return arguments


def uv_environment() -> dict[str, str]:
    """The environment for uv: the certificates that pip was given, where no others are set."""
    environment = dict(os.environ)
    certificates = pip_settings().get("cert")
    if certificates and not environment.get("SSL_CERT_FILE"):
        environment["SSL_CERT_FILE"] = certificates
    return environment


def has_pip(python: Path | str) -> bool:
    """True if `python -m pip` runs."""
    return Path(python).exists() and run(python, "-m", "pip", "--version", quiet=True)


def uv_wanted() -> bool:
    """False if the caller chose pip."""
    choice = os.environ.get("JUSTW_INSTALLER", "uv")
    if choice not in ("uv", "pip"):
        raise SetupError(f"JUSTW_INSTALLER must be uv or pip: {choice}")
    return choice == "uv"


def pip_install(python: Path | str, *arguments: str | Path, quiet: bool = False, into: Path | None = None) -> bool:
    """Install with the pip of the interpreter `python`, for itself or `into` the environment of another (pip 22.3 or newer)."""
    target = ("--python", into) if into else ()
    return run(python, "-m", "pip", *target, "install", "--quiet", "--disable-pip-version-check", *arguments, quiet=quiet)


def uv_install(uv: Path | str, *arguments: str | Path, quiet: bool = False) -> bool:
    """Install into .venv with uv, configured as pip is."""
    command: list[str | Path] = [uv, "pip", "install", "--quiet", "--python", PYTHON, *uv_arguments(), *arguments]
    return run(*command, quiet=quiet, environment=uv_environment())


def install(arguments: Sequence[str], quiet: bool = False) -> bool:
    """Install packages into .venv.

    Parameters
    ----------
    arguments
        Options that uv and pip have in common, and requirements.
    quiet
        Print nothing.

    Returns
    -------
    bool
        True if all were installed.
    """
    if UV.exists() and uv_wanted():
        return uv_install(UV, *arguments, quiet=quiet)
    bring_pip()
    return pip_install(PYTHON, *arguments, quiet=quiet)


def requirements() -> list[str]:
    """The lines of requirements-dev.txt without comments."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in REQUIREMENTS.read_text().splitlines())
    return [line for line in lines if line]


def bring_uv(requirement: str) -> bool:
    """Put the pinned uv into .venv, by whatever installer there is; False if it does not come."""
    uv = shutil.which("uv")
    if uv:
        return uv_install(uv, requirement)
    if has_pip(PYTHON):
        return pip_install(PYTHON, "--only-binary=uv", requirement, quiet=True)
    # The base interpreter's pip spares .venv a pip of its own.
    return pip_install(sys.executable, "--only-binary=uv", requirement, quiet=True, into=PYTHON)


def bring_pip() -> None:
    """Put pip into .venv, from the standard library or by the base interpreter's pip."""
    if has_pip(PYTHON) or run(PYTHON, "-m", "ensurepip", "--upgrade", quiet=True):
        return
    if not pip_install(sys.executable, "pip", quiet=True, into=PYTHON):
        raise SetupError("needs uv, pip or ensurepip to install its tools (Debian, Ubuntu: apt install python3-venv)")


def create() -> None:
    """Create .venv, unless there is a whole one that was made here: a moved one has scripts that name another folder."""
    made_here = STAMP.exists() and STAMP.read_text().endswith(f" {ROOT}")
    if made_here and PYTHON.exists() and run(PYTHON, "-c", "", quiet=True):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    # With pip, venv would need ensurepip, which Debian packages apart; without, it needs nothing.
    if not run(sys.executable, "-m", "venv", "--without-pip", VENV):
        raise SetupError("needs Python's venv module (Debian, Ubuntu: apt install python3-venv)")


def set_up(stamp: str) -> None:
    """Bring .venv to the state that `stamp` names, unless another process did so while this one waited."""
    with locked():
        if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == stamp:
            return
        print("justw: installing the tools of requirements-dev.txt into .venv", file=sys.stderr)
        create()
        STAMP.unlink(missing_ok=True)
        uv_requirement = next(line for line in requirements() if line.startswith("uv=="))
        others = [line for line in requirements() if line != uv_requirement]
        if uv_wanted():
            bring_uv(uv_requirement)  # where it does not come, pip does the rest
        if not install(others):
            raise SetupError("could not install the tools of requirements-dev.txt; the messages above say why")
        STAMP.write_text(stamp)


if __name__ == "__main__":
    try:
        set_up(sys.argv[1])
    except SetupError as error:
        sys.exit(f"justw: {error}")
