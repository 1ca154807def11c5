"""Contexts of drafter and target: retrieved chunks, and the full documents that they are from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from langchain_core.documents import Document
from rapid_llm.config import OnEmpty, Order
from rapid_llm.context.confidence import confidence
from rapid_llm.context.ordering import LAST
from rapid_llm.context.retrieved import Passage, ground
from rapid_llm.errors import DocumentError
from rapid_llm.options import real

from langchain_rapid.documents import FullDocuments, Whole, id_text, ids_of
from langchain_rapid.labels import label

SCORE_KEYS = ("relevance_score", "score")
"""Keys of metadata that may hold a chunk's cosine similarity to the question."""


@dataclass(frozen=True)
class Cited:
    """A retrieved chunk of a document.

    Attributes:
        chunk: the retriever's result.
        start: offset of its first character in the document; None if it is not found there.
    """

    chunk: Document
    start: int | None


@dataclass(frozen=True)
class Source:
    """A document that the target reads.

    Attributes:
        document: text of the document, with the requested labels as metadata.
        cited: chunks retrieved from it.
    """

    document: Document
    cited: list[Cited]


@dataclass(frozen=True)
class Sources:
    """The contexts of one question.

    Attributes:
        chunks: the drafter's context: retrieved chunks without repetitions, in the retriever's
            order; empty if nothing was retrieved.
        full: the target's context: the full documents that the chunks are from.
        retrieved: known ones of ``id``, ``document_id`` and ``start_index`` (in characters of the
            full text) of each chunk.
        confidence: confidence of the retrieval, in [0, 1], from the chunks' scores.
    """

    chunks: list[Document]
    full: list[Source]
    retrieved: list[dict[str, Any]]
    confidence: float


@dataclass(frozen=True)
class _Chunk(Passage):
    document: Document = field(kw_only=True)
    said_id: str | None = field(kw_only=True)


def find_sources(
    chunks: Iterable[Document],
    documents: FullDocuments,
    *,
    on_empty: OnEmpty = "empty",
    order: Order = "canonical",
    labels: Collection[str] = (),
) -> Sources:
    """Find the full documents behind retrieved chunks.

    The document of a chunk is given by the first of the chunk's ids (``documents.id_keys``) that
    names one. A chunk without an id, among others with one, is read as it is by both models.

    Args:
        chunks: retrieved chunks, best first.
        documents: the full texts.
        on_empty: action where nothing was retrieved: ``read_all`` reads every document.
        order: order of the documents: that of their ids, or for ``given`` that of their first
            chunks.
        labels: keys of metadata for the full documents, see :func:`langchain_rapid.labels.label`.

    Raises:
        DocumentError: a chunk is no ``Document`` or is from an unknown document, no chunk names its
            document, all documents are blank, or all are to be read and cannot be listed.
    """
    given = [chunk for chunk in _checked(chunks) if chunk.page_content.strip()]
    passages, wholes = _resolved(given, documents)
    if not given and on_empty == "read_all":
        wholes = documents.all()
    texts = {name: whole.text for name, whole in wholes.items()}
    found = ground(passages, texts, on_empty=on_empty, order=order)

    full: list[Source] = []
    starts: dict[int, int | None] = {}
    for name, text, own in zip(found.document_ids, found.texts, found.cited, strict=True):
        assert name is not None
        whole = wholes[name] if wholes[name].text == text else Whole(text)
        behind = [passage.document for passage in cast("tuple[_Chunk, ...]", own)]
        starts |= {id(chunk): _start(chunk, whole) for chunk in behind}
        source = "" if name.startswith(LAST) else name
        metadata = {key: label(key, source, whole, behind) for key in labels}
        cited = [Cited(chunk, starts[id(chunk)]) for chunk in behind]
        full.append(Source(Document(text, metadata=metadata), cited))

    kept = cast("tuple[_Chunk, ...]", found.passages)
    retrieved = [_described(passage, starts[id(passage.document)]) for passage in kept]
    read = [passage.document for passage in kept]
    return Sources(read, full, retrieved, confidence_of(given))


