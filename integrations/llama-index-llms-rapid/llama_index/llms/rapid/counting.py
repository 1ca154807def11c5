"""LlamaIndex's token counts, in the model's own tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import llama_index.core
from llama_index.core.utils import set_global_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from rapid_llm.surrogates import without_surrogates


class ModelTokenizer:
    """A model's tokenizer as LlamaIndex's budgets, splitters and memories call it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """The token ids of a text, without BOS; lone surrogates in it count as U+FFFD."""
        text = without_surrogates(text)
        if self.tokenizer.is_fast:  # without the checks of each call, as there are very many
            backend = self.tokenizer.backend_tokenizer
            if backend.truncation or backend.padding:  # saved with it, or left by another call
                backend.no_truncation()
                backend.no_padding()
            return backend.encode(text, add_special_tokens=False).ids
        return self.tokenizer.encode(text, add_special_tokens=False)


def count_with(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let what is built from now on count in the tokens of this model.

    LlamaIndex has one tokenizer for all (``Settings.tokenizer``), by default OpenAI's, which counts
    far too few tokens where a model knows a language less well. One that the user has set stays.
    """
    current: object = llama_index.core.global_tokenizer
    if isinstance(current, ModelTokenizer) and current.tokenizer is tokenizer:
        return
    if current is None or isinstance(current, ModelTokenizer) or _is_default(current):
        set_global_tokenizer(ModelTokenizer(tokenizer))


def _is_default(tokenizer: object) -> bool:
    """Whether it is the one that LlamaIndex takes by itself, at the first count."""
    if not (isinstance(tokenizer, partial) and tokenizer.keywords == {"allowed_special": "all"}):
        return False
    return type(getattr(tokenizer.func, "__self__", None)).__module__.startswith("tiktoken")
