"""Write the sources of the Metal kernels into Swift: the backend hands them to the compiler of the system as a text.

    python tools/embed_kernels.py --check      fail if core/MetalBackend/KernelSources.swift is not what the sources give
    python tools/embed_kernels.py --update     write it

A text is the only form that SwiftPM and Xcode treat alike: SwiftPM does not compile .metal files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from metal_translator import flatten

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "core" / "MetalBackend" / "Kernels"
GENERATED = ROOT / "core" / "MetalBackend" / "KernelSources.swift"


def generate() -> str:
    """The Swift source with all kernels."""
    lines = [
        "// Written by tools/embed_kernels.py from core/MetalBackend/Kernels. Do not edit.",
        "",
        "// swift-format-ignore-file",
        "",
        "enum KernelSources {",
    ]
    for path in sorted(KERNELS.glob("*.metal")):
        words = path.stem.split("_")
        name = words[0] + "".join(word.capitalize() for word in words[1:])
        text = flatten(path)
        lines += [f'    static let {name} = #"""', *(f"        {line}" if line else "" for line in text.splitlines()), "", '        """#']
    return "\n".join([*lines, "}", ""])


def main() -> None:
    """Check or update, as the command line says."""
    parser = argparse.ArgumentParser(description="Embed the Metal kernels in Swift.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--update", action="store_true")
    arguments = parser.parse_args()
    text = generate()
    if arguments.update:
        GENERATED.write_text(text, encoding="utf-8")
    elif not GENERATED.exists() or GENERATED.read_text(encoding="utf-8") != text:
        sys.exit(f"embed_kernels: {GENERATED.relative_to(ROOT)} is not up to date; run `python tools/embed_kernels.py --update`")


if __name__ == "__main__":
    main()
