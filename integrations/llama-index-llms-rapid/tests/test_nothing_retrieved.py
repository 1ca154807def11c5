"""What a pipeline kept back is not read: by filters, cutoffs, rerankers, or as nothing is there."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core import Document, MockEmbedding, Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.base.base_selector import SelectorResult, SingleSelection
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import QueryEngineTool
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters

from llama_index.llms.rapid import RapidLLM, RapidSynthesizer
from rapid_llm.errors import DocumentError, InvalidParameterError

SECRET = "The salary of Ada Brandt is ninety thousand crowns."
CANTEEN = "The canteen opens at nine and closes at three."
GLOBES = "Globex sells globes of every size and colour."
EMPTY = "Empty Response"


@pytest.fixture
def staff():
    return [
        Document(text=SECRET, id_="a", metadata={"tenant": "acme"}),
        Document(text=CANTEEN, id_="b", metadata={"tenant": "acme"}),
        Document(text=GLOBES, id_="c", metadata={"tenant": "globex"}),
    ]


@pytest.fixture
def index(staff):
    return VectorStoreIndex.from_documents(staff, embed_model=MockEmbedding(8))


def only(tenant):
    return MetadataFilters(filters=[MetadataFilter(key="tenant", value=tenant)])


class Nothing(BaseNodePostprocessor):
    """A reranker that finds nothing good enough."""

    def _postprocess_nodes(self, nodes, query_bundle=None):
        return []


WAYS = {
    "filter": {"filters": only("initech")},
    "cutoff": {"node_postprocessors": [SimilarityPostprocessor(similarity_cutoff=2.0)]},
    "reranker": {"node_postprocessors": [Nothing()]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_let_through_is_an_empty_response(
    index, staff, decoder, spy, way, streaming, asynchronous
):
    llm = RapidLLM(decoder=decoder, max_tokens=4)
    synthesizer = RapidSynthesizer(llm, documents=staff, streaming=streaming)
    engine = index.as_query_engine(llm=llm, response_synthesizer=synthesizer, **WAYS[way])

    async def aquery():
        response = await engine.aquery("What is the salary?")
        if streaming:
            return "".join([text async for text in response.async_response_gen()]), response
        return str(response), response

    if asynchronous:
        text, response = asyncio.run(aquery())
    else:
        response = engine.query("What is the salary?")
        text = "".join(response.response_gen) if streaming else str(response)
    assert text == EMPTY
    assert spy.prompts == []
    assert response.source_nodes == []
    assert response.metadata["rapid"] == {
        "chunk_ids": [],
        "document_ids": [],
        "draft_skipped": "the retriever returned nothing",
    }


@pytest.mark.parametrize("documents", ["one text", lambda name: "its text", {"a": "text"}, []])
def test_nothing_is_read_whatever_the_documents_are(decoder, spy, documents):
    synthesizer = RapidSynthesizer(RapidLLM(decoder=decoder), documents=documents)
    blank = [NodeWithScore(node=TextNode(text=" "))]
    assert str(synthesizer.synthesize("q", [])) == EMPTY
    assert str(synthesizer.synthesize("q", blank)) == EMPTY
    assert synthesizer.get_response("q", []) == EMPTY
    assert asyncio.run(synthesizer.aget_response("q", [])) == EMPTY
    assert spy.prompts == []


def test_an_empty_index_opens_no_document(decoder, staff, spy):
    index = VectorStoreIndex([], embed_model=MockEmbedding(8))
    llm = RapidLLM(decoder=decoder, documents=staff)
    synthesizer = RapidSynthesizer(llm, documents=staff)
    for engine in (
        index.as_query_engine(llm=llm),
        index.as_query_engine(llm=llm, response_synthesizer=synthesizer),
        index.as_chat_engine(llm=llm, chat_mode="context"),
    ):
        ask = engine.chat if hasattr(engine, "chat") else engine.query
        assert str(ask("What is the salary?")) == EMPTY
    assert spy.prompts == []


def test_all_documents_are_read_where_that_is_asked_for(index, staff, decoder, spy):
    llm = RapidLLM(decoder=decoder, max_tokens=4, on_empty="read_all")
    for synthesizer in (
        RapidSynthesizer(llm, documents=staff),
        RapidSynthesizer(RapidLLM(decoder=decoder), documents=staff, on_empty="read_all"),
    ):
        response = synthesizer.synthesize("What is the salary?", [])
        assert spy.draft() is None
        assert all(text in spy.target() for text in (SECRET, CANTEEN, GLOBES))
        report = response.metadata["rapid"]
        assert (report["method"], report["document_ids"]) == ("lc", ["a", "b", "c"])
        assert report["draft_skipped"] == "the retriever returned nothing"
    seen = len(spy.prompts)
    never = RapidSynthesizer(llm, documents=staff, on_empty="empty")
    assert str(never.synthesize("q", [])) == EMPTY
    assert len(spy.prompts) == seen


def test_a_function_cannot_list_all_documents(decoder):
    llm = RapidLLM(decoder=decoder)
    synthesizer = RapidSynthesizer(llm, documents={"a": "b"}.get, on_empty="read_all")
    with pytest.raises(DocumentError, match="a function cannot list"):
        synthesizer.synthesize("q", [])


def test_what_to_do_is_checked(decoder):
    llm = RapidLLM(decoder=decoder)
    with pytest.raises(InvalidParameterError, match="on_empty='all'"):
        RapidSynthesizer(llm, documents="x", on_empty="all")
    with pytest.raises(ValueError, match="on_empty"):
        RapidLLM(decoder=decoder, on_empty="all")


# --- something let through, and the rest kept back -----------------------------------------------

MODES = ["compact", "refine", "tree_summarize", "simple_summarize", "accumulate"]


@pytest.mark.parametrize("mode", [*MODES, "compact_accumulate"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_plain_engine_reads_only_documents_that_hold_a_passage(
    index, staff, decoder, spy, mode, asynchronous
):
    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=staff)
    engine = index.as_query_engine(
        llm=llm, filters=only("globex"), response_mode=ResponseMode(mode)
    )
    question = "What is the salary?"
    asyncio.run(engine.aquery(question)) if asynchronous else engine.query(question)
    for call in range(len(spy.prompts)):
        assert spy.target(call).count(GLOBES) == 1
        assert SECRET not in spy.target(call)
        assert CANTEEN not in spy.target(call)


@pytest.mark.parametrize("mode", ["no_text", "context_only"])
def test_modes_without_an_llm_read_no_document(index, staff, decoder, spy, mode, monkeypatch):
    llm = RapidLLM(decoder=decoder, documents=staff)
    monkeypatch.setattr(Settings, "_llm", llm)  # these modes take no other
    engine = index.as_query_engine(llm=llm, response_mode=mode, filters=only("globex"))
    assert SECRET not in str(engine.query("What?"))
    assert spy.prompts == []


@pytest.mark.parametrize("method", ["chat", "stream_chat", "achat", "astream_chat"])
@pytest.mark.parametrize(
    "mode", ["simple", "context", "condense_question", "condense_plus_context", "best"]
)
@pytest.mark.parametrize("tenant", ["globex", "initech"])
def test_no_chat_engine_reads_what_was_kept_back(index, staff, decoder, spy, mode, method, tenant):
    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=staff)
    engine = index.as_chat_engine(chat_mode=mode, llm=llm, filters=only(tenant))
    for message in ("What is the salary?", "And Ada's?"):
        if method in ("chat", "stream_chat"):
            response = getattr(engine, method)(message)
            str(response) if method == "chat" else "".join(response.response_gen)
        else:

            async def turn(text=message):
                response = await getattr(engine, method)(text)
                if method == "astream_chat":
                    return "".join([part async for part in response.async_response_gen()])
                return str(response)

            asyncio.run(turn())
    for call in range(len(spy.prompts)):
        assert SECRET not in spy.target(call)
        assert CANTEEN not in spy.target(call)
    answered = any(GLOBES in spy.target(call) for call in range(len(spy.prompts)))
    assert answered == (tenant == "globex" and mode != "simple")


def test_a_router_and_its_engines_read_what_they_retrieved(index, staff, decoder, spy, monkeypatch):
    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=staff)
    tools = [
        QueryEngineTool.from_defaults(
            index.as_query_engine(llm=llm, filters=only(name)), description=name
        )
        for name in ("globex", "initech")
    ]
    selector = LLMSingleSelector.from_defaults(llm=llm)
    for choice in (0, 1):
        result = SelectorResult(selections=[SingleSelection(index=choice, reason="")])
        monkeypatch.setattr(type(selector), "_select", lambda *_, found=result, **__: found)
        RouterQueryEngine(selector, tools, llm=llm).query("What is the salary?")
    assert [GLOBES in spy.target(call) for call in range(len(spy.prompts))] == [True]
    assert SECRET not in spy.target()


def test_metadata_that_documents_share_open_none_of_them(staff, decoder, spy):
    """Both of a tenant's documents have the line "tenant: acme"; one of them was retrieved."""
    index = SummaryIndex.from_documents(staff[1:2])
    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=staff)
    index.as_query_engine(llm=llm).query("When?")
    assert spy.target().count(CANTEEN) == 1
    assert SECRET not in spy.target()


