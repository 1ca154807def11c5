"""The tasks of the evaluation, on tiny files in the benchmarks' own formats."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import tiny_tokenizer
from pydantic import BaseModel

from rapid_llm.encoding import encode_literal
from rapid_llm.errors import DataError, DocumentError, InvalidParameterError
from rapid_llm.evaluation import data
from rapid_llm.evaluation.scoring import normalise
from rapid_llm.evaluation.tasks import MADE_TO_LENGTH, TASKS, load_task
from rapid_llm.evaluation.tasks.base import ANSWER, CONTEXT, Item, Source, Task
from rapid_llm.evaluation.tasks.needle import draw_facts

TOKENIZER = tiny_tokenizer()  # its tokens are words


def load(name: str, path: Path | None = None, **options: Any) -> Task:
    return load_task(name, Source(TOKENIZER, path, **options))


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def tokens(text: str) -> int:
    return len(encode_literal(text, TOKENIZER))


def user_message(item: Item) -> str:
    assert item.messages[-1]["role"] == "user"
    return item.messages[-1]["content"]


class Letters(BaseModel):
    a: data.Text


# --- ∞Bench ------------------------------------------------------------------------------------

BOOK = {"context": "The long book.", "input": "Who baked?", "answer": ["Old Ann", "Ann"]}
CHOICE = BOOK | {"answer": ["A miller"], "options": ["A smith", "A miller", "A monk", "A maid"]}


def test_infinitebench_qa_asks_as_its_authors_do(tmp_path: Path) -> None:
    write_lines(tmp_path / "longbook_qa_eng.jsonl", BOOK, BOOK | {"input": "Who ate?"})
    task = load("infinitebench-qa", tmp_path)
    assert [item.id for item in task.items] == ["1", "2"]
    item = task.items[0]
    assert item.messages == (
        {"role": "system", "content": "You are a helpful assistant"},
        {
            "role": "user",
            "content": "Read the book below and answer a question.\n\n{context}\n\n"
            "Question: Who baked?\n\nBe very concise.",
        },
    )
    assert (item.context, item.query, item.max_new_tokens) == ("The long book.", "Who baked?", 40)
    assert task.metrics == {"f1": "mean"}
    # Of "ann baked" and "old ann" one word in two is common; of "ann", one in one.
    assert task.score(item, "Ann baked.") == {"f1": pytest.approx(2 / 3)}


def test_infinitebench_mc_takes_the_letter_of_the_choice(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "any-name.jsonl", CHOICE)
    task = load("infinitebench-mc", path)
    (item,) = task.items
    assert user_message(item).endswith(
        "Don't say anything else.\nA. A smith\nB. A miller\nC. A monk\nD. A maid"
    )
    assert item.references == ("A miller",)  # not the letter, which stands in every text
    assert item.max_new_tokens == 40
    assert task.metrics == {"accuracy": "rate"}
    assert task.score(item, "B") == {"accuracy": 1}
    assert task.score(item, "A") == {"accuracy": 0}


def test_infinitebench_sum_scores_with_rouge_l_of_lines(tmp_path: Path) -> None:
    write_lines(tmp_path / "longbook_sum_eng.jsonl", BOOK | {"answer": ["Ann bakes.\nAll eat."]})
    task = load("infinitebench-sum", tmp_path)
    (item,) = task.items
    assert user_message(item) == "Summarize the following book.\n\n{context}"
    assert (item.query, item.max_new_tokens) == ("Summarize the following book.", 1200)
    # "all eat" and "ann" are found: 3 of 4 words there, 3 of 3 here.
    assert task.score(item, "All eat.\nAnn.") == {"rouge_lsum": pytest.approx(6 / 7)}


@pytest.mark.parametrize(
    ("name", "file", "answer", "new", "right", "wrong", "opening"),
    [
        ("passkey", "passkey", "71432", 6, "It is 71432.", "7143", "Find it and memorize them."),
        ("number", "number_string", "1122334455", 12, "1122334455", "112233445", "Find it. I"),
        ("kv", "kv_retrieval", "ab-12", 50, '"k": "ab-12"', "xab-12", "Extract the value"),
    ],
)
def test_infinitebench_retrieval_wants_the_value_itself(
    tmp_path: Path,
    name: str,
    file: str,
    answer: str,
    new: int,
    right: str,
    wrong: str,
    opening: str,
) -> None:
    write_lines(tmp_path / f"{file}.jsonl", {"context": "…", "input": "Which?", "answer": [answer]})
    task = load(f"infinitebench-{name}", tmp_path)
    (item,) = task.items
    assert opening in user_message(item)
    assert user_message(item).endswith("{context}\n\nWhich?")
    assert item.max_new_tokens == new
    assert task.score(item, right) == {"accuracy": 1}
    assert task.score(item, wrong) == {"accuracy": 0}


def test_only_the_lines_asked_for_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "longbook_qa_eng.jsonl", BOOK)
    path.write_text(path.read_text() + "no json\n")
    assert len(load("infinitebench-qa", path, limit=1).items) == 1
    with pytest.raises(DataError, match=r"longbook_qa_eng.jsonl, line 2: Invalid JSON"):
        load("infinitebench-qa", path, limit=2)


# --- LongBench v2 ------------------------------------------------------------------------------

LONGBENCH = {
    "_id": "66f1",
    "domain": "Novels",
    "sub_domain": "Detective",
    "difficulty": "hard",
    "length": "medium",
    "question": " Who did it? ",
    "choice_A": "Ann",
    "choice_B": "Bob",
    "choice_C": "Cyd",
    "choice_D": "Dan ",
    "answer": "D",
    "context": "\nIt was Dan.\n",
}
CHOICES = "Choices:\n(A) Ann\n(B) Bob\n(C) Cyd\n(D) Dan"


@pytest.mark.parametrize("as_list", [True, False])
def test_longbench_v2_asks_as_its_authors_do(tmp_path: Path, as_list: bool) -> None:
    path = tmp_path / "data.json"
    text = json.dumps([LONGBENCH], indent=1) if as_list else json.dumps(LONGBENCH)
    path.write_text(text, encoding="utf-8")
    task = load("longbench-v2", tmp_path)
    (item,) = task.items
    assert item.messages == (
        {
            "role": "user",
            "content": "Please read the following text and answer the question below.\n\n"
            f"<text>\n{{context}}\n</text>\n\nWhat is the correct answer to this question: "
            f'Who did it?\n{CHOICES}\n\nFormat your response as follows: "The correct answer is '
            '(insert answer here)".',
        },
    )
    assert (item.id, item.context, item.query) == ("66f1", "It was Dan.", "Who did it?")
    assert (item.references, item.max_new_tokens, item.follow_up) == (("Dan",), 128, None)
    assert item.groups == {"length": "medium", "difficulty": "hard"}
    assert task.metrics == {"accuracy": "rate"}
    assert task.score(item, "The correct answer is (D) Dan.") == {"accuracy": 1}
    assert task.score(item, "The correct answer is (A).") == {"accuracy": 0}
    assert task.score(item, "Dan") == {"accuracy": 0}


def test_longbench_v2_thinks_first(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.jsonl", LONGBENCH)
    (item,) = load("longbench-v2-cot", path).items
    assert user_message(item).endswith(f"{CHOICES}\n\nLet\u2019s think step by step:")
    assert (item.max_new_tokens, item.follow_up_tokens) == (1024, 128)
    assert item.follow_up is not None
    assert CONTEXT not in item.follow_up  # its authors leave the text out
    assert f"step by step: {ANSWER}\n\nBased on the above" in item.follow_up
    assert CHOICES in item.follow_up


# --- needle ------------------------------------------------------------------------------------


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


# --- SQuAD -------------------------------------------------------------------------------------


def squad_file(path: Path, paragraphs: int = 12, **changes: Any) -> Path:
    """Paragraphs of 20 tokens and one question each; ``changes`` go to the third question."""
    articles = []
    for i in range(10, 10 + paragraphs):
        context = f"Fact {i} says that person{i} lives in town{i} , " + "and more " * 5 + "."
        question = {
            "id": f"q{i}",
            "question": f"Where does person{i} live?",
            "answers": [{"text": f"town{i}", "answer_start": 30}, {"text": f"in town{i}"}],
        }
        if i == 12:
            question = {k: v for k, v in (question | changes).items() if v is not None}
        articles.append({"title": "x", "paragraphs": [{"context": context, "qas": [question]}]})
    path.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return path


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


# --- Lost in the Middle ------------------------------------------------------------------------


def nq_row(i: int, **changes: Any) -> dict[str, Any]:
    gold = {"title": f"Page {i}", "text": f"Person{i} was born in year{i} .", "isgold": True}
    near = {"title": "Other", "text": "Not this one.", "isgold": False}
    row = {"question": f"when was person{i} born", "answers": [f"Year{i}"], "ctxs": [near, gold]}
    return row | changes


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


# --- MT-Bench-101 ------------------------------------------------------------------------------


def dialogue(i: int, task: str = "CM") -> dict[str, Any]:
    history = [{"user": f"ask {i} {k}", "bot": f"tell {i} {k}"} for k in range(3)]
    return {"task": task, "id": i, "history": history}


class FixedJudge:
    """Rates everything 4 and remembers what it was shown."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def rate(self, *asked: Any) -> float:
        self.asked.append(asked)
        return 4.0


