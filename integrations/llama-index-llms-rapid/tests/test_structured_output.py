"""Answers that are objects of a class: predictions, structured LLMs and engines."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any, Literal

import pytest
from llama_index.core import Document, MockEmbedding, PromptTemplate, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel, Field, ValidationError, field_validator

from llama_index.llms.rapid import PipelineError, RapidLLM, RapidSynthesizer
from rapid_llm.errors import InvalidParameterError

LAMP = "The lighthouse was built in 1871 by Ida Brandt.\n\nIts lamp went out in 1968 for good."
RETRIEVED, BEYOND = LAMP.split("\n\n")
LAMP_DOCUMENTS = [Document(text=LAMP, id_="lamp")]
QA = PromptTemplate("Where is {it}?")


class Answer(BaseModel):
    """An answer."""

    place: Literal["Rome", "Oslo"]
    sure: bool
    tags: list[Literal["old", "new"]] = Field(max_length=2)


@pytest.fixture
def llm(decoder):
    return RapidLLM(decoder=decoder, max_tokens=200, temperature=1.0, seed=3)


def ways(llm: Any) -> dict[str, list[Any]]:
    """What the four predictions give."""

    async def others() -> tuple[list[Any], list[Any]]:
        stream = await llm.astream_structured_predict(Answer, QA, it="it")
        return [await llm.astructured_predict(Answer, QA, it="it")], [part async for part in stream]

    once, streamed = asyncio.run(others())
    return {
        "sync": [llm.structured_predict(Answer, QA, it="it")],
        "stream": list(llm.stream_structured_predict(Answer, QA, it="it")),
        "async": once,
        "astream": streamed,
    }


def test_the_four_predictions_give_the_same_object(llm):
    given = ways(llm)
    last = [parts[-1] for parts in given.values()]
    assert all(type(each) is Answer for each in last)
    assert all(each == last[0] for each in last)


@pytest.mark.parametrize("way", ["stream", "astream"])
def test_partial_objects_grow(llm, way):
    parts = [part.model_dump(exclude_unset=True) for part in ways(llm)[way]]
    assert len(parts) > 3
    for before, after in pairwise(parts):
        assert before.keys() <= after.keys()
        assert after.get("place", "").startswith(before.get("place", ""))


def test_traces_see_predictions_begin_and_end(llm, trace):
    list(llm.stream_structured_predict(Answer, QA, it="it"))
    kinds = [type(event) for event in trace.events]
    first, last = kinds.index(LLMStructuredPredictStartEvent), len(kinds) - 1
    assert first < kinds.index(LLMStructuredPredictInProgressEvent)
    assert kinds[last] is LLMStructuredPredictEndEvent
    assert trace.span_names.count("RapidLLM.stream_structured_predict") == 1


def test_a_structured_llm_answers_with_objects(llm):
    structured = llm.as_structured_llm(Answer)
    assert isinstance(structured, StructuredLLM)
    messages = [ChatMessage("Where is it?")]

    async def others() -> list[Any]:
        stream = await structured.astream_chat(messages)
        return [await structured.achat(messages), [part async for part in stream][-1]]

    responses = [structured.chat(messages), list(structured.stream_chat(messages))[-1]]
    for response in [*responses, *asyncio.run(others())]:
        assert isinstance(response.raw, Answer)
        assert Answer.model_validate_json(response.message.content) == responses[0].raw
    assert isinstance(structured.complete("Where is it?").raw, Answer)


def test_a_draft_and_the_system_prompt_go_with_a_structured_llm(decoder, spy):
    llm = RapidLLM(decoder=decoder, max_tokens=200, system_prompt="Be brief.")
    draft = [ChatMessage("Shorter.")]
    llm.as_structured_llm(Answer).chat([ChatMessage("Where is it?")], draft_messages=draft)
    assert spy.target().count("Be brief.") == 1
    assert "Shorter." in spy.draft()


def index_of_lamp() -> VectorStoreIndex:
    nodes = Document(text=RETRIEVED, id_="lamp")
    return VectorStoreIndex.from_documents([nodes], embed_model=MockEmbedding(8))


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "structured_llm", "own"])
@pytest.mark.parametrize("way", ["query", "aquery"])
def test_engines_answer_with_objects_that_are_drafted(decoder, spy, mode, way):
    documents = LAMP_DOCUMENTS
    llm = RapidLLM(decoder=decoder, max_tokens=200)
    options: dict[str, Any] = {"llm": llm, "output_cls": Answer}
    if mode == "own":
        options = {
            "llm": llm,
            "response_synthesizer": RapidSynthesizer(llm, documents=documents, output_cls=Answer),
        }
    else:
        llm.documents = documents
        if mode == "structured_llm":
            options = {"llm": llm.as_structured_llm(Answer)}
        else:
            options["response_mode"] = mode
    engine = index_of_lamp().as_query_engine(**options)
    if way == "query":
        response = engine.query("Where is it?")
    else:
        response = asyncio.run(engine.aquery("Where is it?"))
    assert isinstance(response.response, Answer)
    assert response.metadata["rapid"]["document_ids"] == ["lamp"]
    assert len(spy.prompts) == 1
    assert BEYOND in spy.target()
    assert RETRIEVED in spy.draft()
    assert BEYOND not in spy.draft()


async def pieces_of(engine: Any) -> list[str]:
    response = await engine.aquery("Where is it?")
    return [piece async for piece in response.response_gen]


@pytest.mark.parametrize("way", ["query", "aquery"])
def test_a_synthesizer_streams_an_objects_json(decoder, spy, way):
    def engine(max_tokens: int, streaming: bool = True) -> Any:
        llm = RapidLLM(decoder=decoder, max_tokens=max_tokens)
        own = RapidSynthesizer(
            llm, documents=LAMP_DOCUMENTS, output_cls=Answer, streaming=streaming
        )
        return index_of_lamp().as_query_engine(llm=llm, response_synthesizer=own)

    def pieces(max_tokens: int) -> list[str]:
        if way == "aquery":
            return asyncio.run(pieces_of(engine(max_tokens)))
        return list(engine(max_tokens).query("Where is it?").response_gen)

    told = pieces(200)
    assert len(told) > 3
    whole = engine(200, streaming=False).query("Where is it?").response
    assert Answer.model_validate_json("".join(told)) == whole
    assert spy.prompts[0] == spy.prompts[1]
    assert BEYOND in spy.target()
    assert BEYOND not in spy.draft()
    with pytest.raises(InvalidParameterError, match="Answer was complete: raise max_tokens"):
        pieces(8)


def test_an_answer_that_was_cut_is_no_object(llm, decoder):
    async def later(stream: bool) -> None:
        if not stream:
            await llm.astructured_predict(Answer, QA, {"max_tokens": 8}, it="it")
        async for _ in await llm.astream_structured_predict(Answer, QA, {"max_tokens": 8}, it="it"):
            pass

    for ask in (
        lambda: llm.structured_predict(Answer, QA, {"max_tokens": 8}, it="it"),
        lambda: list(llm.stream_structured_predict(Answer, QA, {"max_tokens": 8}, it="it")),
        lambda: asyncio.run(later(False)),
        lambda: asyncio.run(later(True)),
        lambda: (
            index_of_lamp()
            .as_query_engine(llm=RapidLLM(decoder=decoder, max_tokens=8), output_cls=Answer)
            .query("Where is it?")
        ),
    ):
        with pytest.raises(PipelineError, match="Answer was complete: raise max_tokens"):
            ask()


def test_what_only_a_validator_knows_is_its_own_error(scripted):
    class Early(BaseModel):
        year: int

        @field_validator("year")
        @classmethod
        def early(cls, year: int) -> int:
            if year > 1900:
                raise ValueError("too late")
            return year

    llm = RapidLLM(decoder=scripted('{"year": 1871}', '{"year": 1968}'))
    assert llm.structured_predict(Early, QA, it="it").year == 1871
    with pytest.raises(ValidationError, match="too late"):
        llm.structured_predict(Early, QA, it="it")


def test_another_program_mode_is_llama_indexs_own(scripted):
    decoder = scripted('{"place": "Rome", "sure": true, "tags": []}')
    llm = RapidLLM(decoder=decoder, pydantic_program_mode=PydanticProgramMode.LLM)
    assert llm.structured_predict(Answer, QA, it="it").place == "Rome"
    assert decoder.constraints == [None]
    assert "JSON schema" in decoder.prompts[0]


def test_a_model_without_a_chat_template_is_held_to_the_schema(make_decoder):
    llm = RapidLLM(decoder=make_decoder(chat=False), max_tokens=200)
    assert isinstance(llm.structured_predict(Answer, QA, it="it"), Answer)


def test_what_cannot_be_enforced_is_refused(llm, decoder):
    class Once(BaseModel):
        tags: set[str]

    with pytest.raises(PipelineError, match="uniqueItems"):
        llm.structured_predict(Once, QA, it="it")
    bound = RapidLLM(decoder=decoder, constraint="[a-z]+")
    with pytest.raises(PipelineError, match="constraint was given together with"):
        bound.structured_predict(Answer, QA, it="it")
    with pytest.raises(InvalidParameterError, match="is no pydantic class"):
        llm.as_structured_llm(Answer).llm.structured_predict(dict, QA, it="it")
    with pytest.raises(InvalidParameterError, match="is no pydantic class"):
        RapidSynthesizer(llm, documents="a", output_cls=dict)


def test_the_packaged_model_extracts_from_a_document(smollm2):
    class Lighthouse(BaseModel):
        built: int = Field(ge=1000, le=9999)
        engineer: str = Field(max_length=40)

    llm = RapidLLM(decoder=smollm2, max_tokens=128)
    prompt = PromptTemplate("{text}\n\nWhen was the lighthouse built, and by which engineer?")
    parts = list(llm.stream_structured_predict(Lighthouse, prompt, text=LAMP))
    assert type(parts[-1]) is Lighthouse
    assert len(parts) > 1
