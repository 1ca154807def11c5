"""Tools: LlamaIndex's programs, agents and selectors call them through the LLM."""

import asyncio
import json
import sys
from types import ModuleType
from typing import Literal
from unittest.mock import ANY

import pytest
from llama_index.core import Document, MockEmbedding, SummaryIndex, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.query_engine import RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.question_gen.types import SubQuestionList
from llama_index.core.selectors import PydanticSingleSelector
from llama_index.core.tools import FunctionTool, QueryEngineTool, RetrieverTool, ToolMetadata
from pydantic import BaseModel

from llama_index.llms.rapid import RapidLLM
from rapid_llm.errors import InvalidParameterError

LAMP = "The lighthouse was built in 1871 by Ida Brandt."
FERRY = "The ferry is named Freya and carries ninety passengers."
EMBED = MockEmbedding(8)


# Annotations are not put off in this file: LlamaIndex reads a function's as they are.
def weather(place: Literal["Rome", "Oslo"]) -> str:
    """Weather of a place."""
    return f"sunny in {place}"


def written(name: str, **arguments: object) -> str:
    """A call as a model without tools in its template writes it."""
    return f"<tool_call>{json.dumps([{'name': name, 'arguments': arguments}])}</tool_call>"


@pytest.fixture
def tool():
    return FunctionTool.from_defaults(weather)


@pytest.fixture
def llm(decoder):
    return RapidLLM(decoder=decoder, max_tokens=300, temperature=1.0, seed=3)


def test_every_way_to_ask_gives_the_same_call(llm, tool):
    ask = {"tools": [tool], "user_msg": "How is it?", "tool_required": True}

    async def others() -> list[ChatResponse]:
        streamed = [r async for r in await llm.astream_chat_with_tools(**ask)]
        return [streamed[-1], await llm.achat_with_tools(**ask)]

    streamed = list(llm.stream_chat_with_tools(**ask))
    responses = [llm.chat_with_tools(**ask), streamed[-1], *asyncio.run(others())]
    calls = [llm.get_tool_calls_from_response(response) for response in responses]
    assert all(len(each) == 1 for each in calls)
    assert {each[0].tool_name for each in calls} == {"weather"}
    assert len({json.dumps(each[0].tool_kwargs) for each in calls}) == 1
    assert calls[0][0].tool_kwargs["place"] in ("Rome", "Oslo")
    for response in responses:
        assert response.raw["finish_reason"] == "tool_calls"
        assert not response.message.content
        (known,) = response.message.additional_kwargs["tool_calls"]
        assert json.loads(known["function"]["arguments"]) == calls[0][0].tool_kwargs
    partial = [llm.get_tool_calls_from_response(r, error_on_no_tool_call=False) for r in streamed]
    assert partial[0] == []
    assert {} in [each[0].tool_kwargs for each in partial if each]