def confidence_of(chunks: Sequence[Document]) -> float:
    """Confidence of a retrieval from its scores, see :mod:`rapid_llm.context.confidence`.

    Scores are the numbers under the first key of ``SCORE_KEYS`` in any chunk's metadata, if they
    are all in [-1, 1], as cosine similarities are. Without such scores the confidence is 1.
    """
    for key in SCORE_KEYS:
        said = [real(chunk.metadata.get(key)) for chunk in chunks]
        scores = [score for score in said if score is not None]
        if scores and all(-1 <= score <= 1 for score in scores):
            return confidence(scores)
    return 1.0


def _checked(chunks: object) -> list[Document]:
    if isinstance(chunks, Document) or not isinstance(chunks, Iterable):
        chunks = [chunks]
    listed: list[Any] = list(chunks)
    for chunk in listed:
        if not isinstance(chunk, Document):
            raise DocumentError(
                f"a retrieved chunk of type {type(chunk).__name__} is not allowed: the retriever "
                "must return a list of Document"
            )
    return listed


# --- which document a chunk is from ------------------------------------------------------------


def _resolved(
    chunks: Sequence[Document], documents: FullDocuments
) -> tuple[list[_Chunk], dict[str, Whole]]:
    """The chunks with the names of their documents, and the documents by name."""
    look_up = _LookUp(documents)
    passages: list[_Chunk] = []
    wholes: dict[str, Whole] = {}
    for chunk in chunks:
        name, whole, said = look_up(chunk)
        wholes[name] = whole
        passages.append(_Chunk(chunk.page_content, name, chunk.id, document=chunk, said_id=said))
    if passages and look_up.without_id == len(passages):
        raise DocumentError(
            "no retrieved chunk says which document it is from: keep the document's id in the "
            f"metadata when the chunks are made ({'/'.join(documents.id_keys)}), name its key "
            f"with document_id_key=, or pass a single document{_hint(chunks[0], documents)}"
        )
    return passages, wholes


class _LookUp:
    """Finds the documents of chunks, and looks each document up once."""

    def __init__(self, documents: FullDocuments) -> None:
        self.without_id = 0
        self._documents = documents
        self._asked: dict[tuple[str, str], tuple[str, Whole] | None] = {}

    def __call__(self, chunk: Document) -> tuple[str, Whole, str | None]:
        """Name of a chunk's document, the document, and the id in the chunk's metadata."""
        ids = ids_of(chunk, self._documents.id_keys)
        for key, value in ids:
            question = key, id_text(value)
            if question not in self._asked:
                self._asked[question] = self._documents.find(key, value)
            if found := self._asked[question]:
                return *found, found[0]
        said = id_text(ids[0][1]) if ids else None
        if found := self._documents.find_without([key for key, _ in ids]):
            return *found, said
        if ids:
            named = ", ".join(f"{key}={value!r}" for key, value in ids)
            raise DocumentError(
                f"the document that a retrieved chunk is from ({named}) is not among "
                f"{self._documents}: add it, rebuild the index from these documents, or name "
                f"another key with document_id_key={_hint(chunk, self._documents)}"
            )
        self.without_id += 1
        return f"{LAST}{chunk.page_content}", Whole.joined([chunk]), None


def _hint(chunk: Document, documents: FullDocuments) -> str:
    key = documents.key_in(chunk)
    return "" if key is None else f" (its {key!r} is the id of one)"


# --- where in it -------------------------------------------------------------------------------


def _start(chunk: Document, whole: Whole) -> int | None:
    """Offset of a chunk in the whole text; None if the text does not contain it unchanged."""
    text = chunk.page_content
    given = id_text(chunk.metadata.get("start_index"))
    said = int(given) if given.isdecimal() else None  # a splitter says -1 where it lost its place
    if said is not None:  # counted from the beginning of the part that was split
        same = (p.start for p in whole.parts if p.metadata.items() <= chunk.metadata.items())
        for start in (said + part for part in (*same, 0)):
            if whole.text.startswith(text, start):
                return start
    found = whole.text.find(text)
    return found if found >= 0 else None if len(whole.parts) > 1 else said


def _described(passage: _Chunk, start: int | None) -> dict[str, Any]:
    known = {"id": passage.id, "document_id": passage.said_id, "start_index": start}
    return {name: value for name, value in known.items() if value is not None}
