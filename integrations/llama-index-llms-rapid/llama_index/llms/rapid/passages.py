"""Find the documents of retrieved passages by their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llama_index.llms.rapid.fulltext import FullText, telling
from rapid_llm.context.retrieved import Passage


class Located(NamedTuple):
    """The passages that were found in documents.

    Attributes:
        passages: passages with the names of their documents, in the order of the text.
        whole: whether the text consists of these passages and the documents' own metadata only.
    """

    passages: tuple[Passage, ...]
    whole: bool


def locate(text: str, documents: Sequence[FullText]) -> Located:
    """Find the passages of a text in documents.

    A passage is a longest run of lines that a document contains, ignoring white space. It is
    assigned to a document if it has more than a few words, and if only this document contains it,
    or only this one together with the metadata before the passage. So a passage from another source
    is not assigned to a document that quotes it, if their metadata differ.

    Args:
        text: retrieved passages, each after its metadata, and other text of the pipeline.
        documents: documents to search.
    """
    lines = [_Line(*span, " ".join(text[slice(*span)].split())) for span in _lines(text)]
    heads = frozenset().union(*(document.heads for document in documents))
    found: list[Passage] = []
    shared: list[list[FullText]] = []
    rest = False
    before: list[str] = []  # lines before the next passage: metadata and others
    at = 0
    while at < len(lines):
        if lines[at].words in heads:
            before.append(lines[at].words)
            at += 1
            continue
        end, run, holding = _longest(lines, at, documents)
        if end > at:
            metadata = heads.intersection(before)
            fitting = _one_of_each(
                [d for d in holding if metadata <= d.heads and not any(map(d.denies, before))]
            )
            before.clear()
            if len(fitting) == 1 and telling(run, fitting[0]):
                excerpt = text[lines[at].start : lines[end - 1].end]
                found.append(Passage(excerpt, fitting[0].name))
            elif len(fitting) > 1:
                shared.append(fitting)
            else:
                rest = True
        else:
            before.append(lines[at].words)
            rest, end = True, at + 1
        at = end
    read = {passage.document_id for passage in found}
    # A passage of several documents is assigned to none, but is read if one of them is read anyway.
    rest = rest or any(all(d.name not in read for d in fitting) for fitting in shared)
    return Located(tuple(found), whole=bool(found) and not rest)


@dataclass(frozen=True)
class _Line:
    start: int
    end: int
    words: str  # text with single blanks as white space


def _lines(text: str) -> list[tuple[int, int]]:
    """Start and end of each line that is not blank."""
    spans, start = [], 0
    for line in text.splitlines(keepends=True):
        if stripped := line.strip():
            first = start + line.index(stripped)
            spans.append((first, first + len(stripped)))
        start += len(line)
    return spans


def _longest(
    lines: Sequence[_Line], at: int, documents: Sequence[FullText]
) -> tuple[int, str, list[FullText]]:
    """The longest run of lines from ``at`` on in any document: its end, text and documents."""
    end, run, holding = at, "", list(documents)
    while end < len(lines):
        longer = f"{run} {lines[end].words}" if run else lines[end].words
        still = [document for document in holding if longer in document.body]
        if not still:
            break
        end, run, holding = end + 1, longer, still
    return end, run, holding


def _one_of_each(documents: Sequence[FullText]) -> list[FullText]:
    """The documents without later ones of the same text."""
    return list({document.shown: document for document in reversed(documents)}.values())[::-1]
