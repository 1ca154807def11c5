"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): questions with four choices on long texts.

Prompts, lengths of answers and the rule for reading a choice are those of its repository,
THUDM/LongBench; a local file is its ``data.json``, or the same objects as JSON Lines.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import Literal

from pydantic import BaseModel, Field

from rapid_llm.evaluation.tasks.base import ANSWER, CONTEXT, Item, Source, Task
from rapid_llm.evaluation.tasks.data import Text, locate, read_rows

REPOSITORY = "THUDM/LongBench-v2"

_READ = "Please read the following text and answer the question"
_TEXT = f"<text>\n{CONTEXT}\n</text>"
_FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'
_THINK = "Let\u2019s think step by step:"
PROMPT = f"{_READ} below.\n\n{_TEXT}\n\n{{asked}}\n\n{_FORMAT}"
THINKING_PROMPT = f"{_READ}s below.\n\n{_TEXT}\n\n{{asked}}\n\n{_THINK}"
# The benchmark leaves the text out of the second prompt, which has the thoughts instead.
SECOND_PROMPT = (
    f"{_READ}s below.\n\nThe text is too long and omitted here.\n\n{{asked}}\n\n{_THINK} {ANSWER}"
    f"\n\nBased on the above, what is the single, most likely answer choice? {_FORMAT}"
)


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
    rows = islice(read_rows(locate(source.data, "data.json", REPOSITORY), _Row), source.limit)
    items = [_item(row, thinks=name.endswith("-cot")) for row in rows]
    return Task(name, {"accuracy": "rate"}, items, _score)


def _item(row: _Row, thinks: bool) -> Item:
    question = row.question.strip()
    texts = (row.choice_a, row.choice_b, row.choice_c, row.choice_d)
    choices = {letter: text.strip() for letter, text in zip("ABCD", texts, strict=True)}
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in choices.items())
    asked = f"What is the correct answer to this question: {question}\nChoices:\n{listed}"
    prompt = (THINKING_PROMPT if thinks else PROMPT).replace("{asked}", asked)
    return Item(
        id=row.id,
        context=row.context.strip(),
        query=question,
        messages=({"role": "user", "content": prompt},),
        references=(choices[row.answer],),
        max_new_tokens=1024 if thinks else 128,
        follow_up=SECOND_PROMPT.replace("{asked}", asked) if thinks else None,
        groups={"length": row.length, "difficulty": row.difficulty},
        meta={"letter": row.answer},
    )


def extract_choice(answer: str) -> str | None:
    """The letter after "The correct answer is", by the benchmark's rule; None without one."""
    text, stated = answer.replace("*", ""), "The correct answer is "
    match = re.search(rf"{stated}\(([A-D])\)", text) or re.search(f"{stated}([A-D])", text)
    return match and match[1]


def _score(item: Item, answer: str) -> dict[str, float]:
    return {"accuracy": float(extract_choice(answer) == item.meta["letter"])}