@pytest.mark.parametrize(
    "choice", ["weather", "any", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_choice_makes_the_model_call(llm, tool, choice):
    response = llm.chat_with_tools([tool], "How is it?", tool_choice=choice)
    assert llm.get_tool_calls_from_response(response)[0].tool_name == "weather"


def test_a_program_and_a_call_of_tools_give_what_the_function_gives(llm, tool):
    said = llm.predict_and_call([tool], "How is it?", tool_required=True)
    assert said.response in ("sunny in Rome", "sunny in Oslo")
    same = asyncio.run(llm.apredict_and_call([tool], "How is it?", tool_required=True))
    assert same.response == said.response

    class Place(BaseModel):
        """A place."""

        place: Literal["Rome", "Oslo"]

    program = FunctionCallingProgram.from_defaults(Place, "Where is {it}?", llm=llm)
    assert isinstance(program(it="it"), Place)


def test_a_model_says_whether_it_can_be_shown_tools(decoder, make_decoder):
    assert RapidLLM(decoder=decoder).metadata.is_function_calling_model
    assert not RapidLLM(decoder=make_decoder(chat=False)).metadata.is_function_calling_model
    own = RapidLLM(decoder=decoder, messages_to_prompt=lambda messages: "a")
    assert not own.metadata.is_function_calling_model
    unknown = make_decoder()
    unknown.tokenizer.chat_template += "{% if tools %}<tool_call><function={% endif %}"
    assert not RapidLLM(decoder=unknown).metadata.is_function_calling_model


def test_tools_calls_and_results_reach_both_prompts(llm, tool, spy):
    block = ToolCallBlock(tool_call_id="1", tool_name="weather", tool_kwargs={"place": "Rome"})
    function = {"name": "weather", "arguments": '{"place": "Rome"}'}
    beside = {"tool_calls": [{"id": "1", "type": "function", "function": function}]}
    for called in (
        ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"), block]),
        ChatMessage(role="assistant", content=None, additional_kwargs=beside),
    ):
        history = [
            ChatMessage("How is it?"),
            called,
            ChatMessage(role="tool", content="rainy", additional_kwargs={"tool_call_id": "1"}),
        ]
        prepared = {"chat_history": history, "draft_messages": history, "max_tokens": 1}
        llm.chat_with_tools([tool], **prepared)
        for prompt in (spy.target(), spy.draft()):
            assert "Weather of a place" in prompt
            assert '{"name": "weather", "arguments": {"place": "Rome"}}' in prompt
            assert "rainy" in prompt


def test_a_call_that_was_cut_is_not_made(llm, tool):
    cut = 0
    for tokens in range(40, 80, 8):
        response = llm.chat_with_tools([tool], "?", tool_required=True, max_tokens=tokens)
        if response.raw["finish_reason"] == "length":
            cut += 1
            with pytest.raises(InvalidParameterError, match="raise max_tokens"):
                llm.get_tool_calls_from_response(response)
    assert cut
    assert llm.get_tool_calls_from_response(llm.chat([ChatMessage("?")], max_tokens=1), False) == []


def test_a_call_that_a_stop_string_cuts_is_not_made(scripted):
    made: list[str] = []

    def look(place: str) -> str:
        """Look."""
        made.append(place)
        return place

    said = written("look", place="Rome. Oslo.")
    llm = RapidLLM(decoder=scripted(said, said, said))
    ask = {"tools": [FunctionTool.from_defaults(look)], "user_msg": "Where?"}
    for response in (
        llm.chat_with_tools(**ask, stop=[". "]),
        [*llm.stream_chat_with_tools(**ask, stop=[". "])][-1],
    ):
        with pytest.raises(InvalidParameterError, match="the stop string"):
            llm.get_tool_calls_from_response(response)
    assert llm.predict_and_call(**ask, stop=["Nowhere"]).response == "Rome. Oslo."
    assert made == ["Rome. Oslo."]


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"tool_choice": "time"}, "tool_choice='time' names no tool"),
        ({"tools": [weather]}, "is no tool"),
        ({"tools": [], "tool_required": True}, "without tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {}}]}, "has the name None"),
    ],
)
def test_what_is_wrong_with_tools_is_told_before_a_model_is_loaded(tool, ask, says):
    with pytest.raises(InvalidParameterError, match=says):
        RapidLLM("no such model").chat_with_tools(**{"tools": [tool], "user_msg": "?", **ask})


def test_a_name_that_no_model_can_call_is_refused(llm):
    engine = SummaryIndex.from_documents([]).as_query_engine(llm=llm)
    tool = QueryEngineTool(engine, ToolMetadata("All.", name="my documents"))
    with pytest.raises(InvalidParameterError, match="'my documents'"):
        llm.chat_with_tools([tool], "?")


def test_a_model_without_a_template_takes_no_tools(make_decoder, tool):
    bare = RapidLLM(decoder=make_decoder(chat=False))
    with pytest.raises(InvalidParameterError, match="leave tools out"):
        bare.chat_with_tools([tool], "?")


def test_reasoning_is_told_from_the_answer(scripted):
    from conftest import TEMPLATE

    thinking = TEMPLATE + "{% if false %}<think></think>{% endif %}"
    llm = RapidLLM(decoder=scripted("<think>hm</think>Yes.", "Yes.", template=thinking))
    responses = list(llm.stream_chat([ChatMessage("Is it?")]))
    message = responses[-1].message
    assert message.content == "Yes."
    assert [type(block) for block in message.blocks] == [ThinkingBlock, TextBlock]
    assert "".join(r.additional_kwargs.get("thinking_delta", "") for r in responses) == "hm"
    assert "".join(r.delta for r in responses) == "Yes."
    llm.chat([ChatMessage("Is it?"), message, ChatMessage("Sure?")])
    assert "hm" not in llm.decoder.prompts[-1]  # this template shows no reasoning


