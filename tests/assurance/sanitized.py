"""Tests under a sanitizer: in a Python process of their own, which has the sanitizer's runtime and loads a library built for it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import build_library
import figures

# Python never frees much of what it holds at exit, so leaks are counted by suites of their own.
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99:allocator_may_return_null=1"},
    "thread": {"TSAN_OPTIONS": "exitcode=99:halt_on_error=0"},
    "undefined": {"UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99"},
}


@functools.cache
def environment(sanitizer: str) -> dict[str, str]:
    """The environment of a process that uses a sanitised library; the test is skipped where there can be none."""
    if sys.platform != "linux":
        pytest.skip("LD_PRELOAD of a sanitizer's runtime is tried on Linux only")
    try:
        runtime = build_library.sanitizer_runtime(sanitizer)
        library = build_library.build_library(sanitizer=sanitizer)
    except build_library.BuildError as error:
        pytest.skip(str(error))
    own = {"LD_PRELOAD": str(runtime), "MFA_LIBRARY": str(library), "MFA_ASSURANCE_FIGURES": str(folder(sanitizer))}
    return {**os.environ, **OPTIONS[sanitizer], **own}


def folder(sanitizer: str) -> Path:
    """Where suites in such a process leave their figures."""
    return figures.MADE / sanitizer


def figures_of(sanitizer: str, suite: str) -> dict[str, Any]:
    """What a suite counted in the last such process."""
    return dict(json.loads((folder(sanitizer) / f"{suite}.json").read_text())["figures"])


def python(sanitizer: str, *arguments: str | Path, timeout: float = 1200) -> subprocess.CompletedProcess[str]:
    """Run Python under a sanitizer and keep what it prints; a report of the sanitizer is an exit code other than 0."""
    command = [sys.executable, *map(str, arguments)]
    variables = environment(sanitizer)
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=variables, timeout=timeout)
