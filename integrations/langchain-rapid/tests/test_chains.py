"""create_rapid_documents_chain and retriever= on tiny models: prompts, cache, traces, errors."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import (
    ChatPromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
)
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough
from langchain_core.tracers.base import BaseTracer
from pydantic import Field, ValidationError
from rapid_llm.errors import ContextWindowError, DocumentError, InvalidParameterError

from langchain_rapid import (
    ChatRapid,
    RapidLLM,
    RetrievalError,
    create_rapid_documents_chain,
)

HIDDEN = "This sentence was not retrieved."
TEXTS = {"a": f"Ann sails. {HIDDEN} Ann sings.", "b": "Bob bakes. Bob sleeps."}
CHUNKS = [
    Document("Bob bakes.", metadata={"source": "b", "page": 3}, id="1"),
    Document("Ann sings.", metadata={"source": "a", "page": 9}, id="2"),
]
DOCUMENTS = f"{TEXTS['a']}\n\n{TEXTS['b']}"
PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "Use this:\n{context}"),
        MessagesPlaceholder("chat_history", optional=True),
        ("human", "{input}"),
    ]
)

AS_IT_IS = RunnableLambda(lambda message: message)


def rendered(context: str, question: str = "Who bakes?", history: str = "") -> str:
    return f"<s>[system]Use this:\n{context}\n{history}[user]{question}\n[assistant]"


class Fixed(BaseRetriever):
    """Finds the same chunks whatever it is asked."""

    chunks: list[Document]
    asked: list[str] = Field(default_factory=list)
    error: Exception | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        self.asked.append(query)
        if self.error is not None:
            raise self.error
        return list(self.chunks)


@pytest.fixture
def retriever() -> Fixed:
    return Fixed(chunks=CHUNKS, asked=[])


@pytest.fixture
def llm(decoder) -> ChatRapid:
    return ChatRapid(decoder=decoder, max_tokens=8)


@pytest.fixture
def grounded(decoder, retriever) -> ChatRapid:
    return ChatRapid(decoder=decoder, max_tokens=8, retriever=retriever, documents=TEXTS)


class Runs(BaseTracer):
    """Keeps finished runs, the outermost last."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Any] = []

    def _persist_run(self, run: Any) -> None:
        pass

    def _end_trace(self, run: Any) -> None:
        super()._end_trace(run)
        self.runs.append(run)

    def count(self, text: str) -> int:
        return sum(
            repr((run.inputs, run.outputs, run.extra, run.serialized, run.events)).count(text)
            for run in self.runs
        )


def traced(chain: Any, inputs: Any) -> Runs:
    tracer = Runs()
    chain.invoke(inputs, {"callbacks": [tracer]})
    return tracer


# --- the chain ---------------------------------------------------------------------------------


def test_swapping_the_llm_changes_only_the_target_prompt(llm, retriever, prompts):
    """Nothing differs but the LLM and one argument; the draft is what the old LLM read."""
    read: list[str] = []

    class Recording(FakeListChatModel):
        def _call(self, messages: Any, *args: Any, **kwargs: Any) -> str:
            read.append("|".join(f"{m.type}:{m.content}" for m in messages))
            return super()._call(messages, *args, **kwargs)

    before = create_retrieval_chain(
        retriever, create_stuff_documents_chain(Recording(responses=["Bob."]), PROMPT)
    )
    after = create_retrieval_chain(
        retriever, create_rapid_documents_chain(llm, PROMPT, documents=TEXTS)
    )
    old, new = before.invoke({"input": "Who bakes?"}), after.invoke({"input": "Who bakes?"})
    assert old.keys() == new.keys() == {"input", "context", "answer"}
    assert new["context"] == old["context"] == CHUNKS  # with ids and metadata
    assert isinstance(new["answer"], str)
    assert len(new["answer"]) == 8
    target, draft = prompts
    assert target == rendered(DOCUMENTS)
    assert draft == rendered("Bob bakes.\n\nAnn sings.")
    assert read == ["system:Use this:\nBob bakes.\n\nAnn sings.|human:Who bakes?"]


