"""The benchmark: statistics, reference, what it says of the machine, engines, and runs on tiny problems. Speed is not tested."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import umfa
from umfa.bench import BenchError, machine, plot
from umfa.bench.ceilings import FLOATS, INTEGERS, READ, Ceilings
from umfa.bench.groups import GROUPS, Plan, Row, Session
from umfa.bench.machine import Loss, MemoryPeak, UnreadableError, Usage
from umfa.bench.memory import measure_memory
from umfa.bench.native import NativeError, find_compiler, load
from umfa.bench.peers import Peer, Prepared, all_peers, is_quantized
from umfa.bench.problem import Case, Inputs, expected, inputs_of, relative_error
from umfa.bench.run import FORMAT, Result, run, to_json
from umfa.bench.timing import Pace, interleave, summarize, turns_of
from umfa.cli import app

SQUARE = Case.square("forward", 2, 48, 16, causal=True)
DECODE = Case("forward", heads=4, kv_heads=2, queries=1, keys=96, head_dim=32)
BACKWARD = Case.square("backward", 2, 40, 16, causal=True)
TINY = Plan(
    {
        "forward": (SQUARE,),
        "decode": (DECODE,),
        "backward": (BACKWARD,),
        "overhead": (Case.square("forward", 1, 1, 8),),
        "threads": (dataclasses.replace(SQUARE, causal=False),),
        "memory": (SQUARE,),
    },
    Pace(rounds=2, seconds=0.01, least=2),
)
# Relative errors against float64 by the beginning of a variant's name; of PyTorch's and OpenVINO's halves and bytes too.
BOUNDS = {"fp32": 2e-6, "fp16": 2e-2, "bf16": 2e-2, "int8": 0.05, "u8": 0.05, "q8_0": 0.05, "int4": 0.5, "q4_0": 0.5}

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("clang", "gcc", "cc"))), reason="there is no C compiler")


def bound_of(variant: str) -> float:
    return next(bound for beginning, bound in BOUNDS.items() if variant.startswith(beginning))


def own() -> Peer:
    return next(peer for peer in all_peers() if peer.name == "umfa")


def fake(name: str = "fake", modules: tuple[str, ...] = (), variants: tuple[str, ...] = ("fp32",), prepare: Any = None) -> Peer:
    return Peer(name, modules, ("fake-package",), lambda case: variants, prepare or (lambda *_: pytest.fail("it was prepared")))


# ---- Statistics and rounds


def test_summary_has_median_quartiles_and_least() -> None:
    found = summarize([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.lower_quartile, found.upper_quartile, found.least, found.samples) == (3, 2, 4, 1, 5)
    assert dataclasses.astuple(summarize([7.0])) == (7, 7, 7, 7, 1)
    assert dataclasses.astuple(summarize([2.0, 4.0]).divided(2)) == (1.5, 1.25, 1.75, 1, 2)


@pytest.mark.parametrize(
    ("cost", "pace", "turns"),
    [
        (0.001, Pace(15, 1.0), 15),
        (0.25, Pace(15, 1.0), 4),
        (30.0, Pace(15, 1.0), 3),
        (30.0, Pace(2, 1.0), 2),
        (30.0, Pace(20, float("inf")), 20),
        (0.0, Pace(15, 1.0), 15),
    ],
)
def test_slow_candidates_take_part_in_fewer_rounds(cost: float, pace: Pace, turns: int) -> None:
    assert turns_of(cost, pace) == turns


def test_calls_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call takes 60 ms and the other 20 ms of a clock that only they move."""
    now = 0.0
    order: list[str] = []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run_once() -> None:
            nonlocal now
            now += seconds
            order.append(name)

        return run_once

    monkeypatch.setattr("umfa.bench.timing.time.perf_counter", lambda: now)
    advanced: list[int] = []
    samples = interleave([call("a", 0.06), call("b", 0.02)], Pace(6, 0.25, least=1), advance=lambda: advanced.append(1))
    assert [len(each) for each in samples] == [4, 6]
    assert samples[0] == pytest.approx([0.06] * 4)
    assert samples[1] == pytest.approx([0.02] * 6)
    # What is short runs once more before each of its turns; four turns are spread over six rounds.
    assert "".join(order) == "a" + "bb" + "bb" + "abb" * 2 + "bb" + "abb" * 2
    assert len(advanced) == 10


