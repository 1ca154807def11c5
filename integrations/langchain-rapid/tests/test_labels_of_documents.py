"""What a ``document_prompt`` says of whole documents, whichever form they were given in."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate

from langchain_rapid import ChatRapid, create_rapid_documents_chain

PROMPT = ChatPromptTemplate.from_template("{context}")
PAGES = [
    Document(f"Words {n}.", metadata={"source": "r.pdf", "page": n, "title": "R"}) for n in range(3)
]
WHOLE = "Words 0.\n\nWords 1.\n\nWords 2."


@pytest.fixture
def labelled(decoder, prompts):
    """What target and drafter read of chunks, under a template."""

    def read(
        template: str, documents: Any, chunks: list[Document], **options: Any
    ) -> tuple[str, str]:
        prompts.clear()
        create_rapid_documents_chain(
            ChatRapid(decoder=decoder, max_tokens=2),
            PROMPT,
            documents=documents,
            document_prompt=PromptTemplate.from_template(template),
            **options,
        ).invoke({"context": chunks})
        target, draft = (
            text.removeprefix("<s>[user]").removesuffix("\n[assistant]")
            for text in (*prompts, "")[:2]
        )
        return target, draft

    return read


@pytest.mark.parametrize(
    "documents", [{"r.pdf": WHOLE}, {"r.pdf": WHOLE}.get, WHOLE, [Document(WHOLE)], PAGES]
)
def test_the_source_is_known_for_every_form(labelled, documents):
    target, draft = labelled("{source}: {page_content}", documents, [PAGES[2]])
    assert target == f"r.pdf: {WHOLE}"
    assert draft == "r.pdf: Words 2."


def test_the_id_is_the_source_where_nothing_else_is(labelled):
    texts = {"a": "Alpha.", "b": "Beta."}
    target, _ = labelled("{source}: {page_content}", texts, [], on_empty="read_all")
    assert target == "a: Alpha.\n\nb: Beta."
    target, _ = labelled("<{source}>{page_content}", "Alpha.", [], on_empty="read_all")
    assert target == "<>Alpha."


def test_nothing_retrieved_needs_no_label(labelled):
    assert labelled("{source} {page}: {page_content}", {"a": "Alpha."}, []) == ("", "")


def test_a_label_of_one_page_is_not_claimed_for_the_whole_document(labelled):
    target, draft = labelled("[{source} p{page}] {page_content}", PAGES, [PAGES[2]])
    assert target == f"[r.pdf p0-2] {WHOLE}"
    assert draft == "[r.pdf p2] Words 2."
    for documents in ({"r.pdf": WHOLE}, WHOLE):
        target, _ = labelled("[{source} p{page}] {page_content}", documents, [PAGES[2]])
        assert target == f"[r.pdf p] {WHOLE}"


def test_what_all_parts_share_is_said_and_what_differs_is_listed(labelled):
    parts = [
        Document("One.", metadata={"source": "s", "part": "Intro", "title": "S"}),
        Document("Two.", metadata={"source": "s", "part": "End", "title": "S"}),
        Document("Three.", metadata={"source": "s", "part": "End", "title": "S"}),
    ]
    target, _ = labelled("{title} ({part}) {page_content}", parts, [parts[1]])
    assert target == "S (Intro, End) One.\n\nTwo.\n\nThree."


def test_what_the_chunks_agree_on_is_said_where_documents_say_nothing(labelled):
    def chunk(text: str, **metadata: Any) -> Document:
        return Document(text, metadata={"source": "r.pdf", **metadata})

    chunks = [chunk("Words 0.", title="R", by="A"), chunk("Words 1.", title="R", by="B")]
    target, _ = labelled("{title}/{by}: {page_content}", {"r.pdf": WHOLE}, chunks)
    assert target == f"R/: {WHOLE}"
    target, _ = labelled("{title}: {page_content}", PAGES, [chunk("Words 0.", title="another")])
    assert target == f"R: {WHOLE}"  # the document's own goes first


def test_documents_in_a_mapping_have_their_own_metadata(labelled):
    documents = {"r.pdf": Document(WHOLE, metadata={"title": "R", "page": 7})}
    target, _ = labelled("{title} {page}: {page_content}", documents, [PAGES[1]])
    assert target == f"R 7: {WHOLE}"


def test_a_chunk_without_a_field_of_the_template_is_told_as_langchain_does(labelled):
    with pytest.raises(ValueError, match="missing metadata"):
        labelled("{author}: {page_content}", PAGES, [PAGES[0]])
