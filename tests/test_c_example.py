"""The program in docs/c.md is the one in docs/examples, compiles without warnings, and says what it should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import check_abi

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "attention.c"


def test_guide_shows_the_example() -> None:
    assert f"```c\n{EXAMPLE.read_text()}```\n" in (ROOT / "docs" / "c.md").read_text()


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_example_compiles_and_runs(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    library = check_abi.LIBRARY.resolve()
    program = tmp_path / "attention"
    warnings = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    linking = [str(library), f"-Wl,-rpath,{library.parent}", "-lm"]
    subprocess.run([compiler, *warnings, f"-I{ROOT / 'include'}", str(EXAMPLE), "-o", str(program), *linking], check=True)
    answer = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert re.match(r"libmfa \d+\.\d+\.\d+, kernel attention_forward_\w+\n", answer)
    assert "keys and values: 262144 bytes in FP32, 69632 in INT8\n" in answer
    error = re.search(r"relative error of the output: ([\d.]+) %", answer)
    assert error is not None
    assert 0.1 < float(error[1]) < 2
