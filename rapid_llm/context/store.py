"""Store the vectors of chunks in Chroma, so that no document is embedded twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rapid_llm.context.chunking import Span
from rapid_llm.context.database import Owner, database_of, other_length, place_of
from rapid_llm.context.embedding import Vectors, batched
from rapid_llm.errors import InvalidParameterError

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

_AT_ONCE = 256  # chunks per query, whose vectors are in memory beside Chroma's own


class _Chunk(NamedTuple):
    id: str
    document: str
    text: str
    span: Span


class StoredChunks:
    """Chunks of some documents in document order, and their stored vectors of one embedder.

    Attributes:
        owners: the embedder's name with the key of each document.
    """

    def __init__(self, store: ChunkStore, embedder: str, chunks: Sequence[_Chunk]) -> None:
        self._store = store
        self._embedder = embedder
        self._chunks = chunks
        self.owners = frozenset((embedder, chunk.document) for chunk in chunks)

    def missing(self) -> list[int]:
        """Indices of chunks without a stored vector."""
        stored: set[str] = set()
        with self._store.collection(self._embedder) as collection:
            for batch in batched(self._chunks, _AT_ONCE):
                stored.update(collection.get(ids=[chunk.id for chunk in batch], include=[])["ids"])
        return [i for i, chunk in enumerate(self._chunks) if chunk.id not in stored]

    def text(self, chunk: int) -> str:
        span = self._chunks[chunk].span
        return self._chunks[chunk].text[span.start : span.end]

    def add(self, chunks: Sequence[int], vectors: Vectors) -> None:
        """Store vectors of chunks, replacing any that are there.

        Args:
            chunks: indices of the chunks.
            vectors: float32 ``[len(chunks), d]``.

        Raises:
            ModelError: the stored vectors have another d.
        """
        added = [self._chunks[i] for i in chunks]
        with self._store.collection(self._embedder) as collection:
            collection.upsert(
                ids=[chunk.id for chunk in added],
                embeddings=vectors,
                metadatas=[
                    {"document": chunk.document, "start": chunk.span.start, "end": chunk.span.end}
                    for chunk in added
                ],
            )
        owners = [(self._embedder, chunk.document) for chunk in added]
        self._store.added(owners, vectors.itemsize * vectors.shape[1])

    def cosines(self, query: Vectors) -> list[float]:
        """Cosine similarities of all chunks to a query; the vectors of all must be stored.

        They are computed from the vectors themselves: Chroma's graph index can miss chunks that
        are nearly the same as many others, and is slow for one document of many.

        Args:
            query: unit vector, float32 ``[d]``.

        Raises:
            ModelError: the stored vectors have another d.
            InvalidParameterError: vectors were deleted meanwhile.
        """
        cosines: dict[str, float] = {}
        with self._store.collection(self._embedder) as collection:
            for batch in batched(self._chunks, _AT_ONCE):
                found = collection.get(ids=[chunk.id for chunk in batch], include=["embeddings"])
                if not found["ids"]:
                    continue
                vectors = np.asarray(found["embeddings"], dtype=np.float32)
                if vectors.shape[1] != len(query):
                    raise other_length(
                        f"{vectors.shape[1]} numbers each there, {len(query)} the question's"
                    )
                cosines |= zip(found["ids"], (vectors @ query).tolist(), strict=True)
        lost = [chunk for chunk in self._chunks if chunk.id not in cosines]
        if lost:
            raise InvalidParameterError(
                f"{len(lost)} of {len(self._chunks)} vectors are gone from "
                f"{self._store.place} while they were in use: ask again, and let nothing else "
                "delete there"
            )
        return [max(-1.0, min(1.0, cosines[chunk.id])) for chunk in self._chunks]


class ChunkStore:
    """Vectors of documents' chunks in a Chroma database, with one collection per embedder.

    Threads and processes may share a store. However many documents it has, it takes a few open
    files, and memory for the vectors of the embedders in use.

    Args:
        directory: folder of the database, created if need be with access for its owner only; None
            keeps the vectors in memory, shared by the whole process. There the vectors of the
            documents that were searched least recently are dropped beyond
            :data:`.database.MEMORY_BYTES`.

    Raises:
        InvalidParameterError: Chroma cannot open the directory.
        MissingDependencyError: Chroma is not installed.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._directory = Path(directory).expanduser().resolve() if directory else None
        database_of(self._directory)

    @property
    def place(self) -> str:
        return place_of(self._directory)

    def open(self, documents: Mapping[str, Sequence[Span]], embedder: str) -> StoredChunks:
        """Stored chunks of documents, keyed by text, spans and the embedder's name.

        Args:
            documents: spans of the chunks of each text.
            embedder: name of the embedder.
        """
        chunks = []
        for text, spans in documents.items():
            key = _key(text, spans, embedder)
            chunks += [_Chunk(f"{key}-{i}", key, text, span) for i, span in enumerate(spans)]
        stored = StoredChunks(self, embedder, chunks)
        database_of(self._directory).search(stored)
        return stored

    def added(self, owners: Iterable[Owner], size: int) -> None:
        """Note that vectors of ``size`` bytes each were added, and drop what is too much."""
        database_of(self._directory).added(owners, size)

    @contextmanager
    def collection(self, embedder: str) -> Iterator[Collection]:
        """An embedder's collection, with exclusive access for one operation.

        Raises:
            InvalidParameterError: Chroma fails, or another process does not release the folder.
            ModelError: the stored vectors have another length.
        """
        # Look it up each time, because the least recently used databases are closed.
        with database_of(self._directory).collection(embedder) as collection:
            yield collection


def _key(text: str, spans: Sequence[Span], embedder: str) -> str:
    key = hashlib.sha256(embedder.encode() + b"\0")
    key.update(repr([(span.start, span.end) for span in spans]).encode() + b"\0")
    key.update(text.encode())
    return key.hexdigest()[:32]
