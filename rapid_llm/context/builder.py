"""Retrieve the drafter's context: the chunks of documents most relevant to a question."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from math import floor, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rapid_llm.config import RetrievalConfig
from rapid_llm.context.chunking import MIN_CHUNK_TOKENS, Span, Window, count_tokens, split_text
from rapid_llm.context.confidence import confidence
from rapid_llm.context.embedder_loading import default_embedder, load_embedder, require_embedder
from rapid_llm.context.embedding import EMBEDDING_BATCH, Embedder, batched, unit
from rapid_llm.context.ranking import bm25, fuse
from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.context.store import ChunkStore, StoredChunks
from rapid_llm.context.validation import require_documents, require_text
from rapid_llm.forked import Owner, ProcessLock, limit_threads
from rapid_llm.options import changed
from rapid_llm.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_KEPT_SPANS = 100_000  # spans cached for texts that were split before: about 20 MB


@dataclass(frozen=True)
class Chunk:
    """A retrieved passage.

    Attributes:
        text: text of the chunk, ``documents[document][start:end]``.
        start: offset of its first character in the document.
        end: offset one past its last character.
        score: ranking score, higher is better: cosine similarity to the question, in [-1, 1]
            (``dense``); BM25 score, above 0 (``bm25``); sum of the reciprocal ranks by both, in
            (0, 2/61] (``hybrid``).
        tokens: number of tokens of ``text`` in the target's tokenizer.
        document: index of its document.
    """

    text: str
    start: int
    end: int
    score: float
    tokens: int
    document: int = 0


@dataclass(frozen=True)
class RetrievalContext:
    """The retrieved text that the drafter reads instead of the documents.

    Attributes:
        text: chunks in document order, joined by blank lines; empty without chunks.
        chunks: retrieved chunks in document order.
        tokens: number of tokens of ``text`` in the target's tokenizer, at most ``budget``.
        budget: retrieval budget in tokens: max(``retrieval_tokens``, tokens of all documents ÷
            ``compression``), or the available room if that is less.
        empty_reason: reason why there are no chunks; None when there are some.
        confidence: confidence of the retrieval, in [0, 1], from the cosine similarities (see
            :mod:`rapid_llm.context.confidence`); 1 for retrievers other than ``dense``.
    """

    text: str
    chunks: tuple[Chunk, ...]
    tokens: int
    budget: int
    empty_reason: str | None
    confidence: float


class _Split(NamedTuple):
    spans: list[Span]
    tokens: int  # number of tokens of the whole text


class _Splits:
    """Cache of the spans of recently split texts, keyed by a hash of the text."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[bytes, int], _Split] = OrderedDict()
        self._spans = 0
        self._lock = ProcessLock()

    def get(self, text: str, chunk_tokens: int) -> _Split | None:
        key = _digest(text), chunk_tokens
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def put(self, text: str, chunk_tokens: int, split: _Split) -> None:
        key = _digest(text), chunk_tokens
        with self._lock:
            self._drop(key)
            self._known[key] = split
            self._spans += len(split.spans)
            while self._spans > _KEPT_SPANS and len(self._known) > 1:
                self._drop(next(iter(self._known)))

    def _drop(self, key: tuple[bytes, int]) -> None:
        if key in self._known:
            self._spans -= len(self._known.pop(key).spans)


