"""∞Bench (Zhang et al. 2024, arXiv 2402.13718): books of 100K tokens and more.

Prompts, lengths of answers and scores are those of its repository, OpenBMB/InfiniteBench (of its
prompts the chat ones); local files are its own, such as ``longbook_qa_eng.jsonl``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rapid_llm.evaluation.scoring import rouge_lsum, token_f1
from rapid_llm.evaluation.tasks.base import CONTEXT, Benchmark, Item, Message, MetricKind
from rapid_llm.evaluation.tasks.data import Row, locate, read_rows

REPOSITORY = "xinrongzhang2022/InfiniteBench"
LETTERS = "ABCD"

_HIDDEN = (
    "There is an important info hidden inside a lot of irrelevant text. Find it{}. I will quiz "
    "you about the important information there."
)
_BOOK = "Read the book below and answer a question."
_CHOICE = (
    "Only one of the following options is correct, tell me the answer using one single letter "
    "(A, B, C, or D). Don't say anything else.\n{options}"
)


@dataclass(frozen=True)
class _Part:
    """One of the benchmark's tasks.

    Attributes:
        file: without its suffix.
        max_new_tokens: of an answer.
        before: what the user's message says before the context.
        after: what it says after it, with ``{input}`` and ``{options}`` where they go.
        metric: its name and kind.
        score: of an answer.
    """

    file: str
    max_new_tokens: int
    before: str
    after: str
    metric: tuple[str, MetricKind]
    score: Callable[[Item, str], float]


def load(name: str, data: Path | None, limit: int | None) -> Benchmark:
    """The first ``limit`` items of one of :data:`PARTS`.

    Raises:
        DataError: the file is missing, or lacks what it should hold.
    """
    part = PARTS[name]
    rows = islice(read_rows(locate(data, f"{part.file}.jsonl", REPOSITORY)), limit)
    metric, kind = part.metric
    return Benchmark(
        f"infinitebench-{name}",
        {metric: kind},
        [_item(part, number, row) for number, row in enumerate(rows, 1)],
        lambda item, answer: {metric: float(part.score(item, answer))},
    )


def _item(part: _Part, number: int, row: Row) -> Item:
    question = row.text("input") if "{input}" in part.after else ""
    options = _options(row) if "{options}" in part.after else []
    answers = row.texts("answer")
    right = [answer for answer in answers if answer in options]
    if options and not right:
        raise row.wrong("answer", "is none of the field 'options'")
    listed = "\n".join(f"{letter}. {o}" for letter, o in zip(LETTERS, options, strict=False))
    after = part.after.replace("{options}", listed).replace("{input}", question)
    return Item(
        id=str(number),
        context=row.text("context"),
        query=question or part.before,
        messages=_messages(f"{part.before}\n\n{CONTEXT}\n\n{after}".rstrip("\n")),
        references=tuple(right) or answers,
        max_new_tokens=part.max_new_tokens,
        meta={"letter": LETTERS[options.index(right[0])]} if right else {},
    )


def _messages(content: str) -> tuple[Message, ...]:
    return (
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": content},
    )


def _options(row: Row) -> list[str]:
    options = list(row.texts("options"))
    if len(options) != len(LETTERS):
        raise row.wrong("options", f"has {len(options)} texts, not {len(LETTERS)}")
    return options


def chose(answer: str, letter: str, option: str) -> bool:
    """Whether an answer picks the right option, as the benchmark reads it.

    Its first character, if that is a letter of an option; else what follows the first of
    ``answer is:`` and the like; else the first word made of such letters.
    """
    answer = answer.strip()
    if answer[:1] in LETTERS:
        return answer[:1] == letter
    if answer == option:
        return True
    words = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", answer))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        if prefix in words:
            after = words.partition(prefix)[2][1:]
            return after.startswith((letter, option))
    return next((word for word in words.split() if word in LETTERS), None) == letter


def first_number(answer: str) -> str | None:
    """The first run of digits, as the benchmark reads keys and numbers."""
    match = re.search("[0-9]+", answer)
    return match and match[0]


def values(answer: str) -> list[str]:
    """The words of an answer, as the benchmark looks for a value among them."""
    return re.sub(r"[\n:\"'.,?!{}]", " ", answer).split()


def _number_found(item: Item, answer: str) -> float:
    return first_number(answer) == item.references[0]


PARTS = {
    "qa": _Part(
        "longbook_qa_eng",
        40,
        _BOOK,
        "Question: {input}\n\nBe very concise.",
        ("f1", "mean"),
        lambda item, answer: token_f1(answer, item.references),
    ),
    "mc": _Part(
        "longbook_choice_eng",
        40,
        "Read the book and answer the question.",
        "Question: {input}\n\n" + _CHOICE,
        ("accuracy", "rate"),
        lambda item, answer: chose(answer, item.meta["letter"], item.references[0]),
    ),
    "sum": _Part(
        "longbook_sum_eng",
        1200,
        "Summarize the following book.",
        "",
        ("rouge_lsum", "mean"),
        lambda item, answer: rouge_lsum(answer, item.references),
    ),
    "passkey": _Part(
        "passkey",
        6,
        _HIDDEN.format(" and memorize them"),
        "{input}",
        ("accuracy", "rate"),
        _number_found,
    ),
    "number": _Part(
        "number_string",
        12,
        _HIDDEN.format(""),
        "{input}",
        ("accuracy", "rate"),
        _number_found,
    ),
    "kv": _Part(
        "kv_retrieval",
        50,
        "Extract the value corresponding to the specified key in the JSON object below.",
        "{input}",
        ("accuracy", "rate"),
        lambda item, answer: item.references[0] in values(answer),
    ),
}