async def test_invoke_stream_batch_and_their_async_forms_agree(llm, retriever, prompts):
    chain = create_retrieval_chain(
        retriever, create_rapid_documents_chain(llm, PROMPT, documents=TEXTS)
    )
    question = {"input": "Who bakes?"}
    answer = chain.invoke(question)["answer"]
    assert (await chain.ainvoke(question))["answer"] == answer
    pieces = [chunk["answer"] for chunk in chain.stream(question) if "answer" in chunk]
    assert "".join(pieces) == answer
    assert len([piece for piece in pieces if piece]) > 1
    pieces = [chunk["answer"] async for chunk in chain.astream(question) if "answer" in chunk]
    assert "".join(pieces) == answer
    assert [a["answer"] for a in chain.batch([question] * 2)] == [answer] * 2
    assert [a["answer"] for a in await chain.abatch([question] * 2)] == [answer] * 2
    assert set(prompts) == {rendered(DOCUMENTS), rendered("Bob bakes.\n\nAnn sings.")}


def test_a_plain_chain_of_runnables_answers(llm, retriever, prompts):
    chain = {"context": retriever, "input": RunnablePassthrough()} | create_rapid_documents_chain(
        llm, PROMPT, documents=TEXTS
    )
    assert len(chain.invoke("Who bakes?")) == 8
    assert "".join(chain.stream("Who bakes?")) == chain.invoke("Who bakes?")
    assert prompts[0] == rendered(DOCUMENTS)
    assert retriever.asked == ["Who bakes?"] * 3


def test_history_is_in_both_prompts(llm, prompts):
    chain = create_rapid_documents_chain(llm, PROMPT, documents=TEXTS)
    history = [HumanMessage("Hi."), AIMessage("Yes?")]
    chain.invoke({"context": CHUNKS[:1], "input": "Who bakes?", "chat_history": history})
    said = "[user]Hi.\n[assistant]Yes?\n"
    assert prompts == [rendered(TEXTS["b"], history=said), rendered("Bob bakes.", history=said)]


def test_the_other_arguments_are_those_of_the_stuff_chain(llm, prompts):
    arguments: dict[str, Any] = {
        "document_prompt": PromptTemplate.from_template("{source}: {page_content}"),
        "document_separator": "\n--\n",
        "document_variable_name": "found",
        "output_parser": StrOutputParser() | RunnableLambda(len),
    }
    prompt = ChatPromptTemplate.from_template("{found} {input}")
    inputs = {"found": CHUNKS, "input": "Who?"}
    create_stuff_documents_chain(llm, prompt, **arguments).invoke(inputs)
    chain = create_rapid_documents_chain(llm, prompt, documents=TEXTS, **arguments)
    assert chain.invoke(inputs) == 8
    stuffed, target, draft = prompts
    assert draft == stuffed == "<s>[user]b: Bob bakes.\n--\na: Ann sings. Who?\n[assistant]"
    assert target == f"<s>[user]a: {TEXTS['a']}\n--\nb: {TEXTS['b']} Who?\n[assistant]"


def test_bound_arguments_of_the_llm_stay(llm, prompts):
    chain = create_rapid_documents_chain(llm.bind(max_tokens=3), PROMPT, documents=TEXTS)
    assert len(chain.invoke({"context": CHUNKS, "input": "Who bakes?"})) == 3
    configured = llm.with_config(tags=["x"]).with_retry()
    chain = create_rapid_documents_chain(configured, PROMPT, documents=TEXTS)
    assert len(chain.invoke({"context": CHUNKS, "input": "Who bakes?"})) == 8
    assert prompts[:2] == prompts[2:]


def test_a_completion_model_gets_both_prompts_as_text(decoder, prompts):
    llm = RapidLLM(decoder=decoder, max_tokens=8)
    prompt = PromptTemplate.from_template("{context} {input}")
    chain = create_rapid_documents_chain(llm, prompt, documents=TEXTS)
    assert len(chain.invoke({"context": CHUNKS[:1], "input": "Who?"})) == 8
    assert prompts == [f"<s>{TEXTS['b']} Who?", "<s>Bob bakes. Who?"]


