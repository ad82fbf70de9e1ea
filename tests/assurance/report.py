"""Print the figures of all suites of faults; with `--write`, also put those of full runs into docs/assurance.md."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as pytest does
import figures

DOCUMENT = figures.ROOT / "docs" / "assurance.md"
BEGIN, END = "<!-- begin figures -->", "<!-- end figures -->"


def runs() -> list[tuple[str, dict[str, Any]]]:
    """The name of each suite and what its last run wrote, those of runs made by hand after the others of their suite."""
    found = [(path.stem, json.loads(path.read_text())) for path in sorted(figures.MADE.glob("*.json"))]
    found += [(f"{path.stem}, by hand", json.loads(path.read_text())) for path in sorted(figures.RECORDS.glob("*.json"))]
    return sorted(found, key=lambda run: run[0])


def number(figure: Any) -> str:
    """A figure as a person writes it."""
    return f"{figure:,}" if isinstance(figure, int) and not isinstance(figure, bool) else str(figure)


def tables() -> list[str]:
    """A heading and a table in Markdown for each suite."""
    lines = []
    for suite, run in runs():
        lines += [f"### {suite.capitalize()}", ""]
        lines += [f"{run['date']}, {run['machine']}, {run['processor']}, {run['instruction set']}; {run['size']} size.", ""]
        lines += ["| | |", "| --- | --: |", *(f"| {name} | {number(figure)} |" for name, figure in run["figures"].items()), ""]
        lines += planted_errors(run.get("errors", {}))
    return lines


def planted_errors(errors: dict[str, dict[str, Any]]) -> list[str]:
    """A table of the errors that tools/mutate.py planted, and who caught each; parameters of a test are left out."""
    rows = []
    for found in errors.values():
        by = str(found["caught_by"] or "nobody")
        if by.startswith("tests/"):
            by = f"`{by.partition('[')[0].removeprefix('tests/')}`"
        rows.append(f"| {found['part']} | {found['error']} | {by} |")
    return ["| part | error | caught by |", "| --- | --- | --- |", *rows, ""] if rows else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/assurance.md")
    chosen = parser.parse_args()
    text = "\n".join(tables())
    print(text)
    short = [suite for suite, run in runs() if run["size"] != "full"]
    if chosen.write and short:
        print(f"report: not written, since these ran in short size: {', '.join(short)}; run `./justw assurance --write`", file=sys.stderr)
        return 1
    if chosen.write:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        after = rest.split(END)[1]
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
