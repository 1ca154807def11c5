"""What drafters read: retrieved once an item for all methods that read the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from random import Random

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.context import ContextBuilder, Embedder, RetrievalContext, load_embedder
from rapid_llm.context.embedding import PAPER_THRESHOLD, Vectors
from rapid_llm.errors import InvalidParameterError
from rapid_llm.evaluation.methods import RetrievalSpec
from rapid_llm.evaluation.tasks.base import Item


class Retrieval:
    """Retrieves for a run's items.

    Args:
        tokenizer: the target's.
        specs: the ways in which it may be asked to retrieve.
        device: of the embedders.

    Raises:
        InvalidParameterError: a value in a spec is outside its range.
        ModelError, MissingDependencyError: an embedder cannot be loaded.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        specs: Iterable[RetrievalSpec],
        device: str | None = None,
    ) -> None:
        self._embedders: dict[str | None, Embedder] = {}
        self._builders: dict[RetrievalSpec, ContextBuilder] = {}
        for spec in specs:
            if spec.embedder is not None and spec.embedder not in self._embedders:
                self._embedders[spec.embedder] = load_embedder(spec.embedder, device)
            self._builders[spec] = ContextBuilder(
                tokenizer,
                self._embedders.get(spec.embedder),
                retriever=spec.retriever,
                chunk_tokens=spec.chunk_tokens,
                retrieval_tokens=spec.context_tokens,
                # Hardly a chunk of another document is similar, and yet something is to be read.
                threshold=-1 if spec.irrelevant else PAPER_THRESHOLD,
            )
        self._build = lru_cache(maxsize=2 * len(self._builders) + 1)(self._retrieve)

    def context(self, spec: RetrievalSpec, text: str, query: str) -> RetrievalContext:
        """What of a text belongs to a query. Raises DocumentError if one of them is empty."""
        return self._build(spec, text, query)

    def embed(self, spec: RetrievalSpec, texts: Sequence[str]) -> Vectors:
        """Unit vectors ``[len(texts), d]`` by the spec's embedder, which it must have."""
        return self._embedders[spec.embedder].embed_documents(texts)

    def _retrieve(self, spec: RetrievalSpec, text: str, query: str) -> RetrievalContext:
        return self._builders[spec].build(text, query)


def other_context(items: Sequence[Item], index: int, seed: int) -> str:
    """The context of another item, to retrieve what is irrelevant to item ``index``.

    It is drawn from the items before this one, so that more items change nothing; the first ones
    take the next.

    Raises:
        InvalidParameterError: all items have the same context.
    """
    item = items[index]
    before = [other for other in items[:index] if other.context != item.context]
    if before:
        return Random(f"{seed}/{item.id}").choice(before).context
    for other in items[index + 1 :]:
        if other.context != item.context:
            return other.context
    raise InvalidParameterError(
        f"the {len(items)} items share one context, so that none is irrelevant: raise --limit, or "
        "leave --irrelevant out"
    )


def found(item: Item, retrieved: str) -> bool | None:
    """Whether a reference stands in what was retrieved, whatever its case and white space.

    None if none could: the references (a summary, a single letter) are not quoted from the context.
    """
    references = [_plain(reference) for reference in item.references if len(reference) > 1]
    context = _plain(item.context)
    quoted = [reference for reference in references if reference in context]
    text = _plain(retrieved)
    return any(reference in text for reference in quoted) if quoted else None


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()
