"""From retrieved chunks to the two contexts."""

from __future__ import annotations

import pytest

from rapid_llm.context.retrieved import Passage, ground
from rapid_llm.errors import DocumentError, InvalidParameterError

TEXTS = {"a": "First. Second.", "b": "Third. Fourth.", "c": "Fifth."}


@pytest.mark.parametrize(("order", "ids"), [("canonical", ("a", "b")), ("given", ("b", "a"))])
def test_documents_come_in_the_order_of_their_ids_or_of_their_first_chunk(order, ids):
    found = ground([Passage("Fourth.", "b", "1"), Passage("First.", "a", "2")], TEXTS, order=order)
    assert found.draft == "Fourth.\n\nFirst."
    assert found.target == "\n\n".join(TEXTS[name] for name in ids)
    assert found.document_ids == ids
    assert found.empty_reason is None


@pytest.mark.parametrize("documents", [TEXTS, TEXTS.get], ids=["mapping", "function"])
def test_repeated_and_empty_chunks_count_once_or_not(documents):
    chunks = [
        Passage("First.", "a", "1"),
        Passage("First.", "a", "1"),
        Passage("First.", "a", "9"),  # another id, the same text of the same document
        Passage("First, reworded.", "a", "1"),
        Passage("  ", "b", "5"),
        Passage("Second.", "a"),
        Passage("Third.", "b"),
    ]
    found = ground(chunks, documents)
    assert [passage.text for passage in found.passages] == ["First.", "Second.", "Third."]
    assert found.document_ids == ("a", "b")


def test_the_same_text_or_id_in_two_documents_stays_twice():
    for other in ("x", "y"):
        found = ground([Passage("x", "a", "0"), Passage(other, "b", "0")], TEXTS)
        assert found.document_ids == ("a", "b")
        assert [passage.text for passage in found.passages] == ["x", other]


def test_a_single_document_needs_no_ids():
    found = ground([Passage("Second."), Passage("First.", "whatever")], "First. Second.")
    assert (found.target, found.document_ids) == ("First. Second.", (None,))


def test_nothing_retrieved_is_nothing_read():
    for documents in (TEXTS, TEXTS.get, "First.", {}):
        found = ground([], documents)
        assert (found.texts, found.document_ids, found.draft, found.target) == ((), (), "", "")
        assert found.empty_reason == "the retriever returned nothing"


def test_everything_is_read_where_that_was_asked_for():
    found = ground([], TEXTS, on_empty="read_all")
    assert found.draft == ""
    assert found.target == "First. Second.\n\nThird. Fourth.\n\nFifth."
    assert found.empty_reason == "the retriever returned nothing"
    with pytest.raises(DocumentError, match="mapping of all documents"):
        ground([], TEXTS.get, on_empty="read_all")
    with pytest.raises(DocumentError, match="cannot tell"):
        ground([], {}, on_empty="read_all")
    with pytest.raises(InvalidParameterError, match=r"on_empty='all'.*empty.*read_all"):
        ground([], TEXTS, on_empty="all")


def test_documents_that_cannot_be_found_are_named():
    for documents in (TEXTS, TEXTS.get):
        with pytest.raises(DocumentError, match=r"'z'.*add it"):
            ground([Passage("x", "z")], documents)
        with pytest.raises(DocumentError, match="does not say"):
            ground([Passage("x")], documents)
    with pytest.raises(DocumentError, match="'a' is empty"):
        ground([Passage("x", "a")], {"a": " "})
