"""What each way to quantise Q, K and V costs in accuracy, and what memory it saves: the tables of docs/quantization.md.

Attention is computed in FP32 on operands that were quantised and dequantised, and compared with float64 attention on the operands as they
were: the error is that of the storage format, whatever kernels compute with it. The inputs are gaussians, three kinds of difficult keys
that language models are known for, and what all-MiniLM-L6-v2 computes in its six layers on real text.

    python bench/quantization_study.py [--quick] [--write] [--json FILE]

Random numbers are seeded: two runs give the same tables. `--write` puts them and the plot into docs/.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

import umfa
from umfa import QuantizationConfig, QuantizationScheme
from umfa.demo import DemoUnavailableError
from umfa.demo.corpus import load_documents
from umfa.demo.methods import numpy_attention
from umfa.demo.model import MAX_TOKENS, SentenceEncoder
from umfa.scheme_errors import memory_ratio, quantize_by, scheme_name, schemes

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "quantization.md"
PLOT = DOCUMENT.parent / "images" / "quantization.png"
SEED = 20

Operands = tuple[np.ndarray, np.ndarray, np.ndarray]
Schemes = tuple[QuantizationScheme | None, QuantizationScheme | None, QuantizationScheme | None]
"""Schemes of query, key and value; None: FP32."""


# ---- Inputs ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Operands of one or more attention calls whose errors are reported as one number."""

    name: str
    title: str
    calls: list[Operands]


def gaussians(random: np.random.Generator, heads: int, tokens: int, head_dim: int) -> Operands:
    """Standard normal operands."""
    query, key, value = (random.standard_normal((1, heads, tokens, head_dim), dtype=np.float32) for _ in range(3))
    return query, key, value


