"""The study of quantisation runs, and fills all of its document."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import umfa

ROOT = Path(__file__).resolve().parent.parent


def test_study__quick__measures_and_prints_each_table_of_the_document(tmp_path):
    command = [sys.executable, ROOT / "bench" / "quantization_study.py", "--quick", "--json", tmp_path / "study.json"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert answer.returncode == 0, answer.stderr
    document = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    places = re.findall(r"<!-- begin (.+) -->", document)
    assert places == re.findall(r"<!-- end (.+) -->", document)
    printed = set(re.findall(r"^## (.+)$", answer.stdout, flags=re.M))
    assert printed <= set(places)
    # The layers are those of a model that may not be installed.
    assert set(places) - printed <= {"layers"}
    errors = json.loads((tmp_path / "study.json").read_text())["errors"]
    assert {error["inputs"] for error in errors} >= {"gaussian_64", "gaussian_128", "biased_64", "outliers_64", "rotary_128"}
    assert all(0 < error["relative_rmse"] < 2 for error in errors)


def test_document__says_what_the_names_stand_for():
    """The first table of the document, against the library."""
    document = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    for name, config in (("int8", umfa.QuantizationConfig()), ("int4", umfa.QuantizationConfig("int8", "int4", "int4"))):
        (row,) = re.findall(rf'^\| `quantize="{name}"` \| (.+) \| (.+) \| (.+) \| .+ \|$', document, flags=re.M)
        for words, scheme in zip(row, config.schemes):
            assert scheme is not None
            codes = f"{scheme.dtype.upper()} {scheme.granularity}"
            options = {"asymmetric": not scheme.symmetric, "smoothed": scheme.smooth, "rotated": scheme.rotate}
            assert words == ", ".join([codes, *(word for word, used in options.items() if used)])