# --- agents, routers, sub-questions --------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_an_agent_calls_a_retriever_and_answers_from_it(scripted, streaming):
    index = VectorStoreIndex.from_documents([Document(text=LAMP)], embed_model=EMBED)
    retriever = RetrieverTool.from_defaults(
        index.as_retriever(), name="search", description="Searches the documents."
    )
    decoder = scripted(written("search", input="Who built it?"), "Ida Brandt built it.")
    agent = FunctionAgent(
        tools=[retriever], llm=RapidLLM(decoder=decoder), streaming=streaming, timeout=60
    )

    async def run() -> str:
        return str(await agent.run("Who built the lighthouse?"))

    assert asyncio.run(run()) == "Ida Brandt built it."
    assert "Searches the documents." in decoder.prompts[0]
    assert LAMP not in decoder.prompts[0]
    assert LAMP in decoder.prompts[1]
    assert "<tool_response>" in decoder.prompts[1]


@pytest.mark.parametrize("streaming", [True, False])
def test_an_agent_makes_the_calls_of_one_answer_and_reads_all_their_results(scripted, streaming):
    asked: list[str] = []

    def look_up(place: str) -> str:
        """Look up a place."""
        asked.append(place)
        return f"{place} is sunny."

    calls = [{"name": "look_up", "arguments": {"place": place}} for place in ("Rome", "Oslo")]
    decoder = scripted(f"<tool_call>{json.dumps(calls)}</tool_call>", "Both are sunny.")
    llm, tools = RapidLLM(decoder=decoder), [FunctionTool.from_defaults(look_up)]
    agent = FunctionAgent(tools=tools, llm=llm, streaming=streaming, timeout=60)

    async def run() -> str:
        return str(await agent.run("How are Rome and Oslo?"))

    assert asyncio.run(run()) == "Both are sunny."
    assert sorted(asked) == ["Oslo", "Rome"]
    assert json.dumps(calls) in decoder.prompts[1]
    assert decoder.prompts[1].count("is sunny.") == 2


def test_agents_are_chosen_by_what_the_model_can(llm, tool, make_decoder):
    (agent,) = AgentWorkflow.from_tools_or_functions([tool], llm=llm).agents.values()
    assert isinstance(agent, FunctionAgent)
    bare = RapidLLM(decoder=make_decoder(chat=False))
    (agent,) = AgentWorkflow.from_tools_or_functions([tool], llm=bare).agents.values()
    assert isinstance(agent, ReActAgent)


def test_a_react_agent_asks_in_text(scripted, tool):
    decoder = scripted(
        'Thought: I need a tool.\nAction: weather\nAction Input: {"place": "Oslo"}',
        "Thought: I can answer.\nAnswer: It is sunny.",
    )
    agent = ReActAgent(tools=[tool], llm=RapidLLM(decoder=decoder), timeout=60)

    async def run() -> str:
        return str(await agent.run("How is it in Oslo?"))

    assert asyncio.run(run()) == "It is sunny."
    assert decoder.constraints == [None, None]
    assert "sunny in Oslo" in decoder.prompts[1]


def engines(llm):
    return [
        QueryEngineTool.from_defaults(
            SummaryIndex.from_documents([Document(text=text)]).as_query_engine(llm=llm),
            name=name,
            description=f"About the {name}.",
        )
        for name, text in (("lighthouse", LAMP), ("ferry", FERRY))
    ]


def ask(engine, way, question):
    """The response of a query engine."""
    if way == "query":
        return engine.query(question)

    async def later():
        return await engine.aquery(question)

    return asyncio.run(later())


ways = pytest.mark.parametrize("way", ["query", "aquery"])


