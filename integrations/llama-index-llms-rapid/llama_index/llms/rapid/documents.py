"""The full texts that a pipeline's nodes are from, and which node is from which."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, cast

from llama_index.core.schema import BaseNode, Document, MetadataMode
from llama_index.core.storage.docstore import BaseDocumentStore

from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.errors import DocumentError, InvalidParameterError

DocumentSource: TypeAlias = (
    str
    | BaseNode
    | Sequence[BaseNode]
    | Mapping[Any, str | BaseNode]
    | BaseDocumentStore
    | Callable[[str], str | BaseNode | None]
)
"""Where the full texts are: one text or document, several documents, a mapping from their ids, a
docstore that holds them, or a function."""

DocumentKey: TypeAlias = str | Callable[[BaseNode], object]
"""Which Documents are one document: those of one value of a metadata key, or of a function."""

_STABLE_KEYS = ("file_path", "url", "file_name")
"""Metadata that tell a document from others when ids have changed, the surest first."""

_ID = "ref_doc_id"

_PAGE_KEYS = ("page_label", "page_number", "page")


@dataclass(frozen=True)
class FullText:
    """One document as the target reads it: one text, or the parts of one file in their order.

    Attributes:
        name: the Document's id, or what its parts have in common (the file's path).
        parts: texts, or Documents, which are read as the pipeline shows its nodes to an LLM: with
            their metadata, except for ``excluded_llm_metadata_keys``.
    """

    name: str
    parts: tuple[str | BaseNode, ...]

    @property
    def shown(self) -> str:
        """What the target reads: the parts but for blank ones, joined by blank lines."""
        return SEPARATOR.join(
            _content(part, MetadataMode.LLM)
            for part in self.parts
            if _content(part, MetadataMode.NONE).strip()
        )

    @cached_property
    def body(self) -> str:
        """The text without metadata, every white space a single blank: passages are found in it."""
        return " ".join(" ".join(_content(p, MetadataMode.NONE).split()) for p in self.parts)

    @cached_property
    def bodies(self) -> frozenset[str]:
        """As ``body``, of each part alone."""
        return frozenset(" ".join(_content(p, MetadataMode.NONE).split()) for p in self.parts)

    @cached_property
    def heads(self) -> frozenset[str]:
        """The lines that are shown beside its text, every white space a single blank."""
        around = (
            _content(part, MetadataMode.LLM).replace(_content(part, MetadataMode.NONE), "", 1)
            for part in self.parts
        )
        return frozenset(" ".join(line.split()) for text in around for line in text.splitlines())

    @cached_property
    def keys(self) -> frozenset[str]:
        """The metadata keys of its parts."""
        return frozenset(
            key for part in self.parts if isinstance(part, BaseNode) for key in part.metadata
        )

    def denies(self, line: str) -> bool:
        """Whether a line before a passage is metadata of another document than this one."""
        key, colon, _ = line.partition(":")
        return bool(colon) and key in self.keys and line not in self.heads

    def differs(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a node's metadata are those of no part, but for keys that only one has."""
        return all(
            isinstance(part, BaseNode)
            and any(metadata.get(key, value) != value for key, value in part.metadata.items())
            for part in self.parts
        )

    def holds(self, passage: str) -> bool:
        """Whether a passage without metadata was cut out of it; white space does not matter."""
        return " ".join(passage.split()) in self.body


