"""Leaving out of a document what is far from its ends and from what was retrieved from it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.context.retrieved import SEPARATOR, Passage
from rapid_llm.encoding import encode_literal, literal_encoding

OMISSION = "\n[...]\n"
"""Stands where text was left out."""


class Part(NamedTuple):
    """What is left of a document, and how many of its tokens are not."""

    text: str
    omitted_tokens: int


class CuttableDocument:
    """A document that can be made shorter.

    Kept are its beginning, its end and every passage. Passages that cannot be found in it, white
    space aside, are put at its end.

    Args:
        text: the document.
        passages: what was retrieved from it.
        tokenizer: a fast tokenizer, whose tokens are counted.
        mark: stands where text was left out.
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
        """Those of the whole document, with the passages at its end."""
        return len(self._starts)

    @property
    def own_tokens(self) -> int:
        """Those of the document as it was given."""
        return self.tokens - self._added_tokens

    @cached_property
    def least(self) -> int:
        """Tokens that are kept in any case: those of the passages, and one more of each part."""
        return self._size(1)

    def cut(self, tokens: int) -> Part:
        """The document in at most that many tokens, but at least in ``least``.

        The tokens are counted where they stand: the parts can meet in a few others.
        """
        reach = bisect_right(range(1, 2 * self.tokens + 1), tokens, key=self._size)
        kept = self._kept(max(1, reach))
        text = self._mark.join(self._between(start, end) for start, end in kept)
        return Part(text, self.tokens - sum(end - start for start, end in kept))

    def _size(self, reach: int) -> int:
        """Tokens of what is kept, marks included; never less for a longer reach."""
        kept = self._kept(reach)
        return sum(end - start for start, end in kept) + self._mark_tokens * (len(kept) - 1)

    def _kept(self, reach: int) -> list[tuple[int, int]]:
        """Ranges of tokens: both ends and the passages, with ``reach`` tokens around each.

        The first begins with the document and the last ends with it; one of them may be empty.
        A gap no longer than its mark would be is kept as well.
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
        """Whole characters only: one that has several tokens, not all of them in, is left out."""
        first = self._ends[start - 1] if start else 0
        return self._text[first : self._starts[end] if end < self.tokens else None]


def share_out(documents: Sequence[CuttableDocument], tokens: int) -> list[Part]:
    """Documents cut to that many tokens in all.

    Each gets the same, but for those that need less, or whose passages need more.
    """

    def shares(level: int) -> list[int]:
        return [min(max(level, document.least), document.tokens) for document in documents]

    level = bisect_right(range(1, tokens + 1), tokens, key=lambda level: sum(shares(level)))
    return [document.cut(share) for document, share in zip(documents, shares(level), strict=True)]


def _located(text: str, passages: Sequence[Passage]) -> tuple[str, list[tuple[int, int]]]:
    """Where the passages stand, in the text with those at its end that are not in it."""
    search = _Search(text)
    spans = []
    for passage in passages:
        excerpt = (passage.text if passage.excerpt is None else passage.excerpt).strip()
        if not excerpt:
            continue
        span = search(excerpt, passage.start or 0)
        if span is None:
            text += SEPARATOR + excerpt
            span = len(text) - len(excerpt), len(text)
        spans.append(span)
    return text, spans


class _Search:
    """Finds passages in a text, also where their white space is another."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _inked(self) -> list[int]:
        return [i for i, character in enumerate(self._text) if not character.isspace()]

    @cached_property
    def _squeezed(self) -> str:
        return "".join(self._text[i] for i in self._inked)

    def __call__(self, passage: str, start: int) -> tuple[int, int] | None:
        """First and one past the last character, from ``start`` on or else anywhere."""
        for since in (start, 0):
            at = self._text.find(passage, since)
            if at >= 0:
                return at, at + len(passage)
        words = "".join(passage.split())
        for since in (bisect_left(self._inked, start), 0):
            at = self._squeezed.find(words, since)
            if at >= 0:
                return self._inked[at], self._inked[at + len(words) - 1] + 1
        return None
