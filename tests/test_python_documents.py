"""The Python code in the package's guide and README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("document", ["docs/python.md", "python/README.md"])
def test_python_blocks_run(document: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(), flags=re.M | re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        if "torch" in block:
            pytest.importorskip("torch")
        exec(compile(block, document, "exec"), names)
