"""The swap: a pipeline keeps its index and retriever, and the target reads whole documents."""

from __future__ import annotations

import asyncio

import chromadb
import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.node_parser import HierarchicalNodeParser, get_leaf_nodes
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import AutoMergingRetriever
from llama_index.retrievers.bm25 import BM25Retriever
from llama_index.vector_stores.chroma import ChromaVectorStore
from pipelines import (  # noqa: F401  (fixtures)
    QUESTION,
    SPLITTER,
    Recorder,
    ask,
    context_of,
    index_fixture,
    llm_fixture,
    texts_behind,
)

from llama_index.llms.rapid import RapidLLM, RapidSynthesizer
from rapid_llm.encoding import encode_prompt

# --- pipelines, each as a function of the LLM and what the swap adds -----------------------------


def in_memory(documents, minilm, path):
    index = VectorStoreIndex.from_documents(
        documents, embed_model=minilm, transformations=[SPLITTER]
    )
    return lambda llm, **swap: index.as_query_engine(llm=llm, similarity_top_k=3, **swap)


def chroma(documents, minilm, path):
    collection = chromadb.EphemeralClient().create_collection(path.name)
    storage = StorageContext.from_defaults(vector_store=ChromaVectorStore(collection))
    index = VectorStoreIndex.from_documents(
        documents, storage_context=storage, embed_model=minilm, transformations=[SPLITTER]
    )
    return lambda llm, **swap: index.as_query_engine(llm=llm, similarity_top_k=3, **swap)


def chroma_reopened(documents, minilm, path):
    """As after a restart: no docstore, only what Chroma has kept."""
    settings = chromadb.Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(str(path / "chroma"), settings=settings)
    store = ChromaVectorStore(client.create_collection("kept"))
    VectorStoreIndex.from_documents(
        documents,
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=minilm,
        transformations=[SPLITTER],
    )
    again = chromadb.PersistentClient(str(path / "chroma"), settings=settings)
    index = VectorStoreIndex.from_vector_store(
        ChromaVectorStore(again.get_collection("kept")), embed_model=minilm
    )
    return lambda llm, **swap: index.as_query_engine(llm=llm, similarity_top_k=3, **swap)


def bm25(documents, minilm, path):
    nodes = SPLITTER.get_nodes_from_documents(documents)
    retriever = BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=3)
    return lambda llm, **swap: RetrieverQueryEngine.from_args(retriever, llm=llm, **swap)


def auto_merging(documents, minilm, path):
    parser = HierarchicalNodeParser.from_defaults(chunk_sizes=[96, 48], chunk_overlap=0)
    nodes = parser.get_nodes_from_documents(documents)
    storage = StorageContext.from_defaults()
    storage.docstore.add_documents(nodes)
    index = VectorStoreIndex(get_leaf_nodes(nodes), storage_context=storage, embed_model=minilm)
    retriever = AutoMergingRetriever(
        index.as_retriever(similarity_top_k=5), storage, simple_ratio_thresh=0.4
    )
    return lambda llm, **swap: RetrieverQueryEngine.from_args(retriever, llm=llm, **swap)


@pytest.fixture(params=[in_memory, chroma, chroma_reopened, bm25, auto_merging])
def pipeline(request, documents, minilm, tmp_path):
    return request.param(documents, minilm, tmp_path)


# --- RapidSynthesizer ----------------------------------------------------------------------------


