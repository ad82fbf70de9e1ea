"""Build the wheel of umfa_rs into dist/, with libmfa inside, and check that it works where nothing of this folder is known.

    python tools/rust_wheel.py

Where Rust, its crates or a Python that is new enough cannot be had, nothing is built, and the reason is said.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import cargo
from build_library import LIBRARY_NAME, BuildError
from debian_crates import LeftOutError
from environment import VENV

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PROGRAM = """
import numpy, umfa_rs
x = numpy.ones((1, 2, 16, 32), "float32")
with umfa_rs.MfaContext() as context:
    assert numpy.allclose(umfa_rs.attention(x, x, x, context=context), 1)
print(umfa_rs.__file__)
for line in open("/proc/self/maps") if __import__("os").path.exists("/proc/self/maps") else ():
    if "libmfa" in line:
        print(line.split()[-1])
"""


class WheelError(Exception):
    """What is wrong with the wheel."""


def stripped(library: Path) -> Path:
    """A copy of the library without symbols that nothing needs: half the size, and no names of source files."""
    copy = cargo.SCRATCH / "wheel" / library.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(library, copy)
    tool = shutil.which("llvm-objcopy") or shutil.which("objcopy")
    if tool and sys.platform == "linux":
        subprocess.run([tool, "--strip-unneeded", str(copy)], check=True)
    return copy


def build(environment: dict[str, str]) -> Path:
    """Build the wheel; returns its path."""
    library = Path(environment["MFA_LIB_DIR"]) / LIBRARY_NAME
    variables = {"MFA_LIB_DIR": str(stripped(library).parent), "UMFA_RS_RELOCATABLE": "1", "VIRTUAL_ENV": str(VENV)}
    for old in DIST.glob("umfa_rs-*.whl"):
        old.unlink()
    maturin = VENV / "bin" / "maturin"
    command = [str(maturin), "build", "--release", "--quiet", "--manifest-path", "umfa-rs/Cargo.toml", "--out", str(DIST)]
    # Messages of the compiler's own name source files; those of a wheel name no folder of whoever built it.
    flags = f"{environment.get('RUSTFLAGS', '')} --remap-path-prefix={ROOT}=umfa".strip()
    if cargo.run(command, environment, **variables, RUSTFLAGS=flags) != 0:
        raise WheelError("maturin failed; the messages above say why")
    return next(DIST.glob("umfa_rs-*.whl"))


def check(wheel: Path) -> None:
    """Unpack the wheel elsewhere and use it there: module and library come from there, and no path of this folder is in them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        libraries = [path for path in folder.rglob("*") if path.suffix in (".so", ".dylib")]
        if not any(path.name.startswith("libmfa") for path in libraries):
            raise WheelError(f"no libmfa in {wheel.name}: {[path.name for path in libraries]}")
        for path in libraries:
            if str(ROOT).encode() in path.read_bytes():
                raise WheelError(f"{path.name} names a folder of this build")
        command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}){PROGRAM}"]
        answer = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if answer.returncode != 0:
            raise WheelError(f"the wheel does not work:\n{answer.stderr}")
        strangers = [line for line in answer.stdout.splitlines() if not line.startswith(str(folder))]
        if strangers:
            raise WheelError(f"not from the wheel: {strangers}")


def main() -> None:
    """Build and check."""
    try:
        if sys.version_info < (3, 11):
            raise LeftOutError("needs Python >= 3.11, whose stable interface has the buffer protocol")
        DIST.mkdir(exist_ok=True)
        with cargo.prepared() as environment:
            wheel = build(environment)
        check(wheel)
        print(wheel)
    except LeftOutError as error:
        print(f"rust_wheel: left out: {error}", file=sys.stderr)
    except (BuildError, WheelError) as error:
        sys.exit(f"rust_wheel: {error}")


if __name__ == "__main__":
    main()
