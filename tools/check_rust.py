"""Check rust/: formats, lints, tests, examples, documentation, the cost of the safe layer, and the Python module umfa_rs.

    python tools/check_rust.py [options of `cargo test`]      with options, only cargo's tests

Where Rust or its crates cannot be had, everything is left out, and the reason is said.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cargo
import debian_crates
from build_library import BuildError
from debian_crates import LeftOutError
from environment import VENV

ROOT = Path(__file__).resolve().parent.parent
# The crates without the Python module, which only maturin links.
CRATES = ["--package", "mfa-sys", "--package", "mfa"]
STEPS = {
    "format": ["fmt", "--all", "--check"],
    "lints": ["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"],
    "tests": ["test", "--quiet", *CRATES],
    "cost": ["bench", "--quiet", "--package", "mfa", "--bench", "overhead"],
    **{
        f"example {name}": ["run", "--quiet", "--package", "mfa", "--example", name]
        for name in ("c_functions", "first_attention", "quantized_kv", "training_step")
    },
}


class CheckError(Exception):
    """Which step failed."""


def check(environment: dict[str, str]) -> None:
    """Run all steps."""
    for name, arguments in STEPS.items():
        print(f"check_rust: {name}", file=sys.stderr)
        if cargo.run(["cargo", *arguments], environment) != 0:
            raise CheckError(f"{name} failed: cargo {' '.join(arguments)}")
    # Where documentation is made there may be neither the library nor Swift.
    print("check_rust: documentation", file=sys.stderr)
    others = {"DOCS_RS": "1", "MFA_LIB_DIR": "/nowhere", "RUSTDOCFLAGS": "--deny warnings"}
    if cargo.run(["cargo", "doc", "--quiet", "--no-deps", *CRATES], environment, **others) != 0:
        raise CheckError("the documentation cannot be made without the library")


def check_module(environment: dict[str, str]) -> None:
    """Install umfa_rs into .venv in place, and test it."""
    if sys.version_info < (3, 11):
        print("check_rust: umfa_rs left out: needs Python >= 3.11, whose stable interface has the buffer protocol", file=sys.stderr)
        return
    maturin = [str(VENV / "bin" / "maturin"), "develop", "--quiet", "--manifest-path", "umfa-rs/Cargo.toml"]
    if (VENV / "bin" / "uv").exists():
        maturin.append("--uv")
    print("check_rust: umfa_rs", file=sys.stderr)
    if cargo.run(maturin, environment, VIRTUAL_ENV=str(VENV)) != 0:
        raise CheckError("umfa_rs could not be built")
    tests = [sys.executable, "-m", "pytest", "--quiet", "tests/test_umfa_rs.py"]
    if subprocess.run(tests, stdin=subprocess.DEVNULL, cwd=ROOT).returncode != 0:
        raise CheckError("the tests of umfa_rs failed")


def main() -> None:
    """Check, and say what was left out and why."""
    arguments = sys.argv[1:]
    # The bounds of the tests are those of FP32 arithmetic, which integer kernels do not keep to.
    os.environ.setdefault("MFA_KERNELS", "float")
    try:
        with cargo.prepared() as environment:
            if arguments:
                sys.exit(cargo.run(["cargo", "test", *CRATES, *arguments], environment))
            check_module(environment)
            check(environment)
            by_debian = "CARGO_HOME" in environment and Path(environment["CARGO_HOME"]) == debian_crates.HOME
        if by_debian:
            debian_crates.check()
    except LeftOutError as error:
        print(f"check_rust: left out: {error}", file=sys.stderr)
    except (BuildError, CheckError) as error:
        sys.exit(f"check_rust: {error}")


if __name__ == "__main__":
    main()
