"""Contexts that are more than retrieved text keep what they say."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from unittest.mock import AsyncMock

import pytest
from llama_index.core import (
    Document,
    DocumentSummaryIndex,
    MockEmbedding,
    SummaryIndex,
    VectorStoreIndex,
)
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import CitationQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.question_gen.types import SubQuestion
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.core.tools import QueryEngineTool

from llama_index.llms.rapid import RapidLLM, RapidSynthesizer
from rapid_llm.batching import Scheduler
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.model_runner import ModelRunner

EMBED = MockEmbedding(8)
LAMP = "The lighthouse was built in 1871 by Ida Brandt.\n\nIts lamp went out in 1968 for good."
FERRY = "The ferry is named Freya and carries ninety passengers.\n\nShe does not sail in storms."


@pytest.fixture
def documents():
    return [
        Document(text=LAMP, id_="lamp", metadata={"title": "Lamp"}),
        Document(text=FERRY, id_="ferry", metadata={"title": "Ferry"}),
    ]


@pytest.fixture
def llm(decoder, documents):
    return RapidLLM(decoder=decoder, max_tokens=4, documents=documents)


@pytest.fixture
def plain(decoder):
    return RapidLLM(decoder=decoder, max_tokens=4)


@pytest.fixture
def answers(monkeypatch):
    """The answers that the model gives in turn, instead of its own."""
    scripted: list[str] = []
    original = RapidDecoder.stream

    def stream(self, *arguments, **options):
        *_, last = original(self, *arguments, **options)
        if scripted:
            last = replace(last, text=scripted.pop(0))
        yield last

    monkeypatch.setattr(RapidDecoder, "stream", stream)
    return scripted


def test_the_numbers_of_sources_reach_the_target(documents, llm, plain, spy):
    index = VectorStoreIndex.from_documents(documents, embed_model=EMBED)
    synthesizer = RapidSynthesizer(plain, documents=documents)
    for engine in (
        CitationQueryEngine.from_args(index, llm=llm, similarity_top_k=2, citation_chunk_size=24),
        CitationQueryEngine.from_args(
            index,
            llm=plain,
            similarity_top_k=2,
            citation_chunk_size=24,
            response_synthesizer=synthesizer,
        ),
    ):
        response = engine.query("When?")
        assert len(response.source_nodes) > 2
        for scored in response.source_nodes:
            assert scored.node.text.strip() in spy.target()
        assert LAMP in spy.target()
        assert FERRY in spy.target()


@pytest.mark.parametrize("label", ["metadata", "template"])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_label_beside_a_passage_reaches_the_target(documents, plain, spy, label, as_text):
    """As a postprocessor may number its sources; what the document shows itself is not repeated."""
    found = SentenceSplitter().get_nodes_from_documents(documents)
    if label == "metadata":
        found[1].metadata["source"] = "[S2]"
    else:
        found[1].text_template = "[S2]\n{metadata_str}\n{content}"
    texts = {document.id_: document.text for document in documents}
    synthesizer = RapidSynthesizer(plain, documents=texts if as_text else documents)
    synthesizer.synthesize("When?", [NodeWithScore(node=node) for node in found])
    labelled = found[1].get_content(MetadataMode.LLM)
    assert "[S2]" in labelled
    assert labelled in spy.target()
    assert spy.target().count(LAMP) == 1
    assert spy.target().count(FERRY) == 2


def test_an_answer_to_a_sub_question_stays(documents, llm, plain, spy, monkeypatch):
    index = VectorStoreIndex.from_documents(documents, embed_model=EMBED)
    questions = [SubQuestion(sub_question="When was it built?", tool_name="docs")]
    generator = LLMQuestionGenerator.from_defaults(llm=llm)
    monkeypatch.setattr(LLMQuestionGenerator, "generate", lambda *_, **__: questions)
    for model, synthesizer in (
        (llm, get_response_synthesizer(llm=llm)),
        (plain, RapidSynthesizer(plain, documents=documents)),
    ):
        tool = QueryEngineTool.from_defaults(
            index.as_query_engine(llm=model, similarity_top_k=1), name="docs", description="all"
        )
        engine = SubQuestionQueryEngine.from_defaults(
            [tool],
            llm=model,
            question_gen=generator,
            response_synthesizer=synthesizer,
            use_async=False,
            verbose=False,
        )
        response = engine.query("How old is it?")
        (answer,) = [n.node.text for n in response.source_nodes if "Sub question" in n.node.text]
        assert answer in spy.target()
        assert LAMP not in spy.target()
        assert FERRY not in spy.target()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["query", "aquery"])
def test_sub_questions_are_answered_at_once(documents, decoder, monkeypatch, asynchronous):
    llm = RapidLLM(decoder=decoder, max_tokens=16, documents=documents)
    index = VectorStoreIndex.from_documents(documents, embed_model=EMBED)
    asked = ["When was it built?", "Who built it?", "When did its lamp go out?"]
    questions = [SubQuestion(sub_question=question, tool_name="docs") for question in asked]
    monkeypatch.setattr(LLMQuestionGenerator, "generate", lambda *_, **__: questions)
    monkeypatch.setattr(LLMQuestionGenerator, "agenerate", AsyncMock(return_value=questions))
    tool = QueryEngineTool.from_defaults(
        index.as_query_engine(llm=llm, similarity_top_k=1), name="docs", description="all"
    )
    alone = [str(tool.query_engine.query(question)) for question in asked]

    together = threading.Semaphore(0)  # the passes begin when all have asked, however fast they are
    submit, work = Scheduler._submit, Scheduler._work

    def submitted(self, *arguments):
        ticket = submit(self, *arguments)
        together.release()
        return ticket

    def working(self):
        for _ in asked if not sizes else ():
            together.acquire(timeout=10)
        work(self)

    monkeypatch.setattr(Scheduler, "_submit", submitted)
    monkeypatch.setattr(Scheduler, "_work", working)
    sizes: list[int] = []
    original = ModelRunner.joined
    monkeypatch.setattr(
        ModelRunner, "joined", lambda self, parts: sizes.append(len(parts)) or original(self, parts)
    )
    engine = SubQuestionQueryEngine.from_defaults(
        [tool],
        llm=llm,
        question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
        response_synthesizer=get_response_synthesizer(llm=llm),
        use_async=True,
        verbose=False,
    )
    if asynchronous:
        response = asyncio.run(engine.aquery("How old is it?"))
    else:
        response = engine.query("How old is it?")
    assert len(asked) in sizes  # beside passes that measure costs
    for question, answer in zip(asked, alone, strict=True):
        expected = f"Sub question: {question}\nResponse: {answer}"
        assert expected in [node.node.text for node in response.source_nodes]


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "simple_summarize"])
def test_text_of_no_document_stays_in_every_mode(llm, spy, mode):
    nodes = [NodeWithScore(node=TextNode(text="Sub question: when?\nResponse: in 1871"))]
    get_response_synthesizer(llm=llm, response_mode=mode).synthesize("When?", nodes)
    assert "Sub question: when?\nResponse: in 1871" in spy.target()
    assert LAMP not in spy.target()


def test_a_summary_is_of_its_own_document(documents, llm, spy):
    DocumentSummaryIndex.from_documents(
        documents,
        llm=llm,
        embed_model=EMBED,
        response_synthesizer=get_response_synthesizer(llm=llm, response_mode="tree_summarize"),
    )
    read = [(LAMP in spy.target(call), FERRY in spy.target(call)) for call in range(2)]
    assert read == [(True, False), (False, True)]


def test_answers_of_the_model_are_not_taken_for_passages(decoder, documents, spy, answers):
    """The branches of a tree and the answers so far, which are of no document."""
    answers += ["Branch one: built long ago.", "Branch two: she is called Freya.", "All of it."]
    small = RapidLLM(decoder=decoder, max_tokens=4, documents=documents)
    texts = [document.text for document in documents]
    synthesizer = get_response_synthesizer(
        llm=small,
        response_mode="tree_summarize",
        prompt_helper=PromptHelper(1000, 0, tokenizer=list, chunk_size_limit=110),
    )
    synthesizer.get_response("What?", texts)
    top = spy.target()
    assert "Branch one: built long ago." in top
    assert LAMP not in top


def test_the_answer_so_far_stays_when_refining(documents, llm, spy, answers):
    answers += ["It is of 1871."]
    index = SummaryIndex.from_documents(documents)
    index.as_query_engine(llm=llm, response_mode="refine").query("When?")
    assert "It is of 1871." in spy.target(1)
    assert FERRY in spy.target(1)
    assert LAMP not in spy.target(1)
