"""Make LlamaIndex count tokens with the model's own tokenizer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import llama_index.core
from llama_index.core.utils import set_global_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from rapid_llm.surrogates import without_surrogates


class ModelTokenizer:
    """A model's tokenizer as a function, for LlamaIndex's budgets, splitters and memories."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """The token ids of a text, without BOS; lone surrogates in it count as U+FFFD."""
        text = without_surrogates(text)
        if self.tokenizer.is_fast:  # skips the checks of each call, because there are very many
            backend = self.tokenizer.backend_tokenizer
            if backend.truncation or backend.padding:  # saved with it, or left by another call
                backend.no_truncation()
                backend.no_padding()
            return backend.encode(text, add_special_tokens=False).ids
        return self.tokenizer.encode(text, add_special_tokens=False)


def count_with(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set LlamaIndex's global tokenizer to a model's, unless the user has set one.

    LlamaIndex has one tokenizer for all (``Settings.tokenizer``), by default OpenAI's, which counts
    far too few tokens for languages that the model's tokenizer handles less well.
    """
    current: object = llama_index.core.global_tokenizer
    if isinstance(current, ModelTokenizer) and current.tokenizer is tokenizer:
        return
    if current is None or isinstance(current, ModelTokenizer) or _is_default(current):
        set_global_tokenizer(ModelTokenizer(tokenizer))


def _is_default(tokenizer: object) -> bool:
    """Whether it is the tokenizer that LlamaIndex sets by default."""
    if not (isinstance(tokenizer, partial) and tokenizer.keywords == {"allowed_special": "all"}):
        return False
    return type(getattr(tokenizer.func, "__self__", None)).__module__.startswith("tiktoken")