class ContextBuilder:
    """Retrieves the drafter's context from long documents.

    Documents are cut into chunks, embedded, stored in Chroma and searched by cosine similarity, or
    ranked by the words that they share with the question, or by both. A builder may be called from
    several threads; one at a time embeds.

    Args:
        tokenizer: the target's transformers tokenizer, in whose tokens all lengths are counted.
            Control tokens inside a document count as ordinary text.
        embedder: embedding model in any form that :func:`load_embedder` takes; by default the
            config's. It is loaded at the first :meth:`build` (not for ``bm25``), and no chunk is
            longer than its maximum input.
        config: retrieval options.
        device: device of an embedder that is loaded by name.
        options: single retrieval options by name (``chunk_tokens=…``), which override those in
            ``config``.

    Raises:
        InvalidParameterError: an unknown option, a value outside its range, or Chroma cannot open
            the store.
        MissingDependencyError: the retriever needs Chroma, which is not installed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        embedder: str | Path | Embedder | Any | None = None,
        *,
        config: RetrievalConfig | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        self._config = config = changed(config or RetrievalConfig(), options)
        self._tokenizer = tokenizer
        self._count = partial(count_tokens, tokenizer=tokenizer)
        self._chunk_tokens = min(config.chunk_tokens, config.retrieval_tokens)
        self._store = None if config.retriever == "bm25" else ChunkStore(config.store)
        self._source = embedder or config.embedder or default_embedder()
        self._device = None if device is None else str(device)
        self._embedder: Embedder | None = None
        self._loaded_in = Owner("the embedding model")
        self._lock = ProcessLock()  # so that threads do not load a model or embed a text twice
        self._splits = _Splits()

    @property
    def embedder_name(self) -> str | None:
        """Name of the embedder: the name it is loaded by, or its own if it was passed loaded.

        None for ``bm25``, which embeds nothing.
        """
        if self._store is None:
            return None
        return str(self._source) if isinstance(self._source, str | Path) else self._source.name

    def build(
        self,
        documents: str | Sequence[str],
        question: str,
        *,
        room: int | None = None,
        progress: Progress | None = None,
    ) -> RetrievalContext:
        """Retrieve the chunks of the documents that are most relevant to the question.

        Chunks are taken from the best on until the budget is filled; a chunk that no longer fits is
        skipped for smaller ones. ``dense`` takes only chunks above the similarity threshold.

        Args:
            documents: one document or several; blank ones are ignored.
            question: question to retrieve for.
            room: number of tokens that the reading model has for the retrieved text, at least 32;
                an upper limit of the budget and of each chunk. None sets no limit.
            progress: callback ``progress(done, total)`` with the number of chunks embedded, first
                with 0; not called when the vectors of all chunks are stored already.

        Raises:
            DocumentError: a document or the question is not text, the question is empty, or all
                documents are.
            ModelError: the embedding model cannot be loaded, or gives invalid vectors.
            MissingDependencyError: the embedding model or the retriever needs a package that is
                not installed.
        """
        texts = require_documents(documents)
        question = require_text("the question", question)
        if self._store is not None:
            self._load_embedder()
        most = self._chunk_tokens if room is None else min(self._chunk_tokens, room)
        split = {text: self._split(text, most) for text in dict.fromkeys(texts) if text.strip()}
        total = sum(split[text].tokens for text in texts if text in split)
        budget = max(self._config.retrieval_tokens, int(total / self._config.compression))
        budget = budget if room is None else min(budget, room)
        ranked = self._rank(texts, split, question, progress)
        chunks = self._fill(self._similar(ranked), budget)
        text = _join(chunks)
        return RetrievalContext(
            text=text,
            chunks=tuple(chunks),
            tokens=self._count(text),
            budget=budget,
            empty_reason=None if chunks else self._empty_reason(ranked),
            confidence=confidence([chunk.score for chunk in chunks])
            if self._config.retriever == "dense"
            else 1.0,
        )

    def __deepcopy__(self, memo: object) -> ContextBuilder:
        """The builder itself, whose only state is a cache."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without its cache; the embedder and the store are opened again when unpickled."""
        make = partial(type(self), config=self._config, device=self._device)
        return make, (self._tokenizer, self._source)

    def _load_embedder(self) -> Embedder:
        limit_threads()
        with self._lock:
            if self._embedder is None or not self._loaded_in.here:
                self._embedder = load_embedder(self._source, self._device)
                self._loaded_in = Owner("the embedding model")
            return self._embedder

    def _split(self, text: str, chunk_tokens: int) -> _Split:
        known = self._splits.get(text, chunk_tokens)
        if known is None:
            spans = split_text(text, self._tokenizer, chunk_tokens, _window(self._embedder))
            known = _Split(spans, self._count(text))
            self._splits.put(text, chunk_tokens, known)
        return known

    def _rank(
        self,
        texts: Sequence[str],
        split: Mapping[str, _Split],
        question: str,
        progress: Progress | None,
    ) -> list[Chunk]:
        """All chunks that the retriever finds, the best first."""
        places = [
            (number, text, span)
            for number, text in enumerate(texts)
            if text in split
            for span in split[text].spans
        ]
        pieces = [text[span.start : span.end] for _, text, span in places]
        scorings: list[list[float]] = []
        if self._store is not None:
            cosines = self._search(self._store, split, question, progress)
            scorings.append([s for text in texts if text in split for s in cosines[text]])
        if self._config.retriever != "dense":
            words = bm25(pieces, question)
            scorings.append([score if score > 0 else -inf for score in words])
        scores = scorings[0] if len(scorings) == 1 else fuse(*scorings)
        ranked = [
            Chunk(piece, span.start, span.end, score, span.tokens, number)
            for (number, _, span), piece, score in zip(places, pieces, scores, strict=True)
        ]
        ranked = [chunk for chunk in ranked if chunk.score > -inf]
        return sorted(ranked, key=lambda chunk: (-chunk.score, chunk.document, chunk.start))

    def _search(
        self,
        store: ChunkStore,
        split: Mapping[str, _Split],
        question: str,
        progress: Progress | None,
    ) -> dict[str, list[float]]:
        """Cosine similarities to the question of the chunks of each text, embedded if need be."""
        embedder = self._load_embedder()
        stored = store.open({text: parts.spans for text, parts in split.items()}, embedder.name)
        with self._lock:
            _embed(stored, embedder, progress)
            query = unit([embedder.embed_query(question)], 1, embedder)[0]
            cosines = iter(stored.cosines(query))
        return {text: list(islice(cosines, len(parts.spans))) for text, parts in split.items()}

    def _similar(self, ranked: Sequence[Chunk]) -> Sequence[Chunk]:
        """Chunks above the similarity threshold; all for retrievers other than ``dense``."""
        if self._config.retriever != "dense":
            return ranked
        if self._config.threshold is not None:
            return [chunk for chunk in ranked if chunk.score >= self._config.threshold]
        least: float | None = getattr(self._embedder, "threshold", None)
        if least is None:
            return ranked
        return [chunk for chunk in ranked if chunk.score >= least] or ranked[:1]

    def _fill(self, ranked: Sequence[Chunk], budget: int) -> list[Chunk]:
        """The best chunks that fit together, in document order."""
        chosen: list[Chunk] = []
        used = 0
        for chunk in ranked:
            if used + chunk.tokens > budget:
                continue
            together = sorted([*chosen, chunk], key=lambda c: (c.document, c.start))
            # Count the joined text: its tokens are not the sum of the parts' tokens.
            tokens = self._count(_join(together))
            if tokens <= budget:
                chosen, used = together, tokens
        return chosen

    def _empty_reason(self, ranked: Sequence[Chunk]) -> str:
        if self._config.retriever == "bm25":
            return "no chunk has a word of the question"
        best = floor(ranked[0].score * 100) / 100
        return f"no chunk reached similarity {self._config.threshold:g} (best {best:g})"


