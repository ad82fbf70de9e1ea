"""Run cargo, or another program, on rust/ with what the build needs: libmfa, libclang and the crates.

    python tools/cargo.py test -p mfa              cargo test -p mfa
    python tools/cargo.py --program maturin ...    another program that runs cargo

Crates come from their registry, as cargo is configured on this machine, or where that cannot be reached from Debian's packages: see
debian_crates.py. Intermediate files go below .build-rust.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import debian_crates
from build_library import BuildError, build_library
from debian_crates import LeftOutError
from environment import VENV

ROOT = Path(__file__).resolve().parent.parent
WORKSPACE = ROOT / "rust"
LOCK = WORKSPACE / "Cargo.lock"
SCRATCH = ROOT / ".build-rust"


@contextmanager
def prepared() -> Iterator[dict[str, str]]:
    """The environment for cargo, while nobody else runs it.

    Cargo.lock is not part of the repository. That of Debian's crates is set aside afterwards, and the user's own put back: the two differ
    in versions and checksums.

    Raises
    ------
    LeftOutError
        If something is missing on this machine.
    BuildError
        If libmfa cannot be built.
    """
    if shutil.which("cargo") is None:
        raise LeftOutError("needs Rust >= 1.85, and there is no `cargo` on PATH: see https://rustup.rs")
    SCRATCH.mkdir(exist_ok=True)
    with (SCRATCH / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        environment = {"CARGO_TARGET_DIR": str(SCRATCH / "target"), **os.environ}
        environment["PATH"] = f"{VENV / 'bin'}:{environment.get('PATH', '')}"
        if "MFA_LIB_DIR" not in environment:
            environment["MFA_LIB_DIR"] = str(build_library().parent)
        if registry_serves():
            yield environment
            return
        try:
            environment["CARGO_HOME"] = str(debian_crates.fetch())
        except LeftOutError as error:
            raise LeftOutError(f"needs crates: their registry cannot be reached, and Debian's packages neither: {error}") from None
        mine, yours = SCRATCH / "debian" / "Cargo.lock", SCRATCH / "Cargo.lock"
        exchange(mine, yours)
        try:
            yield environment
        finally:
            exchange(yours, mine)


def exchange(comes: Path, goes: Path) -> None:
    """Set the present Cargo.lock aside and put another one in its place, as far as there are any."""
    if LOCK.exists():
        LOCK.replace(goes)
    if comes.exists():
        comes.replace(LOCK)


def registry_serves() -> bool:
    """Whether cargo gets all crates as it is configured on this machine."""
    offline = ["cargo", "fetch", "--quiet", "--offline", "--manifest-path", str(WORKSPACE / "Cargo.toml")]
    had_lock = LOCK.exists()
    if subprocess.run(offline, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0:
        return True
    if debian_crates.STAMP.exists():
        return False
    online = [word for word in offline if word != "--offline"]
    impatient = {**os.environ, "CARGO_NET_RETRY": "0", "CARGO_HTTP_TIMEOUT": "10"}
    serves = subprocess.run(online, stdin=subprocess.DEVNULL, capture_output=True, env=impatient).returncode == 0
    if not serves and not had_lock:
        LOCK.unlink(missing_ok=True)
    return serves


def run(command: Sequence[str | Path], environment: dict[str, str], **variables: str) -> int:
    """Run a command in rust/; returns its exit status."""
    words = [str(word) for word in command]
    return subprocess.run(words, stdin=subprocess.DEVNULL, cwd=WORKSPACE, env={**environment, **variables}).returncode


def main() -> None:
    """Run what the command line says."""
    arguments = sys.argv[1:]
    program = "cargo"
    if arguments[:1] == ["--program"]:
        program, arguments = arguments[1], arguments[2:]
    try:
        with prepared() as environment:
            sys.exit(run([program, *arguments], environment))
    except (LeftOutError, BuildError) as error:
        sys.exit(f"cargo: {error}")


if __name__ == "__main__":
    main()
