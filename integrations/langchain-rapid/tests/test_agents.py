"""Agents whose tools retrieve: what a tool found is the drafter's context."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import create_retriever_tool
from pydantic import BaseModel
from rapid_llm.errors import DocumentError, InvalidParameterError
from scripted import Scripted

from langchain_rapid import ChatRapid, RapidLLM

LAMP = "The lamp was lit in 1871. It burns oil. Nobody has counted the steps."
FERRY = "The ferry is named Freya. It carries ninety."
TEXTS = {"lamp": LAMP, "ferry": FERRY}
CHUNKS = [
    Document("It burns oil.", metadata={"source": "lamp", "relevance_score": 0.4}),
    Document("The ferry is named Freya.", metadata={"source": "ferry"}),
]


class Found(BaseRetriever):
    """Finds the chunks that share a word with the question."""

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        return [chunk for chunk in CHUNKS if set(query.split()) & set(chunk.page_content.split())]


class Answer(BaseModel):
    """An answer."""

    fuel: str


def search(response_format: Any = "content_and_artifact") -> Any:
    return create_retriever_tool(
        Found(), "search", "Searches the harbour's papers.", response_format=response_format
    )


def called(name: str = "search", **arguments: str) -> str:
    return f"<tool_call>{json.dumps([{'name': name, 'arguments': arguments}])}</tool_call>"


def read(decoder: Scripted, call: int) -> tuple[str, str]:
    """What target and drafter read in a call."""
    target, draft, _ = decoder.asked[call]
    text = decoder.tokenizer.decode
    return text(target), "" if draft is None else text(draft)


def result(*chunks: Document, call: str = "1") -> list[Any]:
    """A call of the tool, and what it returned."""
    told = AIMessage("", tool_calls=[{"name": "search", "args": {"query": "oil"}, "id": call}])
    content = "\n\n".join(chunk.page_content for chunk in chunks)
    return [told, ToolMessage(content, tool_call_id=call, artifact=list(chunks))]


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream"])
def test_an_agent_drafts_from_what_its_tool_found(way):
    decoder = Scripted(called(query="burns"), "Oil.")
    agent = create_agent(
        ChatRapid(decoder=decoder, documents=TEXTS), [search()], system_prompt="Be brief."
    )
    asked = {"messages": [HumanMessage("What does it burn?")]}
    if way == "stream":
        *_, said = agent.stream(asked, stream_mode="values")
    else:
        said = agent.invoke(asked) if way == "invoke" else asyncio.run(agent.ainvoke(asked))
    answer = said["messages"][-1]
    assert answer.content == "Oil."
    assert read(decoder, 0)[1] == ""
    target, draft = read(decoder, 1)
    assert LAMP in target
    assert FERRY not in target
    assert "It burns oil." in draft
    assert "steps" not in draft
    assert all("Be brief." in each and "What does it burn?" in each for each in (target, draft))
    rapid = answer.response_metadata["rapid"]
    assert rapid["method"] == "rapid"
    assert rapid["chunks"] == [{"document_id": "lamp", "start_index": LAMP.index("It")}]
    kept = said["messages"][-2]
    assert kept.content == "It burns oil."


@pytest.mark.parametrize("way", ["invoke", "astream"])
def test_an_agent_drafts_from_what_all_calls_of_one_answer_found(way):
    calls = [{"name": "search", "arguments": {"query": query}} for query in ("burns", "ferry")]
    decoder = Scripted(f"<tool_call>{json.dumps(calls)}</tool_call>", "Oil, and Freya.")
    agent = create_agent(ChatRapid(decoder=decoder, documents=TEXTS), [search()])
    asked = {"messages": [HumanMessage("What does it burn, and what is the ferry called?")]}

    async def streamed() -> str:
        parts = [part async for part, _ in agent.astream(asked, stream_mode="messages")]
        return "".join(part.content for part in parts if isinstance(part, AIMessageChunk))

    if way == "invoke":
        assert agent.invoke(asked)["messages"][-1].content == "Oil, and Freya."
    else:
        assert asyncio.run(streamed()) == "Oil, and Freya."
    target, draft = read(decoder, 1)
    assert all(text in target for text in (LAMP, FERRY))
    assert all(found.page_content in draft for found in CHUNKS)
    assert "steps" not in draft


def test_without_full_documents_the_drafter_reads_the_last_question_and_what_was_found():
    decoder = Scripted(called(query="burns"), "Oil.")
    agent = create_agent(ChatRapid(decoder=decoder), [search()], system_prompt="Be brief.")
    earlier = [HumanMessage("Who are you?"), AIMessage("A keeper.")]
    said = agent.invoke({"messages": [*earlier, HumanMessage("What does it burn?")]})
    target, draft = read(decoder, 1)
    assert "A keeper." in target
    assert "A keeper." not in draft
    for text in ("Be brief.", "What does it burn?", "It burns oil."):
        assert text in target
        assert text in draft
    rapid = said["messages"][-1].response_metadata["rapid"]
    assert rapid["method"] == "rapid"
    assert rapid["chunks"] == [{"document_id": "lamp"}]


def test_a_tool_that_returns_text_alone_leaves_the_target_to_itself():
    decoder = Scripted(called(query="burns"), "Oil.")
    agent = create_agent(ChatRapid(decoder=decoder), [search("content")])
    said = agent.invoke({"messages": [HumanMessage("What does it burn?")]})
    assert said["messages"][-1].content == "Oil."
    assert read(decoder, 1)[1] == ""
    assert said["messages"][-1].response_metadata["rapid"]["method"] == "lc"


@pytest.mark.parametrize("strategy", [Answer, ProviderStrategy(Answer), ToolStrategy(Answer)])
def test_an_agent_answers_in_a_schema(strategy):
    last = called("Answer", fuel="oil") if type(strategy) is ToolStrategy else '{"fuel": "oil"}'
    decoder = Scripted(called(query="burns"), last)
    model = ChatRapid(decoder=decoder, documents=TEXTS)
    agent = create_agent(model, [search()], response_format=strategy)
    said = agent.invoke({"messages": [HumanMessage("What does it burn?")]})
    assert said["structured_response"] == Answer(fuel="oil")
    assert "It burns oil." in read(decoder, 1)[1]


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_a_retriever_tools_and_a_schema_go_together(method):
    last = called("Answer", fuel="oil") if method == "function_calling" else '{"fuel": "oil"}'
    decoders = [Scripted(last) for _ in range(4)]

    def ask(decoder: Scripted) -> Any:
        llm = ChatRapid(decoder=decoder, retriever=Found(), documents=TEXTS)
        return llm.bind_tools([search()]).with_structured_output(Answer, method=method)

    async def streamed() -> Any:
        return [part async for part in ask(decoders[3]).astream("What burns oil?")][-1]

    said = [
        ask(decoders[0]).invoke("What burns oil?"),
        asyncio.run(ask(decoders[1]).ainvoke("What burns oil?")),
        list(ask(decoders[2]).stream("What burns oil?"))[-1],
        asyncio.run(streamed()),
    ]
    assert said == [Answer(fuel="oil")] * 4
    for decoder in decoders:
        target, draft = read(decoder, 0)
        assert LAMP in target
        assert "It burns oil." in draft
        assert "steps" not in draft


def test_a_document_is_read_once_however_often_it_is_found():
    decoder = Scripted("Yes.", "Yes.")
    llm = ChatRapid(decoder=decoder, documents=TEXTS)
    lit = Document("The lamp was lit in 1871.", metadata={"source": "lamp"})
    messages = [HumanMessage("Is it?"), *result(CHUNKS[0]), *result(lit, CHUNKS[1], call="2")]
    llm.invoke(messages)
    target, draft = read(decoder, 0)
    assert target.count("Nobody has counted") == 1
    assert target.count("lit in 1871") == 2
    assert target.count("It carries ninety.") == 1
    assert "Nobody has counted" not in draft
    assert draft.count("lit in 1871") == 1
    # what was read before stays as it was, so that it is not read again
    follow_up = [*messages, AIMessage("Yes."), HumanMessage("Sure?"), *result(lit, call="3")]
    llm.invoke(follow_up)
    assert read(decoder, 1)[0].startswith(target.removesuffix("[assistant]"))


def test_documents_of_tools_can_be_shortened():
    whole = "Before. " * 600 + "It burns oil." + " After." * 600  # more tokens than the window has
    llm = ChatRapid(decoder=(decoder := Scripted("Yes.")), documents={"lamp": whole})
    said = llm.invoke(
        [HumanMessage("Is it?"), *result(CHUNKS[0])], truncate="middle", max_tokens=20
    )
    target, _ = read(decoder, 0)
    assert "It burns oil." in target
    assert said.response_metadata["rapid"]["omitted_tokens"] > 0


def test_the_confidence_is_that_of_the_tools_chunks_or_a_calls_own(monkeypatch):
    decoder, told = Scripted("Yes.", "Yes."), []
    original = Scripted.stream
    monkeypatch.setattr(
        Scripted, "stream", lambda *a, **k: told.append(k["confidence"]) or original(*a, **k)
    )
    llm = ChatRapid(decoder=decoder, documents=TEXTS)
    messages = [HumanMessage("Is it?"), *result(CHUNKS[0])]
    llm.invoke(messages)
    llm.invoke(messages, confidence=0.125)
    assert told == [pytest.approx(0.5), 0.125]


def test_documents_that_nothing_retrieves_from_are_not_left_out_in_silence(decoder):
    llm = ChatRapid(decoder=decoder, documents=TEXTS, max_tokens=2)
    with pytest.raises(InvalidParameterError, match="no tool retrieves"):
        llm.invoke("What does it burn?")
    assert llm.bind_tools([search()]).invoke("What does it burn?")
    assert llm.invoke("What does it burn?", draft_messages="It burns oil.")
    with pytest.raises(ValueError, match="without retriever="):
        RapidLLM(documents="text")
    stranger = Document("A whale.", metadata={"source": "sea"})
    with pytest.raises(DocumentError, match="'sea'"):
        llm.invoke([HumanMessage("Is it?"), *result(stranger)])


def test_other_artifacts_are_no_documents():
    decoder = Scripted("Yes.")
    message = ToolMessage("3", tool_call_id="1", artifact={"rows": [1]})
    history = [SystemMessage("Be brief."), HumanMessage("Is it?"), result()[0], message]
    ChatRapid(decoder=decoder).invoke(history)
    assert read(decoder, 0)[1] == ""