def test_swapping_the_llm_changes_only_the_target_prompt(pipeline, llm, documents, spy):
    recorder = Recorder()
    before = pipeline(recorder)
    after = pipeline(llm, response_synthesizer=RapidSynthesizer(llm, documents=documents))

    old, new = before.query(QUESTION), after.query(QUESTION)

    tokenizer = llm.decoder.tokenizer
    (messages,) = recorder.seen
    assert spy.draft_ids() == encode_prompt(messages, tokenizer)
    chunks, full = context_of(old.source_nodes), texts_behind(old.source_nodes, documents)
    assert chunks
    assert full not in spy.draft()
    for message in messages:
        message["content"] = message["content"].replace(chunks, full)
    assert spy.target_ids() == encode_prompt(messages, tokenizer)

    assert len(spy.prompts) == 1
    assert new.source_nodes == old.source_nodes
    report = new.metadata.pop("rapid")
    assert new.metadata == old.metadata
    assert all(new.metadata[n.node_id]["title"] for n in new.source_nodes)
    assert report["method"] == "rapid"
    assert report["chunk_ids"] == [n.node_id for n in new.source_nodes]
    assert report["document_ids"] == sorted({n.node.ref_doc_id for n in old.source_nodes})
    assert report["prompt_tokens"] == len(spy.target_ids())
    assert report["draft_prompt_tokens"] == len(spy.draft_ids())


def test_auto_merging_has_merged(documents, minilm, tmp_path, llm):
    engine = auto_merging(documents, minilm, tmp_path)(
        llm, response_synthesizer=RapidSynthesizer(llm, documents=documents)
    )
    nodes = engine.query(QUESTION).source_nodes
    assert any(n.node.child_nodes for n in nodes)


def test_the_real_model_answers_from_the_document(smollm2, documents, minilm, tmp_path):
    llm = RapidLLM(decoder=smollm2, max_tokens=24, gamma=4)
    engine = chroma(documents, minilm, tmp_path)(
        llm, response_synthesizer=RapidSynthesizer(llm, documents=documents)
    )
    response = engine.query("What is the name of the ferry?")
    assert "Freya" in str(response)
    assert response.metadata["rapid"]["accepted_tokens"] > 0


def test_streaming_gives_the_same_answer_and_sources(index, llm, documents):
    whole = ask(index, llm, documents)
    streamed = ask(index, llm, documents, streaming=True)
    pieces = list(streamed.response_gen)
    assert "".join(pieces) == str(whole)
    assert len(pieces) == whole.metadata["rapid"]["rounds"]
    assert streamed.source_nodes == whole.source_nodes
    report = streamed.metadata["rapid"]  # filled while it streamed
    assert report["completion_tokens"] == whole.metadata["rapid"]["completion_tokens"]


def test_async_queries_give_the_same_answer(index, llm, documents):
    whole = ask(index, llm, documents)

    async def query(streaming):
        synthesizer = RapidSynthesizer(llm, documents=documents, streaming=streaming)
        engine = index.as_query_engine(
            llm=llm, similarity_top_k=2, response_synthesizer=synthesizer
        )
        response = await engine.aquery(QUESTION)
        if streaming:
            return "".join([text async for text in response.async_response_gen()]), response
        return str(response), response

    for streaming in (False, True):
        text, response = asyncio.run(query(streaming))
        assert text == str(whole)
        assert response.source_nodes == whole.source_nodes
        assert response.metadata["rapid"]["chunk_ids"] == whole.metadata["rapid"]["chunk_ids"]


def test_concurrent_queries_give_the_answers_that_they_give_alone(index, llm, documents):
    questions = [QUESTION, "What is the ferry called?", "Who planted the mulberry?"]
    alone = [ask(index, llm, documents, question) for question in questions]
    synthesizer = RapidSynthesizer(llm, documents=documents)
    engine = index.as_query_engine(llm=llm, response_synthesizer=synthesizer)

    async def together():
        return await asyncio.gather(*map(engine.aquery, questions))

    for one, other in zip(alone, asyncio.run(together()), strict=True):
        assert str(one) == str(other)
        assert one.metadata["rapid"]["chunk_ids"] == other.metadata["rapid"]["chunk_ids"]


def test_the_event_loop_stays_free_during_a_query(index, llm, documents, slow_passes):
    engine = index.as_query_engine(
        llm=llm, response_synthesizer=RapidSynthesizer(llm, documents=documents)
    )

    async def main():
        task, ticks = asyncio.ensure_future(engine.aquery(QUESTION)), 0
        while not task.done():
            ticks += 1
            await asyncio.sleep(0.001)
        return ticks

    assert asyncio.run(main()) > 2 * len(slow_passes)
