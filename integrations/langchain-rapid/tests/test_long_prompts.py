"""Prompts longer than the context window: what is cut, what is kept, and what the answer says."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableLambda
from rapid_llm.decoder import RapidDecoder
from rapid_llm.errors import ContextWindowError, InvalidParameterError
from tiny import WINDOW, tiny_model, tiny_tokenizer

from langchain_rapid import ChatRapid, RapidLLM, create_rapid_documents_chain

FACT, OTHER = "The keeper is Orsina Dray.", "The oven is fired with beech."
TEXTS = {
    "a": "A-BEGIN" + "a" * 2000 + FACT + "a" * 2000 + "A-END",
    "b": "B-BEGIN" + "b" * 1000 + OTHER + "b" * 3000 + "B-END",
}
CHUNKS = [Document(FACT, metadata={"source": "a"}), Document(OTHER, metadata={"source": "b"})]
KEPT = ("A-BEGIN", FACT, "A-END", "B-BEGIN", OTHER, "B-END")
PROMPT = ChatPromptTemplate.from_template("Context: {context}\nQuestion: {input}")
TEXT_PROMPT = PromptTemplate.from_template("Context: {context}\nQuestion: {input}")
INPUT = {"context": CHUNKS, "input": "Who?"}
AS_IT_IS = RunnableLambda(lambda message: message)


def tokens(decoder: RapidDecoder, text: str) -> int:
    return len(decoder.tokenizer(text, add_special_tokens=False)["input_ids"])


# --- documents ---------------------------------------------------------------------------------


def assert_cut_around_what_was_retrieved(decoder: RapidDecoder, target: str) -> None:
    assert all(piece in target for piece in KEPT)
    assert "a" + FACT + "a" in target  # with its surroundings
    assert WINDOW - 60 < tokens(decoder, target) <= WINDOW - 20


def test_a_chain_keeps_every_retrieved_passage(decoder, prompts):
    llm = ChatRapid(decoder=decoder, max_tokens=20, truncate="middle")
    chain = create_rapid_documents_chain(llm, PROMPT, documents=TEXTS, output_parser=AS_IT_IS)
    message = chain.invoke(INPUT)
    target, draft = prompts
    assert_cut_around_what_was_retrieved(decoder, target)
    assert target.endswith("\nQuestion: Who?\n[assistant]")
    assert draft == f"<s>[user]Context: {FACT}\n\n{OTHER}\nQuestion: Who?\n[assistant]"
    omitted = message.response_metadata["rapid"]["omitted_tokens"]
    kept = sum(target.count(letter) for letter in "ab")
    assert omitted > 8000 - kept > 0


def test_a_retrieving_model_keeps_every_retrieved_passage(decoder, prompts):
    found = RunnableLambda(lambda question: CHUNKS)
    for kind in (ChatRapid, RapidLLM):
        prompts.clear()
        llm = kind(
            decoder=decoder, max_tokens=20, truncate="middle", retriever=found, documents=TEXTS
        )
        llm.invoke("Who?")
        assert_cut_around_what_was_retrieved(decoder, prompts[0])
    history = [SystemMessage("Be brief."), HumanMessage("Hi."), AIMessage("Yes?")]
    prompts.clear()
    ChatRapid(
        decoder=decoder, max_tokens=20, truncate="middle", retriever=found, documents=TEXTS
    ).invoke([*history, HumanMessage("Who?")])
    assert_cut_around_what_was_retrieved(decoder, prompts[0])
    assert "[system]Be brief.\n[user]Hi.\n[assistant]Yes?\n" in prompts[0]


async def test_streams_and_completion_models_cut_the_documents_too(decoder, prompts):
    llm = RapidLLM(decoder=decoder, max_tokens=20)
    chain = create_rapid_documents_chain(llm.bind(truncate="middle"), TEXT_PROMPT, documents=TEXTS)
    list(chain.stream(INPUT))
    assert len("".join([piece async for piece in chain.astream(INPUT)])) == 20
    for target in prompts[::2]:
        assert_cut_around_what_was_retrieved(decoder, target)


def test_labels_and_separators_stay(decoder, prompts):
    llm = ChatRapid(decoder=decoder, max_tokens=20, truncate="middle")
    create_rapid_documents_chain(
        llm,
        PROMPT,
        documents=TEXTS,
        document_prompt=PromptTemplate.from_template("({source}) {page_content} (end)"),
        document_separator="\n--\n",
    ).invoke(INPUT)
    assert_cut_around_what_was_retrieved(decoder, prompts[0])
    assert "Context: (a) A-BEGIN" in prompts[0]
    assert "A-END (end)\n--\n(b) B-BEGIN" in prompts[0]


def test_a_passage_that_was_reworded_is_kept_at_the_end(decoder, prompts):
    reworded = Document("Orsina keeps it.", metadata={"source": "a"})
    llm = ChatRapid(decoder=decoder, max_tokens=20, truncate="middle")
    chain = create_rapid_documents_chain(llm, PROMPT, documents=TEXTS)
    chain.invoke({"context": [reworded], "input": "Who?"})
    assert prompts[0].index("Orsina keeps it.") > prompts[0].index("A-END")


def test_documents_that_stand_in_a_prompt_twice_are_cut_twice(decoder, prompts):
    llm = ChatRapid(decoder=decoder, max_tokens=20, truncate="middle")
    prompt = ChatPromptTemplate.from_messages(
        [("system", "{context}"), ("human", "{context}\n{input}")]
    )
    create_rapid_documents_chain(llm, prompt, documents=TEXTS).invoke(INPUT)
    assert all(prompts[0].count(piece) == 2 for piece in KEPT)
    assert_cut_around_what_was_retrieved(decoder, prompts[0])


def test_a_template_that_escapes_its_variables_keeps_the_passages(decoder, prompts):
    text = TEXTS["a"].replace("a" * 2000, '<b>"' + "a" * 1990)
    llm = ChatRapid(decoder=decoder, max_tokens=20, truncate="middle")
    prompt = ChatPromptTemplate.from_template(
        "{{context}}\nQuestion: {{input}}", template_format="mustache"
    )
    create_rapid_documents_chain(llm, prompt, documents={"a": text}).invoke(
        {"context": CHUNKS[:1], "input": "Who?"}
    )
    assert "&lt;b&gt;" in prompts[0]
    assert FACT in prompts[0]
    assert prompts[0].endswith("Question: Who?\n[assistant]")


def test_nothing_is_left_out_of_what_fits(decoder):
    llm = ChatRapid(decoder=decoder, max_tokens=20, truncate="middle")
    rapid = llm.invoke("Hello").response_metadata["rapid"]
    assert rapid["omitted_tokens"] == 0


def test_passages_alone_too_long_are_refused(decoder):
    text = "x" * 3000
    chain = create_rapid_documents_chain(
        ChatRapid(decoder=decoder, truncate="middle"), PROMPT, documents=text
    )
    with pytest.raises(ContextWindowError, match="retrieve less"):
        chain.invoke({"context": [Document(text)], "input": "Who?"})


def test_another_rule_is_refused(decoder):
    with pytest.raises(InvalidParameterError, match="truncate='end'"):
        ChatRapid(decoder=decoder).invoke("Hello", truncate="end")


# --- the answer's length -----------------------------------------------------------------------


@pytest.mark.parametrize("truncate", [None, "middle"])
@pytest.mark.parametrize("max_tokens", [WINDOW, 10 * WINDOW])
def test_as_many_tokens_as_fit(decoder, truncate, max_tokens, monkeypatch):
    asked = "x" * 2000
    for llm, prompt in (
        (ChatRapid(decoder=decoder, max_tokens=max_tokens, truncate=truncate), asked),
        (RapidLLM(decoder=decoder, max_tokens=max_tokens, truncate=truncate), asked),
    ):
        answer = llm.generate_prompt([PromptTemplate.from_template(prompt).invoke({})])
        generation = answer.generations[0][0]
        info = generation.generation_info or generation.message.response_metadata
        room = info["rapid"]["max_new_tokens"]
        assert len(generation.text) == room
        assert room < 60 if truncate is None else room >= WINDOW // 2


def test_a_draft_prompt_too_long_is_left_out(decoder):
    message = ChatRapid(decoder=decoder, max_tokens=4).invoke("Hi", draft_messages="x" * 3000)
    rapid = message.response_metadata["rapid"]
    assert rapid["method"] == "lc"
    assert str(WINDOW) in rapid["draft_skipped"]


def test_a_draft_prompt_too_long_is_cut_where_that_was_asked_for(prompts):
    small = tiny_model(1)
    small.config.max_position_embeddings = 256
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), small, name="t", drafter_name="d")
    llm = ChatRapid(decoder=decoder, max_tokens=4, truncate="middle")
    message = llm.invoke("Hi", draft_messages="x" * 600)
    assert message.response_metadata["rapid"]["method"] == "rapid"
    assert tokens(decoder, prompts[1]) <= 252


# --- chats -------------------------------------------------------------------------------------


def long_chat(turns: int) -> list[BaseMessage]:
    said: list[BaseMessage] = [SystemMessage("Be brief.")]
    for n in range(turns):
        said += [HumanMessage(f"Question {n}: " + "q" * 40), AIMessage(f"Answer {n}.")]
    return [*said, HumanMessage("The last question?")]


def test_a_chat_that_outgrew_the_window_is_refused_unless_it_may_be_shortened(decoder, prompts):
    llm = ChatRapid(decoder=decoder, max_tokens=20)
    with pytest.raises(ContextWindowError):
        llm.invoke(long_chat(60))
    prompts.clear()
    llm.invoke(long_chat(60), truncate="middle")
    (target,) = prompts
    assert target.startswith("<s>[system]Be brief.\n[user]Question ")
    assert target.endswith(
        f"{'q' * 40}\n[assistant]Answer 59.\n[user]The last question?\n[assistant]"
    )
    assert "Question 0:" not in target
    assert WINDOW - 120 < tokens(decoder, target) <= WINDOW - 20
    assert "[...]" not in target


def test_a_long_history_does_not_displace_the_documents(decoder, prompts):
    found = RunnableLambda(lambda question: CHUNKS[:1])
    llm = ChatRapid(
        decoder=decoder,
        max_tokens=20,
        truncate="middle",
        retriever=found,
        documents={"a": FACT + " " + "a" * 300},
    )
    llm.invoke(long_chat(60))
    target = prompts[0]
    assert FACT in target
    assert "Be brief." in target
    assert "Question 0:" not in target
    assert target.endswith("Question: The last question?\n[assistant]")


def test_long_documents_do_not_displace_the_history(decoder, prompts):
    found = RunnableLambda(lambda question: CHUNKS[:1])
    llm = ChatRapid(
        decoder=decoder,
        max_tokens=20,
        truncate="middle",
        retriever=found,
        documents={"a": "a" * WINDOW + FACT + "a" * WINDOW},
    )
    llm.invoke(long_chat(60))
    target = prompts[0]
    assert FACT in target
    assert "Question 0:" not in target
    assert "Question 59:" in target
    assert WINDOW // 2 - 80 < target.count("a" * 10) * 10 < WINDOW // 2 + 80
    assert WINDOW - 40 < tokens(decoder, target) <= WINDOW - 20


def test_an_answer_that_may_be_long_does_not_make_a_prompt_too_long(decoder, prompts):
    chat = long_chat(16)
    for limits in ({}, {"truncate": "middle"}):
        ChatRapid(decoder=decoder, max_tokens=WINDOW, **limits).invoke(chat)
    assert tokens(decoder, prompts[0]) > WINDOW // 2
    assert prompts[0] == prompts[1]


def test_a_document_in_an_early_turn_is_cut_and_not_lost(decoder, prompts):
    pasted = HumanMessage("BEGIN" + "x" * 3000 + "END")
    llm = ChatRapid(decoder=decoder, max_tokens=20, truncate="middle")
    llm.invoke([pasted, AIMessage("Read."), HumanMessage("And?")])
    assert prompts[0].startswith("<s>[user]BEGINx")
    assert "xEND\n[assistant]Read.\n[user]And?" in prompts[0]


def test_an_empty_prompt_is_refused(decoder):
    for truncate in (None, "middle"):
        with pytest.raises(InvalidParameterError, match="empty"):
            ChatRapid(decoder=decoder, truncate=truncate).invoke([])
        with pytest.raises(InvalidParameterError, match="empty"):
            RapidLLM(decoder=decoder, truncate=truncate).invoke("")
