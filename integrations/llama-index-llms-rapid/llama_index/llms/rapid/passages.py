"""Find the documents of retrieved passages where only their text is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llama_index.llms.rapid.fulltext import FullText, telling
from rapid_llm.context.retrieved import Passage


class Located(NamedTuple):
    """The passages that were found in documents.

    Attributes:
        passages: each with the name of its document, in the order of the text.
        whole: whether the text is nothing but these passages and the documents' own metadata.
    """

    passages: tuple[Passage, ...]
    whole: bool


def locate(text: str, documents: Sequence[FullText]) -> Located:
    """Find the passages of a text in documents.

    A passage is a longest run of lines that stands in a document; white space does not matter. It
    is taken where just one document holds it, or just one with the metadata that precede it, and
    if it is not merely a few words. So a passage from elsewhere opens no document, not even one
    that quotes it, if their metadata differ.

    Args:
        text: retrieved passages, each with its metadata before it, and whatever else a pipeline
            writes around them.
        documents: those that may be read.
    """
    lines = [_Line(*span, " ".join(text[slice(*span)].split())) for span in _lines(text)]
    heads = frozenset().union(*(document.heads for document in documents))
    found: list[Passage] = []
    shared: list[list[FullText]] = []
    rest = False
    before: list[str] = []  # what stands before the next passage: metadata, and other lines
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
    # A passage of several documents opens none of them, but is read if another opens one.
    rest = rest or any(all(d.name not in read for d in fitting) for fitting in shared)
    return Located(tuple(found), whole=bool(found) and not rest)


@dataclass(frozen=True)
class _Line:
    start: int
    end: int
    words: str  # every white space a single blank


def _lines(text: str) -> list[tuple[int, int]]:
    """Where each line begins and ends, blank ones left out."""
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
    """The longest run of lines from ``at`` on that a document holds: its end, itself, and who."""
    end, run, holding = at, "", list(documents)
    while end < len(lines):
        longer = f"{run} {lines[end].words}" if run else lines[end].words
        still = [document for document in holding if longer in document.body]
        if not still:
            break
        end, run, holding = end + 1, longer, still
    return end, run, holding


def _one_of_each(documents: Sequence[FullText]) -> list[FullText]:
    """Of documents with the same text, the first."""
    return list({document.shown: document for document in reversed(documents)}.values())[::-1]
