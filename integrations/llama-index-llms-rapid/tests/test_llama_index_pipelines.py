"""The swap: a pipeline keeps its index and retriever, and the target reads whole documents."""

from __future__ import annotations

import asyncio
from typing import Any

import chromadb
import pytest
from llama_index.core import Document, Settings, StorageContext, SummaryIndex, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LLMMetadata
from llama_index.core.bridge.pydantic import Field
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.llama_debug import LlamaDebugHandler
from llama_index.core.callbacks.schema import CBEventType
from llama_index.core.llms import CustomLLM, MockLLM
from llama_index.core.node_parser import HierarchicalNodeParser, SentenceSplitter, get_leaf_nodes
from llama_index.core.postprocessor import LLMRerank, SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate, RichPromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.retrievers import AutoMergingRetriever, BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.retrievers.bm25 import BM25Retriever
from llama_index.vector_stores.chroma import ChromaVectorStore

from llama_index.llms.rapid import PipelineError, RapidLLM, RapidSynthesizer
from rapid_llm.encoding import encode_prompt
from rapid_llm.errors import ContextWindowError, DocumentError, InvalidParameterError

QUESTION = "Who kept a diary of storms at the lighthouse?"
SPLITTER = SentenceSplitter(chunk_size=64, chunk_overlap=0, paragraph_separator="\n\n")
QA = PromptTemplate("Text: {context_str}\nQuestion: {query_str}\nAnswer:")


class Recorder(CustomLLM):
    """The LLM of the pipeline before the swap: remembers the messages it is sent."""

    seen: list[Any] = Field(default_factory=list)

    @property
    def metadata(self):
        return LLMMetadata(context_window=16384, is_chat_model=True)

    def chat(self, messages, **kwargs):
        self.seen.append([{"role": m.role.value, "content": m.content} for m in messages])
        return ChatResponse(message=ChatMessage(role="assistant", content="?"))

    def complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError

    stream_complete = complete


def shown(document):
    """A document as the target reads it."""
    return document.get_content(metadata_mode=MetadataMode.LLM)


def context_of(nodes):
    return "\n\n".join(n.node.get_content(metadata_mode=MetadataMode.LLM) for n in nodes)


def by_id(documents):
    return {document.id_: document for document in documents}


def texts_behind(nodes, documents):
    """The documents of nodes, in the order of their ids."""
    names = sorted({scored.node.ref_doc_id for scored in nodes})
    return "\n\n".join(shown(by_id(documents)[name]) for name in names)


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


@pytest.fixture
def llm(decoder):
    return RapidLLM(decoder=decoder, max_tokens=8, gamma=3)


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


@pytest.fixture
def index(documents, minilm):
    return VectorStoreIndex.from_documents(
        documents, embed_model=minilm, transformations=[SPLITTER]
    )


def ask(index, llm, documents, question=QUESTION, top_k=2, **options):
    swap = {"response_synthesizer": RapidSynthesizer(llm, documents=documents, **options)}
    return index.as_query_engine(llm=llm, similarity_top_k=top_k, **swap).query(question)


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


def forms(documents):
    """The same documents in every form that ``documents=`` takes."""
    store = SimpleDocumentStore()
    store.add_documents(documents)
    mapping = by_id(documents)
    return {
        "list": documents,
        "mapping of documents": mapping,
        "mapping of texts": {name: shown(document) for name, document in mapping.items()},
        "docstore": store,
        "function": lambda name: shown(mapping[name]),
        "function giving documents": mapping.get,
    }


@pytest.mark.parametrize("form", forms([Document(text="x")]))
def test_documents_are_read_in_every_form(index, llm, documents, spy, form):
    nodes = ask(index, llm, forms(documents)[form]).source_nodes
    assert texts_behind(nodes, documents) in spy.target()


def test_one_text_takes_the_place_of_whatever_was_retrieved(index, llm, spy):
    response = ask(index, llm, "The whole of it.", text_qa_template=QA)
    assert "Text: The whole of it.\nQuestion: Who" in spy.target()
    assert f"Text: {context_of(response.source_nodes)}\n" in spy.draft()
    assert response.metadata["rapid"]["document_ids"] == []


def test_several_documents_come_whole_and_in_order(index, llm, documents, spy):
    nodes = ask(index, llm, documents, "What can visitors of Karsholm see?", top_k=7).source_nodes
    names = sorted({n.node.ref_doc_id for n in nodes})
    assert len(names) == 3
    assert "\n\n".join(shown(by_id(documents)[name]) for name in names) in spy.target()


