"""Cutting a document into chunks that fit a token limit, with exact character offsets."""

from __future__ import annotations

from collections.abc import Callable, Sized
from copy import deepcopy
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


class TokenCounter:
    """Counts the tokens of document text: ``counter(text) -> int``.

    Document text is data, so ``<|im_end|>`` in it counts as the ordinary characters that it will
    be encoded as; no BOM, BOS or EOS is added.

    Args:
        tokenizer: any transformers tokenizer. A fast one is copied, because counting changes a
            setting that another thread's encoding may rely on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encode: Callable[[str], Sized]
        if tokenizer.is_fast:
            backend = deepcopy(tokenizer.backend_tokenizer)
            backend.encode_special_tokens = True
            backend.no_truncation()
            backend.no_padding()
            self._encode = partial(backend.encode, add_special_tokens=False)
        else:
            self._encode = partial(
                tokenizer.encode, add_special_tokens=False, split_special_tokens=True
            )

    def __call__(self, text: str) -> int:
        return len(self._encode(text))


def split_text(
    text: str, tokenizer: PreTrainedTokenizerBase | TokenCounter, max_tokens: int = 512
) -> list[Span]:
    """Cut a text into chunks at the largest borders (paragraph, sentence, word) that fit.

    Args:
        text: the document.
        tokenizer: the target's tokenizer, or its ``TokenCounter`` to cut many texts.
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
    count = tokenizer if isinstance(tokenizer, TokenCounter) else TokenCounter(tokenizer)
    # A callback, because the splitter's own tokenizer support takes special tokens for one token.
    splitter = TextSplitter.from_callback(count, max_tokens)
    return [
        Span(start, start + len(chunk), count(chunk))
        for start, chunk in splitter.chunk_indices(text)
    ]
