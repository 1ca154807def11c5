"""Benchmarks are asked and scored as their authors do: ∞Bench, LongBench v2, MT-Bench-101."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from task_files import BOOK, CHOICE, LONGBENCH, dialogue, load, tokens, user_message, write_lines

from rapid_llm.errors import DataError
from rapid_llm.evaluation.tasks.base import ANSWER, CONTEXT


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