@pytest.mark.parametrize("kind", [ChatRapid, RapidLLM])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda llm: llm.with_fallbacks([llm]),
        lambda llm: llm.configurable_fields(max_tokens=ConfigurableField(id="most")),
        lambda llm: llm | AS_IT_IS,
    ],
    ids=["with fallbacks", "configurable", "with a step after it"],
)
def test_a_model_in_wrappers_gets_both_prompts(decoder, prompts, kind, wrapped):
    llm = kind(decoder=decoder, max_tokens=8)
    prompt = ChatPromptTemplate.from_template("{context} {input}")
    chain = create_rapid_documents_chain(wrapped(llm), prompt, documents=TEXTS)
    assert len(chain.invoke({"context": CHUNKS[:1], "input": "Who?"})) == 8
    assert len("".join(chain.stream({"context": CHUNKS[:1], "input": "Who?"}))) == 8
    assert len(prompts) == 4
    assert all(TEXTS["b"] in target for target in prompts[::2])
    assert not any("sleeps" in draft for draft in prompts[1::2])


def test_the_chunks_are_in_the_metadata(llm):
    chain = create_rapid_documents_chain(llm, PROMPT, documents=TEXTS, output_parser=AS_IT_IS)
    message = chain.invoke({"context": CHUNKS, "input": "Who bakes?"})
    assert message.response_metadata["rapid"]["chunks"] == [
        {"id": "1", "document_id": "b", "start_index": 0},
        {"id": "2", "document_id": "a", "start_index": TEXTS["a"].index("Ann sings.")},
    ]
    assert message.response_metadata["rapid"]["method"] == "rapid"


def test_repeated_chunks_are_drafted_from_once(llm, prompts):
    chain = create_rapid_documents_chain(llm, PROMPT, documents=TEXTS)
    chain.invoke({"context": [CHUNKS[0], *CHUNKS, CHUNKS[1]], "input": "Who bakes?"})
    assert prompts[1] == rendered("Bob bakes.\n\nAnn sings.")


def test_the_draft_is_part_of_the_cache_key(decoder, prompts):
    def runs(chunks: list[Document]) -> int:
        prompts.clear()
        chain.invoke({"context": chunks, "input": "Who?"})
        return len(prompts)

    one = Document("Bob bakes.", metadata={"source": "b"}, id="1")
    other = Document("Bob sleeps.", metadata={"source": "b"}, id="2")
    prompt = ChatPromptTemplate.from_template("{context} {input}")
    for kind in (ChatRapid, RapidLLM):
        llm = kind(decoder=decoder, max_tokens=4, cache=InMemoryCache())
        chain = create_rapid_documents_chain(llm, prompt, documents=TEXTS)
        assert runs([one]) == 2
        assert runs([one]) == 0
        assert runs([other]) == 2  # the same target prompt
        assert runs([other]) == 0


def test_a_trace_holds_the_documents_once(llm, everything, retriever):
    chain = create_retrieval_chain(
        retriever, create_rapid_documents_chain(llm, PROMPT, documents=TEXTS)
    )
    tracer = traced(chain, {"input": "Who bakes?"})
    assert tracer.count(HIDDEN) == 1
    chain.invoke({"input": "Who bakes?"}, {"callbacks": [everything]})
    assert everything.count(HIDDEN) == 1
    everything.events.clear()
    list(chain.stream({"input": "Who bakes?"}, {"callbacks": [everything]}))
    assert everything.count(HIDDEN) == 1


def test_documents_too_long_are_refused_or_truncated(decoder, prompts):
    texts = {"a": TEXTS["a"] + "x" * 2500 + "THE END"}
    inputs = {"context": CHUNKS[1:], "input": "Who sings?"}
    llm = ChatRapid(decoder=decoder, max_tokens=8)
    with pytest.raises(ContextWindowError, match="2048"):
        create_rapid_documents_chain(llm, PROMPT, documents=texts).invoke(inputs)
    prompts.clear()
    llm = ChatRapid(decoder=decoder, max_tokens=8, truncate="middle")
    create_rapid_documents_chain(llm, PROMPT, documents=texts).invoke(inputs)
    assert prompts[0].startswith("<s>[system]Use this:\nAnn sails. ")
    assert prompts[0].endswith("xxxTHE END\n[user]Who sings?\n[assistant]")
    ids = decoder.tokenizer(prompts[0], add_special_tokens=False)["input_ids"]
    assert len(ids) == 2048 - 8


