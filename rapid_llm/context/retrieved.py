"""Passages from a pipeline's own retriever, and the full documents that they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rapid_llm.config import OnEmpty, Order, RetrievalConfig
from rapid_llm.context.ordering import in_order
from rapid_llm.errors import DocumentError
from rapid_llm.options import require
from rapid_llm.stats import NOTHING_RETRIEVED

Documents: TypeAlias = str | Mapping[Any, str] | Callable[[str], str | None]
"""Full texts: one document, a mapping from document ids, or a function of the id."""

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Passage:
    """A retrieved chunk.

    Attributes:
        text: text of the chunk, which the drafter reads.
        document_id: id of its document; None if unknown. Ids are compared as text, so numbers and
            paths are allowed.
        id: id of the chunk in the pipeline; None if it has none.
        excerpt: the part of ``text`` that is in the document, where the pipeline adds something
            such as metadata; None if all of it is.
        start: offset of the excerpt's first character in the document; None if unknown.
    """

    text: str
    document_id: str | None = None
    id: str | None = None
    excerpt: str | None = field(default=None, kw_only=True)
    start: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.document_id is not None:
            object.__setattr__(self, "document_id", str(self.document_id))


@dataclass(frozen=True)
class Grounding:
    """The drafter's and the target's context for one question.

    Attributes:
        draft: retrieved chunks in the retriever's order, joined by blank lines; empty if nothing
            was retrieved.
        passages: retrieved chunks without repetitions.
        texts: full documents, in the order asked for. If nothing was retrieved, none, or all of
            them for ``read_all``.
        document_ids: ids of ``texts``; None is the id of a single document without one.
        empty_reason: reason why nothing was retrieved; None if something was.
    """

    draft: str
    passages: tuple[Passage, ...]
    texts: tuple[str, ...]
    document_ids: tuple[str | None, ...]
    empty_reason: str | None

    @property
    def target(self) -> str:
        """The target's context: the full documents, joined by blank lines."""
        return SEPARATOR.join(self.texts)

    @property
    def cited(self) -> tuple[tuple[Passage, ...], ...]:
        """Passages retrieved from each of ``texts``."""
        if self.document_ids == (None,):
            return (self.passages,)
        return tuple(_of(name, self.passages) for name in self.document_ids)


def ground(
    passages: Iterable[Passage],
    documents: Documents,
    *,
    on_empty: OnEmpty = "empty",
    order: Order = "canonical",
    titles: Mapping[str, str] | None = None,
) -> Grounding:
    """Find the documents that passages come from.

    Args:
        passages: retrieved passages, best first. Repeated ones (the same id or the same text, of
            the same document) count once; empty ones are ignored.
        documents: source of the full texts. A blank document is skipped, or replaced by the
            passages retrieved from it.
        on_empty: action where nothing was retrieved: ``read_all`` reads every document.
        order: order of the documents: ``canonical`` is that of their ids, see
            :func:`.ordering.in_order`; ``given`` that of their first chunks or, where nothing was
            retrieved, their own.
        titles: sort keys that are compared before the ids, by id, such as file paths.

    Raises:
        DocumentError: a document id is missing, unknown or given twice, a document is not text, all
            of them are blank, or all are to be read and they cannot be listed.
        InvalidParameterError: ``on_empty`` or ``order`` is unknown.
    """
    require(RetrievalConfig, on_empty=on_empty)
    find = _finder(documents)
    unique = _unique(passages)
    if unique:
        names = _document_ids(unique, documents)
    elif on_empty == "read_all":
        names = _all_document_ids(documents)
    else:
        names = ()
    texts = {name: find(name) for name in in_order(names, order, titles)}
    if texts and not any(text.strip() for text in texts.values()):
        raise DocumentError(
            "the document is empty: give its full text"
            if names == (None,)
            else f"document {', '.join(map(repr, names))} is empty: give the full text"
        )
    texts = {
        name: text if text.strip() else SEPARATOR.join(p.text for p in _of(name, unique))
        for name, text in texts.items()
    }
    read = {name: text for name, text in texts.items() if text}
    return Grounding(
        draft=SEPARATOR.join(passage.text for passage in unique),
        passages=unique,
        texts=tuple(read.values()),
        document_ids=tuple(read),
        empty_reason=None if unique else NOTHING_RETRIEVED,
    )


def _unique(passages: Iterable[Passage]) -> tuple[Passage, ...]:
    kept: dict[tuple[str | None, ...], Passage] = {}
    ids = set()
    for passage in passages:
        key, name = (passage.document_id, passage.text), (passage.document_id, passage.id)
        if not passage.text.strip() or key in kept or (passage.id and name in ids):
            continue
        ids.add(name)
        kept[key] = passage
    return tuple(kept.values())


def _of(name: str | None, passages: Sequence[Passage]) -> tuple[Passage, ...]:
    return tuple(passage for passage in passages if passage.document_id == name)


def _document_ids(passages: Sequence[Passage], documents: Documents) -> tuple[str | None, ...]:
    if isinstance(documents, str):
        return (None,)
    return tuple(dict.fromkeys(passage.document_id for passage in passages))


def _all_document_ids(documents: Documents) -> tuple[str | None, ...]:
    if isinstance(documents, str):
        return (None,)
    if isinstance(documents, Mapping) and documents:
        return tuple(map(str, documents))
    raise DocumentError(
        "the retriever returned nothing, and from documents given as a function (or none) the "
        "target cannot tell which to read: give a mapping of all documents, or retrieve more"
    )


def _finder(documents: Documents) -> Callable[[str | None], str]:
    """Function that returns the text of a document id; see :func:`ground` for its errors."""
    if isinstance(documents, str):
        whole = documents
        return lambda name: whole
    if isinstance(documents, Mapping):
        find = _keyed(documents)
    elif callable(documents):
        find = documents
    else:
        raise DocumentError(
            f"documents of type {type(documents).__name__} are not allowed: give one text, a "
            "mapping from ids to texts, or a function of the id"
        )

    def text_of(name: str | None) -> str:
        if name is None:
            raise DocumentError(
                "a retrieved chunk does not say which document it is from: keep the document's id "
                "when the chunks are made, or pass a single document"
            )
        text: object = find(name)
        if text is None:
            raise DocumentError(
                f"document {name!r}, which a retrieved chunk is from, is not among the documents "
                "given: add it, or rebuild the index from these documents"
            )
        if not isinstance(text, str):
            raise DocumentError(
                f"document {name!r} is {type(text).__name__}, not text: give its text as a str"
            )
        return text

    return text_of


def texts_by_id(documents: Mapping[Any, str], order: Order) -> dict[str, str]:
    """The documents of a mapping by the text form of their ids, in order.

    Raises:
        DocumentError: two documents have the same id.
        InvalidParameterError: the order is unknown.
    """
    keys = _keys(documents)
    return {name: documents[keys[name]] for name in in_order(keys, order)}


def _keyed(documents: Mapping[Any, str]) -> Callable[[str], str | None]:
    """Lookup in a mapping by the text form of its keys."""
    keys = _keys(documents)
    return lambda name: documents.get(keys.get(name, name))


def _keys(documents: Mapping[Any, str]) -> dict[str, Any]:
    """The keys of a mapping by their text form."""
    keys: dict[str, Any] = {}
    for key in documents:
        if str(key) in keys:
            raise DocumentError(
                f"two documents have the id {str(key)!r}, as {keys[str(key)]!r} and {key!r}: ids "
                "are compared as text, so give each its own"
            )
        keys[str(key)] = key
    return keys
