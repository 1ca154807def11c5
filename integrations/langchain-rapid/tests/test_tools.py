"""Tools and structured output; what is bound to a model stays bound through all of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    ToolMessage,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from pydantic import BaseModel
from rapid_llm.decoder import RapidDecoder
from rapid_llm.errors import InvalidParameterError
from scripted import Scripted
from tiny import TEMPLATE
from typing_extensions import TypedDict

from langchain_rapid import ChatRapid, create_rapid_documents_chain


class Answer(BaseModel):
    """An answer."""

    place: Literal["Rome", "Oslo"]
    sure: bool


CLOSED = {"additionalProperties": False}


class Place(TypedDict):
    """A place."""

    place: Literal["Rome", "Oslo"]


@tool
def weather(place: Literal["Rome", "Oslo"]) -> str:
    """Weather of a place."""
    return f"sunny in {place}"


@pytest.fixture
def llm(decoder: RapidDecoder) -> ChatRapid:
    return ChatRapid(decoder=decoder, max_tokens=300, temperature=1.0, seed=3)


# --- tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["any", "required", True, "weather"])
def test_a_model_that_must_call_a_tool_does(llm, choice):
    bound = llm.bind_tools([weather], tool_choice=choice, parallel_tool_calls=False)
    message = bound.invoke("How is it?")
    (call,) = message.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["place"] in ("Rome", "Oslo")
    assert message.response_metadata["finish_reason"] == "tool_calls"
    assert message.content == ""
    assert [block["type"] for block in message.content_blocks] == ["tool_call"]
    assert weather.invoke(call).content.startswith("sunny")


def test_streams_and_asyncio_give_the_same_call(llm):
    bound = llm.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    chunks = list(bound.stream("How is it?"))
    merged = sum(chunks[1:], chunks[0])
    assert isinstance(merged, AIMessageChunk)
    assert len([c for c in chunks if c.tool_call_chunks]) > 1

    async def others() -> list[Any]:
        streamed = [chunk async for chunk in bound.astream("How is it?")]
        return [sum(streamed[1:], streamed[0]), await bound.ainvoke("How is it?")]

    messages = [merged, bound.invoke("How is it?"), *asyncio.run(others())]
    assert len({json.dumps(m.tool_calls[0]["args"]) for m in messages}) == 1


def test_tools_calls_and_results_reach_both_prompts(llm, prompts):
    call = {"name": "weather", "args": {"place": "Rome"}, "id": "1"}
    for content in ("", [{"type": "tool_use", "id": "1", "name": "weather", "input": {}}]):
        history = [
            HumanMessage("How is it?"),
            AIMessage(content, tool_calls=[call]),
            ToolMessage("rainy", tool_call_id="1"),
        ]
        llm.bind_tools([weather]).invoke(history, max_tokens=1, draft_messages=history)
    assert len(prompts) == 4
    for prompt in prompts:
        assert "Weather of a place" in prompt
        assert '{"name": "weather", "arguments": {"place": "Rome"}}' in prompt
        assert "rainy" in prompt


def test_tools_are_counted(llm):
    messages = [HumanMessage("How is it?")]
    counted = llm.get_num_tokens_from_messages(messages, tools=[weather])
    read = llm.bind_tools([weather]).invoke(messages, max_tokens=1).usage_metadata
    assert counted == read["input_tokens"]


@pytest.mark.parametrize(
    ("tools", "options", "says"),
    [
        ([weather], {"tool_choice": "time"}, "tool_choice='time' names no tool"),
        ([3], {}, "3 is no tool"),
        ([], {"tool_choice": "any"}, "without tools"),
    ],
)
def test_what_is_wrong_with_tools_is_told_when_they_are_bound(llm, tools, options, says):
    with pytest.raises(InvalidParameterError, match=says):
        llm.bind_tools(tools, **options)


def test_a_completion_model_takes_no_tools(decoder):
    from langchain_rapid import RapidLLM

    with pytest.raises(InvalidParameterError, match="tools= is not taken"):
        RapidLLM(decoder=decoder).invoke("Hello", tools=[weather])


def test_a_call_that_was_cut_is_invalid(llm):
    bound = llm.bind_tools([weather], tool_choice="any")
    for tokens in range(60, 100, 5):
        message = bound.invoke("How is it?", max_tokens=tokens)
        assert all(call["args"]["place"] in ("Rome", "Oslo") for call in message.tool_calls)
    assert any(
        bound.invoke("How is it?", max_tokens=tokens).invalid_tool_calls
        for tokens in range(50, 100, 5)
    )


ROME = '<tool_call>[{"name": "weather", "arguments": {"place": "Rome"}}]</tool_call>'
CUT = ROME.index("ome")  # each character is a token


@pytest.mark.parametrize("limit", [{"max_tokens": CUT}, {"stop": ["ome"]}], ids=str)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_cut_call_is_not_completed_whether_or_not_it_streams(limit, streaming):
    llm = ChatRapid(decoder=Scripted(ROME, ROME, ROME), streaming=streaming).bind_tools([weather])
    messages = [llm.invoke("How is it?", **limit), asyncio.run(llm.ainvoke("How is it?", **limit))]
    for message in messages:
        assert message.tool_calls == []
        (call,) = message.invalid_tool_calls
        assert (call["name"], call["args"]) == ("weather", '{"place": "R')
        assert "raise max_tokens" in call["error"]
        assert message.response_metadata["finish_reason"] in ("length", "stop")
    (called,) = llm.invoke("How is it?", stop=["</tool_call>"]).tool_calls
    assert called["args"] == {"place": "Rome"}


@pytest.mark.parametrize("streaming", [False, True])
def test_callbacks_and_caches_see_no_call_that_was_cut(streaming):
    class Seen(BaseCallbackHandler):
        calls: ClassVar[list[Any]] = []

        def on_llm_end(self, response: Any, **_: Any) -> None:
            self.calls.append(response.generations[0][0].message.tool_calls)

    said = [ROME, ROME]
    llm = ChatRapid(decoder=Scripted(*said), streaming=streaming, max_tokens=CUT, cache=False)
    cached = ChatRapid(decoder=Scripted(ROME), streaming=streaming, cache=InMemoryCache())
    asked = {"config": {"callbacks": [Seen()]}, "tools": [weather]}
    llm.invoke("How is it?", **asked)
    asyncio.run(llm.ainvoke("How is it?", **asked))
    for _ in range(2):
        message = cached.invoke("How is it?", max_tokens=CUT, **asked)
        assert (message.tool_calls, len(message.invalid_tool_calls)) == ([], 1)
    assert Seen.calls == [[], [], [], []]


def test_an_agent_that_streams_makes_no_call_that_was_cut():
    made: list[str] = []

    @tool
    def look(place: str) -> str:
        """Look."""
        made.append(place)
        return place

    said = '<tool_call>[{"name": "look", "arguments": {"place": "Rome"}}]</tool_call>'
    llm = ChatRapid(decoder=Scripted(said), max_tokens=said.index("ome"))
    asked = {"messages": [HumanMessage("Where?")]}
    assert list(create_agent(llm, [look]).stream(asked, stream_mode="messages"))
    assert made == []


def test_an_agent_calls_its_tool_reads_the_result_and_answers():
    called = '<tool_call>[{"name": "weather", "arguments": {"place": "Oslo"}}]</tool_call>'
    decoder = Scripted(called, "It is sunny in Oslo.")
    agent = ChatRapid(decoder=decoder).bind_tools([weather])
    history: list[Any] = [HumanMessage("How is it in Oslo?")]
    history.append(agent.invoke(history))
    history += [weather.invoke(call) for call in history[-1].tool_calls]
    history.append(agent.invoke(history))
    assert history[-1].content == "It is sunny in Oslo."
    assert history[-1].tool_calls == []
    assert "sunny in Oslo" in decoder.tokenizer.decode(decoder.asked[1][0])


def test_reasoning_is_told_from_the_answer():
    thinking = TEMPLATE + "{% if false %}<think></think>{% endif %}"
    llm = ChatRapid(decoder=Scripted("<think>hm</think>Yes.", template=thinking))
    message = llm.invoke("Is it?")
    assert message.content == "Yes."
    assert message.additional_kwargs["reasoning_content"] == "hm"
    assert [block["type"] for block in message.content_blocks] == ["reasoning", "text"]


# --- structured output ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True])
def test_answers_are_objects_of_the_schema(llm, method, strict):
    structured = llm.with_structured_output(Answer, method=method, strict=strict)
    assert isinstance(structured.invoke("Where?"), Answer)
    for schema in (Place, Answer.model_json_schema()):
        answer = llm.with_structured_output(schema, method=method, strict=True).invoke("Where?")
        assert answer["place"] in ("Rome", "Oslo")
    last = None
    for last in llm.with_structured_output(Place, method=method).stream("Where?"):
        assert isinstance(last, dict)
    assert last is not None
    assert last["place"] in ("Rome", "Oslo")


def test_json_mode_gives_an_object():
    decoder = Scripted('{"place": "Rome", "sure": true}', '{"a": 1}')
    llm = ChatRapid(decoder=decoder)
    answer = llm.with_structured_output(Answer, method="json_mode").invoke("Where?")
    assert answer == Answer(place="Rome", sure=True)
    assert llm.with_structured_output(method="json_mode").invoke("Where?") == {"a": 1}
    assert all(constraint == {"json": {"type": "object"}} for *_, constraint in decoder.asked)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_the_raw_message_comes_along_and_errors_are_told(llm, method):
    structured = llm.with_structured_output(Answer, method=method, include_raw=True)
    result = structured.invoke("Where?")
    assert isinstance(result["raw"], AIMessage)
    assert isinstance(result["parsed"], Answer)
    assert result["parsing_error"] is None
    cut = llm.with_structured_output(Answer, method=method, include_raw=True, max_tokens=8)
    result = cut.invoke("Where?")
    assert result["parsed"] is None
    assert "raise max_tokens" in str(result["parsing_error"])
    with pytest.raises(OutputParserException, match="raise max_tokens"):
        llm.with_structured_output(Answer, method=method, max_tokens=8).invoke("Where?")


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_an_answer_that_a_stop_string_cuts_is_not_completed(method):
    said = '{"place": "Rome. Oslo."}'
    if method == "function_calling":
        said = f'<tool_call>[{{"name": "where", "arguments": {said}}}]</tool_call>'
    schema = {"title": "where", "type": "object", "properties": {"place": {"type": "string"}}}
    llm = ChatRapid(decoder=Scripted(said, said, said))
    structured = llm.with_structured_output(schema, method=method)
    with pytest.raises(OutputParserException, match="the stop string"):
        structured.invoke("Where?", stop=[". "])
    with pytest.raises(OutputParserException, match="the stop string"):
        list(structured.stream("Where?", stop=[". "]))
    assert structured.invoke("Where?", stop=["Nowhere"]) == {"place": "Rome. Oslo."}


OSLO = '{"place": "Oslo", "sure": true}'


def asked_in_every_way(make: Callable[[], Any]) -> list[Any]:
    """What invoke, ainvoke, and the last of stream and astream give; or their errors."""

    async def streamed() -> Any:
        return [part async for part in make().astream("Where?")][-1]

    ways: list[Callable[[], Any]] = [
        lambda: make().invoke("Where?"),
        lambda: asyncio.run(make().ainvoke("Where?")),
        lambda: list(make().stream("Where?"))[-1],
        lambda: asyncio.run(streamed()),
    ]

    def told(way: Callable[[], Any]) -> Any:
        try:
            return way()
        except OutputParserException as error:
            return str(error)

    return [told(way) for way in ways]


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_a_model_with_tools_may_still_answer_in_the_schema(method):
    call = f'<tool_call>[{{"name": "Answer", "arguments": {OSLO}}}]</tool_call>'
    said = call if method == "function_calling" else OSLO

    def make(**options: Any) -> Any:
        bound = ChatRapid(decoder=Scripted(said)).bind_tools([weather])
        return bound.with_structured_output(Answer, method=method, **options)

    answer = Answer(place="Oslo", sure=True)
    assert asked_in_every_way(make) == [answer] * 4
    parts = list(make(include_raw=True).stream("Where?"))
    whole = {key: value for part in parts for key, value in part.items()}
    assert (whole["parsed"], whole["parsing_error"]) == (answer, None)


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_a_call_in_the_place_of_an_object_is_told(method):
    def make(**options: Any) -> Any:
        bound = ChatRapid(decoder=Scripted(ROME)).bind_tools([weather])
        return bound.with_structured_output(Answer, method=method, **options)

    for told in asked_in_every_way(make):
        assert "the model called weather instead of answering" in told
    raw = make(include_raw=True).invoke("Where?")
    assert raw["raw"].tool_calls[0]["args"] == {"place": "Rome"}
    assert raw["parsed"] is None
    assert "the model called weather" in str(raw["parsing_error"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("include_raw", [False, True])
def test_the_draft_stays_bound(llm, prompts, method, include_raw):
    options = {"method": method, "include_raw": include_raw}
    bound = llm.bind(draft_messages="Retrieved.")
    llm.with_structured_output(Answer, **options).invoke("Where?", draft_messages="Retrieved.")
    bound.with_structured_output(Answer, **options).invoke("Where?")
    bound.bind_tools([weather]).invoke("Where?", max_tokens=1)
    llm.bind_tools([weather]).bind(draft_messages="Retrieved.").invoke("Where?", max_tokens=1)
    drafts = prompts[1::2]
    assert len(drafts) == 4
    assert all("Retrieved." in draft for draft in drafts)


def test_a_documents_chain_answers_in_a_schema(llm, prompts):
    prompt = ChatPromptTemplate.from_template("{context} Where?")
    chain = create_rapid_documents_chain(
        llm.with_structured_output(Answer), prompt, documents="Once in Rome. Then in Oslo."
    )
    answer = chain.invoke({"context": [Document("Once in Rome.")]})
    assert isinstance(answer, Answer)
    assert "Then in Oslo." in prompts[0]
    assert "Then in Oslo." not in prompts[1]
    assert "Once in Rome." in prompts[1]


def test_a_response_format_of_a_call_binds_the_answer(llm):
    described = {"name": "answer", "schema": {**Answer.model_json_schema(), **CLOSED}}
    response_format = {"type": "json_schema", "json_schema": described}
    text = (llm | StrOutputParser()).invoke("Where?", response_format=response_format)
    assert Answer.model_validate_json(text)
    both = llm.bind_tools([weather]).bind(response_format=response_format)
    message = both.invoke("Where?")
    assert message.tool_calls or Answer.model_validate_json(message.content)


@pytest.mark.parametrize(
    ("schema", "options", "says"),
    [
        (None, {}, "schema=None is not allowed"),
        (Answer, {"method": "yaml"}, "method='yaml' is unknown"),
        ({"title": "x", "type": "objekt"}, {}, "objekt"),
        (3, {}, "3 is no schema"),
    ],
)
def test_what_is_wrong_with_a_schema_is_told_when_it_is_bound(llm, schema, options, says):
    with pytest.raises(InvalidParameterError, match=says):
        llm.with_structured_output(schema, **options)


def test_the_profile_says_what_the_model_can(llm, decoder):
    assert llm.profile["tool_calling"]
    assert llm.profile["structured_output"]
    assert llm.profile["max_input_tokens"] == decoder.target.context_window
    assert "max_input_tokens" not in ChatRapid().profile