def test_mtbench101_strews_the_earlier_turns_over_a_long_history(tmp_path: Path) -> None:
    write_lines(tmp_path / "mtbench101.jsonl", *map(dialogue, range(20)))
    task = load("mtbench101", tmp_path, context_tokens=100, limit=8)
    assert len(task.items) == 8
    gaps = set()
    for i, item in enumerate(task.items):
        assert tokens(item.context) == 88  # three other dialogues of 24 tokens, two turns of 8
        turns = [f"User: ask {i} {k}\n\nAssistant: tell {i} {k}" for k in range(2)]
        first, second = (item.context.index(turn) for turn in turns)
        assert first < second
        assert f"ask {i} 2" not in item.context
        gaps.add(item.context[first + len(turns[0]) : second].count("User: "))
        assert item.query == f"ask {i} 2"
        assert user_message(item).endswith(f"{item.query}")
        assert item.references == (f"tell {i} 2",)
        assert item.groups == {"task": "CM"}
        others = {int(n) for n in re.findall(r"ask (\d+) 2", item.context)}
        assert len(others) == 3
    assert len(gaps) > 1  # the turns are at random places, often with others between them
    assert load("mtbench101", tmp_path, context_tokens=100, limit=2).items == task.items[:2]


def test_mtbench101_is_scored_by_overlap_or_by_a_judge(tmp_path: Path) -> None:
    rows = [dialogue(0), dialogue(1, "MR"), *map(dialogue, range(2, 8))]
    path = write_lines(tmp_path / "mtbench101.jsonl", *rows)
    task = load("mtbench101", path, context_tokens=60)
    assert task.metrics == {"rouge_l": "mean"}
    # "tell 0" of "tell 0 2": two words of two, two of three.
    assert task.score(task.items[0], "Tell 0") == {"rouge_l": pytest.approx(0.8)}

    judge: Any = FixedJudge()
    task = load("mtbench101", path, context_tokens=60, judge=judge)
    assert list(task.metrics) == ["rating", "rouge_l"]
    assert task.score(task.items[0], "Tell 0") == {"rating": 0.4, "rouge_l": pytest.approx(0.8)}
    task.score(task.items[1], "Tell 1")
    (messages, answer, reference), (_, _, reasoned) = judge.asked
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[-1]["content"] == "ask 0 2"
    assert answer == "Tell 0"
    assert reference is None
    assert reasoned == "tell 1 2"  # mathematics is judged beside the right answer