def test_ones_own_template_makes_both_prompts(index, llm, documents, spy):
    engine = index.as_query_engine(
        llm=llm, response_synthesizer=RapidSynthesizer(llm, documents=documents)
    )
    chat = ChatPromptTemplate.from_messages(
        [("system", "Read {context_str}"), ("user", "{query_str}")]
    )
    engine.update_prompts({"response_synthesizer:text_qa_template": chat})
    assert engine.get_prompts()["response_synthesizer:text_qa_template"] == chat
    nodes = engine.query(QUESTION).source_nodes
    for seen, text in (
        (spy.target(), texts_behind(nodes, documents)),
        (spy.draft(), context_of(nodes)),
    ):
        assert seen == f"<s><|system>Read {text}\n<|user>{QUESTION}\n<|assistant>"


def test_a_model_without_a_chat_template_reads_plain_text(index, documents, make_decoder, spy):
    llm = RapidLLM(decoder=make_decoder(chat=False), max_tokens=4)
    nodes = ask(index, llm, documents, text_qa_template=QA).source_nodes
    end = f"\nQuestion: {QUESTION}\nAnswer:"
    assert spy.target() == f"<s>Text: {texts_behind(nodes, documents)}{end}"
    assert spy.draft() == f"<s>Text: {context_of(nodes)}{end}"


class Reversed(BaseNodePostprocessor):
    """A reranker of sorts."""

    def _postprocess_nodes(self, nodes, query_bundle=None):
        return nodes[::-1]


def test_the_nodes_are_those_that_the_postprocessors_leave(index, llm, documents, spy):
    everything = ask(index, llm, documents, top_k=4).source_nodes
    cutoff = everything[1].score
    engine = index.as_query_engine(
        llm=llm,
        similarity_top_k=4,
        node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=cutoff), Reversed()],
        response_synthesizer=RapidSynthesizer(llm, documents=documents, text_qa_template=QA),
    )
    nodes = engine.query(QUESTION).source_nodes
    assert [n.node_id for n in nodes] == [n.node_id for n in everything[1::-1]]
    assert f"Text: {context_of(nodes)}\n" in spy.draft()


# --- retrievers that find nothing, the same twice, or fail ---------------------------------------


