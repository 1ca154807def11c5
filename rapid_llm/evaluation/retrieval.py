"""Retrieve the drafter's context of an item, once for all methods with the same options."""

from __future__ import annotations

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
    """Retrieves contexts for the items of a run, with the retrieval options of all methods.

    The tokenizer is the target's, the device that of the embedders; None for the default.
    """

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
                # Chunks of another document are hardly similar, but some must be retrieved.
                threshold=-1 if spec.irrelevant else None,
            )
            for spec, embedder in self._embedders.items()
        }

        @lru_cache(maxsize=2 * len(builders) + 1)
        def context(spec: RetrievalSpec, text: str, query: str) -> RetrievalContext:
            """Chunks of a text that are relevant to a query."""
            return builders[spec].build(text, query)

        self.context = context

    def embed(self, spec: RetrievalSpec, texts: Sequence[str]) -> Vectors:
        """Unit vectors ``[len(texts), d]`` by the embedder of a spec, which must have one."""
        embedder = self._embedders[spec]
        assert embedder is not None
        return embedder.embed_documents(texts)


def other_context(items: Sequence[Item], index: int, seed: int) -> str:
    """The context of another item than that at ``index``, for an irrelevant retrieval.

    It is drawn by the seed from the items before this one, so that it does not depend on the number
    of items; the first items take the next one with another context.

    Raises:
        InvalidParameterError: all items have the same context.
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
    """Whether the retrieved text contains a reference, ignoring case and white space.

    None if no reference (a summary, a single letter) is a quote of the item's context.
    """
    references = [one for one in item.references if len(one) > 1]
    context, text, *plain = (
        " ".join(one.split()).casefold() for one in (item.context, retrieved, *references)
    )
    quoted = [reference for reference in plain if reference in context]
    return any(reference in text for reference in quoted) if quoted else None
