"""Shorten a document: keep its beginning, its end and retrieved passages, cut the text between."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.context.retrieved import SEPARATOR, Passage
from rapid_llm.encoding import encode_literal, literal_encoding

OMISSION = "\n[...]\n"
"""Default mark where text was left out."""


class Part(NamedTuple):
    """A shortened document and the number of tokens left out."""

    text: str
    omitted_tokens: int


class CuttableDocument:
    """A document that can be shortened.

    Its beginning, its end and all passages are kept. Passages that are not found in it, ignoring
    white space, are appended.

    Args:
        text: the document.
        passages: passages retrieved from it.
        tokenizer: fast tokenizer, in whose tokens lengths are counted.
        mark: text that stands where something was left out.
    """

    def __init__(
        self,
        text: str,
        passages: Sequence[Passage],
        tokenizer: PreTrainedTokenizerBase,
        mark: str = OMISSION,
    ) -> None:
        self._text, spans = _located(text, passages)
        self._added_tokens = len(encode_literal(self._text[len(text) :], tokenizer))
        offsets = literal_encoding(self._text, tokenizer).offsets
        self._starts = [start for start, _ in offsets]
        self._ends = [end for _, end in offsets]
        self._passages = sorted(
            (bisect_right(self._ends, start), bisect_left(self._starts, end))
            for start, end in spans
        )
        self._mark = mark
        self._mark_tokens = len(encode_literal(mark, tokenizer))

    @property
    def tokens(self) -> int:
        """Number of tokens of the whole document with appended passages."""
        return len(self._starts)

    @property
    def own_tokens(self) -> int:
        """Number of tokens of the document without appended passages."""
        return self.tokens - self._added_tokens

    @cached_property
    def least(self) -> int:
        """Minimum length in tokens: the passages with marks, and one more token for each part."""
        return self._size(1)

    def cut(self, tokens: int) -> Part:
        """Shorten the document to at most ``tokens`` tokens, but not below ``least``.

        Tokens are counted in the whole document; encoding the joined parts can give a few more.
        """
        reach = bisect_right(range(1, 2 * self.tokens + 1), tokens, key=self._size)
        kept = self._kept(max(1, reach))
        text = self._mark.join(self._between(start, end) for start, end in kept)
        return Part(text, self.tokens - sum(end - start for start, end in kept))

    def _size(self, reach: int) -> int:
        """Number of kept tokens including marks; it does not decrease with ``reach``."""
        kept = self._kept(reach)
        return sum(end - start for start, end in kept) + self._mark_tokens * (len(kept) - 1)

    def _kept(self, reach: int) -> list[tuple[int, int]]:
        """Token ranges to keep: both ends and the passages, with ``reach`` tokens around each.

        The first range begins at the document's start and the last ends at its end; one of them may
        be empty. A gap no longer than a mark is kept as well.
        """
        before, after, last = reach // 2, (reach + 1) // 2, self.tokens
        kept = [(0, min(after, last))]
        for start, end in [*self._passages, (last, last)]:
            start, end = max(0, start - before), min(last, end + after)
            first, reached = kept[-1]
            if start - reached <= self._mark_tokens:
                kept[-1] = (first, max(reached, end))
            else:
                kept.append((start, end))
        return kept

    def _between(self, start: int, end: int) -> str:
        """Text of a range of tokens, without characters that are only partly in it."""
        first = self._ends[start - 1] if start else 0
        return self._text[first : self._starts[end] if end < self.tokens else None]


def share_out(documents: Sequence[CuttableDocument], tokens: int) -> list[Part]:
    """Shorten documents to ``tokens`` tokens in total.

    Each document gets the same share, except those that need less or whose passages need more.
    """

    def shares(level: int) -> list[int]:
        return [min(max(level, document.least), document.tokens) for document in documents]

    level = bisect_right(range(1, tokens + 1), tokens, key=lambda level: sum(shares(level)))
    return [document.cut(share) for document, share in zip(documents, shares(level), strict=True)]


def _located(text: str, passages: Sequence[Passage]) -> tuple[str, list[tuple[int, int]]]:
    """The text with passages that it lacks appended, and the character range of each passage."""
    search = _Search(text)
    spans = []
    for passage in passages:
        excerpt = (passage.text if passage.excerpt is None else passage.excerpt).strip()
        if not excerpt:
            continue
        span = search(excerpt, max(0, passage.start or 0))
        if span is None:
            text += SEPARATOR + excerpt
            span = len(text) - len(excerpt), len(text)
        spans.append(span)
    return text, spans


class _Search:
    """Finds passages in a text, ignoring differences in white space."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _visible(self) -> list[int]:
        return [i for i, character in enumerate(self._text) if not character.isspace()]

    @cached_property
    def _without_space(self) -> str:
        return "".join(self._text[i] for i in self._visible)

    def __call__(self, passage: str, start: int) -> tuple[int, int] | None:
        """Character range of a passage, searched from ``start``, then anywhere; None if absent."""
        for since in (start, 0):
            at = self._text.find(passage, since)
            if at >= 0:
                return at, at + len(passage)
        words = "".join(passage.split())
        for since in (bisect_left(self._visible, start), 0):
            at = self._without_space.find(words, since)
            if at >= 0:
                return self._visible[at], self._visible[at + len(words) - 1] + 1
        return None
