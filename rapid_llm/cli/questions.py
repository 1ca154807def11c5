"""Answer many questions from a file, and write each answer as a JSON object on a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rapid_llm.cli.documents import warned
from rapid_llm.cli.flags import with_flags
from rapid_llm.console import show
from rapid_llm.errors import (
    DocumentError,
    InvalidParameterError,
    MissingDependencyError,
    ModelError,
    RapidError,
)

_OF_ALL = (MissingDependencyError, ModelError)
"""What is wrong with the models, and so with all questions."""


@dataclass(frozen=True)
class Question:
    """A question, and the id of its answer: ``id`` in the file, or its number from 1."""

    id: Any
    text: str


def read_questions(path: str) -> list[Question]:
    """Read a file with one question or JSON object per line; ``-`` is standard input.

    The file is JSON if its first line begins with a brace. Blank lines are skipped.

    Raises:
        DocumentError: the file cannot be read, or is empty.
        InvalidParameterError: a line is not an object with a ``question`` that is text.
    """
    from rapid_llm.context.documents import read_document

    text = warned(lambda: read_document(path, may_be_blank=True))
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DocumentError(
            f"--questions {path} holds no question: put one on each line, as plain text or as "
            '{"question": "…", "id": "…"}'
        )
    as_json = lines[0][1].startswith("{")
    return [
        _from_json(line, f"line {place} of {path}", number) if as_json else Question(number, line)
        for number, (place, line) in enumerate(lines, 1)
    ]


def _from_json(line: str, place: str, number: int) -> Question:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise InvalidParameterError(
            f"{place} is not JSON ({error}): give an object a line, or plain questions alone"
        ) from None
    question = given.get("question") if isinstance(given, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise InvalidParameterError(
            f'{place} has no question: give an object like {{"question": "…", "id": "…"}}'
        )
    return Question(given.get("id", number), question)


def print_answers(
    questions: Iterable[Question], answers: Iterable[dict[str, Any] | Exception]
) -> int:
    """Print a JSON object for each question as soon as it is answered.

    The object of a question that failed has an ``error``, and the next question follows. Errors of
    the models, which would repeat for every question, are raised.

    Args:
        questions: the questions.
        answers: what is printed of each answer, or its error.

    Returns:
        Exit status: 1 if a question failed, else 0.
    """
    asked = failed = 0
    for question, answer in zip(questions, answers, strict=True):
        asked += 1
        if isinstance(answer, Exception):
            if not isinstance(answer, RapidError) or isinstance(answer, _OF_ALL):
                raise answer
            outcome, failed = {"error": with_flags(str(answer))}, failed + 1
        else:
            outcome = answer
        line = {"id": question.id, "question": question.text} | outcome
        print(json.dumps(line), flush=True)
    if failed:
        show(f"{failed:,} of {asked:,} questions failed: see their errors", stderr=True)
    return 1 if failed else 0
