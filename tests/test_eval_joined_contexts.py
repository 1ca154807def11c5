"""Contexts that tasks join to a length: needles, SQuAD, Lost in the Middle."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from task_files import load, nq_row, squad_file, tokens, user_message, write_lines

from rapid_llm.errors import DataError, DocumentError, InvalidParameterError
from rapid_llm.evaluation.scoring import normalise
from rapid_llm.evaluation.tasks.needle import draw_facts


def test_needle_hides_the_answer_once_and_at_every_depth() -> None:
    task = load("needle", limit=20, context_tokens=1500)
    assert task.metrics == {"contains": "rate"}
    for item in task.items:
        (answer,) = item.references
        assert 1490 <= tokens(item.context) <= 1500
        assert item.context.count(answer) == 1
        assert normalise(item.context).count(normalise(answer)) == 1
        assert answer not in item.query
        assert item.query in user_message(item)
        # What the question names stands in the answer's sentence, and in no other.
        names = re.findall(r"\b[A-Z][a-z]+(?: [A-Z][a-z]+)?\b", item.query)[1:]
        (sentence,) = [s for s in re.split(r"(?<=[.!?])\s+", item.context) if answer in s]
        assert names
        for name in names:
            assert name in sentence
            assert item.context.count(name) == 1
        assert task.score(item, f"I think: {answer.upper()}!") == {"contains": 1}
        assert task.score(item, "I do not know") == {"contains": 0}
    depths = [item.groups["depth"] for item in task.items]
    assert set(depths) == {"0–20 %", "20–40 %", "40–60 %", "60–80 %", "80–100 %"}
    for item, depth in zip(task.items, depths, strict=True):
        low = int(depth.split("–")[0]) / 100
        assert low <= item.context.index(item.references[0]) / len(item.context) <= low + 0.25


def test_needles_are_the_same_in_every_run_for_every_limit_and_length() -> None:
    items = load("needle", limit=6, context_tokens=400).items
    assert load("needle", limit=6, context_tokens=400).items == items
    assert load("needle", limit=3, context_tokens=400).items == items[:3]
    longer = load("needle", limit=6, context_tokens=900).items
    assert [(i.query, i.references) for i in longer] == [(i.query, i.references) for i in items]
    other = load("needle", limit=6, context_tokens=400, seed=1).items
    assert {i.query for i in other}.isdisjoint(i.query for i in items)
    assert len({i.query for i in items}) == 6


def test_the_facts_of_an_item_share_no_name_and_none_stands_in_the_text() -> None:
    for seed in range(50):
        facts = draw_facts(Random(seed), "")
        assert len(facts) == 4
        names = [set(re.findall(r"\b(?!The|Every)[A-Z][a-z]+", f.sentence)) for f in facts]
        answers = [set(fact.answer.split()) for fact in facts]
        for words in (names, answers):
            assert len(set.union(*words)) == sum(map(len, words))
        text = f" once {normalise(facts[0].answer)} stood here "
        assert all(fact.answer != facts[0].answer for fact in draw_facts(Random(seed), text))


def test_needles_go_between_the_sentences_of_any_text_however_short(tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_text(" ".join(f"Nothing of note happened on the {i}th morning." for i in range(40)))
    item = load("needle", path, limit=1, context_tokens=2000).items[0]
    assert tokens(item.context) == 2000  # the text is repeated
    sentences = re.split(r"(?<=[.!?])\s+", item.context)
    told = [s for s in sentences if not re.fullmatch(r"Nothing of note .* morning\.", s)]
    assert len(told) == 4 + (not item.context.endswith("."))  # the facts, and where it is cut


def test_needle_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match=r"context_tokens=20 leaves no room.* at least"):
        load("needle", context_tokens=20)
    with pytest.raises(DocumentError, match=r"gone\.txt does not exist"):
        load("needle", tmp_path / "gone.txt")
    short = tmp_path / "short.txt"
    short.write_text("One sentence. And another.")
    with pytest.raises(DataError, match=r"short\.txt has .* sentences.*--data PATH"):
        load("needle", short)


def test_needle_has_100_items_unless_told_otherwise() -> None:
    assert len(load("needle", context_tokens=200).items) == 100


def test_squad_joins_paragraphs_to_the_length_asked_for(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "squad.json")
    task = load("squad", path, context_tokens=110)
    assert sorted(item.id for item in task.items) == [f"q{i}" for i in range(10, 22)]
    for item in task.items:
        assert tokens(item.context) == 100  # five whole paragraphs
        paragraphs = item.context.split("\n\n")
        assert len(set(paragraphs)) == 5
        (gold,) = [k for k, text in enumerate(paragraphs) if f"{item.references[0]} " in text]
        assert item.groups == {"depth": f"{gold * 20}–{gold * 20 + 20} %"}
        assert item.query in user_message(item)
    assert len({item.groups["depth"] for item in task.items}) > 1
    assert task.metrics == {"contains": "rate", "exact_match": "rate", "f1": "mean"}
    item = task.items[0]
    town = item.references[0]
    # "it is in town" and "in town": two words of four, two of two.
    assert task.score(item, f"It is in {town}.") == {
        "contains": 1,
        "exact_match": 0,
        "f1": pytest.approx(2 / 3),
    }
    assert task.score(item, f"The {town}!") == {"contains": 1, "exact_match": 1, "f1": 1}


def test_squad_items_do_not_depend_on_the_limit(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "squad.json")
    items = load("squad", path, context_tokens=110).items
    assert load("squad", path, context_tokens=110, limit=4).items == items[:4]
    assert load("squad", path, context_tokens=110, seed=1).items != items


def test_squad_leaves_out_what_has_no_answer(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "v2.json", is_impossible=True, answers=[])
    items = load("squad", path, context_tokens=60).items
    assert len(items) == 11
    assert "q12" not in {item.id for item in items}


def test_squad_that_is_too_short_or_too_long_for_the_context(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "squad.json")
    with pytest.raises(DataError, match=r"squad\.json .* 240 tokens, not .*context_tokens=300"):
        load("squad", path, context_tokens=300)
    assert tokens(load("squad", path, context_tokens=240).items[0].context) == 240
    with pytest.raises(InvalidParameterError, match=r"context_tokens=19 .* at least 20"):
        load("squad", path, context_tokens=19)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"question": None}, r"\.question: Field required"),
        ({"question": 7}, r"\.question: .*string; there is 7"),
        ({"answers": []}, ": 'answers' is empty"),
        ({"answers": "town12"}, r"\.answers: .*there is \"town12\""),
        ({"answers": [{"answer_start": 3}]}, r"\.answers\[0\]\.text: Field required"),
        ({"id": " "}, r"\.id: .*there is \" \""),
    ],
)
def test_a_wrong_field_of_squad_is_named(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    path = squad_file(tmp_path / "squad.json", **changes)
    place = re.escape(f"{path}: data[2].paragraphs[0].qas[0]")
    with pytest.raises(DataError, match=place + field):
        load("squad", path, context_tokens=60)


def test_two_questions_with_one_id_are_refused(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "squad.json", id="q13")
    with pytest.raises(DataError, match="the id 'q13' twice"):
        load("squad", path, context_tokens=60)


@pytest.mark.parametrize("packed", [True, False])
def test_nq_joins_the_passages_of_other_questions(tmp_path: Path, packed: bool) -> None:
    path = write_lines(tmp_path / "nq.jsonl", *map(nq_row, range(10, 20)))
    if packed:
        path = tmp_path / "nq-open-oracle.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "nq.jsonl").read_bytes()))
    task = load("nq", path, context_tokens=50)
    assert [item.id for item in task.items] == [str(i) for i in range(1, 11)]
    item = task.items[0]
    documents = item.context.split("\n")
    assert len(documents) == 5  # of 10 tokens
    assert f"Document [{_place(documents)}](Title: Page 10) Person10 was born" in item.context
    for number, document in enumerate(documents, 1):
        assert re.match(rf"Document \[{number}\]\(Title: Page \d+\) Person\d+ was born", document)
    assert user_message(item).startswith("Write a high-quality answer for the given question")
    assert user_message(item).endswith("{context}\n\nQuestion: when was person10 born\nAnswer:")
    assert item.max_new_tokens == 100
    assert task.score(item, "In year10.")["contains"] == 1
    # The benchmark reads the first line only.
    assert task.score(item, "I do not know\nyear10")["contains"] == 0
    assert load("nq", path, context_tokens=50, limit=3).items == task.items[:3]


def _place(documents: list[str]) -> int:
    (place,) = [n for n, document in enumerate(documents, 1) if "Person10 " in document]
    return place


def test_nq_takes_no_passage_with_the_answer_as_a_distractor(tmp_path: Path) -> None:
    same = {"title": "Copy", "text": "Also year10 here and some more .", "isgold": True}
    rows = [nq_row(10), nq_row(11, ctxs=[same]), nq_row(12), nq_row(13)]
    path = write_lines(tmp_path / "nq.jsonl", *rows)
    for seed in range(10):
        item = load("nq", path, context_tokens=20, limit=1, seed=seed).items[0]
        assert normalise(item.context).count("year10") == 1


def test_nq_without_a_gold_passage_is_refused(tmp_path: Path) -> None:
    bare = nq_row(11, ctxs=[{"title": "a", "text": "b"}, {"title": "c", "text": "d"}])
    path = write_lines(tmp_path / "nq.jsonl", nq_row(10), bare)
    with pytest.raises(DataError, match=r"nq\.jsonl, line 2: 'ctxs' has no .* isgold"):
        load("nq", path, context_tokens=20)
