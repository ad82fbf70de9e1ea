"""Tests under a sanitizer: in a Python process of their own, which has the sanitizer's runtime and loads a library built for it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import build_library

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
    return {**os.environ, **OPTIONS[sanitizer], "LD_PRELOAD": str(runtime), "MFA_LIBRARY": str(library)}


def python(sanitizer: str, *arguments: str | Path, timeout: float = 1200) -> subprocess.CompletedProcess[str]:
    """Run Python under a sanitizer and keep what it prints; a report of the sanitizer is an exit code other than 0."""
    command = [sys.executable, *map(str, arguments)]
    variables = environment(sanitizer)
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=variables, timeout=timeout)