class Fixed(BaseRetriever):
    """Finds what it is told to."""

    def __init__(self, *texts):
        super().__init__()
        self.found = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in texts]

    def _retrieve(self, query_bundle):
        return self.found


LETTER = "Dear colleague, thank you for your letter of the third of May."


@pytest.mark.parametrize(
    "passage",
    [
        "The canteen of another house opens at ten.",  # of no document
        LETTER,  # of two documents
        "is ninety",  # a few words that stand in one by chance
    ],
)
def test_a_passage_that_is_of_no_one_document_stays_as_it_is(decoder, spy, passage):
    documents = [
        Document(text=f"{LETTER} {SECRET}", id_="a"),
        Document(text=f"{LETTER} {CANTEEN}", id_="b"),
    ]
    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=documents)
    RetrieverQueryEngine.from_args(Fixed(passage), llm=llm).query("What?")
    assert passage in spy.target()
    assert SECRET not in spy.target()
    assert CANTEEN not in spy.target()
    assert spy.target() == spy.draft()


def test_a_passage_of_two_documents_is_read_where_another_opens_one(decoder, spy):
    documents = [
        Document(text=f"{LETTER}\n\n{SECRET}", id_="a"),
        Document(text=f"{LETTER}\n\n{CANTEEN}", id_="b"),
    ]
    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=documents)
    response = RetrieverQueryEngine.from_args(Fixed(CANTEEN, LETTER), llm=llm).query("What?")
    assert str(response)
    assert spy.target().count(LETTER) == spy.target().count(CANTEEN) == 1
    assert SECRET not in spy.target()