# ---- Problems and their reference


def test_a_case_says_what_it_is() -> None:
    assert SQUARE.name == "2,48,16 causal"
    assert dataclasses.replace(SQUARE, layout="bshd").name == "2,48,16 causal bshd"
    assert DECODE.name == "4/2,1:96,32"
    assert DECODE.is_decode
    assert not SQUARE.is_decode
    assert Case.square("forward", 8, 1024, 64).work == 4 * 8 * 1024 * 1024 * 64
    assert SQUARE.work == 4 * 2 * (48 * 49 // 2) * 16
    assert BACKWARD.work == 10 * 2 * (40 * 41 // 2) * 16


@pytest.mark.parametrize("case", [SQUARE, DECODE, BACKWARD, Case.square("forward", 1, 200, 8, causal=True)], ids=lambda case: case.name)
def test_the_reference_is_what_float64_gives(case: Case) -> None:
    query, key, value, grad_output = (array.astype(np.float64) for array in inputs_of(case))
    output, lse = umfa.attention(query, key, value, causal=case.causal, return_lse=True)
    result = (output,)
    if case.operation == "backward":
        result = umfa.attention_backward(grad_output, query, key, value, output, lse, causal=case.causal)
    assert relative_error(case, result) < 1e-12
    assert relative_error(case, tuple(array * 1.01 for array in result)) == pytest.approx(0.01)
    values, _ = expected(case)
    assert len(values) == len(result)


def test_inputs_are_the_same_at_each_run() -> None:
    first = inputs_of(SQUARE)
    inputs_of(DECODE)
    again = inputs_of(SQUARE)
    assert again is not first
    for name in Inputs._fields:
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_a_layout_is_one_of_memory() -> None:
    heads_first, tokens_first = inputs_of(SQUARE).query, inputs_of(dataclasses.replace(SQUARE, layout="bshd")).query
    np.testing.assert_array_equal(heads_first, tokens_first)
    assert heads_first.flags.c_contiguous
    assert tokens_first.swapaxes(1, 2).flags.c_contiguous


# ---- The machine


def test_losses_are_shares_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, after = Usage(100.0, 60.0, 1.0, 50.0), Usage(120.0, 72.0, 2.0, 58.0)
    assert Usage.loss(before, after) == Loss(stolen=0.05, others=0.2)
    assert Usage.loss(None, after) is None
    assert Usage.loss(before, before) is None
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 400 50 6 4 10 99 99\ncpu0 1 2 3\n")
    monkeypatch.setattr(machine, "_STAT", stat)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 10)
    found = Usage.now()
    assert found is not None
    assert (found.total, found.busy, found.stolen) == pytest.approx((62.0, 16.0, 1.0))
    stat.write_text("cpu of another system\n")
    assert Usage.now() is None
    stat.unlink()
    assert Usage.now() is None


def test_peak_memory_counts_what_was_freed_again() -> None:
    try:
        with MemoryPeak() as peak:
            memory = np.ones(64 << 20, np.uint8)
            del memory
    except UnreadableError as error:
        pytest.skip(str(error))
    assert 60 << 20 < peak.extra_bytes < 90 << 20


def test_a_system_without_peaks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CLEAR_REFS", tmp_path / "no" / "such" / "file")
    with pytest.raises(UnreadableError, match="peak of a process's memory cannot be read"), MemoryPeak():
        pass


# ---- Native code


@needs_compiler
def test_ceilings_are_measured() -> None:
    ceilings = Ceilings()
    assert ceilings.limit(FLOATS, 1) > 1e8
    assert ceilings.limit(INTEGERS, 1) >= max(each.per_second for each in ceilings.all() if each.kind == INTEGERS)
    assert ceilings.limit(READ, 2, 1 << 20) > 1e7
    turns = ceilings.turns(FLOATS, 1)
    before = ceilings.limit(FLOATS, 1)
    for turn in turns:
        turn()
    assert ceilings.limit(FLOATS, 1) >= before
    assert any(each.exact for each in ceilings.all() if each.kind == INTEGERS)
    assert {(each.kind, each.threads, each.size) for each in ceilings.all()} == {(FLOATS, 1, 0), (INTEGERS, 1, 0), (READ, 2, 1 << 20)}


@pytest.mark.parametrize("compiler", ["clang", "gcc"])
def test_native_files_compile_without_warnings(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    try:
        find_compiler()
    except NativeError as error:
        pytest.skip(str(error))
    warnings = ("-Wall", "-Wextra", "-Werror")
    load("ceilings.c", *warnings)
    load("overhead.c", *warnings, "-DFORWARD_TYPE(name)=int32_t (*name)()", "-Wno-strict-prototypes", "-Wno-deprecated-non-prototype")


def test_without_a_compiler_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(NativeError, match="CC names no-such-compiler"):
        Ceilings()
    result = run(["forward", "overhead"], plan=TINY, peers=[own()])
    assert result.ceilings == []
    assert "no-such-compiler" in result.no_ceilings
    assert all(row.limit is None and row.share is None for row in result.rows)
    assert [each.variant for each in result.left_out] == ["mfa_attention_forward, from C"]
    assert "no-such-compiler" in rendered(result)


@needs_compiler
def test_what_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NativeError, match=r"does not compile overhead\.c: .*FORWARD_TYPE|does not compile overhead\.c"):
        load("overhead.c")


# ---- Engines


@pytest.mark.filterwarnings("ignore")  # those of the engines
@pytest.mark.parametrize(
    ("peer", "layout"), [pytest.param(peer, layout, id=f"{peer.name}-{layout}") for peer in all_peers() for layout in peer.layouts]
)
@pytest.mark.parametrize("case", [SQUARE, DECODE, BACKWARD, dataclasses.replace(SQUARE, causal=False)], ids=lambda case: case.name)
def test_every_engine_computes_the_same(peer: Peer, case: Case, layout: str) -> None:
    case = dataclasses.replace(case, layout=layout)
    if reason := peer.why_missing():
        pytest.skip(reason)
    for variant in peer.variants(case):
        if variant == "bf16" and peer.name == "umfa":
            pytest.importorskip("ml_dtypes")
        prepared = peer.prepare(case, variant, 1)
        assert relative_error(case, prepared.result(prepared.call())) < bound_of(variant), variant
        if not (peer.name == "OpenVINO" and case.is_decode):  # whose cache has grown by then
            assert relative_error(case, prepared.result(prepared.call())) < bound_of(variant), f"{variant}, the second time"
        assert prepared.cache_bytes > 0


def test_own_kernels_are_named() -> None:
    (forward,) = own().prepare(SQUARE, "int8", 1).kernels
    assert forward.startswith("attention_forward_")
    backward = own().prepare(BACKWARD, "fp32", 1).kernels
    assert backward
    assert all(name.startswith("attention_backward_") for name in backward)


def test_an_engine_that_is_missing_is_named() -> None:
    result = run(["forward"], plan=TINY, peers=[own(), fake(modules=("no_such_module",))])
    assert [engine.name for engine in result.engines if engine.missing] == ["fake"]
    assert "no_such_module" in result.engines[1].missing
    assert "pip install fake-package" in result.engines[1].missing
    assert {row.engine for row in result.rows} == {"umfa"}
    assert "no_such_module" in rendered(result)


def test_an_engine_that_fails_is_left_out_with_the_reason() -> None:
    def prepare(case: Case, variant: str, threads: int) -> Prepared:
        def fail() -> None:
            raise RuntimeError("no\n  such operator")

        return Prepared(fail, lambda result: result)

    result = run(["forward"], plan=TINY, peers=[own(), fake(prepare=prepare)])
    assert [(each.engine, each.variant, each.reason) for each in result.left_out] == [("fake", "fp32", "no such operator")]
    assert {row.engine for row in result.rows} == {"umfa"}


@pytest.mark.parametrize("case", [SQUARE, dataclasses.replace(SQUARE, causal=False)], ids=lambda case: case.name)
def test_the_engine_in_the_guide_works(case: Case) -> None:
    guide = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text()
    names: dict[str, Any] = {}
    exec(compile(re.findall(r"^```python\n(.*?)^```$", guide, flags=re.M | re.S)[0], "benchmarks.md", "exec"), names)
    prepared = names["PEER"].prepare(case, "fp32", 1)
    assert relative_error(case, prepared.result(prepared.call())) < 2e-6
    assert not names["PEER"].why_missing()
    assert names["PEER"].version() == np.__version__


def test_quantised_variants_are_told_by_their_names() -> None:
    assert all(map(is_quantized, ("int8", "int8 from fp32", "int4 K, V", "u8 K, V", "q8_0 K, V")))
    assert not any(map(is_quantized, ("fp32", "fp16", "bf16", "fp32, heads as rows")))


# ---- Runs


def rendered(result: Result) -> str:
    from rich.console import Console

    from umfa.bench.report import render

    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(render(result), highlight=False)
    return console.export_text()


@pytest.fixture(scope="module")
def result() -> Result:
    pytest.importorskip("ml_dtypes")
    steps: list[tuple[int, str, int]] = []
    found = run(threads=1, plan=TINY, peers=[own()], progress=lambda *step: steps.append(step))
    assert steps[0] == (0, "forward 2,48,16 causal", 6)
    return found


@needs_compiler
def test_a_run_measures_every_group(result: Result) -> None:
    by_group = {group: [row for row in result.rows if row.group == group] for group in GROUPS}
    named = {each.group for each in result.left_out}
    for group, rows in by_group.items():
        assert rows or group in named, f"{group}: neither rows nor a reason"
        for row in rows:
            assert row.time is not None
            assert row.time.least <= row.time.lower_quartile <= row.time.median <= row.time.upper_quartile
    for row in by_group["forward"] + by_group["decode"] + by_group["backward"]:
        assert row.kernels
        assert all(kernel.startswith("attention_") for kernel in row.kernels)
        assert row.error is not None
        assert row.error < bound_of(row.variant)
        assert row.limit == (READ if row.group == "decode" else INTEGERS if is_quantized(row.variant) else FLOATS)
        assert row.limit_per_second is not None
        assert row.share == pytest.approx((row.per_second or 0) / row.limit_per_second)
    assert {row.threads for row in by_group["threads"]} <= {1, 2}
    assert all(row.idle is not None and 0 <= row.idle <= 1 for row in by_group["threads"])
    assert any(row.variant.endswith("from C") for row in by_group["overhead"])
    assert all(row.extra_bytes is not None for row in by_group["memory"])


def test_figures_are_json_of_one_layout(result: Result) -> None:
    found = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert found["format"] == FORMAT == 1
    assert set(found) == {"format", *(field.name for field in dataclasses.fields(Result))}
    assert found["rows"]
    for row in found["rows"]:
        assert set(row) == {field.name for field in dataclasses.fields(Row)}
        assert set(row["time"]) == {"median", "lower_quartile", "upper_quartile", "least", "samples"}
    for ceiling in found["ceilings"]:
        assert set(ceiling) == {"kind", "name", "exact", "threads", "size", "per_second"}
    assert found["pace"] == {"rounds": 2, "seconds": 0.01, "least": 2}
    assert to_json(run(["overhead"], plan=TINY, peers=[own()], rounds=1))["pace"]["seconds"] is None


def test_a_run_is_shown(result: Result, tmp_path: Path) -> None:
    text = rendered(result)
    for expected_text in ("Forward: 2,48,16 causal", "Decoding, one query: 4/2,1:96,32", "umfa int4 K, V", "lost:", "Kernels"):
        assert expected_text in text
    pytest.importorskip("matplotlib")
    plot.save(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_only_keeps_matching_rows_and_the_baseline() -> None:
    def prepare(case: Case, variant: str, threads: int) -> Prepared:
        return own().prepare(case, "fp32", threads)

    torch = fake("PyTorch", variants=("fp32", "fp16"), prepare=prepare)
    result = run(["forward", "backward"], plan=TINY, peers=[own(), torch], only="CAUSAL umfa int8")
    assert [(row.group, row.name) for row in result.rows] == [
        ("forward", "umfa int8"),
        ("forward", "umfa int8 from fp32"),
        ("forward", "PyTorch fp32"),
        ("backward", "umfa int8"),
        ("backward", "PyTorch fp32"),
    ]
    assert all(row.ratio is not None for row in result.rows)
    with pytest.raises(BenchError, match="'no such row'"):
        run(plan=TINY, peers=[own()], only="no such row")


def test_rounds_are_as_many_as_asked() -> None:
    result = run(["forward"], plan=TINY, peers=[own()], rounds=4, only="umfa fp32")
    assert [row.time.samples for row in result.rows if row.time] == [4]


def test_too_few_processors_for_threads_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umfa.bench.groups.cpu_count", lambda: 1)
    result = run(["threads"], plan=TINY, peers=[own()])
    assert result.rows == []
    assert "2 threads need 2 CPUs" in result.left_out[0].reason


def test_memory_of_one_call() -> None:
    case = Case.square("forward", 2, 4096, 64)
    try:
        found = measure_memory("umfa", "fp32", 1, case)
    except UnreadableError as error:
        pytest.skip(str(error))
    output = 2 * 4096 * 64 * 4
    scores = 2 * 4096 * 4096 * 4
    assert output <= found["extra_bytes"] + (64 << 10) < scores / 2
    assert found["kernels"]


def test_the_process_that_measures_memory_says_why_it_cannot() -> None:
    request = json.dumps({"engine": "umfa", "variant": "int3", "threads": 1, "case": dataclasses.asdict(SQUARE)})
    answer = subprocess.run([sys.executable, "-m", "umfa.bench.memory", request], capture_output=True, text=True, check=True)
    assert "reason" in json.loads(answer.stdout)


def test_plans_name_all_groups() -> None:
    for plan in (Plan.full(), Plan.quick(), Plan.full("bshd"), Plan.quick("bshd")):
        assert tuple(plan.cases) == GROUPS
        assert all(plan.cases.values())


def test_engines_that_would_copy_a_layout_are_left_out() -> None:
    session = Session(all_peers(), None, 1, Pace(1, 1.0))
    for layout, engines in (("bhsd", {peer.name for peer in all_peers()}), ("bshd", {"umfa", "PyTorch"})):
        assert {peer.name for peer, _ in session.chosen("forward", dataclasses.replace(SQUARE, layout=layout))} == engines


# ---- The command


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "160", "TERM": "dumb"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sideways"], "forward"),
        (["--threads", "0"], "--threads"),
        (["--threads", "257"], "--threads"),
        (["--repeats", "0"], "--repeats"),
        (["--layout", "sbhd"], "--layout"),
        (["--only", "no such row"], "no such row"),
        (["--json", "no/such/directory/figures.json"], "directory of the figures does not exist"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_message(arguments: list[str], message: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("path", "message"), [("plot.unknown", "ending must be one of"), ("no/such/directory/plot.png", "directory does not exist")]
)
def test_a_plot_that_cannot_be_drawn_is_refused_before_the_work(path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("umfa.cli.bench.run", lambda *_, **__: pytest.fail("it went to work"))
    result = command("--plot", path)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_plot_without_matplotlib_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = command("--plot", "plot.png")
    assert result.exit_code == 2
    assert "pip install 'umfa[bench]'" in result.stderr


def test_the_command_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Plan, "quick", classmethod(lambda cls, layout: TINY))
    monkeypatch.setattr("umfa.bench.run.all_peers", lambda: [own()])
    monkeypatch.chdir(tmp_path)
    result = command("forward", "overhead", "--quick", "--json", "figures.json", "--plot", "plot.svg", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert "Forward: 2,48,16 causal" in result.stdout
    assert str(tmp_path / "plot.svg") in result.stdout
    figures = json.loads(Path("figures.json").read_text())
    assert {row["group"] for row in figures["rows"]} == {"forward", "overhead"}
    assert "<svg" in Path("plot.svg").read_text()


def test_measuring_imports_neither_engines_nor_the_command_lines_libraries() -> None:
    unwanted = "{'typer', 'rich', 'matplotlib', 'torch', 'onnxruntime', 'openvino', 'ml_dtypes'}"
    code = f"import sys, umfa.bench.run; sys.exit(', '.join({unwanted} & set(sys.modules)) or None)"
    answer = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
