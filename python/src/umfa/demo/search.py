"""Answers a question from the documents: the best topics, and of each the passage that fits best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from umfa.demo.corpus import Document
from umfa.demo.model import MAX_TOKENS, AttentionFunction, SentenceEncoder

__all__ = ["Hit", "search"]


@dataclass(frozen=True)
class Hit:
    """A topic that answers a question.

    Attributes
    ----------
    document : Document
        The topic.
    score : float
        The cosine between the question's embedding and the topic's.
    excerpt : str
        The topic's passage that is closest to the question.
    """

    document: Document
    score: float
    excerpt: str


def search(
    encoder: SentenceEncoder,
    attention: AttentionFunction,
    documents: Sequence[Document],
    question: str,
    *,
    count: int = 3,
    max_tokens: int = MAX_TOKENS,
    advance: Callable[[int], None] | None = None,
) -> list[Hit]:
    """Find the topics that answer a question best.

    Parameters
    ----------
    encoder : SentenceEncoder
        The model.
    attention : callable
        Computes its attention.
    documents : sequence of Document
        What is searched.
    question : str
        What is asked.
    count : int
        How many topics are wanted.
    max_tokens : int
        Texts are cut to this many word pieces.
    advance : callable, optional
        Called with the number of documents that were read since the last call.

    Returns
    -------
    list of Hit
        The best first.
    """
    (wanted,) = encoder.encode(encoder.tokenize([question]), attention)
    scores = encoder.encode(encoder.tokenize([document.text for document in documents], max_tokens), attention, advance) @ wanted
    hits = []
    for position in np.argsort(-scores, kind="stable")[:count]:
        passages = documents[position].passages()
        closeness = encoder.encode(encoder.tokenize(passages, max_tokens), attention) @ wanted
        hits.append(Hit(documents[position], float(scores[position]), passages[int(closeness.argmax())]))
    return hits
