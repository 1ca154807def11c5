"""``response.metadata["rapid"]`` of engines, and the retrieval's confidence in their calls."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from itertools import product
from typing import Any

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.chat_engine import CondenseQuestionChatEngine, ContextChatEngine
from llama_index.core.chat_engine.types import StreamingAgentChatResponse
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore

from llama_index.llms.rapid import RapidLLM, RapidSynthesizer
from rapid_llm.context.confidence import confidence
from rapid_llm.decoder import RapidDecoder
from rapid_llm.stats import Stats

QUESTION = "Who kept a diary of storms at the lighthouse?"
SPLITTER = SentenceSplitter(chunk_size=64, chunk_overlap=0, paragraph_separator="\n\n")
STREAMING = (StreamingResponse, AsyncStreamingResponse, StreamingAgentChatResponse)
HISTORY = [
    ChatMessage(role="user", content="Is there a lighthouse?"),
    ChatMessage(role="assistant", content="Yes, at Karsholm."),
]


@pytest.fixture
def index(documents, minilm):
    return VectorStoreIndex.from_documents(
        documents, embed_model=minilm, transformations=[SPLITTER]
    )


@pytest.fixture
def llm(decoder, documents):
    return RapidLLM(decoder=decoder, max_tokens=6, gamma=3, documents=documents)


@pytest.fixture
def confidences(monkeypatch) -> list[float]:
    """The confidence that each generation was given."""
    seen: list[float] = []
    original = RapidDecoder.request

    def request(self, *prompts: Any, **options: Any):
        seen.append(options["confidence"])
        return original(self, *prompts, **options)

    monkeypatch.setattr(RapidDecoder, "request", request)
    return seen


def answers(engine, method, question=QUESTION):
    """A response of an engine, read to its end."""
    if not method.startswith("a"):
        response = getattr(engine, method)(question)
        if isinstance(response, STREAMING):
            "".join(response.response_gen)
        return response

    async def ask():
        response = await getattr(engine, method)(question)
        if isinstance(response, STREAMING):
            _ = [text async for text in response.async_response_gen()]
        return response

    return asyncio.run(ask())


# --- query engines -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "streaming"),
    [
        *product(("compact", "refine", "tree_summarize"), (False, True)),
        ("accumulate", False),  # which LlamaIndex does not stream
    ],
)
@pytest.mark.parametrize("method", ["query", "aquery"])
def test_a_plain_engines_response_adds_up_its_calls(index, llm, spy, mode, method, streaming):
    engine = index.as_query_engine(
        llm=llm, similarity_top_k=2, response_mode=ResponseMode(mode), streaming=streaming
    )
    response = answers(engine, method)
    report, calls = response.metadata["rapid"], range(len(spy.prompts))
    assert len(calls) == (2 if mode in ("refine", "accumulate") else 1)
    assert report.keys() > Stats().as_dict().keys()
    assert report["prompt_tokens"] == sum(len(spy.target_ids(call)) for call in calls)
    assert report["draft_prompt_tokens"] == sum(len(spy.draft_ids(call)) for call in calls)
    assert report["completion_tokens"] == 6 * len(calls)
    assert report["drafted_tokens"] >= report["accepted_tokens"]
    assert report["acceptance_ratio"] == report["accepted_tokens"] / report["drafted_tokens"]
    assert (report["method"], report["draft_skipped"]) == ("rapid", None)
    assert report["document_ids"][0] == "lighthouse"
    assert set(report["document_ids"]) <= {n.node.ref_doc_id for n in response.source_nodes}
    # Nodes' metadata stay.
    assert all(node.node_id in response.metadata for node in response.source_nodes)
    assert json.loads(json.dumps(report)) == report
    assert pickle.loads(pickle.dumps(report)) == copy.deepcopy(report) == report


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("method", ["query", "aquery"])
def test_a_plain_engine_without_documents_has_statistics(index, make_decoder, template, method):
    decoder = make_decoder()
    if not template:
        decoder.tokenizer.chat_template = None
    llm = RapidLLM(decoder=decoder, max_tokens=6)
    report = answers(index.as_query_engine(llm=llm), method).metadata["rapid"]
    assert (report["method"], report["completion_tokens"]) == ("lc", 6)
    assert report["draft_skipped"] == "no draft prompt was given"


def test_what_was_cut_and_cached_is_shown(make_decoder):
    text = "\n\n".join(f"Keeper {i} kept a diary of {i} storms, all of them." for i in range(99))
    documents = [Document(text=text, id_="diary")]
    llm = RapidLLM(
        decoder=make_decoder(window=3000), max_tokens=4, documents=documents, truncate="middle"
    )
    engine = RetrieverQueryEngine.from_args(Scored(documents, (0.5,)), llm=llm)
    first, second = (engine.query(QUESTION).metadata["rapid"] for _ in range(2))
    assert first["omitted_tokens"] == second["omitted_tokens"] > 0
    assert second["cached_tokens"] > first["cached_tokens"] == 0


def test_a_response_without_a_call_has_no_statistics(index, llm):
    plain = index.as_query_engine(llm=MockLLM())
    assert "rapid" not in plain.query(QUESTION).metadata


def test_concurrent_answers_have_their_own_statistics(index, llm):
    questions = [QUESTION, "What is the ferry called?", "Who planted the mulberry?"]
    engine = index.as_query_engine(llm=llm, similarity_top_k=1)
    alone = [engine.query(question).metadata["rapid"] for question in questions]

    async def together():
        return await asyncio.gather(*map(engine.aquery, questions))

    for one, other in zip(alone, asyncio.run(together()), strict=True):
        for name in ("document_ids", "prompt_tokens", "draft_prompt_tokens", "completion_tokens"):
            assert other.metadata["rapid"][name] == one[name]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_answer_leaves_nothing_open(index, decoder, documents, asynchronous):
    fails = [True, False]

    def whole(context):
        if fails.pop(0):
            raise LookupError("no such document")
        return documents[0]

    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=whole)
    engine = index.as_query_engine(llm=llm)

    async def both():
        with pytest.raises(LookupError):
            await engine.aquery(QUESTION)
        response = await engine.aquery(QUESTION)
        return response, await llm.acomplete("x")

    if asynchronous:
        response, _ = asyncio.run(both())
    else:
        with pytest.raises(LookupError):
            engine.query(QUESTION)
        response = engine.query(QUESTION)
        llm.complete("x")  # is not part of it any more
    assert response.metadata["rapid"]["completion_tokens"] == 4


# --- chat engines --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["chat", "stream_chat", "achat", "astream_chat"])
@pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
def test_a_chat_engines_response_shows_its_answer_alone(index, llm, spy, mode, method):
    engine = index.as_chat_engine(
        chat_mode=mode, llm=llm, similarity_top_k=1, chat_history=list(HISTORY)
    )
    report = answers(engine, method).metadata["rapid"]
    # The call that condensed the question is none of the answer's.
    assert len(spy.prompts) == (1 if mode == "context" else 2)
    assert report["prompt_tokens"] == len(spy.target_ids())
    assert report["draft_prompt_tokens"] == len(spy.draft_ids())
    assert report["completion_tokens"] == 6
    assert len(report["document_ids"]) == 1


@pytest.mark.parametrize("method", ["chat", "achat"])
def test_a_simple_chat_engine_shows_the_models_own_call(index, llm, spy, method):
    engine = index.as_chat_engine(chat_mode="simple", llm=llm)
    report = answers(engine, method).metadata["rapid"]
    assert report["prompt_tokens"] == len(spy.target_ids())
    assert report["draft_skipped"] == "no draft prompt was given"


def test_a_chat_over_a_query_engine_shows_the_queries_statistics(index, llm, documents, spy):
    query_engine = index.as_query_engine(
        llm=llm, similarity_top_k=1, response_synthesizer=RapidSynthesizer(llm, documents=documents)
    )
    engine = CondenseQuestionChatEngine.from_defaults(
        query_engine=query_engine, llm=llm, chat_history=list(HISTORY)
    )
    report = engine.chat(QUESTION).metadata["rapid"]
    assert len(spy.prompts) == 2
    assert report["prompt_tokens"] == len(spy.target_ids())
    assert report["chunk_ids"]


# --- the retrieval's confidence ------------------------------------------------------------------


class Scored(BaseRetriever):
    """Gives a passage of each document, with these scores."""

    def __init__(self, documents, scores):
        super().__init__()
        self._nodes = [
            NodeWithScore(node=SPLITTER.get_nodes_from_documents([document])[0], score=score)
            for document, score in zip(documents, scores, strict=False)
        ]

    def _retrieve(self, query):
        return self._nodes


SCORES = {
    (0.1,): 0.0,
    (0.4, 0.3): confidence([0.4]),
    (-0.2, 0.9): 1.0,
    (1.0,): 1.0,
    (12.3, 0.4): 1.0,  # BM25's are no cosine similarities
    (None, 0.4): 1.0,
}


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["plain", "RapidSynthesizer"])
def test_the_retrievals_confidence_reaches_the_decoder(
    llm, documents, confidences, scores, asynchronous, own
):
    swap = {"response_synthesizer": RapidSynthesizer(llm, documents=documents)} if own else {}
    engine = RetrieverQueryEngine.from_args(Scored(documents, scores), llm=llm, **swap)
    answers(engine, "aquery" if asynchronous else "query")
    assert confidences == [SCORES[scores]]


def test_a_chat_engine_knows_the_retrievals_confidence(llm, documents, confidences):
    engine = ContextChatEngine.from_defaults(retriever=Scored(documents, (0.3,)), llm=llm)
    engine.chat(QUESTION)
    "".join(engine.stream_chat(QUESTION).response_gen)
    assert confidences == [confidence([0.3])] * 2


def test_a_doubtful_retrieval_transfers_less_where_eta_is_dynamic(decoder, documents):
    """With a confidence of 0 nothing is transferred, as in exact mode."""
    template = PromptTemplate("{context_str}\n{query_str}")

    def text(score, **options):
        options = {"mode": "augmented", "gamma": 3, "eta": 50, **options}
        llm = RapidLLM(decoder=decoder, max_tokens=24, **options)
        synthesizer = RapidSynthesizer(llm, documents=documents, text_qa_template=template)
        (node,) = Scored(documents[:1], (score,)).retrieve("?")
        return str(synthesizer.synthesize("?", [node]))

    assert text(0.0, dynamic_eta=True) == text(0.9, mode="exact")
    assert text(0.0) == text(0.9) != text(0.9, mode="exact")
