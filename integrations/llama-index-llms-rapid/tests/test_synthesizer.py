"""``RapidSynthesizer``: documents in every form, templates, retrievers, the window, traces."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core import Document, Settings, SummaryIndex
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.llama_debug import LlamaDebugHandler
from llama_index.core.callbacks.schema import CBEventType
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore
from llama_index.core.storage.docstore import SimpleDocumentStore
from pipelines import (  # noqa: F401  (fixtures)
    QA,
    QUESTION,
    SPLITTER,
    WHOLE,
    ask,
    by_id,
    context_of,
    index_fixture,
    llm_fixture,
    shown,
    texts_behind,
)

from llama_index.llms.rapid import RapidLLM, RapidSynthesizer
from rapid_llm.errors import ContextWindowError, DocumentError, InvalidParameterError


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
