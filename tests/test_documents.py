"""The code in README.md and docs/ is code: Python blocks run, blocks of C compile, links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("python/*.md")])
# What the fragments take for granted.
DECLARATIONS = """
#include <math.h>
#include <mfa.h>
#include <stdio.h>
#include <stdlib.h>
extern mfa_context_t* context;
extern float *query, *key, *value, *output, softmax_scale;
extern uint32_t batch_size, seq_len_q, seq_len_kv, num_heads;
extern uint16_t head_dim;
extern bool causal;
extern mfa_attention_t attention;
extern mfa_tensor_t grad_output, grad_query, grad_key, grad_value;
"""


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), flags=re.M | re.S)


def test_python_in_the_readme_runs() -> None:
    pytest.importorskip("umfa")
    names: dict[str, object] = {}
    found = blocks(ROOT / "README.md", "python")
    assert len(found) == 3
    for block in found:
        if "import torch" in block:
            pytest.importorskip("torch")
        exec(compile(block, "README.md", "exec"), names)


@pytest.mark.parametrize("document", ["README.md", "docs/c.md"])
def test_fragments_of_c_compile(document: str, tmp_path: Path) -> None:
    compiler = shutil.which("clang") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("neither clang nor gcc is installed")
    fragments = [block for block in blocks(ROOT / document, "c") if "int main" not in block]
    assert fragments
    for number, fragment in enumerate(fragments):
        source = tmp_path / f"fragment_{number}.c"
        source.write_text(DECLARATIONS + "void fragment(void) {\n" + fragment + "}\n")
        command = [compiler, "-std=c11", "-Wall", "-Werror", f"-I{ROOT / 'include'}", "-fsyntax-only", str(source)]
        answer = subprocess.run(command, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    headings = {path: anchors(path) for path in DOCUMENTS}
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{target} in {document.name}"
        assert not anchor or anchor in headings[path], f"{target} in {document.name}"


def anchors(document: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
