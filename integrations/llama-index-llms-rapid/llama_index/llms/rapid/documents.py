"""The documents given to an LLM or synthesizer, and the lookup of a node's document."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeAlias, cast

from llama_index.core.schema import BaseNode, Document, MetadataMode
from llama_index.core.storage.docstore import BaseDocumentStore

from llama_index.llms.rapid.catalog import Catalog, DocumentKey, group_of, key_value
from llama_index.llms.rapid.fulltext import FullText, telling
from rapid_llm.context.validation import require_read
from rapid_llm.errors import DocumentError, InvalidParameterError

DocumentSource: TypeAlias = (
    str
    | BaseNode
    | Sequence[BaseNode]
    | Mapping[Any, str | BaseNode]
    | BaseDocumentStore
    | Callable[[str], str | BaseNode | None]
)
"""Source of full texts: one text or document, several documents, a mapping from ids, a docstore, or
a function."""

_STABLE_KEYS = ("file_path", "url", "file_name")
"""Metadata that identify a document when ids have changed, the most reliable first."""

_ID, _OWN = "ref_doc_id", "node_id"


def require_whole(documents: object) -> None:
    """Refuse documents that cannot be searched for a retrieved text.

    Raises:
        InvalidParameterError: they are a docstore.
    """
    if isinstance(documents, BaseDocumentStore):
        raise InvalidParameterError(
            "a docstore is not allowed as RapidLLM(documents=...), which looks for the retrieved "
            "text in every document, because a docstore may hold chunks only: pass the list of "
            "documents, or give the docstore to RapidSynthesizer"
        )


class Library:
    """The given documents, in any form.

    Documents with the same ``file_path`` are the pages or sections of one file, and so are those
    with a ``page_label`` and the same ``file_name``; ``document_key`` overrides this. Pages are in
    the order of their numbers if each has a different one; other parts are in the given order.

    Ids are compared as text. A node's document is the first that is found by: ``document_key``;
    the node's ``ref_doc_id``; its own id; its ``file_path``, ``url`` or ``file_name`` (the first
    that the documents have too); its text, if only one document contains it.

    Args:
        source: source of the full texts.
        document_key: metadata key, or function of a Document or node, with equal values for the
            parts of one document; None for the rule above.

    Attributes:
        only: the single text that was given, the document of every node; None for other sources.
        function: the function that was given; None for other sources.

    Raises:
        DocumentError: a Document of a list holds the bytes of a PDF.
        InvalidParameterError: the source is of another type; two Documents that are not of one
            file have the same id; ``document_key`` is in no Document's metadata; files cannot be
            told apart.
    """

    def __init__(self, source: DocumentSource, document_key: DocumentKey | None = None) -> None:
        if not (document_key is None or isinstance(document_key, str) or callable(document_key)):
            raise InvalidParameterError(
                f"document_key={document_key!r} is not allowed: give the name of a metadata key, "
                "or a function of a Document"
            )
        self._key = document_key
        self.only: FullText | None = None
        self.function: Callable[[str], str | BaseNode | None] | None = None
        self._source: _Source | None = None
        if isinstance(source, BaseNode):
            source = [source]
        if isinstance(source, str):
            self.only = FullText("", (source,))
        elif isinstance(source, BaseDocumentStore):
            self._source = _Docstore(source)
        elif isinstance(source, Mapping):
            self._source = _Mapped(source)
        elif isinstance(source, Sequence) and all(isinstance(part, BaseNode) for part in source):
            for document in cast(Sequence[BaseNode], source):
                name = document.metadata.get("file_path", document.node_id)
                require_read(f"the document {name!r}", document.get_content())
            self._source = _Listed(cast(Sequence[BaseNode], source))
            Catalog(self._source.entries(), document_key)  # checks the list
        elif callable(source):
            self.function = source
        else:
            wrong: tuple[str, object] = "documents", source
            if isinstance(source, Sequence):
                wrong = next(
                    (f"documents[{number}]", each)
                    for number, each in enumerate(source)
                    if not isinstance(each, BaseNode)
                )
            raise InvalidParameterError(
                f"{wrong[0]} of type {type(wrong[1]).__name__} is not allowed: give one text, a "
                "list of Documents, a mapping from ids to texts or Documents, a docstore, or a "
                "function"
            )
        self._made_from = self._state()

    @property
    def listed(self) -> bool:
        """Whether all documents can be listed, which a function does not allow."""
        return self.function is None

    def all(self) -> list[FullText]:
        """All documents in the given order; none for a function."""
        if self.only is not None:
            return [self.only]
        return self._catalog.texts if self._source else []

    def source(self, node: BaseNode) -> FullText | None:
        """The document of a node; None if the node names none and no document contains its text.

        Raises:
            DocumentError: the node names a document that does not exist.
        """
        if self.only is not None:
            own = node.ref_doc_id is None and not isinstance(node, Document)
            return None if own and not self._by_text(node) else self.only
        tried = {}
        for label, name in self._names(node):
            if name is not None:
                tried[label] = str(name)
                if found := self._find(str(name), surely=label != _OWN):
                    return found
        if found := self._by_metadata(node, tried) or self._by_text(node):
            return found
        if isinstance(node, Document):
            return FullText(node.node_id, (node,))
        if _ID not in tried:
            return None
        if isinstance(self._source, _Docstore) and self._source.has_chunks_of(tried[_ID]):
            raise DocumentError(
                f"the docstore holds chunks of document {tried[_ID]!r}, but not the document: add "
                "it (docstore.add_documents(documents)), or pass the list of documents instead"
            )
        others = ", ".join(f"{key}={value!r}" for key, value in tried.items() if key != _ID)
        raise DocumentError(
            f"document {tried[_ID]!r}, which the retrieved node {node.node_id!r} is from, "
            f"is not among the documents given{others and f' (nor is {others})'}: add it, or "
            "rebuild the index from these documents; ids that change whenever files are read again "
            "stay with SimpleDirectoryReader(filename_as_id=True), or name metadata that stay with "
            "document_key=..."
        )

    def now(self) -> Library:
        """The documents in their current state, for one question."""
        if self._state() == self._made_from:
            return self
        fresh = copy.copy(self)
        fresh.__dict__.pop("_catalog", None)
        return fresh

    def _names(self, node: BaseNode) -> Iterator[tuple[str, object]]:
        """Ids in a node that may name its document, each with a label for errors."""
        if self._key is not None:
            label = self._key if isinstance(self._key, str) else "document_key"
            yield label, key_value(node, self._key)
        yield (_OWN, node.node_id) if node.ref_doc_id is None else (_ID, node.ref_doc_id)

    def _find(self, name: str, surely: bool = False) -> FullText | None:
        """The document of an id; a function's errors are ignored unless it is ``surely`` an id."""
        if self._key is not None and self._source and (found := self._catalog.keyed.get(name)):
            return found
        part = None
        if self._source:
            part = self._source.get(name)
        elif self.function:
            try:
                part = self.function(name)
            except (LookupError, OSError):
                if surely:
                    raise
        joined = part is None or group_of(part, self._key) is not None
        if self._source and joined and (found := self._catalog.ids.get(name)):
            return found
        return None if part is None else FullText(name, (part,))

    def _by_metadata(self, node: BaseNode, tried: dict[str, str]) -> FullText | None:
        known = node.metadata
        if node.source_node is not None:  # metadata of the document when it was split
            known = node.source_node.metadata | known
        for key in _STABLE_KEYS:
            if known.get(key) is None:
                continue
            value = tried[key] = str(known[key])
            if found := self._find(value):
                return found
            if self._source and (values := self._catalog.having(key)):
                named = values.get(value, [])
                return named[0] if len(named) == 1 else None
        return None

    def _by_text(self, node: BaseNode) -> FullText | None:
        text = " ".join(node.get_content(MetadataMode.NONE).split())
        if not self.listed or not text:
            return None
        holding = [
            document
            for document in self.all()
            if text in document.body and not document.differs(node.metadata)
        ]
        return holding[0] if len(holding) == 1 and telling(text, holding[0]) else None

    @cached_property
    def _catalog(self) -> Catalog:
        assert self._source is not None
        return Catalog(self._source.entries(), self._key)

    def _state(self) -> object:
        """Content of a list, to detect changes; a new object for sources that are not tracked."""
        return self._source.state() if isinstance(self._source, _Listed) else object()


