"""Which document a chunk is from: ids of every kind, parts of a file, chunks that do not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.stores import InMemoryStore
from rapid_llm.errors import DocumentError

from langchain_rapid import ChatRapid, create_rapid_documents_chain
from langchain_rapid.documents import FullDocuments
from langchain_rapid.grounding import find_sources

TEXTS = {"a": "First. Second.", "b": "Third. Fourth."}
PROMPT = ChatPromptTemplate.from_template("{context}\n{input}")


def chunk(text: str, **metadata: Any) -> Document:
    return Document(text, metadata=metadata)


def read(chunks: list[Document], documents: Any, key: str | None = None) -> list[str]:
    """The texts that the target reads."""
    found = find_sources(chunks, FullDocuments(documents, key))
    return [source.document.page_content for source in found.full]


# --- what an id may be -------------------------------------------------------------------------

IDS = [7, Path("folder/a.txt"), UUID(int=5), "a", 2.5]


@pytest.mark.parametrize("name", IDS, ids=lambda name: type(name).__name__)
def test_a_number_or_a_path_is_an_id(name):
    other = {"z": "Other."}
    lists = [chunk("Text.", source=name), chunk("Other.", source="z")]
    for documents in ({name: "Text."} | other, {str(name): "Text."} | other, lists):
        assert read([chunk("Te", source=name)], documents) == ["Text."]
        assert read([chunk("Te", source=str(name))], documents) == ["Text."]


def test_ids_that_a_store_returns_as_floats_are_found():
    for number in (7.0, np.float32(7), np.int64(7)):
        assert read([chunk("Te", document_id=number)], {7: "Text.", 8: "Other."}) == ["Text."]
    assert read([chunk("Te", document_id=7.0)], {"7": "Text."}.get) == ["Text."]


@pytest.mark.parametrize("blank", [None, "", float("nan")])
def test_a_blank_id_is_none(blank):
    shadowed = chunk("Third.", document_id=blank, source="b")
    assert read([shadowed], TEXTS) == [TEXTS["b"]]
    chunks = [chunk("From the web.", source=blank), chunk("Third.", source="b")]
    assert read(chunks, TEXTS) == [TEXTS["b"], "From the web."]


def test_a_function_may_want_the_id_as_it_is():
    assert read([chunk("Te", document_id=7)], {7: "Text."}.get) == ["Text."]
    assert read([chunk("Te", document_id=7)], {"7": "Text."}.get) == ["Text."]
    assert read([chunk("Te", document_id=7)], {7: "Text."}.__getitem__) == ["Text."]


def test_a_function_may_read_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("Text.", encoding="utf-8")
    documents = lambda path: Path(path).read_text(encoding="utf-8")  # noqa: E731
    assert read([chunk("Text.", doc_id="none", source=str(file))], documents) == ["Text."]
    with pytest.raises(DocumentError, match=r"source='gone.txt'.*not among"):
        read([chunk("Text.", source="gone.txt")], documents)


def test_a_function_is_asked_for_each_document_once():
    asked: list[Any] = []

    def look_up(name: Any) -> str | None:
        asked.append(name)
        return TEXTS.get(name)

    chunks = [chunk(text, doc_id=f"x{n % 2}", source="a") for n, text in enumerate("abcd")]
    assert read(chunks, look_up) == [TEXTS["a"]]
    assert asked == ["x0", "a", "x1"]


def test_texts_may_be_documents():
    store = InMemoryStore()
    parts = {name: Document(text, metadata={"title": name}) for name, text in TEXTS.items()}
    store.mset(list(parts.items()))
    for documents in (parts, lambda name: store.mget([name])[0]):
        assert read([chunk("Third.", doc_id="b")], documents) == [TEXTS["b"]]
    with pytest.raises(DocumentError, match="'b' is bytes, not text"):
        read([chunk("Third.", doc_id="b")], {"b": b"Third."})


def test_documents_added_to_a_mapping_later_are_found():
    texts = dict(TEXTS)
    documents = FullDocuments(texts)
    texts["c"] = "Fifth."
    (source,) = find_sources([chunk("Fifth.", source="c")], documents).full
    assert source.document.page_content == "Fifth."


# --- several keys ------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [TEXTS, TEXTS.get], ids=["mapping", "function"])
def test_the_first_key_that_names_a_document_counts(documents):
    shadowed = chunk("Third.", document_id="of another index", doc_id=3, source="b")
    assert read([shadowed], documents) == [TEXTS["b"]]
    assert read([chunk("Third.", document_id="b", source="a")], documents) == [TEXTS["b"]]


def test_every_key_that_was_tried_is_named():
    wrong = chunk("Third.", document_id=7, source="c")
    with pytest.raises(DocumentError, match=r"document_id=7, source='c'.*'a', 'b'"):
        read([wrong], TEXTS)
    with pytest.raises(DocumentError, match=r"\(url='c'\).*document_id_key="):
        read([chunk("Third.", url="c", source="b")], TEXTS, "url")


def test_the_key_that_would_do_is_named():
    with pytest.raises(DocumentError, match=r"its 'file_path' is the id of one"):
        read([chunk("Third.", source="x", file_path="b")], TEXTS)
    with pytest.raises(DocumentError, match=r"its 'file_path' is the id of one"):
        read([chunk("Third.", file_path="b")], TEXTS)


def test_an_index_made_with_other_ids_is_read_by_its_sources():
    """Ids that are new each day stand in the documents, those of yesterday in the chunks."""
    documents = [chunk(text, doc_id=f"today {name}", source=name) for name, text in TEXTS.items()]
    assert read([chunk("Third.", doc_id="yesterday b", source="b")], documents) == [TEXTS["b"]]


def test_ids_of_two_kinds_are_not_confused():
    documents = [chunk("One.", document_id=1, doc_id=2), chunk("Two.", document_id=2, doc_id=1)]
    assert read([chunk("On", doc_id=2)], documents) == ["One."]
    assert read([chunk("Tw", document_id=2)], documents) == ["Two."]


def test_a_source_of_several_documents_names_none():
    documents = [chunk("One.", doc_id=1, source="s"), chunk("Two.", doc_id=2, source="s")]
    assert read([chunk("Tw", doc_id=2, source="s")], documents) == ["Two."]
    with pytest.raises(DocumentError, match="source='s'"):
        read([chunk("Tw", source="s")], documents)


# --- parts of one file -------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["page", "page_number"])
def test_pages_are_one_document_in_their_order(key):
    pages = [chunk(f"Page {n}.", source="r.pdf", **{key: n}) for n in (10, 2, 1)]
    documents = [*pages, chunk("Other.", source="o.pdf", **{key: 0})]
    assert read([pages[1]], documents) == ["Page 1.\n\nPage 2.\n\nPage 10."]
    assert read([chunk("Page 2.", source="r.pdf")], pages) == ["Page 1.\n\nPage 2.\n\nPage 10."]


def test_pages_that_a_store_returns_as_floats_are_sorted():
    pages = [chunk(f"Page {n}.", source="r.pdf", page=float(n)) for n in (10, 2)]
    assert read([pages[0]], pages) == ["Page 2.\n\nPage 10."]


def test_pages_of_files_read_as_one_do_not_mix():
    pages = [chunk(f"{file}{n}", project="p", source=file, page=n) for n in (1, 0) for file in "ba"]
    assert read([pages[0]], pages, "project") == ["b0\n\nb1\n\na0\n\na1"]


def test_elements_of_a_page_stay_in_their_order():
    parts = [("c", 2), ("a", 1), ("b", 1)]
    documents = [chunk(text, source="r.pdf", page_number=page) for text, page in parts]
    assert read([documents[0]], documents) == ["a\n\nb\n\nc"]


def test_sections_are_one_document_as_they_come():
    documents = [chunk("Intro.", source="s.md", section="1"), chunk("End.", source="s.md")]
    assert read([documents[1]], documents) == ["Intro.\n\nEnd."]


def test_blank_pages_are_passed_over():
    documents = [chunk(text, source="r.pdf", page=n) for n, text in enumerate(["A", " ", "C"])]
    assert read([documents[2]], documents) == ["A\n\nC"]


def test_where_a_chunk_of_a_page_begins_in_the_whole_document():
    pages = [chunk("Same words. More.", source="r.pdf", page=n) for n in range(3)]
    found = find_sources(
        [
            chunk("More.", source="r.pdf", page=2, start_index=12),
            chunk("words.", source="r.pdf", page=1, start_index=5.0),
        ],
        FullDocuments(pages),
    )
    assert [described["start_index"] for described in found.retrieved] == [2 * 19 + 12, 19 + 5]


@pytest.mark.parametrize("lost", [-1, float("nan"), "", None])
def test_a_chunk_without_a_position_is_looked_up_in_the_text(lost):
    """LangChain's say -1 where a chunk is not in the text; a store may make NaN of it."""
    texts = ["Second.", "Reworded."]
    found = find_sources(
        [chunk(text, source="a", start_index=lost) for text in texts], FullDocuments(TEXTS)
    )
    assert found.retrieved == [{"document_id": "a", "start_index": 7}, {"document_id": "a"}]