class Library:
    """The documents that were given, in whatever form.

    Documents with the same ``file_path`` are the pages or sections of one file, and so are those
    with a ``page_label`` and the same ``file_name``; ``document_key`` says otherwise. Pages come in
    the order of their numbers if each has one of its own, else parts come as they were given.

    Ids are compared as text. A node's document is the first that is found by: ``document_key``;
    the node's ``ref_doc_id``; its own id; its ``file_path``, ``url`` or ``file_name`` (the first
    that the documents have too); its text, if only one document holds it.

    Args:
        source: the full texts.
        document_key: metadata key, or function of a Document or node, whose value is common to the
            parts of one document; None is the rule above.

    Raises:
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
        """The one text that was given; every node that is from a document is from it."""
        self.function: Callable[[str], str | BaseNode | None] | None = None
        """What was given instead of documents, if it was a function."""
        self._entries: Callable[[], Iterable[tuple[str, str | BaseNode]]] | None = None
        self._given: Callable[[str], str | BaseNode | None]
        # What is read of a list, to see whether it has changed; of others that is not known.
        self._state: Callable[[], object] = object
        if isinstance(source, BaseNode):
            source = [source]
        if isinstance(source, str):
            text = source
            self.only = FullText("", (text,))
            self._given = lambda name: text
        elif isinstance(source, BaseDocumentStore):
            store = source
            self._given = lambda name: _from_docstore(store, name)
            self._entries = lambda: (
                (name, node) for name, node in store.docs.items() if isinstance(node, Document)
            )
        elif isinstance(source, Mapping):
            mapping = source
            self._given = lambda name: _keyed(mapping, name)
            self._entries = lambda: ((str(name), part) for name, part in mapping.items())
        elif isinstance(source, Sequence) and all(isinstance(part, BaseNode) for part in source):
            documents = cast(Sequence[BaseNode], source)
            self._entries = lambda: ((part.node_id, part) for part in documents)
            self._given = lambda name: None  # the catalog has them all
            self._state = lambda: [part.get_content(MetadataMode.LLM) for part in documents]
            _Catalog(self._entries(), document_key)  # checks the list
        elif callable(source):
            self._given = self.function = source
        else:
            raise InvalidParameterError(
                f"documents of type {type(source).__name__} are not allowed: give one text, a list "
                "of Documents, a mapping from ids to texts or Documents, a docstore, or a function"
            )
        self._made_from = self._state()

    @property
    def listed(self) -> bool:
        """Whether all documents can be listed; a function's cannot."""
        return self._entries is not None or self.only is not None

    def all(self) -> list[FullText]:
        """Every document, in the order that they were given; of a function, none."""
        if self.only is not None:
            return [self.only]
        return self._catalog.texts if self._entries else []

    def source(self, node: BaseNode) -> FullText | None:
        """The document that a node is from; None if the node does not say and none holds it.

        Raises:
            DocumentError: the node says which document it is from, and there is no such document.
        """
        if self.only is not None:
            own = node.ref_doc_id is None and not isinstance(node, Document)
            return None if own and not self._by_text(node) else self.only
        tried = {}
        for label, name in self._names(node):
            if name is not None:
                tried[label] = str(name)
                if found := self._find(str(name)):
                    return found
        if found := self._by_metadata(node, tried) or self._by_text(node):
            return found
        if isinstance(node, Document):
            return FullText(node.node_id, (node,))
        if _ID not in tried:
            return None
        others = ", ".join(f"{key}={value!r}" for key, value in tried.items() if key != _ID)
        raise DocumentError(
            f"document {tried[_ID]!r}, which the retrieved node {node.node_id!r} is from, "
            f"is not among the documents given{others and f' (nor is {others})'}: add it, or "
            "rebuild the index from these documents; ids that change whenever files are read again "
            "stay with SimpleDirectoryReader(filename_as_id=True), or name metadata that stay with "
            "document_key=..."
        )

    def now(self) -> Library:
        """The documents as they are now, for one question."""
        if self._state() == self._made_from:
            return self
        fresh = copy.copy(self)
        fresh.__dict__.pop("_catalog", None)
        return fresh

    def _names(self, node: BaseNode) -> Iterator[tuple[str, object]]:
        """What a node says of its document, and how it is called in an error."""
        if self._key is not None:
            label = self._key if isinstance(self._key, str) else "document_key"
            yield label, _key_value(node, self._key)
        yield ("node_id", node.node_id) if node.ref_doc_id is None else (_ID, node.ref_doc_id)

    def _find(self, name: str) -> FullText | None:
        if self._key is not None and self._entries and (found := self._catalog.keyed.get(name)):
            return found
        part = self._given(name)
        joined = part is None or _group(part, self._key) is not None
        if self._entries and joined and (found := self._catalog.ids.get(name)):
            return found
        return None if part is None else FullText(name, (part,))

    def _by_metadata(self, node: BaseNode, tried: dict[str, str]) -> FullText | None:
        known = node.metadata
        if node.source_node is not None:  # as it was when the document was split
            known = node.source_node.metadata | known
        for key in _STABLE_KEYS:
            if known.get(key) is None:
                continue
            value = tried[key] = str(known[key])
            if found := self._find(value):
                return found
            if self._entries and (values := self._catalog.having(key)):
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
    def _catalog(self) -> _Catalog:
        assert self._entries is not None
        return _Catalog(self._entries(), self._key)


def telling(passage: str, document: FullText) -> bool:
    """Whether a passage that only this document holds says that it is from there.

    A few words may stand in a document by chance; they do not open it to the target, unless they
    are all that there is in it.

    Args:
        passage: every white space in it a single blank.
        document: holds the passage.
    """
    return len(passage.encode()) >= 24 or passage in document.bodies


