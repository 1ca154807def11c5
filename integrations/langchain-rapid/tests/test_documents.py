"""Full documents in every form, and what stands behind retrieved chunks."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from rapid_llm.errors import DocumentError

from langchain_rapid.documents import FullDocuments
from langchain_rapid.grounding import find_sources

TEXTS = {"a": "First. Second.", "b": "Third. Fourth."}


def chunk(text: str, source: str | None = None, **more: object) -> Document:
    metadata = {} if source is None else {"source": source}
    return Document(text, metadata=metadata | dict(more))


def as_list() -> list[Document]:
    return [
        Document("First. ", metadata={"source": "a", "page": 0, "title": "A"}),
        Document("Third. Fourth.", metadata={"source": "b", "title": "B"}),
        Document("Second.", metadata={"source": "a", "page": 1, "title": "A"}),
    ]


def read(chunks: list[Document], documents: FullDocuments, **more: Any) -> list[str]:
    """The texts that the target reads."""
    return [source.document.page_content for source in find_sources(chunks, documents, **more).full]


@pytest.mark.parametrize(
    "documents", [TEXTS, TEXTS.get, as_list()], ids=["mapping", "function", "list"]
)
def test_every_form_finds_the_documents_in_the_order_that_is_asked_for(documents):
    chunks = [chunk("Fourth.", "b"), chunk("First.", "a"), chunk("Third.", "b")]
    assert find_sources(chunks, FullDocuments(documents)).chunks == chunks
    first, second = read(chunks, FullDocuments(documents))
    assert first.split() == ["First.", "Second."]
    assert second == "Third. Fourth."
    found = find_sources(chunks, FullDocuments(documents), order="given")
    assert [source.document.page_content for source in found.full] == [second, first]


def test_parts_of_one_document_are_joined():
    assert read([chunk("Second.", "a")], FullDocuments(as_list())) == ["First. \n\nSecond."]


def test_one_document_needs_no_id():
    for documents in ("Whole text.", [Document("Whole text.")]):
        chunks = [chunk("text"), chunk("Whole", "any")]
        assert read(chunks, FullDocuments(documents)) == ["Whole text."]


def test_a_documents_own_id_serves_in_a_list():
    documents = [Document("One.", id="1"), Document("Two.", id="2")]
    assert read([chunk("Two", "2")], FullDocuments(documents)) == ["Two."]


def test_the_key_of_the_ids_may_be_named():
    documents = [Document("One.", metadata={"url": "1"}), Document("Two.", metadata={"url": "2"})]
    assert read([chunk("Two", "1", url="2")], FullDocuments(documents, "url")) == ["Two."]


def test_repeated_chunks_count_once():
    chunks = [
        Document("First.", metadata={"source": "a"}, id="1"),
        Document("First.", metadata={"source": "a"}, id="1"),
        Document("First.", metadata={"source": "a"}, id="2"),
        Document("Second.", metadata={"source": "a"}),
    ]
    assert [c.page_content for c in find_sources(chunks, FullDocuments(TEXTS)).chunks] == [
        "First.",
        "Second.",
    ]


def test_where_a_chunk_is_from_is_said_as_far_as_it_is_known():
    chunks = [
        Document("Second.", metadata={"source": "a", "start_index": 7}, id="x"),
        chunk("Fourth.", "b"),
        chunk("Reworded.", "b"),
    ]
    assert find_sources(chunks, FullDocuments(TEXTS)).retrieved == [
        {"id": "x", "document_id": "a", "start_index": 7},
        {"document_id": "b", "start_index": 7},
        {"document_id": "b"},
    ]
    assert find_sources([chunk("Second.")], FullDocuments("First. Second.")).retrieved == [
        {"start_index": 7}
    ]


@pytest.mark.parametrize(
    ("documents", "error"),
    [
        (3, "type int"),
        ([], "empty"),
        ({}, "empty"),
        ("", "empty"),
        (["text"], r"documents\[0\] of type str is not allowed"),
        (
            [Document("One."), Document("Two.")],
            r"document 0 of 2 has no id.*doc_id/source",
        ),
    ],
)
def test_unusable_documents_are_refused(documents, error):
    with pytest.raises(DocumentError, match=error):
        FullDocuments(documents)


@pytest.mark.parametrize("documents", [TEXTS, TEXTS.get], ids=["mapping", "function"])
def test_chunks_without_a_document_are_refused(documents):
    with pytest.raises(DocumentError, match="says which document"):
        find_sources([chunk("x")], FullDocuments(documents))
    with pytest.raises(DocumentError, match="'z'"):
        find_sources([chunk("x", "z")], FullDocuments(documents))
    with pytest.raises(DocumentError, match="type str"):
        find_sources(["x"], FullDocuments(documents))


def test_a_function_is_asked_once_for_each_document():
    asked: list[str] = []

    def look_up(name: str) -> str | None:
        asked.append(name)
        return TEXTS.get(name)

    chunks = [chunk("First.", "a"), chunk("Second.", "a"), chunk("Third.", "b")]
    find_sources(chunks, FullDocuments(look_up))
    assert asked == ["a", "b"]
