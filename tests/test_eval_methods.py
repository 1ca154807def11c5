"""Which methods a sweep makes, what drafters read, and Speculative RAG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import tiny_model, tiny_tokenizer

from rapid_llm import InvalidParameterError, RapidDecoder, SamplingParams
from rapid_llm.context.embedding import Vectors
from rapid_llm.encoding import encode_literal, encode_prompt
from rapid_llm.evaluation import retrieval, speculative_rag
from rapid_llm.evaluation.methods import METHODS, RetrievalSpec, Sweep
from rapid_llm.evaluation.retrieval import Retrieval, found, other_context
from rapid_llm.evaluation.speculative_rag import CHUNKS_A_DRAFT, DRAFTS, draw_subsets, split
from rapid_llm.evaluation.tasks.base import Item

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


class WordCounts:
    """Vectors that count words, so that a text is similar to the words it shares."""

    def __init__(self, name: str = "words", threshold: float | None = None) -> None:
        self.name = name
        self.threshold = threshold

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        vectors = np.full((len(texts), 64), 0.01, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                vectors[row, int(word[1:])] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed_query(self, text: str) -> Vectors:
        return self.embed_documents([text])[0]


def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def words(first: int, number: int, kinds: int = 10) -> str:
    return " ".join(f"w{first + i % kinds}" for i in range(number))


def item(name: str, context: str, **changes: Any) -> Item:
    values: dict[str, Any] = {
        "query": "w5",
        "messages": ({"role": "user", "content": "w3 {context} w4 w5"},),
        "references": ("w9 w10",),
        "max_new_tokens": 8,
    }
    return Item(id=name, context=context, **values | changes)


# --- sweeps -----------------------------------------------------------------------------------


def names(bases: Sequence[str], **options: Any) -> list[str]:
    return [spec.name for spec in Sweep(**options).methods(bases)]


def test_every_method_has_its_default() -> None:
    specs = Sweep().methods(list(METHODS))
    assert [spec.name for spec in specs] == [
        *("lc", "rag", "sd", "rapid η=10", "streaming", "triforce", "rest", "speculative-rag")
    ]
    by_base = {spec.base: spec for spec in specs}
    assert by_base["lc"].options == {}
    reads = {
        "retrieval_tokens": 4096,
        "chunk_tokens": 512,
        "retriever": "dense",
        "embedder": "all-minilm-l6-v2",
        "irrelevant": False,
    }
    assert by_base["rag"].options == by_base["speculative-rag"].options == reads
    drafts = {"gamma": 4, "eta": 10.0, "mode": "paper", "dynamic_eta": False}
    assert by_base["rapid"].options == drafts | reads
    assert by_base["sd"].options == drafts | reads | {"eta": 0.0, "mode": "exact"}
    assert by_base["rest"].options == {"gamma": 4}
    for base in ("streaming", "triforce", "rest"):
        config = by_base[base].speculation
        assert config is not None
        assert (config.drafting, config.applied_mode) == (base, "exact")


def test_a_sweep_is_the_product_of_what_means_something() -> None:
    assert names(["lc", "rag", "rapid"], eta=[5, 10.5], irrelevant=True) == [
        "lc",
        "rag",
        "rag, irrelevant",
        "rapid η=5",
        "rapid η=5, irrelevant",
        "rapid η=10.5",
        "rapid η=10.5, irrelevant",
    ]
    assert names(["lc", "rag", "sd", "rest"], gamma=[4, 8], eta=[5, 10]) == [
        *("lc", "rag", "sd", "sd, γ=8", "rest", "rest, γ=8")
    ]
    assert names(["rapid"], mode=["paper", "augmented"], gamma=[10, "auto"]) == [
        "rapid η=10",
        "rapid η=10, γ=auto",
        "rapid η=10, augmented",
        "rapid η=10, γ=auto, augmented",
    ]


def test_a_dynamic_eta_is_run_beside_the_constant_one() -> None:
    assert names(["sd", "rapid"], eta=[5, 10], dynamic_eta=True) == [
        *("sd", "rapid η=5", "rapid η=5, dynamic", "rapid η=10", "rapid η=10, dynamic")
    ]
    constant, dynamic = Sweep(dynamic_eta=True).methods(["rapid"])
    assert (constant.options["dynamic_eta"], dynamic.options["dynamic_eta"]) == (False, True)


def test_no_knowledge_transfer_is_sd() -> None:
    assert names(["sd", "rapid"], eta=[0, 5], mode=["paper", "exact"]) == ["sd", "rapid η=5"]
    (spec,) = Sweep(eta=[0]).methods(["rapid"])
    assert (spec.name, spec.base, spec.options["eta"]) == ("sd", "sd", 0.0)


def test_the_first_value_goes_unnamed() -> None:
    swept = {
        "retrieval_tokens": [512, 1024],
        "chunk_tokens": [64, 32],
        "retriever": ["bm25", "dense"],
        "embedder": ["one", "two"],
    }
    found = names(["rag"], **swept)
    assert found[0] == "rag"
    assert found[-1] == "rag, 1024 retrieved, chunks of 32, dense, two"
    # Without vectors there is nothing to embed: 2 · 2 · (1 + 2)
    assert len(found) == len(set(found)) == 12
    assert len(names(["speculative-rag"], **swept)) == 16  # it clusters by vectors
    own = Sweep(**swept).own
    assert own["retrieval_tokens"] == 512
    assert own["retriever"] == "bm25"


def test_unknown_values_are_refused() -> None:
    for bases, options, mention in (
        (["magic"], {}, "'magic'.*speculative-rag"),
        (["rag"], {"retriever": ["sparse"]}, "'sparse'.*hybrid"),
        (["rapid"], {"mode": ["fast"]}, "'fast'.*augmented"),
        (["rapid"], {"eta": [-1.0]}, "eta=-1.0"),
        (["sd"], {"gamma": [0]}, "gamma=0"),
    ):
        with pytest.raises(InvalidParameterError, match=mention):
            Sweep(**options).methods(bases)


# --- what drafters read -----------------------------------------------------------------------


@pytest.fixture
def _words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "load_embedder", lambda name, device: WordCounts(name))


@pytest.mark.parametrize(("threshold", "chunks"), [(0.3, 1), (None, 2)])
def test_the_embedder_says_what_is_similar_but_irrelevant_chunks_fill_the_budget(
    monkeypatch: pytest.MonkeyPatch, threshold: float | None, chunks: int
) -> None:
    monkeypatch.setattr(
        retrieval, "load_embedder", lambda name, device: WordCounts(name, threshold)
    )
    own = RetrievalSpec(64, 32, "dense", "words", False)
    other = RetrievalSpec(64, 32, "dense", "words", irrelevant=True)
    made = Retrieval(tokenizer(), [own, other])
    text = words(30, 60)  # no word of the question; the best chunk is kept in any case
    assert len(made.context(own, text, "w5").chunks) == chunks
    assert len(made.context(other, text, "w5").chunks) == 2


@pytest.mark.usefixtures("_words")
def test_a_bad_spec_is_refused_at_once() -> None:
    with pytest.raises(InvalidParameterError, match="chunk_tokens=31"):
        Retrieval(tokenizer(), [RetrievalSpec(32, 31, "dense", "words", False)])


def test_another_item_s_context_does_not_depend_on_those_that_follow() -> None:
    items = [item(str(i), f"w{3 + i // 2}") for i in range(40)]
    chosen = [other_context(items, i, seed=0) for i in range(40)]
    assert all(context != one.context for context, one in zip(chosen, items, strict=True))
    for limit in (3, 10, 25):
        some = [other_context(items[:limit], i, seed=0) for i in range(limit)]
        assert some == chosen[:limit]
    assert len(set(chosen[20:])) > 5
    assert chosen != [other_context(items, i, seed=1) for i in range(40)]
    with pytest.raises(InvalidParameterError, match="--limit"):
        other_context(items[:2], 0, seed=0)


def test_a_reference_is_found_whatever_its_case_and_white_space() -> None:
    context = "The ferry leaves  at\nNoon."
    for reference, text, expected in (
        ("at noon", "It leaves AT NOON.", True),
        ("at noon", "It leaves at one.", False),
        ("a summary in other words", "at noon", None),
        ("T", "T", None),  # a choice's letter stands anywhere
    ):
        asked = item("1", context, references=(reference,))
        assert found(asked, text) is expected
    assert found(item("1", context, references=("T", "ferry")), "a ferry") is True


# --- Speculative RAG --------------------------------------------------------------------------


def test_each_subset_has_a_chunk_of_every_cluster() -> None:
    groups = [[0, 2, 4], [1, 3, 5, 6]]
    vectors = np.zeros((7, 2), dtype=np.float32)
    for axis, members in enumerate(groups):
        for member in members:
            vectors[member] = (0.01 * member, 0.01 * member)
            vectors[member, axis] = 1
    subsets = draw_subsets(vectors, seed=0)
    assert 1 < len(subsets) <= DRAFTS
    assert len({tuple(subset) for subset in subsets}) == len(subsets)
    for subset in subsets:
        assert len(subset) == CHUNKS_A_DRAFT
        assert subset == sorted(subset)
        assert [sum(i in group for i in subset) for group in groups] == [1, 1]
    assert draw_subsets(vectors, seed=0) == subsets


def test_few_chunks_make_few_subsets() -> None:
    one, two = np.eye(2, dtype=np.float32)
    assert draw_subsets(np.stack([one]), seed=0) == [[0]]
    assert draw_subsets(np.stack([one, two]), seed=0) == [[0, 1]]
    assert all(len(subset) == 1 for subset in draw_subsets(np.stack([one, one]), seed=0))


@pytest.mark.parametrize(
    ("text", "rationale", "answer"),
    [
        ("Rationale: it says so. Answer: noon", "Rationale: it says so. Answer: ", "noon"),
        ("Rationale: so.\n\n**Answer:** noon", "Rationale: so.\n\n**Answer:** ", "noon"),
        ("at noon", "", "at noon"),
        ("Rationale: so. Answer:", "", "Rationale: so. Answer:"),
        ("The answers are many: noon", "", "The answers are many: noon"),
    ],
)
def test_a_draft_is_a_rationale_and_an_answer(text: str, rationale: str, answer: str) -> None:
    assert split(text) == (rationale, answer)


class Scripted(RapidDecoder):
    """A decoder whose drafter says what was arranged for what it reads."""

    def __init__(self, says: dict[str, str]) -> None:
        super().__init__(tiny_model(), tokenizer(), tiny_model(seed=1))
        self.says = says
        self.asked: list[Any] = []

    def generate(self, target_prompt: Any, draft_prompt: Any = None, **options: Any) -> Any:
        assert target_prompt is None
        self.asked.append(draft_prompt)
        result = super().generate(None, draft_prompt, **options)
        text = next(
            says for chunk, says in self.says.items() if chunk in draft_prompt[0]["content"]
        )
        return type(result)(text, result.token_ids, result.finish_reason, result.stats)


def test_the_target_chooses_the_likeliest_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative_rag, "INSTRUCTION", "w60")
    monkeypatch.setattr(speculative_rag, "REFLECTION", "w61 w62")
    says = {"w10": "w20 w21", "w11": "w40 w41 w42"}
    decoder = Scripted(says)
    chunks = ["w10 w10", "w11 w11"]
    # Two chunks that are alike to the embedder are one cluster: each is a subset.
    vectors = np.ones((2, 4), dtype=np.float32)

    def render(context: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"w3 {context} w4"}]

    best, stats = speculative_rag.answer(
        decoder, render, chunks, vectors, SamplingParams(max_new_tokens=3)
    )

    def score(chunk: str, said: str) -> float:
        question = render("")
        reflection = [
            *question,
            {"role": "assistant", "content": said},
            {"role": "user", "content": "w61 w62"},
        ]
        prompt = [{"role": "user", "content": f"w3 {chunk} w4\n\nw60"}]
        return (
            decoder.log_likelihood(prompt, said, drafter=True)
            + decoder.log_likelihood(question, said)
            + decoder.log_likelihood(reflection, "Yes")
        )

    scores = {says: score(chunk, says) for chunk, says in zip(chunks, says.values(), strict=True)}
    assert len(decoder.asked) == 2
    assert best == max(scores, key=scores.__getitem__)
    assert len({round(value, 3) for value in scores.values()}) == 2
    assert stats.prompt_tokens == 2 * 5
    assert stats.rounds > stats.completion_tokens  # of both drafts, of the chosen one


def test_a_rationale_is_scored_before_its_answer() -> None:
    decoder = RapidDecoder(tiny_model(), tokenizer(), tiny_model(seed=1))
    prompt = [{"role": "user", "content": "w3 w4"}]
    ids = encode_prompt(prompt, decoder.tokenizer)
    rationale = decoder.log_likelihood(ids, "w8 w9", drafter=True)
    answer = decoder.log_likelihood(
        [*ids, *encode_literal("w8 w9", decoder.tokenizer)], "w10 w11", drafter=True
    )
    assert speculative_rag.drafting(decoder, prompt, "w8 w9 ", "w10 w11") == pytest.approx(
        np.log(np.exp(rationale) + np.exp(answer)), abs=1e-3
    )
    assert speculative_rag.drafting(decoder, prompt, "", "w8 w9") == pytest.approx(
        rationale, abs=1e-3
    )