class Fixed(BaseRetriever):
    """Finds what it is told to."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def _retrieve(self, query_bundle):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def engine_over(found, llm, documents, **options):
    synthesizer = RapidSynthesizer(llm, documents=documents, text_qa_template=QA, **options)
    return RetrieverQueryEngine.from_args(Fixed(found), llm=llm, response_synthesizer=synthesizer)


def test_repeated_nodes_count_once_for_the_drafter(llm, documents, spy):
    nodes = SPLITTER.get_nodes_from_documents(documents)[:2]
    twice = [NodeWithScore(node=node, score=0.5) for node in (*nodes, *nodes)]
    synthesizer = RapidSynthesizer(llm, documents=documents, text_qa_template=QA)
    response = synthesizer.synthesize(QUESTION, twice)
    assert f"Text: {context_of(twice[:2])}\nQuestion" in spy.draft()
    assert f"Text: {shown(documents[0])}\nQuestion" in spy.target()
    assert response.metadata["rapid"]["chunk_ids"] == [node.node_id for node in nodes]
    assert response.source_nodes == twice


def test_a_retriever_that_fails_is_heard(llm, documents, spy):
    error = ConnectionError("the store is down")
    with pytest.raises(ConnectionError, match="the store is down"):
        engine_over(error, llm, documents).query(QUESTION)
    assert not spy.prompts


def test_nodes_that_are_whole_documents_are_read(documents, llm, spy):
    """Indexed without a splitter: they have no ``ref_doc_id``."""
    index = SummaryIndex(nodes=documents)
    for source in (documents, {"some": "other"}):
        synthesizer = RapidSynthesizer(llm, documents=source, text_qa_template=QA)
        engine = index.as_query_engine(llm=llm, response_synthesizer=synthesizer)
        report = engine.query(QUESTION).metadata["rapid"]
        in_order = sorted(documents, key=lambda document: document.id_)
        assert "\n\n".join(map(shown, in_order)) in spy.target()
        assert report["document_ids"] == ["ferry", "garden", "lighthouse"]


def test_a_missing_document_is_named(llm, documents, index):
    with pytest.raises(DocumentError, match=r"'lighthouse'.*not among the documents"):
        ask(index, llm, documents[1:])
    with pytest.raises(DocumentError, match=r"chunks of document 'lighthouse'.*add_documents"):
        ask(index, llm, index.docstore)


# --- the window ----------------------------------------------------------------------------------


def test_documents_too_long_are_refused_or_cut_never_refined(index, documents, make_decoder, spy):
    llm = RapidLLM(decoder=make_decoder(window=900), max_tokens=50)
    with pytest.raises(ContextWindowError, match=r"prompt of \d+ tokens.*=50.*900.*truncate"):
        ask(index, llm, documents, text_qa_template=QA)
    llm.truncate = "middle"
    nodes = ask(index, llm, documents, top_k=1, text_qa_template=QA).source_nodes
    assert len(spy.prompts) == 1
    assert len(spy.target_ids()) == 850
    full = texts_behind(nodes, documents)
    assert spy.target().startswith("<s><|user>Text: " + full[:100])
    assert nodes[0].node.text in spy.target()
    assert full[-100:] + "\nQuestion: " in spy.target()
    assert f"Text: {context_of(nodes)}\n" in spy.draft()


# --- traces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_traces_hold_the_retrieved_text_only(index, decoder, documents, trace, streaming):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm = RapidLLM(decoder=decoder, max_tokens=8)
    synthesizer = RapidSynthesizer(
        llm,
        documents=documents,
        streaming=streaming,
        callback_manager=CallbackManager([debug]),
    )
    retriever = index.as_retriever(similarity_top_k=1)
    response = RetrieverQueryEngine(retriever, synthesizer).query(QUESTION)
    if streaming:
        list(response.response_gen)
    (node,) = response.source_nodes
    document = by_id(documents)[node.node.ref_doc_id]
    chunk, elsewhere = node.text, document.text[-60:]
    assert elsewhere not in chunk

    dumped = [str(event.model_dump()) for event in trace.events]
    dumped += [event.model_dump_json() for event in trace.events if "LLMChat" in str(type(event))]
    payloads = [str(event.payload) for event in debug.get_events()]
    spans = [str(arguments) for _, arguments in trace.spans]
    for text in (*dumped, *payloads, *spans):
        assert elsewhere not in text
    assert any(chunk in text for text in dumped)
    assert any(chunk in text for text in payloads)

    names = [event.class_name() for event in trace.events]
    for expected in ("SynthesizeStartEvent", "LLMPredictStartEvent", "SynthesizeEndEvent"):
        assert names.count(expected) == 1
    assert len(debug.get_event_pairs(CBEventType.SYNTHESIZE)) == 1
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 1
    assert "RapidSynthesizer.synthesize" in trace.span_names


# --- a query engine with nothing changed but the LLM ---------------------------------------------

WHOLE = "The document begins. " + "It goes on for a while. " * 20 + "It ends here."


def whole(context):
    """The documents of an LLM: whatever was retrieved is from this one."""
    return WHOLE


MODES = ["compact", "refine", "tree_summarize", "simple_summarize", "accumulate"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_target_reads_the_document_in_every_response_mode(
    index, decoder, spy, mode, asynchronous
):
    recorder = Recorder()
    llm = RapidLLM(decoder=decoder, max_tokens=8, documents=whole)
    options = {"similarity_top_k": 2, "response_mode": ResponseMode(mode)}
    old = index.as_query_engine(llm=recorder, **options).query(QUESTION)
    engine = index.as_query_engine(llm=llm, **options)
    new = asyncio.run(engine.aquery(QUESTION)) if asynchronous else engine.query(QUESTION)

    assert new.source_nodes == old.source_nodes
    assert len(spy.prompts) == len(recorder.seen) == (2 if mode in ("refine", "accumulate") else 1)
    chunks = [n.node.get_content(metadata_mode=MetadataMode.LLM) for n in new.source_nodes]
    for call in range(len(spy.prompts)):
        found = [chunk for chunk in chunks if chunk in spy.draft(call)]
        assert len(found) == (1 if mode in ("refine", "accumulate") else 2)
        assert spy.target(call).count(WHOLE) == 1
        assert WHOLE not in spy.draft(call)
        assert QUESTION in spy.target(call)
        assert QUESTION in spy.draft(call)
        joined = ("\n" if mode == "simple_summarize" else "\n\n").join(found)
        # The two prompts differ in nothing else.
        assert spy.target(call).replace(WHOLE, "") == spy.draft(call).replace(joined, "")
    assert "Empty Response" not in str(new)


@pytest.mark.parametrize(
    "template",
    [
        QA,
        RichPromptTemplate("Text: {{ context_str }}\nQuestion: {{ query_str }}\nAnswer:"),
        PromptTemplate(
            "Text: {text}\nQuestion: {q}\nAnswer:",
            template_var_mappings={"context_str": "text", "query_str": "q"},
        ),
        PromptTemplate(
            "Text: {context_str}\nQuestion: {query_str}\nAnswer:",
            function_mappings={"context_str": lambda **given: given["context_str"].upper()},
        ),
    ],
    ids=["plain", "jinja", "mapped", "function"],
)
def test_every_kind_of_template_is_filled_twice(index, decoder, spy, template):
    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=whole)
    engine = index.as_query_engine(llm=llm, similarity_top_k=1, text_qa_template=template)
    nodes = engine.query(QUESTION).source_nodes
    form = str.upper if template.function_mappings else str
    end = f"\nQuestion: {QUESTION}\nAnswer:"
    assert f"Text: {form(WHOLE)}{end}" in spy.target()
    assert f"Text: {form(context_of(nodes))}{end}" in spy.draft()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_query_engine_streams_its_answer(index, decoder, spy, asynchronous):
    llm = RapidLLM(decoder=decoder, max_tokens=8, documents=whole)
    expected = str(index.as_query_engine(llm=llm).query(QUESTION))
    engine = index.as_query_engine(llm=llm, streaming=True)

    async def collect():
        response = await engine.aquery(QUESTION)
        return "".join([text async for text in response.async_response_gen()])

    text = asyncio.run(collect()) if asynchronous else "".join(engine.query(QUESTION).response_gen)
    assert text == expected
    assert WHOLE in spy.target()


def test_the_answers_so_far_are_in_both_prompts_when_refining(index, decoder, spy):
    llm = RapidLLM(decoder=decoder, max_tokens=8, documents=whole)
    index.as_query_engine(llm=llm, response_mode="refine").query(QUESTION)
    first = llm.decoder.generate(*spy.prompts[0], sampling=llm._options({}).sampling).text
    assert first in spy.target(1)
    assert first in spy.draft(1)


def test_what_a_function_gives_is_read(index, decoder, documents, spy):
    asked = []

    def document_for(context):
        asked.append(context)
        return next(document for document in documents if document.metadata["title"] in context)

    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=document_for)
    response = index.as_query_engine(llm=llm, similarity_top_k=1).query(QUESTION)
    assert asked == [context_of(response.source_nodes)]
    assert shown(documents[0]) in spy.target()
    assert shown(documents[1]) not in spy.target()


@pytest.mark.parametrize("mode", MODES)
def test_errors_are_not_swallowed(index, documents, make_decoder, mode):
    llm = RapidLLM(
        decoder=make_decoder(window=2500), max_tokens=64, documents=lambda context: "word " * 1000
    )
    with pytest.raises(PipelineError, match=r"prompt of \d+ tokens.*=64.*2500") as caught:
        index.as_query_engine(llm=llm, response_mode=mode).query(QUESTION)
    assert isinstance(caught.value.__cause__, ContextWindowError)
    llm = RapidLLM(decoder=llm.decoder, documents=lambda context: None)
    with pytest.raises(PipelineError, match="returned None"):
        index.as_query_engine(llm=llm, response_mode=mode).query(QUESTION)


def test_the_document_may_be_cut(index, make_decoder, spy):
    llm = RapidLLM(
        decoder=make_decoder(window=2500),
        max_tokens=64,
        documents=lambda context: WHOLE * 10,
        truncate="middle",
    )
    index.as_query_engine(llm=llm).query(QUESTION)
    assert len(spy.prompts) == 1
    assert len(spy.target_ids()) == 2500 - 64


@pytest.mark.parametrize("chat", [False, True])
def test_other_calls_of_the_pipeline_keep_their_text(index, make_decoder, spy, chat):
    """A reranker asks the same LLM, with a ``context_str`` of its own if it is no chat model."""
    llm = RapidLLM(decoder=make_decoder(chat=chat), max_tokens=4, documents=whole)
    reranker = LLMRerank(
        llm=llm, top_n=1, parse_choice_select_answer_fn=lambda answer, count: ([1], [1.0])
    )
    engine = index.as_query_engine(llm=llm, node_postprocessors=[reranker])
    engine.query(QUESTION)
    assert "relevance" in spy.target(0)
    assert WHOLE not in spy.target(0)
    assert spy.draft(0) is None
    assert WHOLE in spy.target(1)


def test_without_documents_the_pipeline_decodes_plainly(index, decoder, spy):
    recorder = Recorder()
    index.as_query_engine(llm=recorder).query(QUESTION)
    index.as_query_engine(llm=RapidLLM(decoder=decoder, max_tokens=4)).query(QUESTION)
    assert spy.target_ids() == encode_prompt(recorder.seen[0], decoder.tokenizer)
    assert spy.draft() is None


# --- chat engines --------------------------------------------------------------------------------


def chats(engine, message, method):
    if method == "chat":
        return str(engine.chat(message))
    if method == "stream_chat":
        return "".join(engine.stream_chat(message).response_gen)

    async def collect():
        response = await getattr(engine, method)(message)
        if method == "achat":
            return str(response)
        return "".join([text async for text in response.async_response_gen()])

    return asyncio.run(collect())


@pytest.mark.parametrize("method", ["chat", "stream_chat", "achat", "astream_chat"])
@pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
def test_chat_engines_have_the_history_in_both_prompts(index, decoder, spy, mode, method):
    llm = RapidLLM(decoder=decoder, max_tokens=8, documents=whole)
    history = [
        ChatMessage(role="user", content="Is there a lighthouse?"),
        ChatMessage(role="assistant", content="Yes, at Karsholm."),
    ]
    engine = index.as_chat_engine(
        chat_mode=mode, llm=llm, similarity_top_k=1, chat_history=history, system_prompt="Be kind."
    )
    answer = chats(engine, "Who kept it?", method)
    assert answer
    assert len(spy.prompts) == (1 if mode == "context" else 2)
    if mode == "condense_plus_context":
        assert "Yes, at Karsholm." in spy.target(0)
        assert spy.draft(0) is None
    for prompt in (spy.target(), spy.draft()):
        assert "Be kind." in prompt
        assert prompt.endswith(
            "<|user>Is there a lighthouse?\n<|assistant>Yes, at Karsholm.\n<|user>Who kept it?\n"
            "<|assistant>"
        )
    assert WHOLE in spy.target()
    assert WHOLE not in spy.draft()
    assert "Karsholm" in spy.draft()
    assert [message.content for message in engine.chat_history][-1] == answer


# --- the synthesizer itself ----------------------------------------------------------------------


def test_the_synthesizer_checks_its_arguments(decoder, llm):
    with pytest.raises(InvalidParameterError, match="MockLLM is not allowed"):
        RapidSynthesizer(MockLLM(), documents="x")
    with pytest.raises(InvalidParameterError, match=r"documents\[0\] of type str is not allowed"):
        RapidSynthesizer(llm, documents=["no", "ids"])
    with pytest.raises(InvalidParameterError, match="docstore"):
        RapidLLM(decoder=decoder, documents=SimpleDocumentStore())


def test_building_it_does_not_load_the_model(monkeypatch, documents):
    monkeypatch.setattr("rapid_llm.decoder.load_model", lambda *_, **__: pytest.fail("loaded"))
    RapidSynthesizer(RapidLLM("some/model"), documents=documents)


def test_it_takes_the_global_llm(monkeypatch, llm, index, documents, spy):
    monkeypatch.setattr(Settings, "_llm", llm)
    synthesizer = RapidSynthesizer(documents=documents)
    index.as_query_engine(response_synthesizer=synthesizer).query(QUESTION)
    assert spy.decoders == [llm.decoder]


def test_texts_without_nodes_open_the_document_that_holds_them(llm, documents, spy):
    synthesizer = RapidSynthesizer(llm, documents=WHOLE, text_qa_template=QA)
    answer = synthesizer.get_response(QUESTION, ["One.", "Two."])
    assert "Text: One.\n\nTwo.\n" in spy.draft()
    assert WHOLE in spy.target()
    assert asyncio.run(synthesizer.aget_response(QUESTION, ["One.", "Two."])) == answer
    passage = SPLITTER.get_nodes_from_documents(documents)[1].text
    RapidSynthesizer(llm, documents=documents, text_qa_template=QA).get_response(
        QUESTION, [passage, "One."]
    )
    assert f"Text: {shown(documents[0])}\n\nOne.\nQuestion" in spy.target()
    assert f"Text: {passage}\n\nOne.\nQuestion" in spy.draft()
