"""Fuzzing in short: each target of libFuzzer on its seeds, past findings among them, and for a while on inputs made from them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import figures
import fuzz

SECONDS = figures.pick(2, 60)


@pytest.fixture(scope="module", autouse=True)
def targets() -> None:
    try:
        fuzz.build_targets()
    except (fuzz.UnavailableError, fuzz.build_library.BuildError) as reason:
        pytest.skip(str(reason))


# The first has to wait for the library, which is built once for fuzzing.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_nothing_is_found(target: str) -> None:
    seeds = sorted((fuzz.SEEDS / target).iterdir())
    assert seeds, "a target without seeds finds nothing"
    outcome = fuzz.run(target, executions=-1, seconds=SECONDS, keep=False)
    assert not outcome.finding, f"{outcome.finding}\nthe input is in {fuzz.FINDINGS}"
    assert outcome.executions > len(seeds)
    assert sorted((fuzz.SEEDS / target).iterdir()) == seeds, "what is new is not for the repository"
    figures.add("fuzzing", targets=1, seeds=len(seeds), executions=outcome.executions)


FAILING = """
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size > 1 && data[0] == 'N' && data[1] == 'O') abort();
    return 0;
}
"""


def test_a_finding_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, program = tmp_path / "failing.c", tmp_path / "failing"
    source.write_text(FAILING)
    subprocess.run([fuzz.find_clang(), "-fsanitize=fuzzer", "-fuse-ld=lld", source, "-o", program], check=True)
    monkeypatch.setattr(fuzz, "program", lambda target, build: program)
    monkeypatch.setattr(fuzz, "FINDINGS", tmp_path / "findings")
    outcome = fuzz.run("descriptor", executions=1_000_000, keep=False)
    assert "deadly signal" in outcome.finding
    assert [path.read_bytes()[:2] for path in (tmp_path / "findings").iterdir()] == [b"NO"]
