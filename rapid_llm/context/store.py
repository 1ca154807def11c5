"""Chunks and their vectors in Chroma, kept so that no document is embedded twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rapid_llm.context.chunking import Span
from rapid_llm.context.embedding import Vectors
from rapid_llm.errors import InvalidParameterError, ModelError

if TYPE_CHECKING:
    from chromadb.api import ServerAPI
    from chromadb.api.models.Collection import Collection


class StoredDocument:
    """The chunks of one document under one embedder: one Chroma collection in cosine space."""

    def __init__(self, collection: Collection, text: str, spans: Sequence[Span]) -> None:
        self._collection = collection
        self._text = text
        self._spans = spans

    def missing(self) -> list[int]:
        """The chunks without a vector: all of a new document, the rest of an interrupted one."""
        stored = set(self._collection.get(include=[])["ids"])
        return [i for i in range(len(self._spans)) if str(i) not in stored]

    def text(self, chunk: int) -> str:
        span = self._spans[chunk]
        return self._text[span.start : span.end]

    def add(self, chunks: Sequence[int], vectors: Vectors) -> None:
        """Store the vectors ``[len(chunks), d]`` of these chunks; again is no harm.

        Raises:
            ModelError: d is not that of the vectors that are there.
        """
        with _one_length():
            self._collection.upsert(
                ids=[str(i) for i in chunks],
                embeddings=vectors,
                documents=[self.text(i) for i in chunks],
                metadatas=[
                    {"start": self._spans[i].start, "end": self._spans[i].end} for i in chunks
                ],
            )

    def search(self, query: Vectors) -> list[tuple[Span, float]]:
        """Every stored chunk with its cosine similarity to a unit vector ``[d]``, best first.

        Raises:
            ModelError: d is not that of the stored vectors.
        """
        with _one_length():
            found = self._collection.query(
                query_embeddings=query[None], n_results=len(self._spans), include=["distances"]
            )
        ids, distances = found["ids"][0], found["distances"][0]
        scores = {int(i): 1 - distance for i, distance in zip(ids, distances, strict=True)}
        # Chroma's graph index can lose sight of chunks that are nearly the same as many others.
        unseen = [str(i) for i in range(len(self._spans)) if i not in scores]
        if unseen:
            rest = self._collection.get(ids=unseen, include=["embeddings"])
            cosines = np.asarray(rest["embeddings"]) @ query
            scores |= {int(i): float(s) for i, s in zip(rest["ids"], cosines, strict=True)}
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        return [(self._spans[i], max(-1.0, min(1.0, score))) for i, score in ranked]


class ChunkStore:
    """Documents in a Chroma database.

    Args:
        directory: where Chroma keeps it; None keeps it in memory, shared by the whole process.

    Raises:
        InvalidParameterError: Chroma cannot open the directory.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        try:
            self._server = _server(Path(directory).expanduser().resolve() if directory else None)
        except Exception as error:  # Chroma raises its own, sqlite's and Rust's types
            raise InvalidParameterError(
                f"store={str(directory)!r} cannot be opened ({error}): "
                "give a writable folder that is empty or a Chroma database"
            ) from error

    def open(self, text: str, spans: Sequence[Span], embedder: str) -> StoredDocument:
        """The place of a document's chunks, found by text, borders and the embedder's name."""
        from chromadb.api.models.Collection import Collection

        key = hashlib.sha256(embedder.encode() + b"\0")
        key.update(repr([(span.start, span.end) for span in spans]).encode() + b"\0")
        key.update(text.encode())
        model = self._server.get_or_create_collection(
            f"rapid-{key.hexdigest()[:32]}",
            metadata={"embedder": embedder},
            configuration={"hnsw": {"space": "cosine", "ef_search": max(100, len(spans))}},
        )
        # The vectors are the embedder's, so Chroma's own embedding function stays out.
        collection = Collection(client=self._server, model=model, embedding_function=None)
        return StoredDocument(collection, text, spans)


@contextmanager
def _one_length() -> Iterator[None]:
    from chromadb.errors import InvalidArgumentError

    try:
        yield
    except InvalidArgumentError as error:
        raise ModelError(
            f"the embedder's vectors differ in length from those stored under its name ({error}): "
            "give other vectors another name"
        ) from error


@cache
def _server(directory: Path | None) -> ServerAPI:
    """One Chroma a directory, and one in memory.

    They are built without Chroma's client registry: it has a single in-memory database a process
    and refuses other settings than its first user's, who may be our caller.
    """
    from chromadb.api import ServerAPI
    from chromadb.config import Settings, System

    system = System(
        Settings(
            anonymized_telemetry=False,
            is_persistent=directory is not None,
            persist_directory=str(directory or ""),
        )
    )
    server = system.instance(ServerAPI)
    system.start()
    return server
