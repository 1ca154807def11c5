"""Cutting a document into chunks that fit a token limit, with exact character offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from rapid_llm.context.extras import import_extra
from rapid_llm.errors import InvalidParameterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One character can take several tokens (bytes, decomposed letters); it is never cut in two.
MIN_CHUNK_TOKENS = 32


@dataclass(frozen=True)
class Span:
    """``text[start:end]``, characters of a document, and its number of tokens on its own."""

    start: int
    end: int
    tokens: int


class Window(NamedTuple):
    """What another model reads of a text: ``count(text)`` of its own tokens, at most ``most``."""

    count: Callable[[str], int]
    most: int


def count_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of document text: control tokens in it count as the ordinary text they will be."""
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
        max_tokens: the limit of each chunk, at least 32.
        window: that of another model, into which each chunk is to fit as well.

    Returns:
        Spans in document order. They do not overlap, and only white space lies between them;
        a text of white space alone has none.

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
    # A callback, because the splitter's own tokenizer support takes control tokens for one token.
    count = partial(count_tokens, tokenizer=tokenizer)

    # The splitter takes a piece of no more bytes than its limit to fit: it gets the smaller limit.
    limit = min(limits.values())

    def size(piece: str) -> int:
        """At most ``limit`` if and only if the piece is within both limits."""
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