def test_what_cannot_work_is_refused_when_the_chain_is_made(llm):
    with pytest.raises(InvalidParameterError, match=r"'context'.*only input"):
        create_rapid_documents_chain(
            llm, ChatPromptTemplate.from_template("{input}"), documents=TEXTS
        )
    with pytest.raises(InvalidParameterError, match="FakeListChatModel cannot read a draft"):
        create_rapid_documents_chain(
            FakeListChatModel(responses=[""]).bind(x=1), PROMPT, documents=TEXTS
        )
    with pytest.raises(DocumentError, match="empty"):
        create_rapid_documents_chain(llm, PROMPT, documents=[])


def test_a_chunk_of_an_unknown_document_is_an_error(llm):
    chain = create_rapid_documents_chain(llm, PROMPT, documents=TEXTS)
    with pytest.raises(DocumentError, match="'z'"):
        chain.invoke({"context": [Document("?", metadata={"source": "z"})], "input": "Who?"})


# --- retriever= --------------------------------------------------------------------------------

ASKED = "{}\n\nAnswer the question using only the text above.\n\nQuestion: Who bakes?"
TARGET = f"<s>[user]{ASKED.format(DOCUMENTS)}\n[assistant]"
DRAFT = "<s>[user]{}\n[assistant]".format(ASKED.format("Bob bakes.\n\nAnn sings."))


@pytest.mark.filterwarnings("ignore:.*is in beta:DeprecationWarning")
async def test_every_way_to_call_retrieves(grounded, retriever, prompts):
    answer = grounded.invoke("Who bakes?")
    assert answer.response_metadata["rapid"]["chunks"][0]["id"] == "1"
    same = [
        (await grounded.ainvoke("Who bakes?")).content,
        "".join(chunk.content for chunk in grounded.stream("Who bakes?")),
        "".join([chunk.content async for chunk in grounded.astream("Who bakes?")]),
        grounded.batch(["Who bakes?"])[0].content,
        (await grounded.abatch(["Who bakes?"]))[0].content,
        grounded.generate([[HumanMessage("Who bakes?")]]).generations[0][0].text,
        (await grounded.agenerate([[HumanMessage("Who bakes?")]])).generations[0][0].text,
        grounded.stream_events("Who bakes?", version="v3").output.text,
        await (await grounded.astream_events("Who bakes?", version="v3")).text,
    ]
    assert same == [answer.content] * len(same)
    assert prompts == [TARGET, DRAFT] * (1 + len(same))
    assert retriever.asked == ["Who bakes?"] * (1 + len(same))


def test_several_chats_are_grounded_one_by_one(grounded, retriever):
    result = grounded.generate([[HumanMessage("One?")], [HumanMessage("Two?")]])
    assert retriever.asked == ["One?", "Two?"]
    assert len(result.generations) == len(result.run) == 2


def test_system_message_and_history_are_in_both_prompts(grounded, retriever, prompts):
    grounded.invoke(
        [
            SystemMessage("Be brief."),
            HumanMessage("Hi."),
            AIMessage("Yes?"),
            HumanMessage("Who bakes?"),
        ]
    )
    before = "<s>[system]Be brief.\n[user]Hi.\n[assistant]Yes?\n[user]"
    assert prompts == [text.replace("<s>[user]", before) for text in (TARGET, DRAFT)]
    assert retriever.asked == ["Who bakes?\nHi."]


def test_what_the_call_brings_along_goes_first(grounded, retriever, prompts):
    grounded.invoke("Who bakes?", draft_messages="Bob?")
    assert prompts == ["<s>[user]Who bakes?\n[assistant]", "<s>[user]Bob?\n[assistant]"]
    create_rapid_documents_chain(grounded, PROMPT, documents=TEXTS).invoke(
        {"context": [], "input": "Who?"}
    )
    assert retriever.asked == []


def test_any_runnable_retrieves_and_any_form_of_documents_serves(decoder, prompts):
    retriever = RunnableLambda(lambda question: CHUNKS) | (lambda chunks: chunks[:1])
    for documents in (TEXTS, TEXTS.get, [Document(TEXTS["b"])], TEXTS["b"]):
        prompts.clear()
        ChatRapid(decoder=decoder, max_tokens=2, retriever=retriever, documents=documents).invoke(
            "Who bakes?"
        )
        assert prompts == [
            f"<s>[user]{ASKED.format(text)}\n[assistant]" for text in (TEXTS["b"], "Bob bakes.")
        ]


