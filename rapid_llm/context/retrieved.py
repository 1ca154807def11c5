"""What a pipeline's own retriever found: the drafter's context, and the documents behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rapid_llm.errors import DocumentError
from rapid_llm.stats import NOTHING_RETRIEVED

Documents = str | Mapping[str, str] | Callable[[str], str | None]
"""The full texts: one document, a mapping from document ids, or a function of the id."""

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Passage:
    """One retrieved chunk.

    Attributes:
        text: what the drafter reads.
        document_id: which document it was cut from; None if the pipeline does not say.
        id: the chunk's own id in the pipeline; None if it has none.
    """

    text: str
    document_id: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Grounding:
    """The two contexts of one question.

    Attributes:
        draft: the retrieved chunks, joined by blank lines, in the retriever's order; empty if
            nothing was retrieved.
        passages: the chunks without repetitions.
        texts: the full documents, in the order of their first chunk; all of them if nothing was
            retrieved and they can be listed.
        document_ids: theirs; None stands for a single document without id.
        empty_reason: why there is no draft, or None if there is one.
    """

    draft: str
    passages: tuple[Passage, ...]
    texts: tuple[str, ...]
    document_ids: tuple[str | None, ...]
    empty_reason: str | None

    @property
    def target(self) -> str:
        """What the target reads: the full documents, joined by blank lines."""
        return SEPARATOR.join(self.texts)


def ground(passages: Iterable[Passage], documents: Documents) -> Grounding:
    """Find the documents that passages come from.

    Args:
        passages: what was retrieved, best first. Repeated ones (same id, or same text of the
            same document) count once; empty ones not at all.
        documents: where the full texts are.

    Raises:
        DocumentError: a document id is missing or unknown, a document is empty, or nothing was
            retrieved and the documents cannot be listed.
    """
    kept: dict[tuple[str | None, ...], Passage] = {}
    ids = set()
    for passage in passages:
        key = (passage.document_id, passage.text)
        if not passage.text.strip() or key in kept or (passage.id and passage.id in ids):
            continue
        ids.add(passage.id)
        kept[key] = passage
    unique = tuple(kept.values())
    if unique:
        names = _document_ids(unique, documents)
        reason = None
    else:
        names = _all_document_ids(documents)
        reason = NOTHING_RETRIEVED
    return Grounding(
        draft=SEPARATOR.join(passage.text for passage in unique),
        passages=unique,
        texts=tuple(_full_text(name, documents) for name in names),
        document_ids=names,
        empty_reason=reason,
    )


def _document_ids(passages: tuple[Passage, ...], documents: Documents) -> tuple[str | None, ...]:
    if isinstance(documents, str):
        return (None,)
    return tuple(dict.fromkeys(passage.document_id for passage in passages))


def _all_document_ids(documents: Documents) -> tuple[str | None, ...]:
    if isinstance(documents, str):
        return (None,)
    if isinstance(documents, Mapping) and documents:
        return tuple(documents)
    raise DocumentError(
        "the retriever returned nothing, and from documents given as a function (or none) the "
        "target cannot tell which to read: give a mapping of all documents, or retrieve more"
    )


def _full_text(name: str | None, documents: Documents) -> str:
    if isinstance(documents, str):
        text: str | None = documents
    elif name is None:
        raise DocumentError(
            "a retrieved chunk does not say which document it is from: keep the document's id "
            "when the chunks are made, or pass a single document"
        )
    elif isinstance(documents, Mapping):
        text = documents.get(name)
    else:
        text = documents(name)
    if text is None:
        raise DocumentError(
            f"document {name!r}, which a retrieved chunk is from, is not among the documents "
            "given: add it, or rebuild the index from these documents"
        )
    if not text.strip():
        raise DocumentError(f"document {name!r} is empty: give its full text")
    return text
