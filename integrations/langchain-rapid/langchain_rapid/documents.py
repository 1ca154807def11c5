"""Find full documents by the ids in chunks' metadata, in any form that a pipeline has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from math import isnan
from numbers import Integral, Real
from typing import Any, TypeAlias, cast

from langchain_core.documents import Document
from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.errors import DocumentError

Text: TypeAlias = str | Document
Documents: TypeAlias = str | Mapping[Any, Text] | Sequence[Document] | Callable[[Any], Text | None]
"""One text; texts by document id; documents of a loader; or a function from id to text."""

ID_KEYS = ("document_id", "doc_id", "source")
"""Keys of metadata that may hold a document's id, the first one first."""

_PAGE_KEYS = ("page", "page_number")
"""Keys under which loaders number the parts of a file."""


@dataclass(frozen=True)
class Part:
    """A part of a document, such as a page.

    Attributes:
        metadata: metadata from its loader.
        start: offset of its first character in the whole text.
    """

    metadata: Mapping[str, Any]
    start: int


@dataclass(frozen=True)
class Whole:
    """One full document.

    Attributes:
        text: whole text.
        parts: parts that it was joined from; empty if only the text is known.
    """

    text: str
    parts: tuple[Part, ...] = ()

    @classmethod
    def joined(cls, documents: Sequence[Document]) -> Whole:
        """A document made of its parts, in the order given."""
        texts = [document.page_content for document in documents]
        starts = accumulate((len(text) + len(SEPARATOR) for text in texts), initial=0)
        parts = (Part(d.metadata, start) for d, start in zip(documents, starts, strict=False))
        return cls(SEPARATOR.join(texts), tuple(parts))


class FullDocuments:
    """Full texts by document id. Ids are compared as text: a number or a path may be one.

    Args:
        documents: full texts, see :data:`Documents`. Elements of a list with the same id are parts
            of one document (a PDF loader returns a page each), in the order of their page numbers,
            file by file, if all have one, or else of the list. ``Document.id`` is the id where the
            metadata has none.
        id_key: key of the metadata for the id; None tries ``ID_KEYS`` in turn.

    Attributes:
        id_keys: keys of metadata that may hold an id.

    Raises:
        DocumentError: there are none, several have no id, two of different files have the same,
            or they are of another type.
    """

    def __init__(self, documents: Documents, id_key: str | None = None) -> None:
        self.id_keys = ID_KEYS if id_key is None else (id_key,)
        self._texts: Mapping[Any, Text | Whole] | Callable[[Any], Text | None]
        self._only: tuple[str, Whole] | None = None
        self._ids: dict[tuple[str, str], str | None] = {}
        if isinstance(documents, str):
            self._texts = self._listed({"": Whole(documents)} if documents else {})
        elif isinstance(documents, Mapping):
            self._texts = documents
            names = Counter(map(id_text, documents))
            if twice := next((name for name, count in names.items() if count > 1), None):
                raise DocumentError(
                    f"two documents have the id {twice!r}: ids are compared as text, so give each "
                    "its own"
                )
        elif callable(documents):
            self._texts = documents
        elif isinstance(documents, Sequence) and all(isinstance(d, Document) for d in documents):
            loaded = cast("Sequence[Document]", documents)
            self._texts = self._listed(self._joined(loaded, join_files=id_key is not None))
        else:
            wrong: tuple[str, object] = "documents", documents
            if isinstance(documents, Sequence):  # that is none of Document
                wrong = next(
                    (f"documents[{number}]", each)
                    for number, each in enumerate(documents)
                    if not isinstance(each, Document)
                )
            raise DocumentError(
                f"{wrong[0]} of type {type(wrong[1]).__name__} is not allowed: pass one text, a "
                "mapping from id to text, a list of Document, or a function from id to text"
            )
        if not self._texts:
            raise DocumentError("documents is empty: pass at least one document")

    def find(self, key: str, value: Any) -> tuple[str, Whole] | None:
        """Id and document that a chunk's metadata names by this key and value.

        Raises:
            DocumentError: the document is not text.
        """
        name = self._ids.get((key, id_text(value)), id_text(value))
        if name is None:
            return None  # several documents share it
        if isinstance(self._texts, Mapping):
            text = self._texts.get(name)
            if text is None:
                text = self._texts.get(next((k for k in self._texts if id_text(k) == name), name))
        else:
            text = _ask(self._texts, name)
            if text is None and not isinstance(value, str):
                text = _ask(self._texts, value)
        return None if text is None else (name, _whole(name, text))

    def find_without(self, keys: Collection[str]) -> tuple[str, Whole] | None:
        """Id and document of a chunk whose ids (under ``keys``) name no document, or are missing.

        None if there are several documents, or if the only one has an id under one of these keys,
        so that the chunk must be from another document.
        """
        return None if any(key in keys for key, _ in self._ids) else self._only

    def all(self) -> dict[str, Whole]:
        """Every document by its id.

        Raises:
            DocumentError: they cannot be listed, two have the same id, or one is not text.
        """
        if not isinstance(self._texts, Mapping):
            raise DocumentError(
                "nothing was retrieved, and on_empty='read_all' cannot list documents that are "
                "given as a function: give a mapping or a list"
            )
        named = ((id_text(key), text) for key, text in self._texts.items())
        return {name: _whole(name, text) for name, text in named}

    def key_in(self, chunk: Document) -> str | None:
        """The key of a chunk's metadata, other than those tried, that names a document."""
        if not isinstance(self._texts, Mapping):
            return None  # a function is asked for ids only
        named = chunk.metadata.items()
        return next((k for k, v in named if k not in self.id_keys and self.find(k, v)), None)

    def __str__(self) -> str:
        """The first ids, for errors."""
        if not isinstance(self._texts, Mapping):
            return "the function that looks documents up"
        first = ", ".join(repr(id_text(name)) for name in islice(self._texts, 3))
        more = len(self._texts) - 3
        return f"the documents given ({first}{f' and {more} more' if more > 0 else ''})"

    def _listed(self, wholes: dict[str, Whole]) -> dict[str, Whole]:
        if len(wholes) == 1:
            (self._only,) = wholes.items()
        return wholes

    def _joined(self, documents: Sequence[Document], *, join_files: bool) -> dict[str, Whole]:
        documents = [d for d in documents if d.page_content.strip()] or list(documents)
        parts: dict[str, list[Document]] = {}
        for number, document in enumerate(documents):
            named = ids_of(document, self.id_keys)
            name = id_text(named[0][1]) if named else document.id or ""
            if not name and len(documents) > 1:
                raise DocumentError(
                    f"document {number} of {len(documents)} has no id, so its chunks cannot be "
                    f"told from others: put one into its metadata ({'/'.join(self.id_keys)}), or "
                    "pass document_id_key="
                )
            parts.setdefault(name, []).append(document)
            for key, value in named:
                # An id of a lower rank that several documents share names none of them.
                if self._ids.setdefault((key, id_text(value)), name) != name:
                    self._ids[key, id_text(value)] = None
        if not join_files:
            for name, same in parts.items():
                _require_one_file(name, same, self.id_keys)
        return {name: Whole.joined(_in_order(same)) for name, same in parts.items()}


