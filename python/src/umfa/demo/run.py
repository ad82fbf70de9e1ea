"""Measures every way to compute attention inside the model: time, memory, error, and what the error does to search results."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

import umfa
from umfa.demo import require
from umfa.demo.corpus import Document
from umfa.demo.methods import Method, UmfaMethod, all_methods, numpy_attention
from umfa.demo.model import MAX_TOKENS, AttentionFunction, SentenceEncoder

__all__ = ["QUESTIONS", "Answer", "DemoResult", "Measurement", "ProgressFunction", "measure", "thread_limit"]

QUESTIONS = (
    "How can I pause my program and look at its variables line by line?",
    "How do I leave a loop early?",
    "How are numbers formatted inside a string?",
    "How does Python find a module that I import?",
    "How do I raise an error?",
    "What makes an object count as true or false?",
    "How do I remove an item from a list?",
    "What is a coroutine?",
    "How does inheritance of classes work?",
    "How do I write a function without a name?",
    "How can a class control access to its attributes?",
    "How long does Python keep an object in memory?",
)

ProgressFunction = Callable[[int, str, int], object]
"""``(texts done, what is being done, texts in all)``."""

_SAMPLE_SIZE = 8


@dataclass(frozen=True)
class Measurement:
    """What one method took and how exact it was.

    Attributes
    ----------
    method, engine, precision : str
        Which method, see `umfa.demo.methods.Method`.
    attention_seconds : float
        All attention calls for all documents, quantising included; of each call the median of the repeats.
    kv_bytes : int
        Keys and values of all layers and documents, with their scales.
    relative_rmse : float
        Error of the attention output against float64, relative to its root mean square, on a sample of documents in every layer.
    cosine_min, cosine_mean : float
        Between the documents' embeddings and those of `umfa` in fp32.
    top1_kept, top3_kept : int
        The number of questions whose best answer, and whose best three in this order, are those of `umfa` in fp32.
    """

    method: str
    engine: str
    precision: str
    attention_seconds: float
    kv_bytes: int
    relative_rmse: float
    cosine_min: float
    cosine_mean: float
    top1_kept: int
    top3_kept: int


@dataclass(frozen=True)
class Answer:
    """The topics that answer a question best.

    Attributes
    ----------
    question : str
        The question.
    topics : dict of str to list of str
        For each method the names of its best three topics.
    """

    question: str
    topics: dict[str, list[str]]


@dataclass(frozen=True)
class DemoResult:
    """A whole run.

    Attributes
    ----------
    versions : dict of str to str
        Of the packages that computed.
    threads : int
        Threads that each engine was given.
    repeats : int
        How often each attention call was timed.
    documents, tokens : int
        The amount of text.
    layers, heads, head_dim : int
        The shape of the model's attention.
    seconds : float
        The run's duration.
    measurements : list of Measurement
        One a method.
    answers : list of Answer
        One a question.
    """

    versions: dict[str, str]
    threads: int
    repeats: int
    documents: int
    tokens: int
    layers: int
    heads: int
    head_dim: int
    seconds: float
    measurements: list[Measurement]
    answers: list[Answer]


class _Stopwatch:
    """Wraps a method: times its calls and adds up the memory of keys and values."""

    def __init__(self, method: Method, repeats: int) -> None:
        self._method = method
        self._repeats = repeats
        self.seconds = 0.0
        self.kv_bytes = 0

    def __call__(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, kv_lengths: np.ndarray) -> np.ndarray:
        operands = self._method.prepare(query, key, value)
        durations = []
        for _ in range(self._repeats):
            start = time.perf_counter()
            output = self._method.attend(*operands, kv_lengths)
            durations.append(time.perf_counter() - start)
        self.seconds += statistics.median(durations)
        self.kv_bytes += self._method.kv_bytes(*operands[1:])
        return output.astype(np.float32, copy=False)


class _Recorder:
    """Wraps an attention function and keeps every call's operands, and what they give in float64."""

    def __init__(self, attention: AttentionFunction) -> None:
        self._attention = attention
        self._calls: list[tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = []

    def __call__(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, kv_lengths: np.ndarray) -> np.ndarray:
        reference = numpy_attention(query.astype(np.float64), key.astype(np.float64), value.astype(np.float64), kv_lengths)
        self._calls.append(((query, key, value, kv_lengths), reference))
        return self._attention(query, key, value, kv_lengths)

    def relative_rmse(self, attention: AttentionFunction) -> float:
        """Run `attention` on the recorded operands and compare the rows that belong to a text."""
        squared_error = squared_reference = 0.0
        for operands, reference in self._calls:
            inside = np.arange(reference.shape[1]) < operands[3][:, None]
            squared_error += float(np.sum((attention(*operands) - reference)[inside] ** 2))
            squared_reference += float(np.sum(reference[inside] ** 2))
        return float(np.sqrt(squared_error / squared_reference))


@contextlib.contextmanager
def thread_limit(threads: int) -> Iterator[None]:
    """Give NumPy's BLAS, and PyTorch if it is in use, this many threads.

    Parameters
    ----------
    threads : int
        At least 1.

    Yields
    ------
    None
        The limits end with the block.

    Raises
    ------
    DemoUnavailableError
        If threadpoolctl is not installed.
    """
    (threadpoolctl,) = require("threadpoolctl")
    torch = sys.modules.get("torch")
    torch_threads = torch.get_num_threads() if torch is not None else 0
    with threadpoolctl.threadpool_limits(threads):
        if torch is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch is not None:
                torch.set_num_threads(torch_threads)


def _sample(token_ids: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Take texts of all lengths, from the shortest to the longest."""
    ordered = sorted(token_ids, key=len)
    positions = np.linspace(0, len(ordered) - 1, min(_SAMPLE_SIZE, len(ordered))).round().astype(int)
    return [ordered[position] for position in positions]


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Compute the cosine between each row of `left` and the same row of `right`, in float64."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    products = np.sum(left * right, axis=1)
    cosines: np.ndarray = products / np.sqrt(np.sum(left * left, axis=1) * np.sum(right * right, axis=1))
    return cosines


def measure(
    encoder: SentenceEncoder,
    documents: Sequence[Document],
    *,
    threads: int = 1,
    repeats: int = 3,
    max_tokens: int = MAX_TOKENS,
    questions: Sequence[str] = QUESTIONS,
    progress: ProgressFunction | None = None,
) -> DemoResult:
    """Run the model over the documents once a method and compare.

    Parameters
    ----------
    encoder : SentenceEncoder
        The model.
    documents : sequence of Document
        What is searched; at least 3.
    threads : int
        For every engine alike.
    repeats : int
        How often each attention call is timed.
    max_tokens : int
        Documents are cut to this many word pieces.
    questions : sequence of str
        What is asked.
    progress : callable, optional
        Told what is done, see `ProgressFunction`.

    Returns
    -------
    DemoResult
        Everything that the report shows.
    """
    start = time.perf_counter()
    token_ids = encoder.tokenize([document.text for document in documents], max_tokens)
    question_ids = encoder.tokenize(questions, max_tokens)

    with umfa.MFAContext(num_threads=threads) as context:
        methods = all_methods(context)
        baseline = next(method for method in methods if isinstance(method, UmfaMethod) and method.precision == "fp32")
        stopwatches: dict[str, _Stopwatch] = {}
        embeddings: dict[str, np.ndarray] = {}
        rankings: dict[str, np.ndarray] = {}
        errors: dict[str, float] = {}
        with thread_limit(threads):
            recorder = _Recorder(baseline)
            encoder.encode(_sample(token_ids), recorder)
            done = 0
            for method in methods:
                errors[method.name] = recorder.relative_rmse(method)  # first: it also warms the method up

                def advance(count: int, name: str = method.name) -> None:
                    nonlocal done
                    done += count
                    if progress is not None:
                        progress(done, name, len(methods) * len(documents))

                advance(0)
                stopwatch = stopwatches[method.name] = _Stopwatch(method, repeats)
                embeddings[method.name] = encoder.encode(token_ids, stopwatch, advance)
                scores = encoder.encode(question_ids, method) @ embeddings[method.name].T
                rankings[method.name] = np.argsort(-scores, axis=1, kind="stable")[:, :3]

    measurements = []
    for method in methods:
        name = method.name
        cosines = _cosines(embeddings[name], embeddings[baseline.name])
        same = rankings[name] == rankings[baseline.name]
        measurements.append(
            Measurement(
                method=name,
                engine=method.engine,
                precision=method.precision,
                attention_seconds=stopwatches[name].seconds,
                kv_bytes=stopwatches[name].kv_bytes,
                relative_rmse=errors[name],
                cosine_min=float(cosines.min()),
                cosine_mean=float(cosines.mean()),
                top1_kept=int(same[:, 0].sum()),
                top3_kept=int(same.all(axis=1).sum()),
            )
        )
    answers = [
        Answer(question, {name: [documents[position].name for position in ranking[row]] for name, ranking in rankings.items()})
        for row, question in enumerate(questions)
    ]
    versions = {"umfa": umfa.__version__, "NumPy": np.__version__}
    if "torch" in sys.modules:
        versions["PyTorch"] = str(sys.modules["torch"].__version__)
    model = encoder.model
    return DemoResult(
        versions=versions,
        threads=threads,
        repeats=repeats,
        documents=len(documents),
        tokens=sum(map(len, token_ids)),
        layers=model.num_layers,
        heads=model.num_heads,
        head_dim=model.head_dim,
        seconds=time.perf_counter() - start,
        measurements=measurements,
        answers=answers,
    )