class _Source(Protocol):
    """Documents that can be listed."""

    def get(self, name: str) -> str | BaseNode | None:
        """The document of an id; None if it is found by listing only."""

    def entries(self) -> Iterable[tuple[str, str | BaseNode]]:
        """All documents with their ids."""


class _Listed(_Source):
    def __init__(self, documents: Sequence[BaseNode]) -> None:
        self._documents = documents

    def get(self, name: str) -> None:
        return None

    def entries(self) -> Iterable[tuple[str, BaseNode]]:
        return ((document.node_id, document) for document in self._documents)

    def state(self) -> list[tuple[str, str, dict[str, Any]]]:
        return [
            (d.node_id, d.get_content(MetadataMode.LLM), {**d.metadata}) for d in self._documents
        ]


class _Mapped(_Source):
    def __init__(self, documents: Mapping[Any, str | BaseNode]) -> None:
        self._documents = documents

    def get(self, name: str) -> str | BaseNode | None:
        # A number, a path or another object may be the key.
        keys = [k for k in self._documents if (k if isinstance(k, str) else str(k)) == name]
        if len(keys) > 1:
            raise InvalidParameterError(
                f"two documents have the id {name!r}, as {keys[0]!r} and {keys[1]!r}: ids are "
                "compared as text, so give each its own"
            )
        return self._documents.get(keys[0] if keys else name)

    def entries(self) -> Iterable[tuple[str, str | BaseNode]]:
        return ((str(key), part) for key, part in self._documents.items())


class _Docstore(_Source):
    def __init__(self, store: BaseDocumentStore) -> None:
        self._store = store

    def get(self, name: str) -> BaseNode | None:
        return self._store.get_document(name, raise_error=False)

    def has_chunks_of(self, name: str) -> bool:
        return self._store.get_ref_doc_info(name) is not None

    def entries(self) -> Iterable[tuple[str, BaseNode]]:
        stored = self._store.docs.items()
        return ((name, node) for name, node in stored if isinstance(node, Document))
