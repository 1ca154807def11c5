"""What answers cost is in reach: of a message, of a chain's result, over a chain or an agent."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableLambda
from rapid_llm import Stats
from rapid_llm.errors import InvalidParameterError

from langchain_rapid import (
    ChatRapid,
    MessageOutputParser,
    RapidLLM,
    RapidStats,
    RapidStatsCallbackHandler,
    create_rapid_documents_chain,
    get_rapid_stats_callback,
    rapid_stats,
)

TEXTS = {"a": "Ann sails. Ann sings.", "b": "Bob bakes. Bob sleeps."}
CHUNKS = [Document("Bob bakes.", metadata={"source": "b"}, id="1")]
PROMPT = ChatPromptTemplate.from_messages([("system", "Use: {context}"), ("human", "{input}")])
INPUTS = {"context": CHUNKS, "input": "Who bakes?"}
COUNTS = ("prompt_tokens", "completion_tokens", "drafted_tokens", "accepted_tokens", "rounds")


@pytest.fixture
def chain(llm: ChatRapid) -> Any:
    parser = MessageOutputParser()
    return create_rapid_documents_chain(llm, PROMPT, documents=TEXTS, output_parser=parser)


def test_a_chain_returns_the_message_and_its_statistics(chain: Any) -> None:
    message = chain.invoke(INPUTS)
    assert isinstance(message, AIMessage)
    stats = rapid_stats(message)
    assert isinstance(stats, RapidStats)
    shown = message.response_metadata["rapid"]
    assert {name: shown[name] for name in stats.as_dict() if name in shown} == {
        name: value for name, value in stats.as_dict().items() if name in shown
    }
    assert stats.drafted_tokens > 0
    assert stats.completion_tokens == message.usage_metadata["output_tokens"]
    assert stats.model_name == "tiny-0"
    assert [chunk["id"] for chunk in stats.chunks] == ["1"]


def test_a_streamed_chain_ends_with_the_same_statistics(chain: Any) -> None:
    whole = None
    for chunk in chain.stream(INPUTS):
        whole = chunk if whole is None else whole + chunk
    told, again = rapid_stats(whole), rapid_stats(chain.invoke(INPUTS))
    assert told is not None
    assert again is not None
    assert told.completion_tokens == again.completion_tokens
    assert told.chunks == again.chunks


def test_an_unfinished_answer_and_another_models_have_none(llm: ChatRapid) -> None:
    assert rapid_stats(next(iter(llm.stream("Hi")))) is None
    assert rapid_stats(FakeListChatModel(responses=["x"]).invoke("Hi")) is None


def test_why_nothing_was_drafted_is_told(chain: Any, llm: ChatRapid) -> None:
    stats = rapid_stats(chain.invoke({**INPUTS, "context": []}))
    assert stats is not None
    assert stats.draft_skipped == "the retriever returned nothing"
    assert (stats.drafted_tokens, stats.method) == (0, "lc")


def test_a_text_has_no_message(decoder: Any) -> None:
    llm = RapidLLM(decoder=decoder, max_tokens=3)
    parser = MessageOutputParser()
    prompt = PromptTemplate.from_template("{context}{input}")
    chain = create_rapid_documents_chain(llm, prompt, documents=TEXTS, output_parser=parser)
    with pytest.raises(InvalidParameterError, match="not a message"):
        chain.invoke(INPUTS)


# --- over many calls -----------------------------------------------------------------------------


def test_a_handler_collects_the_calls_of_a_chain(chain: Any, llm: ChatRapid) -> None:
    steps = chain | RunnableLambda(lambda message: f"Sure? {message.text}") | llm
    handler = RapidStatsCallbackHandler()
    steps.invoke(INPUTS, {"callbacks": [handler]})
    assert len(handler.calls) == 2
    total = handler.total
    assert type(total) is Stats
    for name in COUNTS:
        assert getattr(total, name) == sum(getattr(call, name) for call in handler.calls)
    assert total.acceptance_ratio == total.accepted_tokens / total.drafted_tokens
    assert "2 calls" in repr(handler)


def test_a_context_collects_every_call_and_nothing_after_it(llm: ChatRapid, decoder: Any) -> None:
    text = RapidLLM(decoder=decoder, max_tokens=3)
    with get_rapid_stats_callback() as outer:
        llm.invoke("a")
        with get_rapid_stats_callback() as inner:
            list(llm.stream("b"))
            text.generate(["c", "d"])
            asyncio.run(llm.ainvoke("e"))
            FakeListChatModel(responses=["x"]).invoke("Hi")
        llm.batch(["f", "g"])
    llm.invoke("h")
    assert (len(inner.calls), len(outer.calls)) == (4, 7)
    assert inner.total.prompt_tokens == sum(call.prompt_tokens for call in inner.calls)


def test_a_context_ends_with_an_error(llm: ChatRapid) -> None:
    def failing() -> None:
        with get_rapid_stats_callback() as handler:
            llm.invoke("a", max_tokens=2)
            handlers.append(handler)
            llm.invoke("a" * 5000)

    handlers: list[RapidStatsCallbackHandler] = []
    with pytest.raises(ValueError, match="context window"):
        failing()
    llm.invoke("b")
    assert len(handlers[0].calls) == 1


def test_an_answer_from_the_cache_cost_nothing(decoder: Any) -> None:
    llm = ChatRapid(decoder=decoder, max_tokens=3, cache=InMemoryCache())
    text = RapidLLM(decoder=decoder, max_tokens=3, cache=InMemoryCache())
    with get_rapid_stats_callback() as handler:
        for model in (llm, text):
            for _ in range(3):
                model.invoke("Hi")
    assert len(handler.calls) == 2


def test_nothing_collected_is_zero() -> None:
    assert RapidStatsCallbackHandler().total == Stats()


def test_handlers_are_copied_and_pickled(llm: ChatRapid) -> None:
    with get_rapid_stats_callback() as handler:
        llm.invoke("a")
    for twin in (copy.deepcopy(handler), pickle.loads(pickle.dumps(handler))):
        assert twin.calls == handler.calls
        assert twin.total == handler.total
