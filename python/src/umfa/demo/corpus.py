"""The demo's text: the help topics of Python itself, which `help("with")` shows, as plain prose."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from umfa.demo import DemoUnavailableError

__all__ = ["Document", "load_documents", "paragraphs"]

_RULE = re.compile(r"^\s*([*=~^\"+-])\1{2,}\s*$|^-\[ .* \]-$")
_STATEMENT = re.compile(
    r"^ *(?:(?:async )?(?:class|def|for|with) .*|(?:if|elif|while|match|case) .*|try|except.*|else|finally):$", re.MULTILINE
)
_CODE_OPENERS = (">>> ", "... ", "+--", "| ", "> ", "-> ", "(Pdb)")
_PASSAGE_WORDS = 60


@dataclass(frozen=True)
class Document:
    """A help topic.

    Attributes
    ----------
    name : str
        What ``help(name)`` takes.
    title : str
        The topic's first heading.
    paragraphs : tuple of str
        Its prose, one line a paragraph, the title not included.
    """

    name: str
    title: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """Title and prose, as the encoder reads them."""
        return "\n".join((self.title + ".", *self.paragraphs))

    def passages(self, words: int = _PASSAGE_WORDS) -> list[str]:
        """Group neighbouring paragraphs into passages of about `words` words, to quote from.

        Parameters
        ----------
        words : int
            A passage is closed once it has this many words. A longer paragraph is divided between its sentences.

        Returns
        -------
        list of str
            The passages in the order of the text; at least one.
        """
        passages: list[str] = []
        current: list[str] = []
        for sentence in (part for paragraph in self.paragraphs for part in _pieces(paragraph, words)):
            current.append(sentence)
            if sum(len(part.split()) for part in current) >= words:
                passages.append(" ".join(current))
                current = []
        if current:
            passages.append(" ".join(current))
        return passages or [self.title]


def _pieces(paragraph: str, words: int) -> list[str]:
    """Keep a short paragraph whole and divide a long one into sentences."""
    if len(paragraph.split()) <= words:
        return [paragraph]
    return re.split(r"(?<=[.!?]) +(?=[A-Z\"'(“])", paragraph)


def paragraphs(source: str) -> list[str]:
    """Take the prose out of a help topic.

    Underlines of headings, grammar, tables, interactive sessions and code examples go; wrapped lines are joined; quotes and stars that
    mark code and emphasis go, their content stays.

    Parameters
    ----------
    source : str
        The topic's text, as in `pydoc_data.topics`.

    Returns
    -------
    list of str
        Headings and paragraphs, one line each.
    """
    lines = [line for line in source.splitlines() if not _RULE.match(line)]
    result = []
    previous = ""
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        # A list's items follow one another without a blank line between them.
        for item in re.split(r"\n(?=\s*(?:\* |\d+\. ))", block.strip("\n")):
            if item.strip() and not _is_code(item, previous):
                result.append(_plain(item))
            previous = item
    return result


def _is_code(block: str, previous: str) -> bool:
    """Tell code, grammar and tables from prose: by their marks, else as an indented block that a colon announces."""
    lines = textwrap.dedent(block).splitlines()
    indented = block[:1].isspace()
    if "::=" in block or lines[0].startswith(_CODE_OPENERS) or (indented and _STATEMENT.search(block)):
        return True
    announced = previous.rstrip().endswith(":") or previous[:1].isspace()
    return indented and announced and not re.search(r"[.!?:;)]\"?$|^\* |^\d+\. ", lines[-1].rstrip())


def _plain(block: str) -> str:
    """Join wrapped lines and take marks off."""
    text = " ".join(block.split())
    text = re.sub(r"^(?:\* |\d+\. )", "", text)
    text = re.sub(r"\*\*([A-Za-z][^*]*)\*\*|\*([A-Za-z][^*]*)\*", lambda match: match[1] or match[2], text)
    text = re.sub(r"`+([^`]+)`+|\"([^\"]+)\"", lambda match: match[1] or match[2], text)
    return re.sub(r" \[\d+\]", "", text)


def load_documents() -> list[Document]:
    """Read the help topics of the running Python.

    Returns
    -------
    list of Document
        About 80, in alphabetical order of their names.

    Raises
    ------
    DemoUnavailableError
        If this Python was packaged without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DemoUnavailableError("This Python has no help topics (pydoc_data): install the full standard library") from None
    documents = []
    for name, source in sorted(topics.items()):
        title, *prose = paragraphs(source)
        documents.append(Document(name, title, tuple(prose)))
    return documents
