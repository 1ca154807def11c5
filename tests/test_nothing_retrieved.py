"""What a pipeline kept back is never read: nothing retrieved, and what retrieval kept out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np
import pytest
from asking import Asked
from conftest import smollm2, tiny_model, tiny_tokenizer

from rapid_llm import (
    ContextBuilder,
    RapidDecoder,
    SamplingParams,
    SpeculationConfig,
)
from rapid_llm.config import PACKAGED_EMBEDDER
from rapid_llm.context import embedder_loading
from rapid_llm.context.embedding import Vectors
from rapid_llm.context.retrieved import Documents, Passage, ground
from rapid_llm.errors import DocumentError, InvalidParameterError, ModelError

SECRET = "The salary of Ada is ninety thousand."
CANTEEN = "The canteen opens at nine."
TEXTS = {"a": SECRET, "b": CANTEEN}


class Cosines:
    """An embedder by which a text has the similarity to any question that it names."""

    def __init__(self, name: str, threshold: float | None = None) -> None:
        self.name = name
        self.threshold = threshold

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        cosines = np.array([float(text.split()[-1]) for text in texts])
        return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1).astype(np.float32)

    def embed_query(self, text: str) -> Vectors:
        return np.array([1, 0], dtype=np.float32)


def retrieved(documents: Sequence[str], embedder: Any, **options: Any) -> list[str]:
    builder = ContextBuilder(smollm2(), embedder, **options)
    return [chunk.text for chunk in builder.build(documents, "Why?").chunks]


# --- an index that finds nothing ----------------------------------------------------------------


@pytest.mark.parametrize(
    "documents", [SECRET, TEXTS, TEXTS.get, {}], ids=["text", "mapping", "function", "none"]
)
@pytest.mark.parametrize("passages", [[], [Passage("  ", "a")]], ids=["no chunk", "blank chunk"])
def test_no_hit_is_no_document(documents: Documents, passages: list[Passage]) -> None:
    found = ground(passages, documents)
    assert (found.target, found.draft, found.document_ids, found.cited) == ("", "", (), ())
    assert found.empty_reason is not None


def test_another_tenants_documents_are_not_read() -> None:
    asked: list[str] = []

    def documents(name: str) -> str:
        asked.append(name)
        return TEXTS[name]

    for source in (TEXTS, cast("Documents", documents)):
        assert ground([Passage("canteen", "b")], source).target == CANTEEN
    assert asked == ["b"]


# --- ids and texts of documents -----------------------------------------------------------------


@pytest.mark.parametrize("name", [7, 2.5, PurePosixPath("notes/a.txt"), "7"])
def test_numbers_and_paths_are_ids(name: Any) -> None:
    for key, asked in ((name, name), (name, str(name)), (str(name), name)):
        found = ground([Passage("canteen", asked)], {key: CANTEEN, "a": SECRET})
        assert found.texts == (CANTEEN,)
        assert found.document_ids == (str(name),)
        assert found.cited == (found.passages,)
    by_function: Callable[[str], str | None] = {str(name): CANTEEN}.get
    assert ground([Passage("canteen", name)], by_function).texts == (CANTEEN,)
    assert ground([], {name: CANTEEN}, on_empty="read_all").document_ids == (str(name),)


def test_two_documents_with_one_id_are_told_so() -> None:
    with pytest.raises(DocumentError, match=r"two documents have the id '1', as 1 and '1'"):
        ground([Passage("x", "1")], {1: "First.", "1": "Second."})


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_document_among_others_is_passed_over(blank: str) -> None:
    texts = {"x": blank, **TEXTS, "y": blank}
    assert ground([], texts, on_empty="read_all").document_ids == ("a", "b")
    assert ground([Passage("canteen", "b"), Passage(" ", "x")], texts).texts == (CANTEEN,)
    # What was retrieved from a document is never lost with it.
    found = ground([Passage("One.", "x"), Passage("canteen", "b"), Passage("Two.", "x")], texts)
    assert found.target == f"{CANTEEN}\n\nOne.\n\nTwo."
    assert [len(passages) for passages in found.cited] == [1, 2]
    for passages in ([], [Passage("One.", "x")]):
        with pytest.raises(DocumentError, match="is empty: give"):
            ground(passages, {"x": blank, "y": blank}, on_empty="read_all")
    with pytest.raises(DocumentError, match="the document is empty: give"):
        ground([Passage("One.")], blank)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ({"a": b"bytes"}, "document 'a' is bytes, not text"),
        ({"a": 3}, "document 'a' is int, not text"),
        (lambda name: [name], "document 'a' is list, not text"),
        (["text"], "documents of type list are not allowed"),
        (None, "documents of type NoneType are not allowed"),
    ],
)
def test_documents_of_another_type_are_named(documents: Any, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        ground([Passage("x", "a")], documents)


# --- our own retrieval --------------------------------------------------------------------------

SCORED = ["Similar: 0.9", "Less so: 0.4", "Hardly: 0.1"]


def test_without_a_threshold_the_best_chunk_is_kept() -> None:
    picky = Cosines("picky", threshold=0.3)
    assert retrieved(SCORED, picky) == SCORED[:2]
    assert retrieved(SCORED[2:], picky) == SCORED[2:]
    assert retrieved(["Hardly: 0.1", "Not: -0.2"], picky) == ["Hardly: 0.1"]
    assert retrieved(SCORED, Cosines("plain")) == SCORED


def test_a_threshold_that_was_asked_for_is_a_limit() -> None:
    for embedder in (Cosines("picky", threshold=0.3), Cosines("plain")):
        assert retrieved(SCORED, embedder, threshold=0.05) == SCORED
        assert retrieved(SCORED, embedder, threshold=0.5) == SCORED[:1]
        context = ContextBuilder(smollm2(), embedder, threshold=0.95).build(SCORED, "Why?")
        assert context.chunks == ()
        assert context.empty_reason == "no chunk reached similarity 0.95 (best 0.9)"


def test_the_papers_threshold_belongs_to_its_embedder() -> None:
    load_embedder: Any = embedder_loading.load_embedder

    class M3Embedder:
        passage_max_length = 64

        def encode_corpus(self, texts: Sequence[str], **_: Any) -> Any:
            return {"dense_vecs": np.ones((len(texts), 4))}

    class Other(M3Embedder):
        pass

    assert load_embedder(M3Embedder()).threshold == load_embedder(Other()).threshold == 0.3
    M3Embedder.__name__ = "BaseEmbedder"
    assert load_embedder(M3Embedder()).threshold is None
    packaged = load_embedder(PACKAGED_EMBEDDER, "cpu")
    assert packaged.threshold is None


@pytest.mark.parametrize("retriever", ["hybrid", "dense"])
def test_a_question_of_unknown_words_still_finds_something(retriever: Any) -> None:
    context = ContextBuilder(smollm2(), Cosines("words of kept back"), retriever=retriever).build(
        [*SCORED, " "], "zebrawood"
    )
    assert len(context.chunks) == 3
    assert {chunk.document for chunk in context.chunks} == {0, 1, 2}


@pytest.mark.parametrize(
    "vectors",
    [
        lambda texts: np.full((len(texts), 2), np.nan),
        lambda texts: np.zeros((len(texts), 2)),
        lambda texts: np.ones((2 * len(texts), 2)),
        lambda texts: np.ones(len(texts)),
        lambda texts: [None for _ in texts],
        lambda texts: [[1.0] * (1 + i) for i in range(len(texts))],
    ],
    ids=["NaN", "zero", "two each", "numbers", "None", "of several lengths"],
)
def test_vectors_that_are_none_are_told_so(vectors: Any) -> None:
    class Broken(Cosines):
        def embed_documents(self, texts: Sequence[str]) -> Vectors:
            return cast("Vectors", vectors(texts))

    with pytest.raises(ModelError, match=r"model Broken .*vector|vectors differ in length"):
        retrieved(SCORED, Broken("broken"))

    class BrokenQuery(Cosines):
        def embed_query(self, text: str) -> Vectors:
            return cast("Vectors", vectors([text, text])[1:])

    with pytest.raises(ModelError, match=r"model BrokenQuery .*vector|vectors differ"):
        retrieved(SCORED, BrokenQuery("broken query"))


def test_vectors_of_another_length_than_the_stored_ones_are_told_so() -> None:
    class Longer(Cosines):
        def embed_query(self, text: str) -> Vectors:
            return np.ones(3, dtype=np.float32)

    retrieved(SCORED, Cosines("length"))
    with pytest.raises(ModelError, match="differ in length"):
        retrieved(SCORED, Longer("length"))


# --- a question on documents --------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder() -> RapidDecoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return RapidDecoder(tiny_model(), tokenizer)


ANSWER = SamplingParams(max_new_tokens=4, ignore_eos=True)


def test_blank_documents_change_nothing(decoder: RapidDecoder) -> None:
    class Words(Cosines):
        def embed_documents(self, texts: Sequence[str]) -> Vectors:
            return np.stack([np.array([1, len(text)], dtype=np.float32) for text in texts])

    for method in ("lc", "rapid", "rag"):
        answers = [
            Asked(
                decoder,
                ContextBuilder(decoder.tokenizer, Words("words of kept back")),
                documents,
                "w5",
                sampling=ANSWER,
            ).answer(cast("Any", method))
            for documents in (["w3 w4", "w6 w7"], ["", "w3 w4", " \n", "w6 w7", "\t"])
        ]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].stats.prompt_tokens == answers[1].stats.prompt_tokens


def test_one_text_is_one_document(decoder: RapidDecoder) -> None:
    one, listed = (
        Asked(decoder, None, documents, "w5", sampling=ANSWER).answer("lc")
        for documents in ("w3 w4", ["w3 w4"])
    )
    assert one.token_ids == listed.token_ids
    assert one.stats.prompt_tokens == listed.stats.prompt_tokens


@pytest.mark.parametrize(
    ("documents", "question", "message"),
    [
        (b"w3", "w5", "documents of type bytes are not allowed"),
        (["w3", 4], "w5", "document 2 of 2 is int, not text"),
        ([], "w5", "no document was given"),
        (["", " "], "w5", "all 2 documents are empty"),
        ("", "w5", "the document is empty"),
        ("w3", "", "the question is empty"),
        ("w3", 5, "the question is int, not text"),
        ("w3", ["w5"], "the question is list, not text"),
    ],
)
def test_what_is_no_document_and_no_question_is_named(
    decoder: RapidDecoder, documents: Any, question: Any, message: str
) -> None:
    with pytest.raises(DocumentError, match=message):
        Asked(decoder, None, documents, question).answer("lc")


def test_an_unknown_on_empty_is_refused(decoder: RapidDecoder) -> None:
    choice: Any = "everything"
    for refused in (
        lambda: Asked(decoder, None, "w3", "w5", on_empty=choice),
        lambda: ground([], TEXTS, on_empty=choice),
    ):
        with pytest.raises(InvalidParameterError, match=r"on_empty='everything'.*read_all"):
            refused()


@pytest.mark.parametrize("method", ["rapid", "sd", "rag"])
@pytest.mark.parametrize("max_new_tokens", [4, 300, 10_000])
def test_no_more_is_retrieved_than_the_models_have_room_for(
    decoder: RapidDecoder, method: Any, max_new_tokens: int
) -> None:
    """With a builder's defaults, made for windows of 8,000 tokens and more."""

    class Alike(Cosines):
        def embed_documents(self, texts: Sequence[str]) -> Vectors:
            return np.ones((len(texts), 2), dtype=np.float32)

    small = tiny_model(seed=1, max_position_embeddings=256)
    documents = [" ".join(f"w{3 + i % 40}" for i in range(300 + 1500 * n)) for n in range(3)]
    for drafter in (None, small):
        inquiry = Asked(
            RapidDecoder(decoder.target.model, decoder.tokenizer, drafter),
            ContextBuilder(decoder.tokenizer, Alike("alike")),
            documents,
            "w5",
            sampling=SamplingParams(max_new_tokens=max_new_tokens),
            speculation=SpeculationConfig(gamma=2),
            truncate="middle",
        )
        stats = inquiry.answer(method).stats
        assert stats.method == method
        assert stats.draft_skipped is None
        window = 512 if drafter is None else 256
        assert 32 <= inquiry.context.tokens <= window - min(max_new_tokens, window // 2)


def test_truncation_keeps_what_was_retrieved(decoder: RapidDecoder) -> None:
    class Marked(Cosines):
        """Similar is a chunk with the word w60."""

        def embed_documents(self, texts: Sequence[str]) -> Vectors:
            return np.stack(
                [np.array([1, 0 if "w60" in text else 9], dtype=np.float32) for text in texts]
            )

    filler = " ".join(f"w{3 + i % 40}" for i in range(900))
    documents = [filler, f"{filler} w60 w61 w62 {filler}", " "]
    seen: list[str] = []
    builder = ContextBuilder(
        decoder.tokenizer, Marked("marked"), chunk_tokens=32, retrieval_tokens=64, threshold=0.9
    )
    inquiry = Asked(decoder, builder, documents, "w5", sampling=ANSWER, truncate="middle")

    def spy(target: Any, draft: Any = None, **_: Any) -> Any:
        seen.append(target[0]["content"] if target else "")
        return iter(())

    rapid = inquiry.answer("rapid")
    assert 1800 < rapid.stats.omitted_tokens < 2703
    assert rapid.stats.as_dict()["omitted_tokens"] == rapid.stats.omitted_tokens
    assert rapid.stats.prompt_tokens <= 512 - 4
    assert inquiry.answer("rag").stats.omitted_tokens == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "stream", spy)
        for method in ("rapid", "sd", "lc"):
            list(inquiry.stream(cast("Any", method)))
    for content in seen[:2]:
        for chunk in inquiry.context.chunks:
            assert chunk.text in content
        assert content.startswith("w3 w4 ")
    assert seen[0] == seen[1]
    assert "w60" not in seen[2]  # lc retrieves nothing
