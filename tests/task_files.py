"""Files of benchmarks as their authors have them, and the tasks that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import tiny_tokenizer

from rapid_llm.encoding import encode_literal
from rapid_llm.evaluation.tasks import load_task
from rapid_llm.evaluation.tasks.base import Item, Source, Task

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


BOOK = {"context": "The long book.", "input": "Who baked?", "answer": ["Old Ann", "Ann"]}
CHOICE = BOOK | {"answer": ["A miller"], "options": ["A smith", "A miller", "A monk", "A maid"]}
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


def nq_row(i: int, **changes: Any) -> dict[str, Any]:
    gold = {"title": f"Page {i}", "text": f"Person{i} was born in year{i} .", "isgold": True}
    near = {"title": "Other", "text": "Not this one.", "isgold": False}
    row = {"question": f"when was person{i} born", "answers": [f"Year{i}"], "ctxs": [near, gold]}
    return row | changes


def dialogue(i: int, task: str = "CM") -> dict[str, Any]:
    history = [{"user": f"ask {i} {k}", "bot": f"tell {i} {k}"} for k in range(3)]
    return {"task": task, "id": i, "history": history}
