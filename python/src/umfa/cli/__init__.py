"""The command line: ``umfa info``, ``umfa check``, ``umfa quantize``, ``umfa demo``, ``umfa bench``.

Exit codes: 0 done, 1 a check failed, 2 wrong usage or something that is not installed.
"""

import sys

import umfa
from umfa.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; the entry point ``umfa``."""
    try:
        app(prog_name="umfa")
    except umfa.MFAError as error:  # such as a setting of the environment that no context can be made with
        print(error, file=sys.stderr)
        sys.exit(2)
