"""Retrieve the drafter's context, once per item for all methods that read the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache, partial
from random import Random

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.context import ContextBuilder, Embedder, RetrievalContext, load_embedder
from rapid_llm.context.embedding import Vectors
from rapid_llm.errors import InvalidParameterError
from rapid_llm.evaluation.methods import RetrievalSpec
from rapid_llm.evaluation.tasks.base import Item


class Retrieval:
    """Retrieves for a run's items, as ``specs`` say; ``tokenizer`` is the target's."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        specs: Iterable[RetrievalSpec],
        device: str | None = None,
    ) -> None:
        load = cache(partial(load_embedder, device=device))
        self._embedders: dict[RetrievalSpec, Embedder | None] = {
            spec: None if spec.embedder is None else load(spec.embedder) for spec in specs
        }
        builders = {
            spec: ContextBuilder(
                tokenizer,
                embedder,
                retriever=spec.retriever,
                chunk_tokens=spec.chunk_tokens,
                retrieval_tokens=spec.retrieval_tokens,
                # Hardly a chunk of another document is similar, and yet something is to be read.
                threshold=-1 if spec.irrelevant else None,
            )
            for spec, embedder in self._embedders.items()
        }

        @lru_cache(maxsize=2 * len(builders) + 1)
        def context(spec: RetrievalSpec, text: str, query: str) -> RetrievalContext:
            """What of a text belongs to a query."""
            return builders[spec].build(text, query)

        self.context = context

    def embed(self, spec: RetrievalSpec, texts: Sequence[str]) -> Vectors:
        """Unit vectors ``[len(texts), d]`` by the spec's embedder, which it must have."""
        embedder = self._embedders[spec]
        assert embedder is not None
        return embedder.embed_documents(texts)


def other_context(items: Sequence[Item], index: int, seed: int) -> str:
    """The context of another item, to retrieve what is irrelevant to item ``index``.

    It is drawn from the items before this one, so that more items change nothing; the first ones
    take the next. Raises InvalidParameterError if all items have the same context.
    """
    item = items[index]
    before, after = (
        [other.context for other in some if other.context != item.context]
        for some in (items[:index], items[index + 1 :])
    )
    if before:
        return Random(f"{seed}/{item.id}").choice(before)
    if after:
        return after[0]
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
