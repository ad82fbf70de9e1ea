"""Print the conformance matrix; with `--write`, also put it into docs/conformance.md."""

from __future__ import annotations

import argparse
import collections
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as pytest does
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import suite
from umfa.bench.machine import processor_name

DOCUMENT = suite.ROOT / "docs" / "conformance.md"
BEGIN, END = "<!-- begin matrix -->", "<!-- end matrix -->"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def languages() -> tuple[list[str], bool]:
    """For each language and backend how many cases have C's bytes and words, and whether all that were answered have."""
    rows, passed = [], True
    for language in suite.LANGUAGES:
        row = [language]
        for backend in suite.BACKENDS:
            try:
                answers = suite.run(language, backend)
                suite.run("C", backend)
            except suite.UnavailableError as reason:
                row.append(f"not here: {reason}")
                continue
            said = [case for case in suite.cases() if "skipped" not in answers[case["id"]]]
            wrong = [
                case
                for case in said
                if suite.wrong_status(case, answers[case["id"]]) or suite.other_than_c(case, language, backend)
            ]  # fmt: skip
            passed = passed and not wrong
            row.append(f"{len(said) - len(wrong)} of {len(said)}")
        rows.append(row)
    return table(["", *suite.BACKENDS], rows), passed


def features() -> tuple[list[str], bool]:
    """For each kind of case and backend how many are within their bounds, and which kernels served them."""
    kinds: dict[str, list[suite.Case]] = collections.defaultdict(list)
    for case in (case for case in suite.cases() if case["status"] == 0):
        kinds["/".join(case["id"].split("/")[:2])].append(case)
    here = []
    for backend in suite.BACKENDS:
        try:
            suite.run("Python", backend)
            here.append(backend)
        except suite.UnavailableError:
            continue
    rows, passed = [], True
    for kind, cases in kinds.items():
        row = [f"`{kind}`"]
        for backend in here:
            good = sum(suite.out_of_bounds(case, backend) is None for case in cases)
            answers = suite.run("C", backend)
            kernels = {answers[case["id"]].get("kernel") for case in cases} - {None}
            borrowed = backend == "softmetal" and any("metal" not in str(kernel) for kernel in kernels)
            passed = passed and good == len(cases)
            row.append(f"{good} of {len(cases)}" + (", some by the CPU" if borrowed else ""))
        rows.append(row)
    return table(["", *here], rows), passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the matrix into docs/conformance.md")
    chosen = parser.parse_args()
    by_language, same = languages()
    by_feature, near = features()
    matrix = [
        f"{len(suite.cases())} cases, on {platform.system()} {platform.machine()} ({processor_name()}). In each language, how many of the",
        "cases that it can say give C's bytes, statuses and words:",
        "",
        *by_language,
        "",
        "On each backend, how many are within their bounds of the reference:",
        "",
        *by_feature,
    ]
    print("\n".join(matrix))
    if chosen.write:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        after = rest.split(END)[1]
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n" + "\n".join(matrix) + f"\n\n{END}{after}")
    return 0 if same and near else 1


if __name__ == "__main__":
    sys.exit(main())
