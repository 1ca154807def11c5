"""Whole pipelines: Chroma, the packaged embedder, and the packaged model at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import SMOLLM2
from langchain_chroma import Chroma
from langchain_classic.chains import create_retrieval_chain
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from texts import LIBRARY, LIGHTHOUSE, TEXTS, loaded, split

from langchain_rapid import ChatRapid, create_rapid_documents_chain

QUESTION = "Who is the keeper of the lighthouse?"
PROMPT = ChatPromptTemplate.from_template("{context}\n\nAnswer in one sentence: {input}")


@pytest.fixture(scope="module")
def store(embeddings) -> Chroma:
    return Chroma.from_documents(split(), embeddings, collection_metadata={"hnsw:space": "cosine"})


@pytest.fixture
def llm(decoder) -> ChatRapid:
    return ChatRapid(decoder=decoder, max_tokens=4)


def rendered(context: str, question: str = QUESTION) -> str:
    return f"<s>[user]{context}\n\nAnswer in one sentence: {question}\n[assistant]"


def documents_behind(chunks: list[Document]) -> str:
    names = dict.fromkeys(chunk.metadata["source"] for chunk in chunks)
    return "\n\n".join(TEXTS[name] for name in names)


RETRIEVERS: dict[str, dict[str, Any]] = {
    "similarity": {"search_kwargs": {"k": 3}},
    "mmr": {"search_type": "mmr", "search_kwargs": {"k": 3, "fetch_k": 8}},
    "threshold": {
        "search_type": "similarity_score_threshold",
        "search_kwargs": {"k": 3, "score_threshold": 0.3},
    },
}


@pytest.mark.parametrize("kind", RETRIEVERS)
def test_every_retriever_of_chroma_serves(store, llm, prompts, kind):
    retriever = store.as_retriever(**RETRIEVERS[kind])
    chain = create_retrieval_chain(
        retriever, create_rapid_documents_chain(llm, PROMPT, documents=loaded())
    )
    result = chain.invoke({"input": QUESTION})
    chunks = result["context"]
    assert chunks[0].metadata["source"] == "lighthouse.txt"
    assert "Orsina Dray" in chunks[0].page_content
    assert all(chunk.id for chunk in chunks)
    assert chunks == retriever.invoke(QUESTION)
    target, draft = prompts
    assert target == rendered(documents_behind(chunks))
    assert draft == rendered("\n\n".join(chunk.page_content for chunk in chunks))


def test_a_threshold_that_nothing_reaches_opens_no_document(store, llm, prompts):
    retriever = store.as_retriever(
        search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.99}
    )
    chain = create_retrieval_chain(
        retriever,
        create_rapid_documents_chain(llm, PROMPT, documents=TEXTS),
    )
    assert chain.invoke({"input": QUESTION})["context"] == []
    assert prompts == [rendered("")]


def test_a_store_opened_again_gives_the_same_chunks(embeddings, llm, prompts, tmp_path: Path):
    folder = str(tmp_path / "chroma")
    Chroma.from_documents(split(), embeddings, persist_directory=folder)
    again = Chroma(embedding_function=embeddings, persist_directory=folder)
    grounded = ChatRapid(
        decoder=llm.decoder,
        max_tokens=4,
        retriever=again.as_retriever(search_kwargs={"k": 1}),
        documents=TEXTS,
    )
    message = grounded.invoke("Who may borrow a cello?")
    (chunk,) = message.response_metadata["rapid"]["chunks"]
    assert chunk["document_id"] == "library.txt"
    (text,) = again.get(chunk["id"])["documents"]
    assert "cello" in text
    assert LIBRARY[chunk["start_index"] :].startswith(text)
    assert LIBRARY in prompts[0]
    assert LIBRARY not in prompts[1]
    assert text in prompts[1]


@pytest.mark.usefixtures("smollm2")
def test_a_real_answer_comes_from_the_document(store):
    """The question is answered from the document, and most of what was drafted is kept."""
    llm = ChatRapid(**SMOLLM2, max_tokens=30, gamma=4)
    chain = create_retrieval_chain(
        store.as_retriever(search_kwargs={"k": 1}),
        create_rapid_documents_chain(
            llm, PROMPT, documents=TEXTS, output_parser=RunnableLambda(lambda message: message)
        ),
    )
    message = chain.invoke({"input": QUESTION})["answer"]
    assert "Orsina Dray" in message.content
    rapid = message.response_metadata["rapid"]
    assert rapid["method"] == "rapid"
    assert rapid["acceptance_ratio"] > 0.5
    assert message.usage_metadata["input_tokens"] > llm.get_num_tokens(LIGHTHOUSE)
    assert rapid["draft_prompt_tokens"] < llm.get_num_tokens(LIGHTHOUSE)
