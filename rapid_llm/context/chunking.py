"""Cut a document into chunks within a token limit, with exact character offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from rapid_llm.context.extras import import_extra
from rapid_llm.errors import InvalidParameterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_CHUNK_TOKENS = 32
"""Smallest chunk limit: one character, which is never cut, can take several tokens."""


@dataclass(frozen=True)
class Span:
    """A part of a text, ``text[start:end]``, and its number of tokens when encoded alone."""

    start: int
    end: int
    tokens: int


class Window(NamedTuple):
    """Maximum input of another model: at most ``most`` of its tokens, as ``count(text)`` counts."""

    count: Callable[[str], int]
    most: int


def count_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens of a text, with control tokens in it encoded as ordinary text."""
    from rapid_llm.encoding import encode_literal  # here, because it imports torch

    return len(encode_literal(text, tokenizer))


def split_text(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = 512,
    window: Window | None = None,
) -> list[Span]:
    """Cut a text into chunks at the largest borders (paragraph, sentence, word) that fit.

    Args:
        text: the document.
        tokenizer: the target's tokenizer.
        max_tokens: maximum length of a chunk in tokens, at least 32.
        window: maximum input of another model, which each chunk must fit as well.

    Returns:
        Spans in document order, without overlap and with only white space between them; none for
        a blank text.

    Raises:
        InvalidParameterError: ``max_tokens`` or ``window.most`` is below 32.
        MissingDependencyError: semantic-text-splitter is not installed.
    """
    limits = {"max_tokens": max_tokens} | ({"window.most": window.most} if window else {})
    for name, value in limits.items():
        if value < MIN_CHUNK_TOKENS:
            raise InvalidParameterError(
                f"{name}={value} is too small for a chunk: give at least {MIN_CHUNK_TOKENS}"
            )
    # A callback, because the splitter's own tokenizer support encodes control tokens as such.
    count = partial(count_tokens, tokenizer=tokenizer)

    # The smaller limit, because the splitter accepts any piece of no more bytes than its limit.
    limit = min(limits.values())

    def size(piece: str) -> int:
        """Size that is at most ``limit`` if and only if the piece is within both limits."""
        tokens = -(-count(piece) * limit // max_tokens)  # rounded up
        if window is None or tokens > limit:
            return tokens
        return max(tokens, -(-window.count(piece) * limit // window.most))

    package = import_extra("semantic_text_splitter", "retrieval", "cutting a document into chunks")
    splitter = package.TextSplitter.from_callback(size, limit)
    return [
        Span(start, start + len(chunk), count(chunk))
        for start, chunk in splitter.chunk_indices(text)
    ]
