"""From documents and a question to an answer: what each method hands to the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from asking import Asked
from conftest import tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from rapid_llm import (
    ContextBuilder,
    ContextWindowError,
    DocumentError,
    InvalidParameterError,
    RapidDecoder,
    SamplingParams,
    SpeculationConfig,
)
from rapid_llm.context.prompts import build_messages, retrieval_query
from rapid_llm.pipeline import RapidPipeline
from rapid_llm.questions import METHODS

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
FIRST = " ".join(f"w{3 + i % 20}" for i in range(90))
SECOND = " ".join(f"w{30 + i % 20}" for i in range(90))
QUESTION = "w31 w32 w33"


class CountingEmbedder:
    """Vectors that count words, so that a text is similar to the words it shares."""

    name = "counting"

    def __init__(self) -> None:
        self.calls = 0

    def embed_documents(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.calls += 1
        vectors = np.full((len(texts), 64), 0.01, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                vectors[row, int(word[1:])] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        return self.embed_documents([text])[0]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def decoder(tokenizer: PreTrainedTokenizerFast) -> RapidDecoder:
    return RapidDecoder(tiny_model(), tokenizer)


@pytest.fixture
def embedder() -> CountingEmbedder:
    return CountingEmbedder()


@pytest.fixture
def inquire(decoder: RapidDecoder, embedder: CountingEmbedder) -> Any:
    def inquire(
        documents: Sequence[str] = (FIRST, SECOND), *, threshold: float = 0.1, **options: Any
    ) -> Asked:
        builder = ContextBuilder(
            decoder.tokenizer,
            embedder,
            chunk_tokens=32,
            threshold=threshold,
            retrieval_tokens=64,
        )
        sampling = options.pop("sampling", SamplingParams(max_new_tokens=16, ignore_eos=True))
        return Asked(decoder, builder, documents, QUESTION, sampling=sampling, **options)

    return inquire


def test_the_target_reads_every_document_in_order(inquire: Any, decoder: RapidDecoder) -> None:
    result = inquire().answer("lc")

    messages = build_messages(f"{FIRST}\n\n{SECOND}", QUESTION)
    sampling = SamplingParams(max_new_tokens=16, ignore_eos=True)
    assert result.token_ids == decoder.generate(messages, sampling=sampling).token_ids
    assert result.stats.method == "lc"


def test_the_drafter_reads_what_was_retrieved(inquire: Any, decoder: RapidDecoder) -> None:
    inquiry = inquire()
    result = inquiry.answer("rag")

    assert {chunk.document for chunk in inquiry.context.chunks} == {1}
    messages = build_messages(inquiry.context.text, QUESTION)
    sampling = SamplingParams(max_new_tokens=16, ignore_eos=True)
    assert result.token_ids == decoder.generate(None, messages, sampling=sampling).token_ids
    assert result.stats.method == "rag"


def test_sd_is_lossless_and_rapid_transfers(inquire: Any) -> None:
    inquiry = inquire(speculation=SpeculationConfig(gamma=3, eta=40))
    plain, exact, rapid = (inquiry.answer(method) for method in ("lc", "sd", "rapid"))

    assert exact.token_ids == plain.token_ids
    assert exact.stats.method == "sd"
    assert exact.stats.drafted_tokens > 0
    assert rapid.stats.method == "rapid"
    assert rapid.token_ids != plain.token_ids  # so strong a transfer must show in a random model
    assert rapid.stats.draft_prompt_tokens == exact.stats.draft_prompt_tokens


def test_the_retrievals_confidence_reaches_the_decoder(inquire: Any) -> None:
    inquiry = inquire(speculation=SpeculationConfig(gamma=3, eta=40, dynamic_eta=True))
    sure = inquiry.answer("rapid")
    exact = inquiry.answer("sd")
    known = inquiry.pipeline._contexts[QUESTION]
    unsure = known._replace(context=replace(known.context, confidence=0.0))
    inquiry.pipeline._contexts[QUESTION] = unsure
    unsure = inquiry.answer("rapid")
    assert unsure.token_ids == exact.token_ids != sure.token_ids


def test_methods_share_one_retrieval(inquire: Any, embedder: CountingEmbedder) -> None:
    inquiry = inquire()
    inquiry.answer("lc")
    assert embedder.calls == 0
    inquiry.answer("rapid")
    calls = embedder.calls
    inquiry.answer("sd")
    inquiry.answer("rag")
    assert embedder.calls == calls > 0


def test_lc_retrieves_nothing(decoder: RapidDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rapid_llm.pipeline.ContextBuilder", None)
    pipeline = RapidPipeline(decoder, FIRST, sampling=SamplingParams(max_new_tokens=4))
    answer = pipeline.ask(QUESTION, "lc")
    assert answer.stats.method == "lc"
    assert answer.context is None


@pytest.mark.parametrize("method", ["rapid", "sd", "rag"])
def test_without_chunks_nothing_is_read(
    inquire: Any, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RapidDecoder, "stream", None)
    inquiry = inquire(threshold=1.0)
    (chunk,) = inquiry.stream(method)
    assert (chunk.text, chunk.token_ids, chunk.finish_reason) == ("", (), "stop")
    result = inquiry.answer(method)
    assert (result.text, result.token_ids, result.finish_reason) == ("", [], "stop")
    assert result.stats.method == ("rag" if method == "rag" else "lc")  # nothing was drafted
    assert "similarity 1" in result.stats.draft_skipped
    assert result.stats.prompt_tokens == result.stats.draft_prompt_tokens == 0


@pytest.mark.parametrize("method", ["rapid", "sd", "rag"])
def test_without_chunks_everything_is_read_where_that_was_asked_for(
    inquire: Any, method: Any
) -> None:
    inquiry = inquire(threshold=1.0, on_empty="read_all")
    result = inquiry.answer(method)

    assert result.token_ids == inquiry.answer("lc").token_ids
    assert result.stats.method == "lc"
    assert result.stats.draft_skipped == inquiry.context.empty_reason
    assert [c.stats.draft_skipped for c in inquiry.stream(method)] == [
        inquiry.context.empty_reason
    ] * 16
    with pytest.raises(InvalidParameterError, match=r"on_empty='all'.*empty.*read_all"):
        inquire(on_empty="all")


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_is_the_answer_in_pieces(inquire: Any, method: Any) -> None:
    inquiry = inquire(sampling=SamplingParams(temperature=1.0, max_new_tokens=16, seed=3))
    chunks = list(inquiry.stream(method))
    result = inquiry.answer(method)

    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [token for chunk in chunks for token in chunk.token_ids] == result.token_ids
    assert chunks[-1].finish_reason == result.finish_reason
    stats = chunks[-1].stats
    assert (stats.draft_skipped is None) == (stats.method != "lc")


def test_long_documents_are_refused_or_truncated(inquire: Any) -> None:
    long = " ".join([FIRST] * 7)  # 630 words, in a window of 512
    with pytest.raises(ContextWindowError, match="512"):
        inquire([long, SECOND]).answer("rapid")

    inquiry = inquire([long, SECOND], truncate="middle")
    stats = inquiry.answer("rapid").stats
    assert 480 < stats.prompt_tokens <= 512 - 16
    assert {chunk.document for chunk in inquiry.context.chunks} == {1}  # retrieved from the whole


def test_progress_covers_embedding_and_both_prompts(inquire: Any) -> None:
    seen: dict[str, tuple[int, int]] = {}
    # Other words than in the other tests: vectors are stored once a process.
    documents = [FIRST + " w60", SECOND + " w61"]
    inquire(documents, progress=lambda stage, *count: seen.update({stage: count})).answer("rapid")

    assert list(seen) == ["embed", "target", "draft"]
    assert all(done == total > 0 for done, total in seen.values())


def test_an_unknown_method_is_named(inquire: Any) -> None:
    with pytest.raises(InvalidParameterError, match=r"'magic'.*rapid, sd, lc, rag"):
        inquire().answer("magic")


def retrieving(decoder: RapidDecoder, embedder: CountingEmbedder, **options: Any) -> Asked:
    builder = ContextBuilder(
        decoder.tokenizer, embedder, chunk_tokens=32, threshold=-1, retrieval_tokens=64
    )
    return Asked(decoder, builder, [FIRST, SECOND], QUESTION, **options)


def test_template_variables_of_a_question_reach_both_prompts(embedder: CountingEmbedder) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{{ one }} {{ two }}"
    decoder = RapidDecoder(
        tiny_model(), tokenizer, chat_template_kwargs={"one": "w5 w6", "two": "w7"}
    )
    plain = retrieving(decoder, embedder).answer().stats
    changed = retrieving(decoder, embedder, chat_template_kwargs={"two": "w7 w8 w9"})
    stats = changed.answer().stats
    assert stats.prompt_tokens == plain.prompt_tokens + 2
    assert stats.draft_prompt_tokens == plain.draft_prompt_tokens + 2


def test_a_draft_that_the_decoder_leaves_out_is_still_explained(
    tokenizer: PreTrainedTokenizerFast, embedder: CountingEmbedder
) -> None:
    drafter = tiny_model(seed=1, max_position_embeddings=40)
    stats = retrieving(RapidDecoder(tiny_model(), tokenizer, drafter), embedder).answer().stats
    assert stats.method == "lc"
    assert "the draft prompt has" in str(stats.draft_skipped)


def pipeline_of(decoder: RapidDecoder, embedder: CountingEmbedder, **options: Any) -> RapidPipeline:
    return RapidPipeline(
        decoder,
        [FIRST, SECOND],
        embedder=embedder,
        chunk_tokens=32,
        threshold=-1,
        retrieval_tokens=64,
        sampling=SamplingParams(max_new_tokens=8, ignore_eos=True),
        **options,
    )


def test_many_questions_are_answered_as_each_alone(
    decoder: RapidDecoder, embedder: CountingEmbedder
) -> None:
    questions = ["w31 w32", "w5 w6 w7", "w9"]
    answers = pipeline_of(decoder, embedder).ask_many(questions)
    assert [answer.question for answer in answers] == questions
    for answer in answers:
        alone = pipeline_of(decoder, embedder).ask(answer.question)
        assert answer.token_ids == alone.token_ids
        assert answer.context == alone.context


@pytest.mark.parametrize("method", METHODS)
def test_a_chat_reads_what_was_said_before(
    decoder: RapidDecoder, embedder: CountingEmbedder, method: Any
) -> None:
    chat = pipeline_of(decoder, embedder).chat(method)
    first = chat.ask("w31 w32")
    list(chat.stream("w5 w6"))
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == first.text
    third = chat.ask("w9")
    fresh = pipeline_of(decoder, embedder).ask("w9", method)
    assert third.stats.prompt_tokens > fresh.stats.prompt_tokens + 10


def test_a_follow_up_is_searched_for_with_the_questions_before_it(
    decoder: RapidDecoder, embedder: CountingEmbedder
) -> None:
    """ "w60 w61" is in no document, as "and the second one?" is in none."""
    short = SamplingParams(max_new_tokens=4)
    options = {"retrieval_tokens": 40, "chunk_tokens": 32}
    pipeline = RapidPipeline(decoder, [FIRST, SECOND], embedder=embedder, **options)
    for about, document in (("w31 w32 w33", 1), ("w5 w6 w7", 0)):
        chat = pipeline.chat("rag")
        chat.ask(about, sampling=short)
        context = chat.ask("w60 w61", sampling=short).context
        assert context is not None
        assert {chunk.document for chunk in context.chunks} == {document}
        # A question of its own words is found whatever was asked before.
        own = "w8 w9 w10 w11" if document else "w34 w35 w36 w37"
        context = chat.ask(f"{own} {own}", sampling=short).context
        assert context is not None
        assert {chunk.document for chunk in context.chunks} == {1 - document}


def test_the_latest_question_leads_what_is_searched_for() -> None:
    assert retrieval_query("d", ["a", "b", "c"]) == "d\nc\nb"
    assert retrieval_query("a", []) == "a"


def test_what_fails_or_is_closed_is_no_part_of_a_chat(
    decoder: RapidDecoder, embedder: CountingEmbedder
) -> None:
    chat = pipeline_of(decoder, embedder).chat()
    with pytest.raises(DocumentError):
        chat.ask(" ")
    stream = chat.stream("w31")
    next(stream)
    stream.close()
    assert chat.messages == []
    assert chat.ask("w31").token_ids == pipeline_of(decoder, embedder).ask("w31").token_ids


def test_several_questions_are_no_string(decoder: RapidDecoder, embedder: CountingEmbedder) -> None:
    with pytest.raises(DocumentError, match="'w31 w32' is one string"):
        pipeline_of(decoder, embedder).ask_many("w31 w32")


def test_an_error_of_several_questions_says_which_one_failed(
    decoder: RapidDecoder, embedder: CountingEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(decoder, embedder)
    with pytest.raises(DocumentError, match="question 2 of 3: the question is empty"):
        pipeline.ask_many(["w31", " ", "w32"])
    error, _, other = pipeline.answers([" ", "w31", 5], return_exceptions=True)  # type: ignore[list-item]
    assert str(error).startswith("the question is empty")
    assert isinstance(other, Exception)

    def late(requests: Any, return_exceptions: bool) -> Any:
        yield 0, ContextWindowError("too long")

    monkeypatch.setattr(decoder, "_stream_many", late)
    with pytest.raises(ContextWindowError, match="question 1 of 2: too long"):
        pipeline.ask_many(["w31", "w32"])


@pytest.mark.parametrize(
    ("history", "told"),
    [
        ([{"role": "assistant", "content": "w9"}], "begins with .*assistant"),
        ([{"role": "system", "content": "w9"}], "begins with .*system"),
        ([{"role": "user"}], "content None"),
        ([("user", "w9")], "begins with"),
        ("w9", "history of type str"),
        (None, "history of type NoneType"),
    ],
)
def test_a_history_that_does_not_begin_with_a_users_message_is_refused(
    decoder: RapidDecoder, embedder: CountingEmbedder, history: Any, told: str
) -> None:
    with pytest.raises(InvalidParameterError, match=told):
        pipeline_of(decoder, embedder).ask("w31", history=history)


def test_a_question_finds_the_same_whatever_was_asked_before(
    decoder: RapidDecoder, embedder: CountingEmbedder
) -> None:
    """A long history or answer leaves less room for what is retrieved, in its own call only."""

    def fresh() -> RapidPipeline:
        return RapidPipeline(decoder, [FIRST] * 3, embedder=embedder, chunk_tokens=32)

    history = [{"role": "user", "content": "w7 " * 300}, {"role": "assistant", "content": "w8"}]
    calls: list[dict[str, Any]] = [{}, {"history": history}]
    short = SamplingParams(max_new_tokens=4)
    alone = [fresh().ask("w3 w4", "rag", sampling=short, **call) for call in calls]
    for order in (calls, calls[::-1]):
        pipeline = fresh()
        answers = [pipeline.ask("w3 w4", "rag", sampling=short, **call) for call in order]
        for call, answer in zip(order, answers, strict=True):
            expected = alone[calls.index(call)]
            assert answer.token_ids == expected.token_ids
            assert answer.context == expected.context
    assert alone[0].context.tokens > alone[1].context.tokens


def test_what_is_retrieved_fits_a_drafter_with_a_smaller_window(
    tokenizer: PreTrainedTokenizerFast, embedder: CountingEmbedder
) -> None:
    drafter = tiny_model(seed=1, max_position_embeddings=256)
    pipeline = RapidPipeline(
        RapidDecoder(tiny_model(), tokenizer, drafter),
        [FIRST, SECOND] * 2,
        embedder=embedder,
        chunk_tokens=32,
        threshold=-1,
    )
    answer = pipeline.ask(QUESTION, "rag", sampling=SamplingParams(max_new_tokens=4))
    assert answer.context is not None
    assert 64 < answer.context.tokens < answer.stats.prompt_tokens <= 252


@pytest.mark.parametrize("name", ["sampling", "speculation", "retrieval"])
def test_settings_of_another_type_are_refused(decoder: RapidDecoder, name: str) -> None:
    for wrong in ({}, {"gamma": 3}):
        with pytest.raises(InvalidParameterError, match=f"{name} of type dict is not allowed"):
            RapidPipeline(decoder, FIRST, **{name: wrong})
        if name != "retrieval":
            with pytest.raises(InvalidParameterError, match=f"{name} of type dict"):
                decoder.generate("w5", **{name: wrong})


def test_a_stream_knows_its_context_whatever_is_asked_meanwhile(
    decoder: RapidDecoder, embedder: CountingEmbedder
) -> None:
    pipeline = pipeline_of(decoder, embedder)
    expected = pipeline.ask("w31 w32").context
    stream = pipeline.stream("w31 w32")
    deltas = [next(stream)]
    for i in range(70):
        pipeline.retrieve(f"w{3 + i % 60} w{3 + i // 2}")
    assert stream.answer([*deltas, *stream]).context == expected
