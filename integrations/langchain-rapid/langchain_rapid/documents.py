"""The full documents, in whichever form the pipeline has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from langchain_core.documents import Document
from rapid_llm.errors import DocumentError

Documents: TypeAlias = str | Mapping[str, str] | Sequence[Document] | Callable[[str], str | None]
"""One text; texts by document id; what a loader returned; or a function from id to text."""

ID_KEYS = ("document_id", "doc_id", "source")
"""Where a chunk's metadata is looked up, in turn, for the id of the document it was cut from."""

SEPARATOR = "\n\n"


def document_id(document: Document, key: str | None = None) -> str | None:
    """The id of the document that a chunk was cut from; None if its metadata does not say.

    ``Document.id`` is not it: a vector store gives every chunk an id of its own.

    Args:
        document: a chunk, or a document itself.
        key: the metadata's key; None tries ``ID_KEYS`` in turn.
    """
    for name in ID_KEYS if key is None else (key,):
        if (value := document.metadata.get(name)) is not None:
            return str(value)
    return None


class FullDocuments:
    """Full texts by document id.

    Args:
        documents: see :data:`Documents`. Of a list, those with the same id are one document, its
            parts in their order (a PDF loader returns a page each); ``Document.id`` serves if
            the metadata holds none, and a single document needs no id.
        id_key: see :func:`document_id`.

    Attributes:
        texts: as ``rapid_llm.context.retrieved.ground`` takes them.

    Raises:
        DocumentError: there are none, several have no id, or they are of another type.
    """

    def __init__(self, documents: Documents, id_key: str | None = None) -> None:
        self.id_key = id_key
        self.texts: str | Mapping[str, str] | Callable[[str], str | None]
        self._metadata: dict[str | None, dict[str, Any]] = {}
        if isinstance(documents, str | Mapping) or callable(documents):
            self.texts = documents
        elif isinstance(documents, Sequence) and all(isinstance(d, Document) for d in documents):
            self.texts = self._from_list(cast("Sequence[Document]", documents))
        else:
            raise DocumentError(
                f"documents of type {type(documents).__name__} are not allowed: pass one text, a "
                "mapping from id to text, a list of Document, or a function from id to text"
            )
        if not self.texts:
            raise DocumentError("documents is empty: pass at least one document")

    def _from_list(self, documents: Sequence[Document]) -> str | dict[str, str]:
        if len(documents) == 1:
            # Every chunk is from it, whatever its metadata says.
            self._metadata[None] = documents[0].metadata
            return documents[0].page_content
        parts: dict[str, list[str]] = {}
        for number, document in enumerate(documents):
            name = document_id(document, self.id_key) or document.id
            if name is None:
                keys = "/".join(ID_KEYS) if self.id_key is None else self.id_key
                raise DocumentError(
                    f"document {number} of {len(documents)} has no id, so its chunks cannot be "
                    f"told from others: put one into its metadata ({keys}), or pass "
                    "document_id_key="
                )
            parts.setdefault(name, []).append(document.page_content)
            self._metadata.setdefault(name, document.metadata)
        return {name: SEPARATOR.join(texts) for name, texts in parts.items()}

    def metadata(self, name: str | None) -> dict[str, Any]:
        """What a loader said of a document; of one with several parts, of the first."""
        return self._metadata.get(name, {})
