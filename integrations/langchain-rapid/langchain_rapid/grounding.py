"""From the chunks that a retriever found to the two contexts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from langchain_core.documents import Document
from rapid_llm.context.retrieved import Passage, ground
from rapid_llm.errors import DocumentError

from langchain_rapid.documents import FullDocuments, document_id


@dataclass(frozen=True)
class Sources:
    """What one question is answered from.

    Attributes:
        chunks: the retrieved ones without repetitions, in the retriever's order: the drafter's
            context. Empty if nothing was retrieved.
        documents: the full documents that they were cut from, in the order of their first chunk:
            the target's context. All documents if nothing was retrieved. Their metadata is
            that of their first chunk, under what a list of documents says itself.
        retrieved: of each chunk its ``id``, its ``document_id`` and its ``start_index`` (in
            characters of the full text), as far as they are known.
    """

    chunks: list[Document]
    documents: list[Document]
    retrieved: list[dict[str, Any]]


@dataclass(frozen=True)
class _Chunk(Passage):
    document: Document | None = None


def find_sources(chunks: Iterable[Document], documents: FullDocuments) -> Sources:
    """Find the full documents behind retrieved chunks.

    Raises:
        DocumentError: a chunk is no ``Document``, its document is not said or not known, a
            document is empty, or nothing was retrieved and the documents cannot be listed.
    """
    passages = [_passage(chunk, documents.id_key) for chunk in chunks]
    found = ground(passages, documents.texts)
    full = {
        name: Document(text, metadata=documents.metadata(name))
        for name, text in zip(found.document_ids, found.texts, strict=True)
    }

    unique: list[Document] = []
    retrieved: list[dict[str, Any]] = []
    for passage in cast("tuple[_Chunk, ...]", found.passages):
        chunk = passage.document
        assert chunk is not None
        unique.append(chunk)
        source = full[None if isinstance(documents.texts, str) else passage.document_id]
        source.metadata = chunk.metadata | source.metadata
        retrieved.append(_describe(passage, chunk, source.page_content))
    return Sources(unique, list(full.values()), retrieved)


def _passage(chunk: Document, id_key: str | None) -> _Chunk:
    if not isinstance(chunk, Document):
        raise DocumentError(
            f"a retrieved chunk of type {type(chunk).__name__} is not allowed: the retriever must "
            "return a list of Document"
        )
    return _Chunk(chunk.page_content, document_id(chunk, id_key), chunk.id, chunk)


def _describe(passage: Passage, chunk: Document, text: str) -> dict[str, Any]:
    start = chunk.metadata.get("start_index")
    if start is None and (found := text.find(passage.text)) >= 0:
        start = found
    known = {"id": passage.id, "document_id": passage.document_id, "start_index": start}
    return {name: value for name, value in known.items() if value is not None}