def biased_keys(random: np.random.Generator, heads: int, tokens: int, head_dim: int) -> Operands:
    """Gaussians, with a constant of 5 or -5 added to every 16th channel of the keys: what the bias of a projection does."""
    query, key, value = gaussians(random, heads, tokens, head_dim)
    key[..., ::16] += 5 * random.choice(np.array([-1, 1], np.float32), (1, heads, 1, head_dim // 16))
    return query, key, value


def outlier_channels(random: np.random.Generator, heads: int, tokens: int, head_dim: int) -> Operands:
    """Gaussians whose key channels differ in size.

    Each channel of a key head is multiplied by ``exp(0.5 * normal)``, one in 16 of them by 6 as well; queries are divided by the root mean
    square of their head's factors, which brings the scores back to variance 1. Value channels are multiplied by ``exp(0.3 * normal)``.
    """
    query, key, value = gaussians(random, heads, tokens, head_dim)
    factors = np.exp(0.5 * random.standard_normal((1, heads, 1, head_dim), dtype=np.float32))
    for head in range(heads):
        factors[0, head, 0, random.choice(head_dim, head_dim // 16, replace=False)] *= 6
    key *= factors
    query /= np.sqrt(np.mean(factors**2, axis=-1, keepdims=True))
    value *= np.exp(0.3 * random.standard_normal((1, heads, 1, head_dim), dtype=np.float32))
    return query, key, value


def rotary_keys(random: np.random.Generator, heads: int, tokens: int, head_dim: int) -> Operands:
    """Gaussians with a constant of 8 or -8 in one of 16 key channels, then rotary position embeddings of base 10,000 on queries and keys.

    The embedding turns a constant into a wave along the tokens in the fast channels, whose mean is about 0, and leaves it in the slow ones.
    """
    query, key, value = gaussians(random, heads, tokens, head_dim)
    for head in range(heads):
        channels = random.choice(head_dim, head_dim // 16, replace=False)
        key[0, head, :, channels] += 8 * random.choice(np.array([-1, 1], np.float32), (head_dim // 16, 1))
    half = head_dim // 2
    angles = np.arange(tokens)[:, None] * 10000.0 ** (-np.arange(half) / half)
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def embedded(rows: np.ndarray) -> np.ndarray:
        first, second = rows[..., :half], rows[..., half:]
        return np.concatenate([first * cosines - second * sines, first * sines + second * cosines], axis=-1)

    return embedded(query), embedded(key), value


def minilm_layers(texts: int) -> list[Operands]:
    """Q, K and V of each layer of all-MiniLM-L6-v2 on the first help topics of Python that fill its 256 tokens."""
    encoder = SentenceEncoder.load()
    tokens = [ids for ids in encoder.tokenize([document.text for document in load_documents()]) if len(ids) == MAX_TOKENS][:texts]
    layers: list[Operands] = []

    def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, kv_lengths: np.ndarray) -> np.ndarray:
        q, k, v = (np.ascontiguousarray(operand.transpose(0, 2, 1, 3)) for operand in (query, key, value))
        layers.append((q, k, v))
        return numpy_attention(query, key, value, kv_lengths)

    encoder.encode(tokens, attend)
    return layers


def all_inputs(console: Console, quick: bool) -> list[Inputs]:
    """The columns of the tables."""
    heads, tokens = (2, 256) if quick else (8, 1024)
    kinds: list[tuple[str, str, Callable[..., Operands], int]] = [
        ("gaussian_64", "gaussian, 64", gaussians, 64),
        ("gaussian_128", "gaussian, 128", gaussians, 128),
        ("biased_64", "biased keys, 64", biased_keys, 64),
        ("outliers_64", "outlier channels, 64", outlier_channels, 64),
        ("rotary_128", "rotary keys, 128", rotary_keys, 128),
    ]
    inputs = [
        Inputs(name, title, [make(np.random.default_rng([SEED, index]), heads, tokens, head_dim)])
        for index, (name, title, make, head_dim) in enumerate(kinds)
    ]
    try:
        inputs.append(Inputs("minilm", "MiniLM, 32", minilm_layers(1 if quick else 4)))
    except DemoUnavailableError as error:
        console.print(f"Left out MiniLM: {error}", style="yellow", markup=False)
    return inputs


def exact_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Attention in float64, head by head."""
    output = np.empty(query.shape, np.float64)
    for index in np.ndindex(query.shape[:2]):
        q, k, v = (operand[index].astype(np.float64) for operand in (query, key, value))
        weights = q @ k.T / math.sqrt(q.shape[-1])
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        output[index] = (weights @ v) / weights.sum(axis=-1, keepdims=True)
    return output


# ---- Measuring ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Error:
    """The error of attention on one kind of inputs; of several calls, the root mean square of theirs."""

    relative: float
    absolute: float
    calls: tuple[float, ...]  # the relative error of each


class Study:
    """Measures schemes on all inputs, each once."""

    def __init__(self, console: Console, inputs: list[Inputs]) -> None:
        self.console = console
        self.inputs = inputs
        self._exact = {kind.name: [exact_attention(*call) for call in kind.calls] for kind in inputs}
        self._operands: dict[tuple[str, int, int, QuantizationScheme], np.ndarray] = {}
        self._errors: dict[tuple[str, Schemes], Error] = {}

    def _operand(self, kind: Inputs, call: int, position: int, scheme: QuantizationScheme | None) -> np.ndarray:
        """Query, key or value as a scheme leaves it."""
        operand = kind.calls[call][position]
        if scheme is None:
            return operand
        place = (kind.name, call, position, scheme)
        if place not in self._operands:
            self._operands[place] = quantize_by(operand, scheme).dequantize()
        return self._operands[place]

    def _compare(self, kind: Inputs, attend: Callable[[int], np.ndarray]) -> Error:
        relative, absolute = [], []
        for call, exact in enumerate(self._exact[kind.name]):
            absolute.append(float(np.sqrt(np.mean((attend(call) - exact) ** 2))))
            relative.append(absolute[-1] / float(np.sqrt(np.mean(exact**2))))
        return Error(math.hypot(*relative) / math.sqrt(len(relative)), math.hypot(*absolute) / math.sqrt(len(absolute)), tuple(relative))

    def stored(self, kind: Inputs, chosen: Schemes) -> Error:
        """The error that storing the operands by these schemes makes."""
        if (kind.name, chosen) not in self._errors:
            self._errors[kind.name, chosen] = self._compare(
                kind, lambda call: umfa.attention(*(self._operand(kind, call, position, scheme) for position, scheme in enumerate(chosen)))
            )
        return self._errors[kind.name, chosen]

    def fused(self, kind: Inputs, quantize: str | QuantizationConfig) -> Error:
        """The error of `umfa.attention(..., quantize=...)`, kernels included."""
        return self._compare(kind, lambda call: umfa.attention(*kind.calls[call], quantize=quantize))

    def measure(self, description: str, rows: Iterable[Schemes], kinds: Iterable[Inputs] | None = None) -> None:
        """Fill the record, showing how far it is; by default on all inputs."""
        kinds = self.inputs if kinds is None else list(kinds)
        for chosen in track(list(rows), description, console=self.console, transient=True):
            for kind in kinds:
                self.stored(kind, chosen)
        self._operands.clear()

    def records(self) -> list[dict[str, Any]]:
        """Everything that was measured, as plain values."""
        return [
            {
                "inputs": name,
                **{operand: scheme and asdict(scheme) for operand, scheme in zip(("query", "key", "value"), chosen, strict=True)},
                "relative_rmse": error.relative,
                "absolute_rmse": error.absolute,
                "relative_rmse_of_calls": error.calls,
            }
            for (name, chosen), error in self._errors.items()
        ]


# ---- What is measured --------------------------------------------------------------------------------------------------------------------

QUERY = QuantizationScheme("int8", "token")
ROTATED_QUERY = replace(QUERY, rotate=True)


def uniform(scheme: QuantizationScheme) -> Schemes:
    """One scheme for all: smoothing for keys alone, rotation for queries and keys."""
    return replace(scheme, smooth=False), scheme, replace(scheme, smooth=False, rotate=False)


def scheme(words: str) -> QuantizationScheme:
    """A scheme from words such as ``"int4 group 32 asymmetric smooth rotate"``."""
    dtype, granularity, *rest = words.split()
    size = int(rest.pop(0)) if rest and rest[0].isdigit() else None
    return QuantizationScheme(
        dtype,
        granularity,
        block_size=size if granularity == "block" else None,
        group_size=size if granularity == "group" else None,
        symmetric="asymmetric" not in rest,
        smooth="smooth" in rest,
        rotate="rotate" in rest,
    )


def with_int8_query(key: str, value: str) -> Schemes:
    """Keys and values by the given schemes, queries INT8 a token and rotated as the keys are."""
    keys = scheme(key)
    return (ROTATED_QUERY if keys.rotate else QUERY), keys, scheme(value)


DEFAULTS = {
    "int8": QuantizationConfig("int8", "int8", "int8").schemes,
    "int4": QuantizationConfig("int8", "int4", "int4").schemes,
}
"""What `quantize="int8"` and `quantize="int4"` stand for."""

MIXTURES = [
    with_int8_query("int8 token", "int8 token"),
    with_int8_query("int8 token smooth", "int8 token"),
    with_int8_query("int8 token rotate", "int8 token"),
    DEFAULTS["int8"],
    with_int8_query("int8 token asymmetric smooth rotate", "int8 token"),
    with_int8_query("int8 token smooth rotate", "int8 channel"),
    with_int8_query("int8 channel", "int8 token"),
    with_int8_query("int8 group 32", "int8 group 32"),
    with_int8_query("int8 token smooth rotate", "int4 token asymmetric"),
    with_int8_query("int4 token asymmetric smooth rotate", "int8 token"),
    uniform(scheme("int4 token")),
    uniform(scheme("int4 group 32")),
    uniform(scheme("int4 token asymmetric smooth rotate")),
    with_int8_query("int4 token", "int4 token"),
    with_int8_query("int4 token asymmetric", "int4 token asymmetric"),
    with_int8_query("int4 token asymmetric smooth", "int4 token asymmetric"),
    with_int8_query("int4 token asymmetric rotate", "int4 token asymmetric"),
    DEFAULTS["int4"],
    with_int8_query("int4 token asymmetric smooth rotate", "int4 channel asymmetric"),
    with_int8_query("int4 channel asymmetric", "int4 token asymmetric"),
    with_int8_query("int4 group 32", "int4 group 32"),
    with_int8_query("int4 group 32 smooth rotate", "int4 token asymmetric"),
    with_int8_query("int4 group 64 asymmetric smooth rotate", "int4 token asymmetric"),
    with_int8_query("int4 token asymmetric smooth rotate", "int4 group 64 asymmetric"),
    with_int8_query("int4 group 32 asymmetric smooth rotate", "int4 group 32 asymmetric"),
    with_int8_query("int4 group 16 asymmetric smooth rotate", "int4 group 16 asymmetric"),
]

KEY_SCHEMES = schemes(
    ["int4"], [("token", None), ("group", 64), ("group", 32), ("channel", None)], (True, False), (False, True), (False, True)
)
VALUE_SCHEMES = schemes(
    ["int4"],
    [("tensor", None), ("head", None), ("block", 64), ("channel", None), ("token", None), ("group", 64), ("group", 32), ("group", 16)],
)
TOKEN_SCHEMES = schemes(sharing=[("token", None)], smooth=(False, True), rotate=(False, True))
PLAIN_SCHEMES = schemes()
EVERY_SCHEME = schemes(smooth=(False, True), rotate=(False, True))


# ---- Tables ------------------------------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def percent(share: float) -> str:
    """Three significant digits, in percent."""
    return f"{100 * share:#.3g}"


def stored_memory(chosen: Schemes, head_dim: int) -> float:
    """The memory of keys and values as a share of FP16."""
    return sum(1.0 if scheme is None else memory_ratio(scheme, head_dim) for scheme in chosen[1:]) / 2


def short(scheme: QuantizationScheme) -> str:
    """A scheme in a table of one dtype."""
    return scheme_name(scheme).removeprefix(f"{scheme.dtype} ")


def errors(study: Study, chosen: Schemes) -> list[str]:
    """A row's errors, a column a kind of inputs."""
    return [percent(study.stored(kind, chosen).relative) for kind in study.inputs]


def uniform_table(study: Study, dtype: str, chosen: list[QuantizationScheme]) -> str:
    """One scheme for all three operands."""
    header = ["scales", *(kind.title for kind in study.inputs), "memory, 128"]
    rows = [
        [short(scheme), *errors(study, uniform(scheme)), percent(stored_memory(uniform(scheme), 128))]
        for scheme in chosen
        if scheme.dtype == dtype
    ]
    return table(header, rows)


def operand_table(study: Study, chosen: list[QuantizationScheme], position: int) -> str:
    """One operand quantised, the others in FP32."""
    header = ["scales", *(kind.title for kind in study.inputs), *(f"memory, {head_dim}" for head_dim in (64, 128))]
    rows = [
        [short(scheme), *errors(study, alone(scheme, position)), *(percent(memory_ratio(scheme, head_dim)) for head_dim in (64, 128))]
        for scheme in chosen
    ]
    return table(header, rows)


def alone(scheme: QuantizationScheme, position: int) -> Schemes:
    """One operand by a scheme, the others in FP32."""
    return (scheme if position == 0 else None), (scheme if position == 1 else None), (scheme if position == 2 else None)


def mixture_table(study: Study) -> str:
    """Mixtures, the defaults in bold."""
    header = ["Q", "K", "V", *(kind.title for kind in study.inputs), "memory, 128"]
    rows = []
    for chosen in MIXTURES:
        names = [scheme_name(scheme) if scheme else "fp32" for scheme in chosen]
        if chosen in DEFAULTS.values():
            names = [f"**{name}**" for name in names]
        rows.append([*names, *errors(study, chosen), percent(stored_memory(chosen, 128))])
    return table(header, rows).replace("| --- | --: | --: |", "| --- | --- | --- |", 1)


def default_table(study: Study) -> str:
    """What `umfa.attention` gives with the names of the defaults."""
    header = ["`quantize=`", "error", *(kind.title for kind in study.inputs)]
    rows = []
    for dtype in DEFAULTS:
        found = [study.fused(kind, dtype) for kind in study.inputs]
        rows.append([f'`"{dtype}"`', "relative, %", *(percent(error.relative) for error in found)])
        rows.append([f'`"{dtype}"`', "absolute RMSE", *(f"{error.absolute:.2g}" for error in found)])
    return table(header, rows).replace("| --- | --: |", "| --- | --- |", 1)


def layer_table(study: Study) -> str:
    """MiniLM, a layer a column."""
    kind = next(kind for kind in study.inputs if kind.name == "minilm")
    chosen = {
        "int8 token": uniform(scheme("int8 token")),
        "int8 token, smoothed, rotated (default)": DEFAULTS["int8"],
        "int4 token": uniform(scheme("int4 token")),
        "Q int8 token; K, V int4 token": with_int8_query("int4 token", "int4 token"),
        "Q int8 token; K, V int4 token, asymmetric": with_int8_query("int4 token asymmetric", "int4 token asymmetric"),
        "the same, K smoothed and rotated (default)": DEFAULTS["int4"],
    }
    header = ["schemes", *(f"layer {layer}" for layer in range(len(kind.calls)))]
    return table(header, ([name, *map(percent, study.stored(kind, schemes).calls)] for name, schemes in chosen.items()))


def memory_table() -> str:
    """Bytes an element, and the share of FP16."""
    header = ["scales", *(f"{dtype}, {head_dim}" for dtype in DEFAULTS for head_dim in (32, 64, 128))]
    rows = []
    for scheme in schemes(["int8"]):
        ratios = [memory_ratio(replace(scheme, dtype=dtype), head_dim) for dtype in DEFAULTS for head_dim in (32, 64, 128)]
        rows.append([short(scheme), *(f"{2 * ratio:.3f} ({percent(ratio)} %)" for ratio in ratios)])
    ratios = [stored_memory(chosen, head_dim) for chosen in DEFAULTS.values() for head_dim in (32, 64, 128)]
    rows.append(["**defaults, K and V together**", *(f"{2 * ratio:.3f} ({percent(ratio)} %)" for ratio in ratios)])
    return table(header, rows)


def tables(study: Study) -> dict[str, str]:
    """All generated parts of the document."""
    made = {
        "defaults": default_table(study),
        "int8": uniform_table(study, "int8", PLAIN_SCHEMES),
        "int4": uniform_table(study, "int4", PLAIN_SCHEMES),
        "int8 token": uniform_table(study, "int8", TOKEN_SCHEMES),
        "int4 token": uniform_table(study, "int4", TOKEN_SCHEMES),
        "keys": operand_table(study, KEY_SCHEMES, 1),
        "values": operand_table(study, VALUE_SCHEMES, 2),
        "mixtures": mixture_table(study),
        "memory": memory_table(),
    }
    if any(kind.name == "minilm" for kind in study.inputs):
        made["layers"] = layer_table(study)
    return made


def write_document(made: dict[str, str]) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, content in made.items():
        pattern = re.compile(rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}", text)
        if count != 1:
            raise SystemExit(f"{DOCUMENT}: expected one place for the table {name!r}, found {count}")
    DOCUMENT.write_text(text, encoding="utf-8")


def draw(study: Study, path: Path) -> None:
    """Plot the error against the memory of keys and values, with queries in INT8."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9})
    kinds = plotted_inputs(study)
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(10, 4.2), sharey=True, layout="constrained")
    styles = {
        "plain": (lambda k: not (k.smooth or k.rotate), "o", "tab:gray"),
        "keys smoothed": (lambda k: k.smooth and not k.rotate, "^", "tab:orange"),
        "keys rotated": (lambda k: k.rotate and not k.smooth, "s", "tab:green"),
        "keys smoothed and rotated": (lambda k: k.smooth and k.rotate, "D", "tab:blue"),
    }
    for axis, kind in zip(axes, kinds, strict=True):
        for label, (belongs, marker, colour) in styles.items():
            chosen = [row for row in plotted() if row[1] is not None and belongs(row[1])]
            memory = [100 * stored_memory(row, 128) for row in chosen]
            measured = [100 * study.stored(kind, row).relative for row in chosen]
            axis.scatter(memory, measured, s=22, marker=marker, color=colour, alpha=0.8, linewidths=0, label=label)
        for dtype, row in DEFAULTS.items():
            at = (100 * stored_memory(row, 128), 100 * study.stored(kind, row).relative)
            axis.annotate(
                f'"{dtype}"',
                at,
                (at[0] + 3, at[1] / 1.6),
                arrowprops={"arrowstyle": "-", "linewidth": 0.8, "shrinkB": 4},
                fontweight="bold",
            )
        axis.set(title=kind.title, xlabel="memory of K and V, % of FP16", yscale="log", ylim=(0.6, 60))
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axes[0].set_ylabel("relative RMSE of attention, %")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[-1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def plotted() -> list[Schemes]:
    """The points of the plot: keys and values by one scheme, queries in INT8."""
    return [(ROTATED_QUERY if k.rotate else QUERY, k, replace(k, smooth=False, rotate=False)) for k in EVERY_SCHEME]


def plotted_inputs(study: Study) -> list[Inputs]:
    """The plot's two panels: the easiest and the hardest inputs of head_dim 128."""
    return [kind for kind in study.inputs if kind.name in ("gaussian_128", "rotary_128")]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small inputs, and only what the tables show.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put tables and plot into docs/.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured to this file.")] = None,
) -> None:
    """Measure the schemes and print the tables of docs/quantization.md."""
    if quick and write:
        raise typer.BadParameter("--write takes the full study, not --quick")
    console = Console(stderr=True)
    start = time.perf_counter()
    study = Study(console, all_inputs(console, quick))
    study.measure("mixtures", [*MIXTURES, *DEFAULTS.values()])
    study.measure("keys alone", [alone(scheme, 1) for scheme in KEY_SCHEMES])
    study.measure("values alone", [alone(scheme, 2) for scheme in VALUE_SCHEMES])
    study.measure("one scheme for all", map(uniform, [*PLAIN_SCHEMES, *TOKEN_SCHEMES] if quick else EVERY_SCHEME))
    if not quick:
        study.measure("queries in int8", plotted(), plotted_inputs(study))
    made = tables(study)
    if json_path is not None:
        json_path.write_text(json.dumps({"quick": quick, "seed": SEED, "errors": study.records()}, indent=1) + "\n", encoding="utf-8")
    if write:
        write_document(made)
        draw(study, PLOT)
    else:
        for name, content in made.items():
            print(f"\n## {name}\n\n{content}")
    console.print(f"{len(study.records())} measurements in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
