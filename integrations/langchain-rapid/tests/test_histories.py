"""Histories as real front ends send them: strict templates, reasoning, answers to be continued."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
)
from langchain_core.runnables import RunnableLambda
from strict import ALTERNATING, NO_SYSTEM, THINKING, decoder_with

from langchain_rapid import ChatRapid

HISTORIES: dict[str, list[BaseMessage]] = {
    "two human in a row": [HumanMessage("aa"), HumanMessage("bb")],
    "the assistant first": [AIMessage("aa"), HumanMessage("bb")],
    "system, then assistant": [SystemMessage("ss"), AIMessage("aa"), HumanMessage("bb")],
    "system in the middle": [
        HumanMessage("aa"),
        AIMessage("bb"),
        SystemMessage("ss"),
        HumanMessage("cc"),
    ],
    "two system": [SystemMessage("ss"), SystemMessage("rr"), HumanMessage("cc")],
    "two assistant": [HumanMessage("aa"), AIMessage("bb"), AIMessage("cc"), HumanMessage("dd")],
    "system alone": [SystemMessage("ss")],
}


@pytest.mark.parametrize("template", [ALTERNATING, NO_SYSTEM], ids=["alternating", "no system"])
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_strict_templates_get_every_history(prompts, template, history):
    llm = ChatRapid(decoder=decoder_with(template), max_tokens=2)
    assert llm.invoke(history).content
    assert "".join(chunk.content for chunk in llm.stream(history))
    llm.invoke("?", draft_messages=history)
    for prompt in (prompts[0], prompts[3]):
        assert all(str(message.content) in prompt for message in history)


def test_documents_reach_a_template_without_a_system_role(prompts):
    found = RunnableLambda(lambda question: [])
    llm = ChatRapid(
        decoder=decoder_with(NO_SYSTEM),
        max_tokens=2,
        retriever=found,
        documents="Text.",
        on_empty="read_all",
    )
    llm.invoke([SystemMessage("Be brief."), HumanMessage("?")])
    assert "Be brief." in prompts[0]
    assert "Text." in prompts[0]


# --- reasoning ---------------------------------------------------------------------------------

REASONED: dict[str, dict[str, Any]] = {
    "reasoning": {"content": [{"type": "reasoning", "reasoning": "hmm"}, "Paris"]},
    "thinking": {
        "content": [
            {"type": "thinking", "thinking": "hmm", "signature": "s"},
            {"type": "text", "text": "Paris"},
        ]
    },
    "content blocks": {
        "content_blocks": [
            {"type": "reasoning", "reasoning": "hmm"},
            {"type": "text", "text": "Paris"},
        ]
    },
    "beside the content": {"content": "Paris", "additional_kwargs": {"reasoning_content": "hmm"}},
}


@pytest.mark.parametrize("answer", REASONED.values(), ids=REASONED)
def test_reasoning_is_left_out_of_the_text(llm, prompts, answer):
    history = [HumanMessage("Capital?"), AIMessage(**answer), HumanMessage("Sure?")]
    llm.invoke(history)
    assert prompts == ["<s>[user]Capital?\n[assistant]Paris\n[user]Sure?\n[assistant]"]


@pytest.mark.parametrize("answer", REASONED.values(), ids=REASONED)
def test_reasoning_reaches_a_template_that_has_a_place_for_it(prompts, answer):
    llm = ChatRapid(decoder=decoder_with(THINKING), max_tokens=2)
    llm.invoke([HumanMessage("Capital?"), AIMessage(**answer), HumanMessage("Sure?")])
    assert prompts == ["<s>[user]Capital?\n[assistant](hmm)Paris\n[user]Sure?\n[assistant]"]


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hmm"}]}],
        [{"type": "redacted_thinking", "data": "x"}],
        [{"type": "reasoning", "reasoning": "hmm"}],
    ],
)
def test_reasoning_without_text_is_an_empty_answer(llm, prompts, parts):
    llm.invoke([HumanMessage("Capital?"), AIMessage(parts), HumanMessage("Sure?")])
    assert prompts == ["<s>[user]Capital?\n[assistant]\n[user]Sure?\n[assistant]"]


# --- an answer to be continued -----------------------------------------------------------------


@pytest.mark.parametrize(
    "begun",
    [
        AIMessage("The answer is"),
        AIMessage([{"type": "text", "text": "The answer is"}]),
        ChatMessage("The answer is", role="assistant"),
    ],
)
def test_a_last_answer_is_continued(llm, prompts, begun):
    message = llm.invoke([HumanMessage("Capital?"), begun])
    assert prompts == ["<s>[user]Capital?\n[assistant]The answer is"]
    assert "The answer is" not in message.content
    pieces = llm.stream([HumanMessage("Capital?"), begun])
    assert "".join(chunk.content for chunk in pieces) == message.content


def test_with_a_retriever_both_prompts_are_continued(decoder, prompts):
    found = RunnableLambda(lambda question: [Document("Paris is it.")])
    llm = ChatRapid(
        decoder=decoder, max_tokens=2, retriever=found, documents="Paris is it. Or is it?"
    )
    llm.invoke([HumanMessage("Capital?"), AIMessage("The answer is")])
    assert len(prompts) == 2
    assert all(text.endswith("Capital?\n[assistant]The answer is") for text in prompts)


def test_the_question_is_the_users_last_message_of_any_class(decoder):
    asked: list[str] = []

    def find(question: str) -> list[Document]:
        asked.append(question)
        return []

    llm = ChatRapid(
        decoder=decoder, max_tokens=2, retriever=RunnableLambda(find), documents="Text."
    )
    llm.invoke([HumanMessage("Old?"), AIMessage("Yes."), ChatMessage(role="user", content="New?")])
    llm.invoke([ChatMessage(role="user", content="Only?"), ChatMessage(role="note", content="-")])
    assert asked == ["New?\nOld?", "Only?"]  # with what was asked before it
