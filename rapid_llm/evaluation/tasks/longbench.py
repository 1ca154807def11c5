"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): questions with four choices on long texts.

Prompts, lengths of answers and the rule for reading a choice are those of its repository,
THUDM/LongBench; a local file is its ``data.json``, or the same objects as JSON Lines.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import Literal

from pydantic import BaseModel, Field

from rapid_llm.evaluation.data import Text, locate, read_rows
from rapid_llm.evaluation.tasks.base import Item, Source, Task, prompt

REPOSITORY = "THUDM/LongBench-v2"


class _Row(BaseModel):
    id: Text = Field(alias="_id")
    question: Text
    choice_a: Text = Field(alias="choice_A")
    choice_b: Text = Field(alias="choice_B")
    choice_c: Text = Field(alias="choice_C")
    choice_d: Text = Field(alias="choice_D")
    answer: Literal["A", "B", "C", "D"]
    context: Text
    length: Literal["short", "medium", "long"]
    difficulty: Literal["easy", "hard"]


def load(name: str, source: Source) -> Task:
    """Load the items, with a prompt for the answer or (``longbench-v2-cot``) for thoughts first."""
    rows = read_rows(locate(source.data, "data.json", REPOSITORY), _Row)
    items = [_item(row, name) for row in islice(rows, source.limit)]
    return Task(
        name,
        {"accuracy": "rate"},
        items,
        lambda item, answer: {"accuracy": float(extract_choice(answer) == item.meta["letter"])},
    )


def _item(row: _Row, name: str) -> Item:
    question, thinks = row.question.strip(), name.endswith("-cot")
    texts = (row.choice_a, row.choice_b, row.choice_c, row.choice_d)
    choices = {letter: text.strip() for letter, text in zip("ABCD", texts, strict=True)}
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in choices.items())
    asked = f"What is the correct answer to this question: {question}\nChoices:\n{listed}"
    return Item(
        id=row.id,
        context=row.context.strip(),
        query=question,
        messages=({"role": "user", "content": prompt(name, asked)},),
        references=(choices[row.answer],),
        max_new_tokens=1024 if thinks else 128,
        # The benchmark leaves the text out of the second prompt, which has the thoughts instead.
        follow_up=prompt(f"{name}, then", asked) if thinks else None,
        groups={"length": row.length, "difficulty": row.difficulty},
        meta={"letter": row.answer},
    )


def extract_choice(answer: str) -> str | None:
    """The letter after "The correct answer is", by the benchmark's rule; None without one."""
    text, stated = answer.replace("*", ""), "The correct answer is "
    match = re.search(rf"{stated}\(([A-D])\)", text) or re.search(f"{stated}([A-D])", text)
    return match and match[1]