def test_an_id_given_to_two_files_is_told():
    documents = [
        chunk("One.", document_id="x", source="1"),
        chunk("Two.", document_id="x", source="2"),
    ]
    with pytest.raises(DocumentError, match=r"document_id 'x' \(1, 2\)"):
        FullDocuments(documents)
    whole = read([chunk("Two.", document_id="x")], documents, "document_id")  # asked for by name
    assert whole == ["One.\n\nTwo."]
    with pytest.raises(DocumentError, match="2 documents have the id 'x'"):
        FullDocuments([Document("One.", id="x"), Document("Two.", id="x")])
    with pytest.raises(DocumentError, match="two documents have the id '1'"):
        FullDocuments({1: "One.", "1": "Two."})


# --- chunks that do not say --------------------------------------------------------------------


@pytest.mark.parametrize("documents", [TEXTS, TEXTS.get], ids=["mapping", "function"])
def test_a_chunk_without_a_source_is_read_as_it_is_beside_others(documents):
    chunks = [chunk("From the web."), chunk("Third.", source="b"), chunk("From the web.")]
    found = find_sources(chunks, FullDocuments(documents))
    assert found.chunks == chunks[:2]
    full = [source.document.page_content for source in found.full]
    assert full == [TEXTS["b"], "From the web."]  # behind the documents
    assert found.retrieved == [{"start_index": 0}, {"document_id": "b", "start_index": 0}]