@ways
@pytest.mark.parametrize("multi", [False, True])
def test_a_router_selects_with_its_default_selector(scripted, multi, way):
    chosen = {"index": 2, "reason": "It is about a ferry."}
    call = (
        written("MultiSelection", selections=[chosen])
        if multi
        else written("SingleSelection", **chosen)
    )
    decoder = scripted(call, "Freya.")
    llm = RapidLLM(decoder=decoder)
    router = RouterQueryEngine.from_defaults(engines(llm), llm=llm, select_multi=multi)
    assert isinstance(router._selector, PydanticSingleSelector) is not multi
    response = ask(router, way, "What is the ferry's name?")
    assert str(response) == "Freya."
    assert decoder.constraints[0] is not None
    assert FERRY in decoder.prompts[1]
    assert LAMP not in decoder.prompts[1]


@ways
def test_a_router_gathers_the_answers_of_all_engines_that_it_selects(scripted, way):
    chosen = [{"index": n, "reason": "It may tell."} for n in (1, 2)]
    decoder = scripted(written("MultiSelection", selections=chosen), "One.", "Two.", "Both.")
    llm = RapidLLM(decoder=decoder)
    router = RouterQueryEngine.from_defaults(engines(llm), llm=llm, select_multi=True)
    assert str(ask(router, way, "What is there?")) == "Both."
    assert "One." in decoder.prompts[3]
    assert "Two." in decoder.prompts[3]


def test_an_engine_that_a_router_selects_answers_with_a_drafted_object(scripted):
    class Built(BaseModel):
        year: int

    decoder = scripted(written("SingleSelection", index=1, reason="the only one"), '{"year": 1871}')
    whole = Document(text=f"{LAMP}\n\nIts bell cracked.", id_="lamp")
    llm = RapidLLM(decoder=decoder, documents=[whole])
    index = VectorStoreIndex.from_documents([Document(text=LAMP)], embed_model=EMBED)
    engine = QueryEngineTool.from_defaults(
        index.as_query_engine(llm=llm, output_cls=Built), name="lamp", description="The lighthouse."
    )
    response = RouterQueryEngine.from_defaults([engine], llm=llm).query("When was it built?")
    assert response.response == Built(year=1871)
    assert response.metadata["rapid"]["document_ids"] == ["lamp"]
    assert "Its bell cracked." in decoder.prompts[1]


@pytest.fixture
def openai_question_gen(monkeypatch):
    """LlamaIndex's package, which refuses an LLM that is not OpenAI's."""

    class OpenAIQuestionGenerator:
        @staticmethod
        def from_defaults(llm):
            raise ValueError("OpenAIPydanticProgram only supports OpenAI LLMs.")

    package = ModuleType("llama_index.question_gen.openai")
    package.OpenAIQuestionGenerator = OpenAIQuestionGenerator
    monkeypatch.setitem(sys.modules, "llama_index.question_gen", ModuleType("question_gen"))
    monkeypatch.setitem(sys.modules, package.__name__, package)


@ways
@pytest.mark.parametrize("given", [False, True])
def test_sub_questions_are_gathered(scripted, openai_question_gen, given, way):
    asked = {
        "items": [
            {"sub_question": "When was it built?", "tool_name": "lighthouse"},
            {"sub_question": "What is it called?", "tool_name": "ferry"},
        ]
    }
    decoder = scripted(json.dumps(asked), "In 1871.", "Freya.", "In 1871, and Freya.")
    llm = RapidLLM(decoder=decoder)
    held = RapidLLM(decoder=decoder, constraint=SubQuestionList)
    engine = SubQuestionQueryEngine.from_defaults(
        engines(llm),
        llm=llm,
        question_gen=LLMQuestionGenerator.from_defaults(held) if given else None,
        use_async=way == "aquery",
        verbose=False,
    )
    said = ask(engine, way, "When was it built, and what is it called?")
    assert str(said) == "In 1871, and Freya."
    assert decoder.constraints == [{"json": ANY} if given else None, None, None, None]
    assert "In 1871." in decoder.prompts[3]
    assert "Freya." in decoder.prompts[3]


def test_the_packaged_model_calls_the_tool_that_it_has_to(smollm2, tool):
    llm = RapidLLM(decoder=smollm2, max_tokens=128)
    said = llm.predict_and_call([tool], "How is the weather in Oslo?", tool_required=True)
    assert said.response in ("sunny in Rome", "sunny in Oslo")
