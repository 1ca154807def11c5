"""Retrieval by words, and by words and vectors together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import smollm2

from rapid_llm import ContextBuilder, InvalidParameterError, MissingDependencyError
from rapid_llm.context.embedding import Vectors
from rapid_llm.context.ranking import bm25, fuse

PARTS = [
    "The ferry to the island leaves the harbour at noon, and comes back in the evening with mail "
    "and with the few visitors who did not wish to stay for the night.",
    "A baker weighs flour and salt before dawn. The dough rests under a cloth, and the oven is hot "
    "when the first customers knock at the door of the shop.",
    "The lighthouse keeper, Ingrid Voss, wrote down each ship that passed. Her ledger has the name "
    "zebrawood in it once, and nobody knows what she meant by that word.",
    "In winter the lake freezes, and the children skate to school across it. Their teacher rings a "
    "bell from the porch when the ice begins to sing and nobody should be out there.",
]
DOCUMENT = "\n\n".join(PARTS)


class Similarities:
    """An embedder with a chosen cosine similarity of each text to every question."""

    def __init__(self, name: str, cosines: dict[str, float]) -> None:
        self.name = name
        self._cosines = cosines

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        x = np.array([self._cosines[text] for text in texts])
        return np.stack([x, np.sqrt(1 - x**2)], axis=1).astype(np.float32)

    def embed_query(self, text: str) -> Vectors:
        return np.array([1, 0], dtype=np.float32)


class NoEmbedder:
    name = "none"

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        raise AssertionError("nothing is to be embedded")

    embed_query: Any = embed_documents


def builder(embedder: Any, budget: int = 45, **options: Any) -> ContextBuilder:
    return ContextBuilder(smollm2(), embedder, chunk_tokens=45, retrieval_tokens=budget, **options)


def test_bm25_finds_rare_words() -> None:
    scores = bm25(PARTS, "Why did she write zebrawood?")
    assert int(np.argmax(scores)) == 2
    assert scores[0] == scores[1] == scores[3] == 0
    assert bm25(PARTS, "ZEBRAWOOD")[2] > 0


def test_a_rare_word_counts_for_more_than_a_frequent_one() -> None:
    scores = bm25(PARTS, "nobody zebrawood")  # "nobody" is in the last part too
    assert scores[2] > scores[3] > 0


@pytest.mark.parametrize("question", ["the of and", "?", "quetzal", "the quetzal"])
def test_a_question_without_a_known_word_scores_nothing(question: str) -> None:
    assert bm25(PARTS, question) == [0, 0, 0, 0]


def test_texts_without_words_score_zero() -> None:
    assert bm25(["…", "!"], "zebrawood") == [0, 0]


def retrieved(document: str, question: str) -> str:
    """What bm25 ranks first."""
    parts = document.split("\n\n")
    scores = bm25(parts, question)
    best = int(np.argmax(scores))
    assert scores[best] > 0
    return parts[best]


@pytest.mark.parametrize(
    ("others", "part", "question"),
    [
        (
            "今天市场上有苹果和香蕉。价格没有变化。",
            "灯塔建于一八七一年。由工程师布兰特设计。",
            "灯塔是谁设计的",
        ),
        ("白狗在那里。", "黑猫在这里。", "猫"),
        ("昨日は雨が降りました。", "灯台は1871年に建てられました。", "灯台はいつ建てられましたか"),
        ("ｺｰﾋｰを飲みました。", "バナナを食べました。", "ﾊﾞﾅﾅ"),
        ("ตลาดมีแอปเปิ้ลและกล้วย", "ประภาคารสร้างในปีหนึ่งแปดเจ็ดหนึ่ง", "ประภาคารสร้างเมื่อไร"),
        ("ផ្សារមានផ្លែប៉ោមនិងចេក", "ប្រាសាទអង្គរវត្តសាងសង់នៅសតវត្សទី១២", "អង្គរវត្ត"),
        ("ຕະຫຼາດມີໝາກໂປມ", "ພະທາດຫຼວງຢູ່ວຽງຈັນ", "ພະທາດຫຼວງ"),
        ("ဈေးမှာပန်းသီးရှိသည်", "ရွှေတိဂုံဘုရားသည်ရန်ကုန်တွင်ရှိသည်", "ရွှေတိဂုံ"),
        (
            "오늘 시장에 사과가 있습니다.",
            "등대는 1871년에 지어졌습니다.",
            "등대가 언제 지어졌나요?",
        ),
        ("बाज़ार में सेब हैं।", "हिन्दी भाषा भारत में बोली जाती है।", "हिन्दी"),
        ("新しいスマートフォンを買いました。", "新しいiPhone15を買いました。", "iPhone15の値段"),
        ("This is chapter 4.", "This is chapter 5.", "chapter 5"),
        ("The town house.", "The light\u00adhouse.", "LIGHTHOUSE"),
    ],
)
def test_words_are_found_in_any_script(others: str, part: str, question: str) -> None:
    assert retrieved("\n\n".join([others, others, part, others]), question) == part


@pytest.mark.parametrize(
    ("text", "question"),
    [("今天市场上有苹果。", "灯塔"), ("ตลาดมีกล้วย", "ช้าง"), ("the market", "灯塔"), ("猫", "zebra")],
)
def test_other_words_are_not_found(text: str, question: str) -> None:
    assert bm25([text], question) == [0]


def test_fusion_adds_reciprocal_ranks() -> None:
    fused = fuse([0.9, 0.5, 0.1], [0.0, 7.0, 3.0])
    assert fused == pytest.approx([1 / 61 + 1 / 63, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62])


def test_what_was_not_retrieved_gets_nothing() -> None:
    assert fuse([0.9, 0.5], [-np.inf, 7.0]) == pytest.approx([1 / 61, 1 / 62 + 1 / 61])
    assert fuse([0.9, 0.5], [-np.inf, -np.inf]) == pytest.approx([1 / 61, 1 / 62])


def test_equal_scores_share_a_rank() -> None:
    assert fuse([2.0, 1.0, 1.0, 0.0]) == pytest.approx([1 / 61, 1 / 62, 1 / 62, 1 / 64])


def test_the_bm25_retriever_embeds_nothing() -> None:
    context = builder(NoEmbedder(), retriever="bm25").build(
        DOCUMENT, "Why did she write zebrawood?"
    )
    (chunk,) = context.chunks
    assert chunk.text == PARTS[2]
    assert DOCUMENT[chunk.start : chunk.end] == chunk.text
    assert chunk.score == pytest.approx(max(bm25(PARTS, "Why did she write zebrawood?")))


def test_hybrid_ranks_by_both() -> None:
    cosines = dict(zip(PARTS, (0.9, 0.2, 0.8, 0.1), strict=True))
    embedder = Similarities("hybrid", cosines)
    question = "Why does nobody know zebrawood?"
    found = {
        retriever: builder(embedder, retriever=retriever).build(DOCUMENT, question).chunks[0]
        for retriever in ("dense", "bm25", "hybrid")
    }
    assert found["dense"].text == PARTS[0]
    assert found["hybrid"].text == PARTS[2]  # second by similarity, first by words
    assert found["hybrid"].score == pytest.approx(1 / 62 + 1 / 61)


def test_only_similarities_have_a_threshold() -> None:
    embedder = Similarities("low", dict.fromkeys(PARTS, 0.1))
    for retriever, chunks in (("dense", 0), ("bm25", 1), ("hybrid", 4)):
        context = builder(embedder, 400, retriever=retriever, threshold=0.3).build(
            DOCUMENT, "zebrawood"
        )
        assert len(context.chunks) == chunks
        assert (context.empty_reason is None) == (chunks > 0)


def test_chunks_without_a_word_of_the_question_are_not_retrieved() -> None:
    context = builder(NoEmbedder(), 400, retriever="bm25").build(DOCUMENT, "quetzal")
    assert context.chunks == ()
    assert context.empty_reason == "no chunk has a word of the question"
    cosines = dict(zip(PARTS, (0.1, 0.2, 0.8, 0.3), strict=True))
    embedder = Similarities("no word", cosines)
    found = builder(embedder, retriever="hybrid").build(DOCUMENT, "quetzal")
    assert [chunk.text for chunk in found.chunks] == [PARTS[2]]
    assert found.chunks[0].score == pytest.approx(1 / 61)


def test_words_are_ranked_across_documents() -> None:
    context = builder(NoEmbedder(), retriever="bm25").build(PARTS, "When does the ferry leave?")
    assert [chunk.document for chunk in context.chunks] == [0]


def test_unknown_retrievers_and_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InvalidParameterError, match=r"'sparse'.*dense, bm25, hybrid"):
        builder(NoEmbedder(), retriever="sparse")
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rapid-llm\[eval\]"'):
        bm25(PARTS, "zebrawood")