def test_both_models_read_a_chunk_without_a_source(decoder, prompts):
    chain = create_rapid_documents_chain(
        ChatRapid(decoder=decoder, max_tokens=2), PROMPT, documents=TEXTS
    )
    chain.invoke({"context": [chunk("Third.", source="b"), chunk("From the web.")], "input": "?"})
    assert prompts == [
        f"<s>[user]{TEXTS['b']}\n\nFrom the web.\n?\n[assistant]",
        "<s>[user]Third.\n\nFrom the web.\n?\n[assistant]",
    ]


def test_no_label_is_made_up_for_it():
    chunks = [chunk("From the web.", title="W"), chunk("Third.", source="b")]
    found = find_sources(chunks, FullDocuments(TEXTS), labels=["source", "title"])
    assert [source.document.metadata for source in found.full] == [
        {"source": "b", "title": ""},
        {"source": "", "title": "W"},
    ]


def test_chunks_none_of_which_has_a_source_are_told():
    with pytest.raises(DocumentError, match="document_id/doc_id/source"):
        read([chunk("Third."), chunk("Fourth.")], TEXTS)


def test_a_single_document_is_what_every_chunk_is_from():
    pages = [chunk("One.", source="r.pdf", page=0), chunk("Two.", source="r.pdf", page=1)]
    for documents in ("One.\n\nTwo.", [Document("One.\n\nTwo.")], pages):
        assert read([chunk("Two.")], documents) == ["One.\n\nTwo."]
        assert read([chunk("Two.", doc_id="of the index")], documents) == ["One.\n\nTwo."]


def test_a_chunk_of_another_document_does_not_open_the_single_one():
    with pytest.raises(DocumentError, match=r"source='other.pdf'.*'r.pdf'"):
        read([chunk("?", source="other.pdf")], [chunk("Secret.", source="r.pdf")])


# --- blank documents ---------------------------------------------------------------------------


def test_blank_documents_beside_others_are_passed_over(decoder, prompts):
    llm = ChatRapid(decoder=decoder, max_tokens=2)
    for documents in ({"a": "alpha", "b": " "}, [chunk("alpha", source="a"), Document(" ")]):
        prompts.clear()
        chain = create_rapid_documents_chain(llm, PROMPT, documents=documents, on_empty="read_all")
        chain.invoke({"context": [], "input": "?"})
        assert prompts == ["<s>[user]alpha\n?\n[assistant]"]
    with pytest.raises(DocumentError, match="empty"):
        create_rapid_documents_chain(llm, PROMPT, documents={"a": " "}).invoke(
            {"context": [chunk("alpha", source="a")], "input": "?"}
        )
