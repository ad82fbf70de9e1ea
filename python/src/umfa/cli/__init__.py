"""The command line: ``umfa info``, ``umfa check``, ``umfa demo``.

Exit codes: 0 done, 1 a check failed, 2 wrong usage or something that is not installed.
"""

from umfa.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; the entry point ``umfa``."""
    app(prog_name="umfa")
