"""Token counts of whatever trim_messages, memories and agents measure."""

from __future__ import annotations

import itertools
import warnings

import pytest
from langchain_classic.memory import (
    ConversationSummaryBufferMemory,
    ConversationTokenBufferMemory,
)
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from strict import ALTERNATING, NO_SYSTEM, THINKING, decoder_with
from tiny import TEMPLATE

from langchain_rapid import ChatRapid, RapidLLM

CALL = AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])
IMAGE = HumanMessage([{"type": "image_url", "image_url": {"url": "http://x/y.png"}}])
HISTORY: list[BaseMessage] = [
    SystemMessage("Be brief."),
    HumanMessage("First question?"),
    AIMessage("First answer."),
    HumanMessage("Second question?"),
    AIMessage("Second answer."),
    HumanMessage("Third?"),
]


@pytest.fixture(params=[TEMPLATE, ALTERNATING, NO_SYSTEM], ids=["lenient", "strict", "no system"])
def llm(request) -> ChatRapid:
    return ChatRapid(decoder=decoder_with(request.param), max_tokens=4)


def test_a_chat_is_counted_as_the_model_reads_it(llm):
    for messages in (HISTORY, HISTORY[1:], HISTORY[1:2]):
        read = llm.invoke(messages).usage_metadata["input_tokens"]
        assert llm.get_num_tokens_from_messages(messages) == read


def test_every_part_of_a_history_is_counted(llm):
    kinds = [*HISTORY[:4], ChatMessage("Aside.", role="narrator"), CALL]
    kinds += [ToolMessage("42", tool_call_id="1")]
    assert llm.get_num_tokens_from_messages([]) == 0
    for length in (1, 2, 3):
        for messages in itertools.permutations(kinds, length):
            assert llm.get_num_tokens_from_messages(list(messages)) > 0
    assert llm.get_num_tokens_from_messages([*HISTORY, IMAGE]) > 0


def test_more_messages_never_count_less(llm):
    counts = [llm.get_num_tokens_from_messages(HISTORY[:n]) for n in range(len(HISTORY) + 1)]
    assert counts == sorted(counts)


@pytest.mark.parametrize("strategy", ["first", "last"])
@pytest.mark.parametrize("messages", [HISTORY, HISTORY[:-1], HISTORY[1:], HISTORY[2:]])
def test_trim_messages_counts_with_the_model(llm, strategy, messages):
    for most in range(0, 200, 20):
        kept = trim_messages(messages, max_tokens=most, strategy=strategy, token_counter=llm)
        assert llm.get_num_tokens_from_messages(kept) <= most
    assert trim_messages(messages, max_tokens=500, strategy=strategy, token_counter=llm) == messages


def test_memories_stay_within_their_limit(llm):
    for kind in (ConversationSummaryBufferMemory, ConversationTokenBufferMemory):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            memory = kind(llm=llm, max_token_limit=60, return_messages=True)
        for _ in range(3):
            memory.save_context({"input": "x" * 40}, {"output": "y" * 40})
        assert llm.get_num_tokens_from_messages(memory.chat_memory.messages) <= 60


def test_a_counter_of_ones_own_is_used(decoder):
    llm = ChatRapid(decoder=decoder, custom_get_token_ids=lambda text: [0])
    assert llm.get_num_tokens_from_messages(HISTORY) == len(HISTORY)
    assert llm.get_num_tokens("Any text") == 1


def test_variables_of_the_template_are_counted():
    decoder = decoder_with(THINKING)
    plain, quiet = (
        ChatRapid(decoder=decoder, max_tokens=4, chat_template_kwargs=variables)
        for variables in ({}, {"enable_thinking": False})
    )
    for llm in (plain, quiet):
        read = llm.invoke("Hi").usage_metadata["input_tokens"]
        assert llm.get_num_tokens_from_messages([HumanMessage("Hi")]) == read
    assert quiet.get_num_tokens_from_messages(HISTORY) == 2 + plain.get_num_tokens_from_messages(
        HISTORY
    )


def test_a_completion_model_counts_messages_as_text(decoder):
    llm = RapidLLM(decoder=decoder)
    assert llm.get_num_tokens_from_messages([]) == 0
    assert llm.get_num_tokens_from_messages(HISTORY) > 0
