"""Full documents in every form, and what stands behind retrieved chunks."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document
from rapid_llm.errors import DocumentError

from langchain_rapid.documents import FullDocuments, document_id
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


@pytest.mark.parametrize(
    ("metadata", "key", "expected"),
    [
        ({"source": "s"}, None, "s"),
        ({"source": "s", "doc_id": "d"}, None, "d"),
        ({"source": "s", "doc_id": "d", "document_id": 7}, None, "7"),
        ({"source": "s", "url": "u"}, "url", "u"),
        ({"source": "s"}, "url", None),
        ({}, None, None),
    ],
)
def test_document_ids(metadata, key, expected):
    assert document_id(Document("x", metadata=metadata, id="the chunk's own"), key) == expected


@pytest.mark.parametrize(
    "documents", [TEXTS, TEXTS.get, as_list()], ids=["mapping", "function", "list"]
)
def test_every_form_finds_the_documents_in_the_order_of_their_first_chunk(documents):
    chunks = [chunk("Fourth.", "b"), chunk("First.", "a"), chunk("Third.", "b")]
    found = find_sources(chunks, FullDocuments(documents))
    assert found.chunks == chunks
    assert found.documents[0].page_content == "Third. Fourth."
    assert found.documents[1].page_content.split() == ["First.", "Second."]


def test_parts_of_one_document_are_joined():
    assert FullDocuments(as_list()).texts == {"a": "First. \n\nSecond.", "b": "Third. Fourth."}


def test_one_document_needs_no_id():
    for documents in ("Whole text.", [Document("Whole text.")]):
        found = find_sources([chunk("text"), chunk("Whole", "any")], FullDocuments(documents))
        assert [document.page_content for document in found.documents] == ["Whole text."]


def test_a_documents_own_id_serves_in_a_list():
    documents = [Document("One.", id="1"), Document("Two.", id="2")]
    found = find_sources([chunk("Two", "2")], FullDocuments(documents))
    assert [document.page_content for document in found.documents] == ["Two."]


def test_another_key():
    documents = [Document("One.", metadata={"url": "1"}), Document("Two.", metadata={"url": "2"})]
    found = find_sources([chunk("Two", "1", url="2")], FullDocuments(documents, "url"))
    assert [document.page_content for document in found.documents] == ["Two."]


def test_a_document_has_its_own_metadata_and_its_first_chunks():
    chunks = [chunk("First.", "a", page=4, lang="en"), chunk("Second.", "a", page=5, author="N")]
    (document,) = find_sources(chunks, FullDocuments(as_list())).documents
    assert document.metadata == {
        "source": "a",
        "title": "A",
        "page": 0,
        "lang": "en",
        "author": "N",
    }
    (document,) = find_sources(chunks, FullDocuments(TEXTS)).documents
    assert document.metadata == {"source": "a", "page": 4, "lang": "en", "author": "N"}
    assert chunks[0].metadata == {"source": "a", "page": 4, "lang": "en"}


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


def test_nothing_retrieved_means_all_documents():
    found = find_sources([], FullDocuments(TEXTS))
    assert (found.chunks, found.retrieved) == ([], [])
    assert [document.page_content for document in found.documents] == list(TEXTS.values())
    with pytest.raises(DocumentError, match="returned nothing"):
        find_sources([], FullDocuments(TEXTS.get))


@pytest.mark.parametrize(
    ("documents", "error"),
    [
        (3, "type int"),
        ([], "empty"),
        ({}, "empty"),
        ("", "empty"),
        (["text"], "type list"),
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
    with pytest.raises(DocumentError, match="does not say which document"):
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
