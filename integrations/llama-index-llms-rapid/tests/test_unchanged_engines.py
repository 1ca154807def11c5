"""Query and chat engines with nothing changed but the LLM."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.postprocessor import LLMRerank
from llama_index.core.prompts import PromptTemplate, RichPromptTemplate
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import MetadataMode
from pipelines import (  # noqa: F401  (fixtures)
    QA,
    QUESTION,
    WHOLE,
    Recorder,
    context_of,
    index_fixture,
    llm_fixture,
    shown,
    whole,
)

from llama_index.llms.rapid import PipelineError, RapidLLM
from rapid_llm.encoding import encode_prompt
from rapid_llm.errors import ContextWindowError

MODES = ["compact", "refine", "tree_summarize", "simple_summarize", "accumulate"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_target_reads_the_document_in_every_response_mode(
    index, decoder, spy, mode, asynchronous
):
    recorder = Recorder()
    llm = RapidLLM(decoder=decoder, max_tokens=8, documents=whole)
    options = {"similarity_top_k": 2, "response_mode": ResponseMode(mode)}
    old = index.as_query_engine(llm=recorder, **options).query(QUESTION)
    engine = index.as_query_engine(llm=llm, **options)
    new = asyncio.run(engine.aquery(QUESTION)) if asynchronous else engine.query(QUESTION)

    assert new.source_nodes == old.source_nodes
    assert len(spy.prompts) == len(recorder.seen) == (2 if mode in ("refine", "accumulate") else 1)
    chunks = [n.node.get_content(metadata_mode=MetadataMode.LLM) for n in new.source_nodes]
    for call in range(len(spy.prompts)):
        found = [chunk for chunk in chunks if chunk in spy.draft(call)]
        assert len(found) == (1 if mode in ("refine", "accumulate") else 2)
        assert spy.target(call).count(WHOLE) == 1
        assert WHOLE not in spy.draft(call)
        assert QUESTION in spy.target(call)
        assert QUESTION in spy.draft(call)
        joined = ("\n" if mode == "simple_summarize" else "\n\n").join(found)
        # The two prompts differ in nothing else.
        assert spy.target(call).replace(WHOLE, "") == spy.draft(call).replace(joined, "")
    assert "Empty Response" not in str(new)


@pytest.mark.parametrize(
    "template",
    [
        QA,
        RichPromptTemplate("Text: {{ context_str }}\nQuestion: {{ query_str }}\nAnswer:"),
        PromptTemplate(
            "Text: {text}\nQuestion: {q}\nAnswer:",
            template_var_mappings={"context_str": "text", "query_str": "q"},
        ),
        PromptTemplate(
            "Text: {context_str}\nQuestion: {query_str}\nAnswer:",
            function_mappings={"context_str": lambda **given: given["context_str"].upper()},
        ),
    ],
    ids=["plain", "jinja", "mapped", "function"],
)
def test_every_kind_of_template_is_filled_twice(index, decoder, spy, template):
    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=whole)
    engine = index.as_query_engine(llm=llm, similarity_top_k=1, text_qa_template=template)
    nodes = engine.query(QUESTION).source_nodes
    form = str.upper if template.function_mappings else str
    end = f"\nQuestion: {QUESTION}\nAnswer:"
    assert f"Text: {form(WHOLE)}{end}" in spy.target()
    assert f"Text: {form(context_of(nodes))}{end}" in spy.draft()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_query_engine_streams_its_answer(index, decoder, spy, asynchronous):
    llm = RapidLLM(decoder=decoder, max_tokens=8, documents=whole)
    expected = str(index.as_query_engine(llm=llm).query(QUESTION))
    engine = index.as_query_engine(llm=llm, streaming=True)

    async def collect():
        response = await engine.aquery(QUESTION)
        return "".join([text async for text in response.async_response_gen()])

    text = asyncio.run(collect()) if asynchronous else "".join(engine.query(QUESTION).response_gen)
    assert text == expected
    assert WHOLE in spy.target()


def test_the_answers_so_far_are_in_both_prompts_when_refining(index, decoder, spy):
    llm = RapidLLM(decoder=decoder, max_tokens=8, documents=whole)
    index.as_query_engine(llm=llm, response_mode="refine").query(QUESTION)
    first = llm.decoder.generate(*spy.prompts[0], sampling=llm._options({}).sampling).text
    assert first in spy.target(1)
    assert first in spy.draft(1)


def test_what_a_function_gives_is_read(index, decoder, documents, spy):
    asked = []

    def document_for(context):
        asked.append(context)
        return next(document for document in documents if document.metadata["title"] in context)

    llm = RapidLLM(decoder=decoder, max_tokens=4, documents=document_for)
    response = index.as_query_engine(llm=llm, similarity_top_k=1).query(QUESTION)
    assert asked == [context_of(response.source_nodes)]
    assert shown(documents[0]) in spy.target()
    assert shown(documents[1]) not in spy.target()


@pytest.mark.parametrize("mode", MODES)
def test_errors_are_not_swallowed(index, documents, make_decoder, mode):
    llm = RapidLLM(
        decoder=make_decoder(window=2500), max_tokens=64, documents=lambda context: "word " * 1000
    )
    with pytest.raises(PipelineError, match=r"prompt of \d+ tokens.*=64.*2500") as caught:
        index.as_query_engine(llm=llm, response_mode=mode).query(QUESTION)
    assert isinstance(caught.value.__cause__, ContextWindowError)
    llm = RapidLLM(decoder=llm.decoder, documents=lambda context: None)
    with pytest.raises(PipelineError, match="returned None"):
        index.as_query_engine(llm=llm, response_mode=mode).query(QUESTION)


def test_the_document_may_be_cut(index, make_decoder, spy):
    llm = RapidLLM(
        decoder=make_decoder(window=2500),
        max_tokens=64,
        documents=lambda context: WHOLE * 10,
        truncate="middle",
    )
    index.as_query_engine(llm=llm).query(QUESTION)
    assert len(spy.prompts) == 1
    assert len(spy.target_ids()) == 2500 - 64


@pytest.mark.parametrize("chat", [False, True])
def test_other_calls_of_the_pipeline_keep_their_text(index, make_decoder, spy, chat):
    """A reranker asks the same LLM, with a ``context_str`` of its own if it is no chat model."""
    llm = RapidLLM(decoder=make_decoder(chat=chat), max_tokens=4, documents=whole)
    reranker = LLMRerank(
        llm=llm, top_n=1, parse_choice_select_answer_fn=lambda answer, count: ([1], [1.0])
    )
    engine = index.as_query_engine(llm=llm, node_postprocessors=[reranker])
    engine.query(QUESTION)
    assert "relevance" in spy.target(0)
    assert WHOLE not in spy.target(0)
    assert spy.draft(0) is None
    assert WHOLE in spy.target(1)


def test_without_documents_the_pipeline_decodes_plainly(index, decoder, spy):
    recorder = Recorder()
    index.as_query_engine(llm=recorder).query(QUESTION)
    index.as_query_engine(llm=RapidLLM(decoder=decoder, max_tokens=4)).query(QUESTION)
    assert spy.target_ids() == encode_prompt(recorder.seen[0], decoder.tokenizer)
    assert spy.draft() is None


def chats(engine, message, method):
    if method == "chat":
        return str(engine.chat(message))
    if method == "stream_chat":
        return "".join(engine.stream_chat(message).response_gen)

    async def collect():
        response = await getattr(engine, method)(message)
        if method == "achat":
            return str(response)
        return "".join([text async for text in response.async_response_gen()])

    return asyncio.run(collect())


@pytest.mark.parametrize("method", ["chat", "stream_chat", "achat", "astream_chat"])
@pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
def test_chat_engines_have_the_history_in_both_prompts(index, decoder, spy, mode, method):
    llm = RapidLLM(decoder=decoder, max_tokens=8, documents=whole)
    history = [
        ChatMessage(role="user", content="Is there a lighthouse?"),
        ChatMessage(role="assistant", content="Yes, at Karsholm."),
    ]
    engine = index.as_chat_engine(
        chat_mode=mode, llm=llm, similarity_top_k=1, chat_history=history, system_prompt="Be kind."
    )
    answer = chats(engine, "Who kept it?", method)
    assert answer
    assert len(spy.prompts) == (1 if mode == "context" else 2)
    if mode == "condense_plus_context":
        assert "Yes, at Karsholm." in spy.target(0)
        assert spy.draft(0) is None
    for prompt in (spy.target(), spy.draft()):
        assert "Be kind." in prompt
        assert prompt.endswith(
            "<|user>Is there a lighthouse?\n<|assistant>Yes, at Karsholm.\n<|user>Who kept it?\n"
            "<|assistant>"
        )
    assert WHOLE in spy.target()
    assert WHOLE not in spy.draft()
    assert "Karsholm" in spy.draft()
    assert [message.content for message in engine.chat_history][-1] == answer
