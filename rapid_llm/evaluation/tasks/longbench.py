"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): questions with four choices on long texts.

Prompts, lengths of answers and how a choice is read are those of its repository, THUDM/LongBench;
a local file is its ``data.json``, or the same objects as JSON Lines.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from rapid_llm.evaluation.tasks.base import ANSWER, CONTEXT, Benchmark, Item
from rapid_llm.evaluation.tasks.data import Row, locate, read_rows

REPOSITORY = "THUDM/LongBench-v2"
LETTERS = "ABCD"
LENGTHS = ("short", "medium", "long")
DIFFICULTIES = ("easy", "hard")

_FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'
_THINK = "Let\u2019s think step by step:"


def load(name: str, data: Path | None, limit: int | None) -> Benchmark:
    """The first ``limit`` items, asked for the answer or (``longbench-v2-cot``) for thoughts first.

    Raises:
        DataError: the file is missing, or lacks what it should hold.
    """
    rows = islice(read_rows(locate(data, "data.json", REPOSITORY)), limit)
    thinks = name.endswith("-cot")
    return Benchmark(name, {"accuracy": "rate"}, [_item(row, thinks) for row in rows], _score)


def _item(row: Row, thinks: bool) -> Item:
    question = row.text("question").strip()
    choices = {letter: row.text(f"choice_{letter}").strip() for letter in LETTERS}
    letter = row.choice("answer", LETTERS)
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in choices.items())
    asked = f"What is the correct answer to this question: {question}\nChoices:\n{listed}"
    text = f"<text>\n{CONTEXT}\n</text>"
    read = "Please read the following text and answer the question"
    if thinks:
        prompt = f"{read}s below.\n\n{text}\n\n{asked}\n\n{_THINK}"
        # Its authors leave the text out of the second prompt: the thoughts stand for it.
        follow_up = (
            f"{read}s below.\n\nThe text is too long and omitted here.\n\n{asked}\n\n"
            f"{_THINK} {ANSWER}\n\nBased on the above, what is the single, most likely answer "
            f"choice? {_FORMAT}"
        )
    else:
        prompt, follow_up = f"{read} below.\n\n{text}\n\n{asked}\n\n{_FORMAT}", None
    return Item(
        id=row.text("_id"),
        context=row.text("context").strip(),
        query=question,
        messages=({"role": "user", "content": prompt},),
        references=(choices[letter],),
        max_new_tokens=1024 if thinks else 128,
        follow_up=follow_up,
        follow_up_tokens=128,
        groups={
            "length": row.choice("length", LENGTHS),
            "difficulty": row.choice("difficulty", DIFFICULTIES),
        },
        meta={"letter": letter},
    )


def extract_choice(answer: str) -> str | None:
    """The letter after "The correct answer is", as the benchmark reads it; None without one."""
    text = answer.replace("*", "")
    stated = "The correct answer is "
    match = re.search(rf"{stated}\(([A-D])\)", text) or re.search(f"{stated}([A-D])", text)
    return match and match[1]


def _score(item: Item, answer: str) -> dict[str, float]:
    return {"accuracy": float(extract_choice(answer) == item.meta["letter"])}