def ids_of(document: Document, keys: Sequence[str] = ID_KEYS) -> list[tuple[str, Any]]:
    """Keys and values of the document's id in the metadata of a chunk or document.

    ``Document.id`` is not used, because a vector store gives every chunk an id of its own.
    """
    metadata = document.metadata
    return [(key, metadata[key]) for key in keys if id_text(metadata.get(key))]


def id_text(value: Any) -> str:
    """An id as text, for comparison; "" for no id.

    A whole number has the same text as int and as float, which some stores return; NaN is no id.
    """
    if isinstance(value, Real) and not isinstance(value, Integral):
        number = float(value)
        return "" if isnan(number) else str(int(number) if number.is_integer() else value)
    return "" if value is None else str(value)


def _ask(texts: Callable[[Any], Text | None], name: Any) -> Text | None:
    try:
        return texts(name)
    except (KeyError, FileNotFoundError):  # from a dictionary or a file: no such document
        return None


def _whole(name: str, text: object) -> Whole:
    if isinstance(text, Whole):
        return text
    if isinstance(text, Document):
        return Whole.joined([text])
    if isinstance(text, str):
        return Whole(text)
    raise DocumentError(
        f"document {name!r} is {type(text).__name__}, not text: give a str or a Document"
    )


def _in_order(documents: list[Document]) -> list[Document]:
    """Parts sorted by page number, if all have one, and files joined as one file by file."""
    files = [str(document.metadata.get("source")) for document in documents]
    rank = {file: number for number, file in enumerate(dict.fromkeys(files))}
    for key in _PAGE_KEYS:
        pages = [id_text(document.metadata.get(key)) for document in documents]
        if all(page.isdecimal() for page in pages):
            places = [(rank[file], int(page)) for file, page in zip(files, pages, strict=True)]
            ordered = sorted(zip(places, documents, strict=True), key=lambda placed: placed[0])
            return [document for _, document in ordered]
    return documents


def _require_one_file(name: str, documents: list[Document], keys: Sequence[str]) -> None:
    """Refuse elements with the same id that are not parts of one file."""
    sources = {str(d.metadata["source"]) for d in documents if "source" in d.metadata}
    if len(sources) > 1:
        (key, _), *_ = ids_of(documents[0], keys)
        raise DocumentError(
            f"documents of different files have the {key} {name!r} ({', '.join(sorted(sources))}): "
            f"give each its own, or pass document_id_key={key!r} if they are to be read as one"
        )
    if not ids_of(documents[0], keys) and len({d.page_content for d in documents}) > 1:
        raise DocumentError(
            f"{len(documents)} documents have the id {name!r}: give each its own, or put what "
            f"they are parts of into their metadata ({'/'.join(keys)})"
        )