def test_a_failing_retriever_is_the_cause(decoder):
    cause = ConnectionError("index is down")
    llm = ChatRapid(
        decoder=decoder, retriever=Fixed(chunks=[], error=cause), documents=TEXTS, max_tokens=2
    )
    with pytest.raises(RetrievalError, match="ConnectionError: index is down") as raised:
        llm.invoke("Who bakes?")
    assert raised.value.__cause__ is cause
    with pytest.raises(RetrievalError):
        list(llm.stream("Who bakes?"))


async def test_a_failing_retriever_is_the_cause_under_asyncio(decoder):
    llm = ChatRapid(
        decoder=decoder, retriever=Fixed(chunks=[], error=OSError("gone")), documents=TEXTS
    )
    with pytest.raises(RetrievalError, match="gone") as raised:
        await llm.ainvoke("Who bakes?")
    assert isinstance(raised.value.__cause__, OSError)


def test_without_a_question_there_is_nothing_to_retrieve(grounded):
    with pytest.raises(InvalidParameterError, match="no human message"):
        grounded.invoke([SystemMessage("Be brief.")])


def test_retrieval_comes_before_the_cache(decoder, prompts):
    retriever = Fixed(chunks=CHUNKS[:1])
    llm = ChatRapid(
        decoder=decoder, max_tokens=2, retriever=retriever, documents=TEXTS, cache=InMemoryCache()
    )
    llm.invoke("Who bakes?")
    llm.invoke("Who bakes?")
    assert len(prompts) == 2
    retriever.chunks = CHUNKS[1:]
    llm.invoke("Who bakes?")
    assert len(prompts) == 4


def test_traces_show_the_retrieval_and_the_documents_once(grounded, everything):
    chain = RunnablePassthrough() | grounded
    tracer = traced(chain, "Who bakes?")
    by_type = {run.run_type: run for run in tracer.runs}
    assert by_type["retriever"].parent_run_id == by_type["chain"].id
    assert by_type["llm"].parent_run_id == by_type["chain"].id
    assert tracer.count(HIDDEN) == 1
    names = {run.run_type: run.name for run in traced(grounded.with_config(run_name="n"), "?").runs}
    assert names == {"retriever": "Fixed", "llm": "n"}
    grounded.invoke("Who bakes?", {"callbacks": [everything]})
    assert everything.names() == [
        "on_retriever_start",
        "on_retriever_end",
        "on_chat_model_start",
        "on_llm_end",
    ]
    assert everything.count(HIDDEN) == 1
    everything.events.clear()
    grounded.stream_events("Who bakes?", {"callbacks": [everything]}, version="v3").output  # noqa: B018
    starts = [name for name in everything.names() if name.endswith("_start")]
    assert starts == ["on_chat_model_start", "on_retriever_start"]


def test_a_completion_model_retrieves_for_its_prompt(decoder, retriever, prompts, everything):
    llm = RapidLLM(decoder=decoder, max_tokens=4, retriever=retriever, documents=TEXTS)
    answer = llm.invoke("Who bakes?", {"callbacks": [everything]})
    assert prompts == [
        f"<s>{ASKED.format(text)}\n\nAnswer:" for text in (DOCUMENTS, "Bob bakes.\n\nAnn sings.")
    ]
    assert "on_retriever_end" in everything.names()
    assert everything.count(HIDDEN) == 0
    assert "".join(llm.stream("Who bakes?")) == answer
    (generation,) = llm.generate(["Who bakes?"]).generations[0]
    assert [c["id"] for c in generation.generation_info["rapid"]["chunks"]] == ["1", "2"]
    with pytest.raises(ValidationError, match="cannot be cached"):
        RapidLLM(retriever=retriever, documents=TEXTS, cache=InMemoryCache())


def test_a_follow_up_is_searched_for_with_the_messages_before_it(decoder, retriever):
    llm = ChatRapid(decoder=decoder, retriever=retriever, documents=TEXTS, max_tokens=2)
    chat = [
        SystemMessage("Be brief."),
        HumanMessage("One?"),
        AIMessage("An answer."),
        HumanMessage("Who bakes?"),
        AIMessage("Bob."),
        HumanMessage("And before that?"),
        AIMessage("Nobody."),
        HumanMessage("And the second one?"),
    ]
    llm.invoke(chat)
    list(llm.stream(chat))
    assert retriever.asked == ["And the second one?\nAnd before that?\nWho bakes?"] * 2