def require_retrieval(config: RetrievalConfig) -> None:
    """Refuse an embedder or a store that a retriever could not use, before models are loaded.

    Args:
        config: retrieval options.

    Raises:
        ModelError: there is no such embedding model.
        InvalidParameterError: Chroma cannot open the store.
        MissingDependencyError: the retriever needs a package that is not installed.
    """
    if config.retriever != "bm25":
        require_embedder(config.embedder)
        ChunkStore(config.store)


def _embed(stored: StoredChunks, embedder: Embedder, progress: Progress | None) -> None:
    """Embed and store missing chunks in batches, so that an interrupt loses one batch only."""
    missing = stored.missing()
    report = progress or (lambda done, total: None)
    for done, batch in zip(count(0, EMBEDDING_BATCH), batched(missing, EMBEDDING_BATCH)):
        report(done, len(missing))
        vectors = embedder.embed_documents([stored.text(i) for i in batch])
        stored.add(batch, unit(vectors, len(batch), embedder))
    if missing:
        report(len(missing), len(missing))


def _window(embedder: Embedder | None) -> Window | None:
    """Maximum input of an embedder, at least 32 tokens; None if it does not declare one."""
    most: int | None = getattr(embedder, "max_tokens", None)
    count_tokens = getattr(embedder, "count_tokens", None)
    if most is None or count_tokens is None:
        return None
    return Window(count_tokens, max(most, MIN_CHUNK_TOKENS))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _join(chunks: Sequence[Chunk]) -> str:
    return SEPARATOR.join(chunk.text for chunk in chunks)
