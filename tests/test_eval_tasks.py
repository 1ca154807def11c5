"""What every task does: one message, lengths, and files that are missing, broken or wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from task_files import (
    BOOK,
    CHOICE,
    LONGBENCH,
    dialogue,
    load,
    nq_row,
    squad_file,
    tokens,
    write_lines,
)

from rapid_llm.errors import DataError, InvalidParameterError
from rapid_llm.evaluation import data
from rapid_llm.evaluation.tasks import MADE_TO_LENGTH, TASKS
from rapid_llm.evaluation.tasks.base import CONTEXT


class Letters(BaseModel):
    a: data.Text


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
