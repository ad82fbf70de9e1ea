"""`umfa quantize FILE`: the errors of all schemes on the tensors of a file, and what it says about files that it cannot use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import umfa
from umfa.cli import app
from umfa.scheme_errors import SHARING, measure, memory_ratio, quantize_by, scheme_name, schemes

DONE, UNUSABLE = 0, 2


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)], env={"COLUMNS": "120", "TERM": "dumb"})


def as_json(*arguments: Any) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == DONE, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def keys(rng) -> np.ndarray:
    """Keys of which every channel has a mean of its own, and two are large."""
    keys = rng.normal(size=(2, 3, 200, 64)) + 4 * rng.normal(size=64)
    keys[..., [5, 40]] *= 10
    return keys.astype(np.float32)


@pytest.fixture
def npy(tmp_path, keys) -> Path:
    np.save(tmp_path / "keys.npy", keys)
    return tmp_path / "keys.npy"


@pytest.fixture
def checkpoint(tmp_path, keys) -> Path:
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {
        "keys [0]": keys,
        "weight": keys[0, 0].astype(np.float16),
        "wide": np.ones((2, 1025), np.float32),
        "bias": np.ones(8, np.float32),
        "ids": np.arange(12).reshape(3, 4),
        "empty": np.ones((0, 4), np.float32),
        "poisoned": np.array([[1, np.nan], [2, 3]], np.float32),
    }
    numpy.save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


# ---- What it measures


def test_json__has_what_quantising_gives(npy, keys):
    (tensor,) = as_json(npy)["tensors"]
    assert (tensor["name"], tensor["dtype"], tensor["shape"]) == ("keys", "float32", [2, 3, 200, 64])
    # A group of 64 is a token here.
    assert len(tensor["schemes"]) == 2 * 2 * (len(SHARING) - 1)
    for row in tensor["schemes"]:
        words = {name: row[name] for name in ("block_size", "group_size", "symmetric", "smooth", "rotate")}
        made = umfa.quantize(keys, row["dtype"], row["granularity"], **words)
        error = made.dequantize().astype(np.float64) - keys
        assert row["nbytes"] == made.nbytes
        assert row["fp16_ratio"] == made.nbytes / (2 * keys.size)
        assert row["max_abs"] == np.abs(error).max()
        assert row["relative_rmse"] == pytest.approx(np.sqrt(np.mean(error**2) / np.mean(keys.astype(np.float64) ** 2)))


def test_json__marks_the_best_the_efficient_and_the_default(npy):
    (tensor,) = as_json(npy)["tensors"]
    for dtype in ("int8", "int4"):
        rows = [row for row in tensor["schemes"] if row["dtype"] == dtype]
        (best,) = (row for row in rows if row["best"])
        assert best["relative_rmse"] == min(row["relative_rmse"] for row in rows)
        assert best["efficient"]
        for row in rows:
            better = [
                other
                for other in rows
                if other["relative_rmse"] <= row["relative_rmse"] and other["nbytes"] <= row["nbytes"] and other is not row
            ]
            assert row["efficient"] is (better == [])
        (default,) = (row for row in rows if row["default"])
        assert (default["granularity"], default["symmetric"]) == ("token", dtype == "int8")


def test_options__choose_codes_smoothing_and_rotation(npy):
    plain = as_json(npy, "--dtype", "int4")["tensors"][0]["schemes"]
    both = as_json(npy, "--dtype", "int4", "--smooth", "--rotate")["tensors"][0]["schemes"]
    assert {row["dtype"] for row in plain + both} == {"int4"}
    assert all(row["smooth"] and row["rotate"] for row in both)
    assert sum(row["default"] for row in both) == 1

    def token(rows: list[dict[str, Any]]) -> float:
        return next(row["relative_rmse"] for row in rows if row["default"])

    assert token(both) < token(plain) / 2


def test_layout__says_which_axis_is_the_tokens(npy, keys, tmp_path):
    np.save(tmp_path / "swapped.npy", keys.swapaxes(1, 2))

    def measured(*arguments: Any) -> list[tuple[float, int]]:
        return [(row["max_abs"], row["nbytes"]) for row in as_json(*arguments)["tensors"][0]["schemes"]]

    assert measured(tmp_path / "swapped.npy", "--layout", "bshd") == measured(npy)
    assert measured(tmp_path / "swapped.npy") != measured(npy)


@pytest.mark.parametrize("dtype", [">f4", "<f2", ">f8", "<f8"])
def test_npy__of_any_float_type_and_order(tmp_path, keys, dtype):
    np.save(tmp_path / "keys.npy", np.asfortranarray(keys[0].astype(dtype)))
    (tensor,) = as_json(tmp_path / "keys.npy")["tensors"]
    assert tensor["dtype"] == np.dtype(dtype).name
    made = umfa.quantize(keys[0].astype(np.dtype(dtype).newbyteorder("=")))
    assert next(row for row in tensor["schemes"] if row["default"])["nbytes"] == made.nbytes


def test_safetensors__every_float_tensor_of_2_to_4_axes(checkpoint):
    found = as_json(checkpoint)
    assert sorted(tensor["name"] for tensor in found["tensors"]) == ["keys [0]", "weight"]
    left_out = {one["name"]: one["reason"] for one in found["left_out"]}
    assert sorted(left_out) == ["poisoned", "wide"]
    assert "1024" in left_out["wide"]
    named = as_json(checkpoint, "--tensor", "weight", "--tensor", "weight")
    assert [tensor["name"] for tensor in named["tensors"]] == ["weight"]
    assert named["left_out"] == []


def test_safetensors__bfloat16(tmp_path, keys):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rounded = keys[0].astype(ml_dtypes.bfloat16)
    try:
        save_file({"keys": rounded}, tmp_path / "model.safetensors")
    except Exception as error:
        pytest.skip(f"this version of safetensors does not write bfloat16: {error}")
    (tensor,) = as_json(tmp_path / "model.safetensors")["tensors"]
    assert tensor["dtype"] == "bfloat16"
    made = umfa.quantize(rounded)
    error = made.dequantize() - rounded.astype(np.float32)
    assert next(row for row in tensor["schemes"] if row["default"])["max_abs"] == np.abs(error).max()


def test_zeros__have_no_error(tmp_path):
    np.save(tmp_path / "zeros.npy", np.zeros((3, 4), np.float16))
    assert {row["relative_rmse"] for row in as_json(tmp_path / "zeros.npy")["tensors"][0]["schemes"]} == {0.0}


# ---- What it prints


def test_table__names_schemes_and_marks(checkpoint):
    result = run(checkpoint)
    assert result.exit_code == DONE, result.stderr
    assert "keys [0]  float32 [2, 3, 200, 64]" in result.stdout
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert sum(line.endswith(" best") for line in lines) == 4
    assert sum(line.startswith("int4 token, asymmetric ") and line.endswith("default") for line in lines) == 2
    assert any(line.startswith("int8 group 32 ") for line in lines)
    assert any(line.startswith("Left out poisoned: ") for line in lines)


def test_table__fits_80_columns_and_says_in_its_title_how_it_was_prepared(npy):
    result = CliRunner().invoke(app, ["quantize", str(npy), "--smooth", "--rotate"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert "keys  float32 [2, 3, 200, 64], smoothed, rotated" in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.strip().startswith(("int8 ", "int4 "))]
    assert len(rows) == 32
    assert all("%" in row and "…" not in row for row in rows)


# ---- What it cannot use


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.npy", None, "no file"),
        ("tensors.txt", b"text", ".safetensors or .npy"),
        ("broken.npy", b"text", "cannot be read"),
        ("empty.npy", b"", "cannot be read"),
        ("broken.safetensors", b"text", "cannot be read"),
        ("empty.safetensors", b"", "cannot be read"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_files__that_cannot_be_read__give_2(tmp_path, name, content, words, options):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run(tmp_path / name, *options)
    assert result.exit_code == UNUSABLE
    assert words in result.stderr
    assert name in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.arange(6).reshape(2, 3), "float type"),
        (np.ones(3, np.float32), "2 to 4 axes"),
        (np.ones((1, 1, 1, 1, 2), np.float32), "2 to 4 axes"),
        (np.ones((0, 3), np.float32), "with elements"),
        (np.ones((2, 1025), np.float32), "1024"),
        (np.array([[np.inf, 1]], np.float32), "finite"),
        (np.ones((2, 3), complex), "float type"),
        (np.array([[None]]), "cannot be read"),
    ],
)
def test_arrays__that_cannot_be_quantised__give_2(tmp_path, array, words):
    np.save(tmp_path / "array.npy", array, allow_pickle=True)
    for options in ((), ("--tensor", "array")):
        result = run(tmp_path / "array.npy", *options)
        assert result.exit_code == UNUSABLE
        assert words in result.stderr or not options
        assert str(tmp_path / "array.npy") in result.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "no tensor 'nothing'; it has "),
        ("bias", "2 to 4 axes"),
        ("ids", "I64"),
        ("empty", "with elements"),
        ("wide", "1024"),
        ("poisoned", "finite"),
    ],
)
def test_named_tensors__that_cannot_be_quantised__give_2(checkpoint, name, words):
    result = run(checkpoint, "--tensor", "weight", "--tensor", name)
    assert result.exit_code == UNUSABLE
    assert words in result.stderr
    assert result.stdout == ""


def test_files__without_a_fit_tensor__give_2(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    for count, words in ((0, "none at all"), (1, "tensor 0"), (20, "and 12 more")):
        numpy.save_file({f"tensor {index}": np.arange(3) for index in range(count)}, tmp_path / "model.safetensors")
        result = run(tmp_path / "model.safetensors")
        assert result.exit_code == UNUSABLE
        assert words in result.stderr


def test_safetensors__not_installed__gives_2(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    result = run(tmp_path / "model.safetensors")
    assert result.exit_code == UNUSABLE
    assert "pip install safetensors" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("x.npy", "--dtype", "fp8"), ("x.npy", "--layout", "sbhd"), ("x.npy", "--unknown")])
def test_usage__that_is_wrong__gives_2(arguments):
    assert run(*arguments).exit_code == UNUSABLE


# ---- The functions under it


def test_scheme_names():
    scheme = umfa.QuantizationScheme("int4", "group", group_size=16, symmetric=False, smooth=True, rotate=True)
    assert scheme_name(scheme) == "int4 group 16, asymmetric, smoothed, rotated"
    assert scheme_name(umfa.QuantizationScheme()) == "int8 token"
    names = [scheme_name(scheme) for scheme in schemes(smooth=(False, True), rotate=(False, True))]
    assert len(set(names)) == len(names) == 2 * len(SHARING) * 8


def test_measures__agree_with_the_tensor(rng):
    x = rng.normal(size=(1, 2, 1024, 128)).astype(np.float32)
    for scheme in schemes(["int4"], symmetric=(False,), smooth=(True,)):
        found = measure(x, scheme)
        assert found.nbytes == quantize_by(x, scheme).nbytes
        # One scale for a whole tensor weighs less in two heads than in one.
        assert found.fp16_ratio == pytest.approx(memory_ratio(scheme, 128), abs=1e-4)
