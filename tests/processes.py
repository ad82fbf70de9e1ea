"""Work in processes of its own, where a crash shows and a hang ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parent / "assurance")]


def run_alone(code: str, timeout: float = 240, **environment: str) -> str:
    """Run a program, which may import from the tests, in a Python process of its own; what it prints."""
    program = f"import sys\nsys.path[:0] = {FOLDERS!r}\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def in_child(function: Callable[[], object]) -> None:
    """Run a function in a forked child; fails if it raises or does not end there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = threading.Timer(60, os.kill, (child, 9))
    deadline.start()
    _, status = os.waitpid(child, 0)
    deadline.cancel()
    assert status == 0, status
