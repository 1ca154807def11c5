"""∞Bench (Zhang et al. 2024, arXiv 2402.13718): books of 100K tokens and more.

Prompts (the chat ones), lengths of answers and scores are those of its repository,
OpenBMB/InfiniteBench; local files are its own, such as ``longbook_qa_eng.jsonl``.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from rapid_llm.evaluation.data import Text, Texts, locate, read_rows
from rapid_llm.evaluation.scoring import rouge, token_f1
from rapid_llm.evaluation.tasks.base import CONTEXT, Item, Source, Task
from rapid_llm.folders import packaged_text

REPOSITORY = "xinrongzhang2022/InfiniteBench"
LETTERS = "ABCD"
PARTS: dict[str, dict[str, Any]] = json.loads(packaged_text("infinitebench.json"))
"""File, prompt, maximum length of an answer and metric of each of the benchmark's tasks."""


class _Book(BaseModel):
    context: Text
    answer: Texts
    options: tuple[Text, ...] = ()


class _Question(_Book):
    input: Text


class _Choice(_Question):
    options: Annotated[tuple[Text, ...], Field(min_length=4, max_length=4)]

    @model_validator(mode="after")
    def _holds_the_answer(self) -> _Choice:
        if set(self.answer).isdisjoint(self.options):
            raise ValueError("no 'answer' is one of the 'options'")
        return self


def load(name: str, source: Source) -> Task:
    """Load ``infinitebench-`` and one of :data:`PARTS`."""
    kind = name.removeprefix("infinitebench-")
    part = PARTS[kind]
    path = locate(source.data, f"{part['file']}.jsonl", REPOSITORY)
    models: dict[str, type[_Book]] = {"sum": _Book, "mc": _Choice}
    rows = read_rows(path, models.get(kind, _Question))
    items = [_item(part, number, row) for number, row in enumerate(islice(rows, source.limit), 1)]
    metric = part["metric"]
    return Task(
        name,
        {metric: "rate" if metric == "accuracy" else "mean"},
        items,
        lambda item, answer: {metric: float(_score(kind, item, answer))},
    )


def _item(part: dict[str, Any], number: int, row: _Book) -> Item:
    question = row.input if isinstance(row, _Question) else ""
    right = [answer for answer in row.answer if answer in row.options]
    listed = "\n".join(f"{letter}. {o}" for letter, o in zip(LETTERS, row.options, strict=False))
    after = part["after"].replace("{options}", listed).replace("{input}", question)
    content = f"{part['before']}\n\n{CONTEXT}\n\n{after}".rstrip("\n")
    return Item(
        id=str(number),
        context=row.context,
        query=question or part["before"],
        messages=(
            {"role": "system", "content": "You are a helpful assistant"},
            {"role": "user", "content": content},
        ),
        references=tuple(right) or row.answer,
        max_new_tokens=part["max_new_tokens"],
        meta={"letter": LETTERS[row.options.index(right[0])]} if right else {},
    )


def _score(kind: str, item: Item, answer: str) -> float:
    if kind == "qa":
        return token_f1(answer, item.references)
    if kind == "sum":
        return rouge("rougeLsum", answer, item.references)
    if kind == "mc":
        return chose(answer, item.meta["letter"], item.references[0])
    read = values(answer) if kind == "kv" else [first_number(answer)]
    return item.references[0] in read


def chose(answer: str, letter: str, option: str) -> bool:
    """Whether an answer picks the right option, by the rules of the benchmark.

    The pick is the first character, if it is the letter of an option; else the text after
    ``answer is:`` or a similar phrase; else the first word of such letters. ``letter`` and
    ``option`` are those of the right one.
    """
    answer = answer.strip()
    if answer[:1] in LETTERS:
        return answer[:1] == letter
    if answer == option:
        return True
    words = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", answer))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        if prefix in words:
            return words.partition(prefix)[2][1:].startswith((letter, option))
    return next((word for word in words.split() if word in LETTERS), None) == letter


def first_number(answer: str) -> str | None:
    """The first run of digits, in which the benchmark looks for keys and numbers."""
    match = re.search("[0-9]+", answer)
    return match and match[0]


def values(answer: str) -> list[str]:
    """The words of an answer, among which the benchmark looks for a value."""
    return re.sub(r"[\n:\"'.,?!{}]", " ", answer).split()