def test_one_text_is_read_only_where_it_holds_a_passage(decoder, spy):
    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=f"{CANTEEN}\n\n{SECRET}")
    RetrieverQueryEngine.from_args(Fixed(GLOBES), llm=llm).query("What?")
    assert GLOBES in spy.target()
    assert SECRET not in spy.target()
    RetrieverQueryEngine.from_args(Fixed(CANTEEN), llm=llm).query("What?")
    assert SECRET in spy.target()
    assert spy.target().count(CANTEEN) == 1


@pytest.mark.parametrize("plain", [False, True])
def test_a_document_that_quotes_another_is_not_opened_by_it(decoder, spy, plain):
    """The retrieved chunk is of a document that was not given; one that was given quotes it."""
    quoting = Document(text=f"{SECRET}\n\n{GLOBES}", id_="q", metadata={"tenant": "acme"})
    node = TextNode(text=GLOBES, metadata={"tenant": "globex"})
    if plain:
        llm = RapidLLM(decoder=decoder, max_tokens=4, documents=[quoting])
        engine = SummaryIndex([node]).as_query_engine(llm=llm)
    else:
        llm = RapidLLM(decoder=decoder, max_tokens=4)
        synthesizer = RapidSynthesizer(llm, documents=[quoting])
        engine = SummaryIndex([node]).as_query_engine(llm=llm, response_synthesizer=synthesizer)
    engine.query("What?")
    assert GLOBES in spy.target()
    assert SECRET not in spy.target()