# --- what every task does ----------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_every_task_puts_the_context_into_one_message(tmp_path: Path, name: str) -> None:
    rows: dict[str, list[object]] = {
        "infinitebench-mc": [CHOICE],
        "longbench-v2": [LONGBENCH],
        "longbench-v2-cot": [LONGBENCH],
        "nq": [nq_row(i) for i in range(10, 30)],
        "mtbench101": [dialogue(i) for i in range(20)],
    }
    if name == "squad":
        path = squad_file(tmp_path / "squad.json")
    else:
        path = write_lines(tmp_path / "rows.jsonl", *rows.get(name, [BOOK]))
    task = load(name, None if name == "needle" else path, context_tokens=100, limit=1)
    assert task.name == name
    (item,) = task.items
    assert sum(message["content"].count(CONTEXT) for message in item.messages) == 1
    assert item.context
    assert item.query
    assert item.references
    assert item.references[0]
    scores = task.score(item, item.references[0])
    assert scores.keys() == task.metrics.keys()
    assert all(0 <= score <= 1 for score in scores.values())
    assert task.score(item, "").keys() == task.metrics.keys()


def test_where_a_length_is_needed_there_is_one() -> None:
    lengths = {name: length for name, (_, length) in MADE_TO_LENGTH.items()}
    assert lengths == {"needle": 6000, "squad": 1700, "nq": 6500, "mtbench101": 6000}
    assert tokens(load("needle", limit=1).items[0].context) == 6000


def test_an_unknown_task_and_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match=r"task='needles' is unknown.* needle, squad"):
        load("needles")
    with pytest.raises(InvalidParameterError, match="limit=0"):
        load("needle", limit=0)
    with pytest.raises(InvalidParameterError, match="context_tokens=-5"):
        load("needle", context_tokens=-5)