class _Catalog:
    """Documents joined to full texts, and found by ids, keys and metadata.

    Attributes:
        texts: the full texts, in the order of their first part.
        ids: by the id of any part.
        keyed: by the value of ``document_key``.
    """

    def __init__(
        self, entries: Iterable[tuple[str, str | BaseNode]], document_key: DocumentKey | None
    ) -> None:
        groups: dict[tuple[str, str], list[tuple[str, str | BaseNode]]] = {}
        of: dict[str, tuple[str, str]] = {}
        for name, part in entries:
            group = _group(part, document_key) or ("id", name)
            if name in of and (group != of[name] or group[0] == "id"):
                raise InvalidParameterError(
                    f"two Documents have the id {name!r}: give each its own (id_=...), or join "
                    "them; only the parts of one file may share an id"
                )
            of[name] = group
            groups.setdefault(group, []).append((name, part))
        self.keyed: dict[str, FullText] = {}
        self.ids: dict[str, FullText] = {}
        named: dict[str, FullText] = {}
        for (kind, value), members in groups.items():
            if kind == "file_name":
                _require_one_file(value, [part for _, part in members])
            joined = kind == "key" or len(members) > 1
            called = value if joined else members[0][0]
            if called in named:
                raise InvalidParameterError(
                    f"{called!r} is the id of a Document and the {kind} of others: give each "
                    "document an id of its own"
                )
            text = named[called] = FullText(called, _in_order([part for _, part in members]))
            for name, part in members:
                self.ids[name] = text
                if isinstance(part, BaseNode):
                    self.ids.setdefault(part.node_id, text)
            if kind == "key":
                self.keyed[value] = text
        self.texts = list(named.values())
        if isinstance(document_key, str):
            self._require_key(document_key)

    def having(self, key: str) -> dict[str, list[FullText]]:
        """The full texts by the values that they have of a metadata key."""
        values: dict[str, list[FullText]] = {}
        for text in self.texts:
            found = {
                str(part.metadata[key])
                for part in text.parts
                if isinstance(part, BaseNode) and key in part.metadata
            }
            for value in found:
                values.setdefault(value, []).append(text)
        return values

    def _require_key(self, key: str) -> None:
        parts = [p for text in self.texts for p in text.parts if isinstance(p, BaseNode)]
        if parts and not self.keyed:
            known = sorted({name for part in parts for name in part.metadata})
            raise InvalidParameterError(
                f"document_key={key!r} is in no document's metadata, which have "
                + (", ".join(map(repr, known)) or "no keys")
            )


def _group(part: str | BaseNode, document_key: DocumentKey | None) -> tuple[str, str] | None:
    """What the parts of one document have in common; None if it is one by itself."""
    if not isinstance(part, BaseNode):
        return None
    if document_key is not None:
        value = _key_value(part, document_key)
        return None if value is None else ("key", str(value))
    if not isinstance(part, Document):
        return None
    if part.metadata.get("file_path") is not None:
        return "file_path", str(part.metadata["file_path"])
    if part.metadata.get("file_name") is not None and "page_label" in part.metadata:
        return "file_name", str(part.metadata["file_name"])
    return None


def _key_value(node: BaseNode, document_key: DocumentKey) -> object:
    return node.metadata.get(document_key) if isinstance(document_key, str) else document_key(node)


def _require_one_file(name: str, parts: Sequence[str | BaseNode]) -> None:
    """Two files of one name in two folders must not be taken for one."""
    labels = Counter(p.metadata["page_label"] for p in parts if isinstance(p, BaseNode))
    twice = [label for label, count in labels.items() if count > 1]
    if twice:
        raise InvalidParameterError(
            f"page_label={twice[0]!r} of file_name={name!r} is there twice, so two files may have "
            "that name: say with document_key=... which Documents are one, by a metadata key (such "
            "as a file_path that you add), or by a function"
        )


def _in_order(parts: Sequence[str | BaseNode]) -> tuple[str | BaseNode, ...]:
    for key in _PAGE_KEYS:
        pages = [str(p.metadata.get(key)) if isinstance(p, BaseNode) else "" for p in parts]
        if all(page.isdecimal() for page in pages) and len(set(map(int, pages))) == len(parts):
            numbered = sorted(zip(map(int, pages), parts, strict=True), key=lambda pair: pair[0])
            return tuple(part for _, part in numbered)
    return tuple(parts)


def _content(part: str | BaseNode, mode: MetadataMode) -> str:
    return part if isinstance(part, str) else part.get_content(metadata_mode=mode)


def _keyed(mapping: Mapping[Any, str | BaseNode], name: str) -> str | BaseNode | None:
    """By the key as text: a number, a path or another object may be the key."""
    if (part := mapping.get(name)) is not None:
        return part
    for key in mapping:
        if not isinstance(key, str) and str(key) == name:
            return mapping[key]
    return None


def _from_docstore(store: BaseDocumentStore, name: str) -> BaseNode | None:
    document = store.get_document(name, raise_error=False)
    if document is None and store.get_ref_doc_info(name) is not None:
        raise DocumentError(
            f"the docstore holds chunks of document {name!r}, but not the document: add it "
            "(docstore.add_documents(documents)), or pass the list of documents instead"
        )
    return document
