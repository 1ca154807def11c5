"""What a pipeline kept back is not read: nothing found, and documents that hold no found chunk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_classic.retrievers import (
    ContextualCompressionRetriever,
    EnsembleRetriever,
    MultiQueryRetriever,
    ParentDocumentRetriever,
)
from langchain_classic.storage import InMemoryStore
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_text_splitters import CharacterTextSplitter
from pydantic import ValidationError
from rapid_llm.errors import DocumentError, InvalidParameterError

from langchain_rapid import ChatRapid, RapidLLM, create_rapid_documents_chain

SECRET = "Ada earns ninety thousand."
TEXTS = {"a": SECRET, "b": "The canteen opens at nine. It closes at two."}
PROMPT = ChatPromptTemplate.from_template("Context: {context}\nQuestion: {input}")
TEXT_PROMPT = PromptTemplate.from_template("Context: {context}\nQuestion: {input}")
EMPTY = "<s>[user]Context: \nQuestion: When?\n[assistant]"
CANTEEN = Document("It closes at two.", metadata={"source": "b"})


def finds(*chunks: Document) -> Runnable[str, list[Document]]:
    return RunnableLambda(lambda question: list(chunks))


Call = Callable[[Runnable[Any, Any], Any], Awaitable[Any]]


async def _invoke(chain: Runnable[Any, Any], given: Any) -> Any:
    return chain.invoke(given)


async def _ainvoke(chain: Runnable[Any, Any], given: Any) -> Any:
    return await chain.ainvoke(given)


async def _stream(chain: Runnable[Any, Any], given: Any) -> Any:
    return list(chain.stream(given))


async def _astream(chain: Runnable[Any, Any], given: Any) -> Any:
    return [piece async for piece in chain.astream(given)]


async def _batch(chain: Runnable[Any, Any], given: Any) -> Any:
    return chain.batch([given])


WAYS = pytest.mark.parametrize("call", [_invoke, _ainvoke, _stream, _astream, _batch])


@WAYS
async def test_the_chain_formats_an_empty_context(decoder, prompts, call: Call):
    chain = create_rapid_documents_chain(
        ChatRapid(decoder=decoder, max_tokens=2), PROMPT, documents=TEXTS
    )
    await call(chain, {"context": [], "input": "When?"})
    assert prompts == [EMPTY]


@WAYS
async def test_a_retrieving_model_reads_its_question_alone(decoder, prompts, call: Call):
    for kind in (ChatRapid, RapidLLM):
        prompts.clear()
        llm = kind(decoder=decoder, max_tokens=2, retriever=finds(), documents=TEXTS)
        await call(llm, "When?")
        (target,) = prompts
        assert SECRET not in target
        assert "Answer the question using only the text above.\n\nQuestion: When?" in target


def test_a_completion_model_in_a_chain_formats_an_empty_context(decoder, prompts):
    llm = RapidLLM(decoder=decoder, max_tokens=2)
    chain = create_rapid_documents_chain(llm, TEXT_PROMPT, documents=TEXTS)
    chain.invoke({"context": [], "input": "When?"})
    assert prompts == ["<s>Context: \nQuestion: When?"]


@WAYS
async def test_every_document_is_read_where_that_was_asked_for(decoder, prompts, call: Call):
    everything = "\n\n".join(TEXTS.values())
    llm = ChatRapid(decoder=decoder, max_tokens=2)
    chain = create_rapid_documents_chain(llm, PROMPT, documents=TEXTS, on_empty="read_all")
    await call(chain, {"context": [], "input": "When?"})
    (target,) = prompts
    assert target == f"<s>[user]Context: {everything}\nQuestion: When?\n[assistant]"
    for kind in (ChatRapid, RapidLLM):
        prompts.clear()
        asked = kind(
            decoder=decoder,
            max_tokens=2,
            retriever=finds(),
            documents=TEXTS,
            on_empty="read_all",
        )
        await call(asked, "When?")
        (target,) = prompts
        assert f"{everything}\n\nAnswer the question" in target


@pytest.mark.parametrize("on_empty", ["empty", "read_all"])
def test_the_answer_says_that_nothing_was_retrieved(decoder, on_empty):
    as_it_is = RunnableLambda(lambda message: message)
    llm = ChatRapid(decoder=decoder, max_tokens=2)
    chain = create_rapid_documents_chain(
        llm, PROMPT, documents=TEXTS, output_parser=as_it_is, on_empty=on_empty
    )
    asked = ChatRapid(
        decoder=decoder, max_tokens=2, retriever=finds(), documents=TEXTS, on_empty=on_empty
    )
    for message in (chain.invoke({"context": [], "input": "When?"}), asked.invoke("When?")):
        rapid = message.response_metadata["rapid"]
        assert (rapid["method"], rapid["drafted_tokens"], rapid["chunks"]) == ("lc", 0, [])
        assert rapid["draft_skipped"] == "the retriever returned nothing"


def test_blank_chunks_are_nothing(decoder, prompts):
    chain = create_rapid_documents_chain(
        ChatRapid(decoder=decoder, max_tokens=2), PROMPT, documents=TEXTS
    )
    chain.invoke({"context": [Document(" \n", metadata={"source": "a"})], "input": "When?"})
    assert prompts == [EMPTY]


def test_a_single_text_is_not_read_either(decoder, prompts):
    for documents in (SECRET, [Document(SECRET)], lambda name: SECRET):
        llm = ChatRapid(decoder=decoder, max_tokens=2, retriever=finds(), documents=documents)
        llm.invoke("When?")
    assert not any(SECRET in prompt for prompt in prompts)


def test_what_cannot_be_listed_cannot_be_read_whole(decoder):
    llm = ChatRapid(decoder=decoder, max_tokens=2)
    chain = create_rapid_documents_chain(llm, PROMPT, documents=TEXTS.get, on_empty="read_all")
    with pytest.raises(DocumentError, match="on_empty='read_all' cannot list"):
        chain.invoke({"context": [], "input": "When?"})


def test_another_choice_is_refused_at_once(decoder):
    with pytest.raises(ValidationError, match="on_empty"):
        ChatRapid(decoder=decoder, on_empty="all")
    with pytest.raises(InvalidParameterError, match="on_empty='all'"):
        create_rapid_documents_chain(
            ChatRapid(decoder=decoder),
            PROMPT,
            documents=TEXTS,
            on_empty="all",  # type: ignore[arg-type]
        )


def test_a_corpus_beyond_the_window_does_not_matter_where_nothing_was_found(decoder):
    big = {f"d{i}": f"text {i} " * 60 for i in range(8)}
    llm = ChatRapid(decoder=decoder, max_tokens=2, retriever=finds(), documents=big)
    assert llm.invoke("When?").content


# --- retrievers of all kinds -------------------------------------------------------------------


class Keeps(BaseDocumentCompressor):
    """Keeps what holds a word, and of it only the sentences that do."""

    word: str

    def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> Any:
        found = []
        for document in documents:
            kept = [s for s in document.page_content.split(". ") if self.word in s]
            if kept:
                found.append(Document("; ".join(kept), metadata=document.metadata))
        return found


def stored(texts: dict[str, str]) -> InMemoryVectorStore:
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store.add_documents([Document(text, metadata={"source": k}) for k, text in texts.items()])
    return store


def of_b(document: Document) -> bool:
    return document.metadata["source"] == "b"


def retrievers(word: str, only: Callable[[Document], bool]) -> dict[str, Runnable[str, Any]]:
    store = stored(TEXTS)
    base = store.as_retriever(search_kwargs={"filter": only})
    parents = ParentDocumentRetriever(
        vectorstore=InMemoryVectorStore(DeterministicFakeEmbedding(size=8)),
        docstore=InMemoryStore(),
        child_splitter=CharacterTextSplitter(chunk_size=10, chunk_overlap=0, separator=" "),
        search_kwargs={"filter": only},
    )
    parents.add_documents([Document(text, metadata={"source": k}) for k, text in TEXTS.items()])
    ask = FakeListChatModel(responses=["What?\nWhich?"])
    return {
        "filter": base,
        "compression": ContextualCompressionRetriever(
            base_compressor=Keeps(word=word), base_retriever=base
        ),
        "ensemble": EnsembleRetriever(retrievers=[base, base]),
        "several questions": MultiQueryRetriever.from_llm(base, ask),
        "parents": parents,
        "expression": base | RunnableLambda(lambda chunks: chunks[:2]),
    }


KINDS = list(retrievers("", of_b))


def chained(retriever: Runnable[str, Any], answer: Runnable[Any, Any]) -> Runnable[Any, Any]:
    if not isinstance(retriever, BaseRetriever):  # only those are given the question alone
        return create_retrieval_chain(RunnableLambda(lambda x: x["input"]) | retriever, answer)
    return create_retrieval_chain(retriever, answer)


@pytest.mark.parametrize("kind", KINDS)
def test_only_documents_that_hold_a_found_chunk_are_read(decoder, prompts, kind):
    retriever = retrievers("closes", of_b)[kind]
    llm = ChatRapid(decoder=decoder, max_tokens=2)
    answer = create_rapid_documents_chain(llm, PROMPT, documents=TEXTS)
    assert chained(retriever, answer).invoke({"input": "When?"})["context"]
    ({"context": retriever, "input": RunnablePassthrough()} | answer).invoke("When?")
    ChatRapid(decoder=decoder, max_tokens=2, retriever=retriever, documents=TEXTS).invoke("When?")
    assert len(prompts) == 6
    assert not any(SECRET in prompt for prompt in prompts)
    assert all(TEXTS["b"] in target for target in prompts[::2])


@pytest.mark.parametrize("kind", KINDS)
def test_no_document_is_read_where_no_chunk_passes(decoder, prompts, kind):
    retriever = retrievers("closes", lambda document: False)[kind]
    llm = ChatRapid(decoder=decoder, max_tokens=2)
    answer = create_rapid_documents_chain(llm, PROMPT, documents=TEXTS)
    assert chained(retriever, answer).invoke({"input": "When?"})["context"] == []
    ({"context": retriever, "input": RunnablePassthrough()} | answer).invoke("When?")
    ChatRapid(decoder=decoder, max_tokens=2, retriever=retriever, documents=TEXTS).invoke("When?")
    assert prompts[:2] == [EMPTY, EMPTY]
    assert len(prompts) == 3
    assert SECRET not in prompts[2]


def test_an_empty_index_opens_no_document(decoder, prompts):
    empty = InMemoryVectorStore(DeterministicFakeEmbedding(size=8)).as_retriever()
    ChatRapid(decoder=decoder, max_tokens=2, retriever=empty, documents=TEXTS).invoke("When?")
    assert not any(text in prompts[0] for text in TEXTS.values())


def test_a_question_rewritten_from_the_history_opens_the_document_it_finds(decoder, prompts):
    ask = FakeListChatModel(responses=["When does the canteen open?"])
    rewrite = ChatPromptTemplate.from_messages([("placeholder", "{chat_history}"), "{input}"])
    retriever = create_history_aware_retriever(ask, finds(CANTEEN), rewrite)
    answer = create_rapid_documents_chain(
        ChatRapid(decoder=decoder, max_tokens=2), PROMPT, documents=TEXTS
    )
    history = [HumanMessage("A canteen?"), AIMessage("Yes.")]
    create_retrieval_chain(retriever, answer).invoke({"input": "When?", "chat_history": history})
    target, draft = prompts
    assert TEXTS["b"] in target
    assert TEXTS["b"] not in draft
    assert CANTEEN.page_content in draft
    assert SECRET not in target + draft


@pytest.mark.parametrize("found", [None, "text", ["text"], [("chunk", 0.5)]])
def test_what_is_no_list_of_documents_is_told_so(decoder, found):
    llm = ChatRapid(
        decoder=decoder, max_tokens=2, retriever=RunnableLambda(lambda q: found), documents=TEXTS
    )
    with pytest.raises(DocumentError, match="must return a list of Document"):
        llm.invoke("When?")