@pytest.mark.parametrize("name", ["squad", "nq", "mtbench101"])
def test_what_is_not_on_the_hub_needs_data(name: str) -> None:
    with pytest.raises(DataError, match=r"give .* with --data PATH"):
        load(name)


@pytest.mark.parametrize(
    ("name", "repository", "file"),
    [
        ("infinitebench-kv", "xinrongzhang2022/InfiniteBench", "kv_retrieval.jsonl"),
        ("longbench-v2", "THUDM/LongBench-v2", "data.json"),
    ],
)
def test_without_data_the_file_comes_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, repository: str, file: str
) -> None:
    path = write_lines(tmp_path / "cached", LONGBENCH | BOOK | {"answer": "A"})
    asked = []

    def download(*args: str, **options: str) -> str:
        asked.append((*args, *options.values()))
        return str(path)

    monkeypatch.setattr(data, "hf_hub_download", download)
    assert len(load(name).items) == 1
    assert asked == [(repository, file, "dataset")]


def test_a_download_that_fails_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: str, **options: str) -> str:
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr(data, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"passkey\.jsonl of .*\(no route\).*--data PATH"):
        load("infinitebench-passkey")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"longbook_qa_eng\.jsonl does not exist.*--data PATH"):
        load("infinitebench-qa", tmp_path)
    with pytest.raises(DataError, match=r"gone\.json does not exist"):
        load("squad", tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("infinitebench-qa", BOOK | {"answer": []}, r"answer: .* at least 1 .*; there is \[\]"),
        ("infinitebench-qa", BOOK | {"answer": [3]}, r"answer\[0\]: .*; there is 3"),
        ("infinitebench-qa", {"context": "x", "answer": "y"}, 'input: .*required.*"context"'),
        ("infinitebench-mc", BOOK, "options: Field required"),
        ("infinitebench-mc", CHOICE | {"options": ["a", "b"]}, "options: .*at least 4 .*not 2"),
        ("infinitebench-mc", CHOICE | {"answer": "A king"}, "no 'answer' is one of the 'options'"),
        ("longbench-v2", LONGBENCH | {"answer": "E"}, "answer: .*'A', 'B', 'C' or 'D'.*\"E\""),
        ("longbench-v2", LONGBENCH | {"length": "huge"}, "length: .*'short'.*\"huge\""),
        ("longbench-v2", LONGBENCH | {"difficulty": None}, "difficulty: .* null"),
        ("longbench-v2", LONGBENCH | {"choice_C": ""}, 'choice_C: .*""'),
        ("longbench-v2-cot", LONGBENCH | {"context": ["x"] * 99}, r"context: .*string.* \[.{59}\."),
        ("mtbench101", {"task": "CM", "history": []}, "history: .* at least 1 item"),
        ("mtbench101", {"task": "CM", "history": [{"user": "hi"}]}, r"history\[0\]\.bot: "),
        ("nq", nq_row(1, answers=None), "answers: .* null"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_and_line(
    tmp_path: Path, name: str, row: dict[str, Any], problem: str
) -> None:
    good = {
        "infinitebench-qa": BOOK,
        "infinitebench-mc": CHOICE,
        "mtbench101": dialogue(1),
        "nq": nq_row(2),
    }.get(name, LONGBENCH | {"_id": "another"})
    path = write_lines(tmp_path / "rows.jsonl", good, row)
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: {problem}"):
        load(name, path, context_tokens=10)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", " is empty"),
        (b"\n\n", " is empty"),
        (b"[]", " is empty"),
        (b'{"a": "1"}\n{"a": \n', ", line 2: Invalid JSON"),
        (b'[{"a": "1"},\n {"a" 2}]', ": Invalid JSON: .* line 2"),
        (b'{"a": "1"}\n{"a": "\xff"}\n', ", line 2: Invalid JSON: .*unicode"),
        (b"3\n", ", line 1: .*object.*"),
        (b'[{"a": "1"}, "b"]', r': \[1\]: .*; there is "b"'),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"rows\.jsonl{problem}"):
        list(data.read_rows(path, Letters))


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(nq_row(1)).encode() * 50)
    for content in (b"no archive", whole[:-20], whole[:30] + b"\0\1\2" + whole[33:]):
        path = tmp_path / "nq.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"nq\.jsonl\.gz.* (cannot be read|Invalid JSON)"):
            list(data.read_rows(path, Letters))


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"a": "x\u2028y\x85z"}\r\n\n{"a": "w"}', encoding="utf-8")
    rows = list(data.read_rows(path, Letters))
    assert [row.a for row in rows] == ["x\u2028y\x85z", "w"]
