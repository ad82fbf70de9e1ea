"""Build hook of the Python package: compiles libmfa, declares include/mfa.h to cffi, and puts both beside the Python sources.

A wheel gets a copy of the library; an editable installation a link to it, so that the next build of the library is in use at once.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).resolve().parent
PACKAGE = HERE / "src" / "umfa"
LIBRARY_NAME = "libmfa.dylib" if sys.platform == "darwin" else "libmfa.so"
CFFI_MODULE_NAME = "_mfa_cffi.py"
MINIMUM_MACOS = "14_0"

# The parts of DLPack 1.0 that reading a CPU tensor needs (https://dmlc.github.io/dlpack).
DLPACK_DECLARATIONS = """
typedef struct { int32_t device_type; int32_t device_id; } DLDevice;
typedef struct { uint8_t code; uint8_t bits; uint16_t lanes; } DLDataType;
typedef struct {
    void* data; DLDevice device; int32_t ndim; DLDataType dtype; int64_t* shape; int64_t* strides; uint64_t byte_offset;
} DLTensor;
typedef struct { DLTensor dl_tensor; void* manager_ctx; void* deleter; } DLManagedTensor;
typedef struct {
    uint32_t major; uint32_t minor; void* manager_ctx; void* deleter; uint64_t flags; DLTensor dl_tensor;
} DLManagedTensorVersioned;
"""


def repository_root() -> Path:
    """The folder with the library's sources: above this one in the repository, this one in a source distribution."""
    for root in (HERE.parent, HERE):
        if (root / "include" / "mfa.h").is_file() and (root / "Package.swift").is_file():
            return root
    raise SystemExit(
        f"umfa: libmfa's sources (include/mfa.h, Package.swift, core/) are neither in {HERE.parent} nor in {HERE}; build from a clone"
    )


def header_text() -> str:
    """The text of include/mfa.h."""
    return (repository_root() / "include" / "mfa.h").read_text(encoding="utf-8")


def header_version() -> str:
    """The version that include/mfa.h states: the only place where it is written."""
    text = header_text()
    numbers = [re.search(rf"#define MFA_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    if not all(numbers):
        raise SystemExit("umfa: include/mfa.h does not define MFA_VERSION_MAJOR, _MINOR and _PATCH as numbers")
    return ".".join(number[1] for number in numbers if number)


def declarations(header: str) -> str:
    """What cffi's ``cdef`` understands of a header: its types, functions and integer constants."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.DOTALL)
    constants = re.findall(r"^#define (MFA_[A-Z0-9_]+) (\d+)\s*$", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\b(MFA_API|MFA_NULLABLE|MFA_CHECKED)\b", "", text)
    return "\n".join(f"#define {name} {value}" for name, value in constants) + text


def generate_cffi_module(path: Path) -> None:
    """Write the cffi module (out-of-line, ABI mode: pure Python, no C compiler) of the header to `path`."""
    from cffi import FFI

    ffi = FFI()
    ffi.set_source("umfa._mfa_cffi", None)
    ffi.cdef(declarations(header_text()))
    ffi.cdef(DLPACK_DECLARATIONS)
    ffi.emit_python_code(str(path))


def compile_library() -> Path:
    """The path of a libmfa for this machine: built now, or the one that MFA_LIBRARY names."""
    given = os.environ.get("MFA_LIBRARY")
    if given:
        if not Path(given).is_file():
            raise SystemExit(f"umfa: MFA_LIBRARY must name a built libmfa, and there is no file {given}")
        return Path(given).resolve()
    script = repository_root() / "tools" / "build_library.py"
    answer = subprocess.run([sys.executable, str(script)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    lines = answer.stdout.split("\n")
    library = Path(lines[-2]) if len(lines) > 1 else Path()
    if answer.returncode != 0 or not library.is_file():
        raise SystemExit(
            "umfa: libmfa could not be built; the messages above say why. It takes Swift 6.3 or newer (https://swift.org/install; on macOS,"
            " Xcode). Or set MFA_LIBRARY to a libmfa that was built elsewhere."
        )
    return library


def strip(library: Path) -> None:
    """Remove a copied library's local symbols, where there is a tool for that; they are two thirds of its size."""
    tool = shutil.which("llvm-objcopy") or shutil.which("objcopy")
    if tool and sys.platform != "darwin":
        subprocess.run([tool, "--strip-unneeded", str(library)], check=True)


def wheel_tag() -> str:
    """One wheel serves every Python 3 on a platform: nothing in it is compiled against Python."""
    if sys.platform == "darwin":
        return f"py3-none-macosx_{MINIMUM_MACOS}_{platform.machine()}"
    return "py3-none-" + os.environ.get("MFA_WHEEL_PLATFORM", f"linux_{platform.machine()}")


class CustomBuildHook(BuildHookInterface[Any]):
    """Called by hatchling before and after it collects the files of a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the two generated files: in place for an editable installation, else elsewhere, so that one in use is left alone."""
        library = compile_library()
        if version == "editable":
            link = PACKAGE / LIBRARY_NAME
            link.unlink(missing_ok=True)
            link.symlink_to(library)
            generate_cffi_module(PACKAGE / CFFI_MODULE_NAME)
        else:
            self.generated = tempfile.TemporaryDirectory()
            folder = Path(self.generated.name)
            strip(Path(shutil.copy2(library, folder / LIBRARY_NAME)))
            generate_cffi_module(folder / CFFI_MODULE_NAME)
            build_data["force_include"] |= {str(folder / name): f"umfa/{name}" for name in (LIBRARY_NAME, CFFI_MODULE_NAME)}
        build_data["pure_python"] = False
        build_data["tag"] = wheel_tag()

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the wheel now holds."""
        if version != "editable":
            self.generated.cleanup()
