"""Cutting a document into chunks that fit a token limit, with exact character offsets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from semantic_text_splitter import TextSplitter

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


def count_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of document text: control tokens in it count as the ordinary text they will be."""
    from rapid_llm.encoding import encode_literal  # here, because it imports torch

    return len(encode_literal(text, tokenizer))


def split_text(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 512) -> list[Span]:
    """Cut a text into chunks at the largest borders (paragraph, sentence, word) that fit.

    Args:
        text: the document.
        tokenizer: the target's tokenizer.
        max_tokens: the limit of each chunk, at least 32.

    Returns:
        Spans in document order. They do not overlap, and only white space lies between them;
        a text of white space alone has none.

    Raises:
        InvalidParameterError: ``max_tokens`` is below 32.
    """
    if max_tokens < MIN_CHUNK_TOKENS:
        raise InvalidParameterError(
            f"max_tokens={max_tokens} is too small for a chunk: give at least {MIN_CHUNK_TOKENS}"
        )
    # A callback, because the splitter's own tokenizer support takes control tokens for one token.
    count = partial(count_tokens, tokenizer=tokenizer)
    splitter = TextSplitter.from_callback(count, max_tokens)
    return [
        Span(start, start + len(chunk), count(chunk))
        for start, chunk in splitter.chunk_indices(text)
    ]
